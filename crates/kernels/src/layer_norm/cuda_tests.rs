use super::{Affine, Gradients, add_forward, apply, backward, forward};
use crate::test_support::{DTYPES, assert_same_bits};
use crate::twins::assert_cuda_matches;
use crate::{DType, Tensor};

const EPS: f32 = 1e-5;

/// A warp for a row, and a block for a row.
const SHAPES: [[usize; 2]; 4] = [[0, 8], [5, 123], [6, 512], [3, 1096]];
/// More than one span.
const LONG: [usize; 2] = [2, 20_000];

#[test]
fn forward_matches_the_cpu() {
    for (a, b) in DTYPES.into_iter().flat_map(|a| DTYPES.map(|b| (a, b))) {
        for shape in SHAPES.into_iter().chain([LONG]) {
            assert_cuda_matches(&format!("x {a}, y {b}, {shape:?}"), |place| {
                let parameters = [1, 2].map(|seed| place.dense(seed, [1, shape[1]]));
                let affine = Affine {
                    weight: parameters[0].view(),
                    bias: parameters[1].view(),
                    eps: EPS,
                };
                let (mut x, branch) = (place.matrix(3, shape, a), place.matrix(4, shape, b));
                let mut y = place.poisoned(shape, b);
                let mut statistics = place.dense(5, [shape[0], 2]);
                forward(x.view(), affine, y.view_mut(), statistics.view_mut()).unwrap();
                let forward_y = y.values();
                let target = statistics.view_mut();
                add_forward(x.view_mut(), branch.view(), affine, y.view_mut(), target).unwrap();
                let mut repeated = place.poisoned(shape, b);
                apply(x.view(), affine, statistics.view(), repeated.view_mut()).unwrap();
                assert_same_bits(&repeated.values(), &y.values(), "apply");
                vec![(b, forward_y), (a, x.values()), (b, y.values())]
            });
        }
    }
}

#[test]
fn backward_matches_the_cpu() {
    for (a, b) in DTYPES.into_iter().flat_map(|a| DTYPES.map(|b| (a, b))) {
        for shape in SHAPES.into_iter().chain((a == b).then_some(LONG)) {
            assert_cuda_matches(&format!("dy {a}, x {b}, {shape:?}"), |place| {
                let (dy, x) = (place.matrix(1, shape, a), place.matrix(2, shape, b));
                let weight = place.dense(3, [1, shape[1]]);
                // Any mean and deviation near those of the data will do.
                let statistics = [0.1, 0.9].repeat(shape[0]);
                let statistics =
                    Tensor::from_f32(statistics, shape[0], 2).to_device(place.device());
                let mut dx = place.matrix(4, shape, b);
                let mut trained = [5, 6].map(|seed| place.dense(seed, [1, shape[1]]));
                let [d_weight, d_bias] = &mut trained;
                let gradients = Gradients {
                    weight: Some(d_weight.view_mut()),
                    bias: Some(d_bias.view_mut()),
                };
                let (weight, statistics) = (weight.view(), statistics.view());
                backward(
                    dy.view(),
                    x.view(),
                    weight,
                    statistics,
                    dx.view_mut(),
                    match shape {
                        // Column sums know no span.
                        LONG => Gradients::default(),
                        _ => gradients,
                    },
                )
                .unwrap();
                let [d_weight, d_bias] = trained.map(|t| (DType::F32, t.to_f32_vec()));
                vec![(b, dx.values()), d_weight, d_bias]
            });
        }
    }
}
