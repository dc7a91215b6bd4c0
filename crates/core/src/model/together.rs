//! Several adapters over one base in one pass: each has its own documents, parameters, gradients and draws, and
//! the products with the frozen weights are of all rows at once.
//!
//! The documents of one adapter are rows of their own, so what stands at a linear is computed for these rows
//! alone, and each adapter's numbers are those of a pass without the others.

use super::inputs::{Inputs, Marks};
use super::norm::Normed;
use super::run::{Member, Mode, Pass, Run};
use super::saved::Stream;
use super::weight_source::WeightSource;
use super::{Model, ModelPlan, Saved, WeightFormat, on_worker, weights};
use crate::adapter::{Attachment, SiteId};
use crate::data::PackedBatch;
use crate::model::DecoderConfig;
use crate::params::{FlatBuffer, ParamLayoutBuilder};
use crate::{Error, Result};
use ferrotune_kernels::linear_cross_entropy::Accumulator;
use ferrotune_kernels::{DType, Device, Workspace};
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::BTreeMap;

/// What one adapter brings to a pass with others, and takes from it.
#[derive(Debug)]
pub struct MemberPass<'a> {
    /// Which adapter of the model.
    pub number: usize,
    /// Its micro-batch.
    pub batch: &'a PackedBatch,
    /// Its trained values.
    pub params: &'a FlatBuffer,
    /// Where its gradient is added to.
    pub grads: &'a mut FlatBuffer,
    /// Where its losses are.
    pub sums: &'a mut Accumulator,
    /// Its random draws.
    pub mode: Mode,
    /// Pool of its own buffers and tables.
    pub workspace: &'a Workspace,
}

impl Model {
    /// [`Model::load`] for several adapters, numbered from 0, each with what it attaches.
    ///
    /// # Errors
    /// As there; [`Error::Config`] for an attachment that others cannot stand beside: anything but an update of
    /// a linear inside the layers.
    pub fn load_together(
        config: &DecoderConfig,
        adapters: Vec<Vec<(SiteId, Attachment)>>,
        source: &dyn WeightSource,
        device: &Device,
        format: impl Into<WeightFormat>,
    ) -> Result<Self> {
        let plan = ModelPlan::new(config);
        let inside: Vec<SiteId> = (plan.layers.iter())
            .flat_map(|layer| {
                let rest = [layer.o, layer.down];
                [&layer.qkv[..], &layer.gate_up[..], &rest].concat()
            })
            .collect();
        for (site, attachment) in adapters.iter().flatten() {
            require_apart(&plan, *site, attachment, &inside)?;
        }
        let mut params = nothing(device)?;
        let model = weights::Builder {
            config,
            plan: &plan,
            attachments: BTreeMap::new(),
            members: (adapters.into_iter())
                .map(|attachments| attachments.into_iter().collect())
                .collect(),
            trained_biases: BTreeMap::new(),
            prompt: None,
            invocation: None,
            source,
            params: &mut params,
            format: format.into(),
            held: weights::Held::default(),
        };
        model.model()
    }

    /// [`Model::loss_and_gradients`] of several adapters in one pass; `workspace` is that of all their rows.
    ///
    /// # Errors
    /// If a token id lies outside the vocabulary.
    pub fn loss_and_gradients_together(
        &self,
        workspace: &Workspace,
        dtype: DType,
        members: Vec<MemberPass<'_>>,
    ) -> Result<()> {
        on_worker(|| self.together(workspace, dtype, members, true))
    }

    /// Adds the losses of one adapter's documents to its sums, nothing kept.
    ///
    /// # Errors
    /// If a token id lies outside the vocabulary.
    pub fn loss_of_member(
        &self,
        workspace: &Workspace,
        dtype: DType,
        member: MemberPass<'_>,
    ) -> Result<()> {
        self.together(workspace, dtype, vec![member], false)
    }

    fn together(
        &self,
        workspace: &Workspace,
        dtype: DType,
        members: Vec<MemberPass<'_>>,
        backward: bool,
    ) -> Result<()> {
        let joined = PackedBatch::joined(members.iter().map(|member| member.batch));
        let of = |workspace, mode| Pass {
            workspace,
            dtype,
            mode,
        };
        let pass = of(workspace, Mode::Eval);
        let inputs = Inputs::of(self, pass, &Cow::Owned(joined), Marks::default(), false);
        let passes: Vec<Pass<'_>> = (members.iter())
            .map(|member| of(member.workspace, member.mode))
            .collect();
        let own: Vec<Inputs<'_>> = (members.iter().zip(&passes))
            .map(|(m, &pass)| {
                Inputs::of(self, pass, &Cow::Borrowed(m.batch), Marks::default(), false)
            })
            .collect();
        let nothing = nothing(&self.device)?;
        let mut run = Run::new(&nothing, pass, &inputs)?;
        let mut sums = Vec::with_capacity(members.len());
        let mut first = 0;
        for ((member, &pass), inputs) in members.into_iter().zip(&passes).zip(&own) {
            let rows = first..first + inputs.rows;
            first = rows.end;
            sums.push(member.sums);
            run.members.push(Member {
                number: member.number,
                rows,
                run: Run::new(member.params, pass, inputs)?,
                grads: RefCell::new(member.grads),
            });
        }
        if backward {
            self.backward_together(&run, sums)?;
        } else {
            self.loss_together(&run, sums)?;
        }
        run.end();
        Ok(())
    }

    fn backward_together(&self, run: &Run<'_>, sums: Vec<&mut Accumulator>) -> Result<()> {
        let mut layers = Vec::with_capacity(self.layers.len());
        let (x, Normed { y, statistics }) = self.decoder(run, Some(&mut layers), None)?;
        let stream = Stream { x, statistics };
        let hidden = Normed::read(&y, &stream.x);
        let mut d_hidden = run.workspace.take(run.dtype, hidden.rows(), hidden.cols());
        for (member, sums) in run.members.iter().zip(sums) {
            let (rows, grads) = (|| member.rows.clone(), &mut member.grads.borrow_mut());
            let own = self.head_backward(&member.run, grads, hidden.row_range(rows()), sums)?;
            d_hidden.view_mut().row_range(rows()).copy_from(own.view());
            member.run.give([own]);
        }
        run.give(y);
        let saved = Saved { layers, stream };
        let mut nothing = nothing(&self.device)?;
        self.backward(run, &mut nothing, saved, d_hidden, &mut |_, _| Ok(()))
    }

    fn loss_together(&self, run: &Run<'_>, sums: Vec<&mut Accumulator>) -> Result<()> {
        let (stream, Normed { y, statistics }) = self.decoder(run, None, None)?;
        let hidden = Normed::read(&y, &stream);
        for (member, sums) in run.members.iter().zip(sums) {
            self.head_loss(&member.run, hidden.row_range(member.rows.clone()), sums)?;
        }
        run.give(y.into_iter().chain(statistics).chain([stream]));
        Ok(())
    }
}

/// Refuses what changes more than the rows of its own adapter.
fn require_apart(
    plan: &ModelPlan,
    site: SiteId,
    attachment: &Attachment,
    inside: &[SiteId],
) -> Result<()> {
    use Attachment::{Custom, Factors, LowRank};
    if matches!(attachment, LowRank(_) | Factors(_) | Custom(_)) && inside.contains(&site) {
        return Ok(());
    }
    let what = match attachment {
        Attachment::Weight(_) => "a method that makes another weight of the base's",
        Attachment::Prompt(_) => "a prompt",
        Attachment::Invocation(_) => "a LoRA that tokens call up",
        _ if inside.contains(&site) => "a part of the base that is trained itself",
        _ => "what is trained of the embedding, the head or a norm",
    };
    let message = format!(
        "{what}, as of `{}`, cannot stand beside other adapters in one run yet; target linears inside the layers with \
         LoRA, or train it in a run of its own",
        plan.site(site).name
    );
    Err(Error::config("adapters", message))
}

/// The parameters of a base that is frozen throughout.
fn nothing(device: &Device) -> Result<FlatBuffer> {
    let layout = ParamLayoutBuilder::new().build()?;
    Ok(FlatBuffer::zeros_on(&layout, device))
}
