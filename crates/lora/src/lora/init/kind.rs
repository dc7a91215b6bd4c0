//! The starts there are, by PEFT's names.

use ferrotune_core::suggest;
use serde_json::{Value, json};

/// How A and B start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InitLoraWeights {
    /// `true` in PEFT: A uniform in ±1/√in_features (Kaiming with a = √5), B zero.
    #[default]
    Kaiming,
    /// `"gaussian"`: A normal with standard deviation 1/rank, B zero.
    Gaussian,
    /// `false` in PEFT: A uniform in ±1/√in_features, B uniform in ±1/√rank. Changes the model.
    Random,
    /// `"orthogonal"`: A of even, B of odd rows of one orthogonal matrix, so that B A is zero and both
    /// learn from the start. Needs an even rank.
    Orthogonal,
    /// `"pissa"`: A and B are the leading singular values and vectors of the weight, the base what is left
    /// of it.
    Pissa {
        /// `"pissa_niter_N"`: as they are found by N rounds of subspace iteration.
        iterations: Option<u32>,
    },
    /// `"olora"`: B are the first columns of Q and A the first rows of R of the weight, the base what is
    /// left of it.
    Olora,
}

/// The starts that have a name of their own.
const NAMED: [(&str, InitLoraWeights); 4] = [
    ("gaussian", InitLoraWeights::Gaussian),
    ("orthogonal", InitLoraWeights::Orthogonal),
    ("pissa", InitLoraWeights::Pissa { iterations: None }),
    ("olora", InitLoraWeights::Olora),
];
/// What stands before the number of iterations.
const PISSA_ITERATIONS: &str = "pissa_niter_";
/// Starts of PEFT that are not here.
const NOT_SUPPORTED: [&str; 5] = ["corda", "eva", "loftq", "lora_ga", "mica"];

impl InitLoraWeights {
    /// The start that PEFT calls so.
    ///
    /// # Errors
    /// What is wrong with the name: it means nothing (with all names there are, and the nearest), it is one
    /// of PEFT's that is not supported, or its number is none.
    pub fn from_name(name: &str) -> Result<Self, String> {
        let lower = name.to_ascii_lowercase();
        if let Some((_, init)) = NAMED.iter().find(|(known, _)| *known == lower) {
            return Ok(*init);
        }
        if let Some(number) = lower.strip_prefix(PISSA_ITERATIONS) {
            return match number.parse() {
                Ok(iterations) => Ok(Self::Pissa {
                    iterations: Some(iterations),
                }),
                Err(_) => Err(format!(
                    "is \"{name}\": `{number}` is no number of iterations, which is a whole number from 0; \
                     16 is usual, as in \"{PISSA_ITERATIONS}16\""
                )),
            };
        }
        let names = NAMED
            .iter()
            .map(|(name, _)| *name)
            .chain(["pissa_niter_16"]);
        let names: Vec<&str> = names.collect();
        if NOT_SUPPORTED.contains(&lower.as_str()) {
            return Err(format!(
                "is \"{name}\": this start of PEFT is not supported; supported: true, false, {}",
                names.join(", ")
            ));
        }
        Err(format!(
            "is \"{name}\", expected true, false or one of {}{}",
            names.join(", "),
            suggest::did_you_mean(&lower, names.iter().copied())
        ))
    }

    /// What PEFT has in `init_lora_weights` for it.
    pub(crate) fn to_value(self) -> Value {
        match self {
            Self::Kaiming => json!(true),
            Self::Random => json!(false),
            named => json!(named.name()),
        }
    }

    /// PEFT's name for it.
    #[must_use]
    pub fn name(self) -> String {
        match self {
            Self::Kaiming => "true".into(),
            Self::Random => "false".into(),
            Self::Pissa {
                iterations: Some(iterations),
            } => format!("{PISSA_ITERATIONS}{iterations}"),
            named => {
                let found = NAMED.iter().find(|(_, init)| *init == named);
                found.map_or_else(String::new, |(name, _)| (*name).into())
            }
        }
    }

    /// What is wrong with a base whose weights are held as codes, if this start needs values.
    ///
    /// # Source
    /// PEFT, which refuses them too, and tells to quantise what is left of the base instead.
    #[must_use]
    pub fn fault_of_codes(self) -> Option<String> {
        let needs_values = matches!(self, Self::Pissa { .. });
        needs_values.then(|| {
            format!(
                "{} needs the weights as f32 or bf16, and the base is quantised: the directions it looks for are \
                 those of the weights before that; leave out load_in_4bit, or take olora, gaussian or true",
                self.name()
            )
        })
    }

    /// Whether A and B are taken out of the base, so that they are an update of another base.
    #[must_use]
    pub fn changes_base(self) -> bool {
        matches!(self, Self::Pissa { .. } | Self::Olora)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_reads_back_as_what_it_is() {
        for (name, init) in NAMED {
            assert_eq!(InitLoraWeights::from_name(name), Ok(init));
            assert_eq!(init.to_value(), json!(name));
        }
        let iterated = InitLoraWeights::from_name("pissa_niter_7").expect("a number");
        assert_eq!(iterated.to_value(), json!("pissa_niter_7"));
    }

    #[test]
    fn what_is_no_start_is_said_with_the_nearest() {
        for (name, parts) in [
            ("pisa", &["did you mean `pissa`", "olora", "gaussian"][..]),
            ("pissa_niter_-1", &["`-1`", "pissa_niter_16"]),
            ("pissa_niter_", &["whole number"]),
            ("mica", &["not supported", "pissa"]),
        ] {
            let error = InitLoraWeights::from_name(name).expect_err(name);
            for part in parts {
                assert!(error.contains(part), "{name}: {error}");
            }
        }
    }
}
