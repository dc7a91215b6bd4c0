//! The files of a tokenizer beside `tokenizer.json`.

use crate::data::chat_template::ChatTemplate;
use crate::data::jsonl::json_kind;
use crate::suggest::did_you_mean;
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const CONFIG: &str = "tokenizer_config.json";
const TEMPLATE: &str = "chat_template.jinja";

/// Every file that belongs to a tokenizer.
const FILES: [&str; 10] = [
    "added_tokens.json",
    TEMPLATE,
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    CONFIG,
    "vocab.json",
    "vocab.txt",
];

/// The files of `FILES` that a directory has.
pub(super) fn existing(directory: &Path) -> Vec<PathBuf> {
    FILES
        .iter()
        .map(|name| directory.join(name))
        .filter(|path| path.is_file())
        .collect()
}

/// The path of `tokenizer.json`, or what there is instead.
pub(super) fn tokenizer_json(directory: &Path) -> Result<PathBuf> {
    let path = directory.join("tokenizer.json");
    if path.is_file() {
        return Ok(path);
    }
    let has = |name: &str| directory.join(name).is_file();
    let message = if let Some(model) = ["tokenizer.model", "spiece.model"].iter().find(|n| has(n)) {
        format!(
            "missing; there is a SentencePiece `{model}` only: convert it by loading and saving \
             the tokenizer once with transformers, which writes tokenizer.json"
        )
    } else if has("vocab.json") || has("vocab.txt") {
        "missing; there is a vocabulary of the old format only: convert it by loading and saving \
         the tokenizer once with transformers, which writes tokenizer.json"
            .to_owned()
    } else {
        "missing; a model directory holds its tokenizer in tokenizer.json".to_owned()
    };
    Err(Error::model(path, message))
}

/// What the files beside `tokenizer.json` say.
#[derive(Debug)]
pub(super) struct Settings {
    directory: PathBuf,
    pub(super) special_tokens: BTreeMap<String, String>,
    pub(super) generation_eos_ids: Vec<u32>,
    templates: BTreeMap<String, String>,
    /// Where they come from.
    template_file: PathBuf,
}

impl Settings {
    pub(super) fn read(directory: &Path) -> Result<Self> {
        let config = read_object(&directory.join(CONFIG))?;
        let map = read_object(&directory.join("special_tokens_map.json"))?;
        let generation = read_object(&directory.join("generation_config.json"))?;
        let mut special_tokens = BTreeMap::new();
        let extra = match config.get("extra_special_tokens") {
            Some(Value::Object(named)) => named.clone(),
            _ => Map::new(),
        };
        for (name, value) in extra.iter().chain(&map).chain(&config) {
            if !name.ends_with("_token") {
                continue;
            }
            if let Some(token) = token_text(value) {
                special_tokens.insert(name.clone(), token);
            }
        }
        Ok(Self {
            templates: read_templates(directory, &config)?,
            template_file: [TEMPLATE, CONFIG]
                .map(|name| directory.join(name))
                .into_iter()
                .find(|path| path.is_file())
                .unwrap_or_else(|| directory.to_path_buf()),
            directory: directory.to_path_buf(),
            special_tokens,
            generation_eos_ids: match generation.get("eos_token_id") {
                Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
                Some(value) => id(value).into_iter().collect(),
                None => Vec::new(),
            },
        })
    }

    /// Fails when the EOS token is not one token of the vocabulary: nothing would ever end.
    pub(super) fn check_eos(&self, tokenizer: &tokenizers::Tokenizer) -> Result<()> {
        let Some(eos) = self.special_tokens.get("eos_token") else {
            return Ok(());
        };
        if tokenizer.token_to_id(eos).is_some() {
            return Ok(());
        }
        let vocabulary = tokenizer.get_added_tokens_decoder();
        let mut added: Vec<&str> = vocabulary.values().map(|t| t.content.as_str()).collect();
        added.sort_unstable();
        Err(Error::model(
            self.directory.join(CONFIG),
            format!(
                "`eos_token` is `{eos}`, which is not in the vocabulary of tokenizer.json{}",
                did_you_mean(eos, added)
            ),
        ))
    }

    pub(super) fn compile_templates(&self) -> Result<BTreeMap<String, ChatTemplate>> {
        self.templates
            .iter()
            .map(|(name, source)| {
                let template = ChatTemplate::new(source, &self.special_tokens);
                let template = template.map_err(|e| e.in_template_file(&self.template_file))?;
                Ok((name.clone(), template))
            })
            .collect()
    }
}

fn id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

/// A special token: text, or an object with its `content`.
fn token_text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Object(fields) => fields.get("content")?.as_str().map(str::to_owned),
        _ => None,
    }
}

/// The chat templates by name: those of `chat_template.jinja`, else of the configuration.
fn read_templates(
    directory: &Path,
    config: &Map<String, Value>,
) -> Result<BTreeMap<String, String>> {
    let path = directory.join(TEMPLATE);
    if path.is_file() {
        let source = ChatTemplate::read_source(&path);
        let source = source.map_err(|e| e.in_template_file(&path))?;
        return Ok(BTreeMap::from([("default".to_owned(), source)]));
    }
    let invalid = |found: &Value| {
        Error::model(
            directory.join(CONFIG),
            format!(
                "`chat_template` must be a string or a list of {{\"name\", \"template\"}}, found \
                 {}",
                json_kind(found)
            ),
        )
    };
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(BTreeMap::new()),
        Some(Value::String(source)) => Ok(BTreeMap::from([("default".to_owned(), source.clone())])),
        Some(Value::Array(entries)) => entries
            .iter()
            .map(|entry| match (entry.get("name"), entry.get("template")) {
                (Some(Value::String(name)), Some(Value::String(source))) => {
                    Ok((name.clone(), source.clone()))
                }
                _ => Err(invalid(entry)),
            })
            .collect(),
        Some(other) => Err(invalid(other)),
    }
}

/// A JSON object from a file; empty when there is no such file.
fn read_object(path: &Path) -> Result<Map<String, Value>> {
    if !path.is_file() {
        return Ok(Map::new());
    }
    let bytes = std::fs::read(path).map_err(Error::read(path))?;
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => Err(Error::model(
            path,
            format!("expected a JSON object, found {}", json_kind(&other)),
        )),
        Err(e) => Err(Error::model(path, format!("not valid JSON: {e}"))),
    }
}
