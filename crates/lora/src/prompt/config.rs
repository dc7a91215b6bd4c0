//! The keys of `adapter_config.json`.

use super::start::Start;
use super::{Shape, files};
use crate::method::Keys;
use ferrotune_core::{Error, Result};
use serde_json::{Map, Value, json};

/// A method with its settings.
#[derive(Clone, Debug)]
pub(super) struct PromptConfig {
    pub(super) kind: Kind,
    /// Virtual tokens.
    pub(super) tokens: usize,
    /// PEFT's width of a row or, of a prefix, of the keys of one layer; `None` until the model says it.
    token_dim: Option<usize>,
    num_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    /// Whether the rows alone are there, without what makes them: an adapter of PEFT's, which saves no more.
    pub(super) rows_only: bool,
    pub(super) task_type: Option<String>,
    pub(super) base_model_name_or_path: Option<String>,
    revision: Option<String>,
}

/// Which of the three methods.
#[derive(Clone, Debug)]
pub(super) enum Kind {
    /// Rows of the embedding.
    Prompt { start: Start },
    /// The same, made by an encoder.
    PTuning {
        encoder: EncoderKind,
        /// Width inside it; the model's by default.
        hidden: Option<usize>,
    },
    /// Keys and values of every layer, `projection` wide inside if they are made by two linears.
    Prefix {
        projection: Option<Option<usize>>,
        zero: bool,
    },
}

/// `encoder_reparameterization_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EncoderKind {
    Mlp,
    Lstm { layers: usize },
}

/// Keys that are the model's, or say nothing here.
const IGNORED: [&str; 6] = [
    "auto_mapping",
    "inference_mode",
    "num_transformer_submodules",
    "peft_type",
    "peft_version",
    "runtime_config",
];

impl PromptConfig {
    pub(super) fn read(keys: &mut Keys<'_>) -> Result<Self> {
        keys.ignore(&IGNORED);
        keys.require_off("modules_to_save")?;
        let peft_type = keys.text("peft_type")?.unwrap_or_default().to_uppercase();
        let kind = match peft_type.as_str() {
            "PROMPT_TUNING" => Kind::Prompt {
                start: Start::read(keys)?,
            },
            "P_TUNING" => p_tuning(keys)?,
            _ => prefix_tuning(keys)?,
        };
        if keys.get("num_virtual_tokens").is_none() {
            return Err(keys.error(
                "num_virtual_tokens",
                "is missing: how many virtual tokens stand before each document, such as 20",
            ));
        }
        let optional = |keys: &mut Keys<'_>, key| -> Result<Option<usize>> {
            let given = keys.get(key).is_some();
            Ok(Some(keys.positive(key, 1)?).filter(|_| given))
        };
        Ok(Self {
            kind,
            tokens: keys.positive("num_virtual_tokens", 20)?,
            token_dim: optional(keys, "token_dim")?,
            num_layers: optional(keys, "num_layers")?,
            num_attention_heads: optional(keys, "num_attention_heads")?,
            rows_only: keys.directory().is_some_and(|d| !files::has_encoder(d)),
            task_type: keys.text("task_type")?,
            base_model_name_or_path: keys.text("base_model_name_or_path")?,
            revision: keys.text("revision")?,
        })
    }

    /// Columns of a row.
    pub(super) fn width(&self, shape: &Shape) -> Result<usize> {
        let keys = shape.keys.heads * shape.keys.head_dim;
        let (dim, width) = match self.kind {
            Kind::Prefix { .. } => (keys, 2 * shape.layers * keys),
            Kind::Prompt { .. } | Kind::PTuning { .. } => (shape.hidden, shape.hidden),
        };
        let heads = match self.kind {
            Kind::Prefix { .. } => Some(shape.keys.heads),
            _ => self.num_attention_heads,
        };
        let given = [
            ("token_dim", self.token_dim, Some(dim)),
            ("num_layers", self.num_layers, Some(shape.layers)),
            ("num_attention_heads", self.num_attention_heads, heads),
        ];
        for (key, given, model) in given {
            if given.is_some() && given != model {
                return Err(Error::config(
                    key,
                    format!(
                        "is {}, and this model makes it {}: the adapter belongs to another base",
                        given.unwrap_or_default(),
                        model.unwrap_or_default()
                    ),
                ));
            }
        }
        Ok(width)
    }

    pub(super) fn peft_type(&self) -> &'static str {
        match self.kind {
            Kind::Prompt { .. } => "PROMPT_TUNING",
            Kind::PTuning { .. } => "P_TUNING",
            Kind::Prefix { .. } => "PREFIX_TUNING",
        }
    }

    pub(super) fn describe(&self) -> String {
        let name = match &self.kind {
            Kind::Prompt { .. } => "prompt tuning",
            Kind::PTuning {
                encoder: EncoderKind::Mlp,
                ..
            } => "p-tuning by an MLP",
            Kind::PTuning { .. } => "p-tuning by an LSTM",
            Kind::Prefix {
                projection: None, ..
            } => "prefix tuning",
            Kind::Prefix { .. } => "prefix tuning by a projection",
        };
        format!("{name}, {} virtual tokens", self.tokens)
    }

    /// The object of `adapter_config.json`, for a model of this shape.
    pub(super) fn to_json(&self, shape: &Shape) -> Map<String, Value> {
        let keys = shape.keys.heads * shape.keys.head_dim;
        let (dim, heads) = match self.kind {
            Kind::Prefix { .. } => (keys, json!(shape.keys.heads)),
            _ => (shape.hidden, json!(self.num_attention_heads)),
        };
        let mut object = Map::new();
        let mut put = |key: &str, value: Value| drop(object.insert(key.to_owned(), value));
        put("auto_mapping", Value::Null);
        put(
            "base_model_name_or_path",
            json!(self.base_model_name_or_path),
        );
        put("inference_mode", json!(true));
        put("num_attention_heads", heads);
        put("num_layers", json!(shape.layers));
        put("num_transformer_submodules", json!(1));
        put("num_virtual_tokens", json!(self.tokens));
        put("peft_type", json!(self.peft_type()));
        put("revision", json!(self.revision));
        put("task_type", json!(self.task_type));
        put("token_dim", json!(dim));
        match &self.kind {
            Kind::Prompt { start } => start.write(&mut put),
            Kind::PTuning { encoder, hidden } => {
                let (name, layers) = match encoder {
                    EncoderKind::Mlp => ("MLP", 2),
                    EncoderKind::Lstm { layers } => ("LSTM", *layers),
                };
                put("encoder_reparameterization_type", json!(name));
                put("encoder_hidden_size", json!(hidden.unwrap_or(dim)));
                put("encoder_num_layers", json!(layers));
                put("encoder_dropout", json!(0.0));
            }
            Kind::Prefix { projection, zero } => {
                let hidden = projection.flatten().unwrap_or(dim);
                put("prefix_projection", json!(projection.is_some()));
                put("encoder_hidden_size", json!(hidden));
                put("init_weights", json!(zero.then_some("zero")));
            }
        }
        object
    }
}

fn p_tuning(keys: &mut Keys<'_>) -> Result<Kind> {
    let lstm = keys.choice("encoder_reparameterization_type", &["MLP", "LSTM"])? == "LSTM";
    let layers = keys.positive("encoder_num_layers", 2)?;
    let encoder = if lstm {
        keys.require_off("encoder_dropout")?;
        EncoderKind::Lstm { layers }
    } else {
        // PEFT's MLP has three linears, whatever these say.
        keys.ignore(&["encoder_dropout"]);
        EncoderKind::Mlp
    };
    Ok(Kind::PTuning {
        encoder,
        hidden: hidden_size(keys)?,
    })
}

fn prefix_tuning(keys: &mut Keys<'_>) -> Result<Kind> {
    let hidden = hidden_size(keys)?;
    let projection = keys.boolean("prefix_projection", false)?;
    let init = keys.text("init_weights")?;
    if let Some(other) = init.as_deref().filter(|name| *name != "zero") {
        return Err(keys.error(
            "init_weights",
            format!("is \"{other}\", expected \"zero\" or null"),
        ));
    }
    Ok(Kind::Prefix {
        projection: projection.then_some(hidden),
        zero: init.is_some(),
    })
}

fn hidden_size(keys: &mut Keys<'_>) -> Result<Option<usize>> {
    let given = keys.get("encoder_hidden_size").is_some();
    let size = keys.positive("encoder_hidden_size", 1)?;
    Ok(given.then_some(size))
}
