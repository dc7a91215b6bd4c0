//! Blocks of inputs, each with a rotation of its own.

use super::matrix::{copy_of, empty};
use crate::method::Keys;
use ferrotune_core::adapter::Site;
use ferrotune_core::{Error, Result};
use ferrotune_kernels::rotation::{self, Map, Source};
use ferrotune_kernels::{Tensor, View, ViewMut, hadamard};
use std::sync::Arc;

/// Size and number of the blocks that inputs are rotated in: one of them is given, with its key, the
/// other is 0.
///
/// # Errors
/// [`Error::Config`] if it does not divide the inputs of `site`.
pub(super) fn blocks(
    site: &Site,
    size: (&'static str, usize),
    number: (&'static str, usize),
) -> Result<[usize; 2]> {
    let inputs = site.in_features;
    let (key, given) = if size.1 > 0 { size } else { number };
    if given > inputs || !inputs.is_multiple_of(given) {
        let message = format!(
            "is {given}, but `{}` has {inputs} inputs, which it must divide",
            site.name
        );
        return Err(Error::config(key, message));
    }
    let other = inputs / given;
    Ok(if size.1 > 0 {
        [given, other]
    } else {
        [other, given]
    })
}

/// Refuses block keys of which not exactly one is above 0; the size of a block is `default` where it is left out.
///
/// # Errors
/// What [`Keys::error`] makes of it, naming both.
pub(super) fn require_one(
    keys: &Keys<'_>,
    size: (&'static str, usize),
    number: (&'static str, usize),
    default: usize,
) -> Result<()> {
    let ((key, given), (other, blocks)) = (size, number);
    let message = match (given, blocks) {
        (0, 0) => format!(
            "is 0 and `{other}` is 0, so there are no blocks: set `{key}` to the size of a block, {default} by default, \
             or `{other}` to their number"
        ),
        (1.., 1..) => format!(
            "is {given} and `{other}` is {blocks}, and one follows from the other; add `{key}: 0` for {blocks} blocks \
             (left out, it is {default}), or `{other}: 0` for blocks of {given}"
        ),
        _ => return Ok(()),
    };
    Err(keys.error(key, message))
}

/// Refuses blocks of one input where a run asks for them: they rotate nothing.
///
/// # Errors
/// [`Error::Config`] under `key`, which is `given`.
pub(super) fn require_more_than_one(
    site: &Site,
    size: usize,
    (key, given): (&'static str, usize),
) -> Result<()> {
    if size != 1 {
        return Ok(());
    }
    let (name, inputs) = (&site.name, site.in_features);
    let message = format!(
        "is {given}, which makes blocks of one of the {inputs} inputs of `{name}`, and they rotate nothing"
    );
    Err(Error::config(key, message))
}

/// How a rotation is made of a skew-symmetric matrix S.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Rotation {
    /// `(I - S) (I + S)^-1`.
    Cayley,
    /// I and the powers of S, with these factors.
    Series(Vec<f64>),
}

impl Rotation {
    /// PEFT's truncated series of Cayley's transform in -S with so many terms: 2 for each power, 1 for the last.
    pub(super) fn neumann(terms: usize) -> Self {
        Self::Series(match terms {
            0 | 1 => Vec::new(),
            2 => vec![2.0],
            _ => {
                let full = 2 + (terms - 1).saturating_sub(3);
                let mut factors = vec![2.0; full];
                factors.push(1.0);
                factors
            }
        })
    }

    fn map(&self) -> Map<'_> {
        match self {
            Self::Cayley => Map::Cayley,
            Self::Series(factors) => Map::Series(factors),
        }
    }
}

/// The rotations of one linear.
#[derive(Clone, Debug)]
pub(super) struct Blocks {
    pub(super) size: usize,
    pub(super) count: usize,
    pub(super) source: Source,
    pub(super) rotation: Rotation,
    /// A factor for each `[count, 1]`, 0 for those that do not rotate; where there are such.
    pub(super) kept: Option<Arc<Tensor>>,
}

impl Blocks {
    /// Shape of the parameters.
    pub(super) fn parameters(&self) -> [usize; 2] {
        [self.count, self.source.parameters(self.size)]
    }

    /// The rotations below one another, `[count * size, size]`, on the side of the parameters.
    pub(super) fn rotations(&self, parameters: View<'_>) -> Result<Tensor> {
        let n = self.size;
        let mut rotations = empty(parameters, self.count * n, n);
        // Of zeros the identity is made.
        let thinned = self.kept.as_ref().map(|kept| -> Result<Tensor> {
            let mut thinned = copy_of(parameters);
            hadamard::scale(thinned.view_mut(), 0.0, kept.view())?;
            Ok(thinned)
        });
        let thinned = thinned.transpose()?;
        let parameters = thinned.as_ref().map_or(parameters, Tensor::view);
        let to = rotations.view_mut();
        rotation::forward(to, parameters, self.source, self.rotation.map())?;
        Ok(rotations)
    }

    /// Adds to `d_parameters` their gradient, from that of the rotations.
    pub(super) fn add_gradient(
        &self,
        d_parameters: ViewMut<'_>,
        mut d: Tensor,
        parameters: View<'_>,
    ) -> Result<()> {
        if let Some(kept) = &self.kept {
            let blocks = d.view_mut().reshaped(self.count, self.size * self.size);
            hadamard::scale(blocks, 0.0, kept.view())?;
        }
        let map = self.rotation.map();
        Ok(rotation::add_gradient(
            d_parameters,
            d.view(),
            parameters,
            self.source,
            map,
        )?)
    }
}
