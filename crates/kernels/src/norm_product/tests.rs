use super::{Factors, add_inverse_gradients, inverse};
use crate::test_support::normal;
use crate::{DType, Tensor, View};

/// R, n and m.
const SHAPE: [usize; 3] = [3, 5, 7];

/// By definition, in f64.
fn inverses(a: &[f64], b: &[f64], least: f64) -> Vec<f64> {
    let [rank, n, m] = SHAPE;
    let norm = |values: Vec<f64>| values.iter().map(|v| v * v).sum::<f64>().sqrt().max(least);
    let of = |k: usize| {
        let row = norm(a[k * n..(k + 1) * n].to_vec());
        1.0 / (row * norm((0..m).map(|i| b[i * rank + k]).collect()))
    };
    (0..rank).map(of).collect()
}

fn widened(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

#[test]
fn inverses_and_their_gradients_are_those_of_their_definition() {
    let [rank, n, m] = SHAPE;
    let (mut a, mut b, d) = (normal(1, rank * n), normal(2, m * rank), normal(3, rank));
    // A row of A and a column of B below the least norm: constants.
    a[..n].fill(1e-3);
    (0..m).for_each(|i| b[i * rank + 1] = 0.0);
    let least = 0.1;
    let of = Factors {
        a: View::from_f32(&a, rank, n),
        b: View::from_f32(&b, m, rank),
        least,
    };
    let mut out = Tensor::zeros(DType::F32, rank, 1);
    inverse(out.view_mut(), of).unwrap();
    let (wide, least) = ([widened(&a), widened(&b)], f64::from(least));
    for (got, want) in out
        .to_f32_vec()
        .iter()
        .zip(inverses(&wide[0], &wide[1], least))
    {
        assert!(
            (f64::from(*got) - want).abs() <= 1e-6 * want,
            "{got} for {want}"
        );
    }
    let mut d_a = Tensor::from_f32(vec![1.0; rank * n], rank, n);
    let mut d_b = Tensor::from_f32(vec![1.0; m * rank], m, rank);
    let to = [d_a.view_mut(), d_b.view_mut()];
    add_inverse_gradients(to, View::from_f32(&d, rank, 1), of).unwrap();
    for (part, got) in [d_a, d_b].iter().enumerate() {
        for (at, got) in got.to_f32_vec().iter().enumerate() {
            let value = |step: f64| -> f64 {
                let mut moved = wide.clone();
                moved[part][at] += step;
                let made = inverses(&moved[0], &moved[1], least);
                made.iter().zip(&d).map(|(v, d)| v * f64::from(*d)).sum()
            };
            let want = 1.0 + (value(1e-5) - value(-1e-5)) / 2e-5;
            let error = (f64::from(*got) - want).abs();
            assert!(
                error <= 1e-5 * want.abs().max(1.0),
                "{part} {at}: {got} for {want}"
            );
        }
    }
}

#[test]
fn other_shapes_are_refused() {
    let tensor = |rows, cols| Tensor::zeros(DType::F32, rows, cols);
    let (a, b, wrong) = (tensor(2, 5), tensor(4, 2), tensor(2, 4));
    let with = |b| Factors {
        a: a.view(),
        b,
        least: 1.0,
    };
    inverse(tensor(2, 1).view_mut(), with(b.view())).unwrap();
    assert!(inverse(tensor(2, 1).view_mut(), with(wrong.view())).is_err());
    assert!(inverse(tensor(1, 2).view_mut(), with(b.view())).is_err());
    let d = tensor(2, 1);
    let (mut d_a, mut d_b) = (tensor(2, 5), tensor(2, 4));
    let to = [d_a.view_mut(), d_b.view_mut()];
    assert!(add_inverse_gradients(to, d.view(), with(b.view())).is_err());
}
