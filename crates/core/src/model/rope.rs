//! Rotary position embedding: which frequencies, for every `rope_type` of Transformers that a
//! Llama checkpoint uses.
//!
//! # Source
//! `transformers/modeling_rope_utils.py` (5.x); YaRN: Peng et al. 2023, arXiv 2309.00071.

use super::hf_config::HfConfig;
use crate::{Error, Result, suggest};
use serde_json::{Map, Value};
use std::f64::consts::TAU;

const TYPES: [&str; 6] = ["default", "linear", "dynamic", "llama3", "yarn", "longrope"];

const PARTIAL: &str = "partial_rotary_factor";

/// Parameters that a rope can have, of any type.
const KNOWN: [&str; 19] = [
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "factor",
    "full_attention",
    "high_freq_factor",
    "long_factor",
    "low_freq_factor",
    "mrope_section",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
    PARTIAL,
    "rope_theta",
    "rope_type",
    "short_factor",
    "sliding_attention",
    "truncate",
    "type",
];

/// How positions become angles.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the geometric frequencies.
    pub theta: f64,
    /// Rotated dimensions of each head; even.
    pub rotary_dim: usize,
    /// The scaling rule.
    pub scaling: RopeScaling,
}

/// The scaling rules. Lengths are in tokens.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Plain RoPE.
    Default,
    /// Positions divided by `factor`.
    Linear {
        /// Divisor.
        factor: f64,
    },
    /// NTK-aware base that grows with the length of the document beyond `max_position`.
    Dynamic {
        /// Growth factor.
        factor: f64,
        /// Length up to which RoPE is plain.
        max_position: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original_max_position / low_freq_factor` are low.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position / high_freq_factor` are high.
        high_freq_factor: f64,
        /// Context length of pre-training.
        original_max_position: f64,
    },
    /// YaRN: a ramp over dimensions between divided and plain frequencies, and scaled cos and sin.
    Yarn {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Rotations over the original context above which a dimension is kept.
        beta_fast: f64,
        /// Rotations below which it is divided.
        beta_slow: f64,
        /// Context length of pre-training.
        original_max_position: f64,
        /// Factor of cos and sin.
        attention_factor: f64,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
    },
    /// LongRoPE: each frequency has a divisor of its own, for documents up to a length and beyond it, and
    /// cos and sin are scaled.
    LongRope {
        /// Divisors up to `original_max_position`, one per pair of dimensions.
        short_factor: Vec<f64>,
        /// Divisors of longer documents.
        long_factor: Vec<f64>,
        /// Context length of pre-training.
        original_max_position: f64,
        /// Factor of cos and sin.
        attention_factor: f64,
    },
}

impl RopeConfig {
    /// Reads `rope_parameters` (Transformers 5) or `rope_theta` with `rope_scaling` (4.x), of an architecture that
    /// rotates whole heads; where a part of them may be, see [`RopeConfig::partial`].
    ///
    /// A `partial_rotary_factor` means nothing there beside the default rope. Beside any other, Transformers makes
    /// angles for a part of a head and fails to apply them.
    ///
    /// # Errors
    /// [`Error::Model`] naming the key: an unknown type, a missing or odd parameter, a part of a head.
    pub fn from_hf(config: &HfConfig, head_dim: usize) -> Result<Self> {
        let (group, map) = parameters(config)?;
        let read = Parameters { config, group, map };
        read.whole_heads(("rope_theta", 10_000.0), head_dim)
    }

    /// The same of layers of one kind (`full_attention` or `sliding_attention`): from
    /// `rope_parameters.KIND` (Transformers 5), or `theta`'s key (4.x), where the default of that is.
    /// A `rope_scaling` of 4.x is that of full attention; `rope_parameters` of no kind say nothing.
    ///
    /// # Errors
    /// As [`RopeConfig::from_hf`].
    pub fn of_layers(
        config: &HfConfig,
        head_dim: usize,
        kind: &str,
        theta: (&str, f64),
    ) -> Result<Self> {
        let of_kinds = group_of(config, "rope_parameters")?;
        let of_kind = of_kinds.and_then(|kinds| kinds.get(kind)?.as_object());
        let mut map = of_kind.cloned().unwrap_or_default();
        let mut group = format!("rope_parameters.{kind}");
        if kind == "full_attention"
            && let Some(scaling) = group_of(config, "rope_scaling")?
        {
            map.extend(scaling.clone());
            group = "rope_scaling".into();
        }
        let read = Parameters { config, group, map };
        read.whole_heads(theta, head_dim)
    }

    /// [`RopeConfig::from_hf`] of an architecture that rotates the share `partial_rotary_factor` of a head.
    ///
    /// # Errors
    /// As there, and if it is no share of a head.
    pub fn partial(config: &HfConfig, head_dim: usize) -> Result<Self> {
        let (group, map) = parameters(config)?;
        let read = Parameters { config, group, map };
        let rotary_dim = read.share_of(head_dim)?;
        read.rope(("rope_theta", 10_000.0), rotary_dim)
    }

    /// Angles per position, `[rotary_dim / 2]`, for a document of `length` tokens.
    #[must_use]
    pub fn inverse_frequencies(&self, length: u32) -> Vec<f32> {
        let dim = self.rotary_dim as f64;
        let plain = |theta: f64, i: usize| 1.0 / theta.powf(2.0 * i as f64 / dim);
        let half = self.rotary_dim / 2;
        let frequency = |i: usize| match &self.scaling {
            RopeScaling::LongRope {
                short_factor,
                long_factor,
                ..
            } => {
                let factors = [short_factor, long_factor][self.variant(length)];
                plain(self.theta, i) / factors[i]
            }
            RopeScaling::Default => plain(self.theta, i),
            RopeScaling::Linear { factor } => plain(self.theta, i) / factor,
            RopeScaling::Dynamic {
                factor,
                max_position,
            } => {
                let length = f64::from(length).max(*max_position);
                let growth = factor * length / max_position - (factor - 1.0);
                plain(self.theta * growth.powf(dim / (dim - 2.0)), i)
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position,
            } => {
                let f = plain(self.theta, i);
                let wavelength = TAU / f;
                let [low, high] =
                    [low_freq_factor, high_freq_factor].map(|f| original_max_position / f);
                if wavelength > low {
                    f / factor
                } else if wavelength < high {
                    f
                } else {
                    let smooth = (original_max_position / wavelength - low_freq_factor)
                        / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * f / factor + smooth * f
                }
            }
            RopeScaling::Yarn { factor, .. } => {
                let keep = 1.0 - self.yarn_ramp(i);
                let f = plain(self.theta, i);
                f / factor * (1.0 - keep) + f * keep
            }
        };
        (0..half).map(|i| frequency(i) as f32).collect()
    }

    /// Factor of cos and sin; 1 except for YaRN and LongRoPE.
    #[must_use]
    pub fn attention_factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn {
                attention_factor, ..
            }
            | RopeScaling::LongRope {
                attention_factor, ..
            } => attention_factor,
            _ => 1.0,
        }
    }

    /// Which of its sets of frequencies a document of `length` tokens has, of [`RopeConfig::variants`].
    #[must_use]
    pub fn variant(&self, length: u32) -> usize {
        match self.scaling {
            RopeScaling::LongRope {
                original_max_position,
                ..
            } => usize::from(f64::from(length) > original_max_position),
            _ => 0,
        }
    }

    /// A length of each set of frequencies that are fixed but for the choice between them.
    #[must_use]
    pub fn variants(&self) -> Vec<u32> {
        match self.scaling {
            RopeScaling::LongRope { .. } => vec![0, u32::MAX],
            _ => vec![0],
        }
    }

    /// Whether the frequencies are other ones for every length of a document.
    #[must_use]
    pub fn depends_on_length(&self) -> bool {
        matches!(self.scaling, RopeScaling::Dynamic { .. })
    }

    /// 0 where a dimension is kept, 1 where it is divided (YaRN, equation 23).
    fn yarn_ramp(&self, i: usize) -> f64 {
        let RopeScaling::Yarn {
            beta_fast,
            beta_slow,
            original_max_position,
            truncate,
            ..
        } = self.scaling
        else {
            return 0.0;
        };
        let dim = self.rotary_dim as f64;
        let dimension_of = |rotations: f64| {
            dim * (original_max_position / (rotations * TAU)).ln() / (2.0 * self.theta.ln())
        };
        let (low, high) = (dimension_of(beta_fast), dimension_of(beta_slow));
        let (low, high) = if truncate {
            (low.floor(), high.ceil())
        } else {
            (low, high)
        };
        let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001; // as Transformers: no division by zero
        }
        ((i as f64 - low) / (high - low)).clamp(0.0, 1.0)
    }
}

/// The parameters of the rope, and the key they stand under.
fn parameters(config: &HfConfig) -> Result<(String, Map<String, Value>)> {
    // Where there are both, Transformers takes the older one.
    for key in ["rope_scaling", "rope_parameters"] {
        if let Some(map) = group_of(config, key)? {
            return Ok((key.into(), map.clone()));
        }
    }
    Ok(("rope_parameters".into(), Map::new()))
}

/// The object under `key`, unless absent or null.
fn group_of<'a>(config: &'a HfConfig, key: &str) -> Result<Option<&'a Map<String, Value>>> {
    match config.get(key) {
        None => Ok(None),
        Some(Value::Object(map)) => Ok(Some(map)),
        Some(other) => Err(config.error(key, format!("is {other}; expected an object or null"))),
    }
}

struct Parameters<'a> {
    config: &'a HfConfig,
    group: String,
    map: Map<String, Value>,
}

impl Parameters<'_> {
    fn error(&self, key: &str, message: impl AsRef<str>) -> Error {
        self.config.error(&format!("{}.{key}", self.group), message)
    }

    fn number(&self, key: &str, default: Option<f64>) -> Result<f64> {
        match (self.map.get(key).filter(|v| !v.is_null()), default) {
            (None, Some(default)) => Ok(default),
            (None, None) => Err(self.error(key, "is missing; this rope_type needs it")),
            (Some(value), _) => value
                .as_f64()
                .filter(|v| v.is_finite() && *v > 0.0)
                .ok_or_else(|| self.error(key, format!("is {value}; expected a number above 0"))),
        }
    }

    /// What `partial_rotary_factor`, in the group or beside it, leaves of a head.
    fn share_of(&self, head_dim: usize) -> Result<usize> {
        let outside = self.config.number_or(PARTIAL, 1.0)?;
        let factor = self.number(PARTIAL, Some(outside))?;
        if factor > 1.0 {
            return Err(self.error(PARTIAL, format!("is {factor}; expected at most 1")));
        }
        Ok((head_dim as f64 * factor) as usize)
    }

    fn whole_heads(&self, theta: (&str, f64), head_dim: usize) -> Result<RopeConfig> {
        let rope = self.rope(theta, head_dim)?;
        if rope.scaling == RopeScaling::Default || self.share_of(head_dim)? == head_dim {
            return Ok(rope);
        }
        let factor = self.map.get(PARTIAL).or(self.config.get(PARTIAL));
        let message = format!(
            "is {}, but this architecture rotates whole heads, and Transformers fails there; leave it out, or take \
             rope_type default, which ignores it",
            factor.unwrap_or(&Value::Null)
        );
        Err(self.error(PARTIAL, message))
    }

    /// Refuses a parameter that is another one, mistyped; one that nobody knows means nothing.
    fn require_known(&self) -> Result<()> {
        let given = self.map.iter().filter(|(_, value)| !value.is_null());
        for (key, value) in given.filter(|(key, _)| !KNOWN.contains(&key.as_str())) {
            if let Some(meant) = suggest::misspelt(key, KNOWN) {
                let message =
                    format!("({value}) is no parameter of a rope; did you mean `{meant}`?");
                return Err(self.error(key, message));
            }
        }
        Ok(())
    }

    /// The rope of `rotary_dim` dimensions; `theta` is the key of its base outside of the group, and the
    /// default.
    fn rope(&self, theta: (&str, f64), rotary_dim: usize) -> Result<RopeConfig> {
        self.require_known()?;
        let (key, default) = theta;
        let default = self.config.number_or(key, default)?;
        let theta = self.number("rope_theta", Some(default))?;
        if theta.partial_cmp(&0.0) != Some(std::cmp::Ordering::Greater) {
            let message = format!("is {theta}; expected a number above 0, such as 10000");
            return Err(self.config.error(key, message));
        }
        if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
            return Err(self.config.error(
                "head_dim",
                format!("rotary dimensions are {rotary_dim}; expected an even number above 0"),
            ));
        }
        let max_position = self.config.size_or("max_position_embeddings", Some(2048))? as f64;
        Ok(RopeConfig {
            theta,
            rotary_dim,
            scaling: self.scaling(max_position, rotary_dim)?,
        })
    }

    fn scaling(&self, max_position: f64, rotary_dim: usize) -> Result<RopeScaling> {
        // `type` is the key's name before Transformers 4.43.
        let given = |key: &&str| self.map.get(*key).filter(|value| !value.is_null());
        let name = match ["rope_type", "type"].iter().find_map(&given) {
            Some(Value::String(name)) => name,
            Some(other) => {
                let message = format!("is {other}; expected one of {}", TYPES.join(", "));
                return Err(self.error("rope_type", message));
            }
            None if given(&"factor").is_some() => {
                let message = format!("is missing beside a factor; one of {}", TYPES.join(", "));
                return Err(self.error("rope_type", message));
            }
            None => "default",
        };
        match name {
            "default" => Ok(RopeScaling::Default),
            "linear" => Ok(RopeScaling::Linear {
                factor: self.number("factor", None)?,
            }),
            "dynamic" => Ok(RopeScaling::Dynamic {
                factor: self.number("factor", None)?,
                max_position,
            }),
            "llama3" => self.llama3(max_position),
            "yarn" => self.yarn(max_position),
            "longrope" => self.long_rope(max_position, rotary_dim / 2),
            other => Err(self.error(
                "rope_type",
                format!(
                    "`{other}` is not supported{}; supported: {}",
                    suggest::did_you_mean(other, TYPES),
                    TYPES.join(", ")
                ),
            )),
        }
    }

    /// The context of pre-training. Phi 3 has it outside of the group, where it comes first.
    fn original(&self, max_position: f64) -> Result<f64> {
        const KEY: &str = "original_max_position_embeddings";
        match self.config.positive(KEY)? {
            Some(original) => Ok(original),
            None => self.number(KEY, Some(max_position)),
        }
    }

    fn llama3(&self, max_position: f64) -> Result<RopeScaling> {
        let [low, high] = ["low_freq_factor", "high_freq_factor"];
        let (low_freq_factor, high_freq_factor) =
            (self.number(low, None)?, self.number(high, None)?);
        if low_freq_factor >= high_freq_factor {
            return Err(self.error(
                low,
                format!(
                    "is {low_freq_factor}; expected less than {high} {high_freq_factor}, such as 1 and 4"
                ),
            ));
        }
        Ok(RopeScaling::Llama3 {
            factor: self.number("factor", None)?,
            low_freq_factor,
            high_freq_factor,
            original_max_position: self.original(max_position)?,
        })
    }

    fn long_rope(&self, max_position: f64, pairs: usize) -> Result<RopeScaling> {
        let original = self.original(max_position)?;
        let factor = self.number("factor", Some(max_position / original))?;
        let attention_factor = if factor <= 1.0 {
            1.0
        } else {
            (1.0 + factor.ln() / original.ln()).sqrt()
        };
        Ok(RopeScaling::LongRope {
            short_factor: self.numbers("short_factor", pairs)?,
            long_factor: self.numbers("long_factor", pairs)?,
            original_max_position: original,
            attention_factor: self.number("attention_factor", Some(attention_factor))?,
        })
    }

    /// A number above 0. A zero is none, as Transformers takes it.
    fn bound(&self, key: &str, default: f64) -> Result<f64> {
        match self.map.get(key).and_then(Value::as_f64) {
            Some(0.0) => Ok(default),
            _ => self.number(key, Some(default)),
        }
    }

    /// A list of `count` numbers above 0.
    fn numbers(&self, key: &str, count: usize) -> Result<Vec<f64>> {
        let expected =
            format!("expected {count} numbers above 0, one per pair of rotated dimensions");
        let Some(value) = self.map.get(key) else {
            return Err(self.error(key, format!("is missing; {expected}")));
        };
        let number = |v: &Value| v.as_f64().filter(|v| v.is_finite() && *v > 0.0);
        let list = value.as_array();
        let numbers: Option<Vec<f64>> = list.and_then(|list| list.iter().map(number).collect());
        match numbers {
            Some(numbers) if numbers.len() == count => Ok(numbers),
            Some(numbers) => Err(self.error(key, format!("has {}; {expected}", numbers.len()))),
            None => Err(self.error(key, format!("is {value}; {expected}"))),
        }
    }

    fn yarn(&self, max_position: f64) -> Result<RopeScaling> {
        let original = self.original(max_position)?;
        // A context of pre-training says the factor as well.
        let factor = (original < max_position).then_some(max_position / original);
        let factor = self.number("factor", factor)?;
        // Equation 22, with DeepSeek's pair of multipliers where a checkpoint has them.
        let mscale = |m: f64| {
            if factor <= 1.0 {
                1.0
            } else {
                0.1 * m * factor.ln() + 1.0
            }
        };
        let multiplier = |key: &str| match self.map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) => Ok(Some(number).filter(|m| *m != 0.0)),
                None => Err(self.error(key, format!("is {value}; expected a number"))),
            },
        };
        let attention_factor = match (multiplier("mscale")?, multiplier("mscale_all_dim")?) {
            (Some(a), Some(b)) => mscale(a) / mscale(b),
            _ => mscale(1.0),
        };
        Ok(RopeScaling::Yarn {
            factor,
            beta_fast: self.bound("beta_fast", 32.0)?,
            beta_slow: self.bound("beta_slow", 1.0)?,
            original_max_position: original,
            attention_factor: self.number("attention_factor", Some(attention_factor))?,
            truncate: self
                .map
                .get("truncate")
                .and_then(Value::as_bool)
                .unwrap_or(true),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::path::Path;

    #[test]
    fn whole_heads_rotate_whatever_partial_rotary_factor_says() {
        for config in [
            json!({"partial_rotary_factor": 0.5}),
            json!({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
        ] {
            let config = HfConfig::from_value(Path::new("config.json"), config).expect("an object");
            let rope = RopeConfig::from_hf(&config, 64).expect("a default rope");
            assert_eq!(rope.rotary_dim, 64);
            assert_eq!(rope.inverse_frequencies(8).len(), 32);
        }
    }

    fn refusal(config: Value) -> String {
        let config = HfConfig::from_value(Path::new("config.json"), config).expect("an object");
        let rope = RopeConfig::from_hf(&config, 64);
        rope.expect_err("refused").to_string()
    }

    /// Transformers fails on each of these in the forward pass of a Llama.
    #[test]
    fn a_part_of_a_head_is_refused_beside_a_scaled_rope() {
        let scaled = |kind: &str| {
            json!({"rope_type": kind, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "short_factor": vec![1.0; 32], "long_factor": vec![2.0; 32]})
        };
        for kind in ["linear", "dynamic", "llama3", "yarn", "longrope"] {
            let mut inside = scaled(kind);
            inside["partial_rotary_factor"] = json!(0.5);
            let beside = json!({"rope_scaling": scaled(kind), "partial_rotary_factor": 0.5});
            for config in [json!({"rope_parameters": inside}), beside] {
                let error = refusal(config);
                assert!(
                    error.contains("partial_rotary_factor`: is 0.5, but"),
                    "{error}"
                );
            }
            let mut whole = scaled(kind);
            whole["partial_rotary_factor"] = json!(1.0);
            let config = json!({"rope_parameters": whole});
            let config = HfConfig::from_value(Path::new("config.json"), config).expect("an object");
            RopeConfig::from_hf(&config, 64).expect("whole heads");
        }
    }

    #[test]
    fn a_mistyped_parameter_is_refused_and_an_unknown_one_ignored() {
        let rope =
            |key: &str| json!({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, key: 3.0}});
        let error = refusal(rope("beta_fats"));
        let parts = [
            "`rope_parameters.beta_fats`",
            "3.0",
            "did you mean `beta_fast`?",
        ];
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        let config = HfConfig::from_value(Path::new("config.json"), rope("attn_factor"));
        RopeConfig::from_hf(&config.expect("an object"), 64).expect("as Transformers reads it");
    }
}
