use crate::test_support::{
    DTYPES, ODD_COLUMNS, Pitched, assert_close, assert_same_on_any_thread_count, flat, normal,
    oracle_gradients, stream, tolerance, var,
};
use crate::{DType, Error, Indices, Result, Tensor, View, ViewMut};
use candle_core::Device;

// The operations, over slices of host memory.
fn forward(table: View<'_>, ids: &[u32], out: ViewMut<'_>) -> Result<()> {
    super::forward(table, &Indices::host(ids), out)
}

fn backward(d_out: View<'_>, ids: &[u32], d_table: &mut [f32]) -> Result<()> {
    let rows = d_table.len() / d_out.cols().max(1);
    let d_table = ViewMut::from_f32(d_table, rows, d_out.cols());
    super::backward(d_out, &Indices::host(ids), d_table)
}

const VOCAB: usize = 13;
/// Repeats, the first and the last row, and rows that no token hits.
const IDS: [u32; 7] = [4, 12, 0, 4, 9, 4, 12];

#[test]
fn both_directions_match_candle() {
    let index = candle_core::Tensor::new(&IDS, &Device::Cpu).unwrap();
    for (table_dtype, out_dtype) in DTYPES.into_iter().flat_map(|t| DTYPES.map(|o| (t, o))) {
        for cols in ODD_COLUMNS {
            let shape = [IDS.len(), cols];
            let table = Pitched::normal(1, [VOCAB, cols], table_dtype);
            let leaf = var(&table.values(), &[VOCAB, cols]);
            let want = leaf.index_select(&index, 0).unwrap();
            let what = format!("{table_dtype} -> {out_dtype}, {cols} columns");

            let mut out = Pitched::zeros(shape, out_dtype);
            forward(table.view(), &IDS, out.view_mut()).unwrap();
            assert_close(&out.values(), &flat(&want), tolerance(out_dtype), &what);

            let d_out = Pitched::normal(2, shape, out_dtype);
            let mut d_table = normal(3, VOCAB * cols);
            let gradient = oracle_gradients(&want, &d_out.values(), &[&leaf]);
            let want: Vec<f32> = d_table
                .iter()
                .zip(&gradient[0])
                .map(|(a, b)| a + b)
                .collect();
            backward(d_out.view(), &IDS, &mut d_table).unwrap();
            // The table's gradient is f32 whatever the data is.
            assert_close(&d_table, &want, tolerance(DType::F32), &what);
        }
    }
}

#[test]
fn results_do_not_depend_on_the_thread_count() {
    let (tokens, vocab, cols) = (3_000, 400, 123);
    let mut stream = stream(5);
    let ids: Vec<u32> = (0..tokens).map(|_| stream.below(vocab) as u32).collect();
    let table = Pitched::normal(1, [vocab, cols], DType::F32);
    let d_out = Pitched::normal(2, [tokens, cols], DType::F32);
    assert_same_on_any_thread_count(|| {
        let mut out = Pitched::zeros([tokens, cols], DType::F32);
        forward(table.view(), &ids, out.view_mut()).unwrap();
        let mut d_table = vec![0.0; vocab * cols];
        backward(d_out.view(), &ids, &mut d_table).unwrap();
        vec![out.values(), d_table]
    });
}

#[test]
fn no_rows_is_legal() {
    let table = Tensor::zeros(DType::F32, VOCAB, 4);
    let mut out = Tensor::zeros(DType::F32, 0, 4);
    forward(table.view(), &[], out.view_mut()).unwrap();
    let mut d_table = vec![1.0; VOCAB * 4];
    backward(out.view(), &[], &mut d_table).unwrap();
    assert!(d_table.iter().all(|&v| v == 1.0));
}

#[test]
fn an_id_outside_the_table_is_refused_before_anything_is_written() {
    let table = Tensor::zeros(DType::F32, VOCAB, 4);
    let mut out = Tensor::from_f32(vec![5.0; 8], 2, 4);
    let error = forward(table.view(), &[12, 13], out.view_mut()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "embedding::forward: ids[1] is 13, but there are only 13"
    );
    assert!(out.to_f32_vec().iter().all(|&v| v == 5.0));
    let mut d_table = vec![0.0; VOCAB * 4];
    let error = backward(out.view(), &[12, 13], &mut d_table).unwrap_err();
    assert!(matches!(
        error,
        Error::Index {
            at: 1,
            index: 13,
            limit: 13,
            ..
        }
    ));
    assert!(d_table.iter().all(|&v| v == 0.0));
}

#[test]
fn wrong_shapes_are_refused() {
    let table = Tensor::zeros(DType::F32, VOCAB, 4);
    let mut out = Tensor::zeros(DType::F32, 2, 4);
    assert!(forward(table.view(), &[1], out.view_mut()).is_err());
    assert!(forward(table.view().columns(0..3), &[1, 2], out.view_mut()).is_err());
    assert!(backward(out.view(), &[1], &mut [0.0; 52]).is_err());
    let mut narrow = [0.0; 39];
    let narrow = ViewMut::from_f32(&mut narrow, VOCAB, 3);
    assert!(super::backward(out.view(), &Indices::host(&[1, 2][..]), narrow).is_err());
}

#[test]
fn a_part_of_a_table_takes_and_gives_for_its_own_rows_alone() {
    // Rows 9 to 12 of the table; IDS hits 12 twice and 9 once.
    let (first, cols) = (9, 5);
    let part = Pitched::normal(1, [VOCAB - first, cols], DType::F32);
    let mut out = Pitched::normal(2, [IDS.len(), cols], DType::F32);
    let before = out.values();
    let indices = Indices::host(&IDS[..]);
    super::overlay(part.view(), first, &indices, out.view_mut()).unwrap();
    let (after, rows) = (out.values(), part.values());
    let mut want = vec![0.0; (VOCAB - first) * cols];
    for (t, &id) in IDS.iter().enumerate() {
        let at = t * cols..(t + 1) * cols;
        match (id as usize).checked_sub(first) {
            None => assert_eq!(after[at.clone()], before[at]),
            Some(row) => {
                let row = row * cols..(row + 1) * cols;
                assert_eq!(after[at.clone()], rows[row.clone()]);
                for (sum, value) in want[row].iter_mut().zip(&after[at]) {
                    *sum += value;
                }
            }
        }
    }
    let mut d_part = vec![0.0; want.len()];
    let to = ViewMut::from_f32(&mut d_part, VOCAB - first, cols);
    super::overlay_backward(out.view(), first, &indices, to).unwrap();
    assert_eq!(d_part, want);
    assert!(super::overlay(part.view(), first - 1, &indices, out.view_mut()).is_err());
}
