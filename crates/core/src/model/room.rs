//! Room beside matrices, in which a linear and its low-rank updates become one product
//! (`ferrotune_kernels::augmented_linear`).

use super::ahead::Wanted;
use super::frozen::{FrozenWeight, Scratch};
use super::linear::{LinearGroup, Matrix, Part, PartSaved};
use super::run::Run;
use super::{DecoderConfig, LayerPlan, ModelPlan};
use crate::Result;
use crate::adapter::{Attachment, LowRank, SiteId};
use crate::params::{FlatBuffer, ParamId};
use ferrotune_kernels::augmented_linear::{self, Factors, Weight};
use ferrotune_kernels::{
    DType, Device, Tensor, View, ViewMut, Workspace, bias, lora_linear, matmul,
};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Columns beside the inputs and the gradients of the groups of a layer: q/k/v, o, gate/up, down.
pub(super) type Rooms = [usize; 4];

/// What a group reads, or the gradient of what it writes.
pub(crate) enum Wide<'a> {
    /// The matrix alone.
    Plain(View<'a>),
    /// With columns behind it that hold nothing yet.
    WithRoom(ViewMut<'a>),
}

impl Wide<'_> {
    /// Its first `cols` columns.
    pub(crate) fn view(&self, cols: usize) -> View<'_> {
        match self {
            Self::Plain(matrix) => matrix.columns(0..cols),
            Self::WithRoom(matrix) => matrix.as_view().columns(0..cols),
        }
    }
}

/// Room of all layers of a model, where `attached` says what is at a site beside a trained bias.
///
/// There is none on a CPU, where separate products are as fast, and none where copies of a layer share a weight, whose
/// margins can hold the factors of one. The caller knows whether linears multiply values.
pub(super) fn of_layers<'a>(
    config: &DecoderConfig,
    plan: &ModelPlan,
    attached: impl Fn(SiteId) -> Option<&'a Attachment>,
    device: &Device,
) -> Vec<Rooms> {
    if !device.is_cuda() || config.is_restacked() {
        return vec![Rooms::default(); plan.layers.len()];
    }
    let layers = plan.layers.iter();
    layers.map(|layer| of_layer(layer, &attached)).collect()
}

fn of_layer<'a>(layer: &LayerPlan, attached: impl Fn(SiteId) -> Option<&'a Attachment>) -> Rooms {
    let [qkv, o, gate_up, down] = layer.groups().map(|ids| of_group(ids, &attached));
    // Without a norm a block reads the stream itself, which has no room.
    let behind = |norm: Option<SiteId>, room| if norm.is_some() { room } else { 0 };
    [
        behind(layer.input_norm, qkv),
        o,
        behind(layer.mlp_norm, gate_up),
        down,
    ]
}

/// Elements of the largest weight of a group with its margins.
pub(super) fn largest_group(plan: &ModelPlan, rooms: &[Rooms]) -> usize {
    let groups = (plan.layers.iter().zip(rooms)).flat_map(|(layer, rooms)| {
        let elements = |(ids, room): (&[SiteId], &usize)| {
            let out: usize = ids.iter().map(|&id| plan.site(id).out_features).sum();
            (out + room) * (plan.site(ids[0]).in_features + room)
        };
        layer.groups().into_iter().zip(rooms).map(elements)
    });
    groups.max().unwrap_or(0)
}

/// Room for the low-rank updates of a group; none if anything else stands there.
fn of_group<'a>(ids: &[SiteId], attached: impl Fn(SiteId) -> Option<&'a Attachment>) -> usize {
    let mut ranks = 0;
    for &id in ids {
        match attached(id) {
            None => {}
            Some(Attachment::LowRank(update)) if update.magnitude.is_none() => ranks += update.rank,
            Some(_) => return 0,
        }
    }
    augmented_linear::room(ranks)
}

/// A frozen matrix `[out, in]`, in products as `[out + R, in + R]` with margins for factors.
#[derive(Debug)]
pub(crate) struct Augmented {
    held: Held,
    shape: [usize; 2],
    room: usize,
}

#[derive(Debug)]
enum Held {
    /// Values with their margins. Behind a lock, because every pass writes its factors.
    Values(Mutex<Tensor>),
    /// Codes, which are written out between margins for each product.
    Codes(Box<FrozenWeight>),
}

/// Which pass wants a weight.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pass {
    Forward,
    Backward,
}

impl Augmented {
    /// Of values, which `write` writes to a matrix `[out, in]`.
    pub(super) fn of_values(
        device: &Device,
        dtype: DType,
        shape: [usize; 2],
        room: usize,
        write: impl FnOnce(ViewMut<'_>) -> Result<()>,
    ) -> Result<Self> {
        let [rows, cols] = shape.map(|length| length + room);
        let mut values = Tensor::empty(device, dtype, rows, cols);
        values.view_mut().fill(0.0);
        write(
            values
                .view_mut()
                .row_range(0..shape[0])
                .columns(0..shape[1]),
        )?;
        Ok(Self {
            held: Held::Values(Mutex::new(values)),
            shape,
            room,
        })
    }

    /// Of a matrix that is held as codes.
    pub(super) fn of_codes(codes: FrozenWeight, room: usize) -> Self {
        Self {
            shape: codes.shape(),
            held: Held::Codes(Box::new(codes)),
            room,
        }
    }

    pub(super) fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// The codes, if it is held as such.
    pub(super) fn codes(&self) -> Option<&FrozenWeight> {
        match &self.held {
            Held::Values(_) => None,
            Held::Codes(codes) => Some(codes),
        }
    }

    /// Calls `body` with `W [out, in]`.
    pub(super) fn with_base<R>(
        &self,
        scratch: Scratch,
        workspace: &Workspace,
        body: impl FnOnce(View<'_>) -> Result<R>,
    ) -> Result<R> {
        let [out, inputs] = self.shape;
        match &self.held {
            Held::Values(values) => body(lock(values).view().row_range(0..out).columns(0..inputs)),
            Held::Codes(codes) => codes.with_values(scratch, workspace, body),
        }
    }

    /// Writes W to `out [out, in]`.
    pub(super) fn write(&self, out: ViewMut<'_>) -> Result<()> {
        let [rows, inputs] = self.shape;
        match &self.held {
            Held::Values(values) => {
                out.copy_from(lock(values).view().row_range(0..rows).columns(0..inputs));
                Ok(())
            }
            Held::Codes(codes) => codes.write(out),
        }
    }

    /// Writes `rows` of W, rounded or quantised as they are held.
    pub(super) fn replace_rows(&mut self, rows: Range<usize>, from: View<'_>) -> Result<()> {
        match &mut self.held {
            Held::Values(values) => {
                let values = values.get_mut().unwrap_or_else(PoisonError::into_inner);
                let to = values.view_mut().row_range(rows);
                to.columns(0..self.shape[1]).copy_from(from);
                Ok(())
            }
            Held::Codes(codes) => codes.replace_rows(rows, from),
        }
    }
}

fn lock(values: &Mutex<Tensor>) -> MutexGuard<'_, Tensor> {
    // Values that a panic left half written are written anew by the next pass.
    values.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A low-rank update of a group, with its columns among all ranks.
type Update<'a> = (&'a Part, &'a LowRank, Range<usize>);

impl LinearGroup {
    /// Columns that its input, and the gradient of its output, have room for beside theirs.
    pub(crate) fn room(&self) -> usize {
        self.augmented().map_or(0, |weight| weight.room)
    }

    /// Calls `product` with W~, the factors of `updates` in its margins.
    fn with_weight<R>(
        &self,
        run: &Run<'_>,
        (weight, pass): (&Augmented, Pass),
        updates: &[Update<'_>],
        product: impl FnOnce(&Weight<'_>) -> Result<R>,
    ) -> Result<R> {
        let room = weight.room;
        if let Held::Values(values) = &weight.held {
            let mut values = lock(values);
            // Those of the forward pass are still there.
            if pass == Pass::Forward {
                place(run, updates, values.view_mut(), room)?;
            }
            return product(&Weight::new(values.view(), room)?);
        }
        if let Some(ahead) = &run.ahead {
            let wanted = Wanted {
                group: self.index,
                matrix: Matrix::Augmented,
            };
            return ahead.with(run, wanted, |values| {
                product(&Weight::new(values.view(), room)?)
            });
        }
        let shape = self.shape_of(Matrix::Augmented);
        self.scratch.lend(run.workspace, shape, |values| {
            self.write_augmented(run, weight, values.view_mut())?;
            product(&Weight::new(values.view(), room)?)
        })
    }

    /// Writes what `weight`, which is this group's, stands for to `to` `[out + R, in + R]`, with the factors in the
    /// margins.
    pub(super) fn write_augmented(
        &self,
        run: &Run<'_>,
        weight: &Augmented,
        mut to: ViewMut<'_>,
    ) -> Result<()> {
        let (room, [out, inputs]) = (weight.room, weight.shape);
        let (own, margin) = (0..inputs, inputs..inputs + room);
        weight.write(to.reborrow().row_range(0..out).columns(own))?;
        to.reborrow().row_range(0..out).columns(margin).fill(0.0);
        to.reborrow().row_range(out..out + room).fill(0.0);
        place(run, &self.updates(), to, room)
    }

    fn updates(&self) -> Vec<Update<'_>> {
        let mut first = 0;
        let updates = self.parts.iter().filter_map(|part| match &part.attachment {
            Some(Attachment::LowRank(update)) => {
                let ranks = first..first + update.rank;
                first = ranks.end;
                Some((part, update, ranks))
            }
            _ => None,
        });
        updates.collect()
    }

    /// Forward as one product; `x` `[T, in + R]`.
    pub(super) fn augmented_forward(
        &self,
        run: &Run<'_>,
        weight: &Augmented,
        mut x: ViewMut<'_>,
        mut y: ViewMut<'_>,
    ) -> Result<Vec<PartSaved>> {
        let (updates, room) = (self.updates(), weight.room);
        let mut s = run.workspace.take(run.dtype, run.rows, room);
        let beside = self.in_features..self.in_features + room;
        let apart = has_dropout(run, &updates) || is_silent_somewhere(run, &updates);
        if apart {
            s.view_mut().fill(0.0);
            let inputs = x.as_view().columns(0..self.in_features);
            for (part, update, ranks) in &updates {
                let s = s.view_mut().columns(ranks.clone());
                lora_linear::down(inputs, &part.low_rank(run, update), s, run.workspace)?;
            }
            augmented_linear::copy(x.reborrow().columns(beside.clone()), s.view())?;
        }
        self.with_weight(run, (weight, Pass::Forward), &updates, |weight| {
            if !apart {
                augmented_linear::down(x.reborrow(), weight)?;
                augmented_linear::copy(s.view_mut(), x.as_view().columns(beside))?;
            }
            Ok(augmented_linear::forward(
                x.as_view(),
                weight,
                y.reborrow(),
            )?)
        })?;
        for (part, update, _) in &updates {
            if let Some(id) = update.bias {
                let y = y.reborrow().columns(part.columns.clone());
                bias::add_scaled(y, update.scale, run.params.view(id))?;
            }
        }
        for part in &self.parts {
            part.add_bias(run, y.reborrow().columns(part.columns.clone()))?;
        }
        Ok(vec![PartSaved::Augmented { s }])
    }

    /// Backward of [`LinearGroup::augmented_forward`]; `dy` `[T, out + R]`.
    #[expect(clippy::too_many_arguments, reason = "a linear's own, and its weight")]
    pub(super) fn augmented_backward(
        &self,
        run: &Run<'_>,
        grads: &mut FlatBuffer,
        weight: &Augmented,
        x: View<'_>,
        s: Tensor,
        mut dy: ViewMut<'_>,
        mut dx: Option<ViewMut<'_>>,
    ) -> Result<()> {
        let input_gradient = dx.as_mut().map(ViewMut::reborrow);
        self.input_gradient(run, grads, weight, s, dy.reborrow(), input_gradient)?;
        let dx = dx.filter(|_| has_dropout(run, &self.updates()));
        self.factor_gradients(run, grads, x, dy.as_view(), dx)
    }

    /// Its first half, which does not need the input: `ds` beside `dy`, the gradients of every B, and `dx`, short of
    /// what goes through a dropout.
    pub(super) fn input_gradient(
        &self,
        run: &Run<'_>,
        grads: &mut FlatBuffer,
        weight: &Augmented,
        s: Tensor,
        mut dy: ViewMut<'_>,
        dx: Option<ViewMut<'_>>,
    ) -> Result<()> {
        let updates = self.updates();
        self.with_weight(run, (weight, Pass::Backward), &updates, |weight| {
            augmented_linear::up_backward(dy.reborrow(), weight)?;
            for (part, update, ranks) in &updates {
                let first = self.out_features() + ranks.start;
                let ds = dy.reborrow().columns(first..first + ranks.len());
                part.low_rank(run, update).silence(ds)?;
            }
            match dx {
                Some(dx) if has_dropout(run, &updates) => {
                    let d_out = dy.as_view().columns(0..self.out_features());
                    Ok(matmul::nn(dx, 0.0, 1.0, d_out, weight.base())?)
                }
                Some(dx) => Ok(augmented_linear::backward(dy.as_view(), weight, dx)?),
                None => Ok(()),
            }
        })?;
        let d_out = dy.as_view().columns(0..self.out_features());
        for (part, update, ranks) in &updates {
            let d_part = d_out.columns(part.columns.clone());
            if let Some(id) = update.bias {
                bias::backward_scaled(d_part, update.scale, grads.view_mut(id))?;
            }
            let s = s.view().columns(ranks.clone());
            matmul::tn(grads.view_mut(update.b), 1.0, update.scale, d_part, s)?;
        }
        run.workspace.give(s);
        Ok(())
    }

    /// Its second half: the gradients of every A, in one product where they lie beside one another, from the input and
    /// `ds` beside `dy`; what goes through a dropout is added to `dx`, if it is given.
    pub(super) fn factor_gradients(
        &self,
        run: &Run<'_>,
        grads: &mut FlatBuffer,
        x: View<'_>,
        dy: View<'_>,
        mut dx: Option<ViewMut<'_>>,
    ) -> Result<()> {
        let (updates, out) = (self.updates(), self.out_features());
        let factors: Vec<ParamId> = updates.iter().map(|(_, update, _)| update.a).collect();
        if !has_dropout(run, &updates)
            && let (None, Some(d_a)) = (&dx, grads.view_joined_mut(&factors))
        {
            let ds = dy.columns(out..out + d_a.rows());
            return Ok(matmul::tn(d_a, 1.0, 1.0, ds, x)?);
        }
        for (part, update, ranks) in updates {
            let first = out + ranks.start;
            let ds = dy.columns(first..first + ranks.len());
            let (low_rank, dx) = (
                part.low_rank(run, update),
                dx.as_mut().map(ViewMut::reborrow),
            );
            let d_a = grads.view_mut(update.a);
            lora_linear::down_backward(x, &low_rank, ds, dx, d_a, run.workspace)?;
        }
        Ok(())
    }

    /// The weight, where the halves of the backward of what was `saved` may be called apart.
    pub(super) fn in_halves(&self, run: &Run<'_>, saved: &[PartSaved]) -> Option<&Augmented> {
        let augmented = matches!(saved, [PartSaved::Augmented { .. }]);
        self.augmented()
            .filter(|_| augmented && !has_dropout(run, &self.updates()))
    }
}

fn has_dropout(run: &Run<'_>, updates: &[Update<'_>]) -> bool {
    let mut updates = updates.iter();
    updates.any(|(part, update, _)| part.low_rank(run, update).dropout.is_some())
}

fn is_silent_somewhere(run: &Run<'_>, updates: &[Update<'_>]) -> bool {
    let mut updates = updates.iter();
    updates.any(|(part, update, _)| part.low_rank(run, update).silent.is_some())
}

/// Writes the factors as they are now into the margins of `weight`.
fn place(run: &Run<'_>, updates: &[Update<'_>], weight: ViewMut<'_>, room: usize) -> Result<()> {
    let factors = updates.iter().map(|(part, update, ranks)| Factors {
        a: run.params.view(update.a),
        b: run.params.view(update.b),
        scale: update.scale,
        row: part.columns.start,
        rank: ranks.start,
    });
    let factors: Vec<Factors<'_>> = factors.collect();
    Ok(augmented_linear::place(weight, room, &factors)?)
}
