use super::super::{LoraAdapter, LoraBias, LoraConfig, TokenIndices};
use crate::target::TargetModules;
use crate::testing::{edit_config, list, llama_sites};
use ferrotune_core::adapter::{Adapter, Attachment, Site, SiteId};
use ferrotune_core::io::{self, SafetensorsFile, TensorData};
use ferrotune_core::params::{FlatBuffer, ParamLayoutBuilder};
use std::collections::BTreeMap;

/// A Llama whose head is its embedding.
fn tied_sites() -> Vec<Site> {
    let mut sites = llama_sites(2);
    if let Some(head) = sites.last_mut() {
        head.tied_to = Some(SiteId(0));
    }
    sites
}

fn attached(config: LoraConfig, sites: &[Site]) -> Vec<(SiteId, Attachment)> {
    let adapter = LoraAdapter::new(config, "llama").expect("valid");
    let mut params = ParamLayoutBuilder::new();
    adapter.attach(sites, &mut params).expect("attaches")
}

fn refusal(config: LoraConfig, sites: &[Site]) -> String {
    let adapter = LoraAdapter::new(config, "llama").expect("each value is valid");
    let error = adapter.attach(sites, &mut ParamLayoutBuilder::new());
    error.expect_err("refused").to_string()
}

fn saves(names: &[&str]) -> LoraConfig {
    LoraConfig {
        modules_to_save: names.iter().map(|&name| name.into()).collect(),
        ..LoraConfig::default()
    }
}

fn trains(tokens: TokenIndices) -> LoraConfig {
    LoraConfig {
        trainable_token_indices: Some(tokens),
        ..LoraConfig::default()
    }
}

#[test]
fn each_mistake_names_its_key_its_value_and_the_way_out() {
    let rows = |ids: &[u32]| trains(TokenIndices::Embedding(ids.to_vec()));
    let of = |name: &str| trains(TokenIndices::Modules(vec![(name.into(), vec![1])]));
    let targets = |names: &[&str], config: LoraConfig| LoraConfig {
        target_modules: list(names),
        ..config
    };
    for (config, parts) in [
        (
            saves(&["lm_haed"]),
            ["`modules_to_save`", "did you mean `lm_head`"],
        ),
        (
            saves(&["lm_.*"]),
            ["entry `lm_.*` matches no module", "end of a module's path"],
        ),
        (
            targets(&["lm_head"], saves(&["lm_head"])),
            ["`target_modules`", "only what `modules_to_save` trains"],
        ),
        (rows(&[3, 256]), ["token 256", "has 256 rows"]),
        (of("embed_tokns"), ["`embed_tokns`", "did you mean"]),
        (
            of("q_proj"),
            ["no table of token rows", "model.embed_tokens, lm_head"],
        ),
        (
            targets(&["q_proj", "embed_tokens"], rows(&[1])),
            ["`trainable_token_indices`", "adapted"],
        ),
    ] {
        let error = refusal(config, &llama_sites(2));
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    }
    for name in ["", "named twice"] {
        let tokens = match name {
            "" => vec![(String::new(), vec![1])],
            _ => vec![
                ("embed_tokens".into(), vec![1]),
                ("model.embed_tokens".into(), vec![1]),
            ],
        };
        let error = refusal(trains(TokenIndices::Modules(tokens)), &llama_sites(2));
        let part = ["is no table", "named before"][usize::from(!name.is_empty())];
        assert!(error.contains(part), "{error}");
    }
    let other = [("embed_tokens", 1), ("lm_head", 2)];
    let other = other.map(|(name, id)| (name.into(), vec![id])).to_vec();
    let config = LoraConfig {
        ensure_weight_tying: true,
        ..trains(TokenIndices::Modules(other))
    };
    let error = refusal(config, &tied_sites());
    assert!(
        error.contains("to keep by `ensure_weight_tying`") && error.contains("name the embedding"),
        "{error}"
    );
    let with_bias = LoraConfig {
        lora_bias: true,
        ..targets(&["q_proj", "embed_tokens"], LoraConfig::default())
    };
    let error = refusal(with_bias, &llama_sites(2));
    let parts = ["`lora_bias`", "`model.embed_tokens`", "`target_modules`"];
    assert!(parts.iter().all(|part| error.contains(part)), "{error}");
}

/// PEFT ties what is named with the same tokens, or not named; what is named with others it trains apart.
#[test]
fn a_tied_head_named_with_other_tokens_is_trained_apart() {
    let rows = |modules: &[(&str, &[u32])]| -> Vec<(usize, Vec<u32>)> {
        let modules = modules.iter();
        let modules = modules.map(|(name, ids)| ((*name).into(), ids.to_vec()));
        let config = trains(TokenIndices::Modules(modules.collect()));
        let all = attached(config, &tied_sites()).into_iter();
        let found = all.filter_map(|(site, attachment)| match attachment {
            Attachment::TrainRows { indices, .. } => Some((site.0, indices)),
            _ => None,
        });
        found.collect()
    };
    let head = tied_sites().len() - 1;
    let embedding = (0, vec![1, 2]);
    assert_eq!(
        rows(&[("embed_tokens", &[1, 2])]),
        std::slice::from_ref(&embedding)
    );
    let same: &[(&str, &[u32])] = &[("lm_head", &[1, 2]), ("embed_tokens", &[1, 2])];
    assert_eq!(rows(same), std::slice::from_ref(&embedding));
    let other: &[(&str, &[u32])] = &[("embed_tokens", &[1, 2]), ("lm_head", &[2])];
    assert_eq!(rows(other), [embedding, (head, vec![2])]);
    assert_eq!(rows(&[("lm_head", &[2])]), [(head, vec![2])]);
    // Named alone, also where what is named is to stay tied.
    let alone = LoraConfig {
        ensure_weight_tying: true,
        ..trains(TokenIndices::Modules(vec![("lm_head".into(), vec![2])]))
    };
    let all = attached(alone, &tied_sites());
    let is_rows = |(site, a): &(SiteId, Attachment)| {
        site.0 == head && matches!(a, Attachment::TrainRows { .. })
    };
    assert!(all.iter().any(is_rows), "{all:?}");
}

/// An update of a tied head stands on the embedding's trained rows; PEFT has none where these are named for the head too.
#[test]
fn rows_of_an_embedding_lie_below_an_update_of_its_head() {
    let with = |tokens| LoraConfig {
        target_modules: list(&["q_proj", "lm_head"]),
        ..trains(tokens)
    };
    let all = attached(with(TokenIndices::Embedding(vec![1, 2])), &tied_sites());
    let rows = all
        .iter()
        .filter(|(_, a)| matches!(a, Attachment::TrainRows { .. }));
    assert_eq!(rows.map(|(site, _)| site.0).collect::<Vec<_>>(), [0]);
    let both = ["embed_tokens", "lm_head"].map(|name| (name.to_owned(), vec![1, 2]));
    let saved = LoraConfig {
        modules_to_save: vec!["lm_head".into()],
        ..with(TokenIndices::Embedding(vec![1, 2]))
    };
    let tied = LoraConfig {
        ensure_weight_tying: true,
        ..with(TokenIndices::Embedding(vec![1, 2]))
    };
    for config in [with(TokenIndices::Modules(both.to_vec())), saved, tied] {
        let error = refusal(config, &tied_sites());
        assert!(
            error.contains("trains rows of `model.embed_tokens`"),
            "{error}"
        );
    }
}

/// Where the embedding is trained as a whole, its head may have rows of its own over the base's.
#[test]
fn rows_of_a_head_lie_beside_an_embedding_trained_as_a_whole() {
    let config = LoraConfig {
        modules_to_save: vec!["embed_tokens".into()],
        ..trains(TokenIndices::Modules(vec![("lm_head".into(), vec![2])]))
    };
    let head = tied_sites().len() - 1;
    let all = attached(config, &tied_sites());
    let of_head: Vec<_> = all.iter().filter(|(site, _)| site.0 == head).collect();
    assert!(
        matches!(of_head[..], [(_, Attachment::TrainRows { .. })]),
        "{of_head:?}"
    );
}

/// PEFT reads a pattern that decides nothing, so a file may have one; a run may not.
#[test]
fn a_pattern_that_decides_nothing_is_refused_but_in_a_file() {
    let config = LoraConfig {
        rank_pattern: vec![
            ("q_proj".into(), 2),
            ("layers.0.self_attn.q_proj".into(), 4),
        ],
        ..LoraConfig::default()
    };
    let error = refusal(config.clone(), &llama_sites(2));
    assert!(
        error.contains("`layers.0.self_attn.q_proj` decides nothing"),
        "{error}"
    );
    let read = LoraAdapter::of_file(config, "llama").expect("valid");
    let all = read.attach(&llama_sites(2), &mut ParamLayoutBuilder::new());
    let ranks = all
        .expect("attaches")
        .into_iter()
        .filter_map(|(_, a)| match a {
            Attachment::LowRank(update) => Some(update.rank),
            _ => None,
        });
    assert_eq!(ranks.collect::<Vec<_>>(), [2, 8, 2, 8]);
}

/// A base without biases has none that copies of a layer would share.
#[test]
fn biases_that_copies_of_a_layer_share_are_not_trained() {
    let copies = |bias| LoraConfig {
        bias,
        layer_replication: vec![[0, 1], [0, 1]],
        ..LoraConfig::default()
    };
    let mut sites = llama_sites(2);
    for site in &mut sites {
        site.stored_name = site.name.replacen(".1.", ".0.", 1);
    }
    for bias in [LoraBias::All, LoraBias::LoraOnly] {
        attached(copies(bias), &sites);
    }
    for site in sites
        .iter_mut()
        .filter(|site| site.name.ends_with("k_proj"))
    {
        site.bias = true;
    }
    attached(copies(LoraBias::LoraOnly), &sites);
    let error = refusal(copies(LoraBias::All), &sites);
    for part in [
        "`bias`: all",
        "layers.0.self_attn.k_proj",
        "`layer_replication`",
        "none",
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
}

#[test]
fn a_name_to_save_means_every_module_that_ends_with_it() {
    let trained: Vec<SiteId> = attached(saves(&["norm"]), &llama_sites(2))
        .into_iter()
        .filter(|(_, attachment)| matches!(attachment, Attachment::TrainBase { .. }))
        .map(|(id, _)| id)
        .collect();
    // Two norms in each of two layers, and the last one.
    assert_eq!(trained.len(), 5);
    let whole = attached(saves(&["layers.1"]), &llama_sites(2));
    let low_rank = |a: &&(SiteId, Attachment)| matches!(a.1, Attachment::LowRank(_));
    assert_eq!(
        whole.iter().filter(low_rank).count(),
        2,
        "layer 0 alone is adapted"
    );
    assert_eq!(whole.len() - 2, 9, "every module of layer 1 is trained");
}

#[test]
fn a_tied_pair_stays_one_only_where_that_is_asked_for() {
    let sites = tied_sites();
    let head = sites.len() - 1;
    let at = |config: &LoraConfig, id: usize| {
        let mut all = attached(config.clone(), &sites).into_iter();
        all.find(|(site, _)| site.0 == id)
            .map(|(_, attachment)| attachment)
    };
    let mut config = saves(&["embed_tokens"]);
    assert!(matches!(at(&config, head), Some(Attachment::KeepBase)));
    config.ensure_weight_tying = true;
    assert!(at(&config, head).is_none());
    let mut config = LoraConfig {
        target_modules: list(&["lm_head"]),
        ..LoraConfig::default()
    };
    assert!(at(&config, 0).is_none());
    config.ensure_weight_tying = true;
    match [at(&config, 0), at(&config, head)] {
        [Some(Attachment::LowRank(a)), Some(Attachment::LowRank(b))] => assert_eq!(a, b),
        other => panic!("{other:?}"),
    }
}

/// PEFT looks for `embed_tokens` and `lm_head`, and an expression has to match one of these names alone.
#[test]
fn only_names_that_peft_knows_keep_a_pair_tied() {
    let regex = |source: &str| Some(TargetModules::Regex(source.into()));
    for (target_modules, tied) in [
        (list(&["q_proj", "model.embed_tokens"]), true),
        (regex(".*(q_proj|embed_tokens)"), true),
        (regex("model.embed_tokens|.*q_proj"), false),
        (Some(TargetModules::AllLinear), false),
    ] {
        let config = LoraConfig {
            ensure_weight_tying: true,
            target_modules,
            ..LoraConfig::default()
        };
        let kept = crate::beside::tied::kept(config.wanted()).expect("an expression");
        assert_eq!(kept.is_some(), tied, "{:?}", config.target_modules);
    }
}

#[test]
fn tokens_call_up_updates_of_linears_inside_the_layers() {
    let invoked = |names: &[&str], token| LoraConfig {
        alora_invocation_tokens: Some(vec![token]),
        target_modules: list(names),
        ..LoraConfig::default()
    };
    let all = attached(invoked(&["q_proj"], 3), &llama_sites(2));
    let at_embedding = |(site, a): &(SiteId, Attachment)| {
        site.0 == 0 && matches!(a, Attachment::Invocation(tokens) if tokens == &[3])
    };
    assert!(all.iter().any(at_embedding), "{all:?}");
    for (names, token, part) in [
        (&["q_proj", "lm_head"][..], 3, "`lm_head` is none"),
        (&["embed_tokens"], 3, "`model.embed_tokens` is none"),
        (&["q_proj"], 256, "token 256 is none of the 256"),
    ] {
        let error = refusal(invoked(names, token), &llama_sites(2));
        let key = "`alora_invocation_tokens`";
        assert!(error.contains(key) && error.contains(part), "{error}");
    }
}

#[test]
fn what_is_trained_as_a_whole_is_not_adapted_though_it_is_named() {
    let config = LoraConfig {
        target_modules: list(&["q_proj", "v_proj"]),
        ..saves(&["v_proj"])
    };
    let all = attached(config, &llama_sites(2));
    let count = |of: fn(&Attachment) -> bool| all.iter().filter(|(_, a)| of(a)).count();
    assert_eq!(count(|a| matches!(a, Attachment::LowRank(_))), 2);
    assert_eq!(count(|a| matches!(a, Attachment::TrainBase { .. })), 2);
    let config = LoraConfig {
        ensure_weight_tying: true,
        target_modules: list(&["lm_head"]),
        ..saves(&["embed_tokens"])
    };
    let error = refusal(config, &tied_sites());
    assert!(error.contains("`ensure_weight_tying`"), "{error}");
}

/// PEFT's file has a row for each entry, of which the last one of a token is what it computes with.
#[test]
fn of_a_token_that_is_named_twice_the_last_row_counts() {
    let twice = trains(TokenIndices::Embedding(vec![3, 9, 3]));
    let adapter = LoraAdapter::new(twice, "llama").expect("valid");
    let mut params = ParamLayoutBuilder::new();
    adapter
        .attach(&llama_sites(2), &mut params)
        .expect("attaches");
    let mut params = FlatBuffer::zeros(&params.build().expect("unique names"));
    let directory = tempfile::tempdir().expect("temporary directory");
    adapter.save(&params, directory.path()).expect("saved");
    edit_config(
        directory.path(),
        "trainable_token_indices",
        serde_json::json!([3, 9, 3]),
    );
    let path = directory.path().join("adapter_model.safetensors");
    let file = SafetensorsFile::open(&path).expect("saved");
    let rows = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta";
    let values: BTreeMap<String, (Vec<usize>, Vec<f32>)> = file
        .names()
        .map(|name| match name {
            _ if name == rows => {
                let values = (0..3 * 32).map(|i| (i / 32) as f32).collect();
                (name.to_owned(), (vec![3, 32], values))
            }
            _ => {
                let shape = file.meta(name).expect("saved").shape.clone();
                (
                    name.to_owned(),
                    (shape, file.read_f32(name).expect("saved")),
                )
            }
        })
        .collect();
    drop(file);
    let tensors = values.iter();
    let tensors = tensors
        .map(|(name, (shape, values))| (name.clone(), TensorData::from_f32(values, shape.clone())));
    io::write_safetensors(&path, &tensors.collect(), &BTreeMap::new()).expect("writable");
    adapter
        .load(&mut params, directory.path())
        .expect("PEFT's file");
    let id = params.layout().find(rows).expect("declared");
    let (nine, three) = params.get(id).split_at(32);
    assert!(nine.iter().all(|&v| v == 1.0) && three.iter().all(|&v| v == 2.0));
}

/// The adapter of `config` on a base whose head is tied, and its parameters.
fn attached_to_tied(config: LoraConfig) -> (LoraAdapter, FlatBuffer) {
    let adapter = LoraAdapter::new(config, "llama").expect("valid");
    let mut params = ParamLayoutBuilder::new();
    adapter
        .attach(&tied_sites(), &mut params)
        .expect("attaches");
    let params = FlatBuffer::zeros(&params.build().expect("unique names"));
    (adapter, params)
}

/// PEFT writes and wants both names.
#[test]
fn a_tied_update_is_written_for_the_head_too() {
    let config = LoraConfig {
        ensure_weight_tying: true,
        target_modules: list(&["embed_tokens"]),
        ..LoraConfig::default()
    };
    let (adapter, mut params) = attached_to_tied(config);
    let values = params.as_mut_slice().iter_mut().enumerate();
    values.for_each(|(i, value)| *value = i as f32);
    let directory = tempfile::tempdir().expect("temporary directory");
    adapter.save(&params, directory.path()).expect("saved");
    let file = directory.path().join("adapter_model.safetensors");
    let file = SafetensorsFile::open(file).expect("saved");
    for (head, of_embedding, shape) in [
        ("lora_A.weight", "lora_embedding_B", [8, 32]),
        ("lora_B.weight", "lora_embedding_A", [256, 8]),
    ] {
        let head = format!("base_model.model.lm_head.{head}");
        let of_embedding = format!("base_model.model.model.embed_tokens.{of_embedding}");
        assert_eq!(file.meta(&head).expect("written").shape, shape);
        let transposed = file.read_f32(&of_embedding).expect("written");
        let [rows, cols] = shape;
        let own = file.read_f32(&head).expect("written");
        let same = |at: usize| own[at] == transposed[at % cols * rows + at / cols];
        assert!((0..own.len()).all(same), "{head}");
    }
}

/// PEFT writes and wants both names.
#[test]
fn a_weight_trained_for_two_modules_is_written_under_both_names() {
    for (name, tied, written) in [
        ("lm_head", true, &["lm_head", "model.embed_tokens"][..]),
        ("embed_tokens", true, &["lm_head", "model.embed_tokens"]),
        ("embed_tokens", false, &["model.embed_tokens"]),
    ] {
        let config = LoraConfig {
            ensure_weight_tying: tied,
            ..saves(&[name])
        };
        let (adapter, mut params) = attached_to_tied(config);
        let values = params.as_mut_slice().iter_mut().enumerate();
        values.for_each(|(i, value)| *value = i as f32);
        let directory = tempfile::tempdir().expect("temporary directory");
        adapter
            .save(&params, directory.path())
            .expect("saved and read back");
        let file = directory.path().join("adapter_model.safetensors");
        let file = SafetensorsFile::open(file).expect("saved");
        let weights: Vec<&str> = file.names().filter(|n| !n.contains("lora")).collect();
        let names: Vec<String> = written
            .iter()
            .map(|module| format!("base_model.model.{module}.weight"))
            .collect();
        assert_eq!(weights, names, "{name} {tied}");
        let all: Vec<Vec<f32>> = weights
            .iter()
            .map(|name| file.read_f32(name).expect("saved"))
            .collect();
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "{name}");
    }
}

/// PEFT saves the base's weight of an adapted table, and of the head that is tied to it.
#[test]
fn copies_of_a_base_weight_beside_a_tied_update_change_nothing() {
    for tied in [true, false] {
        let config = LoraConfig {
            ensure_weight_tying: tied,
            target_modules: list(&["embed_tokens"]),
            ..LoraConfig::default()
        };
        let (adapter, mut params) = attached_to_tied(config);
        let directory = tempfile::tempdir().expect("temporary directory");
        adapter.save(&params, directory.path()).expect("saved");
        let path = directory.path().join("adapter_model.safetensors");
        let file = SafetensorsFile::open(&path).expect("saved");
        let values: BTreeMap<&str, Vec<f32>> = file
            .names()
            .map(|name| (name, file.read_f32(name).expect("saved")))
            .collect();
        let shape = |name: &str| file.meta(name).expect("saved").shape.clone();
        let saved = values.iter();
        let saved =
            saved.map(|(name, v)| ((*name).to_owned(), TensorData::from_f32(v, shape(name))));
        let weight = vec![0.5; 256 * 32];
        let copy = |module: &str| {
            let name = format!("base_model.model.{module}.base_layer.weight");
            (name, TensorData::from_f32(&weight, [256, 32]))
        };
        let copies = [copy("model.embed_tokens"), copy("lm_head")];
        io::write_safetensors(&path, &saved.chain(copies).collect(), &BTreeMap::new())
            .expect("writable");
        let read = adapter.load(&mut params, directory.path());
        assert_eq!(read.is_ok(), tied, "{read:?}");
    }
}
