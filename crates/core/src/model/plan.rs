//! The model by names and shapes alone: what adapters are matched against before a weight is read.

use super::config::{DecoderConfig, NormKind, QkNorm};
use crate::adapter::{KeyHeads, Site, SiteId, SiteKind};
use std::collections::BTreeSet;

/// Sites of one decoder layer, in execution order. Examples are those of a Llama.
#[derive(Clone, Debug)]
pub struct LayerPlan {
    /// `input_layernorm`.
    pub input_norm: Option<SiteId>,
    /// `self_attn.q_proj`, `self_attn.k_proj` and `self_attn.v_proj`, or one for all three.
    pub qkv: Vec<SiteId>,
    /// `self_attn.q_norm` and `self_attn.k_norm`, where there are such.
    pub qk_norm: Option<[SiteId; 2]>,
    /// `self_attn.o_proj`.
    pub o: SiteId,
    /// Norm of the attention block's output.
    pub attention_norm: Option<SiteId>,
    /// `post_attention_layernorm`.
    pub mlp_norm: Option<SiteId>,
    /// `mlp.gate_proj` and `mlp.up_proj`, or one for both, or that without a gate.
    pub gate_up: Vec<SiteId>,
    /// `mlp.down_proj`.
    pub down: SiteId,
    /// Norm of the mlp's output.
    pub mlp_output_norm: Option<SiteId>,
}

impl LayerPlan {
    /// The site that forward uses first.
    #[must_use]
    pub fn first(&self) -> SiteId {
        self.input_norm.unwrap_or(self.qkv[0])
    }

    /// Sites of linears, by the input they share.
    #[must_use]
    pub fn groups(&self) -> [&[SiteId]; 4] {
        let one = std::slice::from_ref;
        [&self.qkv, one(&self.o), &self.gate_up, one(&self.down)]
    }

    /// Sites of norms.
    pub fn norms(&self) -> impl Iterator<Item = SiteId> {
        let of_stream = [
            self.input_norm,
            self.attention_norm,
            self.mlp_norm,
            self.mlp_output_norm,
        ];
        let of_heads = self.qk_norm.into_iter().flatten();
        of_stream.into_iter().flatten().chain(of_heads)
    }
}

/// Every site of a model, in execution order.
#[derive(Clone, Debug)]
pub struct ModelPlan {
    /// The sites; [`SiteId`] is the index.
    pub sites: Vec<Site>,
    /// `model.embed_tokens`.
    pub embedding: SiteId,
    /// The table of learned positions, where there is one.
    pub positions: Option<SiteId>,
    /// The layers' sites.
    pub layers: Vec<LayerPlan>,
    /// `model.norm`.
    pub norm: SiteId,
    /// `lm_head`.
    pub head: SiteId,
    /// Of layers that the checkpoint has and the stack has not.
    pub left_out: Vec<Site>,
}

impl ModelPlan {
    /// Lays out the sites of a decoder.
    #[must_use]
    pub fn new(config: &DecoderConfig) -> Self {
        let mut sites = Sites(Vec::new());
        let (d, names) = (config.hidden_size, &config.modules);
        let embedding = sites.add(Place {
            kind: SiteKind::Embedding,
            out_features: config.vocab_size,
            in_features: d,
            ..Place::new(names.embedding)
        });
        let positions = names.positions.map(|name| {
            sites.add(Place {
                kind: SiteKind::Embedding,
                out_features: config.max_position_embeddings,
                in_features: d,
                ..Place::new(name)
            })
        });
        let sources = config.layer_sources.iter().enumerate();
        let layers = sources.map(|(layer, &source)| sites.layer_of(config, layer, source));
        let layers = layers.collect();
        let has_bias = config.norm == NormKind::Layer;
        let norm = sites.norm(names.norm.to_owned(), d, has_bias, None);
        let head = sites.add(Place {
            out_features: config.outputs(),
            in_features: d,
            ..Place::new(names.head)
        });
        let mut sites = sites.0;
        sites[head.0].output_head = true;
        sites[head.0].tied_to = config.tie_word_embeddings.then_some(embedding);
        Self {
            sites,
            embedding,
            positions,
            layers,
            norm,
            head,
            left_out: left_out(config),
        }
    }

    /// The sites that have weights of their own: of those that share one, the first.
    pub fn owners(&self) -> impl Iterator<Item = &Site> {
        let mut seen = BTreeSet::new();
        let own = self.sites.iter().filter(|site| site.tied_to.is_none());
        own.filter(move |site| seen.insert(site.stored_name.as_str()))
    }

    /// Columns of the widest input of a linear.
    pub(crate) fn largest_input(&self) -> usize {
        let linears = self.layers.iter().flat_map(LayerPlan::groups).flatten();
        linears
            .map(|id| self.site(*id).in_features)
            .max()
            .unwrap_or(0)
    }

    /// A site.
    #[must_use]
    pub fn site(&self, id: SiteId) -> &Site {
        &self.sites[id.0]
    }
}

/// Sites of layers that no place of the stack has.
fn left_out(config: &DecoderConfig) -> Vec<Site> {
    let mut sites = Sites(Vec::new());
    for layer in (0..config.stored_layers).filter(|l| !config.layer_sources.contains(l)) {
        sites.layer(config, layer);
    }
    sites.0
}

struct Sites(Vec<Site>);

/// A site to be added.
struct Place {
    name: String,
    kind: SiteKind,
    out_features: usize,
    in_features: usize,
    bias: bool,
    stored_transposed: bool,
    layer: Option<usize>,
}

impl Place {
    fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            kind: SiteKind::Linear,
            out_features: 0,
            in_features: 1,
            bias: false,
            stored_transposed: false,
            layer: None,
        }
    }
}

impl Sites {
    /// Layer `layer` with the weights of the checkpoint's `source`.
    fn layer_of(&mut self, config: &DecoderConfig, layer: usize, source: usize) -> LayerPlan {
        let first = self.0.len();
        let plan = self.layer(config, layer);
        let path = |layer| format!("{}.{layer}.", config.modules.layers);
        for site in &mut self.0[first..] {
            site.stored_name = site.name.replacen(&path(layer), &path(source), 1);
        }
        plan
    }

    fn layer(&mut self, config: &DecoderConfig, layer: usize) -> LayerPlan {
        let (d, f, names) = (
            config.hidden_size,
            config.intermediate_size,
            &config.modules,
        );
        let (q, kv) = (config.q_width(), config.kv_width());
        let at = |name: &str| format!("{}.{layer}.{name}", names.layers);
        let has_bias = config.norm == NormKind::Layer;
        let norm = |sites: &mut Self, name: &str, width: usize| {
            sites.norm(at(name), width, has_bias, Some(layer))
        };
        let linear = |sites: &mut Self, name: &str, [out, input]: [usize; 2], bias| {
            sites.add(Place {
                out_features: out,
                in_features: input,
                bias,
                stored_transposed: config.stored_transposed,
                layer: Some(layer),
                ..Place::new(at(name))
            })
        };
        // Linears over one input of width D, or one whose output is theirs side by side.
        let group = |sites: &mut Self, modules: &[&str], widths: &[usize], bias| -> Vec<SiteId> {
            let fused = [widths.iter().sum()];
            let widths = if modules.len() == 1 { &fused } else { widths };
            let each = modules.iter().zip(widths);
            let ids: Vec<SiteId> = each
                .map(|(name, &out)| linear(sites, name, [out, d], bias))
                .collect();
            for id in &ids {
                sites.0[id.0].execution_order = ids[0].0;
            }
            ids
        };
        let input_norm = names.input_norm.map(|name| norm(self, name, d));
        let qkv = group(self, names.qkv, &[q, kv, kv], config.qkv_bias);
        self.0[qkv.get(1).unwrap_or(&qkv[0]).0].keys = Some(KeyHeads {
            heads: config.kv_heads,
            head_dim: config.head_dim,
        });
        LayerPlan {
            input_norm,
            qkv,
            qk_norm: config.qk_norm.map(|over| {
                let [q_width, k_width] = match over {
                    QkNorm::PerHead => [config.head_dim; 2],
                    QkNorm::Whole => [q, kv],
                };
                let [q_norm, k_norm] = names.qk_norm;
                [norm(self, q_norm, q_width), norm(self, k_norm, k_width)]
            }),
            o: linear(self, names.o, [d, q], config.o_bias),
            attention_norm: names.attention_norm.map(|name| norm(self, name, d)),
            mlp_norm: names.mlp_norm.map(|name| norm(self, name, d)),
            gate_up: match config.gated_mlp {
                true => group(self, names.gate_up, &[f, f], config.mlp_bias),
                false => group(self, names.gate_up, &[f], config.mlp_bias),
            },
            down: linear(self, names.down, [d, f], config.mlp_bias),
            mlp_output_norm: names.mlp_output_norm.map(|name| norm(self, name, d)),
        }
    }

    fn norm(&mut self, name: String, width: usize, bias: bool, layer: Option<usize>) -> SiteId {
        self.add(Place {
            kind: SiteKind::Norm,
            out_features: width,
            bias,
            layer,
            ..Place::new(name)
        })
    }

    fn add(&mut self, place: Place) -> SiteId {
        let id = SiteId(self.0.len());
        self.0.push(Site {
            id,
            stored_name: place.name.clone(),
            name: place.name,
            kind: place.kind,
            in_features: place.in_features,
            out_features: place.out_features,
            bias: place.bias,
            stored_transposed: place.stored_transposed,
            keys: None,
            layer: place.layer,
            output_head: false,
            tied_to: None,
            execution_order: id.0,
        });
        id
    }
}
