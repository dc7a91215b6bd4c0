//! The model by names and shapes alone: what adapters are matched against before a weight is read.

use super::config::DecoderConfig;
use crate::adapter::{Site, SiteId, SiteKind};

/// Sites of one decoder layer.
#[derive(Clone, Copy, Debug)]
pub struct LayerPlan {
    /// `input_layernorm`.
    pub input_norm: SiteId,
    /// `self_attn.q_proj`.
    pub q: SiteId,
    /// `self_attn.k_proj`.
    pub k: SiteId,
    /// `self_attn.v_proj`.
    pub v: SiteId,
    /// `self_attn.q_norm` and `self_attn.k_norm`, where there are such.
    pub qk_norm: Option<[SiteId; 2]>,
    /// `self_attn.o_proj`.
    pub o: SiteId,
    /// `post_attention_layernorm`.
    pub mlp_norm: SiteId,
    /// `mlp.gate_proj`.
    pub gate: SiteId,
    /// `mlp.up_proj`.
    pub up: SiteId,
    /// `mlp.down_proj`.
    pub down: SiteId,
}

/// Every site of a model, in execution order.
#[derive(Clone, Debug)]
pub struct ModelPlan {
    /// The sites; [`SiteId`] is the index.
    pub sites: Vec<Site>,
    /// `model.embed_tokens`.
    pub embedding: SiteId,
    /// The layers' sites.
    pub layers: Vec<LayerPlan>,
    /// `model.norm`.
    pub norm: SiteId,
    /// `lm_head`.
    pub head: SiteId,
}

impl ModelPlan {
    /// Lays out the sites of a decoder.
    #[must_use]
    pub fn new(config: &DecoderConfig) -> Self {
        let mut sites = Sites(Vec::new());
        let (d, f) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (config.q_width(), config.kv_width());
        let embedding = sites.add(
            "model.embed_tokens",
            SiteKind::Embedding,
            config.vocab_size,
            d,
            false,
            None,
        );
        let layers = (0..config.layers)
            .map(|layer| {
                let norm = |sites: &mut Sites, name: &str, width: usize| {
                    sites.add(
                        &format!("model.layers.{layer}.{name}"),
                        SiteKind::Norm,
                        width,
                        1,
                        false,
                        Some(layer),
                    )
                };
                let linear = |sites: &mut Sites, name: &str, out, input, bias| {
                    sites.add(
                        &format!("model.layers.{layer}.{name}"),
                        SiteKind::Linear,
                        out,
                        input,
                        bias,
                        Some(layer),
                    )
                };
                LayerPlan {
                    input_norm: norm(&mut sites, "input_layernorm", d),
                    q: linear(&mut sites, "self_attn.q_proj", q, d, config.qkv_bias),
                    k: linear(&mut sites, "self_attn.k_proj", kv, d, config.qkv_bias),
                    v: linear(&mut sites, "self_attn.v_proj", kv, d, config.qkv_bias),
                    qk_norm: config.qk_norm.map(|_| {
                        ["self_attn.q_norm", "self_attn.k_norm"]
                            .map(|name| norm(&mut sites, name, config.head_dim))
                    }),
                    o: linear(&mut sites, "self_attn.o_proj", d, q, config.o_bias),
                    mlp_norm: norm(&mut sites, "post_attention_layernorm", d),
                    gate: linear(&mut sites, "mlp.gate_proj", f, d, config.mlp_bias),
                    up: linear(&mut sites, "mlp.up_proj", f, d, config.mlp_bias),
                    down: linear(&mut sites, "mlp.down_proj", d, f, config.mlp_bias),
                }
            })
            .collect();
        let norm = sites.add("model.norm", SiteKind::Norm, d, 1, false, None);
        let head = sites.add(
            "lm_head",
            SiteKind::Linear,
            config.vocab_size,
            d,
            false,
            None,
        );
        let mut sites = sites.0;
        sites[head.0].output_head = true;
        sites[head.0].tied_to = config.tie_word_embeddings.then_some(embedding);
        Self {
            sites,
            embedding,
            layers,
            norm,
            head,
        }
    }

    /// Weights of the largest group of linears that share their input.
    pub(crate) fn largest_group(&self) -> usize {
        let groups = self.layers.iter().flat_map(|l| {
            let groups: [&[SiteId]; 4] = [&[l.q, l.k, l.v], &[l.o], &[l.gate, l.up], &[l.down]];
            groups.map(|ids| {
                let sites = ids.iter().map(|&id| self.site(id));
                sites.map(|s| s.out_features * s.in_features).sum()
            })
        });
        groups.max().unwrap_or(0)
    }

    /// A site.
    #[must_use]
    pub fn site(&self, id: SiteId) -> &Site {
        &self.sites[id.0]
    }
}

struct Sites(Vec<Site>);

impl Sites {
    fn add(
        &mut self,
        name: &str,
        kind: SiteKind,
        out_features: usize,
        in_features: usize,
        bias: bool,
        layer: Option<usize>,
    ) -> SiteId {
        let id = SiteId(self.0.len());
        self.0.push(Site {
            id,
            name: name.into(),
            kind,
            in_features,
            out_features,
            bias,
            layer,
            output_head: false,
            tied_to: None,
            execution_order: id.0,
        });
        id
    }
}
