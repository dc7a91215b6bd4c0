//! The head of Transformers' causal models and `torch.nn.functional.cross_entropy`, some rows being ignored.

use super::{Case, Recorded, Results, as_close_as_pytorch, file, zeros};
use crate::linear_cross_entropy::{Accumulator, Head, Labels, forward, forward_backward};
use crate::{Device, Indices, Workspace};

as_close_as_pytorch!(
    run: "linear_cross_entropy_21x64x307",
    "linear_cross_entropy_softcap_17x45x130",
);

/// What PyTorch takes for no label.
const IGNORED: i64 = -100;

fn run(case: &Case, device: &Device) -> Results {
    let [hidden, weight] = ["hidden", "head"].map(|name| case.tensor(name, device));
    let head = Head {
        softcap: Some(case.number("softcap")).filter(|&cap| cap > 0.0),
        ..weight.view().into()
    };
    let labels = case.integers("labels");
    let labelled = (0..labels.len()).filter(|&row| labels[row] != IGNORED);
    let (rows, targets): (Vec<u32>, Vec<u32>) =
        labelled.map(|row| (row as u32, labels[row] as u32)).unzip();
    let workspace = Workspace::on(device.clone(), hidden.rows());

    // The operation gives sums: one of each row alone.
    let mut losses = Vec::new();
    for (&row, &target) in rows.iter().zip(&targets) {
        let [row, target] = [row, target].map(|index| Indices::new(vec![index], device));
        let labels = Labels {
            rows: &row,
            targets: &target,
            smoothing: 0.0,
        };
        let mut sums = Accumulator::new(device);
        forward(hidden.view(), head, labels, &mut sums, &workspace).expect("fits");
        losses.push(sums.read().expect("the GPU has not failed").loss as f32);
    }

    let [rows, targets] = [rows, targets].map(|indices| Indices::new(indices, device));
    let labels = Labels {
        rows: &rows,
        targets: &targets,
        smoothing: 0.0,
    };
    let mut d_hidden = case.output(hidden.view().shape(), device);
    let mut d_head = zeros(weight.view().shape(), device);
    forward_backward(
        hidden.view(),
        head,
        labels,
        d_hidden.view_mut(),
        Some(d_head.view_mut()),
        &mut Accumulator::new(device),
        &workspace,
    )
    .expect("fits");
    vec![
        ("losses", losses),
        ("d_hidden", d_hidden.to_f32_vec()),
        ("d_head", d_head.to_f32_vec()),
    ]
}
