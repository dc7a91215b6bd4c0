//! `ferrotune.json`: what a checkpoint consists of and what run it belongs to.

use crate::io::{blake3_of_bytes, blake3_of_files, safe_file_name, write_file};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Name of the manifest in a checkpoint.
pub const MANIFEST: &str = "ferrotune.json";

/// The layout written and the only one read.
const SCHEMA_VERSION: u32 = 1;

/// Longest manifest read. Ours have a few KB; the config is the larger part.
const MAX_BYTES: u64 = 16 << 20;

/// What the file starts with, before the 64 digits of its own sum.
const HEAD: &[u8] = b"{\n  \"blake3\": \"";
const DIGITS: usize = 64;

/// What must be equal for a resumed run to be the same run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunIdentity {
    /// The resolved configuration, as a JSON object.
    pub config: Value,
    /// What was trained on what: digests by name, such as `base_model`, `data`, `tokenizer`.
    pub fingerprints: BTreeMap<String, String>,
}

impl RunIdentity {
    /// One line for every config key or fingerprint that is different in `now`, sorted by name.
    #[must_use]
    pub fn differences(&self, now: &Self) -> Vec<String> {
        let (was, is) = (members(&self.config), members(&now.config));
        let mut lines = compare("config", &was, &is);
        let (was, is) = (strings(&self.fingerprints), strings(&now.fingerprints));
        lines.extend(compare("fingerprint", &was, &is));
        lines
    }
}

fn members(config: &Value) -> BTreeMap<&str, Value> {
    let members = config.as_object().into_iter().flatten();
    members.map(|(k, v)| (k.as_str(), v.clone())).collect()
}

fn strings(map: &BTreeMap<String, String>) -> BTreeMap<&str, Value> {
    let entries = map.iter();
    entries
        .map(|(k, v)| (k.as_str(), Value::from(v.as_str())))
        .collect()
}

fn compare(what: &str, was: &BTreeMap<&str, Value>, is: &BTreeMap<&str, Value>) -> Vec<String> {
    let keys: BTreeSet<&str> = was.keys().chain(is.keys()).copied().collect();
    let shown = |v: Option<&Value>| v.map_or_else(|| "absent".to_owned(), Value::to_string);
    let mut lines = Vec::new();
    for key in keys {
        let (was, is) = (was.get(key), is.get(key));
        let same = match (was, is) {
            (Some(was), Some(is)) => same_value(was, is),
            _ => false,
        };
        if !same {
            let (was, is) = (shown(was), shown(is));
            lines.push(format!("{what} `{key}`: {was} in the checkpoint, {is} now"));
        }
    }
    lines
}

/// Equality up to the last bit of a float, which reading it back from decimal digits may change.
fn same_value(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(x), Value::Number(y)) if x != y => match (x.as_f64(), y.as_f64()) {
            (Some(x), Some(y)) if a.is_f64() && b.is_f64() => {
                (x - y).abs() <= 2.0 * f64::EPSILON * x.abs()
            }
            _ => false,
        },
        (Value::Array(x), Value::Array(y)) => {
            x.len() == y.len() && x.iter().zip(y).all(|(x, y)| same_value(x, y))
        }
        (Value::Object(x), Value::Object(y)) => {
            let same = |(k, x): (&String, &Value)| y.get(k).is_some_and(|y| same_value(x, y));
            x.len() == y.len() && x.iter().all(same)
        }
        _ => a == b,
    }
}

/// Length and sum of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Length in bytes.
    pub bytes: u64,
    /// BLAKE3, in hexadecimal.
    pub blake3: String,
}

/// The contents of [`MANIFEST`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Sum of this file with these digits taken as zeros. First, at a fixed place.
    blake3: String,
    /// Version of this layout.
    pub schema_version: u32,
    /// Optimizer steps done.
    pub step: u64,
    /// Every file, by its path relative to the checkpoint, with `/` between components.
    pub files: BTreeMap<String, FileRecord>,
    /// What run the checkpoint belongs to.
    pub run: RunIdentity,
}

impl Manifest {
    /// Describes what lies in `dir`.
    ///
    /// # Errors
    /// [`Error::Write`] if something there is neither a file nor a directory, or has a name that
    /// other systems refuse; [`Error::Read`].
    pub(super) fn of(dir: &Path, step: u64, run: &RunIdentity) -> Result<Self> {
        let mut names = Vec::new();
        collect_files(dir, "", &mut names)?;
        if names.iter().any(|name| name == MANIFEST) {
            let taken = std::io::Error::other("the name is the manifest's own");
            return Err(Error::write(dir.join(MANIFEST))(taken));
        }
        names.sort();
        let paths: Vec<PathBuf> = names.iter().map(|name| dir.join(name)).collect();
        let sums = blake3_of_files(&paths)?;
        let files = names
            .into_iter()
            .zip(sums)
            .map(|(name, (blake3, bytes))| (name, FileRecord { bytes, blake3 }))
            .collect();
        Ok(Self {
            blake3: "0".repeat(DIGITS),
            schema_version: SCHEMA_VERSION,
            step,
            files,
            run: run.clone(),
        })
    }

    pub(super) fn write(&self, dir: &Path) -> Result<()> {
        let path = dir.join(MANIFEST);
        let mut text = serde_json::to_vec_pretty(self)
            .map_err(std::io::Error::from)
            .map_err(Error::write(&path))?;
        text.push(b'\n');
        let sum = blake3_of_bytes(&text);
        text[HEAD.len()..HEAD.len() + DIGITS].copy_from_slice(sum.as_bytes());
        write_file(&path, &text)
    }

    pub(super) fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(MANIFEST);
        let bytes = match fs::symlink_metadata(&path) {
            Ok(about) if about.is_file() => about.len(),
            Ok(_) => return Err(Error::checkpoint(&path, "is not a regular file")),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::checkpoint(
                    dir,
                    format!(
                        "{MANIFEST} is missing: expected a checkpoint-N that this program wrote; give \
                         the path of one, or begin anew with overwrite_output_dir: true"
                    ),
                ));
            }
            Err(e) => return Err(Error::read(&path)(e)),
        };
        if bytes > MAX_BYTES {
            let message = format!("has {bytes} bytes, expected at most {MAX_BYTES}");
            return Err(Error::checkpoint(&path, message));
        }
        let text = fs::read(&path).map_err(Error::read(&path))?;
        Self::parse(text).map_err(|defect| Error::checkpoint(&path, defect))
    }

    fn parse(mut text: Vec<u8>) -> Result<Self, String> {
        let damaged = || {
            "is damaged: its sum is wrong; use an older checkpoint, or begin anew with overwrite_output_dir: true".to_owned()
        };
        let place = HEAD.len()..HEAD.len() + DIGITS;
        let Some(digits) = text.get_mut(place) else {
            return Err(damaged());
        };
        let mut sum = [b'0'; DIGITS];
        digits.swap_with_slice(&mut sum);
        if !text.starts_with(HEAD) || blake3_of_bytes(&text).as_bytes() != sum {
            return Err(damaged());
        }
        // The version comes first: a later layout may lack what this one needs.
        #[derive(Deserialize)]
        struct Version {
            schema_version: u32,
        }
        let invalid = |e: serde_json::Error| format!("is not a manifest: {e}");
        let Version { schema_version } = serde_json::from_slice(&text).map_err(invalid)?;
        if schema_version != SCHEMA_VERSION {
            return Err(format!(
                "has layout version {schema_version}, expected {SCHEMA_VERSION}; use the version of \
                 ferrotune that wrote it"
            ));
        }
        serde_json::from_slice(&text).map_err(invalid)
    }

    /// Checks that every file is in `dir`, with its length; gives their paths.
    pub(super) fn check_lengths(&self, dir: &Path) -> Result<Vec<PathBuf>> {
        let mut paths = Vec::with_capacity(self.files.len());
        for (name, record) in &self.files {
            let path = join_safely(dir, name)?;
            check_length(&path, record.bytes)?;
            paths.push(path);
        }
        Ok(paths)
    }

    /// Checks every file in `dir` against its record: lengths first, because that is cheap.
    pub(super) fn verify(&self, dir: &Path) -> Result<()> {
        let paths = self.check_lengths(dir)?;
        let sums = blake3_of_files(&paths)?;
        for ((path, (sum, _)), record) in paths.iter().zip(sums).zip(self.files.values()) {
            if sum != record.blake3 {
                return Err(Error::checkpoint(
                    path,
                    format!(
                        "is damaged: BLAKE3 {sum}, expected {}; use an older checkpoint, or begin anew with overwrite_output_dir: true",
                        record.blake3
                    ),
                ));
            }
        }
        Ok(())
    }
}

fn check_length(path: &Path, expected: u64) -> Result<()> {
    let fate = match fs::symlink_metadata(path) {
        Ok(about) if !about.is_file() => "is not a regular file".to_owned(),
        Ok(about) if about.len() == expected => return Ok(()),
        Ok(about) => format!("is damaged: {} bytes, expected {expected}", about.len()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => "is missing".to_owned(),
        Err(e) => return Err(Error::read(path)(e)),
    };
    Err(Error::checkpoint(
        path,
        format!("{fate}; use an older checkpoint, or begin anew with overwrite_output_dir: true"),
    ))
}

/// `dir/name`, every component of `name` being a plain one.
fn join_safely(dir: &Path, name: &str) -> Result<PathBuf> {
    let mut path = dir.to_path_buf();
    for component in name.split('/') {
        path.push(safe_file_name(component).map_err(|e| Error::checkpoint(dir.join(MANIFEST), e))?);
    }
    Ok(path)
}

fn collect_files(dir: &Path, prefix: &str, names: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(Error::read(dir))? {
        let entry = entry.map_err(Error::read(dir))?;
        let path = entry.path();
        let refuse = |message: String| {
            let source = std::io::Error::new(std::io::ErrorKind::InvalidInput, message);
            Error::write(&path)(source)
        };
        let name = entry.file_name();
        let name = name.to_string_lossy();
        safe_file_name(&name).map_err(refuse)?;
        let kind = entry.file_type().map_err(Error::read(&path))?;
        let relative = format!("{prefix}{name}");
        if kind.is_dir() {
            collect_files(&path, &format!("{relative}/"), names)?;
        } else if kind.is_file() {
            names.push(relative);
        } else {
            return Err(refuse(
                "a checkpoint holds files and directories only".into(),
            ));
        }
    }
    Ok(())
}
