use super::direction;
use crate::test_support::normal;
use crate::{DType, Tensor, View, matmul};

/// |M M^T - I| of `m [rank, cols]`, in f64; of rows that are not zero.
fn distance(m: &[f64], cols: usize) -> f64 {
    let rows: Vec<&[f64]> = m.chunks(cols).collect();
    let product = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let mut sum = 0.0;
    for (i, a) in rows.iter().enumerate() {
        for (j, b) in rows.iter().enumerate() {
            let gram = product(a, b);
            let identity = f64::from(u8::from(i == j && gram > 0.0));
            sum += (gram - identity).powi(2);
        }
    }
    sum.sqrt()
}

#[test]
fn the_distance_and_its_gradient_are_those_of_their_definition() {
    let (rank, cols) = (4, 6);
    let mut m = normal(1, rank * cols);
    // A vector that is not there.
    m[cols..2 * cols].fill(0.0);
    let view = View::from_f32(&m, rank, cols);
    let mut gram = Tensor::zeros(DType::F32, rank, rank);
    matmul::nt(gram.view_mut(), 0.0, 1.0, view, view).unwrap();
    let mut found = Tensor::zeros(DType::F32, 1, 1);
    direction(gram.view_mut(), found.view_mut()).unwrap();
    let wide: Vec<f64> = m.iter().map(|v| f64::from(*v)).collect();
    let want = distance(&wide, cols);
    let found = f64::from(found.to_f32_vec()[0]);
    assert!((found - want).abs() < 1e-5 * want, "{found} for {want}");
    let mut d = Tensor::zeros(DType::F32, rank, cols);
    matmul::nn(d.view_mut(), 0.0, 2.0, gram.view(), view).unwrap();
    for (at, got) in d.to_f32_vec().into_iter().enumerate() {
        if wide[at] == 0.0 {
            assert_eq!(got, 0.0, "{at}");
            continue;
        }
        let moved = |step: f64| {
            let mut moved = wide.clone();
            moved[at] += step;
            distance(&moved, cols)
        };
        let want = (moved(1e-5) - moved(-1e-5)) / 2e-5;
        assert!(
            (f64::from(got) - want).abs() < 1e-4,
            "{at}: {got} for {want}"
        );
    }
}

#[test]
fn an_identity_has_no_direction() {
    let mut gram = Tensor::from_f32(vec![1.0, 0.0, 0.0, 1.0], 2, 2);
    let mut found = Tensor::from_f32(vec![9.0], 1, 1);
    direction(gram.view_mut(), found.view_mut()).unwrap();
    assert_eq!(gram.to_f32_vec(), [0.0; 4]);
    assert_eq!(found.to_f32_vec(), [0.0]);
}

#[test]
fn other_shapes_are_refused() {
    let tensor = |rows, cols| Tensor::zeros(DType::F32, rows, cols);
    let mut distance = tensor(1, 1);
    assert!(direction(tensor(2, 3).view_mut(), distance.view_mut()).is_err());
    assert!(direction(tensor(2, 2).view_mut(), tensor(2, 1).view_mut()).is_err());
}
