use super::{Absmax, Blockwise, ByteCodec, FP4, FourBit, Int8, NF4, dynamic_map};
use crate::test_support::{DTYPES, Pitched, assert_same_bits, cuda_device, normal};
use crate::twins::{Place, assert_cuda_matches};
use crate::{DType, Device, Error, Tensor, View, ViewMut};
use candle_core::DType as CandleDType;
use std::collections::HashMap;

/// bitsandbytes 0.50.2 on a CPU: `quantize_4bit`, `dequantize_4bit`, `int8_vectorwise_quant`, and
/// layers of a tiny Llama that Transformers saved quantised (`hf_*`). Bytes are stored as u8.
const BITSANDBYTES: &[u8] = include_bytes!("../../fixtures/dequantise/bitsandbytes.safetensors");

struct Recorded(HashMap<String, candle_core::Tensor>);

impl Recorded {
    fn load() -> Self {
        let file = candle_core::safetensors::load_buffer(BITSANDBYTES, &candle_core::Device::Cpu);
        Self(file.expect("the fixture is a safetensors file"))
    }

    fn tensor(&self, name: &str) -> &candle_core::Tensor {
        self.0.get(name).unwrap_or_else(|| panic!("no {name:?}"))
    }

    fn f32(&self, name: &str) -> Vec<f32> {
        let tensor = self.tensor(name).to_dtype(CandleDType::F32);
        tensor
            .and_then(|t| t.flatten_all()?.to_vec1())
            .expect("floats widen to f32")
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        let tensor = self.tensor(name).flatten_all();
        tensor.and_then(|t| t.to_vec1()).expect("bytes are u8")
    }

    fn shape(&self, name: &str) -> [usize; 2] {
        match *self.tensor(name).dims() {
            [cols] => [1, cols],
            [rows, cols] => [rows, cols],
            ref dims => panic!("{name:?} has the shape {dims:?}"),
        }
    }

    /// The primitives' `TENSOR.DTYPE.CODE.bBLOCK.sq` or `.dq`, as far as bytes are concerned.
    fn four_bit(&self, case: &Case) -> FourBit {
        let Case { name, shape, .. } = case;
        let absmax = if case.nested {
            Absmax::Nested {
                indices: self.bytes(&format!("{name}.absmax_q")),
                map: Box::new(dynamic_map(true)),
                nested: self.f32(&format!("{name}.nested_absmax")),
                offset: self.f32(&format!("{name}.offset"))[0],
            }
        } else {
            Absmax::F32(self.f32(&format!("{name}.absmax")))
        };
        let packed = self.bytes(&format!("{name}.packed"));
        FourBit::new(*shape, case.block, case.code, packed, absmax).expect("lengths fit")
    }

    /// Every recorded 4-bit matrix whose codes are there.
    fn cases(&self) -> Vec<Case> {
        let mut names: Vec<&str> = self
            .0
            .keys()
            .filter_map(|k| k.strip_suffix(".packed"))
            .collect();
        names.retain(|name| !name.starts_with("hf_"));
        names.sort_unstable();
        names.iter().map(|name| Case::parse(name, self)).collect()
    }
}

struct Case {
    name: String,
    input: String,
    shape: [usize; 2],
    dtype: DType,
    code: [f32; 16],
    block: usize,
    nested: bool,
}

impl Case {
    fn parse(name: &str, recorded: &Recorded) -> Self {
        let [tensor, dtype, code, block, nested] = name.split('.').collect::<Vec<_>>()[..] else {
            panic!("{name:?} has five parts");
        };
        let input = format!("input.{tensor}.{dtype}");
        Self {
            name: name.into(),
            shape: recorded.shape(&input),
            input,
            dtype: if dtype == "bf16" {
                DType::Bf16
            } else {
                DType::F32
            },
            code: if code == "nf4" { NF4 } else { FP4 },
            block: block[1..].parse().expect("a number after b"),
            nested: nested == "dq",
        }
    }
}

fn packed(matrix: &FourBit) -> (&[u8], &Absmax) {
    matrix.parts().expect("in host memory")
}

fn dequantised(matrix: &FourBit, dtype: DType) -> Vec<f32> {
    let mut out = Pitched::new(
        &vec![f32::NAN; matrix.shape().iter().product()],
        matrix.shape(),
        dtype,
    );
    matrix.dequantise(out.view_mut()).expect("the shapes agree");
    out.values()
}

#[test]
fn tables_are_those_of_bitsandbytes() {
    let recorded = Recorded::load();
    assert_same_bits(&NF4, &recorded.f32("code.nf4"), "nf4");
    assert_same_bits(&FP4, &recorded.f32("code.fp4"), "fp4");
    let map = recorded.f32("code.dynamic_signed");
    assert_same_bits(&dynamic_map(true), &map, "dynamic map");
    for format in ["nf4", "fp4"] {
        let map = recorded.f32(&format!("hf_{format}.nested_quant_map"));
        assert_same_bits(&dynamic_map(true), &map, "dynamic map of a checkpoint");
    }
}

#[test]
fn four_bit_values_are_those_of_bitsandbytes() {
    let recorded = Recorded::load();
    let mut compared = 0;
    for case in recorded.cases() {
        let want = format!("{}.dequant", case.name);
        if recorded.0.contains_key(&want) {
            let got = dequantised(&recorded.four_bit(&case), case.dtype);
            assert_same_bits(&got, &recorded.f32(&want), &case.name);
            compared += 1;
        }
    }
    assert!(compared >= 16, "only {compared} recorded results");
}

#[test]
fn a_saved_layer_has_the_values_transformers_saw() {
    let recorded = Recorded::load();
    for (format, code) in [("nf4", NF4), ("fp4", FP4)] {
        let of = |part: &str| format!("hf_{format}.{part}");
        assert_same_bits(&code, &recorded.f32(&of("quant_map")), format);
        let absmax = Absmax::Nested {
            indices: recorded.bytes(&of("absmax")),
            map: Box::new(dynamic_map(true)),
            nested: recorded.f32(&of("nested_absmax")),
            offset: recorded.f32(&of("offset"))[0],
        };
        let codes = recorded.bytes(&of("packed"));
        let matrix = FourBit::new([64, 64], 64, code, codes, absmax).expect("lengths fit");
        let want = recorded.f32(&of("dequant"));
        assert_same_bits(&dequantised(&matrix, DType::F32), &want, format);

        let values = recorded.f32(&of("input"));
        let ours = FourBit::quantise(View::from_f32(&values, 64, 64), 64, code, true);
        let ours = ours.expect("finite values");
        assert_eq!(packed(&ours), packed(&matrix), "{format}, quantised here");
    }
}

#[test]
fn quantising_gives_the_codes_of_bitsandbytes() {
    let recorded = Recorded::load();
    for case in recorded.cases() {
        let values = recorded.f32(&case.input);
        let view = View::from_f32(&values, case.shape[0], case.shape[1]);
        let got = FourBit::quantise(view, case.block, case.code, case.nested).expect("finite");
        let want = recorded.four_bit(&case);
        let (got, want) = (packed(&got), packed(&want));
        assert_eq!(got.0, want.0, "{}", case.name);
        match (got.1, want.1) {
            (Absmax::F32(got), Absmax::F32(want)) => assert_same_bits(got, want, &case.name),
            (got, want) => assert_nested_close(got, want, &case.name),
        }
    }
}

/// The mean of the scales is summed in another order there: one unit in its last place, and what is
/// relative to it moves by as much. The indices must agree.
fn assert_nested_close(got: &Absmax, want: &Absmax, what: &str) {
    let (
        Absmax::Nested {
            indices: got_indices,
            nested: got_nested,
            offset: got_offset,
            ..
        },
        Absmax::Nested {
            indices,
            nested,
            offset,
            ..
        },
    ) = (got, want)
    else {
        panic!("{what}: nested on one side only");
    };
    assert_eq!(got_indices, indices, "{what}");
    let unit = offset.abs() * f32::EPSILON;
    for (got, want) in got_nested.iter().zip(nested).chain([(got_offset, offset)]) {
        assert!((got - want).abs() <= unit, "{what}: {got}, expected {want}");
    }
}

#[test]
fn int8_rows_are_those_of_bitsandbytes() {
    let recorded = Recorded::load();
    let cases = [
        ("normal_40x64.fp16.int8row", "input.normal_40x64.fp16", true),
        (
            "outliers_32x48.fp16.int8row",
            "input.outliers_32x48.fp16",
            true,
        ),
        ("hf_int8.0", "hf_int8.0.input", false),
        ("hf_int8.1", "hf_int8.1.input", false),
    ];
    for (name, input, has_values) in cases {
        let (shape, values) = (recorded.shape(input), recorded.f32(input));
        let bytes = recorded.bytes(&format!("{name}.q"));
        let bytes = bytes.into_iter().map(|byte| byte as i8).collect();
        let want = Int8::new(shape, bytes, recorded.f32(&format!("{name}.scale")));
        let want = want.expect("lengths fit");
        let got = Int8::quantise(View::from_f32(&values, shape[0], shape[1]));
        assert_eq!(got.expect("finite values").rows(), want.rows(), "{name}");
        if has_values {
            let mut out = Pitched::new(&vec![f32::NAN; values.len()], shape, DType::F32);
            want.dequantise(out.view_mut()).expect("the shapes agree");
            let recorded = recorded.f32(&format!("{name}.dequant"));
            assert_same_bits(&out.values(), &recorded, name);
        }
    }
}

#[test]
fn values_come_back_within_half_a_gap_of_the_code() {
    // Blocks that end inside rows, and more blocks than a nested statistic covers.
    for (shape, block) in [([7, 23], 32), ([100, 200], 64), ([3, 5000], 4096)] {
        let values = normal(9, shape[0] * shape[1]);
        for nested in [false, true] {
            let view = View::from_f32(&values, shape[0], shape[1]);
            let matrix = FourBit::quantise(view, block, NF4, nested).expect("finite");
            let absmax = packed(&matrix).1.values();
            let got = dequantised(&matrix, DType::F32);
            for (i, (got, want)) in got.iter().zip(&values).enumerate() {
                // The widest gap, -1 to -0.696; the 8-bit scales are off by 1.5 % of their range.
                let largest = absmax[i / block];
                let bound = largest * 0.152 + if nested { 0.05 } else { 0.0 };
                assert!(
                    (got - want).abs() <= bound,
                    "{shape:?} {block}: {got}, {want}"
                );
            }
        }
    }
}

/// The GPU writes the bits of the CPU, into any layout.
fn check_cuda(what: &str, shape: [usize; 2], run: impl Fn(&Place, ViewMut<'_>)) {
    for dtype in DTYPES {
        let mut want = Pitched::new(&vec![f32::NAN; shape[0] * shape[1]], shape, dtype);
        run(&Place::dense_on(Device::Cpu), want.view_mut());
        let want = want.values();
        assert_cuda_matches(&format!("{what} {dtype}"), |place| {
            let mut out = place.poisoned(shape, dtype);
            run(place, out.view_mut());
            if out.view().dtype() == dtype {
                assert_same_bits(&out.values(), &want, what);
            }
            vec![(dtype, out.values())]
        });
    }
}

#[test]
fn cuda_has_the_bits_of_the_cpu() {
    let recorded = Recorded::load();
    for case in recorded.cases() {
        check_cuda(&case.name, case.shape, |place, out| {
            let matrix = recorded.four_bit(&case).to_device(place.device());
            matrix.dequantise(out).expect("the shapes agree");
        });
    }
    // Rows of whole eights that end inside blocks; more blocks than a nested scale covers.
    for (shape, block) in [([9, 40], 64), ([130, 72], 32), ([0, 8], 64), ([3, 0], 64)] {
        let values = normal(4, shape[0] * shape[1]);
        let view = || View::from_f32(&values, shape[0], shape[1]);
        for nested in [false, true] {
            check_cuda(
                &format!("{shape:?} {block} {nested}"),
                shape,
                |place, out| {
                    let matrix = FourBit::quantise(view(), block, FP4, nested).expect("finite");
                    let matrix = matrix.to_device(place.device());
                    matrix.dequantise(out).expect("the shapes agree");
                },
            );
        }
        check_cuda(&format!("int8 {shape:?}"), shape, |place, out| {
            let matrix = Int8::quantise(view())
                .expect("finite")
                .to_device(place.device());
            matrix.dequantise(out).expect("the shapes agree");
        });
    }
}

#[test]
fn cuda_refuses_an_output_elsewhere() {
    let device = Device::Cuda(cuda_device());
    let values = normal(4, 64);
    let view = View::from_f32(&values, 1, 64);
    let mut out = Tensor::zeros(DType::F32, 1, 64);
    let matrix = FourBit::quantise(view, 64, NF4, false)
        .expect("finite")
        .to_device(&device);
    assert!(matrix.dequantise(out.view_mut()).is_err());
    let matrix = Int8::quantise(view).expect("finite").to_device(&device);
    assert!(matrix.dequantise(out.view_mut()).is_err());
}

#[test]
fn empty_and_all_zero_matrices_are_legal() {
    for shape in [[0, 5], [5, 0], [2, 33]] {
        let zeros = Tensor::zeros(DType::F32, shape[0], shape[1]);
        for nested in [false, true] {
            let matrix = FourBit::quantise(zeros.view(), 64, FP4, nested).expect("finite");
            assert!(dequantised(&matrix, DType::Bf16).iter().all(|&v| v == 0.0));
        }
        let matrix = Int8::quantise(zeros.view()).expect("finite");
        let mut out = Tensor::from_f32(vec![1.0; shape[0] * shape[1]], shape[0], shape[1]);
        matrix.dequantise(out.view_mut()).expect("the shapes agree");
        assert!(out.to_f32_vec().iter().all(|&v| v == 0.0));
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let absmax = || Absmax::F32(vec![1.0; 2]);
    let new = |shape, block, packed: usize, absmax| {
        FourBit::new(shape, block, NF4, vec![0; packed], absmax).expect_err("refused")
    };
    assert!(
        new([4, 16], 48, 32, absmax())
            .to_string()
            .contains("power of two")
    );
    assert!(matches!(
        new([4, 16], 32, 31, absmax()),
        Error::Length { what: "packed", .. }
    ));
    assert!(matches!(
        new([4, 16], 64, 32, absmax()),
        Error::Length { what: "absmax", .. }
    ));
    let nested = Absmax::Nested {
        indices: vec![0; 2],
        map: Box::new(dynamic_map(true)),
        nested: Vec::new(),
        offset: 0.0,
    };
    assert!(matches!(
        new([4, 16], 32, 32, nested),
        Error::Length {
            what: "nested absmax",
            ..
        }
    ));
    let bad = [1.0, f32::NAN];
    let error = FourBit::quantise(View::from_f32(&bad, 1, 2), 64, NF4, false);
    assert!(
        error
            .expect_err("refused")
            .to_string()
            .contains("value 1 is NaN")
    );
    let large = [7e4];
    assert!(
        Int8::quantise(View::from_f32(&large, 1, 1)).is_err(),
        "infinite as f16"
    );
    let matrix = Int8::new([1, 2], vec![0; 2], vec![1.0]).expect("lengths fit");
    let mut out = Tensor::zeros(DType::F32, 2, 1);
    assert!(matches!(
        matrix.dequantise(out.view_mut()),
        Err(Error::Shape { .. })
    ));
    assert!(Int8::new([1, 2], vec![0; 2], Vec::new()).is_err());
}

/// Values of every magnitude, and those beside the middles between entries of the map.
#[test]
fn a_codec_finds_the_entries_that_a_search_finds() {
    for signed in [true, false] {
        let map = dynamic_map(signed);
        let middles = map.windows(2).map(|pair| (pair[0] + pair[1]) * 0.5);
        let beside = middles.flat_map(|middle| [middle.next_down(), middle, middle.next_up()]);
        let magnitudes = (0..4096_u32).map(|i| f32::from_bits((i << 18) | (i * 7919 % (1 << 18))));
        let finite = magnitudes.filter(|value| value.abs() <= 1.0);
        let both = finite.flat_map(|value| [value, -value]);
        let values: Vec<f32> = beside.chain(both).chain([1.0, 0.0, -0.0]).collect();
        assert!(values.len() > 8000, "{}", values.len());
        let block = values.len();
        let searched = Blockwise::quantise(&values, block, &map).expect("finite");
        let mut indices = vec![0; block];
        let absmax = ByteCodec::new(map).encode(&values, &mut indices);
        assert_eq!((absmax, indices), (1.0, searched.indices));
    }
}
