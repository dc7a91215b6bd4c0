//! The C functions this crate calls, as tables of function pointers filled from an opened library.
//!
//! cudarc declares the types and constants. Its own loader is not used: it tries `libcuda.so`, the
//! toolkit's link stub, before `libcuda.so.1`, cannot be given a path, and panics if nothing is
//! there. Status codes stay integers, because a newer library may return one that no enum lists.

use super::library::Opened;
use crate::Result;
use cudarc::cublaslt::sys as lt;
use cudarc::driver::sys as cu;
use std::ffi::{c_char, c_int, c_uint, c_void};

/// A handle that a library gave out.
pub(super) type Raw = *mut c_void;

/// Declares a table and the function that fills it. Symbols after `optional` may be missing.
macro_rules! table {
    (
        $(#[$doc:meta])* $Table:ident {
            required {
                $($field:ident = $symbol:literal ($($argument:ty),*) -> $output:ty;)*
            }
            optional {
                $($optional:ident = $optional_symbol:literal ($($optional_argument:ty),*) -> $optional_output:ty;)*
            }
        }
    ) => {
        $(#[$doc])*
        pub(super) struct $Table {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) -> $output,)*
            $(pub(super) $optional: Option<unsafe extern "C" fn($($optional_argument),*) -> $optional_output>,)*
        }

        impl $Table {
            pub(super) fn load(library: &Opened) -> Result<Self> {
                // SAFETY: the types are those of the CUDA headers for these symbols, which are
                // stable within the versions that `library` was chosen from; a library stays open
                // for the life of the process.
                unsafe {
                    Ok(Self {
                        $($field: library.symbol($symbol)?,)*
                        $($optional: library.optional_symbol($optional_symbol),)*
                    })
                }
            }
        }
    };
}

table! {
    /// libcuda: the driver.
    Driver {
        required {
            init = "cuInit" (c_uint) -> u32;
            driver_version = "cuDriverGetVersion" (*mut c_int) -> u32;
            error_name = "cuGetErrorName" (u32, *mut *const c_char) -> u32;
            error_string = "cuGetErrorString" (u32, *mut *const c_char) -> u32;
            device_count = "cuDeviceGetCount" (*mut c_int) -> u32;
            device_get = "cuDeviceGet" (*mut c_int, c_int) -> u32;
            device_name = "cuDeviceGetName" (*mut c_char, c_int, c_int) -> u32;
            device_attribute = "cuDeviceGetAttribute" (*mut c_int, c_int, c_int) -> u32;
            primary_context_retain = "cuDevicePrimaryCtxRetain" (*mut Raw, c_int) -> u32;
            primary_context_release = "cuDevicePrimaryCtxRelease_v2" (c_int) -> u32;
            context_set_current = "cuCtxSetCurrent" (Raw) -> u32;
            stream_create = "cuStreamCreate" (*mut Raw, c_uint) -> u32;
            stream_destroy = "cuStreamDestroy_v2" (Raw) -> u32;
            stream_wait_event = "cuStreamWaitEvent" (Raw, Raw, c_uint) -> u32;
            stream_synchronize = "cuStreamSynchronize" (Raw) -> u32;
            default_pool = "cuDeviceGetDefaultMemPool" (*mut Raw, c_int) -> u32;
            pool_set_attribute = "cuMemPoolSetAttribute" (Raw, c_int, *mut c_void) -> u32;
            pool_trim_to = "cuMemPoolTrimTo" (Raw, usize) -> u32;
            memory_info = "cuMemGetInfo_v2" (*mut usize, *mut usize) -> u32;
            alloc_async = "cuMemAllocAsync" (*mut u64, usize, Raw) -> u32;
            free_async = "cuMemFreeAsync" (u64, Raw) -> u32;
            host_alloc = "cuMemHostAlloc" (*mut *mut c_void, usize, c_uint) -> u32;
            host_free = "cuMemFreeHost" (*mut c_void) -> u32;
            copy_to_host_async = "cuMemcpyDtoHAsync_v2" (*mut c_void, u64, usize, Raw) -> u32;
            copy_to_device_async = "cuMemcpyHtoDAsync_v2" (u64, *const c_void, usize, Raw) -> u32;
            copy_on_device_async = "cuMemcpyDtoDAsync_v2" (u64, u64, usize, Raw) -> u32;
            copy_2d_async = "cuMemcpy2DAsync_v2" (*const cu::CUDA_MEMCPY2D, Raw) -> u32;
            fill_bytes_async = "cuMemsetD8Async" (u64, u8, usize, Raw) -> u32;
            module_load = "cuModuleLoadData" (*mut Raw, *const c_void) -> u32;
            module_unload = "cuModuleUnload" (Raw) -> u32;
            module_function = "cuModuleGetFunction" (*mut Raw, Raw, *const c_char) -> u32;
            function_set_attribute = "cuFuncSetAttribute" (Raw, c_int, c_int) -> u32;
            launch_kernel = "cuLaunchKernel" (Raw, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Raw, *mut *mut c_void, *mut *mut c_void) -> u32;
            event_create = "cuEventCreate" (*mut Raw, c_uint) -> u32;
            event_destroy = "cuEventDestroy_v2" (Raw) -> u32;
            event_record = "cuEventRecord" (Raw, Raw) -> u32;
            event_query = "cuEventQuery" (Raw) -> u32;
            event_synchronize = "cuEventSynchronize" (Raw) -> u32;
            event_elapsed = "cuEventElapsedTime" (*mut f32, Raw, Raw) -> u32;
            capture_begin = "cuStreamBeginCapture_v2" (Raw, c_uint) -> u32;
            capture_end = "cuStreamEndCapture" (Raw, *mut Raw) -> u32;
            graph_instantiate = "cuGraphInstantiateWithFlags" (*mut Raw, Raw, u64) -> u32;
            graph_launch = "cuGraphLaunch" (Raw, Raw) -> u32;
            graph_destroy = "cuGraphDestroy" (Raw) -> u32;
            graph_exec_destroy = "cuGraphExecDestroy" (Raw) -> u32;
        }
        optional {
            function_parameter = "cuFuncGetParamInfo" (Raw, usize, *mut usize, *mut usize) -> u32;
            tensor_map_encode = "cuTensorMapEncodeTiled" (*mut c_void, u32, c_uint, *mut c_void, *const u64, *const u64, *const c_uint, *const c_uint, u32, u32, u32, u32) -> u32;
        }
    }
}

table! {
    /// libnvrtc: the compiler.
    Nvrtc {
        required {
            version = "nvrtcVersion" (*mut c_int, *mut c_int) -> u32;
            error_string = "nvrtcGetErrorString" (u32) -> *const c_char;
            create_program = "nvrtcCreateProgram" (*mut Raw, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char) -> u32;
            destroy_program = "nvrtcDestroyProgram" (*mut Raw) -> u32;
            compile_program = "nvrtcCompileProgram" (Raw, c_int, *const *const c_char) -> u32;
            log_size = "nvrtcGetProgramLogSize" (Raw, *mut usize) -> u32;
            log = "nvrtcGetProgramLog" (Raw, *mut c_char) -> u32;
            cubin_size = "nvrtcGetCUBINSize" (Raw, *mut usize) -> u32;
            cubin = "nvrtcGetCUBIN" (Raw, *mut c_char) -> u32;
            ptx_size = "nvrtcGetPTXSize" (Raw, *mut usize) -> u32;
            ptx = "nvrtcGetPTX" (Raw, *mut c_char) -> u32;
        }
        optional {
            arch_count = "nvrtcGetNumSupportedArchs" (*mut c_int) -> u32;
            archs = "nvrtcGetSupportedArchs" (*mut c_int) -> u32;
        }
    }
}

table! {
    /// libcublasLt: matrix products.
    CublasLt {
        required {
            create = "cublasLtCreate" (*mut Raw) -> u32;
            destroy = "cublasLtDestroy" (Raw) -> u32;
            version = "cublasLtGetVersion" () -> usize;
            status_string = "cublasLtGetStatusString" (u32) -> *const c_char;
            desc_create = "cublasLtMatmulDescCreate" (*mut Raw, u32, u32) -> u32;
            desc_destroy = "cublasLtMatmulDescDestroy" (Raw) -> u32;
            desc_set = "cublasLtMatmulDescSetAttribute" (Raw, u32, *const c_void, usize) -> u32;
            layout_create = "cublasLtMatrixLayoutCreate" (*mut Raw, u32, u64, u64, i64) -> u32;
            layout_destroy = "cublasLtMatrixLayoutDestroy" (Raw) -> u32;
            preference_create = "cublasLtMatmulPreferenceCreate" (*mut Raw) -> u32;
            preference_destroy = "cublasLtMatmulPreferenceDestroy" (Raw) -> u32;
            preference_set = "cublasLtMatmulPreferenceSetAttribute" (Raw, u32, *const c_void, usize) -> u32;
            heuristic = "cublasLtMatmulAlgoGetHeuristic" (Raw, Raw, Raw, Raw, Raw, Raw, Raw, c_int, *mut Heuristic, *mut c_int) -> u32;
            check_algorithm = "cublasLtMatmulAlgoCheck" (Raw, Raw, Raw, Raw, Raw, Raw, *const lt::cublasLtMatmulAlgo_t, *mut Heuristic) -> u32;
            matmul = "cublasLtMatmul" (Raw, Raw, *const c_void, *const c_void, Raw, *const c_void, Raw, *const c_void, *const c_void, Raw, *mut c_void, Raw, *const lt::cublasLtMatmulAlgo_t, *mut c_void, usize, Raw) -> u32;
        }
        optional {}
    }
}

/// `cublasLtMatmulHeuristicResult_t` with its status as an integer.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Heuristic {
    pub(super) algo: lt::cublasLtMatmulAlgo_t,
    pub(super) workspace: usize,
    pub(super) state: u32,
    pub(super) waves: f32,
    reserved: [c_int; 4],
}

impl Heuristic {
    pub(super) const EMPTY: Self = Self {
        algo: lt::cublasLtMatmulAlgo_t { data: [0; 8] },
        workspace: 0,
        state: 0,
        waves: 0.0,
        reserved: [0; 4],
    };
}

const _: () = assert!(
    size_of::<Heuristic>() == size_of::<lt::cublasLtMatmulHeuristicResult_t>()
        && std::mem::offset_of!(Heuristic, state)
            == std::mem::offset_of!(lt::cublasLtMatmulHeuristicResult_t, state)
);
