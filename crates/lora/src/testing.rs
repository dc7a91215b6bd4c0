//! Fixtures and sites for the tests of this crate.

use crate::{LoraAdapter, LoraConfig, PeftConfig, TargetModules};
use ferrotune_core::Result;
use ferrotune_core::adapter::{Adapter, Attachment, LowRank, Site, SiteId, SiteKind};
use ferrotune_core::io::{self, SafetensorsFile, TensorData};
use ferrotune_core::model::DecoderConfig;
use ferrotune_core::params::{FlatBuffer, ParamLayoutBuilder};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The folder of recorded adapters and bases.
pub(crate) fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/fixtures/golden/adapters")
        .join(path)
}

fn site(id: usize, name: &str, kind: SiteKind, shape: [usize; 2]) -> Site {
    Site {
        id: SiteId(id),
        name: name.into(),
        stored_name: name.into(),
        kind,
        in_features: shape[1],
        out_features: shape[0],
        bias: false,
        stored_transposed: false,
        keys: None,
        layer: name
            .split('.')
            .nth(2)
            .and_then(|segment| segment.parse().ok()),
        output_head: name == "lm_head",
        tied_to: None,
        execution_order: id,
    }
}

/// The sites of a Llama, in the order of execution, from the recorded base.
pub(crate) fn llama_sites(layers: usize) -> Vec<Site> {
    let base = SafetensorsFile::open(golden("_bases/llama/model.safetensors")).expect("fixture");
    let mut names = vec![("model.embed_tokens".to_owned(), SiteKind::Embedding)];
    for layer in 0..layers {
        for (name, kind) in [
            ("input_layernorm", SiteKind::Norm),
            ("self_attn.q_proj", SiteKind::Linear),
            ("self_attn.k_proj", SiteKind::Linear),
            ("self_attn.v_proj", SiteKind::Linear),
            ("self_attn.o_proj", SiteKind::Linear),
            ("post_attention_layernorm", SiteKind::Norm),
            ("mlp.gate_proj", SiteKind::Linear),
            ("mlp.up_proj", SiteKind::Linear),
            ("mlp.down_proj", SiteKind::Linear),
        ] {
            names.push((format!("model.layers.{layer}.{name}"), kind));
        }
    }
    names.push(("model.norm".into(), SiteKind::Norm));
    names.push(("lm_head".into(), SiteKind::Linear));
    names
        .iter()
        .enumerate()
        .map(|(id, (name, kind))| {
            // Every layer has the shapes of the recorded base's first.
            let like = name
                .splitn(4, '.')
                .nth(3)
                .map_or(name.clone(), |end| format!("model.layers.0.{end}"));
            let shape = &base.meta(&format!("{like}.weight")).expect("fixture").shape;
            site(
                id,
                name,
                *kind,
                [shape[0], shape.get(1).copied().unwrap_or(1)],
            )
        })
        .collect()
}

/// `target_modules` as a list.
pub(crate) fn list(names: &[&str]) -> Option<TargetModules> {
    Some(TargetModules::List(
        names.iter().map(|&name| name.into()).collect(),
    ))
}

/// An adapter for a Llama.
pub(crate) fn adapter(config: LoraConfig) -> LoraAdapter {
    LoraAdapter::new(config, "llama").expect("valid configuration")
}

/// The adapter's parameters over a Llama of two layers, zero, and what it attached.
pub(crate) fn attach(adapter: &LoraAdapter) -> (FlatBuffer, Vec<LowRank>) {
    let mut builder = ParamLayoutBuilder::new();
    let attachments = adapter
        .attach(&llama_sites(2), &mut builder)
        .expect("attaches")
        .into_iter()
        .map(|(_, attachment)| match attachment {
            Attachment::LowRank(low_rank) => low_rank,
            other => panic!("not a low-rank update: {other:?}"),
        })
        .collect();
    let layout = builder.build().expect("names are unique");
    (FlatBuffer::zeros(&layout), attachments)
}

/// The adapter in `directory` for the recorded Llama.
pub(crate) fn load(directory: &Path) -> Result<Box<dyn Adapter>> {
    crate::load(directory, &DecoderConfig::open(&golden("_bases/llama"))?)
}

/// Adapter and parameters as PEFT saved them.
pub(crate) fn recorded(case: &str) -> (LoraAdapter, FlatBuffer) {
    let directory = golden(case).join("adapter");
    let PeftConfig::Lora(config) = PeftConfig::load(&directory).expect("fixture") else {
        panic!("a LoRA")
    };
    let adapter = adapter(config);
    let (mut params, _) = attach(&adapter);
    adapter.load(&mut params, &directory).expect("fixture");
    (adapter, params)
}

/// A copy of a recorded adapter that a test can damage.
pub(crate) fn copy_of(case: &str) -> tempfile::TempDir {
    let copy = tempfile::tempdir().expect("temporary directory");
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(
            golden(case).join("adapter").join(file),
            copy.path().join(file),
        )
        .expect("fixture");
    }
    copy
}

/// Changes one key of a copied configuration.
pub(crate) fn edit_config(directory: &Path, key: &str, value: serde_json::Value) {
    let path = directory.join("adapter_config.json");
    let text = std::fs::read_to_string(&path).expect("copied");
    let mut config: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    config[key] = value;
    std::fs::write(&path, config.to_string()).expect("writable");
}

/// Shapes and values by name.
pub(crate) type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Changes the tensors of a copied adapter.
pub(crate) fn edit_tensors(directory: &Path, edit: impl FnOnce(&mut Tensors)) {
    let path = directory.join("adapter_model.safetensors");
    let file = SafetensorsFile::open(&path).expect("copied");
    let mut tensors: Tensors = file
        .names()
        .map(|name| {
            let shape = file.meta(name).expect("named").shape.clone();
            (
                name.to_owned(),
                (shape, file.read_f32(name).expect("copied")),
            )
        })
        .collect();
    drop(file);
    edit(&mut tensors);
    let tensors = tensors.iter();
    let tensors = tensors
        .map(|(name, (shape, values))| (name.clone(), TensorData::from_f32(values, shape.clone())));
    io::write_safetensors(&path, &tensors.collect(), &BTreeMap::new()).expect("writable");
}
