//! Keys of an `adapter_config.json` that nobody here knows: of a newer PEFT, or mistyped.
//!
//! PEFT ignores them with a warning. Ignored is here, too, what can be off: null, false, zero and what is empty, without
//! a word, and numbers and names, which new settings have as defaults, with a warning. An error is what asks for
//! something: a known key mistyped, and `true`, a list or an object, which switch a feature on whose absence would give
//! another model.

use ferrotune_core::{Error, Result, suggest};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Whether `value` switches nothing on: null, false, 0, an empty list, object or text, or `"none"`.
pub(crate) fn is_off(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(on) => !on,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty() || text == "none",
        Value::Array(items) => items.is_empty(),
        Value::Object(entries) => entries.is_empty(),
    }
}

/// Judges `key`, which is none of `known`.
///
/// # Errors
/// [`Error::Adapter`] naming key, value and the nearest key, if it asks for something.
pub(crate) fn judge(path: &Path, key: &str, value: &Value, known: &[&str]) -> Result<()> {
    if is_off(value) {
        return Ok(());
    }
    if let Some(meant) = suggest::misspelt(key, known.iter().copied()) {
        let message =
            format!("`{key}` is {value}, and no key of this method; did you mean `{meant}`?");
        return Err(Error::adapter(path, message));
    }
    let near = suggest::did_you_mean(key, known.iter().copied());
    if let Value::Bool(_) | Value::Array(_) | Value::Object(_) = value {
        let message = format!(
            "`{key}` is {value}, and not known here{near}; of a newer PEFT, it may switch on what is not supported, and \
             ignoring it would give a different model. If it changes nothing, take it out"
        );
        return Err(Error::adapter(path, message));
    }
    if is_news(path, key) {
        tracing::warn!(
            path = %path.display(),
            key,
            %value,
            "unknown key ignored{near}; it may come from a newer PEFT"
        );
    }
    Ok(())
}

/// Whether this process has said nothing of `key` in this file yet: a file is read more than once.
fn is_news(path: &Path, key: &str) -> bool {
    static SAID: Mutex<BTreeSet<(PathBuf, String)>> = Mutex::new(BTreeSet::new());
    let said = (path.to_path_buf(), key.to_owned());
    // A poisoned lock costs one more note at most.
    SAID.lock().map_or(true, |mut all| all.insert(said))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_unknown_key_is_news_once_per_file() {
        let (a, b) = (
            Path::new("a/adapter_config.json"),
            Path::new("b/adapter_config.json"),
        );
        let asked = [(a, "x"), (a, "x"), (a, "y"), (b, "x"), (b, "x")];
        let news = asked.map(|(path, key)| is_news(path, key));
        assert_eq!(news, [true, false, true, true, false]);
    }

    #[test]
    fn what_asks_for_something_is_refused_with_the_nearest_key() {
        let known = ["target_modules", "use_rslora", "r"];
        let judged = |key, value: Value| judge(Path::new("c.json"), key, &value, &known);
        for (key, value, part) in [
            ("use_rslroa", json!(true), "did you mean `use_rslora`?"),
            (
                "target_moduls",
                json!("q_proj"),
                "did you mean `target_modules`?",
            ),
            ("rr", json!(4), "did you mean `r`?"),
            ("target_paramters", json!(["x"]), "switch on"),
            ("a_feature_of_tomorrow", json!(true), "take it out"),
            ("b_config", json!({"a": 1}), "take it out"),
        ] {
            let error = judged(key, value.clone()).expect_err(key).to_string();
            for part in ["c.json", &format!("`{key}` is {value}"), part] {
                assert!(error.contains(part), "`{part}` is not in: {error}");
            }
        }
        for (key, value) in [
            ("use_rslroa", json!(false)),
            ("target_moduls", json!(null)),
            ("a_feature_of_tomorrow", json!([])),
            ("a_group_size_of_tomorrow", json!(16)),
            ("a_library_of_tomorrow", json!("megatron.core")),
        ] {
            judged(key, value).expect(key);
        }
    }
}
