//! A saved prompt before recorded inputs: logits of the inputs' own tokens, loss, gradient of the rows.

use super::adapted::Adapted;
use super::arch::{FORWARD, GRADIENT, select_behind};
use super::case::{Case, scalar};
use super::compare::Comparison;
use super::padded::PaddedBatch;
use ferrotune_core::adapter::PromptOf;
use ferrotune_core::io::SafetensorsFile;
use ferrotune_core::{Error, Result};
use ferrotune_kernels::DType;

pub(super) fn compare(
    case: &Case,
    expected: &SafetensorsFile,
    adapted: &Adapted,
    padded: &PaddedBatch,
) -> Result<Comparison> {
    let Some(prompt) = adapted.model.prompt() else {
        return Err(Error::config("adapter", "has no prompt"));
    };
    // PEFT gives logits of virtual embeddings too, and none of keys and values.
    let virtual_tokens = match prompt.of {
        PromptOf::Embeddings => prompt.tokens,
        PromptOf::KeysAndValues => 0,
    };
    let (batch, places) = padded.pack();
    let ours = adapted.run(DType::F32, &batch)?;
    let mut comparison = Comparison::default();
    let logits = select_behind(expected, "logits", padded, &places, virtual_tokens)?;
    comparison.tensor("logits", "logits", ours.logits(), &logits, FORWARD);
    comparison.number(
        "loss",
        "loss",
        ours.loss(),
        scalar(expected, "loss")?,
        FORWARD,
    );

    let rows = ours.grads().get(prompt.rows);
    let (name, ours) = match last_bias(expected) {
        // What PEFT saves is what its encoder made; of the encoder that says the gradient of the last bias
        // alone, which is the sum over the rows.
        Some(name) => {
            let width = rows.len() / prompt.tokens;
            let column = |at: usize| rows.iter().skip(at).step_by(width).sum();
            (name, (0..width).map(column).collect())
        }
        None => (
            "grad.prompt_encoder.embedding.weight".to_owned(),
            rows.to_vec(),
        ),
    };
    if expected.meta(&name).is_none() {
        let path = case.path("expected.safetensors");
        return Err(Error::data(path, None, format!("`{name}` is missing")));
    }
    let theirs = expected.read_f32(&name)?;
    comparison.tensor("grad", &name, &ours, &theirs, GRADIENT);
    Ok(comparison)
}

/// The gradient of the bias of an encoder's last linear, if one was recorded.
fn last_bias(expected: &SafetensorsFile) -> Option<String> {
    let number = |name: &str| -> Option<usize> {
        let name = name.strip_prefix("grad.prompt_encoder.")?;
        let linear = name.strip_suffix(".bias")?;
        let (module, number) = linear.rsplit_once('.')?;
        let number = number.parse().ok()?;
        ["mlp_head", "transform"]
            .contains(&module)
            .then_some(number)
    };
    let linears = expected
        .names()
        .filter_map(|name| Some((number(name)?, name)));
    linears.max().map(|(_, name)| name.to_owned())
}
