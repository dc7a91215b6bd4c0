use super::{Angles, Axis, Pairs, Per, add_gradients, coefficients, rotate};
use crate::DType;
use crate::twins::assert_cuda_matches;

#[test]
fn matches_the_cpu() {
    for per in [Per::Pair, Per::Column, Per::Coefficient] {
        for (axis, [groups, group, others]) in [
            (Axis::Columns, [1, 2, 1]),
            (Axis::Columns, [3, 6, 7]),
            (Axis::Columns, [5, 64, 123]),
            (Axis::Rows, [3, 6, 7]),
            (Axis::Rows, [2, 10, 1100]),
        ] {
            for dtype in [DType::F32, DType::Bf16] {
                let (n, pairs) = (groups * group, Pairs { group, per });
                let shape = match axis {
                    Axis::Columns => [others, n],
                    Axis::Rows => [n, others],
                };
                assert_cuda_matches(&format!("{per:?} {axis:?} {shape:?}"), |place| {
                    let count = pairs.angles(n);
                    let [theta, alpha] = [1, 2].map(|seed| place.dense(seed, [1, count]));
                    let angles = Angles {
                        theta: theta.view(),
                        alpha: alpha.view(),
                    };
                    let mut made = place.dense(3, [2, n]);
                    coefficients(made.view_mut(), angles, pairs).unwrap();
                    let mut y = place.matrix(4, shape, dtype);
                    rotate(y.view_mut(), made.view(), pairs, axis, false).unwrap();
                    let mut back = place.matrix(5, shape, dtype);
                    rotate(back.view_mut(), made.view(), pairs, axis, true).unwrap();
                    let (d, x) = (place.matrix(6, shape, dtype), place.matrix(7, shape, dtype));
                    let [mut d_theta, mut d_alpha] =
                        [8, 9].map(|seed| place.dense(seed, [1, count]));
                    let to = [d_theta.view_mut(), d_alpha.view_mut()];
                    add_gradients(to, d.view(), x.view(), angles, pairs, axis).unwrap();
                    vec![
                        (DType::F32, made.to_f32_vec()),
                        (dtype, y.values()),
                        (dtype, back.values()),
                        (DType::F32, d_theta.to_f32_vec()),
                        (DType::F32, d_alpha.to_f32_vec()),
                    ]
                });
            }
        }
    }
}
