//! What an adapter's files say, and how two adapters differ, without their base.

pub(crate) mod read;
mod spectrum;
#[cfg(test)]
mod tests;

use ferrotune_core::Result;
use read::{Adapter, Factors};
use serde_json::{Map, Value};
use spectrum::{effective_rank, norm_of_product, singular_values};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// What there is to know of an adapter.
#[derive(Clone, Debug)]
pub struct AdapterFacts {
    /// `peft_type`.
    pub peft_type: String,
    /// The whole configuration.
    pub config: Map<String, Value>,
    /// Its low-rank updates, by module.
    pub updates: Vec<UpdateFacts>,
    /// Every tensor that is no factor of such an update, by name.
    pub tensors: Vec<TensorFacts>,
    /// Number of values in all tensors.
    pub values: usize,
    /// Bytes of the weights file.
    pub bytes: u64,
}

/// A low-rank update `scale * B A` of one module.
#[derive(Clone, Debug, PartialEq)]
pub struct UpdateFacts {
    /// Path of the module.
    pub module: String,
    /// Rows of A.
    pub rank: usize,
    /// Of `B A`: `[out_features, in_features]`, `[dim, vocabulary]` for an embedding.
    pub shape: [usize; 2],
    /// Factor of the product.
    pub scale: f32,
    /// Frobenius norm of the update; NaN where a value is not finite.
    pub norm: f64,
    /// Number of directions that it really uses, from 0 for no update to the rank.
    pub effective_rank: f64,
    /// The smallest and the largest of DoRA's trained row norms, where there are such: the weight's change
    /// is then another than the update, and depends on the base.
    pub magnitudes: Option<[f64; 2]>,
    /// Values of A and B that are NaN or infinite.
    pub not_finite: usize,
}

/// A tensor of an adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorFacts {
    /// Its name.
    pub name: String,
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// Its norm; NaN where a value is not finite.
    pub norm: f64,
    /// Values that are NaN or infinite.
    pub not_finite: usize,
}

/// How two adapters differ.
#[derive(Clone, Debug, Default)]
pub struct AdapterDifference {
    /// Keys of the configuration with both values, null where a key is absent.
    pub config: Vec<(String, Value, Value)>,
    /// Modules and tensors that both have, with ‖a - b‖ / max(‖a‖, ‖b‖); `None` where shapes differ.
    pub relative: Vec<(String, Option<f64>)>,
    /// What the first one alone has.
    pub only_first: Vec<String>,
    /// What the second one alone has.
    pub only_second: Vec<String>,
}

/// Reads the adapter in `directory`.
///
/// # Errors
/// [`ferrotune_core::Error::Adapter`] naming file and tensor if a file is damaged, or a factor lacks the
/// other or does not fit it; [`ferrotune_core::Error::Read`].
pub fn adapter(directory: &Path) -> Result<AdapterFacts> {
    let adapter = Adapter::read(directory)?;
    let bad = |values: &[f32]| values.iter().filter(|v| !v.is_finite()).count();
    let updates = adapter.updates.iter().map(|(module, update)| {
        let Factors {
            a, b, rank, scale, ..
        } = update;
        let values = singular_values(a, b, *rank);
        let square: f64 = values.iter().map(|v| v * v).sum();
        UpdateFacts {
            module: module.clone(),
            rank: *rank,
            shape: update.shape,
            scale: *scale,
            norm: f64::from(scale.abs()) * square.sqrt(),
            effective_rank: effective_rank(&values),
            magnitudes: adapter.magnitudes(module),
            not_finite: bad(a) + bad(b),
        }
    });
    let tensors = adapter
        .tensors
        .iter()
        .map(|(name, (shape, values))| TensorFacts {
            name: name.clone(),
            shape: shape.clone(),
            norm: norm(values.iter().map(|v| f64::from(*v))),
            not_finite: bad(values),
        });
    let of_updates = adapter.updates.values().map(|u| u.a.len() + u.b.len());
    let of_tensors = adapter.tensors.values().map(|(_, values)| values.len());
    Ok(AdapterFacts {
        updates: updates.collect(),
        tensors: tensors.collect(),
        values: of_updates.sum::<usize>() + of_tensors.sum::<usize>(),
        bytes: adapter.bytes,
        peft_type: adapter.peft_type,
        config: adapter.config,
    })
}

/// Compares the adapters in two directories.
///
/// # Errors
/// As [`adapter`], for either.
pub fn difference(first: &Path, second: &Path) -> Result<AdapterDifference> {
    let [a, b] = [Adapter::read(first)?, Adapter::read(second)?];
    let mut found = AdapterDifference::default();
    let keys: BTreeSet<&String> = a.config.keys().chain(b.config.keys()).collect();
    for key in keys {
        let [x, y] = [&a, &b].map(|of| of.config.get(key).cloned().unwrap_or_default());
        if x != y && sorted(&x) != sorted(&y) {
            found.config.push((key.clone(), x, y));
        }
    }
    let by_module = |x: &Factors, y: &Factors| (x.shape == y.shape).then(|| updates_apart(x, y));
    compare(&a.updates, &b.updates, by_module, &mut found);
    let by_name = |x: &(Vec<usize>, Vec<f32>), y: &(Vec<usize>, Vec<f32>)| {
        (x.0 == y.0).then(|| values_apart(&x.1, &y.1))
    };
    compare(&a.tensors, &b.tensors, by_name, &mut found);
    Ok(found)
}

fn compare<T>(
    first: &BTreeMap<String, T>,
    second: &BTreeMap<String, T>,
    apart: impl Fn(&T, &T) -> Option<f64>,
    found: &mut AdapterDifference,
) {
    for (name, x) in first {
        match second.get(name) {
            Some(y) => found.relative.push((name.clone(), apart(x, y))),
            None => found.only_first.push(name.clone()),
        }
    }
    let alone = second.keys().filter(|name| !first.contains_key(*name));
    found.only_second.extend(alone.cloned());
}

/// PEFT writes lists of modules in any order.
fn sorted(value: &Value) -> Value {
    let Value::Array(items) = value else {
        return value.clone();
    };
    let mut items = items.clone();
    items.sort_by_key(ToString::to_string);
    Value::Array(items)
}

/// ‖x - y‖ over the larger norm, from the factors of both side by side.
fn updates_apart(x: &Factors, y: &Factors) -> f64 {
    let a = [x.a.as_slice(), y.a.as_slice()].concat();
    let rank = x.rank + y.rank;
    let mut b = Vec::with_capacity(x.b.len() + y.b.len());
    for (of_x, of_y) in x.b.chunks(x.rank).zip(y.b.chunks(y.rank)) {
        b.extend(of_x.iter().map(|v| v * x.scale));
        b.extend(of_y.iter().map(|v| -v * y.scale));
    }
    let alone = |f: &Factors| f64::from(f.scale.abs()) * norm_of_product(&f.a, &f.b, f.rank);
    share(norm_of_product(&a, &b, rank), alone(x).max(alone(y)))
}

fn values_apart(x: &[f32], y: &[f32]) -> f64 {
    let apart = x.iter().zip(y).map(|(x, y)| f64::from(*x) - f64::from(*y));
    let alone = |values: &[f32]| norm(values.iter().map(|v| f64::from(*v)));
    share(norm(apart), alone(x).max(alone(y)))
}

fn share(part: f64, whole: f64) -> f64 {
    if part == 0.0 { 0.0 } else { part / whole }
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|v| v * v).sum::<f64>().sqrt()
}
