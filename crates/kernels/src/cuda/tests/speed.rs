//! How long the kernels take that a step waits for longest:
//! `FERROTUNE_TEST_DEVICE=cuda cargo test --workspace --lib -- --ignored --nocapture speed`.

#![expect(clippy::print_stdout, reason = "times are for who runs it")]

use crate::attention::with_each;
use crate::cuda::{CudaDevice, LaunchTime};
use crate::linear_cross_entropy::{Accumulator, Labels, forward_backward};
use crate::test_support::cuda_device;
use crate::{DType, Device, Indices, Tensor, ViewMut, Workspace, attention, embedding};
use std::sync::Arc;

const RUNS: usize = 10;

/// Whether this is a GPU; what stands in for one gets small shapes.
pub(super) fn on_gpu() -> bool {
    std::env::var("FERROTUNE_TEST_DEVICE").as_deref() == Ok("cuda")
}

/// Values in -1..1 without a pattern that matters.
pub(super) fn matrix(device: &Device, dtype: DType, rows: usize, cols: usize) -> Tensor {
    let value = |i: usize| (i as u32).wrapping_mul(2_654_435_761) as i32 as f32 / 2_f32.powi(31);
    let values = (0..rows * cols).map(value).collect();
    let host = Tensor::from_f32(values, rows, cols).to_dtype(dtype);
    host.to_device(device)
}

/// Times of the launches of `run`, which runs once before.
pub(super) fn times(device: &Arc<CudaDevice>, mut run: impl FnMut()) -> Vec<LaunchTime> {
    run();
    device.start_profile().expect("works");
    for _ in 0..RUNS {
        run();
    }
    device.take_profile().expect("works")
}

/// One line: microseconds, and `amount` per launch (floating-point operations, or bytes) per second.
fn print(what: &str, time: &LaunchTime, amount: f64, unit: &str) {
    let seconds = time.milliseconds / 1e3 / time.calls as f64;
    let unit_size = if unit == "TFLOP/s" { 1e12 } else { 1e9 };
    println!(
        "{:36} {what:28} {:9.1} us {:8.1} {unit}",
        time.name,
        seconds * 1e6,
        amount / seconds / unit_size,
    );
}

/// Forward and backward of `documents` of `length` tokens.
fn time_attention(device: &Arc<CudaDevice>, head_dim: usize, documents: usize, length: usize) {
    let place = Device::Cuda(device.clone());
    let (heads, kv_heads, rows) = (32, 8, documents * length);
    let config = attention::Config {
        heads,
        kv_heads,
        head_dim,
        scale: 1.0 / (head_dim as f32).sqrt(),
        window: None,
        softcap: None,
    };
    let [width, kv_width] = [heads * head_dim, kv_heads * head_dim];
    let [q, d_out] = [(); 2].map(|()| matrix(&place, DType::Bf16, rows, width));
    let [k, v] = [(); 2].map(|()| matrix(&place, DType::Bf16, rows, kv_width));
    let bounds: Vec<u32> = (0..=documents).map(|d| (d * length) as u32).collect();
    let cu = Indices::new(bounds, &place);
    let mut out = Tensor::empty(&place, DType::Bf16, rows, width);
    let mut lse = Tensor::empty(&place, DType::F32, rows, heads);
    let mut d_qkv = Tensor::empty(&place, DType::Bf16, rows, width + 2 * kv_width);
    let workspace = Workspace::on(place.clone(), rows);
    let [q, k, v] = [q.view(), k.view(), v.view()];
    let times = times(device, || {
        let (to, sums) = (out.view_mut(), lse.view_mut());
        attention::forward(&config, q, k, v, &cu, &cu, to, sums).expect("valid");
        let (saved, gradient) = ((out.view(), lse.view()), d_out.view());
        let to = d_qkv.view_mut();
        attention::backward(
            &config, q, k, v, saved.0, saved.1, &cu, gradient, to, &workspace,
        )
        .expect("valid");
    });
    let product = (documents * length * length * width) as f64;
    let what = format!("{documents} x {length}, head {head_dim}");
    for time in times {
        let kernel = ["_bf16", "_wgmma", "_tma"].iter();
        let mut kernel = kernel.filter_map(|engine| time.name.strip_suffix(engine));
        let products = match kernel.next() {
            Some("attention_forward") => 2.0,
            Some("attention_backward_q") => 3.0,
            Some("attention_backward_kv") => 4.0,
            _ => {
                print(&what, &time, (4 * rows * width) as f64, "GB/s");
                continue;
            }
        };
        print(&what, &time, products * product, "TFLOP/s");
    }
}

/// The loss of `rows` label rows and its gradient, with a narrow head: only its products depend on that.
fn time_cross_entropy(device: &Arc<CudaDevice>, rows: usize, vocabulary: usize) {
    let place = Device::Cuda(device.clone());
    let [hidden, head] = [rows, vocabulary].map(|rows| matrix(&place, DType::Bf16, rows, 64));
    let numbers: Vec<u32> = (0..rows as u32).collect();
    let [label_rows, targets] = [(); 2].map(|()| Indices::new(numbers.clone(), &place));
    let labels = Labels {
        rows: &label_rows,
        targets: &targets,
        smoothing: 0.0,
    };
    let mut d_hidden = Tensor::empty(&place, DType::Bf16, rows, 64);
    let mut sums = Accumulator::new(&place);
    let workspace = Workspace::on(place.clone(), rows);
    let times = times(device, || {
        let (x, w, to) = (hidden.view(), head.view(), d_hidden.view_mut());
        forward_backward(x, w, labels, to, None::<ViewMut<'_>>, &mut sums, &workspace)
            .expect("valid");
    });
    let bytes = (rows * vocabulary * 6) as f64;
    for time in times.iter().filter(|time| time.name.contains("gradient")) {
        print(&format!("{rows} x {vocabulary}"), time, bytes, "GB/s");
    }
}

/// The angles of so many positions.
fn time_gather(device: &Arc<CudaDevice>, rows: usize, cols: usize) {
    let place = Device::Cuda(device.clone());
    let table = matrix(&place, DType::F32, rows, cols);
    let ids: Vec<u32> = (0..rows as u32).rev().collect();
    let ids = Indices::new(ids, &place);
    let mut out = Tensor::empty(&place, DType::F32, rows, cols);
    let times = times(device, || {
        embedding::forward(table.view(), &ids, out.view_mut()).expect("valid");
    });
    for time in &times {
        print(
            &format!("{rows} x {cols}"),
            time,
            (8 * rows * cols) as f64,
            "GB/s",
        );
    }
}

#[test]
#[ignore = "prints times, for a GPU"]
fn speed() {
    let device = cuda_device();
    println!("{}", device.name());
    let documents: &[[usize; 2]] = match on_gpu() {
        true => &[[2, 2048], [1, 2048], [1, 16384], [64, 256]],
        false => &[[1, 40]],
    };
    for head_dim in [64, 128] {
        for &[documents, length] in documents {
            with_each(|| time_attention(&device, head_dim, documents, length));
        }
    }
    let [rows, vocabulary] = if on_gpu() { [1024, 128_256] } else { [3, 9000] };
    time_cross_entropy(&device, rows, vocabulary);
    time_gather(&device, if on_gpu() { 4096 } else { 40 }, 32);
}
