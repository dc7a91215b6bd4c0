//! What the tests of the whole share: tiny models in temporary directories, data sets, and runs of
//! the `ferrotune` binary.
#![allow(
    dead_code,
    reason = "every test file compiles this and uses a part of it"
)]

pub(crate) mod family;
pub(crate) mod oracle;
pub(crate) mod output_scaling;

pub(crate) use family::Family;

use ferrotune::core::data::{Example, IGNORE_INDEX};
use ferrotune::core::io::{FileDType, SafetensorsFile, TensorData, write_safetensors};
use ferrotune::kernels::rng::{Stream, key_for};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Characters of the tiny tokenizer beside its special tokens.
const ALPHABET: &str =
    "\n !?.,:;'+-=0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
/// Special tokens, ids 0 to 3.
const SPECIAL: [&str; 4] = ["<unk>", "<s>", "<|im_end|>", "<|im_start|>"];
const CHAT_TEMPLATE: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n\
    {{ message.content }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// Architecture and dimensions of a tiny model.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) vocab: usize,
    pub(crate) max_position: usize,
    pub(crate) tied: bool,
    pub(crate) bias: bool,
    pub(crate) hidden_act: &'static str,
    pub(crate) family: Family,
    /// Standard deviation of a weight times the root of its columns.
    pub(crate) gain: f64,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            hidden: 32,
            intermediate: 48,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            head_dim: 8,
            vocab: 96,
            max_position: 256,
            tied: false,
            bias: false,
            hidden_act: "silu",
            family: Family::Llama,
            gain: 1.4,
        }
    }
}

impl Shape {
    pub(crate) fn config(&self) -> Value {
        let mut config = json!({
            "architectures": ["TinyForCausalLM"],
            "model_type": self.family.model_type(),
        });
        let llama = json!({
            "hidden_act": self.hidden_act,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.max_position,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "attention_bias": self.bias,
            "mlp_bias": self.bias,
            "tie_word_embeddings": self.tied,
            "bos_token_id": 1,
            "eos_token_id": 2,
        });
        let own = self.family.keys(self);
        let keys = match self.family.has_own_keys() {
            true => vec![own],
            false => vec![llama, own],
        };
        for keys in keys {
            if let (Some(config), Value::Object(keys)) = (config.as_object_mut(), keys) {
                config.extend(keys);
            }
        }
        config
    }

    /// Names and shapes of the weights, written down independently of the engine.
    pub(crate) fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (family, hidden) = (self.family, self.hidden);
        let table = |name: &str, rows| (format!("{name}.weight"), vec![rows, hidden]);
        let mut tensors = vec![table(family.embedding(), self.vocab)];
        if let Some(positions) = family.positions() {
            tensors.push(table(positions, self.max_position));
        }
        if !self.tied {
            tensors.push(table("lm_head", self.vocab));
        }
        let mut norms = vec![(family.final_norm().to_owned(), hidden)];
        for layer in 0..self.layers {
            let at = |name: &str| family.in_layer(layer, name);
            for norm in family.norms().into_iter().flatten() {
                norms.push((at(norm), hidden));
            }
            if let Some([q, k]) = family.qk_norms(self) {
                norms.extend([(at("self_attn.q_norm"), q), (at("self_attn.k_norm"), k)]);
            }
            for (name, [out, input]) in family.linears(self) {
                let shape = match family.is_conv1d() {
                    true => vec![input, out],
                    false => vec![out, input],
                };
                tensors.push((at(&format!("{name}.weight")), shape));
                if self.bias || family.has_bias(name) {
                    tensors.push((at(&format!("{name}.bias")), vec![out]));
                }
            }
        }
        for (name, width) in norms {
            if family.has_layer_norm() {
                tensors.push((format!("{name}.bias"), vec![width]));
            }
            tensors.push((format!("{name}.weight"), vec![width]));
        }
        tensors
    }

    /// Random values, large enough that a wrong mask, scale or rotation shows.
    pub(crate) fn weights(&self, seed: u64) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
        let mean = 1.0 - self.family.norm_offset();
        let draw = |(name, shape): (String, Vec<usize>)| {
            let mut stream = Stream::new(key_for(seed, &name));
            let norm = shape.len() == 1 && name.ends_with(".weight");
            let std = match shape[..] {
                [_] => 0.2,
                [_, columns] => self.gain / (columns as f64).sqrt(),
                _ => 1.0,
            };
            let values = (0..shape.iter().product::<usize>())
                .map(|_| (stream.normal() * std + if norm { mean } else { 0.0 }) as f32);
            (name, (shape.clone(), values.collect()))
        };
        self.tensors().into_iter().map(draw).collect()
    }
}

/// Element type of a written checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stored {
    F32,
    F16,
    Bf16,
}

impl Stored {
    fn file_dtype(self) -> FileDType {
        match self {
            Self::F32 => FileDType::F32,
            Self::F16 => FileDType::F16,
            Self::Bf16 => FileDType::BF16,
        }
    }

    fn bytes(self, values: &[f32]) -> Vec<u8> {
        let each = |v: &f32| match self {
            Self::F32 => v.to_le_bytes().to_vec(),
            Self::F16 => half::f16::from_f32(*v).to_le_bytes().to_vec(),
            Self::Bf16 => half::bf16::from_f32(*v).to_le_bytes().to_vec(),
        };
        values.iter().flat_map(each).collect()
    }
}

/// Writes config.json, model.safetensors and a tokenizer with a chat template.
pub(crate) fn write_model(directory: &Path, shape: &Shape, stored: Stored, seed: u64) {
    std::fs::create_dir_all(directory).expect("writable");
    write_json(&directory.join("config.json"), &shape.config());
    write_weights(
        &directory.join("model.safetensors"),
        shape.weights(seed).iter(),
        stored,
    );
    write_tokenizer(directory);
}

/// The same with the weights in two shards and an index.
pub(crate) fn write_sharded_model(directory: &Path, shape: &Shape, seed: u64) {
    write_model(directory, shape, Stored::F32, seed);
    std::fs::remove_file(directory.join("model.safetensors")).expect("just written");
    let weights = shape.weights(seed);
    let mut map = serde_json::Map::new();
    for shard in 0..2 {
        let file = format!("model-{:05}-of-00002.safetensors", shard + 1);
        let part: Vec<_> = weights
            .iter()
            .enumerate()
            .filter(|(i, _)| i % 2 == shard)
            .map(|(_, tensor)| tensor)
            .collect();
        for (name, _) in &part {
            map.insert((*name).clone(), json!(file));
        }
        write_weights(&directory.join(&file), part.into_iter(), Stored::F32);
    }
    let index = json!({"metadata": {}, "weight_map": map});
    write_json(&directory.join("model.safetensors.index.json"), &index);
}

type NamedTensor<'a> = (&'a String, &'a (Vec<usize>, Vec<f32>));

pub(crate) fn write_weights<'a>(
    path: &Path,
    tensors: impl Iterator<Item = NamedTensor<'a>>,
    stored: Stored,
) {
    let data = |(name, (shape, values)): NamedTensor<'a>| {
        let tensor = TensorData {
            dtype: stored.file_dtype(),
            shape: shape.clone(),
            bytes: Cow::Owned(stored.bytes(values)),
        };
        (name.clone(), tensor)
    };
    let tensors: BTreeMap<String, TensorData<'_>> = tensors.map(data).collect();
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    write_safetensors(path, &tensors, &metadata).expect("writable");
}

/// One token per character; `<|im_end|>` ends a text.
fn write_tokenizer(directory: &Path) {
    let mut vocab = serde_json::Map::new();
    for token in SPECIAL {
        vocab.insert(token.to_owned(), json!(vocab.len()));
    }
    for character in ALPHABET.chars() {
        vocab.insert(character.to_string(), json!(vocab.len()));
    }
    let added: Vec<Value> = SPECIAL
        .iter()
        .enumerate()
        .map(|(id, token)| {
            json!({"id": id, "content": token, "special": true, "single_word": false,
                   "lstrip": false, "rstrip": false, "normalized": false})
        })
        .collect();
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {
            "type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated",
            "invert": false
        },
        "post_processor": null,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    });
    write_json(&directory.join("tokenizer.json"), &tokenizer);
    let settings = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "unk_token": "<unk>",
        "chat_template": CHAT_TEMPLATE,
    });
    write_json(&directory.join("tokenizer_config.json"), &settings);
}

pub(crate) fn write_json(path: &Path, value: &Value) {
    std::fs::write(path, format!("{value:#}\n")).expect("writable");
}

pub(crate) fn read_json(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// JSON Lines.
pub(crate) fn write_rows(path: &Path, rows: &[Value]) {
    let text: String = rows.iter().map(|row| format!("{row}\n")).collect();
    std::fs::write(path, text).expect("writable");
}

/// Rows of `messages`: sums of one-digit numbers.
pub(crate) fn chat_rows(count: usize) -> Vec<Value> {
    (0..count)
        .map(|i| {
            let (a, b) = (i % 10, i * 7 / 10 % 10);
            json!({"messages": [
                {"role": "user", "content": format!("{a}+{b}=?")},
                {"role": "assistant", "content": format!("{}{}", "so ".repeat(i % 4), a + b)},
            ]})
        })
        .collect()
}

/// Documents of different lengths with some labels masked, as if tokenised.
pub(crate) fn examples(count: usize, vocab: usize, seed: u64) -> Vec<Example> {
    let mut stream = Stream::new(key_for(seed, "examples"));
    let mut below = |n: usize| (stream.bits() % n as u64) as usize;
    (0..count)
        .map(|i| {
            let length = 3 + (i * 5 + below(7)) % 23;
            let input_ids: Vec<u32> = (0..length).map(|_| below(vocab) as u32).collect();
            let prompt = below(length - 2);
            let labels = input_ids
                .iter()
                .enumerate()
                .map(|(t, id)| if t < prompt { IGNORE_INDEX } else { *id as i32 });
            Example {
                labels: labels.collect(),
                input_ids,
            }
        })
        .collect()
}

/// A base model, a data file and a place for output, gone with the value.
pub(crate) struct Workbench {
    root: tempfile::TempDir,
}

impl Workbench {
    /// A model of the default shape and `rows` chat rows.
    pub(crate) fn new(rows: usize) -> Self {
        Self::of(&Shape::default(), rows)
    }

    pub(crate) fn of(shape: &Shape, rows: usize) -> Self {
        let root = tempfile::tempdir().expect("temporary directory");
        write_model(&root.path().join("base"), shape, Stored::F32, 7);
        write_rows(&root.path().join("rows.jsonl"), &chat_rows(rows));
        Self { root }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// Writes `NAME.yaml`: a short LoRA run into `NAME`, with `changes` on top.
    pub(crate) fn config(&self, name: &str, changes: &Value) -> PathBuf {
        let mut config = json!({
            "model_name_or_path": self.path("base"),
            "dataset_name": self.path("rows.jsonl"),
            "output_dir": self.path(name),
            "use_peft": true,
            "lora_r": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.0,
            "lora_target_modules": ["q_proj", "v_proj", "down_proj"],
            "learning_rate": 0.01,
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
        });
        let keys = changes.as_object().expect("an object of keys").clone();
        let config_keys = config.as_object_mut().expect("an object");
        config_keys.extend(keys);
        if config_keys.contains_key("peft_config") {
            // LoRA's keys have no meaning beside another method's.
            config_keys.retain(|key, _| !key.starts_with("lora_") || key == "lora_task_type");
        }
        let path = self.path(&format!("{name}.yaml"));
        // JSON is YAML.
        write_json(&path, &config);
        path
    }

    /// `ferrotune train` on [`Workbench::config`].
    pub(crate) fn train(&self, name: &str, changes: &Value) -> Finished {
        let config = self.config(name, changes);
        ferrotune(&["train", text(&config)])
    }
}

/// How a run of the binary ended.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl From<Output> for Finished {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Finished {
    /// Panics with what the program said unless it ended with `code`.
    #[track_caller]
    pub(crate) fn expect(self, code: i32) -> Self {
        assert_eq!(
            self.code,
            Some(code),
            "stdout:\n{}\nstderr:\n{}",
            self.stdout,
            self.stderr
        );
        self
    }
}

/// Whether the GPU of the tests is one, and not what stands in for it.
pub(crate) fn on_real_gpu() -> bool {
    std::env::var("FERROTUNE_TEST_DEVICE").is_ok_and(|device| device == "cuda")
}

/// Runs the test called `name` of this program again where the stand-in holds the work of all streams back, and does it
/// as late or as early as waits allow: where one is missing, it finds other values.
pub(crate) fn assert_passes_in_every_order_of_streams(name: &str) {
    if on_real_gpu() {
        eprintln!("not tried: a real GPU runs streams in its own order");
        return;
    }
    for order in ["late", "early"] {
        let mut again = Command::new(std::env::current_exe().expect("a path"));
        again.args(["--exact", name]);
        again.env("FERROTUNE_HOST_STREAMS", order);
        let output = again.output().expect("starts");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{order}: {said}");
        assert!(said.contains("1 passed"), "{order}: {said}");
    }
}

/// The folder with `tests/fixtures`. Cargo sets the variable for a program that it starts, and `tests/gpu/run.sh`
/// for one that was carried.
pub(crate) fn root() -> PathBuf {
    let carried = std::env::var_os("CARGO_MANIFEST_DIR");
    carried.map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
}

/// The binary under test, with a clean environment for logs and threads. Its variable is as that of [`root`].
pub(crate) fn command(arguments: &[&str]) -> Command {
    let carried = std::env::var_os("CARGO_BIN_EXE_ferrotune");
    let mut command =
        Command::new(carried.unwrap_or_else(|| env!("CARGO_BIN_EXE_ferrotune").into()));
    command
        .args(arguments)
        // No test asks a server that it did not start.
        .env("HF_HUB_OFFLINE", "1")
        .env_remove("RUST_LOG")
        .env_remove("RAYON_NUM_THREADS");
    command
}

pub(crate) fn ferrotune(arguments: &[&str]) -> Finished {
    command(arguments)
        .output()
        .expect("the binary starts")
        .into()
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}

/// What a run locks its output directory with; it stays there, empty of meaning.
const LOCK: &str = ".ferrotune.lock";

/// Names of the entries of a directory, sorted, without the lock; none if it does not exist.
pub(crate) fn entries(directory: &Path) -> Vec<String> {
    let Ok(found) = std::fs::read_dir(directory) else {
        return Vec::new();
    };
    let name = |e: std::io::Result<std::fs::DirEntry>| e.map(|e| e.file_name());
    let mut names: Vec<String> = found
        .map(|e| name(e).expect("readable").to_string_lossy().into_owned())
        .collect();
    names.retain(|n| n != LOCK);
    names.sort();
    names
}

/// The largest difference is at most `tolerance` of the largest of `want`.
#[track_caller]
pub(crate) fn assert_close(got: &[f32], want: &[f32], tolerance: f32, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let largest = want.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    let differences = got.iter().zip(want).map(|(a, b)| (a - b).abs());
    let error = differences.fold(0.0, f32::max);
    assert!(error <= tolerance * largest, "{what}: {error} of {largest}");
}

/// Each of `files` has the same bytes in both directories.
#[track_caller]
pub(crate) fn assert_same_files(one: &Path, other: &Path, files: &[&str], what: &str) {
    for file in files {
        let same = read(&one.join(file)) == read(&other.join(file));
        assert!(same, "{what}: {file} differs");
    }
}

pub(crate) fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("writable");
    for entry in std::fs::read_dir(from).unwrap_or_else(|e| panic!("{}: {e}", from.display())) {
        let entry = entry.expect("readable");
        let target = to.join(entry.file_name());
        if entry.file_type().expect("known").is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            std::fs::write(&target, std::fs::read(entry.path()).expect("readable"))
                .expect("writable");
        }
    }
}

pub(crate) fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// All tensors of a file as f32.
pub(crate) fn tensors(path: &Path) -> BTreeMap<String, Vec<f32>> {
    let file = SafetensorsFile::open(path).expect("safetensors");
    file.names()
        .map(|n| (n.to_owned(), file.read_f32(n).expect("readable")))
        .collect()
}

/// Moves every trained value, each tensor by its own draws: a fresh B is zero, and so would the gradient of A be.
pub(crate) fn add_noise(params: &mut ferrotune::core::params::FlatBuffer, seed: u64) {
    let layout = std::sync::Arc::clone(params.layout());
    for (id, segment) in layout.by_name() {
        let mut stream = Stream::new(key_for(seed, &segment.spec.name));
        for value in params.get_mut(id) {
            *value += (stream.normal() * 0.15) as f32;
        }
    }
}
