use super::quantise::{self, NearestCode};
use crate::Result;

/// Values as bytes that index a map, in blocks with a scale each, in host memory: what bitsandbytes makes of scales
/// and of the moments of its 8-bit optimizers.
#[derive(Clone, Debug, PartialEq)]
pub struct Blockwise {
    /// One index into the map per value.
    pub indices: Vec<u8>,
    /// The largest magnitude of every block.
    pub absmax: Vec<f32>,
    /// Values per scale.
    pub block: usize,
}

impl Blockwise {
    /// The nearest entries of `map` ([`super::dynamic_map`]) for `values` over the largest magnitude of their block.
    ///
    /// # Errors
    /// If a value is not finite.
    pub fn quantise(values: &[f32], block: usize, map: &[f32; 256]) -> Result<Self> {
        quantise::check_finite("dequantise::Blockwise::quantise", values)?;
        // A block of zeros has the first index: whatever stands there is multiplied by 0.
        let (indices, absmax) = quantise::blockwise(values, block, &NearestCode::new(map), 0);
        Ok(Self {
            indices,
            absmax,
            block,
        })
    }

    /// The values.
    #[must_use]
    pub fn values(&self, map: &[f32; 256]) -> Vec<f32> {
        let blocks = self.indices.chunks(self.block).zip(&self.absmax);
        let values = blocks.flat_map(|(indices, absmax)| {
            let value = move |index: &u8| map[usize::from(*index)] * absmax;
            indices.iter().map(value)
        });
        values.collect()
    }
}
