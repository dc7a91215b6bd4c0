//! The functions of NCCL that are called, and their types.
//!
//! NCCL's ABI is append-only: a structure grows at its end and carries its size and version, so the one of
//! the oldest release supported works with every later one, which takes its own defaults for the rest.
//! Status codes stay integers, because a newer library may return one that no enum lists.
//!
//! # Source
//! `src/nccl.h.in` of NCCL 2.18 to 2.30, and how `parseCommConfig` in its `src/init.cc` reads a shorter
//! structure.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::ptr;

/// `ncclResult_t`.
pub(super) type Status = c_int;
/// `ncclComm_t`.
pub(super) type RawCommunicator = *mut c_void;
/// `cudaStream_t`.
pub(super) type RawStream = *mut c_void;

/// The call did what it was asked to.
pub(super) const SUCCESS: Status = 0;
/// An argument is wrong.
pub(super) const INVALID_ARGUMENT: Status = 4;
/// A call that may not be made, two ranks on one GPU among them.
pub(super) const INVALID_USAGE: Status = 5;
/// The call began something; `ncclCommGetAsyncError` says when it has ended.
pub(super) const IN_PROGRESS: Status = 7;
/// Names of the codes, by number.
const NAMES: [&str; 9] = [
    "ncclSuccess",
    "ncclUnhandledCudaError",
    "ncclSystemError",
    "ncclInternalError",
    "ncclInvalidArgument",
    "ncclInvalidUsage",
    "ncclRemoteError",
    "ncclInProgress",
    "ncclTimeout",
];

/// `ncclFloat32` of `ncclDataType_t`.
pub(super) const FLOAT32: c_int = 7;
/// `ncclSum` of `ncclRedOp_t`.
pub(super) const SUM: c_int = 0;

/// The name of a status.
pub(super) fn name(status: Status) -> String {
    let known = usize::try_from(status).ok().and_then(|i| NAMES.get(i));
    known.map_or_else(|| format!("status {status}"), ToString::to_string)
}

/// Bytes of a [`UniqueId`].
pub(super) const UNIQUE_ID_BYTES: usize = 128;

/// `ncclUniqueId`: what ranks find each other by; made by one, given to all.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct UniqueId(pub(super) [u8; UNIQUE_ID_BYTES]);

/// `NCCL_CONFIG_UNDEF_INT`: the library's own default.
const UNDEFINED: c_int = c_int::MIN;

/// `ncclConfig_t` as of 2.18.
#[repr(C)]
pub(super) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
    /// Padding of this release; later ones have a field here.
    later: c_int,
}

impl Config {
    /// `NCCL_CONFIG_INITIALIZER` with `blocking = 0`: calls begin, and are polled for their end.
    pub(super) fn non_blocking() -> Self {
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            version: 21_800,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: ptr::null(),
            split_share: UNDEFINED,
            later: UNDEFINED,
        }
    }
}

/// The functions, filled from an opened library.
///
/// There is no grouping (`ncclGroupStart`): it joins collectives into one, which would make the order of
/// additions depend on what happens to be ready together.
#[derive(Clone, Copy)]
pub(super) struct Api {
    pub(super) get_version: unsafe extern "C" fn(*mut c_int) -> Status,
    pub(super) error_string: unsafe extern "C" fn(Status) -> *const c_char,
    pub(super) last_error: unsafe extern "C" fn(RawCommunicator) -> *const c_char,
    pub(super) unique_id: unsafe extern "C" fn(*mut UniqueId) -> Status,
    pub(super) init_rank:
        unsafe extern "C" fn(*mut RawCommunicator, c_int, UniqueId, c_int, *mut Config) -> Status,
    pub(super) async_error: unsafe extern "C" fn(RawCommunicator, *mut Status) -> Status,
    pub(super) all_reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_int,
        c_int,
        RawCommunicator,
        RawStream,
    ) -> Status,
    pub(super) broadcast: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_int,
        c_int,
        RawCommunicator,
        RawStream,
    ) -> Status,
    pub(super) finalize: unsafe extern "C" fn(RawCommunicator) -> Status,
    pub(super) destroy: unsafe extern "C" fn(RawCommunicator) -> Status,
    pub(super) abort: unsafe extern "C" fn(RawCommunicator) -> Status,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::{offset_of, size_of};

    /// Offsets of the C structure on a 64-bit machine, counted from the header: 8 + 4 + 4 + 4 * 4, a
    /// pointer, an int, and padding to the alignment of the pointer.
    #[test]
    fn structures_have_the_layout_of_the_header() {
        assert_eq!(size_of::<UniqueId>(), 128);
        assert_eq!(
            [
                offset_of!(Config, size),
                offset_of!(Config, magic),
                offset_of!(Config, version),
                offset_of!(Config, blocking),
                offset_of!(Config, cga_cluster_size),
                offset_of!(Config, min_ctas),
                offset_of!(Config, max_ctas),
                offset_of!(Config, net_name),
                offset_of!(Config, split_share),
                size_of::<Config>(),
            ],
            [0, 8, 12, 16, 20, 24, 28, 32, 40, 48]
        );
    }

    #[test]
    fn statuses_have_names_also_those_of_later_releases() {
        assert_eq!(name(IN_PROGRESS), "ncclInProgress");
        assert_eq!(name(INVALID_USAGE), "ncclInvalidUsage");
        assert_eq!(name(99), "status 99");
    }
}
