//! How much of the rate of a copy the elementwise kernels of a step reach, at the shapes of an 8B model:
//! `FERROTUNE_TEST_DEVICE=cuda cargo test --workspace --lib -- --ignored --nocapture bandwidth`.

#![expect(clippy::print_stdout, reason = "rates are for who runs it")]

use super::speed::{matrix, on_gpu, times};
use crate::activation::{self, Activation};
use crate::cuda::CudaDevice;
use crate::dequantise::{FourBitFormat, FourBitType};
use crate::rope::{self, Direction};
use crate::test_support::cuda_device;
use crate::{DType, Device, Indices, Tensor, axpby, embedding, rms_norm};
use std::sync::Arc;
use std::time::Instant;

/// Rows of a micro-batch, the width of the stream, of an MLP, of heads.
struct Sizes {
    rows: usize,
    hidden: usize,
    intermediate: usize,
    head_dim: usize,
}

struct Bench {
    device: Arc<CudaDevice>,
    sizes: Sizes,
    /// Bytes a second that a copy reads and writes.
    copy: f64,
}

impl Bench {
    fn place(&self) -> Device {
        Device::Cuda(self.device.clone())
    }

    fn bf16(&self, cols: usize) -> Tensor {
        matrix(&self.place(), DType::Bf16, self.sizes.rows, cols)
    }

    fn f32(&self, rows: usize, cols: usize) -> Tensor {
        matrix(&self.place(), DType::F32, rows, cols)
    }

    /// One line for every kernel of `run`, each of which reads and writes so many bytes a launch.
    fn print(&self, bytes: usize, run: impl FnMut()) {
        for time in times(&self.device, run) {
            let rate = (bytes * time.calls) as f64 / time.milliseconds * 1e3;
            println!(
                "{:36} {:8.0} GB/s {:6.3} of a copy",
                time.name,
                rate / 1e9,
                rate / self.copy
            );
        }
    }

    fn norms(&self) {
        let Sizes { rows, hidden, .. } = self.sizes;
        let [mut residual, branch, mut y] = [(); 3].map(|()| self.bf16(hidden));
        let (weight, mut rstd) = (self.f32(1, hidden), self.f32(rows, 1));
        let matrix = 2 * rows * hidden;
        self.print(2 * matrix, || {
            let (x, y, rstd) = (branch.view(), y.view_mut(), rstd.view_mut());
            rms_norm::forward(x, weight.view(), 1e-5, y, rstd).expect("valid");
        });
        self.print(4 * matrix, || {
            let (to, y, rstd) = (residual.view_mut(), y.view_mut(), rstd.view_mut());
            rms_norm::add_forward(to, branch.view(), weight.view(), 1e-5, y, rstd).expect("valid");
        });
        // Not what a norm gives: its gradient adds to the residual's, and steps repeat.
        let rstd = self.f32(rows, 1);
        self.print(4 * matrix, || {
            let (dy, x, dx) = (y.view(), branch.view(), residual.view_mut());
            rms_norm::backward(dy, x, weight.view(), rstd.view(), dx, None).expect("valid");
        });
    }

    fn activations(&self) {
        let width = self.sizes.intermediate;
        let [mut gate_up, mut out] = [self.bf16(2 * width), self.bf16(width)];
        let matrix = 2 * self.sizes.rows * width;
        self.print(3 * matrix, || {
            activation::forward_gated(Activation::Silu, gate_up.view(), out.view_mut())
                .expect("valid");
        });
        self.print(5 * matrix, || {
            activation::backward_gated_in_place(Activation::Silu, gate_up.view_mut(), out.view())
                .expect("valid");
        });
    }

    fn rotation(&self) {
        let Sizes {
            rows,
            hidden,
            head_dim,
            ..
        } = self.sizes;
        let mut heads = self.bf16(hidden);
        let [cos, sin] = [(); 2].map(|()| self.f32(rows, head_dim / 2));
        self.print(4 * rows * hidden + 4 * rows * head_dim, || {
            let (x, angles) = (heads.view_mut(), [cos.view(), sin.view()]);
            rope::apply(
                x,
                head_dim,
                angles[0],
                angles[1],
                head_dim,
                Direction::Forward,
            )
            .expect("valid");
        });
    }

    fn sums(&self) {
        let Sizes { rows, hidden, .. } = self.sizes;
        let [mut y, x] = [(); 2].map(|()| self.bf16(hidden));
        self.print(6 * rows * hidden, || {
            axpby::add(1.0, y.view_mut(), 0.5, x.view()).expect("valid");
        });
    }

    fn gather(&self) {
        let Sizes { rows, hidden, .. } = self.sizes;
        let table = self.bf16(hidden);
        let mut out = self.bf16(hidden);
        let ids: Vec<u32> = (0..rows as u32).rev().collect();
        let ids = Indices::new(ids, &self.place());
        self.print(4 * rows * hidden, || {
            embedding::forward(table.view(), &ids, out.view_mut()).expect("valid");
        });
    }

    fn four_bits(&self) {
        let Sizes {
            hidden,
            intermediate,
            ..
        } = self.sizes;
        let format = FourBitFormat {
            quant_type: FourBitType::Nf4,
            block: 64,
            double_quant: true,
        };
        let weight = matrix(&Device::Cpu, DType::Bf16, intermediate, hidden);
        let weight = format.quantise(weight.view()).expect("finite");
        let weight = weight.to_device(&self.place());
        let mut out = matrix(&self.place(), DType::Bf16, intermediate, hidden);
        self.print(intermediate * hidden * 5 / 2, || {
            weight.dequantise(out.view_mut()).expect("valid");
        });
    }
}

/// Bytes a second of copies within the device's memory, each read and written.
fn copy_rate(device: &Arc<CudaDevice>, rows: usize, cols: usize) -> f64 {
    const COPIES: usize = 20;
    let place = Device::Cuda(device.clone());
    let from = matrix(&place, DType::Bf16, rows, cols);
    let mut to = Tensor::empty(&place, DType::Bf16, rows, cols);
    let mut copies = |count: usize| {
        for _ in 0..count {
            to.view_mut().copy_from(from.view());
        }
        device.synchronize().expect("works");
    };
    copies(2);
    let begin = Instant::now();
    copies(COPIES);
    (4 * rows * cols * COPIES) as f64 / begin.elapsed().as_secs_f64()
}

#[test]
#[ignore = "prints rates, for a GPU"]
fn bandwidth() {
    let device = cuda_device();
    let sizes = match on_gpu() {
        true => Sizes {
            rows: 16384,
            hidden: 4096,
            intermediate: 14336,
            head_dim: 128,
        },
        false => Sizes {
            rows: 5,
            hidden: 64,
            intermediate: 128,
            head_dim: 16,
        },
    };
    let copy = copy_rate(&device, sizes.rows, 4 * sizes.hidden);
    println!("{}: a copy moves {:.0} GB/s", device.name(), copy / 1e9);
    let bench = Bench {
        device,
        sizes,
        copy,
    };
    bench.norms();
    bench.activations();
    bench.rotation();
    bench.sums();
    bench.gather();
    bench.four_bits();
}
