use super::{Operands, add_scale_gradient, add_second_gradient, product};
use crate::DType;
use crate::twins::assert_cuda_matches;

#[test]
fn matches_the_cpu() {
    for [of_a, of_g, n] in [[1, 1, 1], [3, 5, 7], [4, 33, 70], [32, 9, 260]] {
        assert_cuda_matches(&format!("{of_a} {of_g} {n}"), |place| {
            let (a, g) = (
                place.matrix(1, [of_a, n], DType::F32),
                place.matrix(2, [of_g, n], DType::F32),
            );
            let scale = place.dense(3, [1, of_a * of_g]);
            let of = Operands {
                a: a.view(),
                g: g.view(),
                scale: scale.view(),
            };
            let mut out = place.poisoned([n, of_a * of_g], DType::F32);
            product(out.view_mut(), of).unwrap();
            let d = place.matrix(4, [n, of_a * of_g], DType::F32);
            let mut d_scale = place.dense(5, [1, of_a * of_g]);
            add_scale_gradient(d_scale.view_mut(), 0.5, d.view(), of).unwrap();
            let mut d_g = place.matrix(6, [of_g, n], DType::F32);
            add_second_gradient(d_g.view_mut(), -2.0, d.view(), of).unwrap();
            vec![
                (DType::F32, out.values()),
                (DType::F32, d_scale.to_f32_vec()),
                (DType::F32, d_g.values()),
            ]
        });
    }
}
