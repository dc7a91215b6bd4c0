mod optimizer;

use super::{
    Dtype, InitLoraWeights, IntervalStrategy, Names, PackingStrategy, Resume, TrainConfig,
    json_schema, load, markdown_reference,
};
use crate::Error;
use ferrotune_kernels::dequantise::QuantFormat;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const LORA: &str = include_str!("../../fixtures/trl_sft_lora.yaml");
const FULL: &str = include_str!("../../fixtures/trl_sft_full.yaml");
const MINIMAL: &str = "model_name_or_path: base\ndataset_name: train.jsonl\n";

fn pairs(overrides: &[(&str, &str)]) -> Vec<(String, String)> {
    let pairs = overrides.iter();
    pairs
        .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
        .collect()
}

fn with(overrides: &[(&str, &str)]) -> TrainConfig {
    TrainConfig::from_yaml(MINIMAL, "minimal.yaml", &pairs(overrides)).unwrap()
}

fn fault(overrides: &[(&str, &str)]) -> String {
    let result = TrainConfig::from_yaml(MINIMAL, "minimal.yaml", &pairs(overrides));
    result.unwrap_err().to_string()
}

fn yaml_fault(text: &str) -> String {
    let text = format!("{MINIMAL}{text}\n");
    TrainConfig::from_yaml(&text, "sft.yaml", &[])
        .unwrap_err()
        .to_string()
}

#[test]
fn a_stock_trl_lora_file_loads_unchanged() {
    let config = TrainConfig::from_yaml(LORA, "lora.yaml", &[]).unwrap();
    assert_eq!(config.model.base_dtype(), Dtype::Bfloat16);
    assert_eq!(config.data.dataset_name, ["trl-lib/Capybara"]);
    assert_eq!(config.data.max_length, Some(2048));
    assert_eq!(config.data.packing_strategy, PackingStrategy::Bfd);
    assert!(config.lora.use_peft);
    assert_eq!((config.lora.lora_r, config.lora.lora_alpha), (32, 16.0));
    let Some(Names::List(targets)) = &config.lora.lora_target_modules else {
        panic!("{:?}", config.lora.lora_target_modules);
    };
    assert_eq!(targets.len(), 7);
    assert_eq!(config.schedule.warmup_steps_of(1000), 30);
    assert_eq!(
        config.schedule.lr_scheduler_kwargs["min_lr_rate"],
        json!(0.1)
    );
    assert_eq!(config.output.eval_interval(1000), 100);
    let noted = [
        "attn_implementation",
        "dataloader_num_workers",
        "dataset_num_proc",
        "gradient_checkpointing_kwargs",
        "hub_model_id",
        "log_level",
        "tf32",
        "trust_remote_code",
        "report_to",
    ];
    let keys: Vec<_> = config
        .notes
        .iter()
        .map(|note| note.split(':').next().unwrap())
        .collect();
    assert_eq!(keys, noted);
}

#[test]
fn a_stock_trl_full_file_loads_unchanged() {
    let config = TrainConfig::from_yaml(FULL, "full.yaml", &[]).unwrap();
    assert_eq!(config.optimizer.learning_rate, 2e-5);
    assert_eq!(config.schedule.warmup_steps_of(101), 6);
    assert_eq!(
        config.schedule.lr_scheduler_kwargs["num_cycles"],
        json!(0.5)
    );
    assert_eq!(config.output.save_strategy, IntervalStrategy::No);
    assert_eq!(config.output.eval_strategy, IntervalStrategy::No);
    assert!(config.output.logging_first_step);
    assert_eq!(config.data.eos_token.as_deref(), Some("<|im_end|>"));
    assert_eq!(config.runtime.data_seed(), 7);
    assert_eq!(
        config.notes,
        ["pad_to_multiple_of: 8 has no effect: no batch is ever padded"]
    );
}

#[test]
fn the_saved_form_loads_as_the_same_configuration() {
    for (text, overrides) in [
        (MINIMAL, pairs(&[])),
        (
            LORA,
            pairs(&[
                ("run_name", "no"),
                ("output_dir", "1e-5"),
                ("eos_token", "null"),
            ]),
        ),
        (
            FULL,
            pairs(&[("resume_from_checkpoint", "auto"), ("save_steps", "0.5")]),
        ),
        (
            MINIMAL,
            pairs(&[("run_name", "a: {b} # \"c\" \u{1f980}\n'd'")]),
        ),
    ] {
        let config = TrainConfig::from_yaml(text, "first", &overrides).unwrap();
        let saved = config.to_yaml();
        let again = TrainConfig::from_yaml(&saved, "saved", &[]).unwrap();
        assert_eq!(config.to_json(), again.to_json(), "{saved}");
        assert_eq!(config.diff(&again), []);
        let from_json = TrainConfig::from_yaml(&config.to_json().to_string(), "json", &[]).unwrap();
        assert_eq!(config.diff(&from_json), []);
    }
}

#[test]
fn defaults_are_those_of_trl_but_for_the_dtype_of_the_base() {
    let config = with(&[]);
    assert_eq!((config.lora.lora_r, config.lora.lora_alpha), (16, 32.0));
    assert_eq!(config.lora.lora_dropout, 0.05);
    assert_eq!(config.optimizer.learning_rate, 2e-5);
    assert_eq!(config.data.max_length, Some(1024));
    assert_eq!(config.output.logging_interval(5), 10);
    assert_eq!(config.schedule.total_steps(7), 21);
    // TRL loads float32: twice the memory of a bf16 checkpoint for the same values.
    assert_eq!(config.model.base_dtype(), Dtype::Auto);
    assert!(!config.lora.use_peft);
    assert_eq!(config.notes, [""; 0]);
}

#[test]
fn every_key_can_be_overridden_with_its_own_default() {
    for key in TrainConfig::keys() {
        let text = match key.default {
            Value::String(text) => text,
            Value::Object(_) => "{}".to_owned(),
            other => other.to_string(),
        };
        let required = ["model_name_or_path", "dataset_name"];
        if !required.contains(&key.name) {
            let config = with(&[(key.name, &text)]);
            assert_eq!(config.diff(&with(&[])), [], "{}", key.name);
        }
    }
}

#[test]
fn overrides_read_lists_numbers_and_nulls() {
    let config = with(&[
        ("--lora-r", "8"),
        ("lora_target_modules", "q_proj v_proj"),
        ("train_file", "a.jsonl,b.jsonl"),
        ("dataset_name", "[\"with blank.jsonl\"]"),
        ("max_length", "null"),
        ("learning_rate", "1e-3"),
        ("lr_scheduler_type", "cosine"),
        ("lr_scheduler_kwargs", "{num_cycles: 2}"),
        ("run_name", "2024"),
        ("resume_from_checkpoint", "out/checkpoint-5"),
        ("init_lora_weights", "gaussian"),
        ("seed", "1"),
        ("seed", "2"),
    ]);
    assert_eq!(config.lora.lora_r, 8);
    let names = Names::List(vec!["q_proj".to_owned(), "v_proj".to_owned()]);
    assert_eq!(config.lora.lora_target_modules, Some(names));
    assert_eq!(config.data.train_file, ["a.jsonl", "b.jsonl"]);
    assert_eq!(config.data.dataset_name, ["with blank.jsonl"]);
    assert_eq!(config.data.max_length, None);
    assert_eq!(config.optimizer.learning_rate, 1e-3);
    assert_eq!(config.schedule.lr_scheduler_kwargs["num_cycles"], json!(2));
    assert_eq!(config.output.run_name.as_deref(), Some("2024"));
    let checkpoint = Resume::From("out/checkpoint-5".into());
    assert_eq!(config.output.resume_from_checkpoint, checkpoint);
    let gaussian = InitLoraWeights::Method("gaussian".to_owned());
    assert_eq!(config.lora.init_lora_weights, gaussian);
    assert_eq!(config.runtime.seed, 2);
}

#[test]
fn target_modules_keep_peft_s_difference_between_a_pattern_and_names() {
    let pattern = |text: &str| Some(Names::Pattern(text.to_owned()));
    let list = |text: &str| Some(Names::List(vec![text.to_owned()]));
    for (text, expected) in [
        ("all-linear", pattern("all-linear")),
        (".*\\.(q|v)_proj", pattern(".*\\.(q|v)_proj")),
        ("q_proj", list("q_proj")),
        ("[.*q_proj]", list(".*q_proj")),
        ("null", None),
    ] {
        let config = with(&[("lora_target_modules", text)]);
        assert_eq!(config.lora.lora_target_modules, expected, "{text}");
    }
    let yaml = format!("{MINIMAL}lora_target_modules: q_proj\n");
    let config = TrainConfig::from_yaml(&yaml, "x", &[]).unwrap();
    assert_eq!(config.lora.lora_target_modules, pattern("q_proj"));
}

#[test]
fn null_unsets_a_list_on_the_command_line_too() {
    let yaml = format!("{MINIMAL}eval_file: [a.jsonl]\n");
    let unset = [("eval_file".to_owned(), "null".to_owned())];
    let config = TrainConfig::from_yaml(&yaml, "x", &unset).unwrap();
    assert!(config.data.eval_file.is_empty());
}

#[test]
fn patterns_keep_the_order_they_are_written_in() {
    let yaml =
        format!("{MINIMAL}lora_rank_pattern: {{v_proj: 3, layers.1.self_attn.v_proj: 2, a: 1}}\n");
    let config = TrainConfig::from_yaml(&yaml, "x", &[]).unwrap();
    let names = |config: &TrainConfig| {
        let entries = config.lora.lora_rank_pattern.0.clone();
        entries
            .into_iter()
            .map(|(name, _)| name)
            .collect::<Vec<_>>()
    };
    let written = ["v_proj", "layers.1.self_attn.v_proj", "a"];
    assert_eq!(names(&config), written);
    let config = with(&[(
        "lora_rank_pattern",
        "{v_proj: 3, layers.1.self_attn.v_proj: 2, a: 1}",
    )]);
    assert_eq!(names(&config), written);
}

#[test]
fn resume_values_have_their_meaning() {
    for (text, expected) in [
        ("auto", Resume::Auto),
        ("true", Resume::Last),
        ("False", Resume::Never),
        ("null", Resume::Never),
    ] {
        let config = with(&[("resume_from_checkpoint", text)]);
        assert_eq!(config.output.resume_from_checkpoint, expected, "{text}");
    }
}

#[test]
fn unknown_keys_name_the_nearest_and_the_line() {
    let message = yaml_fault("learnig_rate: 1");
    assert_eq!(
        message,
        "config: `learnig_rate`: unknown key (sft.yaml:3); did you mean `learning_rate`?"
    );
    assert!(fault(&[("lora_rnak", "1")]).contains("(command line)"));
    assert!(yaml_fault("pad_to_multiple: 8").contains("`pad_to_multiple_of`"));
}

#[test]
fn wrong_values_name_key_value_expectation_and_place() {
    let message = yaml_fault("lora_r: many");
    assert_eq!(
        message,
        "config: `lora_r`: got \"many\", expected a whole number of at least 0 (sft.yaml:3)"
    );
    assert!(yaml_fault("learning_rate: .nan").contains("expected a finite number"));
    assert!(yaml_fault("packing: 3").contains("expected true or false"));
    assert!(yaml_fault("lora_r: -1").contains("at least 0"));
    assert!(yaml_fault("lora_r: 1.5").contains("whole number"));
    assert!(yaml_fault("optim: adamw_tourch").contains("did you mean `adamw_torch`"));
    let lomo = yaml_fault("optim: lomo");
    assert!(
        lomo.contains("Transformers' lomo is not supported; nearest to it is sgd"),
        "{lomo}"
    );
    assert!(yaml_fault("dtype: bfloat").contains("did you mean `bfloat16`?"));
    assert!(yaml_fault("dtype: float16").contains("one of auto, float32, bfloat16"));
    assert!(yaml_fault("init_lora_weights: pisa").contains("did you mean `pissa`?"));
    assert!(yaml_fault("dtype: auto\ntorch_dtype: auto").contains("two names"));
    assert!(fault(&[("lr_scheduler_kwargs", "{a")]).contains("command line"));
}

#[test]
fn an_8_bit_base_is_what_its_keys_say() {
    let keys = "use_peft: true\nload_in_8bit: true\nllm_int8_threshold: 5\nllm_int8_skip_modules: [down_proj]\n\
                llm_int8_has_fp16_weight: false\n";
    let text = format!("{MINIMAL}{keys}");
    let config = TrainConfig::from_yaml(&text, "run.yaml", &[]).expect("valid");
    let quantise = config.model.quantise().expect("8 bits");
    assert_eq!(quantise.format, QuantFormat::Int8 { threshold: 5.0 });
    assert_eq!(quantise.skip_modules, ["down_proj"]);
    assert!(config.notes.is_empty(), "{:?}", config.notes);

    for (from, to, parts) in [
        (
            "use_peft: true",
            "use_peft: false",
            ["cannot be trained", "load_in_8bit"],
        ),
        (
            "load_in_8bit: true",
            "load_in_8bit: true\nload_in_4bit: true",
            ["load_in_4bit", "one format"],
        ),
        (
            "threshold: 5",
            "threshold: -5",
            ["llm_int8_threshold", "0 or more"],
        ),
        (
            "weight: false",
            "weight: true",
            ["llm_int8_has_fp16_weight", "frozen"],
        ),
    ] {
        let fault = yaml_fault(&keys.replace(from, to));
        assert!(parts.iter().all(|part| fault.contains(part)), "{fault}");
    }
}

#[test]
fn a_4_bit_base_is_what_its_keys_say() {
    let keys = "use_peft: true\nload_in_4bit: true\nbnb_4bit_quant_type: fp4\n\
                use_bnb_nested_quant: true\nbnb_4bit_compute_dtype: bfloat16\n\
                bnb_4bit_quant_storage: uint8\n";
    let read = |keys: &str| {
        let text = format!("{MINIMAL}{keys}");
        TrainConfig::from_yaml(&text, "run.yaml", &[]).expect("valid")
    };
    let config = read(keys);
    let format = config.model.quantise().expect("4 bits").format;
    let QuantFormat::FourBit(format) = format else {
        panic!("{format:?}");
    };
    assert_eq!((format.quant_type.as_str(), format.block), ("fp4", 64));
    assert!(format.double_quant && config.notes.is_empty());
    assert_eq!(config.model.base_dtype(), Dtype::Bfloat16);

    let off = keys.replace("load_in_4bit: true", "load_in_4bit: false");
    let config = read(&off);
    assert_eq!(config.model.quantise(), None);
    assert_eq!(config.model.base_dtype(), Dtype::Auto);
    assert!(config.notes[0].contains("bnb_4bit_quant_type"));

    let full = keys.replace("use_peft: true", "use_peft: false");
    assert!(yaml_fault(&full).contains("cannot be trained"));
    assert!(yaml_fault("bnb_4bit_quant_type: nf3").contains("did you mean `nf4`?"));
}

#[test]
fn features_to_come_are_errors_unless_they_are_off() {
    for text in [
        "fp16: true",
        "llm_int8_has_fp16_weight: true",
        "loss_type: dft",
        "push_to_hub: true",
        "dataset_kwargs: {add_special_tokens: false}",
        "dataloader_drop_last: true",
    ] {
        let message = yaml_fault(text);
        assert!(message.contains("not supported yet"), "{message}");
        assert!(message.contains("sft.yaml:"), "{message}");
    }
}

#[test]
fn ranges_and_combinations_are_checked() {
    for (key, value, part) in [
        ("learning_rate", "-1", "0 or more"),
        ("adam_beta2", "1", "below 1"),
        ("adam_epsilon", "0", "above 0"),
        ("adam_epsilon", "1e-300", "a float holds"),
        ("warmup_steps", "2.5", "whole steps"),
        ("warmup_ratio", "1.5", "from 0 to 1"),
        ("max_steps", "0", "-1 to follow num_train_epochs"),
        ("num_train_epochs", "0", "above 0"),
        ("label_smoothing_factor", "1", "below 1"),
        ("loraplus_lr_ratio", "0", "above 0"),
        ("neftune_noise_alpha", "-1", "0 or more"),
        ("test_split_size", "1", "below 1"),
        ("dataset_weights", "[1, 2]", "2 entries for 1 training file"),
        ("dataset_weights", "[-1]", "above 0"),
        ("per_device_train_batch_size", "0", "1 to"),
        ("gradient_accumulation_steps", "0", "1 to"),
        ("logging_steps", "0", "whole steps"),
        ("save_total_limit", "0", "keep all"),
        ("max_length", "0", "null for no limit"),
        ("lr_scheduler_type", "cosin", "did you mean `cosine`?"),
        (
            "lr_scheduler_type",
            "reduce_lr_on_plateau",
            "set eval_strategy",
        ),
        ("lr_scheduler_kwargs", "{power: 2}", "takes none"),
        ("optim_args", "{amsgrad: maybe}", "not true or false"),
        ("optim_args", "momentum", "momentum=0.9,nesterov=true"),
        ("optim_args", "weight_decay=0.1", "use the key weight_decay"),
        ("eval_strategy", "steps", "set eval_file"),
        ("load_best_model_at_end", "true", "set eval_strategy"),
        ("early_stopping_patience", "3", "set eval_strategy"),
        ("early_stopping_patience", "0", "1 or more"),
        ("early_stopping_threshold", "-1", "0 or more"),
        ("metric_for_best_model", "eval_lost", "did you mean `loss`?"),
        ("num_threads", "0", "1 to"),
        ("model_name_or_path", "null", "not set"),
        ("dataset_name", "[]", "not set"),
        ("lora_task_type", "TOKEN_CLS", "not supported"),
        ("num_labels", "3", "SEQ_CLS alone"),
        ("num_labels", "1", "expected 2 to"),
        ("num_labels", "9223372036854775808", "expected 2 to"),
    ] {
        let message = fault(&[(key, value)]);
        assert!(message.contains(part), "{key}={value}: {message}");
        assert!(message.contains("(command line)"), "{message}");
        assert!(message.contains(key), "{message}");
    }
    for (key, value) in [("lora_r", "0"), ("lora_alpha", "0"), ("lora_dropout", "1")] {
        assert!(fault(&[("use_peft", "true"), (key, value)]).contains(key));
    }
    let no_block = fault(&[("packing", "true"), ("max_length", "null")]);
    assert!(no_block.contains("needs max_length"), "{no_block}");
}

#[test]
fn adapter_keys_without_an_adapter_are_noted() {
    let config = with(&[("lora_r", "8")]);
    assert_eq!(config.notes.len(), 1);
    assert!(config.notes[0].contains("lora_r"));
}

#[test]
fn bf16_wins_over_dtype() {
    let config = with(&[("bf16", "true"), ("dtype", "float32")]);
    assert_eq!(config.model.base_dtype(), Dtype::Bfloat16);
}

#[test]
fn differences_name_key_old_and_new_value() {
    let differences = with(&[]).diff(&with(&[("learning_rate", "1e-3"), ("seed", "1")]));
    let keys: Vec<_> = differences.iter().map(|d| d.key).collect();
    assert_eq!(keys, ["learning_rate", "seed"]);
    assert_eq!(differences[1].old, json!(42));
    assert_eq!(differences[1].new, json!(1));
}

#[test]
fn hostile_yaml_is_refused_quickly() {
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..12 {
        let alias = format!("*a{}", level - 1);
        bomb += &format!("a{level}: &a{level} [{}]\n", vec![alias; 10].join(", "));
    }
    let deep = format!("run_name: {}", "[".repeat(50_000));
    let start = Instant::now();
    for text in [
        bomb,
        deep,
        "a: 1\na: 2".to_owned(),
        "- a".to_owned(),
        "a: 1\n---\nb: 2".to_owned(),
    ] {
        let error = TrainConfig::from_yaml(&text, "bomb.yaml", &[]).unwrap_err();
        assert!(error.to_string().contains("bomb.yaml"), "{error}");
        assert_eq!(error.exit_code() as u8, 78);
    }
    assert!(start.elapsed() < Duration::from_secs(2));
}

#[test]
fn words_that_are_booleans_elsewhere_stay_words_where_a_word_is_expected() {
    let text = format!("{MINIMAL}run_name: on\neos_token: y\npacking: yes\nsave_strategy: no\n");
    let config = TrainConfig::from_yaml(&text, "x", &[]).unwrap();
    assert_eq!(config.output.run_name.as_deref(), Some("on"));
    assert_eq!(config.data.eos_token.as_deref(), Some("y"));
    assert!(config.data.packing);
    assert_eq!(config.output.save_strategy, IntervalStrategy::No);
}

#[test]
fn a_key_set_twice_is_named() {
    let message = yaml_fault("seed: 1\nseed: 2");
    assert_eq!(
        message,
        "config: `sft.yaml:4`: key seed is set twice; keep one"
    );
}

#[test]
fn files_too_large_or_not_text_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.yaml");
    let write = |bytes: &[u8]| std::fs::write(&path, bytes).unwrap();
    write(&vec![b'#'; (1 << 20) + 1]);
    assert!(
        load(&path, &[])
            .unwrap_err()
            .to_string()
            .contains("at most 1048576")
    );
    write(b"seed: 1\nrun_name: \xff\n");
    assert!(
        load(&path, &[])
            .unwrap_err()
            .to_string()
            .contains("config.yaml:2`: not UTF-8")
    );
    write(MINIMAL.as_bytes());
    assert_eq!(
        load(&path, &pairs(&[("seed", "3")])).unwrap().runtime.seed,
        3
    );
    let missing = load(&directory.path().join("none.yaml"), &[]).unwrap_err();
    assert!(matches!(missing, Error::Config { .. }), "{missing}");
    assert!(missing.to_string().contains("none.yaml"), "{missing}");
}

#[test]
fn the_hub_token_is_never_shown() {
    let text = format!("{MINIMAL}hub_token: secret\n");
    let config = TrainConfig::from_yaml(&text, "x", &[]).unwrap();
    assert!(!config.notes.join("").contains("secret"));
    assert!(!config.to_yaml().contains("secret"));
}

#[test]
fn schema_and_reference_hold_every_key_with_a_description() {
    let schema = json_schema();
    let reference = markdown_reference();
    let properties = schema["properties"].as_object().unwrap();
    for key in TrainConfig::keys() {
        assert!(
            !key.doc.is_empty() && !key.doc.contains("  "),
            "{}",
            key.doc
        );
        assert_eq!(properties[key.name]["default"], key.default);
        assert!(
            reference.contains(&format!("| `{}` |", key.name)),
            "{}",
            key.name
        );
    }
    assert_eq!(schema["additionalProperties"], json!(false));
    assert!(properties.contains_key("torch_dtype"));
    assert!(properties.contains_key("deepspeed"));
    let names: std::collections::BTreeSet<_> = properties.keys().collect();
    assert_eq!(names.len(), properties.len());
}
