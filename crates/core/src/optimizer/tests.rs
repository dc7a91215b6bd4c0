use super::{NOT_HERE, OPTIMIZERS, OptimizerChoice, Shared, Step, TensorStates};
use crate::params::{FlatBuffer, ParamLayout, ParamLayoutBuilder, ParamSpec};
use ferrotune_kernels::adamw::AdamW;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// A matrix large enough for moments in bytes, whose last block is not whole, a stack of matrices, and a vector.
fn layout() -> Arc<ParamLayout> {
    let mut builder = ParamLayoutBuilder::new();
    builder.add(ParamSpec::new("matrix", [67, 65], 0));
    builder.add(ParamSpec::new("stack", [2, 3, 5], 1));
    builder.add(ParamSpec::new("vector", [7], 2));
    builder.build().expect("unique names")
}

fn optimizer(name: &str) -> Option<Arc<dyn super::Optimizer>> {
    let entry = OPTIMIZERS.iter().find(|entry| entry.name == name)?;
    let shared = Shared {
        adam: AdamW::default(),
    };
    match entry
        .build(&shared, &BTreeMap::new())
        .expect("without arguments")
    {
        OptimizerChoice::PerTensor(optimizer) => Some(optimizer),
        OptimizerChoice::AdamW(_) => None,
    }
}

/// Every optimizer that is no kernel.
fn per_tensor() -> Vec<(&'static str, Arc<dyn super::Optimizer>)> {
    let named = OPTIMIZERS.iter().map(|entry| entry.name);
    named
        .filter_map(|name| Some((name, optimizer(name)?)))
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
                let mut states = TensorStates::new(Arc::clone(&optimizer), &layout);
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
        let mut states = TensorStates::new(Arc::clone(&optimizer), &layout);
        steps(&mut states, &mut params, 1..=3);
        let mut continued = params.clone();
        let mut restored = TensorStates::new(optimizer, &layout);
        let kept: BTreeMap<_, _> = states.tensors().collect();
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
        let planned: u64 = segments.map(|s| choice.state_bytes(&s.spec.shape)).sum();
        let states = TensorStates::new(optimizer, &layout);
        let held: usize = states.tensors().map(|(_, tensor)| tensor.bytes.len()).sum();
        assert_eq!(planned, held as u64, "{name}");
    }
    let bytes = |name| {
        let optimizer = optimizer(name).expect("no kernel");
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
    let mut states = TensorStates::new(Arc::new(super::Elementwise(rule)), &layout);
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
