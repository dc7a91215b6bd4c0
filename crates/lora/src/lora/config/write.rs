//! To `adapter_config.json`.

use super::{LoraConfig, TokenIndices};
use crate::modules;
use crate::target::{ExcludeModules, TargetModules};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

impl LoraConfig {
    /// The text of an `adapter_config.json` for inference, keys sorted, as PEFT writes it.
    ///
    /// Only keys that every PEFT release knows are written, with the few others only where they
    /// are set. `peft_version` is left out: PEFT then fills in its own, and no method written here
    /// is read differently by version. The entries of `rank_pattern` and `alpha_pattern` keep
    /// their order, because the first match wins.
    #[must_use]
    pub fn to_json(&self) -> String {
        let saved = modules::as_in_file(self.task_type.as_deref(), &self.modules_to_save);
        let mut keys = BTreeMap::from([
            ("auto_mapping", Value::Null),
            (
                "base_model_name_or_path",
                json!(self.base_model_name_or_path),
            ),
            ("bias", json!(self.bias.as_str())),
            ("fan_in_fan_out", json!(self.fan_in_fan_out)),
            ("inference_mode", json!(true)),
            ("init_lora_weights", self.init_lora_weights.to_value()),
            ("layers_pattern", names_or_null(&self.layers_pattern)),
            ("layers_to_transform", json!(self.layers_to_transform)),
            ("lora_alpha", number(self.alpha)),
            ("lora_dropout", json!(self.dropout)),
            ("modules_to_save", names_or_null(&saved)),
            ("peft_type", json!("LORA")),
            ("r", json!(self.rank)),
            ("revision", json!(self.revision)),
            ("target_modules", self.target_modules_value()),
            ("task_type", json!(self.task_type)),
            ("use_dora", json!(self.use_dora)),
            ("use_rslora", json!(self.use_rslora)),
            ("rank_pattern", pattern(&self.rank_pattern, |&r| json!(r))),
            (
                "alpha_pattern",
                pattern(&self.alpha_pattern, |&alpha| number(alpha)),
            ),
        ]);
        keys.extend(self.init_lora_weights.settings_value());
        if self.lora_bias {
            keys.insert("lora_bias", json!(true));
        }
        if self.ensure_weight_tying {
            keys.insert("ensure_weight_tying", json!(true));
        }
        if let Some(tokens) = &self.alora_invocation_tokens {
            keys.insert("alora_invocation_tokens", json!(tokens));
        }
        if !self.layer_replication.is_empty() {
            keys.insert("layer_replication", json!(self.layer_replication));
        }
        match &self.trainable_token_indices {
            None => {}
            Some(TokenIndices::Embedding(ids)) => {
                keys.insert("trainable_token_indices", json!(ids));
            }
            Some(TokenIndices::Modules(modules)) => {
                let modules = pattern(modules, |ids| json!(ids));
                keys.insert("trainable_token_indices", modules);
            }
        }
        match &self.exclude_modules {
            None => {}
            Some(ExcludeModules::List(names)) => {
                keys.insert("exclude_modules", json!(sorted(names)));
            }
            Some(ExcludeModules::Regex(source)) => {
                keys.insert("exclude_modules", json!(source));
            }
        }
        // A map of strings to JSON values has no way to fail; `{:#}` indents by two spaces.
        let object: Map<String, Value> = keys.into_iter().map(|(k, v)| (k.into(), v)).collect();
        format!("{:#}", Value::Object(object))
    }

    fn target_modules_value(&self) -> Value {
        match &self.target_modules {
            None => Value::Null,
            Some(TargetModules::AllLinear) => json!("all-linear"),
            Some(TargetModules::Regex(source)) => json!(source),
            Some(TargetModules::List(names)) => json!(sorted(names)),
        }
    }
}

fn sorted(names: &[String]) -> Vec<&String> {
    let mut names: Vec<&String> = names.iter().collect();
    names.sort_unstable();
    names.dedup();
    names
}

fn names_or_null(names: &[String]) -> Value {
    if names.is_empty() {
        Value::Null
    } else {
        json!(names)
    }
}

/// PEFT writes alpha as an integer, and some readers insist on one.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 2f64.powi(53) {
        json!(value as i64)
    } else {
        json!(value)
    }
}

fn pattern<T>(entries: &[(String, T)], convert: impl Fn(&T) -> Value) -> Value {
    let object: Map<String, Value> = entries
        .iter()
        .map(|(name, value)| (name.clone(), convert(value)))
        .collect();
    Value::Object(object)
}
