//! (IA)³: a trained factor per output of a linear, or per input of a feed-forward one.
//!
//! `y = l ⊙ (x W^T + b)`, or `y = (l ⊙ x) W^T + b`.
//!
//! # Source
//! Liu et al.: "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
//! Learning" (2022); PEFT's `tuners/ia3`.

use super::matrix::{device_of, grad, param};
use crate::method::{Init, Keys, Method, Place, TensorSpec};
use crate::target::{Expression, TargetModules, is_suffix};
use ferrotune_core::adapter::{Attachment, CustomLinear, Site, WeightUpdate};
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::{Tensor, View, ViewMut, hadamard};
use serde_json::{Map, Value, json};

const L: &str = "ia3_l";

/// (IA)³'s configuration.
#[derive(Clone, Debug)]
pub(crate) struct Ia3 {
    /// Modules whose inputs are scaled.
    feedforward: Option<TargetModules>,
    init_weights: bool,
}

/// PEFT's targets by model type, and which of them are feed-forward.
const DEFAULTS: [(&[&str], &[&str]); 3] = [
    (
        &[
            "llama",
            "mistral",
            "mixtral",
            "qwen2",
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3_text",
            "smollm3",
            "granite",
            "olmo2",
        ],
        &["k_proj", "v_proj", "down_proj"],
    ),
    (&["gpt2"], &["c_attn", "mlp.c_proj"]),
    (&["phi3"], &["qkv_proj", "down_proj"]),
];
/// The ends of the names of feed-forward modules among them.
const FEEDFORWARD: [&str; 2] = ["down_proj", "mlp.c_proj"];

impl Ia3 {
    fn scales_inputs(&self, site: &Site) -> Result<bool> {
        let Some(modules) = &self.feedforward else {
            return Ok(FEEDFORWARD.iter().any(|end| site.name.ends_with(end)));
        };
        Ok(match modules {
            TargetModules::AllLinear => true,
            TargetModules::List(names) => names
                .iter()
                .any(|name| *name == site.name || is_suffix(name, &site.name)),
            TargetModules::Regex(source) => {
                Expression::full("feedforward_modules", source)?.matches(&site.name)?
            }
        })
    }
}

impl Method for Ia3 {
    const PEFT_TYPE: &'static str = "IA3";

    fn read(keys: &mut Keys<'_>) -> Result<Self> {
        Ok(Self {
            feedforward: keys.target_modules("feedforward_modules")?,
            init_weights: keys.boolean("init_ia3_weights", true)?,
        })
    }

    fn write(&self, keys: &mut Map<String, Value>) {
        // PEFT wants them to be among the targets, where both are lists.
        let targets = keys.get("target_modules").and_then(Value::as_array);
        let targeted = |name: &&&str| targets.is_none_or(|t| t.contains(&json!(name)));
        let default = || FEEDFORWARD.iter().filter(targeted).collect::<Vec<_>>();
        let modules = match &self.feedforward {
            None => json!(default()),
            Some(TargetModules::List(names)) => json!(names),
            Some(TargetModules::Regex(source)) => json!(source),
            Some(TargetModules::AllLinear) => json!("all-linear"),
        };
        keys.insert("feedforward_modules".into(), modules);
        keys.insert("init_ia3_weights".into(), json!(self.init_weights));
        keys.insert("fan_in_fan_out".into(), json!(false));
    }

    fn describe(&self) -> String {
        "(IA)³".into()
    }

    fn default_targets(model_type: &str) -> Option<TargetModules> {
        let found = DEFAULTS
            .iter()
            .find(|(types, _)| types.contains(&model_type));
        found.map(|(_, names)| TargetModules::List(names.iter().map(|&n| n.into()).collect()))
    }

    fn check(&self, targets: &[&Site]) -> Result<()> {
        if self.feedforward.is_none() || self.feedforward == Some(TargetModules::List(Vec::new())) {
            return Ok(());
        }
        for site in targets {
            if self.scales_inputs(site)? {
                return Ok(());
            }
        }
        Err(Error::config(
            "feedforward_modules",
            "none of them is targeted: they must be a part of `target_modules`",
        ))
    }

    fn tensors(&self, site: &Site) -> Result<Vec<TensorSpec>> {
        let shape = if self.scales_inputs(site)? {
            [1, site.in_features]
        } else {
            [site.out_features, 1]
        };
        Ok(vec![TensorSpec::new(L, shape)])
    }

    fn init(&self, _: &str, _: &[usize]) -> Init {
        if self.init_weights {
            Init::Constant(1.0)
        } else {
            Init::Normal {
                mean: 0.0,
                std: 1.0,
            }
        }
    }

    fn attach(&self, site: &Site, at: &Place<'_>) -> Result<Attachment> {
        let id = at.ids[0];
        let outputs = Outputs {
            factors: id,
            out: site.out_features,
        };
        Ok(match (self.scales_inputs(site)?, site.output_head) {
            (true, _) => Attachment::Weight(Box::new(Inputs(id))),
            // Whose outputs are never there as a whole.
            (false, true) => Attachment::Weight(Box::new(outputs)),
            (false, false) => Attachment::Custom(Box::new(outputs)),
        })
    }
}

/// A factor per output.
#[derive(Debug)]
struct Outputs {
    factors: ParamId,
    out: usize,
}

impl CustomLinear for Outputs {
    fn computes_on_host(&self) -> bool {
        false
    }

    fn kept_columns(&self) -> usize {
        self.out
    }

    fn forward(&self, params: &FlatBuffer, _: View<'_>, y: ViewMut<'_>) -> Result<Vec<Tensor>> {
        let [rows, cols] = y.shape();
        let mut base = Tensor::temporary(&device_of(y.as_view()), y.dtype(), rows, cols);
        base.view_mut().copy_from(y.as_view());
        let l = param(params, self.factors, [1, cols], y.as_view());
        hadamard::scale(y, 0.0, l)?;
        Ok(vec![base])
    }

    fn backward(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        _: View<'_>,
        saved: &[Tensor],
        dy: ViewMut<'_>,
        _: Option<ViewMut<'_>>,
    ) -> Result<()> {
        let shape = [1, dy.cols()];
        let d_l = grad(grads, self.factors, shape, dy.as_view());
        hadamard::add_column_sums(d_l, 1.0, dy.as_view(), saved[0].view())?;
        let l = param(params, self.factors, shape, dy.as_view());
        Ok(hadamard::scale(dy, 0.0, l)?)
    }

    fn merge(
        &self,
        params: &FlatBuffer,
        weight: ViewMut<'_>,
        bias: Option<ViewMut<'_>>,
    ) -> Result<()> {
        if let Some(bias) = bias {
            let l = param(params, self.factors, [1, weight.rows()], bias.as_view());
            hadamard::scale(bias, 0.0, l)?;
        }
        self.apply(params, weight)
    }
}

/// The same as a factor per row of the weight, where there is no bias.
impl WeightUpdate for Outputs {
    fn computes_on_host(&self) -> bool {
        false
    }

    fn apply(&self, params: &FlatBuffer, weight: ViewMut<'_>) -> Result<()> {
        let l = param(params, self.factors, [weight.rows(), 1], weight.as_view());
        Ok(hadamard::scale(weight, 0.0, l)?)
    }

    fn backward(
        &self,
        _: &FlatBuffer,
        grads: &mut FlatBuffer,
        weight: View<'_>,
        d_weight: View<'_>,
    ) -> Result<()> {
        let d_l = grad(grads, self.factors, [weight.rows(), 1], weight);
        Ok(hadamard::add_row_sums(d_l, 1.0, weight, d_weight)?)
    }
}

/// A factor per input, which is one per column of the weight.
#[derive(Debug)]
struct Inputs(ParamId);

impl WeightUpdate for Inputs {
    fn computes_on_host(&self) -> bool {
        false
    }

    fn apply(&self, params: &FlatBuffer, weight: ViewMut<'_>) -> Result<()> {
        let l = param(params, self.0, [1, weight.cols()], weight.as_view());
        Ok(hadamard::scale(weight, 0.0, l)?)
    }

    fn backward(
        &self,
        _: &FlatBuffer,
        grads: &mut FlatBuffer,
        weight: View<'_>,
        d_weight: View<'_>,
    ) -> Result<()> {
        let d_l = grad(grads, self.0, [1, weight.cols()], weight);
        Ok(hadamard::add_column_sums(d_l, 1.0, weight, d_weight)?)
    }
}
