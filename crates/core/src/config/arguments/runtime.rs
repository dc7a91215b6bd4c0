use super::source::{OURS, TRANSFORMERS};
use crate::config::section::section;
use crate::config::value::choices;

choices! {
    /// Where to compute.
    Device {
        /// The best there is.
        Auto = "auto",
        /// The processor.
        Cpu = "cpu",
        /// An NVIDIA GPU.
        Cuda = "cuda",
    }
}

section! {
    /// The machine, and chance.
    RuntimeArguments, "runtime" {
        /// Where to compute: auto, cpu or cuda.
        device: Device = Device::Auto, OURS;
        /// CPU threads; null for one per core. Results do not depend on it.
        num_threads: Option<usize> = None, OURS;
        /// true computes every layer again in the backward pass, whatever memory there is; else a plan
        /// decides per layer, from the memory that is there. Results do not depend on it.
        gradient_checkpointing: Option<bool> = None, TRANSFORMERS;
        /// Seed of every random draw.
        seed: u64 = 42, TRANSFORMERS;
        /// Seed of the order of the rows; null for seed.
        data_seed: Option<u64> = None, TRANSFORMERS;
        /// Sum one gradient per micro-batch, in their global order: the same bits for any number of
        /// ranks. Moves and holds as many gradients as a step has micro-batches, over all ranks.
        deterministic_reduction: bool = false, OURS;
        /// Steps between comparisons of the trained weights over ranks; 0 for none.
        replica_check_steps: u64 = 100, OURS;
    }
}

impl RuntimeArguments {
    /// The seed of the order of the rows.
    #[must_use]
    pub fn data_seed(&self) -> u64 {
        self.data_seed.unwrap_or(self.seed)
    }
}
