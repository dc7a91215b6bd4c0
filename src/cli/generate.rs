use super::asked::{self, Asked, Place};
use super::chat::{ModelArgs, SamplingArgs};
use super::{Failure, Outcome, print_line};
use ferrotune::TextModel;
use ferrotune::core::data::{Message, Prompt, read_columns};
use ferrotune::core::{Error, ExitCode, Result};
use ferrotune::generate::Question;
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
    /// JSON Lines, plain, gzip or zstd, or parquet, of `prompt` (a string is plain text, as in training) or of `messages`;
    /// `adapter` names the one of several that is to answer, all of them otherwise
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
    let mut model = args.model.load()?;
    let names: Vec<String> = model.adapters().map(str::to_owned).collect();
    if args.model.is_several() {
        check_names(&model, &rows)?;
    }
    let mut asked: Vec<(Asked, Question)> = Vec::new();
    for (voice, name) in names.iter().enumerate() {
        model.set_adapter(name)?;
        let typed = args.prompt.iter().zip(1..).map(|(text, n)| Asked {
            prompt: if args.raw {
                Prompt::Text(text.clone())
            } else {
                model.prompt(text)
            },
            place: Place::CommandLine(n),
        });
        let own = |row: &&Row| {
            let adapter = row.adapter.as_deref();
            !args.model.is_several() || adapter.is_none_or(|adapter| adapter == name)
        };
        let own = rows.iter().filter(own).map(|row| row.asked.clone());
        let own: Vec<Asked> = typed.chain(own).collect();
        let all: Vec<&Asked> = own.iter().collect();
        let ids = asked::encode(&model, &all, options.max_new_tokens)?;
        let questions = ids.into_iter().map(|ids| Question { voice, ids });
        asked.extend(own.into_iter().zip(questions));
    }
    // What was asked once stays together, whoever answers.
    asked.sort_by(|(one, _), (other, _)| one.place.cmp(&other.place));
    let questions: Vec<Question> = asked.iter().map(|(_, question)| question.clone()).collect();
    let answers = model.answer_together(&questions, &options)?;
    let mut before = None;
    for ((Asked { prompt, place }, question), answer) in asked.iter().zip(&answers) {
        let adapter = (args.model.is_several()).then(|| names[question.voice].as_str());
        if args.json {
            print_line(json_line(prompt, adapter, answer))?;
            continue;
        }
        if before.replace(place) != Some(place) {
            print_line(format_args!("> {}", prompt.last_text()))?;
        }
        match adapter {
            Some(name) => print_line(format_args!("[{name}] {answer}\n"))?,
            None => print_line(format_args!("{answer}\n"))?,
        }
    }
    Ok(ExitCode::Done)
}

/// A row of the prompts file.
struct Row {
    asked: Asked,
    /// Who is to answer, where several can: `adapter`.
    adapter: Option<String>,
}

/// Every row is for adapters that are there.
fn check_names(model: &TextModel, rows: &[Row]) -> Result<()> {
    for row in rows {
        if let (Some(name), Place::Line(path, line)) = (&row.adapter, &row.asked.place) {
            model.place_of(name).map_err(|e| e.in_row(path, *line))?;
        }
    }
    Ok(())
}

/// The prompt under the name of its column, and the answer.
fn json_line(prompt: &Prompt, adapter: Option<&str>, answer: &str) -> Value {
    let mut line = match prompt {
        Prompt::Text(text) => json!({ "prompt": text, "answer": answer }),
        Prompt::Chat { messages, .. } => {
            let messages: Vec<_> = messages.iter().map(Message::fields).collect();
            json!({ "messages": messages, "answer": answer })
        }
    };
    if let Some(adapter) = adapter {
        line["adapter"] = json!(adapter);
    }
    line
}

fn read_prompts(path: &Path) -> Result<Vec<Row>> {
    let shared: Arc<Path> = Arc::from(path);
    let read = |row: Result<(u64, Map<String, Value>)>| {
        let (line, row) = row?;
        let prompt = Prompt::from_row(&row);
        let prompt = prompt.map_err(|message| Error::data(path, line, message))?;
        let place = Place::Line(Arc::clone(&shared), line);
        let adapter = match row.get("adapter") {
            None | Some(Value::Null) => None,
            Some(Value::String(name)) => Some(name.clone()),
            Some(_) => {
                let message = "`adapter` is the name of one, a text";
                return Err(Error::data(path, line, message));
            }
        };
        let asked = Asked { prompt, place };
        Ok(Row { asked, adapter })
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
