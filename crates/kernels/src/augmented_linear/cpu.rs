use super::Factors;
use crate::{Element, Rows, RowsMut};

pub(super) fn place<W: Element>(
    mut weight: RowsMut<'_, W>,
    [out, inputs]: [usize; 2],
    updates: &[Factors<'_>],
) {
    for update in updates {
        let (rank, first) = (update.a.rows(), inputs + update.rank);
        let (a, b) = (update.a.to_f32_vec(), update.b.to_f32_vec());
        for (r, a) in a.chunks_exact(inputs.max(1)).enumerate() {
            let to = &mut weight.row_mut(out + update.rank + r)[..inputs];
            to.iter_mut()
                .zip(a)
                .for_each(|(to, a)| *to = W::from_f32(*a));
        }
        for (o, b) in b.chunks_exact(rank.max(1)).enumerate() {
            let to = &mut weight.row_mut(update.row + o)[first..first + rank];
            let scaled = b.iter().map(|b| W::from_f32(update.scale * b));
            to.iter_mut().zip(scaled).for_each(|(to, b)| *to = b);
        }
    }
}

pub(super) fn copy<M: Element, S: Element>(mut to: RowsMut<'_, M>, s: Rows<'_, S>) {
    for t in 0..s.rows() {
        let values = s.row(t).iter().map(|s| M::from_f32(s.to_f32()));
        to.row_mut(t)
            .iter_mut()
            .zip(values)
            .for_each(|(to, s)| *to = s);
    }
}
