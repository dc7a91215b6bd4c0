//! 4-bit weights in safetensors, as bitsandbytes saves them: the codes under the weight's own name, and
//! what belongs to them under names that begin with it.
//!
//! | name after the weight's | holds |
//! |---|---|
//! | (none) | two codes per byte, of any element type |
//! | `.quant_state.bitsandbytes__nf4`, `__fp4` | JSON: shape, block, and what is below |
//! | `.quant_map` | f32 `[16]`, what a code stands for |
//! | `.absmax` | f32 per block, or u8 where the scales are quantised too |
//! | `.nested_absmax`, `.nested_quant_map` | f32 per 256 blocks; f32 `[256]`, what a u8 stands for |
//!
//! # Source
//! `QuantState.as_dict(packed=True)` of bitsandbytes 0.50.

use crate::io::{FileDType, ModelFiles, TensorMeta};
use crate::{Error, Result};
use ferrotune_kernels::dequantise::{Absmax, FourBit, FourBitFormat, FourBitType, NESTED_BLOCK};
use serde::Deserialize;
use std::collections::BTreeMap;

const STATE: &str = ".quant_state.bitsandbytes__";
const TYPES: [FourBitType; 2] = [FourBitType::Nf4, FourBitType::Fp4];
/// What belongs to a 4-bit weight besides its state.
const MEMBERS: [&str; 4] = [
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
];
/// The state of a weight takes about 170 bytes.
const MAX_STATE_BYTES: usize = 4096;
/// Blocks that kernels know.
const BLOCKS: std::ops::RangeInclusive<usize> = 32..=4096;

/// What a file says of a 4-bit weight, checked against the lengths of its parts.
#[derive(Clone, Debug)]
pub(in crate::io) struct QuantState {
    /// `[out, in]` of the values.
    pub(in crate::io) shape: [usize; 2],
    pub(in crate::io) format: FourBitFormat,
    /// Of quantised scales.
    nested_offset: Option<f32>,
}

/// The JSON of a state.
#[derive(Deserialize)]
struct Fields {
    quant_type: String,
    blocksize: usize,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_dtype: Option<String>,
    nested_offset: Option<f32>,
}

/// The 4-bit weights of a model by name.
///
/// # Errors
/// [`Error::Model`] for a state that is no such JSON or of another kind, for a part that is missing or
/// has another length, and for a part without a state.
pub(super) fn quant_states(files: &ModelFiles) -> Result<BTreeMap<String, QuantState>> {
    let mut states = BTreeMap::new();
    for key in files.names() {
        if let Some((weight, quant_type)) = key.split_once(STATE) {
            let state = QuantState::read(files, key, weight, quant_type)?;
            states.insert(weight.to_owned(), state);
        }
    }
    let orphan = files.names().find(|name| {
        let weight = MEMBERS.iter().find_map(|member| name.strip_suffix(member));
        weight.is_some_and(|weight| files.meta(weight).is_some() && !states.contains_key(weight))
    });
    match orphan {
        None => Ok(states),
        Some(part) => Err(Error::model(
            files.file_of(part),
            format!(
                "tensor `{part}` is part of a quantised weight whose state (`...{STATE}nf4` or `fp4`) is \
                 missing; save the model again with bitsandbytes 0.43 or newer"
            ),
        )),
    }
}

impl QuantState {
    /// The tensors of `weight` beside itself.
    pub(super) fn parts(&self, weight: &str) -> impl Iterator<Item = String> {
        let state = format!("{weight}{STATE}{}", self.format.quant_type.as_str());
        let members = MEMBERS.map(|member| format!("{weight}{member}"));
        members.into_iter().chain([state])
    }

    fn read(files: &ModelFiles, key: &str, weight: &str, quant_type: &str) -> Result<Self> {
        let fault =
            |message: String| Error::model(files.file_of(key), format!("`{key}`: {message}"));
        let Some(known) = TYPES.into_iter().find(|t| t.as_str() == quant_type) else {
            let message = format!("is of the type `{quant_type}`; supported are nf4 and fp4");
            return Err(fault(message));
        };
        let length = files.meta(key).map_or(0, TensorMeta::len);
        if length > MAX_STATE_BYTES {
            let message = format!("has {length} elements, expected at most {MAX_STATE_BYTES}");
            return Err(fault(message));
        }
        let fields: Fields = serde_json::from_slice(&files.read_bytes(key)?)
            .map_err(|e| fault(format!("is not the JSON of a quant state: {e}")))?;
        let state = Self::from_fields(fields, known).map_err(fault)?;
        state.check_parts(files, weight)?;
        Ok(state)
    }

    fn from_fields(fields: Fields, quant_type: FourBitType) -> Result<Self, String> {
        if fields.quant_type != quant_type.as_str() {
            let (other, name) = (fields.quant_type, quant_type.as_str());
            return Err(format!("says `quant_type` {other}, its name {name}"));
        }
        let block = fields.blocksize;
        if !(block.is_power_of_two() && BLOCKS.contains(&block)) {
            let (low, high) = (BLOCKS.start(), BLOCKS.end());
            return Err(format!(
                "`blocksize` is {block}; expected a power of two from {low} to {high}"
            ));
        }
        let [rows, cols] = fields.shape[..] else {
            return Err(format!("`shape` is {:?}; expected a matrix", fields.shape));
        };
        if rows.checked_mul(cols).is_none() {
            return Err(format!("`shape` is {:?}", fields.shape));
        }
        let nested = (fields.nested_blocksize, fields.nested_dtype.as_deref());
        let nested_offset = match (nested, fields.nested_offset) {
            ((None, None), None) => None,
            ((Some(NESTED_BLOCK), Some("float32")), Some(offset)) if offset.is_finite() => {
                Some(offset)
            }
            ((blocksize, dtype), offset) => {
                let [blocksize, dtype, offset] = [
                    blocksize.map(|n| n.to_string()),
                    dtype.map(str::to_owned),
                    offset.map(|number| number.to_string()),
                ]
                .map(|found| {
                    found.map_or_else(|| "is missing".to_owned(), |is| format!("is {is}"))
                });
                return Err(format!(
                    "`nested_blocksize` {blocksize}, `nested_dtype` {dtype}, `nested_offset` {offset}; expected \
                     {NESTED_BLOCK}, float32 and a finite number, or none of the three; quantise the model again"
                ));
            }
        };
        Ok(Self {
            shape: [rows, cols],
            format: FourBitFormat {
                quant_type,
                block,
                double_quant: nested_offset.is_some(),
            },
            nested_offset,
        })
    }

    fn len(&self) -> usize {
        self.shape[0] * self.shape[1]
    }

    /// The parts must have the lengths that shape and block make.
    fn check_parts(&self, files: &ModelFiles, weight: &str) -> Result<()> {
        let codes = self.len().div_ceil(2);
        let blocks = self.len().div_ceil(self.format.block);
        let part = |member: &str| format!("{weight}{member}");
        let found = files.bytes_of(weight);
        if found != Some(codes) {
            let found = found.map_or("is missing".into(), |bytes| format!("has {bytes} bytes"));
            let message = format!(
                "4-bit tensor `{weight}` {found}; {:?} weights are {codes} bytes",
                self.shape
            );
            return Err(Error::model(files.file_of(weight), message));
        }
        let mut expected = vec![(".quant_map", FileDType::F32, 16)];
        match self.nested_offset {
            None => expected.push((".absmax", FileDType::F32, blocks)),
            Some(_) => expected.extend([
                (".absmax", FileDType::U8, blocks),
                (
                    ".nested_absmax",
                    FileDType::F32,
                    blocks.div_ceil(NESTED_BLOCK),
                ),
                (".nested_quant_map", FileDType::F32, 256),
            ]),
        }
        for (member, dtype, len) in expected {
            let name = part(member);
            let found = match files.meta(&name) {
                None => "is missing".to_owned(),
                Some(meta) if meta.dtype == dtype && meta.len() == len => continue,
                Some(meta) => format!("is {} {:?}", meta.dtype, meta.shape),
            };
            let message = format!(
                "tensor `{name}` {found}; {:?} weights in blocks of {} need {dtype} [{len}]",
                self.shape, self.format.block
            );
            return Err(Error::model(files.file_of(&name), message));
        }
        Ok(())
    }

    /// Reads the weight into host memory.
    pub(super) fn read_weight(&self, files: &ModelFiles, weight: &str) -> Result<FourBit> {
        let part = |member: &str| {
            let name = format!("{weight}{member}");
            let values = files.read_f32(&name)?;
            match values.iter().position(|value| !value.is_finite()) {
                None => Ok(values),
                Some(at) => {
                    let message = format!(
                        "tensor `{name}` holds {} at element {at}; expected finite numbers",
                        values[at]
                    );
                    Err(Error::model(files.file_of(weight), message))
                }
            }
        };
        let changed = |_| {
            let message = format!("4-bit tensor `{weight}` changed while it was read");
            Error::model(files.file_of(weight), message)
        };
        let absmax = match self.nested_offset {
            None => Absmax::F32(part(".absmax")?),
            Some(offset) => Absmax::Nested {
                indices: files.read_bytes(&format!("{weight}.absmax"))?,
                map: part(".nested_quant_map")?.try_into().map_err(changed)?,
                nested: part(".nested_absmax")?,
                offset,
            },
        };
        let code = part(".quant_map")?.try_into().map_err(changed)?;
        let codes = files.read_bytes(weight)?;
        Ok(FourBit::new(
            self.shape,
            self.format.block,
            code,
            codes,
            absmax,
        )?)
    }
}
