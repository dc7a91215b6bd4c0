//! `LoraConfig`: plain names in Rust, PEFT's names in `adapter_config.json`.

mod read;
#[cfg(test)]
mod tests;
mod write;

use super::{InitLoraWeights, TokenIndices};
use crate::beside::{Biases, Wanted};
use crate::modules;
use crate::target::{
    ExcludeModules, PatternMap, RankAndAlpha, Selection, TargetModules, default_target_modules,
};
use ferrotune_core::{Error, Result};

/// Which biases of the base are trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoraBias {
    /// `"none"`.
    #[default]
    None,
    /// `"all"`: every bias of the model.
    All,
    /// `"lora_only"`: those of adapted layers.
    LoraOnly,
}

impl LoraBias {
    /// Its name in PEFT.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::All => "all",
            Self::LoraOnly => "lora_only",
        }
    }

    /// The same, whatever the method.
    pub(crate) fn of_base(self) -> Biases {
        match self {
            Self::None => Biases::None,
            Self::All => Biases::All,
            Self::LoraOnly => Biases::Adapted,
        }
    }
}

/// What LoRA does: where, with which rank, scale, dropout and start.
///
/// The update of a linear is `y += scale * dropout(x) A^T B^T` with scale = alpha / rank, or
/// alpha / √rank for rsLoRA.
///
/// # Source
/// PEFT's `LoraConfig`; field names on disk are PEFT's (`r`, `lora_alpha`, `lora_dropout`).
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// `r`: rank of the update, at least 1.
    pub rank: usize,
    /// `lora_alpha`: numerator of the scale.
    pub alpha: f64,
    /// `lora_dropout`: probability in `[0, 1)` that an element of the input is dropped before A; a file that is not
    /// trained further may say 1.
    pub dropout: f64,
    /// Scale by alpha / √rank instead of alpha / rank.
    pub use_rslora: bool,
    /// DoRA: the rows of W + scale * B A are brought to trained norms.
    pub use_dora: bool,
    /// What to adapt; `None` takes PEFT's default for the model type.
    pub target_modules: Option<TargetModules>,
    /// What not to adapt.
    pub exclude_modules: Option<ExcludeModules>,
    /// Adapt only these layers.
    pub layers_to_transform: Option<Vec<usize>>,
    /// Path segments that stand before a layer's number; any segment if empty.
    pub layers_pattern: Vec<String>,
    /// Rank of the modules that match a name or regular expression; the first match wins.
    pub rank_pattern: PatternMap<usize>,
    /// Alpha of the modules that match; not rescaled when `rank_pattern` changes the rank.
    pub alpha_pattern: PatternMap<f64>,
    /// How A and B start.
    pub init_lora_weights: InitLoraWeights,
    /// Biases of the base to train.
    pub bias: LoraBias,
    /// Give B a bias, which is scaled as B is.
    pub lora_bias: bool,
    /// Modules to train as a whole: every one whose path ends with an entry.
    pub modules_to_save: Vec<String>,
    /// Rows of the embedding or of the head to train.
    pub trainable_token_indices: Option<TokenIndices>,
    /// Where the embedding is shared with the head and one of them is adapted or trained as a whole,
    /// keep them the same. Otherwise the other keeps the base's weight.
    pub ensure_weight_tying: bool,
    /// Another stack of the base's layers: those of each range `[start, end)`, one range after the other,
    /// each copy with updates of its own. Names and numbers of layers are those of this stack. Empty for
    /// the base's own.
    pub layer_replication: Vec<[usize; 2]>,
    /// aLoRA: updates act from the last occurrence of these tokens in a document on, if there is one; before it, the
    /// model is the base.
    pub alora_invocation_tokens: Option<Vec<u32>>,
    /// As in the file. Decides nothing: whether a weight lies transposed is known of the base.
    pub fan_in_fan_out: bool,
    /// PEFT's task, such as `CAUSAL_LM`.
    pub task_type: Option<String>,
    /// Path or hub name of the base model.
    pub base_model_name_or_path: Option<String>,
    /// Revision of the base model on the hub.
    pub revision: Option<String>,
}

impl Default for LoraConfig {
    /// PEFT's defaults, for a causal language model: rank 8, alpha 8, no dropout.
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: 8.0,
            dropout: 0.0,
            use_rslora: false,
            use_dora: false,
            target_modules: None,
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: Vec::new(),
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            init_lora_weights: InitLoraWeights::Kaiming,
            bias: LoraBias::None,
            lora_bias: false,
            modules_to_save: Vec::new(),
            trainable_token_indices: None,
            ensure_weight_tying: false,
            layer_replication: Vec::new(),
            alora_invocation_tokens: None,
            fan_in_fan_out: false,
            task_type: Some("CAUSAL_LM".into()),
            base_model_name_or_path: None,
            revision: None,
        }
    }
}

impl LoraConfig {
    /// Refuses values that no model could be trained with.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key by its name on disk.
    pub fn validate(&self) -> Result<()> {
        if self.dropout == 1.0 {
            let message =
                "1 drops all of every input, and nothing would be trained; 0 and 0.05 are usual";
            return Err(Error::config("lora_dropout", message));
        }
        self.validate_as_file()
    }

    /// Refuses values that no model could use, in inference either, where there is no dropout.
    pub(crate) fn validate_as_file(&self) -> Result<()> {
        let none = "is 0, and a rank must be at least 1; 8 and 16 are usual";
        if self.rank == 0 {
            return Err(Error::config("r", none));
        }
        if let Some((name, _)) = self.rank_pattern.iter().find(|(_, rank)| *rank == 0) {
            return Err(Error::config("rank_pattern", format!("`{name}` {none}")));
        }
        let alphas = self.alpha_pattern.iter().map(|(_, alpha)| *alpha);
        for alpha in std::iter::once(self.alpha).chain(alphas) {
            if !alpha.is_finite() {
                return Err(Error::config(
                    "lora_alpha",
                    format!("{alpha} is not a finite number; once or twice the rank is usual"),
                ));
            }
        }
        if !(0.0..=1.0).contains(&self.dropout) {
            return Err(Error::config(
                "lora_dropout",
                format!(
                    "{} is no probability from 0 to 1; 0 and 0.05 are usual",
                    self.dropout
                ),
            ));
        }
        if self.repeats_a_layer() && self.init_lora_weights.changes_base() {
            let message = format!(
                "{} changes the base's weights, which the copies of a layer share in `layer_replication`; take \
                 another start, or leave that out",
                self.init_lora_weights.name()
            );
            return Err(Error::config("init_lora_weights", message));
        }
        self.validate_invocation()?;
        let plain = [InitLoraWeights::Kaiming, InitLoraWeights::Random];
        if self.lora_bias && self.use_dora {
            let message = "true beside `use_dora`: PEFT has no bias in a weight-decomposed update; switch one off";
            return Err(Error::config("lora_bias", message));
        }
        if self.lora_bias && !plain.contains(&self.init_lora_weights) {
            return Err(Error::config(
                "lora_bias",
                "true needs `init_lora_weights` true or false, as in PEFT",
            ));
        }
        let patterned = self.alpha_pattern.iter().map(|(_, alpha)| *alpha);
        let least = std::iter::once(self.alpha).chain(patterned);
        if self.init_lora_weights.changes_base() && least.fold(f64::MAX, f64::min) <= 0.0 {
            let init = self.init_lora_weights.name();
            let message = format!(
                "{init} needs an alpha above 0: what is taken out of the base is divided by it"
            );
            return Err(Error::config("lora_alpha", message));
        }
        Ok(())
    }

    /// Refuses what an update that acts in places cannot be.
    fn validate_invocation(&self) -> Result<()> {
        let key = "alora_invocation_tokens";
        match &self.alora_invocation_tokens {
            None => return Ok(()),
            Some(tokens) if tokens.is_empty() => {
                return Err(Error::config(
                    key,
                    "names no token, so nothing would ever act",
                ));
            }
            Some(_) => {}
        }
        let init = self.init_lora_weights;
        let other = match (self.use_dora, self.lora_bias, init.changes_base()) {
            (true, _, _) => "`use_dora`".to_owned(),
            (_, true, _) => "`lora_bias`".to_owned(),
            (_, _, true) => format!("`init_lora_weights` {}", init.name()),
            _ => return Ok(()),
        };
        let message = format!(
            "beside {other}: before these tokens the model is the base as it is, which that changes; leave one out"
        );
        Err(Error::config(key, message))
    }

    /// Whether two of the ranges of `layer_replication` overlap.
    fn repeats_a_layer(&self) -> bool {
        let ranges = &self.layer_replication;
        let overlap = |a: &[usize; 2], b: &[usize; 2]| a[0].max(b[0]) < a[1].min(b[1]);
        let mut pairs = (0..ranges.len()).flat_map(|j| (0..j).map(move |i| (i, j)));
        pairs.any(|(i, j)| overlap(&ranges[i], &ranges[j]))
    }

    /// This configuration with a missing `target_modules` replaced by PEFT's default.
    ///
    /// # Errors
    /// [`Error::Config`] if PEFT has no default for `model_type`.
    pub fn with_default_targets(mut self, model_type: &str) -> Result<Self> {
        if self.target_modules.is_none() {
            self.target_modules = Some(default_target_modules(model_type).ok_or_else(|| {
                Error::config(
                    "target_modules",
                    format!(
                        "is not set, and there is no default for model type `{model_type}`; \
                         name modules or use `all-linear`"
                    ),
                )
            })?);
        }
        Ok(self)
    }

    /// The same for a task of PEFT's (`task_type`). With `SEQ_CLS` it also trains the head of the classifier.
    #[must_use]
    pub fn for_task(mut self, task: &str) -> Self {
        self.task_type = Some(task.into());
        modules::complete_for_task(Some(task), &mut self.modules_to_save);
        self
    }

    /// What it says of modules that are trained as a whole.
    pub(crate) fn wanted(&self) -> Wanted<'_> {
        Wanted {
            modules_to_save: &self.modules_to_save,
            keeps_tied: self.ensure_weight_tying,
            target_modules: self.target_modules.as_ref(),
        }
    }

    /// The part that decides where; `target_modules` must be known.
    ///
    /// # Errors
    /// [`Error::Config`] if `target_modules` is not set: see [`LoraConfig::with_default_targets`].
    pub fn selection(&self) -> Result<Selection<'_>> {
        let target_modules = self.target_modules.as_ref().ok_or_else(|| {
            Error::config(
                "target_modules",
                "is not set; name modules or use `all-linear`",
            )
        })?;
        Ok(Selection {
            target_modules,
            exclude_modules: self.exclude_modules.as_ref(),
            layers_to_transform: self.layers_to_transform.as_deref(),
            layers_pattern: &self.layers_pattern,
        })
    }

    /// The part that decides rank and alpha of each module.
    #[must_use]
    pub fn rank_and_alpha(&self) -> RankAndAlpha<'_> {
        RankAndAlpha {
            rank: self.rank,
            alpha: self.alpha,
            rank_pattern: &self.rank_pattern,
            alpha_pattern: &self.alpha_pattern,
        }
    }

    /// Factor of an update of this rank and alpha: alpha / rank, or alpha / √rank for rsLoRA.
    #[must_use]
    pub fn scale(&self, rank: usize, alpha: f64) -> f32 {
        let rank = rank as f64;
        let divisor = if self.use_rslora { rank.sqrt() } else { rank };
        (alpha / divisor) as f32
    }

    /// The first key in which two configurations scale or shape their updates differently, with
    /// both values.
    pub(crate) fn difference(&self, other: &Self) -> Option<(&'static str, String, String)> {
        let pairs = [
            ("r", format!("{}", self.rank), format!("{}", other.rank)),
            (
                "lora_alpha",
                format!("{}", self.alpha),
                format!("{}", other.alpha),
            ),
            (
                "use_rslora",
                format!("{}", self.use_rslora),
                format!("{}", other.use_rslora),
            ),
            (
                "use_dora",
                format!("{}", self.use_dora),
                format!("{}", other.use_dora),
            ),
            (
                "rank_pattern",
                format!("{:?}", self.rank_pattern),
                format!("{:?}", other.rank_pattern),
            ),
            (
                "alpha_pattern",
                format!("{:?}", self.alpha_pattern),
                format!("{:?}", other.alpha_pattern),
            ),
            (
                "trainable_token_indices",
                format!("{:?}", self.trainable_token_indices),
                format!("{:?}", other.trainable_token_indices),
            ),
            (
                "layer_replication",
                format!("{:?}", self.layer_replication),
                format!("{:?}", other.layer_replication),
            ),
            (
                "alora_invocation_tokens",
                format!("{:?}", self.alora_invocation_tokens),
                format!("{:?}", other.alora_invocation_tokens),
            ),
            (
                "ensure_weight_tying",
                format!("{}", self.ensure_weight_tying),
                format!("{}", other.ensure_weight_tying),
            ),
        ];
        pairs.into_iter().find(|(_, ours, theirs)| ours != theirs)
    }
}
