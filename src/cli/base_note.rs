//! A note where an adapter is used on another base than it was trained on.

use super::print_note;
use ferrotune::core::Result;
use ferrotune::lora::PeftConfig;
use std::path::Path;

/// Says on standard error that `adapter` names another base than `base`, if it does. Not an error:
/// models are moved and renamed, and shapes that do not fit are found out anyway.
///
/// # Errors
/// As [`PeftConfig::load`].
pub(super) fn note_other_base(base: &Path, adapter: &Path) -> Result<()> {
    let config = PeftConfig::load(adapter)?;
    if let Some(named) = config.base_model_name_or_path()
        && !names(named, base)
    {
        print_note(&format!(
            "the adapter was trained on `{named}` (base_model_name_or_path in its \
             adapter_config.json) and is used on `{}`; on another model its answers mean nothing",
            base.display()
        ));
    }
    Ok(())
}

/// Whether `named`, a path or a name on the hub, can be the model in the directory `base`.
fn names(named: &str, base: &Path) -> bool {
    let path = Path::new(named);
    match (path.canonicalize(), base.canonicalize()) {
        // Both are here to be compared.
        (Ok(named), Ok(base)) => named == base,
        // A model that was moved or downloaded keeps its name, as a rule.
        _ => match (path.file_name(), base.file_name()) {
            (Some(name), Some(base_name)) => {
                name.eq_ignore_ascii_case(base_name) || is_in_hub_cache(named, base)
            }
            _ => true,
        },
    }
}

/// Whether `base` is a snapshot of the model `named` in the cache of the Hugging Face hub:
/// `models--OWNER--NAME/snapshots/COMMIT`.
fn is_in_hub_cache(named: &str, base: &Path) -> bool {
    let folder = format!("models--{}", named.replace('/', "--"));
    base.components().any(|c| c.as_os_str() == folder.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_is_known_by_its_place_or_else_by_its_name() {
        let root = tempfile::tempdir().expect("temporary directory");
        for name in ["a/tiny", "b/tiny", "a/small"] {
            std::fs::create_dir_all(root.path().join(name)).expect("writable");
        }
        let at = |name: &str| root.path().join(name);
        let base = at("a/tiny");
        let place = |name: &str| at(name).display().to_string();
        for same in [
            &place("a/tiny"),
            &place("a/small/../tiny"),
            "org/Tiny",
            "/gone/tiny",
        ] {
            assert!(names(same, &base), "{same}");
        }
        let snapshot = Path::new("/cache/models--org--tiny/snapshots/0123");
        assert!(names("org/tiny", snapshot));
        assert!(!names("org/small", snapshot));
        for other in [
            &place("b/tiny"),
            &place("a/small"),
            "org/tiny-2",
            "/gone/small",
        ] {
            assert!(!names(other, &base), "{other}");
        }
    }
}
