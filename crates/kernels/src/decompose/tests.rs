use super::{Matrix, Svd};
use crate::rng::Stream;
use crate::test_support::stream;

fn random(rows: usize, cols: usize) -> Matrix {
    let mut stream = stream((rows * 1000 + cols) as u64);
    let values = (0..rows * cols).map(|_| stream.normal()).collect();
    Matrix::new(rows, cols, values).expect("as many values")
}

/// A matrix whose singular values are 1, `ratio`, `ratio`^2 and so on.
fn falling(rows: usize, cols: usize, ratio: f64) -> Matrix {
    let k = rows.min(cols);
    let orthonormal = |n: usize| {
        let [q, _] = random(n, k).qr().expect("finite");
        q
    };
    let factors: Vec<f64> = (0..k as i32).map(|i| ratio.powi(i)).collect();
    let left = orthonormal(rows).columns_scaled(&factors);
    left.times_transposed(&orthonormal(cols)).expect("fits")
}

fn furthest(a: &Matrix, b: &Matrix) -> f64 {
    assert_eq!(a.shape(), b.shape());
    let pairs = a.values().iter().zip(b.values());
    pairs.fold(0.0, |m, (a, b)| m.max((a - b).abs()))
}

fn identity(n: usize) -> Matrix {
    let values = (0..n * n).map(|i| f64::from(u8::from(i % (n + 1) == 0)));
    Matrix::new(n, n, values.collect()).expect("as many values")
}

fn product(svd: &Svd) -> Matrix {
    let left = svd.u.clone().columns_scaled(&svd.s);
    left.times(&svd.vt).expect("fits")
}

#[test]
fn singular_values_and_vectors_make_the_matrix_again() {
    for [rows, cols] in [[1, 1], [1, 7], [7, 1], [40, 23], [23, 40], [150, 150]] {
        let a = random(rows, cols);
        let svd = a.svd().expect("finite");
        assert!(furthest(&product(&svd), &a) < 1e-12, "{rows} x {cols}");
        assert!(svd.s.is_sorted_by(|x, y| x >= y) && svd.s.iter().all(|s| *s >= 0.0));
        let gram = svd.u.transposed_times(&svd.u).expect("fits");
        assert!(furthest(&gram, &identity(rows.min(cols))) < 1e-12);
        let gram = svd.vt.times_transposed(&svd.vt).expect("fits");
        assert!(furthest(&gram, &identity(rows.min(cols))) < 1e-12);
    }
    let known = falling(30, 20, 0.5).svd().expect("finite");
    for (i, s) in known.s.iter().enumerate() {
        assert!((s - 0.5_f64.powi(i as i32)).abs() < 1e-14, "{i}: {s}");
    }
}

#[test]
fn q_is_orthonormal_and_r_triangular_with_the_signs_of_lapack() {
    for [rows, cols] in [[9, 9], [20, 7], [7, 20]] {
        let a = random(rows, cols);
        let [q, r] = a.qr().expect("finite");
        assert!(furthest(&q.times(&r).expect("fits"), &a) < 1e-13);
        let gram = q.transposed_times(&q).expect("fits");
        assert!(furthest(&gram, &identity(rows.min(cols))) < 1e-13);
        for i in 0..rows.min(cols) {
            let row = &r.values()[i * cols..(i + 1) * cols];
            assert!(row[..i.min(cols)].iter().all(|v| v.abs() < 1e-13));
        }
        // A reflection turns the first column onto the axis on the other side of where it points.
        assert!(r.values()[0] * a.values()[0] < 0.0);
    }
}

#[test]
fn the_leading_values_are_found_where_values_fall_off() {
    for [rows, cols] in [[60, 30], [30, 60]] {
        let a = falling(rows, cols, 0.5);
        let exact = a.svd().expect("finite").range(0..5);
        let found = a.svd_low_rank(5, 8, Stream::new(1)).expect("finite");
        assert_eq!((found.u.shape(), found.vt.shape()), ([rows, 5], [5, cols]));
        // (1/2)^(2 * 8 + 1) times the first value left out, and what the start has of it.
        assert!(furthest(&product(&found), &product(&exact)) < 1e-5);
        let again = a.svd_low_rank(5, 8, Stream::new(1)).expect("finite");
        assert_eq!(found.u, again.u);
        let without = a.svd_low_rank(5, 0, Stream::new(1)).expect("finite");
        assert!(furthest(&product(&without), &product(&exact)) > 1e-4);
    }
    let all = random(4, 9);
    let found = all.svd_low_rank(100, 2, Stream::new(1)).expect("finite");
    assert!(found.s.len() == 4 && furthest(&product(&found), &all) < 1e-12);
}

#[test]
fn an_inverse_undoes_its_matrix() {
    let a = random(31, 31);
    let product = a.times(&a.inverse().expect("regular")).expect("fits");
    assert!(furthest(&product, &identity(31)) < 1e-10);
    assert!(random(3, 4).inverse().is_err());
}

#[test]
fn what_is_not_finite_has_no_decomposition() {
    for value in [f64::NAN, f64::INFINITY] {
        let a = Matrix::new(2, 2, vec![1.0, value, 0.0, 1.0]).expect("as many values");
        assert!(a.svd().is_err() && a.qr().is_err() && a.inverse().is_err());
        assert!(a.svd_low_rank(1, 1, Stream::new(0)).is_err());
    }
    assert!(random(2, 3).times(&random(2, 3)).is_err());
    assert!(Matrix::new(2, 2, vec![1.0]).is_err());
}
