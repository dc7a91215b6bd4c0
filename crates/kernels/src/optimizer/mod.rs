//! Optimizers that treat every element alike, as one kernel each over all tensors: moments in f32, or as bytes with a
//! scale for every [`BLOCK`] of them.
//!
//! What they compute stands in `ferrotune_core::optimizer`, a file for each, whose rules are the twins of these kernels
//! on a CPU; both give the same bits. AdamW with f32 moments has a kernel of its own ([`crate::adamw`]).

pub mod cuda;

/// Elements that share a scale where moments are bytes.
pub const BLOCK: usize = 256;
/// Values kept of an element, at most.
pub const MOST_MOMENTS: usize = 3;
/// Bytes of what is the same for all elements of a tensor in a step, at most.
pub const SCALAR_BYTES: usize = 64;

/// An optimizer by what it does to an element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// `ferrotune_core::optimizer::Adadelta`.
    Adadelta,
    /// `Adagrad`.
    Adagrad,
    /// `Adam`.
    Adam,
    /// `Adamax`.
    Adamax,
    /// `AdEmaMix`.
    AdEmaMix,
    /// `Lion`.
    Lion,
    /// `NAdam`.
    NAdam,
    /// `RAdam`.
    RAdam,
    /// `RmsProp`.
    RmsProp,
    /// `Sgd`.
    Sgd,
}

impl Rule {
    fn kernel(self) -> &'static str {
        match self {
            Self::Adadelta => "optimizer_adadelta",
            Self::Adagrad => "optimizer_adagrad",
            Self::Adam => "optimizer_adam",
            Self::Adamax => "optimizer_adamax",
            Self::AdEmaMix => "optimizer_ademamix",
            Self::Lion => "optimizer_lion",
            Self::NAdam => "optimizer_nadam",
            Self::RAdam => "optimizer_radam",
            Self::RmsProp => "optimizer_rmsprop",
            Self::Sgd => "optimizer_sgd",
        }
    }
}

/// A tensor of flat buffers, and how its moments are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Its elements in the buffers.
    pub elements: std::ops::Range<usize>,
    /// Whether its moments are bytes.
    pub bytes: bool,
}
