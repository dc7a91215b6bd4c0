//! LoRA-GA: the first step of the update goes where that of the weight itself would.
//!
//! G, the gradient of the weight, is `U S V^T`; of its first `2 rank` directions, A has some as rows of `V^T`
//! and B others as columns of `U S`.
//!
//! # Source
//! Wang, Yu, Li: "LoRA-GA: Low-Rank Adaptation with Gradient Approximation" (2024); PEFT's `lora_ga_init`,
//! which scales B by S where the paper does not.

use super::start::Factors;
use crate::method::Keys;
use ferrotune_core::Result;
use ferrotune_kernels::View;
use ferrotune_kernels::decompose::{Matrix, Svd};
use ferrotune_kernels::rng::Stream;
use serde_json::{Value, json};

/// PEFT's `lora_ga_config`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoraGaConfig {
    /// `direction`: which of the first `2 rank` directions go where.
    pub direction: Direction,
    /// `scale`: by what A and B are scaled.
    pub scale: Scale,
    /// `stable_gamma`, above 0.
    pub stable_gamma: f64,
}

/// Which directions A has, and which B.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// `ArBr`: A every second one, B those between.
    Alternating,
    /// `A2rBr`: A the second half, B the first.
    SecondHalf,
    /// `ArB2r`: A the first half, B the second.
    FirstHalf,
    /// `random`: the same for both, drawn by the module's name.
    Random,
}

/// By what A and B are scaled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// `stable`: B by `out^(1/4) / √gamma`.
    Stable,
    /// `weight_svd`: B so that its largest direction is as large as the weight's.
    WeightSvd,
    /// `gd_scale`: both divided by the scale of the update.
    GradientDescent,
    /// `unit`: by nothing.
    Unit,
}

const DIRECTIONS: [&str; 4] = ["ArB2r", "ArBr", "A2rBr", "random"];
const SCALES: [&str; 4] = ["stable", "weight_svd", "gd_scale", "unit"];
/// Rounds of subspace iteration, and how many times the rank is looked for, as in PEFT.
const ITERATIONS: u32 = 4;
const OVERSAMPLED: usize = 4;

impl Default for LoraGaConfig {
    fn default() -> Self {
        Self {
            direction: Direction::FirstHalf,
            scale: Scale::Stable,
            stable_gamma: 16.0,
        }
    }
}

impl LoraGaConfig {
    pub(super) fn read(keys: &mut Keys<'_>) -> Result<Self> {
        let direction = match keys.choice("direction", &DIRECTIONS)? {
            "ArBr" => Direction::Alternating,
            "A2rBr" => Direction::SecondHalf,
            "random" => Direction::Random,
            _ => Direction::FirstHalf,
        };
        let scale = match keys.choice("scale", &SCALES)? {
            "weight_svd" => Scale::WeightSvd,
            "gd_scale" => Scale::GradientDescent,
            "unit" => Scale::Unit,
            _ => Scale::Stable,
        };
        let stable_gamma = keys.number("stable_gamma", Self::default().stable_gamma)?;
        if stable_gamma <= 0.0 {
            let message =
                format!("is {stable_gamma}, expected a number above 0; 16 is PEFT's default");
            return Err(keys.error("stable_gamma", message));
        }
        Ok(Self {
            direction,
            scale,
            stable_gamma,
        })
    }

    pub(super) fn to_value(self) -> Value {
        let direction = match self.direction {
            Direction::Alternating => "ArBr",
            Direction::SecondHalf => "A2rBr",
            Direction::FirstHalf => "ArB2r",
            Direction::Random => "random",
        };
        let scale = match self.scale {
            Scale::Stable => "stable",
            Scale::WeightSvd => "weight_svd",
            Scale::GradientDescent => "gd_scale",
            Scale::Unit => "unit",
        };
        json!({"direction": direction, "scale": scale, "stable_gamma": self.stable_gamma})
    }

    /// Indices of the directions of A and of B.
    fn directions(&self, rank: usize, stream: &Stream) -> [Vec<usize>; 2] {
        match self.direction {
            Direction::Alternating => {
                let every_second = |first| (first..2 * rank).step_by(2).collect();
                [every_second(1), every_second(0)]
            }
            Direction::SecondHalf => [(rank..2 * rank).collect(), (0..rank).collect()],
            Direction::FirstHalf => [(0..rank).collect(), (rank..2 * rank).collect()],
            Direction::Random => {
                let mut all: Vec<usize> = (0..2 * rank).collect();
                stream.clone().shuffle(&mut all);
                all.truncate(rank);
                [all.clone(), all]
            }
        }
    }
}

/// A and B of a weight `[out, in]` from its gradient.
pub(super) fn factors(
    config: &LoraGaConfig,
    weight: View<'_>,
    gradient: View<'_>,
    rank: usize,
    scale: f64,
    stream: Stream,
) -> Result<Factors> {
    let gradient = Matrix::of(gradient);
    let [out, inputs] = gradient.shape();
    let found = (OVERSAMPLED * rank).min(out).min(inputs);
    let Svd { u, s, vt } = gradient.svd_low_rank(found, ITERATIONS, stream.clone())?;
    let [of_a, of_b] = config.directions(rank, &stream);
    let rows = of_a
        .iter()
        .flat_map(|&i| vt.row_range(i..i + 1).values().to_vec());
    let mut a = Matrix::new(rank, inputs, rows.collect())?;
    let columns = u.columns_scaled(&s).transposed();
    let rows = of_b
        .iter()
        .flat_map(|&i| columns.row_range(i..i + 1).values().to_vec());
    let mut b = Matrix::new(rank, out, rows.collect())?.transposed();
    let times = |matrix: &mut Matrix, factor: f64| {
        matrix.values_mut().iter_mut().for_each(|v| *v *= factor);
    };
    match config.scale {
        Scale::Stable => times(&mut b, (out as f64).powf(0.25) / config.stable_gamma.sqrt()),
        Scale::WeightSvd => {
            let largest = Matrix::of(weight).svd_low_rank(rank, ITERATIONS, stream)?.s[0];
            let of_b = s[of_b[0]];
            if of_b > 0.0 {
                times(&mut b, largest / of_b);
            }
        }
        Scale::GradientDescent => [&mut a, &mut b]
            .into_iter()
            .for_each(|m| times(m, 1.0 / scale)),
        Scale::Unit => {}
    }
    Ok(Factors {
        a: a.to_f32_vec(),
        b: b.to_f32_vec(),
    })
}
