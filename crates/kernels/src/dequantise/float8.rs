use super::cuda::Blocks;
use super::stored::Stored;
use super::{cpu, quantise};
use crate::error::{check_len, check_shape};
use crate::tensor::with_dtype;
use crate::{Device, Error, Result, View, ViewMut};

/// The largest value of a code.
const LARGEST: f32 = 448.0;

/// A matrix `[rows, cols]` of 8-bit floats (e4m3, without infinities) in blocks with a scale each.
///
/// ```text
/// w[r, c] = q[r, c] * scales[r / block[0], c / block[1]]
/// ```
#[derive(Debug)]
pub struct Float8 {
    shape: [usize; 2],
    block: [usize; 2],
    /// Codes and scales.
    stored: Stored<(Vec<u8>, Vec<f32>), 2>,
}

impl Float8 {
    /// Takes over `codes [rows * cols]`, row by row, and the scales of blocks of `block` rows and columns, row by
    /// row too.
    ///
    /// # Errors
    /// If a length does not fit, or a block has no rows or columns.
    pub fn new(
        shape: [usize; 2],
        block: [usize; 2],
        codes: Vec<u8>,
        scales: Vec<f32>,
    ) -> Result<Self> {
        const OP: &str = "dequantise::Float8::new";
        if block.contains(&0) {
            let message = format!("blocks of {block:?}; expected 1 or more rows and columns");
            return Err(Error::Invalid { op: OP, message });
        }
        check_len(OP, "codes", shape[0] * shape[1], codes.len())?;
        let blocks = shape[0].div_ceil(block[0]) * shape[1].div_ceil(block[1]);
        check_len(OP, "scales", blocks, scales.len())?;
        Ok(Self {
            shape,
            block,
            stored: Stored::Host((codes, scales)),
        })
    }

    /// The nearest codes of `values`, with the scale of each row that makes its largest magnitude 448.
    ///
    /// # Errors
    /// If a value is not finite.
    pub fn quantise(values: View<'_>) -> Result<Self> {
        const OP: &str = "dequantise::Float8::quantise";
        let [rows, cols] = values.shape();
        let flat = values.to_f32_vec();
        quantise::check_finite(OP, &flat)?;
        let (mut codes, mut scales) = (Vec::with_capacity(flat.len()), Vec::with_capacity(rows));
        for row in 0..rows {
            let row = &flat[row * cols..(row + 1) * cols];
            let most = row.iter().fold(0.0_f32, |most, v| v.abs().max(most));
            let scale = if most > 0.0 { most / LARGEST } else { 1.0 };
            codes.extend(row.iter().map(|value| encode(value / scale)));
            scales.push(scale);
        }
        Self::new([rows, cols], [1, cols.max(1)], codes, scales)
    }

    /// Bytes that a matrix takes.
    #[must_use]
    pub fn bytes([rows, cols]: [usize; 2], block: [usize; 2]) -> usize {
        rows * cols + rows.div_ceil(block[0]) * cols.div_ceil(block[1]) * size_of::<f32>()
    }

    /// `[rows, cols]`.
    #[must_use]
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// Moves the matrix from host memory to that of a GPU; one on a GPU stays where it is.
    ///
    /// A GPU that is out of memory says so with its next operation.
    #[must_use]
    pub fn to_device(self, device: &Device) -> Self {
        let stored = self.stored.moved_to(device, |(codes, scales)| {
            [codes, bytemuck::cast_slice(scales)]
        });
        Self { stored, ..self }
    }

    /// `values` as codes with a scale per row, where `self` is.
    ///
    /// # Errors
    /// If a value is not finite, or the scales are not those of rows.
    pub fn requantise(&self, values: View<'_>) -> Result<Self> {
        const OP: &str = "dequantise::Float8::requantise";
        if self.block != [1, self.shape[1].max(1)] {
            let message = format!(
                "scales of blocks of {:?} come from the checkpoint; only those of rows are made anew",
                self.block
            );
            return Err(Error::Invalid { op: OP, message });
        }
        Ok(Self::quantise(values)?.to_device(&self.stored.device()))
    }

    /// Writes the values to `out [rows, cols]`, f32 or bf16, in the same memory.
    ///
    /// # Errors
    /// If the shapes differ, or the devices; the first failure of the GPU.
    pub fn dequantise(&self, out: ViewMut<'_>) -> Result<()> {
        const OP: &str = "dequantise::Float8::dequantise";
        check_shape(OP, "out", self.shape, out.shape())?;
        self.stored.check(OP, &out)?;
        let [rows, cols] = self.block;
        let (width, per_row) = (self.shape[1], self.shape[1].div_ceil(cols));
        let (codes, scales) = match &self.stored {
            Stored::Host(host) => host,
            Stored::Cuda(memory, [codes, scales]) => {
                let sizes = [rows, cols, per_row].map(|size| size as u32);
                let blocks = Blocks::new([*codes, *scales, 0, 0], sizes);
                return blocks.launch(memory.device(), "float8", out);
            }
        };
        with_dtype!(out.dtype(), T => cpu::each_element::<T>(out, |row, column| {
            decode(codes[row * width + column]) * scales[row / rows * per_row + column / cols]
        }));
        Ok(())
    }
}

/// What a code stands for: 4 bits of exponent, of bias 7, and 3 of mantissa; all ones is NaN.
fn decode(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2.0_f32.powi(-9),
        _ => (8.0 + mantissa) * 2.0_f32.powi(exponent - 10),
    };
    if code & 0x80 == 0 {
        magnitude
    } else {
        -magnitude
    }
}

/// The nearest code, of two the even one; the largest for what is beyond.
fn encode(value: f32) -> u8 {
    let (sign, magnitude) = (
        u8::from(value.is_sign_negative()) << 7,
        value.abs().min(LARGEST),
    );
    // Below 2^-6 codes are 2^-9 apart; above, a mantissa is rounded to 3 bits.
    let code = if magnitude < 0.015_625 {
        (magnitude * 512.0).round_ties_even() as u8
    } else {
        let bits = magnitude.to_bits();
        let rounded = bits + 0x7_ffff + (bits >> 20 & 1);
        // The exponent of 1 is 127 there and 7 here.
        ((rounded >> 20) - (120 << 3)) as u8
    };
    sign | code
}
