//! Whether what layers keep goes to host memory where nothing says so: only where that is expected to take less time than
//! to compute again what finds no room.

use super::{ActivationPlan, StepMemory, StepShape};
use crate::model::offload;
use std::collections::BTreeSet;

/// Bytes a second from a GPU to pinned host memory, or back. A guess until it is measured: about what PCIe 4 gives with
/// 16 lanes, of 32e9 on paper.
const LINK_BYTES: f64 = 20e9;
/// Floating point operations a second of a step in bf16, as an H100 has them (`benches/results`). The fastest GPU with the
/// slowest link: what hides by this reckoning hides elsewhere too.
const COMPUTE_FLOPS: f64 = 500e12;
/// Operations done while a byte moves.
pub(super) const FLOPS_PER_BYTE: f64 = COMPUTE_FLOPS / LINK_BYTES;
/// Numbers of layers that are tried, evenly apart.
const TRIED: usize = 8;
/// Share of a step that moving layers must save where the run would fit without: it rests on guesses.
const LEAST_GAIN: f64 = 0.02;

impl StepShape {
    /// The cheapest plan for a step in `memory`, what some of the first layers keep being in host memory where that helps.
    /// Without where everything finds room, and on a CPU. If nothing fits, the one that takes the least of the device.
    #[must_use]
    pub fn plan_beside_host(&self, memory: StepMemory) -> ActivationPlan {
        self.offloaded_if_it_pays(memory, |step| step.plan(memory))
    }

    /// What `plan` makes of this step, or of the same with layers in host memory where that costs less, or alone fits
    /// into `memory`.
    #[must_use]
    pub fn offloaded_if_it_pays(
        &self,
        memory: StepMemory,
        plan: impl Fn(&Self) -> ActivationPlan,
    ) -> ActivationPlan {
        let staying = plan(self);
        if !self.on_gpu || (memory.holds(&staying) && staying.cost() <= LEAST_GAIN) {
            return staying;
        }
        let first = self.first_reached();
        let most = offload::offloadable(self.layers.len());
        let moved = most.saturating_sub(first);
        let numbers: BTreeSet<usize> = (1..=TRIED).map(|n| first + moved * n / TRIED).collect();
        let moved = numbers.into_iter().filter(|&layers| layers > first);
        let moved = moved.map(|layers| plan(&self.clone().with_offloaded(layers)));
        let moved: Vec<_> = moved.filter(|plan| plan.host <= memory.host).collect();
        let fitting = moved.iter().filter(|plan| memory.holds(plan));
        let cheapest = fitting.min_by(|a, b| a.cost().total_cmp(&b.cost()));
        let pays = |plan: &&ActivationPlan| {
            !memory.holds(&staying) || plan.cost() + LEAST_GAIN <= staying.cost()
        };
        match cheapest.filter(pays) {
            Some(plan) => plan.clone(),
            None if memory.holds(&staying) => staying,
            None => {
                let plans = [staying].into_iter().chain(moved);
                let smallest = plans.min_by_key(|plan| plan.bytes.total());
                smallest.unwrap_or_default()
            }
        }
    }
}
