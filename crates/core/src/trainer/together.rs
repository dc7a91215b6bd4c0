//! Several trainers over one base: the micro-batches of all go through it in one pass.
//!
//! Each trainer is on its own in everything but the pass: parameters, moments, schedule, evaluation, checkpoints
//! and end. It runs in a thread of its own and waits where a step needs its gradient; when all that have not left
//! wait, one of them computes for all. What it gets is what it would have got alone.

use super::ranks::Totals;
use super::step::{Trainer, TrainerOptions, attach};
use crate::adapter::Adapter;
use crate::data::PackedBatch;
use crate::model::{DecoderConfig, LoadedBase, MemberPass, Mode, Model, SharedBase, WeightSource};
use crate::params::FlatBuffer;
use crate::{Error, Result};
use ferrotune_kernels::linear_cross_entropy::{Accumulator, Sums};
use ferrotune_kernels::{DType, Device, Workspace};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// What a trainer brings to a pass, to get it back with its gradient and sums.
#[derive(Debug)]
struct Work {
    params: FlatBuffer,
    grads: FlatBuffer,
    sums: Accumulator,
    batches: Vec<PackedBatch>,
    mode: Mode,
}

#[derive(Debug)]
enum Place {
    /// Busy elsewhere: the others wait.
    Away,
    Waiting(Work),
    Done(Work),
    /// Not coming back.
    Left,
}

/// Where the trainers of one base meet.
#[derive(Debug)]
struct Table {
    model: Arc<Model>,
    dtype: DType,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    places: Vec<Place>,
    /// Of the rows of all.
    workspace: Workspace,
    /// Of each one's own.
    own: Vec<Workspace>,
    /// Why a pass failed, once one did.
    failed: Option<String>,
}

/// A trainer's place at the table.
#[derive(Debug)]
pub(super) struct Seat {
    table: Arc<Table>,
    number: usize,
}

impl State {
    /// Whether everybody who comes is there.
    fn complete(&self) -> bool {
        let mut waiting = false;
        for place in &self.places {
            match place {
                Place::Away | Place::Done(_) => return false,
                Place::Waiting(_) => waiting = true,
                Place::Left => {}
            }
        }
        waiting
    }

    /// Computes for all who wait: their first micro-batches in one pass, then the second ones.
    fn compute(&mut self, model: &Model, dtype: DType) -> Result<()> {
        let Self {
            places,
            workspace,
            own,
            ..
        } = self;
        let most = |place: &Place| match place {
            Place::Waiting(work) => work.batches.len(),
            _ => 0,
        };
        for round in 0..places.iter().map(most).max().unwrap_or(0) {
            let waiting = places.iter_mut().zip(own.iter()).enumerate();
            let members = waiting.filter_map(|(number, (place, workspace))| {
                let Place::Waiting(work) = place else {
                    return None;
                };
                Some(MemberPass {
                    number,
                    batch: work.batches.get(round)?,
                    params: &work.params,
                    grads: &mut work.grads,
                    sums: &mut work.sums,
                    mode: work.mode,
                    workspace,
                })
            });
            model.loss_and_gradients_together(workspace, dtype, members.collect())?;
        }
        for place in places {
            if let Place::Waiting(work) = std::mem::replace(place, Place::Left) {
                *place = Place::Done(work);
            }
        }
        Ok(())
    }
}

impl Seat {
    fn lock(&self) -> Result<MutexGuard<'_, State>> {
        let state = self.table.state.lock();
        state.map_err(|_| failed("a thread of it broke off"))
    }

    /// The gradient and sums of `work`, once all others have theirs to compute.
    fn compute(&self, work: Work) -> Result<Work> {
        let mut state = self.lock()?;
        state.places[self.number] = Place::Waiting(work);
        loop {
            if let Some(message) = &state.failed {
                return Err(failed(message));
            }
            if let Place::Done(_) = state.places[self.number] {
                let done = std::mem::replace(&mut state.places[self.number], Place::Away);
                if let Place::Done(work) = done {
                    return Ok(work);
                }
            }
            if state.complete() {
                let computed = state.compute(&self.table.model, self.table.dtype);
                self.table.changed.notify_all();
                if let Err(error) = computed {
                    state.failed = Some(error.to_string());
                    return Err(error);
                }
                continue;
            }
            let waited = self.table.changed.wait(state);
            state = waited.map_err(|_| failed("a thread of it broke off"))?;
        }
    }

    /// The sums of `batch` without random draws, alone.
    pub(super) fn loss(&self, params: &FlatBuffer, batch: &PackedBatch) -> Result<Sums> {
        let state = self.lock()?;
        let device = state.workspace.device();
        let mut sums = Accumulator::new(device);
        let member = MemberPass {
            number: self.number,
            batch,
            params,
            grads: &mut FlatBuffer::empty_on(device),
            sums: &mut sums,
            mode: Mode::Eval,
            workspace: &state.own[self.number],
        };
        let (model, dtype) = (&self.table.model, self.table.dtype);
        model.loss_of_member(&state.workspace, dtype, member)?;
        Ok(sums.read()?)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let state = self.table.state.lock();
        let mut state = state.unwrap_or_else(PoisonError::into_inner);
        state.places[self.number] = Place::Left;
        self.table.changed.notify_all();
    }
}

fn failed(why: &str) -> Error {
    let message = format!("the pass that all adapters of this run share failed: {why}");
    Error::Numeric { message }
}

impl Trainer {
    /// Trainers of several adapters over one base, each with options of its own; those of the first hold for
    /// what they share: device, formats, what layers keep, label smoothing. Each is to run in a thread of its
    /// own: [`Trainer::step`] waits for the steps of all others that were not dropped.
    ///
    /// # Errors
    /// As [`Trainer::new`]; [`Error::Config`] for adapters that change the base or train a part of it.
    pub fn together(
        config: &DecoderConfig,
        source: &dyn WeightSource,
        adapters: Vec<(Box<dyn Adapter>, TrainerOptions)>,
    ) -> Result<Vec<Self>> {
        let Some((_, first)) = adapters.first() else {
            return Ok(Vec::new());
        };
        let first = first.clone();
        for (_, options) in &adapters {
            require_shared(&first, options)?;
        }
        let mut attachments = Vec::with_capacity(adapters.len());
        let mut values = Vec::with_capacity(adapters.len());
        for (adapter, options) in &adapters {
            let (attached, mut params) = attach(config, adapter.as_ref())?;
            params.move_to(&options.device);
            attachments.push(attached);
            values.push(params);
        }
        let mut model =
            Model::load_together(config, attachments, source, &first.device, first.weights)?;
        model.set_keep(&first.keep);
        model.set_label_smoothing(first.label_smoothing);
        for ((adapter, options), params) in adapters.iter().zip(&mut values) {
            adapter.init(params, options.seed)?;
            let model = &mut model;
            adapter.prepare(params, &mut SharedBase(LoadedBase { model, source }))?;
        }
        let pool = |tokens: usize| Workspace::on(first.device.clone(), tokens);
        let tokens = adapters.iter().map(|(_, options)| options.max_tokens);
        let table = Arc::new(Table {
            model: Arc::new(model),
            dtype: first.activation_dtype,
            state: Mutex::new(State {
                places: adapters.iter().map(|_| Place::Away).collect(),
                workspace: pool(tokens.clone().sum()),
                own: tokens.map(pool).collect(),
                failed: None,
            }),
            changed: Condvar::new(),
        });
        let members = adapters.into_iter().zip(values).enumerate();
        let trainers = members.map(|(number, ((adapter, options), params))| {
            let (model, workspace) = (Arc::clone(&table.model), pool(options.max_tokens));
            let mut trainer = Self::over(model, workspace, adapter, params, options)?;
            let table = Arc::clone(&table);
            trainer.seat = Some(Seat { table, number });
            Ok(trainer)
        });
        trainers.collect()
    }

    /// The gradient of `micro_batches` in `grads`, computed with those of the others at the table.
    pub(super) fn gradients_together(&mut self, micro_batches: &[PackedBatch]) -> Result<Totals> {
        let Some(seat) = &self.seat else {
            return Err(failed("it has no place there"));
        };
        let empty = || FlatBuffer::empty_on(&Device::Cpu);
        let work = Work {
            params: std::mem::replace(&mut self.params, empty()),
            grads: std::mem::replace(&mut self.grads, empty()),
            sums: std::mem::take(&mut self.sums),
            batches: micro_batches.to_vec(),
            mode: Mode::Train {
                seed: self.options.seed,
                step: self.step,
            },
        };
        let work = seat.compute(work)?;
        self.params = work.params;
        self.grads = work.grads;
        self.sums = work.sums;
        Ok(Totals::of(self.sums.read()?, micro_batches))
    }
}

/// Refuses what one pass cannot give to each adapter as it would have it alone.
fn require_shared(first: &TrainerOptions, options: &TrainerOptions) -> Result<()> {
    let fault = if options.deterministic_reduction {
        (
            "deterministic_reduction",
            "true sums gradients apart from the pass",
        )
    } else if options.neftune_noise_alpha > 0.0 {
        (
            "neftune_noise_alpha",
            "adds noise to what all adapters read",
        )
    } else if options.offload > 0 {
        ("activation_offloading", "true is for a run of one adapter")
    } else if options.label_smoothing != first.label_smoothing {
        ("label_smoothing_factor", "is one for all adapters of a run")
    } else {
        return Ok(());
    };
    let (key, why) = fault;
    let message =
        format!("{why}; leave it out beside `adapters`, or train that adapter in a run of its own");
    Err(Error::config(key, message))
}
