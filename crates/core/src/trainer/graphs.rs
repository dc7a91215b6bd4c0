//! Micro-steps recorded as CUDA graphs: one call instead of a launch for each kernel.

use crate::model::InputShape;
use crate::{Error, Result};
use ferrotune_kernels::cuda::{Captured, CudaDevice, Graph};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Graphs kept at most; shapes beyond them are issued kernel by kernel.
const MOST_GRAPHS: usize = 256;

/// Addresses, and which buffers the workspace has.
type Memory = (Vec<u64>, u64);

/// The graphs of a trainer, one for each shape of micro-batch that came twice.
///
/// The first time a shape is run as it is: modules are loaded, algorithms chosen, buffers allocated. The
/// second time it is recorded, and replayed from then on. A graph reads and writes the addresses it was
/// recorded with; when one of them is another, all graphs are void.
#[derive(Debug, Default)]
pub(super) struct Graphs {
    /// Nothing is recorded.
    off: bool,
    memory: Memory,
    met: BTreeSet<InputShape>,
    recorded: BTreeMap<InputShape, Graph>,
}

impl Graphs {
    /// Records, unless there is an `obstacle`, which is told to the user.
    pub(super) fn new(obstacle: Option<&str>) -> Self {
        let mut graphs = Self::default();
        if let Some(obstacle) = obstacle {
            graphs.give_up(obstacle);
        }
        graphs
    }

    /// Records nothing, and does not say why.
    pub(super) fn off() -> Self {
        Self {
            off: true,
            ..Self::default()
        }
    }

    /// Number of graphs at hand.
    pub(super) fn len(&self) -> usize {
        self.recorded.len()
    }

    /// Runs `body`, which issues the micro-step of `shape` on `memory`, or its graph.
    ///
    /// # Errors
    /// Those of `body`; the first failure of the device.
    pub(super) fn run(
        &mut self,
        device: &Arc<CudaDevice>,
        shape: InputShape,
        memory: Memory,
        body: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Outcome> {
        if self.off {
            return body().map(|()| Outcome::Done);
        }
        if memory != self.memory {
            self.recorded.clear();
            self.met.clear();
            self.memory = memory;
        }
        if let Some(graph) = self.recorded.get(&shape) {
            graph.launch()?;
            return Ok(Outcome::Done);
        }
        if self.met.insert(shape) || self.recorded.len() >= MOST_GRAPHS {
            return body().map(|()| Outcome::Done);
        }
        match device.capture(|| body().map_err(as_refusal))? {
            Captured::Graph(graph) => {
                graph.launch()?;
                self.recorded.insert(shape, graph);
                Ok(Outcome::Done)
            }
            Captured::Eager { reason } => {
                self.give_up(&reason);
                Ok(Outcome::Refused)
            }
        }
    }

    fn give_up(&mut self, reason: &str) {
        *self = Self::off();
        tracing::warn!("cuda_graph: kernels are launched one by one: {reason}");
    }
}

/// How a micro-step was run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Done,
    /// It could not be recorded, and has not run: buffers that were taken meanwhile are no memory.
    Refused,
}

/// Whatever ends a recording is only a reason not to record; what is wrong shows again without.
fn as_refusal(error: Error) -> ferrotune_kernels::Error {
    match error {
        Error::Kernel(error) => error,
        other => ferrotune_kernels::Error::Invalid {
            op: "cuda_graph",
            message: other.to_string(),
        },
    }
}
