//! `torch.nn.functional.linear`.

use super::{Case, Recorded, Results, as_close_as_pytorch, file, zeros};
use crate::{Device, matmul};

as_close_as_pytorch!(run: "linear_37x123x67", "linear_12x512x24");

fn run(case: &Case, device: &Device) -> Results {
    let [x, weight, d_y] = ["x", "weight", "d_y"].map(|name| case.tensor(name, device));
    let [mut y, mut d_x] = [&d_y, &x].map(|t| case.output(t.view().shape(), device));
    matmul::nt(y.view_mut(), 0.0, 1.0, x.view(), weight.view()).expect("fits");
    matmul::nn(d_x.view_mut(), 0.0, 1.0, d_y.view(), weight.view()).expect("fits");
    let mut d_weight = zeros(weight.view().shape(), device);
    matmul::tn(d_weight.view_mut(), 1.0, 1.0, d_y.view(), x.view()).expect("fits");
    vec![
        ("y", y.to_f32_vec()),
        ("d_x", d_x.to_f32_vec()),
        ("d_weight", d_weight.to_f32_vec()),
    ]
}
