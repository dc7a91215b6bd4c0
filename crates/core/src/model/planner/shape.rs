//! Widths and attachments of the layers, which say what a step holds and computes.

use crate::adapter::{Attachment, SiteId};
use crate::model::room::{self, Rooms};
use crate::model::{DecoderConfig, LayerPlan, ModelPlan, QkNorm};
use ferrotune_kernels::{DType, Device};
use std::collections::BTreeMap;

/// One decoder layer.
#[derive(Clone, Debug)]
pub(super) struct LayerShape {
    pub(super) qkv: GroupShape,
    pub(super) o: GroupShape,
    pub(super) gate_up: GroupShape,
    pub(super) down: GroupShape,
    /// Columns of q and k with their norms and positions, beside the projection, where they have norms.
    pub(super) positioned: Option<QkNormShape>,
    /// Norms of what the blocks read.
    pub(super) input_norm: NormShape,
    pub(super) mlp_norm: NormShape,
    /// Norms of what the blocks write.
    pub(super) attention_norm: NormShape,
    pub(super) mlp_output_norm: NormShape,
    /// Whether what the blocks write is scaled.
    pub(super) scaled: bool,
    /// Whether anything in it is trained, norms included.
    pub(super) trained: bool,
    pub(super) input_norm_trained: bool,
}

impl LayerShape {
    pub(super) fn groups_mut(&mut self) -> [&mut GroupShape; 4] {
        [
            &mut self.qkv,
            &mut self.o,
            &mut self.gate_up,
            &mut self.down,
        ]
    }
}

/// Columns of the statistics of a norm; `None` where there is no norm.
pub(super) type NormShape = Option<usize>;

/// Norms of q and of k.
#[derive(Clone, Copy, Debug)]
pub(super) struct QkNormShape {
    /// Columns of q, and of k.
    pub(super) widths: [usize; 2],
    /// Heads of q, and of k.
    pub(super) heads: [usize; 2],
    /// Whether the norm of q, and of k, is trained.
    pub(super) trained: [bool; 2],
    pub(super) over: QkNorm,
}

/// Linears over one input.
#[derive(Clone, Debug)]
pub(super) struct GroupShape {
    pub(super) in_features: usize,
    pub(super) out_features: usize,
    pub(super) parts: Vec<PartShape>,
    /// As `LinearGroup` has it.
    pub(super) room: usize,
}

impl PartShape {
    /// Whether the gradient of the base output is another than that of the output.
    pub(super) fn changes_output(&self) -> bool {
        matches!(
            self.method,
            Method::Custom { .. } | Method::LowRank { scaled: true, .. }
        )
    }
}

impl GroupShape {
    /// Of the weight, with its margins.
    pub(super) fn elements(&self) -> usize {
        (self.out_features + self.room) * (self.in_features + self.room)
    }

    pub(super) fn has_dropout(&self) -> bool {
        let mut parts = self.parts.iter();
        parts.any(|part| matches!(part.method, Method::LowRank { dropout: true, .. }))
    }

    /// As `LinearGroup` has it.
    pub(super) fn in_halves(&self) -> bool {
        self.room > 0 && !self.has_dropout()
    }
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
    LowRank {
        rank: usize,
        dropout: bool,
        /// Whether DoRA brings what it makes to trained norms.
        scaled: bool,
    },
    TrainBase,
    TrainBias,
    /// A weight that a method changes.
    Changed {
        dropout: bool,
    },
    /// A forward of its own.
    Custom {
        /// Columns that it keeps.
        kept: usize,
    },
}

/// The layers of `config` with `attachments`, and what stands at the embedding, at the head and at the
/// table of positions.
pub(super) fn layers(
    config: &DecoderConfig,
    attachments: &[(SiteId, Attachment)],
    device: &Device,
) -> (Vec<LayerShape>, [Method; 3]) {
    let plan = ModelPlan::new(config);
    let mut methods: BTreeMap<SiteId, Method> = BTreeMap::new();
    for (site, attachment) in attachments {
        // A trained bias beside another method adds nothing that is held.
        match attachment {
            // Nor does what says where updates act.
            Attachment::Invocation(_) => {}
            Attachment::TrainBias(_) => {
                methods.entry(*site).or_insert(Method::TrainBias);
            }
            other => drop(methods.insert(*site, method(other))),
        }
    }
    // A bias that is trained beside an update takes nothing of its room.
    let updates = attachments
        .iter()
        .filter(|(_, a)| !matches!(a, Attachment::TrainBias(_)));
    let updates: BTreeMap<SiteId, &Attachment> = updates.map(|(site, a)| (*site, a)).collect();
    let rooms = room::of_layers(config, &plan, |id| updates.get(&id).copied(), device);
    let layers = plan.layers.iter().zip(rooms);
    let layers = layers.map(|(l, rooms)| layer(config, &plan, &methods, l, rooms));
    let at = |site| methods.get(&site).copied().unwrap_or(Method::Frozen);
    let head = match at(plan.head) {
        Method::LowRank {
            rank,
            dropout,
            scaled,
        } => Method::LowRank {
            rank: rank + usize::from(has_head_bias(&plan, attachments)),
            dropout,
            scaled,
        },
        other => other,
    };
    let positions = plan.positions.map_or(Method::Frozen, at);
    (layers.collect(), [at(plan.embedding), head, positions])
}

/// Bytes of the matrices that a method makes of one linear, where that takes most: a changed weight in f32 with its
/// gradient and those of its size on the way, the head's weight with its rows scaled by DoRA and its gradient, or
/// factors as they are made, as products read them, and their gradients.
pub(super) fn changed_bytes(plan: &ModelPlan, attachments: &[(SiteId, Attachment)]) -> u64 {
    let elements = |(id, attachment): &(SiteId, Attachment)| {
        let site = plan.site(*id);
        let [out, inputs] = [site.out_features, site.in_features];
        match attachment {
            Attachment::Weight(update) => (2 + update.temporaries()) * out * inputs,
            Attachment::LowRank(update) if update.magnitude.is_some() && *id == plan.head => {
                2 * out * inputs
            }
            Attachment::Factors(method) => 3 * method.rank() * (out + inputs),
            _ => 0,
        }
    };
    let largest = attachments.iter().map(elements).max();
    (largest.unwrap_or(0) * DType::F32.bytes()) as u64
}

/// Whether the head's update has a bias, which is one more rank there.
fn has_head_bias(plan: &ModelPlan, attachments: &[(SiteId, Attachment)]) -> bool {
    attachments.iter().any(|(id, attachment)| {
        *id == plan.head && matches!(attachment, Attachment::LowRank(u) if u.bias.is_some())
    })
}

/// How many times the gradient of the head's B is written before it is added: once beside a bias, and once more where
/// its table has trained rows, which come last.
pub(super) fn head_copies(plan: &ModelPlan, attachments: &[(SiteId, Attachment)]) -> usize {
    let table = plan.site(plan.head).tied_to.unwrap_or(plan.head);
    let is_updated = attachments
        .iter()
        .any(|(id, a)| *id == plan.head && matches!(a, Attachment::LowRank(_)));
    let has_rows = attachments
        .iter()
        .any(|(id, a)| *id == table && matches!(a, Attachment::TrainRows { .. }));
    match (is_updated && has_rows, has_head_bias(plan, attachments)) {
        (true, _) => 2,
        (false, bias) => usize::from(bias),
    }
}

fn method(attachment: &Attachment) -> Method {
    match attachment {
        Attachment::TrainBias(_) => Method::TrainBias,
        Attachment::KeepBase | Attachment::Invocation(_) => Method::Frozen,
        // Rows of the stream, or of keys and values, that are there anyway.
        Attachment::Prompt(_) => Method::TrainBias,
        Attachment::LowRank(low_rank) => Method::LowRank {
            rank: low_rank.rank,
            dropout: low_rank.dropout > 0.0,
            scaled: low_rank.magnitude.is_some(),
        },
        Attachment::TrainBase { .. } | Attachment::TrainRows { .. } => Method::TrainBase,
        Attachment::Factors(method) => Method::LowRank {
            rank: method.rank(),
            dropout: method.dropout() > 0.0,
            scaled: false,
        },
        Attachment::Weight(update) => Method::Changed {
            dropout: update.dropout() > 0.0,
        },
        Attachment::Custom(method) => Method::Custom {
            kept: method.kept_columns(),
        },
    }
}

fn layer(
    config: &DecoderConfig,
    plan: &ModelPlan,
    methods: &BTreeMap<SiteId, Method>,
    layer: &LayerPlan,
    rooms: Rooms,
) -> LayerShape {
    let group = |(sites, room): (&[SiteId], usize)| GroupShape {
        room,
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
    let is_trained = |id: &SiteId| methods.contains_key(id);
    let statistics = |norm: Option<SiteId>| norm.map(|_| config.norm.statistics());
    let [qkv, o, gate_up, down] = layer.groups();
    let sites = [(qkv, 0), (o, 1), (gate_up, 2), (down, 3)];
    let [qkv, o, gate_up, down] = sites.map(|(sites, i)| group((sites, rooms[i])));
    let in_linears = layer.groups().into_iter().flatten().any(is_trained);
    LayerShape {
        positioned: layer
            .qk_norm
            .zip(config.qk_norm)
            .map(|(norms, over)| QkNormShape {
                over,
                widths: [config.q_width(), config.kv_width()],
                heads: [config.heads, config.kv_heads],
                trained: norms.map(|id| is_trained(&id)),
            }),
        input_norm: statistics(layer.input_norm),
        mlp_norm: statistics(layer.mlp_norm),
        attention_norm: statistics(layer.attention_norm),
        mlp_output_norm: statistics(layer.mlp_output_norm),
        scaled: config.residual_scale != 1.0,
        trained: in_linears || layer.norms().any(|id| is_trained(&id)),
        input_norm_trained: layer.input_norm.as_ref().is_some_and(is_trained),
        qkv,
        o,
        gate_up,
        down,
    }
}
