//! Unit vectors along the columns of a matrix, orthogonal ones where asked.
//!
//! ```text
//! v_i = u_i                                         or u_i less its parts along q_1 .. q_i-1, one after the other
//! q_i = v_i / |v_i|
//! ```
//!
//! u_i are the columns of `vectors [n, r]`, q_i the rows of `directions [r, n]`. Both are f32, what is between them f64;
//! sums are in a fixed order.
//!
//! # Source
//! Gram and Schmidt's orthogonalisation, in its modified form (Björck: "Solving linear least squares problems by
//! Gram-Schmidt orthogonalization", 1967).

mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;
#[cfg(test)]
mod tests;

use crate::device::common;
use crate::error::check_shape;
use crate::{Result, View, ViewMut};

/// Writes the directions `[r, n]` of `vectors [n, r]`.
///
/// # Errors
/// If a shape or dtype does not fit.
pub fn forward(directions: ViewMut<'_>, vectors: View<'_>, orthogonal: bool) -> Result<()> {
    const OP: &str = "directions::forward";
    let [n, rank] = vectors.shape();
    check_shape(OP, "directions [r, n]", [rank, n], directions.shape())?;
    let vectors = vectors.dense_f32(OP, "vectors")?;
    let directions = directions.dense_f32(OP, "directions")?;
    if let Some(device) = common(OP, &[directions.device(), vectors.device()])? {
        return cuda::forward(device, directions, vectors, orthogonal);
    }
    let vectors = vectors.contiguous(OP, "vectors")?;
    let directions = directions.contiguous(OP, "directions")?;
    cpu::forward(directions, vectors, [n, rank], orthogonal);
    Ok(())
}

/// Adds to `d_vectors [n, r]` their gradient, from that of the directions, `d [r, n]`.
///
/// # Errors
/// As [`forward`].
pub fn add_gradient(
    d_vectors: ViewMut<'_>,
    d: View<'_>,
    vectors: View<'_>,
    orthogonal: bool,
) -> Result<()> {
    const OP: &str = "directions::add_gradient";
    let [n, rank] = vectors.shape();
    check_shape(OP, "d [r, n]", [rank, n], d.shape())?;
    check_shape(OP, "d_vectors", [n, rank], d_vectors.shape())?;
    let vectors = vectors.dense_f32(OP, "vectors")?;
    let d = d.dense_f32(OP, "d")?;
    let d_vectors = d_vectors.dense_f32(OP, "d_vectors")?;
    if let Some(device) = common(OP, &[d_vectors.device(), d.device(), vectors.device()])? {
        return cuda::add_gradient(device, d_vectors, d, vectors, orthogonal);
    }
    let vectors = vectors.contiguous(OP, "vectors")?;
    let d = d.contiguous(OP, "d")?;
    let d_vectors = d_vectors.contiguous(OP, "d_vectors")?;
    cpu::add_gradient(d_vectors, d, vectors, [n, rank], orthogonal);
    Ok(())
}
