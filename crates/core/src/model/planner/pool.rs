//! The pool of activation buffers, counted instead of allocated.

use ferrotune_kernels::DType;

/// A buffer of the pool: element type and columns; rows are the same for all.
pub(super) type Slot = (DType, usize);

/// What [`ferrotune_kernels::Workspace`] holds after the same calls: it reuses a buffer for the same
/// type and width alone, and frees none, so its size is the sum of the most of each kind in use at a
/// time, whenever that was.
#[derive(Debug, Default)]
pub(super) struct Pool {
    kinds: Vec<Kind>,
}

#[derive(Debug)]
struct Kind {
    slot: Slot,
    live: usize,
    most: usize,
}

impl Pool {
    pub(super) fn take(&mut self, dtype: DType, cols: usize) -> Slot {
        let slot = (dtype, cols);
        let kind = self.kind(slot);
        kind.live += 1;
        kind.most = kind.most.max(kind.live);
        slot
    }

    pub(super) fn give(&mut self, slot: Slot) {
        let kind = self.kind(slot);
        kind.live = kind.live.saturating_sub(1);
    }

    /// Takes and gives back.
    pub(super) fn pass(&mut self, dtype: DType, cols: usize) {
        let slot = self.take(dtype, cols);
        self.give(slot);
    }

    /// Bytes per row that are in use.
    pub(super) fn live(&self) -> u64 {
        let live = |k: &Kind| row_bytes(k.slot).saturating_mul(k.live as u64);
        self.kinds.iter().map(live).sum()
    }

    /// Bytes per row that are held.
    pub(super) fn held(&self) -> u64 {
        let most = |k: &Kind| row_bytes(k.slot).saturating_mul(k.most as u64);
        self.kinds.iter().map(most).sum()
    }

    fn kind(&mut self, slot: Slot) -> &mut Kind {
        // There are about ten: a search is quicker than a map.
        let known = self.kinds.iter().position(|kind| kind.slot == slot);
        let index = known.unwrap_or_else(|| {
            self.kinds.push(Kind {
                slot,
                live: 0,
                most: 0,
            });
            self.kinds.len() - 1
        });
        &mut self.kinds[index]
    }
}

/// Bytes of one row.
pub(super) fn row_bytes((dtype, cols): Slot) -> u64 {
    (cols * dtype.bytes()) as u64
}
