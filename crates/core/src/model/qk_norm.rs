//! Where q and k get their positions: RoPE in place, or, where their heads are normed first, a normed
//! and rotated copy beside the projection that backward starts from.

use super::config::QkNorm;
use super::layer::Layer;
use super::norm::RmsNorm;
use super::run::Run;
use crate::Result;
use crate::params::FlatBuffer;
use ferrotune_kernels::{DType, Tensor, View, ViewMut, attention, qk_norm, rms_norm, rope};
use std::ops::Range;

/// Norms of q and of k.
#[derive(Debug)]
pub(crate) struct QkNorms {
    pub(crate) q: RmsNorm,
    pub(crate) k: RmsNorm,
    pub(crate) over: QkNorm,
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

    /// [`Layer::position`], with the keys and values of a prefix in place.
    pub(crate) fn position_all(&self, run: &Run<'_>, qkv: &mut Tensor) -> Result<Option<Tensor>> {
        let mut positioned = self.position(run, qkv)?;
        self.place_keys(run, positioned.as_mut().unwrap_or(qkv))?;
        self.place_values(run, qkv)?;
        Ok(positioned)
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
            let (x, out) = (qkv.view().columns(columns.clone()), out.view_mut());
            let out = out.columns(columns);
            match norms.over {
                QkNorm::PerHead => qk_norm::forward(x, &norms.of(norm, run), out)?,
                QkNorm::Whole => run.give([whole_forward(run, norm, x, out)?]),
            }
        }
        if norms.over == QkNorm::Whole {
            self.rotate(run, &mut out, rope::Direction::Forward)?;
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
        if norms.over == QkNorm::Whole {
            return self.whole_backward(run, grads, norms, qkv, d_qkv);
        }
        let [q, k] = self.widths();
        for (columns, norm) in [(0..q, &norms.q), (q..q + k, &norms.k)] {
            let d_weight = norm.weight.gradient(grads);
            let d = d_qkv.view_mut().columns(columns.clone());
            let (x, norm) = (qkv.view().columns(columns), norms.of(norm, run));
            qk_norm::backward_in_place(d, x, &norm, d_weight, run.workspace)?;
        }
        Ok(())
    }

    /// The same behind norms over all heads together.
    fn whole_backward(
        &self,
        run: &Run<'_>,
        grads: &mut FlatBuffer,
        norms: &QkNorms,
        qkv: &Tensor,
        d_qkv: &mut Tensor,
    ) -> Result<()> {
        self.rotate(run, d_qkv, rope::Direction::Backward)?;
        let [q, k] = self.widths();
        let mut normed = run.workspace.take(run.dtype, run.rows, q + k);
        let mut d_normed = run.workspace.take(run.dtype, run.rows, q + k);
        d_normed
            .view_mut()
            .copy_from(d_qkv.view().columns(0..q + k));
        // The norm's backward adds.
        d_qkv.view_mut().columns(0..q + k).fill(0.0);
        for (columns, norm) in [(0..q, &norms.q), (q..q + k, &norms.k)] {
            let x = qkv.view().columns(columns.clone());
            // For its statistics: to compute them again costs less than to keep them for all layers.
            let out = normed.view_mut().columns(columns.clone());
            let rstd = whole_forward(run, norm, x, out)?;
            rms_norm::backward(
                d_normed.view().columns(columns.clone()),
                x,
                norm.weight(run.params),
                rstd.view(),
                d_qkv.view_mut().columns(columns),
                norm.weight.gradient(grads),
            )?;
            run.give([rstd]);
        }
        run.give([normed, d_normed]);
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
        let [q, k, v] = self.columns();
        let qk = positioned.unwrap_or(qkv).view();
        [qk.columns(q), qk.columns(k), qkv.view().columns(v)]
    }

    /// Columns of q, k and v in the packed projection.
    pub(crate) fn columns(&self) -> [Range<usize>; 3] {
        let [q, k] = self.widths();
        [0..q, q..q + k, q + k..q + 2 * k]
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

/// The norm of all columns of `x` together, into `out`; its statistics `[T, 1]`.
fn whole_forward(run: &Run<'_>, norm: &RmsNorm, x: View<'_>, out: ViewMut<'_>) -> Result<Tensor> {
    let mut rstd = run.workspace.take(DType::F32, x.rows(), 1);
    let weight = norm.weight(run.params);
    rms_norm::forward(x, weight, norm.eps, out, rstd.view_mut())?;
    Ok(rstd)
}
