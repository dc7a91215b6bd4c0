//! config.json and tokenizer.json of the base.

use super::common::{Shape, Stored, Workbench, read_json, write_json, write_model};
use super::{BAD_INPUT, check, fault};
use serde_json::{Value, json};

fn edit_config(bench: &Workbench, key: &str, value: Value) {
    let path = bench.path("base/config.json");
    let mut config = read_json(&path);
    config[key] = value;
    write_json(&path, &config);
}

#[test]
fn faults_of_config_json() {
    check(&[
        fault(
            "no config.json",
            json!({}),
            |bench| std::fs::remove_file(bench.path("base/config.json")).expect("there"),
            BAD_INPUT,
            &["config.json", "Hugging Face model directory"],
        ),
        fault(
            "config.json is not JSON",
            json!({}),
            |bench| std::fs::write(bench.path("base/config.json"), "{\"a\": ").expect("written"),
            BAD_INPUT,
            &["config.json", "not valid JSON"],
        ),
        fault(
            "unknown architecture",
            json!({}),
            |bench| edit_config(bench, "model_type", json!("lama")),
            BAD_INPUT,
            &["config.json", "model_type", "lama", "llama"],
        ),
        fault(
            "unsupported rope type",
            json!({}),
            |bench| {
                let scaling = json!({"rope_type": "yarm", "factor": 2.0});
                edit_config(bench, "rope_scaling", scaling);
            },
            BAD_INPUT,
            &["config.json", "rope_type", "yarm", "yarn"],
        ),
        fault(
            "rope without its factor",
            json!({}),
            |bench| edit_config(bench, "rope_scaling", json!({"rope_type": "linear"})),
            BAD_INPUT,
            &["config.json", "factor"],
        ),
        fault(
            "heads that do not divide the width",
            json!({}),
            |bench| {
                edit_config(bench, "head_dim", Value::Null);
                edit_config(bench, "num_attention_heads", json!(5));
            },
            BAD_INPUT,
            &["config.json", "num_attention_heads", "5", "32", "head_dim"],
        ),
        fault(
            "key heads that do not divide the heads",
            json!({}),
            |bench| edit_config(bench, "num_key_value_heads", json!(3)),
            BAD_INPUT,
            &["config.json", "num_key_value_heads", "3", "4"],
        ),
        fault(
            "no layers",
            json!({}),
            |bench| edit_config(bench, "num_hidden_layers", json!(0)),
            BAD_INPUT,
            &["config.json", "num_hidden_layers", "positive integer"],
        ),
        fault(
            "sizes that overflow",
            json!({}),
            |bench| {
                edit_config(bench, "hidden_size", json!(1_u64 << 39));
                edit_config(bench, "vocab_size", json!(1_u64 << 39));
            },
            BAD_INPUT,
            &[
                "config.json",
                "intermediate_size",
                "hidden_size 549755813888",
            ],
        ),
        fault(
            "heads that overflow",
            json!({}),
            |bench| {
                edit_config(bench, "num_attention_heads", json!(1_u64 << 39));
                edit_config(bench, "head_dim", json!(1_u64 << 39));
            },
            BAD_INPUT,
            &[
                "config.json",
                "num_attention_heads",
                "549755813888",
                "head_dim",
            ],
        ),
        fault(
            "more layers than anything",
            json!({}),
            |bench| edit_config(bench, "num_hidden_layers", json!(1_u64 << 39)),
            BAD_INPUT,
            &["num_hidden_layers", "expected"],
        ),
    ]);
}

#[test]
fn faults_of_the_tokenizer() {
    check(&[
        fault(
            "no tokenizer.json",
            json!({}),
            |bench| std::fs::remove_file(bench.path("base/tokenizer.json")).expect("there"),
            BAD_INPUT,
            &["tokenizer.json", "missing"],
        ),
        fault(
            "tokenizer.json is none",
            json!({}),
            |bench| std::fs::write(bench.path("base/tokenizer.json"), "{}").expect("written"),
            BAD_INPUT,
            &["tokenizer.json"],
        ),
        fault(
            "a token outside the model's vocabulary",
            json!({}),
            |bench| {
                let shape = Shape {
                    vocab: 40,
                    ..Shape::default()
                };
                write_model(&bench.path("base"), &shape, Stored::F32, 1);
            },
            BAD_INPUT,
            &["tokenizer.json", "vocab_size", "40", "belong together"],
        ),
    ]);
}
