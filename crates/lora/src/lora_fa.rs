//! LoRA-FA: A stays as it starts, and B gets the gradient that changes B A most like a full one would.
//!
//! ```text
//! g_B' = g_B (A A^T + 1e-8 I)^-1 / s^2
//! ```
//!
//! after clipping, so that what is clipped is the gradient of the loss. Computed in f64, where PEFT multiplies under bf16
//! autocast on machines that can.
//!
//! # Source
//! Zhang et al.: "LoRA-FA: Memory-efficient Low-rank Adaptation" (2023); the projection: `LoraFAOptimizer` of PEFT 0.21.

use crate::over::{Above, Over};
use ferrotune_core::adapter::{Adapter, Attachment, LowRank, SiteId};
use ferrotune_core::params::{FlatBuffer, ParamLayoutBuilder};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::decompose::Matrix;
use std::sync::OnceLock;

/// Keeps the inverse from growing without bound where rows of A are alike.
const DELTA: f64 = 1e-8;

/// A LoRA whose A is frozen.
pub type LoraFa = Over<FrozenA>;

/// The updates whose A is frozen, once they are attached.
#[derive(Debug, Default)]
pub struct FrozenA {
    updates: OnceLock<Vec<LowRank>>,
}

impl LoraFa {
    /// `method`, which must be a LoRA on linears.
    #[must_use]
    pub fn new(method: Box<dyn Adapter>) -> Self {
        Self::of(method, FrozenA::default())
    }
}

impl FrozenA {
    fn updates(&self) -> &[LowRank] {
        self.updates.get().map_or(&[], Vec::as_slice)
    }
}

impl Above for FrozenA {
    fn attached(
        &self,
        attachments: &[(SiteId, Attachment)],
        params: &mut ParamLayoutBuilder,
    ) -> Result<()> {
        let mut updates = Vec::new();
        for (_, attachment) in attachments {
            match attachment {
                Attachment::LowRank(update) if update.magnitude.is_none() => updates.push(*update),
                Attachment::LowRank(_) | Attachment::Factors(_) | Attachment::Weight(_) => {
                    return Err(not_plain());
                }
                _ => {}
            }
        }
        let of_table = |name: &str| name.contains(".lora_embedding_");
        if updates.is_empty() || params.specs_mut().iter().any(|spec| of_table(&spec.name)) {
            return Err(not_plain());
        }
        for spec in params.specs_mut() {
            if spec.name.contains(".lora_A.") {
                spec.lr_scale = 0.0;
            }
        }
        let _ = self.updates.set(updates);
        Ok(())
    }

    fn completes_gradients(&self) -> bool {
        true
    }

    /// What is frozen has no gradient, and no part in its norm.
    fn complete_gradients(&self, grads: &mut FlatBuffer) {
        for update in self.updates() {
            grads.get_mut(update.a).fill(0.0);
        }
    }

    fn preconditions(&self) -> bool {
        true
    }

    fn precondition(&self, params: &FlatBuffer, grads: &mut FlatBuffer) -> Result<()> {
        for update in self.updates() {
            let rank = update.rank;
            let widened = |values: &[f32]| values.iter().copied().map(f64::from).collect();
            let a = params.get(update.a);
            let a = Matrix::new(rank, a.len() / rank.max(1), widened(a))?;
            let mut gram = a.times_transposed(&a)?;
            for at in 0..rank {
                gram.values_mut()[at * (rank + 1)] += DELTA;
            }
            let scale = f64::from(update.scale).powi(-2);
            let inverse = gram.inverse()?.rows_scaled(&vec![scale; rank]);
            let d_b = grads.get_mut(update.b);
            let gradient = Matrix::new(d_b.len() / rank.max(1), rank, widened(d_b))?;
            d_b.copy_from_slice(&gradient.times(&inverse)?.to_f32_vec());
        }
        Ok(())
    }

    fn describe(&self) -> String {
        "with A frozen".into()
    }
}

fn not_plain() -> Error {
    let message = "is for a plain LoRA on linears; leave it out, or leave out DoRA, embedding targets and other methods";
    Error::config("use_lora_fa", message)
}
