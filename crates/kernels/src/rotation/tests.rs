use super::cpu::{backward, of, product, transposed};
use super::{MOST_TERMS, Map, Source, add_gradient, forward};
use crate::test_support::normal;
use crate::{DType, Tensor, View};

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
fn cayley_gives_the_rotation_of_its_definition() {
    for n in [1, 2, 5, 16] {
        let s = skew(n);
        let r = of(Map::Cayley, &s, n);
        let identity = |at: usize| if at / n == at % n { 1.0 } else { 0.0 };
        let square = product(&r, &transposed(&r, n), n);
        // R (I + S) = I - S
        let sum: Vec<f64> = s
            .iter()
            .enumerate()
            .map(|(at, s)| s + identity(at))
            .collect();
        let difference = product(&r, &sum, n);
        for at in 0..n * n {
            assert!((square[at] - identity(at)).abs() < 1e-12, "{n}");
            assert!(
                (difference[at] - (identity(at) - s[at])).abs() < 1e-12,
                "{n}"
            );
        }
    }
}

#[test]
fn gradients_are_those_of_finite_differences() {
    let (n, step) = (4, 1e-6);
    let d: Vec<f64> = (0..n * n).map(|i| (i as f64 * 0.7).sin()).collect();
    let s = skew(n);
    let maps = [
        Map::Cayley,
        Map::Series(&[]),
        Map::Series(&[2.0]),
        Map::Series(&[2.0, 2.0, 1.0]),
        Map::Series(&[2.0, 1.5, -1.0, 0.5, 1.0]),
    ];
    for map in maps {
        let score = |s: &[f64]| -> f64 { of(map, s, n).iter().zip(&d).map(|(r, d)| r * d).sum() };
        let gradient = backward(map, &s, &d, n);
        for at in 0..n * n {
            let mut moved = [s.clone(), s.clone()];
            moved[0][at] += step;
            moved[1][at] -= step;
            let want = (score(&moved[0]) - score(&moved[1])) / (2.0 * step);
            let got = gradient[at];
            assert!((got - want).abs() < 1e-6, "{map:?} {at}: {got} {want}");
        }
    }
}

#[test]
fn parameters_make_the_skew_matrix_and_get_its_gradient() {
    let n = 3;
    for source in [Source::Upper, Source::Square] {
        let each = source.parameters(n);
        let values: Vec<f32> = normal(1, 2 * each).iter().map(|v| 0.3 * v).collect();
        let d = normal(2, 2 * n * n);
        let score = |values: &[f32]| -> f64 {
            let mut out = Tensor::zeros(DType::F32, 2 * n, n);
            let parameters = View::from_f32(values, 2, each);
            forward(out.view_mut(), parameters, source, Map::Cayley).unwrap();
            let out = out.to_f32_vec();
            out.iter().zip(&d).map(|(r, d)| f64::from(r * d)).sum()
        };
        let mut got = Tensor::from_f32(vec![1.0; 2 * each], 2, each);
        let parameters = View::from_f32(&values, 2, each);
        let of_rotations = View::from_f32(&d, 2 * n, n);
        add_gradient(
            got.view_mut(),
            of_rotations,
            parameters,
            source,
            Map::Cayley,
        )
        .unwrap();
        for (at, got) in got.to_f32_vec().iter().enumerate() {
            let mut moved = [values.clone(), values.clone()];
            moved[0][at] += 1e-2;
            moved[1][at] -= 1e-2;
            let want = (score(&moved[0]) - score(&moved[1])) / 2e-2;
            assert!(
                (f64::from(*got) - 1.0 - want).abs() < 1e-3,
                "{source:?} {at}: {got} {want}"
            );
        }
    }
}

#[test]
fn other_shapes_and_long_series_are_refused() {
    let tensor = |rows, cols| Tensor::zeros(DType::F32, rows, cols);
    let (mut out, parameters) = (tensor(8, 4), tensor(2, 6));
    forward(
        out.view_mut(),
        parameters.view(),
        Source::Upper,
        Map::Cayley,
    )
    .unwrap();
    let long = [1.0; MOST_TERMS + 1];
    let refused = [
        forward(
            out.view_mut(),
            parameters.view(),
            Source::Square,
            Map::Cayley,
        ),
        forward(
            out.view_mut(),
            parameters.view(),
            Source::Upper,
            Map::Series(&long),
        ),
        forward(
            tensor(7, 4).view_mut(),
            parameters.view(),
            Source::Upper,
            Map::Cayley,
        ),
        forward(
            tensor(12, 4).view_mut(),
            parameters.view(),
            Source::Upper,
            Map::Cayley,
        ),
    ];
    assert!(refused.iter().all(Result::is_err));
}

#[test]
fn rows_that_are_too_long_get_the_length_that_is_allowed() {
    let mut vectors = Tensor::from_f32(vec![3.0, 4.0, 0.3, 0.4, 0.0, -1.0], 3, 2);
    super::shorten(vectors.view_mut(), 1.0).unwrap();
    let got = vectors.to_f32_vec();
    for (got, want) in got.iter().zip([0.6, 0.8, 0.3, 0.4, 0.0, -1.0]) {
        assert!((got - want).abs() < 1e-7, "{got} for {want}");
    }
}
