//! Formats whose elements are read one by one: 8-bit floats, groups, blocks of GGUF.

use super::{Float8, Ggml, GgmlType, Grouped, Quantised};
use crate::test_support::{DTYPES, Pitched, assert_same_bits, normal};
use crate::twins::{Place, assert_cuda_matches};
use crate::{DType, Tensor, View};
use candle_core::quantized::{GgmlDType, QTensor};

fn values(codes: &Quantised) -> Vec<f32> {
    let [rows, cols] = codes.shape();
    let mut out = Tensor::from_f32(vec![f32::NAN; rows * cols], rows, cols);
    codes.dequantise(out.view_mut()).expect("the shapes agree");
    out.to_f32_vec()
}

/// The GPU writes the bits of the CPU, into any layout.
fn assert_twins(what: &str, make: impl Fn() -> Quantised) {
    let shape = make().shape();
    for dtype in DTYPES {
        let mut want = Pitched::new(&vec![f32::NAN; shape[0] * shape[1]], shape, dtype);
        make()
            .dequantise(want.view_mut())
            .expect("the shapes agree");
        assert_cuda_matches(&format!("{what} {dtype}"), |place: &Place| {
            let mut out = place.poisoned(shape, dtype);
            let codes = make().to_device(place.device());
            codes.dequantise(out.view_mut()).expect("the shapes agree");
            if out.view().dtype() == dtype {
                assert_same_bits(&out.values(), &want.values(), what);
            }
            vec![(dtype, out.values())]
        });
    }
}

/// candle's 8-bit floats, which are those of the `float8` crate.
fn candle_float8(values: &[f32]) -> Vec<f32> {
    let tensor = candle_core::Tensor::new(values, &candle_core::Device::Cpu);
    let rounded = tensor.and_then(|t| t.to_dtype(candle_core::DType::F8E4M3));
    let widened = rounded.and_then(|t| t.to_dtype(candle_core::DType::F32)?.to_vec1());
    widened.expect("floats convert")
}

#[test]
fn eight_bit_floats_are_those_of_candle() {
    // Every code by itself, NaN left out.
    let codes: Vec<u8> = (0..=255).filter(|code| code & 127 != 127).collect();
    let len = codes.len();
    let every = Float8::new([1, len], [1, len], codes, vec![1.0]).expect("lengths fit");
    let every = values(&Quantised::Float8(every));
    assert_same_bits(&every, &candle_float8(&every), "codes");
    assert_eq!((every[126], every[1]), (448.0, 2.0_f32.powi(-9)));

    // What rounds to them: their neighbours' middles, and anything.
    let mut wanted: Vec<f32> = normal(3, 500).iter().map(|v| v * 100.0).collect();
    wanted.extend(every.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0));
    wanted.retain(|value| value.abs() <= 448.0);
    wanted.push(448.0);
    let view = View::from_f32(&wanted, 1, wanted.len());
    let got = Float8::quantise(view).expect("finite");
    assert_eq!(values(&Quantised::Float8(got)), candle_float8(&wanted));
}

#[test]
fn eight_bit_floats_have_the_scale_of_their_block() {
    let codes = vec![0x38; 5 * 7];
    let scales: Vec<f32> = (1..=6).map(|n| n as f32).collect();
    let matrix = Float8::new([5, 7], [3, 3], codes, scales).expect("lengths fit");
    let got = values(&Quantised::Float8(matrix));
    let want = |at: usize| ((at / 7 / 3) * 3 + at % 7 / 3 + 1) as f32;
    assert_eq!(got, (0..35).map(want).collect::<Vec<_>>());
}

fn grouped(bits: usize, [rows, cols]: [usize; 2], groups: usize) -> Grouped {
    let most = (1_usize << bits) - 1;
    let codes = (0..rows * cols)
        .map(|i| (i * 7 % (most + 1)) as u8)
        .collect();
    let scales = normal(5, rows * groups);
    let zeros = (0..rows * groups)
        .map(|i| (i * 5 % (most + 2)) as u16)
        .collect();
    let group_of = (0..cols).map(|c| (c * 3 % groups) as u32).collect();
    Grouped::new([rows, cols], bits, codes, scales, zeros, group_of).expect("lengths fit")
}

#[test]
fn groups_have_scale_and_zero() {
    for bits in [4, 8] {
        let got = values(&Quantised::Grouped(grouped(bits, [3, 10], 4)));
        let (most, scales) = ((1_usize << bits) - 1, normal(5, 12));
        let want = |i: usize| {
            let group = i / 10 * 4 + i % 10 * 3 % 4;
            let (code, zero) = (i * 7 % (most + 1), group * 5 % (most + 2));
            (code as f32 - zero as f32) * scales[group]
        };
        assert_same_bits(&got, &(0..30).map(want).collect::<Vec<_>>(), "values");
    }
}

fn ggml(kind: GgmlType, [rows, cols]: [usize; 2]) -> (Ggml, Vec<f32>) {
    let dtype = match kind {
        GgmlType::Q4_0 => GgmlDType::Q4_0,
        GgmlType::Q8_0 => GgmlDType::Q8_0,
        GgmlType::Q4K => GgmlDType::Q4K,
        GgmlType::Q6K => GgmlDType::Q6K,
    };
    let source = candle_core::Tensor::from_vec(
        normal(9, rows * cols),
        (rows, cols),
        &candle_core::Device::Cpu,
    );
    let quantised = source
        .and_then(|t| QTensor::quantize(&t, dtype))
        .expect("whole blocks");
    let values = quantised.dequantize(&candle_core::Device::Cpu);
    let values = values
        .and_then(|t| t.flatten_all()?.to_vec1())
        .expect("f32");
    let blocks = quantised.data().expect("on the host").into_owned();
    (
        Ggml::new([rows, cols], kind, blocks).expect("whole blocks"),
        values,
    )
}

const KINDS: [GgmlType; 4] = [GgmlType::Q4_0, GgmlType::Q8_0, GgmlType::Q4K, GgmlType::Q6K];

#[test]
fn blocks_of_gguf_are_those_of_candle() {
    for kind in KINDS {
        let (matrix, want) = ggml(kind, [3, 512]);
        assert_same_bits(&values(&Quantised::Ggml(matrix)), &want, kind.name());
    }
}

#[test]
fn cuda_has_the_bits_of_the_cpu() {
    for kind in KINDS {
        assert_twins(kind.name(), || Quantised::Ggml(ggml(kind, [5, 256]).0));
    }
    for (bits, shape, groups) in [(4, [7, 122], 5), (8, [3, 33], 1), (4, [0, 8], 2)] {
        assert_twins("grouped", || {
            Quantised::Grouped(grouped(bits, shape, groups))
        });
    }
    for (shape, block) in [([9_usize, 130_usize], [4, 64]), ([3, 5], [1, 5])] {
        assert_twins("float8", || {
            let [rows, cols] = shape;
            let codes = (0..rows * cols).map(|i| (i * 11 % 256) as u8);
            let codes = codes
                .map(|code| if code & 127 == 127 { 0 } else { code })
                .collect();
            let blocks = rows.div_ceil(block[0]) * cols.div_ceil(block[1]);
            let matrix = Float8::new(shape, block, codes, normal(2, blocks));
            Quantised::Float8(matrix.expect("lengths fit"))
        });
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let said = |result: crate::Result<()>, part: &str| {
        let message = result.expect_err("refused").to_string();
        assert!(message.contains(part), "{message}");
    };
    let new = |cols, groups: Vec<u32>| {
        let codes = vec![0; 2 * cols];
        Grouped::new([2, cols], 4, codes, vec![1.0; 4], vec![8; 4], groups).map(drop)
    };
    said(new(3, vec![0; 3]), "even number");
    said(new(4, vec![0, 1, 2, 0]), "group 2 of 2");
    said(new(4, vec![0; 3]), "group_of");
    said(
        Ggml::new([1, 48], GgmlType::Q4_0, vec![0; 27]).map(drop),
        "blocks of 32",
    );
    said(
        Float8::new([2, 4], [0, 4], vec![0; 8], vec![1.0]).map(drop),
        "blocks",
    );
    said(
        Float8::new([2, 4], [1, 4], vec![0; 8], vec![1.0]).map(drop),
        "scales",
    );
    let blocks = Quantised::Ggml(ggml(GgmlType::Q8_0, [1, 32]).0);
    said(
        blocks
            .requantise(View::from_f32(&[0.0; 32], 1, 32))
            .map(drop),
        "read and not made",
    );
    let mut out = Tensor::zeros(DType::F32, 32, 1);
    said(blocks.dequantise(out.view_mut()), "out");
}
