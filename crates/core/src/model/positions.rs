//! Learned positions: a table whose rows are added to the embedding's.

use super::run::Run;
use super::vocabulary::{self, Table};
use crate::adapter::LowRank;
use crate::params::FlatBuffer;
use crate::{Error, Result};
use ferrotune_kernels::{Tensor, axpby, embedding};

/// `stream[t] += table[position of t]`.
#[derive(Debug)]
pub(crate) struct Positions {
    /// `[positions, D]`, frozen or trained as a whole.
    pub(crate) table: Table,
    /// Of the table, as the embedding's.
    pub(crate) update: Option<LowRank>,
    /// Its module.
    pub(crate) name: &'static str,
}

impl Positions {
    /// Adds the rows to `stream` `[T, D]`.
    pub(crate) fn add(&self, run: &Run<'_>, stream: &mut Tensor) -> Result<()> {
        let (table, positions) = (
            self.table.whole(run.params, run.dtype),
            &run.inputs.positions,
        );
        self.require(positions, table.rows())?;
        let mut rows = run.workspace.take(run.dtype, stream.rows(), stream.cols());
        embedding::forward(table, positions, rows.view_mut())?;
        axpby::add(1.0, stream.view_mut(), 1.0, rows.view())?;
        run.workspace.give(rows);
        match &self.update {
            Some(update) => vocabulary::add_update(run, update, positions, stream),
            None => Ok(()),
        }
    }

    /// Adds the gradients of what is trained of it, given that of the stream.
    pub(crate) fn backward(
        &self,
        run: &Run<'_>,
        grads: &mut FlatBuffer,
        d_stream: &Tensor,
    ) -> Result<()> {
        if let Some(id) = self.table.param() {
            let positions = &run.inputs.positions;
            embedding::backward(d_stream.view(), positions, grads.view_mut(id))?;
        }
        if let Some(update) = &self.update {
            let positions = &run.inputs.positions;
            vocabulary::update_backward(run, grads, update, positions, d_stream.view())?;
        }
        Ok(())
    }

    pub(crate) fn trained(&self) -> bool {
        self.table.param().is_some() || self.update.is_some()
    }

    /// Refuses a document that is longer than the table.
    fn require(&self, positions: &[u32], limit: usize) -> Result<()> {
        match positions.iter().max() {
            Some(&last) if last as usize >= limit => Err(Error::config(
                "max_length",
                format!(
                    "a document has {} tokens, but the base learned {limit} positions (`{}`); \
                     expected at most {limit}",
                    last + 1,
                    self.name
                ),
            )),
            _ => Ok(()),
        }
    }
}
