//! stand-in
#![allow(missing_docs, clippy::all)]
use crate::{Result, Tensor, View, ViewMut};
#[derive(Clone, Copy, Debug)]
pub struct Config {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub scale: f32,
    pub window: Option<usize>,
}
pub fn forward(
    cfg: &Config,
    q: View<'_>,
    k: View<'_>,
    v: View<'_>,
    cu_q: &[u32],
    cu_k: &[u32],
    out: ViewMut<'_>,
    lse: &mut [f32],
) -> Result<()> {
    let [tq, w] = out.shape();
    let (q, kk, v) = (q.to_f32_vec(), k.to_f32_vec(), v.to_f32_vec());
    let (h, e, kvw) = (cfg.heads, cfg.head_dim, cfg.kv_heads * cfg.head_dim);
    let mut o = vec![0f32; tq * w];
    for s in 0..cu_q.len() - 1 {
        let (nq, nk) = (
            (cu_q[s + 1] - cu_q[s]) as usize,
            (cu_k[s + 1] - cu_k[s]) as usize,
        );
        for i in 0..nq {
            let qi = cu_q[s] as usize + i;
            let last = i + nk - nq;
            let first = cfg.window.map_or(0, |w| (last + 1).saturating_sub(w));
            for head in 0..h {
                let g = head / (h / cfg.kv_heads);
                let sc: Vec<f32> = (first..=last)
                    .map(|j| {
                        let kj = cu_k[s] as usize + j;
                        (0..e)
                            .map(|x| q[qi * w + head * e + x] * kk[kj * kvw + g * e + x])
                            .sum::<f32>()
                            * cfg.scale
                    })
                    .collect();
                let m = sc.iter().cloned().fold(f32::NEG_INFINITY, f32::max);
                let z: f32 = sc.iter().map(|x| (x - m).exp()).sum();
                lse[qi * h + head] = m + z.ln();
                for (n, j) in (first..=last).enumerate() {
                    let kj = cu_k[s] as usize + j;
                    let p = (sc[n] - m).exp() / z;
                    for x in 0..e {
                        o[qi * w + head * e + x] += p * v[kj * kvw + g * e + x];
                    }
                }
            }
        }
    }
    let mut out = out;
    out.reborrow().copy_from(View::from_f32(&o, tq, w));
    Ok(())
}
pub fn backward(
    cfg: &Config,
    q: View<'_>,
    k: View<'_>,
    v: View<'_>,
    out: View<'_>,
    lse: &[f32],
    cu: &[u32],
    d_out: View<'_>,
    d_qkv: ViewMut<'_>,
) -> Result<()> {
    let [t, w] = out.shape();
    let (q, kk, v, o, d) = (
        q.to_f32_vec(),
        k.to_f32_vec(),
        v.to_f32_vec(),
        out.to_f32_vec(),
        d_out.to_f32_vec(),
    );
    let (h, e, kvw) = (cfg.heads, cfg.head_dim, cfg.kv_heads * cfg.head_dim);
    let tw = w + 2 * kvw;
    let mut g_ = vec![0f32; t * tw];
    for s in 0..cu.len() - 1 {
        let c = cu[s] as usize;
        let n = cu[s + 1] as usize - c;
        for i in 0..n {
            let qi = c + i;
            let first = cfg.window.map_or(0, |w| (i + 1).saturating_sub(w));
            for head in 0..h {
                let g = head / (h / cfg.kv_heads);
                let delta: f32 = (0..e)
                    .map(|x| o[qi * w + head * e + x] * d[qi * w + head * e + x])
                    .sum();
                for j in first..=i {
                    let kj = c + j;
                    let sc = (0..e)
                        .map(|x| q[qi * w + head * e + x] * kk[kj * kvw + g * e + x])
                        .sum::<f32>()
                        * cfg.scale;
                    let p = (sc - lse[qi * h + head]).exp();
                    let dp: f32 = (0..e)
                        .map(|x| d[qi * w + head * e + x] * v[kj * kvw + g * e + x])
                        .sum();
                    let ds = p * (dp - delta) * cfg.scale;
                    for x in 0..e {
                        g_[qi * tw + head * e + x] += ds * kk[kj * kvw + g * e + x];
                        g_[kj * tw + w + g * e + x] += ds * q[qi * w + head * e + x];
                        g_[kj * tw + w + kvw + g * e + x] += p * d[qi * w + head * e + x];
                    }
                }
            }
        }
    }
    d_qkv.copy_from(View::from_f32(&g_, t, tw));
    let _ = Tensor::zeros;
    Ok(())
}
