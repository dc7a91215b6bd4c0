//! A vector added to every row.

use super::{Case, Recorded, Results, as_close_as_pytorch, file, zeros};
use crate::Device;
use crate::bias::{add, backward};

as_close_as_pytorch!(run: "bias_37x67");

fn run(case: &Case, device: &Device) -> Results {
    let [mut y, d_y] = ["x", "d_y"].map(|name| case.tensor(name, device));
    let bias = case.f32("bias", device);
    add(y.view_mut(), bias.view()).expect("fits");
    let mut d_bias = zeros(bias.view().shape(), device);
    backward(d_y.view(), d_bias.view_mut()).expect("fits");
    vec![("y", y.to_f32_vec()), ("d_bias", d_bias.to_f32_vec())]
}
