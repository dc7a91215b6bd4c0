//! All trainable parameters in one flat f32 buffer, and the table that says what lies where.
//!
//! Gradients and optimizer moments are buffers of the same layout, so accumulation, all-reduce,
//! clipping, AdamW and checkpoints each work on one slice. The physical order is reverse execution
//! order, so that gradients become ready from the front of the buffer during backward; files are
//! sorted by name instead.

mod flat_buffer;

pub use flat_buffer::{FlatBuffer, transpose};

use crate::{Error, Result};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Segments start at multiples of this many floats (16 bytes).
const ALIGN: usize = 4;

/// A trainable tensor: its place in the [`ParamLayout`]. Stays valid when the layout is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ParamId(usize);

/// What a method says of a tensor it wants to train.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamSpec {
    /// Name in this run, unique; the name in files follows from it.
    pub name: String,
    /// Dimensions; the last one is contiguous.
    pub shape: Vec<usize>,
    /// When forward first uses it: smaller is earlier, linears over one input are equal. Decides the physical order.
    pub execution_order: usize,
    /// Order among tensors of one execution order, before that of their declaration: the gradients of those that lie
    /// beside one another can be one product.
    pub within: usize,
    /// Which adapter of the run it belongs to.
    pub adapter: usize,
    /// Learning rate of this tensor over the run's learning rate.
    pub lr_scale: f64,
    /// Whether weight decay applies. Transformers exempts biases and norms.
    pub weight_decay: bool,
    /// Whether files hold the transposed matrix.
    pub transposed: bool,
    /// A second name under which files have the same values, of `shape`, as PEFT's do where two modules share them.
    pub also: Option<String>,
}

impl ParamSpec {
    /// A tensor of adapter 0 at the run's learning rate.
    ///
    /// Weight decay applies unless the name is that of a bias or of a norm (`norm`, GPT-2's `ln_1`, `ln_2` and `ln_f`),
    /// which Transformers exempts.
    pub fn new(
        name: impl Into<String>,
        shape: impl Into<Vec<usize>>,
        execution_order: usize,
    ) -> Self {
        let name = name.into();
        let lower = name.to_lowercase();
        let weight_decay = !(lower.contains("bias")
            || lower.contains("norm")
            || lower.split('.').any(|part| part.starts_with("ln_")));
        Self {
            name,
            shape: shape.into(),
            execution_order,
            within: 1,
            adapter: 0,
            lr_scale: 1.0,
            weight_decay,
            transposed: false,
            also: None,
        }
    }

    /// Whether it is a table of embeddings, an `nn.Embedding` of PyTorch.
    #[must_use]
    pub fn is_table(&self) -> bool {
        let tables = [
            "embed_tokens.weight",
            "wte.weight",
            "wpe.weight",
            "embedding.weight",
            "prompt_embeddings",
        ];
        tables.iter().any(|table| self.name.ends_with(table))
    }

    /// The same, for a matrix that files hold transposed.
    #[must_use]
    pub fn transposed(mut self) -> Self {
        self.transposed = true;
        self
    }

    /// Dimensions in files.
    #[must_use]
    pub fn file_shape(&self) -> Vec<usize> {
        let mut shape = self.shape.clone();
        if self.transposed {
            shape.reverse();
        }
        shape
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A tensor with its place in the buffer.
#[derive(Clone, Debug, PartialEq)]
pub struct Segment {
    /// What it is.
    pub spec: ParamSpec,
    /// Elements before it.
    pub offset: usize,
}

impl Segment {
    /// Its elements in the flat buffer.
    #[must_use]
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.spec.len()
    }
}

/// Collects [`ParamSpec`]s before the buffer exists.
#[derive(Debug, Default)]
pub struct ParamLayoutBuilder {
    specs: Vec<ParamSpec>,
}

impl ParamLayoutBuilder {
    /// An empty layout.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a tensor.
    pub fn add(&mut self, spec: ParamSpec) -> ParamId {
        self.specs.push(spec);
        ParamId(self.specs.len() - 1)
    }

    /// What was added so far, to be changed before the order is fixed.
    pub fn specs_mut(&mut self) -> &mut [ParamSpec] {
        &mut self.specs
    }

    /// Fixes the physical order.
    ///
    /// # Errors
    /// [`Error::Config`] if two tensors have one name.
    pub fn build(self) -> Result<Arc<ParamLayout>> {
        let mut by_name = BTreeMap::new();
        for (id, spec) in self.specs.iter().enumerate() {
            if by_name.insert(spec.name.clone(), ParamId(id)).is_some() {
                return Err(Error::config(
                    "adapter",
                    format!("two trainable tensors are named `{}`", spec.name),
                ));
            }
        }
        let mut order: Vec<usize> = (0..self.specs.len()).collect();
        let key = |id: usize| {
            let spec = &self.specs[id];
            (std::cmp::Reverse(spec.execution_order), spec.within, id)
        };
        order.sort_by_key(|&id| key(id));
        let mut segments: Vec<Option<Segment>> = vec![None; self.specs.len()];
        let mut len = 0;
        for &id in &order {
            let spec = self.specs[id].clone();
            let offset = len;
            len += spec.len().next_multiple_of(ALIGN);
            segments[id] = Some(Segment { spec, offset });
        }
        let segments = segments.into_iter().flatten().collect();
        let order = order.into_iter().map(ParamId).collect();
        Ok(Arc::new(ParamLayout {
            segments,
            order,
            by_name,
            len,
        }))
    }
}

/// Which tensor lies where in the flat buffer.
#[derive(Debug, Default)]
pub struct ParamLayout {
    segments: Vec<Segment>,
    order: Vec<ParamId>,
    by_name: BTreeMap<String, ParamId>,
    len: usize,
}

impl ParamLayout {
    /// Length of the flat buffer, alignment gaps included. The gaps are always zero.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is trained.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// Number of trainable scalars, without alignment gaps.
    #[must_use]
    pub fn trainable(&self) -> usize {
        self.segments.iter().map(|s| s.spec.len()).sum()
    }

    /// The segment of a tensor.
    #[must_use]
    pub fn segment(&self, id: ParamId) -> &Segment {
        &self.segments[id.0]
    }

    /// Elements at the front of the buffer that belong to tensors first used at `execution_order` or
    /// later: their gradients are final once backward has passed that point.
    #[must_use]
    pub fn final_after(&self, execution_order: usize) -> usize {
        self.physical()
            .map(|(_, segment)| segment)
            .find(|segment| segment.spec.execution_order < execution_order)
            .map_or(self.len, |segment| segment.offset)
    }

    /// The tensor called `name`.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<ParamId> {
        self.by_name.get(name).copied()
    }

    /// Tensors in the order of the buffer.
    pub fn physical(&self) -> impl Iterator<Item = (ParamId, &Segment)> {
        self.order.iter().map(|&id| (id, self.segment(id)))
    }

    /// Tensors in the order of their names.
    pub fn by_name(&self) -> impl Iterator<Item = (ParamId, &Segment)> {
        self.by_name.values().map(|&id| (id, self.segment(id)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn physical_order_is_reverse_execution_order_and_aligned() {
        let mut builder = ParamLayoutBuilder::new();
        let a = builder.add(ParamSpec::new("a", [3], 0));
        let b = builder.add(ParamSpec::new("b", [2, 5], 1));
        let layout = builder.build().expect("unique names");
        assert_eq!(layout.segment(b).range(), 0..10);
        assert_eq!(layout.segment(a).range(), 12..15);
        assert_eq!((layout.len(), layout.trainable()), (16, 13));
        assert_eq!(
            layout.by_name().map(|(id, _)| id).collect::<Vec<_>>(),
            [a, b]
        );
        assert_eq!(
            layout.physical().map(|(id, _)| id).collect::<Vec<_>>(),
            [b, a]
        );
    }

    #[test]
    fn backward_finishes_the_buffer_from_the_front() {
        let mut builder = ParamLayoutBuilder::new();
        for (name, len, order) in [("early", 3, 2), ("late", 10, 9), ("late too", 1, 9)] {
            builder.add(ParamSpec::new(name, [len], order));
        }
        let layout = builder.build().expect("unique names");
        assert_eq!(
            [10, 9, 8, 3, 2, 0].map(|order| layout.final_after(order)),
            [0, 16, 16, 16, 20, 20]
        );
        assert_eq!(ParamLayout::default().final_after(0), 0);
    }

    #[test]
    fn two_segments_can_be_written_at_once() {
        let mut builder = ParamLayoutBuilder::new();
        let a = builder.add(ParamSpec::new("a", [3], 0));
        let b = builder.add(ParamSpec::new("b", [2], 1));
        let mut buffer = FlatBuffer::zeros(&builder.build().expect("unique names"));
        for (first, second) in [(a, b), (b, a)] {
            let [x, y] = buffer.view_two_mut(first, second);
            x.fill(1.0);
            y.fill(2.0);
            assert!(buffer.get(first).iter().all(|&v| v == 1.0));
            assert!(buffer.get(second).iter().all(|&v| v == 2.0));
        }
    }

    #[test]
    fn matrices_that_lie_below_one_another_can_be_written_as_one() {
        let mut builder = ParamLayoutBuilder::new();
        let mut add = |name: &str, rows: usize, within: usize| {
            let spec = ParamSpec::new(name, [rows, 4], 3);
            builder.add(ParamSpec { within, ..spec })
        };
        let (a, b, a2) = (add("a", 2, 0), add("b", 1, 1), add("a2", 3, 0));
        let mut buffer = FlatBuffer::zeros(&builder.build().expect("unique names"));
        let joined = buffer.view_joined_mut(&[a, a2]).expect("neighbours");
        assert_eq!(joined.shape(), [5, 4]);
        joined.fill(1.0);
        assert!(
            buffer
                .get(a)
                .iter()
                .chain(buffer.get(a2))
                .all(|v| *v == 1.0)
        );
        assert!(buffer.get(b).iter().all(|v| *v == 0.0));
        for apart in [&[a, b][..], &[a2, a], &[]] {
            assert!(buffer.view_joined_mut(apart).is_none());
        }
    }

    #[test]
    fn two_tensors_of_one_name_are_refused() {
        let mut builder = ParamLayoutBuilder::new();
        builder.add(ParamSpec::new("a", [1], 0));
        builder.add(ParamSpec::new("a", [1], 1));
        assert!(builder.build().is_err());
    }

    #[test]
    fn norms_and_biases_are_not_decayed() {
        assert!(!ParamSpec::new("model.norm.weight", [1], 0).weight_decay);
        assert!(!ParamSpec::new("q_proj.bias", [1], 0).weight_decay);
        assert!(!ParamSpec::new("transformer.h.0.ln_1.weight", [1], 0).weight_decay);
        assert!(ParamSpec::new("q_proj.lora_A.weight", [1], 0).weight_decay);
    }
}
