//! Widths and attachments of the layers, which say what a step holds and computes.

use crate::adapter::{Attachment, SiteId};
use crate::model::{DecoderConfig, LayerPlan, ModelPlan};
use std::collections::BTreeMap;

/// One decoder layer.
#[derive(Clone, Debug)]
pub(super) struct LayerShape {
    pub(super) qkv: GroupShape,
    pub(super) o: GroupShape,
    pub(super) gate_up: GroupShape,
    pub(super) down: GroupShape,
    /// Whether anything in it is trained, norms included.
    pub(super) trained: bool,
    pub(super) input_norm_trained: bool,
}

/// Linears over one input.
#[derive(Clone, Debug)]
pub(super) struct GroupShape {
    pub(super) in_features: usize,
    pub(super) out_features: usize,
    pub(super) parts: Vec<PartShape>,
}

/// One linear.
#[derive(Clone, Copy, Debug)]
pub(super) struct PartShape {
    pub(super) in_features: usize,
    pub(super) out_features: usize,
    pub(super) method: Method,
}

/// What is attached to a linear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    Frozen,
    LowRank { rank: usize, dropout: bool },
    TrainBase,
    TrainBias,
    Custom,
}

/// The layers of `config` with `attachments`, and what stands at the embedding and at the head.
pub(super) fn layers(
    config: &DecoderConfig,
    attachments: &[(SiteId, Attachment)],
) -> (Vec<LayerShape>, [Method; 2]) {
    let plan = ModelPlan::new(config);
    let mut methods: BTreeMap<SiteId, Method> = BTreeMap::new();
    for (site, attachment) in attachments {
        // A trained bias beside another method adds nothing that is held.
        match attachment {
            Attachment::TrainBias(_) => {
                methods.entry(*site).or_insert(Method::TrainBias);
            }
            other => drop(methods.insert(*site, method(other))),
        }
    }
    let layers = plan.layers.iter().map(|l| layer(&plan, &methods, l));
    let at = |site| methods.get(&site).copied().unwrap_or(Method::Frozen);
    (layers.collect(), [plan.embedding, plan.head].map(at))
}

fn method(attachment: &Attachment) -> Method {
    match attachment {
        Attachment::TrainBias(_) => Method::TrainBias,
        Attachment::KeepBase => Method::Frozen,
        Attachment::LowRank(low_rank) => Method::LowRank {
            rank: low_rank.rank,
            dropout: low_rank.dropout > 0.0,
        },
        Attachment::TrainBase { .. } | Attachment::TrainRows { .. } => Method::TrainBase,
        Attachment::Custom(_) => Method::Custom,
    }
}

fn layer(plan: &ModelPlan, methods: &BTreeMap<SiteId, Method>, layer: &LayerPlan) -> LayerShape {
    let group = |sites: &[SiteId]| GroupShape {
        in_features: plan.site(sites[0]).in_features,
        out_features: sites.iter().map(|&id| plan.site(id).out_features).sum(),
        parts: sites
            .iter()
            .map(|&id| PartShape {
                in_features: plan.site(id).in_features,
                out_features: plan.site(id).out_features,
                method: methods.get(&id).copied().unwrap_or(Method::Frozen),
            })
            .collect(),
    };
    let [qkv, o, gate_up, down] = [
        group(&[layer.q, layer.k, layer.v]),
        group(&[layer.o]),
        group(&[layer.gate, layer.up]),
        group(&[layer.down]),
    ];
    let input_norm_trained = methods.contains_key(&layer.input_norm);
    let in_linears = [&qkv, &o, &gate_up, &down]
        .iter()
        .flat_map(|group| &group.parts)
        .any(|part| part.method != Method::Frozen);
    LayerShape {
        trained: in_linears || input_norm_trained || methods.contains_key(&layer.mlp_norm),
        input_norm_trained,
        qkv,
        o,
        gate_up,
        down,
    }
}
