use crate::row_blocks::{blocks, rows_per_block};
use crate::simd::dispatch;
use crate::{Element, Rows, RowsMut};
use rayon::prelude::{IndexedParallelIterator, IntoParallelIterator, ParallelIterator};

pub(super) fn forward<X: Element, Y: Element>(
    table: Rows<'_, X>,
    first: usize,
    ids: &[u32],
    mut out: RowsMut<'_, Y>,
) {
    let step = rows_per_block(out.cols());
    blocks(&mut out).enumerate().for_each(|(block, mut out)| {
        dispatch(
            #[inline(always)]
            || {
                for (out, &id) in out.rows().zip(&ids[block * step..]) {
                    let Some(row) = (id as usize).checked_sub(first) else {
                        continue;
                    };
                    for (out, value) in out.iter_mut().zip(table.row(row)) {
                        *out = Y::from_f32(value.to_f32());
                    }
                }
            },
        );
    });
}

/// A row of the table and the tokens that are added to it, in order.
struct Target<'a> {
    row: &'a mut [f32],
    tokens: &'a [u32],
}

pub(super) fn backward<G: Element>(
    d_out: Rows<'_, G>,
    first: usize,
    ids: &[u32],
    d_table: &mut [f32],
) {
    let cols = d_out.cols();
    let tokens = tokens_by_id(ids);
    let before = tokens.partition_point(|&token| (ids[token as usize] as usize) < first);
    targets(ids, first, &tokens[before..], d_table, cols)
        .into_par_iter()
        .with_min_len(rows_per_block(cols))
        .for_each(|target| {
            dispatch(
                #[inline(always)]
                || {
                    for &token in target.tokens {
                        let row = target.row.iter_mut().zip(d_out.row(token as usize));
                        for (sum, value) in row {
                            *sum += value.to_f32();
                        }
                    }
                },
            );
        });
}

/// Token numbers sorted by id, then by number.
fn tokens_by_id(ids: &[u32]) -> Vec<u32> {
    let mut tokens: Vec<u32> = (0..).take(ids.len()).collect();
    tokens.sort_by_key(|&token| ids[token as usize]);
    tokens
}

/// Cuts the rows that are hit out of the table, so that each belongs to one thread.
fn targets<'a>(
    ids: &[u32],
    first: usize,
    tokens: &'a [u32],
    d_table: &'a mut [f32],
    cols: usize,
) -> Vec<Target<'a>> {
    let same_id = |a: &u32, b: &u32| ids[*a as usize] == ids[*b as usize];
    let (mut rest, mut next_row) = (d_table, 0);
    tokens
        .chunk_by(same_id)
        .map(|tokens| {
            let id = ids[tokens[0] as usize] as usize - first;
            let (_, from_row) = std::mem::take(&mut rest).split_at_mut((id - next_row) * cols);
            let (row, after) = from_row.split_at_mut(cols);
            (rest, next_row) = (after, id + 1);
            Target { row, tokens }
        })
        .collect()
}
