//! Activations in host memory between forward and backward: the same bits, in whatever order streams run.

use crate::common;
use crate::common::{Shape, Stored, examples, write_model};
use ferrotune::core::data::PackedBatch;
use ferrotune::core::io::ModelFiles;
use ferrotune::core::model::{DecoderConfig, Keep, WeightFormat};
use ferrotune::core::process_group::Solo;
use ferrotune::core::run_log::StepReport;
use ferrotune::core::trainer::{Trainer, TrainerOptions};
use ferrotune::kernels::cuda::CudaDevice;
use ferrotune::kernels::dequantise::{FourBitFormat, FourBitType, QuantFormat};
use ferrotune::kernels::{DType, Device, host_cuda};
use ferrotune::lora::{LoraAdapter, LoraConfig, TargetModules};
use std::path::Path;
use std::process::Command;

const SEED: u64 = 7;
const LAYERS: usize = 5;
/// A name of this file, by which another process runs it.
const SAME_BITS: &str = "offload::offloaded_activations_give_the_same_bits";

/// What differs from case to case.
#[derive(Clone, Debug)]
struct Case {
    dtype: DType,
    /// Held as codes, which are written out ahead on a stream of their own.
    codes: bool,
    keep: Vec<Keep>,
}

fn shape() -> Shape {
    Shape {
        layers: LAYERS,
        ..Shape::default()
    }
}

fn nf4() -> QuantFormat {
    QuantFormat::FourBit(FourBitFormat {
        quant_type: FourBitType::Nf4,
        block: FourBitFormat::BLOCK,
        double_quant: true,
    })
}

/// Steps over micro-batches of several lengths, the parameters after them, and how many graphs there are.
fn train(
    base: &Path,
    case: &Case,
    offload: usize,
    cuda_graph: bool,
) -> (Vec<StepReport>, Vec<u32>, usize) {
    let lora = LoraConfig {
        rank: 4,
        dropout: 0.1,
        target_modules: Some(TargetModules::AllLinear),
        ..LoraConfig::default()
    };
    let adapter = Box::new(LoraAdapter::new(lora, "llama").expect("valid"));
    // A device of its own: nothing else may use it while a graph is recorded.
    let device = CudaDevice::open(host_cuda::device().ordinal()).expect("opens twice");
    let options = TrainerOptions {
        device: Device::Cuda(device),
        weights: WeightFormat {
            dtype: case.dtype,
            quantise: case.codes.then(|| nf4().into()),
        },
        activation_dtype: case.dtype,
        keep: case.keep.clone(),
        write_ahead: case.codes,
        cuda_graph,
        offload,
        // Not that of the longest: buffers grow, here and on the host.
        max_tokens: 16,
        ..TrainerOptions::default()
    };
    let config = DecoderConfig::open(base).expect("config");
    let files = ModelFiles::open(base).expect("weights");
    let mut trainer =
        Trainer::new(&config, &files, adapter, Box::new(Solo), options).expect("fits");
    common::add_noise(trainer.params_mut(), SEED);
    let documents = examples(6, shape().vocab, SEED);
    let pack =
        |rows: &[usize]| PackedBatch::pack(rows.iter().map(|&row| (row as u64, &documents[row])));
    let batches = [pack(&[3]), pack(&[0, 1, 2]), pack(&[4, 5])];
    let mut reports = Vec::new();
    for step in 0..5 {
        // One micro-batch, whose step is one graph, and several.
        let count = if step % 2 == 0 { 1 } else { 3 };
        reports.push(trainer.step(&batches[..count], 1e-2).expect("step"));
    }
    let params = trainer.params().as_slice();
    let params = params.iter().map(|value| value.to_bits()).collect();
    (reports, params, trainer.recorded_graphs())
}

#[test]
fn offloaded_activations_give_the_same_bits() {
    let base = tempfile::tempdir().expect("temporary directory");
    write_model(base.path(), &shape(), Stored::Bf16, SEED);
    let of = |dtype, codes, keep: &[Keep]| Case {
        dtype,
        codes,
        keep: keep.to_vec(),
    };
    let mixed = [Keep::Input, Keep::DropGateUp, Keep::All, Keep::Input];
    for case in [
        of(DType::Bf16, false, &[]),
        of(DType::F32, false, &mixed),
        of(DType::Bf16, true, &[Keep::Input; LAYERS]),
    ] {
        let staying = train(base.path(), &case, 0, false);
        for (layers, cuda_graph) in [(LAYERS - 2, false), (LAYERS - 2, true), (LAYERS, true)] {
            let moved = train(base.path(), &case, layers, cuda_graph);
            let label = format!("{case:?}, {layers} offloaded, graphs {cuda_graph}");
            assert_eq!(moved.0, staying.0, "{label}");
            assert!(moved.1 == staying.1, "{label}: other parameters");
            assert_eq!(moved.2 > 0, cuda_graph, "{label}");
        }
    }
}

#[test]
fn offloaded_activations_give_the_same_bits_in_every_order_of_streams() {
    common::assert_passes_in_every_order_of_streams(SAME_BITS);
}

/// A name of this file, by which another process runs it.
const FAILS: &str = "offload::a_pass_that_fails_frees_nothing_that_is_being_copied";

/// Where there is no memory for the next layer, here or on the host, copies of the one before are still in progress: their
/// buffers go when these have ended.
#[test]
fn a_pass_that_fails_frees_nothing_that_is_being_copied() {
    const FAIL: &str = "FERROTUNE_HOST_FAIL";
    if common::on_real_gpu() {
        eprintln!("not tried: a real GPU does not fail on request");
        return;
    }
    if std::env::var_os(FAIL).is_some() {
        let base = tempfile::tempdir().expect("temporary directory");
        write_model(base.path(), &shape(), Stored::Bf16, SEED);
        let case = Case {
            dtype: DType::Bf16,
            codes: false,
            keep: Vec::new(),
        };
        train(base.path(), &case, LAYERS, false);
        return;
    }
    // Each piece of pinned memory in turn, and every seventh of the GPU's, those of the trainer too, until there are no
    // more.
    for (operation, step) in [("host", 1), ("alloc", 7)] {
        for after in (0..).step_by(step) {
            let mut again = Command::new(std::env::current_exe().expect("a path"));
            again.args(["--exact", FAILS]);
            again.env("FERROTUNE_HOST_STREAMS", "early");
            again.env(FAIL, format!("{operation}:{after}:2:on"));
            let output = again.output().expect("starts");
            let [out, err] = [output.stdout, output.stderr]
                .map(|said| String::from_utf8_lossy(&said).into_owned());
            let place = format!("{operation} {after}");
            assert!(!err.contains("not allocated"), "{place}: {err}");
            if output.status.success() {
                assert!(after > LAYERS, "no layer has failed");
                break;
            }
            let said = out.to_lowercase().replace(' ', "");
            assert!(said.contains("outofmemory"), "{place}: {out}");
        }
    }
}
