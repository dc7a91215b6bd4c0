//! Sums of tensors of which elements are left out.

use super::sum::MajoritySign;
use ferrotune_kernels::rng::Stream;

/// What is left out of each tensor before they are added.
pub(super) enum Prune<'a> {
    Nothing,
    /// The smallest elements.
    Small,
    /// Elements at random; the others grow, so that the mean stays.
    Random(&'a mut Stream),
}

/// A sum of tensors with elements left out.
pub(super) struct Pruned<'a> {
    pub(super) by: Prune<'a>,
    /// Share of the elements that stays.
    pub(super) density: f64,
    /// Leaves out elements of the minority's sign too, and takes the mean of the others.
    pub(super) elect: Option<MajoritySign>,
}

impl Pruned<'_> {
    /// The weighted sum of `tensors`, all of one length.
    pub(super) fn sum(mut self, mut tensors: Vec<Vec<f32>>, weights: &[f64]) -> Vec<f32> {
        if self.density < 1.0 {
            tensors.iter_mut().for_each(|tensor| self.prune(tensor));
        }
        let len = tensors.first().map_or(0, Vec::len);
        let column = |at: usize| tensors.iter().map(move |tensor| f64::from(tensor[at]));
        let weighted = |at: usize| column(at).zip(weights);
        let element = |at: usize| match self.elect {
            None => weighted(at).map(|(v, w)| v * w).sum::<f64>(),
            Some(by) => {
                let votes: f64 = match by {
                    MajoritySign::Total => column(at).sum(),
                    MajoritySign::Frequency => column(at).map(sign).sum(),
                };
                let elected = if votes >= 0.0 { 1.0 } else { -1.0 };
                let kept = weighted(at).filter(|(v, _)| sign(*v) == elected);
                let (sum, count) = kept.fold((0.0, 0.0), |(sum, n), (v, w)| (sum + v * w, n + 1.0));
                sum / f64::max(count, 1.0)
            }
        };
        (0..len).map(|at| element(at) as f32).collect()
    }

    fn prune(&mut self, tensor: &mut [f32]) {
        match &mut self.by {
            Prune::Nothing => {}
            Prune::Small => {
                let kept = (self.density * tensor.len() as f64) as usize;
                let mut order: Vec<usize> = (0..tensor.len()).collect();
                // Of equal ones the first stay.
                order.sort_by(|&i, &j| tensor[j].abs().total_cmp(&tensor[i].abs()));
                order[kept..].iter().for_each(|&i| tensor[i] = 0.0);
            }
            Prune::Random(stream) => {
                let factor = (1.0 / self.density) as f32;
                for value in tensor {
                    let stays = stream.uniform() < self.density;
                    *value = if stays { *value * factor } else { 0.0 };
                }
            }
        }
    }
}

/// -1, 0 or 1, as PyTorch's.
fn sign(value: f64) -> f64 {
    if value == 0.0 { 0.0 } else { value.signum() }
}
