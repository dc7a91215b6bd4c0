//! Digests that tell one base or data set from another, cheap enough for the start of every run.

use crate::data::Examples;
use crate::{Error, Result};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

/// Bytes read at the start and at the end of a file.
const END_BYTES: u64 = 1 << 20;
/// Bytes of each block between.
const BLOCK_BYTES: u64 = 64 << 10;
/// Blocks between, evenly spaced.
const BLOCKS: u64 = 16;

/// BLAKE3, in hexadecimal, over the length of a file and samples of its bytes.
///
/// The samples are the first and the last MiB and 16 blocks of 64 KiB, evenly spaced; a file of up
/// to 3 MiB is read as a whole. Training changes every value of a weight, so other weights of the
/// same shapes are told apart, in a time that does not grow with the model. A change of single bytes
/// between the samples is not seen.
///
/// # Errors
/// [`Error::Read`].
pub fn sampled_digest(path: &Path) -> Result<String> {
    let digest = || -> std::io::Result<String> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        let mut hasher = blake3::Hasher::new();
        hasher.update(&length.to_le_bytes());
        for (start, bytes) in samples(length) {
            file.seek(SeekFrom::Start(start))?;
            let read = std::io::copy(&mut Read::by_ref(&mut file).take(bytes), &mut hasher)?;
            if read != bytes {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(hasher.finalize().to_hex().to_string())
    };
    digest().map_err(Error::read(path))
}

/// Starts and lengths of what is read of a file of `length` bytes.
fn samples(length: u64) -> Vec<(u64, u64)> {
    let sampled = 2 * END_BYTES + BLOCKS * BLOCK_BYTES;
    if length <= sampled {
        return vec![(0, length)];
    }
    let gap = (length - sampled) / (BLOCKS + 1);
    let block = |i: u64| {
        let start = END_BYTES + gap + i * (BLOCK_BYTES + gap);
        (start, BLOCK_BYTES)
    };
    let mut samples = vec![(0, END_BYTES)];
    samples.extend((0..BLOCKS).map(block));
    samples.push((length - END_BYTES, END_BYTES));
    samples
}

/// BLAKE3, in hexadecimal, over the tokens and labels of all examples, in their order.
///
/// # Errors
/// [`Error::Read`] if they lie in a file that cannot be read.
pub fn data_digest(examples: &Examples) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut bytes = Vec::new();
    examples.for_each(|_, example| {
        bytes.clear();
        bytes.extend_from_slice(&(example.len() as u64).to_le_bytes());
        bytes.extend(example.input_ids.iter().flat_map(|v| v.to_le_bytes()));
        bytes.extend(example.labels.iter().flat_map(|v| v.to_le_bytes()));
        hasher.update(&bytes);
        Ok(())
    })?;
    Ok(hasher.finalize().to_hex().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_in_order_apart_and_inside_the_file() {
        for length in [0, 1, 3 << 20, (3 << 20) + 1, 5 << 20, 7 << 30] {
            let mut end = 0;
            for (start, bytes) in samples(length) {
                assert!(start >= end, "{start} before {end} of {length}");
                end = start + bytes;
            }
            assert_eq!(end, length);
        }
    }

    #[test]
    fn a_byte_in_a_sample_and_the_length_change_the_digest() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("weights");
        let mut bytes = vec![7_u8; 4 << 20];
        let digest = |bytes: &[u8]| {
            std::fs::write(&path, bytes).expect("writable");
            sampled_digest(&path).expect("readable")
        };
        let before = digest(&bytes);
        assert_eq!(before, digest(&bytes));
        for (start, _) in samples(bytes.len() as u64) {
            let at = usize::try_from(start).expect("small");
            bytes[at] ^= 1;
            assert_ne!(before, digest(&bytes), "byte {at}");
            bytes[at] ^= 1;
        }
        bytes.push(7);
        assert_ne!(before, digest(&bytes));
        assert!(sampled_digest(&dir.path().join("none")).is_err());
    }
}
