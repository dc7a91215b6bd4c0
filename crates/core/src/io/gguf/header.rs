//! The header of a GGUF file: what it claims is checked against the length of the file before it is believed.

use crate::{Error, Result};
use serde_json::{Number, Value};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;

const MAGIC: [u8; 4] = *b"GGUF";
const VERSIONS: [u32; 2] = [2, 3];
/// Headers of models of 100 billion weights with their tokenizers take 15 MB.
const MAX_HEADER: u64 = 256 << 20;
const ALIGNMENT: &str = "general.alignment";
const DEFAULT_ALIGNMENT: u64 = 32;
/// Tensors have at most this many dimensions.
const MAX_DIMENSIONS: u32 = 4;

/// Keys and tensors.
pub(super) struct Header {
    /// Numbers, flags and texts by their names; lists, which are the tokenizer's, are left out.
    pub(super) keys: BTreeMap<String, Value>,
    pub(super) tensors: BTreeMap<String, Tensor>,
    /// Bytes of the file.
    pub(super) length: u64,
}

/// One tensor.
pub(super) struct Tensor {
    /// Rows first.
    pub(super) shape: Vec<usize>,
    /// Its ggml type.
    pub(super) kind: u32,
    /// From the start of the file.
    pub(super) offset: u64,
}

impl Header {
    /// Reads the header of `path`.
    ///
    /// # Errors
    /// [`Error::Read`], or [`Error::Model`] if it is not one.
    pub(super) fn open(path: &Path) -> Result<(Self, File)> {
        let file = File::open(path).map_err(Error::read(path))?;
        let length = file.metadata().map_err(Error::read(path))?.len();
        let from = file.try_clone().map_err(Error::read(path))?;
        let mut reader = Reader {
            from: BufReader::new(from).take(length.min(MAX_HEADER)),
            limit: length.min(MAX_HEADER),
        };
        let header = reader.header(length).map_err(|defect| match defect {
            Defect::Said(message) => Error::model(path, message),
            Defect::Io(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                Error::model(path, "ends inside its header; was the download cut off?")
            }
            Defect::Io(e) => Error::read(path)(e),
        })?;
        Ok((header, file))
    }
}

enum Defect {
    Said(String),
    Io(io::Error),
}

impl From<io::Error> for Defect {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn said<T>(message: impl Into<String>) -> Result<T, Defect> {
    Err(Defect::Said(message.into()))
}

struct Reader {
    from: io::Take<BufReader<File>>,
    limit: u64,
}

impl Reader {
    fn header(&mut self, length: u64) -> Result<Header, Defect> {
        let magic: [u8; 4] = self.bytes()?;
        if magic != MAGIC {
            return said("is no GGUF file: it does not begin with `GGUF`");
        }
        let version = self.u32()?;
        if !VERSIONS.contains(&version) {
            return said(format!(
                "is GGUF of version {version}; supported are 2 and 3, little-endian"
            ));
        }
        let (tensors, keys) = (self.u64()?, self.u64()?);
        let mut header = Header {
            keys: BTreeMap::new(),
            tensors: BTreeMap::new(),
            length,
        };
        for _ in 0..keys {
            let name = self.text()?;
            let kind = self.u32()?;
            if let Some(value) = self.value(kind, 0)? {
                header.keys.insert(name, value);
            }
        }
        for _ in 0..tensors {
            let name = self.text()?;
            let tensor = self.tensor(&name)?;
            if header.tensors.insert(name.clone(), tensor).is_some() {
                return said(format!("has the tensor `{name}` twice"));
            }
        }
        let alignment = header.keys.get(ALIGNMENT).and_then(Value::as_u64);
        let alignment = alignment.unwrap_or(DEFAULT_ALIGNMENT);
        if !alignment.is_power_of_two() {
            return said(format!(
                "`{ALIGNMENT}` is {alignment}; expected a power of two"
            ));
        }
        let start = (self.limit - self.from.limit()).next_multiple_of(alignment);
        for (name, tensor) in &mut header.tensors {
            let Some(offset) = start.checked_add(tensor.offset).filter(|o| *o <= length) else {
                return said(format!(
                    "ends before its tensor `{name}` begins; was the download cut off?"
                ));
            };
            tensor.offset = offset;
        }
        Ok(header)
    }

    fn tensor(&mut self, name: &str) -> Result<Tensor, Defect> {
        let dimensions = self.u32()?;
        if dimensions > MAX_DIMENSIONS {
            return said(format!(
                "tensor `{name}` has {dimensions} dimensions; expected at most {MAX_DIMENSIONS}"
            ));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            shape.push(usize::try_from(self.u64()?).unwrap_or(usize::MAX));
        }
        // Columns come first there.
        shape.reverse();
        let elements = shape
            .iter()
            .try_fold(1_usize, |product, n| product.checked_mul(*n));
        if elements.and_then(|n| n.checked_mul(4)).is_none() {
            return said(format!("tensor `{name}` has the shape {shape:?}"));
        }
        Ok(Tensor {
            shape,
            kind: self.u32()?,
            offset: self.u64()?,
        })
    }

    /// A value of type `kind`; none for a list, which is passed over.
    fn value(&mut self, kind: u32, depth: u32) -> Result<Option<Value>, Defect> {
        let number = |value: f64| Number::from_f64(value).map_or(Value::Null, Value::Number);
        Ok(Some(match kind {
            0 => self.bytes::<1>()?[0].into(),
            1 => i8::from_le_bytes(self.bytes()?).into(),
            2 => u16::from_le_bytes(self.bytes()?).into(),
            3 => i16::from_le_bytes(self.bytes()?).into(),
            4 => self.u32()?.into(),
            5 => i32::from_le_bytes(self.bytes()?).into(),
            // The shortest decimal that is this f32, as a config.json has it.
            6 => number(
                f32::from_le_bytes(self.bytes()?)
                    .to_string()
                    .parse()
                    .unwrap_or(f64::NAN),
            ),
            7 => (self.bytes::<1>()?[0] != 0).into(),
            8 => self.text()?.into(),
            9 if depth == 0 => {
                let (of, count) = (self.u32()?, self.u64()?);
                for _ in 0..count {
                    self.value(of, depth + 1)?;
                }
                return Ok(None);
            }
            10 => self.u64()?.into(),
            11 => i64::from_le_bytes(self.bytes()?).into(),
            12 => number(f64::from_le_bytes(self.bytes()?)),
            other => return said(format!("has a key of the type {other}, which is none")),
        }))
    }

    fn text(&mut self) -> Result<String, Defect> {
        let length = self.u64()?;
        if length > self.from.limit() {
            return said(format!("has a text of {length} bytes, more than there are"));
        }
        let mut bytes = Vec::new();
        (&mut self.from).take(length).read_to_end(&mut bytes)?;
        // Tokens need not be whole characters.
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn u32(&mut self) -> Result<u32, Defect> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Result<u64, Defect> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], Defect> {
        let mut bytes = [0; N];
        self.from.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}
