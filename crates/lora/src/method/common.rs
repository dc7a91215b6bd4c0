//! The keys that every method's configuration has.

use super::Method;
use super::keys::Keys;
use crate::target::{self, ExcludeModules, Selection, TargetModules};
use ferrotune_core::adapter::Site;
use ferrotune_core::{Error, Result};
use serde_json::{Map, Value, json};

/// Where a method attaches, and for which base.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Common {
    pub(crate) target_modules: Option<TargetModules>,
    pub(crate) exclude_modules: Option<ExcludeModules>,
    pub(crate) layers_to_transform: Option<Vec<usize>>,
    pub(crate) layers_pattern: Vec<String>,
    pub(crate) task_type: Option<String>,
    pub(crate) base_model_name_or_path: Option<String>,
    pub(crate) revision: Option<String>,
}

/// Keys without effect on the arithmetic.
const IGNORED: [&str; 5] = [
    "auto_mapping",
    "inference_mode",
    "peft_type",
    "peft_version",
    "runtime_config",
];

impl Common {
    pub(crate) fn read(keys: &mut Keys<'_>) -> Result<Self> {
        keys.ignore(&IGNORED);
        // How a weight lies in its file is the base's to say; PEFT sets this for GPT-2 by itself.
        keys.ignore(&["fan_in_fan_out"]);
        for key in ["bias", "modules_to_save"] {
            keys.require_off(key)?;
        }
        Ok(Self {
            target_modules: keys.target_modules("target_modules")?,
            exclude_modules: keys.exclude_modules()?,
            layers_to_transform: keys.layers()?,
            layers_pattern: keys.one_or_more("layers_pattern")?,
            task_type: keys.text("task_type")?,
            base_model_name_or_path: keys.text("base_model_name_or_path")?,
            revision: keys.text("revision")?,
        })
    }

    /// The targets with the method's default filled in.
    pub(crate) fn with_default_targets<M: Method>(mut self, model_type: &str) -> Result<Self> {
        if self.target_modules.is_none() {
            self.target_modules = Some(M::default_targets(model_type).ok_or_else(|| {
                Error::config(
                    "target_modules",
                    format!(
                        "is not set, and {} has no default for model type `{model_type}`; name \
                         modules or use `all-linear`",
                        M::PEFT_TYPE
                    ),
                )
            })?);
        }
        Ok(self)
    }

    /// The linears it names.
    pub(crate) fn select<'a>(&self, sites: &'a [Site]) -> Result<Vec<&'a Site>> {
        let none = TargetModules::List(Vec::new());
        let selection = Selection {
            target_modules: self.target_modules.as_ref().unwrap_or(&none),
            exclude_modules: self.exclude_modules.as_ref(),
            layers_to_transform: self.layers_to_transform.as_deref(),
            layers_pattern: &self.layers_pattern,
        };
        target::select(sites, &selection)
    }

    /// Writes the keys, with `targets` for what was targeted.
    pub(crate) fn write(&self, peft_type: &str, keys: &mut Map<String, Value>) {
        let names = |names: &[String]| {
            let mut names = names.to_vec();
            names.sort();
            json!(names)
        };
        let targets = match &self.target_modules {
            None => Value::Null,
            Some(TargetModules::AllLinear) => json!("all-linear"),
            Some(TargetModules::Regex(source)) => json!(source),
            Some(TargetModules::List(list)) => names(list),
        };
        let excluded = match &self.exclude_modules {
            None => Value::Null,
            Some(ExcludeModules::Regex(source)) => json!(source),
            Some(ExcludeModules::List(list)) => names(list),
        };
        let entries = [
            ("auto_mapping", Value::Null),
            (
                "base_model_name_or_path",
                json!(self.base_model_name_or_path),
            ),
            ("exclude_modules", excluded),
            ("inference_mode", json!(true)),
            (
                "layers_pattern",
                if self.layers_pattern.is_empty() {
                    Value::Null
                } else {
                    json!(self.layers_pattern)
                },
            ),
            ("layers_to_transform", json!(self.layers_to_transform)),
            ("modules_to_save", Value::Null),
            ("peft_type", json!(peft_type)),
            ("revision", json!(self.revision)),
            ("target_modules", targets),
            ("task_type", json!(self.task_type)),
        ];
        // Keys that are off are left out: some methods of PEFT have no such field.
        let always = ["base_model_name_or_path", "target_modules", "task_type"];
        let told = entries
            .into_iter()
            .filter(|(key, value)| !value.is_null() || always.contains(key));
        keys.extend(told.map(|(key, value)| (key.to_owned(), value)));
    }
}
