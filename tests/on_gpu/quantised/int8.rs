//! Bases in 8 bits, whose linears multiply bytes.

use super::*;
use ferrotune::kernels::dequantise::Int8;

const CASE: &str = "hf_int8_full";
const Q: &str = "model.layers.0.self_attn.q_proj.weight";
const SCALES: &str = "model.layers.0.self_attn.q_proj.SCB";

fn in_8_bits(dtype: DType, threshold: f32) -> WeightFormat {
    let quantise = Some(QuantFormat::Int8 { threshold }.into());
    WeightFormat { dtype, quantise }
}

/// The GPU's products are those of the CPU, and the planner knows what both take.
#[test]
fn devices_agree_and_take_what_is_planned() {
    let shape = Shape {
        bias: true,
        intermediate: 56,
        ..Shape::default()
    };
    let directory = tempfile::tempdir().expect("temporary directory");
    write_model(directory.path(), &shape, Stored::Bf16, SEED);
    let documents = examples(4, shape.vocab, SEED);
    let batch = PackedBatch::pack(documents.iter().enumerate().map(|(i, d)| (i as u64, d)));
    let cuda = Device::Cuda(host_cuda::device());
    for (dtype, tolerance) in [(DType::F32, 1e-3), (DType::Bf16, 5e-2)] {
        let run = |weights: WeightFormat, device: &Device, codes: fn(StepShape) -> StepShape| {
            let subject = Subject::new(directory.path(), weights, device);
            let (outcome, pooled) = subject.run(&batch);
            assert_eq!(pooled, subject.predicted(&batch, codes), "{dtype} {device}");
            outcome
        };
        let dense = run(dtype.into(), &Device::Cpu, |shape| shape);
        // Outliers by the dozen, and none.
        for threshold in [1.5, 0.0] {
            let on = |device| {
                run(
                    in_8_bits(dtype, threshold),
                    device,
                    StepShape::with_int8_linears,
                )
            };
            let (cpu, gpu) = (on(&Device::Cpu), on(&cuda));
            let distance = distance(&cpu, &gpu);
            assert!(distance < tolerance, "{dtype} {threshold}: {distance}");
            let quantising = self::distance(&dense, &cpu);
            assert!(quantising > 1e-4, "{dtype} {threshold}: {quantising}");
        }
    }
}

/// The distance of two gradients, relative to the first.
pub(super) fn distance(one: &Outcome, other: &Outcome) -> f64 {
    let pairs = one.gradients.iter().zip(&other.gradients);
    let of = |bits: &u32| f64::from(f32::from_bits(*bits));
    let [difference, norm] = pairs.fold([0.0, 0.0], |[d, n], (a, b)| {
        [d + (of(a) - of(b)).powi(2), n + of(a).powi(2)]
    });
    (difference / norm).sqrt()
}

#[test]
fn a_run_over_8_bits_trains_and_is_evaluated_and_merged() {
    let bench = Workbench::new(16);
    let keys = json!({"load_in_8bit": true, "llm_int8_threshold": 2.0, "llm_int8_skip_modules": ["down_proj"],
                      "use_dora": true, "eval_file": bench.path("rows.jsonl"), "eval_strategy": "steps",
                      "eval_steps": 3, "device": "cpu"});
    bench.train("out", &keys).expect(0);
    let state = read_json(&bench.path("out/trainer_state.json"));
    let history = state["log_history"].as_array().expect("a list");
    let trained = history.iter().find_map(|r| r["eval_loss"].as_f64());
    let trained = trained.expect("an evaluation");
    let flags = "--load-in-8bit --llm-int8-threshold 2 --llm-int8-skip-modules down_proj";
    let flags: Vec<&str> = flags.split(' ').collect();
    let (same, all) = (eval_loss(&bench, &flags), eval_loss(&bench, &flags[..3]));
    assert!((same - trained).abs() < 1e-6 * trained, "{same}, {trained}");
    assert_ne!(all, same, "what is skipped changes the result");
    assert_ne!(eval_loss(&bench, &[]), same);
    merge(&bench).expect(0);
}

#[test]
fn the_plan_counts_8_bits() {
    let bench = Workbench::new(4);
    let shape = Shape::default();
    let linears = shape.tensors().into_iter().filter(|(n, _)| is_linear(n));
    let saved = |skipped: &str| -> u64 {
        let counted = linears
            .clone()
            .filter(|(name, _)| skipped.is_empty() || !name.contains(skipped));
        counted
            .map(|(_, s)| (s[0] * s[1] * 3 - s[0] * 4) as u64)
            .sum()
    };
    let dense = planned_weights(&bench, &json!({}));
    let planned =
        |keys: Value| planned_weights(&bench, &with(json!({"load_in_8bit": true}), &keys));
    assert_eq!(planned(json!({})), dense - saved(""));
    let skipped = planned(json!({"llm_int8_skip_modules": ["up_proj"]}));
    assert_eq!(skipped, dense - saved("up_proj"));
}

#[test]
fn a_checkpoint_in_8_bits_trains_without_a_key_and_is_not_merged_into() {
    let bench = saved(CASE);
    bench.train("out", &json!({"device": "cpu"})).expect(0);
    said(&merge(&bench).expect(BAD_INPUT), &["quantised"]);
    assert!(!bench.path("merged").exists());
    let refused = bench.train("full", &json!({"use_peft": false}));
    said(&refused.expect(BAD_CONFIG), &["use_peft", "int8"]);
    let inspected = ferrotune(&["inspect", "model", text(&bench.path("base"))]).expect(0);
    assert!(
        inspected.stdout.contains("linears in int8"),
        "{}",
        inspected.stdout
    );
}

#[test]
fn keys_that_do_not_fit_are_refused() {
    let bench = Workbench::new(4);
    let full = json!({"load_in_8bit": true, "use_peft": false});
    let refused = bench.train("out", &full).expect(BAD_CONFIG);
    said(&refused, &["load_in_8bit", "use_peft: true"]);
    let unknown = json!({"load_in_8bit": true, "llm_int8_skip_modules": ["down_prj"]});
    let refused = bench.train("out", &unknown).expect(BAD_CONFIG);
    said(
        &refused,
        &["llm_int8_skip_modules", "down_prj", "`down_proj`"],
    );

    let bench = saved(CASE);
    let path = bench.path("base/config.json");
    let mut config = read_json(&path);
    config["quantization_config"]["llm_int8_has_fp16_weight"] = json!(true);
    write_json(&path, &config);
    let refused = bench.train("out", &json!({})).expect(BAD_INPUT);
    said(&refused, &["llm_int8_has_fp16_weight"]);
}

#[test]
fn a_damaged_state_is_refused_before_a_weight_is_read() {
    let lose = |name: &'static str| damaged(CASE, |t| drop(t.remove(name).expect("there")));
    let set = |name: &'static str, bytes: Vec<u8>, shape: Vec<usize>| {
        damaged(CASE, move |tensors| {
            let tensor = tensors.get_mut(name).expect("there");
            (tensor.bytes, tensor.shape) = (Cow::Owned(bytes), shape);
        })
    };
    let layout = "model.layers.0.self_attn.q_proj.weight_format";
    for (message, parts) in [
        (lose(SCALES), [SCALES, "missing"]),
        (lose(Q), [Q, "missing"]),
        (set(SCALES, vec![0; 128], vec![32]), [SCALES, "F32 [64]"]),
        (set(Q, vec![1; 32 * 64], vec![32, 64]), [SCALES, "F32 [32]"]),
        (set(Q, vec![1; 64], vec![64]), [Q, "a matrix"]),
        (set(layout, vec![2], vec![]), [layout, "row by row"]),
    ] {
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    }
}

#[test]
fn a_scale_that_is_no_number_is_refused() {
    let directory = tempfile::tempdir().expect("temporary directory");
    copy_dir(&golden(CASE), directory.path());
    change_tensors(directory.path(), |tensors| {
        let scales = tensors.get_mut(SCALES).expect("there");
        scales.bytes.to_mut()[4..8].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    let files = ModelFiles::open(directory.path()).expect("sound shapes");
    let refused = files.read_quantised(Q).expect_err("refused").to_string();
    assert!(
        refused.contains(SCALES) && refused.contains("row 1"),
        "{refused}"
    );
}

#[test]
fn the_threshold_is_that_of_the_checkpoint() {
    let directory = tempfile::tempdir().expect("temporary directory");
    copy_dir(&golden(CASE), directory.path());
    let threshold = || {
        let files = ModelFiles::open(directory.path()).expect("sound");
        files.quant_format(Q).expect("8 bits")
    };
    assert_eq!(
        threshold(),
        QuantFormat::Int8 {
            threshold: Int8::THRESHOLD
        }
    );
    let path = directory.path().join("config.json");
    let mut config = read_json(&path);
    config["quantization_config"]["llm_int8_threshold"] = json!(3.5);
    write_json(&path, &config);
    assert_eq!(threshold(), QuantFormat::Int8 { threshold: 3.5 });
}

/// A change of a weight is added to the product of its bytes: one of nothing changes nothing.
#[test]
fn a_weight_that_is_not_changed_yet_multiplies_as_bytes() {
    let bench = saved(CASE);
    let loss = |adapter: &[&str]| {
        let (base, rows) = (bench.path("base"), bench.path("rows.jsonl"));
        let place = ["--model_name_or_path", text(&base), "--data", text(&rows)];
        ferrotune(&[&["eval"], &place[..], adapter].concat())
            .expect(0)
            .stdout
    };
    let before = loss(&[]);
    let loha = json!({"peft_type": "LOHA", "r": 3, "target_modules": ["q_proj", "gate_proj"]});
    let changes = json!({"peft_config": loha, "learning_rate": 0, "max_steps": 1});
    bench.train("out", &changes).expect(0);
    assert_eq!(loss(&["--adapter", text(&bench.path("out"))]), before);
}
