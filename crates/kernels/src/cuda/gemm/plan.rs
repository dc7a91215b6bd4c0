//! What cublasLt is told about a product: descriptors, preferences, algorithms.

use super::super::bindings::{CublasLt, Heuristic, Raw};
use super::super::error;
use super::{Gemm, Open, WORKSPACE};
use crate::matmul::Layout;
use crate::{DType, Error, Result};
use cudarc::cublaslt::sys as lt;
use serde::{Deserialize, Serialize};
use std::ffi::c_int;

/// Algorithms asked for at most.
pub(super) const CANDIDATES: usize = 8;

/// What an algorithm is chosen for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Shape {
    layout: Layout,
    m: usize,
    n: usize,
    k: usize,
    input: Precision,
    output: Precision,
    /// Of a, b and dst.
    pitches: [usize; 3],
    /// Bytes that the addresses of a, b and dst are multiples of, at most 256.
    alignments: [u32; 3],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) enum Precision {
    F32,
    Bf16,
}

impl Precision {
    fn of(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self::F32,
            DType::Bf16 => Self::Bf16,
        }
    }

    fn code(self) -> u32 {
        match self {
            Self::F32 => lt::cudaDataType_t::CUDA_R_32F as u32,
            Self::Bf16 => lt::cudaDataType_t::CUDA_R_16BF as u32,
        }
    }
}

impl Shape {
    /// What `gemm` asks for, if cublasLt offers it.
    pub(super) fn of(gemm: &Gemm) -> Result<Self> {
        let (input, output) = (Precision::of(gemm.a.dtype), Precision::of(gemm.dst.dtype));
        if gemm.a.dtype != gemm.b.dtype || (input == Precision::F32 && output == Precision::Bf16) {
            return Err(Error::Invalid {
                op: "cuda::gemm",
                message: format!(
                    "{} x {} to {} is not offered; both inputs have one dtype, and f32 inputs an f32 \
                 result",
                    gemm.a.dtype, gemm.b.dtype, gemm.dst.dtype
                ),
            });
        }
        let operands = [gemm.a, gemm.b, gemm.dst];
        Ok(Self {
            layout: gemm.layout,
            m: gemm.m,
            n: gemm.n,
            k: gemm.k,
            input,
            output,
            pitches: operands.map(|operand| operand.pitch),
            alignments: operands.map(|operand| 1 << operand.ptr.trailing_zeros().min(8)),
        })
    }
}

/// Descriptors of one shape and its algorithm.
pub(super) struct Plan {
    pub(super) operation: Described,
    /// `b`, the first operand of the transposed product.
    pub(super) first: Described,
    pub(super) second: Described,
    pub(super) result: Described,
    library: &'static CublasLt,
    pub(super) algorithm: lt::cublasLtMatmulAlgo_t,
}

/// A descriptor of cublasLt and what closes it.
pub(super) struct Described {
    pub(super) raw: Raw,
    close: unsafe extern "C" fn(Raw) -> u32,
}

// SAFETY: a descriptor is plain memory of the library, used under the lock of `Gemms`.
unsafe impl Send for Described {}

impl Drop for Described {
    fn drop(&mut self) {
        // SAFETY: open, and closed nowhere else.
        unsafe { (self.close)(self.raw) };
    }
}

impl Plan {
    pub(super) fn new(library: &'static CublasLt, shape: &Shape) -> Result<Self> {
        use lt::cublasLtMatmulDescAttributes_t as attribute;
        let operation = describe(library, library.desc_destroy, |raw| {
            let compute = lt::cublasComputeType_t::CUBLAS_COMPUTE_32F as u32;
            // SAFETY: the pointer is valid for one handle.
            unsafe { (library.desc_create)(raw, compute, Precision::F32.code()) }
        })?;
        // Stored rows of each matrix are columns there, so what is transposed here is not there.
        let (first, second) = match shape.layout {
            Layout::Nt => (true, false),
            Layout::Nn => (false, false),
            Layout::Tn => (false, true),
        };
        for (attribute, transposed) in [
            (attribute::CUBLASLT_MATMUL_DESC_TRANSA, first),
            (attribute::CUBLASLT_MATMUL_DESC_TRANSB, second),
        ] {
            let value = c_int::from(transposed);
            // SAFETY: the attribute is a 32-bit integer.
            let status = unsafe {
                (library.desc_set)(
                    operation.raw,
                    attribute as u32,
                    (&raw const value).cast(),
                    size_of::<c_int>(),
                )
            };
            error::cublaslt(library, "describing a product", status)?;
        }
        let (m, n, k) = (shape.m, shape.n, shape.k);
        let stored = |transposed: bool, rows, cols| {
            if transposed {
                [cols, rows]
            } else {
                [rows, cols]
            }
        };
        let matrix = |precision: Precision, [rows, cols]: [usize; 2], pitch: usize| {
            describe(library, library.layout_destroy, |raw| {
                // SAFETY: the pointer is valid for one handle.
                unsafe {
                    (library.layout_create)(
                        raw,
                        precision.code(),
                        rows as u64,
                        cols as u64,
                        pitch as i64,
                    )
                }
            })
        };
        let [a, b, dst] = shape.pitches;
        Ok(Self {
            first: matrix(shape.input, stored(first, n, k), b)?,
            second: matrix(shape.input, stored(second, k, m), a)?,
            result: matrix(shape.output, [n, m], dst)?,
            operation,
            library,
            algorithm: lt::cublasLtMatmulAlgo_t { data: [0; 8] },
        })
    }

    /// Up to `count` algorithms, the one expected to be fastest first; at least one.
    pub(super) fn candidates(
        &self,
        open: Open,
        shape: &Shape,
        count: usize,
    ) -> Result<Vec<lt::cublasLtMatmulAlgo_t>> {
        let preference = preference(self.library, shape)?;
        let mut results = [Heuristic::EMPTY; CANDIDATES];
        let mut found: c_int = 0;
        // SAFETY: descriptors are open; the array has room for `count`, at most its length.
        let status = unsafe {
            (self.library.heuristic)(
                open.handle.0,
                self.operation.raw,
                self.first.raw,
                self.second.raw,
                self.result.raw,
                self.result.raw,
                preference.raw,
                count.min(CANDIDATES) as c_int,
                results.as_mut_ptr(),
                &mut found,
            )
        };
        let op = || format!("choosing an algorithm for {shape:?}");
        error::cublaslt(self.library, &op(), status)?;
        let found = usize::try_from(found).unwrap_or(0).min(CANDIDATES);
        let usable = results[..found].iter().filter(|result| result.state == 0);
        let usable: Vec<_> = usable.map(|result| result.algo).collect();
        if usable.is_empty() {
            const NOT_SUPPORTED: u32 = 15;
            error::cublaslt(self.library, &op(), NOT_SUPPORTED)?;
        }
        Ok(usable)
    }

    /// Takes a recorded algorithm, if the library still offers it within the workspace.
    pub(super) fn accept(&mut self, open: Open, algorithm: [u64; 8]) -> bool {
        self.algorithm.data = algorithm;
        let mut result = Heuristic::EMPTY;
        // SAFETY: descriptors are open and both pointers valid.
        let status = unsafe {
            (self.library.check_algorithm)(
                open.handle.0,
                self.operation.raw,
                self.first.raw,
                self.second.raw,
                self.result.raw,
                self.result.raw,
                &self.algorithm,
                &mut result,
            )
        };
        status == 0 && result.state == 0 && result.workspace <= WORKSPACE
    }
}

fn describe(
    library: &CublasLt,
    close: unsafe extern "C" fn(Raw) -> u32,
    create: impl FnOnce(*mut Raw) -> u32,
) -> Result<Described> {
    let mut raw = std::ptr::null_mut();
    error::cublaslt(library, "describing a product", create(&mut raw))?;
    Ok(Described { raw, close })
}

/// What an algorithm may use and assume.
fn preference(library: &CublasLt, shape: &Shape) -> Result<Described> {
    use lt::cublasLtMatmulPreferenceAttributes_t as attribute;
    let preference = describe(library, library.preference_destroy, |raw| {
        // SAFETY: the pointer is valid for one handle.
        unsafe { (library.preference_create)(raw) }
    })?;
    let set = |attribute: attribute, bytes: &[u8]| {
        // SAFETY: the bytes are the attribute's value, of its size.
        let status = unsafe {
            (library.preference_set)(
                preference.raw,
                attribute as u32,
                bytes.as_ptr().cast(),
                bytes.len(),
            )
        };
        error::cublaslt(library, "describing a product", status)
    };
    let [a, b, dst] = shape.alignments;
    set(
        attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
        &(WORKSPACE as u64).to_ne_bytes(),
    )?;
    // Split sums may only be added in f32 in the workspace: in place, their order is open.
    let scheme = lt::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
    for (attribute, value) in [
        (
            attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
            scheme,
        ),
        (attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, b),
        (attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, a),
        (attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, dst),
        (attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, dst),
    ] {
        set(attribute, &value.to_ne_bytes())?;
    }
    Ok(preference)
}
