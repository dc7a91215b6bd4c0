//! Arguments of a base in 4 bits, under the names of the configuration's keys.

use ferrotune::core::config::{ModelArguments, QuantType};
use ferrotune::kernels::dequantise::FourBitFormat;

/// How the base is held.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(super) struct FourBitArgs {
    /// Hold the linears of the base in 4 bits, quantised as they are read
    #[arg(long)]
    load_in_4bit: bool,
    /// What the 4 bits stand for: nf4 or fp4
    #[arg(long, default_value = "nf4", requires = "load_in_4bit")]
    bnb_4bit_quant_type: QuantType,
    /// Quantise the scales too
    #[arg(long, requires = "load_in_4bit")]
    bnb_4bit_use_double_quant: bool,
}

impl FourBitArgs {
    /// The format, if in 4 bits.
    pub(super) fn format(self) -> Option<FourBitFormat> {
        let keys = ModelArguments {
            load_in_4bit: self.load_in_4bit,
            bnb_4bit_quant_type: self.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant: self.bnb_4bit_use_double_quant,
            ..ModelArguments::default()
        };
        keys.four_bit()
    }
}
