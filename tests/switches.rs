//! What PEFT trains of a base beside LoRA, where no recorded case reaches: weights that stay tied, and
//! gradients with dropout on the head.

mod common;

use common::{Shape, Stored, add_noise, examples, write_model};
use ferrotune::core::adapter::Adapter;
use ferrotune::core::data::PackedBatch;
use ferrotune::core::full::FullFineTuning;
use ferrotune::core::io::ModelFiles;
use ferrotune::core::model::{DecoderConfig, Mode, Model, Pass};
use ferrotune::core::params::{FlatBuffer, ParamLayoutBuilder};
use ferrotune::core::trainer::{Trainer, TrainerOptions, attach};
use ferrotune::kernels::linear_cross_entropy::Accumulator;
use ferrotune::kernels::rng::Stream;
use ferrotune::kernels::{DType, Workspace};
use ferrotune::lora::{
    InitLoraWeights, LoraAdapter, LoraBias, LoraConfig, MergeOptions, TargetModules, TokenIndices,
    merge,
};
use ferrotune::prelude::Solo;
use std::collections::BTreeSet;
use std::path::Path;

struct Subject {
    adapter: LoraAdapter,
    model: Model,
    params: FlatBuffer,
    workspace: Workspace,
}

/// A model with the parts of an adapter moved away from where they start.
fn subject(base: &Path, config: LoraConfig) -> Subject {
    let decoder = DecoderConfig::open(base).expect("written");
    let adapter = LoraAdapter::new(config, "llama").expect("valid");
    let decoder = adapter.decoder(decoder).expect("layers of this base");
    let (attachments, mut params) = attach(&decoder, &adapter).expect("attaches");
    let files = ModelFiles::open(base).expect("written");
    let model = Model::load(&decoder, attachments, &files, &mut params, DType::F32);
    adapter.init(&mut params, 5).expect("initial values");
    add_noise(&mut params, 6);
    Subject {
        model: model.expect("loads"),
        adapter,
        params,
        workspace: Workspace::new(64),
    }
}

impl Subject {
    fn pass(&self, mode: Mode) -> Pass<'_> {
        Pass {
            workspace: &self.workspace,
            dtype: DType::F32,
            mode,
        }
    }

    fn loss_and_gradients(&self, mode: Mode, params: &FlatBuffer) -> (f64, FlatBuffer) {
        let mut grads = FlatBuffer::zeros(params.layout());
        let mut sums = Accumulator::default();
        let batch = batch();
        self.model
            .loss_and_gradients(self.pass(mode), params, &mut grads, &batch, &mut sums)
            .expect("computes");
        (sums.read().expect("a CPU does not fail").loss, grads)
    }

    fn logits(&self) -> Vec<f32> {
        let pass = self.pass(Mode::Eval);
        let logits = self.model.logits(pass, &self.params, &batch());
        logits.expect("computes").to_f32_vec()
    }
}

fn batch() -> PackedBatch {
    let documents = examples(3, Shape::default().vocab, 9);
    PackedBatch::pack(documents.iter().enumerate().map(|(i, d)| (i as u64, d)))
}

fn targets(names: &[&str]) -> Option<TargetModules> {
    Some(TargetModules::List(
        names.iter().map(|n| (*n).into()).collect(),
    ))
}

/// Every switch over a tied and an untied base, with biases.
fn configs() -> Vec<(&'static str, bool, LoraConfig)> {
    let plain = LoraConfig {
        rank: 4,
        alpha: 6.0,
        target_modules: targets(&["q_proj", "down_proj"]),
        ..LoraConfig::default()
    };
    let with = |names: &[&str]| LoraConfig {
        target_modules: targets(names),
        ..plain.clone()
    };
    [
        (
            "a tied update of both",
            true,
            LoraConfig {
                ensure_weight_tying: true,
                ..with(&["q_proj", "embed_tokens"])
            },
        ),
        (
            "an update of a tied head",
            true,
            with(&["q_proj", "lm_head"]),
        ),
        (
            "an update of a head with dropout",
            false,
            LoraConfig {
                dropout: 0.3,
                ..with(&["q_proj", "lm_head", "embed_tokens"])
            },
        ),
        (
            "an update of a head with a bias",
            true,
            LoraConfig {
                dropout: 0.3,
                lora_bias: true,
                ..with(&["q_proj", "lm_head"])
            },
        ),
        (
            "DoRA of a tied head with dropout",
            true,
            LoraConfig {
                dropout: 0.3,
                use_dora: true,
                ..with(&["q_proj", "lm_head"])
            },
        ),
        (
            "DoRA of a head beside its embedding, trained apart",
            true,
            LoraConfig {
                use_dora: true,
                modules_to_save: vec!["embed_tokens".into()],
                ..with(&["q_proj", "lm_head"])
            },
        ),
        (
            "a tied table trained as one",
            true,
            LoraConfig {
                modules_to_save: vec!["lm_head".into()],
                ensure_weight_tying: true,
                ..plain.clone()
            },
        ),
        (
            "an embedding trained apart from its head",
            true,
            LoraConfig {
                modules_to_save: vec!["embed_tokens".into()],
                ..plain.clone()
            },
        ),
        (
            "a head trained apart from its embedding",
            true,
            LoraConfig {
                modules_to_save: vec!["lm_head".into(), "mlp".into()],
                target_modules: targets(&["q_proj"]),
                ..plain.clone()
            },
        ),
        (
            "copies of a layer, one part of them trained as a whole",
            false,
            LoraConfig {
                layer_replication: vec![[0, 2], [1, 2]],
                modules_to_save: vec!["layers.2.mlp".into(), "layers.0.input_layernorm".into()],
                target_modules: targets(&["q_proj", "up_proj"]),
                lora_bias: true,
                ..plain.clone()
            },
        ),
    ]
    .into_iter()
    .chain(of_tokens(plain))
    .collect()
}

/// Trained rows of tables.
fn of_tokens(plain: LoraConfig) -> Vec<(&'static str, bool, LoraConfig)> {
    // Two tokens that occur, the larger one first.
    let seen: BTreeSet<u32> = batch().input_ids.into_iter().collect();
    let seen: Vec<u32> = seen.into_iter().rev().take(2).collect();
    vec![
        (
            "rows of a tied head apart from those of the embedding",
            true,
            LoraConfig {
                trainable_token_indices: Some(TokenIndices::Modules(vec![
                    ("embed_tokens".into(), seen.clone()),
                    ("lm_head".into(), vec![1, 9, 3]),
                ])),
                ..plain.clone()
            },
        ),
        (
            "rows of a tied head alone",
            true,
            LoraConfig {
                trainable_token_indices: Some(TokenIndices::Modules(vec![(
                    "lm_head".into(),
                    vec![1, 9, 3],
                )])),
                ..plain.clone()
            },
        ),
        (
            "rows of an embedding and its head",
            true,
            LoraConfig {
                trainable_token_indices: Some(TokenIndices::Embedding(seen.clone())),
                ensure_weight_tying: true,
                ..plain.clone()
            },
        ),
        (
            "rows of two tables",
            false,
            LoraConfig {
                trainable_token_indices: Some(TokenIndices::Modules(vec![
                    ("embed_tokens".into(), seen),
                    ("lm_head".into(), vec![1, 9, 3]),
                ])),
                bias: LoraBias::All,
                lora_bias: true,
                ..plain
            },
        ),
    ]
}

fn base(root: &Path, tied: bool) -> std::path::PathBuf {
    let shape = Shape {
        tied,
        bias: true,
        ..Shape::default()
    };
    let directory = root.join(if tied { "tied" } else { "apart" });
    write_model(&directory, &shape, Stored::F32, 3);
    directory
}

/// Stores a tied head once more, as some checkpoints do.
fn store_head(base: &Path) {
    let shape = Shape {
        tied: true,
        bias: true,
        ..Shape::default()
    };
    let mut weights = shape.weights(3);
    let embedding = weights["model.embed_tokens.weight"].clone();
    weights.insert("lm_head.weight".into(), embedding);
    common::write_weights(&base.join("model.safetensors"), weights.iter(), Stored::F32);
}

/// Norms that are computed in closed form, of rows and of a table's columns, are those that magnitudes start at.
#[test]
fn dora_starts_at_its_base() {
    let root = tempfile::tempdir().expect("temporary directory");
    let targeted = [
        &["q_proj", "down_proj"][..],
        &["embed_tokens", "v_proj"],
        &["lm_head"],
    ];
    for names in targeted {
        let base = base(root.path(), true);
        let decoder = DecoderConfig::open(&base).expect("written");
        let files = ModelFiles::open(&base).expect("written");
        let logits = |config: Option<LoraConfig>| {
            let adapter: Box<dyn Adapter> = match config {
                Some(config) => Box::new(LoraAdapter::new(config, "llama").expect("valid")),
                None => Box::new(FullFineTuning),
            };
            let options = TrainerOptions {
                max_tokens: 64,
                ..TrainerOptions::default()
            };
            let trainer = Trainer::new(&decoder, &files, adapter, Box::new(Solo), options);
            let trainer = trainer.expect("starts");
            let (pass, model) = (trainer.eval_pass(), trainer.model());
            let logits = model.logits(pass, trainer.params(), &batch());
            logits.expect("computes").to_f32_vec()
        };
        let dora = LoraConfig {
            rank: 3,
            use_dora: true,
            // Both factors are random: the norms are not those of the base alone.
            init_lora_weights: InitLoraWeights::Random,
            target_modules: targets(names),
            ..LoraConfig::default()
        };
        let lora = LoraConfig {
            use_dora: false,
            ..dora.clone()
        };
        let started = logits(Some(dora));
        assert!(
            furthest(&started, &logits(None)) > 1e-3,
            "{names:?}: B A is 0"
        );
        let error = furthest(&started, &logits(Some(lora)));
        assert!(error < 1e-5, "{names:?}: {error}");
    }
}

fn furthest(a: &[f32], b: &[f32]) -> f32 {
    let largest = b.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, f32::max) / largest
}

/// Moves all parameters by `step` times a random direction, in which the loss then changes.
#[test]
fn gradients_of_every_switch_are_the_slope_of_the_loss() {
    let root = tempfile::tempdir().expect("temporary directory");
    for (name, tied, config) in configs() {
        let subject = subject(&base(root.path(), tied), config.clone());
        let mode = Mode::Train { seed: 1, step: 2 };
        let (_, grads) = subject.loss_and_gradients(mode, &subject.params);
        let layout = subject.params.layout();
        // DoRA's gradients of A and B are those of norms that stay.
        let is_slope = |name: &str| {
            !config.use_dora || !name.contains(".lora_A.") && !name.contains(".lora_B.")
        };
        let parameters = layout
            .by_name()
            .filter(|(_, segment)| is_slope(&segment.spec.name));
        for (id, segment) in parameters {
            let mut stream = Stream::new(segment.offset as u64 + 1);
            let direction: Vec<f32> = (0..segment.spec.len())
                .map(|_| stream.normal() as f32)
                .collect();
            let dot = |g: &[f32]| -> f64 {
                let products = g.iter().zip(&direction);
                products.map(|(g, d)| f64::from(*g) * f64::from(*d)).sum()
            };
            let slope = dot(grads.get(id));
            let size = grads
                .get(id)
                .iter()
                .map(|g| f64::from(*g).powi(2))
                .sum::<f64>();
            let at = |step: f32| {
                let mut params = subject.params.clone();
                let values = params.get_mut(id).iter_mut();
                values.zip(&direction).for_each(|(v, d)| *v += step * d);
                subject.loss_and_gradients(mode, &params).0
            };
            // Of two steps, so that the curvature of third order drops out as well.
            let central = |step: f32| (at(step) - at(-step)) / (2.0 * f64::from(step));
            let measured = (4.0 * central(1e-3) - central(2e-3)) / 3.0;
            // A random direction has a slope of about the gradient's norm; f32 logits leave some 1e-3.
            assert!(size > 0.0, "{name}: {} has no gradient", segment.spec.name);
            let error = (slope - measured).abs() / size.sqrt();
            assert!(
                error < 1e-2,
                "{name}: {} {slope} {measured}",
                segment.spec.name
            );
        }
    }
}

#[test]
fn what_is_merged_computes_what_the_adapter_did_and_unties_only_what_differs() {
    let root = tempfile::tempdir().expect("temporary directory");
    let twice = configs().into_iter().filter(|(_, tied, _)| *tied);
    let all = configs().into_iter().map(|config| (config, false));
    let all = all.chain(twice.map(|config| (config, true)));
    for (i, ((name, tied, config), stores_head)) in all.enumerate() {
        let stays_tied = config.ensure_weight_tying;
        let base = base(root.path(), tied);
        if stores_head {
            store_head(&base);
        }
        let subject = subject(&base, config);
        let [saved, merged] = ["adapter", "merged"].map(|n| root.path().join(format!("{n}{i}")));
        subject
            .adapter
            .save(&subject.params, &saved)
            .expect("saved");
        let before = common::read(&base.join("model.safetensors"));
        let result = merge(&base, &saved, &merged, &MergeOptions::default());
        if subject.adapter.config().lora_bias && name.contains("head") {
            // No base has a bias of its head.
            let error = result.expect_err("refused").to_string();
            assert!(error.contains("nowhere to go"), "{name}: {error}");
            continue;
        }
        result.expect("merges");
        assert_eq!(
            before,
            common::read(&base.join("model.safetensors")),
            "{name}"
        );
        let files = ModelFiles::open(&merged).expect("merged");
        let decoder = DecoderConfig::open(&merged).expect("merged");
        assert_eq!(decoder.tie_word_embeddings, stays_tied, "{name}");
        assert_eq!(files.meta("lm_head.weight").is_none(), stays_tied, "{name}");
        let layout = ParamLayoutBuilder::new().build().expect("empty");
        let mut none = FlatBuffer::zeros(&layout);
        let model = Model::load(&decoder, Vec::new(), &files, &mut none, DType::F32);
        let merged = Subject {
            model: model.expect("loads"),
            params: none,
            adapter: subject.adapter.clone(),
            workspace: Workspace::new(64),
        };
        let (ours, theirs) = (subject.logits(), merged.logits());
        assert!(furthest(&theirs, &ours) < 1e-5, "{name}");
    }
}
