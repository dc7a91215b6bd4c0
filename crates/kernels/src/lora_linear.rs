//! stand-in
#![allow(missing_docs, clippy::all)]
use crate::{DType, Result, Tensor, View, ViewMut, Workspace, dropout, matmul};
#[derive(Clone, Copy, Debug)]
pub struct LowRank<'a> {
    pub a: View<'a>,
    pub b: View<'a>,
    pub scale: f32,
    pub dropout: Option<(dropout::Key, &'a [[u32; 2]])>,
}
pub fn forward(
    x: View<'_>,
    l: &LowRank<'_>,
    y: ViewMut<'_>,
    mut s: ViewMut<'_>,
    _: &Workspace,
) -> Result<()> {
    if let Some((k, r)) = l.dropout {
        let mut xd = Tensor::zeros(DType::F32, x.rows(), x.cols());
        dropout::forward(x, k, r, xd.view_mut())?;
        matmul::nt(s.reborrow(), 0.0, 1.0, xd.view(), l.a)?;
    } else {
        matmul::nt(s.reborrow(), 0.0, 1.0, x, l.a)?;
    }
    matmul::nt(y, 1.0, l.scale, s.as_view(), l.b)
}
pub fn backward(
    x: View<'_>,
    l: &LowRank<'_>,
    s: View<'_>,
    dy: View<'_>,
    dx: Option<ViewMut<'_>>,
    d_a: &mut [f32],
    d_b: &mut [f32],
    _: &Workspace,
) -> Result<()> {
    let r = l.a.rows();
    let mut ds = Tensor::zeros(DType::F32, x.rows(), r);
    matmul::nn(ds.view_mut(), 0.0, l.scale, dy, l.b)?;
    matmul::tn(ViewMut::from_f32(d_b, dy.cols(), r), 1.0, l.scale, dy, s)?;
    let mut xd = None;
    if let Some((k, rows)) = l.dropout {
        let mut t = Tensor::zeros(DType::F32, x.rows(), x.cols());
        dropout::forward(x, k, rows, t.view_mut())?;
        xd = Some(t);
    }
    matmul::tn(
        ViewMut::from_f32(d_a, r, x.cols()),
        1.0,
        1.0,
        ds.view(),
        xd.as_ref().map_or(x, |t| t.view()),
    )?;
    if let Some(dx) = dx {
        match l.dropout {
            None => matmul::nn(dx, 1.0, 1.0, ds.view(), l.a)?,
            Some((k, rows)) => {
                let mut t = Tensor::zeros(DType::F32, x.rows(), x.cols());
                matmul::nn(t.view_mut(), 0.0, 1.0, ds.view(), l.a)?;
                dropout::add_masked(dx, t.view(), k, rows)?;
            }
        }
    }
    Ok(())
}
