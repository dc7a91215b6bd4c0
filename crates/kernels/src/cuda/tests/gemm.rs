//! Matrix products against those of the CPU.

use super::{cuda_device, downloaded, in_own_process, inject, new_cuda_device, normal, uploaded};
use crate::cuda::{CudaDevice, Gemm, GemmRecord, GemmTuning, Operand};
use crate::matmul::{self, Layout};
use crate::test_support::{Pitched, assert_close, assert_same_bits, tolerance};
use crate::{DType, Error, ErrorKind, Tensor, View};
use std::sync::Arc;

const LAYOUTS: [Layout; 3] = [Layout::Nt, Layout::Nn, Layout::Tn];

/// Rows and columns of `a` and `b` as stored.
fn stored(layout: Layout, [m, n, k]: [usize; 3]) -> [[usize; 2]; 2] {
    match layout {
        Layout::Nt => [[m, k], [n, k]],
        Layout::Nn => [[m, k], [k, n]],
        Layout::Tn => [[k, m], [k, n]],
    }
}

/// All elements of the buffer behind a view, its own first.
fn bytes(view: View<'_>) -> Vec<u8> {
    let [rows, cols] = view.shape();
    let mut host = Tensor::zeros(view.dtype(), rows, cols);
    host.view_mut().copy_from(view);
    host.into_buffer().bytes_mut().to_vec()
}

/// A matrix on the device whose rows have three foreign elements behind them.
struct Placed {
    memory: crate::cuda::Memory,
    dtype: DType,
    shape: [usize; 2],
}

const MARGIN: usize = 3;

impl Placed {
    fn new(device: &Arc<CudaDevice>, view: View<'_>) -> Self {
        let (shape @ [rows, cols], dtype) = (view.shape(), view.dtype());
        let size = dtype.bytes();
        let memory = uploaded(device, &vec![0x7f_u8; rows * (cols + MARGIN) * size]);
        let pitch = crate::cuda::Pitch {
            rows,
            row_bytes: cols * size,
            src: cols * size,
            dst: (cols + MARGIN) * size,
        };
        device
            .upload_2d(memory.ptr(), &bytes(view), pitch)
            .expect("uploads");
        Self {
            memory,
            dtype,
            shape,
        }
    }

    fn operand(&self) -> Operand {
        Operand {
            ptr: self.memory.ptr(),
            dtype: self.dtype,
            pitch: self.shape[1] + MARGIN,
        }
    }

    /// The values; the foreign elements must be as they were.
    fn values(&self) -> Vec<f32> {
        let [rows, cols] = self.shape;
        let size = self.dtype.bytes();
        let all = downloaded::<u8>(&self.memory, rows * (cols + MARGIN) * size);
        let mut host = crate::Buffer::zeros(self.dtype, rows * cols);
        for r in 0..rows {
            let (row, rest) =
                all[r * (cols + MARGIN) * size..][..(cols + MARGIN) * size].split_at(cols * size);
            host.bytes_mut()[r * cols * size..][..cols * size].copy_from_slice(row);
            assert!(
                rest.iter().all(|&byte| byte == 0x7f),
                "a margin was written"
            );
        }
        Tensor::from_buffer(host, rows, cols).to_f32_vec()
    }
}

fn cpu(
    layout: Layout,
) -> fn(crate::ViewMut<'_>, f32, f32, View<'_>, View<'_>) -> crate::Result<()> {
    match layout {
        Layout::Nt => matmul::nt,
        Layout::Nn => matmul::nn,
        Layout::Tn => matmul::tn,
    }
}

/// Compares one product with the CPU's.
fn compare(
    device: &Arc<CudaDevice>,
    layout: Layout,
    sizes: [usize; 3],
    input: DType,
    output: DType,
) {
    let [m, n, k] = sizes;
    let [a, b] = stored(layout, sizes);
    let (a, b) = (Pitched::normal(1, a, input), Pitched::normal(2, b, input));
    let start = normal(3, m * n);
    for (alpha, beta) in [(1.0, 0.0), (0.5, 1.0), (2.0, -0.5)] {
        // With beta 0 what is there must not be read: the margin's bytes are a NaN in bf16.
        let start = if beta == 0.0 {
            vec![f32::NAN; m * n]
        } else {
            start.clone()
        };
        let mut want = Pitched::new(&start, [m, n], output);
        let got = Placed::new(device, want.view());
        cpu(layout)(want.view_mut(), beta, alpha, a.view(), b.view()).expect("fits");
        let (a, b) = (Placed::new(device, a.view()), Placed::new(device, b.view()));
        let gemm = Gemm {
            layout,
            m,
            n,
            k,
            alpha,
            beta,
            a: a.operand(),
            b: b.operand(),
            dst: got.operand(),
        };
        device.gemm(&gemm).expect("multiplies");
        let what = format!("{layout:?} {sizes:?} {input} {output} {alpha} {beta}");
        let tolerance = tolerance(output).max(1e-5);
        if m * n > 0 {
            assert_close(&got.values(), &want.values(), tolerance, &what);
        }
    }
}

#[test]
fn products_are_those_of_the_cpu() {
    let device = cuda_device();
    for layout in LAYOUTS {
        for sizes in [
            [1, 1, 1],
            [5, 3, 7],
            [33, 20, 65],
            [64, 48, 32],
            [2, 129, 1],
        ] {
            for (input, output) in [
                (DType::F32, DType::F32),
                (DType::Bf16, DType::Bf16),
                (DType::Bf16, DType::F32),
            ] {
                compare(&device, layout, sizes, input, output);
            }
        }
    }
}

#[test]
fn a_sum_of_many_products_stays_exact() {
    // Of the root of the sum of squares. One sum after the other in f32 is 3e-5 off, which a GPU may make.
    let on_gpu = std::env::var("FERROTUNE_TEST_DEVICE").as_deref() == Ok("cuda");
    let tolerance = if on_gpu { 1e-4 } else { 1e-5 };
    let (device, k, n) = (cuda_device(), 140_000, 4);
    let [a, b] = [1, 2].map(|seed| normal(seed, n * k));
    let on_device = |values: &[f32]| {
        let tensor = Tensor::from_f32(values.to_vec(), n, k);
        tensor.to_device(&crate::Device::Cuda(Arc::clone(&device)))
    };
    let mut got = Tensor::from_f32(vec![0.0; n * n], n, n);
    got = got.to_device(&crate::Device::Cuda(Arc::clone(&device)));
    matmul::nt(
        got.view_mut(),
        0.0,
        1.0,
        on_device(&a).view(),
        on_device(&b).view(),
    )
    .expect("multiplies");
    for (at, got) in got.to_f32_vec().into_iter().enumerate() {
        let [row, column] = [&a[at / n * k..][..k], &b[at % n * k..][..k]];
        let terms = row
            .iter()
            .zip(column)
            .map(|(&x, &y)| f64::from(x) * f64::from(y));
        let (want, squares) =
            terms.fold((0.0, 0.0), |(sum, squares), t| (sum + t, squares + t * t));
        let off = (f64::from(got) - want).abs() / f64::sqrt(squares);
        assert!(off < tolerance, "{at}: {off:e}");
    }
}

#[test]
fn empty_products_are_legal() {
    let device = cuda_device();
    for layout in LAYOUTS {
        for sizes in [[0, 3, 4], [3, 0, 4], [3, 4, 0], [0, 0, 0]] {
            compare(&device, layout, sizes, DType::F32, DType::F32);
            compare(&device, layout, sizes, DType::Bf16, DType::F32);
        }
    }
}

/// `a [4,5] b [6,5]^T`, all in one allocation.
fn small(device: &Arc<CudaDevice>, input: DType, output: DType) -> (crate::cuda::Memory, Gemm) {
    let memory = uploaded(device, &normal(5, 256));
    let operand = |offset: u64, dtype, pitch| Operand {
        ptr: memory.ptr() + offset,
        dtype,
        pitch,
    };
    let gemm = Gemm {
        layout: Layout::Nt,
        m: 4,
        n: 6,
        k: 5,
        alpha: 1.0,
        beta: 0.0,
        a: operand(0, input, 5),
        b: operand(256, input, 5),
        dst: operand(512, output, 6),
    };
    (memory, gemm)
}

#[test]
fn dtypes_that_do_not_go_together_are_refused() {
    let device = cuda_device();
    let (_memory, gemm) = small(&device, DType::F32, DType::Bf16);
    let error = device.gemm(&gemm).expect_err("f32 to bf16");
    assert!(matches!(error, Error::Invalid { .. }), "{error}");
    let (_memory, mut gemm) = small(&device, DType::F32, DType::F32);
    gemm.b.dtype = DType::Bf16;
    device.gemm(&gemm).expect_err("f32 x bf16");
    device.check().expect("refused arguments do not stick");
}

#[test]
fn a_failed_product_sticks() {
    in_own_process("gemm::a_failed_product_sticks", || {
        let device = new_cuda_device();
        let (_memory, gemm) = small(&device, DType::F32, DType::F32);
        if inject("gemm:0:719") {
            let error = device.gemm(&gemm).expect_err("injected");
            assert_eq!(error.kind(), ErrorKind::DeviceFault, "{error}");
            device.synchronize().expect_err("it sticks");
        }
    });
}

#[test]
fn chosen_algorithms_can_be_replayed() {
    let (first, second) = (new_cuda_device(), new_cuda_device());
    first.set_gemm_tuning(GemmTuning::Measure);
    let run = |device: &Arc<CudaDevice>| {
        let (memory, gemm) = small(device, DType::Bf16, DType::F32);
        device.gemm(&gemm).expect("multiplies");
        downloaded::<f32>(&memory, 152)[128..].to_vec()
    };
    let product = run(&first);
    assert_same_bits(&run(&first), &product, "again");
    let records = first.algorithms();
    assert_eq!(records.len(), 1, "one shape");

    let text = serde_json::to_string(&records).expect("serialises");
    let read: Vec<GemmRecord> = serde_json::from_str(&text).expect("reads back");
    assert_eq!(read, records);
    assert_eq!(second.replay(&read).expect("replays"), 1);
    assert_eq!(second.algorithms(), records);
    assert_same_bits(&run(&second), &product, "replayed");
    assert_eq!(second.algorithms(), records, "nothing was chosen anew");

    let other = text.replace("\"device\":\"", "\"device\":\"Another ");
    let read: Vec<GemmRecord> = serde_json::from_str(&other).expect("reads back");
    assert_eq!(new_cuda_device().replay(&read).expect("leaves them out"), 0);
}

#[test]
fn measuring_leaves_the_result_alone() {
    let device = new_cuda_device();
    device.set_gemm_tuning(GemmTuning::Measure);
    // beta 1 would add the product once per run.
    compare(&device, Layout::Tn, [9, 8, 7], DType::F32, DType::F32);
}
