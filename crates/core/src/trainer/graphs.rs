//! Micro-steps and updates recorded as CUDA graphs: one call instead of a launch for each kernel.

use crate::model::InputShape;
use crate::{Error, Result};
use ferrotune_kernels::cuda::{Captured, CudaDevice, Graph};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Graphs kept at most; shapes beyond them are issued kernel by kernel.
const MOST_GRAPHS: usize = 256;

/// Addresses, and which buffers the workspace has.
type Memory = (Vec<u64>, u64);

/// What is recorded as one graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Recorded {
    /// Forward and backward of one micro-batch.
    MicroStep(InputShape),
    /// A whole step of one micro-batch, update included.
    Step(InputShape),
    /// The update of a step of several.
    Update,
}

impl Recorded {
    /// Of what; an update has no shape.
    fn shape(self) -> Option<InputShape> {
        match self {
            Self::MicroStep(shape) | Self::Step(shape) => Some(shape),
            Self::Update => None,
        }
    }
}

/// The graphs of a trainer: one for each shape of micro-batch that came twice, and one of the update.
///
/// The first time a shape is run as it is: modules are loaded, algorithms chosen, buffers allocated. The
/// second time it is recorded, and replayed from then on. A graph reads and writes the addresses it was
/// recorded with; when one of them is another, all graphs are void.
#[derive(Debug, Default)]
pub(super) struct Graphs {
    /// Nothing is recorded.
    off: bool,
    /// Why it is not is told to the user.
    speaks: bool,
    passes: OnMemory,
    updates: OnMemory,
}

/// Graphs that have been recorded with the same addresses.
#[derive(Debug, Default)]
struct OnMemory {
    memory: Memory,
    met: BTreeSet<Option<InputShape>>,
    recorded: BTreeMap<Recorded, Graph>,
}

impl Graphs {
    /// Records, unless there is an `obstacle`, which is told to the user if it `speaks`.
    pub(super) fn new(speaks: bool, obstacle: Option<&str>) -> Self {
        let mut graphs = Self {
            speaks,
            ..Self::default()
        };
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

    /// Whether anything is recorded.
    pub(super) fn are_on(&self) -> bool {
        !self.off
    }

    /// Number of graphs at hand.
    pub(super) fn len(&self) -> usize {
        self.passes.recorded.len() + self.updates.recorded.len()
    }

    /// Runs `body`, which issues `what` on `memory`, or its graph.
    ///
    /// # Errors
    /// Those of `body`; the first failure of the device.
    pub(super) fn run(
        &mut self,
        device: &Arc<CudaDevice>,
        what: Recorded,
        memory: Memory,
        body: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Outcome> {
        if self.off {
            return body().map(|()| Outcome::Done);
        }
        let graphs = match what {
            Recorded::MicroStep(_) | Recorded::Step(_) => &mut self.passes,
            Recorded::Update => &mut self.updates,
        };
        if memory != graphs.memory {
            *graphs = OnMemory {
                memory,
                ..OnMemory::default()
            };
        }
        if let Some(graph) = graphs.recorded.get(&what) {
            graph.launch()?;
            return Ok(Outcome::Done);
        }
        if graphs.met.insert(what.shape()) || graphs.recorded.len() >= MOST_GRAPHS {
            return body().map(|()| Outcome::Done);
        }
        match device.capture(|| body().map_err(as_refusal))? {
            Captured::Graph(graph) => {
                graph.launch()?;
                graphs.recorded.insert(what, graph);
                Ok(Outcome::Done)
            }
            Captured::Eager { reason } => {
                self.give_up(&reason);
                Ok(Outcome::Refused)
            }
        }
    }

    fn give_up(&mut self, reason: &str) {
        if self.speaks {
            tracing::warn!("cuda_graph: kernels are launched one by one: {reason}");
        }
        *self = Self::off();
    }
}

/// How it was run.
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
