//! Questions of a data set, and how many of the answers are exactly those of the data set.

use super::Failure;
use super::asked::{self, Asked, Place};
use ferrotune::TextModel;
use ferrotune::core::data::{Prompt, Row, read_columns};
use ferrotune::core::{Error, Result};
use ferrotune::generate::GenerateOptions;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A prompt and the answer it should get.
pub(super) struct Question {
    pub(super) asked: Asked,
    pub(super) expected: String,
}

/// Questions with what the model answered.
pub(super) struct Answered {
    pub(super) questions: Vec<Question>,
    pub(super) answers: Vec<String>,
}

impl Answered {
    /// Share of answers that are exactly what was expected, spaces around aside.
    pub(super) fn score(&self) -> f64 {
        let right = |(q, a): &(&Question, &String)| q.expected.trim() == a.trim();
        let right = self
            .questions
            .iter()
            .zip(&self.answers)
            .filter(right)
            .count();
        right as f64 / self.questions.len().max(1) as f64
    }
}

/// The first `limit` rows of files, or all.
pub(super) fn read_rows(files: &[PathBuf], text_field: &str, limit: usize) -> Result<Vec<Row>> {
    let (mut rows, mut read) = (Vec::new(), 0);
    for path in files {
        let shared: Arc<Path> = Arc::from(path.as_path());
        for row in read_columns(path)?.take(limit - read) {
            let (line, columns) = row?;
            rows.extend(Row::of_columns(&shared, line, &columns, text_field)?);
            read += 1;
        }
    }
    Ok(rows)
}

/// The prompts of rows with their completions: the last message, or the completion.
pub(super) fn questions(rows: Vec<Row>) -> Result<Vec<Question>> {
    let question = |row: Row| {
        let (prompt, expected) = Prompt::with_answer(row.record).ok_or_else(|| {
            Error::data(&row.path, row.line, "has no prompt and completion; exact match needs `prompt` and `completion`, or `messages` that end with the assistant")
        })?;
        let place = Place::Line(row.path, row.line);
        let asked = Asked { prompt, place };
        Ok(Question { asked, expected })
    };
    rows.into_iter().map(question).collect()
}

/// Answers every question, greedily.
pub(super) fn exact_match(
    model: &TextModel,
    mut questions: Vec<Question>,
    max_new_tokens: usize,
) -> Result<Answered, Failure> {
    let asked: Vec<&Asked> = questions.iter().map(|q| &q.asked).collect();
    let prompts = asked::encode(model, &asked, max_new_tokens)?;
    let greedy = GenerateOptions {
        max_new_tokens,
        batch_size: 64,
        ..GenerateOptions::default()
    };
    let answers = model.answer(&prompts, &greedy)?;
    // A completion may end with the EOS token as text; an answer never shows it.
    let eos = model.tokenizer().eos_token().unwrap_or_default();
    for question in &mut questions {
        if let Some(text) = question.expected.trim_end().strip_suffix(eos) {
            question.expected = text.to_owned();
        }
    }
    Ok(Answered { questions, answers })
}
