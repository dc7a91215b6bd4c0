//! Pairs of columns, or of rows, rotated and scaled by trained angles.
//!
//! Columns are taken in groups; the first half of a group is paired with the second.
//!
//! ```text
//! c[i] = alpha[p] * cos theta[p]        s[i] = sign[i] * alpha[q] * sin theta[q]     (`Per` says which p and q)
//! y[t, i] = c[i] * x[t, i] + s[i] * x[t, pair(i)]         transposed: s[pair(i)]
//! ```
//!
//! with sign -1 in the first half of a group and 1 in the second. Of rows alike. Data is f32 or bf16, each argument its
//! own; angles, coefficients and arithmetic are f32, sums over rows are in a fixed order.
//!
//! # Source
//! Liao et al.: "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability" (2024).

mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;
#[cfg(test)]
mod tests;

use crate::device::common;
use crate::error::check_shape;
use crate::row_blocks::{typed, typed_mut};
use crate::tensor::with_dtype;
use crate::{Error, Result, View, ViewMut};

/// What has an angle and a factor of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Per {
    /// Each pair.
    Pair,
    /// Each column.
    Column,
    /// c and s of each column: those of a group's c, then those of its s.
    Coefficient,
}

/// What is paired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    /// Columns: y and x are `[T, n]`.
    Columns,
    /// Rows: y and x are `[n, T]`.
    Rows,
}

/// How columns are paired, and what their angles stand for.
#[derive(Clone, Copy, Debug)]
pub struct Pairs {
    /// Columns of a group; even.
    pub group: usize,
    /// What has an angle.
    pub per: Per,
}

/// Trained angles and factors.
#[derive(Clone, Copy, Debug)]
pub struct Angles<'a> {
    /// Angles `[1, ...]`, f32, in radians.
    pub theta: View<'a>,
    /// Factors, as many, f32.
    pub alpha: View<'a>,
}

impl Pairs {
    /// Angles of `columns` columns.
    #[must_use]
    pub fn angles(self, columns: usize) -> usize {
        match self.per {
            Per::Pair => columns / 2,
            Per::Column => columns,
            Per::Coefficient => 2 * columns,
        }
    }

    fn check(self, op: &'static str, columns: usize) -> Result<()> {
        let group = self.group;
        if group == 0 || !group.is_multiple_of(2) || !columns.is_multiple_of(group) {
            let message = format!("groups of {group} do not divide {columns} into pairs");
            return Err(Error::Invalid { op, message });
        }
        Ok(())
    }
}

impl<'a> Angles<'a> {
    fn check(self, op: &'static str, count: usize) -> Result<Self> {
        check_shape(op, "theta", [1, count], self.theta.shape())?;
        check_shape(op, "alpha", [1, count], self.alpha.shape())?;
        Ok(Self {
            theta: self.theta.dense_f32(op, "theta")?,
            alpha: self.alpha.dense_f32(op, "alpha")?,
        })
    }
}

/// Writes c and s of every column to the rows of `coefficients [2, columns]`, f32.
///
/// # Errors
/// If a shape or dtype does not fit, or groups are no pairs.
pub fn coefficients(coefficients: ViewMut<'_>, angles: Angles<'_>, pairs: Pairs) -> Result<()> {
    const OP: &str = "pair_rotation::coefficients";
    let columns = coefficients.cols();
    pairs.check(OP, columns)?;
    check_shape(OP, "coefficients", [2, columns], coefficients.shape())?;
    let coefficients = coefficients.dense_f32(OP, "coefficients")?;
    let angles = angles.check(OP, pairs.angles(columns))?;
    let devices = [
        coefficients.device(),
        angles.theta.device(),
        angles.alpha.device(),
    ];
    if let Some(device) = common(OP, &devices)? {
        return cuda::coefficients(device, coefficients, angles, pairs);
    }
    let theta = angles.theta.contiguous(OP, "theta")?;
    let alpha = angles.alpha.contiguous(OP, "alpha")?;
    let coefficients = coefficients.contiguous(OP, "coefficients")?;
    cpu::coefficients(coefficients, theta, alpha, pairs);
    Ok(())
}

/// Rotates the columns, or the rows, of `y` where they are, with their [`coefficients`], or the transposed of them.
///
/// # Errors
/// As [`coefficients()`].
pub fn rotate(
    y: ViewMut<'_>,
    coefficients: View<'_>,
    pairs: Pairs,
    axis: Axis,
    transposed: bool,
) -> Result<()> {
    const OP: &str = "pair_rotation::rotate";
    let columns = along(y.shape(), axis);
    pairs.check(OP, columns)?;
    check_shape(OP, "coefficients", [2, columns], coefficients.shape())?;
    let coefficients = coefficients.dense_f32(OP, "coefficients")?;
    if let Some(device) = common(OP, &[y.device(), coefficients.device()])? {
        return cuda::rotate(device, y, coefficients, pairs, axis, transposed);
    }
    let coefficients = coefficients.contiguous(OP, "coefficients")?;
    let of = cpu::Coefficients::new(coefficients, pairs, transposed);
    with_dtype!(y.dtype(), T => match axis {
        Axis::Columns => cpu::rotate_columns::<T>(typed_mut(y), of),
        Axis::Rows => cpu::rotate_rows::<T>(typed_mut(y), of),
    });
    Ok(())
}

/// Adds to `d_theta` and `d_alpha` their gradients, from that of what [`rotate`] made, `d`, and what it made that of,
/// `x`, of one shape.
///
/// # Errors
/// As [`coefficients()`].
pub fn add_gradients(
    [d_theta, d_alpha]: [ViewMut<'_>; 2],
    d: View<'_>,
    x: View<'_>,
    angles: Angles<'_>,
    pairs: Pairs,
    axis: Axis,
) -> Result<()> {
    const OP: &str = "pair_rotation::add_gradients";
    check_shape(OP, "x", d.shape(), x.shape())?;
    let columns = along(d.shape(), axis);
    pairs.check(OP, columns)?;
    let count = pairs.angles(columns);
    let angles = angles.check(OP, count)?;
    check_shape(OP, "d_theta", [1, count], d_theta.shape())?;
    check_shape(OP, "d_alpha", [1, count], d_alpha.shape())?;
    let d_theta = d_theta.dense_f32(OP, "d_theta")?;
    let d_alpha = d_alpha.dense_f32(OP, "d_alpha")?;
    let devices = [
        d_theta.device(),
        d_alpha.device(),
        d.device(),
        x.device(),
        angles.theta.device(),
        angles.alpha.device(),
    ];
    if let Some(device) = common(OP, &devices)? {
        return cuda::add_gradients(device, [d_theta, d_alpha], [d, x], angles, pairs, axis);
    }
    let mut sums = vec![[0.0; 2]; columns];
    with_dtype!(d.dtype(), D => with_dtype!(x.dtype(), X => {
        let (d, x) = (typed::<D>(d), typed::<X>(x));
        match axis {
            Axis::Columns => cpu::column_sums(&mut sums, d, x, pairs),
            Axis::Rows => cpu::row_sums(&mut sums, d, x, pairs),
        }
    }));
    let theta = angles.theta.contiguous(OP, "theta")?;
    let alpha = angles.alpha.contiguous(OP, "alpha")?;
    let d_theta = d_theta.contiguous(OP, "d_theta")?;
    let d_alpha = d_alpha.contiguous(OP, "d_alpha")?;
    cpu::add_to_angles([d_theta, d_alpha], &sums, [theta, alpha], pairs);
    Ok(())
}

fn along([rows, cols]: [usize; 2], axis: Axis) -> usize {
    match axis {
        Axis::Columns => cols,
        Axis::Rows => rows,
    }
}
