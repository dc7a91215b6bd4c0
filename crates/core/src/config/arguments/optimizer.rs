use super::source::{OURS, PEFT, TRANSFORMERS, TRL_SFT};
use crate::config::section::section;
use crate::config::value::choices;

choices! {
    /// The optimizer. Both names mean the same AdamW here.
    Optim {
        /// AdamW.
        AdamwTorch = "adamw_torch",
        /// AdamW, Transformers' default name.
        AdamwTorchFused = "adamw_torch_fused",
    }
}

section! {
    /// How gradients become an update.
    OptimizerArguments, "optimizer" {
        /// The optimizer: adamw_torch or adamw_torch_fused, both this engine's AdamW.
        optim: Optim = Optim::AdamwTorchFused, TRANSFORMERS;
        /// Peak learning rate.
        learning_rate: f64 = 2e-5, TRL_SFT;
        /// Decoupled weight decay, on every trained weight but biases and norms.
        weight_decay: f64 = 0.0, TRANSFORMERS;
        /// Decay of the first moment.
        adam_beta1: f64 = 0.9, TRANSFORMERS;
        /// Decay of the second moment.
        adam_beta2: f64 = 0.999, TRANSFORMERS;
        /// Added to the root of the second moment.
        adam_epsilon: f64 = 1e-8, TRANSFORMERS;
        /// Share of each target's probability that is spread evenly over the vocabulary.
        label_smoothing_factor: f64 = 0.0, TRANSFORMERS;
        /// NEFTune: uniform noise on embeddings in training, at most this over the root of tokens times width, with
        /// the tokens of each document, packed or not; null or 0 for none. The paper uses 5.
        neftune_noise_alpha: Option<f64> = None, TRANSFORMERS;
        /// LoRA-FA: A stays as it starts, and the gradient of B is brought as near as can be to that of a full update.
        use_lora_fa: bool = false, OURS;
        /// LoRA+: learning rate of B over that of A; null for the same. The paper suggests 16.
        loraplus_lr_ratio: Option<f64> = None, OURS;
        /// LoRA+: learning rate of an adapted embedding, before the schedule's factor.
        loraplus_lr_embedding: f64 = 1e-6, PEFT;
        /// Largest L2 norm of the gradient, larger ones are scaled down; 0 for no clipping.
        max_grad_norm: f64 = 1.0, TRANSFORMERS;
        /// Micro-batches per optimizer step and rank.
        gradient_accumulation_steps: usize = 1, TRANSFORMERS;
    }
}
