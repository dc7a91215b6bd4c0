use super::ModelPlan;
use crate::adapter::{Site, SiteKind};
use crate::io::ModelFiles;
use ferrotune_kernels::DType;
use ferrotune_kernels::dequantise::FourBitFormat;

/// How the frozen weights of a model are held, and what products read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightFormat {
    /// Dtype of the values in products, and of what is held as values.
    pub dtype: DType,
    /// Holds the linears of the layers as 4-bit codes; embedding, head, norms and biases stay values.
    /// Weights that are codes in their file stay those, whatever this says.
    pub four_bit: Option<FourBitFormat>,
}

impl From<DType> for WeightFormat {
    fn from(dtype: DType) -> Self {
        Self {
            dtype,
            four_bit: None,
        }
    }
}

impl WeightFormat {
    /// Bytes of all weights, each that is shared counted once. What `files` have in 4 bits counts as there.
    #[must_use]
    pub fn bytes(&self, plan: &ModelPlan, files: Option<&ModelFiles>) -> u64 {
        plan.owners()
            .map(|site| self.bytes_of(site, files) as u64)
            .sum()
    }

    fn bytes_of(&self, site: &Site, files: Option<&ModelFiles>) -> usize {
        let (values, weights) = (self.dtype.bytes(), site.out_features * site.in_features);
        let bias = if site.bias {
            site.out_features * values
        } else {
            0
        };
        let in_files = files.and_then(|f| f.four_bit_format(&site.tensor("weight")));
        let in_layer = site.kind == SiteKind::Linear && site.layer.is_some();
        match in_files.or(self.four_bit.filter(|_| in_layer)) {
            Some(format) => format.bytes(weights) + bias,
            None => weights * values + bias,
        }
    }
}
