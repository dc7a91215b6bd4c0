//! Keys and values of the configuration, and what they point at.

use super::common::{Workbench, command, entries, text};
use super::{BAD_CONFIG, check, common, fault, untouched};
use serde_json::json;

#[test]
#[expect(clippy::too_many_lines, reason = "a table of faults")]
fn faults_of_the_configuration() {
    check(&[
        fault(
            "unknown key",
            json!({"lerning_rate": 1e-4}),
            untouched,
            BAD_CONFIG,
            &["lerning_rate", "learning_rate", "out.yaml"],
        ),
        fault(
            "value of another type",
            json!({"max_steps": "many"}),
            untouched,
            BAD_CONFIG,
            &["max_steps", "many", "out.yaml"],
        ),
        fault(
            "no threads",
            json!({"num_threads": 0}),
            untouched,
            BAD_CONFIG,
            &["num_threads", "got 0", "expected 1 to"],
        ),
        fault(
            "more threads than any machine has",
            json!({"num_threads": 4_000_000_000_u64}),
            untouched,
            BAD_CONFIG,
            &["num_threads", "4000000000", "expected 1 to"],
        ),
        fault(
            "threads below nothing",
            json!({"num_threads": -2}),
            untouched,
            BAD_CONFIG,
            &["num_threads", "-2", "expected"],
        ),
        fault(
            "more micro-batches than any step has",
            json!({"gradient_accumulation_steps": 9_000_000_000_000_000_000_u64}),
            untouched,
            BAD_CONFIG,
            &[
                "gradient_accumulation_steps",
                "9000000000000000000",
                "expected 1 to",
            ],
        ),
        fault(
            "more rows than any batch has",
            json!({"per_device_train_batch_size": u64::MAX}),
            untouched,
            BAD_CONFIG,
            &["per_device_train_batch_size", "expected 1 to"],
        ),
        fault(
            "more steps than any run does",
            json!({"max_steps": i64::MAX}),
            untouched,
            BAD_CONFIG,
            &["max_steps", "expected 1 to"],
        ),
        fault(
            "more epochs than any run does",
            json!({"max_steps": -1, "num_train_epochs": 1e300}),
            untouched,
            BAD_CONFIG,
            &["num_train_epochs", "at most"],
        ),
        fault(
            "unknown schedule",
            json!({"lr_scheduler_type": "cosin"}),
            untouched,
            BAD_CONFIG,
            &["lr_scheduler_type", "cosin", "cosine"],
        ),
        fault(
            "no such base",
            json!({"model_name_or_path": "/no/such/model"}),
            untouched,
            BAD_CONFIG,
            &["model_name_or_path", "/no/such/model", "directory"],
        ),
        fault(
            "no such data",
            json!({"dataset_name": "/no/such/rows.jsonl"}),
            untouched,
            BAD_CONFIG,
            &["dataset_name", "/no/such/rows.jsonl", ".jsonl"],
        ),
        fault(
            "context longer than the model's",
            json!({"max_length": null}),
            |bench| {
                let long = json!({"text": "word ".repeat(80)});
                common::write_rows(&bench.path("rows.jsonl"), &[long]);
            },
            BAD_CONFIG,
            &["max_length", "max_position_embeddings", "256", "401"],
        ),
        fault(
            "a rank above the matrix",
            json!({"lora_r": 33}),
            untouched,
            BAD_CONFIG,
            &[
                "`lora_r`",
                "33",
                "q_proj",
                "32 x 32",
                "above 32",
                "lora_rank_pattern",
            ],
        ),
        fault(
            "a rank of one module above its matrix",
            json!({"lora_r": 4, "lora_rank_pattern": {"q_proj": 33}}),
            untouched,
            BAD_CONFIG,
            &[
                "`lora_rank_pattern`: gives `q_proj` 33, but",
                "32 x 32",
                "above 32; take a smaller one (",
            ],
        ),
        fault(
            "a rank of one module above what its start finds",
            json!({"lora_r": 4, "lora_rank_pattern": {"v_proj": 17}, "init_lora_weights": "pissa"}),
            untouched,
            BAD_CONFIG,
            &[
                "`lora_rank_pattern`: gives `v_proj` 17, more than 16",
                "pissa",
                "16 x 32",
                "take a smaller one (",
            ],
        ),
        fault(
            "a rank of another method above the matrix",
            json!({"use_peft": true, "peft_config": {"peft_type": "LOHA", "r": 33, "target_modules": ["q_proj"]}}),
            untouched,
            BAD_CONFIG,
            &[
                "`peft_config.r`",
                "33",
                "q_proj",
                "32 x 32",
                "above 32",
                "yaml:",
            ],
        ),
        fault(
            "a rank that no machine has the memory for",
            json!({"lora_r": 99_999_999_999_999_u64}),
            untouched,
            71,
            &["does not fit", "available", "lora_r"],
        ),
    ]);
}

#[test]
fn faults_of_the_adapter_are_told_in_the_names_of_the_file() {
    check(&[
        fault(
            "unmatched target",
            json!({"lora_target_modules": ["q_prjo"]}),
            untouched,
            BAD_CONFIG,
            &["`lora_target_modules`", "q_prjo", "q_proj", "out.yaml:"],
        ),
        fault(
            "one of several targets unmatched",
            json!({"lora_target_modules": ["q_proj", "v_porj"]}),
            untouched,
            BAD_CONFIG,
            &["`lora_target_modules`", "v_porj", "v_proj"],
        ),
        fault(
            "unmatched exclusion",
            json!({"lora_exclude_modules": ["q_prjo"]}),
            untouched,
            BAD_CONFIG,
            &["`lora_exclude_modules`", "q_prjo", "q_proj"],
        ),
        fault(
            "unmatched rank pattern",
            json!({"lora_rank_pattern": {"q_prjo": 2}}),
            untouched,
            BAD_CONFIG,
            &["`lora_rank_pattern`", "q_prjo", "q_proj"],
        ),
        fault(
            "layers of a pattern that names its own",
            json!({"lora_layers_to_transform": [0], "lora_target_modules": "all-linear"}),
            untouched,
            BAD_CONFIG,
            &["`lora_layers_to_transform`", "needs `lora_target_modules`"],
        ),
        fault(
            "rank 0",
            json!({"lora_r": 0}),
            untouched,
            BAD_CONFIG,
            &["lora_r", "1 or more"],
        ),
    ]);
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table of faults")]
fn switches_that_would_do_nothing_or_contradict_name_the_way_out() {
    check(&[
        fault(
            "unmatched pattern of an alpha",
            json!({"lora_alpha_pattern": {"v_porj": 2}}),
            untouched,
            BAD_CONFIG,
            &["`lora_alpha_pattern`", "v_porj", "v_proj"],
        ),
        fault(
            "a regular expression in a list",
            json!({"lora_target_modules": ["q_proj", ".*v_proj"]}),
            untouched,
            BAD_CONFIG,
            &["`lora_target_modules`", "`.*v_proj`", "as one string"],
        ),
        fault(
            "a layer that is not there",
            json!({"lora_layers_to_transform": [77]}),
            untouched,
            BAD_CONFIG,
            &["`lora_layers_to_transform`", "layer 77"],
        ),
        fault(
            "a pattern of layers without layers",
            json!({"lora_layers_pattern": ["layers"]}),
            untouched,
            BAD_CONFIG,
            &[
                "`lora_layers_pattern`",
                "only used with `lora_layers_to_transform`",
            ],
        ),
        fault(
            "a pattern that stands before no layer",
            json!({"lora_layers_to_transform": [0], "lora_layers_pattern": "block"}),
            untouched,
            BAD_CONFIG,
            &["`lora_layers_pattern`", "`block`", "here `layers` does"],
        ),
        fault(
            "a regular expression that matches nothing",
            json!({"lora_target_modules": ".*q_prjo"}),
            untouched,
            BAD_CONFIG,
            &[
                "`lora_target_modules`",
                "`.*q_prjo`",
                "did you mean `q_proj`",
            ],
        ),
        fault(
            "a rank of 0 in a pattern, which only one of two keys says",
            json!({"lora_rank_pattern": {"q_proj": 0}}),
            untouched,
            BAD_CONFIG,
            &["`lora_rank_pattern`", "\"q_proj\":0", "1 or more"],
        ),
        fault(
            "a start that halves an odd rank",
            json!({"init_lora_weights": "orthogonal", "lora_rank_pattern": {"q_proj": 3}}),
            untouched,
            BAD_CONFIG,
            &[
                "`init_lora_weights`",
                "`orthogonal`",
                "3 is odd",
                "take 4",
                "out.yaml:",
            ],
        ),
        fault(
            "a stack of layers that are not there",
            json!({"lora_layer_replication": [[0, 2], [1, 9]]}),
            untouched,
            BAD_CONFIG,
            &[
                "`lora_layer_replication`",
                "[1, 9]",
                "this base has 2",
                "[1, 2]",
                "out.yaml:",
            ],
        ),
        fault(
            "a stack that is no list of ranges",
            json!({"lora_layer_replication": [[0, 1, 2]]}),
            untouched,
            BAD_CONFIG,
            &["lora_layer_replication", "[[0,1,2]]", "[start, end]"],
        ),
        fault(
            "a rank of modules that all have one by an earlier key",
            json!({"lora_rank_pattern": {"q_proj": 2, "layers.0.self_attn.q_proj": 4}}),
            untouched,
            BAD_CONFIG,
            &[
                "`lora_rank_pattern`",
                "`layers.0.self_attn.q_proj` decides nothing",
                "`q_proj` stands before it",
                "out.yaml:",
            ],
        ),
        fault(
            "rows of a table that is adapted, as PEFT has none",
            json!({"lora_trainable_token_indices": [5], "lora_target_modules": ["embed_tokens"]}),
            untouched,
            BAD_CONFIG,
            &["`lora_trainable_token_indices`", "`model.embed_tokens`"],
        ),
        fault(
            "a module to save that is none",
            json!({"lora_modules_to_save": ["lm_haed"]}),
            untouched,
            BAD_CONFIG,
            &[
                "`lora_modules_to_save`",
                "lm_haed",
                "did you mean `lm_head`",
            ],
        ),
        fault(
            "a module both adapted and saved",
            json!({"lora_modules_to_save": ["q_proj"], "lora_target_modules": ["q_proj"]}),
            untouched,
            BAD_CONFIG,
            &[
                "`lora_target_modules`",
                "`q_proj`",
                "`lora_modules_to_save`",
            ],
        ),
        fault(
            "a token beyond the vocabulary",
            json!({"lora_trainable_token_indices": [99999999]}),
            untouched,
            BAD_CONFIG,
            &["`lora_trainable_token_indices`", "99999999", "rows"],
        ),
        fault(
            "biases of a base that has none",
            json!({"lora_bias": "all"}),
            untouched,
            BAD_CONFIG,
            &["`lora_bias`", "all", "has none", "out.yaml:"],
        ),
        fault(
            "PEFT's name of a bias of B, which is that of another key",
            json!({"lora_bias": true}),
            untouched,
            BAD_CONFIG,
            &["lora_bias", "lora_only", "lora_b_bias"],
        ),
        fault(
            "a bias of B of an embedding",
            json!({"lora_b_bias": true, "lora_target_modules": ["q_proj", "embed_tokens"]}),
            untouched,
            BAD_CONFIG,
            &[
                "`lora_b_bias`",
                "`model.embed_tokens`",
                "`lora_target_modules`",
            ],
        ),
        fault(
            "a start that changes layers that share their weights",
            json!({"init_lora_weights": "pissa", "lora_layer_replication": [[0, 2], [1, 2]]}),
            untouched,
            BAD_CONFIG,
            &[
                "`init_lora_weights`",
                "pissa",
                "`lora_layer_replication`",
                "out.yaml:",
            ],
        ),
        fault(
            "tokens of what is no table",
            json!({"lora_trainable_token_indices": {"embed_tokns": [5]}}),
            untouched,
            BAD_CONFIG,
            &[
                "`lora_trainable_token_indices`",
                "did you mean `embed_tokens`",
                "lm_head",
            ],
        ),
        fault(
            "tokens that are no list",
            json!({"lora_trainable_token_indices": {"embed_tokens": "five"}}),
            untouched,
            BAD_CONFIG,
            &[
                "lora_trainable_token_indices",
                "five",
                "{embed_tokens: [5, 6]}",
            ],
        ),
        fault(
            "a bias of B that its start does not know",
            json!({"lora_b_bias": true, "init_lora_weights": "gaussian"}),
            untouched,
            BAD_CONFIG,
            &["`lora_b_bias`", "init_lora_weights"],
        ),
        fault(
            "keys of LoRA beside another method",
            json!({"peft_config": {"peft_type": "VERA", "r": 8}, "use_rslora": true}),
            untouched,
            BAD_CONFIG,
            &["`use_rslora`", "does nothing beside `peft_config`", "yaml:"],
        ),
        fault(
            "biases of the targets by a name that none has",
            json!({"peft_config": {"peft_type": "VERA", "r": 8, "bias": "al"}}),
            untouched,
            BAD_CONFIG,
            &[
                "`peft_config.bias`",
                "\"al\"",
                "did you mean `all`",
                "vera_only",
            ],
        ),
        fault(
            "biases of a method that trains none",
            json!({"peft_config": {"peft_type": "LOHA", "r": 8, "bias": "all"}}),
            untouched,
            BAD_CONFIG,
            &["`peft_config.bias`", "LOHA", "`modules_to_save`"],
        ),
        fault(
            "biases that are no text",
            json!({"peft_config": {"peft_type": "OFT", "oft_block_size": 8, "bias": true}}),
            untouched,
            BAD_CONFIG,
            &["`peft_config.bias`", "true", "oft_only"],
        ),
        fault(
            "a module to save beside a method that matches nothing",
            json!({"peft_config": {"peft_type": "IA3", "modules_to_save": ["lm_haed"]}}),
            untouched,
            BAD_CONFIG,
            &["modules_to_save", "lm_haed", "did you mean `lm_head`"],
        ),
        fault(
            "modules to save beside a method that are no names",
            json!({"peft_config": {"peft_type": "IA3", "modules_to_save": [3]}}),
            untouched,
            BAD_CONFIG,
            &["`peft_config.modules_to_save`", "[3]", "list of strings"],
        ),
        fault(
            "a method of which everything is trained as a whole",
            json!({"peft_config": {"peft_type": "VERA", "r": 8, "target_modules": ["q_proj"],
                                   "modules_to_save": ["q_proj"]}}),
            untouched,
            BAD_CONFIG,
            &[
                "`peft_config.target_modules`",
                "only what `modules_to_save` trains",
                "`q_proj`",
            ],
        ),
        fault(
            "two features that exclude each other",
            json!({"use_dora": true, "lora_b_bias": true}),
            untouched,
            BAD_CONFIG,
            &["`lora_b_bias`", "use_dora"],
        ),
    ]);
}

#[test]
fn a_run_too_large_for_any_machine_is_told_what_would_fit() {
    let bench = Workbench::new(1);
    // Of some 2 TiB of activations, for weights of a few MiB: a deep and narrow model, many rows.
    let shape = common::Shape {
        hidden: 8,
        intermediate: 8,
        layers: 4096,
        heads: 1,
        kv_heads: 1,
        max_position: 300,
        ..common::Shape::default()
    };
    common::write_json(&bench.path("base/config.json"), &shape.config());
    let row = json!({"text": "a".repeat(250)});
    common::write_rows(&bench.path("rows.jsonl"), &vec![row; 8000]);
    let mut changes = json!({
        "random_init": true, "use_peft": false, "per_device_train_batch_size": 8000,
    });
    let finished = bench.train("out", &changes).expect(71);
    assert!(!bench.path("out").exists());
    let said = |key: &str| {
        let (_, rest) = finished.stderr.split_once(&format!("{key}: "))?;
        let digits = rest.split(|c: char| !c.is_ascii_digit()).next()?;
        digits.parse::<u64>().ok()
    };
    let batch = said("per_device_train_batch_size").expect(&finished.stderr);
    assert!((1..8000).contains(&batch), "{}", finished.stderr);
    // Half of it: other processes may have taken memory meanwhile.
    changes["per_device_train_batch_size"] = json!(batch.div_ceil(2));
    let config = bench.config("out", &changes);
    let planned = command(&["plan", text(&config)]).output();
    let planned: common::Finished = planned.expect("the binary starts").into();
    planned.expect(0);
}

#[test]
fn training_into_the_directory_of_the_base_is_refused_and_changes_nothing() {
    let bench = Workbench::new(6);
    let base = bench.path("base");
    std::fs::create_dir(bench.path("beside")).expect("writable");
    let before = (
        entries(&base),
        common::read(&base.join("model.safetensors")),
    );
    for output in [base.clone(), bench.path("beside/../base")] {
        let changes = json!({
            "output_dir": output, "overwrite_output_dir": true, "use_peft": false,
        });
        let finished = bench.train("out", &changes).expect(BAD_CONFIG);
        for part in ["output_dir", "base model", "another directory"] {
            assert!(finished.stderr.contains(part), "{}", finished.stderr);
        }
    }
    let after = (
        entries(&base),
        common::read(&base.join("model.safetensors")),
    );
    assert!(before == after, "the base has changed");
}

#[test]
fn a_base_among_the_checkpoints_of_the_output_is_not_deleted() {
    let bench = Workbench::new(6);
    let full = json!({
        "use_peft": false, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3,
    });
    bench.train("out", &full).expect(0);
    let checkpoint = bench.path("out/checkpoint-2");
    let again = json!({"model_name_or_path": checkpoint, "overwrite_output_dir": true});
    let finished = bench.train("out", &again).expect(BAD_CONFIG);
    assert!(
        finished.stderr.contains("output_dir"),
        "{}",
        finished.stderr
    );
    assert!(checkpoint.join("model.safetensors").exists());
}

#[test]
fn a_dry_run_makes_no_directory() {
    let bench = Workbench::new(6);
    let changes = json!({"output_dir": bench.path("new/nested/out")});
    let config = bench.config("dry", &changes);
    let run = command(&["train", text(&config), "--dry-run"]).output();
    assert!(run.expect("the binary starts").status.success());
    assert!(!bench.path("new").exists());
}
