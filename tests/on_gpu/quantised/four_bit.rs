//! Bases in 4 bits.

use super::*;

const CASE: &str = "hf_nf4_dq_fp32compute";

fn formats() -> [FourBitFormat; 3] {
    let format = |quant_type, block, double_quant| FourBitFormat {
        quant_type,
        block,
        double_quant,
    };
    [
        format(FourBitType::Nf4, 64, true),
        format(FourBitType::Nf4, 32, false),
        format(FourBitType::Fp4, 128, true),
    ]
}

/// The model with the values that its linears have in `format`.
fn write_dequantised(directory: &Path, shape: &Shape, format: FourBitFormat) {
    write_model(directory, shape, Stored::Bf16, SEED);
    let mut weights = shape.weights(SEED);
    for (name, (shape, values)) in &mut weights {
        for value in values.iter_mut() {
            *value = half::bf16::from_f32(*value).to_f32();
        }
        if is_linear(name) {
            let view = View::from_f32(values, shape[0], shape[1]);
            let mut out = Tensor::zeros(DType::F32, shape[0], shape[1]);
            let codes = format.quantise(view).expect("finite");
            codes.dequantise(out.view_mut()).expect("the shapes agree");
            assert_ne!(*values, out.to_f32_vec(), "{name} is not rounded");
            *values = out.to_f32_vec();
        }
    }
    let file = directory.join("model.safetensors");
    write_weights(&file, weights.iter(), Stored::F32);
}

/// Not the values alone: the same products in the same order, so the same bits.
fn assert_as_if_dense(device: &Device) {
    let shape = Shape {
        bias: true,
        intermediate: 72,
        ..Shape::default()
    };
    let directory = tempfile::tempdir().expect("temporary directory");
    let [base, dense] = ["base", "dense"].map(|name| directory.path().join(name));
    write_model(&base, &shape, Stored::Bf16, SEED);
    let documents = examples(4, shape.vocab, SEED);
    let batch = PackedBatch::pack(documents.iter().enumerate().map(|(i, d)| (i as u64, d)));
    for format in formats() {
        write_dequantised(&dense, &shape, format);
        for dtype in [DType::F32, DType::Bf16] {
            let weights = WeightFormat {
                dtype,
                quantise: Some(QuantFormat::FourBit(format).into()),
            };
            let quantised = Subject::new(&base, weights, device);
            let (ours, pooled) = quantised.run(&batch);
            let (theirs, _) = Subject::new(&dense, dtype.into(), device).run(&batch);
            let label = format!("{format:?} {dtype}");
            assert!(
                ours.gradients.iter().any(|g| f32::from_bits(*g) != 0.0),
                "{label}"
            );
            assert!(ours == theirs, "{label}");
            let predicted = quantised.predicted(&batch, StepShape::with_quantised_linears);
            assert_eq!(pooled, predicted, "bytes of {label}");
        }
    }
}

#[test]
fn codes_compute_as_their_values_do() {
    assert_as_if_dense(&Device::Cpu);
}

#[test]
fn codes_compute_as_their_values_do_on_a_gpu() {
    assert_as_if_dense(&Device::Cuda(host_cuda::device()));
}

fn four_bits() -> Value {
    json!({"load_in_4bit": true, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": true,
           "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "uint8"})
}

#[test]
fn a_run_over_4_bits_trains_and_is_evaluated_and_merged() {
    let bench = Workbench::new(16);
    let rows = bench.path("rows.jsonl");
    let evaluated = json!({"eval_file": rows, "eval_strategy": "steps", "eval_steps": 3,
                           "device": "cpu"});
    bench.train("out", &with(four_bits(), &evaluated)).expect(0);

    let state = read_json(&bench.path("out/trainer_state.json"));
    let history = state["log_history"].as_array().expect("a list");
    let trained = history.iter().find_map(|r| r["eval_loss"].as_f64());
    let trained = trained.expect("an evaluation");
    let flags = ["--load-in-4bit", "--bnb-4bit-use-double-quant"];
    let (same, other) = (eval_loss(&bench, &flags), eval_loss(&bench, &[]));
    assert!((same - trained).abs() < 1e-6 * trained, "{same}, {trained}");
    assert!((other - trained).abs() > 1e-4 * trained, "{other}");

    // What is merged into is the checkpoint itself.
    merge(&bench).expect(0);
    let [base, merged] = ["base", "merged"].map(|name| bench.path(name));
    let [before, after] = [&base, &merged].map(|d| common::tensors(&d.join("model.safetensors")));
    let o = "model.layers.0.self_attn.o_proj.weight";
    let q = "model.layers.0.self_attn.q_proj.weight";
    assert_eq!(before[o], after[o]);
    assert_ne!(before[q], after[q]);
}

#[test]
fn the_plan_counts_4_bits() {
    let bench = Workbench::new(4);
    let shape = Shape::default();
    let linears = shape.tensors().into_iter().filter(|(n, _)| is_linear(n));
    let linears: Vec<u64> = linears.map(|(_, s)| (s[0] * s[1]) as u64).collect();
    let dense = planned_weights(&bench, &json!({}));
    // Codes, a scale per 64 weights, and the table of 16 values.
    let saved: u64 = linears
        .iter()
        .map(|len| len * 4 - (len.div_ceil(2) + len.div_ceil(64) * 4 + 64))
        .sum();
    let planned = planned_weights(&bench, &json!({"load_in_4bit": true}));
    assert_eq!(planned, dense - saved);
}

fn saved_in_4_bits() -> Workbench {
    saved(CASE)
}

#[test]
fn a_checkpoint_in_4_bits_trains_without_a_key_and_is_not_merged_into() {
    let bench = saved_in_4_bits();
    bench.train("out", &json!({"device": "cpu"})).expect(0);
    let refused = merge(&bench).expect(BAD_INPUT);
    said(&refused, &["quantised", "16- or 32-bit"]);
    assert!(!bench.path("merged").exists());
}

#[test]
fn keys_of_another_format_than_the_files_are_refused() {
    let bench = saved_in_4_bits();
    for (keys, key) in [
        (json!({"load_in_8bit": true}), "load_in_8bit"),
        (
            json!({"load_in_4bit": true, "bnb_4bit_quant_type": "fp4"}),
            "bnb_4bit_quant_type",
        ),
    ] {
        let refused = bench.train("out", &keys).expect(BAD_CONFIG);
        said(&refused, &[key, "nf4 already", "leave it out"]);
    }
    bench.train("out", &four_bits()).expect(0);
}

#[test]
fn a_scale_that_is_no_number_is_named_and_codes_say_nothing_of_the_values() {
    const Q: &str = "model.layers.0.self_attn.q_proj.weight";
    let bench = saved_in_4_bits();
    let loss = |bench: &Workbench| {
        let (base, rows) = (bench.path("base"), bench.path("rows.jsonl"));
        let place = ["--model_name_or_path", text(&base), "--data", text(&rows)];
        ferrotune(&[&["eval"], &place[..]].concat())
    };
    let before = loss(&bench).expect(0).stdout;
    // `bnb_4bit_quant_storage: bfloat16`
    change_tensors(&bench.path("base"), |tensors| {
        let codes = tensors.get_mut(Q).expect("there");
        (codes.dtype, codes.shape) = (FileDType::BF16, vec![codes.bytes.len() / 2, 1]);
    });
    assert_eq!(loss(&bench).expect(0).stdout, before);
    change_tensors(&bench.path("base"), |tensors| {
        let scales = tensors.get_mut(&format!("{Q}.nested_absmax"));
        let bytes = scales.expect("there").bytes.to_mut();
        bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    let refused = loss(&bench).expect(BAD_INPUT);
    said(&refused, &["nested_absmax", "NaN at element 0"]);
}

#[test]
fn a_value_that_has_no_code_is_named_with_its_tensor() {
    const Q: &str = "model.layers.0.self_attn.q_proj.weight";
    let bench = Workbench::new(4);
    change_tensors(&bench.path("base"), |tensors| {
        let bytes = tensors.get_mut(Q).expect("there").bytes.to_mut();
        bytes[12..16].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    for key in ["load_in_4bit", "load_in_8bit", "load_in_fp8"] {
        let refused = bench.train("out", &json!({key: true})).expect(BAD_INPUT);
        said(&refused, &[Q, "NaN at element 3", "model.safetensors"]);
    }
}

#[test]
fn weights_in_4_bits_are_not_trained() {
    let bench = Workbench::new(4);
    let full = json!({"use_peft": false});
    let refused = bench.train("out", &with(four_bits(), &full));
    said(
        &refused.expect(BAD_CONFIG),
        &["load_in_4bit", "use_peft: true"],
    );
    let refused = saved_in_4_bits().train("out", &full).expect(BAD_CONFIG);
    said(&refused, &["use_peft", "nf4"]);
}

#[test]
fn a_damaged_state_is_refused_before_a_weight_is_read() {
    const Q: &str = "model.layers.0.self_attn.q_proj.weight";
    let state = format!("{Q}.quant_state.bitsandbytes__nf4");
    let part = |name: &str| format!("{Q}.{name}");
    let set = |key: &'static str, value: Value| {
        let state = state.clone();
        damaged(CASE, move |tensors| {
            let tensor = tensors.get_mut(&state).expect("there");
            let mut json: Value = serde_json::from_slice(&tensor.bytes).expect("JSON");
            json[key] = value;
            let bytes = json.to_string().into_bytes();
            tensor.shape = vec![bytes.len()];
            tensor.bytes = Cow::Owned(bytes);
        })
    };
    let lose = |name: String| {
        damaged(CASE, move |tensors| {
            drop(tensors.remove(&name).expect("there"));
        })
    };
    let cut = |name: String| {
        damaged(CASE, move |tensors| {
            let tensor = tensors.get_mut(&name).expect("there");
            let len = tensor.bytes.len() / 2;
            tensor.bytes.to_mut().truncate(len);
            tensor.shape = vec![len / if tensor.dtype == FileDType::F32 { 4 } else { 1 }];
        })
    };
    let rows = [
        (lose(state.clone()), vec![part("absmax"), "missing".into()]),
        (lose(part("absmax")), vec![part("absmax"), "missing".into()]),
        (
            lose(part("nested_quant_map")),
            vec![part("nested_quant_map")],
        ),
        (cut(Q.to_owned()), vec![Q.into(), "1024 bytes".into()]),
        (
            cut(part("quant_map")),
            vec![part("quant_map"), "[16]".into()],
        ),
        (
            set("blocksize", json!(48)),
            vec!["blocksize".into(), "48".into()],
        ),
        (
            set("blocksize", json!(128)),
            vec![part("absmax"), "[32]".into()],
        ),
        (
            set("shape", json!([32, 64])),
            vec![Q.into(), "[32, 64]".into()],
        ),
        (
            set("shape", json!([128, 32])),
            vec![Q.into(), "[64, 64]".into()],
        ),
        (set("quant_type", json!("fp4")), vec!["quant_type".into()]),
        (
            set("nested_blocksize", json!(128)),
            vec![
                "`nested_blocksize` is 128, `nested_dtype` is float32, `nested_offset` is ".into(),
                "expected 256, float32".into(),
            ],
        ),
        (
            set("nested_offset", Value::Null),
            vec!["`nested_offset` is missing; expected".into()],
        ),
    ];
    for (message, parts) in rows {
        for part in parts {
            assert!(message.contains(&part), "`{part}` is not in: {message}");
        }
    }
}

#[test]
fn another_quantisation_is_refused_by_name() {
    let bench = saved_in_4_bits();
    let path = bench.path("base/config.json");
    let mut config = read_json(&path);
    config["quantization_config"] = json!({"quant_method": "hqq", "bits": 4});
    write_json(&path, &config);
    let refused = bench.train("out", &json!({})).expect(BAD_INPUT);
    said(&refused, &["quantization_config", "hqq", "bitsandbytes"]);
}
