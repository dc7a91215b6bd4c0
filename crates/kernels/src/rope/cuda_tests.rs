use super::Direction::{Backward, Forward};
use super::apply;
use crate::test_support::DTYPES;
use crate::twins::assert_cuda_matches;

/// Rows, heads, head_dim, rotary_dim: whole and partial rotation, odd halves and whole groups.
const SHAPES: [[usize; 4]; 6] = [
    [0, 2, 8, 8],
    [5, 3, 6, 6],
    [7, 1, 41, 26],
    [3, 5, 80, 32],
    [2, 2, 257, 256],
    [9, 33, 128, 128],
];

#[test]
fn matches_the_cpu() {
    for (dtype, shape) in DTYPES.into_iter().flat_map(|d| SHAPES.map(|s| (d, s))) {
        let [rows, heads, head_dim, rotary] = shape;
        for direction in [Forward, Backward] {
            assert_cuda_matches(&format!("{dtype} {shape:?} {direction:?}"), |place| {
                let mut x = place.matrix(1, [rows, heads * head_dim], dtype);
                let angles = [11, 12].map(|seed| place.dense(seed, [rows, rotary / 2]));
                let [cos, sin] = &angles;
                apply(
                    x.view_mut(),
                    head_dim,
                    cos.view(),
                    sin.view(),
                    rotary,
                    direction,
                )
                .unwrap();
                vec![(dtype, x.values())]
            });
        }
    }
}
