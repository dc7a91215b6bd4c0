//! Names of an adapter's tensors: `base_model.model.{module path}.lora_A.weight` and others.

/// What PEFT puts before the path of a module of the base model.
const PREFIX: &str = "base_model.model.";

/// What the path of a module trained as a whole goes on with where the base's own is meant.
pub(crate) const ORIGINAL: &str = "original_module";
/// The same where the trained one is, under the name of its adapter.
pub(crate) const SAVED: &str = "modules_to_save";

/// What a tensor of an adapter is to its module. Shapes are those in files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    /// Of a linear, `[rank, in_features]`.
    A,
    /// `[out_features, rank]`.
    B,
    /// `[out_features]`.
    BiasOfB,
    /// DoRA's m, `[out_features]`.
    Magnitude,
    /// Of an embedding, `[rank, vocabulary]`.
    EmbeddingA,
    /// `[dim, rank]`.
    EmbeddingB,
    /// Rows of a table, `[tokens, dim]`, as a part of a LoRA.
    TokenRows,
    /// The same where they are the whole method.
    TokenRowsAlone,
    /// A norm's weight as LN tuning has it.
    TunedNormWeight,
    /// Its bias.
    TunedNormBias,
    /// The base's trained bias of an adapted linear.
    AdaptedBias,
    /// A weight trained as a whole.
    Weight,
    /// A bias trained as a whole.
    Bias,
}

impl Part {
    /// Longer endings come before those that they end in.
    const ALL: [Self; 13] = [
        Self::A,
        Self::B,
        Self::BiasOfB,
        Self::Magnitude,
        Self::EmbeddingA,
        Self::EmbeddingB,
        Self::TokenRows,
        Self::TokenRowsAlone,
        Self::TunedNormWeight,
        Self::TunedNormBias,
        Self::AdaptedBias,
        Self::Weight,
        Self::Bias,
    ];

    const fn ending(self) -> &'static str {
        match self {
            Self::A => ".lora_A.weight",
            Self::B => ".lora_B.weight",
            Self::BiasOfB => ".lora_B.bias",
            Self::Magnitude => ".lora_magnitude_vector",
            Self::EmbeddingA => ".lora_embedding_A",
            Self::EmbeddingB => ".lora_embedding_B",
            Self::TokenRows => ".token_adapter.trainable_tokens_delta",
            Self::TokenRowsAlone => ".trainable_tokens_delta",
            Self::TunedNormWeight => ".ln_tuning_layers.weight",
            Self::TunedNormBias => ".ln_tuning_layers.bias",
            Self::AdaptedBias => ".base_layer.bias",
            Self::Weight => ".weight",
            Self::Bias => ".bias",
        }
    }

    /// Whether it has a row for each of some tokens.
    pub(crate) fn is_rows(self) -> bool {
        matches!(self, Self::TokenRows | Self::TokenRowsAlone)
    }

    /// What the tensor called `name` is, if it is any of these.
    pub(crate) fn of(name: &str) -> Option<Self> {
        parse(name).map(|(_, part)| part)
    }
}

/// `path` without its first `segment`; `None` where it has no such.
pub(crate) fn without(path: &str, segment: &str) -> Option<String> {
    let mut segments: Vec<&str> = path.split('.').collect();
    let at = segments.iter().position(|own| *own == segment)?;
    segments.remove(at);
    Some(segments.join("."))
}

/// The name of a tensor, in the run and on disk.
pub(crate) fn tensor(module: &str, part: Part) -> String {
    format!("{PREFIX}{module}{}", part.ending())
}

/// The module path and the part that a name stands for.
pub(crate) fn parse(name: &str) -> Option<(&str, Part)> {
    let name = name.strip_prefix(PREFIX)?;
    Part::ALL
        .into_iter()
        .find_map(|part| Some((name.strip_suffix(part.ending())?, part)))
        .filter(|(module, _)| !module.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_reads_back_as_what_it_is() {
        for part in Part::ALL {
            let name = tensor("model.layers.0.mlp.up_proj", part);
            assert_eq!(parse(&name), Some(("model.layers.0.mlp.up_proj", part)));
        }
        assert_eq!(parse("base_model.model.weight"), None);
        assert_eq!(parse("model.norm.weight"), None);
    }
}
