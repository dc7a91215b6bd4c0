use super::{Matrix, Svd};
use crate::Result;
use crate::rng::Stream;

impl Matrix {
    /// About the leading `rank` singular values and their vectors, by `iterations` rounds of subspace
    /// iteration from a random start, at most min(m, n) of them. Much faster than [`Matrix::svd`] where
    /// `rank` is small; how near it comes depends on how fast the values fall off.
    ///
    /// # Errors
    /// If a value is not finite.
    pub fn svd_low_rank(&self, rank: usize, iterations: u32, start: Stream) -> Result<Svd> {
        let [rows, cols] = self.shape();
        if rows < cols {
            // The basis is that of the longer side.
            let Svd { u, s, vt } = self.transposed().svd_low_rank(rank, iterations, start)?;
            return Ok(Svd {
                u: vt.transposed(),
                s,
                vt: u.transposed(),
            });
        }
        let basis = self.leading_columns(rank.min(cols), iterations, start)?;
        let Svd { u, s, vt } = basis.transposed_times(self)?.svd()?;
        let u = basis.times(&u)?;
        Ok(Svd { u, s, vt })
    }

    /// An orthonormal basis `[rows, rank]` of about the leading `rank` left singular vectors.
    fn leading_columns(&self, rank: usize, iterations: u32, mut start: Stream) -> Result<Self> {
        let cols = self.shape()[1];
        let normal = (0..cols * rank).map(|_| start.normal()).collect();
        let orthonormal = |x: Self| x.qr().map(|[q, _]| q);
        let mut basis = orthonormal(self.times(&Self::new(cols, rank, normal)?)?)?;
        for _ in 0..iterations {
            let back = orthonormal(self.transposed_times(&basis)?)?;
            basis = orthonormal(self.times(&back)?)?;
        }
        Ok(basis)
    }
}
