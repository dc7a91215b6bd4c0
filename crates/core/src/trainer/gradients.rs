//! The gradient of a step: of every micro-batch in turn, then over the ranks.

use super::graphs::{Outcome, Recorded};
use super::optimizer::OnGpu;
use super::ranks::{self, MicroGradient, Totals};
use super::step::Trainer;
use crate::Result;
use crate::data::PackedBatch;
use crate::model::{Mode, Pass};
use crate::params::FlatBuffer;
use ferrotune_kernels::Device;

impl Trainer {
    /// The gradient of every rank's micro-batches in `grads`, the sums of this rank's in `sums`; those over
    /// all ranks, unless there is this one alone on a GPU that would have to be waited for.
    pub(super) fn gradients(&mut self, micro_batches: &[PackedBatch]) -> Result<Option<Totals>> {
        self.grads.zero();
        self.sums.clear();
        if self.seat.is_some() {
            return self.gradients_together(micro_batches).map(Some);
        }
        let peers = self.group.world_size() > 1;
        for (i, batch) in micro_batches.iter().enumerate() {
            // Peers begin to sum what is final while the rest is still computed.
            let is_last = peers && i + 1 == micro_batches.len();
            self.add_gradient(batch, is_last)?;
        }
        if !peers && self.options.device.is_cuda() {
            return Ok(None);
        }
        let totals = Totals::of(self.sums.read()?, micro_batches);
        ranks::all_reduce(self.group.as_mut(), &mut self.grads, totals).map(Some)
    }

    /// [`Trainer::gradients`], summed in the global order of micro-batches.
    pub(super) fn gradients_in_order(&mut self, micro_batches: &[PackedBatch]) -> Result<Totals> {
        let mut mine = Vec::new();
        self.sums.clear();
        for batch in micro_batches {
            let Some(&first_sequence_id) = batch.sequence_ids.first() else {
                continue;
            };
            self.grads.zero();
            self.sums.clear();
            self.add_gradient(batch, false)?;
            mine.push(MicroGradient {
                first_sequence_id,
                totals: Totals::of(self.sums.read()?, std::slice::from_ref(batch)),
                gradient: self.grads.as_slice().to_vec(),
            });
        }
        ranks::sum_in_order(self.group.as_mut(), &mine, &mut self.grads)
    }

    /// Adds the gradient of one micro-batch to `grads`. After the last one of a step, what a layer leaves
    /// there is final, and the group hears of it.
    pub(super) fn add_gradient(&mut self, batch: &PackedBatch, is_last: bool) -> Result<()> {
        self.pass(batch, is_last, false)
    }

    /// [`Trainer::add_gradient`]; or, as a `whole_step`, with nothing in `grads` and `sums` before and the update after
    /// it, whose scalars are set.
    pub(super) fn pass(
        &mut self,
        batch: &PackedBatch,
        is_last: bool,
        whole_step: bool,
    ) -> Result<()> {
        let Self {
            model,
            params,
            grads,
            optimizer,
            sums,
            group,
            workspace,
            graphs,
            options,
            layer_ends,
            ..
        } = self;
        let mode = Mode::Train {
            seed: options.seed,
            step: self.step,
        };
        let pass = Pass {
            workspace,
            dtype: options.activation_dtype,
            mode,
        };
        let inputs = model.inputs(pass, batch);
        params.bring_home();
        // A replay changes the gradients behind the back of their buffer.
        grads.home_mut();
        let mut update = optimizer.on_gpu();
        let moments = update.as_ref().map(OnGpu::addresses).unwrap_or_default();
        let tables = inputs.addresses();
        let addresses = [
            &params.addresses()[..],
            &grads.addresses(),
            &moments,
            &tables,
        ]
        .concat();
        let mut begun = 0;
        // What layers after the first trained one leave is final once the last micro-batch has passed.
        let mut layer_done = |grads: &mut FlatBuffer, layer: usize| {
            let end = layer_ends[layer];
            if !is_last || end <= begun {
                return Ok(());
            }
            group.reduce_ready(grads, std::mem::replace(&mut begun, end)..end)
        };
        let mut issue = || {
            if whole_step {
                grads.zero();
                sums.clear();
            }
            let done = &mut layer_done;
            model.loss_and_gradients_by_layer(pass, params, grads, &inputs, sums, done)?;
            match &mut update {
                Some(update) if whole_step => update.issue(params, grads, sums),
                _ => Ok(()),
            }
        };
        // What peers begin to sum meanwhile is not in a graph.
        let (Device::Cuda(device), Some(generation), false) =
            (&options.device, workspace.generation(), is_last)
        else {
            return issue();
        };
        let memory = (addresses, generation);
        let what = match whole_step {
            true => Recorded::Step(inputs.shape()),
            false => Recorded::MicroStep(inputs.shape()),
        };
        match graphs.run(device, what, memory, &mut issue)? {
            Outcome::Done => Ok(()),
            Outcome::Refused => {
                workspace.clear();
                issue()
            }
        }
    }

    /// The update that [`Trainer::pass`] has in a whole step, for steps of several micro-batches.
    pub(super) fn issue_update(&mut self) -> Result<()> {
        let Self {
            params,
            grads,
            optimizer,
            sums,
            graphs,
            options,
            ..
        } = self;
        let (Device::Cuda(device), Some(mut update)) = (&options.device, optimizer.on_gpu()) else {
            return Ok(());
        };
        let addresses = [
            &params.addresses()[..],
            &grads.addresses(),
            &update.addresses(),
        ];
        let memory = (addresses.concat(), 0);
        let mut issue = || update.issue(params, grads, sums);
        match graphs.run(device, Recorded::Update, memory, &mut issue)? {
            Outcome::Done => Ok(()),
            Outcome::Refused => issue(),
        }
    }
}
