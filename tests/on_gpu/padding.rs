//! Rows of padding change no bit of a loss or a gradient, whatever stands in them.

use crate::common;
use crate::common::{Family, Stored, examples, write_model};
use ferrotune::core::adapter::Adapter;
use ferrotune::core::data::PackedBatch;
use ferrotune::core::full::FullFineTuning;
use ferrotune::core::io::ModelFiles;
use ferrotune::core::model::{DecoderConfig, Mode, Model, Pass, WeightFormat};
use ferrotune::core::params::FlatBuffer;
use ferrotune::core::trainer::attach;
use ferrotune::kernels::dequantise::QuantFormat;
use ferrotune::kernels::linear_cross_entropy::{Accumulator, Sums};
use ferrotune::kernels::{DType, Device, Workspace, host_cuda};
use ferrotune::lora::{LoraAdapter, LoraConfig, TargetModules};
use std::path::Path;

const SEED: u64 = 5;

fn lora() -> Box<dyn Adapter> {
    let config = LoraConfig {
        rank: 5,
        dropout: 0.3,
        target_modules: Some(TargetModules::AllLinear),
        ..LoraConfig::default()
    };
    Box::new(LoraAdapter::new(config, "llama").expect("valid"))
}

/// Loss sums and bits of the gradient.
#[derive(Debug, PartialEq)]
struct Outcome {
    sums: Sums,
    gradient: Vec<f32>,
}

/// The same bits; of a real GPU values that are near, as its library may sum the products of more rows in another order.
fn assert_equal(device: &Device, dtype: DType, got: &Outcome, want: &Outcome, what: &str) {
    if !(common::on_real_gpu() && device.is_cuda()) {
        let bits = |of: &Outcome| of.gradient.iter().map(|g| g.to_bits()).collect::<Vec<_>>();
        assert_eq!(got.sums, want.sums, "{what}");
        assert!(bits(got) == bits(want), "{what}");
        return;
    }
    let tolerance = if dtype == DType::F32 { 1e-5 } else { 2e-2 };
    let norm = |values: &mut dyn Iterator<Item = f32>| {
        values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt()
    };
    let pairs = got.gradient.iter().zip(&want.gradient);
    let apart = norm(&mut pairs.map(|(a, b)| a - b)) / norm(&mut want.gradient.iter().copied());
    assert!(apart <= tolerance, "{what}: gradients {apart:e} apart");
    let apart = (got.sums.loss - want.sums.loss).abs() / want.sums.loss;
    assert!(apart <= tolerance, "{what}: losses {apart:e} apart");
    assert_eq!(got.sums.count, want.sums.count, "{what}");
}

fn run(
    directory: &Path,
    adapter: &dyn Adapter,
    device: &Device,
    format: &WeightFormat,
    batch: &PackedBatch,
) -> Outcome {
    let dtype = format.dtype;
    let config = DecoderConfig::open(directory).expect("config");
    let files = ModelFiles::open(directory).expect("weights");
    let (attachments, mut params) = attach(&config, adapter).expect("attaches");
    params.move_to(device);
    let format = format.clone();
    let mut model = Model::load(&config, attachments, &files, &mut params, format).expect("loads");
    model.set_neftune_noise_alpha(5.0);
    // A fresh B is zero, and so would the gradient of A be.
    common::add_noise(&mut params, SEED);
    let workspace = Workspace::on(device.clone(), batch.rows());
    let pass = Pass {
        workspace: &workspace,
        dtype,
        mode: Mode::Train {
            seed: SEED,
            step: 2,
        },
    };
    let mut grads = FlatBuffer::zeros_on(params.layout(), device);
    let mut sums = Accumulator::new(device);
    model
        .loss_and_gradients(pass, &params, &mut grads, batch, &mut sums)
        .expect("runs");
    let sums = sums.read().expect("sums");
    let eval = Pass {
        mode: Mode::Eval,
        ..pass
    };
    let evaluated = model.loss(eval, &params, batch).expect("runs");
    assert_eq!(evaluated.count, sums.count);
    Outcome {
        sums,
        gradient: grads.as_slice().to_vec(),
    }
}

/// `batch` with `more` rows of padding, of the tokens from `token` on.
fn padded(batch: &PackedBatch, more: usize, token: u32) -> PackedBatch {
    let mut padded = batch.clone().padded_to(batch.rows() + more);
    for (i, id) in padded.input_ids.iter_mut().enumerate().skip(batch.rows()) {
        *id = token + i as u32 % 7;
    }
    padded
}

fn assert_same(
    device: &Device,
    family: Family,
    method: fn() -> Box<dyn Adapter>,
    format: impl Fn(DType) -> WeightFormat,
) {
    let directory = tempfile::tempdir().expect("temporary directory");
    let shape = family.shape();
    write_model(directory.path(), &shape, Stored::F32, SEED);
    let documents = examples(5, shape.vocab, SEED);
    let batch = PackedBatch::pack(documents.iter().enumerate().map(|(i, d)| (i as u64, d)));
    for dtype in [DType::F32, DType::Bf16] {
        let format = format(dtype);
        let run =
            |batch: &PackedBatch| run(directory.path(), method().as_ref(), device, &format, batch);
        let plain = run(&batch);
        assert!(plain.gradient.iter().any(|g| *g != 0.0));
        for (more, token) in [(1, 0), (1, 3), (40, 9)] {
            let other = run(&padded(&batch, more, token));
            let what = format!("{family:?}, {dtype}, {more} rows");
            assert_equal(device, dtype, &other, &plain, &what);
        }
    }
}

#[test]
fn padding_changes_no_bit_of_the_gradient_of_an_adapter() {
    for device in [Device::Cpu, Device::Cuda(host_cuda::device())] {
        for family in Family::ALL {
            assert_same(&device, family, lora, WeightFormat::from);
        }
    }
}

#[test]
fn padding_changes_no_bit_of_the_gradient_of_the_model() {
    for device in [Device::Cpu, Device::Cuda(host_cuda::device())] {
        for family in Family::ALL {
            let full = || -> Box<dyn Adapter> { Box::new(FullFineTuning) };
            assert_same(&device, family, full, WeightFormat::from);
        }
    }
}

/// Columns with a large value are multiplied in another way: those that padding alone has are not.
#[test]
fn padding_changes_no_bit_of_the_gradient_over_8_bits() {
    let threshold = 1.5;
    let format = |dtype| WeightFormat {
        dtype,
        quantise: Some(QuantFormat::Int8 { threshold }.into()),
    };
    for device in [Device::Cpu, Device::Cuda(host_cuda::device())] {
        assert_same(&device, Family::Llama, lora, format);
    }
}
