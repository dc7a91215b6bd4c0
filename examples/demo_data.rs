//! Makes the files under `examples/demo`: the tiny base's tokenizer and config, the rows it is
//! pre-trained on, and the rows that teach it a skill it does not have.
//!
//! Everything is a function of the seeds below, so the committed files can be made again:
//! `examples/demo/README.md` has the commands.
//!
//! ```text
//! demo_data shape DIR         config.json, tokenizer.json, tokenizer_config.json of the base
//! demo_data pretrain DIR      train.jsonl, eval.jsonl: the skills the base is to have
//! demo_data task DIR          train.jsonl, test.jsonl: the skill it lacks
//! demo_data store FROM DIR    weights of FROM as bfloat16 in DIR, with its config
//! ```

use ferrotune::core::io::{FileDType, ModelFiles, TensorData, write_file, write_safetensors};
use ferrotune::kernels::rng::{Stream, key_for};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::path::Path;

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

/// Letters of every word.
const LETTERS: usize = 6;
const PRETRAIN_ROWS: usize = 120_000;
const PRETRAIN_EVAL_ROWS: usize = 500;
const TRAIN_ROWS: usize = 3_000;
const TEST_ROWS: usize = 256;

/// The skill the base never sees.
const TARGET: &str = "reverse";

/// What the base learns: for each answer position, the position in the word it is copied from.
const SKILLS: [(&str, &[usize]); 18] = [
    ("copy", &[0, 1, 2, 3, 4, 5]),
    ("left", &[1, 2, 3, 4, 5, 0]),
    ("right", &[5, 0, 1, 2, 3, 4]),
    ("halves", &[3, 4, 5, 0, 1, 2]),
    ("ends", &[5, 1, 2, 3, 4, 0]),
    ("pairs", &[1, 0, 3, 2, 5, 4]),
    ("thirds", &[4, 5, 2, 3, 0, 1]),
    ("weave", &[0, 3, 1, 4, 2, 5]),
    ("inward", &[0, 5, 1, 4, 2, 3]),
    ("outward", &[2, 3, 1, 4, 0, 5]),
    ("odd", &[0, 2, 4]),
    ("even", &[1, 3, 5]),
    ("head", &[0, 1, 2]),
    ("tail", &[3, 4, 5]),
    ("first", &[0]),
    ("third", &[2]),
    ("fourth", &[3]),
    ("last", &[5]),
];

/// Which run a word belongs to. A word is in one of them for good, by its hash: no row of one can
/// turn up in another, whatever the seeds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Share {
    Pretraining,
    Training,
    Test,
}

impl Share {
    fn of(word: &str) -> Self {
        match key_for(0, word) % 10 {
            0 => Self::Test,
            1..=4 => Self::Training,
            _ => Self::Pretraining,
        }
    }
}

fn main() -> Outcome {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["shape", directory] => shape(Path::new(directory)),
        ["pretrain", directory] => pretrain(Path::new(directory)),
        ["task", directory] => task(Path::new(directory)),
        ["store", from, directory] => store(Path::new(from), Path::new(directory)),
        _ => Err("usage: demo_data shape DIR | pretrain DIR | task DIR | store FROM DIR".into()),
    }
}

fn pretrain(directory: &Path) -> Outcome {
    let mut stream = Stream::new(key_for(1, "pretraining"));
    let mut rows = |count| {
        let mut row = || {
            let (name, sources) = SKILLS[stream.below(SKILLS.len())];
            chat_row(name, sources, &word(&mut stream, Share::Pretraining))
        };
        (0..count).map(|_| row()).collect::<String>()
    };
    write(directory, "train.jsonl", &rows(PRETRAIN_ROWS))?;
    write(directory, "eval.jsonl", &rows(PRETRAIN_EVAL_ROWS))
}

fn task(directory: &Path) -> Outcome {
    let reverse: Vec<usize> = (0..LETTERS).rev().collect();
    for (file, share, count) in [
        ("train.jsonl", Share::Training, TRAIN_ROWS),
        ("test.jsonl", Share::Test, TEST_ROWS),
    ] {
        let mut stream = Stream::new(key_for(2, file));
        let mut words = BTreeSet::new();
        let mut rows = String::new();
        while words.len() < count {
            let word = word(&mut stream, share);
            if words.insert(word.clone()) {
                rows += &chat_row(TARGET, &reverse, &word);
            }
        }
        write(directory, file, &rows)?;
    }
    Ok(())
}

/// A random word of `share`.
fn word(stream: &mut Stream, share: Share) -> String {
    loop {
        let word: String = (0..LETTERS)
            .map(|_| char::from(b'a' + stream.below(26) as u8))
            .collect();
        if Share::of(&word) == share {
            return word;
        }
    }
}

/// One line of JSON: a question and its answer as chat messages.
fn chat_row(skill: &str, sources: &[usize], word: &str) -> String {
    let letters: Vec<char> = word.chars().collect();
    let answer: String = sources.iter().map(|&i| letters[i]).collect();
    let row = json!({
        "prompt": [{"role": "user", "content": format!("{skill}: {word}")}],
        "completion": [{"role": "assistant", "content": answer}],
    });
    format!("{row}\n")
}

const SPECIAL: [&str; 6] = [
    "<|pad|>",
    "<|unk|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
];

const CHAT_TEMPLATE: &str = "{% for message in messages %}\
{% if message['role'] == 'assistant' %}<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}\
{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}";

/// Shape and tokenizer of the base.
fn shape(directory: &Path) -> Outcome {
    let vocabulary = vocabulary();
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000.0,
        "attention_bias": false,
        "mlp_bias": false,
        "tie_word_embeddings": true,
        "vocab_size": vocabulary.len(),
        "pad_token_id": 0,
        "eos_token_id": 2,
        "dtype": "float32",
    });
    let special: Vec<Value> = SPECIAL.iter().enumerate().map(added_token).collect();
    // Byte-pair encoding without a single merge: every character is a token.
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": special,
        "normalizer": null,
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": SPECIAL[1],
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": false,
            "vocab": vocabulary,
            "merges": [],
        },
    });
    let tokenizer_config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIAL[0],
        "unk_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "clean_up_tokenization_spaces": false,
        "model_max_length": 512,
        "chat_template": CHAT_TEMPLATE,
    });
    for (name, document) in [
        ("config.json", config),
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", tokenizer_config),
    ] {
        write(directory, name, &format!("{document:#}\n"))?;
    }
    Ok(())
}

/// Special tokens, then every printable ASCII character and the line break.
fn vocabulary() -> Map<String, Value> {
    let characters = (' '..='~').chain(['\n']).map(String::from);
    let tokens = SPECIAL.iter().map(ToString::to_string).chain(characters);
    tokens.zip(0..).map(|(t, id)| (t, json!(id))).collect()
}

fn added_token((id, content): (usize, &&str)) -> Value {
    json!({
        "id": id,
        "content": content,
        "single_word": false,
        "lstrip": false,
        "rstrip": false,
        "normalized": false,
        "special": true,
    })
}

/// The trained weights at half the size, and what belongs to them.
fn store(from: &Path, directory: &Path) -> Outcome {
    let files = ModelFiles::open(from)?;
    let mut tensors = BTreeMap::new();
    for name in files.names() {
        let shape = files
            .meta(name)
            .map(|m| m.shape.clone())
            .unwrap_or_default();
        let values = files.read_f32(name)?;
        let bytes: Vec<u8> = values
            .iter()
            .flat_map(|&v| half::bf16::from_f32(v).to_le_bytes())
            .collect();
        let tensor = TensorData {
            dtype: FileDType::BF16,
            shape,
            bytes: bytes.into(),
        };
        tensors.insert(name.to_owned(), tensor);
    }
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    write_safetensors(&directory.join("model.safetensors"), &tensors, &metadata)?;
    let path = directory.join("config.json");
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path)?)?;
    config["dtype"] = json!("bfloat16");
    write(directory, "config.json", &format!("{config:#}\n"))
}

fn write(directory: &Path, name: &str, text: &str) -> Outcome {
    std::fs::create_dir_all(directory)?;
    Ok(write_file(&directory.join(name), text.as_bytes())?)
}
