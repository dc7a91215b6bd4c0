use super::{InitLoraWeights, LoraAdapter, LoraConfig};
use crate::PeftConfig;
use crate::names::{self, Part};
use crate::testing::{adapter, attach, copy_of, edit_config, list, llama_sites};
use ferrotune_core::adapter::{Adapter, LowRank};
use ferrotune_core::params::{FlatBuffer, ParamLayoutBuilder};

fn attach_error(config: LoraConfig) -> String {
    adapter(config)
        .attach(&llama_sites(2), &mut ParamLayoutBuilder::new())
        .expect_err("refused")
        .to_string()
}

fn tensor<'a>(params: &'a FlatBuffer, module: &str, part: Part) -> &'a [f32] {
    let name = names::tensor(module, part);
    params.get(params.layout().find(&name).expect("attached"))
}

#[test]
fn targets_null_means_the_default_of_the_architecture() {
    let adapter = adapter(LoraConfig::default());
    let (params, attachments) = attach(&adapter);
    let names: Vec<&str> = params
        .layout()
        .by_name()
        .map(|(_, s)| s.spec.name.as_str())
        .collect();
    assert_eq!(attachments.len(), 4);
    assert_eq!(
        names[..2],
        [
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
        ]
    );
    let unknown = LoraAdapter::new(LoraConfig::default(), "unheard_of").expect_err("no default");
    assert!(unknown.to_string().contains("unheard_of"), "{unknown}");
}

#[test]
fn shapes_scale_and_order_follow_the_site() {
    let config = LoraConfig {
        rank: 4,
        alpha: 10.0,
        dropout: 0.25,
        target_modules: list(&["down_proj"]),
        ..LoraConfig::default()
    };
    let rslora = LoraConfig {
        use_rslora: true,
        ..config.clone()
    };
    let (params, attachments) = attach(&adapter(config));
    let LowRank {
        a,
        b,
        rank,
        scale,
        dropout,
        magnitude,
        bias,
    } = attachments[0];
    assert_eq!((rank, scale, dropout), (4, 2.5, 0.25));
    assert_eq!((magnitude, bias), (None, None));
    let (a, b) = (
        &params.layout().segment(a).spec,
        &params.layout().segment(b).spec,
    );
    assert_eq!(
        (a.shape.as_slice(), b.shape.as_slice()),
        (&[4, 64][..], &[32, 4][..])
    );
    let down = llama_sites(2)
        .into_iter()
        .find(|s| s.name.ends_with("0.mlp.down_proj"));
    assert_eq!(
        Some(a.execution_order),
        down.map(|site| site.execution_order)
    );
    assert_eq!(attach(&adapter(rslora)).1[0].scale, 5.0);
}

#[test]
fn rank_and_alpha_patterns_reach_shapes_and_scale() {
    let config = LoraConfig {
        rank: 8,
        alpha: 16.0,
        rank_pattern: vec![("layers.1.self_attn.q_proj".into(), 2)],
        alpha_pattern: vec![("v_proj".into(), 4.0)],
        ..LoraConfig::default()
    };
    let (_, attachments) = attach(&adapter(config));
    let found: Vec<_> = attachments.iter().map(|l| (l.rank, l.scale)).collect();
    assert_eq!(found, [(8, 2.0), (8, 0.5), (2, 8.0), (8, 0.5)]);
}

#[test]
fn a_norm_is_refused_and_the_way_to_train_it_named() {
    let message = attach_error(LoraConfig {
        target_modules: list(&["q_proj", "norm"]),
        ..LoraConfig::default()
    });
    assert!(
        message.contains("model.norm") && message.contains("modules_to_save"),
        "{message}"
    );
}

#[test]
fn values_out_of_range_are_refused() {
    let default = LoraConfig::default;
    for (config, key) in [
        (
            LoraConfig {
                rank: 0,
                ..default()
            },
            "`r`",
        ),
        (
            LoraConfig {
                rank_pattern: vec![("q_proj".into(), 0)],
                ..default()
            },
            "`rank_pattern`",
        ),
        (
            LoraConfig {
                alpha: f64::NAN,
                ..default()
            },
            "`lora_alpha`",
        ),
        (
            LoraConfig {
                dropout: 1.0,
                ..default()
            },
            "`lora_dropout`",
        ),
        (
            LoraConfig {
                dropout: -0.1,
                ..default()
            },
            "`lora_dropout`",
        ),
    ] {
        let error = LoraAdapter::new(config, "llama")
            .expect_err("refused")
            .to_string();
        assert!(error.contains(key), "{error}");
    }
}

/// PyTorch's `Dropout(1)` is legal, and does nothing in inference.
#[test]
fn dropout_of_a_file_may_drop_everything() {
    let copy = copy_of("lora_qv");
    edit_config(copy.path(), "lora_dropout", serde_json::json!(1.0));
    let adapter = crate::testing::load(copy.path()).expect("loads");
    let mut params = ParamLayoutBuilder::new();
    adapter
        .attach(&llama_sites(2), &mut params)
        .expect("attaches");
    let mut params = FlatBuffer::zeros(&params.build().expect("unique names"));
    adapter.load(&mut params, copy.path()).expect("reads");
    adapter.save(&params, copy.path()).expect("writes");
    let Ok(PeftConfig::Lora(config)) = PeftConfig::load(copy.path()) else {
        panic!("a LoRA")
    };
    assert_eq!(config.dropout, 1.0);
    let error = LoraAdapter::new(config, "llama").expect_err("no training");
    assert!(
        error.to_string().contains("nothing would be trained"),
        "{error}"
    );
}

#[test]
fn initial_values_have_pefts_distributions() {
    let moments = |values: &[f32]| {
        let n = values.len() as f64;
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
        let second = values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / n;
        (
            mean,
            second.sqrt(),
            values.iter().fold(0.0f32, |m, v| m.max(v.abs())),
        )
    };
    let module = "model.layers.0.mlp.down_proj";
    for (init, a_deviation, a_bound, b_bound) in [
        // A uniform distribution within ±bound has the standard deviation bound / √3.
        (InitLoraWeights::Kaiming, 1.0 / 192f64.sqrt(), 0.125, 0.0),
        (InitLoraWeights::Random, 1.0 / 192f64.sqrt(), 0.125, 0.25),
        (InitLoraWeights::Gaussian, 1.0 / 16.0, f32::INFINITY, 0.0),
    ] {
        let adapter = adapter(LoraConfig {
            rank: 16,
            init_lora_weights: init,
            target_modules: list(&["down_proj"]),
            ..LoraConfig::default()
        });
        let (mut params, _) = attach(&adapter);
        adapter.init(&mut params, 3).expect("supported");
        let (mean, deviation, largest) = moments(tensor(&params, module, Part::A));
        // 1024 draws: three standard errors of the mean are a tenth of a deviation.
        assert!(mean.abs() < 0.1 * a_deviation, "{init:?} {mean}");
        assert!(
            (deviation / a_deviation - 1.0).abs() < 0.1,
            "{init:?} {deviation}"
        );
        assert!(largest <= a_bound, "{init:?} {largest}");
        let (_, _, b_largest) = moments(tensor(&params, module, Part::B));
        assert!(
            b_largest <= b_bound && b_largest >= 0.9 * b_bound,
            "{init:?} {b_largest}"
        );
    }
}

#[test]
fn initial_values_depend_on_seed_and_name_alone() {
    let values = |targets: &[&str], seed| {
        let adapter = adapter(LoraConfig {
            target_modules: list(targets),
            ..LoraConfig::default()
        });
        let (mut params, _) = attach(&adapter);
        adapter.init(&mut params, seed).expect("supported");
        tensor(&params, "model.layers.1.self_attn.v_proj", Part::A).to_vec()
    };
    let alone = values(&["v_proj"], 1);
    assert_eq!(alone, values(&["q_proj", "v_proj", "up_proj"], 1));
    assert_ne!(alone, values(&["v_proj"], 2));
}

#[test]
fn an_orthogonal_start_changes_nothing_and_has_both_factors() {
    let config = LoraConfig {
        init_lora_weights: InitLoraWeights::Orthogonal,
        rank: 6,
        target_modules: list(&["down_proj"]),
        ..LoraConfig::default()
    };
    let adapter = adapter(config.clone());
    let (mut params, _) = attach(&adapter);
    adapter.init(&mut params, 7).expect("an even rank");
    let module = "model.layers.0.mlp.down_proj";
    let (a, b) = (
        tensor(&params, module, Part::A),
        tensor(&params, module, Part::B),
    );
    let (features, norm) = (a.len() / 6, |v: &[f32]| {
        v.iter().map(|v| v * v).sum::<f32>().sqrt()
    });
    // A row of X Q_even has the expected norm sqrt(rank / 2) / 10 per feature.
    let expected = (3.0 * features as f32).sqrt() / 10.0;
    assert!((norm(a) / expected - 1.0).abs() < 0.2 && norm(b) > 0.1);
    for row in b.chunks(6) {
        for column in 0..features {
            let dot: f32 = (0..6).map(|r| row[r] * a[r * features + column]).sum();
            assert!(dot.abs() < 1e-6, "{dot}");
        }
    }
    let odd =
        super::LoraAdapter::new(LoraConfig { rank: 3, ..config }, "llama").expect("read as any");
    let (mut params, _) = attach(&odd);
    let error = odd.init(&mut params, 0).expect_err("refused").to_string();
    assert!(error.contains("`orthogonal` needs even ranks"), "{error}");
}

#[test]
fn the_description_names_method_rank_alpha_and_dropout() {
    let plain = adapter(LoraConfig::default());
    assert_eq!(plain.describe(), "LoRA r=8 alpha=8");
    let full = adapter(LoraConfig {
        use_rslora: true,
        alpha: 0.5,
        dropout: 0.05,
        rank_pattern: vec![("q_proj".into(), 2)],
        ..LoraConfig::default()
    });
    assert_eq!(
        full.describe(),
        "rsLoRA r=8 alpha=0.5 dropout=0.05 with patterns"
    );
}
