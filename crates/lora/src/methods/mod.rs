//! The methods beside LoRA, one file each.

mod adalora;
mod boft;
mod c3a;
mod cayley;
mod delora;
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
mod tests {
    use crate::PeftConfig;
    use crate::testing::{copy_of, edit_config};
    use serde_json::json;

    #[test]
    fn dropout_of_training_alone_is_refused_there_and_read_elsewhere() {
        for (case, key) in [
            ("boft", "boft_dropout"),
            ("delora", "module_dropout"),
            ("hira", "hira_dropout"),
            ("loha", "rank_dropout"),
            ("lokr", "module_dropout"),
            ("miss", "miss_dropout"),
            ("oft", "module_dropout"),
            ("randlora", "randlora_dropout"),
        ] {
            let copy = copy_of(case);
            edit_config(copy.path(), key, json!(0.1));
            // PEFT sets it for GPT-2.
            edit_config(copy.path(), "fan_in_fan_out", json!(true));
            PeftConfig::load(copy.path()).expect(case);
            let asked = json!({"peft_type": case.to_uppercase(), key: 0.1});
            let asked = asked.as_object().expect("an object");
            let error = PeftConfig::from_config("peft_config", asked).expect_err(case);
            assert!(error.to_string().contains(key), "{error}");
        }
    }
}
