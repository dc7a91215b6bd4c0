//! Tensors as the copy engine of Hopper reads them.

use super::{CudaDevice, error};
use crate::{Error, Result};
use cudarc::driver::sys as cu;

/// `struct TensorMap` of the kernels: a tensor in the memory of a GPU and a box of it. Only the driver knows
/// what is in it.
#[repr(C, align(64))]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct TensorMap([u64; 16]);

const _: () = assert!(size_of::<TensorMap>() == size_of::<cu::CUtensorMap>());

/// A tensor of bf16 of three dimensions, innermost first, and a box of it, whose rows are 128 bytes and swizzled
/// within them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BoxedTensor {
    /// Of the first element; a multiple of 16.
    pub(crate) address: u64,
    /// Elements of each dimension, at least one.
    pub(crate) shape: [u64; 3],
    /// Bytes from one to the next of the second and the third dimension; multiples of 16.
    pub(crate) strides: [u64; 2],
    /// Elements of a box: 64 and twice at most 256. Beyond the tensor it has zeros.
    pub(crate) box_shape: [u32; 3],
}

impl CudaDevice {
    /// What `tensor` is to the copy engine, for a parameter of a kernel.
    ///
    /// # Errors
    /// If the driver refuses it, because its numbers are not as they have to be, or is older than CUDA 12.
    pub(crate) fn tensor_map(&self, tensor: &BoxedTensor) -> Result<TensorMap> {
        self.enter()?;
        let Some(encode) = self.driver.tensor_map_encode else {
            return Err(Error::Library {
                library: "libcuda".into(),
                problem: "it has no cuTensorMapEncodeTiled".into(),
                fix: "install a driver of CUDA 12 or later, or take another FERROTUNE_ATTENTION"
                    .into(),
            });
        };
        let mut map = TensorMap([0; 16]);
        // SAFETY: the map is aligned to 64 bytes and has those of the driver's; the arrays have as many
        // values as three dimensions need. The address is kept and not read.
        let status = unsafe {
            encode(
                (&raw mut map).cast(),
                cu::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 as u32,
                3,
                tensor.address as *mut _,
                tensor.shape.as_ptr(),
                tensor.strides.as_ptr(),
                tensor.box_shape.as_ptr(),
                [1_u32; 3].as_ptr(),
                cu::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE as u32,
                cu::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B as u32,
                cu::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B as u32,
                cu::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE as u32,
            )
        };
        if status != 0 {
            let op = format!("describing {tensor:?} to the copy engine");
            error::driver(self.driver, &op, status)?;
        }
        Ok(map)
    }
}
