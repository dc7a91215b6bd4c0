//! Conversion to and from candle's tensor: two dimensions, f32 or bf16, CPU, always a copy.

use crate::tensor::with_dtype;
use crate::{Buffer, Error, Tensor};
use candle_core::Device;
use half::bf16;

const OP: &str = "Tensor::try_from(candle)";

impl TryFrom<&Tensor> for candle_core::Tensor {
    type Error = Error;

    /// Copies into a contiguous CPU tensor of the same shape and dtype, not tracked by autograd.
    fn try_from(tensor: &Tensor) -> Result<Self, Error> {
        let view = tensor.view();
        let shape = (view.rows(), view.cols());
        with_dtype!(view.dtype(), T => {
            let mut values: Vec<T> = Vec::with_capacity(view.rows() * view.cols());
            let rows = crate::row_blocks::typed::<T>(view);
            for r in 0..rows.rows() {
                values.extend_from_slice(rows.row(r));
            }
            Ok(Self::from_vec(values, shape, &Device::Cpu)?)
        })
    }
}

impl TryFrom<&candle_core::Tensor> for Tensor {
    type Error = Error;

    /// Copies a 2-D f32 or bf16 CPU tensor of any strides; the rows of the copy are back to back.
    fn try_from(tensor: &candle_core::Tensor) -> Result<Self, Error> {
        let invalid = |message: String| Err(Error::Invalid { op: OP, message });
        if !tensor.device().is_cpu() {
            return invalid("the tensor is not on the CPU; move it with to_device".into());
        }
        let &[rows, cols] = tensor.dims() else {
            return invalid(format!(
                "the tensor has shape {:?}, expected two dimensions; reshape it",
                tensor.dims()
            ));
        };
        let flat = tensor.flatten_all()?;
        let buffer = match tensor.dtype() {
            candle_core::DType::F32 => Buffer::F32(flat.to_vec1()?),
            candle_core::DType::BF16 => Buffer::Bf16(flat.to_vec1::<bf16>()?),
            other => {
                return invalid(format!(
                    "the tensor is {other:?}, expected F32 or BF16; convert it with to_dtype"
                ));
            }
        };
        Ok(Self::from_buffer(buffer, rows, cols))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;

    #[test]
    fn both_dtypes_round_trip() -> Result<(), Error> {
        for dtype in [DType::F32, DType::Bf16] {
            for (rows, cols) in [(0, 3), (3, 0), (1, 1), (2, 5)] {
                let values = (0..rows * cols).map(|v| v as f32 - 2.5).collect();
                let ours = Tensor::from_f32(values, rows, cols).to_dtype(dtype);
                let theirs = candle_core::Tensor::try_from(&ours)?;
                assert_eq!(theirs.dims(), [rows, cols]);
                let back = Tensor::try_from(&theirs)?;
                assert_eq!((back.dtype(), back.view().shape()), (dtype, [rows, cols]));
                assert_eq!(back.to_f32_vec(), ours.to_f32_vec());
            }
        }
        Ok(())
    }

    #[test]
    fn strided_candle_tensors_are_copied_in_row_order() -> Result<(), Error> {
        let wide = candle_core::Tensor::arange(0.0_f32, 6.0, &Device::Cpu)?.reshape((2, 3))?;
        let ours = Tensor::try_from(&wide.t()?)?;
        assert_eq!(ours.view().shape(), [3, 2]);
        assert_eq!(ours.to_f32_vec(), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
        let columns = Tensor::try_from(&wide.narrow(1, 1, 2)?)?;
        assert_eq!(columns.to_f32_vec(), [1.0, 2.0, 4.0, 5.0]);
        Ok(())
    }

    #[test]
    fn other_ranks_and_dtypes_are_refused_with_the_fix() -> Result<(), Error> {
        let zeros = |shape: &[usize], dtype| candle_core::Tensor::zeros(shape, dtype, &Device::Cpu);
        let refusal = |tensor: &candle_core::Tensor| {
            Tensor::try_from(tensor)
                .err()
                .map(|error| error.to_string())
        };
        let message = refusal(&zeros(&[2, 3, 4], candle_core::DType::F32)?);
        assert!(message.is_some_and(|m| m.contains("[2, 3, 4]") && m.contains("reshape")));
        let message = refusal(&zeros(&[2, 3], candle_core::DType::F64)?);
        assert!(message.is_some_and(|m| m.contains("F64") && m.contains("to_dtype")));
        Ok(())
    }
}
