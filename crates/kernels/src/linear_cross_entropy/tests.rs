use super::{Accumulator, Labels, Sums};
use crate::test_support::stream;
use crate::{DType, Error, Indices, Result, Tensor, View, ViewMut, Workspace};
use candle_core::{D, Device, Tensor as Oracle, Var};

// The operations, over slices of host memory.
fn forward(
    hidden: View<'_>,
    head: View<'_>,
    rows: &[u32],
    targets: &[u32],
    workspace: &Workspace,
) -> Result<Sums> {
    let (rows, targets) = (Indices::host(rows), Indices::host(targets));
    let mut sums = Accumulator::default();
    super::forward(hidden, head, labels(&rows, &targets), &mut sums, workspace)?;
    sums.read()
}

fn forward_backward(
    hidden: View<'_>,
    head: View<'_>,
    rows: &[u32],
    targets: &[u32],
    d_hidden: ViewMut<'_>,
    d_head: Option<&mut [f32]>,
    workspace: &Workspace,
) -> Result<Sums> {
    let (rows, targets) = (Indices::host(rows), Indices::host(targets));
    let d_head = d_head.map(|d| {
        let vocabulary = d.len() / head.cols();
        ViewMut::from_f32(d, vocabulary, head.cols())
    });
    let mut sums = Accumulator::default();
    let labels = labels(&rows, &targets);
    super::forward_backward(hidden, head, labels, d_hidden, d_head, &mut sums, workspace)?;
    sums.read()
}

pub(super) fn labels<'a>(rows: &'a Indices<'a>, targets: &'a Indices<'a>) -> Labels<'a> {
    Labels {
        rows,
        targets,
        smoothing: 0.0,
    }
}

pub(super) struct Case {
    hidden: Tensor,
    head: Tensor,
    pub(super) rows: Vec<u32>,
    pub(super) targets: Vec<u32>,
}

pub(super) fn case([tokens, width, vocabulary, labels]: [usize; 4], dtypes: [DType; 2]) -> Case {
    let mut stream = stream((tokens + width * 1000 + vocabulary) as u64);
    let mut random = |rows: usize, dtype| {
        let cols = width + 3;
        let values = (0..rows * cols)
            .map(|i| {
                if i % cols < width {
                    stream.normal() as f32
                } else {
                    f32::NAN
                }
            })
            .collect();
        Tensor::from_f32(values, rows, cols).to_dtype(dtype)
    };
    let (hidden, head) = (random(tokens, dtypes[0]), random(vocabulary, dtypes[1]));
    let mut rows: Vec<u32> = (0..tokens as u32).collect();
    stream.shuffle(&mut rows);
    rows.truncate(labels);
    let targets = (0..labels)
        .map(|_| stream.below(vocabulary) as u32)
        .collect();
    Case {
        hidden,
        head,
        rows,
        targets,
    }
}

impl Case {
    pub(super) fn hidden(&self) -> View<'_> {
        self.hidden.view().columns(0..self.hidden.cols() - 3)
    }

    pub(super) fn head(&self) -> View<'_> {
        self.head.view().columns(0..self.head.cols() - 3)
    }

    /// (sums, gradient of hidden, gradient of the head) by candle's autograd in f64.
    fn oracle(&self) -> candle_core::Result<(Sums, Vec<f64>, Vec<f64>)> {
        let variable = |view: View<'_>| {
            let values: Vec<f64> = view.to_f32_vec().into_iter().map(f64::from).collect();
            Var::from_vec(values, (view.rows(), view.cols()), &Device::Cpu)
        };
        let (hidden, head) = (variable(self.hidden())?, variable(self.head())?);
        let rows = Oracle::new(self.rows.as_slice(), &Device::Cpu)?;
        let logits = hidden.index_select(&rows, 0)?.matmul(&head.t()?)?;
        let targets = Oracle::new(self.targets.as_slice(), &Device::Cpu)?;
        let max = logits.max_keepdim(D::Minus1)?.detach();
        let shifted = logits.broadcast_sub(&max)?;
        let log_z = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
        let log_p = shifted.broadcast_sub(&log_z)?;
        let loss = log_p.gather(&targets.unsqueeze(1)?, 1)?.sum_all()?.neg()?;
        let entropy = (log_p.exp()? * &log_p)?.sum_all()?.neg()?;
        let best = logits.argmax(D::Minus1)?.to_vec1::<u32>()?;
        let sums = Sums {
            loss: loss.to_scalar()?,
            count: self.rows.len() as u64,
            correct: best
                .iter()
                .zip(&self.targets)
                .filter(|(a, b)| a == b)
                .count() as u64,
            entropy: entropy.to_scalar()?,
        };
        let gradients = loss.backward()?;
        let values = |variable: &Var| {
            gradients
                .get(variable)
                .expect("the oracle has this gradient")
                .flatten_all()?
                .to_vec1()
        };
        Ok((sums, values(&hidden)?, values(&head)?))
    }
}

fn check(what: &str, got: &[f32], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    let scale = want.iter().fold(1e-6_f64, |scale, v| scale.max(v.abs()));
    for (at, (&got, &want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(got) - want).abs();
        assert!(
            error <= tolerance * scale,
            "{what}[{at}] is {got}, expected {want}"
        );
    }
}

fn check_against_autograd(sizes: [usize; 4], dtypes: [DType; 2], tolerance: f64) {
    let case = case(sizes, dtypes);
    let what = format!("{sizes:?} {dtypes:?}");
    let workspace = Workspace::new(sizes[0]);
    let (want, d_hidden_want, mut d_head_want) = case.oracle().expect("oracle");
    let mut d_hidden = Tensor::zeros(dtypes[0], sizes[0], sizes[1] + 2);
    d_hidden.view_mut().fill(f32::NAN);
    let mut d_head: Vec<f32> = (0..sizes[2] * sizes[1]).map(|i| (i % 3) as f32).collect();
    for (i, want) in d_head_want.iter_mut().enumerate() {
        *want += (i % 3) as f64;
    }
    let (hidden, head) = (case.hidden(), case.head());
    let target = d_hidden.view_mut().columns(1..1 + sizes[1]);
    let with = Some(d_head.as_mut_slice());
    let got = forward_backward(
        hidden,
        head,
        &case.rows,
        &case.targets,
        target,
        with,
        &workspace,
    )
    .expect("valid arguments");
    // Twice, so that the second run meets the stale buffers of the first.
    let alone = forward(hidden, head, &case.rows, &case.targets, &workspace);
    assert_eq!(alone.expect("valid arguments"), got, "{what}");
    assert_eq!(
        (got.count, got.correct),
        (want.count, want.correct),
        "{what}"
    );
    assert!(
        (got.loss - want.loss).abs() <= 2e-6 * want.loss,
        "{what}: {got:?} {want:?}"
    );
    assert!(
        (got.entropy - want.entropy).abs() <= 1e-5 * want.entropy.max(1.0),
        "{what}"
    );
    let inner = d_hidden.view().columns(1..1 + sizes[1]);
    check(
        &format!("{what}: d_hidden"),
        &inner.to_f32_vec(),
        &d_hidden_want,
        tolerance,
    );
    check(&format!("{what}: d_head"), &d_head, &d_head_want, 5e-6);
    for (row, values) in inner.to_f32_vec().chunks(sizes[1]).enumerate() {
        if !case.rows.contains(&(row as u32)) {
            assert!(
                values.iter().all(|v| *v == 0.0),
                "{what}: row {row} has no label"
            );
        }
    }

    let frozen = d_hidden.view_mut().columns(1..1 + sizes[1]);
    forward_backward(
        hidden,
        head,
        &case.rows,
        &case.targets,
        frozen,
        None,
        &workspace,
    )
    .expect("valid arguments");
    let inner = d_hidden.view().columns(1..1 + sizes[1]);
    check(
        &format!("{what}: frozen head"),
        &inner.to_f32_vec(),
        &d_hidden_want,
        tolerance,
    );
}

const SIZES: [[usize; 4]; 6] = [
    [1, 1, 1, 1],
    [3, 17, 123, 2],
    [17, 3, 5, 17],
    [300, 8, 2, 290],
    [600, 32, 1000, 513],
    [40, 16, 9000, 33],
];

#[test]
fn f32_matches_f64_autograd() {
    for sizes in SIZES {
        // Logits of magnitude 16, rounded to f32, change a probability by 2e-6 of it.
        check_against_autograd(sizes, [DType::F32; 2], 5e-6);
    }
}

#[test]
fn bf16_rounds_the_gradient_of_hidden_once() {
    for sizes in SIZES {
        check_against_autograd(sizes, [DType::Bf16; 2], 5e-3);
        check_against_autograd(sizes, [DType::F32, DType::Bf16], 5e-6);
    }
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let case = case([700, 48, 5000, 600], [DType::F32; 2]);
    let results = [1, 2, 3].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.expect("threads start").install(|| {
            let workspace = Workspace::new(700);
            let mut d_hidden = Tensor::zeros(DType::F32, 700, 48);
            let mut d_head = vec![0.0; 5000 * 48];
            let sums = forward_backward(
                case.hidden(),
                case.head(),
                &case.rows,
                &case.targets,
                d_hidden.view_mut(),
                Some(&mut d_head),
                &workspace,
            )
            .expect("valid arguments");
            let bits = |v: Vec<f32>| v.into_iter().map(f32::to_bits).collect::<Vec<_>>();
            let sums = [sums.loss.to_bits(), sums.entropy.to_bits(), sums.correct];
            (sums, bits(d_hidden.to_f32_vec()), bits(d_head))
        })
    });
    assert!(results[0] == results[1] && results[0] == results[2]);
}

#[test]
fn no_tokens_and_no_labels_give_zero() {
    let workspace = Workspace::new(0);
    for tokens in [0, 4] {
        let hidden = Tensor::zeros(DType::F32, tokens, 3);
        let head = Tensor::zeros(DType::F32, 7, 3);
        let mut d_hidden = Tensor::zeros(DType::F32, tokens, 3);
        d_hidden.view_mut().fill(f32::NAN);
        let target = d_hidden.view_mut();
        let sums = forward_backward(
            hidden.view(),
            head.view(),
            &[],
            &[],
            target,
            None,
            &workspace,
        )
        .expect("valid arguments");
        assert_eq!(sums, Sums::default());
        assert!(d_hidden.to_f32_vec().iter().all(|v| *v == 0.0));
    }
}

#[test]
fn logits_that_are_not_finite_give_a_loss_that_is_not_finite() {
    let workspace = Workspace::new(1);
    let head = Tensor::from_f32(vec![1.0, -1.0, 0.5], 3, 1);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let hidden = Tensor::from_f32(vec![bad], 1, 1);
        let mut d_hidden = Tensor::zeros(DType::F32, 1, 1);
        let target = d_hidden.view_mut();
        let sums = forward_backward(
            hidden.view(),
            head.view(),
            &[0],
            &[1],
            target,
            None,
            &workspace,
        )
        .expect("valid arguments");
        assert!(!sums.loss.is_finite(), "{bad}: {sums:?}");
    }
}

#[test]
fn large_logits_do_not_overflow() {
    let workspace = Workspace::new(1);
    let hidden = Tensor::from_f32(vec![1e4], 1, 1);
    let head = Tensor::from_f32(vec![1.0, -1.0, 1.0], 3, 1);
    let sums = forward(hidden.view(), head.view(), &[0], &[2], &workspace).expect("valid");
    assert!((sums.loss - 2.0_f64.ln()).abs() < 1e-6, "{sums:?}");
    assert!((sums.entropy - 2.0_f64.ln()).abs() < 1e-6, "{sums:?}");
    assert_eq!(sums.correct, 0, "of equal logits the first counts");
}

#[test]
fn rows_and_targets_outside_their_tables_are_refused() {
    let workspace = Workspace::new(1);
    let (hidden, head) = (
        Tensor::zeros(DType::F32, 4, 3),
        Tensor::zeros(DType::F32, 7, 3),
    );
    let run = |rows: &[u32], targets: &[u32]| {
        forward(hidden.view(), head.view(), rows, targets, &workspace).expect_err("refused")
    };
    assert_eq!(
        run(&[0, 4], &[1, 1]).to_string(),
        "linear_cross_entropy::forward: rows[1] is 4, but there are only 4"
    );
    assert!(matches!(
        run(&[0], &[7]),
        Error::Index {
            what: "targets",
            at: 0,
            index: 7,
            limit: 7,
            ..
        }
    ));
    assert!(matches!(
        run(&[0, 1], &[0]),
        Error::Length {
            what: "targets",
            ..
        }
    ));
    let narrow = hidden.view().columns(0..2);
    let error = forward(narrow, head.view(), &[], &[], &workspace);
    assert!(matches!(error, Err(Error::Shape { .. })));
    let mut d_hidden = Tensor::zeros(DType::F32, 4, 3);
    let error = forward_backward(
        hidden.view(),
        head.view(),
        &[],
        &[],
        d_hidden.view_mut(),
        Some(&mut [0.0; 18]),
        &workspace,
    );
    assert!(matches!(
        error,
        Err(Error::Shape {
            expected: [7, 3],
            got: [6, 3],
            ..
        })
    ));
}

/// The head in one matrix, and the same in two pieces with an update that makes up the difference.
#[test]
fn a_head_in_pieces_with_an_update_is_the_sum_of_them() {
    let [tokens, width, vocabulary, rank, scale] = [9, 12, 37, 3, 2];
    let Case {
        hidden,
        head,
        rows,
        targets,
    } = case([tokens, width, vocabulary, 7], [DType::F32; 2]);
    let (hidden, head) = (
        hidden.view().columns(0..width),
        head.view().columns(0..width),
    );
    let normal = |seed, rows: usize, cols: usize| {
        let mut stream = stream(seed);
        let values = (0..rows * cols).map(|_| stream.normal() as f32).collect();
        Tensor::from_f32(values, rows, cols)
    };
    // s = hidden A^T, so that the whole is hidden (W + scale B A)^T.
    let (a, b) = (normal(1, rank, width), normal(2, vocabulary, rank));
    let mut s = Tensor::zeros(DType::F32, tokens, rank);
    crate::matmul::nt(s.view_mut(), 0.0, 1.0, hidden, a.view()).unwrap();
    let mut whole = Tensor::from_f32(head.to_f32_vec(), vocabulary, width);
    let scale = scale as f32;
    crate::matmul::nn(whole.view_mut(), 1.0, scale, b.view(), a.view()).unwrap();
    let workspace = Workspace::new(tokens);
    let (rows, targets) = (Indices::host(&rows[..]), Indices::host(&targets[..]));
    let mut d_hidden = Tensor::zeros(DType::F32, tokens, width);
    let mut d_whole = Tensor::zeros(DType::F32, vocabulary, width);
    let mut sums = Accumulator::default();
    let d = Some(d_whole.view_mut());
    let at = labels(&rows, &targets);
    super::forward_backward(
        hidden,
        whole.view(),
        at,
        d_hidden.view_mut(),
        d,
        &mut sums,
        &workspace,
    )
    .unwrap();
    let want = sums.read().unwrap();

    for first in [0, 20, vocabulary] {
        let pieces = super::Head {
            weight: head.row_range(0..first),
            tail: Some(head.row_range(first..vocabulary)),
            update: Some(super::Update {
                s: s.view(),
                b: b.view(),
                scale,
            }),
            ..whole.view().into()
        };
        let mut d_pieces = Tensor::zeros(DType::F32, vocabulary, width);
        let mut d_tail = Tensor::zeros(DType::F32, vocabulary - first, width);
        let mut d_s = Tensor::from_f32(vec![f32::NAN; tokens * rank], tokens, rank);
        let mut d_b = Tensor::zeros(DType::F32, vocabulary, rank);
        let mut d_x = Tensor::zeros(DType::F32, tokens, width);
        let mut sums = Accumulator::default();
        let gradients = super::HeadGradients {
            weight: Some(d_pieces.view_mut().row_range(0..first)),
            tail: Some(d_tail.view_mut()),
            update: Some(super::UpdateGradients {
                s: d_s.view_mut(),
                b: d_b.view_mut(),
            }),
        };
        super::forward_backward(
            hidden,
            pieces,
            at,
            d_x.view_mut(),
            gradients,
            &mut sums,
            &workspace,
        )
        .unwrap();
        let got = sums.read().unwrap();
        assert!((got.loss / want.loss - 1.0).abs() < 1e-5 && got.correct == want.correct);
        // What comes through s joins the rest; dB = scale dW A^T.
        crate::matmul::nn(d_x.view_mut(), 1.0, 1.0, d_s.view(), a.view()).unwrap();
        let mut d_b_want = Tensor::zeros(DType::F32, vocabulary, rank);
        crate::matmul::nt(d_b_want.view_mut(), 0.0, scale, d_whole.view(), a.view()).unwrap();
        let close = |got: Vec<f32>, want: Vec<f32>| {
            let largest = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs());
            assert!(worst.fold(0.0f32, f32::max) <= 1e-5 * largest, "{first}");
        };
        let weights = [d_pieces.view().row_range(0..first), d_tail.view()];
        let d_weight = weights.map(View::to_f32_vec).concat();
        close(d_weight, d_whole.to_f32_vec());
        close(d_x.to_f32_vec(), d_hidden.to_f32_vec());
        close(d_b.to_f32_vec(), d_b_want.to_f32_vec());
        let mut out = super::Accumulator::default();
        super::forward(hidden, pieces, at, &mut out, &workspace).unwrap();
        assert_eq!(out.read().unwrap().loss, got.loss);
    }
}
