//! Formats that are read and not made here: GPTQ, AWQ, 8-bit floats; and 8-bit floats that are.

use super::*;

const CASES: [&str; 5] = ["gptq4", "gptq8", "awq4", "fp8_block", "fp8_channel"];
const MODULE: &str = "model.layers.0.mlp.down_proj";

fn case(name: &str) -> PathBuf {
    common::root().join("tests/fixtures/quantised").join(name)
}

/// Values of the linears by name, which another program multiplied out.
fn expected(name: &str) -> BTreeMap<String, Vec<f32>> {
    common::tensors(&case(name).join("expected.safetensors"))
}

#[test]
fn weights_stand_for_what_their_definition_says() {
    for name in CASES {
        let files = ModelFiles::open(case(name)).expect("sound");
        let expected = expected(name);
        assert_eq!(expected.len(), 7);
        for (weight, want) in expected {
            let codes = files
                .read_quantised(&weight)
                .expect("readable")
                .expect("codes");
            let [rows, cols] = codes.shape();
            let mut values = Tensor::zeros(DType::F32, rows, cols);
            codes
                .dequantise(values.view_mut())
                .expect("the shapes agree");
            assert_eq!(values.to_f32_vec(), want, "{name} {weight}");
        }
    }
}

/// A model of values that are those of `codes`, for the linears in `linears`.
fn write_dense(directory: &Path, codes: &Path, linears: &BTreeMap<String, Vec<f32>>) {
    std::fs::create_dir_all(directory).expect("writable");
    let mut config = read_json(&codes.join("config.json"));
    config
        .as_object_mut()
        .expect("keys")
        .remove("quantization_config");
    write_json(&directory.join("config.json"), &config);
    let files = ModelFiles::open(codes).expect("sound");
    let mut weights = BTreeMap::new();
    for (name, shape) in files.weight_shapes() {
        let values = match linears.get(name) {
            Some(values) => values.clone(),
            None if name.ends_with(".bias") => continue,
            None => files.read_f32(name).expect("floats"),
        };
        weights.insert(name.to_owned(), (shape.to_vec(), values));
    }
    write_weights(
        &directory.join("model.safetensors"),
        weights.iter(),
        Stored::F32,
    );
}

/// Codes compute as their values do, to the bit, in the memory that is planned.
pub(super) fn assert_as_if_dense(codes: &Path, dense: &Path, what: &str) {
    let documents = examples(4, 96, SEED);
    let batch = PackedBatch::pack(documents.iter().enumerate().map(|(i, d)| (i as u64, d)));
    for device in [Device::Cpu, Device::Cuda(host_cuda::device())] {
        for dtype in [DType::F32, DType::Bf16] {
            let subject = Subject::new(codes, dtype.into(), &device);
            let (ours, pooled) = subject.run(&batch);
            let (theirs, _) = Subject::new(dense, dtype.into(), &device).run(&batch);
            let what = format!("{what} {dtype} {device}");
            assert!(
                ours.gradients.iter().any(|g| f32::from_bits(*g) != 0.0),
                "{what}"
            );
            assert!(ours == theirs, "{what}");
            let predicted = subject.predicted(&batch, StepShape::with_quantised_linears);
            assert_eq!(pooled, predicted, "{what}");
        }
    }
}

#[test]
fn checkpoints_compute_as_their_values_do() {
    let directory = tempfile::tempdir().expect("temporary directory");
    for name in CASES {
        let dense = directory.path().join(name);
        write_dense(&dense, &case(name), &expected(name));
        assert_as_if_dense(&case(name), &dense, name);
    }
}

/// A workbench with the base of a case.
fn bench_of(name: &str) -> Workbench {
    let bench = Workbench::new(4);
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(case(name).join(file), bench.path("base").join(file)).expect("writable");
    }
    bench
}

/// Methods of every kind of attachment: folded into products, made of factors, weights, activations.
fn methods() -> [(&'static str, Value); 5] {
    let peft = |kind: &str, more: Value| {
        let own = json!({"peft_type": kind, "target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"]});
        json!({"peft_config": with(own, &more)})
    };
    [
        ("lora", json!({})),
        (
            "dora",
            json!({"use_dora": true, "lora_target_modules": ["q_proj", "down_proj", "lm_head"]}),
        ),
        ("olora", json!({"init_lora_weights": "olora"})),
        (
            "ia3",
            peft("IA3", json!({"feedforward_modules": ["down_proj"]})),
        ),
        ("oft", peft("OFT", json!({"oft_block_size": 16, "r": 0}))),
    ]
}

#[test]
fn every_kind_of_method_trains_over_every_format() {
    let plain = || Workbench::new(4);
    let mut benches: Vec<(String, Workbench, Value)> = vec![
        ("nf4".into(), plain(), json!({"load_in_4bit": true})),
        ("int8".into(), plain(), json!({"load_in_8bit": true})),
        ("fp8".into(), plain(), json!({"load_in_fp8": true})),
        ("q8_0".into(), super::gguf::bench(), json!({})),
    ];
    benches.extend(CASES.map(|name| (name.to_owned(), bench_of(name), json!({}))));
    for (format, bench, keys) in benches {
        for (method, own) in methods() {
            let changes = with(with(json!({"device": "cpu", "max_steps": 2}), &keys), &own);
            let finished = bench.train(method, &changes);
            // What changes the base's weights needs a format that they can be brought into again.
            let made = ["nf4", "int8", "fp8", "fp8_channel"].contains(&&*format);
            if method == "olora" && !made {
                said(&finished.expect(70), &["checkpoint"]);
                assert!(!bench.path(method).join("adapter_config.json").exists());
            } else {
                finished.expect(0);
                let adapter = bench.path(method).join("adapter_model.safetensors");
                assert!(adapter.exists(), "{format} {method}");
            }
        }
    }
}

#[test]
fn eight_bit_floats_made_as_they_are_read_are_planned_and_evaluated() {
    let bench = Workbench::new(16);
    let evaluated = json!({"load_in_fp8": true, "eval_file": bench.path("rows.jsonl"), "device": "cpu",
                           "eval_strategy": "steps", "eval_steps": 3});
    bench.train("out", &evaluated).expect(0);
    let state = read_json(&bench.path("out/trainer_state.json"));
    let history = state["log_history"].as_array().expect("a list");
    let trained = history
        .iter()
        .find_map(|r| r["eval_loss"].as_f64())
        .expect("an evaluation");
    let same = eval_loss(&bench, &["--load-in-fp8"]);
    assert!((same - trained).abs() < 1e-6 * trained, "{same}, {trained}");
    assert!((eval_loss(&bench, &[]) - trained).abs() > 1e-6 * trained);
    merge(&bench).expect(0);
    let shape = Shape::default();
    let linears = shape.tensors().into_iter().filter(|(n, _)| is_linear(n));
    let saved: usize = linears.map(|(_, s)| s[0] * s[1] * 3 - s[0] * 4).sum();
    let dense = planned_weights(&bench, &json!({}));
    let planned = planned_weights(&bench, &json!({"load_in_fp8": true}));
    assert_eq!(planned, dense - saved as u64);
}

#[test]
fn a_configuration_of_codes_over_files_of_values_is_refused() {
    let base = common::root().join("tests/fixtures/golden/adapters/_bases/llama");
    for settings in [
        json!({"quant_method": "gptq", "bits": 4}),
        json!({"load_in_4bit": true}),
    ] {
        let directory = tempfile::tempdir().expect("temporary directory");
        copy_dir(&base, directory.path());
        let path = directory.path().join("config.json");
        let mut config = read_json(&path);
        config["quantization_config"] = settings;
        write_json(&path, &config);
        let refused = ModelFiles::open(directory.path()).expect_err("refused");
        let refused = refused.to_string();
        for part in [
            "config.json",
            "`quantization_config`",
            "none in the files is",
        ] {
            assert!(refused.contains(part), "{refused}");
        }
    }
}

/// What is said of a case whose configuration and tensors went through changes.
fn said_of(name: &str, settings: &Value, change: impl FnOnce(&mut Tensors)) -> String {
    let directory = tempfile::tempdir().expect("temporary directory");
    copy_dir(&case(name), directory.path());
    std::fs::remove_file(directory.path().join("expected.safetensors")).expect("there");
    let path = directory.path().join("config.json");
    let mut config = read_json(&path);
    config["quantization_config"] = with(config["quantization_config"].clone(), settings);
    write_json(&path, &config);
    change_tensors(directory.path(), change);
    let read = ModelFiles::open(directory.path())
        .and_then(|files| files.read_quantised(&format!("{MODULE}.weight")).map(drop));
    read.expect_err("refused").to_string()
}

#[test]
fn states_that_do_not_fit_are_refused() {
    let none = || json!({});
    let part = |name: &str| format!("{MODULE}.{name}");
    let lose = |case: &str, name: &str| {
        let name = part(name);
        said_of(case, &none(), |tensors| {
            drop(tensors.remove(&name).expect("there"));
        })
    };
    let set = |case: &str, name: &str, at: usize, bytes: &[u8]| {
        let name = part(name);
        said_of(case, &none(), |tensors| {
            let tensor = tensors.get_mut(&name).expect("there");
            tensor.bytes.to_mut()[at..at + bytes.len()].copy_from_slice(bytes);
        })
    };
    let keys = |case: &str, keys: Value| said_of(case, &keys, |_| {});
    let rows = [
        (
            keys("gptq4", json!({"group_size": 16})),
            ["scales", "[6, 64]"],
        ),
        (keys("gptq4", json!({"bits": 3})), ["`bits` is 3", "[4, 8]"]),
        (
            keys("gptq4", json!({"checkpoint_format": "marlin"})),
            ["marlin", "gptq_v2"],
        ),
        (
            keys("gptq4", json!({"quant_method": "hqq"})),
            ["hqq", "gptq or awq"],
        ),
        (keys("awq4", json!({"version": "gemv"})), ["gemv", "gemm"]),
        (keys("awq4", json!({"group_size": 0})), ["group_size", "-1"]),
        (lose("gptq4", "scales"), ["scales", "missing"]),
        (lose("gptq4", "qzeros"), ["qzeros", "missing"]),
        (lose("gptq4", "qweight"), ["qweight", "missing"]),
        (
            said_of("gptq4", &json!({"desc_act": true}), |tensors| {
                drop(tensors.remove(&part("g_idx")).expect("there"));
            }),
            ["g_idx", "`desc_act`"],
        ),
        (
            set("gptq4", "g_idx", 8, &[9, 0, 0, 0]),
            ["input 2", "group 9 of 3"],
        ),
        (set("gptq4", "scales", 0, &[0, 0x7e]), ["scales", "NaN"]),
        (
            lose("fp8_block", "weight_scale_inv"),
            ["weight_scale_inv", "missing"],
        ),
        (lose("fp8_channel", "weight"), ["weight_scale", "missing"]),
        (
            keys("fp8_block", json!({"weight_block_size": [16, 16]})),
            ["weight_scale_inv", "[4, 6]"],
        ),
        (
            set("fp8_channel", "weight", 5, &[0x7f]),
            ["NaN", "element 5"],
        ),
    ];
    for (message, parts) in rows {
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    }
}
