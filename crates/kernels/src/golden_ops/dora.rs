//! PEFT's DoRA over a frozen linear.

use super::lora::Linear;
use super::{Case, Recorded, Results, as_close_as_pytorch, file, zeros};
use crate::lora_linear::LowRank;
use crate::{DType, Device, Tensor, Workspace, dora, matmul};

as_close_as_pytorch!(run: "dora_37x123x67");

fn run(case: &Case, device: &Device) -> Results {
    let of = Linear::new(case, device);
    let (factors, workspace) = (
        of.factors(case, device),
        Workspace::on(device.clone(), of.x.rows()),
    );
    let update = of.update(&factors);
    let [mut y, s] = of.forward(case, &update, &workspace);
    let norms = norms(&of, &update, device);
    let magnitude = case.f32("magnitude", device);
    let mut u = case.output(y.view().shape(), device);
    let factors = [magnitude.view(), norms.view()];
    dora::forward(y.view_mut(), u.view_mut(), factors[0], factors[1]).expect("fits");
    let mut d_magnitude = zeros([1, y.cols()], device);
    let mut d_u = case.output(y.view().shape(), device);
    dora::backward(
        of.d_y.view(),
        u.view(),
        factors[0],
        factors[1],
        d_magnitude.view_mut(),
        d_u.view_mut(),
    )
    .expect("fits");
    let [d_x, d_a, d_b] = of.backward(case, &update, [s.view(), d_u.view()], &workspace);
    vec![
        ("y", y.to_f32_vec()),
        ("d_x", d_x.to_f32_vec()),
        ("d_a", d_a.to_f32_vec()),
        ("d_b", d_b.to_f32_vec()),
        ("d_magnitude", d_magnitude.to_f32_vec()),
    ]
}

/// Of the rows of W + scale * B A, `[1, out]`.
fn norms(of: &Linear, update: &LowRank<'_>, device: &Device) -> Tensor {
    let (rank, out) = (of.a.rows(), of.b.rows());
    let f32 = |rows, cols| Tensor::empty(device, DType::F32, rows, cols);
    let [mut cross, mut spread, mut norms] = [f32(rank, out), f32(rank, out), f32(1, out)];
    let mut gram = Tensor::empty(device, update.a.dtype(), rank, rank);
    matmul::nt(cross.view_mut(), 0.0, 1.0, update.a, of.weight.view()).expect("fits");
    matmul::nt(gram.view_mut(), 0.0, 1.0, update.a, update.a).expect("fits");
    matmul::nt(spread.view_mut(), 0.0, 1.0, gram.view(), update.b).expect("fits");
    let operands = dora::Operands {
        weight: of.weight.view(),
        b: of.b.view(),
        cross: cross.view(),
        spread: spread.view(),
        scale: of.scale,
    };
    dora::row_norms(&operands, norms.view_mut()).expect("fits");
    norms
}
