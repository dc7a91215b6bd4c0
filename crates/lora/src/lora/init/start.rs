//! The factors that a run starts from.

use super::super::LoraConfig;
use super::{Linear, linears, site};
use crate::files::Weights;
use crate::names::{self, Part};
use ferrotune_core::adapter::BaseWeights;
use ferrotune_core::params::{FlatBuffer, ParamLayout, ParamLayoutBuilder, ParamSpec};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::{View, matmul};
use std::path::Path;
use std::sync::Arc;

/// A and B of every adapted linear as a run starts with them, where that is more than a seed says.
///
/// Where the start changes the base, whatever continues, loads or converts the run must know them.
#[derive(Clone, Debug)]
pub struct Start(Arc<FlatBuffer>);

/// Which dimension of a factor of a linear is its rank.
pub(crate) fn rank_dimension(name: &str) -> Option<usize> {
    match Part::of(name) {
        Some(Part::A) => Some(0),
        Some(Part::B) => Some(1),
        _ => None,
    }
}

/// A and B of one linear.
pub(super) struct Factors {
    /// `[rank, in_features]`.
    pub(super) a: Vec<f32>,
    /// `[out_features, rank]`.
    pub(super) b: Vec<f32>,
}

impl Start {
    /// Of these factors by their names on disk.
    #[must_use]
    pub fn new(factors: FlatBuffer) -> Self {
        Self(Arc::new(factors))
    }

    /// The factors by their names on disk.
    #[must_use]
    pub fn factors(&self) -> &FlatBuffer {
        &self.0
    }

    /// Zeros for every A and B of linears in `layout`.
    pub(crate) fn zeros(layout: &ParamLayout) -> Result<Self> {
        let of_linear = |spec: &&ParamSpec| rank_dimension(&spec.name).is_some();
        let specs = layout.by_name().map(|(_, segment)| &segment.spec);
        let mut builder = ParamLayoutBuilder::new();
        for spec in specs.filter(of_linear) {
            builder.add(spec.clone());
        }
        Ok(Self::new(FlatBuffer::zeros(&builder.build()?)))
    }

    /// The factors of the adapter in `directory`, whatever else it has.
    ///
    /// # Errors
    /// [`Error::Adapter`] if the file is damaged.
    pub(crate) fn read_factors(directory: &Path) -> Result<Self> {
        let file = Weights::open(directory)?;
        Self::read_with(&file, |shape, _| shape, |values, _, _| values)
    }

    /// The factors in `directory`, which are what the run beside it started from.
    ///
    /// # Errors
    /// [`Error::Adapter`] if the file is damaged or holds anything else.
    pub(crate) fn read(directory: &Path) -> Result<Self> {
        let file = Weights::open(directory)?;
        match file
            .file
            .names()
            .find(|name| rank_dimension(name).is_none())
        {
            None => Self::read_with(&file, |shape, _| shape, |values, _, _| values),
            Some(name) => {
                let message =
                    format!("`{name}` is no A or B of a linear, which is all a start has");
                Err(Error::adapter(&file.path, message))
            }
        }
    }

    /// The same of a plain LoRA that was made of an update: the second half of the ranks, with B negated.
    ///
    /// # Errors
    /// [`Error::Adapter`] if the file is damaged.
    pub(crate) fn read_half(directory: &Path) -> Result<Self> {
        let half = |mut shape: [usize; 2], rank: usize| {
            shape[rank] /= 2;
            shape
        };
        let second = |values: Vec<f32>, cols: usize, rank: usize| match rank {
            0 => values[values.len() / 2..].to_vec(),
            _ => {
                let rows = values.chunks(cols.max(1)).map(|row| &row[cols / 2..]);
                rows.flatten().map(|v| -v).collect()
            }
        };
        Self::read_with(&Weights::open(directory)?, half, second)
    }

    /// Of the factors of a file: `shape` and `values` say which part of them, from shape and values, columns,
    /// and which dimension the rank is.
    fn read_with(
        file: &Weights,
        shape: impl Fn([usize; 2], usize) -> [usize; 2],
        values: impl Fn(Vec<f32>, usize, usize) -> Vec<f32>,
    ) -> Result<Self> {
        let mut read = Vec::new();
        for name in file.file.names() {
            let Some(rank) = rank_dimension(name) else {
                continue;
            };
            let found = file.file.meta(name).map_or(&[][..], |meta| &meta.shape);
            let &[rows, cols] = found else {
                let message = format!("`{name}` is no matrix");
                return Err(Error::adapter(&file.path, message));
            };
            let of_file = file.read(name, &[rows, cols])?;
            let spec = ParamSpec::new(name, shape([rows, cols], rank), 0);
            read.push((spec, values(of_file, cols, rank)));
        }
        let mut builder = ParamLayoutBuilder::new();
        let ids: Vec<_> = read
            .iter()
            .map(|(spec, _)| builder.add(spec.clone()))
            .collect();
        let mut factors = FlatBuffer::zeros(&builder.build()?);
        for (id, (_, values)) in ids.into_iter().zip(read) {
            factors.get_mut(id).copy_from_slice(&values);
        }
        Ok(Self::new(factors))
    }

    /// Of linears with their factors.
    pub(super) fn of(all: impl IntoIterator<Item = (Linear, Factors)>) -> Result<Self> {
        let mut builder = ParamLayoutBuilder::new();
        let mut values = Vec::new();
        for (linear, factors) in all {
            let [out, inputs] = linear.shape;
            for (part, shape, of_part) in [
                (Part::A, [linear.rank, inputs], factors.a),
                (Part::B, [out, linear.rank], factors.b),
            ] {
                let name = names::tensor(&linear.module, part);
                if of_part.len() != shape[0] * shape[1] {
                    let message = format!(
                        "`{name}` has {} elements, expected {shape:?}",
                        of_part.len()
                    );
                    return Err(Error::config(super::KEY, message));
                }
                values.push((builder.add(ParamSpec::new(name, shape, 0)), of_part));
            }
        }
        let mut factors = FlatBuffer::zeros(&builder.build()?);
        for (id, values) in values {
            factors.get_mut(id).copy_from_slice(&values);
        }
        Ok(Self::new(factors))
    }

    /// The adapted modules with their ranks.
    pub(super) fn ranks(&self) -> impl Iterator<Item = (&str, usize)> {
        self.0.layout().by_name().filter_map(|(_, segment)| {
            let (module, part) = names::parse(&segment.spec.name)?;
            (part == Part::A).then_some((module, segment.spec.shape[0]))
        })
    }

    /// Copies the factors to `params`.
    ///
    /// # Errors
    /// [`Error::Config`] if a factor of `params` is not here in its shape.
    pub(super) fn put_into(&self, params: &mut FlatBuffer) -> Result<()> {
        let layout = Arc::clone(params.layout());
        let of_linear = layout
            .by_name()
            .filter(|(_, segment)| rank_dimension(&segment.spec.name).is_some());
        for (id, segment) in of_linear {
            let values = self.values_of(&segment.spec)?;
            params.get_mut(id).copy_from_slice(values);
        }
        Ok(())
    }

    /// The values of one factor.
    ///
    /// # Errors
    /// [`Error::Config`] if it is not here in this shape.
    pub(crate) fn values_of(&self, spec: &ParamSpec) -> Result<&[f32]> {
        let id = self.0.layout().find(&spec.name);
        let found = id.filter(|id| self.0.layout().segment(*id).spec.shape == spec.shape);
        found.map(|id| self.0.get(id)).ok_or_else(|| {
            let message = format!(
                "what the run started from has no `{}` of {:?}",
                spec.name, spec.shape
            );
            Error::config(super::KEY, message)
        })
    }

    /// Takes `scale * B A` out of every weight: what is left, rounded to what the base is held in, is the
    /// base of the run.
    pub(super) fn subtract(&self, config: &LoraConfig, base: &mut dyn BaseWeights) -> Result<()> {
        let layout = self.0.layout();
        for linear in linears(config, layout)? {
            let site = site(base, &linear.module)?;
            let mut weight = base.read(site)?;
            let [out, inputs] = [weight.rows(), weight.cols()];
            let part = |part, rows, cols| {
                let name = names::tensor(&linear.module, part);
                let values = layout.find(&name).map(|id| self.0.get(id));
                match values.filter(|values| values.len() == rows * cols) {
                    Some(values) => Ok(View::from_f32(values, rows, cols)),
                    None => Err(Error::config(
                        super::KEY,
                        format!("`{name}` does not fit a weight of {out} x {inputs}"),
                    )),
                }
            };
            let a = part(Part::A, linear.rank, inputs)?;
            let b = part(Part::B, out, linear.rank)?;
            matmul::nn(weight.view_mut(), 1.0, -linear.scale, b, a)?;
            base.replace(site, weight.view())?;
        }
        Ok(())
    }

    /// Whether both hold the same bits.
    pub(crate) fn same(&self, other: &Self) -> bool {
        let named = |start: &Self| -> Vec<(String, Vec<u32>)> {
            let segments = start.0.layout().by_name();
            let bits = |id| start.0.get(id).iter().map(|v| v.to_bits()).collect();
            segments
                .map(|(id, s)| (s.spec.name.clone(), bits(id)))
                .collect()
        };
        named(self) == named(other)
    }
}
