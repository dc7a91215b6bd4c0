use super::{add, scale};
use crate::test_support::{DTYPES, Pitched};
use crate::{DType, Error, Tensor};
use half::bf16;

/// The exact value in f32, stored as `dtype`.
fn rounded(dtype: DType, value: f64) -> f32 {
    match dtype {
        DType::F32 => value as f32,
        DType::Bf16 => bf16::from_f32(value as f32).to_f32(),
    }
}

#[test]
fn sums_are_exact_but_for_their_rounding() {
    for (y_dtype, x_dtype) in DTYPES.into_iter().flat_map(|y| DTYPES.map(|x| (y, x))) {
        for cols in [1, 7, 123, 4097] {
            let shape = [3, cols];
            let (x, mut y) = (
                Pitched::normal(1, shape, x_dtype),
                Pitched::normal(2, shape, y_dtype),
            );
            let before = y.values();
            add(0.5, y.view_mut(), 2.0, x.view()).unwrap();
            for ((got, old), x) in y.values().iter().zip(&before).zip(x.values()) {
                let want = rounded(y_dtype, 0.5 * f64::from(*old) + 2.0 * f64::from(x));
                assert_eq!(*got, want, "{y_dtype} {x_dtype}");
            }
            let before = y.values();
            scale(0.3, y.view_mut()).unwrap();
            for (got, old) in y.values().iter().zip(before) {
                let want = rounded(y_dtype, f64::from(0.3_f32) * f64::from(old));
                assert_eq!(*got, want, "{y_dtype}");
            }
        }
    }
}

#[test]
fn what_is_not_read_may_be_anything() {
    let x = Pitched::normal(1, [2, 5], DType::F32);
    let mut y = Tensor::zeros(DType::F32, 2, 5);
    y.view_mut().fill(f32::NAN);
    add(0.0, y.view_mut(), 1.0, x.view()).unwrap();
    assert_eq!(y.to_f32_vec(), x.values());
}

#[test]
fn other_shapes_are_refused() {
    let mut y = Tensor::zeros(DType::F32, 2, 5);
    let x = Tensor::zeros(DType::F32, 2, 4);
    let refused = add(1.0, y.view_mut(), 1.0, x.view());
    assert!(matches!(refused, Err(Error::Shape { .. })));
    let mut empty = Tensor::zeros(DType::F32, 0, 4);
    add(
        1.0,
        empty.view_mut(),
        1.0,
        Tensor::zeros(DType::F32, 0, 4).view(),
    )
    .unwrap();
}
