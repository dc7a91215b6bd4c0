//! Where the tests of this module find recorded cases.

use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// The repository's subset of the recorded SFT cases.
pub(crate) fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/sft")
}

/// Every folder of SFT cases there is: the repository's, and the full set where the environment
/// variable `FERROTUNE_SHARED_FIXTURES` names it. Says which.
pub(crate) fn roots(test: &str) -> Vec<PathBuf> {
    let mut roots = vec![repository()];
    let message = match std::env::var_os("FERROTUNE_SHARED_FIXTURES") {
        Some(shared) => {
            let shared = Path::new(&shared).join("golden/sft");
            assert!(shared.is_dir(), "no directory {}", shared.display());
            let message = format!("{test}: the repository's cases and {}", shared.display());
            roots.push(shared);
            message
        }
        None => {
            format!("{test}: the repository's subset only (FERROTUNE_SHARED_FIXTURES is not set)")
        }
    };
    report(&message);
    roots
}

/// Prints a line of a test.
#[expect(clippy::print_stdout, reason = "a test says what it ran on")]
pub(crate) fn report(message: &str) {
    println!("{message}");
}

/// Reads a JSON file.
pub(crate) fn read_json(path: &Path) -> Value {
    let text = std::fs::read_to_string(path)
        .unwrap_or_else(|e| panic!("{} is readable: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{} is JSON: {e}", path.display()))
}

/// Makes the tokenizer.json of a directory put `token`, which has `id`, behind every text, and nothing before it.
pub(crate) fn put_behind_every_text(directory: &Path, token: &str, id: u32) {
    let path = directory.join("tokenizer.json");
    let mut file = read_json(&path);
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let special = json!({"SpecialToken": {"id": token, "type_id": 0}});
    file["post_processor"] = json!({"type": "TemplateProcessing", "single": [text, special], "pair": [text, special],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}}});
    std::fs::write(&path, file.to_string()).expect("the file is writable");
}

/// The folders inside `path`, sorted.
pub(crate) fn folders(path: &Path) -> Vec<PathBuf> {
    let entries =
        std::fs::read_dir(path).unwrap_or_else(|e| panic!("{} is readable: {e}", path.display()));
    let mut folders: Vec<PathBuf> = entries
        .map(|e| e.expect("the entry is readable").path())
        .filter(|p| p.is_dir())
        .collect();
    folders.sort();
    folders
}
