use super::{NOT_HERE, OPTIMIZERS, OptimizerChoice, Shared, Step, TensorStates};
use crate::params::{FlatBuffer, ParamLayout, ParamLayoutBuilder, ParamSpec, Segment};
use ferrotune_kernels::adamw::AdamW;
use ferrotune_kernels::adamw::cuda::{Settings, Update};
use ferrotune_kernels::optimizer::cuda::Buffers;
use ferrotune_kernels::{Device, host_cuda};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// A matrix large enough for moments in bytes, whose last block is not whole, a stack of matrices, and a vector.
fn layout() -> Arc<ParamLayout> {
    let mut builder = ParamLayoutBuilder::new();
    builder.add(ParamSpec::new("matrix", [67, 65], 0));
    builder.add(ParamSpec::new("embed_tokens.weight", [70, 65], 0));
    builder.add(ParamSpec::new("stack", [2, 3, 5], 1));
    builder.add(ParamSpec::new("vector", [7], 2));
    builder.build().expect("unique names")
}

fn optimizer(name: &str, args: &BTreeMap<String, Value>) -> Option<Arc<dyn super::Optimizer>> {
    let entry = OPTIMIZERS.iter().find(|entry| entry.name == name)?;
    let shared = Shared {
        adam: AdamW::default(),
    };
    match entry.build(&shared, args).expect("valid arguments") {
        OptimizerChoice::PerTensor(optimizer) => Some(optimizer),
        OptimizerChoice::AdamW(_) => None,
    }
}

/// Every optimizer that is no kernel.
fn per_tensor() -> Vec<(&'static str, Arc<dyn super::Optimizer>)> {
    let named = OPTIMIZERS.iter().map(|entry| entry.name);
    named
        .filter_map(|name| Some((name, optimizer(name, &BTreeMap::new())?)))
        .collect()
}

/// Where the minimum of the tests' objective is.
fn target(i: usize) -> f32 {
    ((i * 37) % 101) as f32 / 50.0 - 1.0
}

fn start(layout: &Arc<ParamLayout>) -> FlatBuffer {
    let mut params = FlatBuffer::zeros(layout);
    let ids: Vec<_> = layout.by_name().map(|(id, _)| id).collect();
    for id in ids {
        params
            .get_mut(id)
            .iter_mut()
            .enumerate()
            .for_each(|(i, p)| *p = (i % 13) as f32 / 13.0);
    }
    params
}

fn loss(params: &FlatBuffer) -> f64 {
    let values = params.as_slice().iter().enumerate();
    values
        .map(|(i, p)| f64::from((p - target(i)).powi(2)))
        .sum()
}

/// Steps of gradient descent on the distance from the target; the sums are over two tokens.
fn steps(
    states: &mut TensorStates,
    params: &mut FlatBuffer,
    numbers: std::ops::RangeInclusive<u64>,
) {
    for number in numbers {
        let grads: Vec<f32> = {
            let values = params.as_slice().iter().enumerate();
            values.map(|(i, p)| 2.0 * (p - target(i))).collect()
        };
        let step = Step {
            lr: 0.02,
            weight_decay: 0.01,
            number,
        };
        let updated = states.update(params.as_mut_slice(), &grads, 0.5, |_| step);
        updated.expect("an update");
    }
}

fn in_threads<T: Send>(threads: usize, body: impl FnOnce() -> T + Send) -> T {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    pool.expect("threads").install(body)
}

#[test]
fn every_optimizer_descends_to_the_same_bits_on_any_number_of_threads() {
    let layout = layout();
    for (name, optimizer) in per_tensor() {
        let run = |threads| {
            in_threads(threads, || {
                let mut params = start(&layout);
                let mut states = TensorStates::new(Arc::clone(&optimizer), &layout, &Device::Cpu)
                    .expect("host memory");
                steps(&mut states, &mut params, 1..=20);
                params
            })
        };
        let (one, three) = (run(1), run(3));
        assert_eq!(one.as_slice(), three.as_slice(), "{name}");
        let (before, after) = (loss(&start(&layout)), loss(&one));
        assert!(after < before, "{name}: {before} before, {after} after");
    }
}

#[test]
fn every_optimizer_goes_on_from_its_state_to_the_same_bits() {
    let layout = layout();
    for (name, optimizer) in per_tensor() {
        let mut params = start(&layout);
        let mut states =
            TensorStates::new(Arc::clone(&optimizer), &layout, &Device::Cpu).expect("host memory");
        steps(&mut states, &mut params, 1..=3);
        let mut continued = params.clone();
        let mut restored =
            TensorStates::new(optimizer, &layout, &Device::Cpu).expect("host memory");
        let kept: BTreeMap<_, _> = states.tensors().into_iter().collect();
        for (tensor, bytes) in restored.bytes_mut() {
            bytes.copy_from_slice(&kept[&tensor].bytes);
        }
        drop(kept);
        steps(&mut states, &mut params, 4..=9);
        steps(&mut restored, &mut continued, 4..=9);
        assert_eq!(params.as_slice(), continued.as_slice(), "{name}");
    }
}

#[test]
fn state_takes_the_bytes_that_are_planned_for_it() {
    let layout = layout();
    for (name, optimizer) in per_tensor() {
        let choice = OptimizerChoice::PerTensor(Arc::clone(&optimizer));
        let segments = layout.physical().map(|(_, segment)| segment);
        let planned: u64 = segments.map(|s| choice.state_bytes_of(&s.spec)).sum();
        let states = TensorStates::new(optimizer, &layout, &Device::Cpu).expect("host memory");
        let held: usize = states
            .tensors()
            .iter()
            .map(|(_, tensor)| tensor.bytes.len())
            .sum();
        assert_eq!(planned, held as u64, "{name}");
    }
    let bytes = |name| {
        let optimizer = optimizer(name, &BTreeMap::new()).expect("no kernel");
        OptimizerChoice::PerTensor(optimizer).state_bytes(&[67, 65])
    };
    // Two bytes an element and two scales for each of 18 blocks; of Adafactor a vector for each side.
    assert_eq!(bytes("adamw_8bit"), 2 * 67 * 65 + 2 * 4 * 18);
    assert_eq!(bytes("lion_8bit"), 67 * 65 + 4 * 18);
    assert_eq!(bytes("adafactor"), 4 * (67 + 65));
    assert_eq!(bytes("sgd"), 0);
}

#[test]
fn a_centered_mean_square_below_the_square_of_the_mean_is_no_nan() {
    let layout = layout();
    let rule = super::RmsProp {
        alpha: 0.3,
        centered: true,
        ..super::RmsProp::default()
    };
    let mut states = TensorStates::new(Arc::new(super::Elementwise(rule)), &layout, &Device::Cpu)
        .expect("host memory");
    let mut params = start(&layout);
    // The same in every step: both averages come to the same square, up to rounding.
    let grads: Vec<f32> = (0..layout.len()).map(|i| 0.1 + i as f32 / 7.0).collect();
    for number in 1..=100 {
        let step = Step {
            lr: 1e-12,
            weight_decay: 0.0,
            number,
        };
        let updated = states.update(params.as_mut_slice(), &grads, 1.0, |_| step);
        updated.expect("an update");
    }
    assert!(params.as_slice().iter().all(|value| value.is_finite()));
}

#[test]
fn an_optimizer_reads_the_keys_that_it_says() {
    let built = |entry: &super::OptimizerEntry, adam: AdamW| {
        format!("{:?}", entry.build(&Shared { adam }, &BTreeMap::new()))
    };
    let plain = AdamW::default();
    let others = [
        AdamW {
            beta1: 0.5,
            ..plain
        },
        AdamW {
            beta2: 0.5,
            ..plain
        },
        AdamW { eps: 0.5, ..plain },
    ];
    for entry in OPTIMIZERS {
        for (key, other) in super::ADAM_KEYS.into_iter().zip(others) {
            let differs = built(entry, plain) != built(entry, other);
            assert_eq!(differs, entry.reads.contains(&key), "{} {key}", entry.name);
        }
    }
}

#[test]
fn names_are_unique_and_those_of_transformers_are_here_or_said_not_to_be() {
    let here = OPTIMIZERS.iter().map(|entry| entry.name);
    let names: Vec<&str> = here.chain(NOT_HERE.iter().map(|(name, _)| *name)).collect();
    assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len());
    // transformers.training_args.OptimizerNames (5.24).
    for name in TRANSFORMERS {
        assert!(names.contains(&name), "{name}");
    }
}

const TRANSFORMERS: [&str; 41] = [
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_torch_xla",
    "adamw_torch_npu_fused",
    "adafactor",
    "adamw_anyprecision",
    "adamw_torch_4bit",
    "adamw_torch_8bit",
    "ademamix",
    "sgd",
    "adagrad",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "ademamix_8bit",
    "lion_8bit",
    "lion_32bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "rmsprop",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
    "galore_adamw",
    "galore_adamw_8bit",
    "galore_adafactor",
    "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise",
    "galore_adafactor_layerwise",
    "lomo",
    "adalomo",
    "grokadamw",
    "schedule_free_radam",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "apollo_adamw",
    "apollo_adamw_layerwise",
    "stable_adamw",
];

/// What [`OPTIMIZERS`] has a kernel for, with arguments that take other ways through it.
const WITH_KERNELS: [(&str, &[(&str, bool)]); 17] = [
    ("adam", &[]),
    ("adam", &[("amsgrad", true)]),
    ("adamw_8bit", &[]),
    ("adagrad", &[]),
    ("adadelta", &[]),
    ("adamax", &[]),
    ("ademamix", &[]),
    ("ademamix_8bit", &[]),
    ("lion_32bit", &[]),
    ("lion_8bit", &[]),
    ("nadam", &[]),
    ("radam", &[]),
    ("rmsprop", &[("momentum", true), ("centered", true)]),
    ("rmsprop", &[("centered", true)]),
    ("rmsprop_bnb_8bit", &[]),
    ("sgd", &[]),
    ("sgd", &[("momentum", true), ("nesterov", true)]),
];

#[test]
fn cuda_changes_values_and_state_by_the_same_bits() {
    let device = Device::Cuda(host_cuda::device());
    let Device::Cuda(cuda) = &device else {
        unreachable!("a stand-in is one");
    };
    for (name, args) in WITH_KERNELS {
        let what = format!("{name} {args:?}");
        let value = |(key, value): &(&str, bool)| match *key {
            "momentum" => ("momentum".to_owned(), json!(0.9)),
            key => (key.to_owned(), json!(value)),
        };
        let optimizer = optimizer(name, &args.iter().map(value).collect()).expect(name);
        assert!(optimizer.on_gpu().is_some(), "{what}");
        let layout = layout();
        let on = |device| TensorStates::new(Arc::clone(&optimizer), &layout, device).expect("room");
        let (mut ours, mut theirs) = (on(&Device::Cpu), on(&device));
        let (mut values, mut moved) = (start(&layout), start(&layout));
        moved.move_to(&device);
        let mut norm = Update::new(cuda, layout.len(), 1);
        for number in 1..=7 {
            // Decay for one tensor, and another rate in every step.
            let step = |segment: &Segment| Step {
                lr: 0.01 / number as f64,
                weight_decay: if segment.spec.name == "matrix" {
                    0.1
                } else {
                    0.0
                },
                number,
            };
            let mut grads = FlatBuffer::zeros(&layout);
            let random =
                (0_u64..).map(|i| ((i * 7919 + number * 104_729) % 1009) as f32 / 50.0 - 10.0);
            for (g, random) in grads.as_mut_slice().iter_mut().zip(random) {
                *g = random;
            }
            let scale = 0.25_f32;
            ours.update(values.as_mut_slice(), grads.as_slice(), scale, step)
                .expect("a step");
            grads.move_to(&device);
            let settings = Settings {
                adamw: AdamW::default(),
                divisor: 4.0,
                max_norm: None,
            };
            norm.set(&settings, &[]).expect("valid");
            norm.norm_and_scale(grads.home(), None).expect("a norm");
            theirs.set(step).expect("room");
            let buffers = Buffers {
                params: moved.home_mut(),
                grads: grads.home(),
                shadow: None,
            };
            theirs.issue(&norm, buffers).expect("a step");
            // As a checkpoint does, which another run takes.
            if number == 4 {
                let kept: Vec<_> = theirs
                    .tensors()
                    .into_iter()
                    .map(|(_, t)| t.bytes.into_owned())
                    .collect();
                theirs = on(&device);
                for ((_, to), from) in theirs.bytes_mut().zip(kept) {
                    to.copy_from_slice(&from);
                }
            }
            let bits = |buffer: &FlatBuffer| -> Vec<u32> {
                buffer.as_slice().iter().map(|v| v.to_bits()).collect()
            };
            assert!(
                bits(&values) == bits(&moved),
                "{what}: values of step {number}"
            );
            for ((name, ours), (_, theirs)) in ours.tensors().iter().zip(theirs.tensors()) {
                assert!(
                    ours.bytes == theirs.bytes,
                    "{what}: {name} of step {number}"
                );
            }
        }
    }
}

#[test]
fn cuda_changes_nothing_by_what_is_not_finite() {
    let device = Device::Cuda(host_cuda::device());
    let Device::Cuda(cuda) = &device else {
        unreachable!("a stand-in is one");
    };
    let (layout, optimizer) = (
        layout(),
        optimizer("adamw_8bit", &BTreeMap::new()).expect("known"),
    );
    let mut states = TensorStates::new(optimizer, &layout, &device).expect("room");
    let (mut params, mut grads) = (start(&layout), start(&layout));
    grads.as_mut_slice()[3] = f32::NAN;
    params.move_to(&device);
    grads.move_to(&device);
    let mut norm = Update::new(cuda, layout.len(), 1);
    let settings = Settings {
        adamw: AdamW::default(),
        divisor: 1.0,
        max_norm: Some(1.0),
    };
    norm.set(&settings, &[]).expect("valid");
    norm.norm_and_scale(grads.home(), None).expect("a norm");
    let step = Step {
        lr: 0.1,
        weight_decay: 0.1,
        number: 1,
    };
    states.set(|_| step).expect("room");
    let buffers = Buffers {
        params: params.home_mut(),
        grads: grads.home(),
        shadow: None,
    };
    states.issue(&norm, buffers).expect("a step");
    assert!(params.as_slice() == start(&layout).as_slice());
    let kept = states.tensors();
    assert!(
        kept.iter()
            .all(|(_, state)| state.bytes.iter().all(|byte| *byte == 0))
    );
}
