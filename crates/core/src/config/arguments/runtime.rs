use super::source::{OURS, TRANSFORMERS, TRL_SFT};
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

choices! {
    /// How ranks exchange gradients.
    DdpBackend {
        /// NVIDIA's library, between GPUs.
        Nccl = "nccl",
        /// Over TCP, through the processors. PyTorch's name for what it uses there.
        Gloo = "gloo",
        /// Through the MPI of the site, in a binary built with the feature `mpi`.
        Mpi = "mpi",
    }
}

choices! {
    /// Whether micro-steps on a GPU are recorded and replayed.
    CudaGraph {
        /// Where that can be done.
        Auto = "auto",
        /// Every kernel is launched by itself.
        Off = "off",
    }
}

choices! {
    /// How a GPU's algorithm for a product is chosen.
    GemmTuning {
        /// As its library expects it to be fastest.
        Heuristic = "heuristic",
        /// By timing the first few that the library offers.
        Measure = "measure",
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
        /// true moves what layers keep for the backward pass to pinned host memory while later layers compute, and back
        /// ahead of their backward: all layers but the last two; for a run of one adapter. Unset, a plan does so with some of
        /// the layers where otherwise the run would not fit, or would by its estimate take longer to compute them again;
        /// it leaves half of the host's free memory. On a GPU; without effect on a CPU. Results do not depend on it.
        activation_offloading: Option<bool> = None, TRL_SFT;
        /// Records the kernels of a step on a GPU and replays them with one call, for each padded length:
        /// auto where that can be done (the log says why not, where it cannot), or off. Results do not depend
        /// on it.
        cuda_graph: CudaGraph = CudaGraph::Auto, OURS;
        /// How a GPU's algorithm for the products of a shape is chosen: heuristic, or measure, which times a few
        /// before the first step. Timings vary, and the last bits of results with them; a resumed run uses
        /// what its checkpoint recorded.
        gemm_tuning: GemmTuning = GemmTuning::Heuristic, OURS;
        /// Seed of every random draw.
        seed: u64 = 42, TRANSFORMERS;
        /// Seed of the order of the rows; null for seed.
        data_seed: Option<u64> = None, TRANSFORMERS;
        /// Sum one gradient per micro-batch, in their global order: the same bits for any number of
        /// ranks. Moves and holds as many gradients as a step has micro-batches, over all ranks.
        deterministic_reduction: bool = false, OURS;
        /// Steps between comparisons of the trained weights over ranks; 0 for none.
        replica_check_steps: u64 = 100, OURS;
        /// How ranks exchange gradients: nccl, gloo for TCP, or mpi; null for nccl on GPUs, else TCP.
        ddp_backend: Option<DdpBackend> = None, TRANSFORMERS;
        /// Seconds that ranks wait for each other in one exchange.
        ddp_timeout: u64 = 1800, TRANSFORMERS;
        /// Seconds that ranks wait for all of them to come at the start.
        rendezvous_timeout: u64 = 600, OURS;
        /// Seconds without a sign of life after which a rank counts as lost.
        peer_timeout: u64 = 5, OURS;
    }
}

impl RuntimeArguments {
    /// The seed of the order of the rows.
    #[must_use]
    pub fn data_seed(&self) -> u64 {
        self.data_seed.unwrap_or(self.seed)
    }
}
