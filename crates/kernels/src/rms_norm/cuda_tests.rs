use super::{Weight, add_forward, apply, backward, forward};
use crate::test_support::{DTYPES, assert_same_bits};
use crate::twins::assert_cuda_matches;
use crate::{DType, Tensor};

const EPS: f32 = 1e-5;

/// A warp for a row, and a block for a row.
const SHAPES: [[usize; 2]; 5] = [[0, 8], [7, 1], [5, 123], [6, 512], [3, 1096]];
/// More than one span.
const LONG: [usize; 2] = [2, 20_000];

/// With an offset that both twins must add.
fn weight_of(values: &Tensor) -> Weight<'_> {
    Weight {
        values: values.view(),
        offset: 1.0,
    }
}

#[test]
fn forward_matches_the_cpu() {
    for (x_dtype, y_dtype) in DTYPES.into_iter().flat_map(|x| DTYPES.map(|y| (x, y))) {
        for shape in SHAPES.into_iter().chain([LONG]) {
            assert_cuda_matches(&format!("{x_dtype} -> {y_dtype} {shape:?}"), |place| {
                let weight = place.dense(1, [1, shape[1]]);
                let mut rstd = place.dense(2, [shape[0], 1]);
                let x = place.matrix(3, shape, x_dtype);
                let mut y = place.poisoned(shape, y_dtype);
                forward(
                    x.view(),
                    weight_of(&weight),
                    EPS,
                    y.view_mut(),
                    rstd.view_mut(),
                )
                .unwrap();
                let mut repeated = place.poisoned(shape, y_dtype);
                apply(
                    x.view(),
                    weight_of(&weight),
                    rstd.view(),
                    repeated.view_mut(),
                )
                .unwrap();
                assert_same_bits(&repeated.values(), &y.values(), "apply");
                vec![(y_dtype, y.values()), (DType::F32, rstd.to_f32_vec())]
            });
        }
    }
}

#[test]
fn add_forward_matches_the_cpu() {
    for (x_dtype, y_dtype) in DTYPES.into_iter().flat_map(|x| DTYPES.map(|y| (x, y))) {
        for shape in SHAPES.into_iter().chain([LONG]) {
            assert_cuda_matches(&format!("{x_dtype} -> {y_dtype} {shape:?}"), |place| {
                let weight = place.dense(1, [1, shape[1]]);
                let mut rstd = place.dense(2, [shape[0], 1]);
                let mut residual = place.matrix(3, shape, x_dtype);
                let branch = place.matrix(4, shape, y_dtype);
                let mut y = place.poisoned(shape, y_dtype);
                add_forward(
                    residual.view_mut(),
                    branch.view(),
                    weight.view(),
                    EPS,
                    y.view_mut(),
                    rstd.view_mut(),
                )
                .unwrap();
                let mut repeated = place.poisoned(shape, y_dtype);
                apply(
                    residual.view(),
                    weight.view(),
                    rstd.view(),
                    repeated.view_mut(),
                )
                .unwrap();
                assert_same_bits(&repeated.values(), &y.values(), "apply");
                vec![(x_dtype, residual.values()), (y_dtype, y.values())]
            });
        }
    }
}

#[test]
fn backward_matches_the_cpu() {
    for (dy_dtype, x_dtype) in DTYPES.into_iter().flat_map(|g| DTYPES.map(|x| (g, x))) {
        for shape in SHAPES
            .into_iter()
            .chain((dy_dtype == x_dtype).then_some(LONG))
        {
            assert_cuda_matches(&format!("dy {dy_dtype}, x {x_dtype} {shape:?}"), |place| {
                let weight = place.dense(1, [1, shape[1]]);
                let (dy, x) = (
                    place.matrix(2, shape, dy_dtype),
                    place.matrix(3, shape, x_dtype),
                );
                // Any positive numbers of the right size will do.
                let rstd =
                    Tensor::from_f32(vec![0.9; shape[0]], shape[0], 1).to_device(place.device());
                let mut dx = place.matrix(4, shape, x_dtype);
                let mut d_weight = place.dense(5, [1, shape[1]]);
                // Column sums know no span.
                let gradient = (shape != LONG).then(|| d_weight.view_mut());
                backward(
                    dy.view(),
                    x.view(),
                    weight_of(&weight),
                    rstd.view(),
                    dx.view_mut(),
                    gradient,
                )
                .unwrap();
                vec![(x_dtype, dx.values()), (DType::F32, d_weight.to_f32_vec())]
            });
        }
    }
}
