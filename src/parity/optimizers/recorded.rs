//! Which optimizer a recording is of: told by the defaults that its class has.

use super::super::case::Case;
use super::plain;
use ferrotune_core::optimizer::{
    AdEmaMix, Adadelta, Adafactor, Adagrad, Adam, Adamax, AdjustLr, EightBit, Elementwise,
    LearningRate, Lion, Lookup, Muon, NAdam, OptimizerChoice, RAdam, RmsProp, Rule, Sgd,
    TorchAdafactor,
};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::adamw::AdamW;
use serde_json::Value;

/// An optimizer of the case with the constants of its recording.
pub(super) struct Recorded {
    pub(super) name: String,
    pub(super) optimizer: OptimizerChoice,
    pub(super) lr: f64,
    pub(super) weight_decay: f64,
    /// Goes up the gradient.
    pub(super) maximize: bool,
    /// Whether it has products in bf16.
    pub(super) in_bf16: bool,
}

/// The optimizers in the list `key` of case.json.
pub(super) fn list(case: &Case, key: &str) -> Result<Vec<Recorded>> {
    let entries = case.json.get(key).and_then(Value::as_array);
    entries
        .into_iter()
        .flatten()
        .map(|entry| {
            let name = entry
                .get("name")
                .and_then(Value::as_str)
                .unwrap_or_default();
            let defaults = Defaults { entry, name };
            let unknown = || {
                let message = format!("the optimizer `{name}` is none known here by its defaults");
                Error::data(case.path("case.json"), None, message)
            };
            Ok(Recorded {
                name: name.to_owned(),
                optimizer: defaults.optimizer().ok_or_else(unknown)?,
                lr: defaults.number("lr").unwrap_or(0.0),
                weight_decay: defaults.number("weight_decay").unwrap_or(0.0),
                maximize: defaults.flag("maximize"),
                in_bf16: defaults.has("ns_coefficients"),
            })
        })
        .collect()
}

/// What the constructor was given, and what it took where it was given nothing.
struct Defaults<'a> {
    entry: &'a Value,
    name: &'a str,
}

impl Defaults<'_> {
    fn get(&self, key: &str) -> Option<Value> {
        self.entry.get("defaults")?.get(key).map(plain)
    }

    fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    fn number(&self, key: &str) -> Option<f64> {
        self.get(key)?.as_f64()
    }

    fn flag(&self, key: &str) -> bool {
        self.get(key)
            .and_then(|value| value.as_bool())
            .unwrap_or(false)
    }

    fn numbers(&self, key: &str) -> Vec<Option<f64>> {
        let list = self.get(key).and_then(|value| value.as_array().cloned());
        list.into_iter()
            .flatten()
            .map(|value| value.as_f64())
            .collect()
    }

    fn beta(&self, at: usize) -> Option<f64> {
        self.numbers("betas").get(at).copied().flatten()
    }

    fn adam(&self) -> Option<AdamW> {
        Some(AdamW {
            beta1: self.beta(0)?,
            beta2: self.beta(1)?,
            eps: self.number("eps")?,
        })
    }

    fn optimizer(&self) -> Option<OptimizerChoice> {
        self.of_one_moment()
            .or_else(|| self.of_torch())
            .or_else(|| self.factored())
            .or_else(|| self.of_bitsandbytes())
    }

    fn of_one_moment(&self) -> Option<OptimizerChoice> {
        let number = |key| self.number(key);
        if self.has("dampening") {
            return Some(plainly(Sgd {
                momentum: number("momentum")?,
                dampening: number("dampening")?,
                nesterov: self.flag("nesterov"),
            }));
        }
        if self.has("centered") {
            return Some(plainly(RmsProp {
                alpha: number("alpha")?,
                eps: number("eps")?,
                momentum: number("momentum")?,
                centered: self.flag("centered"),
            }));
        }
        if self.has("lr_decay") {
            return Some(plainly(Adagrad {
                lr_decay: number("lr_decay")?,
                eps: number("eps")?,
                initial_accumulator_value: number("initial_accumulator_value")?,
            }));
        }
        let rho = number("rho")?;
        let eps = number("eps")?;
        Some(plainly(Adadelta { rho, eps }))
    }

    fn of_torch(&self) -> Option<OptimizerChoice> {
        let decoupled = self.flag("decoupled_weight_decay");
        if self.has("amsgrad") {
            let (constants, amsgrad) = (self.adam()?, self.flag("amsgrad"));
            return Some(match (decoupled, amsgrad) {
                (true, false) => OptimizerChoice::AdamW(constants),
                _ => plainly(Adam {
                    constants,
                    amsgrad,
                    decoupled,
                }),
            });
        }
        if let Some(decay) = self.number("momentum_decay") {
            return Some(plainly(NAdam::new(self.adam()?, decay, decoupled)));
        }
        if self.has("decoupled_weight_decay") {
            let constants = self.adam()?;
            return Some(plainly(RAdam {
                constants,
                decoupled,
            }));
        }
        // bitsandbytes has no such argument.
        self.has("differentiable").then_some(())?;
        Some(plainly(Adamax(self.adam()?)))
    }

    fn factored(&self) -> Option<OptimizerChoice> {
        let eps = self.numbers("eps");
        if self.has("clip_threshold") {
            let [Some(eps1), Some(eps2)] = eps[..] else {
                return None;
            };
            return Some(OptimizerChoice::per_tensor(Adafactor {
                eps: [eps1, eps2],
                clip_threshold: self.number("clip_threshold")?,
                decay_rate: self.number("decay_rate")?,
                beta1: self.number("beta1"),
                scale_parameter: self.flag("scale_parameter"),
                learning_rate: match (self.flag("relative_step"), self.flag("warmup_init")) {
                    (false, _) => LearningRate::Given,
                    (true, false) => LearningRate::Relative,
                    (true, true) => LearningRate::RelativeWithWarmup,
                },
            }));
        }
        if self.has("beta2_decay") {
            return Some(OptimizerChoice::per_tensor(TorchAdafactor {
                beta2_decay: self.number("beta2_decay")?,
                eps1: eps.first()?.unwrap_or(TorchAdafactor::default().eps1),
                eps2: (*eps.get(1)?)?,
                d: self.number("d")?,
            }));
        }
        let coefficients: Option<Vec<f64>> = self.numbers("ns_coefficients").into_iter().collect();
        let word = self.get("adjust_lr_fn").unwrap_or_default();
        let named = AdjustLr::NAMES.into_iter().find(|(name, _)| word == *name);
        Some(OptimizerChoice::per_tensor(Muon {
            momentum: self.number("momentum")?,
            nesterov: self.flag("nesterov"),
            ns_coefficients: coefficients?.try_into().ok()?,
            ns_steps: self.number("ns_steps")? as u64,
            eps: self.number("eps")?,
            adjust_lr: named.map_or(AdjustLr::Original, |(_, adjust)| adjust),
            others: None,
        }))
    }

    /// Those of one moment have the same defaults: there the name tells.
    fn of_bitsandbytes(&self) -> Option<OptimizerChoice> {
        let constants = self.adam()?;
        if self.has("t_alpha") {
            return Some(match self.beta(2) {
                Some(beta3) => self.in_bits(AdEmaMix {
                    constants,
                    beta3,
                    alpha: self.number("alpha")?,
                    t_alpha: self.number("t_alpha").map(|steps| steps as u64),
                    t_beta3: self.number("t_beta3").map(|steps| steps as u64),
                }),
                None => self.in_bits(Adam {
                    constants,
                    amsgrad: false,
                    decoupled: true,
                }),
            });
        }
        let is = |part: &str| self.name.to_lowercase().contains(part);
        if is("lion") {
            return Some(self.in_bits(Lion {
                beta1: constants.beta1,
                beta2: constants.beta2,
            }));
        }
        if is("rmsprop") {
            return Some(self.in_bits(RmsProp {
                alpha: constants.beta1,
                eps: constants.eps,
                ..RmsProp::default()
            }));
        }
        if is("sgd") {
            return Some(self.in_bits(Sgd {
                momentum: constants.beta1,
                ..Sgd::default()
            }));
        }
        is("adagrad").then(|| {
            self.in_bits(Adagrad {
                eps: constants.eps,
                ..Adagrad::default()
            })
        })
    }

    /// In bytes if the state that was recorded is.
    fn in_bits(&self, rule: impl Rule + 'static) -> OptimizerChoice {
        match self
            .entry
            .pointer("/state/state1/0")
            .and_then(Value::as_str)
        {
            Some("torch.uint8") => OptimizerChoice::per_tensor(EightBit::new(rule, Lookup::Steps)),
            _ => plainly(rule),
        }
    }
}

/// With moments in f32.
fn plainly(rule: impl Rule + 'static) -> OptimizerChoice {
    OptimizerChoice::per_tensor(Elementwise(rule))
}
