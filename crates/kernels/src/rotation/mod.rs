//! Rotations made of skew-symmetric matrices, many small ones at once.
//!
//! ```text
//! S = -S^T  [n, n], of trained parameters (`Source`)
//! R = (I - S) (I + S)^-1                                    Cayley
//! R = I + f_1 S + f_2 S^2 + ...                             a series
//! ```
//!
//! Parameters and rotations are f32, what is between them f64: blocks are small.
//!
//! # Source
//! Qiu et al.: "Controlling Text-to-Image Diffusion by Orthogonal Finetuning" (2023) for Cayley's transform, "Orthogonal
//! Finetuning Made Scalable" (2025) for its series.

mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;
#[cfg(test)]
mod tests;

use crate::device::common;
use crate::error::{check_dtype, check_shape};
use crate::{DType, Error, Result, View, ViewMut};

/// Most terms of a series.
pub const MOST_TERMS: usize = 32;

/// What S is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A row `[n (n - 1) / 2]` for each block: the elements above the diagonal, row by row.
    Upper,
    /// A row `[n n]` for each block: a matrix M, of which S is `(M - M^T) / 2`.
    Square,
}

/// How R is made of S.
#[derive(Clone, Copy, Debug)]
pub enum Map<'a> {
    /// Exactly a rotation.
    Cayley,
    /// The factors of S, S^2, ...; at most [`MOST_TERMS`].
    Series(&'a [f64]),
}

impl Source {
    /// Parameters of a block of size n.
    #[must_use]
    pub fn parameters(self, n: usize) -> usize {
        match self {
            Self::Upper => n * n.saturating_sub(1) / 2,
            Self::Square => n * n,
        }
    }
}

/// Writes to `rotations [blocks * n, n]` those of `parameters [blocks, ...]`.
///
/// # Errors
/// If a shape or dtype does not fit, or a series is too long.
pub fn forward(
    rotations: ViewMut<'_>,
    parameters: View<'_>,
    source: Source,
    map: Map<'_>,
) -> Result<()> {
    const OP: &str = "rotation::forward";
    let parameters = check(OP, rotations.shape(), parameters, source, map)?;
    let rotations = rotations.dense_f32(OP, "rotations")?;
    if let Some(device) = common(OP, &[rotations.device(), parameters.device()])? {
        return cuda::forward(device, rotations, parameters, source, map);
    }
    let n = rotations.cols();
    let parameters = parameters.contiguous(OP, "parameters")?;
    let rotations = rotations.contiguous(OP, "rotations")?;
    cpu::forward(rotations, parameters, n, source, map);
    Ok(())
}

/// Adds to `d_parameters` their gradient, from that of the rotations, `d [blocks * n, n]`.
///
/// # Errors
/// As [`forward`].
pub fn add_gradient(
    d_parameters: ViewMut<'_>,
    d: View<'_>,
    parameters: View<'_>,
    source: Source,
    map: Map<'_>,
) -> Result<()> {
    const OP: &str = "rotation::add_gradient";
    let parameters = check(OP, d.shape(), parameters, source, map)?;
    let shape = parameters.shape();
    check_shape(OP, "d_parameters", shape, d_parameters.shape())?;
    let d_parameters = d_parameters.dense_f32(OP, "d_parameters")?;
    let d = d.dense_f32(OP, "d")?;
    let devices = [d_parameters.device(), d.device(), parameters.device()];
    if let Some(device) = common(OP, &devices)? {
        return cuda::add_gradient(device, d_parameters, d, parameters, source, map);
    }
    let (n, parameters) = (d.cols(), parameters.contiguous(OP, "parameters")?);
    let (d, d_parameters) = (
        d.contiguous(OP, "d")?,
        d_parameters.contiguous(OP, "d_parameters")?,
    );
    cpu::add_gradient(d_parameters, d, parameters, n, source, map);
    Ok(())
}

/// Shortens each row of `vectors` that is longer than `limit` to that length. Lengths are f64.
///
/// # Errors
/// If they are not f32 with rows back to back.
pub fn shorten(vectors: ViewMut<'_>, limit: f64) -> Result<()> {
    const OP: &str = "rotation::shorten";
    let vectors = vectors.dense_f32(OP, "vectors")?;
    if let Some(device) = vectors.device() {
        return cuda::shorten(device, vectors, limit);
    }
    let cols = vectors.cols();
    cpu::shorten(vectors.contiguous(OP, "vectors")?, cols, limit);
    Ok(())
}

/// The parameters, if they are dense and as many as the rotations need.
fn check<'a>(
    op: &'static str,
    [rows, n]: [usize; 2],
    parameters: View<'a>,
    source: Source,
    map: Map<'_>,
) -> Result<View<'a>> {
    check_dtype(op, "parameters", DType::F32, parameters.dtype())?;
    if n == 0 || !rows.is_multiple_of(n) {
        let message = format!("{rows} rows are no whole blocks of {n} columns");
        return Err(Error::Invalid { op, message });
    }
    if let Map::Series(factors) = map
        && factors.len() > MOST_TERMS
    {
        let message = format!("a series of {} terms; at most {MOST_TERMS}", factors.len());
        return Err(Error::Invalid { op, message });
    }
    let shape = [rows / n, source.parameters(n)];
    check_shape(op, "parameters", shape, parameters.shape())?;
    parameters.dense_f32(op, "parameters")
}
