use super::{Decoding, SpecialTokens, Tokenizer};
use crate::data::fixtures::{folders, put_behind_every_text, read_json, report, repository, roots};
use serde_json::json;
use std::path::Path;

fn ids(value: &serde_json::Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).expect("ids are a list of numbers")
}

fn write(directory: &Path, name: &str, value: &serde_json::Value) {
    std::fs::write(directory.join(name), value.to_string()).expect("the file is writable");
}

/// A copy of the byte-level tokenizer with changes to its configuration.
fn copy_of(name: &str, config: &serde_json::Value) -> tempfile::TempDir {
    let source = repository().join("tokenizers").join(name);
    let directory = tempfile::tempdir().expect("a temporary directory can be made");
    std::fs::copy(
        source.join("tokenizer.json"),
        directory.path().join("tokenizer.json"),
    )
    .expect("the tokenizer can be copied");
    write(directory.path(), "tokenizer_config.json", config);
    directory
}

#[test]
fn recorded_encodings_are_reproduced() {
    for root in roots("tokenizers") {
        let mut probes = 0;
        for folder in folders(&root.join("tokenizers")) {
            let tokenizer = Tokenizer::from_dir(&folder).expect("the tokenizer loads");
            let encodings = folder.join("encodings.json");
            if !encodings.is_file() {
                continue;
            }
            for probe in read_json(&encodings)["probes"]
                .as_array()
                .into_iter()
                .flatten()
            {
                let text = probe["text"].as_str().expect("a probe has a text");
                let with = tokenizer.encode(text, SpecialTokens::Add);
                assert_eq!(with.ok(), Some(ids(&probe["ids"])), "{text}");
                let without = tokenizer.encode_with_offsets(text, SpecialTokens::Omit);
                let without = without.expect("the text can be encoded");
                assert_eq!(without.ids, ids(&probe["ids_no_special"]), "{text}");
                let decoded = tokenizer.decode(&ids(&probe["ids"]), Decoding::SkipSpecialTokens);
                assert_eq!(
                    decoded.ok().as_deref(),
                    probe["decoded_skip_special"].as_str(),
                    "{text}"
                );
                probes += 1;
            }
        }
        assert!(probes >= 36, "{probes} probes in {}", root.display());
        report(&format!("{probes} probes in {}", root.display()));
    }
}

#[test]
fn offsets_cover_the_text_in_bytes() {
    let tokenizer = Tokenizer::from_dir(&repository().join("tokenizers/bpe_llama3"))
        .expect("the tokenizer loads");
    let encoded = tokenizer
        .encode_with_offsets("Größe ok", SpecialTokens::Add)
        .expect("the text can be encoded");
    assert_eq!(encoded.offsets[0], (0, 0));
    assert_eq!(encoded.offsets.last().map(|o| o.1), Some("Größe ok".len()));
}

/// As transformers 5.23 and 5.24 have it, which leave both keys out where there is a tokenizer.json.
#[test]
fn what_is_added_to_a_text_is_said_by_tokenizer_json_alone() {
    let config = |add: bool| {
        json!({"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|eot_id|>"},
               "add_bos_token": add, "add_eos_token": add})
    };
    for add in [false, true] {
        let directory = copy_of("bpe_llama3", &config(add));
        let encode = || {
            let tokenizer = Tokenizer::from_dir(directory.path()).expect("the tokenizer loads");
            let ids = tokenizer.encode("x", SpecialTokens::Add);
            let with_offsets = tokenizer.encode_with_offsets("x", SpecialTokens::Add);
            let with_offsets = with_offsets.expect("x can be encoded");
            assert_eq!(ids.as_ref().ok(), Some(&with_offsets.ids));
            assert_eq!(with_offsets.ids.len(), with_offsets.offsets.len());
            with_offsets.ids
        };
        assert_eq!(encode(), [7, 122]);
        put_behind_every_text(directory.path(), "<|eot_id|>", 11);
        assert_eq!(encode(), [122, 11]);
    }
}

#[test]
fn padding_and_truncation_of_the_file_are_not_used() {
    let directory = copy_of("bpe_llama3", &json!({}));
    let path = directory.path().join("tokenizer.json");
    let mut file = read_json(&path);
    file["truncation"] = json!({"direction": "Right", "max_length": 2,
                                "strategy": "LongestFirst", "stride": 0});
    file["padding"] = json!({"strategy": {"Fixed": 9}, "direction": "Right",
        "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"});
    file["model"]["dropout"] = json!(0.9);
    write(directory.path(), "tokenizer.json", &file);
    let tokenizer = Tokenizer::from_dir(directory.path()).expect("the tokenizer loads");
    for _ in 0..8 {
        assert_eq!(
            tokenizer.encode("hello world", SpecialTokens::Add).ok(),
            Some(vec![7, 106, 327, 418, 302, 323, 110, 102])
        );
    }
}

#[test]
fn chat_templates_are_found_in_each_place() {
    let config = json!({"eos_token": "<|im_end|>", "chat_template": [
        {"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]});
    let directory = copy_of("bpe_qwen2", &config);
    let tools = json!([]);
    let sources = || {
        let tokenizer = Tokenizer::from_dir(directory.path()).expect("the tokenizer loads");
        [None, Some(&tools)].map(|tools| {
            let template = tokenizer.chat_template(tools).expect("there is a template");
            template.source().to_owned()
        })
    };
    assert_eq!(sources(), ["D", "T"]);
    std::fs::write(directory.path().join("chat_template.jinja"), "J").expect("writable");
    assert_eq!(sources(), ["J", "J"]);
    let tokenizer = Tokenizer::from_dir(directory.path()).expect("the tokenizer loads");
    assert_eq!(tokenizer.files().len(), 3);
}

#[test]
fn stop_ids_add_those_of_the_generation_config() {
    let directory = copy_of("bpe_qwen2", &json!({"eos_token": "<|im_end|>"}));
    write(
        directory.path(),
        "generation_config.json",
        &json!({"eos_token_id": [5, 6]}),
    );
    let tokenizer = Tokenizer::from_dir(directory.path()).expect("the tokenizer loads");
    assert_eq!(tokenizer.stop_ids(), [5, 6]);
}

#[test]
fn broken_directories_are_refused_with_the_file_and_a_hint() {
    let message = |directory: &Path| {
        Tokenizer::from_dir(directory)
            .expect_err("the directory is broken")
            .to_string()
    };
    let empty = tempfile::tempdir().expect("a temporary directory can be made");
    assert!(message(empty.path()).contains("tokenizer.json: missing"));
    std::fs::write(empty.path().join("tokenizer.model"), "x").expect("writable");
    assert!(message(empty.path()).contains("SentencePiece `tokenizer.model` only: convert"));
    std::fs::write(empty.path().join("tokenizer.json"), "{").expect("writable");
    assert!(message(empty.path()).contains("not a tokenizer.json"));

    let eos = copy_of("bpe_qwen2", &json!({"eos_token": "<|im_ende|>"}));
    let found = message(eos.path());
    assert!(
        found.contains("tokenizer_config.json") && found.contains("`<|im_end|>`?"),
        "{found}"
    );
    let template = copy_of("bpe_qwen2", &json!({"chat_template": 3}));
    assert!(message(template.path()).contains("`chat_template` must be a string"));
    let syntax = copy_of("bpe_qwen2", &json!({"chat_template": "a\n{% for %}"}));
    let found = message(syntax.path());
    assert!(
        found.contains("line 2") && found.contains("tokenizer_config.json"),
        "{found}"
    );
    std::fs::write(syntax.path().join("chat_template.jinja"), "{{ 'a' ").expect("writable");
    let found = message(syntax.path());
    assert!(found.contains("chat_template.jinja: "), "{found}");
}
