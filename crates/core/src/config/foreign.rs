//! Keys of TRL and Transformers that this engine has no field for.
//!
//! Either the feature is not there yet, then any value but the neutral one is an error; or the key
//! steers something this engine does not have (a framework's knob), then it is noted and ignored.

use super::value::Arity;
use serde_json::{Value, json};

/// What to do with a key at a value that is not neutral.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Treatment {
    /// An error; the text is what to do instead, possibly empty.
    NotYet(&'static str),
    /// A note saying why it has no effect.
    NoEffect(&'static str),
}

/// A key known but not used.
#[derive(Clone, Copy, Debug)]
pub(super) struct ForeignKey {
    pub(super) name: &'static str,
    /// Values, as JSON, that mean "off" or "the default".
    neutral: &'static [&'static str],
    pub(super) treatment: Treatment,
}

use Treatment::{NoEffect, NotYet};

const OFF: &[&str] = &["null", "false"];
const OFF_OR_ZERO: &[&str] = &["null", "false", "0"];
const EMPTY: &[&str] = &["null", "{}", "\"\"", "[]", "false"];
const LOADER: &str = "rows are tokenized in memory before the first step";
const TRANSPOSED: &str = "whether a weight lies transposed is known of the base";
const NO_TORCH: &str = "it steers PyTorch, which is not here";
const NO_LAUNCH: &str = "ranks configure themselves from the launcher's environment";
const NO_HUB: &str = "nothing is sent to a hub";
const NO_REMOTE_CODE: &str = "code from a model directory is never run";
const ATTENTION: &str = "there is one attention, exact and with memory linear in the length";
const RECOMPUTE: &str = "what to keep for the backward pass is decided per layer, without it";
const ALWAYS: &str = "training is deterministic always";
const CONSOLE: &str = "the console output is not configured by this key";
const METRICS: &str = "there are no custom metrics";

const fn key(
    name: &'static str,
    neutral: &'static [&'static str],
    treatment: Treatment,
) -> ForeignKey {
    ForeignKey {
        name,
        neutral,
        treatment,
    }
}

/// Every such key, grouped as in TRL's and Transformers' argument classes.
pub(super) const FOREIGN_KEYS: &[ForeignKey] = &[
    // Model
    key(
        "model_init_kwargs",
        EMPTY,
        NotYet("use dtype for the data type"),
    ),
    key("trust_remote_code", OFF, NoEffect(NO_REMOTE_CODE)),
    key("attn_implementation", &["null"], NoEffect(ATTENTION)),
    key("use_flash_attention_2", OFF, NoEffect(ATTENTION)),
    key(
        "use_cache",
        OFF,
        NoEffect("training keeps no key-value cache"),
    ),
    key("device_map", &["null", "\"auto\""], NoEffect("use device")),
    key("use_cpu", OFF, NoEffect("use device: cpu")),
    key("no_cuda", OFF, NoEffect("use device: cpu")),
    key("lora_target_parameters", EMPTY, NotYet("")),
    key("fan_in_fan_out", OFF, NoEffect(TRANSPOSED)),
    key("lora_fan_in_fan_out", OFF, NoEffect(TRANSPOSED)),
    key(
        "llm_int8_has_fp16_weight",
        OFF,
        NotYet("weights in 8 bits are frozen; leave it out"),
    ),
    key(
        "llm_int8_enable_fp32_cpu_offload",
        OFF,
        NotYet("a model is on one device"),
    ),
    key(
        "bnb_4bit_quant_storage",
        &["null", "\"uint8\""],
        NoEffect("4-bit weights are held as bytes"),
    ),
    key("router_aux_loss_coef", OFF_OR_ZERO, NotYet("")),
    key("ignore_bias_buffers", OFF, NoEffect(NO_TORCH)),
    // Data
    key(
        "dataset_config",
        &["null"],
        NotYet("give a local file or directory as dataset_name"),
    ),
    key("dataset_streaming", OFF, NotYet("")),
    key(
        "datasets",
        EMPTY,
        NotYet("give a list of files as dataset_name"),
    ),
    key("streaming", OFF, NotYet("")),
    key(
        "dataset_kwargs",
        &[
            "null",
            "{}",
            "\"\"",
            "{\"skip_prepare_dataset\":false}",
            "{\"skip_prepare_dataset\":true}",
        ],
        NotYet("leave it out: rows of input_ids are taken as they are, all others are prepared"),
    ),
    key("dataset_num_proc", &["null"], NoEffect("use num_threads")),
    key("dataset_batch_size", &["null", "1000"], NoEffect(LOADER)),
    key(
        "pad_to_multiple_of",
        &["null", "\"auto\""],
        NoEffect("no batch is ever padded"),
    ),
    key("group_by_length", OFF, NoEffect("no batch is ever padded")),
    key(
        "length_column_name",
        &["null", "\"length\""],
        NoEffect("no batch is ever padded"),
    ),
    key(
        "remove_unused_columns",
        &["true", "null"],
        NoEffect("fields that are not used are ignored"),
    ),
    key("label_names", EMPTY, NotYet("")),
    key("dataloader_drop_last", OFF, NotYet("")),
    key("dataloader_num_workers", OFF_OR_ZERO, NoEffect(LOADER)),
    key(
        "dataloader_pin_memory",
        &["true", "false", "null"],
        NoEffect(LOADER),
    ),
    key("dataloader_persistent_workers", OFF, NoEffect(LOADER)),
    key("dataloader_prefetch_factor", &["null"], NoEffect(LOADER)),
    key(
        "dataloader_multiprocessing_context",
        &["null"],
        NoEffect(LOADER),
    ),
    key("dataloader_in_order", &["true", "null"], NoEffect(LOADER)),
    // Loss and regularisation
    key(
        "loss_type",
        &["null", "\"nll\"", "\"chunked_nll\""],
        NotYet(""),
    ),
    key(
        "average_tokens_across_devices",
        &["true", "null"],
        NotYet(""),
    ),
    // Optimizer
    key("optim_target_modules", EMPTY, NotYet("")),
    key("adafactor", OFF, NotYet("use optim: adafactor")),
    // Precision, memory, compilation
    key("fp16", OFF, NotYet("use bf16: true, or dtype: float32")),
    key(
        "fp16_full_eval",
        OFF,
        NotYet("evaluation uses the precision of training"),
    ),
    key(
        "bf16_full_eval",
        OFF,
        NoEffect("evaluation uses the precision of training"),
    ),
    key("tf32", OFF, NoEffect(NO_TORCH)),
    key("gradient_checkpointing_kwargs", EMPTY, NoEffect(RECOMPUTE)),
    key("activation_checkpointing", OFF, NoEffect(RECOMPUTE)),
    key(
        "activation_checkpointing_kwargs",
        EMPTY,
        NoEffect(RECOMPUTE),
    ),
    key("torch_compile", OFF, NoEffect(NO_TORCH)),
    key("torch_compile_backend", &["null"], NoEffect(NO_TORCH)),
    key("torch_compile_mode", &["null"], NoEffect(NO_TORCH)),
    key("torch_empty_cache_steps", &["null"], NoEffect(NO_TORCH)),
    key(
        "use_liger_kernel",
        OFF,
        NoEffect("fused kernels are always in use"),
    ),
    key(
        "liger_kernel_config",
        EMPTY,
        NoEffect("fused kernels are always in use"),
    ),
    key(
        "auto_find_batch_size",
        OFF,
        NotYet("lower per_device_train_batch_size"),
    ),
    // Logging
    key(
        "logging_dir",
        &["null"],
        NoEffect("logs are written to output_dir"),
    ),
    key(
        "logging_nan_inf_filter",
        OFF,
        NoEffect("a loss that is not finite is never hidden"),
    ),
    key("log_on_each_node", &["true", "null"], NoEffect(CONSOLE)),
    key("log_level", &["null", "\"passive\""], NoEffect(CONSOLE)),
    key(
        "log_level_replica",
        &["null", "\"warning\""],
        NoEffect(CONSOLE),
    ),
    key(
        "disable_tqdm",
        OFF,
        NoEffect("there is a progress bar on a terminal only"),
    ),
    key(
        "include_num_input_tokens_seen",
        &["false", "\"no\"", "null"],
        NoEffect("tokens are counted always"),
    ),
    key(
        "include_tokens_per_second",
        OFF,
        NoEffect("tokens per second are logged always"),
    ),
    key(
        "project",
        &["null", "\"huggingface\""],
        NoEffect("report_to is none"),
    ),
    key("trackio_space_id", OFF, NoEffect("report_to is none")),
    key("trackio_bucket_id", OFF, NoEffect("report_to is none")),
    key(
        "trackio_static_space_id",
        OFF,
        NoEffect("report_to is none"),
    ),
    // Evaluation
    key("do_train", &["true", "false", "null"], NoEffect("")),
    key("do_eval", &["true", "false", "null"], NoEffect("")),
    key("do_predict", OFF, NotYet("")),
    key("eval_delay", OFF_OR_ZERO, NotYet("")),
    key("eval_on_start", OFF, NotYet("")),
    key(
        "eval_accumulation_steps",
        &["null"],
        NoEffect("evaluation keeps no logits"),
    ),
    key(
        "prediction_loss_only",
        &["true", "false", "null"],
        NoEffect(METRICS),
    ),
    key(
        "eval_do_concat_batches",
        &["true", "false", "null"],
        NoEffect(METRICS),
    ),
    key("eval_use_gather_object", OFF, NoEffect(METRICS)),
    key("include_for_metrics", EMPTY, NoEffect(METRICS)),
    key("batch_eval_metrics", OFF, NoEffect(METRICS)),
    // Checkpoints
    key(
        "save_only_model",
        OFF,
        NotYet("a checkpoint always holds what resuming needs"),
    ),
    key(
        "save_safetensors",
        &["true", "null"],
        NotYet("every weight is saved as safetensors"),
    ),
    key("save_on_each_node", OFF, NoEffect("the first rank writes")),
    key(
        "enable_jit_checkpoint",
        OFF,
        NoEffect("a signal to stop always saves a checkpoint"),
    ),
    key(
        "ignore_data_skip",
        OFF,
        NotYet("resuming always continues with the next row"),
    ),
    key(
        "restore_callback_states_from_checkpoint",
        OFF,
        NoEffect("there are no callbacks"),
    ),
    key("full_determinism", OFF, NoEffect(ALWAYS)),
    // Hub
    key("push_to_hub", OFF, NotYet("upload output_dir afterwards")),
    key("hub_model_id", &["null"], NoEffect(NO_HUB)),
    key(
        "hub_strategy",
        &["null", "\"every_save\""],
        NoEffect(NO_HUB),
    ),
    key("hub_private_repo", OFF, NoEffect(NO_HUB)),
    key("hub_always_push", OFF, NoEffect(NO_HUB)),
    key("hub_revision", &["null"], NoEffect(NO_HUB)),
    key("hub_token", &["null"], NoEffect(NO_HUB)),
    // Distribution
    key("accelerator_config", EMPTY, NoEffect(NO_LAUNCH)),
    key("parallelism_config", EMPTY, NotYet("")),
    key("deepspeed", EMPTY, NoEffect(NO_LAUNCH)),
    key("fsdp", EMPTY, NoEffect(NO_LAUNCH)),
    key("fsdp_config", EMPTY, NoEffect(NO_LAUNCH)),
    key("ddp_bucket_cap_mb", &["null"], NoEffect(NO_LAUNCH)),
    key("ddp_broadcast_buffers", OFF, NoEffect(NO_LAUNCH)),
    key("ddp_find_unused_parameters", OFF, NoEffect(NO_LAUNCH)),
    key("ddp_static_graph", OFF, NoEffect(NO_LAUNCH)),
    key("local_rank", &["null", "-1"], NoEffect(NO_LAUNCH)),
    key(
        "env",
        EMPTY,
        NoEffect("a configuration file sets no environment variables"),
    ),
    // Debugging
    key("debug", EMPTY, NoEffect(NO_TORCH)),
    key("skip_memory_metrics", &["true", "null"], NoEffect(NO_TORCH)),
];

/// The table's entry for `name`.
pub(super) fn find(name: &str) -> Option<&'static ForeignKey> {
    FOREIGN_KEYS.iter().find(|key| key.name == name)
}

impl ForeignKey {
    /// Checks a value: nothing to say, a note, or what is wrong with it.
    pub(super) fn check(&self, value: &Value) -> Result<Option<String>, String> {
        if self.is_neutral(value) {
            return Ok(None);
        }
        let shown = super::shown(self.name, value);
        match self.treatment {
            NoEffect(why) => Ok(Some(format!("{}: {shown} has no effect: {why}", self.name))),
            NotYet(hint) => Err(format!(
                "{shown} is not supported yet; expected {}{}{hint}",
                self.neutral.join(" or "),
                if hint.is_empty() { "" } else { "; " }
            )),
        }
    }

    /// How many words follow it on a command line, as far as its neutral values tell.
    pub(super) fn arity(&self) -> Arity {
        if self.neutral.contains(&"[]") {
            Arity::List
        } else if self.neutral == OFF || self.neutral.contains(&"true") {
            Arity::Switch
        } else {
            Arity::Single
        }
    }

    fn is_neutral(&self, value: &Value) -> bool {
        let neutral = self
            .neutral
            .iter()
            .map(|text| serde_json::from_str::<Value>(text).unwrap_or_else(|_| json!(text)));
        neutral.into_iter().any(|neutral| match value {
            Value::Number(number) => number.as_f64() == neutral.as_f64(),
            Value::String(text) if neutral.is_boolean() => {
                super::value::word_as_bool(text) == neutral.as_bool()
            }
            value => *value == neutral,
        })
    }

    /// What the documentation says of it.
    pub(super) fn doc(&self) -> String {
        match self.treatment {
            NotYet(_) => format!(
                "Not supported yet: accepted at {}.",
                self.neutral.join(", ")
            ),
            NoEffect("") => "Accepted; the command decides.".to_owned(),
            NoEffect(why) => format!("Accepted without effect: {why}."),
        }
    }
}
