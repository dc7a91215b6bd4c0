use super::Config;
use crate::rng::Stream;
use crate::test_support::stream;
use crate::{DType, Error, Indices, Result, Tensor, View, ViewMut, Workspace};
use candle_core::{D, DType as CandleDType, Device, IndexOp, Tensor as Oracle, Var};

// The operations, over slices of host memory.
#[expect(clippy::too_many_arguments, reason = "as the operation")]
fn forward(
    config: &Config,
    q: View<'_>,
    k: View<'_>,
    v: View<'_>,
    cu_q: &[u32],
    cu_k: &[u32],
    out: ViewMut<'_>,
    lse: &mut [f32],
) -> Result<()> {
    let lse = ViewMut::from_f32(lse, q.rows(), config.heads);
    let (cu_q, cu_k) = (Indices::host(cu_q), Indices::host(cu_k));
    super::forward(config, q, k, v, &cu_q, &cu_k, out, lse)
}

#[expect(clippy::too_many_arguments, reason = "as the operation")]
fn backward(
    config: &Config,
    q: View<'_>,
    k: View<'_>,
    v: View<'_>,
    out: View<'_>,
    lse: &[f32],
    cu_seqlens: &[u32],
    d_out: View<'_>,
    d_qkv: ViewMut<'_>,
) -> Result<()> {
    let lse = View::from_f32(lse, q.rows(), config.heads);
    super::backward(
        config,
        q,
        k,
        v,
        out,
        lse,
        &Indices::host(cu_seqlens),
        d_out,
        d_qkv,
        &Workspace::new(0),
    )
}

fn random(rows: usize, cols: usize, stream: &mut Stream) -> Tensor {
    let values = (0..rows * cols).map(|_| stream.normal() as f32).collect();
    Tensor::from_f32(values, rows, cols)
}

/// The columns `5..5+cols` of a wider matrix, with NaN around them.
fn padded(inner: &Tensor) -> Tensor {
    let mut wide = Tensor::zeros(inner.dtype(), inner.rows(), inner.cols() + 8);
    wide.view_mut().fill(f32::NAN);
    wide.view_mut()
        .columns(5..5 + inner.cols())
        .copy_from(inner.view());
    wide
}

fn inner(wide: &Tensor) -> View<'_> {
    wide.view().columns(5..wide.cols() - 3)
}

fn oracle(tensor: &Tensor) -> Var {
    let values: Vec<f64> = tensor.to_f32_vec().into_iter().map(f64::from).collect();
    Var::from_vec(values, (tensor.rows(), tensor.cols()), &Device::Cpu).expect("sizes agree")
}

/// Attention of one head of one sequence in f64; (output, log-sum-exp).
fn head(
    config: &Config,
    q: &Oracle,
    k: &Oracle,
    v: &Oracle,
) -> candle_core::Result<(Oracle, Oracle)> {
    let (queries, keys) = (q.dim(0)?, k.dim(0)?);
    let window = config.window.unwrap_or(keys);
    let mask: Vec<f64> = (0..queries * keys)
        .map(|at| {
            let (i, j) = (at / keys + keys - queries, at % keys);
            if j <= i && j + window > i { 0.0 } else { -1e30 }
        })
        .collect();
    let mask = Oracle::from_vec(mask, (queries, keys), q.device())?;
    let scores = (q.matmul(&k.t()?.contiguous()?)? * f64::from(config.scale))?;
    let scores = match config.softcap.map(f64::from) {
        None => scores,
        Some(softcap) => ((scores / softcap)?.tanh()? * softcap)?,
    };
    let scores = (scores + mask)?;
    let max = scores.max_keepdim(D::Minus1)?.detach();
    let exp = scores.broadcast_sub(&max)?.exp()?;
    let sum = exp.sum_keepdim(D::Minus1)?;
    let out = exp.broadcast_div(&sum)?.matmul(v)?;
    Ok((out, (sum.log()? + max)?.squeeze(1)?))
}

/// (output `[Tq,H*E]`, log-sum-exp `[Tq,H]`).
fn reference(
    config: &Config,
    [q, k, v]: [&Oracle; 3],
    cu_q: &[u32],
    cu_k: &[u32],
) -> candle_core::Result<(Oracle, Oracle)> {
    let (e, group) = (config.head_dim, config.heads / config.kv_heads);
    let (mut outs, mut lses) = (Vec::new(), Vec::new());
    for (rq, rk) in cu_q.windows(2).zip(cu_k.windows(2)) {
        if rq[0] == rq[1] {
            continue;
        }
        let rows = |t: &Oracle, r: &[u32], h: usize| {
            t.i((r[0] as usize..r[1] as usize, h * e..(h + 1) * e))?
                .contiguous()
        };
        let heads = (0..config.heads)
            .map(|h| {
                let kv = h / group;
                head(
                    config,
                    &rows(q, rq, h)?,
                    &rows(k, rk, kv)?,
                    &rows(v, rk, kv)?,
                )
            })
            .collect::<candle_core::Result<Vec<_>>>()?;
        let (out, lse): (Vec<_>, Vec<_>) = heads.into_iter().unzip();
        outs.push(Oracle::cat(&out, 1)?);
        lses.push(Oracle::stack(&lse, 1)?);
    }
    Ok((Oracle::cat(&outs, 0)?, Oracle::cat(&lses, 0)?))
}

fn values(oracle: &Oracle) -> Vec<f64> {
    let flat = oracle.flatten_all().expect("a tensor flattens");
    assert_eq!(flat.dtype(), CandleDType::F64);
    flat.to_vec1().expect("f64 values")
}

/// Largest error relative to the largest value; inputs are of order 1, so are the terms of sums that
/// cancel to zero.
fn check(what: &str, got: &[f32], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    let scale = want.iter().fold(1.0_f64, |scale, v| scale.max(v.abs()));
    for (at, (&got, &want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(got) - want).abs();
        assert!(
            error <= tolerance * scale,
            "{what}[{at}] is {got}, expected {want}"
        );
    }
}

fn config(heads: usize, kv_heads: usize, head_dim: usize, window: Option<usize>) -> Config {
    let scale = 1.0 / (head_dim as f32).sqrt();
    Config {
        heads,
        kv_heads,
        head_dim,
        scale,
        window,
        softcap: None,
    }
}

fn cu(lengths: &[usize]) -> Vec<u32> {
    let mut sum = 0;
    std::iter::once(0)
        .chain(lengths.iter().map(|len| {
            sum += *len as u32;
            sum
        }))
        .collect()
}

const CONFIGS: [(usize, usize, usize, Option<usize>); 6] = [
    (1, 1, 1, None),
    (2, 2, 3, None),
    (4, 2, 16, Some(7)),
    (6, 2, 17, Some(1)),
    (3, 1, 64, Some(100)),
    (4, 4, 32, Some(1000)),
];
const LENGTHS: [&[usize]; 5] = [&[1], &[0, 3, 1, 0, 17], &[123], &[64, 65, 0], &[5, 200, 1]];

/// Inputs rounded to `dtype`, all wide with NaN around them: q, k, v and the gradient of the output.
fn inputs(config: &Config, queries: usize, keys: usize, dtype: DType) -> [Tensor; 4] {
    let mut stream = stream((queries * 31 + keys) as u64);
    let (q, kv) = (
        config.heads * config.head_dim,
        config.kv_heads * config.head_dim,
    );
    [(queries, q), (keys, kv), (keys, kv), (queries, q)]
        .map(|(rows, cols)| padded(&random(rows, cols, &mut stream).to_dtype(dtype)))
}

#[test]
fn padding_is_zero_and_changes_no_bit_of_the_rest() {
    for dtype in [DType::F32, DType::Bf16] {
        let config = config(4, 2, 16, Some(7));
        let tensors = inputs(&config, 40, 40, dtype);
        let short = tensors.each_ref().map(|t| {
            let mut rows = Tensor::zeros(dtype, 25, t.cols());
            rows.view_mut().copy_from(t.view().row_range(0..25));
            rows
        });
        let bounds = [0, 9, 25];
        let (padded, plain) = (
            run(&config, &tensors, &bounds, dtype),
            run(&config, &short, &bounds, dtype),
        );
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        let pairs = [
            (
                inner(&padded.out).to_f32_vec(),
                inner(&plain.out).to_f32_vec(),
            ),
            (padded.lse, plain.lse),
            (
                inner(&padded.d_qkv).to_f32_vec(),
                inner(&plain.d_qkv).to_f32_vec(),
            ),
        ];
        for (padded, plain) in pairs {
            let (real, rest) = padded.split_at(plain.len());
            assert_eq!(bits(real), bits(&plain));
            assert!(rest.iter().all(|v| v.to_bits() == 0), "{rest:?}");
        }
    }
}

struct Run {
    out: Tensor,
    lse: Vec<f32>,
    d_qkv: Tensor,
}

/// Both passes into stale NaN, on views with a pitch.
fn run(config: &Config, [q, k, v, d_out]: &[Tensor; 4], bounds: &[u32], dtype: DType) -> Run {
    let rows = q.rows();
    let mut out = padded(&Tensor::zeros(dtype, rows, config.heads * config.head_dim));
    let cols = (config.heads + 2 * config.kv_heads) * config.head_dim;
    let mut d_qkv = padded(&Tensor::zeros(dtype, rows, cols));
    out.view_mut().fill(f32::NAN);
    d_qkv.view_mut().fill(f32::NAN);
    let mut lse = vec![f32::NAN; rows * config.heads];
    let [q, k, v, d_out] = [q, k, v, d_out].map(inner);
    let end = out.cols() - 3;
    forward(
        config,
        q,
        k,
        v,
        bounds,
        bounds,
        out.view_mut().columns(5..end),
        &mut lse,
    )
    .expect("valid arguments");
    let end = d_qkv.cols() - 3;
    let target = d_qkv.view_mut().columns(5..end);
    backward(config, q, k, v, inner(&out), &lse, bounds, d_out, target).expect("valid arguments");
    Run { out, lse, d_qkv }
}

fn check_against_autograd(config: &Config, lengths: &[usize], dtype: DType, tolerance: f64) {
    let bounds = cu(lengths);
    let rows = lengths.iter().sum();
    let inputs = inputs(config, rows, rows, dtype);
    let got = run(config, &inputs, &bounds, dtype);

    let [q, k, v, d_out] = inputs.each_ref().map(|wide| {
        oracle(&Tensor::from_f32(
            inner(wide).to_f32_vec(),
            rows,
            wide.cols() - 8,
        ))
    });
    let (out, lse) = reference(config, [&q, &k, &v], &bounds, &bounds).expect("oracle");
    let what = format!("{config:?} {lengths:?} {dtype}");
    check(
        &format!("{what}: out"),
        &inner(&got.out).to_f32_vec(),
        &values(&out),
        tolerance,
    );
    check(&format!("{what}: lse"), &got.lse, &values(&lse), tolerance);

    let loss = (out * d_out.as_tensor())
        .and_then(|product| product.sum_all())
        .expect("oracle");
    let gradients = loss.backward().expect("oracle");
    let parts = [
        ("dq", &q, config.heads),
        ("dk", &k, config.kv_heads),
        ("dv", &v, config.kv_heads),
    ];
    let mut column = 0;
    for (name, variable, heads) in parts {
        let want = values(
            gradients
                .get(variable)
                .expect("the oracle has this gradient"),
        );
        let width = heads * config.head_dim;
        let part = inner(&got.d_qkv)
            .columns(column..column + width)
            .to_f32_vec();
        check(&format!("{what}: {name}"), &part, &want, tolerance);
        column += width;
    }
    for wide in [&got.out, &got.d_qkv] {
        let (all, cols) = (wide.to_f32_vec(), wide.cols());
        let gap = |at: usize| !(5..cols - 3).contains(&(at % cols));
        let untouched = all.iter().enumerate().all(|(at, v)| !gap(at) || v.is_nan());
        assert!(untouched, "{what}: wrote between the rows");
    }
}

#[test]
fn f32_matches_f64_autograd_for_groups_windows_and_ragged_sequences() {
    for (heads, kv_heads, head_dim, window) in CONFIGS {
        for lengths in LENGTHS {
            let config = config(heads, kv_heads, head_dim, window);
            check_against_autograd(&config, lengths, DType::F32, 2e-6);
        }
    }
}

#[test]
fn a_softcap_bounds_scores_and_scales_their_gradients() {
    // Scores here are of order 1: the first cap bends every score, the last almost none.
    for softcap in [0.5, 2.0, 50.0] {
        for (heads, kv_heads, head_dim, window) in CONFIGS {
            let config = Config {
                softcap: Some(softcap),
                ..config(heads, kv_heads, head_dim, window)
            };
            check_against_autograd(&config, &[5, 70, 1], DType::F32, 2e-6);
            check_against_autograd(&config, &[5, 70, 1], DType::Bf16, 8e-3);
        }
    }
}

#[test]
fn contexts_longer_than_a_task_match_autograd() {
    check_against_autograd(&config(2, 1, 8, None), &[1100], DType::F32, 4e-6);
    check_against_autograd(&config(2, 1, 8, Some(600)), &[1100, 3], DType::F32, 4e-6);
}

#[test]
fn bf16_is_within_a_rounding_of_inputs_and_outputs() {
    // The output is rounded before the backward pass reads it: 2^-8 of it in delta, then in dS.
    for (heads, kv_heads, head_dim, window) in CONFIGS {
        for lengths in LENGTHS {
            let config = config(heads, kv_heads, head_dim, window);
            check_against_autograd(&config, lengths, DType::Bf16, 8e-3);
        }
    }
}

#[test]
fn queries_are_aligned_with_the_last_keys() {
    for window in [None, Some(5), Some(150)] {
        let config = config(4, 2, 16, window);
        for (queries, keys) in [
            (vec![1, 1], vec![300, 1]),
            (vec![3, 0, 40], vec![17, 9, 123]),
            (vec![2, 70], vec![2, 71]),
        ] {
            let (cu_q, cu_k) = (cu(&queries), cu(&keys));
            let rows = queries.iter().sum();
            let [q, k, v, _] = inputs(&config, rows, keys.iter().sum(), DType::F32);
            let mut out = Tensor::zeros(DType::F32, rows, 64);
            let mut lse = vec![f32::NAN; rows * 4];
            let [q, k, v] = [&q, &k, &v].map(inner);
            forward(&config, q, k, v, &cu_q, &cu_k, out.view_mut(), &mut lse)
                .expect("valid arguments");
            let [q, k, v] = [q, k, v].map(|view| {
                oracle(&Tensor::from_f32(
                    view.to_f32_vec(),
                    view.rows(),
                    view.cols(),
                ))
            });
            let (want, want_lse) = reference(&config, [&q, &k, &v], &cu_q, &cu_k).expect("oracle");
            check("out", &out.to_f32_vec(), &values(&want), 2e-6);
            check("lse", &lse, &values(&want_lse), 2e-6);
        }
    }
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let config = config(6, 3, 32, Some(150));
    let bounds = cu(&[200, 1, 0, 317]);
    for dtype in [DType::F32, DType::Bf16] {
        let inputs = inputs(&config, 518, 518, dtype);
        let results = [1, 2, 3].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            let run = || run(&config, &inputs, &bounds, dtype);
            let run = pool.expect("threads start").install(run);
            let bits = |v: Vec<f32>| v.into_iter().map(f32::to_bits).collect::<Vec<_>>();
            (
                bits(run.out.to_f32_vec()),
                bits(run.lse),
                bits(run.d_qkv.to_f32_vec()),
            )
        });
        assert!(
            results[0] == results[1] && results[0] == results[2],
            "{dtype}"
        );
    }
}

#[test]
fn no_tokens_are_legal() {
    let config = config(4, 2, 8, None);
    for bounds in [vec![0], vec![0, 0], vec![0, 0, 0]] {
        let inputs = inputs(&config, 0, 0, DType::F32);
        assert!(run(&config, &inputs, &bounds, DType::F32).lse.is_empty());
    }
}

#[test]
fn a_nan_score_surfaces_in_the_output() {
    let config = config(1, 1, 4, None);
    let mut q = Tensor::zeros(DType::F32, 2, 4);
    q.view_mut().row_range(1..2).fill(f32::NAN);
    let k = Tensor::zeros(DType::F32, 2, 4);
    let mut out = Tensor::zeros(DType::F32, 2, 4);
    let mut lse = [0.0; 2];
    let (q, k) = (q.view(), k.view());
    forward(&config, q, k, k, &[0, 2], &[0, 2], out.view_mut(), &mut lse).expect("valid arguments");
    let out = out.to_f32_vec();
    assert!(out[..4].iter().all(|v| *v == 0.0) && out[4..].iter().all(|v| v.is_nan()));
    assert!(lse[0] == 0.0 && lse[1].is_nan());
}

#[test]
fn arguments_that_do_not_fit_are_refused() {
    let good = config(4, 2, 8, None);
    let message = |config: Config, cu_q: &[u32], cu_k: &[u32]| {
        let q = Tensor::zeros(DType::F32, 3, 32);
        let k = Tensor::zeros(DType::F32, 5, 16);
        let mut out = Tensor::zeros(DType::F32, 3, 32);
        let (mut lse, k) = ([0.0; 12], k.view());
        forward(
            &config,
            q.view(),
            k,
            k,
            cu_q,
            cu_k,
            out.view_mut(),
            &mut lse,
        )
        .expect_err("refused")
        .to_string()
    };
    let three_heads = message(
        Config {
            kv_heads: 3,
            ..good
        },
        &[0, 3],
        &[0, 5],
    );
    assert!(
        three_heads.contains("4 query heads and 3 key heads"),
        "{three_heads}"
    );
    let window = message(
        Config {
            window: Some(0),
            ..good
        },
        &[0, 3],
        &[0, 5],
    );
    assert!(window.contains("window of 0"), "{window}");
    let scale = message(
        Config {
            scale: -0.5,
            ..good
        },
        &[0, 3],
        &[0, 5],
    );
    assert!(scale.contains("scale of -0.5"), "{scale}");
    let softcap = message(
        Config {
            softcap: Some(0.0),
            ..good
        },
        &[0, 3],
        &[0, 5],
    );
    assert!(softcap.contains("softcap of 0"), "{softcap}");
    let width = message(
        Config {
            head_dim: 4,
            ..good
        },
        &[0, 3],
        &[0, 5],
    );
    assert!(width.contains("q [Tq,H*E]"), "{width}");
    let long = message(good, &[0, 4], &[0, 5]);
    assert!(long.contains("cu_q is [0, 4]"), "{long}");
    let falling = message(good, &[0, 3, 3], &[0, 6, 5]);
    assert!(falling.contains("cu_k is [0, 6, 5]"), "{falling}");
    let keys = message(good, &[0, 3, 3], &[0, 2, 5]);
    assert!(
        keys.contains("sequence 0 has 3 queries but 2 keys"),
        "{keys}"
    );

    let (q, k) = (
        Tensor::zeros(DType::F32, 3, 32),
        Tensor::zeros(DType::F32, 3, 16),
    );
    let mut d_qkv = Tensor::zeros(DType::F32, 3, 63);
    let (q, k, bounds) = (q.view(), k.view(), [0, 3]);
    let error = backward(&good, q, k, k, q, &[0.0; 12], &bounds, q, d_qkv.view_mut());
    assert!(matches!(
        error,
        Err(Error::Shape {
            what: "d_qkv [T,(H+2K)*E]",
            ..
        })
    ));
}
