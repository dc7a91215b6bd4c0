//! Which singular values matter: sensitivity and its uncertainty, smoothed over steps.

use super::budget::Left;
use crate::method::Target;
use ferrotune_core::adapter::StepDone;
use ferrotune_core::params::{FlatBuffer, ParamId};

/// What is kept between steps, under PEFT's names: mean sensitivity and mean uncertainty of each element.
/// Once ranks are decided, the sensitivity of E is 1 where a singular value stays and 0 elsewhere.
pub(super) const STATE: [&str; 2] = ["exp_avg_ipt", "exp_avg_unc"];

/// Measures importance and sets singular values to zero, as `left` says.
pub(super) fn after_step(
    left: &Left,
    betas: [f32; 2],
    targets: &[Target],
    params: &mut FlatBuffer,
    done: &mut StepDone<'_>,
) {
    let StepDone {
        grads,
        grad_scale,
        state: [sensitivity, uncertainty],
        ..
    } = done
    else {
        return;
    };
    match *left {
        Left::Measured(count) => {
            for id in targets.iter().flat_map(|target| target.ids.iter().copied()) {
                let gradient = grads.get(id).iter().map(|g| g * *grad_scale);
                let means = [sensitivity.get_mut(id), uncertainty.get_mut(id)];
                measure(betas, params.get(id), gradient, means);
            }
            if let Some(count) = count {
                let kept = most_important(count, targets, sensitivity, uncertainty);
                mask(&kept, targets, params);
            }
        }
        Left::Decided(count) => {
            let kept = most_important(count, targets, sensitivity, uncertainty);
            mask(&kept, targets, params);
            sensitivity.zero();
            uncertainty.zero();
            for (target, kept) in targets.iter().zip(&kept) {
                let marks = sensitivity.get_mut(target.ids[2]).iter_mut();
                marks
                    .zip(kept)
                    .for_each(|(mark, kept)| *mark = f32::from(u8::from(*kept)));
            }
        }
        Left::Kept => {
            let of = |target: &Target| {
                sensitivity
                    .get(target.ids[2])
                    .iter()
                    .map(|&m| m != 0.0)
                    .collect()
            };
            let kept: Vec<Vec<bool>> = targets.iter().map(of).collect();
            mask(&kept, targets, params);
        }
    }
}

/// Sensitivity |p g|, p as of after the step and g the gradient it was made with.
fn measure(
    [beta1, beta2]: [f32; 2],
    values: &[f32],
    gradient: impl Iterator<Item = f32>,
    [sensitivity, uncertainty]: [&mut [f32]; 2],
) {
    let means = sensitivity.iter_mut().zip(uncertainty);
    for ((p, g), (mean, spread)) in values.iter().zip(gradient).zip(means) {
        let now = (p * g).abs();
        *mean = beta1 * *mean + (1.0 - beta1) * now;
        *spread = beta2 * *spread + (1.0 - beta2) * (now - *mean).abs();
    }
}

/// For each module, whether each of its singular values is above the importance that leaves `count` over
/// all modules. Equal ones fall together, so fewer may be left.
fn most_important(
    count: usize,
    targets: &[Target],
    sensitivity: &FlatBuffer,
    uncertainty: &FlatBuffer,
) -> Vec<Vec<bool>> {
    let score = |id: ParamId| -> Vec<f32> {
        let elements = sensitivity.get(id).iter().zip(uncertainty.get(id));
        elements.map(|(s, u)| s * u).collect()
    };
    let of = |target: &Target| -> Vec<f32> {
        let [a, b, e] = [0, 1, 2].map(|i| score(target.ids[i]));
        let (rank, inputs, out) = (e.len(), target.site.in_features, target.site.out_features);
        let triplet = |i: usize| {
            let row: f32 = a[i * inputs..(i + 1) * inputs].iter().sum();
            let column: f32 = b.iter().skip(i).step_by(rank).sum();
            e[i] + (row / inputs as f32 + column / out as f32)
        };
        (0..rank).map(triplet).collect()
    };
    let scores: Vec<Vec<f32>> = targets.iter().map(of).collect();
    let mut sorted: Vec<f32> = scores.iter().flatten().copied().collect();
    sorted.sort_by(f32::total_cmp);
    let dropped = sorted.len().saturating_sub(count);
    let threshold = dropped
        .checked_sub(1)
        .map_or(f32::NEG_INFINITY, |last| sorted[last]);
    let above = |module: &Vec<f32>| module.iter().map(|&score| score > threshold).collect();
    scores.iter().map(above).collect()
}

fn mask(kept: &[Vec<bool>], targets: &[Target], params: &mut FlatBuffer) {
    for (target, kept) in targets.iter().zip(kept) {
        for (value, kept) in params.get_mut(target.ids[2]).iter_mut().zip(kept) {
            if !kept {
                *value = 0.0;
            }
        }
    }
}
