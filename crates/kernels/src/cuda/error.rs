//! Status codes of the CUDA libraries as errors.

use super::bindings::{CublasLt, Driver, Nvrtc};
use super::library::text;
use crate::error::ErrorKind;
use crate::{Error, Result};
use cudarc::driver::sys::cudaError_enum as code;

/// Refuses a status of the driver other than success.
pub(super) fn driver(driver: &Driver, op: &str, status: u32) -> Result<()> {
    if status == code::CUDA_SUCCESS as u32 {
        return Ok(());
    }
    let describe = |function: unsafe extern "C" fn(u32, *mut *const _) -> u32| {
        let mut pointer = std::ptr::null();
        // SAFETY: the pointer is valid for one string, which is static in the driver.
        unsafe {
            function(status, &mut pointer);
            text(pointer)
        }
    };
    let (kind, fix) = classify(status);
    Err(Error::Cuda {
        op: op.to_owned(),
        code: status,
        name: describe(driver.error_name),
        meaning: describe(driver.error_string),
        fix,
        kind,
    })
}

/// Refuses a status of the compiler other than success.
pub(super) fn nvrtc(nvrtc: &Nvrtc, op: &str, status: u32) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    Err(Error::Cuda {
        op: op.to_owned(),
        code: status,
        // SAFETY: the string is static in the library.
        name: unsafe { text((nvrtc.error_string)(status)) },
        meaning: "the run-time compiler failed".into(),
        fix: if status == NVRTC_BUILTINS_MISSING {
            "libnvrtc-builtins.so of the same version has to lie beside libnvrtc.so"
        } else {
            ""
        },
        kind: ErrorKind::Environment,
    })
}

const NVRTC_BUILTINS_MISSING: u32 = 7;

/// Refuses a status of cublasLt other than success.
pub(super) fn cublaslt(cublaslt: &CublasLt, op: &str, status: u32) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    let (kind, fix) = match status {
        // ARCH_MISMATCH
        8 => (
            ErrorKind::Environment,
            "this GPU is too old for libcublasLt",
        ),
        // NOT_INITIALIZED
        1 => (
            ErrorKind::Environment,
            "libcublasLt does not fit the driver; install the one of the driver's CUDA version",
        ),
        // ALLOC_FAILED
        3 => (ErrorKind::OutOfMemory, SMALLER),
        // EXECUTION_FAILED, and INTERNAL_ERROR, as which a fault of the device can come back
        13 | 14 => (ErrorKind::DeviceFault, DEVICE_FIX),
        _ => (ErrorKind::Internal, ""),
    };
    Err(Error::Cuda {
        op: op.to_owned(),
        code: status,
        // SAFETY: the string is static in the library.
        name: unsafe { text((cublaslt.status_string)(status)) },
        meaning: "the matrix product failed".into(),
        fix,
        kind,
    })
}

/// Whether a status of the driver says that memory ran out.
pub(super) fn is_out_of_memory(status: u32) -> bool {
    status == code::CUDA_ERROR_OUT_OF_MEMORY as u32
}

/// What a status of the driver means for the process, and what helps.
fn classify(status: u32) -> (ErrorKind, &'static str) {
    const DEVICE: [code; 12] = [
        code::CUDA_ERROR_ECC_UNCORRECTABLE,
        code::CUDA_ERROR_NVLINK_UNCORRECTABLE,
        code::CUDA_ERROR_ILLEGAL_ADDRESS,
        code::CUDA_ERROR_LAUNCH_FAILED,
        code::CUDA_ERROR_LAUNCH_TIMEOUT,
        code::CUDA_ERROR_HARDWARE_STACK_ERROR,
        code::CUDA_ERROR_ILLEGAL_INSTRUCTION,
        code::CUDA_ERROR_MISALIGNED_ADDRESS,
        code::CUDA_ERROR_INVALID_ADDRESS_SPACE,
        code::CUDA_ERROR_INVALID_PC,
        code::CUDA_ERROR_SYSTEM_NOT_READY,
        code::CUDA_ERROR_UNKNOWN,
    ];
    const ENVIRONMENT: [(code, &str); 10] = [
        (
            code::CUDA_ERROR_NO_DEVICE,
            "no GPU is visible: check CUDA_VISIBLE_DEVICES, and the container's GPU access",
        ),
        (
            code::CUDA_ERROR_DEVICE_UNAVAILABLE,
            "another process has this GPU for itself: end it, or see `nvidia-smi -q -d COMPUTE` for the compute mode",
        ),
        (
            code::CUDA_ERROR_STUB_LIBRARY,
            "this libcuda.so.1 is the toolkit's link stub; remove it from the library path",
        ),
        (
            code::CUDA_ERROR_INVALID_DEVICE,
            "there is no GPU of that number",
        ),
        (
            code::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH,
            "the driver's kernel module and libcuda.so.1 differ; reboot, or reload the module",
        ),
        (
            code::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE,
            "the CUDA compatibility package does not support this GPU; remove it from the path",
        ),
        (code::CUDA_ERROR_NO_BINARY_FOR_GPU, OLD_DRIVER),
        (code::CUDA_ERROR_INVALID_IMAGE, OLD_DRIVER),
        (code::CUDA_ERROR_UNSUPPORTED_PTX_VERSION, OLD_DRIVER),
        (code::CUDA_ERROR_NOT_SUPPORTED, "update the NVIDIA driver"),
    ];
    if is_out_of_memory(status) {
        return (ErrorKind::OutOfMemory, SMALLER);
    }
    // Contained faults are newer than the oldest headers that can be built against.
    const CONTAINED: u32 = 721;
    if status == CONTAINED || DEVICE.iter().any(|&fault| fault as u32 == status) {
        return (ErrorKind::DeviceFault, DEVICE_FIX);
    }
    ENVIRONMENT
        .iter()
        .find(|(listed, _)| *listed as u32 == status)
        .map_or((ErrorKind::Internal, ""), |&(_, fix)| {
            (ErrorKind::Environment, fix)
        })
}

const SMALLER: &str = "a smaller micro-batch or a shorter max_length needs less";

const DEVICE_FIX: &str = "the GPU or this process's state on it is lost; `dmesg | grep Xid` names the cause, and a \
                          restart resumes from the last checkpoint";

const OLD_DRIVER: &str = "the driver is too old for these kernels, or they are for another GPU: \
                          update the driver, or compile them with the libnvrtc of its CUDA version";

#[cfg(test)]
mod tests {
    use super::{classify, code};
    use crate::ErrorKind;

    #[test]
    fn codes_are_sorted_by_what_the_scheduler_should_do() {
        for (status, kind) in [
            (code::CUDA_ERROR_OUT_OF_MEMORY, ErrorKind::OutOfMemory),
            (code::CUDA_ERROR_ECC_UNCORRECTABLE, ErrorKind::DeviceFault),
            (code::CUDA_ERROR_ILLEGAL_ADDRESS, ErrorKind::DeviceFault),
            (code::CUDA_ERROR_NO_DEVICE, ErrorKind::Environment),
            (
                code::CUDA_ERROR_UNSUPPORTED_PTX_VERSION,
                ErrorKind::Environment,
            ),
            (code::CUDA_ERROR_INVALID_VALUE, ErrorKind::Internal),
        ] {
            assert_eq!(classify(status as u32).0, kind, "{status:?}");
        }
        assert_eq!(classify(123_456).0, ErrorKind::Internal, "unknown codes");
    }
}
