//! What one micro-batch takes from the pool and gives back, in the order of the passes themselves:
//! the same calls as in `layer.rs`, `linear.rs` and their kernels, and to be changed with them.

use super::StepShape;
use super::pool::{Pool, Slot};
use super::shape::{GroupShape, LayerShape, Method};
use crate::model::Keep;
use ferrotune_kernels::{DType, Workspace};

/// Bytes per row of the pool after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Held {
    /// What layers keep from forward to backward.
    pub(super) kept: u64,
    /// All buffers.
    pub(super) all: u64,
}

/// Runs one micro-batch over counted buffers.
pub(super) fn run(shape: &StepShape, keep: &[Keep]) -> Held {
    let mut trace = Trace {
        shape,
        pool: Pool::default(),
    };
    let act = shape.activations;
    let width = shape.hidden;
    let angles = [(); 2].map(|()| trace.pool.take(DType::F32, shape.rotary_dim / 2));
    // Forward: the stream, its norm and the norm's statistics.
    let mut flow = Flow::take(&mut trace);
    if let Method::LowRank { rank, .. } = shape.embedding {
        trace.pool.pass(shape.factors, trace.aligned(rank));
    }
    let reached = shape.first_reached();
    let mut saved = Vec::new();
    for (i, layer) in shape.layers.iter().enumerate() {
        let policy = (i >= reached).then(|| keep.get(i).copied().unwrap_or_default());
        let (next, layer_saved) = trace.layer_forward(layer, flow, policy);
        flow = next;
        saved.extend(layer_saved.map(|s| (i, s)));
    }
    // Angles, the stream, its norm and statistics are no layer's.
    let last = trace.row_bytes(act, 2 * width) + trace.row_bytes(DType::F32, 1 + shape.rotary_dim);
    let kept = trace.pool.live() - last;
    // Loss and the gradient of the last norm.
    let d_hidden = trace.pool.take(act, width);
    let head = trace.head_update();
    if !shape.on_gpu {
        let chunk = [(); 2].map(|()| trace.pool.take(DType::F32, width));
        chunk.into_iter().for_each(|slot| trace.pool.give(slot));
    }
    trace.give_all(head);
    trace.pool.give(flow.y);
    let d_stream = trace.pool.take(act, width);
    for slot in [d_hidden, flow.stream, flow.rstd] {
        trace.pool.give(slot);
    }
    while let Some((i, layer_saved)) = saved.pop() {
        let needs_input = shape.embedding != Method::Frozen || i > reached;
        trace.layer_backward(&shape.layers[i], layer_saved, needs_input);
    }
    if let Method::LowRank { rank, .. } = shape.embedding {
        let cols = trace.aligned(rank);
        let both = [(); 2].map(|()| trace.pool.take(shape.factors, cols));
        trace.give_all(both);
    }
    trace.pool.give(d_stream);
    trace.give_all(angles);
    Held {
        kept,
        all: trace.pool.held(),
    }
}

struct Trace<'a> {
    shape: &'a StepShape,
    pool: Pool,
}

/// What goes from layer to layer.
#[derive(Clone, Copy)]
struct Flow {
    stream: Slot,
    y: Slot,
    rstd: Slot,
}

impl Flow {
    fn take(trace: &mut Trace<'_>) -> Self {
        let (act, width) = (trace.shape.activations, trace.shape.hidden);
        Self {
            stream: trace.pool.take(act, width),
            y: trace.pool.take(act, width),
            rstd: trace.pool.take(DType::F32, 1),
        }
    }
}

/// Slots of a layer's saved activations.
struct Saved {
    input: [Slot; 2],
    attention: Option<Attention>,
    gate_up: Option<Vec<Slot>>,
    down_parts: Vec<Slot>,
}

struct Attention {
    /// q/k/v, the attention output, log-sum-exp.
    core: [Slot; 3],
    qkv_parts: Vec<Slot>,
    o_parts: Vec<Slot>,
    /// The stream before the mlp and its norm's statistics.
    middle: [Slot; 2],
}

impl Trace<'_> {
    fn row_bytes(&self, dtype: DType, cols: usize) -> u64 {
        (dtype.bytes() * cols) as u64
    }

    fn give_all(&mut self, slots: impl IntoIterator<Item = Slot>) {
        slots.into_iter().for_each(|slot| self.pool.give(slot));
    }

    fn layer_forward(
        &mut self,
        layer: &LayerShape,
        flow: Flow,
        keep: Option<Keep>,
    ) -> (Flow, Option<Saved>) {
        let act = self.shape.activations;
        let (attention, y) = self.attend(layer, flow.y);
        let gate_up = self.gate_up(layer, y);
        let activated = self.pool.take(act, layer.down.in_features);
        let stream = self.pool.take(act, layer.down.out_features);
        let down_parts = self.group_forward(&layer.down);
        self.pool.give(activated);
        let next = Flow {
            stream,
            y: self.pool.take(act, self.shape.hidden),
            rstd: self.pool.take(DType::F32, 1),
        };
        let mut saved = Saved {
            input: [flow.stream, flow.rstd],
            attention: Some(attention),
            gate_up: Some(gate_up),
            down_parts,
        };
        if keep != Some(Keep::All) {
            let gate_up = saved.gate_up.take();
            self.give_all(gate_up.into_iter().flatten());
        }
        if matches!(keep, Some(Keep::Input) | None)
            && let Some(attention) = saved.attention.take()
        {
            self.give_all(attention.core);
            self.give_all(attention.middle);
            self.give_all(attention.qkv_parts);
            self.give_all(attention.o_parts);
        }
        if keep.is_none() {
            self.give_all(saved.input);
            self.give_all(saved.down_parts);
            return (next, None);
        }
        (next, Some(saved))
    }

    /// The attention block; gives the normed input back.
    fn attend(&mut self, layer: &LayerShape, y: Slot) -> (Attention, Slot) {
        let act = self.shape.activations;
        let qkv = self.pool.take(act, layer.qkv.out_features);
        let qkv_parts = self.group_forward(&layer.qkv);
        self.pool.give(y);
        let attended = self.pool.take(act, layer.o.in_features);
        let lse = self.pool.take(DType::F32, self.shape.heads);
        let stream = self.pool.take(act, layer.o.out_features);
        let o_parts = self.group_forward(&layer.o);
        let y = self.pool.take(act, self.shape.hidden);
        let attention = Attention {
            core: [qkv, attended, lse],
            qkv_parts,
            o_parts,
            middle: [stream, self.pool.take(DType::F32, 1)],
        };
        (attention, y)
    }

    /// gate and up with their low-rank intermediates; gives the normed stream back.
    fn gate_up(&mut self, layer: &LayerShape, y: Slot) -> Vec<Slot> {
        let values = self
            .pool
            .take(self.shape.activations, layer.gate_up.out_features);
        let mut slots = self.group_forward(&layer.gate_up);
        slots.push(values);
        self.pool.give(y);
        slots
    }

    fn layer_backward(&mut self, layer: &LayerShape, saved: Saved, needs_input: bool) {
        let (act, width) = (self.shape.activations, self.shape.hidden);
        let (attention, y) = match saved.attention {
            Some(attention) => (attention, None),
            None => {
                let y = self.pool.take(act, width);
                let (attention, y) = self.attend(layer, y);
                (attention, Some(y))
            }
        };
        let gate_up = match saved.gate_up {
            Some(gate_up) => gate_up,
            None => {
                let y = y.unwrap_or_else(|| self.pool.take(act, width));
                self.gate_up(layer, y)
            }
        };
        self.mlp_backward(layer, gate_up, saved.down_parts);
        self.give_all(attention.middle);

        let d_attended = self.pool.take(act, layer.o.in_features);
        self.group_backward(&layer.o, true);
        self.give_all(attention.o_parts);
        let d_qkv = self.pool.take(act, layer.qkv.out_features);
        if self.shape.on_gpu {
            // The row sums of the attention's backward.
            self.pool.pass(DType::F32, self.shape.heads);
        }
        self.pool.give(d_attended);
        self.give_all(attention.core);
        let normed = [(); 2].map(|()| self.pool.take(act, width));
        self.group_backward(&layer.qkv, needs_input || layer.input_norm_trained);
        self.give_all(attention.qkv_parts);
        self.give_all(normed);
        self.pool.give(d_qkv);
        self.give_all(saved.input);
    }

    fn mlp_backward(&mut self, layer: &LayerShape, gate_up: Vec<Slot>, down_parts: Vec<Slot>) {
        let act = self.shape.activations;
        let activated = [(); 2].map(|()| self.pool.take(act, layer.down.in_features));
        self.group_backward(&layer.down, true);
        self.give_all(down_parts);
        self.give_all(activated);
        let normed = [(); 2].map(|()| self.pool.take(act, layer.gate_up.in_features));
        self.group_backward(&layer.gate_up, true);
        self.give_all(gate_up);
        self.give_all(normed);
    }

    /// What the head's update holds while the loss is computed: s and its gradient.
    fn head_update(&mut self) -> Vec<Slot> {
        let Method::LowRank { rank, dropout } = self.shape.head_method else {
            return Vec::new();
        };
        let cols = self.aligned(rank);
        let slots = [(); 2].map(|()| self.pool.take(self.shape.factors, cols));
        if dropout {
            let act = self.shape.activations;
            let width = self.shape.hidden;
            let dropped = [(); 2].map(|()| self.pool.take(act, width));
            self.give_all(dropped);
        }
        slots.to_vec()
    }

    /// Columns of a low-rank intermediate.
    fn aligned(&self, rank: usize) -> usize {
        Workspace::aligned(self.shape.factors, rank)
    }

    /// The low-rank intermediates that the parts keep.
    fn group_forward(&mut self, group: &GroupShape) -> Vec<Slot> {
        let mut kept = Vec::new();
        for part in &group.parts {
            if let Method::LowRank { rank, dropout } = part.method {
                kept.push(self.pool.take(self.shape.factors, self.aligned(rank)));
                if dropout {
                    self.pool.pass(self.shape.activations, group.in_features);
                }
            }
        }
        kept
    }

    /// Buffers of a group's backward, without those that its parts kept.
    fn group_backward(&mut self, group: &GroupShape, needs_input: bool) {
        let act = self.shape.activations;
        let custom = group.parts.iter().any(|p| p.method == Method::Custom);
        let base_dy = custom.then(|| self.pool.take(act, group.out_features));
        for part in &group.parts {
            if let Method::LowRank { rank, dropout } = part.method {
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
