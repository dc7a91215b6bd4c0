//! An adapter belongs to the weights it was trained on.

use super::print_note;
use ferrotune::core::checkpoint::{BASE_RECORD, BaseRecord, Likeness};
use ferrotune::core::io::ModelFiles;
use ferrotune::core::{Error, Result};
use ferrotune::lora::PeftConfig;
use std::path::Path;

/// Whether that has to be so.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(super) struct BaseArgs {
    /// Take an adapter that was trained on other weights than these, as far as that is known
    #[arg(long)]
    any_base: bool,
}

impl BaseArgs {
    /// Refuses a `base` with other weights than `adapter` says that it was trained on. Where it does not say, as PEFT's
    /// do not, or one of the two is held in another format, a note on standard error is all there can be.
    ///
    /// # Errors
    /// [`Error::Adapter`] with both digests; as [`PeftConfig::load`] and [`ModelFiles::open`].
    pub(super) fn check(self, base: &Path, adapter: &Path) -> Result<()> {
        let config = PeftConfig::load(adapter)?;
        let named = config.base_model_name_or_path();
        let Some(record) = BaseRecord::read(adapter)? else {
            note_other_name(base, named);
            return Ok(());
        };
        let here = BaseRecord::of(&ModelFiles::open(base)?)?;
        let named = named.map_or_else(String::new, |named| format!(" of `{named}`"));
        let trained = format!("was trained on {record}{named}");
        let used = format!("`{}` has {here}", base.display());
        self.judge(record.likeness(&here), adapter, &trained, &used)
    }

    /// Refuses adapters of different weights, as far as they say.
    ///
    /// # Errors
    /// [`Error::Adapter`] naming one that differs from the first.
    pub(super) fn check_together(self, adapters: &[&Path]) -> Result<()> {
        let mut known = Vec::new();
        for adapter in adapters {
            if let Some(record) = BaseRecord::read(adapter)? {
                known.push((*adapter, record));
            }
        }
        let Some(((first, of_first), others)) = known.split_first() else {
            return Ok(());
        };
        for (other, record) in others {
            let trained = format!("was trained on {record}");
            let used = format!("{} on {of_first}", first.display());
            self.judge(record.likeness(of_first), other, &trained, &used)?;
        }
        Ok(())
    }

    fn judge(self, likeness: Likeness, adapter: &Path, trained: &str, used: &str) -> Result<()> {
        let place = adapter.display();
        match likeness {
            Likeness::Same => {}
            Likeness::Other if !self.any_base => {
                let message = format!(
                    "{trained} ({BASE_RECORD} beside it says so), and {used}: on other weights its answers mean nothing. \
                     Give the base that it was trained on, or pass --any-base if you mean it"
                );
                return Err(Error::adapter(adapter, message));
            }
            Likeness::Other => print_note(&format!(
                "--any-base: the adapter {place} {trained}, and {used}"
            )),
            Likeness::OtherFormat => print_note(&format!(
                "the adapter {place} {trained}, and {used}; held in different formats, they may be the same model or not"
            )),
        }
        Ok(())
    }
}

/// Says on standard error that an adapter names another base, if it does. Not an error: models are moved and renamed,
/// and shapes that do not fit are found out anyway.
fn note_other_name(base: &Path, named: Option<&str>) {
    if let Some(named) = named
        && !names(named, base)
    {
        print_note(&format!(
            "the adapter was trained on `{named}` (base_model_name_or_path in its \
             adapter_config.json) and is used on `{}`; on another model its answers mean nothing",
            base.display()
        ));
    }
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
