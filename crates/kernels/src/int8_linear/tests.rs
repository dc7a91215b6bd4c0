use super::{Input, Outliers};
use crate::dequantise::Int8;
use crate::test_support::{assert_same_bits, normal};
use crate::{DType, Device, Indices, Tensor, View, Workspace};
use candle_core::DType as CandleDType;
use std::collections::HashMap;

/// bitsandbytes 0.50.2 on a CPU: `MatMul8bitLt` and `int8_vectorwise_quant`. Bytes are stored as u8.
const BITSANDBYTES: &[u8] = include_bytes!("../../fixtures/int8_linear/bitsandbytes.safetensors");
/// Another order of the same f32 sums.
const F32: f64 = 1e-6;
/// bitsandbytes rounds to bf16 before it adds the columns that are left out, and after.
const BF16: f64 = 1.0 / 128.0;

struct Recorded(HashMap<String, candle_core::Tensor>);

impl Recorded {
    fn load() -> Self {
        let file = candle_core::safetensors::load_buffer(BITSANDBYTES, &candle_core::Device::Cpu);
        Self(file.expect("the fixture is a safetensors file"))
    }

    fn f32(&self, name: &str) -> Tensor {
        let tensor = self.0.get(name).unwrap_or_else(|| panic!("no {name:?}"));
        let [rows, cols] = match *tensor.dims() {
            [cols] => [1, cols],
            [rows, cols] => [rows, cols],
            ref dims => panic!("{name:?} has the shape {dims:?}"),
        };
        let values = tensor.to_dtype(CandleDType::F32);
        let values = values.and_then(|t| t.flatten_all()?.to_vec1());
        Tensor::from_f32(values.expect("numbers"), rows, cols)
    }

    fn bytes(&self, name: &str) -> Vec<i8> {
        let values = self.f32(name).to_f32_vec();
        values.iter().map(|&v| v as u8 as i8).collect()
    }

    fn weight(&self, dtype: &str) -> Int8 {
        let shape = self.f32(&format!("{dtype}.weight")).view().shape();
        let scales = self.f32(&format!("{dtype}.weight_scales")).to_f32_vec();
        Int8::new(shape, self.bytes(&format!("{dtype}.weight")), scales).expect("lengths fit")
    }
}

fn all(rows: usize) -> Indices<'static> {
    Indices::new(vec![0, rows as u32], &Device::Cpu)
}

fn relative(ours: &[f32], theirs: &[f32]) -> f64 {
    let most = theirs.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    let pairs = ours.iter().zip(theirs);
    let error = pairs.fold(0.0_f32, |m, (a, b)| m.max((a - b).abs()));
    assert!(ours.iter().all(|v| v.is_finite()));
    f64::from(error / most)
}

#[test]
fn products_are_those_of_bitsandbytes() {
    let recorded = Recorded::load();
    for (name, dtype, bound) in [("f32", DType::F32, F32), ("bf16", DType::Bf16, BF16)] {
        let weight = recorded.weight(name);
        let x = recorded.f32(&format!("{name}.x")).to_dtype(dtype);
        let [rows, cols] = x.view().shape();
        let out = weight.shape()[0];
        for threshold in [0.0, 6.0] {
            let part = |what: &str| format!("{name}.{threshold}.{what}");
            let workspace = Workspace::new(rows);
            let input = Input::new(x.view(), dtype, threshold, &all(rows), cols, &workspace);
            let input = input.expect("one device");
            let codes = input.codes.to_f32_vec().into_iter().map(|v| v as i8);
            assert_eq!(codes.collect::<Vec<_>>(), recorded.bytes(&part("codes")));
            let scales = recorded.f32(&part("scales")).to_f32_vec();
            assert_same_bits(&input.scales.to_f32_vec(), &scales, "scales");
            let Outliers::Host(columns) = &input.outliers else {
                panic!("on the host");
            };
            let columns: Vec<f32> = columns.iter().map(|&c| c as f32).collect();
            let want = match threshold {
                0.0 => Vec::new(),
                _ => recorded.f32(&part("columns")).to_f32_vec(),
            };
            assert_eq!(columns, want);

            let mut room = Tensor::empty(&Device::Cpu, dtype, out, cols);
            let mut y = Tensor::empty(&Device::Cpu, dtype, rows, out);
            input
                .product(x.view(), &weight, room.view_mut(), y.view_mut(), &workspace)
                .expect("the shapes agree");
            let error = relative(&y.to_f32_vec(), &recorded.f32(&part("y")).to_f32_vec());
            assert!(error <= bound, "{name} {threshold}: {error}");
            input.give(&workspace);
        }
    }
}

#[test]
fn padding_makes_no_column_an_outlier() {
    let (rows, cols) = (4, 16);
    let mut values = normal(1, rows * cols);
    values.iter_mut().for_each(|v| *v = v.clamp(-5.0, 5.0));
    let plain = values.clone();
    values[3 * cols + 2] = 100.0;
    let codes = |values: &[f32], used: u32| {
        let (x, workspace) = (View::from_f32(values, rows, cols), Workspace::new(rows));
        let documents = Indices::new(vec![0, used, used], &Device::Cpu);
        let input = Input::new(x, DType::F32, 6.0, &documents, cols, &workspace);
        input.expect("one device").codes.to_f32_vec()[..3 * cols].to_vec()
    };
    assert_eq!(codes(&values, 3), codes(&plain, 3));
    assert_ne!(codes(&values, 4), codes(&plain, 4));
}

#[test]
fn a_value_that_is_not_finite_stays_one() {
    let (rows, cols, out) = (3, 8, 2);
    let weight = normal(2, out * cols);
    let weight = Int8::quantise(View::from_f32(&weight, out, cols)).expect("finite");
    for (bad, threshold) in [
        (f32::NAN, 6.0),
        (f32::NAN, 0.0),
        (f32::INFINITY, 6.0),
        (1e30, 0.0),
    ] {
        let mut values = normal(3, rows * cols);
        values[cols + 1] = bad;
        let (x, workspace) = (View::from_f32(&values, rows, cols), Workspace::new(rows));
        let input = Input::new(x, DType::F32, threshold, &all(rows), cols, &workspace);
        let mut room = Tensor::empty(&Device::Cpu, DType::F32, out, cols);
        let mut y = Tensor::empty(&Device::Cpu, DType::F32, rows, out);
        let input = input.expect("one device");
        input
            .product(x, &weight, room.view_mut(), y.view_mut(), &workspace)
            .expect("the shapes agree");
        let y = y.to_f32_vec();
        assert!(
            y[..out].iter().chain(&y[2 * out..]).all(|v| v.is_finite()),
            "{bad}: {y:?}"
        );
        assert!(
            y[out..2 * out].iter().all(|v| !v.is_finite()),
            "{bad}: {y:?}"
        );
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let values = normal(4, 16);
    let x = View::from_f32(&values, 2, 8);
    let workspace = Workspace::new(2);
    let input = Input::new(x, DType::F32, 6.0, &all(2), 8, &workspace).expect("one device");
    let weight = Int8::quantise(View::from_f32(&values, 4, 4)).expect("finite");
    let mut room = Tensor::zeros(DType::F32, 4, 4);
    let mut y = Tensor::zeros(DType::F32, 2, 4);
    let refused = input.product(x, &weight, room.view_mut(), y.view_mut(), &workspace);
    assert!(refused.expect_err("refused").to_string().contains("weight"));
}
