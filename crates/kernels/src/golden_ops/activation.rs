//! The activations of Transformers' MLPs, with a gate and without.

use super::{Case, Recorded, Results, as_close_as_pytorch, file};
use crate::activation::{
    Activation, backward_gated_in_place, backward_in_place, forward, forward_gated,
};
use crate::{Device, Tensor};

as_close_as_pytorch!(run: "swiglu_7x123", "geglu_5x77", "gelu_tanh_7x61", "gelu_7x61");

fn run(case: &Case, device: &Device) -> Results {
    let activation = match case.settings["activation"].as_str() {
        Some("silu") => Activation::Silu,
        Some("gelu") => Activation::Gelu,
        Some("gelu_tanh") => Activation::GeluTanh,
        other => panic!("{other:?} is not recorded"),
    };
    let d_y = case.tensor("d_y", device);
    let [rows, width] = d_y.view().shape();
    let mut y = case.output([rows, width], device);
    if !case.tensors.contains_key("in.gate") {
        let mut x = case.tensor("x", device);
        forward(activation, x.view(), y.view_mut()).expect("fits");
        backward_in_place(activation, x.view_mut(), d_y.view()).expect("fits");
        return vec![("y", y.to_f32_vec()), ("d_x", x.to_f32_vec())];
    }
    let mut gate_up = Tensor::empty(device, case.dtype, rows, 2 * width);
    for (name, columns) in [("gate", 0..width), ("up", width..2 * width)] {
        let half = gate_up.view_mut().columns(columns);
        half.copy_from(case.tensor(name, device).view());
    }
    forward_gated(activation, gate_up.view(), y.view_mut()).expect("fits");
    backward_gated_in_place(activation, gate_up.view_mut(), d_y.view()).expect("fits");
    let gradient = |columns| gate_up.view().columns(columns).to_f32_vec();
    vec![
        ("y", y.to_f32_vec()),
        ("d_gate", gradient(0..width)),
        ("d_up", gradient(width..2 * width)),
    ]
}
