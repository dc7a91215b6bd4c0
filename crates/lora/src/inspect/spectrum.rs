//! Norms and singular values of `B A` from the factors alone: nothing of the weight's size is made.

/// A matrix of few rows and columns, row after row, in f64.
#[derive(Clone, Debug)]
struct Small {
    size: usize,
    values: Vec<f64>,
}

impl Small {
    /// `X X^T` of `x` `[size, cols]`.
    fn gram_of_rows(x: &[f32], size: usize) -> Self {
        let cols = x.len() / size.max(1);
        Self::from_fn(size, |i, j| {
            let rows = x[i * cols..(i + 1) * cols].iter().zip(&x[j * cols..]);
            rows.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        })
    }

    /// `X^T X` of `x` `[rows, size]`.
    fn gram_of_columns(x: &[f32], size: usize) -> Self {
        let mut gram = Self::from_fn(size, |_, _| 0.0);
        for row in x.chunks_exact(size.max(1)) {
            for (i, a) in row.iter().enumerate() {
                let sums = &mut gram.values[i * size..(i + 1) * size];
                for (sum, b) in sums.iter_mut().zip(row) {
                    *sum += f64::from(*a) * f64::from(*b);
                }
            }
        }
        gram
    }

    fn from_fn(size: usize, value: impl Fn(usize, usize) -> f64) -> Self {
        let at = (0..size * size).map(|at| value(at / size, at % size));
        Self {
            size,
            values: at.collect(),
        }
    }

    fn at(&self, i: usize, j: usize) -> f64 {
        self.values[i * self.size + j]
    }

    fn times(&self, other: &Self) -> Self {
        let inner = |i, j| (0..self.size).map(|k| self.at(i, k) * other.at(k, j)).sum();
        Self::from_fn(self.size, inner)
    }

    fn transposed(&self) -> Self {
        Self::from_fn(self.size, |i, j| self.at(j, i))
    }

    /// The sum of the products of elements: `tr(self^T other)`.
    fn inner(&self, other: &Self) -> f64 {
        self.values
            .iter()
            .zip(&other.values)
            .map(|(a, b)| a * b)
            .sum()
    }

    /// Eigenvalues, and eigenvectors as columns, of a symmetric matrix, by Jacobi's rotations.
    fn eigen(&self) -> (Vec<f64>, Self) {
        const SWEEPS: usize = 60;
        let n = self.size;
        let mut a = self.clone();
        let mut vectors = Self::from_fn(n, |i, j| f64::from(u8::from(i == j)));
        let scale: f64 = a.values.iter().map(|v| v * v).sum();
        for _ in 0..SWEEPS {
            let off: f64 = (0..n * n)
                .filter(|at| at / n != at % n)
                .map(|at| a.values[at].powi(2))
                .sum();
            if off <= scale * 1e-30 {
                break;
            }
            for p in 0..n {
                for q in p + 1..n {
                    a.rotate(&mut vectors, p, q);
                }
            }
        }
        ((0..n).map(|i| a.at(i, i)).collect(), vectors)
    }

    /// Makes element (p, q) zero.
    fn rotate(&mut self, vectors: &mut Self, p: usize, q: usize) {
        let (n, element) = (self.size, self.at(p, q));
        if element == 0.0 {
            return;
        }
        let theta = (self.at(q, q) - self.at(p, p)) / (2.0 * element);
        let t = theta.signum() / (theta.abs() + theta.hypot(1.0));
        let t = if theta == 0.0 { 1.0 } else { t };
        let c = 1.0 / t.hypot(1.0);
        let s = t * c;
        for k in 0..n {
            let (x, y) = (self.at(k, p), self.at(k, q));
            (self.values[k * n + p], self.values[k * n + q]) = (c * x - s * y, s * x + c * y);
        }
        for k in 0..n {
            let (x, y) = (self.at(p, k), self.at(q, k));
            (self.values[p * n + k], self.values[q * n + k]) = (c * x - s * y, s * x + c * y);
        }
        for k in 0..n {
            let (x, y) = (vectors.at(k, p), vectors.at(k, q));
            (vectors.values[k * n + p], vectors.values[k * n + q]) = (c * x - s * y, s * x + c * y);
        }
    }
}

/// Frobenius norm of `B A`.
pub(super) fn norm_of_product(a: &[f32], b: &[f32], rank: usize) -> f64 {
    let (a, b) = (
        Small::gram_of_rows(a, rank),
        Small::gram_of_columns(b, rank),
    );
    a.inner(&b).max(0.0).sqrt()
}

/// Singular values of `B A`, largest first, with A `[rank, in]` and B `[out, rank]`.
pub(super) fn singular_values(a: &[f32], b: &[f32], rank: usize) -> Vec<f64> {
    let (a, b) = (
        Small::gram_of_rows(a, rank),
        Small::gram_of_columns(b, rank),
    );
    if a.values.iter().chain(&b.values).any(|v| !v.is_finite()) {
        return vec![f64::NAN; rank];
    }
    // B^T B = C C^T, and the squares are the eigenvalues of C^T (A A^T) C.
    let (values, vectors) = b.eigen();
    let roots: Vec<f64> = values.iter().map(|v| v.max(0.0).sqrt()).collect();
    let c = Small::from_fn(rank, |i, j| vectors.at(i, j) * roots[j]);
    let (squares, _) = c.transposed().times(&a).times(&c).eigen();
    let mut found: Vec<f64> = squares.iter().map(|v| v.max(0.0).sqrt()).collect();
    found.sort_by(|x, y| y.total_cmp(x));
    found
}

/// e to the entropy of the singular values' shares of their sum: the number of directions that an
/// update really uses.
///
/// # Source
/// Roy and Vetterli: "The Effective Rank" (2007).
pub(super) fn effective_rank(singular_values: &[f64]) -> f64 {
    let sum: f64 = singular_values.iter().sum();
    if sum == 0.0 {
        return 0.0;
    }
    let shares = singular_values.iter().map(|s| s / sum);
    let entropy: f64 = shares
        .map(|p| if p > 0.0 { -p * p.ln() } else { 0.0 })
        .sum();
    if sum.is_nan() {
        f64::NAN
    } else {
        entropy.exp()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrotune_kernels::rng::Stream;

    #[test]
    fn singular_values_of_known_products() {
        // B A = diag(3, 2) in the first two of three features, with factors that are not orthogonal.
        let a = [3.0, 3.0, 0.0, 0.0, 2.0, 0.0];
        let b = [1.0, -1.5, 0.0, 1.0];
        let found = singular_values(&a, &b, 2);
        assert!(
            (found[0] - 3.0).abs() < 1e-12 && (found[1] - 2.0).abs() < 1e-12,
            "{found:?}"
        );
        assert_eq!(singular_values(&[0.0; 4], &b, 2), [0.0, 0.0]);
        assert!(singular_values(&[f32::NAN, 0.0, 0.0, 1.0], &b, 2)[0].is_nan());
    }

    #[test]
    fn the_squares_sum_to_the_norm_of_the_product() {
        let (rank, inputs, outputs) = (7, 19, 23);
        let mut stream = Stream::new(3);
        let mut normal = |n| (0..n).map(|_| stream.normal() as f32).collect::<Vec<f32>>();
        let (a, b) = (normal(rank * inputs), normal(outputs * rank));
        let mut norm = 0.0;
        for o in 0..outputs {
            for i in 0..inputs {
                let sum: f64 = (0..rank)
                    .map(|r| f64::from(b[o * rank + r]) * f64::from(a[r * inputs + i]))
                    .sum();
                norm += sum * sum;
            }
        }
        let squares: f64 = singular_values(&a, &b, rank).iter().map(|s| s * s).sum();
        assert!((squares / norm - 1.0).abs() < 1e-10, "{squares} {norm}");
    }

    #[test]
    fn the_effective_rank_counts_equal_directions() {
        assert!((effective_rank(&[2.0, 2.0, 2.0, 0.0]) - 3.0).abs() < 1e-12);
        assert!((effective_rank(&[5.0]) - 1.0).abs() < 1e-12);
        assert_eq!(effective_rank(&[0.0, 0.0]), 0.0);
    }
}
