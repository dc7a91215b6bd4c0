//! Where the output of a block joins the residual stream.

use super::norm::{Norm, Normed};
use super::run::Run;
use crate::Result;
use crate::params::FlatBuffer;
use ferrotune_kernels::{Tensor, View, Workspace, axpby};

/// `stream + scale * norm(output)`, with the output of a block.
#[derive(Debug)]
pub(crate) struct Residual {
    pub(crate) norm: Norm,
    pub(crate) scale: f32,
}

/// What backward needs where the output has a norm.
pub(crate) struct NormedOutput {
    /// The output before its norm, `[T, D]`, and the norm's statistics.
    output: Tensor,
    statistics: Option<Tensor>,
}

/// The stream behind a block, and its norm for the next one.
pub(crate) struct Joined {
    pub(crate) stream: Tensor,
    pub(crate) normed: Normed,
    pub(crate) saved: Option<NormedOutput>,
}

impl Residual {
    /// Adds `output` to `stream`, and norms the sum with `next`.
    pub(crate) fn forward(
        &self,
        run: &Run<'_>,
        output: Tensor,
        stream: &Tensor,
        next: &Norm,
    ) -> Result<Joined> {
        let Normed { y, statistics } = self.norm.forward(run, &output)?;
        let (mut sum, saved) = match y {
            Some(y) => (y, Some(NormedOutput { output, statistics })),
            None => (output, None),
        };
        if self.scale != 1.0 {
            axpby::scale(self.scale, sum.view_mut())?;
        }
        let normed = next.add_forward(run, &mut sum, stream)?;
        Ok(Joined {
            stream: sum,
            normed,
            saved,
        })
    }

    /// The gradient of the block's output and `room` columns more, from that of the stream; `None` if they are the
    /// same.
    pub(crate) fn backward(
        &self,
        run: &Run<'_>,
        grads: &mut FlatBuffer,
        saved: Option<NormedOutput>,
        d_stream: View<'_>,
        room: usize,
    ) -> Result<Option<Tensor>> {
        let [rows, cols] = d_stream.shape();
        let mut scaled = None;
        if self.scale != 1.0 {
            let mut d = run.workspace.take(run.dtype, rows, cols + room);
            axpby::add(0.0, d.view_mut().columns(0..cols), self.scale, d_stream)?;
            scaled = Some(d);
        }
        let Some(NormedOutput { output, statistics }) = saved else {
            return Ok(scaled);
        };
        let d_normed = scaled.as_ref().map_or(d_stream, Tensor::view);
        let d_normed = d_normed.columns(0..cols);
        let mut d_output = run.workspace.take_zeroed(run.dtype, rows, cols + room);
        let (statistics_of, dx) = (statistics.as_ref(), d_output.view_mut().columns(0..cols));
        self.norm
            .backward(run, grads, d_normed, &output, statistics_of, dx)?;
        run.give(statistics.into_iter().chain(scaled).chain([output]));
        Ok(Some(d_output))
    }
}

impl Joined {
    /// Stream and norm, where there is no backward.
    pub(crate) fn without_saved(self, workspace: &Workspace) -> (Tensor, Normed) {
        if let Some(saved) = self.saved {
            saved.release(workspace);
        }
        (self.stream, self.normed)
    }
}

impl NormedOutput {
    pub(crate) fn tensors_mut(&mut self) -> impl Iterator<Item = &mut Tensor> {
        [&mut self.output].into_iter().chain(&mut self.statistics)
    }

    /// Gives everything back.
    pub(crate) fn release(self, workspace: &Workspace) {
        let tensors = self.statistics.into_iter().chain([self.output]);
        tensors.for_each(|tensor| workspace.give(tensor));
    }
}
