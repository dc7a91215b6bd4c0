//! Rotations made of skew-symmetric matrices, and their gradients, in f64: blocks are small.

use ferrotune_core::adapter::Site;
use ferrotune_core::{Error, Result};

/// Size and number of the blocks that inputs are rotated in: one of them is given, with its key, the
/// other is 0.
///
/// # Errors
/// [`Error::Config`] if it does not divide the inputs of `site`.
pub(super) fn blocks(
    site: &Site,
    size: (&'static str, usize),
    number: (&'static str, usize),
) -> Result<[usize; 2]> {
    let inputs = site.in_features;
    let (key, given) = if size.1 > 0 { size } else { number };
    if given > inputs || !inputs.is_multiple_of(given) {
        let message = format!(
            "is {given}, but `{}` has {inputs} inputs, which it must divide",
            site.name
        );
        return Err(Error::config(key, message));
    }
    let other = inputs / given;
    Ok(if size.1 > 0 {
        [given, other]
    } else {
        [other, given]
    })
}

/// A square matrix, row by row.
pub(super) type Square = Vec<f64>;

pub(super) fn identity(n: usize) -> Square {
    (0..n * n)
        .map(|i| f64::from(u8::from(i / n == i % n)))
        .collect()
}

fn transposed(m: &[f64], n: usize) -> Square {
    (0..n * n).map(|i| m[i % n * n + i / n]).collect()
}

pub(super) fn product(a: &[f64], b: &[f64], n: usize) -> Square {
    let mut out = vec![0.0; n * n];
    for (r, out) in out.chunks_exact_mut(n).enumerate() {
        for (k, a) in a[r * n..(r + 1) * n].iter().enumerate() {
            out.iter_mut()
                .zip(&b[k * n..(k + 1) * n])
                .for_each(|(o, b)| *o += a * b);
        }
    }
    out
}

/// The inverse of `I + s`, s skew-symmetric: never singular.
fn inverse_of_identity_plus(s: &[f64], n: usize) -> Square {
    let mut m: Square = identity(n).iter().zip(s).map(|(i, s)| i + s).collect();
    let mut inverse = identity(n);
    for col in 0..n {
        let pivot = (col..n).max_by(|&a, &b| m[a * n + col].abs().total_cmp(&m[b * n + col].abs()));
        let pivot = pivot.unwrap_or(col);
        for k in 0..n {
            m.swap(col * n + k, pivot * n + k);
            inverse.swap(col * n + k, pivot * n + k);
        }
        let scale = 1.0 / m[col * n + col];
        for k in 0..n {
            m[col * n + k] *= scale;
            inverse[col * n + k] *= scale;
        }
        for row in (0..n).filter(|row| *row != col) {
            let factor = m[row * n + col];
            for k in 0..n {
                m[row * n + k] -= factor * m[col * n + k];
                inverse[row * n + k] -= factor * inverse[col * n + k];
            }
        }
    }
    inverse
}

/// How a rotation is made of a skew-symmetric matrix S.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rotation {
    /// `(I - S) (I + S)^-1`.
    Cayley,
    /// PEFT's truncated series of it in -S, with this many terms.
    Neumann(usize),
}

impl Rotation {
    pub(super) fn of(self, s: &[f64], n: usize) -> Square {
        match self {
            Self::Cayley => {
                let difference: Square = identity(n).iter().zip(s).map(|(i, s)| i - s).collect();
                product(&difference, &inverse_of_identity_plus(s, n), n)
            }
            Self::Neumann(terms) => {
                let mut sum = identity(n);
                let mut power = identity(n);
                for factor in coefficients(terms) {
                    power = product(&power, s, n);
                    sum.iter_mut()
                        .zip(&power)
                        .for_each(|(sum, p)| *sum += factor * p);
                }
                sum
            }
        }
    }

    /// The gradient of S as a matrix of independent elements, from that of the rotation.
    pub(super) fn backward(self, s: &[f64], d: &[f64], n: usize) -> Square {
        match self {
            Self::Cayley => {
                // dR (I + S) = -(I + R) dS
                let inverse = transposed(&inverse_of_identity_plus(s, n), n);
                let r = self.of(s, n);
                let sum: Square = identity(n).iter().zip(&r).map(|(i, r)| i + r).collect();
                let left = product(&transposed(&sum, n), d, n);
                product(&left, &inverse, n).iter().map(|v| -v).collect()
            }
            Self::Neumann(terms) => {
                // d(S^k) = sum over i of S^i dS S^(k-1-i), built up from k to k + 1.
                let st = transposed(s, n);
                let factors = coefficients(terms);
                let mut total = vec![0.0; n * n];
                let mut left = d.to_vec();
                let mut current = d.to_vec();
                for (k, factor) in factors.iter().enumerate() {
                    if k > 0 {
                        // G_{k+1} = S^T G_k + D (S^T)^k
                        left = product(&left, &st, n);
                        let ahead = product(&st, &current, n);
                        current = ahead.iter().zip(&left).map(|(a, b)| a + b).collect();
                    }
                    total
                        .iter_mut()
                        .zip(&current)
                        .for_each(|(t, c)| *t += factor * c);
                }
                total
            }
        }
    }
}

/// Factors of S, S^2, ... in PEFT's series of `terms` terms: 2 for each, 1 for the last.
fn coefficients(terms: usize) -> Vec<f64> {
    match terms {
        0 | 1 => Vec::new(),
        2 => vec![2.0],
        _ => {
            let full = 2 + (terms - 1).saturating_sub(3);
            let mut factors = vec![2.0; full];
            factors.push(1.0);
            factors
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Rotation, product, transposed};

    fn skew(n: usize) -> Vec<f64> {
        let value = |i: usize, j: usize| ((i * 7 + j * 3) % 5) as f64 * 0.1 - 0.2;
        (0..n * n)
            .map(|at| match (at / n, at % n) {
                (i, j) if i < j => value(i, j),
                (i, j) if i > j => -value(j, i),
                _ => 0.0,
            })
            .collect()
    }

    #[test]
    fn cayley_gives_a_rotation() {
        for n in [1, 2, 5, 16] {
            let r = Rotation::Cayley.of(&skew(n), n);
            let square = product(&r, &transposed(&r, n), n);
            for (at, v) in square.iter().enumerate() {
                let want = if at / n == at % n { 1.0 } else { 0.0 };
                assert!((v - want).abs() < 1e-12, "{n}: {v}");
            }
        }
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let (n, step) = (4, 1e-6);
        let d: Vec<f64> = (0..n * n).map(|i| (i as f64 * 0.7).sin()).collect();
        let s = skew(n);
        let score = |rotation: Rotation, s: &[f64]| -> f64 {
            rotation.of(s, n).iter().zip(&d).map(|(r, d)| r * d).sum()
        };
        for rotation in [
            Rotation::Cayley,
            Rotation::Neumann(2),
            Rotation::Neumann(3),
            Rotation::Neumann(5),
            Rotation::Neumann(7),
        ] {
            let gradient = rotation.backward(&s, &d, n);
            for at in 0..n * n {
                let mut moved = [s.clone(), s.clone()];
                moved[0][at] += step;
                moved[1][at] -= step;
                let want = (score(rotation, &moved[0]) - score(rotation, &moved[1])) / (2.0 * step);
                assert!(
                    (gradient[at] - want).abs() < 1e-6,
                    "{rotation:?} {at}: {} {want}",
                    gradient[at]
                );
            }
        }
    }
}
