//! The methods beside LoRA, one file each.

mod adalora;
mod boft;
mod c3a;
mod cayley;
mod delora;
mod dropout;
mod fourierft;
mod hira;
mod hra;
mod ia3;
mod loha;
mod lokr;
mod matrix;
mod miss;
mod oft;
mod randlora;
mod road;
mod torch_random;
mod vblora;
mod vera;

use crate::method::{Configured, Method, Source, configure};
use crate::prompt;
use ferrotune_core::Result;
use serde_json::{Map, Value};

/// Reads a method's configuration.
type Configure = fn(Source<'_>, &Map<String, Value>) -> Result<Box<dyn Configured>>;

const fn entry<M: Method>() -> (&'static str, Configure) {
    (M::PEFT_TYPE, configure::<M>)
}

/// Every method, by `peft_type`.
pub(crate) const METHODS: &[(&str, Configure)] = &[
    entry::<adalora::AdaLora>(),
    entry::<boft::Boft>(),
    entry::<c3a::C3a>(),
    entry::<delora::Delora>(),
    entry::<fourierft::FourierFt>(),
    entry::<hira::Hira>(),
    entry::<hra::Hra>(),
    entry::<ia3::Ia3>(),
    entry::<loha::Loha>(),
    entry::<lokr::Lokr>(),
    entry::<miss::Miss>(),
    entry::<oft::Oft>(),
    ("P_TUNING", prompt::configure),
    ("PREFIX_TUNING", prompt::configure),
    ("PROMPT_TUNING", prompt::configure),
    entry::<randlora::RandLora>(),
    entry::<road::Road>(),
    entry::<vblora::VbLora>(),
    entry::<vera::Vera>(),
];

#[cfg(test)]
mod tests;
