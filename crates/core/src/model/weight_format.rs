use super::ModelPlan;
use crate::adapter::{Attachment, Site, SiteId, SiteKind};
use crate::io::ModelFiles;
use ferrotune_kernels::DType;
use ferrotune_kernels::dequantise::FourBitFormat;
use std::collections::BTreeSet;

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

/// Whether a tied head has a table of its own, because the embedding's is trained and it keeps the base's.
fn copies_head(plan: &ModelPlan, attachments: &[(SiteId, Attachment)]) -> bool {
    use Attachment::{KeepBase, LowRank, TrainBase, TrainRows};
    let at = |id: SiteId| {
        let here = attachments.iter().filter(move |(site, _)| *site == id);
        here.map(|(_, attachment)| attachment)
    };
    let trained = |a: &Attachment| matches!(a, TrainBase { .. } | TrainRows { .. });
    let tied_to = plan.site(plan.head).tied_to;
    let keeps = at(plan.head).any(|a| matches!(a, KeepBase));
    let updates = at(plan.head).any(|a| matches!(a, LowRank(_)));
    let embedding_trained = tied_to.is_some_and(|id| at(id).any(trained));
    keeps || (updates && embedding_trained)
}

impl WeightFormat {
    /// Bytes of all weights that are held frozen beside `attachments`, each that is shared counted once. What
    /// `files` have in 4 bits counts as there.
    #[must_use]
    pub fn bytes(
        &self,
        plan: &ModelPlan,
        attachments: &[(SiteId, Attachment)],
        files: Option<&ModelFiles>,
    ) -> u64 {
        let is_trained = |site: &Site| {
            let at = |(id, attachment): &(SiteId, Attachment)| {
                *id == site.id && matches!(attachment, Attachment::TrainBase { .. })
            };
            attachments.iter().any(at)
        };
        let mut held = BTreeSet::new();
        let own = plan.sites.iter().filter(|site| site.tied_to.is_none());
        let own = own.filter(|site| !is_trained(site) && held.insert(&site.stored_name));
        let head = Some(plan.site(plan.head)).filter(|_| copies_head(plan, attachments));
        own.chain(head)
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
