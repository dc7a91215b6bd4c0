//! Blocks of inputs, each with a rotation of its own.

use super::matrix::{device_of, empty};
use crate::method::Keys;
use ferrotune_core::adapter::Site;
use ferrotune_core::{Error, Result};
use ferrotune_kernels::rotation::{self, Map, Source};
use ferrotune_kernels::{Tensor, View, ViewMut};
use std::ops::Range;

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
    /// Blocks that do not rotate; one for each, or none.
    pub(super) left_out: Vec<bool>,
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
        let to = rotations.view_mut();
        rotation::forward(to, parameters, self.source, self.rotation.map())?;
        for rows in self.rows_left_out() {
            let identity = (0..n * n).map(|i| if i / n == i % n { 1.0 } else { 0.0 });
            let identity = Tensor::from_f32(identity.collect(), n, n);
            let to = rotations.view_mut().row_range(rows);
            to.copy_from(identity.to_device(&device_of(parameters)).view());
        }
        Ok(rotations)
    }

    /// Adds to `d_parameters` their gradient, from that of the rotations.
    pub(super) fn add_gradient(
        &self,
        d_parameters: ViewMut<'_>,
        mut d: Tensor,
        parameters: View<'_>,
    ) -> Result<()> {
        for rows in self.rows_left_out() {
            d.view_mut().row_range(rows).fill(0.0);
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

    fn rows_left_out(&self) -> impl Iterator<Item = Range<usize>> {
        let n = self.size;
        let blocks = self.left_out.iter().enumerate();
        let left_out = blocks.filter(|(_, left_out)| **left_out);
        left_out.map(move |(block, _)| block * n..(block + 1) * n)
    }
}
