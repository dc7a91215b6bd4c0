//! OFT: inputs rotated in blocks, by rotations that are trained.
//!
//! `W' = W R^T`, R block-diagonal, each block a rotation made of a skew-symmetric matrix whose upper
//! triangle is a row of `oft_R.weight [blocks, b (b - 1) / 2]`. Dropout puts the identity in the place of some of
//! them, as PEFT says it does; PEFT 0.21.2 makes a module for it and never calls that.
//!
//! # Source
//! Qiu et al.: "Controlling Text-to-Image Diffusion by Orthogonal Finetuning" (2023) and "Orthogonal
//! Finetuning Made Scalable" (2025); PEFT's `tuners/oft`.

use super::cayley::{Blocks, Rotation, blocks, require_more_than_one, require_one};
use super::dropout::kept;
use super::matrix::{copy_of, empty, grad, param};
use crate::method::{Init, Keys, Method, Place, Target, TensorSpec};
use ferrotune_core::Result;
use ferrotune_core::adapter::{Attachment, Site, StepDone, WeightUpdate};
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_kernels::parts::Draws;
use ferrotune_kernels::rotation::{MOST_TERMS, Source};
use ferrotune_kernels::{Tensor, View, ViewMut, block_diagonal, kronecker, rotation};
use serde_json::{Map, Value, json};

/// OFT's configuration.
#[derive(Clone, Debug)]
pub(crate) struct Oft {
    /// Number of blocks; 0 where their size is given.
    rank: usize,
    block_size: usize,
    /// Constrained: how far a block may go from the identity.
    constraint: Option<f64>,
    eps: f64,
    block_share: bool,
    neumann: bool,
    terms: usize,
    dropout: f64,
    /// Whether a run asks for it.
    asked: bool,
    init_weights: bool,
}

impl Oft {
    /// Size and number of blocks.
    fn blocks(&self, site: &Site) -> Result<[usize; 2]> {
        let [size, number] = [self.block_size, self.rank].map(|n| divisor(site.in_features, n));
        blocks(site, ("oft_block_size", size), ("r", number))
    }
}

/// The divisor of `inputs` that PEFT takes for `given`: the nearest one, the smaller of two; 0 stays 0.
fn divisor(inputs: usize, given: usize) -> usize {
    if given == 0 || inputs == 0 {
        return given;
    }
    let given = given.min(inputs);
    let divides = |n: &usize| inputs.is_multiple_of(*n);
    let lower = (1..=given).rev().find(divides).unwrap_or(1);
    let higher = (given..=inputs).find(divides).unwrap_or(inputs);
    match given - lower <= higher - given {
        true => lower,
        false => higher,
    }
}

impl Method for Oft {
    const PEFT_TYPE: &'static str = "OFT";
    const BIAS: Option<&'static str> = Some("oft_only");

    fn read(keys: &mut Keys<'_>) -> Result<Self> {
        let (rank, block_size) = (keys.integer("r", 0)?, keys.integer("oft_block_size", 32)?);
        require_one(keys, ("oft_block_size", block_size), ("r", rank), 32)?;
        let block_share = keys.boolean("block_share", false)?;
        let dropout = keys.probability("module_dropout")?;
        if block_share && dropout > 0.0 && keys.are_asked() {
            let message = format!(
                "is {dropout}, and with `block_share` there is one rotation and none to leave out; leave one of them out"
            );
            return Err(keys.error("module_dropout", message));
        }
        let terms = keys.positive("num_cayley_neumann_terms", 5)?;
        if terms > MOST_TERMS {
            return Err(keys.error(
                "num_cayley_neumann_terms",
                format!("is {terms}, at most {MOST_TERMS}; `use_cayley_neumann: false` is exact"),
            ));
        }
        let (coft, eps) = (keys.boolean("coft", false)?, keys.number("eps", 6e-5)?);
        if coft && eps <= 0.0 {
            let message = format!(
                "is {eps}, and with `coft` blocks are held within it; expected a number above 0"
            );
            return Err(keys.error("eps", message));
        }
        Ok(Self {
            rank,
            block_size,
            constraint: coft.then_some(eps),
            eps,
            block_share,
            neumann: keys.boolean("use_cayley_neumann", true)?,
            terms,
            dropout,
            asked: keys.are_asked(),
            init_weights: keys.boolean("init_weights", true)?,
        })
    }

    fn write(&self, keys: &mut Map<String, Value>) {
        keys.insert("r".into(), json!(self.rank));
        keys.insert("oft_block_size".into(), json!(self.block_size));
        keys.insert("coft".into(), json!(self.constraint.is_some()));
        keys.insert("eps".into(), json!(self.eps));
        keys.insert("block_share".into(), json!(self.block_share));
        keys.insert("use_cayley_neumann".into(), json!(self.neumann));
        keys.insert("num_cayley_neumann_terms".into(), json!(self.terms));
        keys.insert("init_weights".into(), json!(self.init_weights));
        keys.insert("module_dropout".into(), json!(self.dropout));
        keys.insert("fan_in_fan_out".into(), json!(false));
    }

    fn describe(&self) -> String {
        match self.block_size {
            0 => format!("OFT r={}", self.rank),
            size => format!("OFT block size {size}"),
        }
    }

    fn check(&self, targets: &[&Site]) -> Result<()> {
        let (key, given) = match self.block_size {
            0 => ("r", self.rank),
            size => ("oft_block_size", size),
        };
        for site in targets.iter().filter(|_| self.asked) {
            require_more_than_one(site, self.blocks(site)?[0], (key, given))?;
        }
        let changed = |site: &&&Site| divisor(site.in_features, given) != given;
        if let Some(site) = targets.iter().find(changed) {
            let (name, inputs) = (&site.name, site.in_features);
            tracing::warn!(
                "`{key}` is {given}, which does not divide the {inputs} inputs of `{name}`; as in PEFT it is {} there",
                divisor(inputs, given)
            );
        }
        Ok(())
    }

    fn tensors(&self, site: &Site) -> Result<Vec<TensorSpec>> {
        let [size, count] = self.blocks(site)?;
        let rows = if self.block_share { 1 } else { count };
        Ok(vec![TensorSpec::new(
            "oft_R.weight",
            [rows, size * (size - 1) / 2],
        )])
    }

    fn init(&self, _: &str, shape: &[usize]) -> Init {
        if self.init_weights {
            Init::Constant(0.0)
        } else {
            Init::kaiming(shape[1])
        }
    }

    /// Brings constrained parameters back to where the next step will see them; PEFT does so in its forward.
    fn after_step(
        &self,
        targets: &[Target],
        params: &mut FlatBuffer,
        _: StepDone<'_>,
    ) -> Result<()> {
        let Some(eps) = self.constraint else {
            return Ok(());
        };
        for Target { site, ids } in targets {
            let [size, _] = self.blocks(site)?;
            let len = (size * (size - 1) / 2).max(1);
            let rows = params.layout().segment(ids[0]).range().len() / len;
            constrain(params.view_as_matrix_mut(ids[0], [rows, len]), eps)?;
        }
        Ok(())
    }

    fn attach(&self, site: &Site, at: &Place<'_>) -> Result<Attachment> {
        let [size, count] = self.blocks(site)?;
        let shared = self.block_share;
        Ok(Attachment::Weight(Box::new(Rotations {
            weight: at.ids[0],
            count,
            blocks: Blocks {
                size,
                count: if shared { 1 } else { count },
                source: Source::Upper,
                rotation: match self.neumann {
                    true => Rotation::neumann(self.terms),
                    false => Rotation::Cayley,
                },
                kept: None,
            },
            dropout: if shared { 0.0 } else { self.dropout },
            constraint: self.constraint,
        })))
    }
}

/// OFT on one linear.
#[derive(Clone, Debug)]
struct Rotations {
    weight: ParamId,
    /// Of the inputs.
    count: usize,
    /// As many, or one that all of them share.
    blocks: Blocks,
    dropout: f64,
    constraint: Option<f64>,
}

impl Rotations {
    /// Calls `body` with the parameters as they are constrained to be, on the side of `beside`.
    fn with_parameters<T>(
        &self,
        params: &FlatBuffer,
        beside: View<'_>,
        body: impl FnOnce(View<'_>) -> Result<T>,
    ) -> Result<T> {
        let shape = self.blocks.parameters();
        let own = param(params, self.weight, shape, beside);
        let Some(eps) = self.constraint else {
            return body(own);
        };
        let mut projected = copy_of(own);
        constrain(projected.view_mut(), eps)?;
        body(projected.view())
    }

    /// Ones, one below the other for each block that shares the rotation.
    fn copies(&self, beside: View<'_>) -> Option<Tensor> {
        let mut ones = (self.count > self.blocks.count).then(|| empty(beside, self.count, 1))?;
        ones.view_mut().fill(1.0);
        Some(ones)
    }

    /// The rotations below one another, `[blocks * n, n]`, on the side of `beside`.
    fn rotations(&self, params: &FlatBuffer, beside: View<'_>) -> Result<Tensor> {
        let own = self.with_parameters(params, beside, |own| self.blocks.rotations(own))?;
        let Some(ones) = self.copies(beside) else {
            return Ok(own);
        };
        let mut all = empty(beside, self.count * self.blocks.size, self.blocks.size);
        all.view_mut().fill(0.0);
        let second = kronecker::Second {
            matrix: own.view(),
            transposed: false,
        };
        kronecker::add(all.view_mut(), 1.0, ones.view(), second)?;
        Ok(all)
    }
}

/// Shortens each row of upper triangles so that the matrices have norm `eps` together at most, where all have as much.
fn constrain(triangles: ViewMut<'_>, eps: f64) -> Result<()> {
    // Each element stands twice in its matrix.
    let limit = eps / (2.0 * triangles.rows() as f64).sqrt();
    Ok(rotation::shorten(triangles, limit)?)
}

impl WeightUpdate for Rotations {
    fn computes_on_host(&self) -> bool {
        false
    }

    fn drawn(&self, draws: Draws<'_>) -> Result<Option<Box<dyn WeightUpdate + '_>>> {
        let mut drawn = self.clone();
        drawn.blocks.kept = kept(self.dropout, self.count, [0, 1], draws)?;
        Ok(Some(Box::new(drawn)))
    }

    fn apply(&self, params: &FlatBuffer, weight: ViewMut<'_>) -> Result<()> {
        let before = copy_of(weight.as_view());
        let rotations = self.rotations(params, before.view())?;
        Ok(block_diagonal::product(
            weight,
            before.view(),
            rotations.view(),
        )?)
    }

    /// A constraint is a projection of the parameters, whose gradients are taken where they end up.
    fn backward(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        weight: View<'_>,
        d_weight: View<'_>,
    ) -> Result<()> {
        let n = self.blocks.size;
        let mut d = empty(weight, self.count * n, n);
        block_diagonal::gradient(d.view_mut(), d_weight, weight)?;
        if let Some(ones) = self.copies(weight) {
            // A rotation that all blocks share has the sum of their gradients.
            let mut sum = empty(weight, n, n);
            sum.view_mut().fill(0.0);
            kronecker::add_second_gradient(sum.view_mut(), false, 1.0, d.view(), ones.view())?;
            d = sum;
        }
        let to = grad(grads, self.weight, self.blocks.parameters(), weight);
        self.with_parameters(params, weight, |own| self.blocks.add_gradient(to, d, own))
    }
}

#[cfg(test)]
mod tests {
    use super::divisor;

    #[test]
    fn what_does_not_divide_the_inputs_becomes_what_peft_makes_of_it() {
        // Inputs, what is given, and PEFT 0.21.2's block_size or r.
        for (inputs, given, taken) in [
            (48, 32, 24),
            (48, 5, 4),
            (48, 7, 6),
            (96, 20, 16),
            (100, 32, 25),
            (31, 16, 1),
            (31, 15, 1),
            (16, 32, 16),
            (48, 14, 12),
            (48, 10, 8),
            (48, 0, 0),
            (48, 12, 12),
        ] {
            assert_eq!(divisor(inputs, given), taken, "{given} of {inputs}");
        }
    }
}
