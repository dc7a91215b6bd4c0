use super::{adapter, difference};
use crate::testing::{copy_of, edit_config, golden};
use ferrotune_core::io::{self, FileDType, SafetensorsFile, TensorData};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

#[test]
fn norms_of_updates_are_those_that_merging_reports() {
    for (case, base) in [
        ("lora_all_linear", "llama"),
        ("lora_embed_target", "llama"),
        ("lora_rank_alpha_pattern", "llama"),
    ] {
        let root = tempfile::tempdir().expect("temporary directory");
        let (directory, base) = (golden(case).join("adapter"), golden("_bases").join(base));
        let output = root.path().join("merged");
        let options = crate::MergeOptions::default();
        let merged = crate::merge(&base, &directory, &output, &options).expect("merges");
        let facts = adapter(&directory).expect("fixture");
        assert_eq!(facts.updates.len(), merged.tensors.len(), "{case}");
        for update in &facts.updates {
            let name = format!("{}.weight", update.module);
            let tensor = merged.tensors.iter().find(|t| t.name == name);
            let norm = tensor.expect("merged").delta_norm;
            assert!((update.norm / norm - 1.0).abs() < 1e-5, "{case} {name}");
            let rank = update.rank as f64;
            assert!(update.effective_rank > 1.0 && update.effective_rank <= rank + 1e-9);
            assert_eq!(update.not_finite, 0);
        }
    }
}

#[test]
fn what_is_no_update_is_listed_as_it_is() {
    let facts = adapter(&golden("lora_trainable_tokens/adapter")).expect("fixture");
    let [rows] = &facts.tensors[..] else {
        panic!("{:?}", facts.tensors)
    };
    assert!(rows.name.ends_with("trainable_tokens_delta") && rows.norm > 0.0);
    assert_eq!(
        (rows.shape.as_slice(), facts.updates.len()),
        (&[3, 32][..], 4)
    );
}

fn edit(directory: &Path, name: &str, change: impl Fn(&mut Vec<f32>)) {
    let path = directory.join("adapter_model.safetensors");
    let file = SafetensorsFile::open(&path).expect("copied");
    let read = |tensor: &str| {
        let shape = file.meta(tensor).expect("named").shape.clone();
        let mut values = file.read_f32(tensor).expect("copied");
        if tensor == name {
            change(&mut values);
        }
        let data = TensorData {
            dtype: FileDType::F32,
            shape,
            bytes: Cow::Owned(bytemuck::cast_slice(&values).to_vec()),
        };
        (tensor.to_owned(), data)
    };
    let tensors: BTreeMap<_, _> = file.names().map(read).collect();
    io::write_safetensors(&path, &tensors, &BTreeMap::new()).expect("writable");
}

const B0: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight";

#[test]
fn values_that_are_not_finite_are_counted_and_named_by_their_module() {
    let copy = copy_of("lora_qv");
    edit(copy.path(), B0, |values| values[3] = f32::NAN);
    let facts = adapter(copy.path()).expect("read whatever it holds");
    let bad: Vec<_> = facts.updates.iter().filter(|u| u.not_finite > 0).collect();
    assert_eq!(bad.len(), 1);
    assert!(bad[0].module.ends_with("layers.0.self_attn.q_proj") && bad[0].norm.is_nan());
}

#[test]
fn a_difference_names_keys_modules_and_how_far_they_are_apart() {
    let original = golden("lora_qv/adapter");
    let same = difference(&original, &original).expect("fixture");
    assert!(same.config.is_empty() && same.only_first.is_empty());
    assert!(
        same.relative
            .iter()
            .all(|(_, r)| r.is_some_and(|r| r < 1e-7))
    );

    let copy = copy_of("lora_qv");
    // Twice the B at half the scale is the same update; three times is 3/2 of it.
    edit(copy.path(), B0, |values| {
        values.iter_mut().for_each(|v| *v *= 3.0);
    });
    edit_config(copy.path(), "lora_alpha", serde_json::json!(5));
    edit_config(
        copy.path(),
        "target_modules",
        serde_json::json!(["v_proj", "q_proj"]),
    );
    let found = difference(&original, copy.path()).expect("fixture");
    assert_eq!(found.config.len(), 1, "{:?}", found.config);
    assert_eq!(found.config[0].0, "lora_alpha");
    for (module, relative) in &found.relative {
        let relative = relative.expect("same shapes");
        // 10 / r against 5 / r: half as much everywhere, 3/2 at the changed one, of the larger one.
        let expected = if module.ends_with("layers.0.self_attn.q_proj") {
            1.0 / 3.0
        } else {
            0.5
        };
        assert!((relative - expected).abs() < 1e-5, "{module}: {relative}");
    }
    let other = difference(&original, &golden("lora_trainable_tokens/adapter")).expect("fixture");
    assert!(
        other
            .only_second
            .iter()
            .any(|name| name.ends_with("trainable_tokens_delta"))
    );
}
