//! stand-in
#![allow(missing_docs, clippy::all)]
use crate::{DType, Result, Tensor, View, ViewMut, Workspace, matmul};
#[derive(Clone, Copy, Debug, Default)]
pub struct Sums {
    pub loss: f64,
    pub count: u64,
    pub correct: u64,
    pub entropy: f64,
}
impl std::ops::AddAssign for Sums {
    fn add_assign(&mut self, o: Self) {
        self.loss += o.loss;
        self.count += o.count;
        self.correct += o.correct;
        self.entropy += o.entropy;
    }
}
pub fn forward(
    hidden: View<'_>,
    head: View<'_>,
    rows: &[u32],
    targets: &[u32],
    w: &Workspace,
) -> Result<Sums> {
    run(hidden, head, rows, targets, None, None, w)
}
pub fn forward_backward(
    hidden: View<'_>,
    head: View<'_>,
    rows: &[u32],
    targets: &[u32],
    d_hidden: ViewMut<'_>,
    d_head: Option<&mut [f32]>,
    w: &Workspace,
) -> Result<Sums> {
    run(hidden, head, rows, targets, Some(d_hidden), d_head, w)
}
fn run(
    hidden: View<'_>,
    head: View<'_>,
    rows: &[u32],
    targets: &[u32],
    d_hidden: Option<ViewMut<'_>>,
    d_head: Option<&mut [f32]>,
    _: &Workspace,
) -> Result<Sums> {
    let [t, d] = hidden.shape();
    let v = head.rows();
    let n = rows.len();
    let h = hidden.to_f32_vec();
    let g: Vec<f32> = rows
        .iter()
        .flat_map(|&r| h[r as usize * d..][..d].to_vec())
        .collect();
    let g = Tensor::from_f32(g, n, d);
    let mut l = Tensor::zeros(DType::F32, n, v);
    matmul::nt(l.view_mut(), 0.0, 1.0, g.view(), head)?;
    let mut l = l.to_f32_vec();
    let mut s = Sums::default();
    for i in 0..n {
        let r = &mut l[i * v..][..v];
        let y = targets[i] as usize;
        let m = r.iter().cloned().fold(f32::NEG_INFINITY, f32::max);
        let z: f32 = r.iter().map(|x| (x - m).exp()).sum();
        let lz = m + z.ln();
        s.loss += (lz - r[y]) as f64;
        s.count += 1;
        if r[y] >= m {
            s.correct += 1
        }
        s.entropy += lz as f64 - r.iter().map(|x| ((x - lz).exp() * x) as f64).sum::<f64>();
        for x in r.iter_mut() {
            *x = (*x - lz).exp()
        }
        r[y] -= 1.0;
    }
    let p = Tensor::from_f32(l, n, v);
    if let Some(out) = d_hidden {
        let mut dg = Tensor::zeros(DType::F32, n, d);
        matmul::nn(dg.view_mut(), 0.0, 1.0, p.view(), head)?;
        let dg = dg.to_f32_vec();
        let mut full = vec![0f32; t * d];
        for (i, &r) in rows.iter().enumerate() {
            full[r as usize * d..][..d].copy_from_slice(&dg[i * d..][..d]);
        }
        out.copy_from(View::from_f32(&full, t, d));
    }
    if let Some(dw) = d_head {
        matmul::tn(ViewMut::from_f32(dw, v, d), 1.0, 1.0, p.view(), g.view())?;
    }
    Ok(s)
}
