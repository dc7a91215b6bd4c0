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

/// A map of 256 values with what finds the entry for a value: bytes of one block at a time, in host memory.
#[derive(Clone, Debug)]
pub struct ByteCodec {
    map: [f32; 256],
    nearest: NearestCode,
    /// The entry for each of [`STEPS`] even steps from -1 to 1, where those are looked up.
    steps: Option<Vec<u8>>,
}

/// Steps of [`ByteCodec::in_steps`].
const STEPS: u16 = u16::MAX;

impl ByteCodec {
    /// Takes the nearest entry.
    #[must_use]
    pub fn new(map: [f32; 256]) -> Self {
        Self {
            nearest: NearestCode::new(&map),
            steps: None,
            map,
        }
    }

    /// Takes the entry nearest to the nearest of 65536 even steps from -1 to 1, as bitsandbytes (0.50) does on a
    /// CPU. Values below a step, which the map tells apart, are not told apart so.
    #[must_use]
    pub fn in_steps(map: [f32; 256]) -> Self {
        let mut codec = Self::new(map);
        let value = |step: u16| 2.0 * f32::from(step) / f32::from(STEPS) - 1.0;
        let of = |step| codec.nearest.of(value(step));
        codec.steps = Some((0..=STEPS).map(of).collect());
        codec
    }

    /// Writes an index for each of `values` and returns their largest magnitude, which scales them.
    pub fn encode(&self, values: &[f32], indices: &mut [u8]) -> f32 {
        match &self.steps {
            None => quantise::one_block(values, indices, 0, |value| self.nearest.of(value)),
            Some(steps) => quantise::one_block(values, indices, 0, |value| {
                let step = ((value + 1.0) * (f32::from(STEPS) / 2.0)).round();
                steps[usize::from(step as u16)]
            }),
        }
    }

    /// Writes the values of `indices` at this scale.
    pub fn decode(&self, indices: &[u8], absmax: f32, values: &mut [f32]) {
        for (value, index) in values.iter_mut().zip(indices) {
            *value = self.map[usize::from(*index)] * absmax;
        }
    }
}
