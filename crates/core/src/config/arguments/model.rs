use super::source::{OURS, TRL_MODEL};
use crate::config::section::section;
use crate::config::value::choices;
use crate::model::Quantise;
use ferrotune_kernels::dequantise::{FourBitFormat, FourBitType, Int8, QuantFormat};

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

choices! {
    /// What the codes of a 4-bit base stand for.
    QuantType {
        /// Quantiles of a normal distribution.
        Nf4 = "nf4",
        /// Small floats.
        Fp4 = "fp4",
    }
}

section! {
    /// Which model, in which precision.
    ModelArguments, "model" {
        /// Directory of the base model (config.json, safetensors, tokenizer.json), or its name on the Hugging Face
        /// hub, such as owner/name.
        model_name_or_path: Option<String> = None, TRL_MODEL;
        /// Branch, tag or commit of a model from the hub; null for main.
        model_revision: Option<String> = None, TRL_MODEL;
        /// Number of classes, with `lora_task_type: SEQ_CLS` over a language model, which gets a new head of as many rows;
        /// null for those of a base that is a classifier.
        num_labels: Option<usize> = None, OURS;
        /// Data type of the base weights: auto (as stored), float32 or bfloat16. `torch_dtype` is
        /// another name for this key.
        dtype: Dtype = Dtype::Auto, OURS;
        /// Start from random weights of the shape in config.json instead of reading any: for
        /// pre-training small models and for tests. Needs `use_peft: false`.
        random_init: bool = false, OURS;
        /// Run the base in bfloat16, as Transformers' mixed precision would, whatever `dtype` says;
        /// trained weights stay float32. null and false leave the choice to `dtype`.
        bf16: Option<bool> = None, OURS;
        /// Hold the linears of the base's layers in 4 bits, quantised as they are read, in the format of
        /// bitsandbytes (QLoRA). Needs `use_peft: true`. A base whose files are in 4 bits needs no key.
        load_in_4bit: bool = false, TRL_MODEL;
        /// Hold the linears of the base's layers in 8 bits, quantised as they are read, and multiply them as
        /// bytes with inputs that become bytes too (`LLM.int8()` of bitsandbytes). Needs `use_peft: true`. A base
        /// whose files are in 8 bits needs no key.
        load_in_8bit: bool = false, TRL_MODEL;
        /// Hold the linears of the base's layers as 8-bit floats (e4m3) with a scale per output, quantised as they
        /// are read; products read what they stand for. Needs `use_peft: true`. A base whose files are so needs no
        /// key.
        load_in_fp8: bool = false, OURS;
        /// With `load_in_8bit`, inputs from this magnitude on are multiplied as they are; 0 for none. A base whose
        /// files are in 8 bits has its own.
        llm_int8_threshold: f64 = f64::from(Int8::THRESHOLD), OURS;
        /// Linears that `load_in_8bit`, `load_in_4bit` and `load_in_fp8` leave as they are: names of modules, or what they begin or
        /// end with, such as down_proj.
        llm_int8_skip_modules: Vec<String> = Vec::new(), OURS;
        /// What the 4 bits stand for: nf4 or fp4.
        bnb_4bit_quant_type: QuantType = QuantType::Nf4, TRL_MODEL;
        /// Quantise the scales of the blocks of 64 weights too, which saves 0.37 bits per weight.
        /// `use_bnb_nested_quant` is another name for this key.
        bnb_4bit_use_double_quant: bool = false, TRL_MODEL;
        /// Data type that 4-bit weights become for a product: auto, float32 or bfloat16. auto and null
        /// leave the choice to `dtype`, and `bf16: true` wins over it.
        bnb_4bit_compute_dtype: Option<Dtype> = None, OURS;
    }
}

impl ModelArguments {
    /// The data type the base is held and computed in: `bf16: true` wins over the compute type of a
    /// 4-bit base, and that over `dtype`.
    #[must_use]
    pub fn base_dtype(&self) -> Dtype {
        match self.bnb_4bit_compute_dtype {
            _ if self.bf16 == Some(true) => Dtype::Bfloat16,
            Some(compute) if self.load_in_4bit && compute != Dtype::Auto => compute,
            _ => self.dtype,
        }
    }

    /// Which linears are to be quantised as they are read, and what to.
    #[must_use]
    pub fn quantise(&self) -> Option<Quantise> {
        let format = if self.load_in_4bit {
            QuantFormat::FourBit(FourBitFormat {
                quant_type: match self.bnb_4bit_quant_type {
                    QuantType::Nf4 => FourBitType::Nf4,
                    QuantType::Fp4 => FourBitType::Fp4,
                },
                block: FourBitFormat::BLOCK,
                double_quant: self.bnb_4bit_use_double_quant,
            })
        } else if self.load_in_8bit {
            QuantFormat::Int8 {
                threshold: self.llm_int8_threshold as f32,
            }
        } else if self.load_in_fp8 {
            QuantFormat::Float8
        } else {
            return None;
        };
        Some(Quantise {
            format,
            skip_modules: self.llm_int8_skip_modules.clone(),
        })
    }
}
