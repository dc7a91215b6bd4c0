//! Checkpoints whose names lack the first part of the path, as those of a model saved without its head do, with
//! the buffers that old ones keep.

mod common;

use common::{Family, Shape, Stored, add_noise, examples, tensors, write_model};
use ferrotune::core::adapter::Adapter;
use ferrotune::core::data::PackedBatch;
use ferrotune::core::io::ModelFiles;
use ferrotune::core::model::{DecoderConfig, Mode, Model, Pass};
use ferrotune::core::params::{FlatBuffer, ParamLayoutBuilder};
use ferrotune::core::trainer::attach;
use ferrotune::kernels::{DType, Workspace};
use ferrotune::lora::{LoraAdapter, LoraConfig, MergeOptions, TargetModules, merge};
use std::collections::BTreeMap;
use std::path::Path;

const SEED: u64 = 23;

/// Writes `shape` twice: as it is, and without the first part of its names but with old buffers.
fn write_pair(whole: &Path, headless: &Path, shape: &Shape) {
    for directory in [whole, headless] {
        write_model(directory, shape, Stored::F32, SEED);
    }
    let mut weights: BTreeMap<String, (Vec<usize>, Vec<f32>)> = shape
        .weights(SEED)
        .into_iter()
        .map(|(name, tensor)| match name.split_once('.') {
            Some(("model" | "transformer", rest)) => (rest.to_owned(), tensor),
            _ => (name, tensor),
        })
        .collect();
    let buffer = match shape.family {
        Family::Gpt2 => "h.0.attn.bias",
        _ => "layers.0.self_attn.rotary_emb.inv_freq",
    };
    weights.insert(buffer.to_owned(), (vec![4], vec![1.0; 4]));
    let file = headless.join("model.safetensors");
    common::write_weights(&file, weights.iter(), Stored::F32);
}

fn adapter(family: Family, ranges: &[[usize; 2]]) -> LoraAdapter {
    let config = LoraConfig {
        rank: 4,
        target_modules: Some(TargetModules::AllLinear),
        layer_replication: ranges.to_vec(),
        ..LoraConfig::default()
    };
    LoraAdapter::new(config, family.model_type()).expect("valid")
}

/// Logits of a checkpoint, with what `saved` adds to it.
fn logits(base: &Path, adapter: Option<(&LoraAdapter, &Path)>) -> Vec<u32> {
    let mut decoder = DecoderConfig::open(base).expect("written");
    let files = ModelFiles::open(base).expect("written");
    let layout = ParamLayoutBuilder::new().build().expect("empty");
    let (mut attachments, mut params) = (Vec::new(), FlatBuffer::zeros(&layout));
    if let Some((adapter, _)) = adapter {
        decoder = adapter.decoder(decoder).expect("layers of this base");
        (attachments, params) = attach(&decoder, adapter).expect("attaches");
    }
    let model = Model::load(&decoder, attachments, &files, &mut params, DType::F32);
    if let Some((adapter, saved)) = adapter {
        adapter.load(&mut params, saved).expect("saved");
    }
    let workspace = Workspace::new(64);
    let pass = Pass {
        workspace: &workspace,
        dtype: DType::F32,
        mode: Mode::Eval,
    };
    let documents = examples(2, decoder.vocab_size, SEED);
    let batch = PackedBatch::pack(documents.iter().enumerate().map(|(i, d)| (i as u64, d)));
    let model = model.expect("loads");
    let logits = model.logits(pass, &params, &batch).expect("computes");
    logits.to_f32_vec().iter().map(|v| v.to_bits()).collect()
}

#[test]
fn names_without_the_first_part_are_the_same_model() {
    let root = tempfile::tempdir().expect("temporary directory");
    for family in Family::ALL {
        let at = |name: &str| root.path().join(format!("{family:?}{name}"));
        write_pair(&at("whole"), &at("headless"), &family.shape());
        let (ours, theirs) = (logits(&at("headless"), None), logits(&at("whole"), None));
        assert!(ours == theirs, "{family:?}");
    }
}

/// PEFT's names are those of the modules, whatever the base's files say; merging keeps the files' names.
#[test]
fn an_adapter_fits_both_and_merging_keeps_the_names() {
    let root = tempfile::tempdir().expect("temporary directory");
    for (family, ranges) in [
        (Family::Gpt2, &[][..]),
        (Family::Llama, &[]),
        (Family::Llama, &[[1, 2], [0, 2]]),
    ] {
        let at = |name: &str| {
            root.path()
                .join(format!("{family:?}{}{name}", ranges.len()))
        };
        write_pair(&at("whole"), &at("headless"), &family.shape());
        let adapter = adapter(family, ranges);
        let decoder = DecoderConfig::open(&at("whole")).expect("written");
        let decoder = adapter.decoder(decoder).expect("layers of this base");
        let (_, mut params) = attach(&decoder, &adapter).expect("attaches");
        add_noise(&mut params, SEED);
        adapter.save(&params, &at("adapter")).expect("saved");
        let saved = at("adapter");
        let with = Some((&adapter, saved.as_path()));
        assert!(
            logits(&at("headless"), with) == logits(&at("whole"), with),
            "{family:?}"
        );
        for base in ["whole", "headless"] {
            let merged = at(&format!("merged {base}"));
            merge(&at(base), &saved, &merged, &MergeOptions::default()).expect("merges");
        }
        let merged = ["merged headless", "merged whole"].map(at);
        assert!(
            logits(&merged[0], None) == logits(&merged[1], None),
            "{family:?}"
        );
        let names = tensors(&merged[0].join("model.safetensors"));
        let whole = |name: &String| name.starts_with("model.") || name.starts_with("transformer.");
        assert!(!names.keys().any(whole), "{family:?}");
    }
}
