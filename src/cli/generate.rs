use super::chat::{ModelArgs, SamplingArgs};
use super::{Failure, Outcome};
use ferrotune::core::data::jsonl::{JsonLines, Line, parse_object};
use ferrotune::core::data::{Message, Prompt};
use ferrotune::core::{Error, ExitCode, Result};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

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
    /// JSON Lines of `prompt` (a string is plain text, as in training) or of `messages`
    #[arg(long)]
    prompts_file: Option<PathBuf>,
    /// One JSON line per answer
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Outcome {
    let rows = match &args.prompts_file {
        Some(path) => read_prompts(path)?,
        None => Vec::new(),
    };
    if args.prompt.is_empty() && rows.is_empty() {
        return Err(Failure::Usage(
            "nothing to answer; give --prompt or --prompts-file".into(),
        ));
    }
    let options = args.sampling.options()?;
    let model = args.model.load()?;
    let typed = args.prompt.iter().map(|text| {
        if args.raw {
            Prompt::Text(text.clone())
        } else {
            model.prompt(text)
        }
    });
    let prompts: Vec<Prompt> = typed.chain(rows).collect();
    let ids = prompts
        .iter()
        .map(|p| model.encode(p))
        .collect::<Result<Vec<_>>>()?;
    let answers = model.answer(&ids, &options)?;
    for (prompt, answer) in prompts.iter().zip(&answers) {
        if args.json {
            println!("{}", json_line(prompt, answer));
        } else {
            println!("> {}\n{answer}\n", prompt.last_text());
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

fn read_prompts(path: &Path) -> Result<Vec<Prompt>> {
    let read = |line: Result<Line>| {
        let line = line?;
        let row = parse_object(path, &line)?;
        Prompt::from_row(&row).map_err(|message| Error::data(path, line.number, message))
    };
    JsonLines::open(path)?.map(read).collect()
}
