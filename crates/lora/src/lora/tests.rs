use super::names::{self, Factor};
use super::{InitLoraWeights, LoraAdapter, LoraConfig};
use crate::testing::{golden, llama_sites};
use crate::{PeftConfig, TargetModules};
use ferrotune_core::adapter::{Adapter, Attachment, LowRank};
use ferrotune_core::io::{self, FileDType, SafetensorsFile, TensorData};
use ferrotune_core::params::{FlatBuffer, ParamLayoutBuilder};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

fn list(names: &[&str]) -> Option<TargetModules> {
    Some(TargetModules::List(
        names.iter().map(|&name| name.into()).collect(),
    ))
}

fn adapter(config: LoraConfig) -> LoraAdapter {
    LoraAdapter::new(config, "llama").expect("valid configuration")
}

/// The adapter's parameters over a Llama of two layers, zero, and what it attached.
fn attach(adapter: &LoraAdapter) -> (FlatBuffer, Vec<LowRank>) {
    let mut builder = ParamLayoutBuilder::new();
    let attachments = adapter
        .attach(&llama_sites(2), &mut builder)
        .expect("attaches")
        .into_iter()
        .map(|(_, attachment)| match attachment {
            Attachment::LowRank(low_rank) => low_rank,
            other => panic!("not a low-rank update: {other:?}"),
        })
        .collect();
    let layout = builder.build().expect("names are unique");
    (FlatBuffer::zeros(&layout), attachments)
}

fn attach_error(config: LoraConfig) -> String {
    adapter(config)
        .attach(&llama_sites(2), &mut ParamLayoutBuilder::new())
        .expect_err("refused")
        .to_string()
}

fn tensor<'a>(params: &'a FlatBuffer, module: &str, factor: Factor) -> &'a [f32] {
    let name = names::tensor(module, factor);
    params.get(params.layout().find(&name).expect("attached"))
}

/// Adapter and parameters as PEFT saved them.
fn recorded(case: &str) -> (LoraAdapter, FlatBuffer) {
    let directory = golden(case).join("adapter");
    let PeftConfig::Lora(config) = PeftConfig::load(&directory).expect("fixture");
    let adapter = adapter(config);
    let (mut params, _) = attach(&adapter);
    adapter.load(&mut params, &directory).expect("fixture");
    (adapter, params)
}

fn key_set(file: &Path) -> Vec<(String, Vec<usize>)> {
    let file = SafetensorsFile::open(file).expect("readable");
    file.names()
        .map(|name| {
            (
                name.to_owned(),
                file.meta(name).expect("named").shape.clone(),
            )
        })
        .collect()
}

#[test]
fn targets_null_means_the_default_of_the_architecture() {
    let adapter = adapter(LoraConfig::default());
    let (params, attachments) = attach(&adapter);
    let names: Vec<&str> = params
        .layout()
        .by_name()
        .map(|(_, s)| s.spec.name.as_str())
        .collect();
    assert_eq!(attachments.len(), 4);
    assert_eq!(
        names[..2],
        [
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
        ]
    );
    let unknown = LoraAdapter::new(LoraConfig::default(), "unheard_of").expect_err("no default");
    assert!(unknown.to_string().contains("unheard_of"), "{unknown}");
}

#[test]
fn shapes_scale_and_order_follow_the_site() {
    let config = LoraConfig {
        rank: 4,
        alpha: 10.0,
        dropout: 0.25,
        target_modules: list(&["down_proj"]),
        ..LoraConfig::default()
    };
    let rslora = LoraConfig {
        use_rslora: true,
        ..config.clone()
    };
    let (params, attachments) = attach(&adapter(config));
    let LowRank {
        a,
        b,
        rank,
        scale,
        dropout,
    } = attachments[0];
    assert_eq!((rank, scale, dropout), (4, 2.5, 0.25));
    let (a, b) = (
        &params.layout().segment(a).spec,
        &params.layout().segment(b).spec,
    );
    assert_eq!(
        (a.shape.as_slice(), b.shape.as_slice()),
        (&[4, 64][..], &[32, 4][..])
    );
    let down = llama_sites(2)
        .into_iter()
        .find(|s| s.name.ends_with("0.mlp.down_proj"));
    assert_eq!(
        Some(a.execution_order),
        down.map(|site| site.execution_order)
    );
    assert_eq!(attach(&adapter(rslora)).1[0].scale, 5.0);
}

#[test]
fn rank_and_alpha_patterns_reach_shapes_and_scale() {
    let config = LoraConfig {
        rank: 8,
        alpha: 16.0,
        rank_pattern: vec![("layers.1.self_attn.q_proj".into(), 2)],
        alpha_pattern: vec![("v_proj".into(), 4.0)],
        ..LoraConfig::default()
    };
    let (_, attachments) = attach(&adapter(config));
    let found: Vec<_> = attachments.iter().map(|l| (l.rank, l.scale)).collect();
    assert_eq!(found, [(8, 2.0), (8, 0.5), (2, 8.0), (8, 0.5)]);
}

#[test]
fn embeddings_and_norms_are_refused() {
    for (name, reason) in [
        ("embed_tokens", "not supported yet"),
        ("norm", "needs a linear layer"),
    ] {
        let message = attach_error(LoraConfig {
            target_modules: list(&["q_proj", name]),
            ..LoraConfig::default()
        });
        assert!(
            message.contains(name) && message.contains(reason),
            "{message}"
        );
    }
}

#[test]
fn values_out_of_range_are_refused() {
    let default = LoraConfig::default;
    for (config, key) in [
        (
            LoraConfig {
                rank: 0,
                ..default()
            },
            "`r`",
        ),
        (
            LoraConfig {
                rank_pattern: vec![("q_proj".into(), 0)],
                ..default()
            },
            "`r`",
        ),
        (
            LoraConfig {
                alpha: f64::NAN,
                ..default()
            },
            "`lora_alpha`",
        ),
        (
            LoraConfig {
                dropout: 1.0,
                ..default()
            },
            "`lora_dropout`",
        ),
        (
            LoraConfig {
                dropout: -0.1,
                ..default()
            },
            "`lora_dropout`",
        ),
    ] {
        let error = LoraAdapter::new(config, "llama")
            .expect_err("refused")
            .to_string();
        assert!(error.contains(key), "{error}");
    }
}

#[test]
fn initial_values_have_pefts_distributions() {
    let moments = |values: &[f32]| {
        let n = values.len() as f64;
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
        let second = values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / n;
        (
            mean,
            second.sqrt(),
            values.iter().fold(0.0f32, |m, v| m.max(v.abs())),
        )
    };
    let module = "model.layers.0.mlp.down_proj";
    for (init, a_deviation, a_bound, b_bound) in [
        // A uniform distribution within ±bound has the standard deviation bound / √3.
        (InitLoraWeights::Kaiming, 1.0 / 192f64.sqrt(), 0.125, 0.0),
        (InitLoraWeights::Random, 1.0 / 192f64.sqrt(), 0.125, 0.25),
        (InitLoraWeights::Gaussian, 1.0 / 16.0, f32::INFINITY, 0.0),
    ] {
        let adapter = adapter(LoraConfig {
            rank: 16,
            init_lora_weights: init,
            target_modules: list(&["down_proj"]),
            ..LoraConfig::default()
        });
        let (mut params, _) = attach(&adapter);
        adapter.init(&mut params, 3).expect("supported");
        let (mean, deviation, largest) = moments(tensor(&params, module, Factor::A));
        // 1024 draws: three standard errors of the mean are a tenth of a deviation.
        assert!(mean.abs() < 0.1 * a_deviation, "{init:?} {mean}");
        assert!(
            (deviation / a_deviation - 1.0).abs() < 0.1,
            "{init:?} {deviation}"
        );
        assert!(largest <= a_bound, "{init:?} {largest}");
        let (_, _, b_largest) = moments(tensor(&params, module, Factor::B));
        assert!(
            b_largest <= b_bound && b_largest >= 0.9 * b_bound,
            "{init:?} {b_largest}"
        );
    }
}

#[test]
fn initial_values_depend_on_seed_and_name_alone() {
    let values = |targets: &[&str], seed| {
        let adapter = adapter(LoraConfig {
            target_modules: list(targets),
            ..LoraConfig::default()
        });
        let (mut params, _) = attach(&adapter);
        adapter.init(&mut params, seed).expect("supported");
        tensor(&params, "model.layers.1.self_attn.v_proj", Factor::A).to_vec()
    };
    let alone = values(&["v_proj"], 1);
    assert_eq!(alone, values(&["q_proj", "v_proj", "up_proj"], 1));
    assert_ne!(alone, values(&["v_proj"], 2));
}

#[test]
fn orthogonal_start_is_refused_by_name() {
    let adapter = adapter(LoraConfig {
        init_lora_weights: InitLoraWeights::Orthogonal,
        ..LoraConfig::default()
    });
    let (mut params, _) = attach(&adapter);
    let error = adapter
        .init(&mut params, 0)
        .expect_err("refused")
        .to_string();
    assert!(
        error.contains("orthogonal") && error.contains("not supported yet"),
        "{error}"
    );
}

#[test]
fn adapters_saved_by_peft_load_with_every_tensor_in_place() {
    for case in ["lora_all_linear", "lora_qv", "rslora", "lora_bf16_base"] {
        let (_, params) = recorded(case);
        let file = SafetensorsFile::open(golden(case).join("adapter/adapter_model.safetensors"))
            .expect("fixture");
        let names: Vec<&str> = file.names().collect();
        assert_eq!(params.layout().by_name().count(), names.len(), "{case}");
        for name in names {
            let id = params.layout().find(name).expect("attached");
            assert_eq!(
                params.get(id),
                file.read_f32(name).expect("fixture"),
                "{case} {name}"
            );
        }
    }
}

#[test]
fn what_is_saved_reads_back_bit_for_bit_with_pefts_keys() {
    for case in ["lora_all_linear", "lora_qv", "rslora"] {
        let (adapter, params) = recorded(case);
        let directory = tempfile::tempdir().expect("temporary directory");
        adapter.save(&params, directory.path()).expect("saved");
        let (ours, theirs) = (directory.path(), golden(case).join("adapter"));
        assert_eq!(
            key_set(&ours.join("adapter_model.safetensors")),
            key_set(&theirs.join("adapter_model.safetensors"))
        );
        let (ours, theirs) = (PeftConfig::load(ours), PeftConfig::load(&theirs));
        let (PeftConfig::Lora(ours), PeftConfig::Lora(mut theirs)) =
            (ours.expect("ours"), theirs.expect("theirs"));
        if let Some(TargetModules::List(names)) = &mut theirs.target_modules {
            names.sort_unstable();
        }
        assert_eq!(ours, theirs);
    }
}

#[test]
fn saving_twice_gives_the_same_bytes_and_changed_files_fail_verification() {
    let (adapter, mut params) = recorded("lora_qv");
    let [one, two] = [(); 2].map(|()| tempfile::tempdir().expect("temporary directory"));
    adapter.save(&params, one.path()).expect("saved");
    adapter.save(&params, two.path()).expect("saved");
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        let read = |directory: &Path| std::fs::read(directory.join(file)).expect("written");
        assert_eq!(read(one.path()), read(two.path()), "{file}");
    }
    params.as_mut_slice()[0] += 1.0;
    let error = adapter
        .verify_saved(&params, one.path())
        .expect_err("differs")
        .to_string();
    assert!(error.contains("reads back with other values"), "{error}");
}

#[test]
fn all_linear_is_saved_as_sorted_names() {
    let adapter = adapter(LoraConfig {
        target_modules: Some(TargetModules::AllLinear),
        ..LoraConfig::default()
    });
    let (params, _) = attach(&adapter);
    let directory = tempfile::tempdir().expect("temporary directory");
    adapter.save(&params, directory.path()).expect("saved");
    let PeftConfig::Lora(saved) = PeftConfig::load(directory.path()).expect("readable");
    let names = [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ];
    assert_eq!(saved.target_modules, list(&names));
}

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

/// A copy of a recorded adapter that a test can damage.
fn copy_of(case: &str) -> tempfile::TempDir {
    let copy = tempfile::tempdir().expect("temporary directory");
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(
            golden(case).join("adapter").join(file),
            copy.path().join(file),
        )
        .expect("fixture");
    }
    copy
}

fn edit_config(directory: &Path, key: &str, value: serde_json::Value) {
    let path = directory.join("adapter_config.json");
    let text = std::fs::read_to_string(&path).expect("copied");
    let mut config: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    config[key] = value;
    std::fs::write(&path, config.to_string()).expect("writable");
}

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

fn edit_tensors(directory: &Path, edit: impl FnOnce(&mut Tensors)) {
    let path = directory.join("adapter_model.safetensors");
    let file = SafetensorsFile::open(&path).expect("copied");
    let mut tensors: Tensors = file
        .names()
        .map(|name| {
            let shape = file.meta(name).expect("named").shape.clone();
            (
                name.to_owned(),
                (shape, file.read_f32(name).expect("copied")),
            )
        })
        .collect();
    drop(file);
    edit(&mut tensors);
    let data = tensors
        .iter()
        .map(|(name, (shape, values))| {
            let data = TensorData {
                dtype: FileDType::F32,
                shape: shape.clone(),
                bytes: Cow::Borrowed(bytemuck::cast_slice(values)),
            };
            (name.clone(), data)
        })
        .collect();
    io::write_safetensors(&path, &data, &BTreeMap::new()).expect("writable");
}

fn load_error(directory: &Path) -> String {
    let PeftConfig::Lora(config) =
        PeftConfig::load(&golden("lora_qv").join("adapter")).expect("fixture");
    let adapter = adapter(config);
    let (mut params, _) = attach(&adapter);
    let error = adapter.load(&mut params, directory).expect_err("refused");
    assert!(params.as_slice().iter().all(|&v| v == 0.0) || error.to_string().contains("element"));
    error.to_string()
}

const Q0: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";

#[test]
fn missing_extra_and_misshapen_tensors_are_errors_with_names() {
    let copy = copy_of("lora_qv");
    edit_tensors(copy.path(), |tensors| {
        tensors.remove(Q0);
    });
    let error = load_error(copy.path());
    assert!(
        error.contains("1 of 8 expected tensors are missing") && error.contains(Q0),
        "{error}"
    );

    let copy = copy_of("lora_qv");
    edit_tensors(copy.path(), |tensors| {
        let value = tensors.remove(Q0).expect("there");
        tensors.insert(Q0.replace("lora_A", "lora_A.default"), value);
    });
    let error = load_error(copy.path());
    assert!(
        error.contains("did you mean") && error.contains("lora_A.default"),
        "{error}"
    );

    let copy = copy_of("lora_qv");
    edit_tensors(copy.path(), |tensors| {
        tensors.insert(
            Q0.replace("q_proj", "k_proj"),
            (vec![4, 32], vec![0.0; 128]),
        );
    });
    let error = load_error(copy.path());
    assert!(
        error.contains("no place in this model") && error.contains("k_proj"),
        "{error}"
    );

    let copy = copy_of("lora_qv");
    edit_tensors(copy.path(), |tensors| {
        tensors.get_mut(Q0).expect("there").0 = vec![8, 16];
    });
    let error = load_error(copy.path());
    assert!(error.contains("shape [8, 16], expected [4, 32]"), "{error}");
}

#[test]
fn values_that_are_not_finite_are_refused() {
    for value in [f32::NAN, f32::INFINITY] {
        let copy = copy_of("lora_qv");
        edit_tensors(copy.path(), |tensors| {
            tensors.get_mut(Q0).expect("there").1[5] = value;
        });
        let error = load_error(copy.path());
        assert!(error.contains(Q0) && error.contains("element 5"), "{error}");
    }
}

#[test]
fn another_scale_than_the_runs_is_refused() {
    for (key, value) in [
        ("lora_alpha", serde_json::json!(20)),
        ("use_rslora", serde_json::json!(true)),
        ("alpha_pattern", serde_json::json!({"q_proj": 1})),
    ] {
        let copy = copy_of("lora_qv");
        edit_config(copy.path(), key, value);
        let error = load_error(copy.path());
        assert!(
            error.contains(&format!("`{key}`")) && error.contains("different model"),
            "{error}"
        );
    }
}

#[test]
fn a_pickle_is_refused_and_never_opened() {
    let copy = copy_of("lora_qv");
    std::fs::rename(
        copy.path().join("adapter_model.safetensors"),
        copy.path().join("adapter_model.bin"),
    )
    .expect("renamed");
    let error = load_error(copy.path());
    assert!(
        error.contains("pickle") && error.contains("safetensors"),
        "{error}"
    );
}

#[test]
fn a_truncated_weights_file_is_an_error() {
    let copy = copy_of("lora_qv");
    let path = copy.path().join("adapter_model.safetensors");
    let bytes = std::fs::read(&path).expect("copied");
    std::fs::write(&path, &bytes[..bytes.len() - 8]).expect("writable");
    assert!(load_error(copy.path()).contains("adapter_model.safetensors"));
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
        ("use_dora", json!(true)),
        ("modules_to_save", json!(["lm_head"])),
        ("bias", json!("lora_only")),
        ("lora_bias", json!(true)),
        ("trainable_token_indices", json!([1])),
        ("target_parameters", json!(["experts.gate_up_proj"])),
        ("layer_replication", json!([[0, 1]])),
        ("alora_invocation_tokens", json!([5])),
        ("loftq_config", json!({"loftq_bits": 4})),
        ("fan_in_fan_out", json!(true)),
        ("init_lora_weights", json!("pissa_niter_4")),
    ] {
        let error = config_error(key, value.clone());
        assert!(
            error.contains(&format!("`{key}` is {value}")) && error.contains("not supported yet"),
            "{error}"
        );
    }
}

#[test]
fn wrong_types_and_values_name_key_and_expectation() {
    use serde_json::json;
    for (key, value, expected) in [
        ("r", json!("8"), "whole numbers"),
        ("r", json!(-1), "whole numbers"),
        ("r", json!(0), "at least 1"),
        ("lora_alpha", json!([]), "numbers"),
        ("lora_dropout", json!(2), "[0, 1)"),
        ("use_rslora", json!(1), "true or false"),
        ("target_modules", json!([1]), "list of strings"),
        ("rank_pattern", json!({"q_proj": 1.5}), "whole numbers"),
        ("init_lora_weights", json!("gausian"), "\"gaussian\""),
        ("task_type", json!("CAUSAL_LN"), "did you mean `CAUSAL_LM`"),
        ("peft_type", json!("IA3"), "not supported yet"),
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

#[test]
fn a_name_with_path_separators_stays_a_tensor_name() {
    // Module names come from a hostile file here; they must never reach the file system.
    let copy = copy_of("lora_qv");
    edit_tensors(copy.path(), |tensors| {
        let value = tensors.remove(Q0).expect("there");
        tensors.insert(
            "base_model.model.../../../tmp/x.lora_A.weight".into(),
            value,
        );
    });
    assert!(load_error(copy.path()).contains("missing"));
}
