//! Parts of the base beside a method: names, files, and what is wrong with them.

use crate::PeftConfig;
use crate::inspect::difference;
use crate::testing::{copy_of, edit_tensors, golden};
use ferrotune_core::adapter::{Adapter, Site};
use ferrotune_core::model::{DecoderConfig, ModelPlan};
use ferrotune_core::params::{FlatBuffer, ParamLayoutBuilder};
use serde_json::{Value, json};
use std::path::Path;

/// A recorded adapter with parts of its base, and that base.
const CASES: [(&str, &str); 10] = [
    ("adalora_saved_kept_tied", "tiny_gemma"),
    ("boft_bias_all", "tiny_qwen2"),
    ("fourierft_gpt2_bias_all_saved", "tiny_gpt2"),
    ("hra_saved", "tiny_llama_att_mlp"),
    ("ia3_saved_tied", "tiny_gemma"),
    ("loha_saved", "tiny_llama_att_mlp"),
    ("miss_bias_only", "tiny_llama_att_mlp"),
    ("oft_saved_head", "tiny_gemma"),
    ("vblora_bias_only", "tiny_llama_att_mlp"),
    ("vera_saved", "tiny_llama_att_mlp"),
];

fn sites(base: &str) -> Vec<Site> {
    let config = DecoderConfig::open(&golden("_bases").join(base)).expect("fixture");
    ModelPlan::new(&config).sites
}

/// The adapter in `directory` on a model of `sites`, its tensors not read.
fn attached(directory: &Path, sites: &[Site]) -> (Box<dyn Adapter>, FlatBuffer) {
    let adapter = crate::testing::load(directory).expect("fixture");
    let mut params = ParamLayoutBuilder::new();
    adapter.attach(sites, &mut params).expect("attaches");
    let params = FlatBuffer::zeros(&params.build().expect("unique names"));
    (adapter, params)
}

#[test]
fn what_peft_saved_beside_a_method_is_written_again_under_the_same_names() {
    for (case, base) in CASES {
        let theirs = golden(case).join("adapter");
        let (adapter, mut params) = attached(&theirs, &sites(base));
        adapter.load(&mut params, &theirs).expect("PEFT's file");
        let copy = tempfile::tempdir().expect("temporary directory");
        adapter
            .save(&params, copy.path())
            .expect("saved and read back");
        let found = difference(copy.path(), &theirs).expect("both read");
        assert!(found.only_first.is_empty(), "{case}: {found:?}");
        // PEFT repeats biases of whole modules where it saves all biases.
        let is_copy = |name: &String| {
            name.contains(".modules_to_save.") || name.contains(".original_module.")
        };
        assert!(found.only_second.iter().all(is_copy), "{case}: {found:?}");
        assert!(
            found.relative.iter().all(|(_, r)| *r == Some(0.0)),
            "{case}: {found:?}"
        );
        let says = ["bias", "modules_to_save", "ensure_weight_tying"];
        let other = |(key, ours, theirs): &&(String, Value, Value)| {
            let is_off = |value: &Value| value.is_null() || *value == json!(false);
            says.contains(&key.as_str()) && !(is_off(ours) && is_off(theirs))
        };
        let other = found.config.iter().find(other);
        assert!(other.is_none(), "{case}: {other:?}");
    }
}

#[test]
fn initial_values_are_those_of_the_method_alone() {
    for (case, base) in CASES {
        let theirs = golden(case).join("adapter");
        let (adapter, mut params) = attached(&theirs, &sites(base));
        let layout = params.layout().clone();
        params.as_mut_slice().fill(7.0);
        adapter.init(&mut params, 3).expect("starts");
        let of_base = |name: &str| {
            let module = name.strip_prefix("base_model.model.").unwrap_or_default();
            let module = module.rsplit_once('.').map_or("", |(module, _)| module);
            let module = module.strip_suffix(".base_layer").unwrap_or(module);
            sites(base).iter().any(|site| site.name == module)
                && (name.ends_with(".weight") || name.ends_with(".bias"))
        };
        let mut count = 0;
        for (id, segment) in layout.by_name() {
            let kept = params.get(id).iter().all(|value| *value == 7.0);
            assert_eq!(
                kept,
                of_base(&segment.spec.name),
                "{case}: {}",
                segment.spec.name
            );
            count += usize::from(kept);
        }
        assert!(count > 0, "{case} trains nothing of the base");
    }
}

#[test]
fn a_part_of_the_base_that_is_missing_or_repeated_otherwise_is_named() {
    let head = "base_model.model.lm_head.weight";
    let copy = copy_of("vera_saved");
    let (adapter, mut params) = attached(copy.path(), &sites("tiny_llama_att_mlp"));
    edit_tensors(copy.path(), |tensors| drop(tensors.remove(head)));
    let error = adapter.load(&mut params, copy.path()).expect_err("refused");
    assert!(error.to_string().contains(head), "{error}");

    // PEFT has biases of whole modules under two more names: that of the base, and that of the trained one.
    let copy = copy_of("fourierft_gpt2_bias_all_saved");
    let name = "base_model.model.transformer.ln_f.modules_to_save.bias";
    edit_tensors(copy.path(), |tensors| {
        tensors.get_mut(name).expect("recorded").1[0] += 1.0;
    });
    let (adapter, mut params) = attached(copy.path(), &sites("tiny_gpt2"));
    let error = adapter.load(&mut params, copy.path()).expect_err("refused");
    assert!(error.to_string().contains(name), "{error}");

    let copy = copy_of("adalora_saved_kept_tied");
    edit_tensors(copy.path(), |tensors| {
        tensors.get_mut(head).expect("recorded").1[0] += 1.0;
    });
    let (adapter, mut params) = attached(copy.path(), &sites("tiny_gemma"));
    let error = adapter.load(&mut params, copy.path()).expect_err("refused");
    let error = error.to_string();
    assert!(
        error.contains(head) && error.contains("embed_tokens"),
        "{error}"
    );
}

/// As in PEFT, where the method's own name is no more than a habit.
#[test]
fn whatever_ends_with_only_means_the_biases_of_targets() {
    let read = |peft_type: &str, bias: Value| {
        let keys = json!({"peft_type": peft_type, "bias": bias});
        let object = keys.as_object().expect("an object").clone();
        PeftConfig::from_config("peft_config", &object).map(drop)
    };
    for (peft_type, bias) in [
        ("BOFT", json!("lora_only")),
        ("MISS", json!("miss_only")),
        ("LOHA", json!("none")),
        ("ROAD", Value::Null),
    ] {
        read(peft_type, bias).expect(peft_type);
    }
    for (peft_type, bias) in [
        ("BOFT", json!("boft-only")),
        ("HIRA", json!("hira_only")),
        ("LOKR", json!("all")),
        ("OFT", json!("")),
        ("C3A", json!(["all"])),
    ] {
        let error = read(peft_type, bias).expect_err(peft_type).to_string();
        assert!(error.contains("peft_config.bias"), "{error}");
    }
}
