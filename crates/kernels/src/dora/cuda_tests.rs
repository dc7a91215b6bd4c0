use super::{Operands, backward, forward, row_norms};
use crate::DType;
use crate::test_support::DTYPES;
use crate::twins::assert_cuda_matches;

#[test]
fn norms_match_the_cpu() {
    for dtype in DTYPES {
        for [out, inputs, rank] in [[1, 1, 1], [7, 72, 3], [33, 1030, 16]] {
            assert_cuda_matches(&format!("{dtype} {out} {inputs} {rank}"), |place| {
                let weight = place.matrix(1, [out, inputs], dtype);
                let b = place.dense(2, [out, rank]);
                let (cross, spread) = (place.dense(3, [rank, out]), place.dense(4, [rank, out]));
                let mut norms = place.dense(5, [1, out]);
                let of = Operands {
                    weight: weight.view(),
                    b: b.view(),
                    cross: cross.view(),
                    spread: spread.view(),
                    scale: 0.01,
                };
                row_norms(&of, norms.view_mut()).unwrap();
                vec![(DType::F32, norms.to_f32_vec())]
            });
        }
    }
}

#[test]
fn scaling_and_its_gradient_match_the_cpu() {
    for dtype in DTYPES {
        for shape in [[0, 8], [1, 1], [5, 123], [77, 264]] {
            assert_cuda_matches(&format!("{dtype} {shape:?}"), |place| {
                let (dy, u) = (place.matrix(1, shape, dtype), place.matrix(2, shape, dtype));
                // Norms around 1, none near 0.
                let values = (0..shape[1]).map(|c| 1.0 + (c % 7) as f32 / 8.0).collect();
                let norms = crate::Tensor::from_f32(values, 1, shape[1]).to_device(place.device());
                let magnitude = place.dense(5, [1, shape[1]]);
                let mut d_magnitude = place.dense(3, [1, shape[1]]);
                let mut du = place.poisoned(shape, dtype);
                backward(
                    dy.view(),
                    u.view(),
                    magnitude.view(),
                    norms.view(),
                    d_magnitude.view_mut(),
                    du.view_mut(),
                )
                .unwrap();
                let (mut y, mut kept) =
                    (place.matrix(4, shape, dtype), place.poisoned(shape, dtype));
                forward(
                    y.view_mut(),
                    kept.view_mut(),
                    magnitude.view(),
                    norms.view(),
                )
                .unwrap();
                vec![
                    (dtype, y.values()),
                    (dtype, kept.values()),
                    (dtype, du.values()),
                    (DType::F32, d_magnitude.to_f32_vec()),
                ]
            });
        }
    }
}
