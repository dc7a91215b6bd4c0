//! The optimizers by the names of `optim`.

use super::{
    EightBit, Elementwise, Lookup, OptimizerChoice, Rule, adadelta, adafactor, adagrad, adam,
    adamax, ademamix, lion, muon, nadam, radam, rmsprop, sgd, torch_adafactor,
};
use crate::Result;
use crate::kwargs::Kwargs;
use crate::suggest::did_you_mean;
use ferrotune_kernels::adamw::AdamW;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;

pub(super) type Built = Result<OptimizerChoice>;

/// What keys of the configuration say to every optimizer that has such constants.
#[derive(Clone, Copy, Debug)]
pub struct Shared {
    /// `adam_beta1`, `adam_beta2`, `adam_epsilon`.
    pub adam: AdamW,
}

/// An optimizer that `optim` can name.
pub struct OptimizerEntry {
    /// Its name.
    pub name: &'static str,
    /// The keys of the configuration beside `optim_args` that it reads.
    pub reads: &'static [&'static str],
    build: fn(&Shared, &mut Kwargs<'_>) -> Built,
}

impl fmt::Debug for OptimizerEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl PartialEq for OptimizerEntry {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl OptimizerEntry {
    /// The optimizer with these `optim_args`.
    ///
    /// # Errors
    /// [`crate::Error::Config`] for an argument it does not have, or at a value it cannot have.
    pub fn build(&self, shared: &Shared, args: &BTreeMap<String, Value>) -> Built {
        let mut kwargs = Kwargs::new("optim_args", ["optim", self.name], args);
        for (key, instead) in KEYS_OF_THEIR_OWN {
            if args.contains_key(key) {
                let message = format!("is no argument of an optimizer here; use the key {instead}");
                return Err(kwargs.error(key, &message));
            }
        }
        let built = (self.build)(shared, &mut kwargs)?;
        kwargs.finish()?;
        Ok(built)
    }
}

/// Arguments that Transformers' groups of parameters override.
const KEYS_OF_THEIR_OWN: [(&str, &str); 2] =
    [("weight_decay", "weight_decay"), ("lr", "learning_rate")];

/// Keys with the constants of Adam and its kin.
pub const ADAM_KEYS: [&str; 3] = ["adam_beta1", "adam_beta2", "adam_epsilon"];
const ADAM: &[&str] = &ADAM_KEYS;
const BETAS: &[&str] = &["adam_beta1", "adam_beta2"];
const NONE: &[&str] = &[];

const fn entry(
    name: &'static str,
    reads: &'static [&'static str],
    build: fn(&Shared, &mut Kwargs<'_>) -> Built,
) -> OptimizerEntry {
    OptimizerEntry { name, reads, build }
}

/// Every optimizer. State in bytes or paged memory has names of its own; paged state is not paged here.
pub static OPTIMIZERS: &[OptimizerEntry] = &[
    entry("adamw_torch", ADAM, adam::adamw),
    entry("adamw_torch_fused", ADAM, adam::adamw),
    entry("paged_adamw_32bit", ADAM, kernel),
    entry("adamw_bnb_8bit", ADAM, adamw_8bit),
    entry("adamw_8bit", ADAM, adamw_8bit),
    entry("paged_adamw_8bit", ADAM, adamw_8bit),
    entry("adafactor", NONE, adafactor::build),
    entry("sgd", NONE, sgd::build),
    entry("adagrad", NONE, adagrad::build),
    entry("rmsprop", NONE, rmsprop::build),
    entry("rmsprop_bnb", NONE, rmsprop_32bit),
    entry("rmsprop_bnb_32bit", NONE, rmsprop_32bit),
    entry("rmsprop_bnb_8bit", NONE, |_, args| {
        eight_bit(rmsprop::of_bitsandbytes(args)?)
    }),
    entry("lion_32bit", BETAS, lion_32bit),
    entry("paged_lion_32bit", BETAS, lion_32bit),
    entry("lion_8bit", BETAS, lion_8bit),
    entry("paged_lion_8bit", BETAS, lion_8bit),
    entry("ademamix", ADAM, ademamix_32bit),
    entry("paged_ademamix_32bit", ADAM, ademamix_32bit),
    entry("ademamix_8bit", ADAM, ademamix_8bit),
    entry("paged_ademamix_8bit", ADAM, ademamix_8bit),
    // Not Transformers' names.
    entry("adam", ADAM, adam::adam),
    entry("nadam", ADAM, nadam::build),
    entry("radam", ADAM, radam::build),
    entry("adamax", ADAM, adamax::build),
    entry("adadelta", NONE, adadelta::build),
    entry("adafactor_torch", NONE, torch_adafactor::build),
    entry("muon", ADAM, muon::build),
];

fn rmsprop_32bit(_: &Shared, args: &mut Kwargs<'_>) -> Built {
    plain(rmsprop::of_bitsandbytes(args)?)
}

fn lion_32bit(shared: &Shared, _: &mut Kwargs<'_>) -> Built {
    plain(lion::rule(shared))
}

fn lion_8bit(shared: &Shared, _: &mut Kwargs<'_>) -> Built {
    eight_bit(lion::rule(shared))
}

fn ademamix_32bit(shared: &Shared, args: &mut Kwargs<'_>) -> Built {
    plain(ademamix::rule(shared, args)?)
}

fn ademamix_8bit(shared: &Shared, args: &mut Kwargs<'_>) -> Built {
    eight_bit(ademamix::rule(shared, args)?)
}

fn plain(rule: impl Rule + 'static) -> Built {
    Ok(OptimizerChoice::per_tensor(Elementwise(rule)))
}

fn eight_bit(rule: impl Rule + 'static) -> Built {
    let lookup = Lookup::Nearest;
    Ok(OptimizerChoice::per_tensor(EightBit::new(rule, lookup)))
}

fn kernel(shared: &Shared, _: &mut Kwargs<'_>) -> Built {
    Ok(OptimizerChoice::AdamW(shared.adam))
}

fn adamw_8bit(shared: &Shared, _: &mut Kwargs<'_>) -> Built {
    eight_bit(adam::of_bitsandbytes(shared))
}

/// Transformers' names of what there is not, and the nearest that there is.
pub const NOT_HERE: &[(&str, &str)] = &[
    ("adamw_anyprecision", "adamw_torch"),
    ("adamw_torch_4bit", "adamw_8bit"),
    ("adamw_torch_8bit", "adamw_8bit"),
    ("adamw_torch_npu_fused", "adamw_torch_fused"),
    ("adamw_torch_xla", "adamw_torch"),
    ("adalomo", "adafactor"),
    ("lomo", "sgd"),
    ("apollo_adamw", "adamw_8bit or adafactor"),
    ("apollo_adamw_layerwise", "adamw_8bit or adafactor"),
    ("galore_adafactor", "adafactor"),
    ("galore_adafactor_layerwise", "adafactor"),
    ("galore_adamw", "adamw_8bit or adafactor"),
    ("galore_adamw_8bit", "adamw_8bit"),
    ("galore_adamw_8bit_layerwise", "adamw_8bit"),
    ("galore_adamw_layerwise", "adamw_8bit or adafactor"),
    ("grokadamw", "adamw_torch or ademamix"),
    (
        "schedule_free_adamw",
        "adamw_torch with lr_scheduler_type: constant_with_warmup",
    ),
    (
        "schedule_free_radam",
        "radam with lr_scheduler_type: constant",
    ),
    (
        "schedule_free_sgd",
        "sgd with lr_scheduler_type: constant_with_warmup",
    ),
    (
        "stable_adamw",
        "adafactor, which clips its updates, or adamw_torch",
    ),
];

/// The optimizer called `name`.
///
/// # Errors
/// The names there are, and the nearest, as the end of a sentence.
pub(crate) fn find(name: &str) -> Result<&'static OptimizerEntry, String> {
    if let Some(found) = OPTIMIZERS.iter().find(|entry| entry.name == name) {
        return Ok(found);
    }
    if let Some((_, nearest)) = NOT_HERE.iter().find(|(other, _)| *other == name) {
        return Err(format!(
            "an optimizer that there is: Transformers' {name} is not supported; nearest to it is {nearest}"
        ));
    }
    let names: Vec<&str> = OPTIMIZERS.iter().map(|entry| entry.name).collect();
    let hint = did_you_mean(name, names.iter().copied());
    Err(format!("one of {}{hint}", names.join(", ")))
}
