//! Checksums of files.

use crate::{Error, Result};
use rayon::prelude::*;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Bytes hashed at a time.
const PIECE_BYTES: usize = 1 << 20;

/// BLAKE3 of some bytes, in hexadecimal.
#[must_use]
pub fn blake3_of_bytes(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

/// BLAKE3 of a file, in hexadecimal, and its length in bytes.
///
/// # Errors
/// [`Error::Read`].
pub fn blake3_of_file(path: &Path) -> Result<(String, u64)> {
    let mut file = File::open(path).map_err(Error::read(path))?;
    let mut hasher = blake3::Hasher::new();
    let length = file.metadata().map_err(Error::read(path))?.len();
    // One byte more than the file has, so that its end is seen by the same read.
    let mut piece = vec![
        0;
        usize::try_from(length)
            .map_or(PIECE_BYTES, |n| n.saturating_add(1).min(PIECE_BYTES))
    ];
    loop {
        match file.read(&mut piece) {
            Ok(0) => return Ok((hasher.finalize().to_hex().to_string(), hasher.count())),
            Ok(n) => {
                hasher.update(&piece[..n]);
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::read(path)(e)),
        }
    }
}

/// [`blake3_of_file`] of several files at once, in their order.
///
/// # Errors
/// [`Error::Read`].
pub fn blake3_of_files<P: AsRef<Path> + Sync>(paths: &[P]) -> Result<Vec<(String, u64)>> {
    paths
        .par_iter()
        .map(|path| blake3_of_file(path.as_ref()))
        .collect()
}
