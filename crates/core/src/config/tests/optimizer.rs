use super::{MINIMAL, fault};
use crate::config::{KeyValue, TrainConfig};

#[test]
fn an_argument_that_an_optimizer_does_not_have_is_an_error_with_those_it_has() {
    for (optim, args, part) in [
        (
            "sgd",
            "momentun=0.9",
            "expected one of momentum, dampening, nesterov; did you mean `momentum`?",
        ),
        ("sgd", "{momentum: fast}", "at least 0 (optim sgd)"),
        (
            "sgd",
            "momentum=0.9, nesterov=true, momentum=0.5",
            "each name once, and `momentum` stands there twice; take one of them out",
        ),
        ("sgd", "{momentum: 0.9, momentum: 0.5}", "momentum"),
        ("sgd", "nesterov=true", "needs a momentum"),
        ("muon", "adjust_lr_fn=originl", "did you mean `original`?"),
        (
            "adafactor",
            "relative_step=true",
            "would replace learning_rate",
        ),
        ("ademamix", "beta3=1", "from 0 to below 1"),
        ("adamw_8bit", "amsgrad=true", "takes none"),
    ] {
        let message = fault(&[("optim", optim), ("optim_args", args)]);
        assert!(
            message.contains(part) && message.contains("(command line)"),
            "{message}"
        );
    }
}

#[test]
fn arguments_of_the_optimizer_are_a_text_or_a_mapping() {
    let texts = [
        "optim_args: momentum=0.9, nesterov=true",
        "optim_args: {momentum: 0.9, nesterov: true}",
        "optim_args: '{\"momentum\": \"0.9\", \"nesterov\": true}'",
    ];
    let built = texts.map(|args| {
        let text = format!("{MINIMAL}optim: sgd\n{args}\n");
        let config = TrainConfig::from_yaml(&text, "run.yaml", &[]).expect("valid");
        format!("{:?}", config.optimizer.choice().expect("valid"))
    });
    assert!(
        built[0].contains("momentum: 0.9") && built[0].contains("nesterov: true"),
        "{built:?}"
    );
    assert!(built.iter().all(|one| *one == built[0]), "{built:?}");
    // A run that was begun with one goes on with the other.
    let [text, mapping] = [texts[0], texts[1]].map(|args| {
        let text = format!("{MINIMAL}optim: sgd\n{args}\n");
        let config = TrainConfig::from_yaml(&text, "run.yaml", &[]).expect("valid");
        config.optimizer.optim_args.to_value()
    });
    assert_eq!(text, mapping);
}

#[test]
fn constants_that_an_optimizer_does_not_have_are_noted() {
    let notes = |optim: &str| {
        let text = format!("{MINIMAL}optim: {optim}\nadam_beta2: 0.95\nadam_epsilon: 1e-6\n");
        let config = TrainConfig::from_yaml(&text, "run.yaml", &[]).expect("valid");
        config.notes
    };
    assert_eq!(notes("adamw_8bit"), [""; 0]);
    assert_eq!(
        notes("lion_8bit"),
        ["adam_epsilon has no effect with optim: lion_8bit"]
    );
    assert_eq!(notes("adafactor").len(), 2);
}
