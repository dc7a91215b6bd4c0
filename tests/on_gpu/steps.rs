//! What a step on a GPU costs besides its kernels: nothing is allocated, the host waits once, and a
//! micro-step that is replayed from a graph has the bits of one that is issued.

use crate::common::output_scaling::OutputScaling;
use crate::common::{Shape, Stored, examples, write_model};
use ferrotune::core::adapter::Adapter;
use ferrotune::core::config::{KeyValue, Optim, OptimizerArguments};
use ferrotune::core::data::{BatchSize, Example, PackedBatch};
use ferrotune::core::io::ModelFiles;
use ferrotune::core::model::DecoderConfig;
use ferrotune::core::process_group::{ProcessGroup, Solo};
use ferrotune::core::run_log::StepReport;
use ferrotune::core::trainer::{Trainer, TrainerOptions};
use ferrotune::dist::Local;
use ferrotune::kernels::cuda::CudaDevice;
use ferrotune::kernels::rng::{Stream, key_for};
use ferrotune::kernels::{DType, Device, host_cuda};
use ferrotune::lora::{LoraAdapter, LoraConfig, LoraFa, PeftConfig, TargetModules};
use serde_json::{Value, json};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

const SEED: u64 = 9;
const STEPS: usize = 6;

/// A device of the test's own: nothing else may use it while a graph is recorded.
fn gpu() -> Arc<CudaDevice> {
    // Opening the shared one sets where libraries and kernels are.
    CudaDevice::open(host_cuda::device().ordinal()).expect("a device opens twice")
}

fn base() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("temporary directory");
    write_model(directory.path(), &Shape::default(), Stored::F32, SEED);
    directory
}

/// What differs from case to case.
#[derive(Clone, Copy, Debug)]
struct Case {
    dtype: DType,
    rank: usize,
    cuda_graph: bool,
    max_grad_norm: Option<f64>,
    frozen_a: bool,
    optim: &'static str,
}

impl Case {
    fn new(cuda_graph: bool) -> Self {
        Self {
            dtype: DType::Bf16,
            rank: 8,
            cuda_graph,
            max_grad_norm: Some(1.0),
            frozen_a: false,
            optim: "adamw_torch",
        }
    }

    fn trainer(
        self,
        base: &Path,
        device: &Arc<CudaDevice>,
        group: Box<dyn ProcessGroup>,
    ) -> Trainer {
        let lora = LoraConfig {
            rank: self.rank,
            dropout: 0.2,
            target_modules: Some(TargetModules::AllLinear),
            ..LoraConfig::default()
        };
        let mut adapter: Box<dyn Adapter> =
            Box::new(LoraAdapter::new(lora, "llama").expect("valid"));
        if self.frozen_a {
            adapter = Box::new(LoraFa::new(adapter));
        }
        self.trainer_of(adapter, base, device, group)
    }

    fn trainer_of(
        self,
        adapter: Box<dyn Adapter>,
        base: &Path,
        device: &Arc<CudaDevice>,
        group: Box<dyn ProcessGroup>,
    ) -> Trainer {
        let arguments = OptimizerArguments {
            optim: Optim::from_value(&json!(self.optim)).expect("an optimizer"),
            ..OptimizerArguments::default()
        };
        let options = TrainerOptions {
            device: Device::Cuda(Arc::clone(device)),
            optimizer: arguments.choice().expect("valid"),
            weights: self.dtype.into(),
            activation_dtype: self.dtype,
            max_tokens: 200,
            cuda_graph: self.cuda_graph,
            max_grad_norm: self.max_grad_norm,
            weight_decay: 0.1,
            ..TrainerOptions::default()
        };
        let config = DecoderConfig::open(base).expect("config");
        let files = ModelFiles::open(base).expect("weights");
        let mut trainer = Trainer::new(&config, &files, adapter, group, options).expect("trainer");
        // A fresh B is zero, and so would the gradient of A be.
        let mut stream = Stream::new(key_for(SEED, "adapter"));
        for value in trainer.params_mut().as_mut_slice() {
            *value += (stream.normal() * 0.05) as f32;
        }
        trainer
    }
}

/// Micro-batches of a step: two of other lengths each time, one the same in every step.
fn batches(step: usize) -> Vec<PackedBatch> {
    let documents = examples(12, Shape::default().vocab, SEED);
    let pack = |rows: &[usize]| {
        let of = |&row: &usize| (row as u64, &documents[row % documents.len()]);
        PackedBatch::pack(rows.iter().map(of).collect::<Vec<(u64, &Example)>>())
    };
    vec![
        pack(&[step, step + 1, step + 2]),
        pack(&[0, 4]),
        pack(&[step + 5]),
    ]
}

fn sizes() -> Vec<BatchSize> {
    let all = (0..STEPS).flat_map(batches);
    let size = |batch: PackedBatch| BatchSize {
        tokens: batch.tokens(),
        label_rows: batch.trained_tokens(),
        documents: batch.sequences(),
    };
    all.map(size).collect()
}

fn train(trainer: &mut Trainer) -> (Vec<StepReport>, Vec<u32>) {
    let step = |i| trainer.step(&batches(i), 1e-2).expect("step");
    let reports = (0..STEPS).map(step).collect();
    let params = trainer.params().as_slice();
    (reports, params.iter().map(|v| v.to_bits()).collect())
}

/// The gradients of every A over one input are one product, for which they must lie below one another.
#[test]
fn factors_over_one_input_are_neighbours() {
    let base = base();
    let mut trainer = Case::new(false).trainer(base.path(), &gpu(), Box::new(Solo));
    for modules in [
        &["self_attn.q", "self_attn.k", "self_attn.v"][..],
        &["mlp.gate", "mlp.up"],
    ] {
        let name = |module| format!("base_model.model.model.layers.1.{module}_proj.lora_A.weight");
        let layout = trainer.params().layout();
        let ids = modules
            .iter()
            .map(|module| layout.find(&name(module)).expect("trained"));
        let ids: Vec<_> = ids.collect();
        let joined = trainer
            .params_mut()
            .view_joined_mut(&ids)
            .expect("neighbours");
        assert_eq!(joined.rows(), 8 * modules.len());
    }
}

#[test]
fn a_step_allocates_nothing_and_waits_once() {
    let base = base();
    let optims = ["adamw_torch", "adamw_8bit"];
    for (cuda_graph, optim) in [false, true]
        .into_iter()
        .flat_map(|on| optims.map(|o| (on, o)))
    {
        let device = gpu();
        let case = Case {
            optim,
            ..Case::new(cuda_graph)
        };
        let mut trainer = case.trainer(base.path(), &device, Box::new(Solo));
        trainer.rehearse(&sizes()).expect("rehearses");
        for step in 0..STEPS {
            let before = (device.allocations(), device.waits());
            trainer.step(&batches(step), 1e-2).expect("step");
            let after = (device.allocations(), device.waits());
            let cost = (after.0 - before.0, after.1 - before.1);
            assert_eq!(cost, (0, 1), "{optim}, step {step}, graphs {cuda_graph}");
        }
    }
}

#[test]
fn a_rehearsal_changes_nothing_that_is_trained() {
    let base = base();
    let run = |rehearsed: &[BatchSize]| {
        let mut trainer = Case::new(false).trainer(base.path(), &gpu(), Box::new(Solo));
        trainer.rehearse(rehearsed).expect("rehearses");
        train(&mut trainer)
    };
    assert_eq!(run(&[]), run(&sizes()));
}

#[test]
fn a_replayed_step_has_the_bits_of_an_issued_one() {
    let base = base();
    for (dtype, rank) in [(DType::Bf16, 5), (DType::F32, 8)] {
        let run = |cuda_graph| {
            let device = gpu();
            let case = Case {
                dtype,
                rank,
                ..Case::new(cuda_graph)
            };
            let mut trainer = case.trainer(base.path(), &device, Box::new(Solo));
            let outcome = train(&mut trainer);
            // The same again: now nothing is left to be recorded.
            let before = device.launches();
            let last = trainer.step(&batches(STEPS - 1), 1e-2).expect("step");
            let launches = device.launches() - before;
            (outcome, last, trainer.recorded_graphs(), launches)
        };
        let (issued, issued_last, none, many) = run(false);
        let (replayed, replayed_last, graphs, few) = run(true);
        assert_eq!(none, 0);
        assert!(graphs >= 2, "{graphs} graphs");
        assert_eq!(issued, replayed, "{dtype}");
        assert_eq!(issued_last, replayed_last, "{dtype}");
        assert!(few < many / 4, "{few} launches, {many} without graphs");
        let distinct = |reports: &[StepReport]| {
            let mut losses: Vec<u64> = reports.iter().map(|r| r.loss_sum.to_bits()).collect();
            losses.sort_unstable();
            losses.dedup();
            losses.len()
        };
        assert_eq!(distinct(&replayed.0), STEPS, "each step has its own data");
    }
}

/// What is trained and what the optimizer remembers, to the bit.
fn bits(trainer: &Trainer) -> Vec<(String, Vec<u8>)> {
    let params = trainer.params().as_slice();
    let params = params.iter().flat_map(|value| value.to_le_bytes());
    let state = trainer.state().into_iter();
    let state = state.map(|(name, tensor)| (name, tensor.bytes.to_vec()));
    std::iter::once(("params".to_owned(), params.collect()))
        .chain(state)
        .collect()
}

/// Steps of the first `count` micro-batches each, at learning rates that fall.
fn train_on(trainer: &mut Trainer, steps: Range<usize>, count: usize) -> Vec<StepReport> {
    let step = |i: usize| {
        let lr = 1e-2 / (1 + i) as f64;
        trainer.step(&batches(i)[..count], lr).expect("step")
    };
    steps.map(step).collect()
}

#[test]
fn a_recorded_update_has_the_bits_of_an_issued_one() {
    let base = base();
    // One and several micro-batches, clipped always, sometimes and never.
    let cases = [
        ("adamw_torch", 1, Some(1.0), 1),
        ("adamw_torch", 1, Some(1e-3), 1),
        ("adamw_torch", 3, Some(1.0), 4),
        ("adamw_torch", 3, None, 4),
        ("adamw_8bit", 1, Some(1.0), 1),
        ("lion_32bit", 3, None, 4),
    ];
    for (optim, count, max_grad_norm, expected) in cases {
        let run = |cuda_graph| {
            let device = gpu();
            let case = Case {
                max_grad_norm,
                optim,
                // Large enough for moments in bytes.
                rank: if optim == "adamw_8bit" { 128 } else { 8 },
                ..Case::new(cuda_graph)
            };
            let mut trainer = case.trainer(base.path(), &device, Box::new(Solo));
            trainer.rehearse(&sizes()).expect("rehearses");
            let mut reports = train_on(&mut trainer, 0..STEPS, count);
            // Nothing of a shape that came twice is left to be recorded.
            reports.extend(train_on(&mut trainer, 0..STEPS, count));
            let before = device.launches();
            reports.extend(train_on(&mut trainer, 0..1, count));
            (reports, bits(&trainer), device.launches() - before)
        };
        let (issued, issued_bits, _) = run(false);
        let (recorded, recorded_bits, launches) = run(true);
        assert_eq!(
            issued, recorded,
            "{optim}, {count} micro-batches, {max_grad_norm:?}"
        );
        assert!(
            issued_bits == recorded_bits,
            "{optim}, {count}, {max_grad_norm:?}"
        );
        assert_eq!(
            launches, expected,
            "{optim}: graphs of {count} micro-batches"
        );
    }
}

#[test]
fn a_run_that_goes_on_with_graphs_has_the_bits_of_one_without() {
    let base = base();
    let through = |cuda_graph, pause: bool| {
        let case = Case::new(cuda_graph);
        let mut trainer = case.trainer(base.path(), &gpu(), Box::new(Solo));
        train_on(&mut trainer, 0..STEPS, 1);
        if pause {
            let mut next = case.trainer(base.path(), &gpu(), Box::new(Solo));
            // Steps that are forgotten, and graphs that stay.
            train_on(&mut next, 0..STEPS, 1);
            next.restore(trainer.steps_done(), trainer.params(), &trainer.state());
            trainer = next;
        }
        let reports = train_on(&mut trainer, 0..STEPS, 1);
        (reports, bits(&trainer))
    };
    assert!(through(false, false) == through(true, true));
}

#[test]
fn a_replayed_step_that_is_not_finite_updates_nothing() {
    let base = base();
    for count in [1, 3] {
        let run = |cuda_graph| {
            let device = gpu();
            let mut trainer = Case::new(cuda_graph).trainer(base.path(), &device, Box::new(Solo));
            let same = &batches(0)[..count];
            for _ in 0..5 {
                trainer.step(same, 1e-2).expect("step");
            }
            trainer.step(same, 1e30).expect("what it makes is finite");
            let (before, launches) = (bits(&trainer), device.launches());
            let error = trainer
                .step(same, 1e-2)
                .expect_err("nothing is finite any more");
            let launches = device.launches() - launches;
            assert!(before == bits(&trainer), "an update was made of it");
            assert_eq!(trainer.steps_done(), 6);
            (error.to_string(), before, launches)
        };
        let (issued, recorded) = (run(false), run(true));
        assert_eq!(issued.0, recorded.0);
        assert!(issued.0.contains("at step 7"), "{}", issued.0);
        assert!(issued.1 == recorded.1);
        assert_eq!(recorded.2, [1, 4][usize::from(count == 3)]);
    }
}

#[test]
fn what_has_a_say_between_gradient_and_update_has_it_beside_graphs() {
    let base = base();
    let run = |cuda_graph| {
        let device = gpu();
        let case = Case {
            frozen_a: true,
            ..Case::new(cuda_graph)
        };
        let mut trainer = case.trainer(base.path(), &device, Box::new(Solo));
        let reports = train_on(&mut trainer, 0..STEPS, 1);
        (reports, bits(&trainer))
    };
    assert!(run(false) == run(true));
}

/// A configuration of each method.
fn methods() -> Vec<Value> {
    let methods = json!([
        {"peft_type": "IA3"},
        {"peft_type": "VERA", "r": 8, "vera_dropout": 0.1},
        {"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "total_step": 9, "tinit": 1, "tfinal": 3},
        {"peft_type": "LOHA", "r": 3},
        {"peft_type": "LOKR", "r": 2},
        {"peft_type": "LOKR", "r": 2, "decompose_both": true, "init_weights": "lycoris"},
        {"peft_type": "HIRA", "r": 4, "hira_dropout": 0.3},
        {"peft_type": "MISS", "r": 8, "miss_dropout": 0.3},
        {"peft_type": "MISS", "r": 8, "mini_r": 4, "init_weights": "mini"},
        {"peft_type": "OFT", "oft_block_size": 8},
        {"peft_type": "OFT", "oft_block_size": 8, "use_cayley_neumann": false, "block_share": true},
        {"peft_type": "BOFT", "boft_block_size": 4},
        {"peft_type": "BOFT", "boft_block_size": 4, "boft_n_butterfly_factor": 3},
        {"peft_type": "MISS", "r": 8, "init_weights": "bat"},
        {"peft_type": "C3A", "block_size": 8, "init_weights": "kaiming_uniform"},
        {"peft_type": "FOURIERFT", "n_frequency": 20},
        {"peft_type": "RANDLORA", "r": 3, "randlora_dropout": 0.1},
        {"peft_type": "ROAD", "group_size": 8},
        {"peft_type": "ROAD", "group_size": 4, "variant": "road_2"},
        {"peft_type": "ROAD", "group_size": 8, "variant": "road_4"},
        {"peft_type": "HRA", "r": 4},
        {"peft_type": "HRA", "r": 3, "apply_GS": true},
        {"peft_type": "DELORA", "r": 4, "module_dropout": 0.1},
        {"peft_type": "VBLORA", "r": 2, "vector_length": 8, "num_vectors": 12},
        {"peft_type": "OFT", "oft_block_size": 8, "module_dropout": 0.5},
        {"peft_type": "OFT", "oft_block_size": 8, "coft": true},
        {"peft_type": "BOFT", "boft_block_size": 4, "boft_n_butterfly_factor": 3, "boft_dropout": 0.5},
        {"peft_type": "LOHA", "r": 3, "rank_dropout": 0.3},
        {"peft_type": "LOKR", "r": 2, "rank_dropout": 0.3, "rank_dropout_scale": true, "module_dropout": 0.2},
    ]);
    methods.as_array().expect("a list").clone()
}

/// Steps of one micro-batch with a method, and how many graphs there are then, by whether they may be recorded.
fn with_method(base: &Path, keys: &Value, dtype: DType, cuda_graph: bool) -> (Outcome, usize) {
    let mut object = keys.as_object().expect("an object").clone();
    object.insert(
        "target_modules".into(),
        json!(["k_proj", "v_proj", "down_proj", "lm_head"]),
    );
    let config = PeftConfig::from_config("peft_config", &object).expect("a known method");
    let adapter = config.into_adapter("llama").expect("valid");
    with_adapter(base, adapter, dtype, cuda_graph)
}

fn with_adapter(
    base: &Path,
    adapter: Box<dyn Adapter>,
    dtype: DType,
    cuda_graph: bool,
) -> (Outcome, usize) {
    let device = gpu();
    let case = Case {
        dtype,
        ..Case::new(cuda_graph)
    };
    let mut trainer = case.trainer_of(adapter, base, &device, Box::new(Solo));
    let same = |trainer: &mut Trainer| trainer.step(&batches(0)[..1], 1e-2).expect("step");
    let mut reports = Vec::new();
    for step in 0..3 {
        reports.extend(train_on(&mut trainer, step..step + 1, 1));
        reports.push(same(&mut trainer));
    }
    let (allocated, waited) = (device.allocations(), device.waits());
    reports.push(same(&mut trainer));
    let (allocations, waits) = (device.allocations() - allocated, device.waits() - waited);
    let outcome = Outcome {
        bits: bits(&trainer),
        reports,
        allocations,
        waits,
    };
    (outcome, trainer.recorded_graphs())
}

struct Outcome {
    reports: Vec<StepReport>,
    bits: Vec<(String, Vec<u8>)>,
    /// Of a step that is nothing new, as are waits.
    allocations: u64,
    waits: u64,
}

#[test]
fn a_method_is_replayed_with_the_bits_of_an_issued_one() {
    let base = base();
    for keys in &methods() {
        for dtype in [DType::F32, DType::Bf16] {
            let (issued, none) = with_method(base.path(), keys, dtype, false);
            let (replayed, graphs) = with_method(base.path(), keys, dtype, true);
            assert_eq!(none, 0);
            assert!(graphs >= 1, "{keys} {dtype}: no graph");
            assert_eq!(issued.reports, replayed.reports, "{keys} {dtype}");
            assert!(issued.bits == replayed.bits, "{keys} {dtype}: other values");
            // AdaLoRA's term of the loss has matrices of its own and is read after the update; importance is measured
            // on the host, for which values and gradients come there.
            if keys["peft_type"] == "ADALORA" {
                assert_eq!([issued.waits, replayed.waits], [4, 4], "{keys} {dtype}");
            } else {
                assert_eq!(replayed.allocations, 0, "{keys} {dtype}");
                assert_eq!([issued.waits, replayed.waits], [1, 1], "{keys} {dtype}");
                assert!(issued.allocations > 0, "{keys} {dtype}: nothing to replay");
            }
        }
    }
}

#[test]
fn dora_of_the_head_is_replayed_with_the_bits_of_an_issued_one() {
    let base = base();
    let run = |dtype, cuda_graph| {
        let config = LoraConfig {
            rank: 3,
            dropout: 0.1,
            use_dora: true,
            target_modules: Some(TargetModules::List(
                ["q_proj", "lm_head"].map(String::from).into(),
            )),
            ..LoraConfig::default()
        };
        let adapter = LoraAdapter::new(config, "llama").expect("valid");
        with_adapter(base.path(), Box::new(adapter), dtype, cuda_graph)
    };
    for dtype in [DType::F32, DType::Bf16] {
        let ((issued, none), (replayed, graphs)) = (run(dtype, false), run(dtype, true));
        assert!(none == 0 && graphs >= 1, "{dtype}: {graphs} graphs");
        assert_eq!(issued.reports, replayed.reports, "{dtype}");
        assert!(issued.bits == replayed.bits, "{dtype}: other values");
        assert_eq!(replayed.allocations, 0, "{dtype}");
    }
}

#[test]
fn a_method_that_computes_on_the_host_is_issued() {
    let (_, graphs) = with_adapter(base().path(), Box::new(OutputScaling), DType::F32, true);
    assert_eq!(graphs, 0);
}

#[test]
fn values_that_are_replaced_from_outside_are_heeded_by_later_steps() {
    let base = base();
    let run = |cuda_graph| {
        let mut trainer = Case::new(cuda_graph).trainer(base.path(), &gpu(), Box::new(Solo));
        train(&mut trainer);
        for value in trainer.params_mut().as_mut_slice() {
            *value *= 0.5;
        }
        let mut reports = Vec::new();
        for _ in 0..4 {
            reports.push(trainer.step(&batches(1), 1e-2).expect("step"));
            // A longer batch than the trainer was made for: the pool grows, its old buffers go.
            let documents = examples(40, Shape::default().vocab, SEED);
            let long = documents.iter().enumerate().map(|(i, d)| (i as u64, d));
            reports.push(
                trainer
                    .step(&[PackedBatch::pack(long)], 1e-2)
                    .expect("step"),
            );
        }
        // The gradient is read through its own buffer, which a replay writes behind its back.
        let gradient = trainer.grads().as_slice().to_vec();
        reports.push(trainer.step(&batches(1), 1e-2).expect("step"));
        let next = trainer.grads().as_slice().to_vec();
        assert_ne!(gradient, next);
        (reports, next)
    };
    assert_eq!(run(false), run(true));
}

/// Peers sum the gradient of the last micro-batch of a step while it is computed, so that one is issued; those before
/// it are recorded, on every rank.
#[test]
fn several_ranks_record_all_micro_batches_but_the_last() {
    let base = base();
    let run = |cuda_graph| {
        let groups = Local::group(2, Duration::from_secs(60));
        std::thread::scope(|scope| {
            let ranks = groups.into_iter().enumerate().map(|(rank, group)| {
                let base = base.path();
                scope.spawn(move || {
                    let case = Case::new(cuda_graph);
                    let mut trainer = case.trainer(base, &gpu(), Box::new(group));
                    trainer.rehearse(&sizes()).expect("rehearses");
                    let step = |i| trainer.step(&batches(2 * i + rank), 1e-2).expect("step");
                    let reports: Vec<StepReport> = (0..STEPS / 2).map(step).collect();
                    let graphs = trainer.recorded_graphs();
                    assert!(graphs >= 1 || !cuda_graph, "rank {rank}: no graph");
                    assert!(graphs == 0 || cuda_graph, "rank {rank}: {graphs} graphs");
                    let params = trainer.params().as_slice();
                    let bits: Vec<u32> = params.iter().map(|v| v.to_bits()).collect();
                    (reports, bits)
                })
            });
            let ranks: Vec<_> = ranks.collect();
            let joined = ranks.into_iter().map(|rank| rank.join().expect("a rank"));
            joined.collect::<Vec<_>>()
        })
    };
    let (issued, replayed) = (run(false), run(true));
    assert_eq!(issued, replayed);
    assert_eq!(issued[0].1, issued[1].1, "ranks part");
}
