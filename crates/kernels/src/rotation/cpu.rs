use super::{Map, Source};
use rayon::prelude::*;

/// A square matrix, row by row.
pub(super) type Square = Vec<f64>;

pub(super) fn forward(
    rotations: &mut [f32],
    parameters: &[f32],
    n: usize,
    source: Source,
    map: Map<'_>,
) {
    let blocks = rotations.par_chunks_exact_mut(n * n).enumerate();
    blocks.for_each(|(block, rotation)| {
        let s = skew(parameters, block, n, source);
        for (to, value) in rotation.iter_mut().zip(of(map, &s, n)) {
            *to = value as f32;
        }
    });
}

pub(super) fn add_gradient(
    d_parameters: &mut [f32],
    d: &[f32],
    parameters: &[f32],
    n: usize,
    source: Source,
    map: Map<'_>,
) {
    let each = source.parameters(n);
    if each == 0 {
        return;
    }
    let blocks = d_parameters.par_chunks_exact_mut(each).enumerate();
    blocks.for_each(|(block, target)| {
        let d: Square = d[block * n * n..(block + 1) * n * n]
            .iter()
            .map(|d| f64::from(*d))
            .collect();
        let d = backward(map, &skew(parameters, block, n, source), &d, n);
        let of_pair = |i: usize, j: usize| d[i * n + j] - d[j * n + i];
        match source {
            Source::Upper => {
                for ((i, j), target) in pairs(n).zip(target) {
                    *target += of_pair(i, j) as f32;
                }
            }
            Source::Square => {
                for (at, target) in target.iter_mut().enumerate() {
                    *target += (0.5 * of_pair(at / n, at % n)) as f32;
                }
            }
        }
    });
}

pub(super) fn shorten(vectors: &mut [f32], cols: usize, limit: f64) {
    vectors.par_chunks_exact_mut(cols.max(1)).for_each(|row| {
        let squares = row.iter().map(|v| f64::from(*v) * f64::from(*v));
        let norm = squares.sum::<f64>().sqrt();
        if norm > limit {
            let factor = (limit / norm) as f32;
            row.iter_mut().for_each(|v| *v *= factor);
        }
    });
}

/// Places above the diagonal, row by row.
fn pairs(n: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..n).flat_map(move |i| (i + 1..n).map(move |j| (i, j)))
}

fn skew(parameters: &[f32], block: usize, n: usize, source: Source) -> Square {
    let each = source.parameters(n);
    let own = &parameters[block * each..(block + 1) * each];
    match source {
        Source::Upper => {
            let mut matrix = vec![0.0; n * n];
            for ((i, j), value) in pairs(n).zip(own) {
                matrix[i * n + j] = f64::from(*value);
                matrix[j * n + i] = -f64::from(*value);
            }
            matrix
        }
        Source::Square => (0..n * n)
            .map(|at| 0.5 * f64::from(own[at] - own[at % n * n + at / n]))
            .collect(),
    }
}

fn identity(n: usize) -> Square {
    (0..n * n)
        .map(|i| f64::from(u8::from(i / n == i % n)))
        .collect()
}

pub(super) fn transposed(m: &[f64], n: usize) -> Square {
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

/// The inverse of `I + s`, s skew-symmetric: never singular, and its pivots are at least 1.
fn inverse_of_identity_plus(s: &[f64], n: usize) -> Square {
    let mut m: Square = identity(n).iter().zip(s).map(|(i, s)| i + s).collect();
    for c in 0..n {
        let column: Vec<f64> = (0..n).map(|r| m[r * n + c]).collect();
        let row: Vec<f64> = (0..n)
            .map(|k| if k == c { 1.0 } else { m[c * n + k] } / column[c])
            .collect();
        for (r, values) in m.chunks_exact_mut(n).enumerate() {
            values[c] = 0.0;
            let factor = if r == c { -1.0 } else { column[r] };
            if r == c {
                values.fill(0.0);
            }
            for (value, row) in values.iter_mut().zip(&row) {
                *value -= factor * row;
            }
        }
    }
    m
}

/// The rotation of S.
pub(super) fn of(map: Map<'_>, s: &[f64], n: usize) -> Square {
    match map {
        // (I - S) (I + S)^-1 = 2 (I + S)^-1 - I
        Map::Cayley => {
            let inverse = inverse_of_identity_plus(s, n);
            let identity = identity(n);
            let pairs = inverse.iter().zip(&identity);
            pairs.map(|(inverse, i)| 2.0 * inverse - i).collect()
        }
        Map::Series(factors) => {
            let mut sum = identity(n);
            let mut power = identity(n);
            for factor in factors {
                power = product(&power, s, n);
                let terms = sum.iter_mut().zip(&power);
                terms.for_each(|(sum, p)| *sum += factor * p);
            }
            sum
        }
    }
}

/// The gradient of S as a matrix of independent elements, from that of the rotation.
pub(super) fn backward(map: Map<'_>, s: &[f64], d: &[f64], n: usize) -> Square {
    match map {
        // dR = -2 (I + S)^-1 dS (I + S)^-1
        Map::Cayley => {
            let inverse = transposed(&inverse_of_identity_plus(s, n), n);
            let left = product(&inverse, d, n);
            let both = product(&left, &inverse, n);
            both.iter().map(|v| -2.0 * v).collect()
        }
        Map::Series(factors) => {
            // d(S^k) = sum over i of S^i dS S^(k-1-i), built up from k to k + 1.
            let st = transposed(s, n);
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
                let terms = total.iter_mut().zip(&current);
                terms.for_each(|(t, c)| *t += factor * c);
            }
            total
        }
    }
}
