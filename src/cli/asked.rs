//! Prompts that know where they were written, so that a fault of one names it.

use super::Failure;
use ferrotune::TextModel;
use ferrotune::core::Error;
use ferrotune::core::data::Prompt;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// Where a prompt was written.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Place {
    /// The n-th `--prompt`, from 1.
    CommandLine(usize),
    /// A line of a file, from 1.
    Line(Arc<Path>, u64),
}

impl Place {
    /// An error about the prompt written here.
    fn error(&self, message: &str) -> Failure {
        match self {
            Self::CommandLine(n) => Error::config(format!("--prompt {n}"), message).into(),
            Self::Line(path, line) => Error::data(path, *line, message).into(),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CommandLine(n) => write!(f, "--prompt {n}"),
            Self::Line(path, line) => write!(f, "{}:{line}", path.display()),
        }
    }
}

/// A prompt and where it was written.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub(super) prompt: Prompt,
    pub(super) place: Place,
}

/// Token ids of every prompt, each of which leaves room for an answer of `max_new_tokens`.
///
/// # Errors
/// What is wrong with a prompt, and its place; [`Error::Config`] if answers may be too long.
pub(super) fn encode(
    model: &TextModel,
    asked: &[&Asked],
    max_new_tokens: usize,
) -> Result<Vec<Vec<u32>>, Failure> {
    let encoded = asked.iter().map(|a| encode_one(model, a));
    let prompts = encoded.collect::<Result<Vec<_>, Failure>>()?;
    check_fits_context(model, asked, &prompts, max_new_tokens)?;
    Ok(prompts)
}

fn encode_one(model: &TextModel, asked: &Asked) -> Result<Vec<u32>, Failure> {
    let encoded = model.encode(&asked.prompt);
    let ids = encoded.map_err(|error| match &asked.place {
        Place::CommandLine(_) => error,
        Place::Line(path, line) => error.in_row(path, *line),
    })?;
    if ids.is_empty() {
        let message = "has no tokens; there is nothing to go on from";
        return Err(match asked.place {
            Place::CommandLine(n) => Failure::Usage(format!("--prompt {n} {message}")),
            Place::Line(..) => asked.place.error(message),
        });
    }
    Ok(ids)
}

fn check_fits_context(
    model: &TextModel,
    asked: &[&Asked],
    prompts: &[Vec<u32>],
    max_new_tokens: usize,
) -> Result<(), Failure> {
    let context = model.model.config().max_position_embeddings;
    let base = model.base.display();
    let count = |limit: usize| prompts.iter().filter(|p| p.len() > limit).count();
    let all = prompts.len();
    // Not even one token would find room: no option helps.
    let hopeless = |p: &&Vec<u32>| p.len() >= context;
    if let Some((prompt, asked)) = prompts.iter().zip(asked).find(|(p, _)| hopeless(p)) {
        return Err(asked.place.error(&format!(
            "the prompt has {} tokens and leaves no room for an answer in the context of {base}, \
             {context} tokens (as do {} of the {all} prompts); shorten it or leave it out",
            prompt.len(),
            count(context - 1)
        )));
    }
    let too_long = count(context.saturating_sub(max_new_tokens));
    let longest = prompts.iter().zip(asked).max_by_key(|(p, _)| p.len());
    match longest {
        Some((prompt, asked)) if too_long > 0 => Err(Failure::from(Error::config(
            "max_new_tokens",
            format!(
                "is {max_new_tokens}, and with it {too_long} of the {all} prompts exceed the context \
                 of {base}, {context} tokens (the longest, {}, has {}); set --max-new-tokens {} or \
                 less, or shorten the prompts",
                asked.place,
                prompt.len(),
                context - prompt.len()
            ),
        ))),
        _ => Ok(()),
    }
}
