use super::{backward, forward, overlay, overlay_backward};
use crate::DType;
use crate::test_support::{DTYPES, stream};
use crate::twins::assert_cuda_matches;

const VOCAB: usize = 13;
/// Repeats, the first and the last row, and rows that no token hits.
const IDS: [u32; 7] = [4, 12, 0, 4, 9, 4, 12];

#[test]
fn matches_the_cpu() {
    for (table_dtype, out_dtype) in DTYPES.into_iter().flat_map(|t| DTYPES.map(|o| (t, o))) {
        for (ids, cols) in [(&IDS[..], 1), (&IDS, 123), (&IDS, 2120), (&[], 8)] {
            let shape = [ids.len(), cols];
            let what = format!("{table_dtype} -> {out_dtype}, {shape:?}");
            assert_cuda_matches(&what, |place| {
                let (table, ids) = (
                    place.matrix(1, [VOCAB, cols], table_dtype),
                    place.indices(ids),
                );
                let mut out = place.poisoned(shape, out_dtype);
                forward(table.view(), &ids, out.view_mut()).unwrap();
                let mut d_table = place.dense(2, [VOCAB, cols]);
                let d_out = place.matrix(3, shape, out_dtype);
                backward(d_out.view(), &ids, d_table.view_mut()).unwrap();
                vec![
                    (out_dtype, out.values()),
                    (DType::F32, d_table.to_f32_vec()),
                ]
            });
        }
    }
}

/// More tokens than a block compares at a time, with ids that come back after that many.
#[test]
fn tokens_far_apart_are_summed_in_order() {
    let mut stream = stream(5);
    let ids: Vec<u32> = (0..1100).map(|_| stream.below(VOCAB) as u32).collect();
    assert_cuda_matches("1100 tokens", |place| {
        let (d_out, mut d_table) = (
            place.matrix(1, [ids.len(), 5], DType::Bf16),
            place.dense(2, [VOCAB, 5]),
        );
        backward(d_out.view(), &place.indices(&ids), d_table.view_mut()).unwrap();
        vec![(DType::F32, d_table.to_f32_vec())]
    });
}

#[test]
fn a_part_of_a_table_matches_the_cpu() {
    let (first, part) = (9, VOCAB - 9);
    for (dtype, cols) in DTYPES.into_iter().flat_map(|d| [(d, 5), (d, 264)]) {
        let shape = [IDS.len(), cols];
        assert_cuda_matches(&format!("{dtype} {shape:?}"), |place| {
            let (table, ids) = (place.matrix(1, [part, cols], dtype), place.indices(&IDS));
            let mut out = place.matrix(2, shape, dtype);
            overlay(table.view(), first, &ids, out.view_mut()).unwrap();
            let mut d_table = place.dense(3, [part, cols]);
            overlay_backward(out.view(), first, &ids, d_table.view_mut()).unwrap();
            vec![(dtype, out.values()), (DType::F32, d_table.to_f32_vec())]
        });
    }
}
