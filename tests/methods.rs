//! Every method beside LoRA, trained on a recorded base: starts, files, merges.

mod common;

use ferrotune::core::adapter::Adapter;
use ferrotune::core::data::{Example, PackedBatch};
use ferrotune::core::io::ModelFiles;
use ferrotune::core::model::{DecoderConfig, Mode, Model, Pass};
use ferrotune::core::params::FlatBuffer;
use ferrotune::core::trainer::{Trainer, TrainerOptions, attach};
use ferrotune::kernels::{DType, Workspace};
use ferrotune::lora::{MergeOptions, PeftConfig, load, merge};
use ferrotune::prelude::Solo;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// Whether the adapter does nothing before it is trained.
#[derive(Clone, Copy, PartialEq)]
enum Start {
    Nothing,
    Something,
}

/// A configuration of every method and variant.
#[expect(clippy::too_many_lines, reason = "a table")]
fn configurations() -> Vec<(Value, Start)> {
    use Start::{Nothing, Something};
    let of = |peft_type: &str, keys: Value| {
        let mut object =
            json!({"peft_type": peft_type, "target_modules": ["q_proj", "v_proj", "down_proj"]});
        let map = object.as_object_mut().expect("an object");
        map.extend(keys.as_object().expect("an object").clone());
        object
    };
    vec![
        (
            // The term that keeps vectors orthogonal is no part of the loss of an evaluation.
            of(
                "ADALORA",
                json!({"init_r": 6, "target_r": 2, "total_step": 100, "orth_reg_weight": 0.0}),
            ),
            Nothing,
        ),
        (of("BOFT", json!({"boft_block_size": 4})), Nothing),
        (
            of(
                "BOFT",
                json!({"boft_block_size": 4, "boft_n_butterfly_factor": 3}),
            ),
            Nothing,
        ),
        (
            of("C3A", json!({"block_size": 8, "init_weights": true})),
            Nothing,
        ),
        (
            of(
                "C3A",
                json!({"block_size": 8, "block_size_pattern": {"v_proj": 16}}),
            ),
            Something,
        ),
        (of("DELORA", json!({"r": 4})), Nothing),
        (
            of(
                "FOURIERFT",
                json!({"n_frequency": 30, "init_weights": true}),
            ),
            Nothing,
        ),
        (of("FOURIERFT", json!({"n_frequency": 30})), Something),
        (
            of("HIRA", json!({"r": 4, "rank_pattern": {"v_proj": 2}})),
            Nothing,
        ),
        (of("HRA", json!({"r": 4})), Nothing),
        (of("HRA", json!({"r": 3, "apply_GS": true})), Something),
        (of("IA3", json!({})), Nothing),
        (
            of(
                "IA3",
                json!({"feedforward_modules": ["v_proj", "down_proj"]}),
            ),
            Nothing,
        ),
        (
            of("IA3", json!({"feedforward_modules": ["down_proj"]})),
            Nothing,
        ),
        (of("LOHA", json!({"r": 3})), Nothing),
        (of("LOKR", json!({"r": 2})), Nothing),
        (
            of(
                "LOKR",
                json!({"r": 2, "decompose_both": true, "init_weights": "lycoris"}),
            ),
            Nothing,
        ),
        (of("MISS", json!({"r": 8})), Nothing),
        (of("MISS", json!({"r": 6})), Nothing),
        (of("MISS", json!({"r": 8, "init_weights": "bat"})), Nothing),
        (
            of("MISS", json!({"r": 8, "mini_r": 4, "init_weights": "mini"})),
            Nothing,
        ),
        (of("OFT", json!({"oft_block_size": 8})), Nothing),
        (
            of(
                "OFT",
                json!({"oft_block_size": 0, "r": 4, "use_cayley_neumann": false}),
            ),
            Nothing,
        ),
        (
            of(
                "OFT",
                json!({"oft_block_size": 4, "block_share": true, "coft": true, "eps": 10.0}),
            ),
            Nothing,
        ),
        (of("RANDLORA", json!({"r": 5})), Nothing),
        (of("RANDLORA", json!({"r": 8, "sparse": true})), Nothing),
        (
            of(
                "RANDLORA",
                json!({"r": 8, "save_projection": false, "projection_prng_key": 3}),
            ),
            Nothing,
        ),
        (of("ROAD", json!({"group_size": 8})), Nothing),
        (
            of("ROAD", json!({"group_size": 4, "variant": "road_2"})),
            Nothing,
        ),
        (
            of("ROAD", json!({"group_size": 8, "variant": "road_4"})),
            Nothing,
        ),
        (
            of(
                "VBLORA",
                json!({"r": 2, "vector_length": 8, "num_vectors": 12}),
            ),
            Something,
        ),
        (of("VERA", json!({"r": 8, "vera_dropout": 0.1})), Nothing),
        (
            of(
                "VERA",
                json!({"r": 8, "save_projection": false, "projection_prng_key": 3}),
            ),
            Nothing,
        ),
        // Beside parts of the base that are trained as a whole, one of them a target too.
        (
            of(
                "VERA",
                json!({"r": 8, "modules_to_save": ["lm_head", "norm", "1.mlp.down_proj"]}),
            ),
            Nothing,
        ),
        (
            of(
                "OFT",
                json!({"oft_block_size": 8, "modules_to_save": ["embed_tokens"], "bias": "all"}),
            ),
            Nothing,
        ),
    ]
}

/// The same, and each with the head among its targets.
fn configurations_and_on_the_head() -> Vec<(Value, Start)> {
    let plain = configurations();
    let on_the_head = plain.clone().into_iter().map(|(mut keys, start)| {
        keys["target_modules"] = json!(["q_proj", "v_proj", "down_proj", "lm_head"]);
        (keys, start)
    });
    let on_the_head: Vec<_> = on_the_head.collect();
    [plain, on_the_head].concat()
}

fn base() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden/adapters/_bases/llama")
}

fn adapter(keys: &Value) -> Box<dyn Adapter> {
    let object: Map<String, Value> = keys.as_object().expect("an object").clone();
    let config = PeftConfig::from_config("peft_config", &object).expect("a known method");
    config
        .for_base(&base())
        .into_adapter("llama")
        .expect("a llama has defaults")
}

fn batch() -> PackedBatch {
    let rows: Vec<Example> = [11, 7]
        .map(|len| {
            let ids: Vec<u32> = (0..len).map(|i| (i * 37 + len) % 250).collect();
            Example {
                labels: ids.iter().map(|&id| id as i32).collect(),
                input_ids: ids,
            }
        })
        .into();
    PackedBatch::pack((0..).zip(&rows))
}

fn logits(model: &Model, params: &FlatBuffer) -> Vec<f32> {
    let workspace = Workspace::new(0);
    let pass = Pass {
        workspace: &workspace,
        dtype: DType::F32,
        mode: Mode::Eval,
    };
    model
        .logits(pass, params, &batch())
        .expect("runs")
        .to_f32_vec()
}

/// The logits of a directory's model with an adapter from disk, or alone.
fn logits_of(directory: &Path, from: Option<&Path>) -> Vec<f32> {
    let config = DecoderConfig::open(directory).expect("a config");
    let files = ModelFiles::open(directory).expect("weights");
    let Some(from) = from else {
        let mut none = FlatBuffer::zeros(&Default::default());
        let model = Model::load(&config, Vec::new(), &files, &mut none, DType::F32).expect("loads");
        return logits(&model, &none);
    };
    let method = load(from, &config).expect("an adapter");
    let (attachments, mut params) = attach(&config, method.as_ref()).expect("fits");
    let mut model =
        Model::load(&config, attachments, &files, &mut params, DType::F32).expect("loads");
    method
        .prepare(&mut params, &mut model)
        .expect("base values");
    method.load(&mut params, from).expect("tensors");
    logits(&model, &params)
}

fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    let square = |v: f64| v * v;
    let apart: f64 = a.iter().zip(b).map(|(a, b)| square(f64::from(a - b))).sum();
    let size: f64 = b.iter().map(|b| square(f64::from(*b))).sum();
    (apart / size).sqrt()
}

fn trainer(keys: &Value) -> Trainer {
    let config = DecoderConfig::open(&base()).expect("a config");
    let files = ModelFiles::open(base()).expect("weights");
    let options = TrainerOptions::default();
    Trainer::new(&config, &files, adapter(keys), Box::new(Solo), options).expect("fits")
}

#[test]
fn adapters_start_as_they_say_and_learn() {
    let plain = logits_of(&base(), None);
    for (keys, start) in configurations_and_on_the_head() {
        let mut trainer = trainer(&keys);
        let error = relative_error(&logits(trainer.model(), trainer.params()), &plain);
        match start {
            Start::Nothing => assert!(error < 1e-5, "{keys}: starts {error} away from the base"),
            Start::Something => assert!(error > 1e-6, "{keys}: starts at the base"),
        }
        let before = trainer.evaluate(&[batch()]).expect("runs").loss;
        for _ in 0..8 {
            trainer.step(&[batch()], 1e-2).expect("a step");
        }
        let after = trainer.evaluate(&[batch()]).expect("runs").loss;
        assert!(after < before, "{keys}: {before} before, {after} after");
    }
}

#[test]
fn what_is_saved_is_what_was_trained_and_merges_to_the_same_model() {
    for (keys, _) in configurations_and_on_the_head() {
        let mut trainer = trainer(&keys);
        for _ in 0..3 {
            trainer.step(&[batch()], 1e-2).expect("a step");
        }
        let trained = logits(trainer.model(), trainer.params());
        let place = tempfile::tempdir().expect("temporary directory");
        let [saved, again, merged] =
            ["saved", "again", "merged"].map(|name| place.path().join(name));
        trainer
            .adapter()
            .save(trainer.params(), &saved)
            .expect("saved");
        assert_eq!(
            logits_of(&base(), Some(&saved)),
            trained,
            "{keys}: reads back differently"
        );

        let config = DecoderConfig::open(&base()).expect("a config");
        let method = load(&saved, &config).expect("an adapter");
        let (_, mut params) = attach(&config, method.as_ref()).expect("fits");
        method.load(&mut params, &saved).expect("tensors");
        method.save(&params, &again).expect("saved");
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            let [first, second] =
                [&saved, &again].map(|d| std::fs::read(d.join(file)).expect("written"));
            assert!(
                first == second,
                "{keys}: {file} is other bytes after a round trip"
            );
        }

        merge(&base(), &saved, &merged, &MergeOptions::default()).expect("merges");
        let error = relative_error(&logits_of(&merged, None), &trained);
        assert!(error < 1e-5, "{keys}: merged, {error} away");
    }
}

/// Ranks are cut while training goes on, whether it stops in between or not, and files hold what is left.
#[test]
fn adalora_cuts_ranks_and_goes_on_where_it_stopped() {
    let keys = json!({
        "peft_type": "ADALORA", "target_modules": ["q_proj", "v_proj", "down_proj"],
        "init_r": 6, "target_r": 2, "total_step": 12, "tinit": 2, "tfinal": 4,
    });
    let run = |trainer: &mut Trainer, steps: usize| {
        for _ in 0..steps {
            trainer.step(&[batch()], 1e-2).expect("a step");
        }
    };
    let mut whole = trainer(&keys);
    run(&mut whole, 12);
    // Before ranks are cut, between two cuts, and after they are decided.
    for stop in [2, 5, 10] {
        let mut first = trainer(&keys);
        run(&mut first, stop);
        let mut second = trainer(&keys);
        second.restore(stop as u64, first.params(), &first.state());
        run(&mut second, 12 - stop);
        assert_eq!(
            second.params().as_slice(),
            whole.params().as_slice(),
            "stopped after {stop} steps"
        );
    }

    let trained = logits(whole.model(), whole.params());
    whole.finish();
    let place = tempfile::tempdir().expect("temporary directory");
    let save = |to: &Path| {
        whole.adapter().save(whole.params(), to).expect("saved");
        let text = std::fs::read(to.join("adapter_config.json")).expect("written");
        let config: Value = serde_json::from_slice(&text).expect("JSON");
        config["rank_pattern"].clone()
    };
    let pattern = save(place.path());
    let flags = pattern.as_object().expect("ranks were cut").values();
    let flags: Vec<&Value> = flags
        .flat_map(|list| list.as_array().expect("a list"))
        .collect();
    let kept = flags.iter().filter(|flag| ***flag == json!(true)).count();
    assert_eq!((flags.len(), kept), (6 * 6, 2 * 6));
    let ours = logits_of(&base(), Some(place.path()));
    assert!(relative_error(&ours, &trained) < 1e-6);

    let path = place.path().join("adapter_config.json");
    let text = std::fs::read(&path).expect("written");
    let mut config: Value = serde_json::from_slice(&text).expect("JSON");
    config["rank_pattern"]["model.layers.0.self_attn.q_proj.lora_E"] = json!([true, false]);
    std::fs::write(&path, config.to_string()).expect("writable");
    let config = DecoderConfig::open(&base()).expect("a config");
    let error = load(place.path(), &config).expect_err("a pattern of numbers");
    assert!(error.to_string().contains("a list of 6"), "{error}");
}

/// COFT's rotations stay near none after each step.
#[test]
fn constrained_rotations_do_not_leave_their_bounds() {
    let keys = json!({
        "peft_type": "OFT", "target_modules": ["q_proj"], "oft_block_size": 8, "coft": true, "eps": 0.01,
    });
    let mut trainer = trainer(&keys);
    for _ in 0..5 {
        trainer.step(&[batch()], 1e-1).expect("a step");
    }
    for (id, segment) in trainer.params().layout().by_name() {
        let blocks = segment.spec.shape[0];
        for block in trainer.params().get(id).chunks(segment.spec.shape[1]) {
            let norm = block.iter().map(|v| 2.0 * v * v).sum::<f32>().sqrt();
            let bound = 0.01 / (blocks as f32).sqrt();
            assert!(norm > 0.0 && norm < bound * 1.0001, "{norm} above {bound}");
        }
    }
}

/// Along the gradient the loss grows as the gradient says.
#[test]
fn gradients_are_slopes_of_the_loss() {
    for (keys, _) in configurations_and_on_the_head() {
        let mut trainer = trainer(&keys);
        // Away from the start, where many gradients are zero.
        for _ in 0..3 {
            trainer.step(&[batch()], 1e-2).expect("a step");
        }
        let tokens = trainer.evaluate(&[batch()]).expect("runs").label_tokens as f64;
        let params = trainer.params().clone();
        // A step at rate 0 leaves the gradient of these parameters behind.
        trainer.step(&[batch()], 0.0).expect("a step");
        let grads = trainer.grads().clone();
        let norm = grads
            .as_slice()
            .iter()
            .map(|g| f64::from(*g).powi(2))
            .sum::<f64>()
            .sqrt()
            / tokens;
        let mut loss_at = |distance: f64| {
            let moved = params.as_slice().iter().zip(grads.as_slice());
            let moved: Vec<f32> = moved
                .map(|(p, g)| (f64::from(*p) + distance * f64::from(*g) / tokens / norm) as f32)
                .collect();
            trainer.params_mut().as_mut_slice().copy_from_slice(&moved);
            trainer.evaluate(&[batch()]).expect("runs").loss
        };
        // Short where the loss is steep, and so curved.
        let step = 2e-3 / norm.max(2.0);
        let slope = (loss_at(step) - loss_at(-step)) / (2.0 * step);
        assert!(
            (slope - norm).abs() < 0.02 * norm,
            "{keys}: slope {slope}, gradient {norm}"
        );
    }
}

#[test]
fn an_adapted_head_cannot_stay_tied() {
    let keys = json!({
        "peft_type": "ADALORA", "total_step": 100, "target_modules": ["q_proj", "lm_head"],
        "ensure_weight_tying": true,
    });
    let config = DecoderConfig::open(&base().with_file_name("llama_tied")).expect("a config");
    let error = attach(&config, adapter(&keys).as_ref()).expect_err("refused");
    let error = error.to_string();
    assert!(error.contains("leave the head out"), "{error}");
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn mistakes_in_a_configuration_are_named() {
    let sites = |keys: Value| -> String {
        let object: Map<String, Value> = keys.as_object().expect("an object").clone();
        let config = DecoderConfig::open(&base()).expect("a config");
        let attached = PeftConfig::from_config("peft_config", &object)
            .and_then(|c| c.into_adapter("llama"))
            .and_then(|a| attach(&config, a.as_ref()).map(|_| ()));
        attached.expect_err("refused").to_string()
    };
    let cases = [
        (json!({}), "peft_type"),
        (json!({"peft_type": "VERRA"}), "VERA"),
        (json!({"peft_type": "XLORA"}), "not supported yet"),
        (json!({"peft_type": "LORA"}), "lora_r"),
        (
            json!({"peft_type": "ADALORA", "total_step": 5, "tinit": 3, "tfinal": 2}),
            "no step to cut",
        ),
        (
            json!({"peft_type": "ADALORA", "init_r": 4}),
            "ranks are only cut",
        ),
        (
            json!({"peft_type": "OFT", "oft_block_size": 8, "coft": true, "eps": -0.01}),
            "a number above 0",
        ),
        (json!({"peft_type": "ADALORA", "beta2": 1.0}), "less than 1"),
        (
            json!({"peft_type": "ADALORA", "orth_reg_weight": -0.1}),
            "0 or more",
        ),
        (
            json!({"peft_type": "ADALORA", "use_dora": true}),
            "use_dora",
        ),
        (
            json!({"peft_type": "ADALORA", "rank_pattern": {"q_proj": 3}}),
            "leave it out",
        ),
        (json!({"peft_type": "VERA", "rank": 3}), "rank"),
        (json!({"peft_type": "VERA", "r": 0}), "at least 1"),
        (json!({"peft_type": "VERA", "r": "eight"}), "a whole number"),
        (
            json!({"peft_type": "VERA", "vera_dropout": 1.5}),
            "probability",
        ),
        (json!({"peft_type": "VERA", "bias": "vera"}), "vera_only"),
        (
            json!({"peft_type": "VERA", "target_modules": ["q_prog"]}),
            "q_proj",
        ),
        (
            json!({"peft_type": "VERA", "target_modules": ["input_layernorm"]}),
            "a norm",
        ),
        (
            json!({"peft_type": "VERA", "target_modules": ["embed_tokens"]}),
            "an embedding",
        ),
        (
            json!({"peft_type": "LOHA", "rank_pattern": {"nope": 4}}),
            "nope",
        ),
        (
            json!({"peft_type": "LOKR", "decompose_factor": 0}),
            "decompose_factor",
        ),
        (
            json!({"peft_type": "LOKR", "init_weights": "zero"}),
            "lycoris",
        ),
        (
            json!({"peft_type": "LOHA", "module_dropout": 1.0}),
            "module_dropout",
        ),
        (
            json!({"peft_type": "OFT", "r": 4}),
            "add `oft_block_size: 0` for 4 blocks (left out, it is 32)",
        ),
        (
            json!({"peft_type": "OFT", "r": 0, "oft_block_size": 0}),
            "set `oft_block_size` to the size of a block, 32 by default, or `r` to their number",
        ),
        (
            json!({"peft_type": "BOFT", "boft_block_size": 0}),
            "so there are no blocks",
        ),
        (
            json!({"peft_type": "HRA", "r": 4, "apply_GS": true}),
            "set `init_weights: false`, or leave `apply_GS` out",
        ),
        (
            json!({"peft_type": 5}),
            "is 5, expected the name of a method as a string; supported: LN_TUNING",
        ),
        (
            json!({"peft_type": "BOFT", "boft_n_butterfly_factor": 40}),
            "at most",
        ),
        (
            json!({"peft_type": "BOFT", "boft_block_size": 0, "boft_block_num": 3, "boft_n_butterfly_factor": 2}),
            "must divide",
        ),
        (json!({"peft_type": "C3A", "block_size": 5}), "must divide"),
        (json!({"peft_type": "MISS", "r": 1000}), "more than"),
        (
            json!({"peft_type": "VBLORA", "vector_length": 7}),
            "must divide",
        ),
        (json!({"peft_type": "VBLORA", "topk": 300}), "num_vectors"),
        (json!({"peft_type": "ROAD", "group_size": 3}), "even"),
        (json!({"peft_type": "ROAD", "variant": "road_3"}), "road_2"),
        (
            json!({"peft_type": "FOURIERFT", "n_frequency": 1_000_000}),
            "more than",
        ),
        (
            json!({"peft_type": "IA3", "feedforward_modules": ["gate_proj"]}),
            "target_modules",
        ),
    ];
    for (keys, part) in cases {
        let message = sites(keys.clone());
        assert!(message.contains(part), "{keys}: {message}");
    }
}
