//! The least time that a run takes: the products that it cannot do without, at the rate of the largest of them, which
//! is timed on the run's device before a weight is read.

use super::adapter::{self, Attached};
use super::base_weights::activation_dtype;
use super::{Recipe, memory};
use ferrotune_core::Result;
use ferrotune_core::adapter::{Attachment, Site, SiteId, SiteKind};
use ferrotune_core::model::ModelPlan;
use ferrotune_kernels::{DType, Device, Tensor, matmul, rng};
use std::time::{Duration, Instant};

/// Rows of the product that is timed, at most, and its FLOPs: enough to keep a CPU's cores busy, and a GPU.
const MOST_ROWS: [usize; 2] = [256, 8192];
const MOST_FLOPS: [usize; 2] = [2 << 30, 1 << 40];

/// It is repeated so often, and for so long; the best counts.
const LEAST_REPEATS: usize = 3;
const TIMED: Duration = Duration::from_millis(100);

/// What bounds the time of a run from below.
#[derive(Clone, Debug)]
pub struct LeastTime {
    flops: f64,
    rate: f64,
    product: String,
}

impl LeastTime {
    /// Times a product of the run's shapes and dtypes on its device, in a few tenths of a second.
    ///
    /// # Errors
    /// [`ferrotune_core::Error::Config`] if the adapter's settings contradict each other; the first failure of a GPU.
    pub fn measure(recipe: &Recipe) -> Result<Self> {
        let attached = adapter::attach(&recipe.config, &recipe.base, &recipe.decoder)?;
        let sizes = timed_sizes(recipe);
        let weights = recipe.weights.dtype;
        let activations = activation_dtype(&recipe.config, weights, &recipe.device);
        let [rows, out, input] = sizes;
        Ok(Self {
            flops: product_flops(recipe, &attached) / recipe.place.world_size.max(1) as f64,
            rate: rate(&recipe.device, [activations, weights], sizes)?,
            product: format!("{rows} x {input} x {out} in {weights}"),
        })
    }

    /// Seconds of all steps of the run, at least.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        self.flops / self.rate
    }

    /// FLOPs of a rank's products with weights of the base, over all steps.
    #[must_use]
    pub fn flops(&self) -> f64 {
        self.flops
    }

    /// FLOPs per second that were measured.
    #[must_use]
    pub fn rate(&self) -> f64 {
        self.rate
    }

    /// What was timed: its sizes and the dtype of the weight.
    #[must_use]
    pub fn product(&self) -> &str {
        &self.product
    }
}

/// FLOPs of the products with weights of the base that no way of training leaves out, over all steps and ranks: 2 per
/// weight and token forward, as many for the gradient of the input in each layer above the first that trains anything,
/// and as many for the gradient of a weight that is trained; in the head for trained tokens alone.
///
/// Attention, the adapter's own products and what is computed again come on top, as do evaluations. LLM.int8's forward
/// has another product and is left out.
fn product_flops(recipe: &Recipe, attached: &Attached) -> f64 {
    let plan = ModelPlan::new(&recipe.decoder);
    let of_layers = |site: &&Site| site.kind == SiteKind::Linear && site.layer.is_some();
    let weights = |site: &Site| (site.in_features * site.out_features) as f64;
    let lowest = lowest_trained(&plan, attached);
    let is_int8 = memory::Base::of(recipe).held_as(&recipe.weights) == Some("int8");
    let is_trained = |site: &Site| {
        let at = |(id, a): &(SiteId, Attachment)| {
            *id == site.id && matches!(a, Attachment::TrainBase { .. })
        };
        attached.attachments.iter().any(at)
    };
    let per_weight = |site: &Site| {
        let passes = [!is_int8, site.layer >= lowest, is_trained(site)];
        2.0 * passes.iter().filter(|pass| **pass).count() as f64
    };
    let linears = plan.sites.iter().filter(of_layers);
    let per_token: f64 = linears.map(|site| weights(site) * per_weight(site)).sum();
    let report = &recipe.dataset.report;
    let head = 4.0 * weights(plan.site(plan.head));
    let epoch = report.tokens as f64 * per_token + report.trained_tokens as f64 * head;
    epoch * recipe.plan.epochs()
}

/// The first layer whose inputs need a gradient: the one above the first that trains anything. None where the embedding
/// does.
fn lowest_trained(plan: &ModelPlan, attached: &Attached) -> Option<usize> {
    let above = |(id, _): &(SiteId, Attachment)| {
        let site = plan.site(*id);
        match (site.kind, site.layer) {
            (SiteKind::Embedding, _) => None,
            (_, Some(layer)) => Some(layer + 1),
            (_, None) => Some(plan.layers.len()),
        }
    };
    let trains = |(_, a): &&(SiteId, Attachment)| {
        !matches!(a, Attachment::KeepBase | Attachment::Invocation(_))
    };
    attached
        .attachments
        .iter()
        .filter(trains)
        .map(above)
        .min()
        .unwrap_or(Some(plan.layers.len()))
}

/// Rows, outputs and inputs of the largest product of a layer in the largest micro-batch, cut to what is soon timed.
fn timed_sizes(recipe: &Recipe) -> [usize; 3] {
    let plan = ModelPlan::new(&recipe.decoder);
    let is_linear = |site: &&Site| site.kind == SiteKind::Linear;
    let of_layers = plan.sites.iter().filter(is_linear);
    let shapes = of_layers.filter(|site| site.layer.is_some());
    let shapes = shapes.map(|site| [site.out_features, site.in_features]);
    let [out, input] = shapes.max_by_key(|[o, i]| o * i).unwrap_or([1, 1]);
    let kind = usize::from(recipe.device.is_cuda());
    let rows = recipe.max_tokens.clamp(1, MOST_ROWS[kind]);
    let most = MOST_FLOPS[kind] / (2 * rows * input).max(1);
    [rows, out.clamp(1, most.max(1)), input]
}

/// FLOPs per second of a linear's two products, forward and for the gradient of its input, on `device`.
fn rate(device: &Device, dtypes: [DType; 2], [rows, out, input]: [usize; 3]) -> Result<f64> {
    let random = |name: &str, dtype: DType, rows: usize, columns: usize| {
        let mut stream = rng::Stream::new(rng::key_for(0, name));
        let values = (0..rows * columns).map(|_| stream.uniform() as f32 - 0.5);
        let values = Tensor::from_f32(values.collect(), rows, columns);
        values.to_dtype(dtype).to_device(device)
    };
    let [activations, weights] = dtypes;
    let x = random("x", activations, rows, input);
    let weight = random("weight", weights, out, input);
    let mut y = Tensor::zeros(activations, rows, out).to_device(device);
    let mut dx = Tensor::zeros(activations, rows, input).to_device(device);
    let mut best = f64::INFINITY;
    device.synchronize()?;
    let begin = Instant::now();
    let mut repeats = 0;
    while repeats < LEAST_REPEATS || begin.elapsed() < TIMED {
        let begin = Instant::now();
        matmul::nt(y.view_mut(), 0.0, 1.0, x.view(), weight.view())?;
        matmul::nn(dx.view_mut(), 0.0, 1.0, y.view(), weight.view())?;
        device.synchronize()?;
        best = best.min(begin.elapsed().as_secs_f64());
        repeats += 1;
    }
    Ok(4.0 * (rows * out * input) as f64 / best.max(1e-9))
}
