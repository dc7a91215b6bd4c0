//! `demo`: the files under `examples/demo` are in the binary; from there on it is `train`, and
//! `eval --exact_match` before and after, on an ordinary configuration.

use super::exact_match::{Answered, exact_match, questions, read_rows};
use super::train::{self, Voice};
use super::{Failure, Outcome, overrides, print_help_of, print_line, stop};
use ferrotune::TextModel;
use ferrotune::core::config::{Resume, TrainConfig};
use ferrotune::core::io::write_file;
use ferrotune::core::trainer::RunOutcome;
use ferrotune::core::{ExitCode, Result};
use serde_json::json;
use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const CONFIG: &str = include_str!("../../examples/demo/demo.yaml");

/// What is unpacked, by the name it gets there.
const FILES: [(&str, &[u8]); 6] = [
    (
        "base/config.json",
        include_bytes!("../../examples/demo/base/config.json"),
    ),
    (
        "base/tokenizer.json",
        include_bytes!("../../examples/demo/base/tokenizer.json"),
    ),
    (
        "base/tokenizer_config.json",
        include_bytes!("../../examples/demo/base/tokenizer_config.json"),
    ),
    (
        "base/model.safetensors",
        include_bytes!("../../examples/demo/base/model.safetensors"),
    ),
    (
        "train.jsonl",
        include_bytes!("../../examples/demo/train.jsonl"),
    ),
    (
        "test.jsonl",
        include_bytes!("../../examples/demo/test.jsonl"),
    ),
];

/// Answers are six letters; room for a base that does not know where to stop.
const MAX_NEW_TOKENS: usize = 16;
/// Prompts shown side by side.
const SAMPLES: usize = 8;

/// Arguments of `demo`.
#[derive(Debug, clap::Args)]
#[command(after_help = overrides::HELP)]
pub(super) struct Args {
    /// `--key value` for any configuration key, such as --output_dir; also --dry-run and --json
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "--KEY VALUE"
    )]
    overrides: Vec<String>,
}

pub(super) fn run(args: &Args) -> Outcome {
    if overrides::ask_for_help(&args.overrides) {
        return print_help_of("demo");
    }
    let (pairs, switches) = overrides::parse(&args.overrides)?;
    let started = Instant::now();
    let stop = stop::on_signal()?;
    let mut config = TrainConfig::from_yaml(CONFIG, "examples/demo/demo.yaml", &pairs)?;
    // Meant to be tried again and again in one place.
    if config.output.resume_from_checkpoint == Resume::Never {
        config.output.overwrite_output_dir = true;
    }
    let files = unpack(&mut config)?;
    let voice = if switches.json {
        Voice::Machine
    } else {
        Voice::Person
    };
    if switches.dry_run {
        return train::show_plan(config, None, voice);
    }
    let test = files.join("test.jsonl");
    let base = files.join("base");
    say(voice, &introduction(&config))?;
    let before = answers(&base, None, &test)?;
    say(voice, &share("before", &before))?;

    let result = Outputs::of(&config, base);
    let outcome = train::run(config, None, voice, &stop)?;
    if !matches!(outcome, RunOutcome::Finished(_)) {
        return Ok(train::exit_code(&outcome));
    }

    let after = answers(result.model(), result.adapter(), &test)?;
    report(voice, &before, &after, &result, started.elapsed())?;
    // A run that made the model worse is a failure of this program, whatever its loss said.
    let worse = after.score() < before.score();
    Ok(if worse {
        ExitCode::Internal
    } else {
        ExitCode::Done
    })
}

fn report(
    voice: Voice,
    before: &Answered,
    after: &Answered,
    result: &Outputs,
    took: Duration,
) -> Result<()> {
    let seconds = took.as_secs_f64();
    match voice {
        Voice::Person => print_line(format_args!(
            "{}\n\n{}\n{seconds:.0} s in all; the result is in {}\n\n{}",
            share("after", after),
            side_by_side(before, after),
            result.output.display(),
            result.next_commands()
        )),
        Voice::Machine => print_line(json!({
            "event": "demo_finished",
            "exact_match_before": before.score(),
            "exact_match_after": after.score(),
            "prompts": after.questions.len(),
            "seconds": seconds,
            "output_dir": result.output,
            "base": result.base,
        })),
    }
}

/// Writes base and data to `OUTPUT_DIR/demo`, and points the configuration there.
fn unpack(config: &mut TrainConfig) -> Result<PathBuf, Failure> {
    let directory = Path::new(&config.output.output_dir).join("demo");
    let base = directory.join("base");
    std::fs::create_dir_all(&base).map_err(ferrotune::core::Error::write(&base))?;
    for (name, bytes) in FILES {
        write_file(&directory.join(name), bytes)?;
    }
    let text = |path: PathBuf| path.to_string_lossy().into_owned();
    config.model.model_name_or_path = Some(text(base));
    config.data.dataset_name = vec![text(directory.join("train.jsonl"))];
    config.data.eval_file = vec![text(directory.join("test.jsonl"))];
    // The same run again, with `train`.
    write_file(&directory.join("demo.yaml"), config.to_yaml().as_bytes())?;
    Ok(directory)
}

fn answers(model: &Path, adapter: Option<&Path>, test: &Path) -> Result<Answered, Failure> {
    let model = TextModel::load(model, adapter)?;
    let questions = questions(read_rows(&[test.to_path_buf()], "text", usize::MAX)?)?;
    exact_match(&model, questions, MAX_NEW_TOKENS)
}

fn say(voice: Voice, text: &str) -> Result<()> {
    match voice {
        Voice::Person => print_line(text),
        Voice::Machine => Ok(()),
    }
}

fn introduction(config: &TrainConfig) -> String {
    format!(
        "A tiny Llama knows how to copy, rotate and shuffle six letters, but not how to reverse them.\n\
         LoRA teaches it that from 3000 rows of chat; nothing is downloaded, and the CPU is enough.\n\
         It is judged on words it never saw: the whole answer must be right. Files go to {}.\n",
        config.output.output_dir
    )
}

fn share(when: &str, answered: &Answered) -> String {
    format!(
        "exact match {when:<6} {:5.1} % of {} held-out prompts",
        100.0 * answered.score(),
        answered.questions.len()
    )
}

fn side_by_side(before: &Answered, after: &Answered) -> String {
    let mut table = format!(
        "{:<18} {:<18} {:<10} {}\n",
        "prompt", "before", "after", "expected"
    );
    let answers = before.answers.iter().zip(&after.answers);
    for (question, (before, after)) in after.questions.iter().zip(answers).take(SAMPLES) {
        let prompt = question.asked.prompt.last_text();
        table += &format!(
            "{prompt:<18} {before:<18} {after:<10} {}\n",
            question.expected
        );
    }
    table
}

/// Where the run leaves what.
struct Outputs {
    base: PathBuf,
    output: PathBuf,
    is_adapter: bool,
}

impl Outputs {
    fn of(config: &TrainConfig, base: PathBuf) -> Self {
        Self {
            base,
            output: PathBuf::from(&config.output.output_dir),
            is_adapter: config.lora.use_peft,
        }
    }

    /// The directory that holds whole weights.
    fn model(&self) -> &Path {
        if self.is_adapter {
            &self.base
        } else {
            &self.output
        }
    }

    fn adapter(&self) -> Option<&Path> {
        self.is_adapter.then_some(self.output.as_path())
    }

    /// Commands that work as they stand, from where this one was started.
    fn next_commands(&self) -> String {
        let program = std::env::args_os().next().map(PathBuf::from);
        let program = quoted(&program.unwrap_or_else(|| "ferrotune".into()));
        let model = quoted(self.model());
        let ask = "--prompt \"reverse: planet\"";
        let Some(adapter) = self.adapter().map(quoted) else {
            return format!("Next:\n  {program} generate --model_name_or_path {model} {ask}");
        };
        let merged = quoted(&self.output.join("merged"));
        let config = quoted(&self.output.join("demo").join("demo.yaml"));
        format!(
            "Next:\n  \
             {program} generate --model_name_or_path {model} --adapter {adapter} {ask}\n  \
             {program} merge --model_name_or_path {model} --adapter {adapter} --output_dir {merged}\n  \
             {program} generate --model_name_or_path {merged} {ask}\n  \
             {program} plan {config}"
        )
    }
}

/// A path as one word of a shell.
fn quoted(path: &Path) -> String {
    let text: Cow<'_, str> = path.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=:@%,\\".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.into_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}
