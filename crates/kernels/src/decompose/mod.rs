//! Decompositions of matrices in host memory, for what is computed once before a run.
//!
//! ```text
//! singular values   A = U diag(S) V^T          U [m,k], S [k] descending, V^T [k,n], k = min(m,n)
//! their leading q   Q from A (A^T A)^p R, R normal [n,q]; the singular values of Q^T A
//! QR                A = Q R                    Q [m,k] orthonormal, R [k,n] upper triangular
//! ```
//!
//! Each runs on the thread that calls it, so its bits do not depend on how many there are; whoever has
//! several matrices decomposes them side by side.
//!
//! # Source
//! The faer crate; Halko, Martinsson, Tropp: "Finding structure with randomness" (2009), algorithms 4.4
//! and 5.1, as `torch.svd_lowrank` has them.

mod low_rank;
#[cfg(test)]
mod tests;

use crate::error::check_len;
use crate::{Error, Result, View};
use faer::linalg::matmul::matmul;
use faer::linalg::solvers::DenseSolveCore;
use faer::{Accum, MatMut, MatRef, Par};
use std::ops::Range;

/// A matrix `[rows, cols]` in host memory, row after row, in f64: half the digits of f32 are lost on the
/// directions of small singular values.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    values: Vec<f64>,
}

/// Singular values in descending order, with the vectors that belong to them.
#[derive(Clone, Debug)]
pub struct Svd {
    /// Left vectors as columns, `[m, k]`.
    pub u: Matrix,
    /// Values, `[k]`.
    pub s: Vec<f64>,
    /// Right vectors as rows, `[k, n]`.
    pub vt: Matrix,
}

impl Matrix {
    /// Takes over `values`, row after row.
    ///
    /// # Errors
    /// If there are not `rows * cols` of them.
    pub fn new(rows: usize, cols: usize, values: Vec<f64>) -> Result<Self> {
        check_len(
            "decompose::Matrix::new",
            "values",
            rows * cols,
            values.len(),
        )?;
        Ok(Self { rows, cols, values })
    }

    /// The values of a view, widened.
    #[must_use]
    pub fn of(view: View<'_>) -> Self {
        let values = view.to_f32_vec().into_iter();
        Self {
            rows: view.rows(),
            cols: view.cols(),
            values: values.map(f64::from).collect(),
        }
    }

    /// `[rows, cols]`.
    #[must_use]
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// The elements, row after row.
    #[must_use]
    pub fn values(&self) -> &[f64] {
        &self.values
    }

    /// The elements to be changed, row after row.
    #[must_use]
    pub fn values_mut(&mut self) -> &mut [f64] {
        &mut self.values
    }

    /// The elements rounded to f32.
    #[must_use]
    pub fn to_f32_vec(&self) -> Vec<f32> {
        self.values.iter().map(|&v| v as f32).collect()
    }

    /// Some of the rows.
    #[must_use]
    pub fn row_range(&self, rows: Range<usize>) -> Self {
        Self {
            rows: rows.len(),
            cols: self.cols,
            values: self.values[rows.start * self.cols..rows.end * self.cols].to_vec(),
        }
    }

    /// Some of the columns.
    #[must_use]
    pub fn columns(&self, columns: Range<usize>) -> Self {
        let rows = self.values.chunks_exact(self.cols.max(1));
        Self {
            rows: self.rows,
            cols: columns.len(),
            values: rows
                .flat_map(|row| row[columns.clone()].iter().copied())
                .collect(),
        }
    }

    /// Every row times its factor, of `factors [rows]`.
    #[must_use]
    pub fn rows_scaled(mut self, factors: &[f64]) -> Self {
        for (row, &factor) in self.values.chunks_exact_mut(self.cols.max(1)).zip(factors) {
            row.iter_mut().for_each(|v| *v *= factor);
        }
        self
    }

    /// Every column times its factor, of `factors [cols]`.
    #[must_use]
    pub fn columns_scaled(mut self, factors: &[f64]) -> Self {
        for row in self.values.chunks_exact_mut(self.cols.max(1)) {
            row.iter_mut().zip(factors).for_each(|(v, &f)| *v *= f);
        }
        self
    }

    /// `self b`.
    ///
    /// # Errors
    /// If the shapes do not fit together.
    pub fn times(&self, b: &Self) -> Result<Self> {
        product("decompose::Matrix::times", self.faer(), b.faer())
    }

    /// `self^T b`.
    ///
    /// # Errors
    /// If the shapes do not fit together.
    pub fn transposed_times(&self, b: &Self) -> Result<Self> {
        let op = "decompose::Matrix::transposed_times";
        product(op, self.faer().transpose(), b.faer())
    }

    /// `self b^T`.
    ///
    /// # Errors
    /// If the shapes do not fit together.
    pub fn times_transposed(&self, b: &Self) -> Result<Self> {
        let op = "decompose::Matrix::times_transposed";
        product(op, self.faer(), b.faer().transpose())
    }

    /// The transpose.
    #[must_use]
    pub fn transposed(&self) -> Self {
        Self::from_faer(self.faer().transpose())
    }

    /// All singular values and their vectors.
    ///
    /// # Errors
    /// If a value is not finite.
    pub fn svd(&self) -> Result<Svd> {
        const OP: &str = "decompose::Matrix::svd";
        self.check_finite(OP)?;
        let svd = self.faer().thin_svd().map_err(|error| Error::Invalid {
            op: OP,
            message: format!("no singular values were found: {error:?}"),
        })?;
        let count = self.rows.min(self.cols);
        Ok(Svd {
            u: Self::from_faer(svd.U()),
            s: (0..count).map(|i| svd.S()[i]).collect(),
            vt: Self::from_faer(svd.V().transpose()),
        })
    }

    /// Q and R; the signs are those of Householder's reflections, as LAPACK chooses them.
    ///
    /// # Errors
    /// If a value is not finite.
    pub fn qr(&self) -> Result<[Self; 2]> {
        self.check_finite("decompose::Matrix::qr")?;
        let qr = self.faer().qr();
        Ok([
            Self::from_faer(qr.compute_thin_Q().as_ref()),
            Self::from_faer(qr.thin_R()),
        ])
    }

    /// The inverse of a square matrix.
    ///
    /// # Errors
    /// If it is not square, or a value is not finite.
    pub fn inverse(&self) -> Result<Self> {
        const OP: &str = "decompose::Matrix::inverse";
        crate::error::check_shape(OP, "matrix", [self.rows; 2], self.shape())?;
        self.check_finite(OP)?;
        let inverse = self.faer().partial_piv_lu().inverse();
        Ok(Self::from_faer(inverse.as_ref()))
    }

    fn faer(&self) -> MatRef<'_, f64> {
        MatRef::from_row_major_slice(&self.values, self.rows, self.cols)
    }

    fn from_faer(from: MatRef<'_, f64>) -> Self {
        let (rows, cols) = from.shape();
        let mut values = vec![0.0; rows * cols];
        MatMut::from_row_major_slice_mut(&mut values, rows, cols).copy_from(from);
        Self { rows, cols, values }
    }

    fn check_finite(&self, op: &'static str) -> Result<()> {
        match self.values.iter().position(|v| !v.is_finite()) {
            None => Ok(()),
            Some(at) => Err(Error::Invalid {
                op,
                message: format!("value {at} is {}", self.values[at]),
            }),
        }
    }
}

impl Svd {
    /// Some of the values, with their vectors.
    #[must_use]
    pub fn range(&self, range: Range<usize>) -> Self {
        Self {
            u: self.u.columns(range.clone()),
            s: self.s[range.clone()].to_vec(),
            vt: self.vt.row_range(range),
        }
    }
}

fn product(op: &'static str, a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> Result<Matrix> {
    let (rows, cols) = (a.nrows(), b.ncols());
    check_len(op, "rows of b", a.ncols(), b.nrows())?;
    let mut values = vec![0.0; rows * cols];
    let to = MatMut::from_row_major_slice_mut(&mut values, rows, cols);
    matmul(to, Accum::Replace, a, b, 1.0, Par::Seq);
    Ok(Matrix { rows, cols, values })
}
