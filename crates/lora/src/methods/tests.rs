use crate::PeftConfig;
use crate::files::CONFIG_FILE;
use crate::testing::{copy_of, edit_config, edit_tensors, llama_sites};
use ferrotune_core::Result;
use ferrotune_core::adapter::{Adapter, Attachment, WeightUpdate};
use ferrotune_core::params::{FlatBuffer, ParamLayoutBuilder};
use ferrotune_kernels::parts::Draws;
use ferrotune_kernels::rng::{Stream, key_for};
use ferrotune_kernels::{Indices, Tensor};
use serde_json::{Value, json};
use std::path::Path;

/// What a run that asks for `keys` attaches to a Llama of two layers, and its parameters.
fn asked(keys: &Value) -> Result<(Vec<Attachment>, FlatBuffer)> {
    let object = keys.as_object().expect("an object");
    let adapter = PeftConfig::from_config("peft_config", object)?.into_adapter("llama")?;
    attached(adapter.as_ref())
}

fn attached(adapter: &dyn Adapter) -> Result<(Vec<Attachment>, FlatBuffer)> {
    let mut builder = ParamLayoutBuilder::new();
    let attachments = adapter.attach(&llama_sites(2), &mut builder)?;
    let attachments = attachments.into_iter().map(|(_, attachment)| attachment);
    Ok((attachments.collect(), FlatBuffer::zeros(&builder.build()?)))
}

fn loaded(directory: &Path) -> Result<(Box<dyn Adapter>, FlatBuffer)> {
    let adapter = crate::testing::load(directory)?;
    let (_, mut params) = attached(adapter.as_ref())?;
    adapter.load(&mut params, directory)?;
    Ok((adapter, params))
}

#[test]
fn dropout_of_a_file_is_kept_in_the_files_that_are_written() {
    for (case, key) in [
        ("adalora", "lora_dropout"),
        ("boft", "boft_dropout"),
        ("delora", "module_dropout"),
        ("hira", "hira_dropout"),
        ("loha", "rank_dropout"),
        ("loha", "module_dropout"),
        ("lokr", "rank_dropout"),
        ("lokr", "module_dropout"),
        ("miss", "miss_dropout"),
        ("oft", "module_dropout"),
        ("randlora", "randlora_dropout"),
        ("vblora", "vblora_dropout"),
        ("vera", "vera_dropout"),
    ] {
        let copy = copy_of(case);
        // In PEFT 1 is legal, and does nothing where nothing is trained.
        for p in [0.1, 1.0] {
            edit_config(copy.path(), key, json!(p));
            let (adapter, params) = loaded(copy.path()).expect(case);
            let written = tempfile::tempdir().expect("temporary directory");
            adapter.save(&params, written.path()).expect("saved");
            let text = std::fs::read(written.path().join(CONFIG_FILE)).expect("written");
            let config: Value = serde_json::from_slice(&text).expect("JSON");
            assert_eq!(config[key], json!(p), "{case}");
        }
        for p in [1.5, -0.1] {
            edit_config(copy.path(), key, json!(p));
            let error = loaded(copy.path()).expect_err("refused").to_string();
            assert!(
                error.contains(key) && error.contains("from 0 to 1"),
                "{error}"
            );
        }
    }
}

#[test]
fn blocks_of_one_input_load_from_a_file() {
    let copy = copy_of("boft");
    edit_config(copy.path(), "boft_block_size", json!(1));
    let adapter = crate::testing::load(copy.path()).expect("legal in a file");
    attached(adapter.as_ref()).expect("attaches");
}

#[test]
fn a_peft_type_that_is_no_text_is_refused_with_what_there_is() {
    let copy = copy_of("oft");
    edit_config(copy.path(), "peft_type", json!(5));
    let error = PeftConfig::load(copy.path())
        .expect_err("refused")
        .to_string();
    for part in [
        "`peft_type` is 5",
        "as a string",
        "supported: LORA, LN_TUNING",
        "OFT",
    ] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn dropout_that_drops_everything_is_refused_where_it_is_asked_for() {
    for (method, key) in [
        ("ADALORA", "lora_dropout"),
        ("BOFT", "boft_dropout"),
        ("LOHA", "rank_dropout"),
        ("OFT", "module_dropout"),
    ] {
        let error = asked(&json!({"peft_type": method, key: 1.0}));
        let error = error.expect_err("refused").to_string();
        assert!(
            error.contains(key) && error.contains("nothing would be trained"),
            "{error}"
        );
    }
}

#[test]
fn dropout_that_would_do_nothing_is_an_error() {
    for keys in [
        json!({"peft_type": "MISS", "init_weights": "bat", "r": 8, "miss_dropout": 0.1}),
        json!({"peft_type": "OFT", "block_share": true, "module_dropout": 0.1}),
    ] {
        let error = asked(&keys).expect_err("refused").to_string();
        assert!(error.contains("_dropout"), "{error}");
    }
}

/// q is 32 x 32, v 16 x 32.
#[test]
fn a_rank_above_a_weight_is_refused_where_it_is_asked_for() {
    for (keys, part) in [
        (
            json!({"peft_type": "LOHA", "r": 33}),
            "`r`: is 33, but the weight of",
        ),
        (
            json!({"peft_type": "LOHA", "r": 4, "rank_pattern": {"v_proj": 33}}),
            "`rank_pattern`: gives `v_proj` 33, but the weight of `model.layers.0.self_attn.v_proj` is 16 x 32",
        ),
        (
            json!({"peft_type": "HIRA", "r": 33}),
            "or a `rank_pattern` for this module",
        ),
        (
            json!({"peft_type": "DELORA", "r": 33}),
            "or a `rank_pattern` for this module",
        ),
        (
            json!({"peft_type": "VBLORA", "r": 33, "vector_length": 8}),
            "take a smaller one",
        ),
        (
            json!({"peft_type": "ADALORA", "init_r": 33}),
            "`init_r`: is 33, but the weight of",
        ),
        (json!({"peft_type": "HRA", "r": 33}), "32 inputs"),
        (
            json!({"peft_type": "HRA", "r": 32, "apply_GS": true, "init_weights": false}),
            "nothing can be learned; take at most 31, or leave `apply_GS` out",
        ),
        (
            json!({"peft_type": "OFT", "oft_block_size": 0, "r": 33}),
            "rotate nothing",
        ),
        (
            json!({"peft_type": "BOFT", "boft_block_size": 1}),
            "`boft_block_size`: is 1, which makes blocks of one of the 32 inputs of",
        ),
        (
            json!({"peft_type": "BOFT", "boft_block_size": 0, "boft_block_num": 32}),
            "`boft_block_num`: is 32, which makes blocks of one of the 32 inputs of",
        ),
    ] {
        let mut keys = keys;
        keys["target_modules"] = json!(["q_proj", "v_proj"]);
        let error = asked(&keys).expect_err("refused").to_string();
        assert!(error.contains(part), "{error}");
    }
    // As in PEFT: full factors, random directions of which any number is another, blocks of the nearest size.
    for keys in [
        json!({"peft_type": "LOKR", "r": 1000}),
        json!({"peft_type": "VERA", "r": 100}),
        json!({"peft_type": "RANDLORA", "r": 100}),
        json!({"peft_type": "OFT", "oft_block_size": 100}),
        json!({"peft_type": "HRA", "r": 32}),
        json!({"peft_type": "HRA", "r": 31, "apply_GS": true}),
        json!({"peft_type": "LOHA", "r": 32}),
    ] {
        let mut keys = keys;
        keys["target_modules"] = json!(["q_proj", "v_proj"]);
        asked(&keys).expect("attaches");
    }
}

#[test]
fn an_adapter_of_peft_loads_whatever_its_rank() {
    let factors = |directory: &Path, rank: usize| {
        edit_tensors(directory, |tensors| {
            for (name, (shape, values)) in tensors {
                let axis = usize::from(!name.ends_with("_b") && !name.ends_with("_A"));
                shape[axis] = rank;
                *values = vec![0.25; shape[0] * shape[1]];
            }
        });
        edit_config(directory, "r", json!(rank));
    };
    for case in ["loha", "hira", "hra"] {
        let copy = copy_of(case);
        factors(copy.path(), 90);
        let (_, params) = loaded(copy.path()).expect(case);
        assert!(params.as_slice().contains(&0.25));
    }
    // Blocks of one input, as PEFT makes them of more blocks than inputs.
    let copy = copy_of("oft");
    edit_config(copy.path(), "r", json!(100));
    edit_config(copy.path(), "oft_block_size", json!(0));
    edit_tensors(copy.path(), |tensors| {
        for (name, (shape, values)) in tensors {
            let inputs = if name.contains("down_proj") { 64 } else { 32 };
            (*shape, *values) = (vec![inputs, 0], Vec::new());
        }
    });
    loaded(copy.path()).expect("oft");
}

/// PEFT 0.21.2 gives every module the rank `r` and writes the pattern all the same.
#[test]
fn ranks_of_hira_are_those_of_its_file() {
    let copy = copy_of("hira");
    let (_, before) = loaded(copy.path()).expect("fixture");
    edit_config(
        copy.path(),
        "rank_pattern",
        json!({"v_proj": 2, "nothing": 3}),
    );
    let (adapter, params) = loaded(copy.path()).expect("as PEFT reads it");
    assert_eq!(params.as_slice(), before.as_slice());
    let again = tempfile::tempdir().expect("temporary directory");
    adapter.save(&params, again.path()).expect("saved");
    let (_, again) = loaded(again.path()).expect("ours");
    assert_eq!(again.as_slice(), before.as_slice());
}

/// The updates of the first target over many steps, on average and one by one.
fn drawn(keys: &Value) -> (Vec<f32>, Vec<f64>, Vec<Vec<f32>>) {
    let mut keys = keys.clone();
    keys["target_modules"] = json!(["q_proj"]);
    keys["init_weights"] = json!(false);
    let (attachments, mut params) = asked(&keys).expect("attaches");
    let mut random = Stream::new(key_for(1, "parameters"));
    let values = params.as_mut_slice().iter_mut();
    values.for_each(|value| *value = (0.3 * random.normal()) as f32);
    let Attachment::Weight(update) = &attachments[0] else {
        panic!("a change of the weight")
    };
    let weight: Vec<f32> = (0..32 * 32).map(|_| random.normal() as f32).collect();
    let apply = |update: &dyn WeightUpdate| {
        let mut w = Tensor::from_f32(weight.clone(), 32, 32);
        update.apply(&params, w.view_mut()).expect("applied");
        let values = w.to_f32_vec();
        let change = values.iter().zip(&weight).map(|(after, w)| after - w);
        change.collect::<Vec<f32>>()
    };
    let whole = apply(update.as_ref());
    let steps = 4000_u32;
    let mut mean = vec![0.0_f64; whole.len()];
    let mut first = Vec::new();
    for step in 0..steps {
        let table = Indices::host(vec![step]);
        let draws = Draws {
            key: key_for(1, "step"),
            steps: &table,
        };
        let of_step = update.drawn(draws).expect("drawn");
        let of_step = of_step.expect("something is dropped");
        let change = apply(of_step.as_ref());
        let sums = mean.iter_mut().zip(&change);
        sums.for_each(|(sum, c)| *sum += f64::from(*c) / f64::from(steps));
        if step < 3 {
            first.push(change);
        }
    }
    (whole, mean, first)
}

#[test]
fn on_average_over_steps_as_much_is_left_as_the_probabilities_say() {
    for (keys, left) in [
        (
            json!({"peft_type": "LOHA", "r": 3, "rank_dropout": 0.4}),
            1.0,
        ),
        (
            json!({"peft_type": "LOHA", "r": 3, "module_dropout": 0.3}),
            0.7,
        ),
        (
            json!({"peft_type": "LOHA", "r": 3, "rank_dropout": 0.4, "module_dropout": 0.3}),
            0.7,
        ),
        (
            json!({"peft_type": "LOKR", "r": 3, "rank_dropout": 0.4}),
            0.6,
        ),
        (
            json!({"peft_type": "LOKR", "r": 3, "rank_dropout": 0.4, "rank_dropout_scale": true}),
            1.0,
        ),
        // Three of eight blocks.
        (
            json!({"peft_type": "OFT", "oft_block_size": 4, "module_dropout": 0.45}),
            0.625,
        ),
    ] {
        let (whole, mean, first) = drawn(&keys);
        let size: f64 = whole.iter().map(|w| f64::from(*w).powi(2)).sum();
        let along: f64 = whole
            .iter()
            .zip(&mean)
            .map(|(w, m)| f64::from(*w) * m)
            .sum();
        assert!(
            (along / size - left).abs() < 0.03,
            "{keys}: {} is left",
            along / size
        );
        let apart = whole
            .iter()
            .zip(&mean)
            .map(|(w, m)| (left * f64::from(*w) - m).powi(2));
        let apart = (apart.sum::<f64>() / size).sqrt();
        assert!(apart < 0.05, "{keys}: {apart} away");
        assert!(
            first[0] != first[1] || first[1] != first[2],
            "{keys}: the same in every step"
        );
    }
}
