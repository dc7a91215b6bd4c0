//! `ensure_weight_tying`: an input embedding and a head that share a weight, and keep sharing it.

use super::Wanted;
use crate::files::Weights;
use crate::lora::LoraConfig;
use crate::modules::EMBEDDINGS;
use crate::names::{self, Part};
use crate::target::{Expression, Target, TargetModules, last_segment};
use ferrotune_core::adapter::Site;
use ferrotune_core::{Error, Result};
use std::path::Path;

/// What PEFT looks for. GPT-2's embedding is called otherwise, so naming that alone keeps nothing tied.
const HEAD: &str = "lm_head";
const TIED: [&str; 2] = ["embed_tokens", HEAD];

/// How the pair stays one weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kept {
    /// It is trained as a whole.
    Whole,
    /// Both have one update.
    Updates,
}

/// What is kept tied as `wanted`, if anything: `modules_to_save` comes before `target_modules`.
///
/// # Errors
/// [`Error::Config`] if `target_modules` is no regular expression.
///
/// # Source
/// PEFT's `_check_tied_modules`.
pub(crate) fn kept(wanted: Wanted<'_>) -> Result<Option<Kept>> {
    let named = |name: &String| TIED.contains(&last_segment(name));
    if !wanted.keeps_tied {
        return Ok(None);
    }
    if wanted.modules_to_save.iter().any(named) {
        return Ok(Some(Kept::Whole));
    }
    let updates = match wanted.target_modules {
        None | Some(TargetModules::AllLinear) => false,
        Some(TargetModules::List(names)) => names.iter().any(named),
        Some(TargetModules::Regex(source)) => {
            let expression = Expression::full("target_modules", source)?;
            expression.matches(TIED[0])? || expression.matches(TIED[1])?
        }
    };
    Ok(updates.then_some(Kept::Updates))
}

/// The input embedding and the head that shares its weight.
pub(crate) struct Pair<'a> {
    pub(crate) embedding: &'a Site,
    pub(crate) head: &'a Site,
    pub(crate) kept: Kept,
}

impl<'a> Pair<'a> {
    /// What stays tied on a model of `sites`.
    pub(super) fn of(wanted: Wanted<'_>, sites: &'a [Site]) -> Result<Option<Self>> {
        let pair = sites.iter().find_map(|head| {
            let embedding = sites.iter().find(|site| Some(site.id) == head.tied_to)?;
            Some((embedding, head))
        });
        let kept = kept(wanted)?.zip(pair);
        Ok(kept.map(|(kept, (embedding, head))| Self {
            embedding,
            head,
            kept,
        }))
    }

    fn has(&self, site: &Site) -> bool {
        site.id == self.embedding.id || site.id == self.head.id
    }

    /// The sites trained as a whole; the embedding stands for both of the pair.
    pub(super) fn move_whole(&self, saved: &mut Vec<&'a Site>) {
        if saved.iter().any(|site| self.has(site)) {
            saved.retain(|site| !self.has(site));
            saved.insert(0, self.embedding);
        }
    }

    /// Where one of the pair is adapted, the embedding is, and the head follows, by its own alpha and rank as
    /// far as the scale goes: returns it. A whole path, which PEFT takes the embedding's for, passes any filter
    /// of layers.
    pub(crate) fn move_update(
        &self,
        config: &LoraConfig,
        targets: &mut Vec<&'a Site>,
    ) -> Option<&'a Site> {
        let any_layer = config.layers_to_transform.is_some();
        if self.kept != Kept::Updates || !(any_layer || targets.iter().any(|site| self.has(site))) {
            return None;
        }
        targets.retain(|site| !self.has(site));
        targets.insert(0, self.embedding);
        Some(self.head)
    }

    /// Refuses an update of the head where the pair is trained as a whole, and DoRA's norms of both.
    pub(crate) fn require_possible(
        &self,
        config: &LoraConfig,
        targets: &[Target<'_>],
    ) -> Result<()> {
        let [embedding, head] = [&self.embedding.name, &self.head.name];
        let is_adapted = |of: &Site| targets.iter().any(|target| target.site.id == of.id);
        let message = match self.kept {
            Kept::Whole if is_adapted(self.head) => format!(
                "keeps `{embedding}` and `{head}` one weight, and one of them is adapted and the other trained as \
                 a whole; leave one out of `target_modules` or `modules_to_save`"
            ),
            Kept::Updates if config.use_dora && is_adapted(self.embedding) => {
                "true beside `use_dora`: an update whose norms are those of the embedding's columns is none of the \
                 head's rows; switch one off, or leave the embedding out"
                    .to_owned()
            }
            _ => return Ok(()),
        };
        Err(Error::config("ensure_weight_tying", message))
    }
}

/// Completes what the configuration of the adapter in `directory` says, as it was trained. PEFT's file names the
/// embedding alone where the pair stayed tied; where PEFT would not know that one for it again, the head's own tensors
/// tell.
///
/// # Errors
/// As [`kept`].
pub(crate) fn with_head(
    keeps_tied: bool,
    modules_to_save: &mut Vec<String>,
    target_modules: &mut Option<TargetModules>,
    directory: &Path,
) -> Result<()> {
    let wanted = Wanted {
        modules_to_save,
        keeps_tied,
        target_modules: target_modules.as_ref(),
    };
    if !keeps_tied || kept(wanted)?.is_some() {
        return Ok(());
    }
    // What is wrong with the file is said where its tensors are wanted.
    let Ok(weights) = Weights::open(directory) else {
        return Ok(());
    };
    // Without the embedding, it is a copy of the base's, and so it is where copies show what is trained and it is not.
    let has = |part, named: &[String]| {
        let is_table = |name: &String| EMBEDDINGS.contains(&last_segment(name));
        let own = weights.file.meta(&names::tensor(HEAD, part));
        own.is_some() && named.iter().any(is_table)
    };
    let originals: Vec<&str> = weights
        .file
        .names()
        .filter(|name| names::without(name, names::ORIGINAL).is_some())
        .collect();
    let of_head = format!(".{HEAD}.{}.", names::ORIGINAL);
    let is_trained = originals.is_empty() || originals.iter().any(|name| name.contains(&of_head));
    if is_trained && has(Part::Weight, modules_to_save) {
        modules_to_save.push(HEAD.into());
    } else if let Some(TargetModules::List(names)) = target_modules
        && has(Part::A, names)
    {
        names.push(HEAD.into());
    }
    Ok(())
}

/// The name under which files have a factor of the embedding's update once more, for the head.
pub(crate) fn twin_of(head: &Site, part: Part) -> Option<String> {
    let twin = match part {
        Part::EmbeddingB => Part::A,
        Part::EmbeddingA => Part::B,
        _ => return None,
    };
    Some(names::tensor(&head.name, twin))
}
