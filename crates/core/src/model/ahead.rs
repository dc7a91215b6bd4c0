//! Weights that are held as codes, written out while the product before theirs runs.
//!
//! There are two scratch matrices and a stream beside the one of operations. A product waits until its matrix is
//! written; a matrix is written once the last product that read the scratch is done. A pass asks for the same
//! matrices in the same order as the one before, which is how it is known what comes next; what was foreseen wrongly
//! is written again.

use super::layer::Layer;
use super::linear::{LinearGroup, Matrix};
use super::run::Run;
use crate::Result;
use ferrotune_kernels::cuda::{CudaDevice, Event, SideStream};
use ferrotune_kernels::{Buffer, Tensor, Workspace};
use std::cell::RefCell;
use std::sync::{Arc, Mutex, PoisonError};

/// A matrix of a group of linears, which are counted from the first layer's q, k and v.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) group: usize,
    pub(crate) matrix: Matrix,
}

/// What a model has for it.
#[derive(Debug)]
pub(crate) struct WriteAhead {
    stream: SideStream,
    /// What the last pass asked for, in order.
    order: Mutex<Vec<Wanted>>,
}

impl WriteAhead {
    pub(crate) fn new(device: &Arc<CudaDevice>) -> Result<Self> {
        Ok(Self {
            stream: device.side_stream()?,
            order: Mutex::default(),
        })
    }
}

/// A pass that writes ahead.
pub(crate) struct Ahead<'a> {
    of: &'a WriteAhead,
    layers: &'a [Layer],
    workspace: &'a Workspace,
    state: RefCell<State>,
}

struct State {
    order: Vec<Wanted>,
    /// How many were asked for.
    asked: usize,
    /// Which scratch the last one is in.
    last: usize,
    scratch: [Scratch; 2],
}

struct Scratch {
    /// Away while a product reads it.
    buffer: Option<Buffer>,
    holds: Option<Wanted>,
    /// When it is written, on the side stream.
    written: Option<Event>,
    /// When the last product that read it is done.
    read: Event,
}

impl State {
    fn holding(&self, wanted: Wanted) -> Option<usize> {
        let holds = |s: &Scratch| s.holds == Some(wanted) && s.buffer.is_some();
        self.scratch.iter().position(holds)
    }
}

impl<'a> Ahead<'a> {
    /// For a pass over `layers`, whose linears share scratch memory.
    pub(crate) fn new(
        of: &'a WriteAhead,
        layers: &'a [Layer],
        workspace: &'a Workspace,
    ) -> Result<Self> {
        let scratch = |()| -> Result<Scratch> {
            let of_all = layers[0].qkv.scratch;
            Ok(Scratch {
                buffer: Some(workspace.take_scratch(of_all.dtype, of_all.elements)),
                holds: None,
                written: None,
                // What other passes did with the memory, and updates with the factors, is over by then.
                read: of.stream.device().event()?,
            })
        };
        let order = of.order.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Self {
            of,
            layers,
            workspace,
            state: RefCell::new(State {
                order: order.clone(),
                asked: 0,
                last: 1,
                scratch: [scratch(())?, scratch(())?],
            }),
        })
    }

    /// Calls `product` with the matrix that is `wanted`, and has the next one written meanwhile.
    pub(crate) fn with<R>(
        &self,
        run: &Run<'_>,
        wanted: Wanted,
        product: impl FnOnce(&Tensor) -> Result<R>,
    ) -> Result<R> {
        let (at, buffer) = self.ready(run, wanted)?;
        let [rows, cols] = self.group(wanted).shape_of(wanted.matrix);
        let values = Tensor::from_buffer(buffer, rows, cols);
        let result = product(&values);
        let scratch = &mut self.state.borrow_mut().scratch[at];
        scratch.buffer = Some(values.into_buffer());
        scratch.read = self.of.stream.device().event()?;
        result
    }

    /// Which scratch holds what is wanted for operations issued from now on, and its memory.
    fn ready(&self, run: &Run<'_>, wanted: Wanted) -> Result<(usize, Buffer)> {
        let state = &mut *self.state.borrow_mut();
        let at = match state.holding(wanted) {
            Some(at) => at,
            None => {
                let at = 1 - state.last;
                self.write(run, &mut state.scratch[at], wanted)?;
                at
            }
        };
        let device = self.of.stream.device();
        if let Some(written) = &state.scratch[at].written {
            device.wait(written)?;
        }
        if state.order.get(state.asked) != Some(&wanted) {
            state.order.truncate(state.asked);
            state.order.push(wanted);
        }
        state.asked += 1;
        state.last = at;
        let Some(buffer) = state.scratch[at].buffer.take() else {
            unreachable!("one product reads one matrix");
        };
        let next = state.order.get(state.asked).copied();
        if let Some(next) = next.filter(|&next| next != wanted && state.holding(next).is_none()) {
            self.write(run, &mut state.scratch[1 - at], next)?;
        }
        Ok((at, buffer))
    }

    /// Writes on the side stream, behind what last read the scratch.
    fn write(&self, run: &Run<'_>, scratch: &mut Scratch, wanted: Wanted) -> Result<()> {
        let Some(buffer) = scratch.buffer.take() else {
            unreachable!("one product reads one matrix");
        };
        let group = self.group(wanted);
        let [rows, cols] = group.shape_of(wanted.matrix);
        let mut values = Tensor::from_buffer(buffer, rows, cols);
        let stream = &self.of.stream;
        scratch.holds = None;
        let written = stream
            .wait(&scratch.read)
            .map_err(Into::into)
            .and_then(|()| stream.issue(|| group.write_out(run, wanted.matrix, values.view_mut())));
        scratch.buffer = Some(values.into_buffer());
        scratch.written = Some(stream.event()?);
        written?;
        scratch.holds = Some(wanted);
        Ok(())
    }

    fn group(&self, wanted: Wanted) -> &'a LinearGroup {
        self.layers[wanted.group / 4].groups()[wanted.group % 4]
    }
}

impl Drop for Ahead<'_> {
    /// What was written ahead is done before what comes next uses the memory.
    fn drop(&mut self) {
        let state = self.state.get_mut();
        for scratch in &mut state.scratch {
            if let Some(written) = &scratch.written {
                // A failure is remembered by the device and reported by its next operation.
                let _ = self.of.stream.device().wait(written);
            }
            if let Some(buffer) = scratch.buffer.take() {
                self.workspace.give_scratch(buffer);
            }
        }
        let order = self.of.order.lock();
        let asked = std::mem::take(&mut state.order);
        *order.unwrap_or_else(PoisonError::into_inner) = asked;
    }
}
