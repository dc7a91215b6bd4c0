//! From `adapter_config.json`.

use super::{InitLoraWeights, LoraBias, LoraConfig, TokenIndices};
use crate::method::{Keys, Source};
use crate::modules;
use crate::target::{ExcludeModules, PatternMap, TargetModules};
use crate::unknown_key;
use ferrotune_core::{Error, Result, suggest};
use serde_json::{Map, Value};
use std::path::Path;

/// Features of PEFT's LoRA that are not implemented here. Their keys are fine while they are off:
/// null, false, 0, or empty.
const MUST_BE_OFF: &[&str] = &[
    "arrow_config",
    "kasa_config",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
    "velora_config",
];

/// Keys that say nothing about the arithmetic while the features above are off.
const WITHOUT_EFFECT: &[&str] = &[
    "auto_mapping",
    "inference_mode",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
];

/// Keys that say more of a start.
const SETTINGS: [&str; 4] = [
    "corda_config",
    "eva_config",
    "loftq_config",
    "lora_ga_config",
];

/// Keys with a field.
const FIELDS: [&str; 23] = [
    "alora_invocation_tokens",
    "alpha_pattern",
    "base_model_name_or_path",
    "bias",
    "ensure_weight_tying",
    "exclude_modules",
    "fan_in_fan_out",
    "init_lora_weights",
    "layer_replication",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "modules_to_save",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
];

/// Every key of a LoRA.
fn known() -> Vec<&'static str> {
    let all = [MUST_BE_OFF, WITHOUT_EFFECT, &SETTINGS, &FIELDS];
    all.into_iter().flatten().copied().collect()
}

const TASK_TYPES: &[&str] = &[
    "CAUSAL_LM",
    "FEATURE_EXTRACTION",
    "QUESTION_ANS",
    "SEQ_2_SEQ_LM",
    "SEQ_CLS",
    "TOKEN_CLS",
];

impl LoraConfig {
    /// Reads the object of an `adapter_config.json` whose `peft_type` is `LORA`.
    ///
    /// Absent keys take PEFT's defaults. A feature that is switched on but not implemented here is
    /// an error; what becomes of a key that is not known at all, `unknown_key` says.
    ///
    /// # Errors
    /// [`Error::Adapter`] naming `path`, the key, its value and what was expected.
    pub fn from_json(path: &Path, object: &Map<String, Value>) -> Result<Self> {
        let mut config = Self {
            task_type: None,
            ..Self::default()
        };
        let mut settings = Vec::new();
        for (key, value) in object {
            let field = Field { path, key, value };
            if let Some(known) = SETTINGS.iter().find(|known| *known == key) {
                settings.extend(field.object()?.map(|object| (*known, object)));
            } else if MUST_BE_OFF.contains(&key.as_str()) {
                field.require_off()?;
            } else if !WITHOUT_EFFECT.contains(&key.as_str()) {
                config.set(&field)?;
            }
        }
        let mut init = config.init_lora_weights;
        // Those of other starts do nothing, in PEFT too.
        let own = init.settings();
        for (_, object) in settings.iter().filter(|(key, _)| own == Some(key)) {
            init = init.read(&mut Keys::new(Source::File(path), object))?;
        }
        if let InitLoraWeights::Eva(_) = init {
            // What started by EVA is a plain LoRA, once it is there.
            init = InitLoraWeights::Kaiming;
        }
        config.init_lora_weights = init;
        modules::complete_for_task(config.task_type.as_deref(), &mut config.modules_to_save);
        config.validate_as_file().map_err(|error| match error {
            Error::Config { key, message } => Error::adapter(path, format!("`{key}`: {message}")),
            other => other,
        })?;
        Ok(config)
    }

    fn set(&mut self, field: &Field<'_>) -> Result<()> {
        match field.key {
            "r" => self.rank = field.integer(field.value)?,
            "lora_alpha" => self.alpha = field.number(field.value)?,
            "lora_dropout" => self.dropout = field.number(field.value)?,
            "use_rslora" => self.use_rslora = field.boolean()?,
            "target_modules" => self.target_modules = field.target_modules()?,
            "exclude_modules" => self.exclude_modules = field.exclude_modules()?,
            "layers_to_transform" => self.layers_to_transform = field.layers()?,
            "layers_pattern" => self.layers_pattern = field.one_or_more()?,
            "rank_pattern" => self.rank_pattern = field.pattern(|value| field.integer(value))?,
            "alpha_pattern" => self.alpha_pattern = field.pattern(|value| field.number(value))?,
            "init_lora_weights" => self.init_lora_weights = field.init()?,
            "task_type" => self.task_type = field.task_type()?,
            "base_model_name_or_path" => self.base_model_name_or_path = field.text()?,
            "revision" => self.revision = field.text()?,
            "bias" => self.bias = field.bias()?,
            "use_dora" => self.use_dora = field.boolean()?,
            "lora_bias" => self.lora_bias = field.boolean()?,
            "modules_to_save" => self.modules_to_save = field.one_or_more()?,
            "trainable_token_indices" => self.trainable_token_indices = field.token_indices()?,
            "ensure_weight_tying" => self.ensure_weight_tying = field.boolean()?,
            "alora_invocation_tokens" => {
                let listed = !field.value.is_null();
                self.alora_invocation_tokens =
                    listed.then(|| field.tokens(field.value)).transpose()?;
            }
            "layer_replication" => self.layer_replication = field.layer_ranges()?,
            "fan_in_fan_out" => self.fan_in_fan_out = field.boolean()?,
            key => unknown_key::judge(field.path, key, field.value, &known())?,
        }
        Ok(())
    }
}

/// A key with its value and the file that holds them.
struct Field<'a> {
    path: &'a Path,
    key: &'a str,
    value: &'a Value,
}

impl<'a> Field<'a> {
    fn wrong(&self, expected: &str) -> Error {
        Error::adapter(
            self.path,
            format!("`{}` is {}, expected {expected}", self.key, self.value),
        )
    }

    fn require_off(&self) -> Result<()> {
        if unknown_key::is_off(self.value) {
            return Ok(());
        }
        Err(Error::adapter(
            self.path,
            format!(
                "`{}` is {}: this feature of PEFT is not supported yet, and ignoring it would \
                 give a different model",
                self.key, self.value
            ),
        ))
    }

    /// An object with entries.
    fn object(&self) -> Result<Option<&'a Map<String, Value>>> {
        match self.value {
            Value::Null => Ok(None),
            Value::Object(object) => Ok(Some(object).filter(|object| !object.is_empty())),
            _ => Err(self.wrong("an object or null")),
        }
    }

    fn bias(&self) -> Result<LoraBias> {
        let all = [LoraBias::None, LoraBias::All, LoraBias::LoraOnly];
        let name = self.value.as_str().unwrap_or_default();
        if self.value.is_null() {
            return Ok(LoraBias::None);
        }
        all.into_iter()
            .find(|bias| bias.as_str() == name)
            .ok_or_else(|| {
                let nearest = suggest::did_you_mean(name, all.map(LoraBias::as_str));
                self.wrong(&format!("\"none\", \"all\" or \"lora_only\"{nearest}"))
            })
    }

    fn tokens(&self, value: &Value) -> Result<Vec<u32>> {
        let token = |item: &Value| item.as_u64().and_then(|id| u32::try_from(id).ok());
        let tokens = value
            .as_array()
            .map(|items| items.iter().map(token).collect());
        tokens.flatten().ok_or_else(|| {
            self.wrong("a list of token ids, or, of trainable_token_indices, an object from modules to such lists")
        })
    }

    fn token_indices(&self) -> Result<Option<TokenIndices>> {
        match self.value {
            Value::Null => Ok(None),
            Value::Array(items) if items.is_empty() => Ok(None),
            Value::Object(modules) if modules.is_empty() => Ok(None),
            Value::Object(modules) => {
                let modules = modules.iter();
                let modules = modules.map(|(name, ids)| Ok((name.clone(), self.tokens(ids)?)));
                Ok(Some(TokenIndices::Modules(modules.collect::<Result<_>>()?)))
            }
            list => Ok(Some(TokenIndices::Embedding(self.tokens(list)?))),
        }
    }

    fn integer(&self, value: &Value) -> Result<usize> {
        value
            .as_u64()
            .and_then(|number| usize::try_from(number).ok())
            .ok_or_else(|| self.wrong("whole numbers"))
    }

    fn number(&self, value: &Value) -> Result<f64> {
        value.as_f64().ok_or_else(|| self.wrong("numbers"))
    }

    fn boolean(&self) -> Result<bool> {
        self.value
            .as_bool()
            .ok_or_else(|| self.wrong("true or false"))
    }

    fn text(&self) -> Result<Option<String>> {
        match self.value {
            Value::Null => Ok(None),
            Value::String(text) => Ok(Some(text.clone())),
            _ => Err(self.wrong("a string or null")),
        }
    }

    fn names(&self, items: &[Value]) -> Result<Vec<String>> {
        items
            .iter()
            .map(|item| item.as_str().map(str::to_owned))
            .collect::<Option<_>>()
            .ok_or_else(|| self.wrong("a list of strings"))
    }

    fn target_modules(&self) -> Result<Option<TargetModules>> {
        match self.value {
            Value::Null => Ok(None),
            Value::String(text) => Ok(Some(TargetModules::from_text(text))),
            Value::Array(items) => Ok(Some(TargetModules::List(self.names(items)?))),
            _ => Err(self.wrong("a list of names, a regular expression, \"all-linear\" or null")),
        }
    }

    fn exclude_modules(&self) -> Result<Option<ExcludeModules>> {
        match self.value {
            Value::Null => Ok(None),
            Value::String(text) if text.is_empty() => Ok(None),
            Value::String(text) => Ok(Some(ExcludeModules::Regex(text.clone()))),
            Value::Array(items) if items.is_empty() => Ok(None),
            Value::Array(items) => Ok(Some(ExcludeModules::List(self.names(items)?))),
            _ => Err(self.wrong("a list of names, a regular expression or null")),
        }
    }

    fn one_or_more(&self) -> Result<Vec<String>> {
        match self.value {
            Value::Null => Ok(Vec::new()),
            Value::String(text) if text.is_empty() => Ok(Vec::new()),
            Value::String(text) => Ok(vec![text.clone()]),
            Value::Array(items) => self.names(items),
            _ => Err(self.wrong("a string, a list of strings or null")),
        }
    }

    fn layers(&self) -> Result<Option<Vec<usize>>> {
        match self.value {
            Value::Null => Ok(None),
            Value::Array(items) => items
                .iter()
                .map(|item| self.integer(item))
                .collect::<Result<_>>()
                .map(Some),
            single => Ok(Some(vec![self.integer(single)?])),
        }
    }

    fn layer_ranges(&self) -> Result<Vec<[usize; 2]>> {
        let items = match self.value {
            Value::Null => return Ok(Vec::new()),
            Value::Array(items) => Some(items),
            _ => None,
        };
        let number = |item: &Value| item.as_u64().and_then(|n| usize::try_from(n).ok());
        let range = |item: &Value| match item.as_array()?.as_slice() {
            [start, end] => Some([number(start)?, number(end)?]),
            _ => None,
        };
        items
            .and_then(|items| items.iter().map(range).collect())
            .ok_or_else(|| {
                self.wrong("a list of ranges [start, end) of layers, such as [[0, 4], [2, 5]]")
            })
    }

    fn pattern<T>(&self, convert: impl Fn(&Value) -> Result<T>) -> Result<PatternMap<T>> {
        match self.value {
            Value::Null => Ok(PatternMap::new()),
            Value::Object(entries) => entries
                .iter()
                .map(|(name, value)| Ok((name.clone(), convert(value)?)))
                .collect(),
            _ => Err(self.wrong("an object from module names to numbers")),
        }
    }

    fn init(&self) -> Result<InitLoraWeights> {
        match self.value {
            Value::Bool(true) => Ok(InitLoraWeights::Kaiming),
            Value::Bool(false) => Ok(InitLoraWeights::Random),
            Value::String(name) => InitLoraWeights::from_name(name)
                .map_err(|fault| Error::adapter(self.path, format!("`{}` {fault}", self.key))),
            _ => Err(self.wrong("true, false or the name of a start, such as \"gaussian\"")),
        }
    }

    fn task_type(&self) -> Result<Option<String>> {
        let task = self.text()?;
        if let Some(task) = &task
            && !TASK_TYPES.contains(&task.as_str())
        {
            return Err(self.wrong(&format!(
                "one of {}{}",
                TASK_TYPES.join(", "),
                suggest::did_you_mean(task, TASK_TYPES.iter().copied())
            )));
        }
        Ok(task)
    }
}
