use super::source::{OURS, TRANSFORMERS, TRL_SCRIPT, TRL_SFT};
use crate::config::section::section;
use crate::config::value::choices;
use std::collections::BTreeMap;

choices! {
    /// How rows are packed into blocks of `max_length` tokens.
    PackingStrategy {
        /// Best fit decreasing; rows longer than a block are truncated.
        Bfd = "bfd",
        /// Best fit decreasing; rows longer than a block are split.
        BfdSplit = "bfd_split",
        /// Rows are concatenated and cut every `max_length` tokens, and see those before them: for
        /// pre-training on text alone.
        Wrapped = "wrapped",
    }
}

choices! {
    /// Which end of a row that is too long is kept.
    TruncationMode {
        /// The beginning.
        KeepStart = "keep_start",
        /// The end.
        KeepEnd = "keep_end",
    }
}

choices! {
    /// What happens to a row that cannot be used.
    BadRows {
        /// The run ends with its file, its line and the reason.
        Error = "error",
        /// It is left out; how many, and the first of them, are reported.
        Skip = "skip",
    }
}

choices! {
    /// In which order an epoch visits the rows.
    SamplingStrategy {
        /// A new permutation each epoch, a function of the seed.
        Random = "random",
        /// The order of the files.
        Sequential = "sequential",
    }
}

section! {
    /// Which rows, how they become tokens, how many at a time.
    DataArguments, "data" {
        /// Training data: a local file of rows (JSON Lines, plain or as .gz or .zst, or parquet), a
        /// directory with one per split, a name on the Hugging Face hub (owner/name, or owner/name@revision), or
        /// a list of them.
        dataset_name: Vec<String> = Vec::new(), TRL_SCRIPT;
        /// Split of a dataset directory to train on (`train.jsonl`).
        dataset_train_split: String = "train".to_owned(), TRL_SCRIPT;
        /// Split of a dataset directory to evaluate on (`test.jsonl`).
        dataset_test_split: String = "test".to_owned(), TRL_SCRIPT;
        /// Training file or files, in addition to `dataset_name`.
        train_file: Vec<String> = Vec::new(), OURS;
        /// How often the rows of each training file are taken, in the order of `dataset_name` and
        /// `train_file`: 2 for twice, 0.5 for a half chosen by the seed; empty for once each.
        dataset_weights: Vec<f64> = Vec::new(), OURS;
        /// Evaluation file or files.
        eval_file: Vec<String> = Vec::new(), OURS;
        /// Share of the training rows to evaluate on instead, if there is no evaluation file. Which
        /// rows depends on what they say, not on where they are.
        test_split_size: f64 = 0.0, TRL_SCRIPT;
        /// Columns to rename before rows are read, such as {question: prompt, answer: completion}.
        dataset_columns: BTreeMap<String, String> = BTreeMap::new(), OURS;
        /// What happens to a row that cannot be used: error or skip.
        bad_rows: BadRows = BadRows::Error, OURS;
        /// Directory that keeps prepared rows in files, one for each combination of files, tokenizer, template and
        /// settings. Tokens stay in the file, so that rows may be larger than memory; null to prepare them in
        /// memory for every run.
        dataset_cache_dir: Option<String> = None, OURS;
        /// Field of a row that holds plain text.
        dataset_text_field: String = "text".to_owned(), TRL_SFT;
        /// Token that ends a sequence; null for the tokenizer's.
        eos_token: Option<String> = None, TRL_SFT;
        /// Accepted where it is a token of the vocabulary: no batch is ever padded.
        pad_token: Option<String> = None, TRL_SFT;
        /// Jinja file, or directory of a tokenizer, whose chat template replaces the model's.
        chat_template_path: Option<String> = None, TRL_SFT;
        /// Longest sequence in tokens, longer rows are cut; null for no limit. With packing, the size
        /// of a block.
        max_length: Option<usize> = Some(1024), TRL_SFT;
        /// Which end of a row that is too long is kept: keep_start or keep_end. Packing always keeps the start.
        truncation_mode: TruncationMode = TruncationMode::KeepStart, TRL_SFT;
        /// Pack several rows into one block; rows never see each other, unless `wrapped`.
        packing: bool = false, TRL_SFT;
        /// How rows are packed: bfd, bfd_split or wrapped.
        packing_strategy: PackingStrategy = PackingStrategy::Bfd, TRL_SFT;
        /// Pack the evaluation rows; null for the same as `packing`.
        eval_packing: Option<bool> = None, TRL_SFT;
        /// Accepted either way: no batch is ever padded.
        padding_free: bool = false, TRL_SFT;
        /// Train on completions only; null means yes for rows of prompt and completion.
        completion_only_loss: Option<bool> = None, TRL_SFT;
        /// Train on the assistant's turns only.
        assistant_only_loss: bool = false, TRL_SFT;
        /// Shuffle the rows once before anything else.
        shuffle_dataset: bool = false, TRL_SFT;
        /// Order of the rows in an epoch: random or sequential.
        train_sampling_strategy: SamplingStrategy = SamplingStrategy::Random, TRANSFORMERS;
        /// Rows (or packed blocks) per micro-batch and rank.
        per_device_train_batch_size: usize = 8, TRANSFORMERS;
        /// Rows (or packed blocks) per evaluation batch and rank.
        per_device_eval_batch_size: usize = 8, TRANSFORMERS;
    }
}

impl DataArguments {
    /// Whether the evaluation rows are packed.
    #[must_use]
    pub fn packs_evaluation(&self) -> bool {
        self.eval_packing.unwrap_or(self.packing)
    }
}
