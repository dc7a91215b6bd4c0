use crate::testing::{adapter, attach, copy_of, edit_config, edit_tensors, golden, list, recorded};
use crate::{LoraConfig, PeftConfig, TargetModules};
use ferrotune_core::adapter::Adapter;
use ferrotune_core::io::{FileDType, SafetensorsFile};
use std::collections::BTreeMap;
use std::path::Path;

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
            (ours.expect("ours"), theirs.expect("theirs"))
        else {
            panic!("two LoRAs")
        };
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
fn saved_weights_are_f32_marked_as_pytorchs() {
    let (adapter, params) = recorded("lora_bf16_base");
    let directory = tempfile::tempdir().expect("temporary directory");
    adapter.save(&params, directory.path()).expect("saved");
    let file = SafetensorsFile::open(directory.path().join("adapter_model.safetensors"))
        .expect("readable");
    assert_eq!(
        file.metadata(),
        &BTreeMap::from([("format".to_owned(), "pt".to_owned())])
    );
    let mut dtypes = file
        .names()
        .map(|name| file.meta(name).expect("named").dtype);
    assert!(dtypes.all(|dtype| dtype == FileDType::F32));
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
    let PeftConfig::Lora(saved) = PeftConfig::load(directory.path()).expect("readable") else {
        panic!("a LoRA")
    };
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

fn load_error(directory: &Path) -> String {
    let PeftConfig::Lora(config) =
        PeftConfig::load(&golden("lora_qv").join("adapter")).expect("fixture")
    else {
        panic!("a LoRA")
    };
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
