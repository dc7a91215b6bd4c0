//! Folding an attachment into the weight it stands at.

use super::{Attachment, LowRank, Magnitude};
use crate::params::FlatBuffer;
use crate::{Error, Result};
use ferrotune_kernels::{Device, View, ViewMut, matmul};

impl Attachment {
    /// Turns weight `[out, in]` and bias `[1, out]` of a linear, f32 in host memory, into those of the
    /// adapted linear.
    ///
    /// # Errors
    /// [`Error::Config`] if the method cannot be folded in.
    pub fn merge(
        &self,
        params: &FlatBuffer,
        weight: ViewMut<'_>,
        bias: Option<ViewMut<'_>>,
    ) -> Result<()> {
        match self {
            Self::LowRank(low_rank) => low_rank.merge(params, weight),
            Self::Factors(method) => {
                let [a, b] = method.factors(params)?.map(|t| t.to_device(&Device::Cpu));
                Ok(matmul::nn(weight, 1.0, method.scale(), b.view(), a.view())?)
            }
            Self::Weight(method) => method.apply(params, weight),
            Self::Custom(method) => method.merge(params, weight, bias),
            Self::Prompt(_) => {
                let message = "a prompt stands before the text and is no part of a weight; it cannot be merged";
                Err(Error::config("peft_type", message))
            }
            Self::Invocation(_) => {
                let message = "updates that act in a part of a document are in no weight; they cannot be merged";
                Err(Error::config("alora_invocation_tokens", message))
            }
            Self::TrainBase { .. }
            | Self::TrainBias(_)
            | Self::TrainRows { .. }
            | Self::KeepBase => {
                let message = "a trained part of the base replaces it and is no function of it";
                Err(Error::config("modules_to_save", message))
            }
        }
    }
}

impl LowRank {
    /// `W + scale * B A`, with its rows or columns brought to the trained norms for DoRA.
    fn merge(&self, params: &FlatBuffer, mut weight: ViewMut<'_>) -> Result<()> {
        let [out, inputs] = weight.shape();
        let a = View::from_f32(params.get(self.a), self.rank, inputs);
        let b = View::from_f32(params.get(self.b), out, self.rank);
        matmul::nn(weight.reborrow(), 1.0, self.scale, b, a)?;
        let Some(magnitude) = self.magnitude else {
            return Ok(());
        };
        let norms = params.get(magnitude.id());
        let mut values = weight.as_view().to_f32_vec();
        let expected = match magnitude {
            Magnitude::OfRows(_) => out,
            Magnitude::OfColumns(_) => inputs,
        };
        if norms.len() != expected {
            let message = format!("a magnitude of {} values for {expected}", norms.len());
            return Err(Error::config("use_dora", message));
        }
        match magnitude {
            Magnitude::OfRows(_) => bring_rows(&mut values, norms),
            Magnitude::OfColumns(_) => bring_columns(&mut values, norms),
        }
        weight.copy_from(View::from_f32(&values, out, inputs));
        Ok(())
    }
}

/// Brings each row of `values` to its norm.
fn bring_rows(values: &mut [f32], norms: &[f32]) {
    let inputs = values.len() / norms.len().max(1);
    for (row, m) in values.chunks_exact_mut(inputs.max(1)).zip(norms) {
        let squares = row.iter().map(|w| f64::from(*w).powi(2));
        let factor = f64::from(*m) / squares.sum::<f64>().sqrt();
        row.iter_mut()
            .for_each(|w| *w = (f64::from(*w) * factor) as f32);
    }
}

/// Brings each column of `values` to its norm.
fn bring_columns(values: &mut [f32], norms: &[f32]) {
    let mut squares = vec![0.0_f64; norms.len()];
    for row in values.chunks_exact(norms.len().max(1)) {
        for (sum, w) in squares.iter_mut().zip(row) {
            *sum += f64::from(*w).powi(2);
        }
    }
    let factors = squares.iter().zip(norms);
    let factors: Vec<f64> = factors.map(|(sum, m)| f64::from(*m) / sum.sqrt()).collect();
    for row in values.chunks_exact_mut(norms.len().max(1)) {
        for (w, factor) in row.iter_mut().zip(&factors) {
            *w = (f64::from(*w) * factor) as f32;
        }
    }
}
