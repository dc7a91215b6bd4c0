//! Questions to the hub.

use super::Settings;
use super::repository::{Kind, Repository, is_commit};
use ferrotune_core::io::{safe_file_name, write_file_with};
use ferrotune_core::{Error, Result};
use serde_json::Value;
use std::io;
use std::path::Path;
use std::time::Duration;
use ureq::Agent;
use ureq::http::Response;

/// Tries of a question, and the wait after the first.
const TRIES: u32 = 3;
const FIRST_WAIT: Duration = Duration::from_millis(200);
const CONNECT: Duration = Duration::from_secs(20);
/// From a question to the first byte of its answer.
const ANSWER: Duration = Duration::from_secs(60);
/// The longest list of files.
const MAX_LISTING: u64 = 64 << 20;

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum Fault {
    /// It may come later.
    Transient(String),
    /// No such repository, revision or file, or not without a token that may.
    Refused(String),
    /// It makes no sense, or cannot be written.
    Other(Error),
}

/// A commit and the files it has.
#[derive(Debug)]
pub(super) struct Listing {
    pub(super) commit: String,
    /// Paths in the repository, each part of which is a plain name.
    pub(super) files: Vec<String>,
}

/// The hub.
pub(super) struct Client<'a> {
    agent: Agent,
    settings: &'a Settings,
    repository: &'a Repository,
}

impl<'a> Client<'a> {
    pub(super) fn new(settings: &'a Settings, repository: &'a Repository) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(ANSWER))
            .user_agent(concat!("ferrotune/", env!("CARGO_PKG_VERSION")))
            .build();
        Self {
            agent: config.into(),
            settings,
            repository,
        }
    }

    /// What the revision is and has.
    pub(super) fn listing(&self) -> Result<Listing, Fault> {
        let kind = match self.repository.kind {
            Kind::Model | Kind::Adapter => "models",
            Kind::Dataset { .. } => "datasets",
        };
        let Repository { id, revision, .. } = self.repository;
        let revision = revision.replace('/', "%2F");
        let url = format!(
            "{}/api/{kind}/{id}/revision/{revision}",
            self.settings.endpoint
        );
        let text = self.ask(&url, |response| {
            let body = response.body_mut().with_config().limit(MAX_LISTING);
            body.read_to_string()
                .map_err(|e| Fault::Transient(e.to_string()))
        })?;
        let nonsense = |message: String| Fault::Other(Error::data(&url, None, message));
        let value: Value =
            serde_json::from_str(&text).map_err(|e| nonsense(format!("not JSON: {e}")))?;
        let commit = value["sha"].as_str().unwrap_or_default();
        if !is_commit(commit) {
            return Err(nonsense(
                "`sha` is no commit of 40 hexadecimal digits".into(),
            ));
        }
        let names = value["siblings"].as_array().into_iter().flatten();
        let files = names.map(|file| {
            let name = file["rfilename"].as_str().unwrap_or_default();
            let parts = name.split('/').map(safe_file_name);
            let checked: Result<Vec<&str>, String> = parts.collect();
            checked
                .map(|_| name.to_owned())
                .map_err(|e| nonsense(format!("names a file that is none: {e}")))
        });
        Ok(Listing {
            commit: commit.to_owned(),
            files: files.collect::<Result<_, _>>()?,
        })
    }

    /// Writes a file of a commit to `path`, whole or not at all.
    pub(super) fn fetch(&self, commit: &str, file: &str, path: &Path) -> Result<(), Fault> {
        let prefix = match self.repository.kind {
            Kind::Model | Kind::Adapter => "",
            Kind::Dataset { .. } => "datasets/",
        };
        let parts: Vec<String> = file.split('/').map(escaped).collect();
        let url = format!(
            "{}/{prefix}{}/resolve/{commit}/{}",
            self.settings.endpoint,
            self.repository.id,
            parts.join("/")
        );
        self.ask(&url, |response| {
            let expected = response.body().content_length();
            let mut lost = None;
            let mut body = response.body_mut().with_config().limit(u64::MAX).reader();
            let written = write_file_with(path, |to| match copy(&mut body, to) {
                Ok(count) if expected.is_none_or(|bytes| bytes == count) => Ok(()),
                Ok(count) => {
                    lost = Some(format!(
                        "the answer ended after {count} bytes of {}",
                        expected.unwrap_or(0)
                    ));
                    Err(io::ErrorKind::UnexpectedEof.into())
                }
                Err(Side::Reading(error)) => {
                    lost = Some(format!("the answer broke off: {error}"));
                    Err(error)
                }
                Err(Side::Writing(error)) => Err(error),
            });
            match (written, lost) {
                (Ok(()), _) => Ok(()),
                (Err(_), Some(reason)) => Err(Fault::Transient(format!("{url}: {reason}"))),
                (Err(error), None) => Err(Fault::Other(error)),
            }
        })
    }

    /// Asks again while the failure may pass.
    fn ask<T>(
        &self,
        url: &str,
        mut read: impl FnMut(&mut Response<ureq::Body>) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        let mut wait = FIRST_WAIT;
        for _ in 1..TRIES {
            match self.ask_once(url, &mut read) {
                Err(Fault::Transient(reason)) => {
                    tracing::info!("asking again in {wait:?}: {reason}");
                }
                answer => return answer,
            }
            std::thread::sleep(wait);
            wait *= 4;
        }
        self.ask_once(url, &mut read)
    }

    fn ask_once<T>(
        &self,
        url: &str,
        read: &mut impl FnMut(&mut Response<ureq::Body>) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        let mut request = self.agent.get(url);
        if let Some(token) = &self.settings.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let mut response = request.call().map_err(|error| match error {
            ureq::Error::BadUri(_) | ureq::Error::Http(_) => {
                Fault::Refused(format!("HF_ENDPOINT gives {url}: {error}"))
            }
            other => Fault::Transient(format!("{url}: {other}")),
        })?;
        let said = |what: &str| format!("{url} {what}");
        match response.status().as_u16() {
            200..=299 => read(&mut response),
            404 => Err(Fault::Refused(said(
                "does not exist; check the name and the revision",
            ))),
            401 | 403 => Err(Fault::Refused(said(
                "does not exist, or may not be read: check the name, accept its terms on the hub, or set HF_TOKEN",
            ))),
            408 | 429 | 500..=599 => Err(Fault::Transient(said(&format!(
                "answered {}",
                response.status()
            )))),
            code => Err(Fault::Refused(said(&format!("answered {code}")))),
        }
    }
}

enum Side {
    Reading(io::Error),
    Writing(io::Error),
}

fn copy(from: &mut impl io::Read, to: &mut impl io::Write) -> Result<u64, Side> {
    let mut buffer = vec![0; 1 << 20];
    let mut count = 0;
    loop {
        let read = match from.read(&mut buffer) {
            Ok(0) => return Ok(count),
            Ok(read) => read,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(Side::Reading(e)),
        };
        to.write_all(&buffer[..read]).map_err(Side::Writing)?;
        count += read as u64;
    }
}

/// A part of a path in an address.
fn escaped(part: &str) -> String {
    let escape = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
            char::from(byte).to_string()
        }
        other => format!("%{other:02X}"),
    };
    part.bytes().map(escape).collect()
}
