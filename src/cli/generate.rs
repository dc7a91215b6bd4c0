use super::chat::{ModelArgs, SamplingArgs};
use super::{Failure, Outcome};
use ferrotune::core::data::jsonl::{JsonLines, parse_object};
use ferrotune::core::data::{Message, Record};
use ferrotune::core::{Error, ExitCode};
use std::path::{Path, PathBuf};

/// Arguments of `generate`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// A prompt; may be given several times
    #[arg(long)]
    prompt: Vec<String>,
    /// JSON Lines of `prompt`, or of `messages` that end with the user
    #[arg(long)]
    prompts_file: Option<PathBuf>,
    /// One JSON line per answer
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Outcome {
    let mut prompts: Vec<Vec<Message>> = args
        .prompt
        .iter()
        .map(|p| vec![Message::new("user", p)])
        .collect();
    if let Some(path) = &args.prompts_file {
        prompts.extend(read_prompts(path)?);
    }
    if prompts.is_empty() {
        return Err(Failure::Usage(
            "nothing to answer; give --prompt or --prompts-file".into(),
        ));
    }
    let options = args.sampling.options()?;
    let chat = args.model.load()?;
    let ids = prompts
        .iter()
        .map(|p| chat.encode(p))
        .collect::<Result<Vec<_>, _>>()?;
    let answers = chat.answer(&ids, &options)?;
    for (prompt, answer) in prompts.iter().zip(&answers) {
        if args.json {
            let messages: Vec<_> = prompt.iter().map(Message::fields).collect();
            println!(
                "{}",
                serde_json::json!({ "messages": messages, "answer": answer })
            );
        } else {
            println!("> {}\n{answer}\n", last_text(prompt));
        }
    }
    Ok(ExitCode::Done)
}

/// What the last message says.
pub(super) fn last_text(messages: &[Message]) -> &str {
    messages
        .last()
        .and_then(|m| m.content()?.as_str())
        .unwrap_or_default()
}

fn read_prompts(path: &Path) -> Result<Vec<Vec<Message>>, Error> {
    let mut prompts = Vec::new();
    for line in JsonLines::open(path)? {
        let line = line?;
        let row = parse_object(path, &line)?;
        let prompt = match row.get("prompt").and_then(|p| p.as_str()) {
            Some(text) => vec![Message::new("user", text)],
            None => messages_of(Record::from_row(&row, "text"), path, line.number)?,
        };
        prompts.push(prompt);
    }
    Ok(prompts)
}

fn messages_of(
    record: Result<Record, String>,
    path: &Path,
    line: u64,
) -> Result<Vec<Message>, Error> {
    match record {
        Ok(Record::Messages { messages, .. }) => Ok(messages),
        Ok(Record::PromptCompletionMessages { prompt, .. }) => Ok(prompt),
        Ok(_) => Err(Error::data(path, line, "expected `prompt` or `messages`")),
        Err(message) => Err(Error::data(path, line, message)),
    }
}
