use super::asked::{self, Asked, Place};
use super::chat::{ModelArgs, SamplingArgs};
use super::{Failure, Outcome, print_line};
use ferrotune::core::data::{Message, Prompt, read_columns};
use ferrotune::core::{Error, ExitCode, Result};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Arguments of `generate`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// A prompt, the user's message where the model has a chat template; may be given several times
    #[arg(long)]
    prompt: Vec<String>,
    /// Take every --prompt as plain text to go on from, chat template or not
    #[arg(long)]
    raw: bool,
    /// JSON Lines, plain, gzip or zstd, or parquet, of `prompt` (a string is plain text, as in training) or of `messages`
    #[arg(long)]
    prompts_file: Option<PathBuf>,
    /// One JSON line per answer
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Outcome {
    if args.prompt.is_empty() && args.prompts_file.is_none() {
        return Err(Failure::Usage(
            "nothing to answer; give --prompt or --prompts-file".into(),
        ));
    }
    let options = args.sampling.options()?;
    let rows = match &args.prompts_file {
        Some(path) => read_prompts(path)?,
        None => Vec::new(),
    };
    let model = args.model.load()?;
    let typed = args.prompt.iter().zip(1..).map(|(text, n)| Asked {
        prompt: if args.raw {
            Prompt::Text(text.clone())
        } else {
            model.prompt(text)
        },
        place: Place::CommandLine(n),
    });
    let asked: Vec<Asked> = typed.chain(rows).collect();
    let all: Vec<&Asked> = asked.iter().collect();
    let ids = asked::encode(&model, &all, options.max_new_tokens)?;
    let answers = model.answer(&ids, &options)?;
    for (Asked { prompt, .. }, answer) in asked.iter().zip(&answers) {
        if args.json {
            print_line(json_line(prompt, answer))?;
        } else {
            print_line(format_args!("> {}\n{answer}\n", prompt.last_text()))?;
        }
    }
    Ok(ExitCode::Done)
}

/// The prompt under the name of its column, and the answer.
fn json_line(prompt: &Prompt, answer: &str) -> Value {
    match prompt {
        Prompt::Text(text) => json!({ "prompt": text, "answer": answer }),
        Prompt::Chat { messages, .. } => {
            let messages: Vec<_> = messages.iter().map(Message::fields).collect();
            json!({ "messages": messages, "answer": answer })
        }
    }
}

fn read_prompts(path: &Path) -> Result<Vec<Asked>> {
    let shared: Arc<Path> = Arc::from(path);
    let read = |row: Result<(u64, Map<String, Value>)>| {
        let (line, row) = row?;
        let prompt = Prompt::from_row(&row);
        let prompt = prompt.map_err(|message| Error::data(path, line, message))?;
        let place = Place::Line(Arc::clone(&shared), line);
        Ok(Asked { prompt, place })
    };
    let prompts = read_columns(path)?.map(read);
    let prompts = prompts.collect::<Result<Vec<_>>>()?;
    if prompts.is_empty() {
        let message =
            "no prompts; expected one JSON object per line, such as {\"prompt\": \"...\"}";
        return Err(Error::data(path, None, message));
    }
    Ok(prompts)
}
