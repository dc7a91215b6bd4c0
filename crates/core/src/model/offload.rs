//! What layers keep for their backward, in pinned memory of the host meanwhile.
//!
//! A layer's activations are copied on a stream beside the one of operations while the next layer's forward runs, and
//! their buffers go back to the pool behind it. Backward fetches them while the layer above is at work. Events order both
//! ways: a copy waits for what made the values, or last used the buffers; whoever takes the buffers next, or reads the
//! values, waits for the copy. Copies to and from one layer's memory are on one stream and need no more.

use super::run::Run;
use super::saved::LayerSaved;
use crate::Result;
use ferrotune_kernels::cuda::{CudaDevice, Event, PinnedMemory, SideStream};
use ferrotune_kernels::{Device, Tensor};
use std::cell::RefCell;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Last layers whose activations stay: as many are on the GPU at a time in any case, one at work and one on its way.
const STAYING: usize = 2;

/// Of how many of `layers` the activations may lie in host memory: all but the last two.
#[must_use]
pub fn offloadable(layers: usize) -> usize {
    layers.saturating_sub(STAYING)
}

/// What a model has for it.
#[derive(Debug)]
pub(crate) struct Offload {
    stream: Arc<SideStream>,
    /// How many of the first layers.
    layers: usize,
    /// Of each of them, once it was needed; as long as its buffers in the pool.
    host: Mutex<Vec<Option<PinnedMemory>>>,
}

impl Offload {
    pub(crate) fn new(device: &Arc<CudaDevice>, layers: usize) -> Result<Self> {
        Ok(Self {
            stream: Arc::new(device.side_stream()?),
            layers,
            host: Mutex::new((0..layers).map(|_| None).collect()),
        })
    }

    /// Bytes of host memory that it holds.
    pub(crate) fn host_bytes(&self) -> usize {
        let host = self.host();
        host.iter().flatten().map(PinnedMemory::bytes).sum()
    }

    fn host(&self) -> MutexGuard<'_, Vec<Option<PinnedMemory>>> {
        // Between passes it is whole, whatever ended one.
        self.host.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies `tensors` of `layer` out, behind everything issued so far.
    fn store(&self, layer: usize, tensors: Vec<Tensor>) -> Result<Moving> {
        let copied = self.issue_store(layer, &tensors);
        self.moving(layer, tensors, copied)
    }

    fn issue_store(&self, layer: usize, tensors: &[Tensor]) -> Result<Event> {
        let bytes = tensors.iter().map(Tensor::buffer_bytes).sum();
        let mut host = self.host();
        let held = host[layer].take().filter(|memory| memory.bytes() >= bytes);
        let memory = match held {
            Some(memory) => memory,
            None => PinnedMemory::new(&self.stream, bytes)?,
        };
        let memory = host[layer].insert(memory);
        self.stream.wait(&self.stream.device().event()?)?;
        let mut at = 0;
        for tensor in tensors {
            memory.store(at, tensor)?;
            at += tensor.bytes();
        }
        Ok(self.stream.event()?)
    }

    /// Copies what `layer` keeps into `tensors`, behind what last used their buffers.
    fn load(&self, layer: usize, mut tensors: Vec<Tensor>) -> Result<Moving> {
        let copied = self.issue_load(layer, &mut tensors);
        self.moving(layer, tensors, copied)
    }

    fn issue_load(&self, layer: usize, tensors: &mut [Tensor]) -> Result<Event> {
        self.stream.wait(&self.stream.device().event()?)?;
        let mut at = 0;
        if let Some(memory) = &self.host()[layer] {
            for tensor in tensors {
                memory.load(at, tensor)?;
                at += tensor.bytes();
            }
        }
        Ok(self.stream.event()?)
    }

    /// `tensors` until they are `copied`. Where that failed, some of them may be on their way.
    fn moving(&self, layer: usize, tensors: Vec<Tensor>, copied: Result<Event>) -> Result<Moving> {
        let copied = copied.inspect_err(|_| self.stream.drain())?;
        Ok(Moving {
            layer,
            tensors,
            copied,
        })
    }

    /// What was moving, for operations issued from now on.
    fn copied(&self, moving: Moving) -> Result<Vec<Tensor>> {
        let ordered = self.stream.device().wait(&moving.copied);
        ordered.inspect_err(|_| self.stream.drain())?;
        Ok(moving.tensors)
    }
}

/// Buffers that are being copied from or to.
struct Moving {
    layer: usize,
    tensors: Vec<Tensor>,
    copied: Event,
}

/// A pass that offloads.
pub(crate) struct Offloading<'a> {
    of: &'a Offload,
    leaving: RefCell<Option<Moving>>,
    arriving: RefCell<Option<Moving>>,
}

impl<'a> Offloading<'a> {
    pub(crate) fn new(of: &'a Offload) -> Self {
        Self {
            of,
            leaving: RefCell::default(),
            arriving: RefCell::default(),
        }
    }

    /// After the forward of `layer`: what the one before kept goes back to the pool once it is copied, and what this
    /// one has `saved` begins to leave.
    pub(crate) fn forward_done(
        &self,
        run: &Run<'_>,
        layer: usize,
        saved: Option<&mut LayerSaved>,
    ) -> Result<()> {
        self.left(run)?;
        if let Some(saved) = saved.filter(|_| layer < self.of.layers) {
            let tensors = saved.tensors_mut().into_iter().map(take_away).collect();
            *self.leaving.borrow_mut() = Some(self.of.store(layer, tensors)?);
        }
        Ok(())
    }

    /// Gives back what is leaving.
    pub(crate) fn left(&self, run: &Run<'_>) -> Result<()> {
        if let Some(moving) = self.leaving.take() {
            run.give(self.of.copied(moving)?);
        }
        Ok(())
    }

    /// Before the backward of `layer`: it has all that it `saved`.
    pub(crate) fn arrived(
        &self,
        run: &Run<'_>,
        layer: usize,
        saved: &mut LayerSaved,
    ) -> Result<()> {
        self.fetch(run, layer, saved)?;
        let mut arriving = self.arriving.borrow_mut();
        if let Some(moving) = arriving.take_if(|moving| moving.layer == layer) {
            let places = saved.tensors_mut().into_iter();
            places
                .zip(self.of.copied(moving)?)
                .for_each(|(place, tensor)| *place = tensor);
        }
        Ok(())
    }

    /// Begins to bring back what `layer` has `saved`, unless that is under way or never left.
    pub(crate) fn fetch(&self, run: &Run<'_>, layer: usize, saved: &mut LayerSaved) -> Result<()> {
        let mut arriving = self.arriving.borrow_mut();
        let under_way = arriving.as_ref().is_some_and(|m| m.layer == layer);
        if layer >= self.of.layers || under_way {
            return Ok(());
        }
        let places = saved.tensors_mut().into_iter();
        let tensors = places.map(|place| run.workspace.take(place.dtype(), run.rows, place.cols()));
        *arriving = Some(self.of.load(layer, tensors.collect())?);
        Ok(())
    }
}

impl Drop for Offloading<'_> {
    /// On the way out of a failure: nothing else gets the buffers before the copies are done. The device orders nothing
    /// any more once it has failed.
    fn drop(&mut self) {
        if self.leaving.get_mut().is_some() || self.arriving.get_mut().is_some() {
            self.of.stream.drain();
        }
    }
}

/// A tensor, in whose place one of no rows stays.
fn take_away(place: &mut Tensor) -> Tensor {
    let device: Device = place.device();
    let nothing = Tensor::empty(&device, place.dtype(), 0, place.cols());
    std::mem::replace(place, nothing)
}
