//! The norm of each head and its rotation, as in Transformers' Qwen 3 and Gemma 3.

use super::{Case, Recorded, Results, as_close_as_pytorch, file, zeros};
use crate::qk_norm::{Norm, backward_in_place, forward};
use crate::{Device, Workspace};

as_close_as_pytorch!(run: "qk_norm_qwen3_9x3x64", "qk_norm_gemma3_7x2x42");

fn run(case: &Case, device: &Device) -> Results {
    let [x, mut d] = ["x", "d_y"].map(|name| case.tensor(name, device));
    let [weight, cos, sin] = ["weight", "cos", "sin"].map(|name| case.f32(name, device));
    let norm = Norm {
        weight: weight.view(),
        offset: case.number("offset"),
        eps: case.number("eps"),
        cos: cos.view(),
        sin: sin.view(),
    };
    let mut y = case.output(x.view().shape(), device);
    forward(x.view(), &norm, y.view_mut()).expect("fits");
    let mut d_weight = zeros(weight.view().shape(), device);
    let workspace = Workspace::on(device.clone(), 0);
    let gradient = Some(d_weight.view_mut());
    backward_in_place(d.view_mut(), x.view(), &norm, gradient, &workspace).expect("fits");
    vec![
        ("y", y.to_f32_vec()),
        ("d_x", d.to_f32_vec()),
        ("d_weight", d_weight.to_f32_vec()),
    ]
}
