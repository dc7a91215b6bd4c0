//! Prompts before documents: what they are equal to, their gradients, files, generation.

use crate::common::{Family, Stored, assert_close, examples, write_model};
use ferrotune::core::adapter::Adapter;
use ferrotune::core::data::{Example, PackedBatch};
use ferrotune::core::io::ModelFiles;
use ferrotune::core::model::{DecoderConfig, KvCache, Mode, Model, Pass};
use ferrotune::core::params::FlatBuffer;
use ferrotune::core::trainer::{Trainer, TrainerOptions, attach};
use ferrotune::kernels::linear_cross_entropy::Accumulator;
use ferrotune::kernels::{DType, Device, Workspace, host_cuda};
use ferrotune::lora::{MergeOptions, PeftConfig, load, merge};
use ferrotune::prelude::Solo;
use serde_json::{Map, Value, json};
use std::path::Path;

const SEED: u64 = 3;

/// Every method and variant.
fn configurations() -> Vec<Value> {
    let of = |peft_type: &str, keys: Value| {
        let mut object = json!({"peft_type": peft_type, "num_virtual_tokens": 3});
        let map = object.as_object_mut().expect("an object");
        map.extend(keys.as_object().expect("an object").clone());
        object
    };
    vec![
        of("PROMPT_TUNING", json!({})),
        of(
            "PROMPT_TUNING",
            json!({"prompt_tuning_init": "SAMPLE_VOCAB"}),
        ),
        of("P_TUNING", json!({"encoder_hidden_size": 9})),
        of(
            "P_TUNING",
            json!({"encoder_hidden_size": 5, "encoder_reparameterization_type": "LSTM"}),
        ),
        of("PREFIX_TUNING", json!({})),
        of(
            "PREFIX_TUNING",
            json!({"prefix_projection": true, "encoder_hidden_size": 9}),
        ),
    ]
}

fn adapter(keys: &Value, base: &Path) -> Box<dyn Adapter> {
    let object: Map<String, Value> = keys.as_object().expect("an object").clone();
    let config = PeftConfig::from_config("peft_config", &object).expect("a known method");
    let adapter = config.for_base(base).into_adapter("llama");
    adapter.expect("needs no targets")
}

fn documents(lengths: &[usize], vocab: usize) -> Vec<Example> {
    let document = |(i, &length): (usize, &usize)| {
        let ids: Vec<u32> = (0..length)
            .map(|t| ((t * 7 + i * 5 + 3) % vocab) as u32)
            .collect();
        Example {
            labels: ids.iter().map(|&id| id as i32).collect(),
            input_ids: ids,
        }
    };
    lengths.iter().enumerate().map(document).collect()
}

fn pack(documents: &[Example]) -> PackedBatch {
    PackedBatch::pack((0..).zip(documents))
}

/// A model with a method at its start.
struct Prompted {
    model: Model,
    params: FlatBuffer,
    method: Box<dyn Adapter>,
}

impl Prompted {
    fn new(base: &Path, method: Box<dyn Adapter>, device: &Device) -> Self {
        let config = DecoderConfig::open(base).expect("config");
        let files = ModelFiles::open(base).expect("weights");
        let (attachments, mut params) = attach(&config, method.as_ref()).expect("fits");
        params.move_to(device);
        let mut model =
            Model::load(&config, attachments, &files, &mut params, DType::F32).expect("loads");
        method.init(&mut params, SEED).expect("starts");
        method.prepare(&mut params, &mut model).expect("prepares");
        Self {
            model,
            params,
            method,
        }
    }

    fn logits(&self, batch: &PackedBatch) -> Vec<f32> {
        self.with_pass(|pass| {
            let logits = self.model.logits(pass, &self.params, batch);
            logits.expect("runs").to_f32_vec()
        })
    }

    /// Loss of all its trained tokens, with the gradient.
    fn gradient(&self, batch: &PackedBatch) -> (f64, FlatBuffer) {
        let mut grads = FlatBuffer::zeros_on(self.params.layout(), self.model.device());
        let mut sums = Accumulator::new(self.model.device());
        self.with_pass(|pass| {
            let (model, params) = (&self.model, &self.params);
            model.loss_and_gradients(pass, params, &mut grads, batch, &mut sums)
        })
        .expect("runs");
        let sums = sums.read().expect("sums");
        assert_eq!(sums.count, self.model.trained_tokens(batch) as u64);
        if self.method.completes_gradients() {
            let weight = sums.count as f32;
            let completed = self
                .method
                .complete_gradients(&self.params, weight, &mut grads);
            completed.expect("encoders run backward");
        }
        (sums.loss, grads)
    }

    fn with_pass<R>(&self, run: impl FnOnce(Pass<'_>) -> R) -> R {
        let workspace = Workspace::on(self.model.device().clone(), 0);
        run(Pass {
            workspace: &workspace,
            dtype: DType::F32,
            mode: Mode::Eval,
        })
    }
}

/// Families, each with the CPU and the stand-in for a GPU.
fn everywhere() -> Vec<(Family, Device, tempfile::TempDir)> {
    let devices = || [Device::Cpu, Device::Cuda(host_cuda::device())];
    let pairs = Family::ALL
        .into_iter()
        .flat_map(|f| devices().map(|d| (f, d)));
    let written = |(family, device): (Family, Device)| {
        let directory = tempfile::tempdir().expect("temporary directory");
        write_model(directory.path(), &family.shape(), Stored::F32, SEED);
        (family, device, directory)
    };
    pairs.map(written).collect()
}

#[test]
fn a_prompt_of_embeddings_of_tokens_is_those_tokens() {
    for (family, device, base) in everywhere() {
        let vocab = family.shape().vocab;
        let keys = &configurations()[0];
        let mut prompted = Prompted::new(base.path(), adapter(keys, base.path()), &device);
        let prompt = *prompted.model.prompt().expect("a prompt");
        let tokens: [u32; 3] = [5, 2, 9];
        use ferrotune::core::adapter::BaseWeights;
        let rows = prompted.model.embed(&tokens).expect("in the vocabulary");
        prompted
            .params
            .get_mut(prompt.rows)
            .copy_from_slice(&rows.to_f32_vec());

        let short = documents(&[6, 4], vocab);
        let long: Vec<Example> = short
            .iter()
            .map(|document| {
                let ids: Vec<u32> = [&tokens[..], &document.input_ids].concat();
                let labels = ids.iter().map(|&id| id as i32).collect();
                Example {
                    input_ids: ids,
                    labels,
                }
            })
            .collect();
        let ours = prompted.logits(&pack(&short));
        let whole = prompted_without(base.path(), &device, &pack(&long));
        let own = [3..9, 12..16].map(|rows: std::ops::Range<usize>| {
            whole[rows.start * vocab..rows.end * vocab].to_vec()
        });
        assert_close(
            &ours,
            &own.concat(),
            2e-5,
            &format!("{family:?} on {device:?}"),
        );
    }
}

/// Logits of the base alone.
fn prompted_without(base: &Path, device: &Device, batch: &PackedBatch) -> Vec<f32> {
    let config = DecoderConfig::open(base).expect("config");
    let files = ModelFiles::open(base).expect("weights");
    let mut none = FlatBuffer::zeros_on(&Default::default(), device);
    let model = Model::load(&config, Vec::new(), &files, &mut none, DType::F32).expect("loads");
    let workspace = Workspace::on(device.clone(), 0);
    let pass = Pass {
        workspace: &workspace,
        dtype: DType::F32,
        mode: Mode::Eval,
    };
    model.logits(pass, &none, batch).expect("runs").to_f32_vec()
}

#[test]
fn packed_documents_are_documents_one_by_one() {
    for (family, device, base) in everywhere() {
        for keys in configurations() {
            let prompted = Prompted::new(base.path(), adapter(&keys, base.path()), &device);
            let all = documents(&[6, 1, 9], family.shape().vocab);
            let what = format!("{family:?} on {device:?}, {keys}");
            let (loss, grads) = prompted.gradient(&pack(&all));
            let (mut sum, mut logits) = (0.0, Vec::new());
            let mut summed = vec![0.0; grads.as_slice().len()];
            for document in &all {
                let batch = pack(std::slice::from_ref(document));
                let (loss, grads) = prompted.gradient(&batch);
                sum += loss;
                let each = summed.iter_mut().zip(grads.as_slice());
                each.for_each(|(sum, g)| *sum += g);
                logits.extend(prompted.logits(&batch));
            }
            assert!((loss - sum).abs() < 1e-5 * sum, "{what}: {loss}, {sum}");
            assert_close(grads.as_slice(), &summed, 1e-5, &what);
            assert_close(&prompted.logits(&pack(&all)), &logits, 1e-5, &what);
        }
    }
}

#[test]
fn gradients_are_slopes_of_the_loss() {
    for (family, device, base) in everywhere() {
        for keys in configurations() {
            let mut prompted = Prompted::new(base.path(), adapter(&keys, base.path()), &device);
            let batch = pack(&documents(&[6, 9], family.shape().vocab));
            let (_, grads) = prompted.gradient(&batch);
            let square: f64 = grads.as_slice().iter().map(|g| f64::from(*g).powi(2)).sum();
            let norm = square.sqrt();
            let start = prompted.params.clone();
            let mut loss_at = |distance: f64| {
                let moved = start.as_slice().iter().zip(grads.as_slice());
                let moved: Vec<f32> = moved
                    .map(|(p, g)| (f64::from(*p) + distance * f64::from(*g) / norm) as f32)
                    .collect();
                prompted.params.as_mut_slice().copy_from_slice(&moved);
                encode(prompted.method.as_ref(), &mut prompted.params);
                prompted.gradient(&batch).0
            };
            let step = 2e-2 / norm.max(2.0);
            let slope = (loss_at(step) - loss_at(-step)) / (2.0 * step);
            assert!(
                (slope - norm).abs() < 0.03 * norm,
                "{family:?} on {device:?}, {keys}: slope {slope}, gradient {norm}"
            );
        }
    }
}

/// What the trainer does after a step: rows are made again.
fn encode(method: &dyn Adapter, params: &mut FlatBuffer) {
    let grads = FlatBuffer::zeros(params.layout());
    let done = ferrotune::core::adapter::StepDone {
        step: 0,
        grads: &grads,
        grad_scale: 1.0,
        state: &mut [],
    };
    method.after_step(params, done).expect("encoders run");
}

#[test]
fn tokens_one_at_a_time_give_the_logits_of_the_whole() {
    for (family, device, base) in everywhere() {
        let vocab = family.shape().vocab;
        for keys in configurations() {
            let prompted = Prompted::new(base.path(), adapter(&keys, base.path()), &device);
            let document = documents(&[13], vocab).remove(0);
            let ids = &document.input_ids;
            let mut cache = KvCache::new(&prompted.model, DType::F32, ids.len());
            for end in 4..=ids.len() {
                let new = if end == 4 {
                    &ids[..4]
                } else {
                    &ids[end - 1..end]
                };
                let step = prompted.with_pass(|pass| {
                    let (model, params) = (&prompted.model, &prompted.params);
                    model.extend(pass, params, &mut [&mut cache], &[new])
                });
                let step = step.expect("room for it").to_f32_vec();
                let mut so_far = document.clone();
                so_far.input_ids.truncate(end);
                so_far.labels.truncate(end);
                let whole = prompted.logits(&pack(&[so_far]));
                let last = &whole[(end - 1) * vocab..];
                let what = format!("{family:?} on {device:?}, {keys}, token {end}");
                assert_close(&step, last, 2e-5, &what);
            }
        }
    }
}

fn llama() -> tempfile::TempDir {
    let base = tempfile::tempdir().expect("temporary directory");
    write_model(base.path(), &Family::Llama.shape(), Stored::F32, SEED);
    base
}

fn trainer(keys: &Value, base: &Path) -> Trainer {
    let config = DecoderConfig::open(base).expect("config");
    let files = ModelFiles::open(base).expect("weights");
    let options = TrainerOptions::default();
    Trainer::new(
        &config,
        &files,
        adapter(keys, base),
        Box::new(Solo),
        options,
    )
    .expect("fits")
}

#[test]
fn prompts_learn_stop_go_on_and_are_saved() {
    let base = llama();
    let batch = pack(&examples(4, Family::Llama.shape().vocab, SEED));
    for keys in configurations() {
        let run = |trainer: &mut Trainer, steps: usize| {
            for _ in 0..steps {
                trainer
                    .step(std::slice::from_ref(&batch), 2e-2)
                    .expect("a step");
            }
        };
        let mut whole = trainer(&keys, base.path());
        let before = whole
            .evaluate(std::slice::from_ref(&batch))
            .expect("runs")
            .loss;
        run(&mut whole, 8);
        let after = whole
            .evaluate(std::slice::from_ref(&batch))
            .expect("runs")
            .loss;
        assert!(after < before, "{keys}: {before} before, {after} after");

        // By way of files, as a checkpoint has it.
        let place = tempfile::tempdir().expect("temporary directory");
        let mut first = trainer(&keys, base.path());
        run(&mut first, 3);
        first
            .adapter()
            .save(first.params(), place.path())
            .expect("saved");
        let mut second = trainer(&keys, base.path());
        let mut params = FlatBuffer::zeros(second.params().layout());
        let read = second.adapter().load(&mut params, place.path());
        read.expect("reads what was saved");
        second.restore(3, &params, &first.state());
        run(&mut second, 5);
        assert_eq!(
            second.params().as_slice(),
            whole.params().as_slice(),
            "{keys}"
        );

        let saved = tempfile::tempdir().expect("temporary directory");
        whole
            .adapter()
            .save(whole.params(), saved.path())
            .expect("saved");
        let rows = whole.model().prompt().expect("a prompt").rows;
        let rows = whole.params().get(rows);
        // With its encoder, and as PEFT leaves it, without.
        for _ in 0..2 {
            let method = load(saved.path(), whole.model().config()).expect("an adapter");
            let mut read = Prompted::new(base.path(), method, &Device::Cpu);
            let loaded = read.method.load(&mut read.params, saved.path());
            loaded.expect("its tensors");
            let prompt = read.model.prompt().expect("a prompt").rows;
            assert_eq!(read.params.get(prompt), rows, "{keys}");
            let _ = std::fs::remove_file(saved.path().join("prompt_encoder.safetensors"));
        }
        let merged = place.path().join("merged");
        let error = merge(base.path(), saved.path(), &merged, &MergeOptions::default());
        let error = error.expect_err("no weight changes").to_string();
        assert!(error.contains("without merging"), "{error}");
        assert!(!merged.exists());
    }
}

#[test]
fn mistakes_are_named() {
    let base = llama();
    let config = DecoderConfig::open(base.path()).expect("config");
    let cases = [
        (json!({"peft_type": "PROMPT_TUNING"}), "num_virtual_tokens"),
        (
            json!({"peft_type": "P_TUNING", "num_virtual_tokens": 0}),
            "at least 1",
        ),
        (
            json!({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2, "prompt_tuning_init": "TEXT"}),
            "prompt_tuning_init_text",
        ),
        (
            json!({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2, "prompt_tuning_init": "SAMPLE"}),
            "SAMPLE_VOCAB",
        ),
        (
            json!({"peft_type": "P_TUNING", "num_virtual_tokens": 2, "encoder_reparameterization_type": "GRU"}),
            "LSTM",
        ),
        (
            json!({
                "peft_type": "P_TUNING", "num_virtual_tokens": 2, "encoder_dropout": 0.1,
                "encoder_reparameterization_type": "LSTM",
            }),
            "encoder_dropout",
        ),
        (
            json!({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2, "init_weights": "one"}),
            "\"zero\"",
        ),
        (
            json!({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2, "token_dim": 5}),
            "another base",
        ),
        (
            json!({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2, "target_modules": ["q_proj"]}),
            "target_modules",
        ),
    ];
    for (keys, part) in cases {
        let object: Map<String, Value> = keys.as_object().expect("an object").clone();
        let attached = PeftConfig::from_config("peft_config", &object)
            .and_then(|c| c.into_adapter("llama"))
            .and_then(|a| attach(&config, a.as_ref()).map(|_| ()));
        let message = attached.expect_err("refused").to_string();
        assert!(message.contains(part), "{keys}: {message}");
    }
}
