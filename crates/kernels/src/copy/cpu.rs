use crate::{Element, Rows, RowsMut};
use rayon::prelude::*;

pub(super) fn fill<T: Element>(mut to: RowsMut<'_, T>, value: f32) {
    to.par_rows_mut()
        .for_each(|row| row.fill(T::from_f32(value)));
}

pub(super) fn copy<D: Element, S: Element>(mut to: RowsMut<'_, D>, from: Rows<'_, S>) {
    to.par_rows_mut().enumerate().for_each(|(r, row)| {
        for (to, from) in row.iter_mut().zip(from.row(r)) {
            *to = D::from_f32(from.to_f32());
        }
    });
}
