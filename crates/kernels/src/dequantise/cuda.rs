#![expect(
    clippy::needless_pass_by_value,
    reason = "a mutable view is exclusive: whoever launches on it owns it"
)]

use super::NESTED_BLOCK;
use super::four_bit::{Absmax, Packed};
use super::int8::Scaled;
use crate::cuda::{CudaDevice, Grid, Memory, Module};
use crate::{Result, ViewMut};
use std::sync::Arc;

pub(crate) static MODULE: Module = Module {
    name: "dequantise",
    source: include_str!("kernel.cu"),
};

const THREADS: usize = 256;
/// Neighbours that one thread writes where rows allow it.
const EACH: usize = 8;

/// Codes and scales of a matrix on a GPU, one behind the other.
#[derive(Debug)]
pub(super) struct FourBitMemory {
    memory: Memory,
    code: u64,
    absmax: u64,
    /// 0 without nested scales, like `map`.
    indices: u64,
    map: u64,
    offset: f32,
}

impl FourBitMemory {
    /// Whether the scales are quantised too.
    pub(super) fn nested(&self) -> bool {
        self.indices != 0
    }

    pub(super) fn new(device: &Arc<CudaDevice>, packed: &Packed, code: &[f32; 16]) -> Self {
        let code = bytemuck::bytes_of(code);
        let (parts, offset): ([&[u8]; 5], f32) = match &packed.absmax {
            Absmax::F32(values) => {
                let values = bytemuck::cast_slice(values);
                ([&packed.codes, code, values, &[], &[]], 0.0)
            }
            Absmax::Nested {
                indices,
                map,
                nested,
                offset,
            } => {
                let (nested, map) = (bytemuck::cast_slice(nested), bytemuck::bytes_of(&**map));
                ([&packed.codes, code, nested, indices, map], *offset)
            }
        };
        let (memory, [_, code, absmax, indices, map]) = upload(device, parts);
        Self {
            memory,
            code,
            absmax,
            indices,
            map,
            offset,
        }
    }

    pub(super) fn device(&self) -> &Arc<CudaDevice> {
        self.memory.device()
    }
}

/// Bytes and scales of a matrix on a GPU.
#[derive(Debug)]
pub(super) struct Int8Memory {
    memory: Memory,
    absmax: u64,
}

impl Int8Memory {
    pub(super) fn new(device: &Arc<CudaDevice>, scaled: &Scaled) -> Self {
        let parts = [
            bytemuck::cast_slice(&scaled.values),
            bytemuck::cast_slice(&scaled.absmax),
        ];
        let (memory, [_, absmax]) = upload(device, parts);
        Self { memory, absmax }
    }

    /// Addresses of the bytes and of the scales.
    pub(super) fn codes(&self) -> u64 {
        self.memory.ptr()
    }

    pub(super) fn absmax(&self) -> u64 {
        self.absmax
    }

    pub(super) fn device(&self) -> &Arc<CudaDevice> {
        self.memory.device()
    }
}

/// The parts in one allocation, each aligned to 16 bytes, and their addresses; 0 for an empty one.
fn upload<const N: usize>(device: &Arc<CudaDevice>, parts: [&[u8]; N]) -> (Memory, [u64; N]) {
    let room = |part: &[u8]| part.len().next_multiple_of(16);
    let memory = device.alloc(parts.iter().map(|part| room(part)).sum());
    let mut at = memory.ptr();
    let addresses = parts.map(|part| {
        if part.is_empty() {
            return 0;
        }
        // A failure is remembered by the device and reported by its next operation.
        let _ = device.upload(at, part);
        at += room(part) as u64;
        at - room(part) as u64
    });
    (memory, addresses)
}

/// As in kernel.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct FourBit {
    packed: u64,
    code: u64,
    absmax: u64,
    indices: u64,
    map: u64,
    out: u64,
    pitch: u64,
    len: u64,
    cols: u32,
    block_shift: u32,
    offset: f32,
    eights: u32,
}

pub(super) fn four_bit(memory: &FourBitMemory, block: usize, out: ViewMut<'_>) -> Result<()> {
    // The kernel divides by the same number.
    const { assert!(NESTED_BLOCK == 256) };
    let (len, eights) = (out.rows() * out.cols(), has_eights(&out));
    let params = FourBit {
        packed: memory.memory.ptr(),
        code: memory.code,
        absmax: memory.absmax,
        indices: memory.indices,
        map: memory.map,
        out: out.ptr(),
        pitch: out.pitch() as u64,
        len: len as u64,
        cols: out.cols() as u32,
        block_shift: block.trailing_zeros(),
        offset: memory.offset,
        eights: u32::from(eights),
    };
    let kernel = format!("dequantise_four_bit_{}", out.dtype());
    memory
        .device()
        .launch(&MODULE, &kernel, grid(len, eights), &params)
}

/// As in kernel.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Int8 {
    values: u64,
    absmax: u64,
    out: u64,
    pitch: u64,
    len: u64,
    cols: u32,
    eights: u32,
}

/// The values, or without `scaled` the bytes.
pub(super) fn int8(memory: &Int8Memory, scaled: bool, out: ViewMut<'_>) -> Result<()> {
    let (len, eights) = (out.rows() * out.cols(), has_eights(&out));
    let params = Int8 {
        values: memory.memory.ptr(),
        absmax: if scaled { memory.absmax } else { 0 },
        out: out.ptr(),
        pitch: out.pitch() as u64,
        len: len as u64,
        cols: out.cols() as u32,
        eights: u32::from(eights),
    };
    let kernel = format!("dequantise_int8_{}", out.dtype());
    memory
        .device()
        .launch(&MODULE, &kernel, grid(len, eights), &params)
}

/// Whether every row is made of eights that start at multiples of 16 bytes.
fn has_eights(out: &ViewMut<'_>) -> bool {
    let aligned =
        out.ptr().is_multiple_of(16) && (out.pitch() * out.dtype().bytes()).is_multiple_of(16);
    let few = out.rows() * out.cols() / EACH <= u32::MAX as usize;
    aligned && few && out.cols().is_multiple_of(EACH)
}

fn grid(len: usize, eights: bool) -> Grid {
    let per_block = THREADS * if eights { EACH } else { 1 };
    Grid::new(len.div_ceil(per_block) as u32, THREADS as u32)
}
