use super::{add_gradient, forward};
use crate::test_support::normal;
use crate::{DType, Tensor, View};

fn made(vectors: &[f32], [n, rank]: [usize; 2], orthogonal: bool) -> Vec<f64> {
    let mut out = Tensor::zeros(DType::F32, rank, n);
    let vectors = View::from_f32(vectors, n, rank);
    forward(out.view_mut(), vectors, orthogonal).unwrap();
    out.to_f32_vec().into_iter().map(f64::from).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[test]
fn directions_have_length_1_and_are_orthogonal_where_asked() {
    let shape @ [n, rank] = [9, 4];
    let vectors = normal(1, n * rank);
    let column = |i: usize| -> Vec<f64> {
        let of = vectors.iter().skip(i).step_by(rank);
        of.map(|v| f64::from(*v)).collect()
    };
    let alone = made(&vectors, shape, false);
    for (i, q) in alone.chunks(n).enumerate() {
        let norm = dot(&column(i), &column(i)).sqrt();
        for (q, v) in q.iter().zip(column(i)) {
            assert!((q - v / norm).abs() < 1e-6);
        }
    }
    let all = made(&vectors, shape, true);
    let rows: Vec<&[f64]> = all.chunks(n).collect();
    for i in 0..rank {
        for j in 0..rank {
            let want = f64::from(u8::from(i == j));
            assert!((dot(rows[i], rows[j]) - want).abs() < 1e-6, "{i} {j}");
        }
        // Each stands on the side of its column, whose rest the ones before it make.
        let column = column(i);
        assert!(dot(rows[i], &column) > 0.0);
        let mut rest = column.clone();
        for q in &rows[..=i] {
            let part = dot(q, &column);
            rest.iter_mut().zip(*q).for_each(|(r, q)| *r -= part * q);
        }
        assert!(dot(&rest, &rest).sqrt() < 1e-5);
    }
}

/// Central differences; directions are rounded to f32.
#[test]
fn the_gradient_is_the_slope_of_the_directions() {
    for (shape @ [n, rank], orthogonal) in [([7, 3], false), ([7, 3], true), ([4, 4], true)] {
        let (vectors, d) = (normal(1, n * rank), normal(2, n * rank));
        let value = |at: usize, step: f32| {
            let mut moved = vectors.clone();
            moved[at] += step;
            let d = d.iter().map(|d| f64::from(*d));
            let made = made(&moved, shape, orthogonal).into_iter();
            (
                made.zip(d).map(|(q, d)| q * d).sum::<f64>(),
                f64::from(moved[at]),
            )
        };
        let mut got = Tensor::from_f32(vec![1.0; n * rank], n, rank);
        let (of, d) = (
            View::from_f32(&vectors, n, rank),
            View::from_f32(&d, rank, n),
        );
        add_gradient(got.view_mut(), d, of, orthogonal).unwrap();
        for (at, got) in got.to_f32_vec().into_iter().enumerate() {
            let ([above, to], [below, from]) = (value(at, 2e-3).into(), value(at, -2e-3).into());
            let want = 1.0 + (above - below) / (to - from);
            let error = (f64::from(got) - want).abs();
            assert!(
                error < 2e-3 * want.abs().max(1.0),
                "{orthogonal} {at}: {got} for {want}"
            );
        }
    }
}

#[test]
fn other_shapes_are_refused() {
    let tensor = |rows, cols| Tensor::zeros(DType::F32, rows, cols);
    let vectors = Tensor::from_f32(vec![1.0; 6], 3, 2);
    forward(tensor(2, 3).view_mut(), vectors.view(), false).unwrap();
    assert!(forward(tensor(3, 2).view_mut(), vectors.view(), false).is_err());
    let d = tensor(2, 3);
    assert!(add_gradient(tensor(2, 3).view_mut(), d.view(), vectors.view(), false).is_err());
    assert!(
        add_gradient(
            tensor(3, 2).view_mut(),
            vectors.view(),
            vectors.view(),
            false
        )
        .is_err()
    );
}
