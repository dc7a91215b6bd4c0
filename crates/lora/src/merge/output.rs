//! Everything in the output directory but the tensors.

use super::plan::Plan;
use super::stack::restack;
use super::{MergeDType, OutputDirectory};
use ferrotune_core::io::{self, ModelFiles};
use ferrotune_core::model::{DecoderConfig, HfConfig, ModelPlan, WeightSource};
use ferrotune_core::{Error, Result};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const CONFIG_FILE: &str = "config.json";
const INDEX_FILE: &str = "model.safetensors.index.json";
const GENERATION_CONFIG_FILE: &str = "generation_config.json";

/// The files of a tokenizer. They belong together: all come from one directory.
const TOKENIZER_FILES: &[&str] = &[
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
];

/// Refuses an output directory that holds an input, or that is not empty unless it is to be
/// replaced.
pub(super) fn require_usable(
    output: &Path,
    inputs: &[&Path],
    policy: OutputDirectory,
) -> Result<()> {
    let key = "output_dir";
    if !output.exists() {
        return Ok(());
    }
    if !output.is_dir() {
        let message = "it is a file, and output_dir must be a directory; choose another output_dir";
        return Err(Error::write(output)(std::io::Error::other(message)));
    }
    let real = |path: &Path| path.canonicalize().map_err(Error::read(path));
    let real_output = real(output)?;
    for input in inputs {
        if real(input)?.starts_with(&real_output) {
            return Err(Error::config(
                key,
                format!(
                    "{} holds an input of the merge, {}; choose another directory",
                    output.display(),
                    input.display()
                ),
            ));
        }
    }
    let mut entries = std::fs::read_dir(output).map_err(Error::read(output))?;
    if policy == OutputDirectory::MustBeNew && entries.next().is_some() {
        return Err(Error::config(
            key,
            format!(
                "{} exists and is not empty; choose a new directory, or have it replaced (`--overwrite`)",
                output.display()
            ),
        ));
    }
    Ok(())
}

/// The base's `config.json`.
pub(super) struct BaseConfig {
    path: PathBuf,
    bytes: Vec<u8>,
    object: Map<String, Value>,
}

impl BaseConfig {
    pub(super) fn read(directory: &Path) -> Result<Self> {
        let path = directory.join(CONFIG_FILE);
        let bytes = std::fs::read(&path).map_err(Error::read(&path))?;
        let object = serde_json::from_slice(&bytes)
            .map_err(|error| Error::model(&path, format!("is no JSON object: {error}")))?;
        Ok(Self {
            path,
            bytes,
            object,
        })
    }

    /// Refuses weights that are of another model than this config, where its architecture is known:
    /// the result would have the same fault.
    ///
    /// # Errors
    /// [`Error::Model`] naming the tensor or the key.
    pub(super) fn require_matching(&self, weights: &ModelFiles) -> Result<()> {
        match self.decoder()? {
            Some(decoder) => weights.check(&ModelPlan::new(&decoder)),
            None => Ok(()),
        }
    }

    /// The model, where its architecture is known.
    ///
    /// # Errors
    /// [`Error::Model`] naming the key.
    pub(super) fn decoder(&self) -> Result<Option<DecoderConfig>> {
        let config = HfConfig::from_value(&self.path, Value::Object(self.object.clone()))?;
        if !DecoderConfig::covers(&config) {
            return Ok(None);
        }
        DecoderConfig::from_hf(&config).map(Some)
    }

    pub(super) fn model_type(&self) -> &str {
        self.object
            .get("model_type")
            .and_then(Value::as_str)
            .unwrap_or("")
    }

    pub(super) fn ties_head(&self) -> bool {
        self.object.get("tie_word_embeddings") == Some(&Value::Bool(true))
    }

    /// Refuses a quantised base: the sum would be rounded to its few levels.
    pub(super) fn require_dense(&self) -> Result<()> {
        match self.object.get("quantization_config") {
            None | Some(Value::Null) => Ok(()),
            Some(_) => Err(Error::model(
                &self.path,
                "is of a quantised checkpoint (`quantization_config`); merge into the original \
                 16- or 32-bit checkpoint it was made from",
            )),
        }
    }

    /// Copies the file byte for byte, or with what of it the output changes: its dtype, its layers, and
    /// whether the head is the embedding.
    pub(super) fn write(&self, dtype: MergeDType, plan: &Plan, directory: &Path) -> Result<()> {
        let path = directory.join(CONFIG_FILE);
        let same = !plan.unties && plan.stack.is_none();
        let name = match dtype {
            MergeDType::SameAsBase if same => return io::write_file(&path, &self.bytes),
            MergeDType::SameAsBase => None,
            MergeDType::Float32 => Some("float32"),
            MergeDType::BFloat16 => Some("bfloat16"),
        };
        let mut object = self.object.clone();
        if let Some(stack) = &plan.stack {
            restack(&self.path, &mut object, stack)?;
        }
        if plan.unties {
            object.insert("tie_word_embeddings".into(), json!(false));
        }
        if let Some(name) = name {
            set_dtype(&mut object, name);
            // `dtype` is Transformers 5's name; version 4 and most other readers know `torch_dtype`.
            if !object.contains_key("dtype") && !object.contains_key("torch_dtype") {
                object.insert("torch_dtype".into(), json!(name));
            }
        }
        let text = format!("{:#}\n", Value::Object(object));
        io::write_file(&path, text.as_bytes())
    }
}

/// Sets every dtype key, those of nested configurations too.
fn set_dtype(object: &mut Map<String, Value>, name: &str) {
    for (key, value) in object.iter_mut() {
        match value {
            Value::Object(nested) => set_dtype(nested, name),
            Value::String(text) if key == "dtype" || key == "torch_dtype" => name.clone_into(text),
            _ => {}
        }
    }
}

/// Writes the index of a checkpoint in several files, where the base has one.
pub(super) fn write_index(
    base: &Path,
    weight_map: &BTreeMap<String, String>,
    bytes: u64,
    directory: &Path,
) -> Result<()> {
    if !base.join(INDEX_FILE).exists() {
        return Ok(());
    }
    let index = json!({ "metadata": { "total_size": bytes }, "weight_map": weight_map });
    io::write_file(
        &directory.join(INDEX_FILE),
        format!("{index:#}\n").as_bytes(),
    )
}

/// Copies the generation defaults and the tokenizer: the adapter's if it has one, because its chat
/// template is the one that was trained, the base's otherwise.
pub(super) fn copy_side_files(base: &Path, adapter: &Path, directory: &Path) -> Result<()> {
    copy_if_there(base, GENERATION_CONFIG_FILE, directory)?;
    let adapter_has_tokenizer = ["tokenizer.json", "tokenizer_config.json"]
        .iter()
        .any(|name| adapter.join(name).is_file());
    let source = if adapter_has_tokenizer { adapter } else { base };
    for name in TOKENIZER_FILES {
        copy_if_there(source, name, directory)?;
    }
    Ok(())
}

fn copy_if_there(from: &Path, name: &str, to: &Path) -> Result<()> {
    let source = from.join(name);
    if !source.is_file() {
        return Ok(());
    }
    let bytes = std::fs::read(&source).map_err(Error::read(&source))?;
    io::write_file(&to.join(name), &bytes)
}
