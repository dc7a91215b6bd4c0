//! Arguments of a base that is quantised as it is read, under the names of the configuration's keys.

use ferrotune::core::config::{ModelArguments, QuantType};
use ferrotune::core::model::Quantise;
use ferrotune::kernels::dequantise::Int8;

/// How the base is held.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct QuantiseArgs {
    /// Hold the linears of the base in 4 bits, quantised as they are read
    #[arg(long)]
    load_in_4bit: bool,
    /// What the 4 bits stand for: nf4 or fp4
    #[arg(long, default_value = "nf4", requires = "load_in_4bit")]
    bnb_4bit_quant_type: QuantType,
    /// Quantise the scales too
    #[arg(long, requires = "load_in_4bit")]
    bnb_4bit_use_double_quant: bool,
    /// Hold the linears of the base in 8 bits, and multiply bytes
    #[arg(long, conflicts_with = "load_in_4bit")]
    load_in_8bit: bool,
    /// Inputs from this magnitude on are multiplied as they are; 0 for none
    #[arg(long, default_value_t = f64::from(Int8::THRESHOLD), requires = "load_in_8bit")]
    llm_int8_threshold: f64,
    /// Linears that are left as they are
    #[arg(long, num_args = 1.., value_delimiter = ',')]
    llm_int8_skip_modules: Vec<String>,
}

impl QuantiseArgs {
    /// Which linears become what.
    pub(super) fn quantise(&self) -> Option<Quantise> {
        let keys = ModelArguments {
            load_in_4bit: self.load_in_4bit,
            bnb_4bit_quant_type: self.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant: self.bnb_4bit_use_double_quant,
            load_in_8bit: self.load_in_8bit,
            llm_int8_threshold: self.llm_int8_threshold,
            llm_int8_skip_modules: self.llm_int8_skip_modules.clone(),
            ..ModelArguments::default()
        };
        keys.quantise()
    }
}
