use super::{Angles, Axis, Pairs, Per, add_gradients, coefficients, rotate};
use crate::test_support::{Pitched, normal};
use crate::{DType, Tensor, View};

/// θ and α of c and of s of column `i`, as RoAd's variants have them.
fn angles_of(pairs: Pairs, i: usize) -> [usize; 2] {
    let group = pairs.group;
    match pairs.per {
        Per::Pair => [i / group * group / 2 + i % (group / 2); 2],
        Per::Column => [i; 2],
        Per::Coefficient => {
            let c = i / group * 2 * group + i % group;
            [c, c + group]
        }
    }
}

/// The matrix `[n, n]` that columns are multiplied with, in f64.
fn matrix(pairs: Pairs, n: usize, theta: &[f64], alpha: &[f64]) -> Vec<f64> {
    let (half, mut m) = (pairs.group / 2, vec![0.0; n * n]);
    for i in 0..n {
        let [c, s] = angles_of(pairs, i);
        m[i * n + i] = alpha[c] * theta[c].cos();
        let sine = alpha[s] * theta[s].sin();
        if i % pairs.group < half {
            m[i * n + i + half] = -sine;
        } else {
            m[i * n + i - half] = sine;
        }
    }
    m
}

/// `x M^T`, or `x M`.
fn product(x: &[f32], m: &[f64], n: usize, transposed: bool) -> Vec<f64> {
    let of = |t: usize, i: usize| {
        let at = |j| {
            if transposed {
                m[j * n + i]
            } else {
                m[i * n + j]
            }
        };
        (0..n).map(|j| f64::from(x[t * n + j]) * at(j)).sum()
    };
    (0..x.len()).map(|at| of(at / n, at % n)).collect()
}

fn widened(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

#[track_caller]
fn assert_close(got: &[f32], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().zip(want) {
        let error = (f64::from(*got) - want).abs();
        assert!(error <= tolerance * want.abs().max(1.0), "{got} for {want}");
    }
}

/// Rows and columns the other way round.
fn across(values: &[f32], [rows, cols]: [usize; 2]) -> Vec<f32> {
    let at = |i: usize| values[i % rows * cols + i / rows];
    (0..values.len()).map(at).collect()
}

const CASES: [(Per, usize, usize, usize); 4] = [
    (Per::Pair, 6, 18, 5),
    (Per::Column, 4, 4, 7),
    (Per::Coefficient, 2, 10, 3),
    (Per::Coefficient, 8, 16, 1),
];

#[test]
fn columns_and_rows_are_multiplied_with_the_matrix_of_their_angles() {
    for (per, group, n, rows) in CASES {
        let pairs = Pairs { group, per };
        let count = pairs.angles(n);
        let (theta, alpha, x) = (normal(1, count), normal(2, count), normal(3, rows * n));
        let angles = Angles {
            theta: View::vector(&theta),
            alpha: View::vector(&alpha),
        };
        let mut made = Tensor::zeros(DType::F32, 2, n);
        coefficients(made.view_mut(), angles, pairs).unwrap();
        let m = matrix(pairs, n, &widened(&theta), &widened(&alpha));
        for transposed in [false, true] {
            let want = product(&x, &m, n, transposed);
            let mut y = Pitched::new(&x, [rows, n], DType::F32);
            rotate(y.view_mut(), made.view(), pairs, Axis::Columns, transposed).unwrap();
            assert_close(&y.values(), &want, 1e-6);
            let mut y = Pitched::new(&across(&x, [rows, n]), [n, rows], DType::F32);
            rotate(y.view_mut(), made.view(), pairs, Axis::Rows, transposed).unwrap();
            assert_close(&across(&y.values(), [n, rows]), &want, 1e-6);
        }
    }
}

/// Central differences, in f64.
#[test]
fn gradients_are_the_slopes_of_the_product() {
    for (per, group, n, rows) in CASES {
        let pairs = Pairs { group, per };
        let count = pairs.angles(n);
        let (theta, alpha) = (normal(1, count), normal(2, count));
        let (x, d) = (normal(3, rows * n), normal(4, rows * n));
        let value = |theta: &[f64], alpha: &[f64]| -> f64 {
            let y = product(&x, &matrix(pairs, n, theta, alpha), n, false);
            y.iter().zip(&d).map(|(y, d)| y * f64::from(*d)).sum()
        };
        let slope = |of_theta: bool, at: usize| {
            let step = 1e-5;
            let at_step = |step: f64| {
                let (mut theta, mut alpha) = (widened(&theta), widened(&alpha));
                (if of_theta { &mut theta } else { &mut alpha })[at] += step;
                value(&theta, &alpha)
            };
            // What is added to starts at 1.
            1.0 + (at_step(step) - at_step(-step)) / (2.0 * step)
        };
        let want = [true, false].map(|of| (0..count).map(|at| slope(of, at)).collect::<Vec<_>>());
        let angles = Angles {
            theta: View::vector(&theta),
            alpha: View::vector(&alpha),
        };
        for axis in [Axis::Columns, Axis::Rows] {
            let of = |values: &[f32]| match axis {
                Axis::Columns => Pitched::new(values, [rows, n], DType::F32),
                Axis::Rows => Pitched::new(&across(values, [rows, n]), [n, rows], DType::F32),
            };
            let (d, x) = (of(&d), of(&x));
            let ones = || Tensor::from_f32(vec![1.0; count], 1, count);
            let (mut d_theta, mut d_alpha) = (ones(), ones());
            let to = [d_theta.view_mut(), d_alpha.view_mut()];
            add_gradients(to, d.view(), x.view(), angles, pairs, axis).unwrap();
            assert_close(&d_theta.to_f32_vec(), &want[0], 1e-5);
            assert_close(&d_alpha.to_f32_vec(), &want[1], 1e-5);
        }
    }
}

#[test]
fn what_cannot_be_paired_is_refused() {
    let tensor = |rows, cols| Tensor::zeros(DType::F32, rows, cols);
    let (theta, mut made, mut y) = (tensor(1, 6), tensor(2, 12), tensor(3, 12));
    let angles = Angles {
        theta: theta.view(),
        alpha: theta.view(),
    };
    let of = |group, per| Pairs { group, per };
    coefficients(made.view_mut(), angles, of(4, Per::Pair)).unwrap();
    for group in [0, 3, 8] {
        assert!(coefficients(made.view_mut(), angles, of(group, Per::Pair)).is_err());
    }
    let pairs = of(4, Per::Column);
    assert!(coefficients(made.view_mut(), angles, pairs).is_err());
    rotate(y.view_mut(), made.view(), pairs, Axis::Columns, false).unwrap();
    assert!(rotate(y.view_mut(), made.view(), pairs, Axis::Rows, false).is_err());
}
