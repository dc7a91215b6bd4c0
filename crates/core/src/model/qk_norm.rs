//! Where q and k get their positions: RoPE in place, or, where their heads are normed first, a normed
//! and rotated copy beside the projection that backward starts from.

use super::layer::Layer;
use super::norm::RmsNorm;
use super::run::Run;
use crate::Result;
use crate::params::FlatBuffer;
use ferrotune_kernels::{Tensor, View, attention, qk_norm, rope};

/// Norms of the heads of q and of k.
#[derive(Debug)]
pub(crate) struct QkNorms {
    pub(crate) q: RmsNorm,
    pub(crate) k: RmsNorm,
    /// The rope behind them.
    pub(crate) rope: usize,
}

impl QkNorms {
    pub(crate) fn trained(&self) -> bool {
        self.q.weight.trained() || self.k.weight.trained()
    }

    /// The norm of q, or of k, as the kernel takes it.
    fn of<'a>(&self, norm: &'a RmsNorm, run: &'a Run<'_>) -> qk_norm::Norm<'a> {
        let [cos, sin] = run.angles(self.rope);
        qk_norm::Norm {
            weight: norm.weight.view(run.params),
            offset: norm.offset,
            eps: norm.eps,
            cos,
            sin,
        }
    }
}

impl Layer {
    /// Gives q and k of `qkv` `[T, (H + 2 K) E]` their positions, in place.
    ///
    /// With a norm of their heads `qkv` stays as it is, and q and k with positions come back as a
    /// matrix `[T, (H + K) E]` of the workspace: repeating this gives them again.
    pub(crate) fn position(&self, run: &Run<'_>, qkv: &mut Tensor) -> Result<Option<Tensor>> {
        if self.qk_norms.is_some() {
            return self.positioned(run, qkv);
        }
        self.rotate(run, qkv, rope::Direction::Forward)?;
        Ok(None)
    }

    /// Normed q and k with positions, from `qkv` as [`Layer::position`] left it; `None` if they stand
    /// in `qkv` itself.
    pub(crate) fn positioned(&self, run: &Run<'_>, qkv: &Tensor) -> Result<Option<Tensor>> {
        let Some(norms) = &self.qk_norms else {
            return Ok(None);
        };
        let [q, k] = self.widths();
        let mut out = run.workspace.take(run.dtype, run.rows, q + k);
        for (columns, norm) in [(0..q, &norms.q), (q..q + k, &norms.k)] {
            let out = out.view_mut().columns(columns.clone());
            let norm = norms.of(norm, run);
            qk_norm::forward(qkv.view().columns(columns), &norm, out)?;
        }
        Ok(Some(out))
    }

    /// Turns the gradients of q and k in `d_qkv` into those of the projection.
    pub(crate) fn position_backward(
        &self,
        run: &Run<'_>,
        grads: &mut FlatBuffer,
        qkv: &Tensor,
        d_qkv: &mut Tensor,
    ) -> Result<()> {
        let Some(norms) = &self.qk_norms else {
            return self.rotate(run, d_qkv, rope::Direction::Backward);
        };
        let [q, k] = self.widths();
        for (columns, norm) in [(0..q, &norms.q), (q..q + k, &norms.k)] {
            let d_weight = norm.weight.gradient(grads);
            let d = d_qkv.view_mut().columns(columns.clone());
            let (x, norm) = (qkv.view().columns(columns), norms.of(norm, run));
            qk_norm::backward_in_place(d, x, &norm, d_weight, run.workspace)?;
        }
        Ok(())
    }

    /// Rotates q and k, which stand side by side, in place.
    fn rotate(&self, run: &Run<'_>, qkv: &mut Tensor, direction: rope::Direction) -> Result<()> {
        let Some(rope) = self.rope else {
            return Ok(());
        };
        let ([q, k], [cos, sin]) = (self.widths(), run.angles(rope));
        let heads = qkv.view_mut().columns(0..q + k);
        let rotary_dim = 2 * cos.cols();
        rope::apply(
            heads,
            self.attention.head_dim,
            cos,
            sin,
            rotary_dim,
            direction,
        )?;
        Ok(())
    }

    /// q `[T, H E]`, k and v `[T, K E]` of the packed projection; q and k of `positioned`, if given.
    pub(crate) fn split<'a>(
        &self,
        qkv: &'a Tensor,
        positioned: Option<&'a Tensor>,
    ) -> [View<'a>; 3] {
        let [q, k] = self.widths();
        let qk = positioned.unwrap_or(qkv).view();
        let v = qkv.view().columns(q + k..q + 2 * k);
        [qk.columns(0..q), qk.columns(q..q + k), v]
    }

    /// Columns of q, and of k.
    fn widths(&self) -> [usize; 2] {
        let attention::Config {
            heads,
            kv_heads,
            head_dim,
            ..
        } = self.attention;
        [heads * head_dim, kv_heads * head_dim]
    }
}
