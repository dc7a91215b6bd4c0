//! The addition to the residual stream and `torch.nn.functional.rms_norm`, or the norms of Transformers' Llama and
//! Gemma.

use super::{Case, Recorded, Results, as_close_as_pytorch, file, zeros};
use crate::rms_norm::{Weight, add_forward, backward};
use crate::{DType, Device, Tensor};

as_close_as_pytorch!(
    run: "add_rms_norm_llama_7x123",
    "add_rms_norm_llama_5x512",
    "add_rms_norm_gemma_3x515",
);

fn run(case: &Case, device: &Device) -> Results {
    let [mut sum, branch, d_y, mut d_sum] =
        ["residual", "branch", "d_y", "d_sum"].map(|name| case.tensor(name, device));
    let values = case.f32("weight", device);
    let weight = Weight {
        values: values.view(),
        offset: case.number("offset"),
    };
    let shape = sum.view().shape();
    let mut y = case.output(shape, device);
    let mut rstd = Tensor::empty(device, DType::F32, shape[0], 1);
    add_forward(
        sum.view_mut(),
        branch.view(),
        weight,
        case.number("eps"),
        y.view_mut(),
        rstd.view_mut(),
    )
    .expect("fits");
    // The gradient of the stream passes by the norm and takes what comes out of it.
    let mut d_weight = zeros([1, shape[1]], device);
    backward(
        d_y.view(),
        sum.view(),
        weight,
        rstd.view(),
        d_sum.view_mut(),
        Some(d_weight.view_mut()),
    )
    .expect("fits");
    vec![
        ("sum", sum.to_f32_vec()),
        ("y", y.to_f32_vec()),
        ("d_residual", d_sum.to_f32_vec()),
        ("d_branch", d_sum.to_f32_vec()),
        ("d_weight", d_weight.to_f32_vec()),
    ]
}
