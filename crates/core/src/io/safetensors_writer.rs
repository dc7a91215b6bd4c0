//! Writing safetensors, the same bytes for the same contents.

use super::FileDType;
use super::atomic::write_file_with;
use super::safetensors_header::{LENGTH_BYTES, MAX_HEADER_BYTES};
use crate::{Error, Result};
use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::io::{self, BufWriter, Write};
use std::path::Path;

/// Bytes gathered before a write; larger tensors are written as they are.
const BUFFER_BYTES: usize = 1 << 20;

/// A tensor to be written.
#[derive(Clone, Debug)]
pub struct TensorData<'a> {
    /// Element type.
    pub dtype: FileDType,
    /// Dimensions; the last one is contiguous.
    pub shape: Vec<usize>,
    /// The elements in order, little-endian.
    pub bytes: Cow<'a, [u8]>,
}

impl<'a> TensorData<'a> {
    /// f32 elements, borrowed.
    #[must_use]
    pub fn from_f32(values: &'a [f32], shape: impl Into<Vec<usize>>) -> Self {
        Self {
            dtype: FileDType::F32,
            shape: shape.into(),
            bytes: Cow::Borrowed(bytemuck::cast_slice(values)),
        }
    }
}

/// Writes `tensors` to `path`, whole or not at all.
///
/// Equal contents give equal bytes: names and metadata are sorted (wider dtypes first, so that every
/// tensor stays aligned), the header is padded to 8 bytes, the data is streamed without a second
/// copy, and an empty `metadata` is left out.
///
/// # Errors
/// [`Error::Write`] if the file cannot be written, a tensor's bytes do not fit its shape, or the
/// header would be longer than readers accept.
pub fn write_safetensors(
    path: &Path,
    tensors: &BTreeMap<String, TensorData<'_>>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let mut order: Vec<(&String, &TensorData<'_>)> = tensors.iter().collect();
    // Stable: within a dtype the names stay sorted.
    order.sort_by_key(|(_, tensor)| Reverse(tensor.dtype));
    let header = header(&order, metadata).map_err(Error::write(path))?;
    write_file_with(path, |file| {
        let mut out = BufWriter::with_capacity(BUFFER_BYTES, file);
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        for (_, tensor) in &order {
            out.write_all(&tensor.bytes)?;
        }
        out.flush()
    })
}

fn header(
    order: &[(&String, &TensorData<'_>)],
    metadata: &BTreeMap<String, String>,
) -> io::Result<Vec<u8>> {
    let mut json = vec![b'{'];
    if !metadata.is_empty() {
        json.extend_from_slice(b"\"__metadata__\":");
        serde_json::to_writer(&mut json, metadata)?;
    }
    let mut offset = 0_usize;
    for &(name, tensor) in order {
        check_tensor(name, tensor)?;
        if json.len() > 1 {
            json.push(b',');
        }
        let end = offset + tensor.bytes.len();
        serde_json::to_writer(&mut json, name)?;
        write!(json, ":{{\"dtype\":\"{}\",\"shape\":", tensor.dtype)?;
        serde_json::to_writer(&mut json, &tensor.shape)?;
        write!(json, ",\"data_offsets\":[{offset},{end}]}}")?;
        offset = end;
    }
    json.push(b'}');
    json.resize(json.len().next_multiple_of(LENGTH_BYTES), b' ');
    if json.len() as u64 > MAX_HEADER_BYTES {
        return Err(invalid(format!(
            "{} tensors need a header of {} bytes, readers accept {MAX_HEADER_BYTES}; write shards",
            order.len(),
            json.len()
        )));
    }
    Ok(json)
}

fn check_tensor(name: &str, tensor: &TensorData<'_>) -> io::Result<()> {
    if name == "__metadata__" {
        return Err(invalid("`__metadata__` is not a name for a tensor".into()));
    }
    let bits = tensor
        .shape
        .iter()
        .try_fold(tensor.dtype.bitsize(), |n, &d| n.checked_mul(d));
    if bits.is_some_and(|b| b % 8 == 0 && b / 8 == tensor.bytes.len()) {
        return Ok(());
    }
    Err(invalid(format!(
        "tensor `{name}` of {} {:?} does not take {} bytes",
        tensor.dtype,
        tensor.shape,
        tensor.bytes.len()
    )))
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}
