//! HRA: the weight behind a chain of trained Householder reflections.
//!
//! `W' = W H_1 H_2 ... H_r`, `H_i = I - 2 u_i u_i^T / |u_i|^2`, u_i the columns of `hra_u [in, r]`. With
//! `apply_GS` the columns are made orthogonal first, and `W' = W (I - 2 U U^T)`.
//!
//! # Source
//! Yuan et al.: "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection
//! Adaptation" (2024); PEFT's `tuners/hra`.

use super::matrix::{copy_of, empty, grad, param};
use crate::method::{Init, Keys, Method, Place, TensorSpec};
use ferrotune_core::adapter::{Attachment, Site, WeightUpdate};
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::{Tensor, View, ViewMut, directions, matmul};
use serde_json::{Map, Value, json};

/// HRA's configuration.
#[derive(Clone, Debug)]
pub(crate) struct Hra {
    rank: usize,
    /// Whether a run asks for it.
    asked: bool,
    orthogonal: bool,
    init_weights: bool,
}

impl Method for Hra {
    const PEFT_TYPE: &'static str = "HRA";
    const BIAS: Option<&'static str> = Some("hra_only");

    fn read(keys: &mut Keys<'_>) -> Result<Self> {
        let read = Self {
            rank: keys.positive("r", 8)?,
            asked: keys.are_asked(),
            orthogonal: keys.boolean("apply_GS", false)?,
            init_weights: keys.boolean("init_weights", true)?,
        };
        // PEFT goes on with what rounding leaves of the second of a pair.
        if read.asked && read.orthogonal && read.starts_in_pairs() {
            let message = format!(
                "is true, and with `init_weights` and an even `r` ({}) directions start as pairs of equal ones: made \
                 orthogonal, the second of each is 0 and has no direction; set `init_weights: false`, or leave \
                 `apply_GS` out",
                read.rank
            );
            return Err(keys.error("apply_GS", message));
        }
        Ok(read)
    }

    fn write(&self, keys: &mut Map<String, Value>) {
        keys.insert("r".into(), json!(self.rank));
        keys.insert("apply_GS".into(), json!(self.orthogonal));
        keys.insert("init_weights".into(), json!(self.init_weights));
    }

    fn describe(&self) -> String {
        format!("HRA r={}", self.rank)
    }

    /// Refuses more reflections than inputs, which PEFT computes without `apply_GS`: they do what fewer do, and of more
    /// orthogonal directions there are none. As many orthogonal ones as inputs, which PEFT trains, are always all of
    /// them: the weight becomes its negative, and no gradient is left.
    fn check(&self, targets: &[&Site]) -> Result<()> {
        let rank = self.rank;
        let all = |site: &&&Site| self.asked && self.orthogonal && rank == site.in_features;
        if let Some(site) = targets.iter().find(all) {
            let message = format!(
                "is {rank}, and `{}` has as many inputs: with `apply_GS` as many directions are all there are, and \
                 nothing can be learned; take at most {}, or leave `apply_GS` out",
                site.name,
                rank - 1
            );
            return Err(Error::config("r", message));
        }
        let more = |site: &&&Site| (self.asked || self.orthogonal) && rank > site.in_features;
        let Some(site) = targets.iter().find(more) else {
            return Ok(());
        };
        let (name, inputs) = (&site.name, site.in_features);
        let message = format!(
            "is {rank}, but `{name}` has {inputs} inputs: more reflections than that do nothing that fewer do not; \
             take at most {inputs}"
        );
        Err(Error::config("r", message))
    }

    fn tensors(&self, site: &Site) -> Result<Vec<TensorSpec>> {
        Ok(vec![TensorSpec::new(
            "hra_u",
            [site.in_features, self.rank],
        )])
    }

    /// Pairs of equal columns: two equal reflections are none.
    fn init(&self, _: &str, shape: &[usize]) -> Init {
        if self.starts_in_pairs() {
            let bound = 1.0 / ((self.rank / 2) as f64).sqrt();
            return Init::UniformPairs {
                bound,
                columns: self.rank,
            };
        }
        Init::kaiming(shape[1])
    }

    fn attach(&self, site: &Site, at: &Place<'_>) -> Result<Attachment> {
        Ok(Attachment::Weight(Box::new(Reflections {
            u: at.ids[0],
            rank: self.rank,
            inputs: site.in_features,
            orthogonal: self.orthogonal,
        })))
    }
}

impl Hra {
    fn starts_in_pairs(&self) -> bool {
        self.init_weights && self.rank.is_multiple_of(2)
    }
}

/// HRA on one linear.
#[derive(Debug)]
struct Reflections {
    u: ParamId,
    rank: usize,
    inputs: usize,
    orthogonal: bool,
}

impl Reflections {
    fn vectors<'a>(&self, params: &'a FlatBuffer, beside: View<'_>) -> View<'a> {
        param(params, self.u, [self.inputs, self.rank], beside)
    }

    /// The directions that are reflected, `[r, in]`.
    fn directions(&self, params: &FlatBuffer, beside: View<'_>) -> Result<Tensor> {
        let mut made = empty(beside, self.rank, self.inputs);
        let vectors = self.vectors(params, beside);
        directions::forward(made.view_mut(), vectors, self.orthogonal)?;
        Ok(made)
    }
}

/// `W u` `[out, 1]`, with a direction `[1, in]`.
fn along(weight: View<'_>, u: View<'_>) -> Result<Tensor> {
    let mut along = empty(weight, weight.rows(), 1);
    matmul::nt(along.view_mut(), 0.0, 1.0, weight, u)?;
    Ok(along)
}

/// `W -= 2 (W u) u^T`: every row reflected.
fn reflect(weight: &mut Tensor, u: View<'_>) -> Result<()> {
    let along = along(weight.view(), u)?;
    Ok(matmul::nn(weight.view_mut(), 1.0, -2.0, along.view(), u)?)
}

impl WeightUpdate for Reflections {
    fn computes_on_host(&self) -> bool {
        false
    }

    fn apply(&self, params: &FlatBuffer, weight: ViewMut<'_>) -> Result<()> {
        let mut reflected = copy_of(weight.as_view());
        let directions = self.directions(params, weight.as_view())?;
        // Orthogonal directions reflect one by one as they do together.
        for i in 0..self.rank {
            reflect(&mut reflected, directions.view().row_range(i..i + 1))?;
        }
        let mut weight = weight;
        weight.reborrow().copy_from(reflected.view());
        Ok(())
    }

    fn backward(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        weight: View<'_>,
        d_weight: View<'_>,
    ) -> Result<()> {
        let directions = self.directions(params, weight)?;
        let direction = |i: usize| directions.view().row_range(i..i + 1);
        let (mut state, mut gradient) = (copy_of(weight), copy_of(d_weight));
        for i in 0..self.rank {
            reflect(&mut state, direction(i))?;
        }
        let mut d = empty(weight, self.rank, self.inputs);
        for i in (0..self.rank).rev() {
            // A reflection undoes itself.
            reflect(&mut state, direction(i))?;
            // d/du of -2 (row . u) u: -2 ((row . u) g + (g . u) row), summed over the rows.
            let (row_u, g_u) = (
                along(state.view(), direction(i))?,
                along(gradient.view(), direction(i))?,
            );
            let mut d_u = d.view_mut().row_range(i..i + 1);
            matmul::tn(d_u.reborrow(), 0.0, -2.0, row_u.view(), gradient.view())?;
            matmul::tn(d_u, 1.0, -2.0, g_u.view(), state.view())?;
            reflect(&mut gradient, direction(i))?;
        }
        let to = grad(grads, self.u, [self.inputs, self.rank], weight);
        let vectors = self.vectors(params, weight);
        Ok(directions::add_gradient(
            to,
            d.view(),
            vectors,
            self.orthogonal,
        )?)
    }
}
