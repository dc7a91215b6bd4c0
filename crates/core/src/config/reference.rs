//! The table of keys for readers: JSON schema and documentation.

use super::foreign::FOREIGN_KEYS;
use super::{ALIASES, TrainConfig, adapters};
use serde_json::{Map, Value, json};
use std::fmt::Write;

/// JSON schema (draft 2020-12) of a configuration file, for editors and `config-schema`.
#[must_use]
pub fn json_schema() -> Value {
    let mut properties = Map::new();
    for key in TrainConfig::keys() {
        let mut schema = key.schema.as_object().cloned().unwrap_or_default();
        schema.insert("description".to_owned(), json!(key.doc));
        schema.insert("default".to_owned(), key.default);
        properties.insert(key.name.to_owned(), Value::Object(schema));
    }
    for (alias, name) in ALIASES {
        let mut schema = properties[name].as_object().cloned().unwrap_or_default();
        schema.insert(
            "description".to_owned(),
            json!(format!("Another name for {name}.")),
        );
        schema.insert("deprecated".to_owned(), json!(true));
        properties.insert(alias.to_owned(), Value::Object(schema));
    }
    for key in FOREIGN_KEYS {
        properties.insert(key.name.to_owned(), json!({"description": key.doc()}));
    }
    let adapters = json!({
        "description": "Several runs over one base, each with its name and what it has for itself.",
        "type": "array",
        "items": {
            "type": "object",
            "properties": { "name": { "type": "string" } },
            "required": ["name"],
        },
    });
    properties.insert(adapters::KEY.to_owned(), adapters);
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "ferrotune training configuration",
        "type": "object",
        "properties": properties,
        "additionalProperties": false,
    })
}

/// What the reference begins with.
const MARKDOWN_INTRODUCTION: &str = "\
# Configuration keys

A configuration is one flat YAML mapping. `--key value` on the command line overrides a key: a list
may be several words or one with commas, a bare `--key` is true. An unknown key is an error that names
the nearest known one. This page is what `ferrotune config-schema --markdown` prints; `ferrotune
config-schema` prints a JSON schema for editors.

`adapters` is a list of mappings of these keys, each with a `name`: several runs over one base ([several.md](several.md)).
";

/// The reference of all keys as Markdown: a table per section, then the keys without a field.
#[must_use]
pub fn markdown_reference() -> String {
    let mut text = MARKDOWN_INTRODUCTION.to_owned();
    let mut section = "";
    for key in TrainConfig::keys() {
        if key.section != section {
            section = key.section;
            text += &format!(
                "\n## {section}\n\n| key | default | source of the default | meaning |\n|---|---|---|---|\n"
            );
        }
        let (name, default, source) = (key.name, key.default, key.default_source);
        text += &format!("| `{name}` | `{default}` | {source} | {} |\n", key.doc);
    }
    text += "\n## Accepted for compatibility\n\n| key | meaning |\n|---|---|\n";
    for key in FOREIGN_KEYS {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "| `{}` | {} |", key.name, key.doc());
    }
    text
}
