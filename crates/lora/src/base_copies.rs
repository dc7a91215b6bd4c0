//! Weights of the base that PEFT saves beside an adapter: of a table that is adapted, of all tables where the
//! vocabulary was resized or `save_embedding_layers` asks for them, and biases beside modules trained as a whole.
//!
//! PEFT loads them into the base. Where they are the base's own values, that changes nothing; where they are not,
//! they take the place of the base's here too.
//!
//! # Source
//! PEFT's `get_peft_model_state_dict` and `set_peft_model_state_dict`.

#[cfg(test)]
mod tests;

use crate::files::Weights;
use crate::merge::round;
use crate::modules::{EMBEDDINGS, HEADS};
use crate::names;
use crate::target::{last_segment, nearest_end};
use ferrotune_core::adapter::Site;
use ferrotune_core::io::ModelFiles;
use ferrotune_core::model::{ModelPlan, WeightSource};
use ferrotune_core::params::{ParamLayout, ParamSpec};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::dequantise::Quantised;
use ferrotune_kernels::{DType, Tensor, View, ViewMut};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// What stands in front of every name. Prompts have no more; for others, `model.` follows.
const PREFIX: &str = "base_model.";
/// What stands between the path of a module and the name of its tensor, where something is around it.
const WRAPPERS: [&str; 2] = [".token_adapter.base_layer", ".base_layer"];

/// Names of the tensors of an adapter.
pub(crate) struct OwnNames<'a>(BTreeSet<&'a str>);

impl<'a> OwnNames<'a> {
    /// Those of the parameters of `layout`, of shared ones both.
    pub(crate) fn of(layout: &'a ParamLayout) -> Self {
        let specs = layout.by_name().map(|(_, segment)| &segment.spec);
        let names =
            |spec: &'a ParamSpec| std::iter::once(spec.name.as_str()).chain(spec.also.as_deref());
        Self(specs.flat_map(names).collect())
    }

    /// Whether `name`, which a file has beside these, is a tensor of the base.
    pub(crate) fn are_beside_copy(&self, name: &str) -> bool {
        self.copied(name).is_some()
    }

    /// The path, behind [`PREFIX`], and the suffix of the base's tensor that `name` is.
    fn copied(&self, name: &str) -> Option<(String, &'static str)> {
        let rest = name
            .strip_prefix(PREFIX)
            .filter(|_| !self.0.contains(name))?;
        let (path, suffix) = ["weight", "bias"]
            .into_iter()
            .find_map(|suffix| Some((rest.strip_suffix(suffix)?.strip_suffix('.')?, suffix)))?;
        if let Some(module) = names::without(path, names::ORIGINAL)
            && self
                .0
                .contains(format!("{PREFIX}{module}.{suffix}").as_str())
        {
            return Some((module, suffix));
        }
        let wrapped = WRAPPERS
            .into_iter()
            .find_map(|wrapper| path.strip_suffix(wrapper));
        let module = wrapped.unwrap_or(path);
        let last = last_segment(module);
        let is_head = HEADS.contains(&last);
        let is_table = suffix == "weight" && (is_head || EMBEDDINGS.contains(&last));
        let fits = match wrapped {
            None => !self.stand_at(module),
            Some(_) => self.stand_at(module) || (is_head && self.train_rows()),
        };
        (is_table && fits).then(|| (module.to_owned(), suffix))
    }

    fn stand_at(&self, module: &str) -> bool {
        let start = format!("{PREFIX}{module}.");
        let mut from = self.0.range(start.as_str()..);
        from.next().is_some_and(|name| name.starts_with(&start))
    }

    /// Whether rows are trained, which a head may share.
    fn train_rows(&self) -> bool {
        let is_of_rows = |name: &&str| name.ends_with(".trainable_tokens_delta");
        self.0.iter().any(is_of_rows)
    }
}

/// The base of an adapter: its files, but for the tables that the adapter has otherwise.
#[derive(Debug)]
pub struct AdapterBase<'a> {
    files: &'a ModelFiles,
    /// By the names of the base's tensors.
    tables: BTreeMap<String, Vec<f32>>,
}

impl<'a> AdapterBase<'a> {
    /// The base in `files`, a model of `sites`, for the adapter in `directory` with the parameters of `layout`.
    ///
    /// # Errors
    /// [`Error::Adapter`] naming the tensor, if it belongs to no module of the base, or has another shape, as after a
    /// resize; [`Error::Read`].
    pub fn new(
        files: &'a ModelFiles,
        directory: &Path,
        sites: &[Site],
        layout: &ParamLayout,
    ) -> Result<Self> {
        let adapter = Weights::open(directory)?;
        let own = OwnNames::of(layout);
        let mut tables: BTreeMap<String, Vec<f32>> = BTreeMap::new();
        let mut seen: BTreeMap<String, &str> = BTreeMap::new();
        for name in adapter.file.names() {
            let Some((path, suffix)) = own.copied(name) else {
                continue;
            };
            let site =
                owner(&path, sites).ok_or_else(|| no_module(&adapter, name, &path, sites))?;
            let tensor = site.tensor(suffix);
            let shape = match suffix {
                "bias" => [1, site.out_features],
                _ => [site.out_features, site.in_features],
            };
            let values = values(&adapter, name, files, &tensor, shape)?;
            let held = match tables.get(&tensor) {
                Some(held) => Cow::Borrowed(held),
                None => Cow::Owned(read(files, &tensor, shape)?),
            };
            let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits();
            let is_same = values.iter().zip(held.iter()).all(same);
            match (is_same, seen.insert(tensor.clone(), name)) {
                (true, _) => {}
                (false, None) => drop(tables.insert(tensor, values)),
                (false, Some(other)) => {
                    let message = format!(
                        "`{other}` and `{name}` differ, and `{tensor}` of this base is one weight for both; give the \
                         base whose tie_word_embeddings is that of the adapter's"
                    );
                    return Err(Error::adapter(&adapter.path, message));
                }
            }
        }
        say(&adapter.path, &seen, &tables);
        Ok(Self { files, tables })
    }

    /// The base's tensors that the adapter has otherwise, with its values.
    #[must_use]
    pub fn tables(&self) -> &BTreeMap<String, Vec<f32>> {
        &self.tables
    }
}

impl WeightSource for AdapterBase<'_> {
    fn check(&self, plan: &ModelPlan) -> Result<()> {
        self.files.check(plan)
    }

    fn read(&self, name: &str, to: ViewMut<'_>) -> Result<()> {
        let Some(values) = self.tables.get(name) else {
            return WeightSource::read(self.files, name, to);
        };
        let [rows, cols] = to.shape();
        to.copy_from(View::from_f32(values, rows, cols));
        Ok(())
    }

    fn multiplies_bytes(&self) -> bool {
        WeightSource::multiplies_bytes(self.files)
    }

    fn read_quantised(&self, name: &str) -> Result<Option<Quantised>> {
        match self.tables.contains_key(name) {
            true => Ok(None),
            false => WeightSource::read_quantised(self.files, name),
        }
    }
}

/// The site whose weight is meant by `path`: of a tied head, the embedding.
fn owner<'a>(path: &str, sites: &'a [Site]) -> Option<&'a Site> {
    let named = |path: &str| sites.iter().find(|site| site.name == path);
    let site = path.strip_prefix("model.").and_then(named);
    let site = site.or_else(|| named(path))?;
    let shared = sites.iter().find(|other| Some(other.id) == site.tied_to);
    Some(shared.unwrap_or(site))
}

fn no_module(adapter: &Weights, name: &str, path: &str, sites: &[Site]) -> Error {
    let near = nearest_end(path, sites.iter().map(|site| site.name.as_str()));
    let message = format!("`{name}` is the weight of no module of this base{near}");
    Error::adapter(&adapter.path, message)
}

/// Tensor `name` of an adapter, as the base's `tensor` of `shape` holds it.
fn values(
    adapter: &Weights,
    name: &str,
    files: &ModelFiles,
    tensor: &str,
    [rows, cols]: [usize; 2],
) -> Result<Vec<f32>> {
    let meta = adapter.file.meta(name);
    if let Some(&[saved, of_saved]) = meta.map(|meta| meta.shape.as_slice())
        && of_saved == cols
        && saved != rows
    {
        let message = format!(
            "`{name}` has {saved} rows, and `{tensor}` of this base has {rows}: the adapter was trained on a base whose \
             vocabulary was resized from {rows} to {saved}. Give that base: load this one in Transformers, call \
             resize_token_embeddings({saved}) and save_pretrained"
        );
        return Err(Error::adapter(&adapter.path, message));
    }
    let shape = if rows == 1 {
        vec![cols]
    } else {
        vec![rows, cols]
    };
    let mut values = adapter.read(name, &shape)?;
    if let Some(meta) = files.meta(tensor) {
        let round = |value: &mut f32| *value = round(*value, meta.dtype);
        values.iter_mut().for_each(round);
    }
    Ok(values)
}

fn read(files: &ModelFiles, tensor: &str, [rows, cols]: [usize; 2]) -> Result<Vec<f32>> {
    let mut held = Tensor::zeros(DType::F32, rows, cols);
    WeightSource::read(files, tensor, held.view_mut())?;
    Ok(held.to_f32_vec())
}

/// One line on what was found.
fn say(path: &Path, seen: &BTreeMap<String, &str>, tables: &BTreeMap<String, Vec<f32>>) {
    let names = |differ: bool| {
        let names = seen
            .keys()
            .filter(|name| tables.contains_key(*name) == differ);
        names
            .map(|name| format!("`{name}`"))
            .collect::<Vec<_>>()
            .join(", ")
    };
    let path = path.display();
    if !tables.is_empty() {
        tracing::warn!(
            "{path} has its own {}, in place of the base's, as PEFT has it",
            names(true)
        );
    } else if !seen.is_empty() {
        tracing::info!("{path} repeats {} of the base", names(false));
    }
}
