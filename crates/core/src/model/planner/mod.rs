//! What each layer keeps, decided from the memory that is there.
//!
//! A pure function of shapes: [`StepShape::predict`] counts the bytes that the largest micro-batch
//! takes under given policies, and [`StepShape::plan`] finds the policies that fit with the least to
//! compute again. Nothing is allocated and no weight is read for it.

mod cost;
mod host;
mod pool;
mod saved;
mod shape;
#[cfg(test)]
mod tests;
mod trace;

use super::{DecoderConfig, Keep, ModelPlan, QkNorm, angles, offload};
use crate::adapter::{Attachment, SiteId};
use crate::data::{BatchSize, padded_rows};
use ferrotune_kernels::{DType, Device, Workspace, cuda, int8_linear, linear_cross_entropy};
use shape::{GroupShape, LayerShape, Method};
use std::collections::BTreeSet;

/// Most numbers of recomputed layers that are tried; a deeper model is searched in larger strides.
const MOST_TRIED: usize = 128;
/// One part in so many of the memory stays free: for what else the machine does, and for pieces too
/// small to use.
const RESERVE: u64 = 32;
/// Bytes of a scratch below which writing ahead costs more in launches than it hides.
const SMALLEST_AHEAD: u64 = 4 << 20;
/// Bytes of ids, positions, counters of random draws, label rows and targets per token.
const INDEX_BYTES: usize = 24;

/// The micro-batches of a run, as far as memory depends on them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Workload {
    /// Tokens of the longest, without padding.
    pub tokens: usize,
    /// Documents of the micro-batch that has most.
    pub documents: usize,
    /// Numbers of label rows that occur. Those of one power of two count as one.
    pub label_rows: BTreeSet<usize>,
    /// Mean number of tokens of a document.
    pub mean_length: f64,
    /// Sizes of training, of which every padded size has one at least.
    pub sizes: Vec<BatchSize>,
}

impl Workload {
    /// The same behind a prompt of `tokens` virtual tokens before each document.
    #[must_use]
    pub fn behind_prompt(mut self, tokens: usize) -> Self {
        if tokens == 0 {
            return self;
        }
        // The largest micro-batch may have as many documents as any; each may have one more label.
        self.tokens += tokens * self.documents;
        self.mean_length += tokens as f64;
        let more = self.label_rows.iter().map(|rows| rows + self.documents);
        let more: Vec<usize> = more.collect();
        self.label_rows.extend(more);
        self
    }
}

/// Shapes of a training step: all that its memory and its work depend on.
#[derive(Clone, Debug)]
pub struct StepShape {
    hidden: usize,
    heads: usize,
    /// Of each rope.
    rotary_dims: Vec<usize>,
    /// Blocks of rows that the tables of angles have.
    angle_variants: usize,
    learned_positions: bool,
    /// Rows of the head.
    vocabulary: usize,
    layers: Vec<LayerShape>,
    /// Columns of the statistics of the final norm.
    final_norm: usize,
    embedding: Method,
    positions: Method,
    /// Whether anything before the layers is trained.
    input_trained: bool,
    head_method: Method,
    /// Gradients of B that are written beside a copy of it.
    head_copies: usize,
    on_gpu: bool,
    activations: DType,
    head: DType,
    /// Bytes of the scratch for weights that are not held as values.
    scratch: u64,
    /// Whether linears multiply bytes.
    int8: bool,
    /// Bytes of a weight and of its gradient where a method changes the weight.
    changed: u64,
    /// Of low-rank factors in products, and of what they make.
    factors: DType,
    tokens: usize,
    label_rows: BTreeSet<usize>,
    label_share: f64,
    mean_length: f64,
    /// How many of the first layers have what they keep in host memory.
    offloaded: usize,
}

/// Bytes of a training step beside weights and trained values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepBytes {
    /// Kept by the layers from forward to backward, without what is in host memory.
    pub kept: u64,
    /// Other buffers of the pool: those of the layer at work, of gradients, and of the weights at work
    /// where they are held as codes.
    pub working: u64,
    /// Logits of a chunk and what belongs to them.
    pub loss: u64,
    /// Angles of positions, indices, and the workspace of a GPU's products.
    pub other: u64,
}

impl StepBytes {
    /// All of them.
    #[must_use]
    pub fn total(self) -> u64 {
        [self.working, self.loss, self.other]
            .into_iter()
            .fold(self.kept, u64::saturating_add)
    }
}

/// What each layer keeps, and what that takes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ActivationPlan {
    /// One policy per layer. Layers that backward does not reach keep nothing, whatever stands here.
    pub keep: Vec<Keep>,
    /// Bytes of the step.
    pub bytes: StepBytes,
    /// Floating point operations done again, as a share of those of the step without.
    pub extra_compute: f64,
    /// Whether weights that are held as codes are written out ahead of their products, into a second scratch that
    /// is counted.
    pub write_ahead: bool,
    /// How many of the first layers have what they keep in pinned host memory, from forward to backward.
    pub offloaded: usize,
    /// Bytes of that memory.
    pub host: u64,
    /// What the stream of operations is expected to wait for it, as a share of the step's: by an assumed speed of the link.
    pub waiting: f64,
}

impl ActivationPlan {
    /// What it takes more than a step that keeps everything, as a share of that step.
    #[must_use]
    pub fn cost(&self) -> f64 {
        self.extra_compute + self.waiting
    }
}

/// Bytes for a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepMemory {
    /// Of the device that computes, for all of [`StepBytes`].
    pub device: u64,
    /// Of the host, for what layers keep there.
    pub host: u64,
}

impl StepMemory {
    /// Whether `plan` finds room in it.
    #[must_use]
    pub fn holds(self, plan: &ActivationPlan) -> bool {
        plan.bytes.total() <= self.device && plan.host <= self.host
    }
}

impl StepShape {
    /// The step of `config` with `attachments` on micro-batches as `workload` says.
    ///
    /// `weights` and `activations` are the dtypes of frozen weights and of activations on `device`.
    #[must_use]
    pub fn new(
        config: &DecoderConfig,
        attachments: &[(SiteId, Attachment)],
        device: &Device,
        [weights, activations]: [DType; 2],
        workload: &Workload,
    ) -> Self {
        let (layers, [embedding, head_method, positions]) =
            shape::layers(config, attachments, device);
        let on_gpu = device.is_cuda();
        // As `Inputs` pads them.
        let padded = |rows: usize| if on_gpu { padded_rows(rows) } else { rows };
        let tokens = padded(workload.tokens);
        let most_labels = workload.label_rows.last().copied().unwrap_or(0);
        Self {
            hidden: config.hidden_size,
            heads: config.heads,
            rotary_dims: config.ropes.iter().map(|rope| rope.rotary_dim).collect(),
            angle_variants: angles::variants(&config.ropes),
            learned_positions: config.modules.positions.is_some(),
            vocabulary: config.outputs(),
            layers,
            final_norm: config.norm.statistics(),
            embedding,
            positions,
            input_trained: embedding != Method::Frozen || positions != Method::Frozen,
            head_method,
            head_copies: shape::head_copies(&ModelPlan::new(config), attachments),
            on_gpu,
            activations,
            head: weights,
            scratch: 0,
            int8: false,
            changed: shape::changed_bytes(&ModelPlan::new(config), attachments),
            factors: if on_gpu { activations } else { DType::F32 },
            tokens,
            label_rows: workload.label_rows.iter().copied().map(padded).collect(),
            label_share: padded(most_labels) as f64 / tokens.max(1) as f64,
            mean_length: workload.mean_length,
            offloaded: 0,
        }
    }

    /// The same with what layers keep in host memory, of all but the last few; on a CPU as it is.
    #[must_use]
    pub fn with_offloading(self) -> Self {
        let layers = offload::offloadable(self.layers.len());
        self.with_offloaded(layers)
    }

    /// The same with what the first `layers` keep in host memory; on a CPU as it is.
    #[must_use]
    pub fn with_offloaded(mut self, layers: usize) -> Self {
        self.offloaded = if self.on_gpu { layers } else { 0 };
        self
    }

    /// The same with linears that are held as codes and written out for each product.
    #[must_use]
    pub fn with_quantised_linears(mut self) -> Self {
        let largest = self.groups().map(GroupShape::elements).max();
        self.scratch = (largest.unwrap_or(0) as u64).saturating_mul(self.head.bytes() as u64);
        self
    }

    /// The same with linears that multiply bytes (`LLM.int8()`).
    #[must_use]
    pub fn with_int8_linears(mut self) -> Self {
        for layer in &mut self.layers {
            layer
                .groups_mut()
                .into_iter()
                .for_each(|group| group.room = 0);
        }
        let widest = self.groups().map(|g| g.in_features).max().unwrap_or(0);
        let more = int8_linear::scratch_bytes(self.on_gpu, self.activations, widest) as u64;
        let mut shape = self.with_quantised_linears();
        shape.scratch = shape.scratch.saturating_add(more);
        shape.int8 = true;
        shape
    }

    /// Bytes of the margins of weights, in which low-rank factors lie. Those of weights that are held as codes are
    /// in the scratch.
    #[must_use]
    pub fn margins(&self) -> u64 {
        if self.scratch > 0 {
            return 0;
        }
        let margins = self
            .groups()
            .map(|g| g.elements() - g.out_features * g.in_features);
        (margins.sum::<usize>() * self.head.bytes()) as u64
    }

    fn groups(&self) -> impl Iterator<Item = &GroupShape> {
        let layers = self.layers.iter();
        layers.flat_map(|l| [&l.qkv, &l.o, &l.gate_up, &l.down])
    }

    /// Number of layers.
    #[must_use]
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Bytes that a method makes of its parameters in a pass, as many whatever the rows: norms of DoRA, and what is between.
    #[must_use]
    pub fn of_method(&self) -> u64 {
        trace::run(self, &[]).fixed
    }

    /// What policies take; layers without one keep everything.
    #[must_use]
    pub fn predict(&self, keep: &[Keep]) -> ActivationPlan {
        let held = trace::run(self, keep);
        let rows = self.tokens as u64;
        let all = held.all.saturating_mul(rows);
        let kept = held.kept.saturating_mul(rows);
        let policy = |i: usize| keep.get(i).copied().unwrap_or_default();
        let reached = self.first_reached();
        let again = (self.layers.iter().enumerate().skip(reached))
            .map(|(i, layer)| cost::again(self, layer, policy(i)));
        let step = cost::step(self);
        ActivationPlan {
            keep: (0..self.layers.len()).map(policy).collect(),
            bytes: StepBytes {
                kept,
                working: (all - kept)
                    .saturating_add(self.scratch)
                    .saturating_add(held.fixed)
                    .saturating_add(self.qk_norm_bytes()),
                loss: self.loss_bytes(),
                other: self
                    .other_bytes()
                    .saturating_add(held.own.saturating_mul(rows)),
            },
            extra_compute: again.sum::<f64>() / step.max(1.0),
            write_ahead: false,
            offloaded: self.offloaded,
            host: held.host.iter().sum::<u64>().saturating_mul(rows),
            waiting: cost::waiting(self, policy, &held.host) / step.max(1.0),
        }
    }

    /// `plan` with weights written out ahead of their products, if the second scratch finds room beside it in the
    /// memory that [`StepShape::usable`] leaves. To keep more of a layer comes first: computing it again takes
    /// longer than what this saves.
    #[must_use]
    pub fn ahead_for(&self, plan: ActivationPlan, available: u64, taken: u64) -> ActivationPlan {
        let with = self.ahead(plan.clone());
        match with.bytes.total() <= Self::usable(available, taken) {
            true => with,
            false => plan,
        }
    }

    /// `plan` with weights written out ahead of their products, whatever that takes; without where it makes no
    /// difference, or they are small.
    #[must_use]
    pub fn ahead(&self, mut plan: ActivationPlan) -> ActivationPlan {
        if self.on_gpu && !self.int8 && self.scratch >= SMALLEST_AHEAD {
            plan.write_ahead = true;
            plan.bytes.working = plan.bytes.working.saturating_add(self.scratch);
        }
        plan
    }

    /// Bytes for a step on a machine with `available` bytes, of which `taken` are weights and trained values.
    #[must_use]
    pub fn usable(available: u64, taken: u64) -> u64 {
        (available - available / RESERVE).saturating_sub(taken)
    }

    /// The plan with the least [`ActivationPlan::cost`] of those whose step finds room in `memory`, else the one that
    /// takes the least.
    ///
    /// Earlier layers keep less than later ones: backward ends with them, when what the others kept is
    /// free again for what they need to be computed anew.
    #[must_use]
    pub fn plan(&self, memory: StepMemory) -> ActivationPlan {
        let everything = self.predict(&[]);
        if memory.holds(&everything) && everything.cost() == 0.0 {
            return everything;
        }
        let reached = self.layers.len() - self.first_reached();
        let stride = reached.div_ceil(MOST_TRIED).max(1);
        let numbers = (0..=reached).step_by(stride);
        let plans = numbers.flat_map(|recomputed| self.of_recomputed(recomputed, reached, memory));
        let cheapest = plans.min_by(|a, b| a.cost().total_cmp(&b.cost()));
        cheapest.unwrap_or_else(|| self.smallest())
    }

    /// The plan that takes the least memory.
    #[must_use]
    pub fn smallest(&self) -> ActivationPlan {
        let all = self.predict(&vec![Keep::Input; self.layers.len()]);
        // The last layer's backward comes first, when everything else is still kept: to compute it
        // again seldom saves anything.
        let last = self.layers.len().saturating_sub(1);
        let but_last = self.predict(&vec![Keep::Input; last]);
        if but_last.bytes.total() <= all.bytes.total() {
            but_last
        } else {
            all
        }
    }

    /// Plans that find room in `memory` and whose first `recomputed` layers of those reached keep their input: one in which as
    /// few of the next as will do drop gate and up, and one in which all do that move to the host, which may wait less.
    fn of_recomputed(
        &self,
        recomputed: usize,
        reached: usize,
        memory: StepMemory,
    ) -> Vec<ActivationPlan> {
        let first = self.first_reached();
        let plan = |dropped: usize| {
            let mut keep = vec![Keep::All; first];
            keep.resize(first + recomputed, Keep::Input);
            keep.resize(first + recomputed + dropped, Keep::DropGateUp);
            self.predict(&keep)
        };
        let all = reached - recomputed;
        let (mut too_few, mut enough) = (None, all);
        let mut fewest = plan(all);
        if !memory.holds(&fewest) {
            return Vec::new();
        }
        while enough > too_few.map_or(0, |few: usize| few + 1) {
            let low = too_few.map_or(0, |few| few + 1);
            let middle = low + (enough - low) / 2;
            let candidate = plan(middle);
            if memory.holds(&candidate) {
                (enough, fewest) = (middle, candidate);
            } else {
                too_few = Some(middle);
            }
        }
        let moved = self.offloaded.saturating_sub(first + recomputed).min(all);
        let dropped = (moved > enough).then(|| plan(moved));
        let dropped = dropped.filter(|plan| memory.holds(plan));
        [fewest].into_iter().chain(dropped).collect()
    }

    /// The first layer that backward reaches.
    fn first_reached(&self) -> usize {
        if self.input_trained {
            return 0;
        }
        let trained = self.layers.iter().position(|layer| layer.trained);
        trained.unwrap_or(self.layers.len())
    }

    /// The norm of the stream before layer `i`; after the last one it is the final norm.
    fn norm_before(&self, i: usize) -> shape::NormShape {
        let last = Some(self.final_norm);
        self.layers.get(i).map_or(last, |layer| layer.input_norm)
    }

    /// Columns beside what that norm writes.
    fn room_before(&self, i: usize) -> usize {
        self.layers.get(i).map_or(0, |layer| layer.qkv.room)
    }

    /// Scratch of the gradients of trained norms of q and k on a GPU: a sum per column of all heads.
    fn qk_norm_bytes(&self) -> u64 {
        let per_head = |norms: &shape::QkNormShape| norms.over == QkNorm::PerHead;
        let norms = self.layers.iter().filter_map(|layer| layer.positioned);
        let norms = norms.filter(per_head);
        let columns = norms.flat_map(|norms| norms.widths.into_iter().zip(norms.trained));
        let trained: BTreeSet<usize> = columns
            .filter_map(|(columns, trained)| (trained && self.on_gpu).then_some(columns))
            .collect();
        let columns: usize = trained.into_iter().sum();
        (columns * DType::F32.bytes()) as u64
    }

    fn loss_bytes(&self) -> u64 {
        let head = [self.vocabulary, self.hidden + self.head_update()];
        let label_rows = self.label_rows.iter().copied();
        let logits =
            linear_cross_entropy::scratch_bytes(self.on_gpu, self.head, head, label_rows) as u64;
        logits.saturating_add(self.wide_bytes())
    }

    /// Columns of the update that is added to the head's product.
    fn head_update(&self) -> usize {
        match self.head_method {
            Method::LowRank { rank, .. } => rank,
            Method::Changed { dropout: true } => self.hidden,
            _ => 0,
        }
    }

    /// B of the head's update and its gradients, where it is copied.
    fn wide_bytes(&self) -> u64 {
        let Method::LowRank { rank, .. } = self.head_method else {
            return 0;
        };
        if self.head_copies == 0 {
            return 0;
        }
        let cols = Workspace::aligned(self.factors, rank);
        let row = cols * (self.factors.bytes() + self.head_copies * DType::F32.bytes());
        (self.vocabulary as u64).saturating_mul(row as u64)
    }

    fn other_bytes(&self) -> u64 {
        // No position is beyond the longest document, which is no longer than a micro-batch.
        let positions = self.tokens.next_power_of_two() as u64;
        let columns = self.rotary_dims.iter().sum::<usize>() * self.angle_variants;
        let row = columns * DType::F32.bytes();
        let angles = positions.saturating_mul(row as u64);
        let indices = (self.tokens as u64).saturating_mul(INDEX_BYTES as u64);
        let products = if self.on_gpu { cuda::GEMM_WORKSPACE } else { 0 };
        let more = (products as u64).saturating_add(self.changed);
        angles.saturating_add(indices).saturating_add(more)
    }
}
