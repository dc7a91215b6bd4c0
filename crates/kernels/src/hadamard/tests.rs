use super::{add, add_column_sums, add_row_sums, scale};
use crate::test_support::Pitched;
use crate::{DType, Error, Tensor};

/// The element of `values [rows, cols]` that stands at `[r, c]` of a larger matrix.
fn at(values: &[f32], [rows, cols]: [usize; 2], r: usize, c: usize) -> f64 {
    let of = |has: usize, i: usize| if has == 1 { 0 } else { i };
    f64::from(values[of(rows, r) * cols + of(cols, c)])
}

fn assert_close(got: &[f32], want: impl Fn(usize, usize) -> f64, cols: usize) {
    for (i, got) in got.iter().enumerate() {
        let want = want(i / cols, i % cols);
        let distance = (f64::from(*got) - want).abs();
        assert!(
            distance <= 1e-5 * want.abs().max(1.0),
            "{got} for {want} at {i}"
        );
    }
}

#[test]
fn operands_of_one_row_or_column_stand_for_all() {
    let shape @ [rows, cols] = [7, 1030];
    for a_shape in [shape, [1, cols], [rows, 1], [1, 1]] {
        let a = Pitched::normal(1, a_shape, DType::F32);
        let b = Pitched::normal(2, shape, DType::F32);
        let (a_values, b_values) = (a.values(), b.values());
        let product = |r, c| at(&a_values, a_shape, r, c) * at(&b_values, shape, r, c);

        let mut out = Pitched::normal(3, shape, DType::F32);
        let before = out.values();
        add(out.view_mut(), 0.5, 2.0, a.view(), b.view()).unwrap();
        let want = |r, c| 0.5 * at(&before, shape, r, c) + 2.0 * product(r, c);
        assert_close(&out.values(), want, cols);

        scale(out.view_mut(), 1.0, a.view()).unwrap();
        let want = |r, c| want(r, c) * (1.0 + at(&a_values, a_shape, r, c));
        assert_close(&out.values(), want, cols);

        let mut sums = Tensor::from_f32(vec![1.0; rows], rows, 1);
        add_row_sums(sums.view_mut(), -1.0, a.view(), b.view()).unwrap();
        let want = |r, _| 1.0 - (0..cols).map(|c| product(r, c)).sum::<f64>();
        assert_close(&sums.to_f32_vec(), want, 1);

        let mut sums = Tensor::from_f32(vec![1.0; cols], 1, cols);
        add_column_sums(sums.view_mut(), 3.0, b.view(), a.view()).unwrap();
        let want = |_, c| 1.0 + 3.0 * (0..rows).map(|r| product(r, c)).sum::<f64>();
        assert_close(&sums.to_f32_vec(), want, cols);
    }
}

#[test]
fn other_shapes_are_refused() {
    let tensor = |rows, cols| Tensor::zeros(DType::F32, rows, cols);
    let mut out = tensor(3, 4);
    for (rows, cols) in [(2, 4), (3, 2), (4, 3)] {
        let (b, a) = (tensor(rows, cols), tensor(3, 4));
        let refused = add(out.view_mut(), 0.0, 1.0, a.view(), b.view());
        assert!(matches!(refused, Err(Error::Shape { .. })), "{rows} {cols}");
        assert!(scale(out.view_mut(), 0.0, b.view()).is_err());
        assert!(add_row_sums(tensor(3, 1).view_mut(), 1.0, a.view(), b.view()).is_err());
    }
    assert!(add_column_sums(tensor(1, 3).view_mut(), 1.0, out.view(), out.view()).is_err());
}

#[test]
fn what_is_not_read_may_be_anything() {
    let a = Tensor::from_f32(vec![2.0; 6], 2, 3);
    let mut out = Tensor::from_f32(vec![f32::NAN; 6], 2, 3);
    add(out.view_mut(), 0.0, 0.5, a.view(), a.view()).unwrap();
    assert_eq!(out.to_f32_vec(), [2.0; 6]);
}
