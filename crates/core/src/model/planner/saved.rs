//! What a layer keeps from forward to backward, as counted buffers.

use super::pool::Slot;

/// Slots of a layer's saved activations.
pub(super) struct Saved {
    /// The input stream and its norm's statistics.
    pub(super) input: Vec<Slot>,
    pub(super) attention: Option<Attention>,
    pub(super) gate_up: Option<GateUp>,
    pub(super) down: Down,
}

pub(super) struct Attention {
    /// q/k/v, the attention output, log-sum-exp.
    pub(super) core: [Slot; 3],
    pub(super) qkv_parts: Parts,
    pub(super) o_parts: Parts,
    pub(super) output: NormedOutput,
    /// The stream before the mlp and its norm's statistics.
    pub(super) middle: Vec<Slot>,
}

pub(super) struct GateUp {
    pub(super) values: Slot,
    pub(super) parts: Parts,
}

pub(super) struct Down {
    pub(super) parts: Parts,
    pub(super) output: NormedOutput,
}

/// What the parts of a group keep: low-rank intermediates with the outputs that DoRA scales, and of those
/// the norms, which do not grow with the rows.
#[derive(Default)]
pub(super) struct Parts {
    pub(super) rows: Vec<Slot>,
    pub(super) norms: Vec<Slot>,
    /// What methods with a forward of their own keep, outside of the pool.
    pub(super) own: Vec<Slot>,
}

/// A block's output before its norm and the norm's statistics; nothing where it has no norm.
pub(super) type NormedOutput = Vec<Slot>;

impl Saved {
    /// Those of the pool that grow with the rows: what is offloaded where the layer is.
    pub(super) fn slots(&self) -> Vec<Slot> {
        let attention = self.attention.iter().flat_map(|a| {
            let parts = a.qkv_parts.rows.iter().chain(&a.o_parts.rows);
            a.core.iter().chain(parts).chain(&a.output).chain(&a.middle)
        });
        let gate_up = self.gate_up.iter();
        let gate_up = gate_up.flat_map(|g| g.parts.rows.iter().chain([&g.values]));
        let down = self.down.parts.rows.iter().chain(&self.down.output);
        let all = self.input.iter().chain(attention);
        all.chain(gate_up).chain(down).copied().collect()
    }
}
