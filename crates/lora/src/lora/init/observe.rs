//! What a start sees of the data: inputs of linears, and gradients of their weights, in passes over the base
//! before the run.

use super::super::{LoraConfig, attach};
use super::corda::{self, Covariance};
use super::eva::{self, Components, Followed};
use super::start::{Factors, Start};
use super::{InitLoraWeights, KEY, Linear, linears, lora_ga, parts, site};
use ferrotune_core::adapter::{Attachment, BaseWeights, CustomLinear, SiteId};
use ferrotune_core::data::{IGNORE_INDEX, PackedBatch};
use ferrotune_core::model::{Model, ModelPlan};
use ferrotune_core::params::{FlatBuffer, ParamLayoutBuilder};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::decompose::Matrix;
use ferrotune_kernels::rng::{Stream, key_for};
use ferrotune_kernels::{DType, Tensor, View, ViewMut, matmul};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Gathers what a start needs of the data.
///
/// A model of the base alone with [`Observation::attachments`] in place is taken over micro-batches, forward,
/// and backward where [`Observation::needs_gradients`] says so, without dropout, each between
/// [`Observation::begin`] and [`Observation::end`].
#[derive(Debug)]
pub struct Observation {
    config: LoraConfig,
    inputs: Vec<Input>,
    batch: Arc<Mutex<Batch>>,
    trained_tokens: usize,
    ranks: Option<Vec<Vec<usize>>>,
}

/// Linears over one input, or one of them where each has its own gradient.
#[derive(Debug)]
struct Input {
    sites: Vec<SiteId>,
    linears: Vec<Linear>,
    seen: Arc<Mutex<Seen>>,
}

/// What was gathered.
#[derive(Debug)]
enum Seen {
    Components(Components),
    Covariance(Covariance),
    /// `[out, in]`, of the sum of the losses.
    Gradient(Tensor),
}

/// The micro-batch that is under way.
#[derive(Debug, Default)]
struct Batch {
    documents: Vec<Range<usize>>,
    /// Rows that EVA looks at.
    rows: Vec<usize>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What a panic left half done is not read: the run ends with it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Observation {
    /// What `config` wants to see of a model, if its start follows from data.
    pub(in super::super) fn new(config: &LoraConfig, plan: &ModelPlan) -> Result<Option<Self>> {
        let init = config.init_lora_weights;
        if !init.needs_data() {
            return Ok(None);
        }
        let mut builder = ParamLayoutBuilder::new();
        attach::attach(config, false, &plan.sites, &mut builder)?;
        let mut targets = linears(config, &*builder.build()?)?;
        let mut inputs = Vec::new();
        for group in plan
            .layers
            .iter()
            .flat_map(|layer| layer.groups().map(<[SiteId]>::to_vec))
        {
            let mut found: Vec<(SiteId, Linear)> = Vec::new();
            for id in group {
                let at = targets.iter().position(|l| l.module == plan.site(id).name);
                found.extend(at.map(|at| (id, targets.swap_remove(at))));
            }
            if matches!(init, InitLoraWeights::LoraGa(_)) {
                inputs.extend(found.into_iter().map(|one| Input::new(init, vec![one])));
            } else if !found.is_empty() {
                inputs.push(Input::new(init, found));
            }
        }
        Ok(Some(Self {
            config: config.clone(),
            inputs,
            batch: Arc::default(),
            trained_tokens: 0,
            ranks: None,
        }))
    }

    /// What stands in the model that is watched.
    #[must_use]
    pub fn attachments(&self) -> Vec<(SiteId, Attachment)> {
        let probe = |input: &Input| {
            let probe = Probe {
                batch: Arc::clone(&self.batch),
                seen: Arc::clone(&input.seen),
            };
            (input.sites[0], Attachment::Custom(Box::new(probe)))
        };
        self.inputs.iter().map(probe).collect()
    }

    /// Whether micro-batches go backward too.
    #[must_use]
    pub fn needs_gradients(&self) -> bool {
        matches!(self.config.init_lora_weights, InitLoraWeights::LoraGa(_))
    }

    /// Bytes of what is gathered.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let of_input = |input: &Input| {
            let [out, inputs] = input.linears[0].shape;
            let elements = match self.config.init_lora_weights {
                InitLoraWeights::Corda(_) => inputs * inputs,
                InitLoraWeights::LoraGa(_) => out * inputs,
                _ => 0,
            };
            (elements * size_of::<f32>()) as u64
        };
        self.inputs.iter().map(of_input).sum()
    }

    /// Says which micro-batch comes, over `model`.
    pub fn begin(&mut self, model: &Model, batch: &PackedBatch) {
        let bounds = batch.cu_seqlens.windows(2);
        let documents = bounds
            .map(|pair| pair[0] as usize..pair[1] as usize)
            .collect();
        let masks = match self.config.init_lora_weights {
            InitLoraWeights::Eva(eva) => eva.use_label_mask,
            _ => false,
        };
        let shows = |row: &usize| !masks || batch.labels[*row] != IGNORE_INDEX;
        let rows = (0..batch.tokens()).filter(shows).collect();
        *lock(&self.batch) = Batch { documents, rows };
        self.trained_tokens += model.trained_tokens(batch);
    }

    /// Whether enough has been seen, however many micro-batches there are.
    pub fn end(&mut self) -> bool {
        let InitLoraWeights::Eva(_) = self.config.init_lora_weights else {
            return false;
        };
        let ranks = with_followed(&self.inputs, eva::spread);
        self.ranks = ranks.or(self.ranks.take());
        self.ranks.is_some() && self.settled() == self.inputs.len()
    }

    /// Inputs whose directions have settled, which only EVA waits for.
    #[must_use]
    pub fn settled(&self) -> usize {
        let done = |input: &&Input| matches!(&*lock(&input.seen), Seen::Components(c) if c.done);
        self.inputs.iter().filter(done).count()
    }

    /// The start that follows from what was seen, of the weights of `base`.
    ///
    /// # Errors
    /// [`Error::Config`] if nothing, or too little, was seen.
    pub fn start(&self, base: &dyn BaseWeights) -> Result<Start> {
        if let InitLoraWeights::Eva(eva) = self.config.init_lora_weights {
            let Some(ranks) = &self.ranks else {
                let message = "eva has seen no micro-batch with as many tokens as rho times the rank; take longer \
                               ones, a lower rank or rho, or set use_label_mask: false";
                return Err(Error::config("eva_config", message));
            };
            return with_followed(&self.inputs, |followed| eva::start(&eva, followed, ranks));
        }
        if self.trained_tokens == 0 && self.needs_gradients() {
            return Err(Error::config(KEY, "lora_ga has seen no token with a label"));
        }
        let mut all = Vec::new();
        let of_input = |input| -> Vec<(&Input, &Linear)> {
            let input: &Input = input;
            input.linears.iter().map(|linear| (input, linear)).collect()
        };
        let linears: Vec<(&Input, &Linear)> = self.inputs.iter().flat_map(of_input).collect();
        for some in parts(&linears, |(_, linear)| linear) {
            let weights = some.iter().map(|(_, l)| base.read(site(base, &l.module)?));
            let weights: Vec<Tensor> = weights.collect::<Result<_>>()?;
            let factors: Vec<Factors> = some
                .par_iter()
                .zip(&weights)
                .map(|((input, linear), weight)| self.factors(input, linear, weight.view()))
                .collect::<Result<_>>()?;
            let linears = some.iter().map(|(_, linear)| (*linear).clone());
            all.extend(linears.zip(factors));
        }
        Start::of(all)
    }

    fn factors(&self, input: &Input, linear: &Linear, weight: View<'_>) -> Result<Factors> {
        let (rank, scale) = (linear.rank, f64::from(linear.scale));
        match (&*lock(&input.seen), self.config.init_lora_weights) {
            (Seen::Covariance(seen), InitLoraWeights::Corda(method)) => {
                corda::factors(weight, seen, [rank as f64, scale], method)
            }
            (Seen::Gradient(sum), InitLoraWeights::LoraGa(config)) => {
                let count = self.trained_tokens as f32;
                let mean: Vec<f32> = sum.to_f32_vec().iter().map(|g| g / count).collect();
                let mean = View::from_f32(&mean, sum.rows(), sum.cols());
                let stream = Stream::new(key_for(0, &linear.module));
                lora_ga::factors(&config, weight, mean, rank, scale, stream)
            }
            _ => Err(Error::config(
                KEY,
                format!("`{}` was not watched", linear.module),
            )),
        }
    }
}

/// Calls `f` with the linears and components of every input.
fn with_followed<R>(inputs: &[Input], f: impl FnOnce(&mut [Followed<'_>]) -> R) -> R {
    let mut guards: Vec<_> = inputs.iter().map(|input| lock(&input.seen)).collect();
    let pairs = inputs.iter().zip(&mut guards);
    let mut followed: Vec<Followed<'_>> = pairs
        .filter_map(|(input, guard)| match &mut **guard {
            Seen::Components(components) => Some(Followed {
                linears: &input.linears,
                components,
            }),
            _ => None,
        })
        .collect();
    f(&mut followed)
}

impl Input {
    fn new(init: InitLoraWeights, found: Vec<(SiteId, Linear)>) -> Self {
        let (sites, linears): (Vec<SiteId>, Vec<Linear>) = found.into_iter().unzip();
        let [out, inputs] = linears[0].shape;
        let seen = match init {
            InitLoraWeights::Eva(eva) => {
                let most = linears
                    .iter()
                    .map(|linear| eva.components(linear.rank))
                    .max();
                let stream = Stream::new(key_for(0, &linears[0].module));
                Seen::Components(Components::new(most.unwrap_or(0), eva.tau, stream))
            }
            InitLoraWeights::LoraGa(_) => Seen::Gradient(Tensor::zeros(DType::F32, out, inputs)),
            _ => Seen::Covariance(Covariance::new(inputs)),
        };
        Self {
            sites,
            linears,
            seen: Arc::new(Mutex::new(seen)),
        }
    }
}

/// Stands at a linear and changes nothing.
#[derive(Debug)]
struct Probe {
    batch: Arc<Mutex<Batch>>,
    seen: Arc<Mutex<Seen>>,
}

fn on_host(view: View<'_>) -> Tensor {
    Tensor::from_f32(view.to_f32_vec(), view.rows(), view.cols())
}

impl CustomLinear for Probe {
    fn forward(&self, _: &FlatBuffer, x: View<'_>, _: ViewMut<'_>) -> Result<Vec<Tensor>> {
        let batch = lock(&self.batch);
        match &mut *lock(&self.seen) {
            Seen::Components(components) if !components.done => {
                let (x, cols) = (x.to_f32_vec(), x.cols());
                let rows = batch
                    .rows
                    .iter()
                    .flat_map(|&r| &x[r * cols..(r + 1) * cols]);
                let values = rows.map(|v| f64::from(*v)).collect();
                components.add(Matrix::new(batch.rows.len(), cols, values)?)?;
            }
            Seen::Covariance(covariance) => {
                let x = on_host(x);
                for document in batch.documents.iter().filter(|d| !d.is_empty()) {
                    covariance.add(x.view().row_range(document.clone()))?;
                }
            }
            Seen::Components(_) | Seen::Gradient(_) => {}
        }
        Ok(Vec::new())
    }

    fn backward(
        &self,
        _: &FlatBuffer,
        _: &mut FlatBuffer,
        x: View<'_>,
        _: &[Tensor],
        dy: ViewMut<'_>,
        _: Option<ViewMut<'_>>,
    ) -> Result<()> {
        if let Seen::Gradient(sum) = &mut *lock(&self.seen) {
            let (x, dy) = (on_host(x), on_host(dy.as_view()));
            matmul::tn(sum.view_mut(), 1.0, 1.0, dy.view(), x.view())?;
        }
        Ok(())
    }
}
