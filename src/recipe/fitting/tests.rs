//! Every suggestion is applied, the run prepared again, and the check that refused it repeated.

use super::super::memory::{self, Base, Needs};
use super::{Recipe, Rows, SPARE, adapter, changes};
use ferrotune_core::config::TrainConfig;
use ferrotune_core::{Error, Result};
use std::path::Path;

/// The demo's model and rows, with `keys` as well; nothing is written to `output_dir`.
fn prepared(output: &Path, keys: &[(String, String)]) -> Recipe {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/demo");
    // A method of its own has its targets among its own keys.
    let targets = match keys.iter().any(|(key, _)| key == "peft_config") {
        true => "",
        false => "lora_target_modules: all-linear\n",
    };
    let yaml = format!(
        "model_name_or_path: {0}/base\ntrain_file: {0}/test.jsonl\noutput_dir: {1}\n{targets}",
        demo.display(),
        output.display()
    );
    let config = TrainConfig::from_yaml(&yaml, "test.yaml", keys).expect("valid");
    Recipe::prepare(config).expect("sound")
}

fn pairs(keys: &[(&str, &str)]) -> Vec<(String, String)> {
    let pairs = keys.iter();
    pairs.map(|(k, v)| ((*k).into(), (*v).into())).collect()
}

fn attached(recipe: &Recipe) -> adapter::Attached {
    adapter::attach(&recipe.config, &recipe.base, &recipe.decoder).expect("attaches")
}

fn needs(recipe: &Recipe) -> Needs {
    let attached = attached(recipe);
    Base::of(recipe).needs(&recipe.config, &attached, Some(&recipe.workload))
}

fn check_against(recipe: &Recipe, available: u64) -> Result<()> {
    memory::plan(recipe, &attached(recipe), available).map(|_| ())
}

fn changes_of(recipe: &Recipe, available: u64) -> Vec<String> {
    let (rows, attached) = (Rows::of(recipe), attached(recipe));
    let base = Base::of(recipe);
    changes(
        &recipe.config,
        base,
        Some(&attached),
        Some(&rows),
        available,
    )
}

/// `a: 1 with b: 2` as overrides.
fn parsed(suggestion: &str) -> Vec<(String, String)> {
    let pair = |text: &str| {
        let (key, value) = text.split_once(": ").expect("a pair");
        (key.to_owned(), value.to_owned())
    };
    suggestion.split(" with ").map(pair).collect()
}

/// Suggestions for a machine with `share` of the bytes that activations take, each of them tried.
fn suggestions_that_fit(keys: &[(&str, &str)], share: f64) -> Vec<Vec<(String, String)>> {
    let root = tempfile::tempdir().expect("temporary directory");
    let keys = pairs(keys);
    let recipe = prepared(root.path(), &keys);
    let needs = needs(&recipe);
    let room = (needs.activations as f64 * share) as u64;
    let available = needs.weights + needs.trained + room;
    assert!(matches!(
        check_against(&recipe, available),
        Err(Error::Memory { .. })
    ));
    let suggested: Vec<_> = changes_of(&recipe, available)
        .iter()
        .map(|text| parsed(text))
        .collect();
    for changes in &suggested {
        let smaller = prepared(root.path(), &[keys.as_slice(), changes].concat());
        check_against(&smaller, available).unwrap_or_else(|e| panic!("{changes:?}: {e}"));
    }
    suggested
}

/// The value suggested for `key` alone.
fn alone<'a>(suggested: &'a [Vec<(String, String)>], key: &str) -> Option<&'a str> {
    suggested
        .iter()
        .find_map(|changes| match changes.as_slice() {
            [(name, value)] if name == key => Some(value.as_str()),
            _ => None,
        })
}

#[test]
fn a_rank_pattern_that_costs_too_much_is_named() {
    let root = tempfile::tempdir().expect("temporary directory");
    let keys = pairs(&[
        ("use_peft", "true"),
        ("lora_r", "2"),
        ("lora_rank_pattern", "{q_proj: 128, v_proj: 1}"),
    ]);
    let recipe = prepared(root.path(), &keys);
    let needs = needs(&recipe);
    let available = needs.total() - needs.trained / 2;
    let suggested = changes_of(&recipe, available);
    let lower: Vec<_> = suggested
        .iter()
        .filter(|text| text.starts_with("lora_rank_pattern: "))
        .collect();
    let [lower] = lower[..] else {
        panic!("{suggested:?}");
    };
    assert!(lower.contains("\"v_proj\":1"), "{lower}");
    let smaller = prepared(root.path(), &[keys, parsed(lower)].concat());
    check_against(&smaller, available).expect("fits");
}

#[test]
fn single_changes_fit_and_are_as_large_as_can_be() {
    let lora = [
        ("use_peft", "true"),
        ("per_device_train_batch_size", "64"),
        ("per_device_eval_batch_size", "1"),
    ];
    let suggested = suggestions_that_fit(&lora, 0.9);
    let batch = alone(&suggested, "per_device_train_batch_size").expect("suggested");
    // Rows are of nearly one length: 0.9 of 64 is 57, less the spare.
    let batch: usize = batch.parse().expect("a number");
    assert!((48..=57).contains(&batch), "{batch}");
    for key in ["max_length", "bf16"] {
        assert!(alone(&suggested, key).is_some(), "{key}: {suggested:?}");
    }
}

#[test]
fn a_base_that_is_too_large_is_suggested_4_bits() {
    let root = tempfile::tempdir().expect("temporary directory");
    let keys = pairs(&[("use_peft", "true"), ("per_device_train_batch_size", "1")]);
    let recipe = prepared(root.path(), &keys);
    let small = [keys.clone(), pairs(&[("load_in_4bit", "true")])].concat();
    let small = needs(&prepared(root.path(), &small));
    let all = needs(&recipe);
    assert!(small.total() < all.total() && small.weights < all.weights / 2);
    let available = small.total() + small.total() / 8;
    let suggested: Vec<_> = changes_of(&recipe, available);
    assert!(
        suggested.contains(&"load_in_4bit: true".to_owned()),
        "{suggested:?}"
    );
}

#[test]
fn packed_rows_are_suggested_shorter_blocks() {
    let packed = [
        ("use_peft", "true"),
        ("packing", "true"),
        ("max_length", "256"),
        ("per_device_train_batch_size", "4"),
        ("per_device_eval_batch_size", "1"),
    ];
    for strategy in ["bfd", "bfd_split"] {
        let keys = [&packed[..], &[("packing_strategy", strategy)]].concat();
        let suggested = suggestions_that_fit(&keys, 0.6);
        let length = alone(&suggested, "max_length").expect("suggested");
        let length: usize = length.parse().expect("a number");
        assert!((96..=154).contains(&length), "{length}");
    }
}

/// Of 32 virtual tokens before each document, a smaller batch has fewer.
#[test]
fn virtual_tokens_of_a_prompt_count() {
    for packing in ["false", "true"] {
        let prompt = [
            ("use_peft", "true"),
            (
                "peft_config",
                "{peft_type: PROMPT_TUNING, num_virtual_tokens: 32}",
            ),
            ("packing", packing),
            ("max_length", "128"),
            ("per_device_train_batch_size", "16"),
            ("per_device_eval_batch_size", "1"),
        ];
        let suggested = suggestions_that_fit(&prompt, 0.6);
        let batch = alone(&suggested, "per_device_train_batch_size");
        assert!(batch.is_some(), "{packing}: {suggested:?}");
    }
}

#[test]
fn full_fine_tuning_is_suggested_an_adapter() {
    let keys = [("use_peft", "false"), ("per_device_train_batch_size", "2")];
    let suggested = suggestions_that_fit(&keys, 0.3);
    assert_eq!(alone(&suggested, "use_peft"), Some("true"));
}

#[test]
fn several_keys_together_are_suggested_where_none_alone_is_enough() {
    let root = tempfile::tempdir().expect("temporary directory");
    // Nothing is left to gain by 4 bits or a lower rank.
    let keys = pairs(&[
        ("use_peft", "true"),
        ("lora_r", "1"),
        ("load_in_4bit", "true"),
        ("per_device_train_batch_size", "8"),
        ("per_device_eval_batch_size", "1"),
    ]);
    let half = [keys.clone(), pairs(&[("bf16", "true")])].concat();
    let one = pairs(&[("per_device_train_batch_size", "1")]);
    let recipe = prepared(root.path(), &keys);
    let smallest = needs(&prepared(root.path(), &[half, one].concat()));
    // Room for one row in bf16 with what a suggestion leaves free, and for its weights in bf16 only.
    let available = smallest.total() + smallest.total() / (SPARE - 1) + SPARE;
    let suggested = changes_of(&recipe, available);
    assert_eq!(suggested.len(), 1, "{suggested:?}");
    let changes = parsed(&suggested[0]);
    assert!(
        changes.len() > 1 && suggested[0].contains("bf16: true"),
        "{suggested:?}"
    );
    let smaller = prepared(root.path(), &[keys, changes].concat());
    assert!(check_against(&smaller, available).is_ok());
}

#[test]
fn nothing_is_suggested_where_nothing_fits() {
    let root = tempfile::tempdir().expect("temporary directory");
    let recipe = prepared(root.path(), &pairs(&[("use_peft", "true")]));
    assert!(changes_of(&recipe, 1000).is_empty());
    let message = check_against(&recipe, 1000)
        .expect_err("too little")
        .to_string();
    assert!(message.contains("smaller model"), "{message}");
}
