//! The GPU against the CPU: the same bits, since every operation is rounded the same way.

use super::cuda::{Buffers, Outcome, Settings, Update};
use super::{AdamW, Group, global_norm, step};
use crate::linear_cross_entropy::Accumulator;
use crate::test_support::{assert_same_bits, cuda_device, normal};
use crate::{DType, Device, Tensor};

const SETTINGS: Settings = Settings {
    adamw: AdamW {
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
    },
    divisor: 13.0,
    max_norm: Some(0.5),
};

/// The flat buffers on a GPU, in the middle of longer ones.
struct State {
    device: Device,
    len: usize,
    /// Elements before the buffers: 1 makes them unaligned.
    before: usize,
    tensors: [Tensor; 5],
}

impl State {
    fn new(params: &[f32], before: usize) -> Self {
        let device = Device::Cuda(cuda_device());
        let len = params.len();
        let mut wide = vec![7.0; before + len + 3];
        wide[before..before + len].copy_from_slice(params);
        let tensor = |values: &[f32], dtype| {
            let values = Tensor::from_f32(values.to_vec(), 1, values.len());
            values.to_dtype(dtype).to_device(&device)
        };
        let empty = [&vec![7.0; before][..], &vec![0.0; len], &[7.0; 3]].concat();
        let f32s = [&wide, &empty, &empty, &empty].map(|values| tensor(values, DType::F32));
        let [params, grads, m, v] = f32s;
        let shadow = tensor(&wide, DType::Bf16);
        let tensors = [params, grads, m, v, shadow];
        Self {
            device,
            len,
            before,
            tensors,
        }
    }

    fn update(&self, max_groups: usize) -> Update {
        let Device::Cuda(device) = &self.device else {
            panic!("made on a GPU");
        };
        Update::new(device, self.len, max_groups)
    }

    fn set_grads(&mut self, grads: &[f32]) {
        let columns = self.before..self.before + self.len;
        let grads = Tensor::from_f32(grads.to_vec(), 1, self.len);
        self.tensors[1]
            .view_mut()
            .columns(columns)
            .copy_from(grads.view());
    }

    fn step(
        &mut self,
        update: &mut Update,
        loss: Option<&Accumulator>,
        zero_grads: bool,
    ) -> Outcome {
        let columns = self.before..self.before + self.len;
        let grads = self.tensors[1].view().columns(columns.clone());
        update.norm_and_scale(grads, loss).expect("valid arguments");
        let [params, grads, m, v, shadow] = self
            .tensors
            .each_mut()
            .map(|tensor| tensor.view_mut().columns(columns.clone()));
        let buffers = Buffers {
            params,
            grads,
            m,
            v,
            shadow: Some(shadow),
        };
        update.step(buffers, zero_grads).expect("valid arguments");
        update.read().expect("the GPU has not failed")
    }

    /// Parameters, gradients, moments, shadow; nothing around them was written.
    fn values(&self) -> [Vec<f32>; 5] {
        self.tensors.each_ref().map(|tensor| {
            let wide = tensor.to_f32_vec();
            let inside = self.before..self.before + self.len;
            for (i, value) in wide.iter().enumerate() {
                assert!(
                    inside.contains(&i) || *value == 7.0,
                    "element {i} was written"
                );
            }
            wide[inside].to_vec()
        })
    }
}

fn group(range: std::ops::Range<usize>, lr: f64, weight_decay: f64, step: u64) -> Group {
    Group {
        range,
        lr,
        weight_decay,
        step,
    }
}

/// Three steps on both devices.
fn check_steps(len: usize, before: usize, groups: &[Group]) {
    let what = format!("{len} elements from {before}, {groups:?}");
    let start = normal(1, len);
    let (mut params, mut m, mut v) = (start.clone(), vec![0.0; len], vec![0.0; len]);
    let mut state = State::new(&start, before);
    let mut update = state.update(groups.len());
    for k in 0..3 {
        let grads = normal(10 + k, len);
        let mut groups = groups.to_vec();
        groups.iter_mut().for_each(|group| group.step += k);
        let norm = global_norm(&grads) / SETTINGS.divisor;
        let clip = (0.5 / (norm + 1e-6)).min(1.0);
        let scale = (clip / SETTINGS.divisor) as f32;
        step(
            &SETTINGS.adamw,
            &mut params,
            &grads,
            scale,
            &mut m,
            &mut v,
            &groups,
        )
        .expect("valid");

        state.set_grads(&grads);
        update.set(&SETTINGS, &groups).expect("valid arguments");
        let outcome = state.step(&mut update, None, k == 1);
        assert!(outcome.finite, "{what}");
        // The partial sums are others than on the CPU.
        assert!(
            (outcome.norm - norm).abs() <= 1e-14 * norm,
            "{what}: {outcome:?}, {norm}"
        );
        let left = if k == 1 { vec![0.0; len] } else { grads };
        assert_same_bits(&state.values()[1], &left, &what);
    }
    let [got_params, _, got_m, got_v, shadow] = state.values();
    assert_same_bits(&got_params, &params, &what);
    assert_same_bits(&got_m, &m, &what);
    assert_same_bits(&got_v, &v, &what);
    let updated = |i: &usize| groups.iter().any(|group| group.range.contains(i));
    let rounded = Tensor::from_f32(params, 1, len)
        .to_dtype(DType::Bf16)
        .to_f32_vec();
    for i in (0..len).filter(updated) {
        assert_eq!(
            shadow[i].to_bits(),
            rounded[i].to_bits(),
            "{what}: shadow {i}"
        );
    }
}

#[test]
fn cuda_steps_have_the_bits_of_the_cpu() {
    let whole = |len: usize| vec![group(0..len, 1e-2, 0.1, 1)];
    for (len, before) in [(1, 0), (5, 1), (4096, 0), (9001, 0), (4099, 3)] {
        check_steps(len, before, &whole(len));
    }
    // Out of order, with a gap, an empty one, one that covers a whole span, odd bounds, own rates.
    let groups = [
        group(6000..11_001, 3e-3, 0.0, 7),
        group(0..1, 1e-2, 0.1, 1),
        group(64..64, 1.0, 1.0, 1),
        group(1..5, 0.0, 0.5, 2),
        group(7..130, 1e-2, 0.1, 1),
    ];
    for before in [0, 2, 4] {
        check_steps(11_003, before, &groups);
    }
}

#[test]
fn cuda_norm_has_the_same_bits_twice_and_stays_with_long_buffers() {
    let grads = normal(3, 200_003);
    let mut state = State::new(&grads, 0);
    let mut update = state.update(0);
    update.set(&SETTINGS, &[]).expect("valid arguments");
    state.set_grads(&grads);
    let (first, second) = (
        state.step(&mut update, None, false),
        state.step(&mut update, None, false),
    );
    assert_eq!(first.norm.to_bits(), second.norm.to_bits());
    let want = global_norm(&grads) / SETTINGS.divisor;
    assert!((first.norm - want).abs() <= 1e-13 * want);
}

#[test]
fn cuda_skips_the_update_when_norm_or_loss_is_not_finite() {
    let start = normal(1, 5000);
    for (bad_grad, bad_loss) in [(f32::NAN, 0.0), (f32::INFINITY, 0.0), (1.0, f64::NAN)] {
        let mut state = State::new(&start, 0);
        let before = state.values();
        let mut update = state.update(1);
        let settings = [group(0..5000, 1e-2, 0.1, 1)];
        update.set(&SETTINGS, &settings).expect("valid arguments");
        let mut grads = normal(2, 5000);
        grads[4321] = bad_grad;
        state.set_grads(&grads);
        let loss = Accumulator::new(&state.device);
        let memory = loss.memory().expect("on the GPU");
        let uploaded = memory
            .device()
            .upload(memory.ptr(), &f64::to_le_bytes(bad_loss));
        uploaded.expect("the GPU has not failed");
        let outcome = state.step(&mut update, Some(&loss), true);
        assert!(!outcome.finite, "{bad_grad} {bad_loss}");
        let after = state.values();
        for (i, (after, before)) in after.iter().zip(&before).enumerate() {
            if i != 1 {
                assert_same_bits(after, before, "what must not change");
            }
        }
        assert!(
            after[1].iter().all(|&g| g == 0.0),
            "gradients are cleared all the same"
        );
    }
}

#[test]
fn cuda_without_a_largest_norm_never_clips() {
    let start = normal(1, 100);
    let grads = vec![1e3; 100];
    let settings = Settings {
        max_norm: None,
        divisor: 1.0,
        ..SETTINGS
    };
    let groups = [group(0..100, 1e-2, 0.0, 1)];
    let mut state = State::new(&start, 0);
    let mut update = state.update(1);
    update.set(&settings, &groups).expect("valid arguments");
    state.set_grads(&grads);
    let outcome = state.step(&mut update, None, false);
    assert_eq!(
        outcome,
        Outcome {
            norm: 1e4,
            finite: true
        }
    );
    let (mut params, mut m, mut v) = (start, vec![0.0; 100], vec![0.0; 100]);
    step(
        &settings.adamw,
        &mut params,
        &grads,
        1.0,
        &mut m,
        &mut v,
        &groups,
    )
    .expect("valid");
    assert_same_bits(&state.values()[2], &m, "first moment");
}

#[test]
fn cuda_refuses_what_does_not_fit() {
    let mut state = State::new(&[1.0; 8], 0);
    let mut update = state.update(1);
    let two = [group(0..2, 1.0, 0.0, 1), group(2..4, 1.0, 0.0, 1)];
    let error = update
        .set(&SETTINGS, &two)
        .expect_err("refused")
        .to_string();
    assert!(error.contains("2 groups, made for 1"), "{error}");
    assert!(update.set(&SETTINGS, &[group(4..9, 1.0, 0.0, 1)]).is_err());
    assert!(
        update
            .norm_and_scale(state.tensors[0].view(), None)
            .is_err(),
        "too long"
    );
    let host = Tensor::zeros(DType::F32, 1, 8);
    let error = update
        .norm_and_scale(host.view(), None)
        .expect_err("refused");
    assert!(error.to_string().contains("different devices"), "{error}");
    let bf16 = state.tensors[4].view_mut().columns(0..8);
    assert!(update.norm_and_scale(bf16.as_view(), None).is_err(), "bf16");
}
