//! One event for every open that a component asked for, allowed or denied.
//!
//! A component can ask for ever: each of its instances a number of times, and instances come again. So what is kept,
//! written or logged is each distinct open once, up to [`GRANTED_KEPT`] and [`DENIED_KEPT`], and for the rest how many
//! there were. The two are counted apart: no number of denied opens hides one that was granted.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::json;

/// How many distinct opens that were granted are kept. There are no more of them than files that were granted.
pub const GRANTED_KEPT: usize = 4096;
/// How many distinct opens that were denied are kept: a component can make up any number.
pub const DENIED_KEPT: usize = 256;

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

/// What is known of an open after one more attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// It is the one of this number, and was tried so many times.
    Kept { number: usize, times: u64 },
    /// It is one of so many attempts that are not kept.
    LeftOut(u64),
}

/// Which opens there were.
#[derive(Debug, Default)]
struct Distinct {
    /// By the digest of all that makes them distinct: their number, and how often.
    opens: BTreeMap<[u8; 32], (usize, u64)>,
    granted: usize,
    denied: usize,
    left_out: u64,
}

impl Distinct {
    fn count(&mut self, event: &OpenEvent) -> Seen {
        let outcome = match event.outcome {
            Outcome::Allowed => "allowed",
            Outcome::Denied => "denied",
        };
        let mut digest = Sha256::new();
        for part in [event.image.as_str(), event.path.as_str(), event.access, outcome] {
            digest.update(part.len().to_le_bytes());
            digest.update(part);
        }
        let number = self.opens.len();
        let (kept, most) = match event.outcome {
            Outcome::Allowed => (&mut self.granted, GRANTED_KEPT),
            Outcome::Denied => (&mut self.denied, DENIED_KEPT),
        };
        match self.opens.entry(digest.finalize().into()) {
            Entry::Occupied(mut known) => {
                let (number, times) = known.get_mut();
                *times = times.saturating_add(1);
                Seen::Kept { number: *number, times: *times }
            }
            Entry::Vacant(new) if *kept < most => {
                *kept = kept.saturating_add(1);
                new.insert((number, 1));
                Seen::Kept { number, times: 1 }
            }
            Entry::Vacant(_) => {
                self.left_out = self.left_out.saturating_add(1);
                Seen::LeftOut(self.left_out)
            }
        }
    }
}

/// What was said of the opens of each image.
#[derive(Debug, Default)]
struct Said(Mutex<BTreeMap<String, Distinct>>);

impl Said {
    /// What is to be said of one more attempt, if anything is: something is of the first one, the tenth, the
    /// hundredth.
    fn count(&self, event: &OpenEvent) -> Option<Seen> {
        let mut images = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // There are no more images than layers of disks.
        let seen = match images.get_mut(&event.image) {
            Some(opens) => opens.count(event),
            None => images.entry(event.image.clone()).or_default().count(event),
        };
        let (Seen::Kept { times, .. } | Seen::LeftOut(times)) = seen;
        (10_u64.checked_pow(times.ilog10()) == Some(times)).then_some(seen)
    }
}

/// Where audit events go: always to `tracing` (target `blockhouse::audit`), and to any number of sinks.
///
/// In `tracing` each distinct open of an image is once, and again at the tenth attempt, the hundredth, and so on; of
/// what is beyond [`GRANTED_KEPT`] and [`DENIED_KEPT`] there is only how many there were. Sinks get every attempt.
#[derive(Clone, Default)]
pub struct Audit {
    sinks: Arc<[Arc<dyn AuditSink>]>,
    said: Arc<Said>,
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
        Self { sinks: self.sinks.iter().cloned().chain([sink]).collect(), said: self.said }
    }

    pub(crate) fn record(&self, event: &OpenEvent) {
        match (self.said.count(event), event.outcome) {
            (Some(Seen::Kept { times, .. }), Outcome::Allowed) => {
                tracing::info!(target: "blockhouse::audit", image = %event.image, path = ?event.path, access = event.access, grant = ?event.grant, times, "open allowed");
            }
            (Some(Seen::Kept { times, .. }), Outcome::Denied) => {
                tracing::warn!(target: "blockhouse::audit", image = %event.image, path = ?event.path, access = event.access, reason = ?event.reason, times, "open denied");
            }
            (Some(Seen::LeftOut(opens)), _) => {
                tracing::warn!(target: "blockhouse::audit", image = %event.image, opens, "further opens, which are not listed");
            }
            (None, _) => {}
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

/// An open, and how often it was tried.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RepeatedOpen {
    /// The first attempt.
    #[serde(flatten)]
    pub event: OpenEvent,
    /// How many attempts there were.
    pub times: u64,
}

/// A sink that keeps in memory what was opened: each distinct image, path, access and outcome once, in the order of the
/// first attempt, and how often. At most [`GRANTED_KEPT`] and [`DENIED_KEPT`] are kept, and of the rest how many there
/// were.
#[derive(Debug, Default)]
pub struct AuditList(Mutex<List>);

#[derive(Debug, Default)]
struct List {
    distinct: Distinct,
    opens: Vec<RepeatedOpen>,
    allowed: u64,
    denied: u64,
}

impl AuditList {
    fn list(&self) -> MutexGuard<'_, List> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first attempt of each distinct open.
    pub fn events(&self) -> Vec<OpenEvent> {
        self.list().opens.iter().map(|open| open.event.clone()).collect()
    }

    /// The same, with how often there were.
    pub fn opens(&self) -> Vec<RepeatedOpen> {
        self.list().opens.clone()
    }

    /// How many attempts are not in the list because it was full.
    pub fn left_out(&self) -> u64 {
        self.list().distinct.left_out
    }

    /// How many attempts had this outcome, those that are not in the list included.
    pub fn count(&self, outcome: Outcome) -> u64 {
        let list = self.list();
        match outcome {
            Outcome::Allowed => list.allowed,
            Outcome::Denied => list.denied,
        }
    }
}

impl AuditSink for AuditList {
    fn record(&self, event: &OpenEvent) {
        let mut list = self.list();
        let total = match event.outcome {
            Outcome::Allowed => &mut list.allowed,
            Outcome::Denied => &mut list.denied,
        };
        *total = total.saturating_add(1);
        if let Seen::Kept { number, times } = list.distinct.count(event) {
            match list.opens.get_mut(number) {
                Some(open) => open.times = times,
                None => list.opens.push(RepeatedOpen { event: event.clone(), times }),
            }
        }
    }
}

/// A sink that appends events to a file as JSON lines.
///
/// The file says what was opened or tried, and does not grow with how often: each distinct image, path, access and
/// outcome is a line when it is first seen, and another one, with `times`, at the tenth attempt, the hundredth and so
/// on. Of each image there are at most [`GRANTED_KEPT`] and [`DENIED_KEPT`]; how many further attempts there were is a
/// line with `left_out` in the same way.
#[derive(Debug)]
pub struct AuditFile {
    file: Mutex<File>,
    name: String,
    said: Said,
}

/// A line of the file.
#[derive(Serialize)]
#[serde(untagged)]
enum Line<'e> {
    Open {
        #[serde(flatten)]
        event: &'e OpenEvent,
        #[serde(skip_serializing_if = "Option::is_none")]
        times: Option<u64>,
    },
    LeftOut {
        time_ms: u64,
        image: &'e str,
        left_out: u64,
    },
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
        Ok(Self { file: Mutex::new(options.open(path)?), name: path.display().to_string(), said: Said::default() })
    }
}

impl AuditSink for AuditFile {
    fn record(&self, event: &OpenEvent) {
        let line = match self.said.count(event) {
            Some(Seen::Kept { times, .. }) => Line::Open { event, times: Some(times).filter(|times| *times > 1) },
            Some(Seen::LeftOut(left_out)) => Line::LeftOut { time_ms: event.time_ms, image: &event.image, left_out },
            None => return,
        };
        let written = json::line(&line).map_err(io::Error::from).and_then(|mut line| {
            line.push(b'\n');
            // One write call, so that lines of several processes do not mix.
            self.file.lock().unwrap_or_else(PoisonError::into_inner).write_all(&line)
        });
        if let Err(error) = written {
            tracing::error!(target: "blockhouse::audit", file = %self.name, %error, "cannot write the audit file");
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use serde_json::Value;

    use super::*;

    fn event(image: &str, path: &str, outcome: Outcome) -> OpenEvent {
        OpenEvent {
            time_ms: 7,
            image: image.to_owned(),
            format: "qcow2".to_owned(),
            component: "c".to_owned(),
            path: path.to_owned(),
            access: "read-only",
            outcome,
            grant: None,
            reason: None,
        }
    }

    #[test]
    fn a_list_has_each_open_once_and_every_one_that_was_granted() {
        let list = AuditList::default();
        let writes = OpenEvent { access: "read-write", ..event("/i", "/base", Outcome::Allowed) };
        for _ in 0..3 {
            for number in 0..1000 {
                list.record(&event("/i", &format!("/{number}"), Outcome::Denied));
            }
            list.record(&event("/i", "/base", Outcome::Allowed));
            list.record(&writes);
        }
        let opens = list.opens();
        assert_eq!(opens.len(), DENIED_KEPT + 2);
        assert!(opens.iter().all(|open| open.times == 3), "{opens:?}");
        assert_eq!((opens[0].event.path.as_str(), opens[255].event.path.as_str()), ("/0", "/255"));
        assert_eq!((&opens[256].event.path, &opens[257].event), (&"/base".to_owned(), &writes));
        assert_eq!(list.left_out(), 3 * (1000 - 256));
        assert_eq!((list.count(Outcome::Allowed), list.count(Outcome::Denied)), (6, 3000));

        // The same path is another open in another layer, and if it comes to something else.
        list.record(&event("/j", "/base", Outcome::Allowed));
        for number in 0..2 * GRANTED_KEPT {
            list.record(&event("/i", &format!("/{number}"), Outcome::Allowed));
        }
        assert_eq!(list.opens()[258].event.image, "/j");
        assert_eq!(list.opens().len(), DENIED_KEPT + GRANTED_KEPT);
    }

    #[test]
    fn a_file_has_each_open_once_and_how_often_at_times() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("audit");
        let file = AuditFile::append(&path).unwrap();
        for _ in 0..150 {
            file.record(&event("/i", "/base", Outcome::Allowed));
            for number in 0..300 {
                file.record(&event("/i", &format!("/{number}"), Outcome::Denied));
            }
        }
        // What one image asks for leaves room for what others do.
        file.record(&event("/j", "/base", Outcome::Denied));
        let lines = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let base: Vec<&Value> = lines.iter().filter(|line| line["outcome"] == "allowed").collect();
        assert_eq!(base.iter().map(|line| line["times"].as_u64()).collect::<Vec<_>>(), [None, Some(10), Some(100)]);
        let left_out: Vec<_> = lines.iter().filter_map(|line| line["left_out"].as_u64()).collect();
        assert_eq!(left_out, [1, 10, 100, 1000], "of {}", 150 * (300 - DENIED_KEPT));
        assert_eq!(lines.len(), 3 * (1 + DENIED_KEPT) + 4 + 1);
        let last = lines.last().unwrap();
        assert_eq!((last["image"].as_str(), last["path"].as_str()), (Some("/j"), Some("/base")));
    }
}
