//! Matrices that bitsandbytes quantised: their codes and scales from the values, and the values of the codes.

use super::case::Case;
use super::compare::Comparison;
use ferrotune_core::io::{FileDType, SafetensorsFile};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::dequantise::{
    Absmax, Blockwise, FP4, FourBit, FourBitFormat, FourBitType, Int8, NF4, dynamic_map,
};
use ferrotune_kernels::{DType, Device, Indices, Tensor, View, ViewMut, Workspace, int8_linear};

/// Bits are compared: nothing is tolerated.
const EXACT: f64 = 0.0;
/// What is relative to the mean of the scales, which is summed in another order there: one unit in its last place.
const MEAN: f64 = f32::EPSILON as f64;
/// There a value over its scale is looked up in a table of so many steps from -1 to 1, so that one halfway between two
/// entries of the map may get the farther one.
const STEPS: f32 = 65536.0;
/// From which magnitude on inputs stay floating point in the recordings of `int8row_thr6`.
const THRESHOLD: f32 = 6.0;

pub(super) fn compare(case: &Case) -> Result<Comparison> {
    let recorded = Recorded {
        inputs: SafetensorsFile::open(case.path("inputs.safetensors"))?,
        expected: SafetensorsFile::open(case.path("expected.safetensors"))?,
        device: &case.device,
    };
    let mut c = Comparison::default();
    recorded.maps(&mut c)?;
    let keys = case.json.get("keys").and_then(serde_json::Value::as_array);
    for key in keys.into_iter().flatten() {
        let key = key.as_str().unwrap_or_default();
        match key.split('.').collect::<Vec<_>>()[..] {
            [_, _, code @ ("nf4" | "fp4"), block, scales @ ("sq" | "dq")] => {
                let format = FourBitFormat {
                    quant_type: match code {
                        "nf4" => FourBitType::Nf4,
                        _ => FourBitType::Fp4,
                    },
                    block: recorded.block(key, block)?,
                    double_quant: scales == "dq",
                };
                recorded.four_bit(&mut c, key, format)?;
            }
            [_, _, map @ ("dyn8" | "dyn8u"), block] => {
                let block = recorded.block(key, block)?;
                recorded.blockwise(&mut c, key, block, map == "dyn8")?;
            }
            [_, _, "int8row"] => recorded.rows(&mut c, key)?,
            [_, _, "int8row_thr6"] => recorded.rows_beside_outliers(&mut c, key)?,
            _ => return Err(recorded.unknown(key)),
        }
    }
    Ok(c)
}

struct Recorded<'a> {
    inputs: SafetensorsFile,
    expected: SafetensorsFile,
    device: &'a Device,
}

impl Recorded<'_> {
    fn unknown(&self, key: &str) -> Error {
        let message = format!("`{key}` is no primitive known here");
        Error::data(self.expected.path(), None, message)
    }

    /// The number behind the `b` of a key's part.
    fn block(&self, key: &str, part: &str) -> Result<usize> {
        let number = part.strip_prefix('b').and_then(|n| n.parse().ok());
        number.ok_or_else(|| self.unknown(key))
    }

    /// The matrix that `key`, `TENSOR.DTYPE.*`, is made of; a vector is one row.
    fn input(&self, key: &str) -> Result<Tensor> {
        let name: Vec<&str> = key.splitn(3, '.').take(2).collect();
        let name = name.join(".");
        let shape = self.inputs.meta(&name).map(|meta| meta.shape.as_slice());
        let [rows, cols] = match shape {
            Some(&[cols]) => [1, cols],
            Some(&[rows, cols]) => [rows, cols],
            _ => return Err(self.unknown(key)),
        };
        Ok(Tensor::from_f32(self.inputs.read_f32(&name)?, rows, cols))
    }

    /// Numbers of whatever dtype, if they were recorded.
    fn read(&self, name: &str) -> Result<Option<Vec<f32>>> {
        let file = &self.expected;
        let bytes = || file.read_bytes(name);
        Ok(match file.meta(name).map(|meta| meta.dtype) {
            None => None,
            Some(FileDType::U8) => Some(bytes()?.into_iter().map(f32::from).collect()),
            Some(FileDType::I8) => {
                let signed = |byte: u8| f32::from(byte.cast_signed());
                Some(bytes()?.into_iter().map(signed).collect())
            }
            Some(FileDType::I64) => {
                let values = file.read_i64(name)?;
                Some(values.into_iter().map(|value| value as f32).collect())
            }
            Some(_) => Some(file.read_f32(name)?),
        })
    }

    /// Compares what `key.part` was recorded as.
    fn compare(
        &self,
        c: &mut Comparison,
        [key, part]: [&str; 2],
        ours: &[f32],
        tolerance: f64,
    ) -> Result<()> {
        let name = format!("{key}.{part}");
        let theirs = self.read(&name)?.ok_or_else(|| self.unknown(&name))?;
        c.tensor(part, key, ours, &theirs, tolerance);
        Ok(())
    }

    /// The same of whole numbers.
    fn codes(
        &self,
        c: &mut Comparison,
        key_part: [&str; 2],
        ours: impl IntoIterator<Item = impl Into<f32>>,
    ) -> Result<()> {
        let ours: Vec<f32> = ours.into_iter().map(Into::into).collect();
        self.compare(c, key_part, &ours, EXACT)
    }

    fn maps(&self, c: &mut Comparison) -> Result<()> {
        self.compare(c, ["code", "nf4"], &NF4, EXACT)?;
        self.compare(c, ["code", "fp4"], &FP4, EXACT)?;
        self.compare(c, ["code", "dynamic_signed"], &dynamic_map(true), EXACT)?;
        self.compare(c, ["code", "dynamic_unsigned"], &dynamic_map(false), EXACT)
    }

    fn four_bit(&self, c: &mut Comparison, key: &str, format: FourBitFormat) -> Result<()> {
        let made = format.quantise(self.input(key)?.view())?;
        let Some((packed, absmax)) = made.parts() else {
            return Err(self.unknown(key));
        };
        self.codes(c, [key, "packed"], packed.iter().copied())?;
        let recorded = match absmax {
            Absmax::F32(values) => {
                self.compare(c, [key, "absmax"], values, EXACT)?;
                Absmax::F32(values.clone())
            }
            Absmax::Nested {
                indices,
                map,
                nested,
                offset,
            } => {
                self.codes(c, [key, "absmax_q"], indices.iter().copied())?;
                self.compare(c, [key, "offset"], &[*offset], MEAN)?;
                let own = self.read(&format!("{key}.offset"))?.unwrap_or_default();
                let largest = nested.iter().fold(0.0_f32, |most, value| most.max(*value));
                let unit = MEAN * f64::from(offset.abs() / largest.max(f32::MIN_POSITIVE));
                self.compare(c, [key, "nested_absmax"], nested, unit)?;
                // Values are compared through the scales that were recorded.
                let nested = self.read(&format!("{key}.nested_absmax"))?;
                Absmax::Nested {
                    indices: indices.clone(),
                    map: map.clone(),
                    nested: nested.unwrap_or_default(),
                    offset: own.first().copied().unwrap_or_default(),
                }
            }
        };
        let (shape, code) = (made.shape(), format.quant_type.code());
        let codes = FourBit::new(shape, format.block, code, packed.to_vec(), recorded)?;
        let codes = codes.to_device(self.device);
        // There the scales of other blocks are taken where rows of even length are no whole blocks.
        if shape[1] % 2 == 0 && shape[1] % format.block > 0 {
            return Ok(());
        }
        self.values(c, key, shape, |out| Ok(codes.dequantise(out)?))
    }

    /// Compares indices into `map` of values over their scale.
    fn indices(
        &self,
        c: &mut Comparison,
        key: &str,
        (values, made): (&[f32], &Blockwise),
        map: &[f32; 256],
    ) -> Result<Vec<u8>> {
        let name = format!("{key}.q");
        let theirs = self.expected.read_bytes(&name)?;
        let scales = made
            .absmax
            .iter()
            .flat_map(|scale| vec![*scale; made.block]);
        let scaled = values
            .iter()
            .zip(scales)
            .map(|(value, scale)| value / scale);
        let pairs = made.indices.iter().zip(&theirs).zip(scaled);
        let mut same = pairs.map(|((ours, theirs), value)| {
            let [ours, theirs] = [ours, theirs].map(|&i| (map[usize::from(i)] - value).abs());
            ours <= theirs && theirs - ours <= 2.0 * 2.0 / STEPS
        });
        let same = same.all(|one| one) && made.indices.len() == theirs.len();
        c.exact("index", key, same);
        Ok(theirs)
    }

    /// Compares what `dequantise` writes with the values that were recorded, rounded as those are.
    fn values(
        &self,
        c: &mut Comparison,
        key: &str,
        [rows, cols]: [usize; 2],
        dequantise: impl FnOnce(ViewMut<'_>) -> Result<()>,
    ) -> Result<()> {
        let name = format!("{key}.dequant");
        let Some(dtype) = self.expected.meta(&name).map(|meta| meta.dtype) else {
            // Not every size was recorded in full.
            return Ok(());
        };
        let ours = match dtype {
            FileDType::BF16 => DType::Bf16,
            _ => DType::F32,
        };
        let mut out = Tensor::empty(self.device, ours, rows, cols);
        dequantise(out.view_mut())?;
        let mut ours = out.to_f32_vec();
        if dtype == FileDType::F16 {
            let round = |value: &mut f32| *value = half::f16::from_f32(*value).to_f32();
            ours.iter_mut().for_each(round);
        }
        self.compare(c, [key, "dequant"], &ours, EXACT)
    }

    fn blockwise(&self, c: &mut Comparison, key: &str, block: usize, signed: bool) -> Result<()> {
        let (map, mut values) = (dynamic_map(signed), self.input(key)?.to_f32_vec());
        if !signed {
            values.iter_mut().for_each(|value| *value = value.abs());
        }
        let mut made = Blockwise::quantise(&values, block, &map)?;
        self.compare(c, [key, "absmax"], &made.absmax, EXACT)?;
        made.indices = self.indices(c, key, (&values, &made), &map)?;
        match self.expected.meta(&format!("{key}.dequant")) {
            Some(_) => self.compare(c, [key, "dequant"], &made.values(&map), EXACT),
            None => Ok(()),
        }
    }

    fn rows(&self, c: &mut Comparison, key: &str) -> Result<()> {
        let made = Int8::quantise(self.input(key)?.view())?;
        let Some((bytes, absmax)) = made.rows() else {
            return Err(self.unknown(key));
        };
        self.codes(c, [key, "q"], bytes.iter().copied())?;
        self.compare(c, [key, "scale"], absmax, EXACT)?;
        let shape = made.shape();
        let made = made.to_device(self.device);
        self.values(c, key, shape, |out| Ok(made.dequantise(out)?))
    }

    /// Rows of an input, of which some columns stay floating point.
    fn rows_beside_outliers(&self, c: &mut Comparison, key: &str) -> Result<()> {
        let x = self.input(key)?;
        let documents = Indices::new(vec![0, x.rows() as u32], &Device::Cpu);
        let workspace = Workspace::on(Device::Cpu, x.rows());
        let (columns, dtype) = (x.cols(), DType::F32);
        let made =
            int8_linear::Input::new(x.view(), dtype, THRESHOLD, &documents, columns, &workspace)?;
        let Some((codes, scales, outliers)) = made.parts() else {
            return Err(self.unknown(key));
        };
        let values = |view: View<'_>| view.to_f32_vec();
        self.compare(c, [key, "scale"], &values(scales), EXACT)?;
        let theirs = self.read(&format!("{key}.outlier_cols"))?;
        let ours: Vec<f32> = outliers.iter().map(|&column| column as f32).collect();
        c.exact("outlier_cols", key, theirs == Some(ours));
        let name = format!("{key}.q");
        let theirs = self.read(&name)?.ok_or_else(|| self.unknown(&name))?;
        // Here a column that stays floating point has no bytes at all; there the product leaves them out.
        let mut ours = values(codes);
        for (at, (ours, theirs)) in ours.iter_mut().zip(&theirs).enumerate() {
            if outliers.contains(&((at % columns) as u32)) {
                *ours = *theirs;
            }
        }
        c.tensor("q", key, &ours, &theirs, EXACT);
        Ok(())
    }
}
