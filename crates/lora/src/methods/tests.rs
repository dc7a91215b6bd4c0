use crate::PeftConfig;
use crate::files::CONFIG_FILE;
use crate::testing::{copy_of, edit_config, llama_sites};
use ferrotune_core::Result;
use ferrotune_core::adapter::{Adapter, Attachment, WeightUpdate};
use ferrotune_core::params::{FlatBuffer, ParamLayoutBuilder};
use ferrotune_kernels::Tensor;
use ferrotune_kernels::rng::{Stream, key_for};
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
    let adapter = crate::load(directory, "llama")?;
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
        edit_config(copy.path(), key, json!(0.1));
        let (adapter, params) = loaded(copy.path()).expect(case);
        let written = tempfile::tempdir().expect("temporary directory");
        adapter.save(&params, written.path()).expect("saved");
        let text = std::fs::read(written.path().join(CONFIG_FILE)).expect("written");
        let config: Value = serde_json::from_slice(&text).expect("JSON");
        assert_eq!(config[key], json!(0.1), "{case}");
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
    let steps = 4000;
    let mut mean = vec![0.0_f64; whole.len()];
    let mut first = Vec::new();
    for step in 0..steps {
        let draws = Stream::new(key_for(step, "step"));
        let of_step = update.drawn(draws).expect("something is dropped");
        let change = apply(of_step.as_ref());
        let sums = mean.iter_mut().zip(&change);
        sums.for_each(|(sum, c)| *sum += f64::from(*c) / steps as f64);
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
