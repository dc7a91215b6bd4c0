//! Tokens one at a time, with keys and values kept, give the logits of the whole document.

mod common;

use common::{Family, Stored, assert_close, examples, write_model};
use ferrotune::core::data::PackedBatch;
use ferrotune::core::io::ModelFiles;
use ferrotune::core::model::{DecoderConfig, KvCache, Mode, Model, Pass};
use ferrotune::core::params::{FlatBuffer, ParamLayoutBuilder};
use ferrotune::kernels::{DType, Device, Workspace, host_cuda};

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
