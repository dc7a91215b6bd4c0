//! What to say about a directory that holds no adapter.

use crate::files::CONFIG_FILE;
use ferrotune_core::{Error, checkpoint};
use std::path::Path;

/// Files of a whole model, any of which tells one.
const MODEL_FILES: [&str; 3] = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
];
/// Entries shown of a directory that says nothing else.
const SHOWN: usize = 5;

/// The error for a path without `adapter_config.json`: what is there instead.
pub(super) fn no_adapter(path: &Path) -> Error {
    let found = found(path);
    Error::adapter(
        path,
        format!("is no PEFT adapter, which is a directory with {CONFIG_FILE}: {found}"),
    )
}

fn found(path: &Path) -> String {
    if !path.exists() {
        return "there is no such path".into();
    }
    let Ok(entries) = std::fs::read_dir(path) else {
        return "it is a file".into();
    };
    if let Some(file) = MODEL_FILES.iter().find(|name| path.join(name).is_file()) {
        return format!("it holds a whole model ({file}); use it without an adapter");
    }
    let checkpoints = checkpoint::list(path).unwrap_or_default();
    if let Some((_, newest)) = checkpoints.last() {
        return format!(
            "it holds checkpoints, the newest is {}; give one of them",
            newest.display()
        );
    }
    let mut names: Vec<String> = entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| !name.starts_with('.'))
        .collect();
    names.sort();
    match names.len() {
        0 => "it is empty".into(),
        n if n > SHOWN => format!(
            "it holds {} and {} more",
            names[..SHOWN].join(", "),
            n - SHOWN
        ),
        _ => format!("it holds {}", names.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use crate::PeftConfig;
    use ferrotune_core::Error;
    use std::path::Path;

    fn message(path: &Path) -> String {
        let error = PeftConfig::load(path).expect_err("no adapter");
        assert!(matches!(error, Error::Adapter { .. }), "{error:?}");
        let text = error.to_string();
        let head = format!("{}: is no PEFT adapter", path.display());
        assert!(text.contains(&head), "{text}");
        assert!(text.contains("adapter_config.json"), "{text}");
        text
    }

    #[test]
    fn what_is_found_instead_of_an_adapter_is_said() {
        let root = tempfile::tempdir().expect("temporary directory");
        let at = |name: &str| root.path().join(name);
        let touch = |name: &str| {
            let path = at(name);
            std::fs::create_dir_all(path.parent().expect("inside")).expect("writable");
            std::fs::write(path, "").expect("writable");
        };
        for file in [
            "file",
            "model/model.safetensors",
            "model/config.json",
            "run/checkpoint-4/adapter_config.json",
            "run/checkpoint-12/adapter_config.json",
            "few/b.txt",
            "few/a.txt",
            "few/.hidden",
            "many/1",
            "many/2",
            "many/3",
            "many/4",
            "many/5",
            "many/6",
        ] {
            touch(file);
        }
        std::fs::create_dir(at("empty")).expect("writable");
        for (name, part) in [
            ("none", "no such path"),
            ("file", "it is a file"),
            ("model", "a whole model (model.safetensors)"),
            ("run", "checkpoint-12; give one"),
            ("empty", "it is empty"),
            ("few", "it holds a.txt, b.txt"),
            ("many", "1, 2, 3, 4, 5 and 1 more"),
        ] {
            let text = message(&at(name));
            assert!(text.contains(part), "{name}: {text}");
        }
    }
}
