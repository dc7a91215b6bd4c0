//! Files of text, compressed or not, told apart by their first bytes.

use crate::{Error, Result};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

const BUFFER_BYTES: usize = 1 << 18;

/// How much larger than its file a text may be, and what is always allowed. Rows of JSON shrink by a
/// factor of 3 to 20; 200 is far beyond, and 1000 is what a gzip file made to fill a disk reaches.
pub(super) const MAX_EXPANSION: u64 = 200;
pub(super) const ALWAYS_ALLOWED: u64 = 64 << 20;

/// Largest window of a zstd stream: 128 MiB, as `zstd --long` writes.
const MAX_ZSTD_WINDOW_LOG: u32 = 27;

/// Bytes that rows of a file of `length` bytes may have.
pub(super) fn most_bytes(length: u64) -> u64 {
    length
        .saturating_mul(MAX_EXPANSION)
        .saturating_add(ALWAYS_ALLOWED)
}

/// Opens a file; gzip and zstd are decompressed while it is read.
///
/// # Errors
/// [`Error::Read`] when it cannot be opened. Reading fails when the stream is broken, or expands far
/// beyond what rows do.
pub(super) fn open(path: &Path) -> Result<Box<dyn BufRead + Send>> {
    let file = File::open(path).map_err(Error::read(path))?;
    let bytes = file.metadata().map_err(Error::read(path))?.len();
    let mut plain = BufReader::with_capacity(BUFFER_BYTES, file);
    let first = plain.fill_buf().map_err(Error::read(path))?;
    let is_gzip = first.starts_with(&[0x1f, 0x8b]);
    let is_zstd = first.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]);
    let limit = most_bytes(bytes);
    if is_gzip {
        return Ok(bounded(flate2::bufread::MultiGzDecoder::new(plain), limit));
    }
    if is_zstd {
        let mut decoder =
            zstd::stream::read::Decoder::with_buffer(plain).map_err(Error::read(path))?;
        decoder
            .window_log_max(MAX_ZSTD_WINDOW_LOG)
            .map_err(Error::read(path))?;
        return Ok(bounded(decoder, limit));
    }
    Ok(Box::new(plain))
}

fn bounded(inner: impl Read + Send + 'static, limit: u64) -> Box<dyn BufRead + Send> {
    let bounded = Bounded {
        inner,
        read: 0,
        limit,
    };
    Box::new(BufReader::with_capacity(BUFFER_BYTES, bounded))
}

/// Refuses to give more than a limit.
struct Bounded<R> {
    inner: R,
    read: u64,
    limit: u64,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.read += count as u64;
        if self.read > self.limit {
            let message = format!(
                "it expands to more than {} bytes, over {MAX_EXPANSION} times its size, which rows \
                 of data do not; decompress it yourself if it is what you mean",
                self.limit
            );
            return Err(io::Error::other(message));
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn read(bytes: &[u8]) -> io::Result<String> {
        let file = tempfile::NamedTempFile::new().expect("a temporary file can be made");
        std::fs::write(file.path(), bytes).expect("the file is writable");
        let mut text = String::new();
        open(file.path())
            .expect("the file is there")
            .read_to_string(&mut text)?;
        Ok(text)
    }

    fn gzip(text: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        encoder.write_all(text).expect("memory is writable");
        encoder.finish().expect("memory is writable")
    }

    #[test]
    fn compressed_and_plain_files_read_the_same() {
        let text = "{\"text\": \"a\"}\n".repeat(1000);
        let zstd = zstd::encode_all(text.as_bytes(), 3).expect("memory is writable");
        let two = [gzip(text.as_bytes()), gzip(b"x")].concat();
        assert_eq!(read(text.as_bytes()).ok(), Some(text.clone()));
        assert_eq!(read(&gzip(text.as_bytes())).ok(), Some(text.clone()));
        assert_eq!(read(&zstd).ok(), Some(text.clone()));
        assert_eq!(read(&two).ok(), Some(text + "x"));
    }

    #[test]
    fn a_file_made_to_fill_memory_and_a_broken_one_are_refused() {
        let bomb = vec![b'\n'; 200 << 20];
        let zstd = zstd::encode_all(bomb.as_slice(), 3).expect("memory is writable");
        for bytes in [gzip(&bomb), zstd] {
            let message = read(&bytes).expect_err("it is too large").to_string();
            assert!(message.contains("expands to more than"), "{message}");
        }
        let whole = gzip(&[7; 10_000]);
        assert!(read(&whole[..whole.len() / 2]).is_err());
    }
}
