//! The rotation of Transformers' Llama.

use super::{Case, Recorded, Results, as_close_as_pytorch, file};
use crate::Device;
use crate::rope::{Direction, apply};

as_close_as_pytorch!(run: "rope_9x3x32", "rope_partial_5x2x41");

fn run(case: &Case, device: &Device) -> Results {
    let [mut y, mut d_x] = ["x", "d_y"].map(|name| case.tensor(name, device));
    let [cos, sin] = ["cos", "sin"].map(|name| case.f32(name, device));
    let directions = [
        (&mut y, Direction::Forward),
        (&mut d_x, Direction::Backward),
    ];
    for (x, direction) in directions {
        apply(
            x.view_mut(),
            case.count("head_dim"),
            cos.view(),
            sin.view(),
            2 * cos.cols(),
            direction,
        )
        .expect("fits");
    }
    vec![("y", y.to_f32_vec()), ("d_x", d_x.to_f32_vec())]
}
