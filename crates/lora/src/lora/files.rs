//! `adapter_config.json` and `adapter_model.safetensors`, as PEFT writes and reads them.

#[cfg(test)]
mod tests;

use super::tokens::counting;
use super::{InitLoraWeights, LoraConfig, Start, TokenIndices, convert};
use crate::PeftConfig;
use crate::base_copies::OwnNames;
use crate::beside::{differ, repeated};
use crate::files::{self, CONFIG_FILE, Weights};
use crate::names::{self, Part};
use crate::target::{Target, TargetModules, last_segment};
use ferrotune_core::adapter::Site;
use ferrotune_core::io;
use ferrotune_core::params::{FlatBuffer, ParamSpec, Segment};
use ferrotune_core::{Error, Result};
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
    for (id, _) in lora_segments(params) {
        tensors.extend(files::of_parameter(params, id));
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

/// Reads every tensor of `params` that is an adapter's from the weights file, strictly. Rows there are those of `tokens`.
pub(crate) fn read_tensors(
    params: &mut FlatBuffer,
    directory: &Path,
    tokens: Option<TokenIndices>,
) -> Result<()> {
    let tied = false;
    read_all(params, directory, &Shares { tied, tokens })
}

/// What tensors of a file have in common.
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
    let repeated: BTreeMap<_, _> = repeated(&file, &expected, &own, shares.tied).collect();
    file.require_same_names(&expected, |name| {
        own.are_beside_copy(name) || repeated.contains_key(name)
    })?;
    for (id, segment) in layout.by_name() {
        if Part::of(&segment.spec.name).is_some() {
            let values = match &shares.tokens {
                Some(tokens) => read_rows(&file, &segment.spec.name, &segment.spec, tokens)?,
                None => file.read(&segment.spec.name, &segment.spec.file_shape())?,
            };
            params.set_file_values(id, &values);
        }
    }
    for (name, twin) in repeated {
        let id = layout.find(&twin);
        let own = id.map_or(&[][..], |id| params.get(id));
        let repeated = match (id, &shares.tokens) {
            (Some(id), Some(tokens)) if Part::of(name).is_some_and(Part::is_rows) => {
                read_rows(&file, name, &layout.segment(id).spec, tokens)?
            }
            // A head's factors are the transposes of the embedding's in files, and the same here.
            _ => file.read_flat(name, own.len())?,
        };
        if repeated != own {
            return Err(differ(&file, name, &twin));
        }
    }
    Ok(())
}

/// Tensor `name`, which is that of `spec`; where it has the rows of `tokens`, of those of one token the row that counts.
fn read_rows(
    file: &Weights,
    name: &str,
    spec: &ParamSpec,
    tokens: &TokenIndices,
) -> Result<Vec<f32>> {
    let shape = spec.file_shape();
    let listed = match names::parse(&spec.name) {
        Some((module, part)) if part.is_rows() => tokens.of(module),
        _ => None,
    };
    let (Some(ids), &[_, width]) = (listed, shape.as_slice()) else {
        return file.read(name, &shape);
    };
    let values = file.read(name, &[ids.len(), width])?;
    let rows = counting(ids).flat_map(|at| &values[at * width..(at + 1) * width]);
    Ok(rows.copied().collect())
}

fn lora_segments(
    params: &FlatBuffer,
) -> impl Iterator<Item = (ferrotune_core::params::ParamId, &Segment)> {
    params
        .layout()
        .by_name()
        .filter(|(_, segment)| Part::of(&segment.spec.name).is_some())
}
