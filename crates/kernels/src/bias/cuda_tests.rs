use super::{add, backward};
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
                backward(y.view(), d_bias.view_mut()).unwrap();
                add(y.view_mut(), place.dense(3, [1, shape[1]]).view()).unwrap();
                vec![(dtype, y.values()), (DType::F32, d_bias.to_f32_vec())]
            });
        }
    }
}
