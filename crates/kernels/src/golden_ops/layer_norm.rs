//! The addition to the residual stream and `torch.nn.functional.layer_norm`, as in GPT-2.

use super::{Case, Recorded, Results, as_close_as_pytorch, file, zeros};
use crate::layer_norm::{Affine, Gradients, add_forward, backward};
use crate::{DType, Device, Tensor};

as_close_as_pytorch!(run: "add_layer_norm_7x123", "add_layer_norm_3x512");

fn run(case: &Case, device: &Device) -> Results {
    let [mut sum, branch, d_y, mut d_sum] =
        ["residual", "branch", "d_y", "d_sum"].map(|name| case.tensor(name, device));
    let [weight, bias] = ["weight", "bias"].map(|name| case.f32(name, device));
    let affine = Affine {
        weight: weight.view(),
        bias: bias.view(),
        eps: case.number("eps"),
    };
    let shape = sum.view().shape();
    let mut y = case.output(shape, device);
    let mut statistics = Tensor::empty(device, DType::F32, shape[0], 2);
    add_forward(
        sum.view_mut(),
        branch.view(),
        affine,
        y.view_mut(),
        statistics.view_mut(),
    )
    .expect("fits");
    let [mut d_weight, mut d_bias] = [(); 2].map(|()| zeros([1, shape[1]], device));
    let gradients = Gradients {
        weight: Some(d_weight.view_mut()),
        bias: Some(d_bias.view_mut()),
    };
    backward(
        d_y.view(),
        sum.view(),
        weight.view(),
        statistics.view(),
        d_sum.view_mut(),
        gradients,
    )
    .expect("fits");
    vec![
        ("sum", sum.to_f32_vec()),
        ("y", y.to_f32_vec()),
        ("d_residual", d_sum.to_f32_vec()),
        ("d_branch", d_sum.to_f32_vec()),
        ("d_weight", d_weight.to_f32_vec()),
        ("d_bias", d_bias.to_f32_vec()),
    ]
}
