//! The starts there are, by PEFT's names.

use super::corda::CordaMethod;
use super::eva::EvaConfig;
use super::loftq::LoftqConfig;
use super::lora_ga::LoraGaConfig;
use crate::method::{Keys, Source};
use ferrotune_core::{Error, Result, suggest};
use serde_json::{Map, Value, json};

/// How A and B start.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
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
    /// `"loftq"`: the base is quantised, and A and B are the leading part of what that loses.
    Loftq(LoftqConfig),
    /// `"eva"`: A are the directions in which the inputs vary most, with ranks where they explain most.
    Eva(EvaConfig),
    /// `"corda"`: A and B are the directions of the weight that matter most, or least, to its inputs; the base
    /// is what is left of it.
    Corda(CordaMethod),
    /// `"lora_ga"`: A and B are directions of the weight's gradient; the base is what is left of it.
    LoraGa(LoraGaConfig),
}

use InitLoraWeights::{Corda, Eva, Kaiming, Loftq, LoraGa, Olora, Pissa, Random};

/// A name, the key that says more, and the start with PEFT's defaults.
type Named = (&'static str, Option<&'static str>, fn() -> InitLoraWeights);

/// The starts that have a name of their own, and the key that says more of them. A new one is a line here, and
/// a file beside this one.
const NAMED: [Named; 8] = [
    ("gaussian", None, || InitLoraWeights::Gaussian),
    ("orthogonal", None, || InitLoraWeights::Orthogonal),
    ("pissa", None, || Pissa { iterations: None }),
    ("olora", None, || Olora),
    ("loftq", Some("loftq_config"), || {
        Loftq(LoftqConfig::default())
    }),
    ("eva", Some("eva_config"), || Eva(EvaConfig::default())),
    ("corda", Some("corda_config"), || {
        Corda(CordaMethod::default())
    }),
    ("lora_ga", Some("lora_ga_config"), || {
        LoraGa(LoraGaConfig::default())
    }),
];
/// What stands before the number of iterations.
const PISSA_ITERATIONS: &str = "pissa_niter_";
/// Starts of PEFT that are not here.
const NOT_SUPPORTED: [&str; 1] = ["mica"];

impl InitLoraWeights {
    /// The start that PEFT calls so, with PEFT's defaults of whatever else there is to say of it.
    ///
    /// # Errors
    /// What is wrong with the name: it means nothing (with all names there are, and the nearest), it is one
    /// of PEFT's that is not supported, or its number is none.
    pub fn from_name(name: &str) -> std::result::Result<Self, String> {
        let lower = name.to_ascii_lowercase();
        if let Some((_, _, init)) = NAMED.iter().find(|(known, ..)| *known == lower) {
            return Ok(init());
        }
        if let Some(number) = lower.strip_prefix(PISSA_ITERATIONS) {
            return match number.parse() {
                Ok(iterations) => Ok(Pissa {
                    iterations: Some(iterations),
                }),
                Err(_) => Err(format!(
                    "is \"{name}\": `{number}` is no number of iterations, which is a whole number from 0; \
                     16 is usual, as in \"{PISSA_ITERATIONS}16\""
                )),
            };
        }
        let names = NAMED.iter().map(|(name, ..)| *name);
        let names: Vec<&str> = names.chain(["pissa_niter_16"]).collect();
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

    /// The same start as the object under `key` of a training configuration says.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key, if it is another start's, or a value in it is wrong.
    pub fn configured(self, key: &'static str, object: &Map<String, Value>) -> Result<Self> {
        if self.settings() == Some(key) {
            let mut keys = Keys::new(Source::Config(key), object);
            let init = self.read(&mut keys)?;
            return keys.finish().map(|()| init);
        }
        let of = NAMED.iter().find(|(_, settings, _)| *settings == Some(key));
        let message = format!(
            "does nothing beside `{KEY}: {}`; leave it out, or set `{KEY}: {}`",
            self.name(),
            of.map_or("", |(name, ..)| *name)
        );
        Err(Error::config(key, message))
    }

    /// The same start as the object under its key in a file says.
    pub(crate) fn read(self, keys: &mut Keys<'_>) -> Result<Self> {
        Ok(match self {
            Loftq(_) => Loftq(LoftqConfig::read(keys)?),
            Eva(_) => Eva(EvaConfig::read(keys)?),
            Corda(_) => Corda(CordaMethod::read(keys)?),
            LoraGa(_) => LoraGa(LoraGaConfig::read(keys)?),
            plain => plain,
        })
    }

    /// The key that says more of it.
    pub(crate) fn settings(self) -> Option<&'static str> {
        let name = self.name();
        let found = NAMED.iter().find(|(known, ..)| *known == name);
        found.and_then(|(_, settings, _)| *settings)
    }

    /// What PEFT has in `init_lora_weights` for an adapter that is written: one that started by EVA is a plain
    /// LoRA from then on.
    pub(crate) fn to_value(self) -> Value {
        match self {
            Kaiming | Eva(_) => json!(true),
            Random => json!(false),
            named => json!(named.name()),
        }
    }

    /// What PEFT has under the key that says more of it.
    pub(crate) fn settings_value(self) -> Option<(&'static str, Value)> {
        let value = match self {
            Loftq(config) => config.to_value(),
            Corda(method) => method.to_value(),
            LoraGa(config) => config.to_value(),
            _ => return None,
        };
        self.settings().map(|key| (key, value))
    }

    /// PEFT's name for it.
    #[must_use]
    pub fn name(self) -> String {
        let name = match self {
            Kaiming => "true",
            Random => "false",
            Self::Gaussian => "gaussian",
            Self::Orthogonal => "orthogonal",
            Pissa { iterations: None } => "pissa",
            Pissa {
                iterations: Some(iterations),
            } => return format!("{PISSA_ITERATIONS}{iterations}"),
            Olora => "olora",
            Loftq(_) => "loftq",
            Eva(_) => "eva",
            Corda(_) => "corda",
            LoraGa(_) => "lora_ga",
        };
        name.into()
    }

    /// What is wrong with a base whose weights are held as codes, if this start needs values.
    ///
    /// # Source
    /// PEFT, which refuses them too, and tells to quantise what is left of the base instead.
    #[must_use]
    pub fn fault_of_codes(self) -> Option<String> {
        let needs_values = matches!(self, Pissa { .. } | Corda(_) | LoraGa(_));
        needs_values.then(|| {
            format!(
                "{} needs the weights as f32 or bf16, and the base is quantised: the directions it looks for are \
                 those of the weights before that; leave out load_in_4bit, or take olora, loftq or true",
                self.name()
            )
        })
    }

    /// Whether A and B are taken out of the base, so that they are an update of another base.
    #[must_use]
    pub fn subtracts(self) -> bool {
        matches!(self, Pissa { .. } | Olora | Corda(_) | LoraGa(_))
    }

    /// Whether the base is changed.
    #[must_use]
    pub fn changes_base(self) -> bool {
        self.subtracts() || matches!(self, Loftq(_))
    }

    /// Whether it follows from random numbers and the base's weights.
    pub(crate) fn is_drawn(self) -> bool {
        matches!(
            self,
            Pissa {
                iterations: Some(_)
            }
        )
    }

    /// Whether it follows from data: see [`super::Observation`].
    #[must_use]
    pub fn needs_data(self) -> bool {
        matches!(self, Eva(_) | Corda(_) | LoraGa(_))
    }

    /// The highest rank for a weight `[out, in]`, if there is one, and why.
    pub(crate) fn most(self, [out, inputs]: [usize; 2]) -> Option<(usize, &'static str)> {
        let directions = out.min(inputs);
        match self {
            Pissa { .. } | Olora | Loftq(_) | Corda(_) => Some((directions, "one direction each")),
            LoraGa(_) => Some((directions / 2, "two directions each")),
            Eva(eva) => {
                let most = (0..=inputs)
                    .rev()
                    .find(|rank| eva.components(*rank) <= inputs);
                Some((most.unwrap_or(0), "rho directions of its inputs each"))
            }
            _ => None,
        }
    }
}

const KEY: &str = super::KEY;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_reads_back_as_what_it_is() {
        for (name, ..) in NAMED {
            let init = InitLoraWeights::from_name(name).expect(name);
            assert_eq!(init.name(), name);
        }
        let iterated = InitLoraWeights::from_name("pissa_niter_7").expect("a number");
        assert_eq!(iterated.to_value(), json!("pissa_niter_7"));
    }

    #[test]
    fn what_is_no_start_is_said_with_the_nearest() {
        for (name, parts) in [
            ("pisa", &["did you mean `pissa`", "olora", "lora_ga"][..]),
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

    #[test]
    fn settings_belong_to_one_start_and_are_checked() {
        for (name, key, object, parts) in [
            (
                "loftq",
                "loftq_config",
                json!({"loftq_bits": 3}),
                &["loftq_bits", "4 (nf4)"][..],
            ),
            (
                "loftq",
                "loftq_config",
                json!({"loftq_iter": 0}),
                &["loftq_iter"],
            ),
            (
                "loftq",
                "loftq_config",
                json!({"bits": 4}),
                &["loftq_config.bits", "no key"],
            ),
            (
                "eva",
                "eva_config",
                json!({"rho": 0.5}),
                &["rho", "at least 1"],
            ),
            ("eva", "eva_config", json!({"tau": 2}), &["tau", "cosine"]),
            (
                "corda",
                "corda_config",
                json!({"corda_method": "kpn"}),
                &["did you mean `kpm`"],
            ),
            (
                "corda",
                "corda_config",
                json!({"cache_file": "x.pt"}),
                &["cache_file", "pickle"],
            ),
            (
                "lora_ga",
                "lora_ga_config",
                json!({"direction": "ArB"}),
                &["ArB2r"],
            ),
            (
                "lora_ga",
                "lora_ga_config",
                json!({"stable_gamma": 0}),
                &["stable_gamma"],
            ),
            (
                "pissa",
                "eva_config",
                json!({"rho": 2}),
                &["does nothing", "pissa", "eva"],
            ),
        ] {
            let init = InitLoraWeights::from_name(name).expect(name);
            let object = object.as_object().expect("an object");
            let error = init.configured(key, object).expect_err(name).to_string();
            for part in parts {
                assert!(error.contains(part), "{name}: {error}");
            }
        }
        let kpm = json!({"corda_method": "kpm", "verbose": true});
        let init = InitLoraWeights::from_name("corda").expect("a start");
        let init = init.configured("corda_config", kpm.as_object().expect("an object"));
        assert_eq!(init.expect("valid"), Corda(CordaMethod::Kpm));
    }
}
