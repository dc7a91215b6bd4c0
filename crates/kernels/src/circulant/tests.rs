use super::{Order, add, add_gradient};
use crate::test_support::{Pitched, normal};
use crate::{DType, Tensor, View};

#[test]
fn matrix_and_gradient_are_those_of_their_definitions() {
    for ([rows, cols], b) in [([6, 9], 3), ([4, 8], 4), ([5, 10], 5), ([3, 2], 1)] {
        let kernel = normal(1, rows / b * cols);
        let place = |r: usize, c: usize, t: usize| r / b * cols + c / b * b + t % b;
        for order in [Order::Circulant, Order::Reflected] {
            let mut out = Pitched::normal(2, [rows, cols], DType::F32);
            let before = out.values();
            let view = View::from_f32(&kernel, rows / b, cols);
            add(out.view_mut(), 0.5, view, b, order).unwrap();
            for (at, (got, before)) in out.values().iter().zip(&before).enumerate() {
                let (r, c) = (at / cols, at % cols);
                let moved = if order == Order::Circulant {
                    b - r % b
                } else {
                    r % b
                };
                let want = before + 0.5 * kernel[place(r, c, c % b + moved)];
                assert!((got - want).abs() <= 1e-6, "{got} for {want} at {r}, {c}");
            }
        }
        let d = normal(3, rows * cols);
        let mut want = vec![1.0_f64; kernel.len()];
        for (at, d) in d.iter().enumerate() {
            let (r, c) = (at / cols, at % cols);
            want[place(r, c, c % b + b - r % b)] += 2.0 * f64::from(*d);
        }
        let mut got = Tensor::from_f32(vec![1.0; kernel.len()], rows / b, cols);
        add_gradient(got.view_mut(), 2.0, View::from_f32(&d, rows, cols), b).unwrap();
        for (got, want) in got.to_f32_vec().iter().zip(&want) {
            assert!((f64::from(*got) - want).abs() <= 1e-5, "{got} for {want}");
        }
    }
}

#[test]
fn blocks_that_do_not_divide_the_matrix_are_refused() {
    let [mut out, mut kernel] = [[6, 9], [2, 9]].map(|[r, c]| Tensor::zeros(DType::F32, r, c));
    add(out.view_mut(), 1.0, kernel.view(), 3, Order::Circulant).unwrap();
    for block in [0, 2, 4] {
        let error = add(out.view_mut(), 1.0, kernel.view(), block, Order::Circulant);
        assert!(error.is_err(), "{block}");
    }
    let error = add(kernel.view_mut(), 1.0, out.view(), 1, Order::Circulant);
    assert!(error.is_err(), "a kernel of another shape");
}
