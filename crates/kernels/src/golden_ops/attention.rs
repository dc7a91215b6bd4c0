//! `torch.nn.functional.scaled_dot_product_attention` of each sequence, and the eager attention of Transformers.

use super::{Case, Recorded, Results, check, file, gpu};
use crate::attention::{Config, backward, forward, with_each};
use crate::{DType, Device, Indices, Tensor, Workspace};

pub(super) const CASES: &[Recorded] = &[
    file!("attention_3_sequences", "_bf16"),
    file!("attention_3_sequences", "_f32"),
    file!("attention_wide_head", "_bf16"),
    file!("attention_wide_head", "_f32"),
    file!("attention_window", "_bf16"),
    file!("attention_window", "_f32"),
    file!("attention_softcap", "_bf16"),
    file!("attention_softcap", "_f32"),
];

#[test]
fn cpu_is_as_close_as_pytorch() {
    check(CASES, &Device::Cpu, run);
}

#[test]
fn cuda_is_as_close_as_pytorch() {
    with_each(|| check(CASES, &gpu(), run));
}

fn run(case: &Case, device: &Device) -> Results {
    let [heads, kv_heads, head_dim, window] =
        ["heads", "kv_heads", "head_dim", "window"].map(|name| case.count(name));
    let config = Config {
        heads,
        kv_heads,
        head_dim,
        scale: case.number("scale"),
        window: (window > 0).then_some(window),
        softcap: Some(case.number("softcap")).filter(|&cap| cap > 0.0),
    };
    let bounds: Vec<u32> = (case.integers("cu_seqlens").iter())
        .map(|&row| row as u32)
        .collect();
    let cu = &Indices::new(bounds, device);
    let [q, k, v, d_y] = ["q", "k", "v", "d_y"].map(|name| case.tensor(name, device));
    let rows = q.rows();
    let mut y = case.output([rows, q.cols()], device);
    let mut lse = Tensor::empty(device, DType::F32, rows, heads);
    let mut d_qkv = case.output([rows, (heads + 2 * kv_heads) * head_dim], device);
    let workspace = Workspace::on(device.clone(), rows);
    let [q, k, v] = [q.view(), k.view(), v.view()];
    forward(&config, q, k, v, cu, cu, y.view_mut(), lse.view_mut()).expect("fits");
    backward(
        &config,
        q,
        k,
        v,
        y.view(),
        lse.view(),
        cu,
        d_y.view(),
        d_qkv.view_mut(),
        &workspace,
    )
    .expect("fits");
    let (d_k, d_v) = (heads * head_dim, (heads + kv_heads) * head_dim);
    let gradient = |columns| d_qkv.view().columns(columns).to_f32_vec();
    vec![
        ("y", y.to_f32_vec()),
        ("d_q", gradient(0..d_k)),
        ("d_k", gradient(d_k..d_v)),
        ("d_v", gradient(d_v..d_qkv.cols())),
    ]
}
