//! The filter by layer number.

use super::{Expression, Selection, TargetModules};
use ferrotune_core::adapter::Site;
use ferrotune_core::{Error, Result};
use std::collections::BTreeSet;

/// `layers_to_transform` with `layers_pattern`.
pub(super) struct Layers<'a> {
    pub(super) wanted: &'a [usize],
    expressions: Vec<Expression>,
    /// Of `layers_pattern`, one for each expression, or none.
    sources: &'a [String],
}

/// The segments of paths before numbers.
fn before_numbers(sites: &[Site]) -> String {
    let mut found = BTreeSet::new();
    for site in sites {
        let segments: Vec<&str> = site.name.split('.').collect();
        for pair in segments.windows(2) {
            if pair[1].parse::<usize>().is_ok() {
                found.insert(format!("`{}`", pair[0]));
            }
        }
    }
    match found.len() {
        0 => "nothing".into(),
        _ => found.into_iter().collect::<Vec<_>>().join(", "),
    }
}

impl<'a> Layers<'a> {
    /// `None` if every layer is meant.
    pub(super) fn compile(selection: &Selection<'a>) -> Result<Option<Self>> {
        let Some(wanted) = selection.layers_to_transform.filter(|w| !w.is_empty()) else {
            if selection.layers_pattern.is_empty() {
                return Ok(None);
            }
            return Err(Error::config(
                "layers_pattern",
                "is only used with `layers_to_transform`, which is not set",
            ));
        };
        if !matches!(selection.target_modules, TargetModules::List(_)) {
            return Err(Error::config(
                "layers_to_transform",
                "needs `target_modules` as a list of names; a regular expression can name the \
                 layers itself, and `all-linear` takes every layer",
            ));
        }
        let key = "layers_pattern";
        let expressions = if selection.layers_pattern.is_empty() {
            vec![Expression::layer_after(key, "[^.]*")?]
        } else {
            selection
                .layers_pattern
                .iter()
                .map(|source| Expression::layer_after(key, source))
                .collect::<Result<_>>()?
        };
        Ok(Some(Self {
            wanted,
            expressions,
            sources: selection.layers_pattern,
        }))
    }

    /// The number of the layer that a module lies in.
    pub(super) fn index(&self, name: &str) -> Result<Option<usize>> {
        for expression in &self.expressions {
            if let Some(layer) = expression.layer(name)? {
                return Ok(Some(layer));
            }
        }
        Ok(None)
    }

    /// Refuses patterns of which none stands before the layer of a `targeted` module, and a wanted layer that holds
    /// none of them. Among several, some may be for other architectures.
    pub(super) fn require_all_used(&self, targeted: &[&str], sites: &[Site]) -> Result<()> {
        let mut existing = BTreeSet::new();
        for name in targeted {
            existing.extend(self.index(name)?);
        }
        if let (Some(source), true) = (self.sources.first(), existing.is_empty()) {
            return Err(Error::config(
                "layers_pattern",
                format!(
                    "`{source}` stands before the number of no layer; here {} does",
                    before_numbers(sites)
                ),
            ));
        }
        match self.wanted.iter().find(|layer| !existing.contains(layer)) {
            None => Ok(()),
            Some(layer) => Err(Error::config(
                "layers_to_transform",
                format!(
                    "no targeted module lies in layer {layer}; {}",
                    match (existing.first(), existing.last()) {
                        (Some(first), Some(last)) =>
                            format!("targeted modules lie in layers {first} to {last}"),
                        _ => "no targeted module has a layer number in its path".into(),
                    }
                ),
            )),
        }
    }
}
