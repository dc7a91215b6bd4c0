//! What a layer keeps of its forward pass for its backward pass.

use std::fmt;
use std::ops::Range;

/// A layer's choice between memory and computing again. Gradients are the same to the last bit
/// whatever is chosen: what was not kept is made by the operations that made it the first time, from
/// the same operands, with the same dropout masks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Keep {
    /// Every activation that cannot be had again without a matrix product.
    #[default]
    All,
    /// The same without gate and up, the widest of them: their product is computed again.
    DropGateUp,
    /// The layer's input alone, `[T, D]`, low-rank intermediates of the down projection and, where its
    /// output has a norm, that output: all products but that of the down projection, and attention,
    /// are computed again.
    Input,
}

impl Keep {
    /// Every policy, from the most memory to the least.
    pub const EVERY: [Self; 3] = [Self::All, Self::DropGateUp, Self::Input];

    /// Its name, as reports write it and command lines read it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::DropGateUp => "drop-gate-up",
            Self::Input => "input",
        }
    }

    /// The policy of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::EVERY.into_iter().find(|keep| keep.as_str() == name)
    }

    /// Runs of neighbouring layers with one policy.
    #[must_use]
    pub fn runs(layers: &[Self]) -> Vec<(Range<usize>, Self)> {
        let mut first = 0;
        layers
            .chunk_by(|a, b| a == b)
            .map(|chunk| {
                let run = first..first + chunk.len();
                first = run.end;
                (run, chunk[0])
            })
            .collect()
    }
}

impl fmt::Display for Keep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_with_one_policy_are_one_run() {
        let layers = [Keep::Input, Keep::Input, Keep::DropGateUp, Keep::All];
        let runs = [
            (0..2, Keep::Input),
            (2..3, Keep::DropGateUp),
            (3..4, Keep::All),
        ];
        assert_eq!(Keep::runs(&layers), runs);
        assert_eq!(Keep::runs(&[]), []);
    }

    #[test]
    fn every_policy_is_found_by_its_name() {
        for keep in Keep::EVERY {
            assert_eq!(Keep::from_name(keep.as_str()), Some(keep));
        }
        assert_eq!(Keep::from_name("everything"), None);
    }
}
