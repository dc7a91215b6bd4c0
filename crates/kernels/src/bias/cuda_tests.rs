use super::{add_scaled, backward_scaled};
use crate::DType;
use crate::test_support::DTYPES;
use crate::twins::assert_cuda_matches;

#[test]
fn matches_the_cpu() {
    for dtype in DTYPES {
        for shape in [[0, 8], [1, 1], [5, 123], [77, 264], [130, 64]] {
            assert_cuda_matches(&format!("{dtype} {shape:?}"), |place| {
                let mut y = place.matrix(1, shape, dtype);
                let mut d_bias = place.dense(2, [1, shape[1]]);
                backward_scaled(y.view(), 0.75, d_bias.view_mut()).unwrap();
                add_scaled(y.view_mut(), -1.5, place.dense(3, [1, shape[1]]).view()).unwrap();
                vec![(dtype, y.values()), (DType::F32, d_bias.to_f32_vec())]
            });
        }
    }
}
