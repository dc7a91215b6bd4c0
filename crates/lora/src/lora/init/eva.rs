//! EVA: A starts as the directions in which the inputs vary most, and ranks go where they explain most.
//!
//! The principal components of each input are followed over micro-batches until they have settled; then the
//! ranks of all linears together are spread over their components by the share of the variance that each
//! explains. B starts at zero, so the base stays.
//!
//! # Source
//! Paischer et al.: "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation"
//! (2024); PEFT's `eva.py` and `incremental_pca.py`. Ross, Lim, Lin, Yang: "Incremental Learning for Robust
//! Visual Tracking" (2008).

use super::super::LoraConfig;
use super::Linear;
use super::start::{Factors, Start};
use crate::method::Keys;
use crate::target::TargetModules;
use ferrotune_core::Result;
use ferrotune_kernels::decompose::{Matrix, Svd};
use ferrotune_kernels::rng::Stream;

/// PEFT's `eva_config`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EvaConfig {
    /// `rho`: how many times its rank a linear may get at most, at least 1.
    pub rho: f64,
    /// `tau`: cosine between a component and what it was a micro-batch ago, from which on it has settled.
    pub tau: f64,
    /// `use_label_mask`: look at the tokens that have a label alone.
    pub use_label_mask: bool,
    /// `whiten`: divide each component by the root of its singular value.
    pub whiten: bool,
    /// `adjust_scaling_factors`: alpha follows the rank, so that the scale of the update stays.
    pub adjust_scaling_factors: bool,
}

impl Default for EvaConfig {
    fn default() -> Self {
        Self {
            rho: 2.0,
            tau: 0.99,
            use_label_mask: true,
            whiten: false,
            adjust_scaling_factors: true,
        }
    }
}

impl EvaConfig {
    pub(super) fn read(keys: &mut Keys<'_>) -> Result<Self> {
        let default = Self::default();
        let config = Self {
            rho: keys.number("rho", default.rho)?,
            tau: keys.number("tau", default.tau)?,
            use_label_mask: keys.boolean("use_label_mask", default.use_label_mask)?,
            whiten: keys.boolean("whiten", default.whiten)?,
            adjust_scaling_factors: keys
                .boolean("adjust_scaling_factors", default.adjust_scaling_factors)?,
        };
        // Our labels always mark so what is not trained on.
        if keys
            .get("label_mask_value")
            .is_some_and(|v| v.as_i64() != Some(-100))
        {
            return Err(keys.error("label_mask_value", "is not -100, which marks labels here"));
        }
        if config.rho < 1.0 {
            let message = format!(
                "is {}, expected at least 1, where every rank stays",
                config.rho
            );
            return Err(keys.error("rho", message));
        }
        if !(0.0..1.0).contains(&config.tau) {
            let message = format!("is {}, expected a cosine from 0 to below 1", config.tau);
            return Err(keys.error("tau", message));
        }
        Ok(config)
    }

    /// Components that are followed for a linear of `rank`.
    pub(super) fn components(&self, rank: usize) -> usize {
        (rank as f64 * self.rho).round() as usize
    }
}

/// The principal components of one input, followed over micro-batches.
#[derive(Debug)]
pub(super) struct Components {
    count: usize,
    tau: f64,
    stream: Stream,
    rows: usize,
    mean: Vec<f64>,
    /// Sum of squares around the mean, over all columns.
    spread: f64,
    /// `[count, in]`.
    vectors: Option<Matrix>,
    values: Vec<f64>,
    settled: Vec<bool>,
    /// Whether enough of them have settled to look no more.
    pub(super) done: bool,
}

impl Components {
    pub(super) fn new(count: usize, tau: f64, stream: Stream) -> Self {
        Self {
            count,
            tau,
            stream,
            rows: 0,
            mean: Vec::new(),
            spread: 0.0,
            vectors: None,
            values: Vec::new(),
            settled: vec![false; count],
            done: false,
        }
    }

    /// Adds the rows of `x` `[n, in]`; fewer rows than components say too little and are passed over.
    pub(super) fn add(&mut self, mut x: Matrix) -> Result<()> {
        let [rows, cols] = x.shape();
        if rows < self.count {
            return Ok(());
        }
        let mut mean = vec![0.0; cols];
        for row in x.values().chunks_exact(cols) {
            mean.iter_mut().zip(row).for_each(|(m, v)| *m += v);
        }
        mean.iter_mut().for_each(|m| *m /= rows as f64);
        for row in x.values_mut().chunks_exact_mut(cols) {
            row.iter_mut().zip(&mean).for_each(|(v, m)| *v -= m);
        }
        self.spread += x.values().iter().map(|v| v * v).sum::<f64>();
        let total = (self.rows + rows) as f64;
        if let Some(vectors) = &self.vectors {
            let weight = self.rows as f64 * rows as f64 / total;
            let apart = self.mean.iter().zip(&mean).map(|(a, b)| a - b);
            let correction: Vec<f64> = apart.map(|d| weight.sqrt() * d).collect();
            self.spread += correction.iter().map(|v| v * v).sum::<f64>();
            let before = vectors.clone().rows_scaled(&self.values);
            let stacked = [before.values(), x.values(), &correction].concat();
            x = Matrix::new(self.count + rows + 1, cols, stacked)?;
        } else {
            self.mean = vec![0.0; cols];
        }
        let Svd { s, vt, .. } = x.svd_low_rank(2 * self.count, ITERATIONS, self.stream.clone())?;
        let vectors = with_signs(vt.row_range(0..self.count));
        if let Some(before) = &self.vectors {
            let pairs = rows_of(before).zip(rows_of(&vectors));
            self.settled = pairs.map(|(a, b)| cosine(a, b) >= self.tau).collect();
        }
        let share = self.rows as f64 / total;
        for (mean, new) in self.mean.iter_mut().zip(&mean) {
            *mean = *mean * share + new * (1.0 - share);
        }
        self.rows += rows;
        self.values = s[..self.count].to_vec();
        self.vectors = Some(vectors);
        Ok(())
    }

    /// The share of the variance that each component explains.
    fn shares(&self) -> impl Iterator<Item = f64> {
        self.values.iter().map(|s| s * s / self.spread)
    }
}

/// Rounds of subspace iteration, as in PEFT.
const ITERATIONS: u32 = 4;

fn rows_of(matrix: &Matrix) -> impl Iterator<Item = &[f64]> {
    matrix.values().chunks_exact(matrix.shape()[1].max(1))
}

/// Every row with the sign that makes its largest element positive.
fn with_signs(matrix: Matrix) -> Matrix {
    let sign = |row: &[f64]| {
        let largest = row
            .iter()
            .fold(0.0_f64, |m, v| if v.abs() > m.abs() { *v } else { m });
        if largest < 0.0 { -1.0 } else { 1.0 }
    };
    let signs: Vec<f64> = rows_of(&matrix).map(sign).collect();
    matrix.rows_scaled(&signs)
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// The linears of one input, the first of which has its components followed.
pub(super) struct Followed<'a> {
    pub(super) linears: &'a [Linear],
    pub(super) components: &'a mut Components,
}

/// Spreads the ranks of all linears over the components that explain most; says of each input whether it has
/// seen enough. Returns the ranks by linear, in the order of `inputs`, once every input has components.
pub(super) fn spread(inputs: &mut [Followed<'_>]) -> Option<Vec<Vec<usize>>> {
    if inputs
        .iter()
        .any(|input| input.components.vectors.is_none())
    {
        return None;
    }
    let budget = inputs.iter().flat_map(|i| i.linears).map(|l| l.rank).sum();
    // First linears come first, as in PEFT, where components explain the same.
    let mut shares = Vec::new();
    let depth = inputs.iter().map(|input| input.linears.len()).max();
    for place in 0..depth.unwrap_or(0) {
        for (i, input) in inputs.iter().enumerate() {
            if place < input.linears.len() {
                shares.extend(input.components.shares().map(|share| (share, i, place)));
            }
        }
    }
    shares.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut ranks: Vec<Vec<usize>> = inputs.iter().map(|i| vec![0; i.linears.len()]).collect();
    for (_, input, linear) in shares.into_iter().take(budget) {
        ranks[input][linear] += 1;
    }
    for (input, ranks) in inputs.iter_mut().zip(&mut ranks) {
        // What is followed must have settled for the highest rank over this input.
        for place in 1..ranks.len() {
            if ranks[place] > ranks[0] {
                ranks.swap(0, place);
            }
        }
        let settled = &input.components.settled;
        input.components.done = settled.iter().take(ranks[0]).all(|settled| *settled);
    }
    Some(ranks)
}

/// The start of linears with these ranks; those of rank 0 are not adapted.
pub(super) fn start(
    config: &EvaConfig,
    inputs: &[Followed<'_>],
    ranks: &[Vec<usize>],
) -> Result<Start> {
    let mut all = Vec::new();
    for (input, ranks) in inputs.iter().zip(ranks) {
        let Some(vectors) = &input.components.vectors else {
            continue;
        };
        for (linear, &rank) in input.linears.iter().zip(ranks) {
            let mut a = vectors.row_range(0..rank);
            if config.whiten {
                let factors = input.components.values[..rank].iter();
                let factors: Vec<f64> = factors.map(|s| s.sqrt().recip()).collect();
                a = a.rows_scaled(&factors);
            }
            if rank > 0 {
                let factors = Factors {
                    a: a.to_f32_vec(),
                    b: vec![0.0; linear.shape[0] * rank],
                };
                let linear = Linear {
                    rank,
                    ..linear.clone()
                };
                all.push((linear, factors));
            }
        }
    }
    Start::of(all)
}

/// `config` with the ranks of `start`, by the names of the modules that it adapts.
pub(crate) fn with_ranks_of(
    config: &LoraConfig,
    eva: EvaConfig,
    start: &Start,
) -> Result<LoraConfig> {
    let mut adjusted = LoraConfig {
        rank_pattern: Vec::new(),
        alpha_pattern: Vec::new(),
        exclude_modules: None,
        layers_to_transform: None,
        layers_pattern: Vec::new(),
        ..config.clone()
    };
    let mut modules = Vec::new();
    for (module, rank) in start.ranks() {
        let (before, mut alpha) = config.rank_and_alpha().of(module)?;
        if eva.adjust_scaling_factors {
            alpha *= rank as f64 / before as f64;
        }
        if rank != config.rank {
            adjusted.rank_pattern.push((module.to_owned(), rank));
        }
        if alpha != config.alpha {
            adjusted.alpha_pattern.push((module.to_owned(), alpha));
        }
        modules.push(module.to_owned());
    }
    adjusted.target_modules = Some(TargetModules::List(modules));
    Ok(adjusted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn components_of_parts_are_those_of_the_whole() {
        let (cols, mut stream) = (6, Stream::new(4));
        let mut rows = |n: usize| -> Vec<f64> {
            let value = |i: usize| stream.normal() * (1.0 + (i % cols) as f64) + 3.0;
            (0..n * cols).map(value).collect()
        };
        let parts = [rows(9), rows(14), rows(8)];
        let mut followed = Components::new(cols, 0.99, Stream::new(1));
        for part in &parts {
            let x = Matrix::new(part.len() / cols, cols, part.clone()).expect("whole rows");
            followed.add(x).expect("finite");
        }
        let all = parts.concat();
        let mut whole = Components::new(cols, 0.99, Stream::new(1));
        let x = Matrix::new(all.len() / cols, cols, all).expect("whole rows");
        whole.add(x).expect("finite");
        for (a, b) in followed.values.iter().zip(&whole.values) {
            assert!((a - b).abs() < 1e-9, "{a} {b}");
        }
        let vectors = |c: &Components| c.vectors.clone().expect("added");
        let (a, b) = (vectors(&followed), vectors(&whole));
        for (a, b) in rows_of(&a).zip(rows_of(&b)) {
            assert!(cosine(a, b) > 1.0 - 1e-9);
        }
        let shares: f64 = followed.shares().sum();
        assert!(
            (shares - 1.0).abs() < 1e-9,
            "all components explain all: {shares}"
        );
        assert!((followed.spread - whole.spread).abs() < 1e-9 * whole.spread);
    }

    #[test]
    fn too_few_rows_say_nothing() {
        let mut few = Components::new(4, 0.99, Stream::new(1));
        let x = Matrix::new(3, 5, vec![1.0; 15]).expect("whole rows");
        few.add(x).expect("finite");
        assert!(few.vectors.is_none() && few.rows == 0);
    }
}
