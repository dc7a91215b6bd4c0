//! A PEFT method of your own: (IA)^3-like scaling of the outputs of chosen linears.
//!
//! `y = (x W^T) * l` with a trained vector `l` per linear, all ones at the start. The method says
//! where it attaches and what it does there; training, clipping and the optimizer are core's.
//!
//! `cargo run --release --example 04_own_adapter_method`

use ferrotune::core::adapter::{Adapter, Attachment, CustomLinear, Site, SiteId};
use ferrotune::core::data::PrepareOptions;
use ferrotune::core::io::{SafetensorsFile, TensorData, write_safetensors};
use ferrotune::core::params::{FlatBuffer, ParamId, ParamLayoutBuilder, ParamSpec};
use ferrotune::kernels::{Tensor, View, ViewMut};
use ferrotune::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;

/// What the name of a linear's vector has behind the linear's.
const SUFFIX: &str = ".ia3_l";

/// Scales the outputs of every linear whose name ends with one of these.
#[derive(Debug)]
struct OutputScaling {
    targets: [&'static str; 3],
}

/// The vector of one linear, `[out]`.
#[derive(Debug)]
struct Scale(ParamId);

impl CustomLinear for Scale {
    fn forward(&self, params: &FlatBuffer, _x: View<'_>, y: ViewMut<'_>) -> Result<Vec<Tensor>> {
        let [tokens, out] = y.shape();
        let base = y.as_view().to_f32_vec();
        y.copy_from(View::from_f32(
            &scaled(&base, params.get(self.0)),
            tokens,
            out,
        ));
        // Backward needs the output before scaling.
        Ok(vec![Tensor::from_f32(base, tokens, out)])
    }

    fn backward(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        _x: View<'_>,
        saved: &[Tensor],
        dy: ViewMut<'_>,
        _dx: Option<ViewMut<'_>>,
    ) -> Result<()> {
        let [tokens, out] = dy.shape();
        let (d, base) = (dy.as_view().to_f32_vec(), saved[0].to_f32_vec());
        let d_scale = grads.get_mut(self.0);
        for (d, base) in d.chunks_exact(out).zip(base.chunks_exact(out)) {
            for (sum, (d, base)) in d_scale.iter_mut().zip(d.iter().zip(base)) {
                *sum += d * base;
            }
        }
        dy.copy_from(View::from_f32(&scaled(&d, params.get(self.0)), tokens, out));
        Ok(())
    }
}

/// Each row of `values` times `scale`.
fn scaled(values: &[f32], scale: &[f32]) -> Vec<f32> {
    let rows = values.chunks_exact(scale.len());
    rows.flat_map(|row| row.iter().zip(scale).map(|(v, s)| v * s))
        .collect()
}

impl Adapter for OutputScaling {
    fn attach(
        &self,
        sites: &[Site],
        params: &mut ParamLayoutBuilder,
    ) -> Result<Vec<(SiteId, Attachment)>> {
        let chosen = |site: &&Site| self.targets.iter().any(|t| site.name.ends_with(t));
        let attach = |site: &Site| {
            let name = format!("{}{SUFFIX}", site.name);
            let spec = ParamSpec::new(name, [site.out_features], site.execution_order);
            let scale = Scale(params.add(spec));
            (site.id, Attachment::Custom(Box::new(scale)))
        };
        Ok(sites.iter().filter(chosen).map(attach).collect())
    }

    fn init(&self, params: &mut FlatBuffer, _seed: u64) -> Result<()> {
        for (id, _) in params.layout().clone().physical() {
            params.get_mut(id).fill(1.0);
        }
        Ok(())
    }

    fn save(&self, params: &FlatBuffer, directory: &Path) -> Result<()> {
        params.read_back()?;
        let tensor = |(id, segment): (ParamId, &ferrotune::core::params::Segment)| {
            let spec = &segment.spec;
            let data = TensorData::from_f32(params.get(id), spec.shape.clone());
            (spec.name.clone(), data)
        };
        let tensors: BTreeMap<_, _> = params.layout().by_name().map(tensor).collect();
        write_safetensors(
            &directory.join("scales.safetensors"),
            &tensors,
            &BTreeMap::new(),
        )
    }

    fn load(&self, params: &mut FlatBuffer, directory: &Path) -> Result<()> {
        let file = SafetensorsFile::open(directory.join("scales.safetensors"))?;
        for (id, segment) in params.layout().clone().by_name() {
            params
                .get_mut(id)
                .copy_from_slice(&file.read_f32(&segment.spec.name)?);
        }
        Ok(())
    }

    fn describe(&self) -> String {
        format!("output scaling of {}", self.targets.join(", "))
    }
}

fn main() -> Result<()> {
    let base = Path::new("examples/demo/base");
    let config = DecoderConfig::open(base)?;
    let weights = ModelFiles::open(base)?;
    let method = OutputScaling {
        targets: ["k_proj", "v_proj", "down_proj"],
    };
    println!("{}", method.describe());

    let options = TrainerOptions::default();
    let mut trainer = Trainer::new(&config, &weights, Box::new(method), Box::new(Solo), options)?;
    println!("{} trained numbers", trainer.params().layout().trainable());

    let tokenizer = Tokenizer::from_dir(base)?;
    let files = ["examples/opposites.jsonl".into()];
    let rows = Dataset::load(&files, &tokenizer, &PrepareOptions::default())?;
    let rows = rows.examples.to_vec()?;
    let batch = [PackedBatch::pack((0..).zip(&rows))];
    let before = trainer.evaluate(&batch)?.loss;
    for _ in 0..40 {
        trainer.step(&batch, 2e-2)?;
    }
    let adapted = trainer.evaluate(&batch)?.loss;
    println!("loss {before:.4} before, {adapted:.4} after");
    assert!(adapted < before, "training must lower the loss");

    let output = Path::new("out/own_adapter_method");
    std::fs::create_dir_all(output).map_err(Error::write(output))?;
    trainer.adapter().save(trainer.params(), output)?;
    merge(&weights, trainer.params(), output)?;
    let merged = loss_of(output, &batch)?;
    println!("loss {merged:.4} merged into the base");
    assert!(
        (merged - adapted).abs() < 1e-4,
        "merging must not change the model"
    );
    Ok(())
}

/// Writes the base with the method folded into its weights: each row times its scale.
fn merge(weights: &ModelFiles, params: &FlatBuffer, to: &Path) -> Result<()> {
    let mut tensors = BTreeMap::new();
    for name in weights.names() {
        tensors.insert(name.to_owned(), weights.read_f32(name)?);
    }
    for (id, segment) in params.layout().by_name() {
        let scale = params.get(id);
        let linear = segment.spec.name.strip_suffix(SUFFIX);
        let weight = linear.and_then(|name| tensors.get_mut(&format!("{name}.weight")));
        if let Some(weight) = weight {
            let columns = weight.len() / scale.len();
            for (row, scale) in weight.chunks_exact_mut(columns).zip(scale) {
                row.iter_mut().for_each(|w| *w *= scale);
            }
        }
    }
    let shape = |name: &str| {
        weights
            .meta(name)
            .map(|m| m.shape.clone())
            .unwrap_or_default()
    };
    let tensors: BTreeMap<_, _> = tensors
        .iter()
        .map(|(name, values)| (name.clone(), TensorData::from_f32(values, shape(name))))
        .collect();
    write_safetensors(&to.join("model.safetensors"), &tensors, &BTreeMap::new())?;
    let copied = std::fs::copy("examples/demo/base/config.json", to.join("config.json"));
    copied.map_err(Error::write(to)).map(|_| ())
}

/// The loss of a model without any method.
fn loss_of(directory: &Path, batch: &[PackedBatch]) -> Result<f64> {
    let config = DecoderConfig::open(directory)?;
    let nothing = OutputScaling {
        targets: ["nothing"; 3],
    };
    let weights = ModelFiles::open(directory)?;
    let options = TrainerOptions::default();
    let mut plain = Trainer::new(
        &config,
        &weights,
        Box::new(nothing),
        Box::new(Solo),
        options,
    )?;
    Ok(plain.evaluate(batch)?.loss)
}
