//! How far a Gram matrix is from the identity, and in which direction.
//!
//! ```text
//! away = gram - I,    distance = |away| (Frobenius),    gram := away / distance,    0 where that is 0
//! ```
//!
//! The gradient of `|M M^T - I|` by `M` is `2 away / distance M`. A row of zeros in `M` has a zero on the diagonal of its
//! Gram matrix, which stays: what is not there need not be of length 1. Everything is f32, the distance is summed in f64,
//! in a fixed order.
//!
//! # Source
//! The term of Zhang et al.: "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning" (2023).

mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;
#[cfg(test)]
mod tests;

use crate::device::common;
use crate::error::check_shape;
use crate::{Result, ViewMut};

/// Replaces `gram [R, R]` by its direction away from the identity, of length 1, and writes the `distance [1, 1]`.
///
/// # Errors
/// If a shape or dtype does not fit.
pub fn direction(gram: ViewMut<'_>, distance: ViewMut<'_>) -> Result<()> {
    const OP: &str = "identity_distance::direction";
    let rank = gram.rows();
    check_shape(OP, "gram [R, R]", [rank, rank], gram.shape())?;
    check_shape(OP, "distance [1, 1]", [1, 1], distance.shape())?;
    let gram = gram.dense_f32(OP, "gram")?;
    let distance = distance.dense_f32(OP, "distance")?;
    if let Some(device) = common(OP, &[gram.device(), distance.device()])? {
        return cuda::direction(device, gram, distance);
    }
    let distance = distance.contiguous(OP, "distance")?;
    distance[0] = cpu::direction(gram.contiguous(OP, "gram")?, rank);
    Ok(())
}
