//! `torch.optim.AdamW` after `torch.nn.utils.clip_grad_norm_`: three steps, of which some are clipped.

use super::{Case, Recorded, Results, check, file, gpu};
use crate::adamw::cuda::{Buffers, Settings, Update};
use crate::adamw::{AdamW, Group, global_norm, step};
use crate::{DType, Device, Tensor};

pub(super) const CASES: &[Recorded] = &[file!("adamw", "_f32")];
const STEPS: u64 = 3;

#[test]
fn cpu_is_as_close_as_pytorch() {
    check(CASES, &Device::Cpu, on_cpu);
}

#[test]
fn cuda_is_as_close_as_pytorch() {
    check(CASES, &gpu(), on_gpu);
}

fn setting(case: &Case, name: &str) -> f64 {
    case.settings[name].as_f64().expect("a number")
}

fn settings(case: &Case) -> Settings {
    Settings {
        adamw: AdamW {
            beta1: setting(case, "beta1"),
            beta2: setting(case, "beta2"),
            eps: setting(case, "eps"),
        },
        divisor: setting(case, "divisor"),
        max_norm: Some(setting(case, "max_norm")),
    }
}

fn group(case: &Case, len: usize, step: u64) -> Group {
    Group {
        range: 0..len,
        lr: setting(case, "lr"),
        weight_decay: setting(case, "weight_decay"),
        step,
    }
}

fn gradients<'a>(case: &'a Case, device: &'a Device) -> impl Iterator<Item = (u64, Tensor)> + 'a {
    (0..STEPS).map(move |k| (k + 1, case.f32(&format!("d_params{k}"), device)))
}

fn on_cpu(case: &Case, device: &Device) -> Results {
    let settings = settings(case);
    let mut params = case.f32("params", device).to_f32_vec();
    let (mut m, mut v) = (vec![0.0; params.len()], vec![0.0; params.len()]);
    let mut norms = Vec::new();
    for (k, gradient) in gradients(case, device) {
        let gradient = gradient.to_f32_vec();
        let norm = global_norm(&gradient) / settings.divisor;
        let clip = (setting(case, "max_norm") / (norm + 1e-6)).min(1.0);
        let scale = (clip / settings.divisor) as f32;
        let groups = [group(case, params.len(), k)];
        let cfg = &settings.adamw;
        step(cfg, &mut params, &gradient, scale, &mut m, &mut v, &groups).expect("valid");
        norms.push(norm as f32);
    }
    vec![("params", params), ("m", m), ("v", v), ("norms", norms)]
}

fn on_gpu(case: &Case, device: &Device) -> Results {
    let mut params = case.f32("params", device);
    let len = params.cols();
    let [mut m, mut v] = [(); 2].map(|()| Tensor::zeros(DType::F32, 1, len).to_device(device));
    let Device::Cuda(gpu) = device else {
        panic!("a GPU");
    };
    let mut update = Update::new(gpu, len, 1);
    let mut norms = Vec::new();
    for (k, mut gradient) in gradients(case, device) {
        update
            .set(&settings(case), &[group(case, len, k)])
            .expect("valid");
        update.norm_and_scale(gradient.view(), None).expect("valid");
        let buffers = Buffers {
            params: params.view_mut(),
            grads: gradient.view_mut(),
            m: m.view_mut(),
            v: v.view_mut(),
            shadow: None,
        };
        update.step(buffers, false).expect("valid");
        norms.push(update.read().expect("the GPU has not failed").norm as f32);
    }
    vec![
        ("params", params.to_f32_vec()),
        ("m", m.to_f32_vec()),
        ("v", v.to_f32_vec()),
        ("norms", norms),
    ]
}
