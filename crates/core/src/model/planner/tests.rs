use super::*;
use crate::model::HfConfig;
use serde_json::json;
use std::path::Path;

const TOKENS: usize = 16384;
const LAYERS: usize = 32;
/// Of a layer and token: weights of its linears, and S H E of attention.
const WEIGHTS: f64 = (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336) as f64;
const ATTENTION: f64 = (TOKENS * 4096) as f64;
/// Of a step and token, head included.
const STEP: f64 = LAYERS as f64 * (4.0 * WEIGHTS + 7.0 * ATTENTION) + 4.0 * 128_256.0 * 4096.0;
/// The stream and its norm's statistics, in bf16 and f32; q, k, v, attention's output, log-sum-exp; gate and up.
const INPUT: f64 = (2 * 4096 + 4) as f64;
const WITHOUT_GATE_UP: f64 = 2.0 * INPUT + (2 * (6144 + 4096) + 4 * 32) as f64;
const ALL: f64 = WITHOUT_GATE_UP + (2 * 2 * 14336) as f64;

/// A step in the shape of Llama-3.1-8B, one document of 16384 tokens, whose embedding is trained so that all layers are
/// reached.
fn step() -> StepShape {
    let config = json!({
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_hidden_layers": LAYERS, "vocab_size": 128_256, "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0, "max_position_embeddings": 131_072, "tie_word_embeddings": false,
    });
    let config = HfConfig::from_value(Path::new("config.json"), config).expect("an object");
    let config = DecoderConfig::from_hf(&config).expect("known");
    let workload = Workload {
        tokens: TOKENS,
        documents: 1,
        label_rows: [TOKENS].into(),
        mean_length: TOKENS as f64,
        sizes: Vec::new(),
    };
    let mut step = StepShape::new(&config, &[], &Device::Cpu, [DType::Bf16; 2], &workload);
    step.on_gpu = true;
    step.input_trained = true;
    step
}

fn memory(device: u64, host: u64) -> StepMemory {
    StepMemory { device, host }
}

fn assert_near(a: f64, b: f64) {
    assert!((a - b).abs() <= 1e-9 * b.abs(), "{a} and {b}");
}

#[test]
fn what_moves_is_waited_for_where_it_takes_longer_than_the_layer_above() {
    let step = step().with_offloading();
    let moved = (LAYERS - 2) as f64;
    // 500e12 operations a second for 20e9 bytes.
    let moving = |bytes: f64| 25_000.0 * bytes;
    let forward = 2.0 * WEIGHTS + 2.0 * ATTENTION;
    let backward = 2.0 * WEIGHTS + 5.0 * ATTENTION;
    let plan = |keep| step.predict(&[keep; LAYERS]);

    let all = plan(Keep::All);
    assert_eq!(all.host, (moved * ALL) as u64 * TOKENS as u64);
    let waits = 2.0 * moving(ALL) - forward - backward;
    assert_near(all.waiting, moved * waits / STEP);

    // Back it comes beside a backward that computes gate and up again.
    let dropped = plan(Keep::DropGateUp);
    assert_eq!(
        dropped.host,
        (moved * WITHOUT_GATE_UP) as u64 * TOKENS as u64
    );
    assert!(moving(WITHOUT_GATE_UP) < backward + 4.0 * 4096.0 * 14336.0);
    assert_near(
        dropped.waiting,
        moved * (moving(WITHOUT_GATE_UP) - forward) / STEP,
    );

    let input = plan(Keep::Input);
    assert_eq!(input.host, (moved * INPUT) as u64 * TOKENS as u64);
    assert_eq!(input.waiting, 0.0);
}

#[test]
fn nothing_moves_where_everything_finds_room() {
    let step = step();
    let everything = step.predict(&[]);
    let plan = step.plan_beside_host(memory(everything.bytes.total(), u64::MAX));
    assert_eq!(plan, everything);
    assert_eq!(plan.offloaded, 0);
}

#[test]
fn layers_move_where_nothing_else_fits_and_the_host_has_room() {
    let step = step();
    let smallest = step.smallest();
    let bytes = smallest.bytes.total() - (1 << 30);
    let plan = step.plan_beside_host(memory(bytes, u64::MAX));
    assert!(plan.offloaded > 0 && plan.bytes.total() <= bytes);
    assert_eq!(plan.waiting, 0.0, "inputs of layers hide");
    // Of as much room on the host, none and all.
    assert_eq!(step.plan_beside_host(memory(bytes, plan.host)), plan);
    assert_eq!(step.plan_beside_host(memory(bytes, 0)), smallest);
    let mut on_cpu = step;
    on_cpu.on_gpu = false;
    assert_eq!(
        on_cpu.plan_beside_host(memory(bytes, u64::MAX)),
        on_cpu.smallest()
    );
}

#[test]
fn layers_move_where_that_is_cheaper_than_to_compute_them_again() {
    let step = step();
    let (least, most) = (step.smallest(), step.predict(&[]));
    let between = most.bytes.total() - least.bytes.total();
    let mut cheaper = 0;
    for part in 0..8 {
        let bytes = least.bytes.total() + between / 8 * part;
        let (staying, plan) = (
            step.plan(memory(bytes, u64::MAX)),
            step.plan_beside_host(memory(bytes, u64::MAX)),
        );
        assert!(plan.bytes.total() <= bytes, "{part}");
        assert!(plan.cost() <= staying.cost(), "{part}");
        match plan.offloaded {
            0 => assert_eq!(plan, staying, "{part}"),
            _ => {
                assert!(plan.cost() < staying.cost(), "{part}");
                cheaper += 1;
            }
        }
    }
    assert!(cheaper > 0);
}

#[test]
fn layers_that_must_move_keep_no_more_than_the_host_has_room_for() {
    let step = step().with_offloading();
    let [everything, least] = [step.predict(&[]), step.smallest()];
    assert!(least.host < everything.host);
    for part in 0..=4 {
        let host = least.host + (everything.host - least.host) / 4 * part;
        let plan = step.plan(memory(u64::MAX, host));
        assert!(plan.host <= host, "{part}");
    }
    assert_eq!(step.plan(memory(u64::MAX, 0)), least);
}

#[test]
fn layers_that_must_move_drop_gate_and_up_where_that_takes_less_than_to_wait_for_them() {
    let step = step().with_offloading();
    let everything = step.predict(&[]);
    let mut keep = vec![Keep::DropGateUp; LAYERS - 2];
    keep.resize(LAYERS, Keep::All);
    let dropped = step.predict(&keep);
    assert!(dropped.cost() < everything.cost());
    let plan = step.plan(memory(u64::MAX, u64::MAX));
    assert!(plan.cost() <= dropped.cost());
}

#[test]
fn more_memory_costs_no_more() {
    let step = step();
    let (least, most) = (step.clone().with_offloading().smallest(), step.predict(&[]));
    let sizes = |most: u64| (0..=12).map(move |part| most / 12 * part);
    let plans = |host: u64| {
        let sizes = sizes(most.bytes.total() - least.bytes.total());
        let devices = sizes.map(|more| least.bytes.total() + more);
        devices
            .map(|device| (device, step.plan_beside_host(memory(device, host))))
            .collect()
    };
    let mut with_less: Option<Vec<(u64, ActivationPlan)>> = None;
    for host in sizes(most.bytes.kept) {
        let plans: Vec<(u64, ActivationPlan)> = plans(host);
        let held = |(device, plan): &(u64, ActivationPlan)| {
            memory(*device, host).holds(plan).then(|| plan.cost())
        };
        let costs: Vec<Option<f64>> = plans.iter().map(held).collect();
        for (one, other) in costs.iter().zip(&costs[1..]) {
            // Up to what moving must save.
            let dearer = one
                .zip(*other)
                .is_some_and(|(less, more)| more > less + 0.02 + 1e-9);
            assert!(
                !dearer && (one.is_none() || other.is_some()),
                "{host}: {costs:?}"
            );
        }
        for (cost, less) in costs.iter().zip(with_less.iter().flatten()) {
            let dearer = cost.is_none_or(|cost| cost > less.1.cost() + 0.02 + 1e-9);
            let held = memory(less.0, host).holds(&less.1);
            assert!(!held || !dearer, "{host}: {costs:?}");
        }
        with_less = Some(plans);
    }
}

/// Of a layer that is computed again, as long as it is.
#[test]
fn what_methods_keep_by_themselves_is_counted() {
    let plain = step();
    let mut own = step();
    for layer in &mut own.layers {
        layer.qkv.parts[0].method = Method::Custom { kept: 4096 };
        layer.gate_up.parts[0].method = Method::Custom { kept: 14336 };
    }
    let other = |step: &StepShape, keep| step.predict(&[keep; LAYERS]).bytes.other;
    for (keep, columns) in [
        (Keep::All, LAYERS * (4096 + 14336)),
        (Keep::DropGateUp, LAYERS * 4096 + 14336),
        (Keep::Input, 4096 + 14336),
    ] {
        let more = other(&own, keep) - other(&plain, keep);
        assert_eq!(more, (columns * 2 * TOKENS) as u64, "{keep:?}");
    }
}
