use super::{MergeDType, MergeOptions, MergeReport, OutputDirectory, merge};
use crate::testing::{copy_of, golden};
use ferrotune_core::io::{self, FileDType, SafetensorsFile, TensorData};
use half::bf16;
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

struct Merged {
    _root: tempfile::TempDir,
    output: PathBuf,
    report: MergeReport,
}

fn merge_with(base: &Path, adapter: &Path, options: &MergeOptions) -> Merged {
    let root = tempfile::tempdir().expect("temporary directory");
    let output = root.path().join("merged");
    let report = merge(base, adapter, &output, options).expect("merges");
    Merged {
        _root: root,
        output,
        report,
    }
}

fn merge_case(case: &str, base: &str, dtype: MergeDType) -> Merged {
    let options = MergeOptions {
        dtype,
        ..MergeOptions::default()
    };
    let adapter = golden(case).join("adapter");
    merge_with(&golden("_bases").join(base), &adapter, &options)
}

fn refusal(base: &Path, adapter: &Path) -> String {
    let root = tempfile::tempdir().expect("temporary directory");
    let error = merge(
        base,
        adapter,
        &root.path().join("merged"),
        &MergeOptions::default(),
    )
    .expect_err("refused")
    .to_string();
    let left = std::fs::read_dir(root.path()).expect("readable").count();
    assert_eq!(left, 0, "nothing is left behind: {error}");
    error
}

fn open(path: impl AsRef<Path>) -> SafetensorsFile {
    SafetensorsFile::open(path.as_ref()).expect("readable")
}

/// `(name in the checkpoint, name in the recording)` of every merged tensor recorded in full.
fn recorded_tensors(expected: &SafetensorsFile) -> Vec<(String, String)> {
    let found: Vec<_> = expected
        .names()
        .filter_map(|name| Some((name.strip_prefix("merged.")?.to_owned(), name.to_owned())))
        .collect();
    assert!(!found.is_empty());
    found
}

#[test]
fn merged_f32_weights_equal_pefts() {
    for case in ["lora_all_linear", "lora_qv", "rslora"] {
        let merged = merge_case(case, "llama", MergeDType::SameAsBase);
        let (ours, theirs) = (
            open(merged.output.join("model.safetensors")),
            open(golden(case).join("expected.safetensors")),
        );
        for (name, recorded) in recorded_tensors(&theirs) {
            let (ours, theirs) = (
                ours.read_f32(&name).expect("merged"),
                theirs.read_f32(&recorded).expect("recorded"),
            );
            let largest = theirs.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
            let error = ours
                .iter()
                .zip(&theirs)
                .fold(0.0_f32, |m, (a, b)| m.max((a - b).abs()));
            // Both sum four products in f32: a few units in the last place.
            assert!(error <= 1e-6 * largest, "{case} {name}: {error}");
        }
        // Subtracting W from a sum rounded to f32 loses a few 1e-8 |W| / |delta|.
        let worst = merged.report.worst().expect("tensors").relative_error;
        assert!(worst < 1e-6, "{case}: {worst}");
    }
}

#[test]
fn norms_of_all_merged_weights_equal_pefts() {
    for (case, base) in [
        ("lora_all_linear", "llama"),
        ("lora_qv", "llama"),
        ("rslora", "llama"),
        ("lora_bf16_base", "llama_bf16"),
    ] {
        let merged = merge_case(case, base, MergeDType::SameAsBase);
        let ours = open(merged.output.join("model.safetensors"));
        let theirs = open(golden(case).join("expected.safetensors"));
        let mut seen = BTreeSet::new();
        for recorded in theirs
            .names()
            .filter(|name| name.starts_with("merged_norm."))
        {
            let name = &recorded["merged_norm.".len()..];
            let norm = theirs.read_f32(recorded).expect("recorded")[0];
            let values = ours.read_f32(name).expect("merged");
            let sum: f64 = values.iter().map(|&v| f64::from(v).powi(2)).sum();
            let error = (sum.sqrt() / f64::from(norm) - 1.0).abs();
            // The recorded norm of a bf16 tensor was itself rounded to bf16: 2^-8.
            let tolerance = if base == "llama" { 1e-5 } else { 4e-3 };
            assert!(error < tolerance, "{case} {name}: {error}");
            seen.insert(name.to_owned());
        }
        let merged: BTreeSet<_> = merged
            .report
            .tensors
            .iter()
            .map(|t| t.name.clone())
            .collect();
        assert_eq!(merged, seen, "{case}");
    }
}

#[test]
fn merged_bf16_weights_are_within_one_unit_in_the_last_place_of_pefts() {
    let merged = merge_case("lora_bf16_base", "llama_bf16", MergeDType::SameAsBase);
    let ours = open(merged.output.join("model.safetensors"));
    let theirs = open(golden("lora_bf16_base/expected.safetensors"));
    for (name, recorded) in recorded_tensors(&theirs) {
        assert_eq!(ours.meta(&name).expect("merged").dtype, FileDType::BF16);
        let (ours, theirs) = (
            ours.read_f32(&name).expect("merged"),
            theirs.read_f32(&recorded).expect("recorded"),
        );
        let different = ours.iter().zip(&theirs).filter(|(a, b)| a != b).count();
        assert!(different * 100 <= ours.len(), "{name}: {different}");
        for (a, b) in ours.iter().zip(&theirs) {
            // Where W and delta cancel, the order of the f32 sum shows: 1e-7 of W, which is < 1.
            let unit = b.abs() / 128.0;
            assert!((a - b).abs() <= unit.max(1e-7), "{name}: {a} {b}");
        }
    }
    // A bf16 sum keeps 8 bits of W + delta: some per cent of delta is lost, and that is said.
    let worst = merged.report.worst().expect("tensors");
    assert!(
        worst.relative_error > 1e-4 && worst.relative_error < 0.2,
        "{worst:?}"
    );
}

#[test]
fn tensors_that_are_not_adapted_keep_their_bytes() {
    let merged = merge_case("lora_qv", "llama", MergeDType::SameAsBase);
    let (before, after) = (
        open(golden("_bases/llama/model.safetensors")),
        open(merged.output.join("model.safetensors")),
    );
    let changed: BTreeSet<&str> = merged
        .report
        .tensors
        .iter()
        .map(|t| t.name.as_str())
        .collect();
    assert_eq!(changed.len(), 4);
    assert_eq!(
        before.names().collect::<Vec<_>>(),
        after.names().collect::<Vec<_>>()
    );
    for name in before.names() {
        let same =
            before.read_bytes(name).expect("there") == after.read_bytes(name).expect("there");
        assert_eq!(same, !changed.contains(name), "{name}");
    }
    assert_eq!(
        std::fs::read(golden("_bases/llama/config.json")).expect("there"),
        std::fs::read(merged.output.join("config.json")).expect("written")
    );
    assert_eq!(merged.report.files, 1);
}

#[test]
fn the_output_dtype_reaches_every_tensor_and_the_config() {
    for (dtype, file_dtype, name) in [
        (MergeDType::Float32, FileDType::F32, "float32"),
        (MergeDType::BFloat16, FileDType::BF16, "bfloat16"),
    ] {
        for base in ["llama", "llama_bf16"] {
            let merged = merge_case("lora_qv", base, dtype);
            let file = open(merged.output.join("model.safetensors"));
            assert!(
                file.names()
                    .all(|n| file.meta(n).expect("named").dtype == file_dtype)
            );
            let config =
                std::fs::read_to_string(merged.output.join("config.json")).expect("written");
            assert!(
                config.contains(&format!("\"dtype\": \"{name}\"")),
                "{config}"
            );
        }
    }
}

#[test]
fn f32_output_of_a_bf16_base_loses_nothing() {
    let merged = merge_case("lora_bf16_base", "llama_bf16", MergeDType::Float32);
    assert!(merged.report.worst().expect("tensors").relative_error < 1e-6);
}

/// The recorded base split into two files with an index, and a tokenizer.
fn sharded_base() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("temporary directory");
    let base = open(golden("_bases/llama/model.safetensors"));
    let file_of = |name: &str| {
        let first = name.contains("layers.0") || name.contains("embed");
        format!(
            "model-0000{}-of-00002.safetensors",
            if first { 1 } else { 2 }
        )
    };
    let mut files: BTreeMap<String, BTreeMap<String, TensorData<'_>>> = BTreeMap::new();
    let mut weight_map = BTreeMap::new();
    for name in base.names() {
        let data = TensorData {
            dtype: FileDType::F32,
            shape: base.meta(name).expect("named").shape.clone(),
            bytes: Cow::Owned(base.read_bytes(name).expect("there")),
        };
        weight_map.insert(name, file_of(name));
        files
            .entry(file_of(name))
            .or_default()
            .insert(name.into(), data);
    }
    for (file, tensors) in &files {
        io::write_safetensors(&directory.path().join(file), tensors, &BTreeMap::new())
            .expect("writable");
    }
    let index = serde_json::json!({ "metadata": {"total_size": 1}, "weight_map": weight_map });
    for (file, text) in [
        ("model.safetensors.index.json", index.to_string()),
        ("tokenizer.json", "base".into()),
        ("tokenizer_config.json", "base".into()),
        ("generation_config.json", "{}".into()),
        ("unrelated.bin", "x".into()),
    ] {
        std::fs::write(directory.path().join(file), text).expect("writable");
    }
    std::fs::copy(
        golden("_bases/llama/config.json"),
        directory.path().join("config.json"),
    )
    .expect("fixture");
    directory
}

fn file_names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(directory)
        .expect("readable")
        .map(|entry| {
            entry
                .expect("readable")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    names.sort_unstable();
    names
}

#[test]
fn shards_keep_their_names_and_values_and_get_a_new_index() {
    let base = sharded_base();
    let adapter = golden("lora_all_linear").join("adapter");
    let sharded = merge_with(base.path(), &adapter, &MergeOptions::default());
    let whole = merge_case("lora_all_linear", "llama", MergeDType::SameAsBase);
    let whole_file = open(whole.output.join("model.safetensors"));
    assert_eq!(sharded.report.tensors, whole.report.tensors);
    assert_eq!(
        (sharded.report.files, sharded.report.bytes),
        (2, whole.report.bytes)
    );
    assert_eq!(
        file_names(&sharded.output),
        [
            "config.json",
            "generation_config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
    );
    let index = std::fs::read(sharded.output.join("model.safetensors.index.json")).expect("there");
    let index: serde_json::Value = serde_json::from_slice(&index).expect("JSON");
    assert_eq!(index["metadata"]["total_size"], sharded.report.bytes);
    let weight_map = index["weight_map"].as_object().expect("object");
    assert_eq!(weight_map.len(), whole_file.names().count());
    for (name, file) in weight_map {
        let file = open(sharded.output.join(file.as_str().expect("name")));
        assert_eq!(
            file.read_bytes(name).expect("there"),
            whole_file.read_bytes(name).expect("there"),
            "{name}"
        );
    }
}

#[test]
fn the_adapters_own_tokenizer_wins_as_a_whole() {
    let (base, adapter) = (sharded_base(), copy_of("lora_qv"));
    std::fs::write(adapter.path().join("tokenizer.json"), "adapter").expect("writable");
    std::fs::write(adapter.path().join("chat_template.jinja"), "adapter").expect("writable");
    let merged = merge_with(base.path(), adapter.path(), &MergeOptions::default());
    let read = |file: &str| std::fs::read_to_string(merged.output.join(file)).ok();
    assert_eq!(read("tokenizer.json").as_deref(), Some("adapter"));
    assert_eq!(read("chat_template.jinja").as_deref(), Some("adapter"));
    assert_eq!(
        read("tokenizer_config.json"),
        None,
        "no mixture of two tokenizers"
    );
}

#[test]
fn an_output_directory_in_use_is_refused_unless_replaced() {
    let (base, adapter) = (golden("_bases/llama"), golden("lora_qv").join("adapter"));
    let root = tempfile::tempdir().expect("temporary directory");
    let output = root.path().join("merged");
    std::fs::create_dir(&output).expect("writable");
    merge(&base, &adapter, &output, &MergeOptions::default()).expect("empty is fine");
    std::fs::write(output.join("stale"), "x").expect("writable");
    let error = merge(&base, &adapter, &output, &MergeOptions::default()).expect_err("in use");
    assert!(error.to_string().contains("not empty"), "{error}");
    assert!(output.join("stale").exists());
    let replace = MergeOptions {
        output: OutputDirectory::Replace,
        ..MergeOptions::default()
    };
    merge(&base, &adapter, &output, &replace).expect("replaced");
    assert_eq!(file_names(&output), ["config.json", "model.safetensors"]);
}

#[test]
fn an_output_directory_that_holds_an_input_is_refused_even_to_be_replaced() {
    let adapter = copy_of("lora_qv");
    let options = MergeOptions {
        output: OutputDirectory::Replace,
        ..MergeOptions::default()
    };
    let error = merge(
        &golden("_bases/llama"),
        adapter.path(),
        adapter.path(),
        &options,
    )
    .expect_err("refused")
    .to_string();
    assert!(error.contains("holds an input"), "{error}");
    assert!(adapter.path().join("adapter_config.json").exists());
}

fn edit_json(path: &Path, edit: impl FnOnce(&mut serde_json::Value)) {
    let text = std::fs::read_to_string(path).expect("there");
    let mut value = serde_json::from_str(&text).expect("JSON");
    edit(&mut value);
    std::fs::write(path, value.to_string()).expect("writable");
}

#[test]
fn a_quantised_base_is_refused() {
    let base = sharded_base();
    edit_json(&base.path().join("config.json"), |config| {
        config["quantization_config"] = serde_json::json!({"load_in_4bit": true});
    });
    let error = refusal(base.path(), &golden("lora_qv").join("adapter"));
    assert!(
        error.contains("quantised") && error.contains("original"),
        "{error}"
    );
}

#[test]
fn an_adapter_of_another_model_is_refused_before_any_output() {
    let (base, adapter) = (golden("_bases/llama"), copy_of("lora_qv"));
    let config = adapter.path().join("adapter_config.json");
    edit_json(&config, |c| {
        c["target_modules"] = serde_json::json!(["q_proj", "v_proj", "k_proj"]);
    });
    let error = refusal(&base, adapter.path());
    assert!(
        error.contains("4 of 12 expected tensors are missing") && error.contains("k_proj"),
        "{error}"
    );
    edit_json(&config, |c| {
        c["target_modules"] = serde_json::json!(["q_proj"]);
    });
    let error = refusal(&base, adapter.path());
    assert!(
        error.contains("4 tensors have no place") && error.contains("v_proj"),
        "{error}"
    );
    edit_json(&config, |c| {
        c["target_modules"] = serde_json::json!(["q_prj"]);
    });
    let error = refusal(&base, adapter.path());
    assert!(error.contains("did you mean `q_proj`"), "{error}");
    edit_json(&config, |c| {
        c["target_modules"] = serde_json::json!(["q_proj", "v_proj"]);
        c["rank_pattern"] = serde_json::json!({"q_proj": 2});
    });
    let error = refusal(&base, adapter.path());
    assert!(error.contains("shape [4, 32], expected [2, 32]"), "{error}");
}

type Rename = fn(&str) -> String;

/// A recorded adapter with other tensor names or shapes.
fn renamed(rename: Rename, shape: fn(&str, &[usize]) -> Vec<usize>) -> tempfile::TempDir {
    let copy = copy_of("lora_qv");
    let path = copy.path().join("adapter_model.safetensors");
    let file = open(&path);
    let tensors = file
        .names()
        .map(|name| {
            let shape = shape(name, &file.meta(name).expect("named").shape);
            let len = shape.iter().product::<usize>() * 4;
            let mut bytes = file.read_bytes(name).expect("there");
            bytes.resize(len, 0);
            let data = TensorData {
                dtype: FileDType::F32,
                shape,
                bytes: Cow::Owned(bytes),
            };
            (rename(name), data)
        })
        .collect();
    drop(file);
    io::write_safetensors(&path, &tensors, &BTreeMap::new()).expect("writable");
    copy
}

#[test]
fn tensors_that_fit_no_weight_of_the_base_are_refused() {
    let base = golden("_bases/llama");
    let keep_shape: fn(&str, &[usize]) -> Vec<usize> = |_, shape| shape.to_vec();
    for (rename, expected) in [
        (
            (|n| n.replace("layers.0", "layers.7")) as Rename,
            "did you mean `base_model.model.model.layers.",
        ),
        (|n| n.replace("lora_A", "lora_E"), "4 of 8 expected"),
        (
            |n| n.replace("0.self_attn.q_proj.lora_A", "0.x.lora_A"),
            "1 of 8 expected",
        ),
    ] {
        let adapter = renamed(rename, keep_shape);
        let error = refusal(&base, adapter.path());
        assert!(error.contains(expected), "{error}");
    }
    let wider = renamed(str::to_owned, |name, shape| match name.contains("lora_A") {
        true => vec![shape[0], 48],
        false => shape.to_vec(),
    });
    let error = refusal(&base, wider.path());
    assert!(
        error.contains("[4, 48]") && error.contains("[4, 32]"),
        "{error}"
    );
    let flat = renamed(str::to_owned, |_, shape| vec![shape.iter().product()]);
    assert!(refusal(&base, flat.path()).contains("has shape [128], expected [4, 32]"));
}

#[test]
fn an_update_too_small_for_bf16_is_reported_as_lost() {
    let adapter = renamed(str::to_owned, |_, shape| shape.to_vec());
    let path = adapter.path().join("adapter_model.safetensors");
    let file = open(&path);
    let tiny: BTreeMap<String, Vec<f32>> = file
        .names()
        .map(|name| {
            let values = file.read_f32(name).expect("there");
            (name.to_owned(), values.iter().map(|v| v * 1e-4).collect())
        })
        .collect();
    let shapes: BTreeMap<String, Vec<usize>> = file
        .names()
        .map(|name| {
            (
                name.to_owned(),
                file.meta(name).expect("named").shape.clone(),
            )
        })
        .collect();
    drop(file);
    let tensors = tiny
        .iter()
        .map(|(name, values)| {
            let data = TensorData {
                dtype: FileDType::F32,
                shape: shapes[name].clone(),
                bytes: Cow::Borrowed(bytemuck::cast_slice(values)),
            };
            (name.clone(), data)
        })
        .collect();
    io::write_safetensors(&path, &tensors, &BTreeMap::new()).expect("writable");
    let base = golden("_bases/llama_bf16");
    let merged = merge_with(&base, adapter.path(), &MergeOptions::default());
    assert!(merged.report.worst().expect("tensors").relative_error > 0.9);
    assert!(bf16::EPSILON.to_f32() > 1e-4);
}
