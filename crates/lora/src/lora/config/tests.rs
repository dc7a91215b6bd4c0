use crate::testing::{copy_of, edit_config, list};
use crate::{LoraConfig, PeftConfig};

#[test]
fn config_file_has_sorted_keys_and_neutral_values() {
    let text = LoraConfig {
        alpha: 16.0,
        rank_pattern: vec![("v_proj".into(), 2), ("q_proj".into(), 4)],
        target_modules: list(&["v_proj", "q_proj"]),
        ..LoraConfig::default()
    }
    .to_json();
    let object: serde_json::Map<String, serde_json::Value> =
        serde_json::from_str(&text).expect("JSON");
    assert!(object.keys().is_sorted());
    assert!(text.contains("\"lora_alpha\": 16,"), "{text}");
    assert!(text.contains("\"inference_mode\": true"), "{text}");
    assert!(!text.contains("peft_version"), "{text}");
    assert_eq!(
        object["target_modules"],
        serde_json::json!(["q_proj", "v_proj"])
    );
    let patterns: Vec<_> = object["rank_pattern"]
        .as_object()
        .expect("object")
        .keys()
        .collect();
    assert_eq!(
        patterns,
        ["v_proj", "q_proj"],
        "the first match wins, so the order is kept"
    );
}

fn config_error(key: &str, value: serde_json::Value) -> String {
    let copy = copy_of("lora_qv");
    edit_config(copy.path(), key, value);
    PeftConfig::load(copy.path())
        .expect_err("refused")
        .to_string()
}

#[test]
fn features_of_peft_that_are_not_here_are_errors_when_on() {
    use serde_json::json;
    for (key, value) in [
        ("use_bdlora", json!(true)),
        ("target_parameters", json!(["experts.gate_up_proj"])),
        ("velora_config", json!({"num_groups": 2})),
    ] {
        let error = config_error(key, value.clone());
        assert!(
            error.contains(&format!("`{key}` is {value}")) && error.contains("not supported yet"),
            "{error}"
        );
    }
}

#[test]
fn tokens_that_call_updates_up_need_a_plain_update() {
    use serde_json::json;
    let with = |key: &str, value: serde_json::Value| {
        let copy = copy_of("lora_qv");
        edit_config(copy.path(), "alora_invocation_tokens", json!([5, 6]));
        edit_config(copy.path(), key, value);
        PeftConfig::load(copy.path())
    };
    for (key, value) in [
        ("use_dora", json!(true)),
        ("lora_bias", json!(true)),
        ("init_lora_weights", json!("pissa")),
        ("alora_invocation_tokens", json!([])),
        ("alora_invocation_tokens", json!(["5"])),
    ] {
        let error = with(key, value).expect_err(key).to_string();
        for part in ["adapter_config.json", "`alora_invocation_tokens`", key] {
            assert!(error.contains(part), "{error}");
        }
    }
    let Ok(PeftConfig::Lora(config)) = with("r", json!(4)) else {
        panic!("a LoRA")
    };
    assert_eq!(config.alora_invocation_tokens, Some(vec![5, 6]));
    let written: serde_json::Value = serde_json::from_str(&config.to_json()).expect("JSON");
    assert_eq!(written["alora_invocation_tokens"], json!([5, 6]));
}

#[test]
fn wrong_types_and_values_name_key_and_expectation() {
    use serde_json::json;
    for (key, value, expected) in [
        ("r", json!("8"), "whole numbers"),
        ("r", json!(-1), "whole numbers"),
        ("r", json!(0), "at least 1"),
        ("lora_alpha", json!([]), "numbers"),
        ("lora_dropout", json!(2), "from 0 to 1"),
        ("use_rslora", json!(1), "true or false"),
        ("target_modules", json!([1]), "list of strings"),
        ("rank_pattern", json!({"q_proj": 1.5}), "whole numbers"),
        (
            "init_lora_weights",
            json!("gausian"),
            "did you mean `gaussian`",
        ),
        ("init_lora_weights", json!("mica"), "not supported"),
        ("bias", json!("lora_onyl"), "did you mean `lora_only`"),
        ("lora_bias", json!("all"), "true or false"),
        ("modules_to_save", json!([1]), "list of strings"),
        ("trainable_token_indices", json!([-1]), "list of token ids"),
        (
            "trainable_token_indices",
            json!({"embed_tokens": 3}),
            "list of token ids",
        ),
        ("task_type", json!("CAUSAL_LN"), "did you mean `CAUSAL_LM`"),
        ("peft_type", json!("XLORA"), "not supported yet"),
        ("peft_type", json!("LORE"), "did you mean `LORA`"),
        ("peft_type", json!(null), "no `peft_type`"),
    ] {
        let error = config_error(key, value);
        assert!(error.contains(key) && error.contains(expected), "{error}");
        assert!(error.contains("adapter_config.json"), "{error}");
    }
}

#[test]
fn unknown_keys_are_ignored_as_peft_does() {
    let copy = copy_of("lora_qv");
    edit_config(copy.path(), "a_key_of_tomorrow", serde_json::json!(1));
    assert!(PeftConfig::load(copy.path()).is_ok());
    let error = config_error("lora_aplha", serde_json::json!(16));
    assert!(error.contains("did you mean `lora_alpha`"), "{error}");
}

/// What PEFT writes for other kinds of models is no adapter of a causal one.
#[test]
fn an_adapter_of_a_classifier_is_refused_for_a_language_model() {
    for task in ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "SEQ_2_SEQ_LM"] {
        let copy = copy_of("lora_qv");
        edit_config(copy.path(), "task_type", serde_json::json!(task));
        let error = crate::testing::load(copy.path()).expect_err("refused");
        let error = error.to_string();
        let expected = match task {
            "SEQ_CLS" => "language model",
            _ => "CAUSAL_LM",
        };
        for part in ["adapter_config.json", "`task_type`", task, expected] {
            assert!(error.contains(part), "{error}");
        }
    }
    let copy = copy_of("lora_qv");
    edit_config(copy.path(), "task_type", serde_json::json!(null));
    crate::testing::load(copy.path()).expect("PEFT loads it");
}

#[test]
fn config_files_that_are_no_object_are_errors() {
    for text in ["[]", "{", "\u{0}", "", &"[".repeat(100_000)] {
        let directory = tempfile::tempdir().expect("temporary directory");
        std::fs::write(directory.path().join("adapter_config.json"), text).expect("writable");
        let error = PeftConfig::load(directory.path())
            .expect_err("refused")
            .to_string();
        assert!(error.contains("adapter_config.json"), "{error}");
    }
    let empty = tempfile::tempdir().expect("temporary directory");
    assert!(PeftConfig::load(empty.path()).is_err());
}
