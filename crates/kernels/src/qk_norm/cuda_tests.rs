use super::{Norm, backward_in_place, forward};
use crate::test_support::DTYPES;
use crate::twins::{Place, assert_cuda_matches};
use crate::{DType, Workspace};

/// Rows, heads, head_dim, rotary_dim: whole, partial and no rotation; odd halves and whole groups;
/// teams of one lane, of a part of a warp and of all of it, with more than one round.
const SHAPES: [[usize; 4]; 8] = [
    [0, 2, 8, 8],
    [1, 1, 2, 2],
    [5, 3, 6, 6],
    [7, 1, 41, 26],
    [3, 5, 80, 32],
    [9, 33, 128, 128],
    [4, 2, 256, 64],
    [2, 2, 257, 0],
];

#[test]
fn matches_the_cpu() {
    for shape in SHAPES {
        for (x, y) in DTYPES.into_iter().flat_map(|x| DTYPES.map(|y| (x, y))) {
            let what = format!("{shape:?}, x {x}, out {y}");
            assert_cuda_matches(&what, |place| both_directions(place, shape, x, y));
        }
    }
}

fn both_directions(
    place: &Place,
    [rows, heads, head_dim, rotary]: [usize; 4],
    x_dtype: DType,
    y_dtype: DType,
) -> Vec<(DType, Vec<f32>)> {
    let matrix = [rows, heads * head_dim];
    let x = place.matrix(1, matrix, x_dtype);
    let [cos, sin] = [11, 12].map(|seed| place.dense(seed, [rows, rotary / 2]));
    let weight = place.dense(13, [1, head_dim]);
    let norm = Norm {
        weight: weight.view(),
        offset: 1.0,
        eps: 1e-5,
        cos: cos.view(),
        sin: sin.view(),
    };
    let mut out = place.poisoned(matrix, y_dtype);
    forward(x.view(), &norm, out.view_mut()).unwrap();
    let mut d = place.matrix(2, matrix, y_dtype);
    let mut d_weight = place.dense(3, [1, head_dim]);
    let workspace = Workspace::on(place.device().clone(), 0);
    let to = Some(d_weight.view_mut());
    backward_in_place(d.view_mut(), x.view(), &norm, to, &workspace).unwrap();
    vec![
        (y_dtype, out.values()),
        (y_dtype, d.values()),
        (DType::F32, d_weight.to_f32_vec()),
    ]
}
