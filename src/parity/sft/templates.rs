use super::{date, integers, read_json, text};
use crate::parity::case::Case;
use crate::parity::compare::Comparison;
use ferrotune_core::data::{
    ChatTemplate, Conversation, Ending, Message, Rendered, SpecialTokens, Tokenizer, mask_of_spans,
};
use ferrotune_core::{Error, Result};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Text, ids and assistant masks of every rendering of every template in the case's folders.
pub(in crate::parity) fn compare(case: &Case) -> Result<Comparison> {
    let mut comparison = Comparison::default();
    let entries = std::fs::read_dir(&case.directory).map_err(Error::read(&case.directory))?;
    let mut folders: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.join("cases.json").is_file())
        .collect();
    folders.sort();
    for folder in folders {
        compare_template(case, &folder, &mut comparison)?;
    }
    Ok(comparison)
}

fn compare_template(case: &Case, folder: &Path, comparison: &mut Comparison) -> Result<()> {
    let path = folder.join("cases.json");
    let recorded = read_json(&path)?;
    let tokenizer = super::named_tokenizer(case, &path, text(&recorded, "tokenizer"))?;
    let special_tokens: BTreeMap<String, String> = ["bos_token", "eos_token"]
        .iter()
        .filter_map(|name| Some(((*name).to_owned(), text(&recorded, name)?.to_owned())))
        .collect();
    let source = folder.join("template.jinja");
    let source = std::fs::read_to_string(&source).map_err(Error::read(&source))?;
    let mut template = ChatTemplate::new(&source, &special_tokens)?;
    let cases = recorded.get("cases").and_then(Value::as_array);
    let cases = cases.map(Vec::as_slice).unwrap_or_default();
    if source.contains("strftime_now") {
        let renderings = cases.iter().filter_map(|case| text(case, "rendered"));
        if let Some(day) = renderings.filter_map(date::latest).max() {
            template = template.with_date(day);
        }
    }
    let folder = folder.file_name().unwrap_or_default().to_string_lossy();
    for (i, case) in cases.iter().enumerate() {
        let name = format!("{folder} case {i}");
        match (render(&template, case, &path)?, text(case, "rendered")) {
            (Ok(rendered), Some(theirs)) => {
                comparison.exact("rendered text", &name, rendered.text == theirs);
                compare_tokens(&tokenizer, &name, &rendered, case, comparison)?;
            }
            (ours, theirs) => {
                let both_raise = ours.is_err() && theirs.is_none();
                comparison.exact("errors", &name, both_raise);
            }
        }
    }
    Ok(())
}

/// A recorded case, rendered; what the template raises is a result too.
fn render(template: &ChatTemplate, case: &Value, path: &Path) -> Result<Result<Rendered>> {
    let messages = case.get("messages").and_then(Value::as_array);
    let messages: Result<Vec<Message>, String> = messages
        .into_iter()
        .flatten()
        .map(Message::from_json)
        .collect();
    let messages = messages.map_err(|message| Error::data(path, None, message))?;
    let kwargs = case.get("kwargs").and_then(Value::as_object);
    let mut variables: Map<String, Value> = kwargs.cloned().unwrap_or_default();
    let tools = variables.remove("tools");
    let continues = variables.remove("continue_final_message");
    let ending = match (continues, case.get("add_generation_prompt")) {
        (Some(Value::Bool(true)), _) => Ending::ContinueFinalMessage,
        (_, Some(Value::Bool(true))) => Ending::GenerationPrompt,
        _ => Ending::Closed,
    };
    Ok(template.render(&Conversation {
        messages: &messages,
        tools: tools.as_ref(),
        variables: &variables,
        ending,
    }))
}

fn compare_tokens(
    tokenizer: &Tokenizer,
    name: &str,
    rendered: &Rendered,
    case: &Value,
    comparison: &mut Comparison,
) -> Result<()> {
    let Some(ids) = case.get("input_ids") else {
        return Ok(());
    };
    let encoded = tokenizer.encode_with_offsets(&rendered.text, SpecialTokens::Omit)?;
    comparison.exact("ids", name, json!(encoded.ids) == *ids);
    if let Some(mask) = case.get("assistant_masks") {
        let ours = mask_of_spans(&encoded, &rendered.assistant_spans);
        let ours: Vec<i64> = ours.into_iter().map(i64::from).collect();
        comparison.exact("assistant masks", name, ours == integers(mask));
    }
    Ok(())
}
