//! `adapter_config.json` and `adapter_model.safetensors`, as PEFT writes and reads them.

#[cfg(test)]
mod tests;

use super::names::{self, Part};
use super::tokens::counting;
use super::{InitLoraWeights, LoraConfig, Start, TokenIndices, convert};
use crate::PeftConfig;
use crate::base_copies::OwnNames;
use crate::files::{self, CONFIG_FILE, Weights};
use crate::modules::{EMBEDDINGS, HEADS};
use crate::target::{Target, TargetModules, last_segment};
use ferrotune_core::adapter::Site;
use ferrotune_core::io::{self, FileDType, TensorData};
use ferrotune_core::params::{FlatBuffer, ParamSpec, Segment};
use ferrotune_core::{Error, Result};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Where an update of a changed base has what it started from.
const INITIAL: &str = "initial_adapter";

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
    let mut tensors = BTreeMap::new();
    for (id, segment) in lora_segments(params) {
        let ParamSpec {
            name, also, shape, ..
        } = &segment.spec;
        let data = TensorData {
            dtype: FileDType::F32,
            shape: segment.spec.file_shape(),
            bytes: match params.file_values(id) {
                Cow::Borrowed(values) => Cow::Borrowed(bytemuck::cast_slice(values)),
                Cow::Owned(values) => Cow::Owned(bytemuck::cast_slice(&values).to_vec()),
            },
        };
        tensors.insert(name.clone(), data);
        // PEFT misses either name of what two modules share.
        if let Some(also) = also {
            tensors.insert(
                also.clone(),
                TensorData::from_f32(params.get(id), shape.clone()),
            );
        }
    }
    files::write_tensors(directory, &tensors)
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

/// Writes what a run started from, which an update of a changed base needs, as PEFT asks for it when it is to
/// convert the update.
pub(super) fn save_start(config: &LoraConfig, start: &Start, directory: &Path) -> Result<()> {
    let config = LoraConfig {
        init_lora_weights: InitLoraWeights::Kaiming,
        ..config.clone()
    };
    save(&config, start.factors(), &directory.join(INITIAL))
}

/// How an adapter lies in a directory.
enum Form {
    /// As the run has it.
    Own,
    /// As a plain LoRA of the base, where the run changed that.
    Plain,
}

/// The configuration in `directory`.
fn saved_config(directory: &Path) -> Result<LoraConfig> {
    match PeftConfig::load(directory)? {
        PeftConfig::Lora(saved) => Ok(saved),
        _ => {
            let message = "is of another method than LORA";
            Err(Error::adapter(directory.join(CONFIG_FILE), message))
        }
    }
}

/// Which form the adapter in `directory`, `saved` there, has, if it is one of `config`.
fn form(config: &LoraConfig, mut saved: LoraConfig, directory: &Path) -> Result<Form> {
    let config_path = directory.join(CONFIG_FILE);
    saved.trainable_token_indices = saved.trainable_token_indices.map(TokenIndices::distinct);
    let (ours, theirs) = (config.init_lora_weights, saved.init_lora_weights);
    let plain = ours.subtracts() && theirs == InitLoraWeights::Kaiming;
    let (expected, form) = if plain {
        (&convert::config(config), Form::Plain)
    } else {
        (config, Form::Own)
    };
    let unlike = |key: &str, theirs: &str, ours: &str| {
        let message = format!(
            "`{key}` is {theirs}, but this run has {ours}; the same tensors would give a different model"
        );
        Err(Error::adapter(&config_path, message))
    };
    if !plain && ours != theirs && (ours.changes_base() || theirs.changes_base()) {
        return unlike("init_lora_weights", &theirs.name(), &ours.name());
    }
    match expected.difference(&saved) {
        None => Ok(form),
        Some((key, ours, theirs)) => unlike(key, &theirs, &ours),
    }
}

/// Reads both files into `params`, strictly. Returns what the run started from, where that is there.
pub(super) fn load(
    config: &LoraConfig,
    params: &mut FlatBuffer,
    directory: &Path,
) -> Result<Option<Start>> {
    let saved = saved_config(directory)?;
    let shares = Shares {
        tied: config.ensure_weight_tying,
        tokens: saved.trainable_token_indices.clone(),
    };
    match form(config, saved, directory)? {
        Form::Own => {
            read_all(params, directory, &shares)?;
            let subtracts = config.init_lora_weights.subtracts();
            let start = subtracts.then(|| start(config, directory));
            Ok(start.transpose()?.flatten())
        }
        Form::Plain => {
            let mut plain = FlatBuffer::zeros(&convert::layout(params.layout())?);
            read_all(&mut plain, directory, &shares)?;
            convert::split(&plain, params).map(Some)
        }
    }
}

/// What the run that wrote `directory` started from, where that changed the base and is there.
pub(super) fn start(config: &LoraConfig, directory: &Path) -> Result<Option<Start>> {
    let init = config.init_lora_weights;
    if let InitLoraWeights::Eva(_) = init {
        // Its ranks are what a run that goes on must know; the values are read later.
        return Start::read_factors(directory).map(Some);
    }
    if !init.subtracts() {
        return Ok(None);
    }
    if let Form::Plain = form(config, saved_config(directory)?, directory)? {
        return Start::read_half(directory).map(Some);
    }
    let initial = directory.join(INITIAL);
    if initial.is_dir() {
        return Start::read(&initial).map(Some);
    }
    if init.is_drawn() {
        let message = format!(
            "`init_lora_weights` is {}, which starts from random numbers that nobody can draw again, and \
             `{INITIAL}/` with that start is not there; give it, or the adapter as a plain LoRA (PEFT's \
             `path_initial_model_for_weight_conversion`)",
            init.name()
        );
        return Err(Error::adapter(directory.join(CONFIG_FILE), message));
    }
    Ok(None)
}

/// Reads every tensor of `params` that is an adapter's from the weights file, strictly.
pub(crate) fn read_tensors(params: &mut FlatBuffer, directory: &Path) -> Result<()> {
    read_all(params, directory, &Shares::default())
}

/// What tensors of a file have in common.
#[derive(Default)]
struct Shares {
    /// Head and embedding are one.
    tied: bool,
    /// The rows that the file has, of which some may be of one token.
    tokens: Option<TokenIndices>,
}

/// The same, with the copies that PEFT writes.
fn read_all(params: &mut FlatBuffer, directory: &Path, shares: &Shares) -> Result<()> {
    let file = Weights::open(directory)?;
    let layout = params.layout().clone();
    let expected: BTreeSet<String> = lora_segments(params)
        .map(|(_, segment)| segment.spec.name.clone())
        .collect();
    let own = OwnNames::of(&layout);
    let twin = |name: &str| twin(name, &expected, shares.tied);
    file.require_same_names(&expected, |name| {
        own.are_beside_copy(name) || twin(name).is_some()
    })?;
    for (id, segment) in layout.by_name() {
        if Part::of(&segment.spec.name).is_some() {
            let values = match &shares.tokens {
                Some(tokens) => read_rows(&file, &segment.spec, tokens)?,
                None => file.read(&segment.spec.name, &segment.spec.file_shape())?,
            };
            params.set_file_values(id, &values);
        }
    }
    let is_repeated = |name: &&str| !expected.contains(*name) && !own.are_beside_copy(name);
    let copies = file.file.names().filter(is_repeated);
    for (name, twin) in copies.filter_map(|name| Some((name, twin(name)?))) {
        // A head's factors are the transposes of the embedding's in files, and the same here.
        let own = layout.find(&twin).map_or(&[][..], |id| params.get(id));
        if file.read_flat(name, own.len())? != own {
            let message = format!("`{name}` and `{twin}` differ, but are one parameter");
            return Err(Error::adapter(&file.path, message));
        }
    }
    Ok(())
}

/// A tensor; where it has the rows of `tokens`, of those of one token the row that counts.
fn read_rows(file: &Weights, spec: &ParamSpec, tokens: &TokenIndices) -> Result<Vec<f32>> {
    let shape = spec.file_shape();
    let listed = match names::parse(&spec.name) {
        Some((module, Part::TokenRows)) => tokens.of(module),
        _ => None,
    };
    let (Some(ids), &[_, width]) = (listed, shape.as_slice()) else {
        return file.read(&spec.name, &shape);
    };
    let values = file.read(&spec.name, &[ids.len(), width])?;
    let rows = counting(ids).flat_map(|at| &values[at * width..(at + 1) * width]);
    Ok(rows.copied().collect())
}

/// The expected tensor that `name` repeats: of a head that is `tied`, or has the same trained rows, the embedding's; of
/// a module trained as a whole, what PEFT saves of it once more.
fn twin(name: &str, expected: &BTreeSet<String>, tied: bool) -> Option<String> {
    let (module, part) = names::parse(name)?;
    if let Some(saved) = names::without(module, names::SAVED) {
        // Inside of a module, the name of the adapter stays.
        let unnamed = names::without(&saved, "default");
        let saved = names::tensor(&unnamed.unwrap_or(saved), part);
        let is_own = expected.contains(&saved);
        return is_own
            .then(|| saved.clone())
            .or_else(|| twin(&saved, expected, tied));
    }
    let of = match part {
        Part::A => Part::EmbeddingB,
        Part::B => Part::EmbeddingA,
        Part::Weight | Part::TokenRows | Part::TokenRowsAlone => part,
        _ => return None,
    };
    let is_table = |other: &str| EMBEDDINGS.contains(&last_segment(other));
    let twin = |other: &&String| names::parse(other).is_some_and(|(m, p)| p == of && is_table(m));
    let shares = tied || matches!(part, Part::TokenRows | Part::TokenRowsAlone);
    let is_head = shares && HEADS.contains(&last_segment(module));
    expected.iter().find(twin).filter(|_| is_head).cloned()
}

fn lora_segments(
    params: &FlatBuffer,
) -> impl Iterator<Item = (ferrotune_core::params::ParamId, &Segment)> {
    params
        .layout()
        .by_name()
        .filter(|(_, segment)| Part::of(&segment.spec.name).is_some())
}
