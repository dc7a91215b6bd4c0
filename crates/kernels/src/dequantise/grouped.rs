use super::cpu;
use super::cuda::Blocks;
use super::stored::Stored;
use crate::error::{check_len, check_shape};
use crate::tensor::with_dtype;
use crate::{Device, Error, Result, ViewMut};

/// A matrix `[rows, cols]` of whole numbers of 4 or 8 bits, whose columns are in groups with a scale and a zero
/// for every row (GPTQ, AWQ).
///
/// ```text
/// w[r, c] = (q[r, c] - zeros[r, g(c)]) * scales[r, g(c)]
/// ```
#[derive(Debug)]
pub struct Grouped {
    shape: [usize; 2],
    bits: usize,
    groups: usize,
    stored: Stored<Arrays, 4>,
}

#[derive(Debug)]
struct Arrays {
    /// Of 4 bits two in a byte, the first in the low half.
    codes: Vec<u8>,
    /// `[rows, groups]`.
    scales: Vec<f32>,
    /// `[rows, groups]`: one more than a code can be, at most.
    zeros: Vec<u16>,
    /// `[cols]`.
    group_of: Vec<u32>,
}

impl Grouped {
    /// Takes over `codes [rows * cols]`, row by row and one in a byte, `scales` and `zeros [rows * groups]`, and
    /// the group of every column.
    ///
    /// # Errors
    /// If a length does not fit, `bits` is not 4 or 8, a row of 4-bit codes has no whole bytes, or a column is in
    /// no group.
    pub fn new(
        shape: [usize; 2],
        bits: usize,
        codes: Vec<u8>,
        scales: Vec<f32>,
        zeros: Vec<u16>,
        group_of: Vec<u32>,
    ) -> Result<Self> {
        const OP: &str = "dequantise::Grouped::new";
        let [rows, cols] = shape;
        let invalid = |message: String| Error::Invalid { op: OP, message };
        if ![4, 8].contains(&bits) || (bits == 4 && !cols.is_multiple_of(2)) {
            let message =
                format!("{cols} columns of {bits} bits; expected an even number of 4, or 8");
            return Err(invalid(message));
        }
        check_len(OP, "codes", rows * cols, codes.len())?;
        check_len(OP, "group_of", cols, group_of.len())?;
        check_len(OP, "zeros", scales.len(), zeros.len())?;
        let groups = scales.len().checked_div(rows).unwrap_or(0);
        check_len(OP, "scales", rows * groups, scales.len())?;
        if let Some(column) = group_of
            .iter()
            .position(|&group| group as usize >= groups && rows > 0)
        {
            let message = format!(
                "column {column} is in group {} of {groups}",
                group_of[column]
            );
            return Err(invalid(message));
        }
        let codes = match bits {
            4 => codes
                .chunks(2)
                .map(|pair| pair[0] & 15 | pair[1] << 4)
                .collect(),
            _ => codes,
        };
        let stored = Stored::Host(Arrays {
            codes,
            scales,
            zeros,
            group_of,
        });
        Ok(Self {
            shape,
            bits,
            groups,
            stored,
        })
    }

    /// Bytes that a matrix takes.
    #[must_use]
    pub fn bytes([rows, cols]: [usize; 2], bits: usize, groups: usize) -> usize {
        rows * cols * bits / 8
            + rows * groups * (size_of::<f32>() + size_of::<u16>())
            + cols * size_of::<u32>()
    }

    /// `[rows, cols]`.
    #[must_use]
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// Bits of a code.
    #[must_use]
    pub fn bits(&self) -> usize {
        self.bits
    }

    /// Moves the matrix from host memory to that of a GPU; one on a GPU stays where it is.
    ///
    /// A GPU that is out of memory says so with its next operation.
    #[must_use]
    pub fn to_device(self, device: &Device) -> Self {
        let stored = self.stored.moved_to(device, |arrays| {
            [
                &arrays.codes,
                bytemuck::cast_slice(&arrays.scales),
                bytemuck::cast_slice(&arrays.zeros),
                bytemuck::cast_slice(&arrays.group_of),
            ]
        });
        Self { stored, ..self }
    }

    /// Writes the values to `out [rows, cols]`, f32 or bf16, in the same memory.
    ///
    /// # Errors
    /// If the shapes differ, or the devices; the first failure of the GPU.
    pub fn dequantise(&self, out: ViewMut<'_>) -> Result<()> {
        const OP: &str = "dequantise::Grouped::dequantise";
        check_shape(OP, "out", self.shape, out.shape())?;
        self.stored.check(OP, &out)?;
        let arrays = match &self.stored {
            Stored::Host(arrays) => arrays,
            Stored::Cuda(memory, addresses) => {
                let sizes = [self.groups as u32, self.bits as u32, 0];
                return Blocks::new(*addresses, sizes).launch(memory.device(), "grouped", out);
            }
        };
        let (codes, scales, zeros) = (&arrays.codes, &arrays.scales, &arrays.zeros);
        let group_of = &arrays.group_of;
        let (cols, groups, bits) = (self.shape[1], self.groups, self.bits);
        with_dtype!(out.dtype(), T => cpu::each_element::<T>(out, |row, column| {
            let (at, group) = (row * cols + column, row * groups + group_of[column] as usize);
            let code = match bits {
                4 => codes[at / 2] >> (at % 2 * 4) & 15,
                _ => codes[at],
            };
            (f32::from(code) - f32::from(zeros[group])) * scales[group]
        }));
        Ok(())
    }
}
