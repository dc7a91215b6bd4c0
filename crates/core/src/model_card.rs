//! The model card: `README.md` of an output directory.
//!
//! Names in it come from configuration files and data sets, so each is escaped for where it stands:
//! YAML strings in the front matter, Python strings in code, text in tables.

use serde_json::json;

/// What an output directory holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Artifact {
    /// A PEFT adapter.
    Adapter,
    /// A whole model.
    Model,
}

/// Facts about a training run, for its card.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelCard {
    /// What was trained.
    pub artifact: Artifact,
    /// Title of the card, such as the name of the output directory.
    pub name: String,
    /// Base model, as configured.
    pub base_model: String,
    /// Where peft would find the result; the output directory or a hub name.
    pub location: String,
    /// Data sets, as configured.
    pub datasets: Vec<String>,
    /// More tags, beside the ones every card has.
    pub tags: Vec<String>,
    /// Whether the base has a chat template, which the example then uses.
    pub prompt_style: PromptStyle,
    /// Facts about training, name and value, in the order shown.
    pub facts: Vec<(String, String)>,
    /// Version of ferrotune.
    pub version: String,
}

/// How the card's example asks the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PromptStyle {
    /// Through the chat template.
    Chat,
    /// As plain text.
    Text,
    /// As plain text, for which of this many classes it is of.
    Classes(usize),
}

/// A JSON string, which is a double-quoted YAML scalar and a Python string as well.
///
/// Control and invisible characters beyond JSON's own are escaped too, so that no name can end a
/// line or change the direction of text.
fn quoted(text: &str) -> String {
    let mut quoted = String::new();
    for character in json!(text).to_string().chars() {
        let invisible = character.is_control()
            || matches!(character, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}');
        if invisible {
            quoted += &format!("\\u{:04x}", character as u32);
        } else {
            quoted.push(character);
        }
    }
    quoted
}

/// Text for a Markdown line or table cell: one line, no markup, no HTML.
fn plain(text: &str) -> String {
    let mut escaped = String::new();
    for character in text.chars() {
        match character {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '\\' | '|' | '`' | '*' | '_' | '[' | ']' | '#' | '!' | '$' | '~' => {
                escaped.push('\\');
                escaped.push(character);
            }
            c if c.is_control()
                || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}') =>
            {
                escaped.push(' ');
            }
            c => escaped.push(c),
        }
    }
    escaped
}

impl ModelCard {
    /// The text of the card.
    #[must_use]
    pub fn render(&self) -> String {
        [
            self.front_matter(),
            self.introduction(),
            self.quick_start(),
            self.training(),
        ]
        .join("\n")
    }

    fn front_matter(&self) -> String {
        let (library, mut tags) = match self.artifact {
            Artifact::Adapter => ("peft", vec!["lora"]),
            Artifact::Model => ("transformers", vec![]),
        };
        let (task, training) = match self.prompt_style {
            PromptStyle::Classes(_) => ("text-classification", None),
            PromptStyle::Chat | PromptStyle::Text => ("text-generation", Some("sft")),
        };
        tags.extend(training.into_iter().chain(["ferrotune"]));
        tags.extend(self.tags.iter().map(String::as_str));
        let mut text = format!(
            "---\nlibrary_name: {library}\npipeline_tag: {task}\nbase_model: {}\n",
            quoted(&self.base_model)
        );
        if !self.datasets.is_empty() {
            text += &format!(
                "datasets:\n{}",
                items(self.datasets.iter().map(String::as_str))
            );
        }
        text += &format!("tags:\n{}---\n", items(tags));
        text
    }

    fn introduction(&self) -> String {
        let what = match self.artifact {
            Artifact::Adapter => "A PEFT adapter for",
            Artifact::Model => "A fine-tuned version of",
        };
        let (name, base) = (plain(&self.name), plain(&self.base_model));
        format!("# {name}\n\n{what} {base}, trained with ferrotune.\n")
    }

    fn quick_start(&self) -> String {
        let base = quoted(&self.base_model);
        let location = quoted(&self.location);
        let (class, classes) = match self.prompt_style {
            PromptStyle::Classes(classes) => {
                let classes = format!(", num_labels={classes}");
                ("AutoModelForSequenceClassification", classes)
            }
            PromptStyle::Chat | PromptStyle::Text => ("AutoModelForCausalLM", String::new()),
        };
        let load = match self.artifact {
            Artifact::Adapter => format!(
                "from peft import PeftModel\n\
                 from transformers import {class}, AutoTokenizer\n\n\
                 base = {class}.from_pretrained({base}{classes})\n\
                 model = PeftModel.from_pretrained(base, {location})\n"
            ),
            Artifact::Model => format!(
                "from transformers import {class}, AutoTokenizer\n\n\
                 model = {class}.from_pretrained({location})\n"
            ),
        };
        let ask = match self.prompt_style {
            PromptStyle::Chat => {
                "messages = [{\"role\": \"user\", \"content\": \"Hello!\"}]\n\
                 inputs = tokenizer.apply_chat_template(\n    \
                 messages, add_generation_prompt=True, return_tensors=\"pt\", return_dict=True\n)\n"
            }
            PromptStyle::Text | PromptStyle::Classes(_) => {
                "inputs = tokenizer(\"Hello\", return_tensors=\"pt\")\n"
            }
        };
        let answer = match self.prompt_style {
            PromptStyle::Classes(_) => "print(model(**inputs).logits.argmax(-1).item())\n",
            PromptStyle::Chat | PromptStyle::Text => {
                "output = model.generate(**inputs, max_new_tokens=64)\n\
                 print(tokenizer.decode(output[0][inputs[\"input_ids\"].shape[1]:], skip_special_tokens=True))\n"
            }
        };
        format!(
            "## Quick start\n\n```python\n{load}\
             tokenizer = AutoTokenizer.from_pretrained({location})\n\n{ask}{answer}```\n"
        )
    }

    fn training(&self) -> String {
        let mut text = "## Training\n\n| | |\n|---|---|\n".to_owned();
        for (name, value) in &self.facts {
            text += &format!("| {} | {} |\n", plain(name), plain(value));
        }
        text + &format!("| ferrotune | {} |\n", plain(&self.version))
    }
}

/// A YAML block list of quoted strings.
fn items<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let names = names.into_iter();
    names.map(|name| format!("- {}\n", quoted(name))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn card(name: &str) -> ModelCard {
        ModelCard {
            artifact: Artifact::Adapter,
            name: name.to_owned(),
            base_model: name.to_owned(),
            location: name.to_owned(),
            datasets: vec![name.to_owned()],
            tags: vec![name.to_owned()],
            prompt_style: PromptStyle::Chat,
            facts: vec![("loss".to_owned(), name.to_owned())],
            version: "0.1.0".to_owned(),
        }
    }

    fn front_matter(text: &str) -> Value {
        let yaml = text.strip_prefix("---\n").unwrap();
        let (yaml, _) = yaml.split_once("\n---\n").unwrap();
        serde_saphyr::from_str(yaml).unwrap()
    }

    #[test]
    fn the_card_has_the_hub_s_metadata_and_a_peft_example() {
        let text = card("org/base").render();
        let metadata = front_matter(&text);
        assert_eq!(metadata["library_name"], "peft");
        assert_eq!(metadata["pipeline_tag"], "text-generation");
        assert_eq!(metadata["base_model"], "org/base");
        assert_eq!(metadata["datasets"], json!(["org/base"]));
        assert_eq!(
            metadata["tags"],
            json!(["lora", "sft", "ferrotune", "org/base"])
        );
        assert!(text.contains("PeftModel.from_pretrained(base, \"org/base\")"));
        assert!(text.contains("| loss | org/base |"));
    }

    #[test]
    fn a_full_model_is_loaded_without_peft() {
        let mut card = card("out");
        card.artifact = Artifact::Model;
        let text = card.render();
        assert_eq!(front_matter(&text)["library_name"], "transformers");
        assert!(!text.contains("peft"));
    }

    #[test]
    fn a_classifier_is_asked_for_a_class() {
        let mut card = card("out");
        card.prompt_style = PromptStyle::Classes(3);
        let text = card.render();
        assert_eq!(front_matter(&text)["pipeline_tag"], "text-classification");
        assert!(
            text.contains(
                "AutoModelForSequenceClassification.from_pretrained(\"out\", num_labels=3)"
            )
        );
        assert!(!text.contains("generate"));
    }

    #[test]
    fn names_cannot_break_out_of_yaml_python_or_the_table() {
        for name in [
            "a\n---\nlicense: evil",
            "x\"]\nimport os  # ",
            "```\n<script>alert(1)</script> | b",
            "a\u{2028}b\u{85}c\u{202e}d",
            "*star*: [no]\t\u{7f}\\",
        ] {
            let text = card(name).render();
            let metadata = front_matter(&text);
            assert_eq!(metadata["base_model"], name, "{text}");
            assert_eq!(metadata["datasets"], json!([name]));
            assert_eq!(metadata.as_object().unwrap().len(), 5);
            // The structure is that of a harmless card: same lines, same fences, no new HTML.
            let harmless = card("x").render();
            assert_eq!(text.lines().count(), harmless.lines().count());
            assert_eq!(text.lines().filter(|l| l.starts_with("```")).count(), 2);
            let outside_code: String = text.split("```").step_by(2).collect();
            let body = outside_code.split("\n---\n").nth(1).unwrap_or_default();
            assert!(!body.contains('<'), "{body}");
            assert!(!text.contains(['\u{2028}', '\u{85}', '\u{202e}']));
        }
    }
}
