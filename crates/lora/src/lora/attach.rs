//! What a LoRA trains where: its updates, and the parts of the base that it trains beside them.

#[cfg(test)]
mod tests;

use super::{LoraConfig, TokenIndices, files, tokens};
use crate::beside::{Whole, tied, vector};
use crate::names::{self, Part};
use crate::target::{self, Target, TargetModules};
use ferrotune_core::adapter::{Attachment, LowRank, Magnitude, Site, SiteId, SiteKind};
use ferrotune_core::params::{ParamLayoutBuilder, ParamSpec};
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
    let whole = Whole::of(config.wanted(), sites)?;
    let (targets, head) = targets(config, of_file, sites, &whole)?;
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
    attachments.extend(whole.declare(params));
    let taken: BTreeSet<SiteId> = attachments.iter().map(|(id, _)| *id).collect();
    if let Some(indices) = &config.trainable_token_indices {
        let key = "trainable_token_indices";
        for rows in tokens::rows(key, indices, sites, config.ensure_weight_tying)? {
            require_free(sites, rows.site, &taken, |head| {
                follows(indices, head, &targets)
            })?;
            require_plain_head(config, sites, rows.site, &taken)?;
            attachments.push((rows.site.id, tokens::declare(rows, Part::TokenRows, params)));
        }
    }
    let taken = attachments.iter().map(|(id, _)| *id).collect();
    attachments.extend(whole.kept_heads(&taken));
    let adapted = targets.iter().map(|target| target.site.id).collect();
    for (site, part) in whole.biases(config.bias.of_base(), &adapted) {
        require_unshared(config, site)?;
        attachments.push((site.id, Attachment::TrainBias(vector(site, part, params))));
    }
    if let Some(tokens) = &config.alora_invocation_tokens {
        attachments.push(invocation(tokens, sites)?);
    }
    Ok(attachments)
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

/// Refuses DoRA on a head that shares `table`, of which rows are trained: its norms are of all rows.
fn require_plain_head(
    config: &LoraConfig,
    sites: &[Site],
    table: &Site,
    taken: &BTreeSet<SiteId>,
) -> Result<()> {
    let mut heads = sites.iter().filter(|site| site.tied_to == Some(table.id));
    match heads.find(|head| config.use_dora && taken.contains(&head.id)) {
        None => Ok(()),
        Some(head) => Err(Error::config(
            "trainable_token_indices",
            format!(
                "trains rows of `{}`, which `{}` shares, and `use_dora` on that one is not supported beside them; leave \
                 one of both out",
                table.name, head.name
            ),
        )),
    }
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

/// What is adapted, which is nothing that is trained as a whole, and the head that follows its embedding.
fn targets<'a>(
    config: &LoraConfig,
    of_file: bool,
    sites: &'a [Site],
    whole: &Whole<'a>,
) -> Result<(Vec<Target<'a>>, Option<Target<'a>>)> {
    let selection = config.selection()?;
    let mut selected = target::select(sites, &selection)?;
    whole.leave_out(&mut selected);
    let pair = whole.pair.as_ref();
    let head = pair.and_then(|pair| pair.move_update(config, &mut selected));
    whole.require_some(&selected)?;
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
    if let Some(pair) = pair {
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
        let given = config.rank_and_alpha().given_rank(&site.name)?;
        return Err(given.error(|others| {
            format!(
                "more than {most}, the most that {name} finds for `{}` of {} x {}, where a rank takes {why}; take a \
                 smaller one{others}",
                site.name, site.out_features, site.in_features
            )
        }));
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
    Ok(())
}
