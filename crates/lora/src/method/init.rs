//! Initial values: a pure function of the seed and the tensor's name.

use ferrotune_core::params::FlatBuffer;
use ferrotune_kernels::rng::{Stream, key_for};

/// How a tensor starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Init {
    /// One value everywhere.
    Constant(f32),
    /// Uniform in ±bound.
    Uniform(f64),
    /// Normal around `mean` with standard deviation `std`.
    Normal { mean: f64, std: f64 },
    /// Pairs of equal columns of a matrix, each uniform in ±bound.
    UniformPairs { bound: f64, columns: usize },
}

impl Init {
    /// torch's `kaiming_uniform_(a=√5)` of a matrix whose rows have `fan_in` elements.
    pub(crate) fn kaiming(fan_in: usize) -> Self {
        Self::Uniform(1.0 / (fan_in.max(1) as f64).sqrt())
    }

    /// Fills the tensor called `name`.
    pub(crate) fn fill(self, params: &mut FlatBuffer, name: &str, seed: u64) {
        let Some(id) = params.layout().find(name) else {
            return;
        };
        let mut stream = Stream::new(key_for(seed, name));
        let mut uniform = |bound: f64| ((2.0 * stream.uniform() - 1.0) * bound) as f32;
        let values = params.get_mut(id);
        match self {
            Self::Constant(value) => values.fill(value),
            Self::Uniform(bound) => values.iter_mut().for_each(|v| *v = uniform(bound)),
            Self::UniformPairs { bound, columns } => {
                for row in values.chunks_mut(columns.max(1)) {
                    for pair in row.chunks_mut(2) {
                        pair.fill(uniform(bound));
                    }
                }
            }
            Self::Normal { mean, std } => {
                for value in values {
                    *value = (mean + std * stream.normal()) as f32;
                }
            }
        }
    }
}
