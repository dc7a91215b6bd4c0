//! A stack of layers made of the base's (`layer_replication`): the model of a checkpoint that has it.

mod common;

use common::{
    Family, Shape, Stored, add_noise, assert_close, examples, read_json, write_json, write_model,
};
use ferrotune::core::adapter::Adapter;
use ferrotune::core::data::PackedBatch;
use ferrotune::core::full::FullFineTuning;
use ferrotune::core::io::ModelFiles;
use ferrotune::core::model::{DecoderConfig, Mode, Model, Pass, WeightFormat, WeightSource};
use ferrotune::core::params::{FlatBuffer, ParamLayoutBuilder};
use ferrotune::core::trainer::attach;
use ferrotune::core::{Result, model::ModelPlan};
use ferrotune::kernels::dequantise::{FourBitFormat, FourBitType, QuantFormat, Quantised};
use ferrotune::kernels::{DType, ViewMut, Workspace};
use ferrotune::lora::{LoraAdapter, LoraConfig, MergeOptions, TargetModules, merge};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

const RANGES: [[usize; 2]; 3] = [[0, 2], [1, 3], [1, 2]];
/// The base's layer at each place of that stack.
const ORDER: [usize; 5] = [0, 1, 1, 2, 1];
const SEED: u64 = 7;

fn lora(ranges: &[[usize; 2]], model_type: &str) -> LoraAdapter {
    let config = LoraConfig {
        rank: 4,
        target_modules: Some(TargetModules::AllLinear),
        layer_replication: ranges.to_vec(),
        ..LoraConfig::default()
    };
    LoraAdapter::new(config, model_type).expect("valid")
}

/// A base of three layers.
fn base(directory: PathBuf, family: Family) -> (PathBuf, Shape) {
    let shape = Shape {
        layers: 3,
        ..family.shape()
    };
    write_model(&directory, &shape, Stored::F32, SEED);
    (directory, shape)
}

struct Subject {
    decoder: DecoderConfig,
    model: Model,
    params: FlatBuffer,
}

impl Subject {
    fn new(base: &Path, adapter: &dyn Adapter) -> Self {
        let decoder = DecoderConfig::open(base).expect("written");
        let decoder = adapter.decoder(decoder).expect("ranges of this base");
        let files = ModelFiles::open(base).expect("written");
        let (attachments, mut params) = attach(&decoder, adapter).expect("attaches");
        let model = Model::load(&decoder, attachments, &files, &mut params, DType::F32);
        adapter.init(&mut params, SEED).expect("initial values");
        Self {
            model: model.expect("loads"),
            decoder,
            params,
        }
    }

    /// A checkpoint alone.
    fn merged(directory: &Path) -> Self {
        let decoder = DecoderConfig::open(directory).expect("written");
        let files = ModelFiles::open(directory).expect("written");
        let layout = ParamLayoutBuilder::new().build().expect("empty");
        let mut params = FlatBuffer::zeros(&layout);
        let model = Model::load(&decoder, Vec::new(), &files, &mut params, DType::F32);
        Self {
            model: model.expect("loads"),
            decoder,
            params,
        }
    }

    fn logits(&self) -> Vec<f32> {
        let workspace = Workspace::new(64);
        let pass = Pass {
            workspace: &workspace,
            dtype: DType::F32,
            mode: Mode::Eval,
        };
        let documents = examples(3, self.decoder.vocab_size, SEED);
        let batch = PackedBatch::pack(documents.iter().enumerate().map(|(i, d)| (i as u64, d)));
        let logits = self.model.logits(pass, &self.params, &batch);
        logits.expect("computes").to_f32_vec()
    }
}

/// Writes the checkpoint of `shape` with its layers in [`ORDER`].
fn write_twin(directory: &Path, shape: &Shape) {
    let stacked = Shape {
        layers: ORDER.len(),
        ..shape.clone()
    };
    write_model(directory, &stacked, Stored::F32, SEED);
    let weights = shape.weights(SEED);
    let twin: BTreeMap<_, _> = stacked
        .tensors()
        .into_iter()
        .map(|(name, _)| {
            let mut source = name.clone();
            for (layer, from) in ORDER.iter().enumerate() {
                let [at, of] = [layer, *from].map(|n| shape.family.in_layer(n, ""));
                if let Some(rest) = name.strip_prefix(&at) {
                    source = format!("{of}{rest}");
                }
            }
            let tensor = weights[&source].clone();
            (name, tensor)
        })
        .collect();
    let file = directory.join("model.safetensors");
    common::write_weights(&file, twin.iter(), Stored::F32);
}

#[test]
fn a_stack_is_the_model_whose_files_have_its_layers() {
    let root = tempfile::tempdir().expect("temporary directory");
    for family in [Family::Llama, Family::Phi3] {
        let (base, shape) = base(root.path().join(format!("{family:?}")), family);
        let twin = root.path().join(format!("{family:?} twin"));
        write_twin(&twin, &shape);
        // B starts as zero.
        let adapter = lora(&RANGES, family.model_type());
        let stack = Subject::new(&base, &adapter);
        let twin = Subject::merged(&twin);
        assert_close(
            &stack.logits(),
            &twin.logits(),
            1e-5,
            &format!("{family:?}"),
        );
        // Nothing is counted twice that is held once.
        let parameters = DecoderConfig::open(&base).expect("written").parameters();
        assert_eq!(stack.decoder.parameters(), parameters, "{family:?}");
        assert!(twin.decoder.parameters() > parameters, "{family:?}");
    }
}

/// Merged, every copy has its own update, and windows and ropes go with the layers they came from.
#[test]
fn merging_writes_the_larger_checkpoint_for_every_family() {
    let root = tempfile::tempdir().expect("temporary directory");
    for family in Family::ALL.into_iter().filter(|f| *f != Family::Gpt2) {
        let at = |name: &str| root.path().join(format!("{family:?}{name}"));
        let (base, _) = base(at("base"), family);
        let adapter = lora(&RANGES, family.model_type());
        let mut stack = Subject::new(&base, &adapter);
        add_noise(&mut stack.params, SEED);
        adapter.save(&stack.params, &at("adapter")).expect("saved");
        merge(
            &base,
            &at("adapter"),
            &at("merged"),
            &MergeOptions::default(),
        )
        .expect("merges");
        let merged = Subject::merged(&at("merged"));
        assert_eq!(merged.decoder.layers, ORDER.len(), "{family:?}");
        assert_close(
            &stack.logits(),
            &merged.logits(),
            1e-5,
            &format!("{family:?}"),
        );
        let own = DecoderConfig::open(&base).expect("written");
        let windows = ORDER.map(|layer| own.sliding_windows[layer]);
        assert_eq!(merged.decoder.sliding_windows, windows, "{family:?}");
        let ropes = ORDER.map(|layer| own.layer_ropes[layer]);
        assert_eq!(merged.decoder.layer_ropes, ropes, "{family:?}");
    }
}

/// Counts what is read.
struct Counting {
    files: ModelFiles,
    read: Mutex<BTreeMap<String, usize>>,
}

impl WeightSource for Counting {
    fn check(&self, plan: &ModelPlan) -> Result<()> {
        self.files.check(plan)
    }

    fn read(&self, name: &str, to: ViewMut<'_>) -> Result<()> {
        let mut read = self.read.lock().expect("one thread");
        *read.entry(name.to_owned()).or_default() += 1;
        WeightSource::read(&self.files, name, to)
    }

    fn read_quantised(&self, name: &str) -> Result<Option<Quantised>> {
        WeightSource::read_quantised(&self.files, name)
    }
}

#[test]
fn each_weight_of_the_base_is_read_and_held_once() {
    let root = tempfile::tempdir().expect("temporary directory");
    let (base, _) = base(root.path().join("base"), Family::Llama);
    let plain = DecoderConfig::open(&base).expect("written");
    let adapter = lora(&RANGES, "llama");
    let stack = adapter.decoder(plain.clone()).expect("ranges of this base");
    let nf4 = QuantFormat::FourBit(FourBitFormat {
        quant_type: FourBitType::Nf4,
        block: FourBitFormat::BLOCK,
        double_quant: true,
    });
    for format in [None, Some(nf4)] {
        let format = WeightFormat {
            dtype: DType::F32,
            quantise: format.map(Into::into),
        };
        let source = Counting {
            files: ModelFiles::open(&base).expect("written"),
            read: Mutex::default(),
        };
        let (attachments, mut params) = attach(&stack, &adapter).expect("attaches");
        Model::load(&stack, attachments, &source, &mut params, format.clone()).expect("loads");
        let read = source.read.into_inner().expect("one thread");
        let names: Vec<&str> = source.files.names().collect();
        assert_eq!(read.keys().collect::<Vec<_>>(), names);
        assert!(read.values().all(|times| *times == 1), "{read:?}");
        let bytes = |decoder| format.bytes(&ModelPlan::new(decoder), &[], None);
        assert_eq!(bytes(&stack), bytes(&plain));
    }
    // Where q of one copy is trained as a whole, its k and v lie apart from those of the others.
    let config = LoraConfig {
        modules_to_save: vec!["layers.2.self_attn.q_proj".into()],
        target_modules: Some(TargetModules::List(vec!["down_proj".into()])),
        ..adapter.config().clone()
    };
    let adapter = LoraAdapter::new(config, "llama").expect("valid");
    let (attachments, _) = attach(&stack, &adapter).expect("attaches");
    let (format, plan) = (WeightFormat::from(DType::F32), ModelPlan::new(&stack));
    let [with, without] = [&attachments[..], &[]].map(|a| format.bytes(&plan, a, None));
    let apart = 2 * stack.kv_heads * stack.head_dim * stack.hidden_size;
    assert_eq!(with, without + 4 * apart as u64);
}

/// A stack may leave layers out; their tensors are still those of the base.
#[test]
fn a_shorter_stack_is_merged_without_what_it_leaves_out() {
    let root = tempfile::tempdir().expect("temporary directory");
    let (base, _) = base(root.path().join("base"), Family::Llama);
    let [saved, merged] = ["adapter", "merged"].map(|name| root.path().join(name));
    let adapter = lora(&[[0, 1], [2, 3]], "llama");
    let stack = Subject::new(&base, &adapter);
    adapter.save(&stack.params, &saved).expect("saved");
    let report = merge(&base, &saved, &merged, &MergeOptions::default()).expect("merges");
    assert_eq!(report.tensors.len(), 14);
    assert_eq!(
        read_json(&merged.join("config.json"))["num_hidden_layers"],
        2
    );
    assert_close(
        &stack.logits(),
        &Subject::merged(&merged).logits(),
        1e-5,
        "shorter",
    );
    let extra = ModelFiles::open(&merged).expect("merged");
    assert!(extra.names().all(|name| !name.contains(".layers.2.")));
}

#[test]
fn ranges_that_no_base_has_are_refused_by_name_and_nearest() {
    let root = tempfile::tempdir().expect("temporary directory");
    let (base, _) = base(root.path().join("base"), Family::Llama);
    let plain = DecoderConfig::open(&base).expect("written");
    for (ranges, parts) in [
        (
            &[[0, 2], [1, 4]][..],
            &["[1, 4]", "this base has 3", "[1, 3]"][..],
        ),
        (&[[2, 2]], &["[2, 2]", "holds no layer", "[2, 3]"]),
        (&[[2, 1]], &["[2, 1]", "holds no layer", "[1, 3]"]),
        (&[], &["0 layers"]),
    ] {
        let error = plain.stacked(ranges).expect_err("refused").to_string();
        assert!(error.contains("layer_replication"), "{error}");
        for part in parts {
            assert!(error.contains(part), "{part} is not in: {error}");
        }
    }
    // Whoever forgets to ask for the stack is told.
    let adapter = lora(&RANGES, "llama");
    let error = attach(&plain, &adapter).expect_err("refused").to_string();
    assert!(error.contains("Adapter::decoder"), "{error}");
    assert!(FullFineTuning.decoder(plain.clone()).expect("as it is") == plain);
    for (value, part) in [
        (json!([[0, 1, 2]]), "[[0,1,2]]"),
        (json!([0, 2]), "[0,2]"),
        (json!([[-1, 2]]), "[[-1,2]]"),
        (json!("0-2"), "\"0-2\""),
    ] {
        let file = root.path().join("adapter_config.json");
        let keys: Value = json!({"peft_type": "LORA", "r": 4, "layer_replication": value});
        write_json(&file, &keys);
        let error = ferrotune::lora::PeftConfig::load(root.path()).expect_err("refused");
        let error = error.to_string();
        for part in ["`layer_replication`", part, "[[0, 4], [2, 5]]"] {
            assert!(error.contains(part), "{part} is not in: {error}");
        }
    }
}

/// PEFT looks for `layers`, and would not read the adapter.
#[test]
fn layers_that_peft_does_not_find_are_not_replicated() {
    let root = tempfile::tempdir().expect("temporary directory");
    let (base, _) = base(root.path().join("gpt2"), Family::Gpt2);
    let base = DecoderConfig::open(&base).expect("written");
    let error = lora(&RANGES, "gpt2").decoder(base).expect_err("refused");
    let error = error.to_string();
    for part in ["`layer_replication`", "`transformer.h`", "leave it out"] {
        assert!(error.contains(part), "{part} is not in: {error}");
    }
}
