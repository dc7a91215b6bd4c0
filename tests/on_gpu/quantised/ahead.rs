//! Values that are written out while the product before theirs runs: the same bits, in whatever order streams run.

use super::*;
use ferrotune::core::adapter::Adapter;
use ferrotune::core::model::Keep;
use ferrotune::core::process_group::Solo;
use ferrotune::core::run_log::StepReport;
use ferrotune::core::trainer::{Trainer, TrainerOptions};
use ferrotune::kernels::cuda::CudaDevice;
use ferrotune::lora::PeftConfig;

/// A name of this test, by which another process runs it.
const SAME_BITS: &str = "quantised::ahead::values_written_ahead_give_the_same_bits";

/// What differs from case to case.
struct Case {
    /// LoRA's, or another method's keys.
    method: Result<LoraConfig, Value>,
    dtype: DType,
    keep: Vec<Keep>,
}

impl Case {
    fn adapter(&self) -> Box<dyn Adapter> {
        match &self.method {
            Ok(lora) => Box::new(LoraAdapter::new(lora.clone(), "llama").expect("valid")),
            Err(keys) => {
                let keys = keys.as_object().expect("keys");
                let config = PeftConfig::from_config("peft_config", keys).expect("a known method");
                config.into_adapter("llama").expect("valid")
            }
        }
    }
}

/// Every way in which products read a weight: between margins, as a group, alone and changed by the method, with norms
/// of its rows; forward, backward, and again in backward.
fn cases() -> Vec<Case> {
    let lora = |dropout, use_dora| LoraConfig {
        rank: 4,
        dropout,
        use_dora,
        target_modules: Some(TargetModules::AllLinear),
        ..LoraConfig::default()
    };
    let hira =
        json!({"peft_type": "HIRA", "r": 4, "target_modules": ["q_proj", "o_proj", "down_proj"]});
    let of = |method, dtype, keep: &[Keep]| Case {
        method,
        dtype,
        keep: keep.to_vec(),
    };
    let mixed = [Keep::Input, Keep::DropGateUp];
    vec![
        of(Ok(lora(0.0, false)), DType::Bf16, &[]),
        of(Ok(lora(0.1, false)), DType::F32, &mixed),
        of(Ok(lora(0.0, true)), DType::Bf16, &mixed),
        of(Err(hira), DType::F32, &mixed),
    ]
}

/// Steps over micro-batches of two lengths, the parameters after them, and how many graphs there are.
fn train(
    base: &Path,
    case: &Case,
    write_ahead: bool,
    cuda_graph: bool,
) -> (Vec<StepReport>, Vec<u32>, usize) {
    let adapter = case.adapter();
    // A device of its own: nothing else may use it while a graph is recorded.
    let device = CudaDevice::open(host_cuda::device().ordinal()).expect("opens twice");
    let options = TrainerOptions {
        device: Device::Cuda(device),
        weights: WeightFormat {
            dtype: case.dtype,
            quantise: Some(QuantFormat::FourBit(nf4()).into()),
        },
        activation_dtype: case.dtype,
        keep: case.keep.clone(),
        max_tokens: 200,
        write_ahead,
        cuda_graph,
        ..TrainerOptions::default()
    };
    let config = DecoderConfig::open(base).expect("config");
    let files = ModelFiles::open(base).expect("weights");
    let group = Box::new(Solo);
    let mut trainer = Trainer::new(&config, &files, adapter, group, options).expect("fits");
    common::add_noise(trainer.params_mut(), SEED);
    let documents = examples(6, Shape::default().vocab, SEED);
    let pack =
        |rows: &[usize]| PackedBatch::pack(rows.iter().map(|&row| (row as u64, &documents[row])));
    let batches = [pack(&[0, 1, 2]), pack(&[3]), pack(&[4, 5])];
    let mut reports = Vec::new();
    for step in 0..4 {
        // One micro-batch, whose step is one graph, and several.
        let count = if step % 2 == 0 { 1 } else { 3 };
        reports.push(trainer.step(&batches[..count], 1e-2).expect("step"));
    }
    let params = trainer.params().as_slice();
    let params = params.iter().map(|value| value.to_bits()).collect();
    (reports, params, trainer.recorded_graphs())
}

fn nf4() -> FourBitFormat {
    FourBitFormat {
        quant_type: FourBitType::Nf4,
        block: FourBitFormat::BLOCK,
        double_quant: true,
    }
}

fn base() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("temporary directory");
    write_model(directory.path(), &Shape::default(), Stored::Bf16, SEED);
    directory
}

#[test]
fn values_written_ahead_give_the_same_bits() {
    let base = base();
    for case in cases() {
        let one_by_one = train(base.path(), &case, false, false);
        for cuda_graph in [false, true] {
            let ahead = train(base.path(), &case, true, cuda_graph);
            let label = format!("{:?} {} graphs {cuda_graph}", case.method, case.dtype);
            assert_eq!(ahead.0, one_by_one.0, "{label}");
            assert!(ahead.1 == one_by_one.1, "{label}: other parameters");
            assert_eq!(ahead.2 > 0, cuda_graph, "{label}");
        }
    }
}

#[test]
fn values_written_ahead_give_the_same_bits_in_every_order_of_streams() {
    common::assert_passes_in_every_order_of_streams(SAME_BITS);
}

#[test]
fn the_second_scratch_is_counted() {
    let base = base();
    let device = Device::Cuda(host_cuda::device());
    let weights = WeightFormat {
        dtype: DType::Bf16,
        quantise: Some(QuantFormat::FourBit(nf4()).into()),
    };
    let mut subject = Subject::new(base.path(), weights, &device);
    let documents = examples(4, Shape::default().vocab, SEED);
    let batch = PackedBatch::pack(documents.iter().enumerate().map(|(i, d)| (i as u64, d)));
    let (one_by_one, bytes) = subject.run(&batch);
    subject.model.set_write_ahead(true).expect("a side stream");
    let (ahead, more) = subject.run(&batch);
    assert!(one_by_one == ahead);
    let held = subject.predicted(&batch, |step| step);
    let scratch = subject.predicted(&batch, StepShape::with_quantised_linears) - held;
    assert_eq!(more, bytes + scratch);
}

/// A plan has the second scratch where there is room, and no less of anything else for it.
#[test]
fn a_plan_writes_ahead_where_that_fits() {
    let shape = Shape {
        hidden: 512,
        intermediate: 3072,
        head_dim: 128,
        ..Shape::default()
    };
    let directory = tempfile::tempdir().expect("temporary directory");
    write_json(&directory.path().join("config.json"), &shape.config());
    let config = DecoderConfig::open(directory.path()).expect("config");
    let adapter = LoraAdapter::new(LoraConfig::default(), "llama").expect("valid");
    let (attachments, _) = attach(&config, &adapter).expect("attaches");
    let workload = Workload {
        documents: 1,
        tokens: 64,
        label_rows: [64].into(),
        mean_length: 64.0,
        sizes: Vec::new(),
    };
    let step = |device: &Device| {
        StepShape::new(&config, &attachments, device, [DType::Bf16; 2], &workload)
    };
    let gpu = Device::Cuda(host_cuda::device());
    let codes = step(&gpu).with_quantised_linears();
    let enough = codes.ahead(codes.predict(&[]));
    assert!(enough.write_ahead);
    let needed = enough.bytes.total();
    assert!(needed >= codes.predict(&[]).bytes.total() + 2 * 512 * 6144);
    // What a plan leaves in reserve is a thirty-second.
    let plan_at = |bytes: u64| {
        let memory = StepMemory {
            device: bytes,
            host: 0,
        };
        codes.ahead_for(codes.plan(memory), bytes + bytes / 31 + 1, 0)
    };
    assert_eq!(plan_at(needed), enough);
    let less = plan_at(needed - needed / 16);
    assert!(!less.write_ahead);
    assert_eq!(less.keep, enough.keep);
    for other in [
        step(&gpu),
        step(&gpu).with_int8_linears(),
        step(&Device::Cpu).with_quantised_linears(),
    ] {
        assert!(!other.ahead(other.predict(&[])).write_ahead);
    }
}
