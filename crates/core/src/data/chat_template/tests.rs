use super::{ChatTemplate, Conversation, Ending};
use crate::data::fixtures::{folders, read_json, report, roots};
use crate::data::record::Message;
use serde_json::{Map, Value};
use std::path::Path;

/// 2026-11-23, the day on which the recorded cases that print a date were made.
const RECORDED_DATE: i64 = 1_795_392_000;

fn read_template(folder: &Path, cases: &Value) -> ChatTemplate {
    let source =
        std::fs::read_to_string(folder.join("template.jinja")).expect("the template is readable");
    let special_tokens = ["bos_token", "eos_token"]
        .iter()
        .filter_map(|name| Some(((*name).to_owned(), cases[*name].as_str()?.to_owned())))
        .collect();
    ChatTemplate::new(&source, &special_tokens)
        .expect("the template compiles")
        .with_date(RECORDED_DATE)
}

fn render_case(template: &ChatTemplate, case: &Value) -> Result<super::Rendered, String> {
    let messages: Vec<Message> = case["messages"]
        .as_array()
        .expect("messages are a list")
        .iter()
        .map(|m| Message::from_json(m).expect("the message is well formed"))
        .collect();
    let mut variables: Map<String, Value> = case["kwargs"].as_object().cloned().unwrap_or_default();
    let tools = variables.remove("tools");
    let ending = if variables.remove("continue_final_message").is_some() {
        Ending::ContinueFinalMessage
    } else if case["add_generation_prompt"] == true {
        Ending::GenerationPrompt
    } else {
        Ending::Closed
    };
    template
        .render(&Conversation {
            messages: &messages,
            tools: tools.as_ref(),
            variables: &variables,
            ending,
        })
        .map_err(|e| e.to_string())
}

#[test]
fn renderings_match_transformers() {
    for root in roots("chat templates") {
        let (mut cases_run, mut failures) = (0, Vec::new());
        let folders = folders(&root.join("chat_templates"));
        for folder in &folders {
            let cases = read_json(&folder.join("cases.json"));
            let template = read_template(folder, &cases);
            for (i, case) in cases["cases"].as_array().into_iter().flatten().enumerate() {
                cases_run += 1;
                let name = format!("{} case {i}", folder.display());
                match (render_case(&template, case), case["rendered"].as_str()) {
                    (Ok(found), Some(expected)) if found.text == expected => {}
                    (Ok(found), Some(expected)) => {
                        failures.push(format!("{name}:\n  {:?}\n  {expected:?}", found.text));
                    }
                    (Ok(found), None) => failures.push(format!(
                        "{name}: rendered {:?}, transformers raises {}",
                        found.text, case["error"]
                    )),
                    (Err(e), Some(_)) => failures.push(format!("{name}: {e}")),
                    (Err(_), None) => {}
                }
            }
        }
        report(&format!(
            "{} of {cases_run} cases of {} templates match",
            cases_run - failures.len(),
            folders.len()
        ));
        assert!(cases_run > 100, "{cases_run} cases in {}", root.display());
        assert!(failures.is_empty(), "{}", failures.join("\n"));
    }
}
