//! Several adapters over one base in one run: each is what it would be alone.

use crate::common::{Shape, Stored, examples, write_model};
use ferrotune::core::adapter::Adapter;
use ferrotune::core::data::{Example, PackedBatch};
use ferrotune::core::io::ModelFiles;
use ferrotune::core::model::DecoderConfig;
use ferrotune::core::params::FlatBuffer;
use ferrotune::core::trainer::{Trainer, TrainerOptions};
use ferrotune::kernels::{Device, host_cuda};
use ferrotune::lora::{LoraAdapter, LoraConfig, PeftConfig, TargetModules};
use ferrotune::prelude::Solo;
use serde_json::{Value, json};
use std::path::Path;

/// An adapter with its data and schedule.
#[derive(Clone)]
struct Member {
    adapter: fn() -> Box<dyn Adapter>,
    seed: u64,
    lr: f64,
    steps: usize,
    /// Documents of each micro-batch, and micro-batches of each step.
    documents: usize,
    accumulation: usize,
}

/// What came of one.
#[derive(Debug)]
struct Trained {
    losses: Vec<f64>,
    norms: Vec<f64>,
    params: FlatBuffer,
    eval: f64,
}

fn lora(config: LoraConfig) -> Box<dyn Adapter> {
    Box::new(LoraAdapter::new(config, "llama").expect("valid"))
}

fn of_peft(config: &Value) -> Box<dyn Adapter> {
    let object = config.as_object().expect("an object");
    let config = PeftConfig::from_config("peft_config", object).expect("valid");
    config.into_adapter("llama").expect("valid")
}

fn plain() -> LoraConfig {
    LoraConfig {
        rank: 4,
        alpha: 8.0,
        target_modules: Some(TargetModules::AllLinear),
        ..LoraConfig::default()
    }
}

fn targets(names: &[&str]) -> Option<TargetModules> {
    let names = names.iter().map(|&name| name.into());
    Some(TargetModules::List(names.collect()))
}

/// Of other ranks, targets, methods, seeds, rates, lengths and batches.
fn members() -> Vec<Member> {
    let member = Member {
        adapter: || lora(plain()),
        seed: 1,
        lr: 1e-2,
        steps: 4,
        documents: 2,
        accumulation: 1,
    };
    vec![
        member.clone(),
        Member {
            adapter: || {
                lora(LoraConfig {
                    rank: 3,
                    dropout: 0.3,
                    use_rslora: true,
                    target_modules: targets(&["q_proj", "down_proj"]),
                    ..plain()
                })
            },
            seed: 2,
            lr: 3e-3,
            steps: 6,
            documents: 1,
            accumulation: 3,
        },
        Member {
            adapter: || {
                lora(LoraConfig {
                    use_dora: true,
                    dropout: 0.1,
                    target_modules: targets(&["v_proj", "up_proj", "o_proj"]),
                    ..plain()
                })
            },
            seed: 3,
            steps: 3,
            accumulation: 2,
            ..member.clone()
        },
        Member {
            adapter: || {
                of_peft(&json!({
                    "peft_type": "VBLORA", "target_modules": ["q_proj", "v_proj"], "r": 2,
                    "vector_length": 8, "num_vectors": 12,
                }))
            },
            seed: 4,
            steps: 2,
            ..member
        },
    ]
}

impl Member {
    fn options(&self, device: &Device) -> TrainerOptions {
        TrainerOptions {
            device: device.clone(),
            seed: self.seed,
            max_tokens: 64,
            weight_decay: 0.1,
            ..TrainerOptions::default()
        }
    }

    fn batches(&self, step: usize) -> Vec<PackedBatch> {
        let (vocabulary, count) = (Shape::default().vocab, self.documents * self.accumulation);
        let rows = examples(count, vocabulary, self.seed * 100 + step as u64);
        let rows: Vec<(u64, &Example)> = (0..).zip(&rows).collect();
        let micro_batches = rows.chunks(self.documents);
        micro_batches
            .map(|documents| PackedBatch::pack(documents.iter().copied()))
            .collect()
    }

    fn train(&self, mut trainer: Trainer) -> Trained {
        let (mut losses, mut norms) = (Vec::new(), Vec::new());
        let evaluate = |trainer: &mut Trainer| {
            let report = trainer.evaluate(&self.batches(99)).expect("evaluates");
            report.loss
        };
        for step in 0..self.steps {
            let report = trainer.step(&self.batches(step), self.lr).expect("steps");
            losses.push(report.loss_sum / report.trained_tokens as f64);
            norms.push(report.grad_norm);
            if step == 1 {
                evaluate(&mut trainer);
            }
        }
        Trained {
            losses,
            norms,
            eval: evaluate(&mut trainer),
            params: trainer.params().clone(),
        }
    }
}

fn base(root: &Path) -> (DecoderConfig, ModelFiles) {
    let directory = root.join("base");
    let shape = Shape {
        bias: true,
        ..Shape::default()
    };
    write_model(&directory, &shape, Stored::F32, 3);
    let config = DecoderConfig::open(&directory).expect("written");
    (config, ModelFiles::open(&directory).expect("written"))
}

fn together(
    (config, files): &(DecoderConfig, ModelFiles),
    members: &[Member],
    device: &Device,
) -> Vec<Trainer> {
    let adapters = members.iter().map(|m| ((m.adapter)(), m.options(device)));
    Trainer::together(config, files, adapters.collect()).expect("one base for all")
}

/// Trains each in a thread of its own.
fn all(trainers: Vec<Trainer>, members: &[Member]) -> Vec<Trained> {
    std::thread::scope(|scope| {
        let threads = trainers.into_iter().zip(members);
        let threads: Vec<_> = threads
            .map(|(trainer, member)| scope.spawn(move || member.train(trainer)))
            .collect();
        let results = threads.into_iter();
        results.map(|t| t.join().expect("trained")).collect()
    })
}

fn assert_same(found: &Trained, alone: &Trained, of: usize) {
    let near = |a: f64, b: f64| (a - b).abs() <= 1e-5 * b.abs().max(1e-3);
    for (found, alone) in [(&found.losses, &alone.losses), (&found.norms, &alone.norms)] {
        assert_eq!(found.len(), alone.len());
        let mut pairs = found.iter().zip(alone);
        assert!(
            pairs.all(|(a, b)| near(*a, *b)),
            "{of}: {found:?} {alone:?}"
        );
    }
    assert!(
        near(found.eval, alone.eval),
        "{of}: {} {}",
        found.eval,
        alone.eval
    );
    let [ours, theirs] = [&found.params, &alone.params].map(FlatBuffer::as_slice);
    let squares = |values: &mut dyn Iterator<Item = f32>| -> f64 {
        values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt()
    };
    let apart = squares(&mut ours.iter().zip(theirs).map(|(a, b)| a - b));
    let size = squares(&mut theirs.iter().copied());
    assert!(apart <= 1e-5 * size, "{of}: {apart} of {size}");
}

fn compare(device: &Device) {
    let root = tempfile::tempdir().expect("temporary directory");
    let (base, members) = (base(root.path()), members());
    let found = all(together(&base, &members, device), &members);
    for (number, (member, found)) in members.iter().zip(&found).enumerate() {
        let (config, files) = &base;
        let options = member.options(device);
        let trainer = Trainer::new(config, files, (member.adapter)(), Box::new(Solo), options);
        assert_same(found, &member.train(trainer.expect("starts")), number);
    }
}

#[test]
fn each_adapter_is_what_it_is_alone() {
    compare(&Device::Cpu);
}

#[test]
fn each_adapter_is_what_it_is_alone_on_a_gpu() {
    compare(&Device::Cuda(host_cuda::device()));
}

#[test]
fn one_that_fails_or_ends_leaves_the_others_to_go_on() {
    let root = tempfile::tempdir().expect("temporary directory");
    let (base, members) = (base(root.path()), members());
    let mut trainers = together(&base, &members, &Device::Cpu);
    // One never comes, one comes with a token that there is not.
    drop(trainers.pop());
    let error = std::thread::scope(|scope| {
        let mut bad = trainers.remove(0);
        let failing = scope.spawn(move || {
            bad.step(&[PackedBatch::default()], 1e-3)
                .expect_err("nothing to train on")
                .to_string()
        });
        let others = scope.spawn(|| all(trainers, &members[1..3]));
        let others = others.join().expect("trained");
        assert_eq!(others.len(), 2);
        assert!(
            others
                .iter()
                .all(|o| o.losses.iter().all(|l| l.is_finite()))
        );
        failing.join().expect("an answer")
    });
    assert!(
        error.contains("no token of this batch has a label"),
        "{error}"
    );
}

#[test]
fn what_cannot_stand_beside_others_is_named() {
    let root = tempfile::tempdir().expect("temporary directory");
    let (config, files) = base(root.path());
    let refusal = |adapter: Box<dyn Adapter>| {
        let options = TrainerOptions::default();
        let adapters = vec![(lora(plain()), options.clone()), (adapter, options)];
        let refused = Trainer::together(&config, &files, adapters);
        refused.expect_err("refused").to_string()
    };
    let with = |change: fn(&mut LoraConfig)| {
        let mut config = plain();
        change(&mut config);
        refusal(lora(config))
    };
    let error = with(|c| c.target_modules = targets(&["q_proj", "embed_tokens"]));
    assert!(error.contains("model.embed_tokens"), "{error}");
    let error = with(|c| c.modules_to_save = vec!["lm_head".into()]);
    assert!(error.contains("lm_head"), "{error}");
    let error = with(|c| {
        c.use_dora = true;
        c.target_modules = Some(TargetModules::List(vec!["lm_head".into()]));
    });
    assert!(error.contains("lm_head"), "{error}");
    let error = with(|c| c.init_lora_weights = ferrotune::lora::InitLoraWeights::Olora);
    assert!(error.contains("other adapters of this run"), "{error}");
    let error = refusal(of_peft(
        &json!({"peft_type": "LOHA", "r": 2, "target_modules": ["q_proj"]}),
    ));
    assert!(error.contains("q_proj"), "{error}");
}
