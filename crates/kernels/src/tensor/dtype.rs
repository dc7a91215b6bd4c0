//! Element types.

use super::{Slice, SliceMut};
use half::bf16;
use std::fmt;

/// Element type of a tensor. Statistics and accumulators are always f32 or wider.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// bfloat16: the upper half of an f32.
    Bf16,
}

impl DType {
    /// Size of one element in bytes.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        })
    }
}

/// A type that a tensor can hold.
pub trait Element: Copy + Default + Send + Sync + bytemuck::Pod + 'static {
    /// Its dtype.
    const DTYPE: DType;
    /// Widens to f32, exactly.
    fn to_f32(self) -> f32;
    /// Rounds to nearest even.
    fn from_f32(value: f32) -> Self;
    /// The slice, if it holds this type.
    fn slice(slice: Slice<'_>) -> Option<&[Self]>;
    /// The mutable slice, if it holds this type.
    fn slice_mut(slice: SliceMut<'_>) -> Option<&mut [Self]>;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
    fn slice(slice: Slice<'_>) -> Option<&[Self]> {
        if let Slice::F32(s) = slice {
            Some(s)
        } else {
            None
        }
    }
    fn slice_mut(slice: SliceMut<'_>) -> Option<&mut [Self]> {
        if let SliceMut::F32(s) = slice {
            Some(s)
        } else {
            None
        }
    }
}

impl Element for bf16 {
    const DTYPE: DType = DType::Bf16;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        // Branch-free so that loops vectorise: round to nearest even, quiet NaN kept a NaN.
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let nan = (bits >> 16) | 0x40;
        let is_nan = (bits & 0x7fff_ffff) > 0x7f80_0000;
        Self::from_bits(if is_nan { nan } else { rounded } as u16)
    }
    fn slice(slice: Slice<'_>) -> Option<&[Self]> {
        if let Slice::Bf16(s) = slice {
            Some(s)
        } else {
            None
        }
    }
    fn slice_mut(slice: SliceMut<'_>) -> Option<&mut [Self]> {
        if let SliceMut::Bf16(s) = slice {
            Some(s)
        } else {
            None
        }
    }
}

/// Runs `$body` with `$T` bound to the element type of `$dtype`.
macro_rules! with_dtype {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::DType::F32 => {
                type $T = f32;
                $body
            }
            $crate::DType::Bf16 => {
                type $T = half::bf16;
                $body
            }
        }
    };
}
pub(crate) use with_dtype;
