//! Layers stacked anew: PEFT's `layer_replication`.

use super::DecoderConfig;
use super::config::MAX_LAYERS;
use crate::{Error, Result};

/// The key that asks for it.
const KEY: &str = "layer_replication";

impl DecoderConfig {
    /// Whether its layers are others than the checkpoint's.
    #[must_use]
    pub fn is_restacked(&self) -> bool {
        !self.layer_sources.iter().copied().eq(0..self.stored_layers)
    }

    /// The same with another stack of layers: those of each range `[start, end)`, one range after the
    /// other. A layer that is there more than once is held once. Its window and its rope go with it.
    ///
    /// # Errors
    /// [`Error::Config`] for no range, an empty one, or one beyond the last layer.
    ///
    /// # Source
    /// PEFT's `replicate_layers`.
    pub fn stacked(&self, ranges: &[[usize; 2]]) -> Result<Self> {
        let layers = self.layers;
        for &[start, end] in ranges {
            let wrong = |what: String| {
                let message = format!("[{start}, {end}] {what}");
                Err(Error::config(KEY, message))
            };
            if end > layers {
                let start = start.min(layers - 1);
                return wrong(format!(
                    "ends behind the last layer: this base has {layers}, and a range is [start, end) with end at \
                     most {layers}; the nearest is [{start}, {layers}]"
                ));
            }
            if start >= end {
                let (low, high) = (start.min(end), (start.max(end) + 1).min(layers));
                return wrong(format!(
                    "holds no layer: a range is [start, end) with start below end, such as [{low}, {high}]"
                ));
            }
        }
        let count: usize = ranges.iter().map(|[start, end]| end - start).sum();
        if count == 0 || count > MAX_LAYERS {
            let message = format!("makes {count} layers; expected 1 to {MAX_LAYERS}");
            return Err(Error::config(KEY, message));
        }
        let order: Vec<usize> = ranges.iter().flat_map(|&[start, end]| start..end).collect();
        Ok(Self {
            layers: count,
            layer_sources: picked(&self.layer_sources, &order),
            attention_scales: picked(&self.attention_scales, &order),
            layer_ropes: picked(&self.layer_ropes, &order),
            sliding_windows: picked(&self.sliding_windows, &order),
            ..self.clone()
        })
    }
}

fn picked<T: Copy>(values: &[T], order: &[usize]) -> Vec<T> {
    order.iter().map(|&layer| values[layer]).collect()
}
