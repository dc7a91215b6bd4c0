use super::{Key, add_masked, forward};
use crate::test_support::{DTYPES, assert_same_bits, cuda_device, stream};
use crate::twins::assert_cuda_matches;
use crate::{DType, Device, Indices, Tensor};

const ROWS: usize = 5;
const KEY: Key = Key {
    seed: 0x0123_4567_89ab_cdef,
    p: 0.3,
};

/// Sequence and position of `count` tokens, and a step.
fn tokens(count: usize) -> Vec<u32> {
    let mut stream = stream(9);
    (0..=2 * count).map(|_| stream.bits() as u32).collect()
}

#[test]
fn matches_the_cpu() {
    let tokens = tokens(ROWS);
    for (x_dtype, y_dtype) in DTYPES.into_iter().flat_map(|x| DTYPES.map(|y| (x, y))) {
        for (cols, p) in [(1, 0.3), (64, 0.0), (72, 1.0), (123, 0.3), (2120, 0.1)] {
            let (shape, key) = ([ROWS, cols], Key { p, ..KEY });
            let what = format!("{x_dtype} -> {y_dtype}, {cols} columns, p = {p}");
            assert_cuda_matches(&what, |place| {
                let (x, rows) = (place.matrix(1, shape, x_dtype), place.indices(&tokens));
                let mut out = place.poisoned(shape, y_dtype);
                forward(x.view(), key, &rows, out.view_mut()).unwrap();
                let mut sum = place.matrix(2, shape, y_dtype);
                add_masked(sum.view_mut(), x.view(), key, &rows).unwrap();
                vec![(y_dtype, out.values()), (y_dtype, sum.values())]
            });
        }
    }
}

#[test]
fn has_the_mask_of_the_cpu_bit_for_bit() {
    let device = Device::Cuda(cuda_device());
    let tokens = tokens(40);
    for (dtype, cols) in [(DType::F32, 123), (DType::F32, 264), (DType::Bf16, 264)] {
        let ones = Tensor::from_f32(vec![1.0; 40 * cols], 40, cols).to_dtype(dtype);
        let on = |device: &Device| {
            let (ones, rows) = (ones.to_device(device), Indices::new(&tokens[..], device));
            let mut out = Tensor::empty(device, dtype, 40, cols);
            forward(ones.view(), KEY, &rows, out.view_mut()).unwrap();
            out.to_f32_vec()
        };
        assert_same_bits(
            &on(&device),
            &on(&Device::Cpu),
            &format!("{dtype}, {cols} columns"),
        );
    }
}
