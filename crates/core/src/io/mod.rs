//! Files: safetensors in and out, model directories, and writes that survive a crash.
//!
//! Nothing here trusts a file: a header is checked against the length of its file before anything
//! is allocated, names that come from files pass [`safe_file_name`], and pickle is never read.
//! Nothing here leaves half a file: every write goes to a hidden temporary name, is flushed to disk
//! and renamed.

mod atomic;
mod convert;
mod digest;
mod file_name;
pub(crate) mod gguf;
mod json;
mod model_files;
mod output_lock;
mod position;
pub(crate) mod quantised;
mod safetensors_file;
mod safetensors_header;
mod safetensors_writer;
mod staged_dir;
#[cfg(test)]
mod tests;
mod until_closed;
mod weights_digest;

pub(crate) use atomic::remove_dir;
pub use atomic::{holds_set_aside, probe_writable, remove_stale, write_file, write_file_with};
pub use digest::{blake3_of_bytes, blake3_of_file, blake3_of_files};
pub use file_name::safe_file_name;
pub(crate) use model_files::is_buffer;
pub use model_files::{ModelFiles, find_pickle};
pub use output_lock::OutputLock;
pub(crate) use position::read_exact_at;
pub use safetensors::Dtype as FileDType;
pub use safetensors_file::SafetensorsFile;
pub use safetensors_header::TensorMeta;
pub use safetensors_writer::{TensorData, write_safetensors};
pub use staged_dir::StagedDir;
pub use until_closed::UntilClosed;

#[cfg(target_endian = "big")]
compile_error!(
    "weights are little-endian on disk and are read in place: big-endian hosts are not supported"
);
