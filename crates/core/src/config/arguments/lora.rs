use super::source::{OURS, PEFT, TRL_MODEL};
use crate::config::section::section;
use crate::config::value::{Arity, KeyValue, Names, Ordered, choices, yaml_scalar};
use serde_json::{Value, json};
use std::collections::BTreeMap;

choices! {
    /// Which biases of the base are trained.
    LoraBias {
        /// None.
        None = "none",
        /// Every bias of the model.
        All = "all",
        /// The biases of adapted layers.
        LoraOnly = "lora_only",
    }
    else " (PEFT's own lora_bias, which gives B a bias, is lora_b_bias here)"
}

/// Tokens whose rows of a table are trained.
#[derive(Clone, Debug, PartialEq)]
pub enum TokenIndices {
    /// Of the input embedding.
    Embedding(Vec<usize>),
    /// Of each module that is named.
    Modules(Ordered<Vec<usize>>),
}

impl KeyValue for TokenIndices {
    const ARITY: Arity = Arity::List;

    fn schema() -> Value {
        json!({"anyOf": [Vec::<usize>::schema(), Ordered::<Vec<usize>>::schema()]})
    }

    fn from_value(value: &Value) -> Result<Self, String> {
        let by_module = match value {
            Value::String(text) => text.trim_start().starts_with('{'),
            other => other.is_object(),
        };
        let read = match by_module {
            true => Ordered::from_value(value).map(Self::Modules),
            false => Vec::from_value(value).map(Self::Embedding),
        };
        read.map_err(|_| {
            "a list of token ids, or one for each module, such as {embed_tokens: [5, 6]}".to_owned()
        })
    }

    fn to_value(&self) -> Value {
        match self {
            Self::Embedding(ids) => ids.to_value(),
            Self::Modules(modules) => modules.to_value(),
        }
    }

    fn parse_text(text: &str) -> Result<Value, String> {
        match text.trim_start().starts_with('{') {
            true => yaml_scalar(text),
            false => Vec::<usize>::parse_text(text),
        }
    }
}

/// How A and B start out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InitLoraWeights {
    /// `true`: A uniform after Kaiming, B zero.
    Default,
    /// `false`: A and B both random, so that the adapter changes the model from the start.
    Random,
    /// A method by PEFT's name, such as `gaussian` or `pissa`.
    Method(String),
}

/// PEFT's names for `init_lora_weights`; `pissa_niter_16` and other counts are accepted too.
const INIT_METHODS: [&str; 9] = [
    "gaussian",
    "eva",
    "olora",
    "pissa",
    "corda",
    "loftq",
    "orthogonal",
    "mica",
    "lora_ga",
];

impl KeyValue for InitLoraWeights {
    fn schema() -> Value {
        json!({"anyOf": [{"type": "boolean"}, {"enum": INIT_METHODS}, {"type": "string", "pattern": "^pissa_niter_[0-9]+$"}]})
    }

    fn from_value(value: &Value) -> Result<Self, String> {
        if let Ok(default) = bool::from_value(value) {
            return Ok(if default { Self::Default } else { Self::Random });
        }
        let name = value.as_str().unwrap_or_default();
        let iterations = name.strip_prefix("pissa_niter_");
        if INIT_METHODS.contains(&name) || iterations.is_some_and(|n| n.parse::<u32>().is_ok()) {
            return Ok(Self::Method(name.to_owned()));
        }
        Err(format!(
            "true, false or one of {}, pissa_niter_16{}",
            INIT_METHODS.join(", "),
            crate::suggest::did_you_mean(name, INIT_METHODS)
        ))
    }

    fn to_value(&self) -> Value {
        match self {
            Self::Default => json!(true),
            Self::Random => json!(false),
            Self::Method(name) => json!(name),
        }
    }
}

section! {
    /// The adapter. All of it applies with `use_peft: true` only.
    LoraArguments, "lora" {
        /// Train an adapter; false trains every weight of the base.
        use_peft: bool = false, TRL_MODEL;
        /// A method of PEFT with its own keys, as in adapter_config.json, such as {peft_type: VERA,
        /// r: 256}; null for LoRA as the keys below say.
        peft_config: Option<BTreeMap<String, Value>> = None, OURS;
        /// Rank of the update.
        lora_r: usize = 16, TRL_MODEL;
        /// The update is scaled by lora_alpha / lora_r.
        lora_alpha: f64 = 32.0, TRL_MODEL;
        /// Probability that an input of the update is dropped in training.
        lora_dropout: f64 = 0.05, TRL_MODEL;
        /// Modules to adapt: a list of names (whole or last parts of the path), a regular
        /// expression for the whole path, or all-linear; null for PEFT's choice for the
        /// architecture.
        lora_target_modules: Option<Names> = None, TRL_MODEL;
        /// Modules to leave out: a list of names or a regular expression.
        lora_exclude_modules: Option<Names> = None, PEFT;
        /// Modules trained as a whole and saved with the adapter: every module whose path ends with an
        /// entry, such as lm_head, embed_tokens or norm.
        lora_modules_to_save: Vec<String> = Vec::new(), TRL_MODEL;
        /// PEFT's task type: CAUSAL_LM, or SEQ_CLS to learn the class that each row has in its column `label`, with a
        /// head that is trained and saved with the adapter.
        lora_task_type: String = "CAUSAL_LM".to_owned(), TRL_MODEL;
        /// Scale by lora_alpha / sqrt(lora_r).
        use_rslora: bool = false, TRL_MODEL;
        /// Weight-decomposed updates (DoRA): the norms of the adapted rows are trained apart.
        use_dora: bool = false, TRL_MODEL;
        /// How the update starts: true, false, or a method by PEFT's name.
        init_lora_weights: InitLoraWeights = InitLoraWeights::Default, PEFT;
        /// Of init_lora_weights: loftq, as PEFT has it: {loftq_bits: 4, loftq_iter: 1}.
        loftq_config: Option<BTreeMap<String, Value>> = None, PEFT;
        /// Of init_lora_weights: eva, as PEFT has it: {rho: 2.0, tau: 0.99, use_label_mask: true, whiten: false,
        /// adjust_scaling_factors: true}.
        eva_config: Option<BTreeMap<String, Value>> = None, PEFT;
        /// Of init_lora_weights: corda, as PEFT has it: {corda_method: ipm}, or kpm.
        corda_config: Option<BTreeMap<String, Value>> = None, PEFT;
        /// Of init_lora_weights: lora_ga, as PEFT has it: {direction: ArB2r, scale: stable, stable_gamma: 16}.
        lora_ga_config: Option<BTreeMap<String, Value>> = None, PEFT;
        /// Micro-batches of the run, over all ranks, that a start from data looks at before step 0: corda and
        /// lora_ga at all of them, eva until its directions have settled.
        lora_init_batches: usize = 64, OURS;
        /// Where the start takes the update out of the base (pissa, olora, corda, lora_ga), write it as a plain LoRA of twice
        /// the rank for the untouched base; false writes it as it is, which PEFT reads by doing the start again.
        lora_convert_init: bool = true, PEFT;
        /// Biases of the base to train: none, all or lora_only, those of adapted layers (PEFT's bias).
        lora_bias: LoraBias = LoraBias::None, PEFT;
        /// Other ranks for modules whose path ends with, or matches, a name; the first that does decides.
        lora_rank_pattern: Ordered<usize> = Ordered::new(), PEFT;
        /// Other alphas for modules whose path ends with, or matches, a name; the first that does decides.
        lora_alpha_pattern: Ordered<f64> = Ordered::new(), PEFT;
        /// Decoder layers to adapt, counted from 0; empty for all.
        lora_layers_to_transform: Vec<usize> = Vec::new(), PEFT;
        /// What stands before a layer's number in a module's path, where that is not the first number:
        /// names or regular expressions. Needs lora_layers_to_transform.
        lora_layers_pattern: Vec<String> = Vec::new(), PEFT;
        /// Another stack of the base's layers, as ranges [start, end) one after the other, such as [[0, 4],
        /// [2, 5]]: copies of a layer share its weights and have updates of their own. Layers are numbered
        /// in this stack.
        lora_layer_replication: Vec<[usize; 2]> = Vec::new(), PEFT;
        /// Give B a bias, which is trained and scaled as B is (PEFT's own lora_bias).
        lora_b_bias: bool = false, PEFT;
        /// Tokens whose rows of the input embedding are trained, and those of the head where the two are
        /// one weight: what a few new tokens need, without training all of them. Or tokens of each table, such
        /// as `{embed_tokens: [5, 6], lm_head: [5]}`, where a head that is named with other tokens is apart from
        /// then on.
        lora_trainable_token_indices: TokenIndices = TokenIndices::Embedding(Vec::new()), PEFT;
        /// Activated LoRA: updates act from the last occurrence of these tokens in a document on, such as those of the
        /// marker before the answer, and what comes before it is the base's; a document without them trains nothing.
        /// Empty for updates that act everywhere.
        alora_invocation_tokens: Vec<usize> = Vec::new(), PEFT;
        /// Where head and embedding are one weight and one of them is adapted or trained as a whole, keep
        /// them the same; otherwise the other one keeps the base's values.
        lora_ensure_weight_tying: bool = false, PEFT;
    }
}

/// PEFT's task of a classifier of sequences.
pub(in crate::config) const SEQUENCE_CLASSIFICATION: &str = "SEQ_CLS";

impl LoraArguments {
    /// Whether the classes of rows are learned, instead of tokens.
    #[must_use]
    pub fn classifies(&self) -> bool {
        self.lora_task_type == SEQUENCE_CLASSIFICATION
    }
}
