//! `adapter_config.json` and `adapter_model.safetensors`, as PEFT writes and reads them.

#[cfg(test)]
mod tests;

use super::LoraConfig;
use super::names::{self, Part};
use crate::PeftConfig;
use crate::target::{Target, TargetModules};
use ferrotune_core::adapter::Site;
use ferrotune_core::io::{self, FileDType, SafetensorsFile, TensorData};
use ferrotune_core::params::{FlatBuffer, Segment};
use ferrotune_core::{Error, Result, suggest};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Configuration of an adapter.
pub(crate) const CONFIG_FILE: &str = "adapter_config.json";
/// Tensors of an adapter.
const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// Tensors of an adapter as a pickle, which is never read.
const PICKLE_FILE: &str = "adapter_model.bin";

/// Writes both files. The configuration comes last: with it the adapter is complete.
pub(super) fn save(config: &LoraConfig, params: &FlatBuffer, directory: &Path) -> Result<()> {
    write_tensors(params, directory)?;
    let mut config = config.clone();
    if config.target_modules == Some(TargetModules::AllLinear) {
        // PEFT, too, writes what the shorthand stood for: readers other than PEFT do not know it.
        config.target_modules = Some(TargetModules::List(adapted_names(params)));
    }
    io::write_file(&directory.join(CONFIG_FILE), config.to_json().as_bytes())
}

/// Writes every tensor of `params` that is an adapter's, f32, under PEFT's names.
pub(crate) fn write_tensors(params: &FlatBuffer, directory: &Path) -> Result<()> {
    std::fs::create_dir_all(directory).map_err(Error::write(directory))?;
    let tensors: BTreeMap<String, TensorData<'_>> = lora_segments(params)
        .map(|(id, segment)| {
            let data = TensorData {
                dtype: FileDType::F32,
                shape: segment.spec.file_shape(),
                bytes: match params.file_values(id) {
                    Cow::Borrowed(values) => Cow::Borrowed(bytemuck::cast_slice(values)),
                    Cow::Owned(values) => Cow::Owned(bytemuck::cast_slice(&values).to_vec()),
                },
            };
            (segment.spec.name.clone(), data)
        })
        .collect();
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    io::write_safetensors(&directory.join(WEIGHTS_FILE), &tensors, &metadata)
}

/// The last path segments of the adapted modules.
fn adapted_names(params: &FlatBuffer) -> Vec<String> {
    let names: BTreeSet<&str> = lora_segments(params)
        .filter_map(|(_, segment)| names::parse(&segment.spec.name))
        .filter(|(_, part)| *part == Part::A)
        .map(|(module, _)| last_segment(module))
        .collect();
    names.into_iter().map(str::to_owned).collect()
}

fn last_segment(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or(module)
}

/// Refuses an `all-linear` whose modules cannot be told from others by the end of their path:
/// [`adapted_names`] would then name too much.
pub(super) fn require_expressible(sites: &[Site], targets: &[Target<'_>]) -> Result<()> {
    let ends: BTreeSet<&str> = targets
        .iter()
        .map(|target| last_segment(&target.site.name))
        .collect();
    let is_linear =
        |site: &Site| site.kind == ferrotune_core::adapter::SiteKind::Linear && !site.output_head;
    match sites
        .iter()
        .find(|site| !is_linear(site) && ends.contains(last_segment(&site.name)))
    {
        None => Ok(()),
        Some(site) => Err(Error::config(
            "target_modules",
            format!(
                "`all-linear` cannot be written as names, because `{}`, which it leaves out, ends \
                 like a linear layer; list the modules instead",
                site.name
            ),
        )),
    }
}

/// Reads both files into `params`, strictly.
pub(super) fn load(config: &LoraConfig, params: &mut FlatBuffer, directory: &Path) -> Result<()> {
    let config_path = directory.join(CONFIG_FILE);
    let PeftConfig::Lora(saved) = PeftConfig::load(directory)? else {
        return Err(Error::adapter(
            config_path,
            "is of another method than LORA",
        ));
    };
    if let Some((key, ours, theirs)) = config.difference(&saved) {
        return Err(Error::adapter(
            config_path,
            format!(
                "`{key}` is {theirs}, but this run has {ours}; the same tensors would give a different model"
            ),
        ));
    }
    read_tensors(params, directory)
}

/// Reads every tensor of `params` that is an adapter's from the weights file, strictly.
pub(crate) fn read_tensors(params: &mut FlatBuffer, directory: &Path) -> Result<()> {
    let file = open_weights(directory)?;
    let layout = params.layout().clone();
    let expected: BTreeMap<&str, &Segment> = lora_segments(params)
        .map(|(_, segment)| (segment.spec.name.as_str(), segment))
        .collect();
    require_same_names(&file, &expected)?;
    for (id, segment) in layout.by_name() {
        if Part::of(&segment.spec.name).is_some() {
            let values = file.read(&segment.spec.name, &segment.spec.file_shape())?;
            params.set_file_values(id, &values);
        }
    }
    Ok(())
}

/// Whether `name` is a tensor that PEFT writes beside an adapter and that changes nothing: the base's
/// weight of an adapted table, and what a head has of the embedding's update.
fn repeats_another(name: &str, expected: &BTreeMap<&str, &Segment>) -> bool {
    let has = |module: &str, part| expected.contains_key(names::tensor(module, part).as_str());
    match names::parse(name) {
        Some((module, Part::AdaptedWeight)) => {
            has(module, Part::EmbeddingA) || has(module, Part::A)
        }
        _ => false,
    }
}

fn lora_segments(
    params: &FlatBuffer,
) -> impl Iterator<Item = (ferrotune_core::params::ParamId, &Segment)> {
    params
        .layout()
        .by_name()
        .filter(|(_, segment)| Part::of(&segment.spec.name).is_some())
}

/// The weights file, open.
pub(crate) struct Weights {
    pub(crate) path: PathBuf,
    pub(crate) file: SafetensorsFile,
}

pub(crate) fn open_weights(directory: &Path) -> Result<Weights> {
    let path = directory.join(WEIGHTS_FILE);
    if !path.exists() && directory.join(PICKLE_FILE).exists() {
        return Err(Error::adapter(
            directory.join(PICKLE_FILE),
            format!(
                "is a pickle, which can run code when read, and `{WEIGHTS_FILE}` is missing; \
                 save the adapter again with PEFT, which writes safetensors"
            ),
        ));
    }
    let file = SafetensorsFile::open(&path).map_err(as_adapter)?;
    Ok(Weights { path, file })
}

/// What is wrong with the weights of an adapter is no fault of the model.
fn as_adapter(error: Error) -> Error {
    match error {
        Error::Model { path, message } => Error::Adapter { path, message },
        other => other,
    }
}

impl Weights {
    /// A finite tensor of a known shape.
    pub(crate) fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let meta = self
            .file
            .meta(name)
            .ok_or_else(|| Error::adapter(&self.path, format!("`{name}` is missing")))?;
        if meta.shape != shape {
            return Err(Error::adapter(
                &self.path,
                format!("`{name}` has shape {:?}, expected {shape:?}", meta.shape),
            ));
        }
        let values = self.file.read_f32(name).map_err(as_adapter)?;
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(values),
            Some(at) => Err(Error::adapter(
                &self.path,
                format!(
                    "`{name}` holds {} at element {at}: the adapter is damaged or its training diverged",
                    values[at]
                ),
            )),
        }
    }
}

/// Refuses a file that lacks a tensor, or holds one that has no place.
fn require_same_names(file: &Weights, expected: &BTreeMap<&str, &Segment>) -> Result<()> {
    let present: BTreeSet<&str> = file.file.names().collect();
    let missing: Vec<&str> = expected
        .keys()
        .copied()
        .filter(|name| !present.contains(name))
        .collect();
    let extra: Vec<&str> = present
        .iter()
        .copied()
        .filter(|name| !expected.contains_key(name) && !repeats_another(name, expected))
        .collect();
    if let Some(name) = missing.first() {
        return Err(Error::adapter(
            &file.path,
            format!(
                "{} of {} expected tensors are missing, the first is `{name}`{}",
                missing.len(),
                expected.len(),
                suggest::did_you_mean(name, extra.iter().copied()),
            ),
        ));
    }
    if let Some(name) = extra.first() {
        return Err(Error::adapter(
            &file.path,
            format!(
                "{} tensors have no place in this model and configuration, the first is `{name}`{}",
                extra.len(),
                suggest::did_you_mean(name, expected.keys().copied()),
            ),
        ));
    }
    Ok(())
}
