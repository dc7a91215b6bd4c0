//! The update of one module, of those of several adapters.

use super::dense::{self, Pruned};
use super::{Arithmetic, CombineOptions, Pair, factored};
use crate::inspect::read::Factors;
use ferrotune_core::{Error, Result, suggest};
use ferrotune_kernels::decompose::Matrix;
use ferrotune_kernels::rng::{Stream, key_for};

/// What is done with updates before they are added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Combination {
    /// Nothing: their factors stand side by side. The rank is the sum of theirs.
    Cat,
    /// Nothing; of the sum, directions that are zero are left out.
    Linear,
    /// Nothing; the rank is the largest of theirs, or what was asked for.
    Svd,
    /// Small elements are left out.
    MagnitudePrune,
    /// Small elements are left out, and those whose sign is not the majority's; means, not sums.
    Ties,
    /// Elements are left out at random, and the others grow by as much.
    DareLinear,
    /// That, and TIES' election of signs.
    DareTies,
}

/// How TIES elects the sign of an element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MajoritySign {
    /// By the sum of the values.
    Total,
    /// By the number of signs.
    Frequency,
}

impl Combination {
    const NAMES: [(&'static str, Self); 7] = [
        ("cat", Self::Cat),
        ("linear", Self::Linear),
        ("svd", Self::Svd),
        ("magnitude_prune", Self::MagnitudePrune),
        ("ties", Self::Ties),
        ("dare_linear", Self::DareLinear),
        ("dare_ties", Self::DareTies),
    ];

    /// By PEFT's name. What PEFT calls `ties_svd` and so on is `ties` of updates.
    ///
    /// # Errors
    /// What is wrong, with all names.
    pub fn from_name(name: &str) -> Result<Self, String> {
        let bare = name.strip_suffix("_svd").unwrap_or(name);
        let found = Self::NAMES.iter().find(|(known, _)| *known == bare);
        found.map(|(_, combination)| *combination).ok_or_else(|| {
            let names = || Self::NAMES.iter().map(|(name, _)| *name);
            let near = suggest::did_you_mean(name, names());
            let all: Vec<&str> = names().collect();
            format!(
                "\"{name}\" is no combination{near}; there are {}",
                all.join(", ")
            )
        })
    }

    /// Whether PEFT adds A and B apart.
    pub(super) fn is_of_factors_in_peft(self) -> bool {
        !matches!(self, Self::Cat | Self::Svd)
    }

    pub(super) fn prunes(self) -> bool {
        self.is_of_factors_in_peft() && self != Self::Linear
    }
}

/// The combination of the updates of one module, each with its weight.
pub(super) fn of_module(
    name: &str,
    updates: &[(&Factors, f64)],
    options: &CombineOptions,
) -> Result<Pair> {
    let combination = options.combination;
    let apart = options.arithmetic == Arithmetic::AsPeft && combination.is_of_factors_in_peft();
    let mut stream = Stream::new(key_for(options.seed, name));
    if apart {
        return factors_apart(name, updates, options, &mut stream);
    }
    let largest = updates.iter().map(|(f, _)| f.rank).max().unwrap_or(1);
    if !combination.prunes() {
        return match (combination, options.rank) {
            (Combination::Cat, None) => Ok(factored::side_by_side(updates)),
            (Combination::Svd, rank) => factored::sum(updates, Some(rank.unwrap_or(largest))),
            (_, rank) => factored::sum(updates, rank),
        };
    }
    let [out, inputs] = updates.first().map_or([0, 0], |(f, _)| f.shape);
    let tensors = updates.iter().map(|(f, _)| factored::update(f));
    let tensors: Vec<Vec<f32>> = tensors.collect::<Result<_>>()?;
    let weights: Vec<f64> = updates.iter().map(|(_, weight)| *weight).collect();
    let sum = pruned(options, &mut stream).sum(tensors, &weights);
    let sum = sum.into_iter().map(f64::from).collect();
    factored::of_dense(
        &Matrix::new(out, inputs, sum)?,
        options.rank.unwrap_or(largest),
        stream,
    )
}

/// What PEFT does: A of one adapter is added to A of the next, B to B, each with the root of its weight.
fn factors_apart(
    name: &str,
    updates: &[(&Factors, f64)],
    options: &CombineOptions,
    stream: &mut Stream,
) -> Result<Pair> {
    let rank = updates.first().map_or(0, |(f, _)| f.rank);
    if let Some((other, _)) = updates.iter().find(|(f, _)| f.rank != rank) {
        let message = format!(
            "adds A to A and B to B, as PEFT does, and `{name}` has rank {rank} in one adapter and {} in \
             another; add updates instead",
            other.rank
        );
        return Err(Error::config("combination_type", message));
    }
    let scaled = |(f, weight): &(&Factors, f64)| weight * f64::from(f.scale);
    let of_a = |w: f64| w.abs().sqrt() * if w >= 0.0 { 1.0 } else { -1.0 };
    let weights: Vec<f64> = updates.iter().map(scaled).collect();
    let for_a: Vec<f64> = weights.iter().copied().map(of_a).collect();
    let for_b: Vec<f64> = weights.iter().map(|w| w.abs().sqrt()).collect();
    let a = updates.iter().map(|(f, _)| f.a.clone()).collect();
    let b = updates.iter().map(|(f, _)| f.b.clone()).collect();
    Ok(Pair {
        a: pruned(options, stream).sum(a, &for_a),
        b: pruned(options, stream).sum(b, &for_b),
        rank,
        relative_error: 0.0,
    })
}

fn pruned<'a>(options: &CombineOptions, stream: &'a mut Stream) -> Pruned<'a> {
    let combination = options.combination;
    let random = matches!(combination, Combination::DareLinear | Combination::DareTies);
    let by = match combination {
        Combination::Cat | Combination::Linear | Combination::Svd => dense::Prune::Nothing,
        _ if random => dense::Prune::Random(stream),
        _ => dense::Prune::Small,
    };
    let elects = matches!(combination, Combination::Ties | Combination::DareTies);
    Pruned {
        by,
        density: options.density,
        elect: elects.then_some(options.majority_sign),
    }
}
