//! HRA: the weight behind a chain of trained Householder reflections.
//!
//! `W' = W H_1 H_2 ... H_r`, `H_i = I - 2 u_i u_i^T / |u_i|^2`, u_i the columns of `hra_u [in, r]`. With
//! `apply_GS` the columns are made orthogonal first, and `W' = W (I - 2 U U^T)`.
//!
//! # Source
//! Yuan et al.: "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection
//! Adaptation" (2024); PEFT's `tuners/hra`.

use super::matrix::{copy_of, device_of, elements, empty};
use crate::method::{Init, Keys, Method, Place, TensorSpec};
use ferrotune_core::adapter::{Attachment, Site, WeightUpdate};
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::{Tensor, View, ViewMut, matmul};
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
    /// orthogonal directions there are none.
    fn check(&self, targets: &[&Site]) -> Result<()> {
        let rank = self.rank;
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

type Vectors = Vec<Vec<f64>>;

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `v / |v|` and `|v|`.
fn unit(v: &[f64]) -> (Vec<f64>, f64) {
    let norm = dot(v, v).sqrt();
    (v.iter().map(|x| x / norm).collect(), norm)
}

/// The gradient of `v` from that of `unit = v / norm`.
fn unit_backward(unit: &[f64], norm: f64, d_unit: &[f64]) -> Vec<f64> {
    let along = dot(unit, d_unit);
    unit.iter()
        .zip(d_unit)
        .map(|(u, d)| (d - along * u) / norm)
        .collect()
}

impl Reflections {
    fn columns(&self, params: &FlatBuffer) -> Vectors {
        let u = params.get(self.u);
        let column = |i: usize| {
            (0..self.inputs)
                .map(|r| f64::from(u[r * self.rank + i]))
                .collect()
        };
        (0..self.rank).map(column).collect()
    }

    /// The directions that are reflected, with what made them: vectors before normalisation.
    fn directions(&self, params: &FlatBuffer) -> (Vectors, Vectors) {
        let raw = self.columns(params);
        let (mut directions, mut before): (Vectors, Vectors) = (Vec::new(), Vec::new());
        for mut v in raw {
            if self.orthogonal {
                for q in &directions {
                    let along = dot(q, &v);
                    v.iter_mut().zip(q).for_each(|(v, q)| *v -= along * q);
                }
            }
            directions.push(unit(&v).0);
            before.push(v);
        }
        (directions, before)
    }

    /// Adds the gradients of the directions, as those of `u`.
    fn directions_backward(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        directions: &Vectors,
        before: &Vectors,
        mut d: Vectors,
    ) {
        let raw = self.columns(params);
        let mut d_raw: Vectors = vec![Vec::new(); self.rank];
        for i in (0..self.rank).rev() {
            let norm = dot(&before[i], &before[i]).sqrt();
            let mut d_v = unit_backward(&directions[i], norm, &d[i]);
            if self.orthogonal {
                // v_{j+1} = v_j - (q_j . v_j) q_j, from the last j to the first.
                let mut steps: Vectors = vec![raw[i].clone()];
                for q in &directions[..i] {
                    let v = &steps[steps.len() - 1];
                    let along = dot(q, v);
                    steps.push(v.iter().zip(q).map(|(v, q)| v - along * q).collect());
                }
                for j in (0..i).rev() {
                    let (q, v) = (directions[j].clone(), &steps[j]);
                    let (along, back) = (dot(&q, v), dot(&d_v, &q));
                    for ((d_q, d), v) in d[j].iter_mut().zip(&d_v).zip(v) {
                        *d_q -= back * v + along * d;
                    }
                    d_v.iter_mut().zip(&q).for_each(|(d, q)| *d -= back * q);
                }
            }
            d_raw[i] = d_v;
        }
        let target = grads.get_mut(self.u);
        for (i, d) in d_raw.iter().enumerate() {
            for (r, d) in d.iter().enumerate() {
                target[r * self.rank + i] += *d as f32;
            }
        }
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

/// Vectors as rows, on the side of `beside`.
fn rows(vectors: &Vectors, beside: View<'_>) -> Tensor {
    let values: Vec<f32> = vectors.iter().flatten().map(|v| *v as f32).collect();
    let inputs = values.len() / vectors.len();
    Tensor::from_f32(values, vectors.len(), inputs).to_device(&device_of(beside))
}

impl WeightUpdate for Reflections {
    fn apply(&self, params: &FlatBuffer, weight: ViewMut<'_>) -> Result<()> {
        let mut reflected = copy_of(weight.as_view());
        let directions = rows(&self.directions(params).0, weight.as_view());
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
        let (directions, before) = self.directions(params);
        let on_side = rows(&directions, weight);
        let direction = |i: usize| on_side.view().row_range(i..i + 1);
        let (mut state, mut gradient) = (copy_of(weight), copy_of(d_weight));
        for i in 0..self.rank {
            reflect(&mut state, direction(i))?;
        }
        let mut d: Vectors = vec![Vec::new(); self.rank];
        for i in (0..self.rank).rev() {
            // A reflection undoes itself.
            reflect(&mut state, direction(i))?;
            // d/du of -2 (row . u) u: -2 ((row . u) g + (g . u) row), summed over the rows.
            let (row_u, g_u) = (
                along(state.view(), direction(i))?,
                along(gradient.view(), direction(i))?,
            );
            let mut d_u = empty(weight, 1, self.inputs);
            matmul::tn(d_u.view_mut(), 0.0, -2.0, row_u.view(), gradient.view())?;
            matmul::tn(d_u.view_mut(), 1.0, -2.0, g_u.view(), state.view())?;
            d[i] = elements(d_u.view()).into_iter().map(f64::from).collect();
            reflect(&mut gradient, direction(i))?;
        }
        self.directions_backward(params, grads, &directions, &before, d);
        Ok(())
    }
}
