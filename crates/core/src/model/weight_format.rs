use super::{LayerPlan, ModelPlan};
use crate::adapter::{Attachment, Site, SiteId, SiteKind};
use crate::io::ModelFiles;
use ferrotune_kernels::DType;
use ferrotune_kernels::dequantise::QuantFormat;
use std::collections::BTreeSet;

/// How the frozen weights of a model are held, and what products read.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightFormat {
    /// Dtype of the values in products, and of what is held as values.
    pub dtype: DType,
    /// Holds linears of the layers as codes; embedding, head, norms and biases stay values. Weights that
    /// are codes in their file stay those, whatever this says.
    pub quantise: Option<Quantise>,
}

/// Which linears of the layers are quantised as they are read.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantise {
    /// What to.
    pub format: QuantFormat,
    /// Those that are not: names of modules, or what they begin or end with.
    pub skip_modules: Vec<String>,
}

impl Quantise {
    /// Whether `skip` names `module`, as in Transformers' `llm_int8_skip_modules`.
    #[must_use]
    pub fn skips(skip: &str, module: &str) -> bool {
        module.starts_with(skip) || module.ends_with(skip)
    }
}

impl From<QuantFormat> for Quantise {
    fn from(format: QuantFormat) -> Self {
        let skip_modules = Vec::new();
        Self {
            format,
            skip_modules,
        }
    }
}

impl From<DType> for WeightFormat {
    fn from(dtype: DType) -> Self {
        Self {
            dtype,
            quantise: None,
        }
    }
}

/// Whether a tied head has a frozen table of its own, because it keeps the base's or trains rows of it, or because
/// the embedding's is trained.
fn copies_head(plan: &ModelPlan, attachments: &[(SiteId, Attachment)]) -> bool {
    use Attachment::{Factors, KeepBase, LowRank, TrainBase, TrainRows, Weight};
    let at = |id: SiteId| {
        let here = attachments.iter().filter(move |(site, _)| *site == id);
        here.map(|(_, attachment)| attachment)
    };
    let trained = |a: &Attachment| matches!(a, TrainBase { .. } | TrainRows { .. });
    let Some(tied_to) = plan.site(plan.head).tied_to else {
        return false;
    };
    let own = at(plan.head).any(|a| matches!(a, KeepBase | TrainRows { .. }));
    let updates = at(plan.head).any(|a| matches!(a, LowRank(_) | Factors(_) | Weight(_)));
    own || (updates && at(tied_to).any(trained))
}

/// Linears over one input that are held as one matrix.
fn held_together<'a>(
    plan: &'a ModelPlan,
    attachments: &[(SiteId, Attachment)],
) -> Vec<&'a [SiteId]> {
    use Attachment::{TrainBase, Weight};
    let apart = |id: &SiteId| {
        let at = |(site, attachment): &(SiteId, Attachment)| {
            site == id && matches!(attachment, TrainBase { .. } | Weight(_))
        };
        attachments.iter().any(at)
    };
    let groups = plan.layers.iter().flat_map(LayerPlan::groups);
    let parts = groups.map(|ids| match ids.iter().any(apart) {
        true => ids.chunks(1),
        false => ids.chunks(ids.len()),
    });
    parts.flatten().collect()
}

impl WeightFormat {
    /// Whether linears that are quantised as they are read multiply bytes (`LLM.int8()`).
    pub(super) fn multiplies_bytes(&self) -> bool {
        let format = self.quantise.as_ref().map(|quantise| quantise.format);
        matches!(format, Some(QuantFormat::Int8 { .. }))
    }

    /// What the weight of `site` is quantised to as it is read.
    pub(super) fn of(&self, site: &Site) -> Option<QuantFormat> {
        let quantise = self.quantise.as_ref()?;
        let in_layer = site.kind == SiteKind::Linear && site.layer.is_some();
        let mut skip = quantise.skip_modules.iter();
        let skipped = skip.any(|skip| Quantise::skips(skip, &site.stored_name));
        (in_layer && !skipped).then_some(quantise.format)
    }

    /// Bytes of all weights that are held frozen beside `attachments`, each that is shared counted once. What
    /// `files` have as codes counts as there.
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
        let names = |ids: &[SiteId]| -> Vec<&String> {
            ids.iter().map(|&id| &plan.site(id).stored_name).collect()
        };
        let mut held = BTreeSet::new();
        let mut weights = 0;
        let mut in_layers: BTreeSet<SiteId> = BTreeSet::new();
        for ids in held_together(plan, attachments) {
            in_layers.extend(ids);
            // A copy of a layer shares matrices of the same linears.
            if !ids.iter().any(|&id| is_trained(plan.site(id))) && held.insert(names(ids)) {
                let each = ids.iter().map(|&id| self.bytes_of(plan.site(id), files));
                weights += each.sum::<usize>() as u64;
            }
        }
        let rest = plan.sites.iter().filter(|site| site.tied_to.is_none());
        let rest = rest.filter(|site| !in_layers.contains(&site.id) && !is_trained(site));
        let rest = rest.filter(|site| held.insert(vec![&site.stored_name]));
        let head = Some(plan.site(plan.head)).filter(|_| copies_head(plan, attachments));
        let rest = rest
            .chain(head)
            .map(|site| self.bytes_of(site, files) as u64);
        weights + rest.sum::<u64>() + self.biases(plan, is_trained)
    }

    /// Bytes of the biases of sites that are not trained: those of a layer are its copies' too.
    fn biases(&self, plan: &ModelPlan, is_trained: impl Fn(&Site) -> bool) -> u64 {
        let mut held = BTreeSet::new();
        let own = plan
            .sites
            .iter()
            .filter(|site| site.bias && !is_trained(site));
        let own = own.filter(|site| held.insert(&site.stored_name));
        own.map(|site| (site.out_features * self.dtype.bytes()) as u64)
            .sum()
    }

    /// Bytes of the weight of a site.
    fn bytes_of(&self, site: &Site, files: Option<&ModelFiles>) -> usize {
        let weights = site.out_features * site.in_features;
        let in_layer = site.kind == SiteKind::Linear && site.layer.is_some();
        let in_files = files.filter(|_| in_layer);
        let in_files = in_files.and_then(|f| f.quantised_bytes(&site.tensor("weight")));
        let shape = [site.out_features, site.in_features];
        let codes = in_files.or_else(|| Some(self.of(site)?.bytes(shape)));
        codes.unwrap_or(weights * self.dtype.bytes())
    }
}
