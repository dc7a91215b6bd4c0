//! Encoders beside PyTorch's.

use super::encoder::Encoder;
use super::{EMBEDDING, Shape, config::PromptConfig};
use crate::method::{Keys, Source};
use ferrotune_core::adapter::KeyHeads;
use ferrotune_core::io::SafetensorsFile;
use ferrotune_core::params::{FlatBuffer, ParamLayoutBuilder, ParamSpec};
use serde_json::{Value, json};
use std::path::Path;

fn config(object: Value) -> PromptConfig {
    let object = object.as_object().expect("an object").clone();
    let mut keys = Keys::new(Source::Config("peft_config"), &object);
    PromptConfig::read(&mut keys).expect("sound")
}

fn shape(hidden: usize) -> Shape {
    Shape {
        hidden,
        layers: 3,
        keys: KeyHeads {
            heads: 2,
            head_dim: 4,
        },
    }
}

fn relative_error(ours: &[f32], theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    let largest = theirs.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    let differences = ours.iter().zip(theirs).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, f32::max) / largest
}

#[test]
fn rows_and_gradients_are_those_of_pytorch() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures");
    let file = SafetensorsFile::open(fixtures.join("prompt_encoders/encoders.safetensors"));
    let file = file.expect("the recorded encoders");
    let cases = [
        (
            "mlp",
            12,
            json!({"peft_type": "P_TUNING", "num_virtual_tokens": 5, "encoder_hidden_size": 7}),
        ),
        (
            "lstm",
            10,
            json!({
                "peft_type": "P_TUNING", "num_virtual_tokens": 6, "encoder_hidden_size": 4,
                "encoder_reparameterization_type": "LSTM",
            }),
        ),
        (
            "projection",
            16,
            json!({
                "peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4, "encoder_hidden_size": 9,
                "prefix_projection": true,
            }),
        ),
    ];
    for (kind, hidden, object) in cases {
        let mut builder = ParamLayoutBuilder::new();
        let encoder = Encoder::new(&config(object), &shape(hidden), |name, shape| {
            builder.add(ParamSpec::new(name, shape, 0))
        })
        .expect("an encoder");
        let layout = builder.build().expect("unique names");
        let (mut params, mut grads) = (FlatBuffer::zeros(&layout), FlatBuffer::zeros(&layout));
        let recorded = format!("{kind}.prompt_encoder.");
        assert_eq!(
            layout.by_name().count(),
            file.names().filter(|n| n.starts_with(&recorded)).count(),
            "{kind}"
        );
        for (id, segment) in layout.by_name() {
            let name = format!("{kind}.{}", segment.spec.name);
            let values = file.read_f32(&name).expect("recorded");
            params.get_mut(id).copy_from_slice(&values);
        }
        let rows = encoder.forward(&params).expect("runs");
        let theirs = file.read_f32(&format!("{kind}.rows")).expect("recorded");
        assert!(relative_error(&rows, &theirs) < 1e-5, "{kind}");

        let d_rows = file.read_f32(&format!("{kind}.d_rows")).expect("recorded");
        encoder
            .backward(&params, &mut grads, &d_rows)
            .expect("runs");
        for (id, segment) in layout.by_name() {
            let name = format!("{kind}.grad.{}", segment.spec.name);
            let error = relative_error(grads.get(id), &file.read_f32(&name).expect("recorded"));
            assert!(error < 1e-5, "{name}: {error}");
        }
        assert!(layout.find(EMBEDDING).is_some());
    }
}
