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
    lookup: Lookup,
}

/// How a [`ByteCodec`] finds an entry.
#[derive(Clone, Debug)]
enum Lookup {
    /// The nearest, searched for from the place in the map's order that is here for the value's first bits.
    FirstBits(Vec<u8>),
    /// What is here for the nearest of even steps from -1 to 1.
    Steps(Vec<u8>),
}

/// Bits of a value that do not say where to search: all but sign, exponent and five of the mantissa, which leaves
/// three entries of a map at most.
const REST: u32 = 18;
/// Number of the last step of [`Lookup::Steps`].
const LAST_STEP: u16 = u16::MAX;

impl ByteCodec {
    /// Takes the nearest entry.
    #[must_use]
    pub fn new(map: [f32; 256]) -> Self {
        let nearest = NearestCode::new(&map);
        let least = |first: u32| {
            let bits = first << REST;
            let is_negative = bits >> 31 == 1;
            f32::from_bits(if is_negative {
                bits | ((1 << REST) - 1)
            } else {
                bits
            })
        };
        let starts = (0..1 << (32 - REST)).map(|first| nearest.place(least(first)) as u8);
        Self {
            lookup: Lookup::FirstBits(starts.collect()),
            nearest,
            map,
        }
    }

    /// Takes the entry nearest to the nearest of 65536 even steps from -1 to 1, as bitsandbytes (0.50) does on a
    /// CPU. Values below a step, which the map tells apart, are not told apart so.
    #[must_use]
    pub fn in_steps(map: [f32; 256]) -> Self {
        let nearest = NearestCode::new(&map);
        let value = |step: u16| 2.0 * f32::from(step) / f32::from(LAST_STEP) - 1.0;
        let steps = (0..=LAST_STEP).map(|step| nearest.of(value(step)));
        Self {
            lookup: Lookup::Steps(steps.collect()),
            nearest,
            map,
        }
    }

    /// Writes an index for each of `values` and returns their largest magnitude, which scales them.
    pub fn encode(&self, values: &[f32], indices: &mut [u8]) -> f32 {
        match &self.lookup {
            Lookup::FirstBits(starts) => quantise::one_block(values, indices, 0, |value| {
                let start = starts[(value.to_bits() >> REST) as usize];
                self.nearest.of_from(value, usize::from(start))
            }),
            Lookup::Steps(steps) => quantise::one_block(values, indices, 0, |value| {
                let step = ((value + 1.0) * (f32::from(LAST_STEP) / 2.0)).round();
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
