//! The kernels against their CPU twins.

use super::with_each;
use crate::attention::{Config, backward, forward};
use crate::test_support::{assert_same_bits, cuda_device, normal};
use crate::twins::{Matrix, Place, assert_cuda_matches};
use crate::{DType, Device, Error, Indices, Tensor, Workspace};
use std::ops::Range;

/// Heads, key heads, head width.
type Heads = [usize; 3];

pub(super) fn config([heads, kv_heads, head_dim]: Heads) -> Config {
    Config {
        heads,
        kv_heads,
        head_dim,
        scale: 1.0 / (head_dim as f32).sqrt(),
        window: None,
        softcap: None,
    }
}

pub(super) fn bounds(lengths: &[u32]) -> Vec<u32> {
    let ends = lengths.iter().scan(0, |end, length| {
        *end += length;
        Some(*end)
    });
    std::iter::once(0).chain(ends).collect()
}

/// out, lse and the gradients dq, dk and dv.
pub(super) fn both_passes(
    place: &Place,
    config: &Config,
    lengths: &[u32],
    dtype: DType,
) -> Vec<(DType, Vec<f32>)> {
    padded_passes(place, config, lengths, 0, dtype)
}

/// [`both_passes`] with `padding` rows after the last sequence.
fn padded_passes(
    place: &Place,
    config: &Config,
    lengths: &[u32],
    padding: usize,
    dtype: DType,
) -> Vec<(DType, Vec<f32>)> {
    let matrix = |seed, shape| place.matrix(seed, shape, dtype);
    passes(place, config, lengths, padding, dtype, matrix)
}

/// [`padded_passes`] of the matrices that `matrix` makes of a seed and a shape.
pub(super) fn passes(
    place: &Place,
    config: &Config,
    lengths: &[u32],
    padding: usize,
    dtype: DType,
    matrix: impl Fn(u64, [usize; 2]) -> Matrix,
) -> Vec<(DType, Vec<f32>)> {
    let cu_seqlens = place.indices(&bounds(lengths));
    let rows = lengths.iter().sum::<u32>() as usize + padding;
    let (width, kv_width) = (
        config.heads * config.head_dim,
        config.kv_heads * config.head_dim,
    );
    let [q, d_out] = [1, 4].map(|seed| matrix(seed, [rows, width]));
    let [k, v] = [2, 3].map(|seed| matrix(seed, [rows, kv_width]));
    let mut out = place.poisoned([rows, width], dtype);
    let mut lse = place.dense(5, [rows, config.heads]);
    let workspace = Workspace::on(place.device().clone(), rows);
    let mut d_qkv = place.poisoned([rows, width + 2 * kv_width], dtype);
    let [q, k, v] = [q.view(), k.view(), v.view()];
    let cu = &cu_seqlens;
    forward(config, q, k, v, cu, cu, out.view_mut(), lse.view_mut()).unwrap();
    backward(
        config,
        q,
        k,
        v,
        out.view(),
        lse.view(),
        cu,
        d_out.view(),
        d_qkv.view_mut(),
        &workspace,
    )
    .unwrap();
    let (gradients, mut parts) = (d_qkv.values(), [vec![], vec![], vec![]]);
    for row in gradients.chunks(width + 2 * kv_width) {
        let (d_q, rest) = row.split_at(width);
        let (d_k, d_v) = rest.split_at(kv_width);
        for (part, values) in parts.iter_mut().zip([d_q, d_k, d_v]) {
            part.extend_from_slice(values);
        }
    }
    let [d_q, d_k, d_v] = parts.map(|part| (dtype, part));
    vec![
        (dtype, out.values()),
        (DType::F32, lse.to_f32_vec()),
        d_q,
        d_k,
        d_v,
    ]
}

fn check(config: &Config, lengths: &[u32], dtype: DType) {
    let what = format!("{config:?} {lengths:?} {dtype}");
    with_each(|| assert_cuda_matches(&what, |place| both_passes(place, config, lengths, dtype)));
}

/// No rows, one row, and a tile less one, one tile, and one more of either pass.
const LENGTHS: [u32; 7] = [1, 0, 31, 16, 65, 0, 64];

#[test]
fn bf16_matches_for_every_width_of_tile() {
    for (heads, lengths) in [
        ([2, 1, 8], &LENGTHS[..]),
        ([2, 2, 20], &[17, 33]),
        ([2, 1, 64], &[66]),
        ([2, 1, 80], &[3, 20]),
        ([1, 1, 96], &[49]),
        ([1, 1, 128], &[31, 40]),
        ([1, 1, 130], &[9]),
        ([1, 1, 256], &[5, 34]),
    ] {
        check(&config(heads), lengths, DType::Bf16);
    }
}

#[test]
fn bf16_matches_over_many_tiles() {
    for (heads, lengths) in [
        ([2, 1, 64], &[1, 129, 0, 192, 260][..]),
        ([2, 1, 128], &[128, 64, 197]),
    ] {
        check(&config(heads), lengths, DType::Bf16);
    }
}

#[test]
fn f32_matches_for_every_width_of_tile() {
    for (heads, lengths) in [
        ([2, 1, 8], &LENGTHS[..]),
        ([1, 1, 1], &[9]),
        ([2, 2, 20], &[17, 33]),
        ([4, 1, 64], &[15, 16]),
        ([2, 1, 96], &[18]),
        ([2, 1, 128], &[31]),
        ([2, 1, 256], &[5, 18]),
    ] {
        check(&config(heads), lengths, DType::F32);
    }
}

#[test]
fn a_group_of_heads_shares_its_keys() {
    for dtype in [DType::F32, DType::Bf16] {
        for heads in [[2, 2, 16], [4, 2, 16], [4, 1, 16], [8, 1, 16]] {
            check(&config(heads), &[18, 3], dtype);
        }
    }
}

#[test]
fn a_window_hides_old_keys() {
    for dtype in [DType::F32, DType::Bf16] {
        for window in [2, 40, usize::MAX] {
            let window = Some(window);
            let config = Config {
                window,
                ..config([2, 1, 16])
            };
            check(&config, &[70, 20], dtype);
        }
    }
    // Blocks of queries that see no first key, and of keys that no last query sees.
    for heads in [[2, 1, 64], [1, 1, 128]] {
        let window = Some(40);
        let config = Config {
            window,
            ..config(heads)
        };
        check(&config, &[500], DType::Bf16);
    }
}

#[test]
fn a_softcap_bounds_the_scores() {
    for dtype in [DType::F32, DType::Bf16] {
        for softcap in [0.5, 50.0] {
            let softcap = Some(softcap);
            let config = Config {
                softcap,
                ..config([2, 1, 16])
            };
            check(&config, &[40, 3], dtype);
        }
    }
}

#[test]
fn a_score_far_above_those_before_it_scales_what_was_summed() {
    for (heads, length) in [([2, 1, 64], 300), ([1, 1, 128], 300)] {
        let config = Config {
            scale: 0.5,
            ..config(heads)
        };
        check(&config, &[length], DType::Bf16);
    }
}

#[test]
fn few_queries_meet_many_keys() {
    for (dtype, window) in [DType::F32, DType::Bf16]
        .into_iter()
        .flat_map(|dtype| [None, Some(1), Some(30)].map(|window| (dtype, window)))
    {
        let config = Config {
            window,
            ..config([2, 1, 24])
        };
        let (queries, keys) = ([1, 1, 0, 40], [150, 1, 7, 123]);
        let matches = |place: &Place| {
            let (cu_q, cu_k) = (
                place.indices(&bounds(&queries)),
                place.indices(&bounds(&keys)),
            );
            let q = place.matrix(1, [42, 48], dtype);
            let (k, v) = (
                place.matrix(2, [281, 24], dtype),
                place.matrix(3, [281, 24], dtype),
            );
            let mut out = place.poisoned([42, 48], dtype);
            let mut lse = place.dense(4, [42, 2]);
            let [q, k, v] = [q.view(), k.view(), v.view()];
            let results = (out.view_mut(), lse.view_mut());
            forward(&config, q, k, v, &cu_q, &cu_k, results.0, results.1).unwrap();
            vec![(dtype, out.values()), (DType::F32, lse.to_f32_vec())]
        };
        with_each(|| assert_cuda_matches(&format!("{dtype} {window:?}"), matches));
    }
}

#[test]
fn padding_is_zero_and_changes_no_bit_of_the_rest() {
    let place = Place::dense_on(Device::Cuda(cuda_device()));
    let one_each = |heads, dtype, lengths: &[u32], paddings: &[usize]| {
        let config = config(heads);
        let plain = both_passes(&place, &config, lengths, dtype);
        for &padding in paddings {
            let what = format!("{heads:?} {dtype} {lengths:?} and {padding}");
            assert_cuda_matches(&what, |place| {
                padded_passes(place, &config, lengths, padding, dtype)
            });
            let padded = padded_passes(&place, &config, lengths, padding, dtype);
            for ((_, padded), (_, plain)) in padded.iter().zip(&plain) {
                let (real, rest) = padded.split_at(plain.len());
                assert_same_bits(real, plain, &what);
                assert!(rest.iter().all(|v| v.to_bits() == 0), "{what}: {rest:?}");
            }
        }
    };
    with_each(|| {
        for dtype in [DType::F32, DType::Bf16] {
            one_each([2, 1, 16], dtype, &[1, 0, 31, 16, 65, 0], &[1, 15, 200]);
            one_each([2, 1, 16], dtype, &[128], &[16]);
            one_each([1, 1, 256], dtype, &[18], &[14]);
            one_each([2, 1, 16], dtype, &[], &[3]);
        }
    });
}

#[test]
fn what_other_rows_hold_changes_no_bit() {
    let place = Place::dense_on(Device::Cuda(cuda_device()));
    for (heads, lengths, padding) in [
        ([2, 1, 64], &[70, 33, 150][..], 9),
        ([2, 1, 104], &[70, 40], 0),
        ([1, 1, 40], &[100], 90),
    ] {
        let config = config(heads);
        let all = lengths.iter().sum::<u32>() as usize + padding;
        let others = |seed: u64, shape: [usize; 2], rows: Range<usize>| {
            let mut values = normal(seed, shape[0] * shape[1]);
            for (row, values) in values.chunks_mut(shape[1]).enumerate() {
                if !rows.contains(&row) {
                    values.fill(if seed.is_multiple_of(2) {
                        f32::NAN
                    } else {
                        f32::INFINITY
                    });
                }
            }
            place.store(&values, shape, DType::Bf16)
        };
        with_each(|| {
            let both = |rows: &Range<usize>| {
                let matrix = |seed, shape| others(seed, shape, rows.clone());
                passes(&place, &config, lengths, padding, DType::Bf16, matrix)
            };
            let plain = both(&(0..all));
            for bounds in bounds(lengths).windows(2) {
                let rows = bounds[0] as usize..bounds[1] as usize;
                for ((_, plain), (_, got)) in plain.iter().zip(&both(&rows)) {
                    let width = plain.len() / all;
                    let own = rows.start * width..rows.end * width;
                    let what = format!("{heads:?} {lengths:?} {rows:?}");
                    assert_same_bits(&got[own.clone()], &plain[own], &what);
                }
            }
        });
    }
}

#[test]
fn no_tokens_are_legal() {
    for lengths in [&[][..], &[0, 0]] {
        check(&config([2, 1, 16]), lengths, DType::Bf16);
    }
}

#[test]
fn heads_wider_than_256_are_refused() {
    let device = Device::Cuda(cuda_device());
    let [q, mut out] = [(); 2].map(|()| Tensor::empty(&device, DType::Bf16, 3, 257));
    let mut lse = Tensor::empty(&device, DType::F32, 3, 1);
    let cu = Indices::new(vec![0, 3], &device);
    let (q, config) = (q.view(), config([1, 1, 257]));
    let error = forward(&config, q, q, q, &cu, &cu, out.view_mut(), lse.view_mut());
    assert!(matches!(error, Err(Error::Invalid { message, .. }) if message.contains("257")));
}
