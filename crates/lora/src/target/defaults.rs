//! Which modules PEFT adapts when nobody says: one entry per `model_type`.

use super::TargetModules;

/// Names as in `config.json`'s `model_type`, with the suffixes that LoRA targets there.
///
/// # Source
/// PEFT's mapping from model types to LoRA target modules, for decoders that have one.
const DEFAULTS: &[(&[&str], &[&str])] = &[
    (
        &[
            "bart",
            "gemma",
            "gemma2",
            "gemma3_text",
            "gpt_neo",
            "gptj",
            "llama",
            "llama4",
            "mistral",
            "mixtral",
            "opt",
            "qwen2",
            "qwen3",
            "stablelm",
        ],
        &["q_proj", "v_proj"],
    ),
    (&["gpt2", "gpt_bigcode"], &["c_attn"]),
    (
        &["bloom", "chatglm", "falcon", "gpt_neox"],
        &["query_key_value"],
    ),
    (
        &["bert", "electra", "roberta", "xlm-roberta"],
        &["query", "value"],
    ),
    (&["mt5", "t5"], &["q", "v"]),
    (&["mpt"], &["Wqkv"]),
    (&["nemotron_h"], &["q_proj", "k_proj", "v_proj", "o_proj"]),
    (&["phi"], &["q_proj", "v_proj", "fc1", "fc2"]),
];

/// The one model type whose default is a regular expression.
const GEMMA4: &str = r".*language_model\..*\.(q_proj|v_proj)";

/// The modules PEFT targets for `model_type` when `target_modules` is null.
#[must_use]
pub fn default_target_modules(model_type: &str) -> Option<TargetModules> {
    if model_type == "gemma4" {
        return Some(TargetModules::Regex(GEMMA4.into()));
    }
    DEFAULTS
        .iter()
        .find(|(types, _)| types.contains(&model_type))
        .map(|(_, names)| TargetModules::List(names.iter().map(|&n| n.into()).collect()))
}
