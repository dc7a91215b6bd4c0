use super::{ExcludeModules, RankAndAlpha, Selection, TargetModules, default_target_modules};
use super::{resolve, select};
use crate::testing::llama_sites;
use ferrotune_core::Result;

const EXACT_Q: &str = "model.layers.0.self_attn.q_proj";

fn list(names: &[&str]) -> TargetModules {
    TargetModules::List(names.iter().map(|&name| name.into()).collect())
}

fn only(target_modules: &TargetModules) -> Selection<'_> {
    Selection {
        target_modules,
        exclude_modules: None,
        layers_to_transform: None,
        layers_pattern: &[],
    }
}

fn names_of(layers: usize, selection: &Selection<'_>) -> Result<Vec<String>> {
    let sites = llama_sites(layers);
    let selected = select(&sites, selection)?;
    Ok(selected.into_iter().map(|site| site.name.clone()).collect())
}

fn selected(layers: usize, selection: &Selection<'_>) -> Vec<String> {
    names_of(layers, selection).expect("something is selected")
}

fn error(selection: &Selection<'_>) -> String {
    names_of(2, selection).expect_err("refused").to_string()
}

#[test]
fn list_entries_match_whole_paths_and_ends_after_a_dot() {
    assert_eq!(
        selected(2, &only(&list(&["q_proj"]))),
        [EXACT_Q, "model.layers.1.self_attn.q_proj"]
    );
    assert_eq!(
        selected(2, &only(&list(&["1.mlp.up_proj", EXACT_Q]))),
        [EXACT_Q, "model.layers.1.mlp.up_proj"]
    );
    assert_eq!(
        selected(12, &only(&list(&["layers.1.self_attn.q_proj"]))).len(),
        1
    );
    let message = error(&only(&list(&["proj"])));
    assert!(message.contains("`proj` matches no module"), "{message}");
}

#[test]
fn a_string_is_a_regular_expression_over_the_whole_path() {
    let regex = |source: &str| TargetModules::from_text(source);
    let names = selected(2, &only(&regex(r".*\.0\.self_attn\.(q|v)_proj")));
    assert_eq!(names, [EXACT_Q, "model.layers.0.self_attn.v_proj"]);
    // The alternatives are anchored as a whole, and lookaround works as in Python.
    assert_eq!(selected(2, &only(&regex(r"lm_head|.*down_proj"))).len(), 3);
    assert_eq!(selected(2, &only(&regex(r"(?!.*\.1\.).*up_proj"))).len(), 1);
    let message = error(&only(&regex("q_proj")));
    assert!(message.contains(r#"write a list: ["q_proj"]"#), "{message}");
    let message = error(&only(&regex("(q_proj")));
    assert!(
        message.contains("not a valid regular expression"),
        "{message}"
    );
    // Positions are those in what was written, whatever is put around it.
    for source in ["(q_proj", "q_proj)", "q_[proj", "*", "q{2,1}_proj", r"\"] {
        let message = error(&only(&regex(source)));
        let position = message.split("position ").nth(1);
        let digits = position.map(|rest| rest.chars().take_while(char::is_ascii_digit));
        let position: Option<usize> = digits.and_then(|d| d.collect::<String>().parse().ok());
        assert!(position.is_none_or(|at| at <= source.len()), "{message}");
    }
}

#[test]
fn a_regular_expression_that_backtracks_without_end_is_an_error() {
    let regex = TargetModules::from_text(r"((?=.)[a-z_.0-9]*)*\1!");
    let message = error(&only(&regex));
    assert!(message.contains("simplify"), "{message}");
}

#[test]
fn all_linear_takes_every_linear_but_the_head_in_any_case() {
    let names = selected(2, &only(&TargetModules::from_text("All-Linear")));
    assert_eq!(names.len(), 14);
    assert!(names.iter().all(|name| name.ends_with("_proj")));
}

#[test]
fn exclusion_comes_before_everything_even_exact_names() {
    let targets = list(&["q_proj", EXACT_Q]);
    let by_list = ExcludeModules::List(vec!["layers.0.self_attn.q_proj".into()]);
    let by_regex = ExcludeModules::Regex(r".*layers\.0\..*".into());
    for exclude in [by_list, by_regex] {
        let selection = Selection {
            exclude_modules: Some(&exclude),
            ..only(&targets)
        };
        assert_eq!(selected(2, &selection), ["model.layers.1.self_attn.q_proj"]);
    }
}

#[test]
fn an_exclusion_that_matches_nothing_is_an_error() {
    let targets = list(&["q_proj"]);
    let by_list = ExcludeModules::List(vec!["dwon_proj".into()]);
    let by_regex = ExcludeModules::Regex("down_proj".into());
    for (exclude, hint) in [
        (by_list, "did you mean `down_proj`"),
        (by_regex, "write a list"),
    ] {
        let message = error(&Selection {
            exclude_modules: Some(&exclude),
            ..only(&targets)
        });
        assert!(
            message.contains("exclude_modules") && message.contains(hint),
            "{message}"
        );
    }
}

#[test]
fn layers_to_transform_filters_ends_but_not_whole_paths() {
    let targets = list(&["q_proj", EXACT_Q]);
    let pattern = ["layers".to_owned()];
    let of_many = ["h".to_owned(), "layers".to_owned()];
    for layers_pattern in [&[][..], &pattern[..], &of_many[..]] {
        let selection = Selection {
            layers_to_transform: Some(&[2]),
            layers_pattern,
            ..only(&targets)
        };
        assert_eq!(
            selected(12, &selection),
            [EXACT_Q, "model.layers.2.self_attn.q_proj"]
        );
    }
}

#[test]
fn a_whole_path_holds_its_layer() {
    let targets = list(&[EXACT_Q]);
    let of = |layers| Selection {
        layers_to_transform: Some(layers),
        ..only(&targets)
    };
    assert_eq!(selected(2, &of(&[0])), [EXACT_Q]);
    let message = error(&of(&[0, 1]));
    assert!(
        message
            .contains("no targeted module lies in layer 1; targeted modules lie in layers 0 to 0"),
        "{message}"
    );
}

#[test]
fn one_pattern_of_layers_must_match() {
    let targets = list(&["q_proj"]);
    let patterns = ["layers".to_owned(), "blocks".to_owned()];
    let of = |layers_pattern| Selection {
        layers_to_transform: Some(&[1]),
        layers_pattern,
        ..only(&targets)
    };
    // PEFT takes a list for models of several architectures.
    for some in [&patterns[..1], &patterns[..]] {
        assert_eq!(selected(2, &of(some)).len(), 1);
    }
    let message = error(&of(&patterns[1..]));
    assert!(
        message.contains("`blocks` stands before the number of no layer; here `layers` does"),
        "{message}"
    );
}

#[test]
fn what_a_regular_expression_could_match_is_shown_by_a_linear() {
    let message = error(&only(&TargetModules::from_text(".*q_prj")));
    assert!(
        message.contains("(such as `model.layers.0.self_attn.q_proj`)"),
        "{message}"
    );
}

#[test]
fn a_layer_or_layer_pattern_that_matches_nothing_is_an_error() {
    let targets = list(&["q_proj"]);
    let missing = Selection {
        layers_to_transform: Some(&[0, 7]),
        ..only(&targets)
    };
    let message = error(&missing);
    assert!(
        message.contains("layer 7") && message.contains("layers 0 to 1"),
        "{message}"
    );
    let pattern = ["blocks".to_owned()];
    let message = error(&Selection {
        layers_pattern: &pattern,
        ..missing.clone()
    });
    assert!(message.contains("layers_pattern"), "{message}");
    let regex = TargetModules::from_text(".*q_proj");
    let message = error(&Selection {
        target_modules: &regex,
        ..missing
    });
    assert!(
        message.contains("needs `target_modules` as a list"),
        "{message}"
    );
    let message = error(&Selection {
        layers_pattern: &pattern,
        ..only(&targets)
    });
    assert!(
        message.contains("`layers_to_transform`, which is not set"),
        "{message}"
    );
}

#[test]
fn every_list_entry_must_match_and_the_nearest_name_is_given() {
    let message = error(&only(&list(&["q_proj", "k_prj"])));
    assert!(
        message.contains("`k_prj`") && message.contains("did you mean `k_proj`"),
        "{message}"
    );
    let message = error(&only(&list(&["self_atn.q_proj"])));
    assert!(
        message.contains("did you mean `self_attn.q_proj`"),
        "{message}"
    );
    let message = error(&only(&list(&["qkv"])));
    assert!(
        message.contains("down_proj, gate_proj, k_proj, lm_head"),
        "{message}"
    );
}

#[test]
fn a_regular_expression_or_shorthand_inside_a_list_is_an_error_with_a_hint() {
    for entry in [".*q_proj", "(q|v)_proj", "layers[0]"] {
        let message = error(&only(&list(&[entry])));
        assert!(
            message.contains("as one string instead of a list"),
            "{message}"
        );
    }
    let message = error(&only(&list(&["all-linear"])));
    assert!(
        message.contains("write `target_modules: all-linear`"),
        "{message}"
    );
    assert!(error(&only(&list(&[]))).contains("the list is empty"));
}

#[test]
fn nothing_left_after_exclusion_is_an_error() {
    let targets = list(&["q_proj"]);
    let exclude = ExcludeModules::List(vec!["q_proj".into()]);
    let message = error(&Selection {
        exclude_modules: Some(&exclude),
        ..only(&targets)
    });
    for part in ["`exclude_modules`", "takes out every module", "q_proj`"] {
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn patterns_match_the_end_of_a_path_and_the_first_key_wins() {
    let sites = llama_sites(12);
    let targets = list(&["q_proj", "v_proj"]);
    let rank_pattern = vec![
        ("layers.1.self_attn.q_proj".into(), 2),
        (r"^model\.layers\.3\..*v_proj".into(), 3),
        ("q_proj".into(), 4),
        (".*q_proj".into(), 5),
    ];
    let alpha_pattern = vec![("(q|v)_proj".into(), 1.5)];
    let rank_and_alpha = RankAndAlpha {
        rank: 8,
        alpha: 16.0,
        rank_pattern: &rank_pattern,
        alpha_pattern: &alpha_pattern,
    };
    for target in resolve(&sites, &only(&targets), &rank_and_alpha).expect("valid") {
        let expected = match target.site.name.as_str() {
            "model.layers.1.self_attn.q_proj" => 2,
            "model.layers.3.self_attn.v_proj" => 3,
            name if name.ends_with("q_proj") => 4,
            _ => 8,
        };
        assert_eq!(
            (target.rank, target.alpha),
            (expected, 1.5),
            "{}",
            target.site.name
        );
    }
}

#[test]
fn a_pattern_that_matches_no_adapted_module_is_an_error() {
    let sites = llama_sites(2);
    let targets = list(&["q_proj", "v_proj"]);
    for key in ["qproj", "proj", "up_proj", "q"] {
        let rank_pattern = vec![(key.to_owned(), 4)];
        let rank_and_alpha = RankAndAlpha {
            rank: 8,
            alpha: 16.0,
            rank_pattern: &rank_pattern,
            alpha_pattern: &Vec::new(),
        };
        let message = resolve(&sites, &only(&targets), &rank_and_alpha)
            .expect_err("refused")
            .to_string();
        assert!(
            message.contains(&format!("`{key}` matches no adapted module")),
            "{message}"
        );
    }
}

/// As of keys that match nothing, what they say would silently not be so.
#[test]
fn a_pattern_whose_modules_all_belong_to_earlier_ones_is_an_error_that_names_them() {
    let names = ["layers.0.q_proj", "layers.1.q_proj", "layers.0.v_proj"];
    let decides = |keys: &[&str]| {
        let rank_pattern = keys.iter().map(|key| ((*key).to_owned(), 4)).collect();
        RankAndAlpha {
            rank: 8,
            alpha: 16.0,
            rank_pattern: &rank_pattern,
            alpha_pattern: &Vec::new(),
        }
        .require_each_decides(&names)
    };
    for keys in [
        &["layers.0.q_proj", "q_proj", "v_proj"][..],
        &["0.q_proj", "1.q_proj"],
        &["up_proj"],
        &[],
    ] {
        decides(keys).expect("each decides");
    }
    for (keys, hidden, before) in [
        (
            &["q_proj", "layers.0.q_proj"][..],
            "layers.0.q_proj",
            "q_proj",
        ),
        (
            &["v_proj", "0.q_proj", ".*_proj", "1.q_proj"],
            "1.q_proj",
            ".*_proj",
        ),
        (&["0.q_proj", "1.q_proj", "q_proj"], "q_proj", "1.q_proj"),
    ] {
        let message = decides(keys).expect_err("refused").to_string();
        for part in [
            "`rank_pattern`",
            &format!("`{hidden}` decides nothing"),
            &format!("`{before}` stands before it"),
            &format!("put `{hidden}` first"),
        ] {
            assert!(message.contains(part), "{part}: {message}");
        }
    }
}

#[test]
fn defaults_follow_the_model_type() {
    assert_eq!(
        default_target_modules("llama"),
        Some(list(&["q_proj", "v_proj"]))
    );
    assert_eq!(default_target_modules("gpt2"), Some(list(&["c_attn"])));
    assert!(matches!(
        default_target_modules("gemma4"),
        Some(TargetModules::Regex(_))
    ));
    assert_eq!(default_target_modules("unheard_of"), None);
}
