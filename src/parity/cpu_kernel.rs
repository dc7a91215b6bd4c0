//! Products of 4-bit weights as bitsandbytes makes them on a CPU with AVX512-BF16 where no gradient of
//! the input is asked for: input, codes, scales and output are rounded to bf16, the sum is not.
//!
//! Under an adapter that is so for the linears up to the first that is trained and those beside it,
//! whatever the compute dtype. What was recorded of them holds that rounding, which no engine should
//! copy: it is made here for the comparison alone.
//!
//! # Source
//! `Linear4bit.forward` and `gemv_4bit` of bitsandbytes 0.50, and the recorded numbers.

use ferrotune_core::adapter::{Attachment, CustomLinear, LowRank, SiteId};
use ferrotune_core::io::ModelFiles;
use ferrotune_core::model::{LayerPlan, ModelPlan};
use ferrotune_core::params::FlatBuffer;
use ferrotune_core::{Error, Result};
use ferrotune_kernels::{DType, Device, Tensor, View, ViewMut, Workspace, lora_linear, matmul};
use half::bf16;
use std::collections::BTreeMap;

/// `attachments`, with the products of that kernel where it ran.
pub(super) fn in_front(
    plan: &ModelPlan,
    files: &ModelFiles,
    device: &Device,
    attachments: Vec<(SiteId, Attachment)>,
) -> Result<Vec<(SiteId, Attachment)>> {
    let mut attachments: BTreeMap<SiteId, Attachment> = attachments.into_iter().collect();
    let Some(&first) = attachments.keys().next() else {
        return Ok(Vec::new());
    };
    for id in without_gradient(plan, first) {
        let (site, attached) = (plan.site(id), attachments.remove(&id));
        let name = format!("{}.weight", site.name);
        let (update, codes, format) = match (attached, files.read_quantised(&name)?) {
            (None, Some(codes)) => (None, codes, files.four_bit_format(&name)),
            (Some(Attachment::LowRank(update)), Some(codes)) => {
                (Some(update), codes, files.four_bit_format(&name))
            }
            _ => return Err(Error::model(files.file_of(&name), "is no case of QLoRA")),
        };
        let [rows, cols] = codes.shape();
        let mut values = Tensor::zeros(DType::F32, rows, cols);
        codes.dequantise(values.view_mut())?;
        let block = format.map_or(rows * cols, |format| format.block);
        let values = with_rounded_parts(&values.to_f32_vec(), block);
        let kernel = CpuKernel {
            weight: Tensor::from_f32(values, rows, cols).to_device(device),
            update,
            workspace: Workspace::on(device.clone(), 0),
        };
        attachments.insert(id, Attachment::Custom(Box::new(kernel)));
    }
    Ok(attachments.into_iter().collect())
}

/// The linears before the output of `first` comes in.
fn without_gradient(plan: &ModelPlan, first: SiteId) -> Vec<SiteId> {
    let mut before = Vec::new();
    for group in plan.layers.iter().flat_map(LayerPlan::groups) {
        let last = group.contains(&first);
        before.extend(group);
        if last {
            break;
        }
    }
    before
}

/// Code and scale of each value rounded to bf16, their product not. The largest value of a block is its
/// scale, since both formats have codes of 1 and -1.
fn with_rounded_parts(values: &[f32], block: usize) -> Vec<f32> {
    let round = |value: f32| bf16::from_f32(value).to_f32();
    let rounded = values.chunks(block).flat_map(|values| {
        let scale = values.iter().fold(0.0_f32, |most, v| most.max(v.abs()));
        let of = move |value: &f32| match scale {
            0.0 => 0.0,
            scale => round(value / scale) * round(scale),
        };
        values.iter().map(of)
    });
    rounded.collect()
}

#[derive(Debug)]
struct CpuKernel {
    /// `[out, in]`.
    weight: Tensor,
    update: Option<LowRank>,
    workspace: Workspace,
}

impl CpuKernel {
    fn low_rank<'a>(update: &LowRank, params: &'a FlatBuffer) -> lora_linear::LowRank<'a> {
        lora_linear::LowRank {
            a: params.view_as(update.a, DType::F32),
            b: params.view_as(update.b, DType::F32),
            scale: update.scale,
            dropout: None,
            silent: None,
        }
    }
}

impl CustomLinear for CpuKernel {
    fn forward(&self, params: &FlatBuffer, x: View<'_>, mut y: ViewMut<'_>) -> Result<Vec<Tensor>> {
        let tensor = |dtype, cols| Tensor::empty(self.workspace.device(), dtype, x.rows(), cols);
        let mut rounded = tensor(DType::Bf16, x.cols());
        rounded.view_mut().copy_from(x);
        let input = rounded.to_dtype(DType::F32);
        let mut product = tensor(DType::F32, y.cols());
        let weight = self.weight.view();
        matmul::nt(product.view_mut(), 0.0, 1.0, input.view(), weight)?;
        y.reborrow().copy_from(product.to_dtype(DType::Bf16).view());
        let Some(update) = &self.update else {
            return Ok(Vec::new());
        };
        let low_rank = Self::low_rank(update, params);
        let mut s = tensor(DType::F32, update.rank);
        lora_linear::forward(x, &low_rank, y, s.view_mut(), &self.workspace)?;
        Ok(vec![s])
    }

    fn backward(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        x: View<'_>,
        saved: &[Tensor],
        dy: ViewMut<'_>,
        dx: Option<ViewMut<'_>>,
    ) -> Result<()> {
        let (Some(update), [s]) = (&self.update, saved) else {
            return Ok(());
        };
        let low_rank = Self::low_rank(update, params);
        let [d_a, d_b] = grads.view_two_mut(update.a, update.b);
        let (dy, workspace) = (dy.as_view(), &self.workspace);
        lora_linear::backward(x, &low_rank, s.view(), dy, dx, d_a, d_b, workspace)?;
        Ok(())
    }
}
