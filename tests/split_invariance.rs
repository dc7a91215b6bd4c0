//! The same rows give the same gradient however they are split: into micro-batches, accumulation,
//! packs and ranks.

mod common;

use common::{Family, Shape, Stored, examples, write_model};
use ferrotune::core::adapter::Adapter;
use ferrotune::core::data::{Example, PackedBatch};
use ferrotune::core::full::FullFineTuning;
use ferrotune::core::io::ModelFiles;
use ferrotune::core::model::DecoderConfig;
use ferrotune::core::process_group::{ProcessGroup, Solo};
use ferrotune::core::run_log::StepReport;
use ferrotune::core::trainer::{Trainer, TrainerOptions};
use ferrotune::dist::Local;
use ferrotune::kernels::rng::{Stream, key_for, philox4x32};
use ferrotune::lora::{LoraAdapter, LoraConfig, TargetModules};
use std::path::Path;
use std::time::Duration;

/// Rows of one micro-batch, in its order.
type Rows = Vec<usize>;

#[derive(Clone, Copy, Debug)]
enum Method {
    Lora {
        dropout: f64,
    },
    /// LoRA with noise on embeddings.
    Noisy,
    Full,
}

impl Method {
    fn adapter(self) -> Box<dyn Adapter> {
        let dropout = match self {
            Self::Full => return Box::new(FullFineTuning),
            Self::Lora { dropout } => dropout,
            Self::Noisy => 0.0,
        };
        let config = LoraConfig {
            rank: 4,
            dropout,
            target_modules: Some(TargetModules::from_text("all-linear")),
            ..LoraConfig::default()
        };
        Box::new(LoraAdapter::new(config, "llama").expect("valid"))
    }
}

/// What one step did.
struct Step {
    report: StepReport,
    grads: Vec<f32>,
    params: Vec<f32>,
}

/// One step of one rank over its micro-batches, from random A and B.
fn step(
    base: &Path,
    method: Method,
    documents: &[Example],
    micro_batches: &[Rows],
    group: Box<dyn ProcessGroup>,
) -> Step {
    let config = DecoderConfig::open(base).expect("config");
    let files = ModelFiles::open(base).expect("weights");
    let options = TrainerOptions {
        neftune_noise_alpha: if matches!(method, Method::Noisy) {
            5.0
        } else {
            0.0
        },
        ..TrainerOptions::default()
    };
    let mut trainer =
        Trainer::new(&config, &files, method.adapter(), group, options).expect("trainer");
    if !matches!(method, Method::Full) {
        let mut stream = Stream::new(key_for(5, "adapter"));
        let layout = std::sync::Arc::clone(trainer.params().layout());
        for (id, _) in layout.by_name() {
            let values = trainer.params_mut().get_mut(id);
            values
                .iter_mut()
                .for_each(|v| *v = (stream.normal() * 0.1) as f32);
        }
    }
    let batches: Vec<PackedBatch> = micro_batches
        .iter()
        .map(|rows| PackedBatch::pack(rows.iter().map(|&row| (row as u64, &documents[row]))))
        .collect();
    let report = trainer.step(&batches, 1e-3).expect("step");
    Step {
        report,
        grads: trainer.grads().as_slice().to_vec(),
        params: trainer.params().as_slice().to_vec(),
    }
}

/// The step of every rank, each with its own micro-batches.
fn step_on_ranks(
    base: &Path,
    method: Method,
    documents: &[Example],
    ranks: &[Vec<Rows>],
) -> Vec<Step> {
    let groups = Local::group(ranks.len(), Duration::from_secs(60));
    std::thread::scope(|scope| {
        let threads: Vec<_> = groups
            .into_iter()
            .zip(ranks)
            .map(|(group, rows)| {
                scope.spawn(move || step(base, method, documents, rows, Box::new(group)))
            })
            .collect();
        threads
            .into_iter()
            .map(|t| t.join().expect("rank"))
            .collect()
    })
}

/// `|a - b| / |b|`.
fn norm_relative(a: &[f32], b: &[f32]) -> f64 {
    let square = |d: f64| d * d;
    let difference: f64 = a
        .iter()
        .zip(b)
        .map(|(a, b)| square(f64::from(*a) - f64::from(*b)))
        .sum();
    let size: f64 = b.iter().map(|b| square(f64::from(*b))).sum();
    (difference / size).sqrt()
}

fn assert_same(step: &Step, whole: &Step, label: &str) {
    let (ours, theirs) = (&step.report, &whole.report);
    assert_eq!(ours.trained_tokens, theirs.trained_tokens, "{label}");
    assert_eq!(ours.tokens, theirs.tokens, "{label}");
    let error = norm_relative(&step.grads, &whole.grads);
    assert!(error <= 1e-6, "{label}: gradients differ by {error:.2e}");
    let error = norm_relative(&step.params, &whole.params);
    assert!(error <= 1e-5, "{label}: parameters differ by {error:.2e}");
    let error = (ours.loss() - theirs.loss()).abs() / theirs.loss();
    assert!(error <= 1e-6, "{label}: losses differ by {error:.2e}");
}

fn check(method: Method, family: Family) {
    let directory = tempfile::tempdir().expect("temporary directory");
    let base = directory.path();
    // Weights large enough that a wrong mask or position shows.
    let plain = family.shape();
    let shape = Shape {
        bias: plain.family == Family::Llama,
        gain: 1.4,
        ..plain
    };
    write_model(base, &shape, Stored::F32, 3);
    let documents = examples(8, shape.vocab, 3);
    let solo = |rows: &[Rows]| step(base, method, &documents, rows, Box::new(Solo));
    let whole = solo(&[(0..8).collect()]);

    let splits: [(&str, Vec<Rows>); 6] = [
        ("one row each", (0..8).map(|row| vec![row]).collect()),
        ("uneven", vec![vec![0, 1, 2], vec![3, 4, 5, 6, 7]]),
        (
            "another order",
            vec![vec![7, 2, 5], vec![0, 6], vec![4, 3, 1]],
        ),
        (
            "one pack in another order",
            vec![vec![3, 1, 4, 0, 5, 2, 7, 6]],
        ),
        (
            "an empty micro-batch",
            vec![vec![0, 1, 2, 3], vec![], vec![4, 5, 6, 7]],
        ),
        (
            "only the last one is not empty",
            vec![vec![], (0..8).collect()],
        ),
    ];
    for (label, split) in &splits {
        let what = format!("{family:?}, {method:?}, {label}");
        assert_same(&solo(split), &whole, &what);
    }

    let ranks: [(&str, Vec<Vec<Rows>>); 4] = [
        (
            "two ranks",
            vec![vec![vec![0, 1, 2, 3]], vec![vec![4, 5, 6, 7]]],
        ),
        (
            "two ranks, accumulated",
            vec![vec![vec![0, 2], vec![4, 6]], vec![vec![1], vec![3, 5, 7]]],
        ),
        (
            "a rank without rows",
            vec![vec![(0..8).collect()], vec![vec![]]],
        ),
        (
            "three ranks",
            vec![
                vec![vec![6, 7, 0]],
                vec![vec![1, 5]],
                vec![vec![2], vec![3, 4]],
            ],
        ),
    ];
    for (label, rows) in &ranks {
        let steps = step_on_ranks(base, method, &documents, rows);
        for step in &steps {
            assert_same(step, &whole, &format!("{family:?}, {method:?}, {label}"));
            let same = step.params.iter().zip(&steps[0].params);
            assert!(
                same.into_iter().all(|(a, b)| a.to_bits() == b.to_bits()),
                "{label}: ranks have different parameters"
            );
        }
    }
}

#[test]
fn lora_gradients_do_not_depend_on_the_split() {
    check(Method::Lora { dropout: 0.0 }, Family::Llama);
}

#[test]
fn lora_gradients_do_not_depend_on_the_split_with_dropout() {
    for family in Family::ALL {
        check(Method::Lora { dropout: 0.25 }, family);
    }
}

#[test]
fn lora_gradients_do_not_depend_on_the_split_with_noise_on_embeddings() {
    for family in Family::ALL {
        check(Method::Noisy, family);
    }
}

/// Training with noise is evaluating with an embedding that has the noise in it.
#[test]
fn noise_is_added_to_embeddings_in_training_alone_as_its_definition_says() {
    let base = tempfile::tempdir().expect("temporary directory");
    let shape = Shape::default();
    write_model(base.path(), &shape, Stored::F32, 3);
    let config = DecoderConfig::open(base.path()).expect("config");
    let files = ModelFiles::open(base.path()).expect("weights");
    let trainer = |alpha: f32| {
        let options = TrainerOptions {
            neftune_noise_alpha: alpha,
            ..TrainerOptions::default()
        };
        let full = Box::new(FullFineTuning);
        Trainer::new(&config, &files, full, Box::new(Solo), options).expect("trainer")
    };
    // Every token once, so that a row of the table is one token's.
    let ids: Vec<u32> = (5..22).collect();
    let document = Example {
        labels: ids.iter().map(|&id| id as i32).collect(),
        input_ids: ids.clone(),
    };
    let batch = [PackedBatch::pack([(0, &document)])];
    let mut noisy = trainer(5.0);
    let evaluated = noisy.evaluate(&batch).expect("evaluated").loss;
    let trained = noisy.step(&batch, 0.0).expect("step").loss();

    let mut plain = trainer(0.0);
    assert_eq!(plain.evaluate(&batch).expect("evaluated").loss, evaluated);
    let layout = std::sync::Arc::clone(plain.params().layout());
    let segments = layout.by_name();
    let (table, _) = segments
        .into_iter()
        .find(|(_, segment)| segment.spec.name.contains("embed_tokens"))
        .expect("the embedding is trained");
    let (seed, width) = (
        key_for(TrainerOptions::default().seed, "neftune"),
        shape.hidden,
    );
    let largest = 5.0 / ((ids.len() * width) as f32).sqrt();
    let values = plain.params_mut().get_mut(table);
    for (position, &id) in (0..).zip(&ids) {
        for column in 0..width {
            let words = philox4x32(
                [column as u32 / 4, position, 0, 0],
                [seed as u32, (seed >> 32) as u32],
            );
            let uniform = words[column % 4] as f32 / 2.0_f32.powi(31) - 1.0;
            values[id as usize * width + column] += uniform * largest;
        }
    }
    let expected = plain.evaluate(&batch).expect("evaluated").loss;
    assert!(
        (trained - expected).abs() <= 1e-6 * expected,
        "{trained} {expected}"
    );
    assert!(
        (trained - evaluated).abs() > 1e-3 * evaluated,
        "{trained} {evaluated}"
    );
}

#[test]
fn gradients_of_full_fine_tuning_do_not_depend_on_the_split() {
    for family in Family::ALL {
        check(Method::Full, family);
    }
}

#[test]
fn dropout_changes_the_gradient_and_the_mask_follows_the_row_not_its_place() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let base = directory.path();
    let shape = Shape::default();
    write_model(base, &shape, Stored::F32, 3);
    let documents = examples(2, shape.vocab, 3);
    let rows = [vec![0, 1]];
    let run = |dropout, documents: &[Example]| {
        step(
            base,
            Method::Lora { dropout },
            documents,
            &rows,
            Box::new(Solo),
        )
        .grads
    };
    let dropped = run(0.25, &documents);
    assert!(norm_relative(&dropped, &run(0.0, &documents)) > 1e-2);
    // The same two rows under each other's ids draw other masks.
    let swapped = [documents[1].clone(), documents[0].clone()];
    assert!(norm_relative(&run(0.25, &swapped), &dropped) > 1e-2);
    assert!(norm_relative(&run(0.0, &swapped), &run(0.0, &documents)) <= 1e-6);
}

#[test]
fn a_step_in_which_no_rank_has_a_trained_token_is_an_error_and_changes_nothing() {
    let directory = tempfile::tempdir().expect("temporary directory");
    write_model(directory.path(), &Shape::default(), Stored::F32, 3);
    let config = DecoderConfig::open(directory.path()).expect("config");
    let files = ModelFiles::open(directory.path()).expect("weights");
    let adapter = Method::Lora { dropout: 0.0 }.adapter();
    let options = TrainerOptions::default();
    let mut trainer =
        Trainer::new(&config, &files, adapter, Box::new(Solo), options).expect("trainer");
    let before = trainer.params().as_slice().to_vec();
    let error = trainer
        .step(&[PackedBatch::pack([])], 1e-3)
        .expect_err("no token to train");
    assert!(
        error.to_string().contains("no token of this batch"),
        "{error}"
    );
    assert_eq!(trainer.params().as_slice(), before);
    assert_eq!(trainer.steps_done(), 0);
}
