//! Parts of the base that are trained beside an adapter, whatever its method: whole modules (`modules_to_save`) and
//! biases (`bias`).
//!
//! # Source
//! PEFT's `_set_trainable`, `_mark_only_adapters_as_trainable` and `_get_learnable_bias_state_dict`, which are the same
//! for all methods.

mod copies;
mod saved;
pub(crate) mod tied;

pub(crate) use copies::{differ, repeated};

use crate::names::{self, Part};
use crate::target::{TargetModules, last_segment};
use ferrotune_core::adapter::{Attachment, Site, SiteId, SiteKind};
use ferrotune_core::params::{ParamId, ParamLayoutBuilder, ParamSpec};
use ferrotune_core::{Error, Result};
use std::collections::BTreeSet;
use tied::{Kept, Pair};

/// Which biases of the base are trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Biases {
    /// `"none"`.
    #[default]
    None,
    /// `"all"`: every bias of the model.
    All,
    /// `"lora_only"`, `"vera_only"` and so on: those of adapted linears.
    Adapted,
}

/// What a configuration says of whole modules.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<'a> {
    pub(crate) modules_to_save: &'a [String],
    /// `ensure_weight_tying`: a head that shares its weight with the embedding keeps sharing it.
    pub(crate) keeps_tied: bool,
    pub(crate) target_modules: Option<&'a TargetModules>,
}

/// What is trained as a whole on a model of `sites`.
pub(crate) struct Whole<'a> {
    names: &'a [String],
    sites: &'a [Site],
    /// Of a pair that stays tied, the embedding stands for both.
    saved: Vec<&'a Site>,
    /// The pair that stays tied, by this or by an update.
    pub(crate) pair: Option<Pair<'a>>,
}

impl<'a> Whole<'a> {
    /// # Errors
    /// [`Error::Config`] for a name that means nothing.
    pub(crate) fn of(wanted: Wanted<'a>, sites: &'a [Site]) -> Result<Self> {
        let pair = Pair::of(wanted, sites)?;
        let mut saved = saved::sites(sites, wanted.modules_to_save)?;
        if let Some(pair) = pair.as_ref().filter(|pair| pair.kept == Kept::Whole) {
            pair.move_whole(&mut saved);
        }
        Ok(Self {
            names: wanted.modules_to_save,
            sites,
            saved,
            pair,
        })
    }

    fn has(&self, id: SiteId) -> bool {
        self.saved.iter().any(|site| site.id == id)
    }

    fn keeps_tied(&self) -> bool {
        let kept = self.pair.as_ref().map(|pair| pair.kept);
        kept == Some(Kept::Whole)
    }

    /// The head that is tied to `table`.
    fn head_of(&self, table: &Site) -> Option<&'a Site> {
        let mut sites = self.sites.iter();
        sites.find(|other| other.tied_to == Some(table.id))
    }

    /// Takes what is trained as a whole out of `selected`: it is not adapted too.
    pub(crate) fn leave_out(&self, selected: &mut Vec<&Site>) {
        let embedding = self.pair.as_ref().map(|pair| pair.embedding.id);
        let stands_whole = |site: &Site| {
            let is_embedding = Some(site.id) == embedding && self.has(site.id);
            is_embedding || saved::shadows(self.names, &site.name)
        };
        selected.retain(|site| !stands_whole(site));
    }

    /// Refuses targets of which nothing is left, and one that is trained as a whole too: a name that is the end of a
    /// path, but no whole segment of it, trains what it does not take out of the targets. PEFT 0.21.2 refuses to make
    /// such a model, or to save it.
    ///
    /// # Errors
    /// [`Error::Config`] naming `modules_to_save`.
    pub(crate) fn require_some(&self, targets: &[&Site]) -> Result<()> {
        if let Some(both) = targets.iter().find(|site| self.has(site.id)) {
            let path = both.name.as_str();
            let name = self.names.iter().find(|name| saved::means(name, path));
            let name = name.map_or("", String::as_str);
            let message = format!(
                "entry `{name}` trains `{path}` as a whole, for its path, or that of a module around it, ends so, and \
                 `target_modules` adapts it; give the whole path of what it is to mean, or take it or `{}` out",
                last_segment(path)
            );
            return Err(Error::config("modules_to_save", message));
        }
        if !targets.is_empty() {
            return Ok(());
        }
        let whole = self.names.iter().map(|name| format!("`{name}`"));
        let whole = whole.collect::<Vec<_>>().join(", ");
        let message = format!(
            "names only what `modules_to_save` trains as a whole ({whole}), so nothing is left to adapt; take it \
             out of one of them"
        );
        Err(Error::config("target_modules", message))
    }

    /// Everything that stands beside the updates of `adapted`.
    pub(crate) fn attach(
        &self,
        biases: Biases,
        adapted: &BTreeSet<SiteId>,
        params: &mut ParamLayoutBuilder,
    ) -> Vec<(SiteId, Attachment)> {
        let mut attachments = self.declare(params);
        let taken = attachments.iter().map(|(id, _)| *id);
        let taken = taken.chain(adapted.iter().copied()).collect();
        attachments.extend(self.kept_heads(&taken));
        let biases = self.biases(biases, adapted).into_iter();
        attachments.extend(biases.map(|(site, part)| {
            let bias = Attachment::TrainBias(vector(site, part, params));
            (site.id, bias)
        }));
        attachments
    }

    /// Declares weights and biases of the modules.
    pub(crate) fn declare(&self, params: &mut ParamLayoutBuilder) -> Vec<(SiteId, Attachment)> {
        let train = |site: &&Site| {
            let sharing = self.head_of(site).filter(|_| self.keeps_tied());
            (site.id, train(site, sharing, params))
        };
        self.saved.iter().map(train).collect()
    }

    /// Heads that stay the base's while the embedding they are tied to does not: those where nothing else stands.
    pub(crate) fn kept_heads(
        &self,
        taken: &BTreeSet<SiteId>,
    ) -> impl Iterator<Item = (SiteId, Attachment)> {
        let heads = self.saved.iter().filter_map(|site| self.head_of(site));
        heads
            .filter(|head| !self.keeps_tied() && !taken.contains(&head.id))
            .map(|head| (head.id, Attachment::KeepBase))
    }

    /// The biases to train, beside those of whole modules, with what they are called.
    pub(crate) fn biases(
        &self,
        biases: Biases,
        adapted: &BTreeSet<SiteId>,
    ) -> Vec<(&'a Site, Part)> {
        let free = self.sites.iter().filter(|s| s.bias && !self.has(s.id));
        free.filter_map(|site| match (biases, adapted.contains(&site.id)) {
            (Biases::None, _) | (Biases::Adapted, false) => None,
            (_, true) => Some((site, Part::AdaptedBias)),
            (Biases::All, false) => Some((site, Part::Bias)),
        })
        .collect()
    }
}

/// Declares weight and bias of a site that is trained as a whole, and whose weight is also that of `sharing`.
fn train(site: &Site, sharing: Option<&Site>, params: &mut ParamLayoutBuilder) -> Attachment {
    let shape = match site.kind {
        SiteKind::Norm => vec![site.out_features],
        SiteKind::Linear | SiteKind::Embedding => vec![site.out_features, site.in_features],
    };
    let name = names::tensor(&site.name, Part::Weight);
    let mut weight = ParamSpec::new(name, shape, site.execution_order);
    weight.transposed = site.stored_transposed;
    weight.also = sharing.map(|site| names::tensor(&site.name, Part::Weight));
    Attachment::TrainBase {
        weight: params.add(weight),
        bias: site.bias.then(|| vector(site, Part::Bias, params)),
    }
}

/// Declares one value per feature of the output.
pub(crate) fn vector(site: &Site, part: Part, params: &mut ParamLayoutBuilder) -> ParamId {
    let name = names::tensor(&site.name, part);
    params.add(ParamSpec::new(
        name,
        [site.out_features],
        site.execution_order,
    ))
}
