//! What an update starts from, where that is more than a seed says: the same on every rank.

use super::adapter::lora;
use super::{EpochData, Recipe};
use ferrotune_core::config::TrainConfig;
use ferrotune_core::data::PackedBatch;
use ferrotune_core::io::ModelFiles;
use ferrotune_core::model::{DecoderConfig, Mode, Model, ModelPlan, Pass};
use ferrotune_core::params::{FlatBuffer, ParamLayoutBuilder, ParamSpec};
use ferrotune_core::process_group::{Place, ProcessGroup};
use ferrotune_core::trainer::StepData;
use ferrotune_core::{Error, Result};
use ferrotune_kernels::Workspace;
use ferrotune_kernels::linear_cross_entropy::Accumulator;
use ferrotune_lora::{LoraAdapter, Start};
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
    let quantised = config.model.quantise().is_some()
        || files.is_some_and(|files| files.quantisation().is_some());
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
    let init = adapter.config().init_lora_weights;
    if !init.subtracts() && !init.needs_data() {
        return Ok(None);
    }
    let start = from.map(|directory| adapter.start_of(directory));
    let start = share(group, start.transpose()?.flatten())?;
    if start.is_some() || !init.needs_data() {
        return Ok(start);
    }
    // Every rank looks at the same micro-batches, those of the run on one rank, and rank 0's word holds.
    let seen = observe(recipe, &adapter)?;
    share(group, seen)
}

/// Takes the base over the first micro-batches of the run, for a start that follows from data.
fn observe(recipe: &Recipe, adapter: &LoraAdapter) -> Result<Option<Start>> {
    let Some(mut seen) = adapter.observation(&ModelPlan::new(&recipe.decoder))? else {
        return Ok(None);
    };
    require_room(recipe, adapter, seen.bytes())?;
    let options = recipe.options()?;
    let [mut params, mut grads] = [(); 2].map(|()| FlatBuffer::empty_on(&options.device));
    let mut model = recipe.with_source(|source| {
        let (attachments, weights) = (seen.attachments(), options.weights.clone());
        Model::load(&recipe.decoder, attachments, source, &mut params, weights)
    })?;
    model.set_keep(&options.keep);
    model.set_offload(options.offload)?;
    let workspace = Workspace::on(options.device.clone(), 0);
    let pass = Pass {
        workspace: &workspace,
        dtype: options.activation_dtype,
        mode: Mode::Eval,
    };
    let mut sums = Accumulator::new(&options.device);
    let most = recipe.config.lora.lora_init_batches;
    let (mut count, mut enough) = (0, false);
    for batch in batches(recipe).take(most) {
        let batch = batch?;
        seen.begin(&model, &batch);
        if seen.needs_gradients() {
            model.loss_and_gradients(pass, &params, &mut grads, &batch, &mut sums)?;
        } else {
            model.loss(pass, &params, &batch)?;
        }
        (count, enough) = (count + 1, seen.end());
        if enough {
            break;
        }
    }
    let name = adapter.config().init_lora_weights.name();
    if name == "eva" && !enough {
        tracing::warn!(
            "eva: {} of the inputs' directions have settled after {count} micro-batches; the others are as they are \
             then. lora_init_batches: {} looks at more",
            seen.settled(),
            2 * most
        );
    }
    tracing::info!("{name}: the update starts from {count} micro-batches");
    seen.start(&model).map(Some)
}

/// The micro-batches of all ranks, as one rank alone would have them.
fn batches(recipe: &Recipe) -> impl Iterator<Item = Result<PackedBatch>> {
    let mut config = recipe.config.clone();
    config.optimizer.gradient_accumulation_steps *= recipe.place.world_size;
    let width = recipe.decoder.hidden_size;
    let mut data = EpochData::new(&config, &recipe.dataset, width, Place::SOLO);
    (0..).flat_map(move |step| match data.step(step) {
        Ok(batches) => batches.into_iter().map(Ok).collect(),
        Err(error) => vec![Err(error)],
    })
}

/// Refuses to gather more than there is room for beside the weights.
fn require_room(recipe: &Recipe, adapter: &LoraAdapter, gathered: u64) -> Result<()> {
    let plan = ModelPlan::new(&recipe.decoder);
    let weights = recipe.weights.bytes(&plan, &[], recipe.files.as_ref());
    let available = recipe.available_memory;
    if weights.saturating_add(gathered) <= available {
        return Ok(());
    }
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    let message = format!(
        "`init_lora_weights: {}` gathers {:.2} GiB beside weights of {:.2} GiB, and {:.2} GiB are there; take fewer \
         lora_target_modules, or a start that holds less, such as eva or pissa_niter_16",
        adapter.config().init_lora_weights.name(),
        gib(gathered),
        gib(weights),
        gib(available)
    );
    Err(Error::Memory { message })
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
