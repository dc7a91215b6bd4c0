use super::{Second, add, add_first_gradient, add_second_gradient};
use crate::test_support::{Pitched, normal};
use crate::{DType, Tensor, View};

fn assert_close(got: &[f32], want: &[f64]) {
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let distance = (f64::from(*got) - want).abs();
        assert!(
            distance <= 1e-5 * want.abs().max(1.0),
            "{got} for {want} at {i}"
        );
    }
}

#[test]
fn product_and_gradients_are_those_of_their_definitions() {
    let cases: [([usize; 2], [usize; 2]); 3] =
        [([12, 20], [4, 5]), ([9, 23], [4, 5]), ([6, 5], [1, 2])];
    for ([rows, cols], [p, q]) in cases {
        let across = cols.div_ceil(q);
        let blocks = [rows.div_ceil(p), across];
        let (a, b) = (normal(1, blocks[0] * across), normal(2, p * q));
        let mut out = Pitched::normal(3, [rows, cols], DType::F32);
        let before = out.values();
        let turned: Vec<f32> = (0..p * q).map(|i| b[i % p * q + i / p]).collect();
        let second = Second {
            matrix: View::from_f32(&turned, q, p),
            transposed: true,
        };
        let first = View::from_f32(&a, blocks[0], across);
        add(out.view_mut(), 0.5, first, second).unwrap();
        let place = |r: usize, c: usize| (r / p * across + c / q, r % p * q + c % q);
        let at = |i: usize| (i / cols, i % cols);
        let mut want: Vec<f64> = before.iter().map(|v| f64::from(*v)).collect();
        let (mut of_a, mut of_b) = (vec![0.0; a.len()], vec![0.0; p * q]);
        for (i, want) in want.iter_mut().enumerate() {
            let (r, c) = at(i);
            let (i_a, i_b) = place(r, c);
            *want += 0.5 * f64::from(a[i_a]) * f64::from(b[i_b]);
            of_a[i_a] += 2.0 * f64::from(before[i]) * f64::from(b[i_b]);
            of_b[i_b] += 3.0 * f64::from(before[i]) * f64::from(a[i_a]);
        }
        assert_close(&out.values(), &want);

        let d = View::from_f32(&before, rows, cols);
        let mut d_a = Tensor::zeros(DType::F32, blocks[0], across);
        add_first_gradient(d_a.view_mut(), 2.0, d, second).unwrap();
        assert_close(&d_a.to_f32_vec(), &of_a);
        let mut d_b = Tensor::zeros(DType::F32, p, q);
        add_second_gradient(d_b.view_mut(), false, 3.0, d, first).unwrap();
        assert_close(&d_b.to_f32_vec(), &of_b);
    }
}

#[test]
fn other_numbers_of_blocks_are_refused() {
    let tensor = |rows, cols| Tensor::zeros(DType::F32, rows, cols);
    let (mut out, b) = (tensor(6, 8), tensor(2, 4));
    let matrix = b.view();
    let second = |transposed| Second { matrix, transposed };
    let (a, bf16) = (tensor(3, 2), tensor(3, 2).to_dtype(DType::Bf16));
    add(out.view_mut(), 1.0, a.view(), second(false)).unwrap();
    assert!(add(out.view_mut(), 1.0, a.view(), second(true)).is_err());
    assert!(add(out.view_mut(), 1.0, bf16.view(), second(false)).is_err());
    assert!(add_first_gradient(tensor(2, 2).view_mut(), 1.0, out.view(), second(false)).is_err());
}
