use super::Input;
use crate::dequantise::Int8;
use crate::test_support::{DTYPES, normal};
use crate::twins::assert_cuda_matches;
use crate::{DType, Tensor, View, Workspace};

/// Values of a fraction of a scale, so that no order of operations lies between two bytes, but for two that
/// are outliers and one of a padding row.
fn inputs(rows: usize, cols: usize) -> Vec<f32> {
    let mut values: Vec<f32> = normal(3, rows * cols);
    if cols > 8 && rows > 3 {
        values[cols + 2] = 7.5;
        values[2 * cols + 8] = -60.0;
        values[(rows - 1) * cols + 5] = 9.0;
    }
    values
}

#[test]
fn matches_the_cpu() {
    for (dtype, threshold) in DTYPES.into_iter().flat_map(|d| [(d, 0.0), (d, 6.0)]) {
        for [rows, cols, out] in [[0, 8, 3], [1, 9, 1], [5, 123, 7], [40, 264, 70]] {
            let what = format!("{dtype} {threshold} {rows} {cols} {out}");
            assert_cuda_matches(&what, |place| {
                let mut x = place.poisoned([rows, cols], dtype);
                let values = inputs(rows, cols);
                x.view_mut().copy_from(View::from_f32(&values, rows, cols));
                let weight = normal(5, out * cols);
                let weight = Int8::quantise(View::from_f32(&weight, out, cols));
                let weight = weight.expect("finite").to_device(place.device());
                let documents = place.indices(&[0, rows.saturating_sub(1) as u32]);
                let workspace = Workspace::on(place.device().clone(), rows);
                let input = Input::new(x.view(), dtype, threshold, &documents, cols, &workspace);
                let input = input.expect("one device");
                let mut room = Tensor::empty(place.device(), dtype, out, cols);
                let mut y = place.poisoned([rows, out], dtype);
                input
                    .product(x.view(), &weight, room.view_mut(), y.view_mut(), &workspace)
                    .expect("the shapes agree");
                let (codes, scales) = (input.codes.to_f32_vec(), input.scales.to_f32_vec());
                vec![
                    (dtype, y.values()),
                    (DType::F32, codes),
                    (DType::F32, scales),
                ]
            });
        }
    }
}
