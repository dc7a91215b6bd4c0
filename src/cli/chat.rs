//! Arguments that `generate` and `eval` share.

use super::Failure;
use super::quantise::QuantiseArgs;
use super::same_base::BaseArgs;
use ferrotune::core::Result;
use ferrotune::core::config::Device;
use ferrotune::generate::GenerateOptions;
use ferrotune::{TextModel, hub};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

/// Arguments that choose the model.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct ModelArgs {
    /// Directory of the model (merged or base), or its name on the hub: OWNER/NAME or OWNER/NAME@REVISION
    #[arg(long)]
    pub(super) model_name_or_path: String,
    /// Directory of an adapter on it, or its name on the hub; several, each as PLACE or NAME=PLACE, are read over one
    /// base and answer or are evaluated beside one another
    #[arg(long, value_name = "[NAME=]PLACE")]
    pub(super) adapter: Vec<String>,
    #[command(flatten)]
    same_base: BaseArgs,
    #[command(flatten)]
    pub(super) quantise: QuantiseArgs,
    /// Where to compute: auto, cpu or cuda
    #[arg(long, default_value = "auto")]
    pub(super) device: Device,
}

impl ModelArgs {
    pub(super) fn load(&self) -> Result<TextModel> {
        let base = hub::model(&self.model_name_or_path, None, "model_name_or_path")?;
        let adapters = self.adapter.iter().map(|adapter| {
            let (name, place) = named(adapter);
            let directory = hub::adapter(place, "adapter")?;
            self.same_base.check(&base, &directory)?;
            Ok((name, directory))
        });
        let adapters: Vec<(&str, PathBuf)> = adapters.collect::<Result<_>>()?;
        let device = ferrotune::device::open(self.device)?;
        let quantise = self.quantise.quantise();
        if let [] | [_] = adapters.as_slice() {
            let alone = adapters.first().map(|(_, directory)| directory.as_path());
            return TextModel::load_as(&device, &base, alone, quantise);
        }
        let adapters = adapters.iter().map(|(name, at)| (*name, at.as_path()));
        TextModel::load_together(&device, &base, adapters, quantise)
    }

    /// Whether adapters stand beside one another.
    pub(super) fn is_several(&self) -> bool {
        self.adapter.len() > 1
    }
}

/// Name and place of an adapter; without a name the place is one.
fn named(adapter: &str) -> (&str, &str) {
    match adapter.split_once('=') {
        Some((name, place)) if !name.is_empty() && !Path::new(adapter).exists() => (name, place),
        _ => (adapter, adapter),
    }
}

/// A count on a command line: there is no use in 0.
pub(super) fn at_least_one(text: &str) -> Result<NonZeroUsize, String> {
    let parsed = text.parse();
    parsed.map_err(|_| "expected a whole number of 1 or more".to_owned())
}

/// Arguments that choose tokens.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct SamplingArgs {
    /// Longest answer, in tokens
    #[arg(long, default_value = "128", value_parser = at_least_one)]
    max_new_tokens: NonZeroUsize,
    /// 0 always takes the most likely token
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    temperature: f64,
    /// Only the k most likely tokens
    #[arg(long)]
    top_k: Option<usize>,
    /// Only the smallest set of tokens with this much probability
    #[arg(long)]
    top_p: Option<f64>,
    /// Seed of the draws
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Prompts that run together
    #[arg(long, default_value = "32", value_parser = at_least_one)]
    batch_size: NonZeroUsize,
}

impl SamplingArgs {
    pub(super) fn options(&self) -> Result<GenerateOptions, Failure> {
        if !self.temperature.is_finite() || self.temperature < 0.0 {
            return Err(Failure::Usage(format!(
                "--temperature {}: expected 0 or more",
                self.temperature
            )));
        }
        if self.top_p.is_some_and(|p| !(p > 0.0 && p <= 1.0)) {
            return Err(Failure::Usage(
                "--top-p: expected a number above 0 and at most 1".into(),
            ));
        }
        if self.top_k == Some(0) {
            return Err(Failure::Usage("--top-k: expected 1 or more".into()));
        }
        Ok(GenerateOptions {
            max_new_tokens: self.max_new_tokens.get(),
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            seed: self.seed,
            batch_size: self.batch_size.get(),
            ..GenerateOptions::default()
        })
    }
}
