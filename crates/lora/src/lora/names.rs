//! Names of LoRA tensors: `base_model.model.{module path}.lora_A.weight`.

/// What PEFT puts before the path of a module of the base model.
const PREFIX: &str = "base_model.model.";

/// One of the two factors of an update.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Factor {
    /// `[rank, in_features]`.
    A,
    /// `[out_features, rank]`.
    B,
}

impl Factor {
    const fn ending(self) -> &'static str {
        match self {
            Self::A => ".lora_A.weight",
            Self::B => ".lora_B.weight",
        }
    }

    /// The factor that `name` is, if it is one.
    pub(crate) fn of(name: &str) -> Option<Self> {
        parse(name).map(|(_, factor)| factor)
    }
}

/// The name of a factor, in the run and on disk.
pub(crate) fn tensor(module: &str, factor: Factor) -> String {
    format!("{PREFIX}{module}{}", factor.ending())
}

/// The module path and the factor that a name stands for.
pub(crate) fn parse(name: &str) -> Option<(&str, Factor)> {
    let name = name.strip_prefix(PREFIX)?;
    [Factor::A, Factor::B]
        .into_iter()
        .find_map(|factor| Some((name.strip_suffix(factor.ending())?, factor)))
        .filter(|(module, _)| !module.is_empty())
}
