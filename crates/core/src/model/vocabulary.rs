//! Tables over the vocabulary, `[V, D]`: the embedding, and the head where that has a table of its own.

use super::column_norms::ColumnNorms;
use super::run::Run;
use crate::Result;
use crate::adapter::LowRank;
use crate::params::{FlatBuffer, ParamId};
use ferrotune_kernels::{DType, Indices, Tensor, View, Workspace, dora, embedding, matmul};

/// A table, frozen or trained, or frozen but for some of its rows.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) weight: TableWeight,
    pub(crate) rows: Option<TrainedRows>,
}

#[derive(Debug)]
pub(crate) enum TableWeight {
    Frozen(Tensor),
    Trained(ParamId),
}

/// The rows of a table that are trained: the last ones, tokens having changed places for that.
///
/// So a product with the table is two products, whatever the tokens are, and no value of the frozen
/// part is written. What goes in as ids and labels is renumbered ([`TrainedRows::place`]); a loss does
/// not depend on the order of its classes.
#[derive(Debug)]
pub(crate) struct TrainedRows {
    /// `[N, D]`.
    pub(crate) param: ParamId,
    /// V - N; what the frozen tensor holds from here on is never used.
    first: usize,
    /// Row of each token.
    places: Vec<u32>,
}

impl TrainedRows {
    /// `indices` are distinct and below `vocabulary`; row i of `param` is that of token `indices[i]`.
    pub(crate) fn new(param: ParamId, indices: &[u32], vocabulary: usize) -> Self {
        let first = vocabulary - indices.len();
        let mut places: Vec<u32> = (0..vocabulary as u32).collect();
        for (place, &token) in (first as u32..).zip(indices) {
            places[token as usize] = place;
        }
        for (left, moved) in exchanged(indices, first, vocabulary) {
            places[moved as usize] = left;
        }
        Self {
            param,
            first,
            places,
        }
    }

    /// Moves the frozen rows of `table` `[V, D]` in host memory to where [`TrainedRows::new`] says.
    pub(crate) fn reorder(table: &mut Tensor, indices: &[u32]) {
        let (vocabulary, width) = (table.rows(), table.cols());
        for (left, moved) in exchanged(indices, vocabulary - indices.len(), vocabulary) {
            let [left, moved] = [left, moved].map(|row| row as usize);
            // Through f32 and back, which keeps every value of a short float.
            let values = table.view().row_range(moved..moved + 1).to_f32_vec();
            let to = table.view_mut().row_range(left..left + 1);
            to.copy_from(View::from_f32(&values, 1, width));
        }
    }

    /// The row of each token.
    pub(crate) fn places(&self) -> &[u32] {
        &self.places
    }

    /// The token of each row.
    pub(crate) fn tokens(&self) -> Vec<u32> {
        let mut tokens = vec![0; self.places.len()];
        for (token, &place) in (0..).zip(&self.places) {
            tokens[place as usize] = token;
        }
        tokens
    }

    /// The row of a token; what is no token stays what it is.
    pub(crate) fn place(&self, token: u32) -> u32 {
        self.places.get(token as usize).copied().unwrap_or(token)
    }
}

/// Rows before `first` that trained tokens leave, with the frozen token from behind that takes each.
fn exchanged(indices: &[u32], first: usize, vocabulary: usize) -> Vec<(u32, u32)> {
    let mut trained: Vec<u32> = indices.to_vec();
    trained.sort_unstable();
    let left = trained.iter().copied().filter(|&id| (id as usize) < first);
    let behind = first as u32..vocabulary as u32;
    let moved = behind.filter(|id| trained.binary_search(id).is_err());
    left.zip(moved).collect()
}

impl Table {
    /// The two pieces of a product with the table, in `dtype` where they are trained: the rows, and
    /// those after them that alone are trained.
    pub(crate) fn pieces<'a>(
        &'a self,
        params: &'a FlatBuffer,
        dtype: DType,
    ) -> (View<'a>, Option<View<'a>>) {
        let whole = self.whole(params, dtype);
        match &self.rows {
            None => (whole, None),
            Some(rows) => {
                let tail = params.view_as(rows.param, dtype);
                (whole.row_range(0..rows.first), Some(tail))
            }
        }
    }

    /// What is trained of it.
    pub(crate) fn param(&self) -> Option<ParamId> {
        match (&self.weight, &self.rows) {
            (TableWeight::Trained(id), _) => Some(*id),
            (TableWeight::Frozen(_), rows) => rows.as_ref().map(|rows| rows.param),
        }
    }

    /// Its values without those of trained rows, in `dtype` where it is trained.
    pub(crate) fn whole<'a>(&'a self, params: &'a FlatBuffer, dtype: DType) -> View<'a> {
        match &self.weight {
            TableWeight::Frozen(tensor) => tensor.view(),
            TableWeight::Trained(id) => params.view_as(*id, dtype),
        }
    }
}

/// The rows of token ids, or of positions.
#[derive(Debug)]
pub(crate) struct Embedding {
    pub(crate) table: Table,
    /// `scale * B[ids] A`, with the shapes of a linear `[V, D]`.
    pub(crate) update: Option<LowRank>,
    /// Where the update has a magnitude: what its norms are made of.
    pub(crate) norms: Option<ColumnNorms>,
}

impl Embedding {
    /// A `[T, D]` buffer with the rows of `ids`.
    pub(crate) fn forward(&self, run: &Run<'_>, ids: &Indices<'_>) -> Result<Tensor> {
        let mut out = self.unscaled(run, ids)?;
        if let Some((magnitude, norms)) = self.norms(run)? {
            let magnitude = run.params.view(magnitude);
            dora::scale(out.view_mut(), magnitude, norms.view())?;
            run.give_fixed([norms]);
        }
        Ok(out)
    }

    /// [`Embedding::forward`] before DoRA brings its columns to the trained norms.
    fn unscaled(&self, run: &Run<'_>, ids: &Indices<'_>) -> Result<Tensor> {
        let params = run.params;
        let table = self.table.whole(params, run.dtype);
        let mut out = run.workspace.take(run.dtype, run.rows, table.cols());
        embedding::forward(table, ids, out.view_mut())?;
        if let Some(rows) = &self.table.rows {
            let values = params.view_as(rows.param, run.dtype);
            embedding::overlay(values, rows.first, ids, out.view_mut())?;
        }
        if let Some(update) = &self.update {
            add_update(run, update, ids, &mut out)?;
        }
        Ok(out)
    }

    /// DoRA's magnitude, and the norms that it stands for, `[1, D]`.
    fn norms(&self, run: &Run<'_>) -> Result<Option<(ParamId, Tensor)>> {
        let (Some(update), Some(norms)) = (&self.update, &self.norms) else {
            return Ok(None);
        };
        let Some(magnitude) = update.magnitude else {
            return Ok(None);
        };
        let table = self.table.whole(run.params, run.dtype);
        Ok(Some((magnitude.id(), norms.of(run, update, table)?)))
    }

    /// Adds to `grads` what `d_out` `[T, D]` says of what is trained here.
    pub(crate) fn backward(
        &self,
        run: &Run<'_>,
        grads: &mut FlatBuffer,
        ids: &Indices<'_>,
        d_out: View<'_>,
    ) -> Result<()> {
        match (&self.table.weight, &self.table.rows) {
            (TableWeight::Trained(id), _) => {
                embedding::backward(d_out, ids, grads.view_mut(*id))?;
            }
            (_, Some(rows)) => {
                let to = grads.view_mut(rows.param);
                embedding::overlay_backward(d_out, rows.first, ids, to)?;
            }
            (_, None) => {}
        }
        let Some(update) = &self.update else {
            return Ok(());
        };
        let Some((magnitude, norms)) = self.norms(run)? else {
            return update_backward(run, grads, update, ids, d_out);
        };
        // The rows again: to look them up costs less than to keep them.
        let unscaled = self.unscaled(run, ids)?;
        let mut d_unscaled = run
            .workspace
            .take(d_out.dtype(), d_out.rows(), d_out.cols());
        dora::backward(
            d_out,
            unscaled.view(),
            run.params.view(magnitude),
            norms.view(),
            grads.view_mut(magnitude),
            d_unscaled.view_mut(),
        )?;
        run.give([unscaled]);
        update_backward(run, grads, update, ids, d_unscaled.view())?;
        run.give([d_unscaled]);
        run.give_fixed([norms]);
        Ok(())
    }

    /// Whether anything here is trained.
    pub(crate) fn trained(&self) -> bool {
        self.table.param().is_some() || self.update.is_some()
    }
}

/// Adds `scale * B[ids] A` of a table's update to `out` `[T, D]`.
fn add_update(run: &Run<'_>, update: &LowRank, ids: &Indices<'_>, out: &mut Tensor) -> Result<()> {
    let s = gathered(run, update, ids)?;
    let a = run.params.view_as(update.a, run.dtype);
    matmul::nn(out.view_mut(), 1.0, update.scale, rank_of(&s, update), a)?;
    run.workspace.give(s);
    Ok(())
}

/// Adds the gradients of a table's update to `grads`, from that of its output, `[T, D]`.
fn update_backward(
    run: &Run<'_>,
    grads: &mut FlatBuffer,
    update: &LowRank,
    ids: &Indices<'_>,
    d_out: View<'_>,
) -> Result<()> {
    // s again: to gather it costs less than to keep it.
    let s = gathered(run, update, ids)?;
    let mut d_s = run.workspace.take(s.dtype(), s.rows(), s.cols());
    let d_a = grads.view_mut(update.a);
    matmul::tn(d_a, 1.0, update.scale, rank_of(&s, update), d_out)?;
    let (a, scale) = (run.params.view_as(update.a, run.dtype), update.scale);
    let d_rank = d_s.view_mut().columns(0..update.rank);
    matmul::nt(d_rank, 0.0, scale, d_out, a)?;
    embedding::backward(rank_of(&d_s, update), ids, grads.view_mut(update.b))?;
    run.give([s, d_s]);
    Ok(())
}

/// `B[ids]`, `[T, rank]` and room up to whole 16 bytes.
fn gathered(run: &Run<'_>, update: &LowRank, ids: &Indices<'_>) -> Result<Tensor> {
    let b = run.params.view_as(update.b, run.dtype);
    let cols = Workspace::aligned(b.dtype(), update.rank);
    let mut s = run.workspace.take(b.dtype(), run.rows, cols);
    let to = s.view_mut().columns(0..update.rank);
    embedding::forward(b, ids, to)?;
    Ok(s)
}

fn rank_of<'a>(s: &'a Tensor, update: &LowRank) -> View<'a> {
    s.view().columns(0..update.rank)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::{ParamLayoutBuilder, ParamSpec};

    #[test]
    fn every_token_keeps_its_row_and_trained_ones_come_last_in_their_order() {
        let id = ParamLayoutBuilder::new().add(ParamSpec::new("rows", [1], 0));
        for indices in [
            &[5, 1][..],
            &[0],
            &[7, 6],
            &[6, 0, 7],
            &[],
            &[3, 2, 1, 0, 7, 6, 5, 4],
        ] {
            let rows = TrainedRows::new(id, indices, 8);
            let mut table = Tensor::from_f32((0..8).map(|v| v as f32).collect(), 8, 1);
            TrainedRows::reorder(&mut table, indices);
            let values = table.to_f32_vec();
            let mut seen = std::collections::BTreeSet::new();
            for token in 0..8 {
                let place = rows.place(token) as usize;
                assert!(seen.insert(place), "{indices:?}: two tokens in row {place}");
                match indices.iter().position(|&index| index == token) {
                    Some(i) => assert_eq!(place, 8 - indices.len() + i, "{indices:?}"),
                    None => assert_eq!(values[place], token as f32, "{indices:?}"),
                }
            }
            let tokens = rows.tokens();
            assert!((0..8).all(|token| tokens[rows.places()[token as usize] as usize] == token));
            assert_eq!(rows.place(8), 8);
        }
    }
}
