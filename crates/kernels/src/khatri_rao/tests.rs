use super::{Operands, add_scale_gradient, add_second_gradient, product};
use crate::test_support::{Pitched, normal};
use crate::{DType, Tensor, View};

#[test]
fn product_and_gradients_are_those_of_their_definitions() {
    for [of_a, of_g, n] in [[3, 4, 5], [1, 7, 2], [6, 1, 3]] {
        let cols = of_a * of_g;
        let a = Pitched::normal(1, [of_a, n], DType::F32);
        let g = Pitched::normal(2, [of_g, n], DType::F32);
        let (scale, d) = (normal(3, cols), normal(4, n * cols));
        let of = Operands {
            a: a.view(),
            g: g.view(),
            scale: View::from_f32(&scale, 1, cols),
        };
        let (a, g) = (a.values(), g.values());
        let mut out = Tensor::from_f32(vec![f32::NAN; n * cols], n, cols);
        product(out.view_mut(), of).unwrap();
        let (mut d_scale, mut d_g) = (vec![1.0_f64; cols], vec![1.0_f64; of_g * n]);
        for (at, got) in out.to_f32_vec().iter().enumerate() {
            let (j, c) = (at / cols, at % cols);
            let (a, g) = (a[c / of_g * n + j], g[c % of_g * n + j]);
            let want = scale[c] * a * g;
            assert!((got - want).abs() <= 1e-6 * want.abs(), "{got} for {want}");
            d_scale[c] += 2.0 * f64::from(d[at] * a * g);
            d_g[c % of_g * n + j] += 2.0 * f64::from(d[at] * scale[c] * a);
        }
        let d = View::from_f32(&d, n, cols);
        let ones = |rows, cols| Tensor::from_f32(vec![1.0; rows * cols], rows, cols);
        let (mut of_scale, mut of_g) = (ones(1, cols), ones(of_g, n));
        add_scale_gradient(of_scale.view_mut(), 2.0, d, of).unwrap();
        add_second_gradient(of_g.view_mut(), 2.0, d, of).unwrap();
        for (got, want) in [(of_scale, d_scale), (of_g, d_g)] {
            for (got, want) in got.to_f32_vec().iter().zip(&want) {
                assert!((f64::from(*got) - want).abs() <= 1e-5, "{got} for {want}");
            }
        }
    }
}

#[test]
fn other_shapes_are_refused() {
    let tensor = |rows, cols| Tensor::zeros(DType::F32, rows, cols);
    let (a, g, scale, mut out) = (tensor(2, 5), tensor(3, 5), tensor(1, 6), tensor(5, 6));
    let of = Operands {
        a: a.view(),
        g: g.view(),
        scale: scale.view(),
    };
    product(out.view_mut(), of).unwrap();
    let wrong = tensor(3, 4);
    assert!(
        product(
            out.view_mut(),
            Operands {
                g: wrong.view(),
                ..of
            }
        )
        .is_err()
    );
    assert!(
        product(
            out.view_mut(),
            Operands {
                scale: g.view(),
                ..of
            }
        )
        .is_err()
    );
    assert!(product(tensor(6, 5).view_mut(), of).is_err());
    assert!(add_scale_gradient(tensor(1, 5).view_mut(), 1.0, out.view(), of).is_err());
    assert!(add_second_gradient(tensor(5, 3).view_mut(), 1.0, out.view(), of).is_err());
}
