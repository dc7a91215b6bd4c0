use super::super::convert;
use super::{InitLoraWeights, Start};
use crate::LoraConfig;
use crate::names::{self, Part};
use crate::testing::{adapter, attach, list};
use ferrotune_core::adapter::Adapter;
use ferrotune_core::params::FlatBuffer;
use ferrotune_kernels::rng::Stream;

fn random(buffer: &mut FlatBuffer, seed: u64) {
    let mut stream = Stream::new(seed);
    for value in buffer.as_mut_slice() {
        *value = stream.normal() as f32;
    }
}

#[test]
fn a_plain_lora_has_both_halves_to_the_last_bit() {
    let config = LoraConfig {
        rank: 3,
        alpha: 5.0,
        use_rslora: true,
        use_dora: true,
        rank_pattern: vec![("v_proj".into(), 2)],
        alpha_pattern: vec![("layers.1.self_attn.q_proj".into(), 7.0)],
        target_modules: list(&["q_proj", "v_proj"]),
        ..LoraConfig::default()
    };
    let (mut params, attachments) = attach(&adapter(config.clone()));
    random(&mut params, 1);
    let mut first = FlatBuffer::zeros(
        Start::zeros(params.layout())
            .expect("a layout")
            .factors()
            .layout(),
    );
    random(&mut first, 2);
    let start = Start::new(first);
    let plain = convert::join(&params, &start).expect("joins");
    let (expected, wide) = attach(&adapter(convert::config(&config)));
    for (before, after) in attachments.iter().zip(&wide) {
        assert_eq!(after.rank, 2 * before.rank);
        assert!((after.scale / before.scale - 1.0).abs() < 1e-6);
    }
    for (_, segment) in expected.layout().by_name() {
        let id = plain
            .layout()
            .find(&segment.spec.name)
            .expect("the same names");
        assert_eq!(plain.layout().segment(id).spec.shape, segment.spec.shape);
    }
    let mut again = FlatBuffer::zeros(params.layout());
    let split = convert::split(&plain, &mut again).expect("splits");
    for (id, _) in params.layout().by_name() {
        assert_eq!(params.get(id), again.get(id));
    }
    assert!(split.same(&start));
    let module = "model.layers.0.self_attn.q_proj";
    let id = plain
        .layout()
        .find(&names::tensor(module, Part::B))
        .expect("there");
    let (row, of_start) = (&plain.get(id)[..6], start.factors());
    let b0 = of_start
        .layout()
        .find(&names::tensor(module, Part::B))
        .expect("there");
    let negated: Vec<f32> = of_start.get(b0)[..3].iter().map(|v| -v).collect();
    assert_eq!(row[3..], negated);
}

#[test]
fn a_start_from_data_without_any_is_an_error() {
    for name in ["eva", "corda", "lora_ga"] {
        let config = LoraConfig {
            init_lora_weights: InitLoraWeights::from_name(name).expect("a start"),
            target_modules: list(&["q_proj"]),
            ..LoraConfig::default()
        };
        let method = adapter(config);
        let (mut params, _) = attach(&method);
        method.init(&mut params, 0).expect("random at first");
        let error = method.prepare(&mut params, &mut NoBase).expect_err(name);
        assert!(error.to_string().contains("Observation"), "{error}");
    }
}

struct NoBase;

impl ferrotune_core::adapter::BaseWeights for NoBase {
    fn vocabulary(&self) -> usize {
        0
    }

    fn embed(&self, _: &[u32]) -> ferrotune_core::Result<ferrotune_kernels::Tensor> {
        unreachable!("no start embeds tokens")
    }

    fn find(&self, _: &str) -> Option<ferrotune_core::adapter::SiteId> {
        None
    }

    fn read(
        &self,
        _: ferrotune_core::adapter::SiteId,
    ) -> ferrotune_core::Result<ferrotune_kernels::Tensor> {
        unreachable!("nothing is found")
    }

    fn replace(
        &mut self,
        _: ferrotune_core::adapter::SiteId,
        _: ferrotune_kernels::View<'_>,
    ) -> ferrotune_core::Result<()> {
        unreachable!("nothing is found")
    }
}
