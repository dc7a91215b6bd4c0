//! Learned positions: a table whose rows are added to the embedding's.

use super::run::Run;
use super::vocabulary::Embedding;
use crate::params::FlatBuffer;
use crate::{Error, Result};
use ferrotune_kernels::{Tensor, View, axpby};

/// `stream[t] += table[position of t]`.
#[derive(Debug)]
pub(crate) struct Positions {
    /// `[positions, D]`, frozen or trained as a whole, or with an update.
    pub(crate) embedding: Embedding,
    /// Its module.
    pub(crate) name: &'static str,
}

impl Positions {
    /// Adds the rows to `stream` `[T, D]`.
    pub(crate) fn add(&self, run: &Run<'_>, stream: &mut Tensor) -> Result<()> {
        let positions = &run.inputs.positions;
        let table = self.embedding.table.whole(run.params, run.dtype);
        self.require(positions, table.rows())?;
        let rows = self.embedding.forward(run, positions)?;
        axpby::add(1.0, stream.view_mut(), 1.0, rows.view())?;
        run.workspace.give(rows);
        Ok(())
    }

    /// Adds the gradients of what is trained of it, given that of the stream.
    pub(crate) fn backward(
        &self,
        run: &Run<'_>,
        grads: &mut FlatBuffer,
        d_stream: View<'_>,
    ) -> Result<()> {
        let positions = &run.inputs.positions;
        self.embedding.backward(run, grads, positions, d_stream)
    }

    pub(crate) fn trained(&self) -> bool {
        self.embedding.trained()
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
