//! The moments of all tensors in GPU memory, and steps over them that nothing waits for.

#![expect(
    clippy::needless_pass_by_value,
    reason = "a mutable view is exclusive: whoever launches on it owns it"
)]

use super::{BLOCK, MOST_MOMENTS, Rule, SCALAR_BYTES, Tensor};
use crate::adamw::cuda::Update;
use crate::cuda::{CudaDevice, Grid, Memory, Module};
use crate::dequantise::{NearestCode, dynamic_map};
use crate::error::{check_dtype, check_len, check_shape};
use crate::{DType, Result, View, ViewMut};
use std::ops::Range;
use std::sync::Arc;

pub(crate) static MODULE: Module = Module {
    name: "optimizer",
    source: include_str!("kernel.cu"),
};

/// Elements that a block of threads updates.
const SPAN: usize = 16 * BLOCK;
/// Where a state starts.
const ALIGNMENT: usize = 16;

/// The flat buffers of a step, each `[1, len]` on the same GPU.
#[derive(Debug)]
pub struct Buffers<'a> {
    /// f32, updated.
    pub params: ViewMut<'a>,
    /// f32.
    pub grads: View<'a>,
    /// bf16, receives a copy of every parameter that was updated.
    pub shadow: Option<ViewMut<'a>>,
}

/// What an optimizer keeps of the tensors of flat buffers, zero at first.
#[derive(Debug)]
pub struct States {
    len: usize,
    tensors: usize,
    moments: usize,
    spans: usize,
    places: Vec<Range<usize>>,
    memory: Memory,
    table: Memory,
    scalars: Memory,
    codecs: Memory,
}

impl States {
    /// For flat buffers of `len` elements. An element has a moment for each of `signed`, which says whether it can be
    /// negative.
    ///
    /// # Errors
    /// The first failure of the GPU.
    pub fn new(
        device: &Arc<CudaDevice>,
        len: usize,
        tensors: &[Tensor],
        signed: &[bool],
    ) -> Result<Self> {
        check_len(
            "optimizer::cuda::States",
            "moments",
            signed.len().min(MOST_MOMENTS),
            signed.len(),
        )?;
        let mut layout = Layout::default();
        let table: Vec<_> = tensors
            .iter()
            .map(|tensor| layout.add(tensor, signed))
            .collect();
        let memory = device.alloc(layout.bytes);
        device.fill_zero(memory.ptr(), layout.bytes)?;
        let table: Vec<DeviceTensor> = table
            .into_iter()
            .map(|tensor| tensor.at(memory.ptr()))
            .collect();
        let upload = |bytes: &[u8]| -> Result<Memory> {
            let to = device.alloc(bytes.len());
            device.upload(to.ptr(), bytes)?;
            Ok(to)
        };
        let codecs = [false, true].map(Codec::new);
        Ok(Self {
            len,
            tensors: tensors.len(),
            moments: signed.len(),
            spans: layout.spans,
            table: upload(bytemuck::cast_slice(&table))?,
            codecs: upload(bytemuck::cast_slice(&codecs))?,
            scalars: device.alloc(tensors.len() * SCALAR_BYTES),
            places: layout.places,
            memory,
        })
    }

    /// Where each state lies among the bytes of all: tensor by tensor and moment by moment f32 values, or bytes and
    /// then their scales.
    #[must_use]
    pub fn places(&self) -> &[Range<usize>] {
        &self.places
    }

    /// Bytes of all states.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    /// Takes the states from `bytes`, as [`States::places`] has them.
    ///
    /// # Errors
    /// If their number is another; the first failure of the GPU.
    pub fn upload(&mut self, bytes: &[u8]) -> Result<()> {
        check_len(
            "optimizer::cuda::upload",
            "bytes",
            self.bytes(),
            bytes.len(),
        )?;
        self.device().upload(self.memory.ptr(), bytes)
    }

    /// The bytes of all states. Waits for the GPU.
    ///
    /// # Errors
    /// The first failure of the GPU.
    pub fn download(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.bytes()];
        self.device().download(&mut bytes, self.memory.ptr())?;
        Ok(bytes)
    }

    /// Uploads what is the same for all elements of each tensor in the steps from now on: as many bytes for each as
    /// the kernel's struct of `rule` has, one after another.
    ///
    /// # Errors
    /// If there are not as many as tensors; the first failure of the GPU.
    pub fn set(&mut self, scalars: &[[u8; SCALAR_BYTES]]) -> Result<()> {
        check_len(
            "optimizer::cuda::set",
            "scalars",
            self.tensors,
            scalars.len(),
        )?;
        self.device()
            .upload(self.scalars.ptr(), bytemuck::cast_slice(scalars))
    }

    /// One update of all tensors by the gradient that `norm` has scaled
    /// ([`Update::norm_and_scale`]), or none if that was not finite.
    ///
    /// # Errors
    /// If a shape, dtype or device does not fit; the first failure of the GPU.
    pub fn step(&mut self, rule: Rule, norm: &Update, buffers: Buffers<'_>) -> Result<()> {
        const OP: &str = "optimizer::cuda::step";
        let (params, shadow) = (
            buffers.params.as_view(),
            buffers.shadow.as_ref().map(ViewMut::as_view),
        );
        let mut views = vec![
            ("params", params, DType::F32),
            ("grads", buffers.grads, DType::F32),
        ];
        views.extend(shadow.map(|shadow| ("shadow", shadow, DType::Bf16)));
        for (what, view, dtype) in views {
            check_shape(OP, what, [1, self.len], view.shape())?;
            check_dtype(OP, what, dtype, view.dtype())?;
            crate::device::common(OP, &[Some(self.device()), view.device()])?;
        }
        if self.spans == 0 {
            return Ok(());
        }
        let step = Step {
            tensors: self.table.ptr(),
            scalars: self.scalars.ptr(),
            outcome: norm.outcome(),
            codecs: self.codecs.ptr(),
            params: params.ptr(),
            grads: buffers.grads.ptr(),
            shadow: shadow.map_or(0, |shadow| shadow.ptr()),
            count: self.tensors as u32,
            moments: self.moments as u32,
        };
        let grid = Grid::new(self.spans as u32, BLOCK as u32);
        self.device().launch(&MODULE, rule.kernel(), grid, &step)
    }

    /// Loads the kernels, so that the first step does not wait for the compiler.
    ///
    /// # Errors
    /// If they do not compile or load.
    pub fn prepare(&self) -> Result<()> {
        self.device().prepare(&MODULE)
    }

    fn device(&self) -> &Arc<CudaDevice> {
        self.memory.device()
    }
}

/// Places for the states of tensors, one after another.
#[derive(Default)]
struct Layout {
    bytes: usize,
    spans: usize,
    places: Vec<Range<usize>>,
}

impl Layout {
    fn place(&mut self, bytes: usize) -> u64 {
        let start = self.bytes;
        self.places.push(start..start + bytes);
        self.bytes = (start + bytes).next_multiple_of(ALIGNMENT);
        start as u64
    }

    fn add(&mut self, tensor: &Tensor, signed: &[bool]) -> DeviceTensor {
        let len = tensor.elements.len();
        let mut entry = DeviceTensor {
            start: tensor.elements.start as u64,
            len: len as u64,
            first_span: self.spans as u32,
            bytes: u32::from(tensor.bytes),
            ..DeviceTensor::default()
        };
        for (at, signed) in signed.iter().enumerate() {
            if tensor.bytes {
                entry.data[at] = self.place(len);
                entry.scales[at] = self.place(len.div_ceil(BLOCK) * size_of::<f32>());
                entry.is_signed |= u32::from(*signed) << at;
            } else {
                entry.data[at] = self.place(len * size_of::<f32>());
            }
        }
        self.spans += len.div_ceil(SPAN);
        entry
    }
}

/// `struct Tensor` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
struct DeviceTensor {
    start: u64,
    len: u64,
    data: [u64; MOST_MOMENTS],
    scales: [u64; MOST_MOMENTS],
    first_span: u32,
    bytes: u32,
    is_signed: u32,
    unused: u32,
}

impl DeviceTensor {
    /// With addresses for places.
    fn at(mut self, address: u64) -> Self {
        for place in self.data.iter_mut().chain(&mut self.scales) {
            *place += address;
        }
        self
    }
}

/// `struct Codec` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Codec {
    map: [f32; 256],
    limits: [f32; 256],
    order: [u32; 256],
}

impl Codec {
    fn new(signed: bool) -> Self {
        let map = dynamic_map(signed);
        let NearestCode { order, limits } = NearestCode::new(&map);
        Self {
            map,
            limits: std::array::from_fn(|at| limits.get(at).copied().unwrap_or(f32::INFINITY)),
            order: std::array::from_fn(|at| u32::from(order[at])),
        }
    }
}

/// `struct Step` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Step {
    tensors: u64,
    scalars: u64,
    outcome: u64,
    codecs: u64,
    params: u64,
    grads: u64,
    shadow: u64,
    count: u32,
    moments: u32,
}
