//! Fixtures and sites for the tests of this crate.

use ferrotune_core::adapter::{Site, SiteId, SiteKind};
use ferrotune_core::io::SafetensorsFile;
use std::path::{Path, PathBuf};

/// The folder of recorded adapters and bases.
pub(crate) fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/fixtures/golden/adapters")
        .join(path)
}

fn site(id: usize, name: &str, kind: SiteKind, shape: [usize; 2]) -> Site {
    Site {
        id: SiteId(id),
        name: name.into(),
        kind,
        in_features: shape[1],
        out_features: shape[0],
        bias: false,
        layer: name
            .split('.')
            .nth(2)
            .and_then(|segment| segment.parse().ok()),
        output_head: name == "lm_head",
        tied_to: None,
        execution_order: id,
    }
}

/// The sites of a Llama, in the order of execution, from the recorded base.
pub(crate) fn llama_sites(layers: usize) -> Vec<Site> {
    let base = SafetensorsFile::open(golden("_bases/llama/model.safetensors")).expect("fixture");
    let mut names = vec![("model.embed_tokens".to_owned(), SiteKind::Embedding)];
    for layer in 0..layers {
        for (name, kind) in [
            ("input_layernorm", SiteKind::Norm),
            ("self_attn.q_proj", SiteKind::Linear),
            ("self_attn.k_proj", SiteKind::Linear),
            ("self_attn.v_proj", SiteKind::Linear),
            ("self_attn.o_proj", SiteKind::Linear),
            ("post_attention_layernorm", SiteKind::Norm),
            ("mlp.gate_proj", SiteKind::Linear),
            ("mlp.up_proj", SiteKind::Linear),
            ("mlp.down_proj", SiteKind::Linear),
        ] {
            names.push((format!("model.layers.{layer}.{name}"), kind));
        }
    }
    names.push(("model.norm".into(), SiteKind::Norm));
    names.push(("lm_head".into(), SiteKind::Linear));
    names
        .iter()
        .enumerate()
        .map(|(id, (name, kind))| {
            // Every layer has the shapes of the recorded base's first.
            let like = name
                .splitn(4, '.')
                .nth(3)
                .map_or(name.clone(), |end| format!("model.layers.0.{end}"));
            let shape = &base.meta(&format!("{like}.weight")).expect("fixture").shape;
            site(
                id,
                name,
                *kind,
                [shape[0], shape.get(1).copied().unwrap_or(1)],
            )
        })
        .collect()
}
