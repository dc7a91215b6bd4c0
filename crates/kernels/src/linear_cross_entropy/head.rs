//! The output projection: one matrix, or one in two pieces with a low-rank update.

use crate::error::{check_dtype, check_shape};
use crate::{DType, Error, Result, View, ViewMut};

/// What turns hidden states into logits: `scale (hidden W^T + r s B^T)`, with W the rows of `weight` and
/// then those of `tail`, and r the factor of the update.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    /// `[V - N, D]`.
    pub weight: View<'a>,
    /// The last N rows of W, `[N, D]`: those that are trained where the others are not.
    pub tail: Option<View<'a>>,
    /// What is added to the product with W.
    pub update: Option<Update<'a>>,
    /// Factor of the logits.
    pub scale: f32,
    /// Bound c of the logits, which become `c * tanh(logit / c)`.
    pub softcap: Option<f32>,
}

/// `r s B^T`.
#[derive(Clone, Copy, Debug)]
pub struct Update<'a> {
    /// `[T, R]`, in one dtype with `b`.
    pub s: View<'a>,
    /// `[V, R]`.
    pub b: View<'a>,
    /// r.
    pub scale: f32,
}

/// Where the gradients of a [`Head`] go; each f32. A piece without one is frozen, and its gradient never
/// computed.
#[derive(Debug, Default)]
pub struct HeadGradients<'a> {
    /// Of `weight`, added to.
    pub weight: Option<ViewMut<'a>>,
    /// Of `tail`, added to.
    pub tail: Option<ViewMut<'a>>,
    /// Of the update, which has them exactly if the head has one.
    pub update: Option<UpdateGradients<'a>>,
}

/// Where the gradients of an [`Update`] go.
#[derive(Debug)]
pub struct UpdateGradients<'a> {
    /// Of `s`, in its dtype: written, zero off the label rows.
    pub s: ViewMut<'a>,
    /// Of `b`, f32: added to.
    pub b: ViewMut<'a>,
}

impl<'a> From<View<'a>> for Head<'a> {
    fn from(weight: View<'a>) -> Self {
        Self {
            weight,
            tail: None,
            update: None,
            scale: 1.0,
            softcap: None,
        }
    }
}

impl<'a> From<Option<ViewMut<'a>>> for HeadGradients<'a> {
    fn from(weight: Option<ViewMut<'a>>) -> Self {
        Self {
            weight,
            ..Self::default()
        }
    }
}

impl Head<'_> {
    /// V.
    pub(super) fn vocabulary(&self) -> usize {
        self.weight.rows() + self.tail.map_or(0, |tail| tail.rows())
    }

    pub(super) fn check(&self, op: &'static str, hidden: View<'_>) -> Result<()> {
        if let Some(softcap) = self.softcap
            && !(softcap > 0.0 && softcap.is_finite())
        {
            let message = format!("a softcap of {softcap}; it must be positive and finite");
            return Err(Error::Invalid { op, message });
        }
        let width = hidden.cols();
        for piece in std::iter::once(self.weight).chain(self.tail) {
            check_shape(op, "head [V,D]", [piece.rows(), width], piece.shape())?;
        }
        if let Some(Update { s, b, .. }) = self.update {
            check_shape(op, "s [T,R]", [hidden.rows(), b.cols()], s.shape())?;
            check_shape(op, "b [V,R]", [self.vocabulary(), b.cols()], b.shape())?;
            check_dtype(op, "s", b.dtype(), s.dtype())?;
        }
        Ok(())
    }
}

impl HeadGradients<'_> {
    pub(super) fn check(&self, op: &'static str, head: &Head<'_>) -> Result<()> {
        let shape = |view: Option<View<'_>>| view.map_or([0, 0], |view| view.shape());
        let check = |what, gradient: &Option<ViewMut<'_>>, value| match gradient {
            Some(gradient) => {
                check_dtype(op, what, DType::F32, gradient.dtype())?;
                check_shape(op, what, shape(value), gradient.shape())
            }
            None => Ok(()),
        };
        check("d_head [V,D]", &self.weight, Some(head.weight))?;
        check("d_tail [N,D]", &self.tail, head.tail)?;
        let [s, b] = [
            head.update.map(|update| update.s),
            head.update.map(|update| update.b),
        ];
        let (d_s, d_b) = match &self.update {
            Some(update) => (Some(update.s.as_view()), Some(update.b.as_view())),
            None => (None, None),
        };
        check_shape(op, "d_s [T,R]", shape(s), shape(d_s))?;
        check_shape(op, "d_b [V,R]", shape(b), shape(d_b))?;
        if let (Some(s), Some(d_s), Some(d_b)) = (s, d_s, d_b) {
            check_dtype(op, "d_s", s.dtype(), d_s.dtype())?;
            check_dtype(op, "d_b", DType::F32, d_b.dtype())?;
        }
        Ok(())
    }
}
