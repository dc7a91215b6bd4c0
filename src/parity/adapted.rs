//! A base with or without an adapter, forward and backward, beside what was recorded of it.

use super::arch::{
    BF16_FACTOR, FORWARD, GRADIENT, judged_rows, largest_gradient, mean_gradient, select,
};
use super::case::scalar;
use super::compare::{Comparison, relative_error};
use super::padded::PaddedBatch;
use ferrotune_core::adapter::{Adapter, Attachment, SiteId};
use ferrotune_core::data::PackedBatch;
use ferrotune_core::io::{ModelFiles, SafetensorsFile};
use ferrotune_core::model::{
    DecoderConfig, LoadedBase, Mode, Model, ModelPlan, Pass, WeightSource,
};
use ferrotune_core::params::FlatBuffer;
use ferrotune_core::trainer::attach;
use ferrotune_core::{Error, Result};
use ferrotune_kernels::{DType, Device, Workspace};
use ferrotune_lora::{AdapterBase, PeftConfig};
use std::borrow::Cow;
use std::path::Path;

/// Largest error that PyTorch's own bf16 forward of such a tiny model is taken to have (0.016 was
/// seen); a recorded bf16 result further than this from our f32 is not rounding. A wrong scale, mask
/// or rotation shows as 0.3 and more.
const BF16_FORWARD: f64 = 0.05;
/// The same for gradients (0.038 was seen).
const BF16_GRADIENT: f64 = 0.12;

/// What stands at which site.
pub(super) type Attachments = Vec<(SiteId, Attachment)>;

/// A base model, with an adapter read from disk if there is one.
pub(super) struct Adapted {
    pub(super) model: Model,
    pub(super) params: FlatBuffer,
    method: Option<Box<dyn Adapter>>,
}

/// What one forward and backward gave.
pub(super) struct Recomputed {
    logits: Vec<f32>,
    loss: f64,
    grads: FlatBuffer,
}

impl Recomputed {
    pub(super) fn logits(&self) -> &[f32] {
        &self.logits
    }

    pub(super) fn loss(&self) -> f64 {
        self.loss
    }

    pub(super) fn grads(&self) -> &FlatBuffer {
        &self.grads
    }
}

impl Adapted {
    pub(super) fn load(
        base: &Path,
        adapter: Option<&Path>,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        Self::load_with(base, adapter, dtype, device, Ok)
    }

    /// [`Adapted::load`] with `change` made to what stands at the sites.
    pub(super) fn load_with(
        base: &Path,
        adapter: Option<&Path>,
        dtype: DType,
        device: &Device,
        change: impl FnOnce(Attachments) -> Result<Attachments>,
    ) -> Result<Self> {
        let Some(directory) = adapter else {
            let config = DecoderConfig::open(base)?;
            let files = ModelFiles::open(base)?;
            let mut params = FlatBuffer::empty_on(device);
            let attachments = change(Vec::new())?;
            let model = Model::load(&config, attachments, &files, &mut params, dtype)?;
            let method = None;
            return Ok(Self {
                model,
                params,
                method,
            });
        };
        let config = DecoderConfig::open(base)?;
        let method = ferrotune_lora::load_as_peft(directory, &config)?;
        let adapted = Self::with(
            base,
            method.as_ref(),
            Some(directory),
            dtype,
            device,
            change,
        )?;
        Ok(Self {
            method: Some(method),
            ..adapted
        })
    }

    /// A base with `method`, at its start or as it is in `directory`.
    pub(super) fn with(
        base: &Path,
        method: &dyn Adapter,
        directory: Option<&Path>,
        dtype: DType,
        device: &Device,
        change: impl FnOnce(Attachments) -> Result<Attachments>,
    ) -> Result<Self> {
        let config = DecoderConfig::open(base)?;
        let files = ModelFiles::open(base)?;
        let config = method.decoder(config)?;
        let (attachments, mut params) = attach(&config, method)?;
        params.move_to(device);
        let attachments = change(attachments)?;
        let sites = ModelPlan::new(&config).sites;
        let own = directory.map(|at| AdapterBase::new(&files, at, &sites, params.layout()));
        let own = own.transpose()?;
        let source: &dyn WeightSource = own.as_ref().map_or(&files, |own| own);
        let mut model = Model::load(&config, attachments, source, &mut params, dtype)?;
        let mut loaded = LoadedBase {
            model: &mut model,
            source,
        };
        method.prepare(&mut params, &mut loaded)?;
        if let Some(directory) = directory {
            method.load(&mut params, directory)?;
        }
        let method = None;
        Ok(Self {
            model,
            params,
            method,
        })
    }

    pub(super) fn run(&self, dtype: DType, batch: &PackedBatch) -> Result<Recomputed> {
        let workspace = Workspace::on(self.model.device().clone(), batch.rows());
        let pass = Pass {
            workspace: &workspace,
            dtype,
            mode: Mode::Eval,
        };
        let logits = self.model.logits(pass, &self.params, batch)?;
        let logits = judged_rows(&self.model, &logits, batch);
        let (mut loss, mut grads) = mean_gradient(&self.model, pass, &self.params, batch)?;
        if let Some(method) = &self.method
            && method.completes_gradients()
        {
            let penalty = method.complete_gradients(&self.params, 1.0, &mut grads)?;
            loss += penalty.value()?;
        }
        Ok(Recomputed {
            logits,
            loss,
            grads,
        })
    }
}

/// A gradient and its recorded twin: `(name, ours, theirs)`.
type GradientPair<'a> = (String, Cow<'a, [f32]>, Vec<f32>);

/// What was recorded of one run: `logits`, `loss` and `grad.*` behind a prefix, at the places that are
/// not padding.
#[derive(Clone, Copy)]
pub(super) struct Recorded<'a> {
    pub(super) file: &'a SafetensorsFile,
    pub(super) prefix: &'a str,
    pub(super) padded: &'a PaddedBatch,
    pub(super) places: &'a [usize],
}

impl Recorded<'_> {
    pub(super) fn compare_f32(&self, c: &mut Comparison, ours: &Recomputed) -> Result<()> {
        let name = |quantity| self.name(quantity);
        let (logits, loss) = (self.logits()?, self.loss()?);
        c.tensor(&name("logits"), "logits", &ours.logits, &logits, FORWARD);
        c.number(&name("loss"), "loss", ours.loss, loss, FORWARD);
        let largest = largest_gradient(self.file, &name("grad."))?;
        for (parameter, ours, theirs) in self.gradients(&ours.grads)? {
            let pair = (&*ours, &*theirs);
            c.gradient(&name("grad"), &parameter, pair, largest, GRADIENT);
        }
        Ok(())
    }

    /// PyTorch recorded bf16 only: our f32 run stands for the exact result, and our bf16 run may be at
    /// most twice as far from it as PyTorch's. That PyTorch's is near it bounds our f32 run itself.
    pub(super) fn compare_bf16(
        &self,
        c: &mut Comparison,
        ours: &Recomputed,
        reference: &Recomputed,
    ) -> Result<()> {
        let mut judge =
            |quantity: &str, name: &str, ours: &[f32], exact: &[f32], theirs: &[f32], bound| {
                let quantity = self.name(quantity);
                let theirs_error = relative_error(theirs, exact);
                c.error(
                    &format!("{quantity} (recorded against f32)"),
                    name,
                    theirs_error,
                    bound,
                );
                let ours_error = relative_error(ours, exact);
                c.beside_peer(&quantity, name, ours_error, theirs_error, BF16_FACTOR);
            };
        judge(
            "logits",
            "logits",
            &ours.logits,
            &reference.logits,
            &self.logits()?,
            BF16_FORWARD,
        );
        judge(
            "loss",
            "loss",
            &[ours.loss as f32],
            &[reference.loss as f32],
            &[self.loss()? as f32],
            BF16_FORWARD,
        );
        let exact = self.gradients(&reference.grads)?;
        for ((name, ours, theirs), (_, exact, _)) in
            self.gradients(&ours.grads)?.into_iter().zip(exact)
        {
            judge("grad", &name, &ours, &exact, &theirs, BF16_GRADIENT);
        }
        Ok(())
    }

    /// The logits of another run beside the recorded ones.
    pub(super) fn compare_logits(
        &self,
        c: &mut Comparison,
        quantity: &str,
        ours: &Recomputed,
    ) -> Result<()> {
        c.tensor(quantity, "logits", &ours.logits, &self.logits()?, FORWARD);
        Ok(())
    }

    /// How far the logits of a run are from the recorded ones.
    pub(super) fn logits_error(&self, ours: &Recomputed) -> Result<f64> {
        Ok(relative_error(&ours.logits, &self.logits()?))
    }

    fn name(&self, quantity: &str) -> String {
        format!("{}{quantity}", self.prefix)
    }

    fn logits(&self) -> Result<Vec<f32>> {
        select(self.file, &self.name("logits"), self.padded, self.places)
    }

    fn loss(&self) -> Result<f64> {
        scalar(self.file, &self.name("loss"))
    }

    /// The recorded gradients with ours.
    fn gradients<'a>(&self, grads: &'a FlatBuffer) -> Result<Vec<GradientPair<'a>>> {
        let prefix = self.name("grad.");
        let layout = grads.layout();
        let names = self.file.names().filter_map(|n| n.strip_prefix(&prefix));
        let (own, twins): (Vec<&str>, Vec<&str>) =
            names.partition(|name| layout.find(name).is_some() || twin(name).is_none());
        let pairs: Result<Vec<GradientPair<'_>>> = own
            .into_iter()
            .map(|name| {
                let id = grads.layout().find(name).ok_or_else(|| {
                    let message = format!("`{prefix}{name}` names no trainable parameter");
                    Error::data(self.file.path(), None, message)
                })?;
                let mut theirs = self.file.read_f32(&format!("{prefix}{name}"))?;
                let ours = grads.file_values(id);
                if theirs.len() > ours.len() {
                    theirs = self.counting_rows(name, &theirs)?;
                }
                Ok((name.to_owned(), ours, theirs))
            })
            .collect();
        let mut pairs = pairs?;
        for name in twins {
            let shared =
                |pair: &&mut GradientPair<'_>| twin(name).is_some_and(|t| pair.0.ends_with(t));
            let file = format!("{prefix}{name}");
            let shape = self.file.meta(&file).map(|meta| meta.shape.clone());
            if let (Some(pair), Some([rows, cols])) =
                (pairs.iter_mut().find(shared), shape.as_deref())
            {
                let part = self.file.read_f32(&file)?;
                for (i, sum) in pair.2.iter_mut().enumerate() {
                    *sum += part[i % rows * cols + i / rows];
                }
            }
        }
        Ok(pairs)
    }
}

impl Recorded<'_> {
    /// Of the gradient of rows, of which PEFT has one for each time that a token is named, those that count.
    fn counting_rows(&self, name: &str, theirs: &[f32]) -> Result<Vec<f32>> {
        let adapter = PeftConfig::load(&self.file.path().with_file_name("adapter"))?;
        let shape = self.file.meta(&self.name(&format!("grad.{name}")));
        let width = shape.and_then(|meta| meta.shape.last().copied());
        Ok(match (adapter.counting_rows(name), width) {
            (Some(rows), Some(width)) => {
                let rows = rows.into_iter();
                let rows = rows.filter_map(|at| theirs.get(at * width..(at + 1) * width));
                rows.flatten().copied().collect()
            }
            _ => theirs.to_vec(),
        })
    }
}

/// The end of the name of the embedding's factor that a head's factor is the transpose of, where the two are
/// tied: PEFT has a gradient for each of them, and here it is one.
fn twin(name: &str) -> Option<&'static str> {
    if name.ends_with(".lm_head.lora_A.weight") {
        Some(".lora_embedding_B")
    } else if name.ends_with(".lm_head.lora_B.weight") {
        Some(".lora_embedding_A")
    } else {
        None
    }
}
