use super::{add, add_column_sums, add_row_sums, scale};
use crate::DType;
use crate::test_support::DTYPES;
use crate::twins::assert_cuda_matches;

/// Operands of a product of this shape: whole, a row, a column, one element.
fn operands([rows, cols]: [usize; 2]) -> [[usize; 2]; 4] {
    [[rows, cols], [1, cols], [rows, 1], [1, 1]]
}

#[test]
fn products_match_the_cpu() {
    for (a_dtype, b_dtype) in DTYPES.into_iter().flat_map(|a| DTYPES.map(|b| (a, b))) {
        for shape in [[1, 1], [5, 123], [77, 264]] {
            for (a, b) in operands(shape)
                .map(|b| (shape, b))
                .into_iter()
                .chain([([1, shape[1]], [shape[0], 1])])
            {
                assert_cuda_matches(&format!("{a_dtype} {b_dtype} {shape:?} {b:?}"), |place| {
                    let (a, b) = (place.matrix(1, a, a_dtype), place.matrix(2, b, b_dtype));
                    let mut out = place.matrix(3, shape, a_dtype);
                    add(out.view_mut(), 0.5, -1.5, a.view(), b.view()).unwrap();
                    let mut written = place.poisoned(shape, DType::F32);
                    add(written.view_mut(), 0.0, 2.0, a.view(), b.view()).unwrap();
                    let mut scaled = place.matrix(4, shape, a_dtype);
                    scale(scaled.view_mut(), 1.0, b.view()).unwrap();
                    vec![
                        (a_dtype, out.values()),
                        (DType::F32, written.values()),
                        (a_dtype, scaled.values()),
                    ]
                });
            }
        }
    }
}

#[test]
fn sums_match_the_cpu() {
    for (a_dtype, b_dtype) in DTYPES.into_iter().flat_map(|a| DTYPES.map(|b| (a, b))) {
        for shape in [[1, 1], [5, 123], [77, 264], [3, 5000], [2000, 3]] {
            for b in operands(shape) {
                assert_cuda_matches(&format!("{a_dtype} {b_dtype} {shape:?} {b:?}"), |place| {
                    let (a, b) = (place.matrix(1, shape, a_dtype), place.matrix(2, b, b_dtype));
                    let mut rows = place.dense(3, [shape[0], 1]);
                    add_row_sums(rows.view_mut(), 0.5, a.view(), b.view()).unwrap();
                    let mut columns = place.dense(4, [1, shape[1]]);
                    add_column_sums(columns.view_mut(), -2.0, b.view(), a.view()).unwrap();
                    [rows, columns]
                        .map(|sums| (DType::F32, sums.to_f32_vec()))
                        .into()
                });
            }
        }
    }
}
