use super::{AdamW, Group, global_norm, step};
use crate::test_support::{
    assert_close, assert_same_bits, assert_same_on_any_thread_count, flat, normal,
};
use std::collections::HashMap;

/// Ten steps of `torch.optim.AdamW` (PyTorch 2.15, lr 0.01, betas 0.9 and 0.95, weight decay 0.1)
/// on three tensors with fixed gradients: `pJ` the start, `stepK.gJ`, `adamw.afterN.pJ`.
const PYTORCH: &[u8] = include_bytes!("../../fixtures/adamw/pytorch.safetensors");

struct State {
    params: Vec<f32>,
    m: Vec<f32>,
    v: Vec<f32>,
}

impl State {
    fn new(params: Vec<f32>) -> Self {
        let (m, v) = (vec![0.0; params.len()], vec![0.0; params.len()]);
        Self { params, m, v }
    }

    fn step(&mut self, cfg: &AdamW, grads: &[f32], grad_scale: f32, groups: &[Group]) {
        let Self { params, m, v } = self;
        step(cfg, params, grads, grad_scale, m, v, groups).unwrap();
    }
}

fn joined(file: &HashMap<String, candle_core::Tensor>, prefix: &str) -> Vec<f32> {
    let tensors = (0..3).map(|j| flat(&file[&format!("{prefix}{j}")]));
    tensors.flatten().collect()
}

#[test]
fn ten_steps_match_pytorch() {
    let file = candle_core::safetensors::load_buffer(PYTORCH, &candle_core::Device::Cpu).unwrap();
    let cfg = AdamW {
        beta2: 0.95,
        ..AdamW::default()
    };
    let mut state = State::new(joined(&file, "p"));
    let sizes = [35, 11, 60];
    for k in 0..10_u64 {
        let mut end = 0;
        let groups = sizes.map(|size| {
            end += size;
            Group {
                range: end - size..end,
                lr: 0.01,
                weight_decay: 0.1,
                step: k + 1,
            }
        });
        // A factor that grad_scale takes out again, exactly.
        let grads: Vec<f32> = joined(&file, &format!("step{k}.g"))
            .iter()
            .map(|g| g * 8.0)
            .collect();
        state.step(&cfg, &grads, 0.125, &groups);
        if [1, 2, 10].contains(&(k + 1)) {
            let want = joined(&file, &format!("adamw.after{}.p", k + 1));
            // Ten steps of f32 roundings on both sides.
            assert_close(
                &state.params,
                &want,
                3e-7,
                &format!("after {} steps", k + 1),
            );
        }
    }
}

#[test]
fn groups_with_their_own_rates_match_an_f64_reference() {
    let cfg = AdamW {
        beta1: 0.8,
        beta2: 0.99,
        eps: 1e-6,
    };
    let (len, start) = (257, normal(1, 257));
    let mut state = State::new(start.clone());
    let mut reference: Vec<[f64; 3]> = start.iter().map(|&p| [f64::from(p), 0.0, 0.0]).collect();
    for k in 1..=5 {
        let grads = normal(k + 10, len);
        // Out of order, a gap from 123 to 130, an empty one, different rates and step counts.
        let group = |range, lr, weight_decay, step| Group {
            range,
            lr,
            weight_decay,
            step,
        };
        let groups = [
            group(130..257, 3e-3, 0.0, k + 7),
            group(0..1, 1e-2, 0.1, k),
            group(64..64, 1.0, 1.0, 1),
            group(1..123, 0.0, 0.5, k),
        ];
        state.step(&cfg, &grads, 0.5, &groups);
        for group in &groups {
            for i in group.range.clone() {
                let [p, m, v] = &mut reference[i];
                let g = f64::from(grads[i]) * 0.5;
                *p *= 1.0 - group.lr * group.weight_decay;
                *m = cfg.beta1 * *m + (1.0 - cfg.beta1) * g;
                *v = cfg.beta2 * *v + (1.0 - cfg.beta2) * g * g;
                let bias = |beta: f64| 1.0 - beta.powi(group.step as i32);
                let root = v.sqrt() / bias(cfg.beta2).sqrt();
                *p -= group.lr / bias(cfg.beta1) * *m / (root + cfg.eps);
            }
        }
    }
    let column = |c: usize| -> Vec<f32> { reference.iter().map(|r| r[c] as f32).collect() };
    assert_close(&state.params, &column(0), 5e-7, "params");
    assert_close(&state.m, &column(1), 1e-6, "m");
    assert_close(&state.v, &column(2), 1e-6, "v");
    assert_same_bits(
        &state.params[123..130],
        &start[123..130],
        "params of no group",
    );
    assert!(state.m[123..130].iter().all(|&m| m == 0.0));
    assert_same_bits(
        &state.params[1..123],
        &start[1..123],
        "params at a rate of zero",
    );
}

#[test]
fn the_norm_is_euclidean_and_keeps_nan() {
    for len in [0, 1, 3, 64, 123, 32 * 1024, 100_001] {
        let values = normal(3, len);
        let squares: f64 = values.iter().map(|&v| f64::from(v).powi(2)).sum();
        let (got, want) = (global_norm(&values), squares.sqrt());
        // The reference adds one by one: its own rounding grows with the length.
        assert!(
            (got - want).abs() <= 1e-13 * want,
            "{len}: {got}, expected {want}"
        );
    }
    // The square of the largest f32 is far inside f64.
    assert_eq!(global_norm(&[f32::MAX]), f64::from(f32::MAX));
    assert!(global_norm(&[1.0, f32::NAN]).is_nan());
    assert_eq!(global_norm(&[1.0, f32::NEG_INFINITY]), f64::INFINITY);
}

#[test]
fn results_do_not_depend_on_the_thread_count() {
    let (start, grads) = (normal(1, 200_003), normal(2, 200_003));
    let group = |range, step| Group {
        range,
        lr: 1e-3,
        weight_decay: 0.01,
        step,
    };
    let groups = [group(0..77_777, 1), group(77_777..200_003, 3)];
    assert_same_on_any_thread_count(|| {
        let norm = global_norm(&grads).to_bits();
        let words = [norm as u32, (norm >> 32) as u32].map(f32::from_bits);
        let mut state = State::new(start.clone());
        state.step(&AdamW::default(), &grads, 0.5, &groups);
        vec![words.to_vec(), state.params, state.m, state.v]
    });
}

#[test]
fn an_empty_buffer_is_legal() {
    let mut state = State::new(Vec::new());
    state.step(&AdamW::default(), &[], 1.0, &[]);
}

#[test]
fn wrong_arguments_are_refused_and_change_nothing() {
    let group = |range, step| Group {
        range,
        lr: 1.0,
        weight_decay: 0.0,
        step,
    };
    let refused = |cfg: &AdamW, grads: &[f32], groups: &[Group]| {
        let mut state = State::new(vec![1.0; 4]);
        let State { params, m, v } = &mut state;
        let error = step(cfg, params, grads, 1.0, m, v, groups).unwrap_err();
        assert!(state.params == [1.0; 4] && state.m == [0.0; 4] && state.v == [0.0; 4]);
        error.to_string()
    };
    let (cfg, grads) = (AdamW::default(), [1.0; 4]);
    assert_eq!(
        refused(&cfg, &grads[1..], &[]),
        "adamw::step: grads has 3 elements, expected 4"
    );
    assert_eq!(
        refused(&cfg, &grads, &[group(0..2, 1), group(1..4, 1)]),
        "adamw::step: group 1..4 overlaps the one before it, which ends at 2"
    );
    assert!(refused(&cfg, &grads, &[group(2..5, 1)]).contains("ends after the 4 parameters"));
    assert!(refused(&cfg, &grads, &[group(0..4, 0)]).contains("step 0"));
    let cfg = AdamW { beta2: 1.0, ..cfg };
    assert!(refused(&cfg, &grads, &[group(0..4, 1)]).contains("[0, 1)"));
}
