//! One linear of a group with what is attached to it: what comes after the base product, and before it
//! on the way back.

use super::linear::{LinearGroup, Part, PartBias};
use super::run::{Pass, Run};
use crate::Result;
use crate::adapter::{Attachment, LowRank, LowRankFactors};
use crate::params::{FlatBuffer, ParamId};
use ferrotune_kernels::{
    DType, Device, Tensor, View, ViewMut, Workspace, bias, dora, lora_linear, matmul,
};
use std::collections::BTreeMap;
use std::ops::Range;

/// What a part's attachment needs for backward.
pub(crate) enum PartSaved {
    None,
    /// `dropout(x) A^T`, `[T, rank]` and room up to whole 16 bytes, and what DoRA adds.
    LowRank {
        s: Tensor,
        scaled: Option<Scaled>,
    },
    /// The same, with the factors that a method made.
    Factors {
        s: Tensor,
        factors: [Tensor; 2],
    },
    Custom(Vec<Tensor>),
    /// Of all parts of a group with room for them: `dropout(x) A^T` `[T, R]`.
    Augmented {
        s: Tensor,
    },
    /// Of each member of the pass.
    Members(Vec<PartSaved>),
}

/// What DoRA keeps: the output before it is scaled, without bias, `[T, out]`, and the norms of the rows
/// of W + scale * B A, `[1, out]`.
pub(crate) struct Scaled {
    pub(crate) u: Tensor,
    pub(crate) norms: Tensor,
}

impl PartSaved {
    /// Whether backward of the output adds to the gradient of the input.
    pub(crate) fn adds_to_input(&self) -> bool {
        match self {
            Self::Custom(_) => true,
            Self::Members(saved) => saved.iter().any(Self::adds_to_input),
            _ => false,
        }
    }

    /// Whether the gradient of the base output is another than that of the output.
    pub(crate) fn changes_output(&self) -> bool {
        match self {
            Self::Custom(_) => true,
            Self::LowRank { scaled, .. } => scaled.is_some(),
            Self::Members(saved) => saved.iter().any(Self::changes_output),
            Self::None | Self::Factors { .. } | Self::Augmented { .. } => false,
        }
    }
}

/// Norms of the rows of W + scale * B A for the parts that need them, taken while W is at hand: by site, and
/// by place among the members of the pass.
#[derive(Default)]
pub(crate) struct Norms(BTreeMap<(usize, usize), Tensor>);

impl Norms {
    /// Whether a part of `group` that lies in `columns` needs them.
    pub(crate) fn are_wanted(group: &LinearGroup, columns: &Range<usize>) -> bool {
        let mut attached = inside(group, columns).flat_map(Part::all_attached);
        attached.any(|attachment| scaled(Some(attachment)).is_some())
    }

    /// Those of the parts of `group` that lie in `columns`, whose weight is `weight`; and the `product` of that with
    /// an input `x`, written to `y`: on a CPU both read the weight at once.
    pub(crate) fn add(
        &mut self,
        group: &LinearGroup,
        run: &Run<'_>,
        columns: Range<usize>,
        weight: View<'_>,
        product: Option<(View<'_>, ViewMut<'_>)>,
    ) -> Result<()> {
        let mut wanted = Vec::new();
        for part in inside(group, &columns) {
            let rows = part.columns.start - columns.start..part.columns.end - columns.start;
            for (place, (attachment, run)) in part.attached(run).into_iter().enumerate() {
                if let Some(low_rank) = scaled(attachment) {
                    let cross = run.take_fixed(DType::F32, low_rank.rank, rows.len());
                    let rows = rows.clone();
                    wanted.push(Wanted {
                        part,
                        place,
                        run,
                        low_rank,
                        rows,
                        cross,
                    });
                }
            }
        }
        let others = wanted.iter_mut().map(|norms| matmul::Beside {
            a: norms.run.params.view_as(norms.low_rank.a, norms.run.dtype),
            rows: norms.rows.clone(),
            dst: norms.cross.view_mut(),
        });
        match product {
            Some((x, y)) => matmul::nt_beside(y, x, weight, others.collect())?,
            None => {
                for of in others {
                    matmul::nt(of.dst, 0.0, 1.0, of.a, weight.row_range(of.rows))?;
                }
            }
        }
        for norms in wanted {
            let (site, place) = (norms.part.site, norms.place);
            self.0.insert((site, place), norms.finish(weight)?);
        }
        Ok(())
    }

    fn take(&mut self, part: &Part, place: usize) -> Option<Tensor> {
        self.0.remove(&(part.site, place))
    }
}

/// The parts of `group` that lie in `columns`.
fn inside<'a>(group: &'a LinearGroup, columns: &'a Range<usize>) -> impl Iterator<Item = &'a Part> {
    let parts = group.parts.iter();
    parts.filter(|p| columns.start <= p.columns.start && p.columns.end <= columns.end)
}

/// An update whose rows are brought to trained norms.
fn scaled(attachment: Option<&Attachment>) -> Option<&LowRank> {
    match attachment {
        Some(Attachment::LowRank(low_rank)) if low_rank.magnitude.is_some() => Some(low_rank),
        _ => None,
    }
}

/// Norms that are being made.
struct Wanted<'a, 'b> {
    part: &'a Part,
    place: usize,
    run: &'a Run<'b>,
    low_rank: &'a LowRank,
    /// Those of the weight that are the part's.
    rows: Range<usize>,
    /// A W^T `[rank, out]`.
    cross: Tensor,
}

impl Wanted<'_, '_> {
    fn finish(self, weight: View<'_>) -> Result<Tensor> {
        let run = self.run;
        let weight = weight.row_range(self.rows);
        let lengths = self.part.row_lengths(run, weight)?;
        row_norms(
            run.pass(),
            run.params,
            self.low_rank,
            self.cross,
            lengths.view(),
        )
    }
}

/// Norms of the rows of W + scale * B A `[1, out]`, in closed form: nothing of W's size is made. `cross` is A W^T
/// `[rank, out]`, which is given back, and `lengths` are the norms of the rows of W `[out, 1]`.
pub(super) fn row_norms(
    run: Pass<'_>,
    params: &FlatBuffer,
    low_rank: &LowRank,
    cross: Tensor,
    lengths: View<'_>,
) -> Result<Tensor> {
    let [rank, out] = cross.view().shape();
    let [a, b] = [low_rank.a, low_rank.b].map(|id| params.view_as(id, run.dtype));
    let mut gram = run.take_fixed(b.dtype(), rank, rank);
    matmul::nt(gram.view_mut(), 0.0, 1.0, a, a)?;
    let mut spread = run.take_fixed(DType::F32, rank, out);
    matmul::nt(spread.view_mut(), 0.0, 1.0, gram.view(), b)?;
    let mut norms = run.take_fixed(DType::F32, 1, out);
    let of = dora::Operands {
        weight: lengths,
        b: params.view(low_rank.b),
        cross: cross.view(),
        spread: spread.view(),
        scale: low_rank.scale,
    };
    dora::row_norms(&of, norms.view_mut())?;
    run.give_fixed([cross, gram, spread]);
    Ok(norms)
}

/// Norms of the rows of `weight`, `[out, 1]` f32.
pub(super) fn row_lengths(run: Pass<'_>, weight: View<'_>) -> Result<Tensor> {
    let out = weight.rows();
    let mut nothing = run.take_fixed(DType::F32, 1, out);
    nothing.view_mut().fill(0.0);
    let mut lengths = Tensor::empty(run.workspace.device(), DType::F32, 1, out);
    let of = dora::Operands {
        weight,
        b: nothing.view().reshaped(out, 1),
        cross: nothing.view(),
        spread: nothing.view(),
        scale: 0.0,
    };
    dora::row_norms(&of, lengths.view_mut())?;
    run.give_fixed([nothing]);
    Ok(Tensor::from_buffer(lengths.into_buffer(), out, 1))
}

impl Part {
    /// Norms of the rows of `weight`, which is this part's, `[out, 1]` f32: found once, for it is frozen.
    fn row_lengths(&self, run: &Run<'_>, weight: View<'_>) -> Result<&Tensor> {
        if let Some(known) = self.row_lengths.get() {
            return Ok(known);
        }
        let lengths = row_lengths(run.pass(), weight)?;
        Ok(self.row_lengths.get_or_init(|| lengths))
    }

    /// What stands here in each pass of `run`: one, or those of its members.
    fn attached<'a, 'b>(&'a self, run: &'a Run<'b>) -> Vec<(Option<&'a Attachment>, &'a Run<'b>)> {
        if run.members.is_empty() {
            return vec![(self.attachment.as_ref(), run)];
        }
        let of = |number: usize| self.members.get(number).and_then(Option::as_ref);
        let members = run.members.iter();
        members
            .map(|member| (member.number.and_then(of), &member.run))
            .collect()
    }

    /// Adds bias and attachment to `y` `[T, out]`, which holds the base product.
    pub(crate) fn forward(
        &self,
        run: &Run<'_>,
        x: View<'_>,
        mut y: ViewMut<'_>,
        norms: &mut Norms,
    ) -> Result<PartSaved> {
        let bias = self.bias(run.params);
        let mut saved = Vec::new();
        for (place, (attachment, own)) in self.attached(run).into_iter().enumerate() {
            let rows = run.rows_of(place);
            let (x, y) = (x.row_range(rows.clone()), y.reborrow().row_range(rows));
            let norms = norms.take(self, place);
            saved.push(self.forward_of(attachment, own, x, y, norms, bias)?);
        }
        Ok(match run.members.is_empty() {
            true => saved.pop().unwrap_or(PartSaved::None),
            false => PartSaved::Members(saved),
        })
    }

    fn forward_of(
        &self,
        attachment: Option<&Attachment>,
        run: &Run<'_>,
        x: View<'_>,
        mut y: ViewMut<'_>,
        norms: Option<Tensor>,
        base_bias: Option<View<'_>>,
    ) -> Result<PartSaved> {
        match attachment {
            Some(Attachment::LowRank(low_rank)) => {
                if let Some(id) = low_rank.bias {
                    bias::add_scaled(y.reborrow(), low_rank.scale, run.params.view(id))?;
                }
                let update = self.low_rank(run, low_rank);
                let s = low_rank_forward(run, x, &update, y.reborrow())?;
                let scaled = match (low_rank.magnitude, norms) {
                    (Some(magnitude), Some(norms)) => {
                        Some(scale(run, magnitude.id(), norms, y.reborrow())?)
                    }
                    _ => None,
                };
                add(y, base_bias)?;
                Ok(PartSaved::LowRank { s, scaled })
            }
            Some(Attachment::Factors(method)) => {
                let factors = method.factors(run.params)?.map(|t| self.placed(run, &t));
                let update = self.factors_update(run, method.as_ref(), &factors);
                let s = low_rank_forward(run, x, &update, y.reborrow())?;
                add(y, base_bias)?;
                Ok(PartSaved::Factors { s, factors })
            }
            Some(Attachment::Custom(custom)) => {
                add(y.reborrow(), base_bias)?;
                Ok(PartSaved::Custom(custom.forward(run.params, x, y)?))
            }
            _ => {
                add(y, base_bias)?;
                Ok(PartSaved::None)
            }
        }
    }

    /// Writes the gradient of the base output to `base_dy`; `dy` is that of the output.
    #[expect(
        clippy::too_many_arguments,
        reason = "whose, where, and a linear's own"
    )]
    pub(crate) fn output_backward(
        &self,
        run: &Run<'_>,
        grads: &mut FlatBuffer,
        x: View<'_>,
        saved: &PartSaved,
        dy: View<'_>,
        mut base_dy: ViewMut<'_>,
        mut dx: Option<ViewMut<'_>>,
    ) -> Result<()> {
        let PartSaved::Members(saved) = saved else {
            let attachment = self.attachment.as_ref();
            return output_backward_of(attachment, run, grads, x, saved, dy, base_dy, dx);
        };
        let attached = self.attached(run).into_iter().zip(&run.members);
        for (((attachment, own), member), saved) in attached.zip(saved) {
            let rows = || member.rows.clone();
            let dx = dx.as_mut().map(|dx| dx.reborrow().row_range(rows()));
            let base_dy = base_dy.reborrow().row_range(rows());
            let (x, dy) = (x.row_range(rows()), dy.row_range(rows()));
            let grads = &mut member.grads.borrow_mut();
            output_backward_of(attachment, own, grads, x, saved, dy, base_dy, dx)?;
        }
        Ok(())
    }

    /// Gradients of a low-rank update's factors; what it adds to `dx`. `dy` is the gradient of the base
    /// output.
    pub(crate) fn low_rank_backward(
        &self,
        run: &Run<'_>,
        grads: &mut FlatBuffer,
        x: View<'_>,
        saved: PartSaved,
        dy: View<'_>,
        mut dx: Option<ViewMut<'_>>,
    ) -> Result<()> {
        let PartSaved::Members(saved) = saved else {
            let attachment = self.attachment.as_ref();
            return self.low_rank_backward_of(attachment, run, grads, x, saved, dy, dx);
        };
        let attached = self.attached(run).into_iter().zip(&run.members);
        for (((attachment, own), member), saved) in attached.zip(saved) {
            let rows = || member.rows.clone();
            let (x, dy) = (x.row_range(rows()), dy.row_range(rows()));
            let dx = dx.as_mut().map(|dx| dx.reborrow().row_range(rows()));
            let grads = &mut member.grads.borrow_mut();
            self.low_rank_backward_of(attachment, own, grads, x, saved, dy, dx)?;
        }
        Ok(())
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "whose, where, and a linear's own"
    )]
    fn low_rank_backward_of(
        &self,
        attachment: Option<&Attachment>,
        run: &Run<'_>,
        grads: &mut FlatBuffer,
        x: View<'_>,
        saved: PartSaved,
        dy: View<'_>,
        dx: Option<ViewMut<'_>>,
    ) -> Result<()> {
        match (attachment, saved) {
            (Some(Attachment::LowRank(low_rank)), PartSaved::LowRank { s, scaled }) => {
                if let Some(id) = low_rank.bias {
                    bias::backward_scaled(dy, low_rank.scale, grads.view_mut(id))?;
                }
                let update = self.low_rank(run, low_rank);
                let [d_a, d_b] = grads.view_two_mut(low_rank.a, low_rank.b);
                let rank = s.view().columns(0..low_rank.rank);
                lora_linear::backward(x, &update, rank, dy, dx, d_a, d_b, run.workspace)?;
                run.give([s]);
                if let Some(Scaled { u, norms }) = scaled {
                    run.give([u]);
                    run.give_fixed([norms]);
                }
            }
            (Some(Attachment::Factors(method)), PartSaved::Factors { s, factors }) => {
                let update = self.factors_update(run, method.as_ref(), &factors);
                let zeros = |t: &Tensor| {
                    let mut gradient =
                        Tensor::temporary(&t.device(), DType::F32, t.rows(), t.cols());
                    gradient.view_mut().fill(0.0);
                    gradient
                };
                let [mut d_a, mut d_b] = [zeros(&factors[0]), zeros(&factors[1])];
                let rank = s.view().columns(0..method.rank());
                lora_linear::backward(
                    x,
                    &update,
                    rank,
                    dy,
                    dx,
                    d_a.view_mut(),
                    d_b.view_mut(),
                    run.workspace,
                )?;
                run.workspace.give(s);
                method.backward(run.params, grads, d_a.view(), d_b.view())?;
            }
            _ => {}
        }
        Ok(())
    }

    pub(crate) fn bias_gradient(&self, grads: &mut FlatBuffer, dy: View<'_>) -> Result<()> {
        if let Some(PartBias::Trained(id)) = self.bias {
            bias::backward(dy, grads.view_mut(id))?;
        }
        Ok(())
    }

    /// What a method made, where products read it, in the dtype they read.
    pub(crate) fn placed(&self, run: &Run<'_>, tensor: &Tensor) -> Tensor {
        match run.workspace.device() {
            Device::Cpu => tensor.to_dtype(DType::F32),
            device => {
                let [rows, cols] = tensor.view().shape();
                let mut placed = Tensor::temporary(device, run.dtype, rows, cols);
                placed.view_mut().copy_from(tensor.view());
                placed
            }
        }
    }

    /// `update` as it is in this pass.
    pub(crate) fn low_rank<'a>(
        &self,
        run: &'a Run<'_>,
        update: &LowRank,
    ) -> lora_linear::LowRank<'a> {
        lora_linear::LowRank {
            a: run.params.view_as(update.a, run.dtype),
            b: run.params.view_as(update.b, run.dtype),
            scale: update.scale,
            dropout: run.dropout(self.site, update.dropout),
            silent: run.inputs.silent(update.rank),
        }
    }

    fn factors_update<'a>(
        &self,
        run: &'a Run<'_>,
        method: &dyn LowRankFactors,
        [a, b]: &'a [Tensor; 2],
    ) -> lora_linear::LowRank<'a> {
        lora_linear::LowRank {
            a: a.view(),
            b: b.view(),
            scale: method.scale(),
            dropout: run.dropout(self.site, method.dropout()),
            silent: None,
        }
    }

    /// Adds the bias of the base to `y`, if there is one.
    pub(crate) fn add_bias(&self, run: &Run<'_>, y: ViewMut<'_>) -> Result<()> {
        add(y, self.bias(run.params))
    }

    fn bias<'a>(&'a self, params: &'a FlatBuffer) -> Option<View<'a>> {
        self.bias.as_ref().map(|bias| match bias {
            PartBias::Frozen(values) => values.view(),
            PartBias::Trained(id) => params.view(*id),
        })
    }
}

#[expect(
    clippy::too_many_arguments,
    reason = "whose, where, and a linear's own"
)]
fn output_backward_of(
    attachment: Option<&Attachment>,
    run: &Run<'_>,
    grads: &mut FlatBuffer,
    x: View<'_>,
    saved: &PartSaved,
    dy: View<'_>,
    mut base_dy: ViewMut<'_>,
    dx: Option<ViewMut<'_>>,
) -> Result<()> {
    match (attachment, saved) {
        (Some(Attachment::Custom(custom)), PartSaved::Custom(saved)) => {
            base_dy.reborrow().copy_from(dy);
            custom.backward(run.params, grads, x, saved, base_dy, dx)
        }
        (
            Some(Attachment::LowRank(LowRank {
                magnitude: Some(magnitude),
                ..
            })),
            PartSaved::LowRank {
                scaled: Some(Scaled { u, norms }),
                ..
            },
        ) => {
            let id = magnitude.id();
            let (values, to) = (run.params.view(id), grads.view_mut(id));
            Ok(dora::backward(
                dy,
                u.view(),
                values,
                norms.view(),
                to,
                base_dy,
            )?)
        }
        _ => {
            base_dy.copy_from(dy);
            Ok(())
        }
    }
}

fn add(y: ViewMut<'_>, values: Option<View<'_>>) -> Result<()> {
    match values {
        Some(values) => Ok(bias::add(y, values)?),
        None => Ok(()),
    }
}

/// Adds the update to `y` and returns `dropout(x) A^T`.
fn low_rank_forward(
    run: &Run<'_>,
    x: View<'_>,
    update: &lora_linear::LowRank<'_>,
    y: ViewMut<'_>,
) -> Result<Tensor> {
    let (dtype, rank) = (update.a.dtype(), update.a.rows());
    let mut s = run
        .workspace
        .take(dtype, x.rows(), Workspace::aligned(dtype, rank));
    let columns = s.view_mut().columns(0..rank);
    lora_linear::forward(x, update, y, columns, run.workspace)?;
    Ok(s)
}

/// DoRA's scaling of `y`, and what it keeps.
fn scale(run: &Run<'_>, magnitude: ParamId, norms: Tensor, y: ViewMut<'_>) -> Result<Scaled> {
    let mut u = run.workspace.take(y.dtype(), y.rows(), y.cols());
    dora::forward(y, u.view_mut(), run.params.view(magnitude), norms.view())?;
    Ok(Scaled { u, norms })
}
