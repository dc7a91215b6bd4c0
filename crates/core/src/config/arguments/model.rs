use super::source::{OURS, TRL_MODEL};
use crate::config::section::section;
use crate::config::value::choices;

choices! {
    /// Data type of the frozen weights and of the arithmetic on them.
    Dtype {
        /// As the checkpoint has it.
        Auto = "auto",
        /// 32-bit floats.
        Float32 = "float32",
        /// Brain floats.
        Bfloat16 = "bfloat16",
    }
}

section! {
    /// Which model, in which precision.
    ModelArguments, "model" {
        /// Directory of the base model: config.json, safetensors, tokenizer.json.
        model_name_or_path: Option<String> = None, TRL_MODEL;
        /// Data type of the base weights: auto (as stored), float32 or bfloat16. `torch_dtype` is
        /// another name for this key.
        dtype: Dtype = Dtype::Float32, TRL_MODEL;
        /// Run the base in bfloat16, as Transformers' mixed precision would, whatever `dtype` says;
        /// trained weights stay float32. null and false leave the choice to `dtype`.
        bf16: Option<bool> = None, OURS;
    }
}

impl ModelArguments {
    /// The data type the base is held and computed in: `bf16: true` wins over `dtype`.
    #[must_use]
    pub fn base_dtype(&self) -> Dtype {
        if self.bf16 == Some(true) {
            Dtype::Bfloat16
        } else {
            self.dtype
        }
    }
}
