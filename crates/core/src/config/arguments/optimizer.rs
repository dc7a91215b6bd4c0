use super::source::{OURS, PEFT, TRANSFORMERS, TRL_SFT};
use crate::config::section::section;
use crate::config::value::{KeyValue, yaml_scalar};
use crate::optimizer::{OPTIMIZERS, OptimizerChoice, OptimizerEntry, Shared, find};
use ferrotune_kernels::adamw::AdamW;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// The optimizer, by name.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Optim(&'static OptimizerEntry);

impl Optim {
    /// Transformers' default.
    const DEFAULT: &str = "adamw_torch_fused";

    /// Whether it reads a key with a constant of Adam's.
    #[must_use]
    pub fn reads(self, key: &str) -> bool {
        self.0.reads.contains(&key)
    }

    /// The word for it in a configuration file.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.0.name
    }
}

impl Default for Optim {
    fn default() -> Self {
        let named = OPTIMIZERS.iter().find(|entry| entry.name == Self::DEFAULT);
        Self(named.unwrap_or(&OPTIMIZERS[0]))
    }
}

impl KeyValue for Optim {
    fn schema() -> Value {
        let names: Vec<&str> = OPTIMIZERS.iter().map(|entry| entry.name).collect();
        json!({ "enum": names })
    }

    fn from_value(value: &Value) -> Result<Self, String> {
        find(value.as_str().unwrap_or_default()).map(Self)
    }

    fn to_value(&self) -> Value {
        json!(self.0.name)
    }

    fn parse_text(text: &str) -> Result<Value, String> {
        String::parse_text(text)
    }
}

/// An optimizer's own arguments: named values, or as Transformers has them one text, `momentum=0.9,nesterov=true`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OptimArgs(pub BTreeMap<String, Value>);

impl KeyValue for OptimArgs {
    fn schema() -> Value {
        json!({"anyOf": [{"type": "object"}, {"type": "string"}, {"type": "null"}]})
    }

    fn from_value(value: &Value) -> Result<Self, String> {
        match value {
            Value::String(text) if !text.trim_start().starts_with('{') => pairs(text).map(Self),
            other => BTreeMap::from_value(other).map(Self),
        }
    }

    fn to_value(&self) -> Value {
        self.0.to_value()
    }

    fn parse_text(text: &str) -> Result<Value, String> {
        if text.trim_start().starts_with('{') {
            return yaml_scalar(text);
        }
        Ok(json!(text))
    }
}

/// The values of `a=1,b=2`.
fn pairs(text: &str) -> Result<BTreeMap<String, Value>, String> {
    let parts = text.split(',').map(str::trim);
    let mut values = BTreeMap::new();
    for part in parts.filter(|part| !part.is_empty()) {
        let (key, value) = pair(part).ok_or_else(|| {
            "named values such as {momentum: 0.9}, or momentum=0.9,nesterov=true".to_owned()
        })?;
        if values.insert(key.to_owned(), value).is_some() {
            return Err(format!(
                "each name once, and `{key}` stands there twice; take one of them out"
            ));
        }
    }
    Ok(values)
}

/// Name and value of `a=1`.
fn pair(text: &str) -> Option<(&str, Value)> {
    let (key, value) = text.split_once('=')?;
    let (key, value) = (key.trim(), value.trim());
    let read = serde_json::from_str::<Value>(value).ok();
    let scalar = read.filter(|v| v.is_number() || v.is_boolean());
    (!key.is_empty()).then(|| (key, scalar.unwrap_or_else(|| json!(value))))
}

section! {
    /// How gradients become an update.
    OptimizerArguments, "optimizer" {
        /// The optimizer, by Transformers' names and some more; docs/optimizers.md has a table of them.
        optim: Optim = Optim::default(), TRANSFORMERS;
        /// The optimizer's own arguments, such as {momentum: 0.9, nesterov: true} or momentum=0.9,nesterov=true.
        optim_args: OptimArgs = OptimArgs::default(), TRANSFORMERS;
        /// Peak learning rate.
        learning_rate: f64 = 2e-5, TRL_SFT;
        /// Weight decay, on every trained weight but biases and norms: decoupled, or where the optimizer has it so a
        /// part of the gradient.
        weight_decay: f64 = 0.0, TRANSFORMERS;
        /// Decay of the first moment, of optimizers that have such a constant; of Lion the momentum's share of a step.
        adam_beta1: f64 = 0.9, TRANSFORMERS;
        /// Decay of the second moment, of Lion that of the momentum.
        adam_beta2: f64 = 0.999, TRANSFORMERS;
        /// Added to the root of the second moment.
        adam_epsilon: f64 = 1e-8, TRANSFORMERS;
        /// Share of each target's probability that is spread evenly over the vocabulary.
        label_smoothing_factor: f64 = 0.0, TRANSFORMERS;
        /// NEFTune: uniform noise on embeddings in training, at most this over the root of tokens times width, with
        /// the tokens of each document, packed or not; null or 0 for none. The paper uses 5.
        neftune_noise_alpha: Option<f64> = None, TRANSFORMERS;
        /// LoRA-FA: A stays as it starts, and the gradient of B is brought as near as can be to that of a full update.
        use_lora_fa: bool = false, OURS;
        /// LoRA+: learning rate of B over that of A; null for the same. The paper suggests 16.
        loraplus_lr_ratio: Option<f64> = None, OURS;
        /// LoRA+: learning rate of an adapted embedding, before the schedule's factor.
        loraplus_lr_embedding: f64 = 1e-6, PEFT;
        /// Largest L2 norm of the gradient, larger ones are scaled down; 0 for no clipping.
        max_grad_norm: f64 = 1.0, TRANSFORMERS;
        /// Micro-batches per optimizer step and rank.
        gradient_accumulation_steps: usize = 1, TRANSFORMERS;
    }
}

impl OptimizerArguments {
    /// The optimizer that these keys describe.
    ///
    /// # Errors
    /// [`crate::Error::Config`] for an argument that it does not have.
    pub fn choice(&self) -> crate::Result<OptimizerChoice> {
        let adam = AdamW {
            beta1: self.adam_beta1,
            beta2: self.adam_beta2,
            eps: self.adam_epsilon,
        };
        self.optim.0.build(&Shared { adam }, &self.optim_args.0)
    }
}
