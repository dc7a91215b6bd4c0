//! What an update starts from, where that is more than a seed says: the same on every rank.

use super::Recipe;
use super::adapter::lora;
use ferrotune_core::config::TrainConfig;
use ferrotune_core::io::ModelFiles;
use ferrotune_core::model::DecoderConfig;
use ferrotune_core::params::{FlatBuffer, ParamLayoutBuilder, ParamSpec};
use ferrotune_core::process_group::ProcessGroup;
use ferrotune_core::{Error, Result};
use ferrotune_lora::Start;
use std::path::Path;

/// Names and shapes of the factors of a start.
type Shapes = Vec<(String, Vec<usize>)>;

/// Refuses a start that needs values of weights that are held as codes.
pub(super) fn require_readable(
    config: &TrainConfig,
    base: &Path,
    decoder: &DecoderConfig,
    files: Option<&ModelFiles>,
) -> Result<()> {
    let quantised = config.model.load_in_4bit || files.is_some_and(ModelFiles::has_four_bit);
    if !quantised || !config.lora.use_peft || config.lora.peft_config.is_some() {
        return Ok(());
    }
    let init = lora(config, base, decoder)?.config().init_lora_weights;
    let key = "init_lora_weights";
    let place = config.origin(key).map(|origin| format!(" ({origin})"));
    match init.fault_of_codes() {
        None => Ok(()),
        Some(fault) => Err(Error::config(key, fault + &place.unwrap_or_default())),
    }
}

/// What the run that left the checkpoint `from` started from, or `None` where the method makes it of the base.
/// Rank 0, which alone knows of a checkpoint, tells the others.
///
/// # Errors
/// If a file is damaged; [`Error::Transient`] if a peer is lost.
pub(super) fn agree(
    recipe: &Recipe,
    group: &mut dyn ProcessGroup,
    from: Option<&Path>,
) -> Result<Option<Start>> {
    let keys = &recipe.config.lora;
    if !keys.use_peft || keys.peft_config.is_some() {
        return Ok(None);
    }
    let adapter = lora(&recipe.config, &recipe.base, &recipe.decoder)?;
    if !adapter.config().init_lora_weights.changes_base() {
        return Ok(None);
    }
    let start = from.map(|directory| adapter.start_of(directory));
    share(group, start.transpose()?.flatten())
}

/// Rank 0's, on every rank.
fn share(group: &mut dyn ProcessGroup, mine: Option<Start>) -> Result<Option<Start>> {
    if group.world_size() == 1 {
        return Ok(mine);
    }
    let shapes: Option<Shapes> = mine.as_ref().map(|start| {
        let segments = start.factors().layout().by_name();
        let specs = segments.map(|(_, segment)| &segment.spec);
        specs
            .map(|spec| (spec.name.clone(), spec.shape.clone()))
            .collect()
    });
    let words = serde_json::to_vec(&shapes).unwrap_or_default();
    let all = group.all_gather(&words)?;
    let shapes: Option<Shapes> =
        serde_json::from_slice(&all[0]).map_err(|error| Error::Transient {
            message: format!("rank 0 sent no start: {error}"),
        })?;
    let Some(shapes) = shapes else {
        return Ok(None);
    };
    let mut builder = ParamLayoutBuilder::new();
    for (name, shape) in shapes {
        builder.add(ParamSpec::new(name, shape, 0));
    }
    let mut factors = FlatBuffer::zeros(&builder.build()?);
    if let Some(start) = mine {
        for (id, segment) in factors.layout().clone().by_name() {
            let values = start.factors().layout().find(&segment.spec.name);
            if let Some(from) = values {
                factors
                    .get_mut(id)
                    .copy_from_slice(start.factors().get(from));
            }
        }
    }
    group.broadcast(&mut factors)?;
    Ok(Some(Start::new(factors)))
}
