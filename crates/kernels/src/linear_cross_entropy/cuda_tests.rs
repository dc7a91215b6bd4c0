//! The GPU against the CPU.

use super::{Accumulator, Head, Labels, PADDING, Sums, forward, forward_backward};
use crate::rng::Stream;
use crate::test_support::{DTYPES, assert_close, assert_same_bits, cuda_device};
use crate::twins::{Matrix, Place, assert_cuda_matches};
use crate::{DType, Device, Error, Indices, Tensor, Workspace};

/// Inputs. A GPU keeps logits and their gradients in bf16, as PyTorch does, and the CPU in f32: whether few numbers are
/// within twice the CPU's error depends on what is drawn, so in bf16 they are the same in every run. Against PyTorch's
/// error both are judged in `golden_ops`.
fn matrix(place: &Place, seed: u64, shape: [usize; 2], dtype: DType) -> Matrix {
    match dtype {
        DType::F32 => place.matrix(seed, shape, dtype),
        DType::Bf16 => place.fixed_matrix(seed, shape, dtype),
    }
}

/// What a run on either device gives: gradients of hidden states and head, sums.
fn run_at(place: &Place, sizes: [usize; 4], rows: &[u32], dtype: DType) -> Results {
    run_loss(place, sizes, rows, dtype, (0.0, 1.0, None))
}

/// With label smoothing, and factor and softcap of the logits.
fn run_loss(
    place: &Place,
    sizes: [usize; 4],
    rows: &[u32],
    dtype: DType,
    (smoothing, scale, softcap): (f32, f32, Option<f32>),
) -> Results {
    let [tokens, width, vocabulary, _] = sizes;
    let hidden = matrix(place, 1, [tokens, width], dtype);
    let head = matrix(place, 2, [vocabulary, width], dtype);
    let mut stream = Stream::new(7);
    let mut target = || stream.below(vocabulary) as u32;
    let target_of = |&row: &u32| if row == PADDING { PADDING } else { target() };
    let targets: Vec<u32> = rows.iter().map(target_of).collect();
    let (rows, targets) = (place.indices(rows), place.indices(&targets));
    let mut d_hidden = place.poisoned([tokens, width], dtype);
    let mut d_head = place.dense(3, [vocabulary, width]);
    let workspace = Workspace::on(place.device().clone(), tokens);
    let mut sums = Accumulator::new(place.device());
    let (x, weight) = (hidden.view(), head.view());
    let w = Head {
        scale,
        softcap,
        ..weight.into()
    };
    let labels = Labels {
        rows: &rows,
        targets: &targets,
        smoothing,
    };
    forward(x, w, labels, &mut sums, &workspace).expect("valid arguments");
    let (dx, dw) = (d_hidden.view_mut(), Some(d_head.view_mut()));
    forward_backward(x, w, labels, dx, dw, &mut sums, &workspace).expect("valid");
    Results {
        d_hidden: d_hidden.values(),
        d_head: d_head.to_f32_vec(),
        sums: sums.read().expect("the GPU has not failed"),
    }
}

struct Results {
    d_hidden: Vec<f32>,
    d_head: Vec<f32>,
    sums: Sums,
}

fn labels<'a>(rows: &'a Indices<'a>, targets: &'a Indices<'a>) -> Labels<'a> {
    Labels {
        rows,
        targets,
        smoothing: 0.0,
    }
}

/// [T, D, V, N]: less than one warp of logits, and more than a block of threads; even and odd rows.
const CUDA_SIZES: [[usize; 4]; 4] = [
    [1, 1, 1, 1],
    [9, 24, 131, 9],
    [12, 17, 2051, 5],
    [5, 8, 5000, 3],
];

/// `labels` of the rows in no order.
fn shuffled_rows([tokens, .., labels]: [usize; 4]) -> Vec<u32> {
    let mut rows: Vec<u32> = (0..tokens as u32).collect();
    Stream::new(5).shuffle(&mut rows);
    rows.truncate(labels);
    rows
}

#[test]
fn cuda_matches_the_cpu() {
    for (sizes, dtype) in CUDA_SIZES.iter().flat_map(|s| DTYPES.map(|d| (*s, d))) {
        let rows = shuffled_rows(sizes);
        assert_cuda_matches(&format!("{sizes:?} {dtype}"), |place| {
            let results = run_at(place, sizes, &rows, dtype);
            let Sums {
                loss,
                entropy,
                correct,
                count,
            } = results.sums;
            assert_eq!(count, 2 * sizes[3] as u64);
            let mut all = vec![
                (dtype, results.d_hidden),
                (DType::F32, vec![loss as f32]),
                (DType::F32, vec![entropy as f32]),
                (DType::F32, vec![correct as f32]),
            ];
            if dtype == DType::F32 {
                all.push((dtype, results.d_head));
            }
            all
        });
    }
}

#[test]
fn cuda_smooths_labels_as_the_cpu_does() {
    for (sizes, dtype) in CUDA_SIZES.iter().flat_map(|s| DTYPES.map(|d| (*s, d))) {
        let rows = shuffled_rows(sizes);
        assert_cuda_matches(&format!("{sizes:?} {dtype}"), |place| {
            let results = run_loss(place, sizes, &rows, dtype, (0.1, 1.0, None));
            let loss = vec![results.sums.loss as f32];
            vec![(dtype, results.d_hidden), (DType::F32, loss)]
        });
    }
}

#[test]
fn cuda_scales_and_caps_logits_as_the_cpu_does() {
    for (sizes, dtype) in CUDA_SIZES.iter().flat_map(|s| DTYPES.map(|d| (*s, d))) {
        let rows = [&shuffled_rows(sizes)[..], &[PADDING; 3]].concat();
        for loss in [
            (0.0, 0.3, None),
            (0.0, 1.0, Some(2.5)),
            (0.1, 0.7, Some(4.0)),
        ] {
            assert_cuda_matches(&format!("{sizes:?} {dtype} {loss:?}"), |place| {
                let results = run_loss(place, sizes, &rows, dtype, loss);
                let sum = vec![results.sums.loss as f32];
                let mut all = vec![(dtype, results.d_hidden), (DType::F32, sum)];
                if dtype == DType::F32 {
                    all.push((dtype, results.d_head));
                }
                all
            });
        }
    }
}

#[test]
fn padding_adds_nothing_to_any_bit() {
    for (sizes, dtype) in CUDA_SIZES.iter().flat_map(|s| DTYPES.map(|d| (*s, d))) {
        let rows = shuffled_rows(sizes);
        let padded = [&rows[..], &[PADDING; 7]].concat();
        for device in [Device::Cpu, Device::Cuda(cuda_device())] {
            let place = Place::dense_on(device);
            let [plain, padded] = [&rows, &padded].map(|rows| run_at(&place, sizes, rows, dtype));
            let what = format!("{sizes:?} {dtype}");
            assert_eq!(padded.sums, plain.sums, "{what}");
            assert_same_bits(&padded.d_hidden, &plain.d_hidden, &what);
            assert_same_bits(&padded.d_head, &plain.d_head, &what);
        }
    }
}

#[test]
fn padding_stands_at_the_end_of_rows_and_targets_alike() {
    let (hidden, head) = (
        Tensor::zeros(DType::F32, 2, 4),
        Tensor::zeros(DType::F32, 3, 4),
    );
    let run = |rows: &[u32], targets: &[u32]| {
        let (rows, targets) = (Indices::host(rows), Indices::host(targets));
        let (mut sums, workspace) = (Accumulator::default(), Workspace::new(2));
        let (x, w) = (hidden.view(), head.view());
        let labels = labels(&rows, &targets);
        forward(x, w, labels, &mut sums, &workspace).map(|()| sums)
    };
    let sums = run(&[1, PADDING], &[2, PADDING]).expect("valid");
    assert_eq!(sums.read().expect("on the host").count, 1);
    for (rows, targets) in [([PADDING, 1], [PADDING, 2]), ([1, PADDING], [2, 2])] {
        run(&rows, &targets).expect_err("no place for padding");
    }
}

#[test]
fn cuda_rounds_the_gradient_of_bf16_logits_once() {
    let sizes = [12, 16, 777, 12];
    let rows = shuffled_rows(sizes);
    let results = [Device::Cpu, Device::Cuda(cuda_device())]
        .map(|device| run_at(&Place::dense_on(device), sizes, &rows, DType::Bf16).d_head);
    // The GPU multiplies a gradient of 8 bits, the CPU one of 24.
    assert_close(&results[1], &results[0], 2.0_f64.powi(-8), "d_head");
}

#[test]
fn cuda_adds_up_rows_that_are_named_twice() {
    let sizes = [4, 8, 50, 7];
    for dtype in DTYPES {
        assert_cuda_matches(&format!("{dtype}"), |place| {
            let results = run_at(place, sizes, &[3, 1, 3, 0, 0, 1, 3], dtype);
            // bf16: every addition is rounded on both devices.
            vec![
                (dtype, results.d_hidden),
                (DType::F32, vec![results.sums.loss as f32]),
            ]
        });
    }
}

#[test]
fn cuda_takes_no_labels_and_no_tokens() {
    for sizes in [[0, 3, 7, 0], [4, 3, 7, 0]] {
        assert_cuda_matches(&format!("{sizes:?}"), |place| {
            let results = run_at(place, sizes, &[], DType::F32);
            assert_eq!(results.sums, Sums::default());
            assert!(results.d_hidden.iter().all(|v| *v == 0.0));
            vec![(DType::F32, results.d_hidden), (DType::F32, results.d_head)]
        });
    }
}

#[test]
fn cuda_logits_that_are_not_finite_give_a_loss_that_is_not_finite() {
    let device = Device::Cuda(cuda_device());
    let head = Tensor::from_f32(vec![1.0, -1.0, 0.5], 3, 1).to_device(&device);
    let index = |value| Indices::new(vec![value], &device);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let hidden = Tensor::from_f32(vec![bad], 1, 1).to_device(&device);
        let mut sums = Accumulator::new(&device);
        let workspace = Workspace::on(device.clone(), 1);
        let (x, w) = (hidden.view(), head.view());
        let (rows, targets) = (index(0), index(1));
        let labels = labels(&rows, &targets);
        forward(x, w, labels, &mut sums, &workspace).expect("valid arguments");
        let sums = sums.read().expect("the GPU has not failed");
        assert!(!sums.loss.is_finite(), "{bad}: {sums:?}");
    }
}

#[test]
fn cuda_refuses_what_it_cannot_multiply_or_reach() {
    let device = Device::Cuda(cuda_device());
    let hidden = Tensor::zeros(DType::F32, 2, 4).to_device(&device);
    let head = Tensor::zeros(DType::Bf16, 3, 4).to_device(&device);
    let workspace = Workspace::on(device.clone(), 2);
    let run = |head: &Tensor, rows: &Indices<'_>, mut sums: Accumulator| {
        let (x, w) = (hidden.view(), head.view());
        forward(x, w, labels(rows, rows), &mut sums, &workspace).expect_err("refused")
    };
    let (here, there) = (Indices::new(vec![1], &device), Indices::host(vec![1]));
    let error = run(&head, &here, Accumulator::new(&device));
    assert!(matches!(error, Error::DType { .. }), "{error}");
    let same = head.to_dtype(DType::F32);
    let error = run(&same, &there, Accumulator::new(&device));
    assert!(error.to_string().contains("different devices"), "{error}");
    let error = run(&same, &here, Accumulator::new(&Device::Cpu));
    assert!(
        error.to_string().contains("sums must be made for the GPU"),
        "{error}"
    );
}

#[test]
fn a_head_in_pieces_with_an_update_matches_the_cpu() {
    use super::{Head, HeadGradients, Update, UpdateGradients};
    let [tokens, width, vocabulary, rank] = [12, 24, 523, 5];
    for dtype in DTYPES {
        assert_cuda_matches(&format!("{dtype}"), |place| {
            let hidden = matrix(place, 1, [tokens, width], dtype);
            let weight = matrix(place, 2, [vocabulary - 7, width], dtype);
            let tail = matrix(place, 3, [7, width], dtype);
            let s = matrix(place, 4, [tokens, rank], dtype);
            let b = matrix(place, 5, [vocabulary, rank], dtype);
            let rows = place.indices(&[3, 11, 0, 7]);
            let targets = place.indices(&[520, 1, 518, 400]);
            let head = Head {
                weight: weight.view(),
                tail: Some(tail.view()),
                update: Some(Update {
                    s: s.view(),
                    b: b.view(),
                    scale: 0.5,
                }),
                scale: 1.25,
                softcap: Some(30.0),
            };
            let mut d_hidden = place.poisoned([tokens, width], dtype);
            let mut d_s = place.poisoned([tokens, rank], dtype);
            let mut d_b = place.dense(6, [vocabulary, rank]);
            let mut d_tail = place.dense(7, [7, width]);
            let workspace = Workspace::on(place.device().clone(), tokens);
            let mut sums = Accumulator::new(place.device());
            let gradients = HeadGradients {
                weight: None,
                tail: Some(d_tail.view_mut()),
                update: Some(UpdateGradients {
                    s: d_s.view_mut(),
                    b: d_b.view_mut(),
                }),
            };
            let (x, at) = (hidden.view(), labels(&rows, &targets));
            let dx = d_hidden.view_mut();
            forward_backward(x, head, at, dx, gradients, &mut sums, &workspace).expect("valid");
            let loss = sums.read().expect("the GPU has not failed").loss;
            let mut all = vec![
                (dtype, d_hidden.values()),
                (dtype, d_s.values()),
                (DType::F32, vec![loss as f32]),
            ];
            if dtype == DType::F32 {
                all.push((dtype, d_b.to_f32_vec()));
                all.push((dtype, d_tail.to_f32_vec()));
            }
            all
        });
    }
}
