//! AdaLoRA: low-rank updates in the form of a singular value decomposition, whose ranks are cut while
//! training goes on, where they matter least.
//!
//! `y = x W^T + alpha / (init_r + 1e-5) * (x (A ⊙ E)^T B^T)`, A `[init_r, in]`, E `[init_r, 1]`, B
//! `[out, init_r]`. A and B are kept near orthogonal by a term of the loss; elements of E are set to zero by
//! a budget that falls from `init_r` to `target_r` per module on average.
//!
//! # Source
//! Zhang et al.: "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning" (2023); PEFT's
//! `tuners/adalora`. There the user calls `update_and_allocate` after each step; here the trainer does.

mod budget;
mod factors;
mod importance;
mod rank_pattern;
#[cfg(test)]
mod tests;

use super::matrix;
use crate::files::Part;
use crate::fit::{GivenRank, require_rank};
use crate::method::{Init, Keys, Method, Place, Target, TensorSpec};
use crate::target::{TargetModules, default_target_modules};
use budget::Budget;
use factors::Triplets;
use ferrotune_core::adapter::{Attachment, Penalty, Site, StepDone};
use ferrotune_core::params::FlatBuffer;
use ferrotune_core::{Error, Result};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// Features of LoRA that PEFT's AdaLoRA has keys for, and no code.
const WITHOUT: [&str; 14] = [
    "alora_invocation_tokens",
    "alpha_pattern",
    "corda_config",
    "eva_config",
    "layer_replication",
    "loftq_config",
    "lora_bias",
    "lora_ga_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
];
/// Keys that change nothing.
const IGNORED: [&str; 7] = [
    "arrow_config",
    "kasa_config",
    "megatron_config",
    "megatron_core",
    "monteclora_config",
    "qalora_group_size",
    "use_rslora",
];

/// AdaLoRA's configuration.
#[derive(Clone, Debug)]
pub(crate) struct AdaLora {
    init_r: usize,
    /// Whether a run asks for it.
    asked: bool,
    alpha: f64,
    dropout: f64,
    init_weights: bool,
    orth_reg_weight: f64,
    /// Smoothing of sensitivity and of its uncertainty.
    betas: [f32; 2],
    budget: Budget,
}

impl Method for AdaLora {
    const PEFT_TYPE: &'static str = "ADALORA";
    const BIAS: Option<&'static str> = Some("lora_only");
    const TIES: bool = true;

    fn read(keys: &mut Keys<'_>) -> Result<Self> {
        keys.ignore(&IGNORED);
        // LoRA's rank, which PEFT's AdaLoRA does not read.
        keys.ignore(&["r"]);
        for key in WITHOUT {
            keys.require_off(key)?;
        }
        let init_r = keys.positive("init_r", 12)?;
        let betas = [smoothing(keys, "beta1")?, smoothing(keys, "beta2")?];
        let orth_reg_weight = keys.number("orth_reg_weight", 0.5)?;
        if orth_reg_weight < 0.0 {
            return Err(keys.error(
                "orth_reg_weight",
                format!("is {orth_reg_weight}, expected 0 or more"),
            ));
        }
        // What a file leaves out is read with its tensors.
        rank_pattern::check(keys, init_r)?;
        Ok(Self {
            init_r,
            asked: keys.are_asked(),
            alpha: keys.number("lora_alpha", 8.0)?,
            dropout: keys.probability("lora_dropout")?,
            init_weights: keys.boolean("init_lora_weights", true)?,
            orth_reg_weight,
            betas,
            budget: Budget::read(keys, init_r)?,
        })
    }

    fn write(&self, keys: &mut Map<String, Value>) {
        keys.insert("init_r".into(), json!(self.init_r));
        keys.insert("lora_alpha".into(), json!(self.alpha));
        keys.insert("lora_dropout".into(), json!(self.dropout));
        keys.insert("init_lora_weights".into(), json!(self.init_weights));
        keys.insert("orth_reg_weight".into(), json!(self.orth_reg_weight));
        keys.insert("beta1".into(), json!(self.betas[0]));
        keys.insert("beta2".into(), json!(self.betas[1]));
        keys.insert("fan_in_fan_out".into(), json!(false));
        self.budget.write(keys);
    }

    fn describe(&self) -> String {
        let [from, to] = [self.init_r, self.budget.target_r];
        format!("AdaLoRA r={from} to {to} alpha={}", self.alpha)
    }

    /// PEFT's list, which has fewer decoders than LoRA's.
    fn default_targets(model_type: &str) -> Option<TargetModules> {
        const NONE: [&str; 7] = [
            "chatglm", "falcon", "mistral", "mixtral", "mpt", "phi", "stablelm",
        ];
        default_target_modules(model_type).filter(|_| !NONE.contains(&model_type))
    }

    fn check(&self, targets: &[&Site]) -> Result<()> {
        let mut asked = targets.iter().filter(|_| self.asked);
        asked.try_for_each(|site| require_rank(site, GivenRank::of_all("init_r", self.init_r)))
    }

    fn tensors(&self, site: &Site) -> Result<Vec<TensorSpec>> {
        Ok(vec![
            TensorSpec::new("lora_A", [self.init_r, site.in_features]),
            TensorSpec::new("lora_B", [site.out_features, self.init_r]),
            TensorSpec::new("lora_E", [self.init_r, 1]),
        ])
    }

    fn init(&self, name: &str, _: &[usize]) -> Init {
        let std = if self.init_weights { 0.02 } else { 1.0 };
        if self.init_weights && name.ends_with("lora_E") {
            return Init::Constant(0.0);
        }
        Init::Normal { mean: 0.0, std }
    }

    fn attach(&self, site: &Site, at: &Place<'_>) -> Result<Attachment> {
        Ok(Attachment::Factors(Box::new(Triplets::new(
            at.ids,
            [site.out_features, self.init_r, site.in_features],
            self.scale(),
            self.dropout as f32,
        ))))
    }

    fn plan_steps(&mut self, total_steps: u64) -> Result<()> {
        self.budget.plan_steps(total_steps)
    }

    fn state(&self) -> &'static [&'static str] {
        &importance::STATE
    }

    fn completes_gradients(&self) -> bool {
        self.orth_reg_weight > 0.0
    }

    /// `orth_reg_weight` times the mean over all A and B of |A A^T - I| and |B^T B - I|, Frobenius.
    fn complete_gradients(
        &self,
        targets: &[Target],
        params: &FlatBuffer,
        weight: f32,
        grads: &mut FlatBuffer,
    ) -> Result<Penalty> {
        let each = self.orth_reg_weight / (2 * targets.len()) as f64;
        let weight = weight * each as f32;
        let mut distances = matrix::empty(params.home(), 1, 2 * targets.len());
        for (i, target) in targets.iter().enumerate() {
            let both = distances.view_mut().columns(2 * i..2 * (i + 1));
            factors::orthogonality(target, self.init_r, params, weight, grads, both)?;
        }
        Ok(Penalty::new(each, distances))
    }

    fn after_step(
        &self,
        targets: &[Target],
        params: &mut FlatBuffer,
        mut done: StepDone<'_>,
    ) -> Result<()> {
        let Some(left) = self.budget.at(done.step, targets.len()) else {
            return Err(Error::config(
                "total_step",
                "is not set, and without it there is no schedule",
            ));
        };
        importance::after_step(&left, self.betas, targets, params, &mut done);
        Ok(())
    }

    /// Clears the vectors of singular values that are zero, so that files leave them out.
    fn finish(&self, targets: &[Target], params: &mut FlatBuffer) {
        rank_pattern::clear(targets, params);
    }

    fn parts(&self, targets: &[Target], params: &FlatBuffer) -> BTreeMap<String, Part> {
        rank_pattern::parts(targets, params)
    }

    fn write_parts(&self, parts: &BTreeMap<String, Part>, keys: &mut Map<String, Value>) {
        rank_pattern::write(parts, keys);
    }

    fn read_parts(&self, directory: &Path) -> Result<BTreeMap<String, Part>> {
        rank_pattern::read(directory, self.init_r)
    }
}

impl AdaLora {
    /// PEFT's: alpha over the first rank, whatever is left of it; alpha is that rank if it is not above 0.
    fn scale(&self) -> f32 {
        let rank = self.init_r as f64;
        let alpha = if self.alpha > 0.0 { self.alpha } else { rank };
        (alpha / (rank + 1e-5)) as f32
    }
}

/// A factor of an exponential mean, inside (0, 1).
fn smoothing(keys: &mut Keys<'_>, key: &'static str) -> Result<f32> {
    let beta = keys.number(key, 0.85)?;
    if beta > 0.0 && beta < 1.0 {
        return Ok(beta as f32);
    }
    Err(keys.error(
        key,
        format!("is {beta}, expected more than 0 and less than 1"),
    ))
}
