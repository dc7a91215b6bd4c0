//! What is trained, and how it is held and run: the switches of a run's configuration that a bench compares.

use super::Args;
use crate::cli::quantise::QuantiseArgs;
use ferrotune::core::adapter::Adapter;
use ferrotune::core::io::ModelFiles;
use ferrotune::core::model::{
    DecoderConfig, Keep, Quantise, RandomWeights, WeightFormat, WeightSource, offloadable,
};
use ferrotune::core::process_group::ProcessGroup;
use ferrotune::core::trainer::{Trainer, TrainerOptions};
use ferrotune::core::{Error, Result};
use ferrotune::hub;
use ferrotune::kernels::cuda::GemmTuning;
use ferrotune::kernels::{DType, Device};
use ferrotune::lora::{LoraAdapter, LoraConfig, PeftConfig, TargetModules};
use serde_json::{Map, Value};

/// Arguments of `bench` that make its trainer.
#[derive(Debug, clap::Args)]
pub(super) struct TrainerArgs {
    /// Start from this adapter (a directory or a name on the hub), which also says what is trained
    #[arg(long)]
    pub(super) adapter: Option<String>,
    /// Another method than LoRA, as JSON: the keys of its adapter_config.json, like {"peft_type": "OFT"}
    #[arg(long, conflicts_with_all = ["adapter", "use_dora"], value_parser = object)]
    peft_config: Option<Map<String, Value>>,
    /// LoRA rank on every linear of the layers, alpha twice that
    #[arg(long, default_value_t = 16)]
    pub(super) rank: usize,
    /// Train magnitudes too
    #[arg(long, conflicts_with = "adapter")]
    use_dora: bool,
    /// Element type of weights and activations
    #[arg(long, value_enum, default_value_t = Dtype::Float32)]
    dtype: Dtype,
    #[command(flatten)]
    quantise: QuantiseArgs,
    /// What layers keep from forward to backward: all, drop-gate-up or input
    #[arg(long, default_value_t = Keep::All, value_parser = keep)]
    keep: Keep,
    /// What layers keep lies in host memory (GPU only)
    #[arg(long)]
    activation_offloading: bool,
    /// Issue every kernel instead of replaying recorded steps (GPU only)
    #[arg(long)]
    no_cuda_graph: bool,
    /// How the algorithm of a product is chosen on a GPU
    #[arg(long, value_enum, default_value_t = Tuning::Heuristic)]
    gemm_tuning: Tuning,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Dtype {
    /// 32-bit floats
    Float32,
    /// Brain floats
    Bfloat16,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Tuning {
    /// As cublasLt expects
    Heuristic,
    /// The fastest of a few, timed
    Measure,
}

fn object(text: &str) -> std::result::Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|e| format!("expected a JSON object: {e}"))
}

fn keep(text: &str) -> std::result::Result<Keep, String> {
    Keep::from_name(text).ok_or_else(|| {
        let names = Keep::EVERY.map(Keep::as_str).join(", ");
        format!("expected one of {names}")
    })
}

impl TrainerArgs {
    pub(super) fn dtype(&self) -> DType {
        match self.dtype {
            Dtype::Float32 => DType::F32,
            Dtype::Bfloat16 => DType::Bf16,
        }
    }

    pub(super) fn quantise(&self) -> Option<Quantise> {
        self.quantise.quantise()
    }

    /// The adapter of `--adapter` or `--peft-config`, else LoRA on every linear of the layers.
    fn method(&self, decoder: &DecoderConfig) -> Result<Box<dyn Adapter>> {
        if let Some(name) = &self.adapter {
            let directory = &hub::adapter(name, "adapter")?;
            return ferrotune::lora::load(directory, decoder);
        }
        if let Some(keys) = &self.peft_config {
            return PeftConfig::from_config("peft_config", keys)?.into_adapter(&decoder.model_type);
        }
        let config = LoraConfig {
            rank: self.rank,
            alpha: 2.0 * self.rank as f64,
            use_dora: self.use_dora,
            target_modules: Some(TargetModules::AllLinear),
            ..LoraConfig::default()
        };
        Ok(Box::new(LoraAdapter::new(config, &decoder.model_type)?))
    }
}

/// Of `group`, for steps of at most `max_tokens` tokens.
///
/// # Errors
/// For weights, an adapter or keys that cannot be read, or memory that cannot be had.
pub(super) fn trainer(
    args: &Args,
    device: &Device,
    decoder: &DecoderConfig,
    max_tokens: usize,
    group: Box<dyn ProcessGroup>,
) -> Result<Trainer> {
    let files = args.model.as_deref().map(ModelFiles::open).transpose()?;
    let random = RandomWeights { seed: args.seed };
    let source: &dyn WeightSource = match &files {
        Some(files) => files,
        None => &random,
    };
    let how = &args.trainer;
    let offload = match (how.activation_offloading, device.is_cuda()) {
        (false, _) => 0,
        (true, true) => offloadable(decoder.layers),
        (true, false) => {
            let message = "activations of a CPU lie in host memory as it is; give --device cuda";
            return Err(Error::config("activation-offloading", message));
        }
    };
    let options = TrainerOptions {
        device: device.clone(),
        seed: args.seed,
        weights: WeightFormat {
            dtype: how.dtype(),
            quantise: how.quantise(),
        },
        activation_dtype: how.dtype(),
        max_tokens,
        keep: vec![how.keep; decoder.layers],
        offload,
        // One after the other, so that each has its own time.
        write_ahead: !args.profile,
        cuda_graph: !(args.profile || how.no_cuda_graph),
        gemm_tuning: match how.gemm_tuning {
            Tuning::Heuristic => GemmTuning::Heuristic,
            Tuning::Measure => GemmTuning::Measure,
        },
        ..TrainerOptions::default()
    };
    let method = how.method(decoder)?;
    let mut trainer = Trainer::new(decoder, source, method, group, options)?;
    if let Some(name) = &how.adapter {
        let directory = hub::adapter(name, "adapter")?;
        how.method(decoder)?
            .load(trainer.params_mut(), &directory)?;
    }
    Ok(trainer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::bench::measure::{Plan, measure};
    use crate::cli::bench::rows::Steps;
    use crate::cli::bench::shapes::Shape;
    use clap::Parser;
    use ferrotune::core::process_group::Solo;
    use ferrotune::kernels::host_cuda;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    /// Losses of three steps of a tiny model.
    fn losses(device: &Device, more: &[&str]) -> Vec<f64> {
        let args = Line::try_parse_from([&["bench", "--shape", "tiny"], more].concat());
        let args = args.unwrap_or_else(|e| panic!("{more:?}: {e}")).args;
        let decoder = Shape::find("tiny").and_then(|shape| shape.decoder());
        let Ok(decoder) = decoder else {
            panic!("the shape is known");
        };
        let steps = Steps::random(0, 2, 12, decoder.vocab_size);
        let trainer = trainer(&args, device, &decoder, steps.max_tokens(), Box::new(Solo));
        let plan = Plan {
            warmup: 1,
            timed: 2,
            learning_rate: 1e-3,
            profile: false,
        };
        let mut trainer = trainer.expect("a trainer");
        measure(plan, device, &mut trainer, &steps)
            .expect("runs")
            .losses
    }

    #[test]
    fn ways_to_run_the_same_steps_change_no_bit() {
        for device in [Device::Cpu, Device::Cuda(host_cuda::device())] {
            let usual = losses(&device, &[]);
            assert_eq!(usual.len(), 3);
            let mut ways = vec![vec!["--keep", "drop-gate-up"], vec!["--keep", "input"]];
            if device.is_cuda() {
                ways.push(vec!["--no-cuda-graph"]);
                ways.push(vec!["--activation-offloading"]);
            }
            for way in ways {
                assert_eq!(losses(&device, &way), usual, "{way:?} on {device}");
            }
            let oft = losses(&device, &["--peft-config", r#"{"peft_type": "OFT"}"#]);
            assert!((oft[0] - usual[0]).abs() < 1e-4 * usual[0], "{oft:?}");
            assert_ne!(oft[2], usual[2]);
        }
    }

    #[test]
    fn a_switch_that_is_none_is_refused_by_its_name() {
        for (switch, value, said) in [
            ("--keep", "some", "all, drop-gate-up, input"),
            ("--peft-config", "[1]", "expected a JSON object"),
        ] {
            let args = ["bench", "--shape", "tiny", switch, value];
            let error = Line::try_parse_from(args).err().expect("refused");
            assert!(error.to_string().contains(said), "{error}");
        }
    }
}
