use super::{Operands, backward, forward, row_norms, scale};
use crate::test_support::normal;
use crate::{DType, Tensor, View, ViewMut, matmul};

/// `[rows, cols]` of the product of `a` `[rows, k]` and `b` `[k, cols]`, in f64.
fn product(a: &[f32], b: &[f32], [rows, k, cols]: [usize; 3]) -> Vec<f64> {
    let mut out = vec![0.0; rows * cols];
    for (i, out) in out.iter_mut().enumerate() {
        let (row, col) = (i / cols, i % cols);
        *out = (0..k)
            .map(|j| f64::from(a[row * k + j]) * f64::from(b[j * cols + col]))
            .sum();
    }
    out
}

#[test]
fn norms_are_those_of_the_weight_with_its_update() {
    for dtype in [DType::F32, DType::Bf16] {
        for [out, inputs, rank] in [[1, 1, 1], [5, 67, 3], [40, 300, 8]] {
            let weight = Tensor::from_f32(normal(1, out * inputs), out, inputs).to_dtype(dtype);
            let (a, b) = (normal(2, rank * inputs), normal(3, out * rank));
            let (a_view, b_view) = (
                View::from_f32(&a, rank, inputs),
                View::from_f32(&b, out, rank),
            );
            let [mut cross, mut gram, mut spread] = [[rank, out], [rank, rank], [rank, out]]
                .map(|[rows, cols]| Tensor::zeros(DType::F32, rows, cols));
            matmul::nt(cross.view_mut(), 0.0, 1.0, a_view, weight.view()).expect("shapes agree");
            matmul::nt(gram.view_mut(), 0.0, 1.0, a_view, a_view).expect("shapes agree");
            matmul::nt(spread.view_mut(), 0.0, 1.0, gram.view(), b_view).expect("shapes agree");
            let mut norms = vec![0.0; out];
            let of = Operands {
                weight: weight.view(),
                b: b_view,
                cross: cross.view(),
                spread: spread.view(),
                scale: 1.5,
            };
            row_norms(&of, ViewMut::vector(&mut norms)).expect("shapes agree");
            let update = product(&b, &a, [out, rank, inputs]);
            let weight = weight.to_f32_vec();
            for (i, norm) in norms.iter().enumerate() {
                let row = i * inputs..(i + 1) * inputs;
                let pairs = row.map(|at| (f64::from(weight[at]), 1.5 * update[at]));
                let squares = |sum: f64, (w, u): (f64, f64)| sum + (w + u).powi(2);
                let apart = |sum: f64, (w, u): (f64, f64)| sum + w.powi(2) + u.powi(2);
                let want = pairs.clone().fold(0.0, squares);
                // What is summed is as large as weight and update, however much of one the other takes away.
                let summed = pairs.fold(0.0, apart);
                let error = (f64::from(*norm).powi(2) - want).abs();
                assert!(error < 1e-5 * summed, "{norm}^2 and {want}");
            }
        }
    }
}

#[test]
fn the_gradient_is_that_of_the_scaling() {
    let (rows, cols) = (7, 600);
    let (u, dy) = (normal(1, rows * cols), normal(2, rows * cols));
    let positive = |seed| {
        normal(seed, cols)
            .iter()
            .map(|v| v.abs() + 0.5)
            .collect::<Vec<f32>>()
    };
    let (magnitude, norms) = (positive(3), positive(4));
    let (mut y, mut kept) = (u.clone(), vec![f32::NAN; u.len()]);
    forward(
        ViewMut::from_f32(&mut y, rows, cols),
        ViewMut::from_f32(&mut kept, rows, cols),
        View::vector(&magnitude),
        View::vector(&norms),
    )
    .expect("shapes agree");
    assert_eq!(kept, u);
    let mut again = u.clone();
    scale(
        ViewMut::from_f32(&mut again, rows, cols),
        View::vector(&magnitude),
        View::vector(&norms),
    )
    .expect("shapes agree");
    assert_eq!(again, y);
    let mut d_magnitude = vec![1.0; cols];
    let mut du = vec![f32::NAN; dy.len()];
    let [dy_view, u_view] = [&dy, &u].map(|v| View::from_f32(v, rows, cols));
    backward(
        dy_view,
        u_view,
        View::vector(&magnitude),
        View::vector(&norms),
        ViewMut::vector(&mut d_magnitude),
        ViewMut::from_f32(&mut du, rows, cols),
    )
    .expect("shapes agree");
    for c in 0..cols {
        let column = |values: &[f32], r: usize| f64::from(values[r * cols + c]);
        assert!((0..rows).all(|r| y[r * cols + c] == u[r * cols + c] * (magnitude[c] / norms[c])));
        assert!(
            (0..rows).all(|r| du[r * cols + c] == dy[r * cols + c] * (magnitude[c] / norms[c]))
        );
        let sum: f64 = (0..rows).map(|r| column(&dy, r) * column(&u, r)).sum();
        let want = 1.0 + sum / f64::from(norms[c]);
        assert!(
            (f64::from(d_magnitude[c]) - want).abs() < 1e-4,
            "{} and {want}",
            d_magnitude[c]
        );
    }
}

#[test]
fn wrong_shapes_are_refused() {
    let mut y = [0.0; 6];
    assert!(
        scale(
            ViewMut::from_f32(&mut y, 2, 3),
            View::vector(&[1.0; 2]),
            View::vector(&[1.0; 3])
        )
        .is_err()
    );
    assert!(
        scale(
            ViewMut::from_f32(&mut y, 2, 3),
            View::vector(&[1.0; 3]),
            View::vector(&[1.0; 4])
        )
        .is_err()
    );
    let (mut d, mut du) = ([0.0; 2], [0.0; 6]);
    let x = [0.0; 6];
    let x = View::from_f32(&x, 2, 3);
    let ones = View::vector(&[1.0; 3]);
    let d = ViewMut::vector(&mut d);
    assert!(backward(x, x, ones, ones, d, ViewMut::from_f32(&mut du, 2, 3)).is_err());
    let mut d = [0.0; 3];
    let d = ViewMut::vector(&mut d);
    assert!(backward(x, x, ones, ones, d, ViewMut::from_f32(&mut du, 3, 2)).is_err());
    let u = ViewMut::from_f32(&mut du, 3, 2);
    assert!(forward(ViewMut::from_f32(&mut y, 2, 3), u, ones, ones).is_err());
}
