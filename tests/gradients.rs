//! Gradients of every trainable tensor against candle's autograd, and what must not change.

mod common;

use common::oracle::{LowRank, Oracle, variable};
use common::{Family, Shape, Stored, examples, read, write_model};
use ferrotune::core::adapter::Adapter;
use ferrotune::core::data::{Example, PackedBatch};
use ferrotune::core::full::FullFineTuning;
use ferrotune::core::io::ModelFiles;
use ferrotune::core::model::{DecoderConfig, Mode, Model, Pass};
use ferrotune::core::params::{FlatBuffer, ParamLayoutBuilder};
use ferrotune::core::process_group::Solo;
use ferrotune::core::trainer::{Trainer, TrainerOptions, attach};
use ferrotune::kernels::linear_cross_entropy::Accumulator;
use ferrotune::kernels::rng::{Stream, key_for};
use ferrotune::kernels::{DType, Workspace};
use ferrotune::lora::{InitLoraWeights, LoraAdapter, LoraConfig, TargetModules};
use std::path::Path;

const SEED: u64 = 11;

/// Grouped heads with and without biases and a tied head, a head wider than hidden / heads, one key
/// head for all, other activations, and every architecture.
fn shapes() -> Vec<Shape> {
    let plain = Shape::default();
    let llamas = [
        Shape {
            bias: true,
            ..plain.clone()
        },
        Shape {
            tied: true,
            bias: true,
            head_dim: 12,
            heads: 3,
            kv_heads: 1,
            ..plain.clone()
        },
        Shape {
            kv_heads: 4,
            layers: 1,
            hidden_act: "gelu",
            ..plain.clone()
        },
    ];
    let families = Family::ALL.map(Family::shape);
    llamas.into_iter().chain(families).collect()
}

fn lora(config: LoraConfig) -> Box<dyn Adapter> {
    let config = LoraConfig {
        rank: 5,
        alpha: 12.0,
        target_modules: Some(TargetModules::from_text("all-linear")),
        ..config
    };
    Box::new(LoraAdapter::new(config, "llama").expect("valid"))
}

/// A model with an adapter, its parameters and its workspace.
struct Subject {
    model: Model,
    params: FlatBuffer,
    workspace: Workspace,
}

impl Subject {
    fn new(directory: &Path, adapter: &dyn Adapter, dtype: DType) -> Self {
        let config = DecoderConfig::open(directory).expect("config");
        let files = ModelFiles::open(directory).expect("weights");
        let (attachments, mut params) = attach(&config, adapter).expect("attaches");
        let model = Model::load(&config, attachments, &files, &mut params, dtype).expect("loads");
        adapter.init(&mut params, SEED).expect("initial values");
        Self {
            model,
            params,
            workspace: Workspace::new(0),
        }
    }

    fn pass(&self, mode: Mode) -> Pass<'_> {
        Pass {
            workspace: &self.workspace,
            dtype: DType::F32,
            mode,
        }
    }

    fn logits(&self, batch: &PackedBatch) -> Vec<u32> {
        let logits = self
            .model
            .logits(self.pass(Mode::Eval), &self.params, batch)
            .expect("runs");
        logits.to_f32_vec().iter().map(|v| v.to_bits()).collect()
    }

    fn loss_and_gradients(&self, mode: Mode, batch: &PackedBatch) -> (f64, FlatBuffer) {
        let mut grads = FlatBuffer::zeros(self.params.layout());
        let mut sums = Accumulator::default();
        self.model
            .loss_and_gradients(self.pass(mode), &self.params, &mut grads, batch, &mut sums)
            .expect("runs");
        (sums.read().expect("sums of the host").loss, grads)
    }
}

/// Every A and B at values of the size that training reaches.
fn randomise(params: &mut FlatBuffer) {
    let layout = std::sync::Arc::clone(params.layout());
    for (id, segment) in layout.by_name() {
        let mut stream = Stream::new(key_for(SEED, &segment.spec.name));
        for value in params.get_mut(id) {
            *value = (stream.normal() * 0.15) as f32;
        }
    }
}

fn packed(documents: &[Example]) -> PackedBatch {
    PackedBatch::pack(documents.iter().enumerate().map(|(i, d)| (i as u64, d)))
}

/// `MODULE` of `base_model.model.MODULE.lora_A.weight`.
fn module_of(name: &str, factor: &str) -> Option<String> {
    let inner = name.strip_prefix("base_model.model.")?;
    Some(inner.strip_suffix(&format!(".{factor}.weight"))?.to_owned())
}

/// Puts our A and B into the oracle.
fn mirror(oracle: &mut Oracle, params: &FlatBuffer, scale: f64) {
    let layout = params.layout();
    for (id, segment) in layout.by_name() {
        let Some(module) = module_of(&segment.spec.name, "lora_A") else {
            continue;
        };
        let b = layout
            .find(&segment.spec.name.replace("lora_A", "lora_B"))
            .expect("every A has a B");
        let low_rank = LowRank {
            a: variable(params.get(id), &segment.spec.shape),
            b: variable(params.get(b), &layout.segment(b).spec.shape),
            scale,
        };
        oracle.add_low_rank(&module, low_rank);
    }
}

/// Every trainable tensor: finite, not zero, within 1e-4 of candle's.
fn assert_equals_oracle(subject: &Subject, oracle: &Oracle, documents: &[Example], label: &str) {
    let (loss, grads) = subject.loss_and_gradients(Mode::Eval, &packed(documents));
    let (expected_loss, expected) = oracle.loss_and_gradients(documents).expect("oracle runs");
    let error = (loss - expected_loss).abs() / expected_loss;
    assert!(error < 1e-5, "{label}: loss {loss}, candle {expected_loss}");
    for (id, segment) in grads.layout().by_name() {
        let name = &segment.spec.name;
        let key = ["lora_A", "lora_B"]
            .iter()
            .find_map(|f| module_of(name, f).map(|m| format!("{m}.{f}")))
            .unwrap_or_else(|| name.clone());
        let ours = grads.file_values(id);
        let theirs = &expected[&key];
        assert!(ours.iter().all(|v| v.is_finite()), "{label}: {name}");
        assert!(ours.iter().any(|v| *v != 0.0), "{label}: {name} is zero");
        assert_eq!(ours.len(), theirs.len(), "{label}: {name}");
        let scale = theirs.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
        let error = ours
            .iter()
            .zip(theirs)
            .fold(0.0_f64, |m, (a, b)| m.max((f64::from(*a) - b).abs()));
        assert!(
            error <= 1e-4 * scale,
            "{label}: {name} is off by {:.2e}",
            error / scale
        );
    }
}

#[test]
fn gradients_of_random_adapters_equal_candles_autograd() {
    for (i, shape) in shapes().iter().enumerate() {
        let directory = tempfile::tempdir().expect("temporary directory");
        write_model(directory.path(), shape, Stored::F32, SEED);
        for use_rslora in [false, true] {
            let adapter = lora(LoraConfig {
                use_rslora,
                ..LoraConfig::default()
            });
            let mut subject = Subject::new(directory.path(), adapter.as_ref(), DType::F32);
            randomise(&mut subject.params);
            let factors = subject.params.layout().by_name().count();
            let linears = shape.family.linears(shape).len();
            assert_eq!(
                factors,
                linears * 2 * shape.layers,
                "all linears of all layers"
            );
            let scale = if use_rslora {
                12.0 / 5.0_f64.sqrt()
            } else {
                12.0 / 5.0
            };
            let mut oracle = Oracle::new(shape, SEED);
            mirror(&mut oracle, &subject.params, scale);
            let label = format!("shape {i}, {:?}, rslora {use_rslora}", shape.family);
            let documents = examples(5, shape.vocab, SEED + i as u64);
            assert_equals_oracle(&subject, &oracle, &documents, &label);
        }
    }
}

#[test]
fn gradients_of_full_fine_tuning_equal_candles_autograd() {
    for (i, shape) in shapes().iter().enumerate() {
        let directory = tempfile::tempdir().expect("temporary directory");
        write_model(directory.path(), shape, Stored::F32, SEED);
        let subject = Subject::new(directory.path(), &FullFineTuning, DType::F32);
        let names: Vec<_> = subject.params.layout().by_name().collect();
        assert_eq!(
            names.len(),
            shape.tensors().len(),
            "every weight is trained"
        );
        let documents = examples(5, shape.vocab, SEED + i as u64);
        let oracle = Oracle::new(shape, SEED);
        assert_equals_oracle(
            &subject,
            &oracle,
            &documents,
            &format!("shape {i}, {:?}", shape.family),
        );
    }
}

#[test]
fn gradients_with_dropout_are_those_of_the_loss_with_the_same_masks() {
    let shape = Shape {
        bias: true,
        ..Shape::default()
    };
    let directory = tempfile::tempdir().expect("temporary directory");
    write_model(directory.path(), &shape, Stored::F32, SEED);
    let adapter = lora(LoraConfig {
        dropout: 0.3,
        ..LoraConfig::default()
    });
    let mut subject = Subject::new(directory.path(), adapter.as_ref(), DType::F32);
    randomise(&mut subject.params);
    let batch = packed(&examples(5, shape.vocab, SEED));
    let train = Mode::Train { seed: 3, step: 2 };
    let (loss, grads) = subject.loss_and_gradients(train, &batch);
    let (plain, _) = subject.loss_and_gradients(Mode::Eval, &batch);
    assert!((loss - plain).abs() > 1e-3 * plain, "dropout drops nothing");

    // Along the gradient itself, which is where f32 sees the most: central difference, step h.
    let start = subject.params.as_slice().to_vec();
    let square: f64 = grads.as_slice().iter().map(|g| f64::from(*g).powi(2)).sum();
    let mut loss_at = |h: f64| {
        let along = subject.params.as_mut_slice().iter_mut();
        for ((value, start), g) in along.zip(&start).zip(grads.as_slice()) {
            *value = (f64::from(*start) + h * f64::from(*g)) as f32;
        }
        subject.loss_and_gradients(train, &batch).0
    };
    let h = 2e-3 / square.sqrt();
    let slope = (loss_at(h) - loss_at(-h)) / (2.0 * h);
    let error = (slope - square).abs() / square;
    assert!(
        error < 5e-3,
        "the loss falls by {slope}, the gradient says {square}"
    );
}

#[test]
fn an_adapter_whose_b_is_zero_gives_the_base_output_bit_for_bit() {
    for (shape, stored, dtype) in [
        (
            Shape {
                bias: true,
                ..Shape::default()
            },
            Stored::F32,
            DType::F32,
        ),
        (
            Shape {
                tied: true,
                ..Shape::default()
            },
            Stored::Bf16,
            DType::Bf16,
        ),
    ] {
        let directory = tempfile::tempdir().expect("temporary directory");
        write_model(directory.path(), &shape, stored, SEED);
        let batch = packed(&examples(5, shape.vocab, SEED));
        let adapter = lora(LoraConfig::default());
        let mut adapted = Subject::new(directory.path(), adapter.as_ref(), dtype);
        let base = base_logits(directory.path(), dtype, &batch);
        assert_eq!(
            adapted.logits(&batch),
            base,
            "initial values change the base"
        );
        randomise(&mut adapted.params);
        assert_ne!(
            adapted.logits(&batch),
            base,
            "a random adapter changes nothing"
        );
    }
}

#[test]
fn init_lora_weights_false_starts_from_another_model() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let shape = Shape::default();
    write_model(directory.path(), &shape, Stored::F32, SEED);
    let batch = packed(&examples(3, shape.vocab, SEED));
    let init_lora_weights = InitLoraWeights::Random;
    let adapter = lora(LoraConfig {
        init_lora_weights,
        ..LoraConfig::default()
    });
    let adapted = Subject::new(directory.path(), adapter.as_ref(), DType::F32);
    let base = base_logits(directory.path(), DType::F32, &batch);
    assert_ne!(adapted.logits(&batch), base);
}

fn base_logits(directory: &Path, dtype: DType, batch: &PackedBatch) -> Vec<u32> {
    let config = DecoderConfig::open(directory).expect("config");
    let files = ModelFiles::open(directory).expect("weights");
    let layout = ParamLayoutBuilder::new().build().expect("empty");
    let mut params = FlatBuffer::zeros(&layout);
    let model = Model::load(&config, Vec::new(), &files, &mut params, dtype).expect("loads");
    let subject = Subject {
        model,
        params,
        workspace: Workspace::new(0),
    };
    subject.logits(batch)
}

#[test]
fn the_base_is_bit_identical_after_training() {
    for (stored, dtype) in [(Stored::F32, DType::F32), (Stored::Bf16, DType::Bf16)] {
        let directory = tempfile::tempdir().expect("temporary directory");
        let shape = Shape {
            bias: true,
            ..Shape::default()
        };
        write_model(directory.path(), &shape, stored, SEED);
        let path = directory.path().join("model.safetensors");
        let file_before = read(&path);
        let config = DecoderConfig::open(directory.path()).expect("config");
        let files = ModelFiles::open(directory.path()).expect("weights");
        let options = TrainerOptions {
            weights: dtype.into(),
            ..TrainerOptions::default()
        };
        let adapter = lora(LoraConfig {
            dropout: 0.1,
            ..LoraConfig::default()
        });
        let mut trainer =
            Trainer::new(&config, &files, adapter, Box::new(Solo), options).expect("trainer");
        let documents = examples(6, shape.vocab, SEED);
        let batch = packed(&documents);
        let first = trainer
            .step(std::slice::from_ref(&batch), 0.02)
            .expect("step");
        let mut last = first;
        for _ in 0..8 {
            last = trainer
                .step(std::slice::from_ref(&batch), 0.02)
                .expect("step");
        }
        assert!(last.loss() < first.loss(), "nothing was learnt");

        trainer.params_mut().as_mut_slice().fill(0.0);
        let logits = trainer
            .model()
            .logits(trainer.eval_pass(), trainer.params(), &batch)
            .expect("runs");
        let after: Vec<u32> = logits.to_f32_vec().iter().map(|v| v.to_bits()).collect();
        let base = base_logits(directory.path(), dtype, &batch);
        assert!(after == base, "{dtype:?}: training changed a frozen weight");
        assert!(read(&path) == file_before, "training changed the file");
    }
}
