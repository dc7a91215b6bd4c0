//! Files of recorded environments: a surrounding, and what it means.
//!
//! A file is a list of cases, or an object with one under `fixtures`. A case has `name`, `env`,
//! `host` (`gpus`, `hostname`), perhaps `cli` and `files`, and `expect`: either `error` with the name
//! of a code, or any of the fields that `ferrotune env --json` prints.

use super::{Flags, Host, Surroundings, detect};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// One recorded environment.
#[derive(Clone, Debug, Deserialize)]
pub struct Case {
    /// What it shows.
    pub name: String,
    #[serde(default)]
    env: BTreeMap<String, String>,
    #[serde(default)]
    host: CaseHost,
    #[serde(default)]
    cli: Map<String, Value>,
    #[serde(default)]
    files: BTreeMap<String, String>,
    expect: Map<String, Value>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct CaseHost {
    #[serde(default)]
    gpus: usize,
    #[serde(default)]
    hostname: String,
}

const CASE_KEYS: [&str; 8] = [
    "name", "source", "note", "env", "host", "cli", "files", "expect",
];
const HOST_KEYS: [&str; 3] = ["gpus", "hostname", "cpus"];

/// A misspelt key would be a case that tests something else.
fn known_keys(object: &Value, prefix: &str, known: &[&str]) -> Result<(), String> {
    let mut keys = object.as_object().into_iter().flat_map(Map::keys);
    match keys.find(|key| !known.contains(&key.as_str())) {
        Some(key) => Err(format!(
            "unknown key `{prefix}{key}`{}; expected {}",
            ferrotune_core::suggest::did_you_mean(key, known.iter().copied()),
            known.join(", ")
        )),
        None => Ok(()),
    }
}

/// The cases of a file.
///
/// # Errors
/// Where it is not JSON, or not of this shape.
pub fn parse(text: &str) -> Result<Vec<Case>, String> {
    let whole: Value = serde_json::from_str(text).map_err(|e| e.to_string())?;
    let cases = match whole {
        Value::Object(mut file) => file.remove("fixtures").unwrap_or(Value::Null),
        other => other,
    };
    let Value::Array(cases) = cases else {
        return Err("expected a list of cases, or an object with one under `fixtures`".into());
    };
    if cases.is_empty() {
        return Err("expected at least one case".into());
    }
    let cases = cases.into_iter().enumerate().map(|(i, case)| {
        let name = case["name"].as_str().map(str::to_owned);
        let name = name.unwrap_or_else(|| format!("number {}", i + 1));
        known_keys(&case, "", &CASE_KEYS).map_err(|e| format!("case {name}: {e}"))?;
        known_keys(&case["host"], "host.", &HOST_KEYS).map_err(|e| format!("case {name}: {e}"))?;
        serde_json::from_value(case).map_err(|e| format!("case {name}: {e}"))
    });
    cases.collect()
}

impl Case {
    /// Reads the environment and compares.
    ///
    /// # Errors
    /// What differs from the expectation, in words.
    pub fn check(&self) -> Result<(), String> {
        let around = self.surroundings()?;
        let (found, problem) = match detect(&around) {
            Ok(found) => (found.json(), None),
            Err(error) => (error.json(), Some(error.to_string())),
        };
        let fails = found.get("error");
        if self.expect.get("error") != fails {
            let expected = self.expect.get("error").unwrap_or(&Value::Null);
            let found = problem.unwrap_or_else(|| found.to_string());
            return Err(format!("error: expected {expected}, found {found}"));
        }
        let different = self.expect.iter().filter(|(field, expected)| {
            let found = found.get(*field);
            !found.is_some_and(|found| agrees(field, expected, found))
        });
        let different: Vec<String> = different
            .map(|(field, expected)| match found.get(field) {
                Some(found) => format!("{field}: expected {expected}, found {found}"),
                None => format!("{field}: expected {expected}, but no field has this name"),
            })
            .collect();
        if different.is_empty() {
            Ok(())
        } else {
            Err(different.join("; "))
        }
    }

    fn surroundings(&self) -> Result<Surroundings, String> {
        let mut flags = Flags::default();
        for (name, value) in &self.cli {
            let text = match value {
                Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            let yes = text == "true";
            match name.trim_start_matches("--").replace('-', "_").as_str() {
                "nproc" | "nproc_per_node" => flags.nproc = Some(text),
                "nnodes" => flags.nnodes = Some(text),
                "node_rank" => flags.node_rank = Some(text),
                "master" | "master_addr" => flags.master_addr = Some(text),
                "master_port" => flags.master_port = Some(text),
                "standalone" => flags.standalone = yes,
                "device" => flags.cpu = text == "cpu",
                _ => return Err(format!("cli: unknown flag `{name}`")),
            }
        }
        Ok(Surroundings {
            variables: self.env.clone(),
            host: Host {
                gpus: self.host.gpus,
                gpu_note: None,
                hostname: self.host.hostname.clone(),
            },
            files: self.files.clone(),
            flags,
        })
    }
}

/// Whether a field is as expected. Every expected warning must be there; any free port is null or 0;
/// an IPv6 address may stand in brackets.
fn agrees(field: &str, expected: &Value, found: &Value) -> bool {
    match (field, expected, found) {
        ("warnings", Value::Array(expected), Value::Array(found)) => {
            expected.iter().all(|warning| found.contains(warning))
        }
        ("master_port", expected, Value::Null) => expected.is_null() || expected == 0,
        ("master_addr", Value::String(expected), Value::String(found)) => {
            expected.trim_matches(['[', ']']) == found
        }
        _ => expected == found,
    }
}
