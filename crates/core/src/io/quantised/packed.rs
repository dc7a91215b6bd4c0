//! Weights of whole numbers packed into 32-bit words, as GPTQ and AWQ checkpoints have them.
//!
//! | name | GPTQ | AWQ |
//! |---|---|---|
//! | `MODULE.qweight` | i32 `[in * bits / 32, out]`, along the input, lowest bits first | i32 `[in, out / 8]`, along the output, in the order 0 2 4 6 1 3 5 7 |
//! | `MODULE.qzeros` | i32 `[groups, out * bits / 32]`, less 1 but in `gptq_v2` | i32 `[groups, out / 8]`, packed alike |
//! | `MODULE.scales` | floats `[groups, out]` | the same |
//! | `MODULE.g_idx` | i32 `[in]`, the group of each column; without it and `desc_act`, `group_size` in a row | |
//!
//! # Source
//! AutoGPTQ and GPTQModel (`qlinear`), AutoAWQ (`WQLinear_GEMM`).

use super::sibling;
use crate::io::{FileDType, ModelFiles};
use crate::{Error, Result};
use ferrotune_kernels::dequantise::Grouped;
use serde_json::Value;
use std::collections::BTreeMap;

const WORDS: &str = "qweight";
const ZEROS: &str = "qzeros";
const SCALES: &str = "scales";
const GROUPS: &str = "g_idx";
const FLOATS: [FileDType; 3] = [FileDType::F32, FileDType::F16, FileDType::BF16];
/// Where AWQ has the eight codes of a word, from the lowest bits on.
const AWQ_ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// What `quantization_config` says of all weights.
#[derive(Clone, Copy, Debug)]
struct Scheme {
    awq: bool,
    bits: usize,
    /// Columns of a group; `None` for all.
    group_size: Option<usize>,
    /// Whether columns are in groups in an order of their own, which only `g_idx` knows.
    desc_act: bool,
    /// What is added to a zero.
    zero_offset: u16,
}

/// What a file says of one weight.
#[derive(Clone, Debug)]
pub(in crate::io) struct PackedState {
    /// `[out, in]`.
    pub(in crate::io) shape: [usize; 2],
    pub(in crate::io) groups: usize,
    scheme: Scheme,
}

/// The tensors of `weight`.
pub(super) fn parts(weight: &str) -> [String; 4] {
    [WORDS, ZEROS, SCALES, GROUPS].map(|part| sibling(weight, part))
}

/// The packed weights of a model by name.
///
/// # Errors
/// [`Error::Model`] for a scheme that is not read, a part that is missing or of another shape, and for groups that
/// do not fit the input.
pub(super) fn states(
    files: &ModelFiles,
    settings: &Value,
) -> Result<BTreeMap<String, PackedState>> {
    let mut states = BTreeMap::new();
    let mut scheme = None;
    for name in files.names() {
        let fault = |message: String| Error::model(files.file_of(name), message);
        let Some((module, part)) = name.rsplit_once('.') else {
            continue;
        };
        let weight = format!("{module}.weight");
        if part == WORDS {
            let scheme = match scheme {
                Some(scheme) => scheme,
                None => *scheme.insert(Scheme::read(files, settings)?),
            };
            let state = PackedState::check(files, scheme, &weight).map_err(fault)?;
            states.insert(weight, state);
        } else if [ZEROS, GROUPS].contains(&part) && files.meta(&sibling(&weight, WORDS)).is_none()
        {
            let message = format!(
                "tensor `{name}` is part of the packed weight `{}`, which is missing",
                sibling(&weight, WORDS)
            );
            return Err(fault(message));
        }
    }
    Ok(states)
}

impl Scheme {
    fn read(files: &ModelFiles, settings: &Value) -> Result<Self> {
        let fault = |message: String| {
            let path = files.directory().join("config.json");
            Error::model(path, format!("`quantization_config`: {message}"))
        };
        let text = |key: &str| {
            settings
                .get(key)
                .and_then(Value::as_str)
                .unwrap_or_default()
        };
        let awq = match text("quant_method") {
            "gptq" => false,
            "awq" => true,
            other => {
                return Err(fault(format!(
                    "the weights are packed words (`...{WORDS}`) and `quant_method` is `{other}`; expected gptq or awq"
                )));
            }
        };
        let bits = settings.get("bits").and_then(Value::as_u64).unwrap_or(0) as usize;
        let known: &[usize] = if awq { &[4] } else { &[4, 8] };
        if !known.contains(&bits) {
            return Err(fault(format!("`bits` is {bits}; supported are {known:?}")));
        }
        let version = text("version");
        if awq && !(version.is_empty() || version.eq_ignore_ascii_case("gemm")) {
            return Err(fault(format!(
                "`version` is `{version}`; supported is gemm"
            )));
        }
        let zero_offset = match text("checkpoint_format") {
            _ if awq => 0,
            "" | "gptq" => 1,
            "gptq_v2" => 0,
            other => {
                let message =
                    format!("`checkpoint_format` is `{other}`; supported are gptq and gptq_v2");
                return Err(fault(message));
            }
        };
        let group_size = match settings.get("group_size").and_then(Value::as_i64) {
            Some(-1) => None,
            Some(size) if size > 0 => Some(size as usize),
            other => {
                let found = other.map_or("missing".to_owned(), |size| size.to_string());
                return Err(fault(format!(
                    "`group_size` is {found}; expected -1 or a number above 0"
                )));
            }
        };
        Ok(Self {
            awq,
            bits,
            group_size,
            desc_act: settings.get("desc_act").and_then(Value::as_bool) == Some(true),
            zero_offset,
        })
    }

    /// Codes in a word.
    fn per_word(self) -> usize {
        32 / self.bits
    }
}

impl PackedState {
    fn check(files: &ModelFiles, scheme: Scheme, weight: &str) -> Result<Self, String> {
        let name = |part: &str| sibling(weight, part);
        let meta = |part: &str| {
            let found = files.meta(&name(part));
            found.ok_or_else(|| {
                format!(
                    "tensor `{}` is missing, a part of `{}`",
                    name(part),
                    name(WORDS)
                )
            })
        };
        let (words, scales, zeros) = (meta(WORDS)?, meta(SCALES)?, meta(ZEROS)?);
        let per_word = scheme.per_word();
        let [rows, cols] = match words.shape[..] {
            [a, b] if words.dtype == FileDType::I32 && scheme.awq => [b * per_word, a],
            [a, b] if words.dtype == FileDType::I32 => [b, a * per_word],
            _ => {
                let (dtype, shape) = (words.dtype, &words.shape);
                return Err(format!(
                    "tensor `{}` is {dtype} {shape:?}; expected a matrix of I32",
                    name(WORDS)
                ));
            }
        };
        let size = scheme.group_size.unwrap_or(cols).max(1);
        let groups = cols.div_ceil(size);
        if !(FLOATS.contains(&scales.dtype) && scales.shape == [groups, rows]) {
            return Err(format!(
                "tensor `{}` is {} {:?}; {cols} inputs in groups of {size} (`group_size`) and {rows} outputs need \
                 floats [{groups}, {rows}]",
                name(SCALES),
                scales.dtype,
                scales.shape
            ));
        }
        if !(zeros.dtype == FileDType::I32 && zeros.shape == [groups, rows.div_ceil(per_word)]) {
            return Err(format!(
                "tensor `{}` is {} {:?}; {groups} groups of {rows} outputs need I32 [{groups}, {}]",
                name(ZEROS),
                zeros.dtype,
                zeros.shape,
                rows.div_ceil(per_word)
            ));
        }
        match files.meta(&name(GROUPS)) {
            Some(index) if index.dtype != FileDType::I32 || index.shape != [cols] => Err(format!(
                "tensor `{}` is {} {:?}; expected I32 [{cols}], a group per input",
                name(GROUPS),
                index.dtype,
                index.shape
            )),
            None if scheme.desc_act && groups > 1 => Err(format!(
                "tensor `{}` is missing: `desc_act` says that inputs are in groups in an order of their own",
                name(GROUPS)
            )),
            _ => Ok(Self {
                shape: [rows, cols],
                groups,
                scheme,
            }),
        }
    }

    pub(in crate::io) fn name(&self) -> &'static str {
        match (self.scheme.awq, self.scheme.bits) {
            (true, _) => "awq of 4 bits",
            (false, 4) => "gptq of 4 bits",
            (false, _) => "gptq of 8 bits",
        }
    }

    pub(in crate::io) fn bits(&self) -> usize {
        self.scheme.bits
    }

    /// Reads the weight into host memory.
    pub(super) fn read_weight(&self, files: &ModelFiles, weight: &str) -> Result<Grouped> {
        let [rows, cols] = self.shape;
        let (groups, scheme) = (self.groups, self.scheme);
        let name = |part: &str| sibling(weight, part);
        let words = |part: &str| -> Result<Vec<u32>> {
            let bytes = files.read_bytes(&name(part))?;
            let words = bytes.chunks_exact(4);
            Ok(words
                .map(|w| u32::from_le_bytes([w[0], w[1], w[2], w[3]]))
                .collect())
        };
        let packed = words(WORDS)?;
        let mut codes = vec![0; rows * cols];
        for row in 0..rows {
            for col in 0..cols {
                codes[row * cols + col] = match scheme.awq {
                    true => scheme.code(&packed, [col, row], rows),
                    false => scheme.code_along_input(&packed, [row, col], rows),
                };
            }
        }
        let packed = words(ZEROS)?;
        let stored = files.read_f32(&name(SCALES))?;
        super::check_finite(files, &name(SCALES), &stored)?;
        let (mut scales, mut zeros) = (vec![0.0; rows * groups], vec![0; rows * groups]);
        for row in 0..rows {
            for group in 0..groups {
                let zero = scheme.code(&packed, [group, row], rows);
                scales[row * groups + group] = stored[group * rows + row];
                zeros[row * groups + group] = u16::from(zero) + scheme.zero_offset;
            }
        }
        let group_of = self.groups_of(files, weight, words)?;
        Ok(Grouped::new(
            self.shape,
            scheme.bits,
            codes,
            scales,
            zeros,
            group_of,
        )?)
    }

    /// The group of each column.
    fn groups_of(
        &self,
        files: &ModelFiles,
        weight: &str,
        words: impl Fn(&str) -> Result<Vec<u32>>,
    ) -> Result<Vec<u32>> {
        let (cols, name) = (self.shape[1], sibling(weight, GROUPS));
        if files.meta(&name).is_none() {
            let size = self.scheme.group_size.unwrap_or(cols).max(1);
            return Ok((0..cols).map(|col| (col / size) as u32).collect());
        }
        let found = words(GROUPS)?;
        match found
            .iter()
            .position(|&group| group as usize >= self.groups)
        {
            None => Ok(found),
            Some(col) => Err(Error::model(
                files.file_of(&name),
                format!(
                    "`{name}` puts input {col} into group {} of {}: it belongs to another `group_size`",
                    found[col].cast_signed(),
                    self.groups
                ),
            )),
        }
    }
}

impl Scheme {
    /// Code `at` of a matrix packed along its rows of `cols` codes.
    fn code(self, words: &[u32], [row, col]: [usize; 2], cols: usize) -> u8 {
        let per_word = self.per_word();
        let word = words[row * cols.div_ceil(per_word) + col / per_word];
        let place = col % per_word;
        let place = match self.awq {
            true => AWQ_ORDER.iter().position(|&p| p == place).unwrap_or(place),
            false => place,
        };
        self.part(word, place)
    }

    /// The code of `[output, input]` where each word has codes of neighbouring inputs.
    fn code_along_input(self, words: &[u32], [row, col]: [usize; 2], rows: usize) -> u8 {
        let per_word = self.per_word();
        self.part(words[col / per_word * rows + row], col % per_word)
    }

    fn part(self, word: u32, place: usize) -> u8 {
        let mask = (1_u32 << self.bits) - 1;
        (word >> (place * self.bits) & mask) as u8
    }
}
