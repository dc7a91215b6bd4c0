//! Low-rank updates of the head: plain, weight-decomposed, and of factors that a method makes.
//!
//! ```text
//! logits = hidden W^T + scale dropout(hidden) A^T B^T
//! DoRA:  logits[v] *= f[v],  f[v] = m[v] / |W[v] + scale B[v] A|
//! ```
//!
//! Logits are never there as a whole, so that f multiplies the rows of W and of B instead. With G and H, the
//! gradients of these products, `dm[v] += (G[v] . W[v] + H[v] . B[v]) / |..|`, the norms being constants in backward,
//! and H times f is B's gradient.

use super::made::{At, Made, MadeGradients, MadeUpdate, Right};
use crate::Result;
use crate::adapter::{LowRank, LowRankFactors, Magnitude};
use crate::model::{Model, attached};
use crate::params::FlatBuffer;
use ferrotune_kernels::{
    DType, Tensor, View, ViewMut, Workspace, axpby, dora, embedding, hadamard, lora_linear, matmul,
};

impl Model {
    /// Of an update of parameters.
    pub(super) fn made_low_rank(
        &self,
        at: &At<'_>,
        update: &LowRank,
        hidden: View<'_>,
    ) -> Result<Made> {
        let mut made = Made::default();
        let mut copy = self.copy_of_b(at, update)?;
        if let (Some(magnitude), Some(copy)) = (update.magnitude, &mut copy) {
            let norms = self.row_norms(at, update)?;
            let factors = row_factors(at, magnitude, norms.view())?;
            let table = self.head_table().whole(at.params, at.pass.dtype);
            let mut weight = at.temporary(at.product_dtype(), table.rows(), table.cols());
            weight.view_mut().copy_from(table);
            for matrix in [&mut weight, copy] {
                hadamard::scale(matrix.view_mut(), 0.0, factors.view())?;
            }
            at.pass.give_fixed([factors]);
            (made.weight, made.norms) = (Some(weight), Some(norms));
        }
        let factors = of_parameters(at, update);
        made.update = Some(MadeUpdate {
            s: down(at, &factors, width(update), hidden)?,
            a: None,
            b: copy.map_or(Right::Parameter(update.b), Right::Copy),
            width: width(update),
            scale: update.scale,
        });
        Ok(made)
    }

    /// Of factors that a method makes.
    pub(super) fn made_factors(
        &self,
        at: &At<'_>,
        method: &dyn LowRankFactors,
        hidden: View<'_>,
    ) -> Result<Made> {
        let [a, b] = method.factors(at.params)?.map(|factor| at.placed(factor));
        let factors = lora_linear::LowRank {
            a: a.view(),
            b: b.view(),
            scale: method.scale(),
            dropout: at.mask,
            silent: None,
        };
        let update = MadeUpdate {
            s: down(at, &factors, method.rank(), hidden)?,
            a: Some(a),
            b: Right::Made(b),
            width: method.rank(),
            scale: method.scale(),
        };
        Ok(Made {
            update: Some(update),
            ..Made::default()
        })
    }

    /// Adds the gradients of an update of parameters to `grads`, and what it adds to that of `hidden`.
    pub(super) fn low_rank_gradients(
        &self,
        at: &At<'_>,
        grads: &mut FlatBuffer,
        update: &LowRank,
        hidden: View<'_>,
        (made, mut d): (Made, MadeGradients),
        d_hidden: ViewMut<'_>,
    ) -> Result<()> {
        if let (Some(magnitude), Some(norms)) = (update.magnitude, &made.norms) {
            self.magnitude_gradients(at, grads, (update, magnitude), norms.view(), &mut d)?;
        }
        if let Some(d_s) = d.s {
            let d_rank = d_s.view().columns(0..update.rank);
            let (factors, d_a) = (of_parameters(at, update), grads.view_mut(update.a));
            let workspace = at.pass.workspace;
            lora_linear::down_backward(hidden, &factors, d_rank, Some(d_hidden), d_a, workspace)?;
            workspace.give(d_s);
        }
        if let Some(d_b) = d.b {
            self.add_copy(at, grads, update, d_b)?;
        }
        made.give(at.pass);
        Ok(())
    }

    /// Adds the gradients of the parameters that a method makes factors of to `grads`, and what they add to that of
    /// `hidden`.
    pub(super) fn factor_gradients(
        at: &At<'_>,
        grads: &mut FlatBuffer,
        method: &dyn LowRankFactors,
        hidden: View<'_>,
        (made, d): (Made, MadeGradients),
        d_hidden: ViewMut<'_>,
    ) -> Result<()> {
        let (Some(update), Some(d_s), Some(d_b)) = (made.update, d.s, d.b) else {
            return Ok(());
        };
        if let Some(a) = &update.a {
            let factors = lora_linear::LowRank {
                a: a.view(),
                b: update.b(at.params, at.pass.dtype),
                scale: update.scale,
                dropout: at.mask,
                silent: None,
            };
            let mut d_a = at.temporary(DType::F32, a.rows(), a.cols());
            d_a.view_mut().fill(0.0);
            lora_linear::down_backward(
                hidden,
                &factors,
                d_s.view().columns(0..update.width),
                Some(d_hidden),
                d_a.view_mut(),
                at.pass.workspace,
            )?;
            method.backward(at.params, grads, d_a.view(), d_b.view())?;
        }
        at.pass.workspace.give(d_s);
        update.give(at.pass);
        Ok(())
    }

    /// DoRA's norms, `[1, V]`.
    fn row_norms(&self, at: &At<'_>, update: &LowRank) -> Result<Tensor> {
        let table = self.head_table().whole(at.params, at.pass.dtype);
        let lengths = match self.head.row_lengths.get() {
            Some(known) => known,
            None => {
                let lengths = attached::row_lengths(at.pass, table)?;
                self.head.row_lengths.get_or_init(|| lengths)
            }
        };
        let a = at.params.view_as(update.a, at.pass.dtype);
        let mut cross = (at.pass).take_fixed(DType::F32, update.rank, table.rows());
        matmul::nt(cross.view_mut(), 0.0, 1.0, a, table)?;
        attached::row_norms(at.pass, at.params, update, cross, lengths.view())
    }

    /// Adds the gradient of m to `grads`, and turns that of B times f into that of B.
    fn magnitude_gradients(
        &self,
        at: &At<'_>,
        grads: &mut FlatBuffer,
        (update, magnitude): (&LowRank, Magnitude),
        norms: View<'_>,
        d: &mut MadeGradients,
    ) -> Result<()> {
        let (Some(d_weight), Some(d_b)) = (&d.weight, &mut d.b) else {
            return Ok(());
        };
        let table = self.head_table().whole(at.params, at.pass.dtype);
        let vocabulary = table.rows();
        let mut sums = at.pass.take_fixed(DType::F32, vocabulary, 1);
        sums.view_mut().fill(0.0);
        hadamard::add_row_sums(sums.view_mut(), 1.0, d_weight.view(), table)?;
        let b = at.params.view_as(update.b, at.pass.dtype);
        let d_rank = d_b.view().columns(0..update.rank);
        hadamard::add_row_sums(sums.view_mut(), 1.0, d_rank, b)?;
        let ones = ones(at, vocabulary);
        // Of ones it makes the factors.
        let mut factors = at.pass.take_fixed(DType::F32, 1, vocabulary);
        dora::backward(
            ones.view(),
            sums.view().reshaped(1, vocabulary),
            at.params.view(magnitude.id()),
            norms,
            grads.view_mut(magnitude.id()),
            factors.view_mut(),
        )?;
        let of_rows = factors.view().reshaped(vocabulary, 1);
        hadamard::scale(d_b.view_mut(), 0.0, of_rows)?;
        at.pass.give_fixed([sums, ones, factors]);
        Ok(())
    }

    /// B with its bias as one more column, its rows where the table has their tokens, `[V, width]` and room up to
    /// whole 16 bytes; `None` where that is B. DoRA's is a copy too, to be scaled.
    fn copy_of_b(&self, at: &At<'_>, update: &LowRank) -> Result<Option<Tensor>> {
        let moved = self.head.moved.as_ref();
        if update.bias.is_none() && update.magnitude.is_none() && moved.is_none() {
            return Ok(None);
        }
        let b = at.params.view_as(update.b, at.pass.dtype);
        let cols = Workspace::aligned(b.dtype(), width(update));
        let mut copy = at.pass.take_fixed(b.dtype(), b.rows(), cols);
        let bias = update.bias.map(|id| {
            let values = at.params.view_as(id, at.pass.dtype);
            (values.reshaped(b.rows(), 1), update.rank..width(update))
        });
        for (values, columns) in std::iter::once((b, 0..update.rank)).chain(bias) {
            let to = copy.view_mut().columns(columns);
            match moved {
                Some(moved) => embedding::forward(values, &moved.tokens, to)?,
                None => to.copy_from(values),
            }
        }
        Ok(Some(copy))
    }

    /// Adds the gradient of [`Model::copy_of_b`] to those of B and its bias.
    fn add_copy(
        &self,
        at: &At<'_>,
        grads: &mut FlatBuffer,
        update: &LowRank,
        mut d_copy: Tensor,
    ) -> Result<()> {
        if let Some(moved) = &self.head.moved {
            let [rows, cols] = [d_copy.rows(), d_copy.cols()];
            let mut placed = at.pass.take_fixed(DType::F32, rows, cols);
            embedding::forward(d_copy.view(), &moved.places, placed.view_mut())?;
            std::mem::swap(&mut d_copy, &mut placed);
            at.pass.give_fixed([placed]);
        }
        let d_b = d_copy.view().columns(0..update.rank);
        axpby::add(1.0, grads.view_mut(update.b), 1.0, d_b)?;
        if let Some(bias) = update.bias {
            let d_bias = d_copy.view().columns(update.rank..width(update));
            let to = grads.view_mut(bias).reshaped(d_copy.rows(), 1);
            axpby::add(1.0, to, 1.0, d_bias)?;
        }
        at.pass.give_fixed([d_copy]);
        Ok(())
    }
}

/// Columns of B that hold values: the rank, and one more with a bias.
fn width(update: &LowRank) -> usize {
    update.rank + usize::from(update.bias.is_some())
}

/// `dropout(hidden) A^T`, `[T, width]` and room up to whole 16 bytes; one in columns behind the rank, for a bias.
fn down(
    at: &At<'_>,
    factors: &lora_linear::LowRank<'_>,
    width: usize,
    hidden: View<'_>,
) -> Result<Tensor> {
    let (dtype, rank) = (factors.a.dtype(), factors.a.rows());
    let workspace = at.pass.workspace;
    let mut s = workspace.take(dtype, hidden.rows(), Workspace::aligned(dtype, width));
    if width > rank {
        s.view_mut().fill(1.0);
    }
    lora_linear::down(hidden, factors, s.view_mut().columns(0..rank), workspace)?;
    Ok(s)
}

fn of_parameters<'a>(at: &At<'a>, update: &LowRank) -> lora_linear::LowRank<'a> {
    lora_linear::LowRank {
        a: at.params.view_as(update.a, at.pass.dtype),
        b: at.params.view_as(update.b, at.pass.dtype),
        scale: update.scale,
        dropout: at.mask,
        silent: None,
    }
}

/// f, `[V, 1]` f32.
fn row_factors(at: &At<'_>, magnitude: Magnitude, norms: View<'_>) -> Result<Tensor> {
    let mut factors = ones(at, norms.cols());
    let values = at.params.view(magnitude.id());
    dora::scale(factors.view_mut(), values, norms)?;
    Ok(Tensor::from_buffer(factors.into_buffer(), norms.cols(), 1))
}

/// `[1, count]` f32.
fn ones(at: &At<'_>, count: usize) -> Tensor {
    let mut ones = at.pass.take_fixed(DType::F32, 1, count);
    ones.view_mut().fill(1.0);
    ones
}
