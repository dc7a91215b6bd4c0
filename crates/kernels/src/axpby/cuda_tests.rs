use super::{add, scale};
use crate::test_support::DTYPES;
use crate::twins::assert_cuda_matches;

#[test]
fn matches_the_cpu() {
    for (y_dtype, x_dtype) in DTYPES.into_iter().flat_map(|y| DTYPES.map(|x| (y, x))) {
        for shape in [[0, 8], [1, 1], [5, 123], [77, 264]] {
            assert_cuda_matches(&format!("{y_dtype} {x_dtype} {shape:?}"), |place| {
                let x = place.matrix(1, shape, x_dtype);
                let mut y = place.matrix(2, shape, y_dtype);
                add(0.7, y.view_mut(), -1.3, x.view()).unwrap();
                let mut written = place.poisoned(shape, y_dtype);
                add(0.0, written.view_mut(), 2.5, x.view()).unwrap();
                let mut scaled = place.matrix(3, shape, y_dtype);
                scale(-0.3, scaled.view_mut()).unwrap();
                [y, written, scaled].map(|m| (y_dtype, m.values())).into()
            });
        }
    }
}
