//! One event for every open that a component asked for, allowed or denied.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

/// What came of an attempt to open a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// The file was opened.
    Allowed,
    /// The policy, or the file system, said no.
    Denied,
}

/// One attempt of a component to open a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OpenEvent {
    /// Milliseconds since 1970-01-01 UTC.
    pub time_ms: u64,
    /// The image whose component asked.
    pub image: String,
    /// The format of that image.
    pub format: String,
    /// The SHA-256 of the component, in hexadecimal.
    pub component: String,
    /// The absolute path that was asked for.
    pub path: String,
    /// `read-only` or `read-write`.
    pub access: &'static str,
    /// What came of it.
    pub outcome: Outcome,
    /// The grant that the path was judged under, if it was below one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grant: Option<String>,
    /// Why it was denied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl fmt::Display for OpenEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.outcome, &self.grant, &self.reason) {
            (Outcome::Allowed, Some(grant), _) => write!(f, "allowed {:?} {} (grant {grant})", self.path, self.access),
            (Outcome::Allowed, None, _) => write!(f, "allowed {:?} {}", self.path, self.access),
            (Outcome::Denied, _, reason) => {
                write!(f, "denied {:?} {}: {}", self.path, self.access, reason.as_deref().unwrap_or("no reason given"))
            }
        }
    }
}

/// Takes audit events. Called on the thread that serves the component, so it should be quick.
pub trait AuditSink: Send + Sync {
    /// One attempt.
    fn record(&self, event: &OpenEvent);
}

/// Where audit events go: always to `tracing` (target `blockhouse::audit`), and to any number of sinks.
#[derive(Clone, Default)]
pub struct Audit {
    sinks: Arc<[Arc<dyn AuditSink>]>,
}

impl fmt::Debug for Audit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Audit").field("sinks", &self.sinks.len()).finish()
    }
}

impl Audit {
    /// To `tracing` only.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a sink.
    #[must_use]
    pub fn with(self, sink: Arc<dyn AuditSink>) -> Self {
        Self { sinks: self.sinks.iter().cloned().chain([sink]).collect() }
    }

    pub(crate) fn record(&self, event: &OpenEvent) {
        match event.outcome {
            Outcome::Allowed => {
                tracing::info!(target: "blockhouse::audit", image = %event.image, path = ?event.path, access = event.access, grant = ?event.grant, "open allowed");
            }
            Outcome::Denied => {
                tracing::warn!(target: "blockhouse::audit", image = %event.image, path = ?event.path, access = event.access, reason = ?event.reason, "open denied");
            }
        }
        for sink in self.sinks.iter() {
            sink.record(event);
        }
    }
}

pub(crate) fn now_ms() -> u64 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)
}

/// A sink that keeps the events in memory, in order.
#[derive(Debug, Default)]
pub struct AuditList(Mutex<Vec<OpenEvent>>);

impl AuditList {
    /// The events so far.
    pub fn events(&self) -> Vec<OpenEvent> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many of them had this outcome.
    pub fn count(&self, outcome: Outcome) -> usize {
        let events = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        events.iter().filter(|event| event.outcome == outcome).count()
    }
}

impl AuditSink for AuditList {
    fn record(&self, event: &OpenEvent) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(event.clone());
    }
}

/// A sink that appends events to a file as JSON lines.
#[derive(Debug)]
pub struct AuditFile {
    file: Mutex<File>,
    name: String,
}

impl AuditFile {
    /// Opens `path` for appending; creates it (readable by its owner only) if it does not exist.
    ///
    /// # Errors
    /// Those of opening.
    pub fn append(path: &Path) -> io::Result<Self> {
        let mut options = File::options();
        options.append(true).create(true);
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        Ok(Self { file: Mutex::new(options.open(path)?), name: path.display().to_string() })
    }
}

impl AuditSink for AuditFile {
    fn record(&self, event: &OpenEvent) {
        let written = serde_json::to_string(event).map_err(io::Error::from).and_then(|mut line| {
            line.push('\n');
            // One write call, so that lines of several processes do not mix.
            self.file.lock().unwrap_or_else(PoisonError::into_inner).write_all(line.as_bytes())
        });
        if let Err(error) = written {
            tracing::error!(target: "blockhouse::audit", file = %self.name, %error, "cannot write the audit file");
        }
    }
}
