//! The work that a step of LoRA cannot do without.

use ferrotune::core::model::{DecoderConfig, ModelPlan};

/// Floating point operations that a LoRA step needs per token, nothing recomputed.
///
/// - 4 N: the linears of the layers (N weights), 2 forward and 2 for the gradient of their input;
///   a frozen weight has no gradient.
/// - 4 V D: the head likewise, every token being trained.
/// - 7 S H E per layer: causal attention over rows of S tokens, 2 forward and 5 backward
///   (5 products of which each sees half of the S x S square).
/// - 6 per trained weight: forward, gradient of its input, gradient of itself.
pub(super) fn flops_per_token(decoder: &DecoderConfig, trainable: usize, mean_length: f64) -> f64 {
    let plan = ModelPlan::new(decoder);
    let linears: usize = plan
        .sites
        .iter()
        .filter(|site| site.layer.is_some() && site.in_features > 1)
        .map(|site| site.in_features * site.out_features)
        .sum();
    let head = decoder.outputs() * decoder.hidden_size;
    let attention = 7.0 * mean_length * (decoder.layers * decoder.q_width()) as f64;
    (4 * (linears + head) + 6 * trainable) as f64 + attention
}

#[cfg(test)]
mod tests {
    use super::super::shapes::Shape;
    use super::*;

    #[test]
    fn flops_are_those_of_the_shape_counted_by_hand() {
        let decoder = Shape::find("tiny").and_then(|s| s.decoder()).expect("tiny");
        // Per layer q, o 64 x 64, k, v 32 x 64, three of 192 x 64; head 1024 x 64; 2 layers.
        let linears = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 192 * 64);
        let expected = 4 * (linears + 1024 * 64) + 6 * 100 + 7 * 64 * 2 * 64;
        assert_eq!(flops_per_token(&decoder, 100, 64.0), f64::from(expected));
    }
}
