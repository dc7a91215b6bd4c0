//! Tokens one at a time, with keys and values kept, give the logits of the whole document.

use crate::common::{Family, Stored, assert_close, examples, write_model};
use ferrotune::core::adapter::Adapter;
use ferrotune::core::data::PackedBatch;
use ferrotune::core::io::ModelFiles;
use ferrotune::core::model::{DecoderConfig, KvCache, Mode, Model, Pass};
use ferrotune::core::params::{FlatBuffer, ParamLayoutBuilder};
use ferrotune::core::trainer::attach;
use ferrotune::kernels::{DType, Device, Workspace, host_cuda};
use ferrotune::lora::{InitLoraWeights, LoraAdapter, LoraConfig, TargetModules};

const SEED: u64 = 17;
/// Of the largest logit: the products of one row and of many sum in another order.
const TOLERANCE: f32 = 2e-5;

#[test]
fn tokens_one_at_a_time_give_the_logits_of_the_whole() {
    for (family, device) in Family::ALL
        .into_iter()
        .flat_map(|f| [(f, Device::Cpu), (f, Device::Cuda(host_cuda::device()))])
    {
        let directory = tempfile::tempdir().expect("temporary directory");
        let shape = family.shape();
        write_model(directory.path(), &shape, Stored::F32, SEED);
        let config = DecoderConfig::open(directory.path()).expect("config");
        let files = ModelFiles::open(directory.path()).expect("weights");
        let layout = ParamLayoutBuilder::new().build().expect("empty");
        let mut params = FlatBuffer::zeros_on(&layout, &device);
        let model =
            Model::load(&config, Vec::new(), &files, &mut params, DType::F32).expect("loads");
        let workspace = Workspace::on(device.clone(), 0);
        let pass = Pass {
            workspace: &workspace,
            dtype: DType::F32,
            mode: Mode::Eval,
        };
        // Longer than a window, and than Phi 3's first context.
        let mut document = examples(1, shape.vocab, SEED).remove(0);
        document.input_ids = (0..17).map(|i| (i * 7 + 3) % shape.vocab as u32).collect();
        document.labels = document.input_ids.iter().map(|id| *id as i32).collect();
        let ids = document.input_ids.clone();
        let mut cache = KvCache::new(&model, DType::F32, ids.len());
        for end in 5..=ids.len() {
            let new = if end == 5 {
                &ids[..5]
            } else {
                &ids[end - 1..end]
            };
            let step = model
                .extend(pass, &params, &mut [&mut cache], &[new])
                .expect("room for it");
            let mut so_far = document.clone();
            so_far.input_ids.truncate(end);
            so_far.labels.truncate(end);
            let batch = PackedBatch::pack([(0, &so_far)]);
            let whole = model
                .logits(pass, &params, &batch)
                .expect("runs")
                .to_f32_vec();
            let last = &whole[(end - 1) * shape.vocab..];
            let what = format!("{family:?} on {device:?}, token {end}");
            assert_close(&step.to_f32_vec(), last, TOLERANCE, &what);
        }
        assert_eq!(cache.len(), ids.len());
    }
}

/// What comes before a document's last invocation is the base's, an answer after it has the updates, and another question
/// asks anew where they act.
#[test]
fn updates_that_tokens_call_up_act_in_an_answer_as_in_the_whole() {
    for device in [Device::Cpu, Device::Cuda(host_cuda::device())] {
        let directory = tempfile::tempdir().expect("temporary directory");
        let shape = Family::Llama.shape();
        write_model(directory.path(), &shape, Stored::F32, SEED);
        let config = DecoderConfig::open(directory.path()).expect("config");
        let files = ModelFiles::open(directory.path()).expect("weights");
        let lora = LoraConfig {
            target_modules: Some(TargetModules::AllLinear),
            init_lora_weights: InitLoraWeights::Random,
            alora_invocation_tokens: Some(vec![9, 4]),
            ..LoraConfig::default()
        };
        let adapter = LoraAdapter::new(lora, "llama").expect("valid");
        let (attachments, mut params) = attach(&config, &adapter).expect("attaches");
        adapter.init(&mut params, SEED).expect("random");
        params.move_to(&device);
        let model = Model::load(&config, attachments, &files, &mut params, DType::F32);
        let model = model.expect("loads");
        let layout = ParamLayoutBuilder::new().build().expect("empty");
        let mut none = FlatBuffer::zeros_on(&layout, &device);
        let base = Model::load(&config, Vec::new(), &files, &mut none, DType::F32);
        let base = base.expect("loads");
        let workspace = Workspace::on(device.clone(), 0);
        let pass = Pass {
            workspace: &workspace,
            dtype: DType::F32,
            mode: Mode::Eval,
        };
        let logits = |model: &Model, params: &FlatBuffer, ids: &[u32]| {
            let mut document = examples(1, shape.vocab, SEED).remove(0);
            document.input_ids = ids.to_vec();
            document.labels = ids.iter().map(|id| *id as i32).collect();
            let batch = PackedBatch::pack([(0, &document)]);
            let all = model.logits(pass, params, &batch).expect("runs");
            all.to_f32_vec()
        };
        // A question, four tokens of an answer, another question, and its answer.
        let ids = [3, 9, 4, 5, 9, 4, 6, 7, 8, 2, 1, 9, 4, 3, 5, 6];
        let mut cache = KvCache::new(&model, DType::F32, ids.len());
        let mut seen = 0;
        for new in [6, 1, 1, 1, 1, 3, 1, 1, 1] {
            let step = model.extend(pass, &params, &mut [&mut cache], &[&ids[seen..seen + new]]);
            let step = step.expect("room for it").to_f32_vec();
            seen += new;
            let whole = logits(&model, &params, &ids[..seen]);
            let last = &whole[(seen - 1) * shape.vocab..];
            let what = format!("on {device:?}, {seen} tokens");
            assert_close(&step, last, TOLERANCE, &what);
            let start = if seen < 13 { 4 } else { 11 };
            let plain = logits(&base, &none, &ids[..seen]);
            let [whole, plain] = [&whole, &plain].map(|all| all.split_at(start * shape.vocab));
            assert_close(whole.0, plain.0, TOLERANCE, &what);
            let apart = whole.1.iter().zip(plain.1).map(|(a, b)| (a - b).abs());
            assert!(apart.fold(0.0, f32::max) > 0.1, "{what}: no update acts");
        }
    }
}
