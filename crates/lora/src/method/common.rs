//! The keys that every method's configuration has.

use super::Method;
use super::keys::Keys;
use crate::beside::{Biases, Wanted, Whole, tied};
use crate::modules;
use crate::target::{self, ExcludeModules, Selection, TargetModules};
use ferrotune_core::adapter::Site;
use ferrotune_core::{Error, Result, suggest};
use serde_json::{Map, Value, json};

/// Where a method attaches, and for which base.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Common {
    pub(crate) target_modules: Option<TargetModules>,
    pub(crate) exclude_modules: Option<ExcludeModules>,
    pub(crate) layers_to_transform: Option<Vec<usize>>,
    pub(crate) layers_pattern: Vec<String>,
    pub(crate) bias: Biases,
    pub(crate) modules_to_save: Vec<String>,
    pub(crate) ensure_weight_tying: bool,
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
    pub(crate) fn read<M: Method>(keys: &mut Keys<'_>) -> Result<Self> {
        keys.ignore(&IGNORED);
        // How a weight lies in its file is the base's to say; PEFT sets this for GPT-2 by itself.
        keys.ignore(&["fan_in_fan_out"]);
        let mut target_modules = keys.target_modules("target_modules")?;
        let mut modules_to_save = keys.one_or_more("modules_to_save")?;
        let ensure_weight_tying = M::TIES && keys.boolean("ensure_weight_tying", false)?;
        if let Some(directory) = keys.directory() {
            tied::with_head(
                ensure_weight_tying,
                &mut modules_to_save,
                &mut target_modules,
                directory,
            )?;
        }
        let task_type = keys.text("task_type")?;
        modules::complete_for_task(task_type.as_deref(), &mut modules_to_save);
        Ok(Self {
            target_modules,
            bias: biases::<M>(keys)?,
            modules_to_save,
            ensure_weight_tying,
            exclude_modules: keys.exclude_modules()?,
            layers_to_transform: keys.layers()?,
            layers_pattern: keys.one_or_more("layers_pattern")?,
            task_type,
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

    /// The same for a task of PEFT's.
    pub(crate) fn for_task(&mut self, task: &str) {
        self.task_type = Some(task.into());
        modules::complete_for_task(Some(task), &mut self.modules_to_save);
    }

    /// What it trains of the base on a model of `sites`.
    pub(crate) fn whole<'a>(&'a self, sites: &'a [Site]) -> Result<Whole<'a>> {
        let wanted = Wanted {
            modules_to_save: &self.modules_to_save,
            keeps_tied: self.ensure_weight_tying,
            target_modules: self.target_modules.as_ref(),
        };
        Whole::of(wanted, sites)
    }

    /// The linears it names, but for those of `whole`.
    pub(crate) fn select<'a>(&self, sites: &'a [Site], whole: &Whole<'_>) -> Result<Vec<&'a Site>> {
        let none = TargetModules::List(Vec::new());
        let selection = Selection {
            target_modules: self.target_modules.as_ref().unwrap_or(&none),
            exclude_modules: self.exclude_modules.as_ref(),
            layers_to_transform: self.layers_to_transform.as_deref(),
            layers_pattern: &self.layers_pattern,
        };
        let mut selected = target::select(sites, &selection)?;
        whole.leave_out(&mut selected);
        whole.require_some(&selected)?;
        Ok(selected)
    }

    /// Writes the keys, with `targets` for what was targeted.
    pub(crate) fn write<M: Method>(&self, keys: &mut Map<String, Value>) {
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
        let saved = modules::as_in_file(self.task_type.as_deref(), &self.modules_to_save);
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
            (
                "modules_to_save",
                if saved.is_empty() {
                    Value::Null
                } else {
                    json!(saved)
                },
            ),
            ("peft_type", json!(M::PEFT_TYPE)),
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
        if let Some(of_targets) = M::BIAS {
            let bias = match self.bias {
                Biases::None => "none",
                Biases::All => "all",
                Biases::Adapted => of_targets,
            };
            keys.insert("bias".into(), json!(bias));
        }
        if M::TIES {
            let ties = json!(self.ensure_weight_tying);
            keys.insert("ensure_weight_tying".into(), ties);
        }
    }
}

/// The key `bias`. As in PEFT, whatever ends with `_only` means the targets'.
fn biases<M: Method>(keys: &mut Keys<'_>) -> Result<Biases> {
    let key = "bias";
    let Some(value) = keys.get(key) else {
        return Ok(Biases::None);
    };
    let name = value.as_str().unwrap_or_default();
    match (name, M::BIAS) {
        ("none", _) => Ok(Biases::None),
        ("all", Some(_)) => Ok(Biases::All),
        (only, Some(_)) if only.ends_with("_only") => Ok(Biases::Adapted),
        (_, Some(of_targets)) => {
            let near = suggest::did_you_mean(name, ["none", "all", of_targets]);
            let message =
                format!("is {value}, expected \"none\", \"all\" or \"{of_targets}\"{near}");
            Err(keys.error(key, message))
        }
        (_, None) => {
            let message = format!(
                "is {value}, and {} of PEFT trains no biases beside what it adapts; leave it out, or name whole modules \
                 in `modules_to_save`",
                M::PEFT_TYPE
            );
            Err(keys.error(key, message))
        }
    }
}
