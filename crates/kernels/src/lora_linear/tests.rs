use super::{LowRank, forward};
use crate::dropout::{self, Key};
use crate::rng::Stream;
use crate::{DType, Error, Indices, Result, Tensor, View, ViewMut, Workspace};
use candle_core::{Device, Tensor as Oracle, Var};

// The operations, over slices of host memory.
#[expect(clippy::too_many_arguments, reason = "as the operation")]
fn backward(
    x: View<'_>,
    low_rank: &LowRank<'_>,
    s: View<'_>,
    dy: View<'_>,
    dx: Option<ViewMut<'_>>,
    d_a: &mut [f32],
    d_b: &mut [f32],
    workspace: &Workspace,
) -> Result<()> {
    let rank = s.cols();
    let rows = d_a.len() / x.cols();
    let d_a = ViewMut::from_f32(d_a, rows, x.cols());
    let rows = d_b.len() / rank;
    let d_b = ViewMut::from_f32(d_b, rows, rank);
    super::backward(x, low_rank, s, dy, dx, d_a, d_b, workspace)
}

/// Sizes: tokens, input, output, rank.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    tokens: usize,
    inputs: usize,
    outputs: usize,
    rank: usize,
}

const fn sizes(tokens: usize, inputs: usize, outputs: usize, rank: usize) -> Sizes {
    Sizes {
        tokens,
        inputs,
        outputs,
        rank,
    }
}

const SIZES: [Sizes; 6] = [
    sizes(1, 1, 1, 1),
    sizes(3, 17, 123, 2),
    sizes(123, 64, 48, 16),
    sizes(0, 5, 6, 3),
    sizes(300, 130, 257, 8),
    sizes(70, 33, 21, 64),
];

struct Case {
    x: Tensor,
    a: Tensor,
    b: Tensor,
    y: Tensor,
    dy: Tensor,
    dx: Tensor,
    rows: Indices<'static>,
}

impl Case {
    fn random(sizes: Sizes, dtype: DType) -> Self {
        // The same numbers in every run: of one row and column, the terms of a sum may cancel.
        let mut stream = Stream::new((sizes.tokens * 7 + sizes.rank) as u64);
        let mut random = |rows: usize, cols: usize| {
            let values = (0..rows * cols).map(|_| stream.normal() as f32).collect();
            Tensor::from_f32(values, rows, cols)
        };
        Self {
            x: random(sizes.tokens, sizes.inputs).to_dtype(dtype),
            a: random(sizes.rank, sizes.inputs),
            b: random(sizes.outputs, sizes.rank),
            y: random(sizes.tokens, sizes.outputs).to_dtype(dtype),
            dy: random(sizes.tokens, sizes.outputs).to_dtype(dtype),
            dx: random(sizes.tokens, sizes.inputs).to_dtype(dtype),
            rows: Indices::host(
                (0..sizes.tokens as u32)
                    .flat_map(|t| [t / 5, t % 5])
                    .chain([3])
                    .collect::<Vec<_>>(),
            ),
        }
    }

    fn low_rank(&self, p: Option<f32>) -> LowRank<'_> {
        LowRank {
            a: self.a.view(),
            b: self.b.view(),
            scale: 0.7,
            dropout: p.map(|p| (Key { seed: 11, p }, &self.rows)),
            silent: None,
        }
    }
}

struct Results {
    y: Vec<f32>,
    s: Vec<f32>,
    dx: Vec<f32>,
    d_a: Vec<f32>,
    d_b: Vec<f32>,
}

fn run(case: &Case, sizes: Sizes, p: Option<f32>, workspace: &Workspace) -> Results {
    run_with(case, &case.low_rank(p), sizes, workspace)
}

fn run_with(case: &Case, low_rank: &LowRank<'_>, sizes: Sizes, workspace: &Workspace) -> Results {
    let (mut y, mut dx) = (case.y.clone(), case.dx.clone());
    let mut s = Tensor::from_f32(
        vec![f32::NAN; sizes.tokens * sizes.rank],
        sizes.tokens,
        sizes.rank,
    );
    let mut d_a = vec![0.5; sizes.rank * sizes.inputs];
    let mut d_b = vec![-0.5; sizes.outputs * sizes.rank];
    forward(
        case.x.view(),
        low_rank,
        y.view_mut(),
        s.view_mut(),
        workspace,
    )
    .expect("valid");
    backward(
        case.x.view(),
        low_rank,
        s.view(),
        case.dy.view(),
        Some(dx.view_mut()),
        &mut d_a,
        &mut d_b,
        workspace,
    )
    .expect("valid");
    Results {
        y: y.to_f32_vec(),
        s: s.to_f32_vec(),
        dx: dx.to_f32_vec(),
        d_a,
        d_b,
    }
}

/// Where an update is silent, it is as if neither x nor dy had the row.
#[test]
fn silent_rows_are_those_of_an_update_that_is_not_there() {
    let sizes = sizes(123, 64, 48, 16);
    let workspace = Workspace::new(sizes.tokens);
    for p in [None, Some(0.4)] {
        let case = Case::random(sizes, DType::F32);
        let marks: Vec<u32> = (0..sizes.tokens as u32)
            .map(|t| u32::from(t % 3 == 1))
            .collect();
        let marks = Indices::host(marks);
        let zeros = Tensor::zeros(DType::F32, 1, sizes.rank);
        let got = run_with(
            &case,
            &LowRank {
                silent: Some((&marks, zeros.view())),
                ..case.low_rank(p)
            },
            sizes,
            &workspace,
        );
        let mut without = Case::random(sizes, DType::F32);
        for t in (0..sizes.tokens).filter(|t| t % 3 == 1) {
            without.x.view_mut().row_range(t..t + 1).fill(0.0);
            without.dy.view_mut().row_range(t..t + 1).fill(0.0);
        }
        let want = run(&without, sizes, p, &workspace);
        assert_eq!(got.y, want.y, "{p:?}");
        assert_eq!(got.s, want.s, "{p:?}");
        assert_eq!(got.dx, want.dx, "{p:?}");
        assert_eq!(got.d_a, want.d_a, "{p:?}");
        assert_eq!(got.d_b, want.d_b, "{p:?}");
    }
}

fn check(what: &str, got: &[f32], want: &Oracle, tolerance: f64) {
    let want: Vec<f64> = want
        .flatten_all()
        .and_then(|t| t.to_vec1())
        .expect("f64 values");
    assert_eq!(got.len(), want.len(), "{what}: length");
    let scale = want.iter().fold(1e-6_f64, |scale, v| scale.max(v.abs()));
    for (at, (&got, &want)) in got.iter().zip(&want).enumerate() {
        let error = (f64::from(got) - want).abs();
        assert!(
            error <= tolerance * scale,
            "{what}[{at}] is {got}, expected {want}"
        );
    }
}

fn check_against_autograd(sizes: Sizes, dtype: DType, p: Option<f32>, tolerance: f64) {
    let case = Case::random(sizes, dtype);
    let workspace = Workspace::new(sizes.tokens);
    let got = run(&case, sizes, p, &workspace);
    let what = format!("{sizes:?} {dtype} {p:?}");
    if sizes.tokens == 0 {
        assert!(got.d_a.iter().all(|v| *v == 0.5) && got.d_b.iter().all(|v| *v == -0.5));
        return;
    }
    // The mask times 1 / (1 - p), as the dropout of ones.
    let mut mask = Tensor::from_f32(
        vec![1.0; sizes.tokens * sizes.inputs],
        sizes.tokens,
        sizes.inputs,
    );
    if let Some(p) = p {
        let ones = mask.clone();
        dropout::forward(
            ones.view(),
            Key { seed: 11, p },
            &case.rows,
            mask.view_mut(),
        )
        .expect("valid");
    }
    let oracle = |view: View<'_>| {
        let values: Vec<f64> = view.to_f32_vec().into_iter().map(f64::from).collect();
        Var::from_vec(values, (view.rows(), view.cols()), &Device::Cpu).expect("sizes agree")
    };
    let [x, a, b] = [&case.x, &case.a, &case.b].map(|t| oracle(t.view()));
    let [y, dy, dx, mask] = [&case.y, &case.dy, &case.dx, &mask].map(|t| oracle(t.view()));
    let compare = || -> candle_core::Result<()> {
        let s = (x.as_tensor() * mask.as_tensor())?.matmul(&a.t()?)?;
        let low = (s.matmul(&b.t()?)? * f64::from(0.7_f32))?;
        let gradients = (&low * dy.as_tensor())?.sum_all()?.backward()?;
        let gradient = |v: &Var| {
            gradients
                .get(v)
                .expect("the oracle has this gradient")
                .clone()
        };
        check(
            &format!("{what}: y"),
            &got.y,
            &(low + y.as_tensor())?,
            tolerance,
        );
        // s is f32, but with bf16 the masked x it comes from is rounded.
        check(&format!("{what}: s"), &got.s, &s, tolerance);
        check(
            &format!("{what}: dx"),
            &got.dx,
            &(gradient(&x) + dx.as_tensor())?,
            tolerance,
        );
        check(
            &format!("{what}: d_a"),
            &got.d_a,
            &(gradient(&a) + 0.5)?,
            tolerance,
        );
        check(
            &format!("{what}: d_b"),
            &got.d_b,
            &(gradient(&b) - 0.5)?,
            tolerance,
        );
        Ok(())
    };
    compare().expect("oracle");
}

#[test]
fn f32_matches_f64_autograd_with_and_without_dropout() {
    for sizes in SIZES {
        for p in [None, Some(0.0), Some(0.25)] {
            check_against_autograd(sizes, DType::F32, p, 3e-6);
        }
    }
}

#[test]
fn bf16_activations_round_the_results_once() {
    for sizes in SIZES {
        check_against_autograd(sizes, DType::Bf16, None, 5e-3);
        // With dropout x / (1 - p) and ds A are rounded as well.
        check_against_autograd(sizes, DType::Bf16, Some(0.25), 1.5e-2);
    }
}

#[test]
fn the_gradient_of_the_input_is_optional() {
    let sizes = SIZES[2];
    let case = Case::random(sizes, DType::F32);
    let workspace = Workspace::new(sizes.tokens);
    let with = run(&case, sizes, Some(0.1), &workspace);
    let mut d_a = vec![0.5; sizes.rank * sizes.inputs];
    let mut d_b = vec![-0.5; sizes.outputs * sizes.rank];
    let s = Tensor::from_f32(with.s, sizes.tokens, sizes.rank);
    let low_rank = case.low_rank(Some(0.1));
    let (x, dy) = (case.x.view(), case.dy.view());
    backward(
        x,
        &low_rank,
        s.view(),
        dy,
        None,
        &mut d_a,
        &mut d_b,
        &workspace,
    )
    .expect("valid");
    assert_eq!((d_a, d_b), (with.d_a, with.d_b));
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let sizes = sizes(700, 384, 900, 16);
    for dtype in [DType::F32, DType::Bf16] {
        let case = Case::random(sizes, dtype);
        let results = [1, 2, 3].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            let workspace = Workspace::new(sizes.tokens);
            let run = || run(&case, sizes, Some(0.1), &workspace);
            let results = pool.expect("threads start").install(run);
            [results.y, results.s, results.dx, results.d_a, results.d_b]
                .map(|v| v.into_iter().map(f32::to_bits).collect::<Vec<_>>())
        });
        assert!(
            results[0] == results[1] && results[0] == results[2],
            "{dtype}"
        );
    }
}

#[test]
fn arguments_that_do_not_fit_are_refused() {
    let sizes = sizes(3, 8, 5, 2);
    let case = Case::random(sizes, DType::F32);
    let workspace = Workspace::new(3);
    let s = Tensor::zeros(DType::F32, 3, 2);
    let run = |low_rank: &LowRank<'_>, s: &Tensor, d_a: &mut [f32]| {
        let (x, dy) = (case.x.view(), case.dy.view());
        backward(
            x,
            low_rank,
            s.view(),
            dy,
            None,
            d_a,
            &mut [0.0; 10],
            &workspace,
        )
    };
    let good = case.low_rank(None);
    assert!(run(&good, &s, &mut [0.0; 16]).is_ok());
    let error = run(&good, &s, &mut [0.0; 24]).expect_err("refused");
    assert_eq!(
        error.to_string(),
        "lora_linear::backward: d_a [R,in] is [3, 8] [rows, columns], expected [2, 8]"
    );
    let half = s.to_dtype(DType::Bf16);
    let error = run(&good, &half, &mut [0.0; 16]);
    assert!(matches!(error, Err(Error::DType { what: "s", .. })));
    let swapped = LowRank { a: good.b, ..good };
    assert!(matches!(
        run(&swapped, &s, &mut [0.0; 16]),
        Err(Error::Shape { .. })
    ));
    let too_much = case.low_rank(Some(1.5));
    assert!(matches!(
        run(&too_much, &s, &mut [0.0; 16]),
        Err(Error::Invalid { .. })
    ));
}
