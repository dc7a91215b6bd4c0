use super::{Combination, CombineOptions, MajoritySign, combine};
use crate::files::CONFIG_FILE;
use crate::inspect::read::Adapter;
use crate::names::{self, Part};
use ferrotune_core::io::TensorData;
use ferrotune_kernels::rng::{Stream, key_for};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const MODULES: [(&str, usize, usize); 2] = [
    ("model.layers.0.self_attn.q_proj", 12, 8),
    ("model.layers.0.mlp.down_proj", 8, 20),
];

/// An adapter of random factors over the first `modules` modules.
fn write(directory: &Path, seed: u64, rank: usize, modules: usize, changes: &Value) {
    let mut values: BTreeMap<String, (Vec<usize>, Vec<f32>)> = BTreeMap::new();
    for (module, out, inputs) in &MODULES[..modules] {
        for (part, shape) in [(Part::A, [rank, *inputs]), (Part::B, [*out, rank])] {
            let name = names::tensor(module, part);
            let mut stream = Stream::new(key_for(seed, &name));
            let draw = (0..shape[0] * shape[1]).map(|_| stream.normal() as f32);
            values.insert(name, (shape.to_vec(), draw.collect()));
        }
    }
    let mut config = json!({
        "peft_type": "LORA", "r": rank, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
    });
    let object = config.as_object_mut().expect("an object");
    object.extend(changes.as_object().expect("an object").clone());
    let tensors = values
        .iter()
        .map(|(name, (shape, values))| (name.clone(), TensorData::from_f32(values, shape.clone())));
    crate::files::write(directory, &tensors.collect(), &config.to_string()).expect("writable");
}

/// `scale * B A` of every module.
fn updates(directory: &Path) -> BTreeMap<String, Vec<f64>> {
    let adapter = Adapter::read(directory).expect("an adapter");
    let update = |f: &crate::inspect::read::Factors| {
        let [out, inputs] = f.shape;
        let at = |i: usize, j: usize| {
            let terms = (0..f.rank).map(|k| f64::from(f.b[i * f.rank + k] * f.a[k * inputs + j]));
            f64::from(f.scale) * terms.sum::<f64>()
        };
        (0..out)
            .flat_map(|i| (0..inputs).map(move |j| (i, j)))
            .map(|(i, j)| at(i, j))
            .collect()
    };
    let each = adapter.updates.iter();
    each.map(|(name, factors)| (name.clone(), update(factors)))
        .collect()
}

fn relative_error(a: &[f64], b: &[f64]) -> f64 {
    let square = |v: f64| v * v;
    let apart: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
    (apart / b.iter().map(|b| square(*b)).sum::<f64>()).sqrt()
}

struct Bench {
    place: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let place = tempfile::tempdir().expect("temporary directory");
        let bench = Self { place };
        write(&bench.path("a"), 1, 3, 2, &json!({}));
        write(&bench.path("b"), 2, 2, 1, &json!({"use_rslora": true}));
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    fn both(&self) -> [(PathBuf, f64); 2] {
        [(self.path("a"), 0.75), (self.path("b"), -1.5)]
    }
}

#[test]
fn sums_are_of_what_adapters_change() {
    let bench = Bench::new();
    let [a, b] = ["a", "b"].map(|name| updates(&bench.path(name)));
    for combination in [Combination::Cat, Combination::Linear] {
        let options = CombineOptions {
            combination,
            ..CombineOptions::default()
        };
        let report = combine(&bench.both(), &bench.path("sum"), &options).expect("combines");
        // The second adapter has one module, the first both.
        let ranks: Vec<usize> = report.modules.iter().map(|m| m.rank).collect();
        assert_eq!(ranks, [3, 5], "{combination:?}");
        for (name, ours) in updates(&bench.path("sum")) {
            let none = vec![0.0; ours.len()];
            let of_b = b.get(&name).unwrap_or(&none);
            let sum = a[&name].iter().zip(of_b).map(|(a, b)| 0.75 * a - 1.5 * b);
            let error = relative_error(&ours, &sum.collect::<Vec<f64>>());
            assert!(error < 1e-6, "{combination:?} of {name}: {error}");
        }
    }
}

#[test]
fn a_rank_that_no_module_can_have_is_refused() {
    let bench = Bench::new();
    // q is 12 x 8 with ranks 3 and 2, down 8 x 20 with rank 3.
    for (combination, most, why) in [
        (Combination::Linear, 5, "add up to 5"),
        (Combination::Svd, 5, "add up to 5"),
        (Combination::Cat, 5, "add up to 5"),
        (Combination::Ties, 8, "is 12 x 8"),
    ] {
        let combined = |rank| {
            let options = CombineOptions {
                combination,
                rank: Some(rank),
                ..CombineOptions::default()
            };
            combine(&bench.both(), &bench.path("sum"), &options)
        };
        let error = combined(most + 1).expect_err("refused").to_string();
        let parts = [
            format!("`rank`: is {}", most + 1),
            format!("above {most}"),
            format!("take {most} or less"),
            why.to_owned(),
        ];
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        assert!(!bench.path("sum").exists());
        let report = combined(most).expect("combines");
        let largest = report.modules.iter().map(|module| module.rank).max();
        assert_eq!(largest, Some(most), "{combination:?}");
        std::fs::remove_dir_all(bench.path("sum")).expect("written");
    }
}

#[test]
fn a_rank_leaves_out_what_it_says() {
    let bench = Bench::new();
    let options = CombineOptions {
        combination: Combination::Svd,
        rank: Some(2),
        ..CombineOptions::default()
    };
    let one = [(bench.path("a"), 1.0)];
    let report = combine(&one, &bench.path("cut"), &options).expect("combines");
    let (whole, cut) = (updates(&bench.path("a")), updates(&bench.path("cut")));
    for module in &report.modules {
        assert_eq!(module.rank, 2);
        let error = relative_error(&cut[&module.name], &whole[&module.name]);
        assert!(error > 0.01, "the third direction matters");
        assert!(
            (error - module.relative_error).abs() < 1e-6,
            "{module:?}, {error}"
        );
    }
    assert!(report.worst().expect("two modules").relative_error > 0.01);
}

#[test]
fn pruning_leaves_the_share_it_is_told() {
    let bench = Bench::new();
    for combination in [
        Combination::MagnitudePrune,
        Combination::Ties,
        Combination::DareLinear,
        Combination::DareTies,
    ] {
        let options = CombineOptions {
            combination,
            rank: Some(8),
            density: 0.4,
            majority_sign: MajoritySign::Frequency,
            ..CombineOptions::default()
        };
        let one = [(bench.path("a"), 1.0)];
        let [first, second] = ["first", "second"].map(|name| {
            combine(&one, &bench.path(name), &options).expect("combines");
            updates(&bench.path(name))
        });
        assert_eq!(first, second, "{combination:?} depends on the seed alone");
        // Of rank 8 of 8 nothing is lost, so zeros stay zeros.
        for (name, update) in first {
            let kept = update.iter().filter(|v| v.abs() > 1e-5).count() as f64;
            let share = kept / update.len() as f64;
            assert!(
                (share - 0.4).abs() < 0.15,
                "{combination:?} of {name}: {share}"
            );
        }
    }
}

#[test]
fn what_has_no_sum_is_refused_and_nothing_is_written() {
    let bench = Bench::new();
    write(&bench.path("dora"), 3, 2, 1, &json!({"use_dora": true}));
    write(
        &bench.path("whole"),
        3,
        2,
        1,
        &json!({"modules_to_save": ["norm"]}),
    );
    write(
        &bench.path("pissa"),
        3,
        2,
        1,
        &json!({"init_lora_weights": "pissa"}),
    );
    let config = bench.path("vera").join(CONFIG_FILE);
    std::fs::create_dir(bench.path("vera")).expect("writable");
    std::fs::write(
        &config,
        r#"{"peft_type": "IA3", "target_modules": ["q_proj"]}"#,
    )
    .expect("writable");
    let cases = [
        ("dora", "use_dora"),
        ("whole", "modules_to_save"),
        ("pissa", "pissa"),
        ("missing", "missing"),
    ];
    let output = bench.path("out");
    for (name, part) in cases {
        let adapters = [(bench.path("a"), 1.0), (bench.path(name), 1.0)];
        let error = combine(&adapters, &output, &CombineOptions::default());
        let error = error.expect_err("refused").to_string();
        assert!(error.contains(part), "{name}: {error}");
        assert!(!output.exists(), "{name} left something");
    }
    let bad = |change: fn(&mut CombineOptions)| {
        let mut options = CombineOptions::default();
        change(&mut options);
        let error = combine(&bench.both(), &output, &options);
        error.expect_err("refused").to_string()
    };
    assert!(bad(|o| o.density = 0.0).contains("density"));
    assert!(bad(|o| o.rank = Some(0)).contains("rank"));
    assert!(bad(|o| o.arithmetic = super::Arithmetic::AsPeft).contains("rank 3"));
    assert!(
        Combination::from_name("tie")
            .expect_err("unknown")
            .contains("ties")
    );
}

#[test]
fn what_was_tied_is_two_updates_of_one_value_from_then_on() {
    let tied = crate::testing::golden("lora_gemma_tied_both").join("adapter");
    let output = tempfile::tempdir().expect("temporary directory");
    let options = CombineOptions::default();
    combine(&[(tied.clone(), 1.0)], output.path(), &options).expect("combined");
    let config = std::fs::read(output.path().join(CONFIG_FILE)).expect("written");
    let config: Value = serde_json::from_slice(&config).expect("JSON");
    assert!(config.get("ensure_weight_tying").is_none(), "{config}");
    let targets = config["target_modules"].as_array().expect("a list");
    for module in ["lm_head", "model.embed_tokens"] {
        assert!(targets.contains(&json!(module)), "{config}");
    }
    let (before, after) = (updates(&tied), updates(output.path()));
    assert!(before.contains_key("lm_head") && before.len() == after.len());
    for (module, update) in &before {
        let error = relative_error(&after[module], update);
        assert!(error < 1e-6, "{module}: {error:e}");
    }
}
