//! What a LoRA trains where: its updates, and the parts of the base that it trains beside them.

#[cfg(test)]
mod tests;

use super::config::LoraBias;
use super::names::{self, Part};
use super::tied::{self, Kept, Pair};
use super::{LoraConfig, TokenIndices, files, saved, tokens};
use crate::target::{self, Target, TargetModules};
use ferrotune_core::adapter::{Attachment, LowRank, Magnitude, Site, SiteId, SiteKind};
use ferrotune_core::params::{ParamId, ParamLayoutBuilder, ParamSpec};
use ferrotune_core::{Error, Result};
use std::collections::BTreeSet;

/// Everything that `config`, or a file that says so, attaches to a model of `sites`.
pub(super) fn attach(
    config: &LoraConfig,
    of_file: bool,
    sites: &[Site],
    params: &mut ParamLayoutBuilder,
) -> Result<Vec<(SiteId, Attachment)>> {
    require_stack(&config.layer_replication, sites)?;
    let mut attachments = Vec::new();
    let tied = Pair::of(config, sites)?;
    let saved = saved_sites(config, sites, tied.as_ref())?;
    let (targets, head) = targets(config, of_file, sites, &saved, tied.as_ref())?;
    for target in &targets {
        require_adaptable(config, target.site)?;
        require_startable(config, target)?;
        let follower = head.filter(|head| head.site.tied_to == Some(target.site.id));
        let low_rank = declare(config, target, follower.map(|head| head.site), params);
        attachments.push((target.site.id, Attachment::LowRank(low_rank)));
        if let Some(head) = follower {
            let scale = config.scale(head.rank, head.alpha);
            let low_rank = LowRank { scale, ..low_rank };
            attachments.push((head.site.id, Attachment::LowRank(low_rank)));
        }
    }
    let kept_whole = tied.is_some_and(|pair| pair.kept == Kept::Whole);
    for site in &saved {
        let sharing = head_of(sites, site).filter(|_| kept_whole);
        attachments.push((site.id, train(site, sharing, params)));
    }
    let taken: BTreeSet<SiteId> = attachments.iter().map(|(id, _)| *id).collect();
    if let Some(indices) = &config.trainable_token_indices {
        let key = "trainable_token_indices";
        for rows in tokens::rows(key, indices, sites, config.ensure_weight_tying)? {
            require_free(sites, rows.site, &taken, |head| {
                follows(indices, head, &targets)
            })?;
            attachments.push((rows.site.id, tokens::declare(rows, Part::TokenRows, params)));
        }
    }
    for head in saved.iter().filter_map(|site| head_of(sites, site)) {
        if !kept_whole && !attachments.iter().any(|(id, _)| *id == head.id) {
            attachments.push((head.id, Attachment::KeepBase));
        }
    }
    let adapted: BTreeSet<SiteId> = targets.iter().map(|target| target.site.id).collect();
    let whole: BTreeSet<SiteId> = saved.iter().map(|site| site.id).collect();
    for site in sites.iter().filter(|s| s.bias && !whole.contains(&s.id)) {
        let is_adapted = adapted.contains(&site.id);
        let part = match (config.bias, is_adapted) {
            (LoraBias::None, _) | (LoraBias::LoraOnly, false) => continue,
            (_, true) => Part::AdaptedBias,
            (LoraBias::All, false) => Part::Bias,
        };
        require_unshared(config, site)?;
        attachments.push((site.id, Attachment::TrainBias(vector(site, part, params))));
    }
    if let Some(tokens) = &config.alora_invocation_tokens {
        attachments.push(invocation(tokens, sites)?);
    }
    Ok(attachments)
}

/// The head that is tied to `table`.
fn head_of<'a>(sites: &'a [Site], table: &Site) -> Option<&'a Site> {
    sites.iter().find(|other| other.tied_to == Some(table.id))
}

/// The tokens that call updates up, at the embedding that knows them.
fn invocation(tokens: &[u32], sites: &[Site]) -> Result<(SiteId, Attachment)> {
    let key = "alora_invocation_tokens";
    let table = sites.iter().find(|site| site.kind == SiteKind::Embedding);
    let table = table.ok_or_else(|| Error::config(key, "the model has no embedding"))?;
    match tokens.iter().find(|&&id| id as usize >= table.out_features) {
        None => Ok((table.id, Attachment::Invocation(tokens.to_vec()))),
        Some(id) => {
            let message = format!(
                "token {id} is none of the {} of `{}`",
                table.out_features, table.name
            );
            Err(Error::config(key, message))
        }
    }
}

/// Refuses sites of another stack of layers than `ranges` make.
fn require_stack(ranges: &[[usize; 2]], sites: &[Site]) -> Result<()> {
    let order: Vec<usize> = ranges.iter().flat_map(|&[start, end]| start..end).collect();
    let fits = |site: &Site| {
        let Some(layer) = site.layer else {
            return true;
        };
        let source = order.get(layer).map(|source| {
            let [at, from] = [layer, *source].map(|number| format!(".{number}."));
            site.name.replacen(&at, &from, 1)
        });
        source.is_some_and(|name| name == site.stored_name)
    };
    let knows_layers = sites.iter().any(|site| site.layer.is_some());
    if order.is_empty() || (knows_layers && sites.iter().all(fits)) {
        return Ok(());
    }
    Err(Error::config(
        "layer_replication",
        "the model has other layers than it asks for: it must be the one that `Adapter::decoder` makes of the base, \
         whose architecture must be known",
    ))
}

/// Refuses to train a bias that copies of a layer share.
fn require_unshared(config: &LoraConfig, site: &Site) -> Result<()> {
    if config.layer_replication.is_empty() {
        return Ok(());
    }
    Err(Error::config(
        "bias",
        format!(
            "{} trains the bias of `{}`, which the copies of `layer_replication` share, and a file of PEFT has no way \
             to say so; set it to none",
            config.bias.as_str(),
            site.name
        ),
    ))
}

/// The sites trained as a whole; of a pair that stays tied, the embedding stands for both.
fn saved_sites<'a>(
    config: &LoraConfig,
    sites: &'a [Site],
    tied: Option<&Pair<'a>>,
) -> Result<Vec<&'a Site>> {
    let mut saved = saved::sites(sites, &config.modules_to_save)?;
    if let Some(pair) = tied.filter(|pair| pair.kept == Kept::Whole) {
        pair.move_whole(&mut saved);
    }
    Ok(saved)
}

/// What is adapted, which is nothing that is trained as a whole, and the head that follows its embedding.
fn targets<'a>(
    config: &LoraConfig,
    of_file: bool,
    sites: &'a [Site],
    saved: &[&Site],
    tied: Option<&Pair<'a>>,
) -> Result<(Vec<Target<'a>>, Option<Target<'a>>)> {
    let selection = config.selection()?;
    let mut selected = target::select(sites, &selection)?;
    let stands_whole = |site: &Site| {
        let embedding = tied.map(|pair| pair.embedding.id);
        let is_whole = Some(site.id) == embedding && saved.iter().any(|whole| whole.id == site.id);
        is_whole || saved::shadows(&config.modules_to_save, &site.name)
    };
    selected.retain(|site| !stands_whole(site));
    let head = tied.and_then(|pair| pair.move_update(config, &mut selected));
    if selected.is_empty() {
        let whole = config
            .modules_to_save
            .iter()
            .map(|name| format!("`{name}`"));
        let whole = whole.collect::<Vec<_>>().join(", ");
        let message = format!(
            "names only what `modules_to_save` trains as a whole ({whole}), so nothing is left to adapt; take it \
             out of one of them"
        );
        return Err(Error::config("target_modules", message));
    }
    let named = || selected.iter().copied().chain(head);
    let names: Vec<&str> = named().map(|site| site.name.as_str()).collect();
    let values = config.rank_and_alpha().resolve(&names)?;
    match config.rank_and_alpha().require_each_decides(&names) {
        // PEFT reads it, and the model is what it says.
        Err(error) if of_file => tracing::warn!("{error}"),
        decided => decided?,
    }
    let with_values = named().zip(values);
    let mut targets: Vec<Target<'_>> = with_values
        .map(|(site, (rank, alpha))| Target { site, rank, alpha })
        .collect();
    let head = head.and_then(|_| targets.pop());
    if *selection.target_modules == TargetModules::AllLinear {
        files::require_expressible(sites, &targets)?;
    }
    if let Some(pair) = tied {
        pair.require_possible(config, &targets)?;
    }
    Ok((targets, head))
}

/// Whether a head that is tied to a table with rows of `tokens` has them below an update of its own.
fn follows(tokens: &TokenIndices, head: &Site, targets: &[Target<'_>]) -> bool {
    let is_named = match tokens {
        TokenIndices::Embedding(_) => false,
        TokenIndices::Modules(modules) => modules.iter().any(|(name, _)| head.name.ends_with(name)),
    };
    !is_named && targets.iter().any(|target| target.site.id == head.id)
}

/// Refuses rows of a table that is adapted or trained as a whole, itself or where it is shared by a head that does
/// not follow.
fn require_free(
    sites: &[Site],
    table: &Site,
    taken: &BTreeSet<SiteId>,
    follows: impl Fn(&Site) -> bool,
) -> Result<()> {
    let shares =
        |site: &&Site| site.id == table.id || (site.tied_to == Some(table.id) && !follows(site));
    match sites.iter().filter(shares).find(|s| taken.contains(&s.id)) {
        None => Ok(()),
        Some(site) => Err(Error::config(
            "trainable_token_indices",
            format!(
                "trains rows of `{}`, and `{}` is adapted or trained as a whole as well; leave one of \
                 them out",
                table.name, site.name
            ),
        )),
    }
}

/// Declares A and B of one target, which are those of the head that `follows` it too.
fn declare(
    config: &LoraConfig,
    target: &Target<'_>,
    follows: Option<&Site>,
    params: &mut ParamLayoutBuilder,
) -> LowRank {
    let (site, rank) = (target.site, target.rank);
    let mut add = |part, shape: [usize; 2]| {
        let name = names::tensor(&site.name, part);
        let mut spec = ParamSpec::new(name, shape, site.execution_order);
        spec.also = follows.and_then(|head| tied::twin_of(head, part));
        // Every A of linears over one input, then every B.
        spec.within = usize::from(part != Part::A);
        let transposed = matches!(part, Part::EmbeddingA | Part::EmbeddingB);
        params.add(if transposed { spec.transposed() } else { spec })
    };
    // A table is the transpose of PEFT's linear from tokens to features: its A and B change places.
    let [a, b] = match site.kind {
        SiteKind::Embedding => [Part::EmbeddingB, Part::EmbeddingA],
        _ => [Part::A, Part::B],
    };
    let (a, b) = (
        add(a, [rank, site.in_features]),
        add(b, [site.out_features, rank]),
    );
    LowRank {
        a,
        b,
        rank,
        scale: config.scale(rank, target.alpha),
        dropout: config.dropout as f32,
        bias: config
            .lora_bias
            .then(|| vector(site, Part::BiasOfB, params)),
        magnitude: config.use_dora.then(|| magnitude(site, params)),
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

/// Declares DoRA's norms, one per feature of the output.
fn magnitude(site: &Site, params: &mut ParamLayoutBuilder) -> Magnitude {
    match site.kind {
        SiteKind::Embedding => {
            let name = names::tensor(&site.name, Part::Magnitude);
            let spec = ParamSpec::new(name, [site.in_features], site.execution_order);
            Magnitude::OfColumns(params.add(spec))
        }
        SiteKind::Linear | SiteKind::Norm => {
            Magnitude::OfRows(vector(site, Part::Magnitude, params))
        }
    }
}

fn vector(site: &Site, part: Part, params: &mut ParamLayoutBuilder) -> ParamId {
    let name = names::tensor(&site.name, part);
    params.add(ParamSpec::new(
        name,
        [site.out_features],
        site.execution_order,
    ))
}

/// Refuses targets whose weight or input a start cannot be made of.
fn require_startable(config: &LoraConfig, target: &Target<'_>) -> Result<()> {
    let (init, Target { site, rank, .. }) = (config.init_lora_weights, *target);
    let Some((most, why)) = init.most([site.out_features, site.in_features]) else {
        return Ok(());
    };
    let name = init.name();
    if site.kind != SiteKind::Linear || site.output_head {
        let message = format!(
            "{name} is for linears inside the layers, and `{}` is none; leave that out",
            site.name
        );
        return Err(Error::config("init_lora_weights", message));
    }
    if rank > most {
        let message = format!(
            "{rank} is more than {most}, the most that {name} finds for `{}` of {} x {}, where a rank takes {why}; \
             lower it, for that module alone by `rank_pattern`",
            site.name, site.out_features, site.in_features
        );
        return Err(Error::config("r", message));
    }
    Ok(())
}

fn require_adaptable(config: &LoraConfig, site: &Site) -> Result<()> {
    if site.kind == SiteKind::Norm {
        return Err(Error::config(
            "target_modules",
            format!(
                "`{}` is a norm, and LoRA needs a linear layer or an embedding; leave it out, put it into \
                 `exclude_modules`, or train it as a whole with `modules_to_save`",
                site.name
            ),
        ));
    }
    if config.alora_invocation_tokens.is_some()
        && (site.kind == SiteKind::Embedding || site.output_head)
    {
        return Err(Error::config(
            "alora_invocation_tokens",
            format!(
                "is for linears inside the layers, and `{}` is none; leave that out of `target_modules`",
                site.name
            ),
        ));
    }
    if config.lora_bias && site.kind == SiteKind::Embedding {
        return Err(Error::config(
            "lora_bias",
            format!(
                "true gives B a bias, and PEFT has none for an embedding such as `{}`; leave that out of \
                 `target_modules`, or this off",
                site.name
            ),
        ));
    }
    if config.use_dora && site.output_head {
        return Err(Error::config(
            "use_dora",
            format!(
                "true is not supported yet on `{}`, only on linears inside the layers and on embeddings; leave \
                 that out",
                site.name
            ),
        ));
    }
    Ok(())
}
