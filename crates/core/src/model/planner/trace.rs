//! What one micro-batch takes from the pool and gives back, in the order of the passes themselves:
//! the same calls as in `layer.rs`, `linear.rs` and their kernels, and to be changed with them.

use super::StepShape;
use super::pool::{Pool, Slot, row_bytes};
use super::saved::{Attention, Down, GateUp, NormedOutput, Parts, Saved};
use super::shape::{GroupShape, LayerShape, Method, NormShape, PartShape};
use crate::model::{Keep, QkNorm};
use ferrotune_kernels::{DType, Workspace};

/// Bytes per row of the pool after a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Held {
    /// What layers keep from forward to backward.
    pub(super) kept: u64,
    /// All buffers.
    pub(super) all: u64,
    /// What each layer keeps in host memory.
    pub(super) host: Vec<u64>,
    /// All buffers that are as large whatever the rows.
    pub(super) fixed: u64,
    /// What methods with a forward of their own keep, outside of the pool.
    pub(super) own: u64,
}

/// Runs one micro-batch over counted buffers.
pub(super) fn run(shape: &StepShape, keep: &[Keep]) -> Held {
    let mut trace = Trace {
        shape,
        pool: Pool::default(),
        fixed: Pool::default(),
        own: Pool::default(),
    };
    let act = shape.activations;
    let width = shape.hidden;
    let angles: Vec<Slot> = (shape.rotary_dims.iter())
        .flat_map(|dim| [(); 2].map(|()| trace.pool.take(DType::F32, dim / 2)))
        .collect();
    // Forward: the stream, its norm and the norm's statistics.
    let stream = trace.pool.take(act, width);
    trace.table_forward(shape.embedding);
    if shape.learned_positions {
        trace.pool.pass(act, width);
    }
    trace.table_forward(shape.positions);
    let mut flow = trace.normed(stream, shape.norm_before(0), shape.room_before(0));
    let reached = shape.first_reached();
    let mut saved: Vec<(usize, Saved)> = Vec::new();
    let mut leaving = Vec::new();
    let mut host = vec![0; shape.layers.len()];
    for (i, layer) in shape.layers.iter().enumerate() {
        let policy = (i >= reached).then(|| keep.get(i).copied().unwrap_or_default());
        let next_norm = (shape.norm_before(i + 1), shape.room_before(i + 1));
        let (next, layer_saved) = trace.layer_forward(layer, flow, next_norm, policy);
        flow = next;
        trace.give_all(std::mem::take(&mut leaving));
        if let Some(saved) = layer_saved.as_ref().filter(|_| i < shape.offloaded) {
            leaving = saved.slots();
            host[i] = leaving.iter().copied().map(row_bytes).sum();
        }
        saved.extend(layer_saved.map(|s| (i, s)));
    }
    trace.give_all(leaving);
    // Angles, the stream, its norm and statistics are no layer's.
    let no_layers = flow.slots().chain(angles.iter().copied()).map(row_bytes);
    let kept = trace.pool.live() - no_layers.sum::<u64>();
    // Loss and the gradient of the last norm.
    let d_hidden = trace.pool.take(act, width);
    let head = trace.head_update();
    if !shape.on_gpu {
        let update = (shape.head_update() > 0).then_some(shape.head_update());
        let [rows, turned] = [(); 2].map(|()| trace.pool.take(DType::F32, width));
        let s = update.map(|cols| trace.pool.take(DType::F32, cols));
        trace.pool.give(turned);
        let d_s = update.map(|cols| trace.pool.take(DType::F32, cols));
        trace.give_all([rows].into_iter().chain(s).chain(d_s));
    }
    trace.give_all(head);
    trace.give_all(flow.y);
    let rooms = shape.layers.iter().map(|l| l.o.room.max(l.down.room));
    let d_stream = trace.pool.take(act, width + rooms.max().unwrap_or(0));
    trace.give_all([d_hidden, flow.stream].into_iter().chain(flow.statistics));
    // The layer from which on everything is there.
    let mut there = shape.layers.len();
    while let Some((i, layer_saved)) = saved.pop() {
        trace.fetch(i, &layer_saved, &mut there);
        if let Some((next, saved)) = saved.last() {
            trace.fetch(*next, saved, &mut there);
        }
        let needs_input = shape.input_trained || i > reached;
        trace.layer_backward(&shape.layers[i], layer_saved, needs_input);
    }
    for table in [shape.positions, shape.embedding] {
        trace.table_backward(table);
    }
    trace.pool.give(d_stream);
    trace.give_all(angles);
    Held {
        kept,
        all: trace.pool.held(),
        host,
        fixed: trace.fixed.held(),
        own: trace.own.held(),
    }
}

struct Trace<'a> {
    shape: &'a StepShape,
    pool: Pool,
    /// Buffers that are as large whatever the rows, as if each were one row.
    fixed: Pool,
    /// Of methods with a forward of their own.
    own: Pool,
}

/// What goes from layer to layer: a stream, its norm and the norm's statistics.
#[derive(Clone, Copy)]
struct Flow {
    stream: Slot,
    y: Option<Slot>,
    statistics: Option<Slot>,
}

impl Flow {
    fn slots(self) -> impl Iterator<Item = Slot> {
        [self.stream]
            .into_iter()
            .chain(self.y)
            .chain(self.statistics)
    }
}

impl Trace<'_> {
    /// Takes what layer `i` has in host memory, unless that was done.
    fn fetch(&mut self, i: usize, saved: &Saved, there: &mut usize) {
        if i < *there && i < self.shape.offloaded {
            for (dtype, cols) in saved.slots() {
                self.pool.take(dtype, cols);
            }
        }
        *there = (*there).min(i);
    }

    fn give_all(&mut self, slots: impl IntoIterator<Item = Slot>) {
        slots.into_iter().for_each(|slot| self.pool.give(slot));
    }

    fn give_parts(&mut self, parts: Parts) {
        self.give_all(parts.rows);
        parts
            .norms
            .into_iter()
            .for_each(|slot| self.fixed.give(slot));
        parts.own.into_iter().for_each(|slot| self.own.give(slot));
    }

    fn give_gate_up(&mut self, gate_up: GateUp) {
        self.give_parts(gate_up.parts);
        self.pool.give(gate_up.values);
    }

    /// The rows of a table.
    fn table_forward(&mut self, table: Method) {
        let Method::LowRank { rank, scaled, .. } = table else {
            return;
        };
        self.pool.pass(self.shape.factors, self.aligned(rank));
        if scaled {
            let norms = self.norms_of([rank, self.shape.hidden], None, rank * self.shape.hidden);
            self.fixed.give(norms);
        }
    }

    fn table_backward(&mut self, table: Method) {
        let Method::LowRank { rank, scaled, .. } = table else {
            return;
        };
        // The rows again, and then their gradient.
        let width = self.shape.hidden;
        let unscaled = scaled.then(|| self.pool.take(self.shape.activations, width));
        let cols = self.aligned(rank);
        let both = [(); 2].map(|()| self.pool.take(self.shape.factors, cols));
        self.give_all(both.into_iter().chain(unscaled));
    }

    /// DoRA's norms of `width` rows or columns, from two products of such a shape, of which `cross` has been taken where it
    /// is given; `more` values beside them on the way.
    fn norms_of(&mut self, [rank, width]: [usize; 2], cross: Option<Slot>, more: usize) -> Slot {
        let cross = cross.unwrap_or_else(|| self.fixed.take(DType::F32, rank * width));
        let gram = (self.shape.factors, rank * rank);
        let made = [gram, (DType::F32, rank * width), (DType::F32, more)];
        let made = made.into_iter().filter(|slot| slot.1 > 0);
        let made: Vec<Slot> = made
            .map(|(dtype, len)| self.fixed.take(dtype, len))
            .collect();
        let norms = self.fixed.take(DType::F32, width);
        made.into_iter()
            .chain([cross])
            .for_each(|slot| self.fixed.give(slot));
        norms
    }

    /// The norm of a stream, with room for the updates of what reads it.
    fn normed(&mut self, stream: Slot, norm: NormShape, room: usize) -> Flow {
        let act = self.shape.activations;
        Flow {
            stream,
            y: norm.map(|_| self.pool.take(act, self.shape.hidden + room)),
            statistics: norm.map(|columns| self.pool.take(DType::F32, columns)),
        }
    }

    /// Where a block's output, which has a slot, joins the stream.
    fn join(
        &mut self,
        output: Slot,
        norm: NormShape,
        (next, room): (NormShape, usize),
    ) -> (Flow, NormedOutput) {
        let (stream, saved) = match norm {
            None => (output, Vec::new()),
            Some(columns) => {
                let y = self.pool.take(self.shape.activations, self.shape.hidden);
                (y, vec![output, self.pool.take(DType::F32, columns)])
            }
        };
        (self.normed(stream, next, room), saved)
    }

    /// The gradient of a block's output, where it has a slot of its own.
    fn join_backward(
        &mut self,
        layer: &LayerShape,
        saved: NormedOutput,
        room: usize,
    ) -> Option<Slot> {
        let (act, width) = (self.shape.activations, self.shape.hidden + room);
        let scaled = layer.scaled.then(|| self.pool.take(act, width));
        if saved.is_empty() {
            return scaled;
        }
        let d_output = self.pool.take(act, width);
        self.give_all(scaled);
        self.give_all(saved);
        Some(d_output)
    }

    fn layer_forward(
        &mut self,
        layer: &LayerShape,
        flow: Flow,
        next_norm: (NormShape, usize),
        keep: Option<Keep>,
    ) -> (Flow, Option<Saved>) {
        let act = self.shape.activations;
        let (attention, y) = self.attend(layer, flow.y);
        let gate_up = self.gate_up(layer, y);
        let activated = self
            .pool
            .take(act, layer.down.in_features + layer.down.room);
        let output = self.pool.take(act, layer.down.out_features);
        let parts = self.group_forward(&layer.down);
        self.pool.give(activated);
        let (next, output) = self.join(output, layer.mlp_output_norm, next_norm);
        let mut saved = Saved {
            input: [flow.stream].into_iter().chain(flow.statistics).collect(),
            attention: Some(attention),
            gate_up: Some(gate_up),
            down: Down { parts, output },
        };
        if keep != Some(Keep::All) {
            let gate_up = saved.gate_up.take();
            gate_up.into_iter().for_each(|g| self.give_gate_up(g));
        }
        if matches!(keep, Some(Keep::Input) | None)
            && let Some(attention) = saved.attention.take()
        {
            self.give_all(attention.core);
            self.give_all(attention.middle);
            self.give_all(attention.output);
            self.give_parts(attention.qkv_parts);
            self.give_parts(attention.o_parts);
        }
        if keep.is_none() {
            self.give_all(saved.input);
            self.give_parts(saved.down.parts);
            self.give_all(saved.down.output);
            return (next, None);
        }
        (next, Some(saved))
    }

    /// The attention block; gives the normed input back.
    fn attend(&mut self, layer: &LayerShape, y: Option<Slot>) -> (Attention, Option<Slot>) {
        let act = self.shape.activations;
        let qkv = self.pool.take(act, layer.qkv.out_features);
        let qkv_parts = self.group_forward(&layer.qkv);
        self.give_all(y);
        let positioned = self.positioned(layer);
        let attended = self.pool.take(act, layer.o.in_features + layer.o.room);
        let lse = self.pool.take(DType::F32, self.shape.heads);
        self.give_all(positioned);
        let output = self.pool.take(act, layer.o.out_features);
        let o_parts = self.group_forward(&layer.o);
        let next = (layer.mlp_norm, layer.gate_up.room);
        let (middle, output) = self.join(output, layer.attention_norm, next);
        let attention = Attention {
            core: [qkv, attended, lse],
            qkv_parts,
            o_parts,
            output,
            middle: [middle.stream]
                .into_iter()
                .chain(middle.statistics)
                .collect(),
        };
        (attention, middle.y)
    }

    /// q and k with their norms and positions.
    fn positioned(&mut self, layer: &LayerShape) -> Option<Slot> {
        let norms = layer.positioned?;
        let columns = norms.widths.iter().sum();
        let positioned = self.pool.take(self.shape.activations, columns);
        if norms.over == QkNorm::Whole {
            self.pool.pass(DType::F32, 1);
        }
        Some(positioned)
    }

    /// gate and up with their low-rank intermediates; gives the normed stream back.
    fn gate_up(&mut self, layer: &LayerShape, y: Option<Slot>) -> GateUp {
        let values = self.pool.take(
            self.shape.activations,
            layer.gate_up.out_features + layer.gate_up.room,
        );
        let parts = self.group_forward(&layer.gate_up);
        self.give_all(y);
        GateUp { values, parts }
    }

    /// A norm computed again.
    fn normed_again(&mut self, norm: NormShape, room: usize) -> Option<Slot> {
        norm.map(|_| {
            self.pool
                .take(self.shape.activations, self.shape.hidden + room)
        })
    }

    fn layer_backward(&mut self, layer: &LayerShape, saved: Saved, needs_input: bool) {
        let (act, width) = (self.shape.activations, self.shape.hidden);
        let (attention, y) = match saved.attention {
            Some(attention) => (attention, None),
            None => {
                let y = self.normed_again(layer.input_norm, layer.qkv.room);
                let (attention, y) = self.attend(layer, y);
                (attention, Some(y))
            }
        };
        let gate_up = match saved.gate_up {
            Some(gate_up) => gate_up,
            None => {
                let y = y.unwrap_or_else(|| self.normed_again(layer.mlp_norm, layer.gate_up.room));
                self.gate_up(layer, y)
            }
        };
        self.mlp_backward(layer, gate_up, saved.down);
        self.give_all(attention.middle);

        let d_output = self.join_backward(layer, attention.output, layer.o.room);
        let d_attended = self.pool.take(act, layer.o.in_features);
        self.group_backward(&layer.o, true);
        self.give_parts(attention.o_parts);
        self.give_all(d_output);
        let d_qkv = self.pool.take(act, layer.qkv.out_features + layer.qkv.room);
        let positioned = self.positioned(layer);
        if self.shape.on_gpu {
            // The row sums of the attention's backward.
            self.pool.pass(DType::F32, self.shape.heads);
        }
        let [qkv, attended, lse] = attention.core;
        self.give_all([d_attended, attended, lse].into_iter().chain(positioned));
        self.position_backward(layer);
        self.pool.give(qkv);
        let normed = self.normed_again(layer.input_norm, layer.qkv.room);
        let d_normed = self.pool.take(act, width);
        self.group_backward(&layer.qkv, needs_input || layer.input_norm_trained);
        self.give_parts(attention.qkv_parts);
        self.give_all(normed);
        self.pool.give(d_normed);
        self.pool.give(d_qkv);
        self.give_all(saved.input);
    }

    /// What the backward of norms of q and k takes.
    fn position_backward(&mut self, layer: &LayerShape) {
        let Some(norms) = layer.positioned else {
            return;
        };
        if norms.over == QkNorm::Whole {
            let columns = norms.widths.iter().sum();
            let buffers = [(); 2].map(|()| self.pool.take(self.shape.activations, columns));
            self.pool.pass(DType::F32, 1);
            self.give_all(buffers);
            return;
        }
        let trained = norms.heads.into_iter().zip(norms.trained);
        for (heads, _) in trained.filter(|(_, trained)| *trained && self.shape.on_gpu) {
            self.pool.pass(DType::F32, heads);
        }
    }

    fn mlp_backward(&mut self, layer: &LayerShape, gate_up: GateUp, down: Down) {
        let act = self.shape.activations;
        let d_output = self.join_backward(layer, down.output, layer.down.room);
        let rooms = match layer.down.in_halves() {
            true => vec![layer.down.room],
            false => vec![layer.down.room, 0],
        };
        let activated: Vec<Slot> = (rooms.into_iter())
            .map(|room| self.pool.take(act, layer.down.in_features + room))
            .collect();
        self.group_backward(&layer.down, true);
        self.give_parts(down.parts);
        self.give_all(d_output);
        self.give_all(activated);
        let normed = self.normed_again(layer.mlp_norm, layer.gate_up.room);
        let d_normed = self.pool.take(act, layer.gate_up.in_features);
        self.group_backward(&layer.gate_up, true);
        self.give_gate_up(gate_up);
        self.give_all(normed);
        self.pool.give(d_normed);
    }

    /// What the head's update holds while the loss is computed: s and its gradient.
    fn head_update(&mut self) -> Vec<Slot> {
        let width = self.shape.head_update();
        if width == 0 {
            return Vec::new();
        }
        let (cols, method) = (self.aligned(width), self.shape.head_method);
        if matches!(method, Method::LowRank { scaled: true, .. }) {
            self.scaled_head(width);
        }
        let slots = [(); 2].map(|()| self.pool.take(self.shape.factors, cols));
        if matches!(method, Method::LowRank { dropout: true, .. }) {
            self.pool.pass(self.shape.activations, self.shape.hidden);
        }
        slots.to_vec()
    }

    /// DoRA's norms of the head's rows, a copy of B and its gradient, and three values per row on the way.
    fn scaled_head(&mut self, rank: usize) {
        let vocabulary = self.shape.vocabulary;
        let elements = vocabulary * self.aligned(rank);
        let copy = self.fixed.take(self.shape.factors, elements);
        let norms = self.norms_of([rank, vocabulary], None, 0);
        let gradient = self.fixed.take(DType::F32, elements);
        let values = [(); 3].map(|()| self.fixed.take(DType::F32, vocabulary));
        let taken = [copy, norms, gradient].into_iter().chain(values);
        taken.for_each(|slot| self.fixed.give(slot));
    }

    /// Columns of a low-rank intermediate.
    fn aligned(&self, rank: usize) -> usize {
        Workspace::aligned(self.shape.factors, rank)
    }

    /// What the parts keep.
    fn group_forward(&mut self, group: &GroupShape) -> Parts {
        if self.shape.int8 {
            // Bytes of the input as numbers, and a scale per row.
            let codes = self.pool.take(self.shape.head, group.in_features);
            let scales = self.pool.take(DType::F32, 1);
            self.give_all([codes, scales]);
        }
        let mut kept = Parts::default();
        if group.room > 0 {
            let s = self.pool.take(self.shape.factors, group.room);
            kept.rows.push(s);
            if group.has_dropout() {
                self.pool.pass(self.shape.activations, group.in_features);
            }
            return kept;
        }
        self.changed(group);
        let scaled = group.parts.iter().filter_map(|part| match part.method {
            Method::LowRank {
                rank, scaled: true, ..
            } => Some([rank, part.out_features]),
            _ => None,
        });
        let crosses: Vec<Slot> = (scaled.clone())
            .map(|[rank, width]| self.fixed.take(DType::F32, rank * width))
            .collect();
        for (shape, cross) in scaled.zip(crosses) {
            kept.norms.push(self.norms_of(shape, Some(cross), 0));
        }
        for part in &group.parts {
            if let Method::Custom {
                kept: columns @ 1..,
            } = part.method
            {
                kept.own
                    .push(self.own.take(self.shape.activations, columns));
            }
            if let Method::LowRank {
                rank,
                dropout,
                scaled,
            } = part.method
            {
                kept.rows
                    .push(self.pool.take(self.shape.factors, self.aligned(rank)));
                if dropout {
                    self.pool.pass(self.shape.activations, group.in_features);
                }
                if scaled {
                    kept.rows
                        .push(self.pool.take(self.shape.activations, part.out_features));
                }
            }
        }
        kept
    }

    /// Inputs, or their gradient, of the change of a weight, where some are dropped.
    fn changed(&mut self, group: &GroupShape) {
        let changed = |part: &PartShape| part.method == Method::Changed { dropout: true };
        if group.parts.iter().any(changed) {
            self.pool.pass(self.shape.activations, group.in_features);
        }
    }

    /// Buffers of a group's backward, without those that its parts kept.
    fn group_backward(&mut self, group: &GroupShape, needs_input: bool) {
        let act = self.shape.activations;
        if group.room > 0 {
            if group.has_dropout() {
                self.pool.pass(act, group.in_features);
            }
            return;
        }
        let changes = group.parts.iter().any(PartShape::changes_output);
        let base_dy = changes.then(|| self.pool.take(act, group.out_features));
        self.changed(group);
        for part in &group.parts {
            if let Method::LowRank { rank, dropout, .. } = part.method {
                let ds = self.pool.take(self.shape.factors, self.aligned(rank));
                if dropout {
                    self.pool.pass(act, group.in_features);
                }
                if dropout && needs_input {
                    self.pool.pass(act, group.in_features);
                }
                self.pool.give(ds);
            }
        }
        self.give_all(base_dy);
    }
}
