//! Several adapters over one base in one pass: each has its own documents, parameters, gradients and draws, and
//! the products with the frozen weights are of all rows at once.
//!
//! The documents of one adapter are rows of their own, so what stands at a linear is computed for these rows
//! alone, and each adapter's numbers are those of a pass without the others.

use super::inputs::{Inputs, Marks};
use super::layer::Layer;
use super::linear::Part;
use super::norm::Normed;
use super::run::{Mode, Pass, Run};
use super::saved::Stream;
use super::weight_source::WeightSource;
use super::{Model, ModelPlan, Saved, WeightFormat, on_worker};
use crate::adapter::{Attachment, SiteId};
use crate::data::PackedBatch;
use crate::model::DecoderConfig;
use crate::params::FlatBuffer;
use crate::{Error, Result};
use ferrotune_kernels::linear_cross_entropy::Accumulator;
use ferrotune_kernels::{DType, Device, Workspace};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

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
    /// As there; as [`Model::add_adapter`], before any weight is read.
    pub fn load_together(
        config: &DecoderConfig,
        adapters: Vec<Vec<(SiteId, Attachment)>>,
        source: &dyn WeightSource,
        device: &Device,
        format: impl Into<WeightFormat>,
    ) -> Result<Self> {
        for attachments in &adapters {
            require_apart(config, attachments)?;
        }
        let mut model = Self::load(
            config,
            Vec::new(),
            source,
            &mut FlatBuffer::empty_on(device),
            format,
        )?;
        for attachments in adapters {
            model.add_adapter(attachments)?;
        }
        Ok(model)
    }

    /// Puts one more adapter beside those of [`Model::load_together`], and returns its number. No weight is touched.
    ///
    /// # Errors
    /// [`Error::Config`] for an attachment that others cannot stand beside: anything but an update of a linear inside
    /// the layers.
    pub fn add_adapter(&mut self, attachments: Vec<(SiteId, Attachment)>) -> Result<usize> {
        let number = self.parts_mut().next().map_or(0, |part| part.members.len());
        self.replace_adapter(number, attachments)?;
        Ok(number)
    }

    /// Puts an adapter in the place of that of this `number`; without attachments the base alone is left there.
    ///
    /// # Errors
    /// As [`Model::add_adapter`], the one that was there being left.
    pub fn replace_adapter(
        &mut self,
        number: usize,
        attachments: Vec<(SiteId, Attachment)>,
    ) -> Result<()> {
        require_apart(&self.config, &attachments)?;
        let mut attachments: BTreeMap<SiteId, Attachment> = attachments.into_iter().collect();
        for part in self.parts_mut() {
            let places = part.members.len().max(number + 1);
            part.members.resize_with(places, || None);
            part.members[number] = attachments.remove(&SiteId(part.site));
        }
        Ok(())
    }

    /// The linears of the layers.
    fn parts_mut(&mut self) -> impl Iterator<Item = &mut Part> {
        let groups = self.layers.iter_mut().flat_map(Layer::groups_mut);
        groups.flat_map(|group| &mut group.parts)
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
        let nothing = FlatBuffer::empty_on(&self.device);
        let mut run = Run::new(&nothing, pass, &inputs)?;
        let mut sums = Vec::with_capacity(members.len());
        for ((member, &pass), inputs) in members.into_iter().zip(&passes).zip(&own) {
            sums.push(member.sums);
            let own = Run::new(member.params, pass, inputs)?;
            run.join(Some(member.number), own, member.grads);
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
        let mut nothing = FlatBuffer::empty_on(&self.device);
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
fn require_apart(config: &DecoderConfig, attachments: &[(SiteId, Attachment)]) -> Result<()> {
    use Attachment::{Custom, Factors, LowRank};
    let plan = ModelPlan::new(config);
    let inside: BTreeSet<SiteId> = (plan.layers.iter())
        .flat_map(|layer| layer.groups().into_iter().flatten().copied())
        .collect();
    let apart = |(site, attachment): &&(SiteId, Attachment)| {
        let own = matches!(attachment, LowRank(_) | Factors(_) | Custom(_));
        !own || !inside.contains(site)
    };
    let Some((site, attachment)) = attachments.iter().find(apart) else {
        return Ok(());
    };
    let what = match attachment {
        Attachment::Weight(_) => "a method that makes another weight of the base's",
        Attachment::Prompt(_) => "a prompt",
        Attachment::Invocation(_) => "a LoRA that tokens call up",
        _ if inside.contains(site) => "a part of the base that is trained itself",
        _ => "what is trained of the embedding, the head or a norm",
    };
    let message = format!(
        "{what}, as of `{}`, cannot stand beside other adapters in one run yet; target linears inside the layers with \
         LoRA, or give it a run of its own",
        plan.site(*site).name
    );
    Err(Error::config("adapters", message))
}
