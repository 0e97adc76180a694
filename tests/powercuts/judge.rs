//! What may be in an image, and what is.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use blockhouse_sandbox::block::{BlockBackend, VolatileSlice};
use blockhouse_sandbox::{OpenRequest, Opener};

use crate::images::{Made, SECTOR, TEMPLATES, Template, sector};
use crate::journal::{self, Event, Journal};
use crate::plan::{Operation, Random, What};
use crate::workload::Case;

/// An operation, as it went.
struct Done {
    operation: Operation,
    start: usize,
    end: Option<usize>,
    failed: Option<String>,
}

/// One case, what was recorded of it, and what the image was before.
pub(crate) struct Subject {
    pub(crate) case: Case,
    pub(crate) events: Vec<Event>,
    pub(crate) initial: Vec<u8>,
    before: Vec<u64>,
    done: Vec<Done>,
}

/// Where states are put, and who reads them.
pub(crate) struct Bench<'a> {
    pub(crate) directory: &'a Path,
    pub(crate) opener: &'a Opener,
    pub(crate) made: &'a [Made],
    /// What lies below the images.
    pub(crate) below: &'a [(PathBuf, Vec<u8>)],
}

/// What was found in a state.
pub(crate) struct Found {
    pub(crate) leaks: u64,
    pub(crate) ids: Vec<u64>,
}

impl Bench<'_> {
    /// A new image of a template.
    pub(crate) fn image(&self, name: &str, template: usize) -> PathBuf {
        let path = self.directory.join(format!("{name}.qcow2"));
        std::fs::write(&path, &self.made[template].image).unwrap();
        path
    }

    /// Nothing is corrupt, and each sector holds what it may. `name` is that of a new file.
    pub(crate) fn judge(&self, name: &str, bytes: &[u8], allowed: &[Vec<u64>]) -> Result<Found, String> {
        let path = self.directory.join(format!("{name}.qcow2"));
        std::fs::write(&path, bytes).unwrap();
        let output = Command::new("qemu-img")
            .args(["check", "-U", "-f", "qcow2", "--output=json"])
            .arg(&path)
            .output()
            .map_err(|error| format!("qemu-img: {error}"))?;
        let said = String::from_utf8_lossy(&output.stdout);
        let found: serde_json::Value = serde_json::from_str(&said)
            .map_err(|_| format!("qemu-img check: {said}{}", String::from_utf8_lossy(&output.stderr)))?;
        let number = |name: &str| found[name].as_u64().unwrap_or(0);
        if number("corruptions") + number("check-errors") > 0 {
            return Err(format!("qemu-img check finds {} corruptions", number("corruptions")));
        }
        let disk = self.opener.open(&OpenRequest::new(&path, "qcow2")).map_err(|error| format!("opening: {error}"))?;
        let mut content = vec![0xee; disk.disk.capacity() as usize];
        let read = disk.disk.read(&[VolatileSlice::from(content.as_mut_slice())], 0);
        read.map_err(|error| format!("reading: {error}"))?;
        if content.len() != allowed.len() * SECTOR as usize {
            return Err(format!("the disk has {} bytes", content.len()));
        }
        let mut ids = Vec::new();
        for (number, (bytes, allowed)) in content.chunks_exact(SECTOR as usize).zip(allowed).enumerate() {
            let id = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            if !allowed.contains(&id) || bytes != sector(id) {
                return Err(format!("sector {number} holds {id:#x}, allowed: {allowed:x?}"));
            }
            ids.push(id);
        }
        Ok(Found { leaks: number("leaks"), ids })
    }

    /// No file below the images was changed.
    pub(crate) fn below_is_unchanged(&self) -> bool {
        self.below.iter().all(|(path, bytes)| std::fs::read(path).is_ok_and(|now| now == *bytes))
    }
}

impl Subject {
    /// What a recording says of its cases, in their order. Each has its first bytes, and who wrote which sector.
    pub(crate) fn all(cases: impl IntoIterator<Item = (Case, Vec<u8>, Vec<u64>)>, mut journal: Journal) -> Vec<Self> {
        let mut said: HashMap<usize, Vec<(usize, usize, String)>> = HashMap::new();
        for (time, line) in journal.said {
            let mut words = line.splitn(3, ' ');
            let mut number = || words.next().unwrap().parse::<usize>().unwrap();
            let (case, operation) = (number(), number());
            said.entry(case).or_default().push((operation, time, words.next().unwrap().to_owned()));
        }
        let mut subjects = Vec::new();
        for (number, (case, initial, before)) in cases.into_iter().enumerate() {
            let plan = case.plan();
            let operations = plan.operations();
            let mut done: Vec<Done> = Vec::new();
            for (operation, time, what) in said.remove(&number).unwrap_or_default() {
                if what == "start" {
                    let operation = operations[operation].clone();
                    done.push(Done { operation, start: time, end: None, failed: None });
                } else {
                    let done = done.iter_mut().find(|done| done.operation.number == operation).unwrap();
                    done.end = Some(time);
                    done.failed = what.strip_prefix("failed ").map(str::to_owned);
                }
            }
            let events = journal.files.remove(&case.image).unwrap_or_default();
            subjects.push(Self { case, events, initial, before, done });
        }
        assert!(journal.files.is_empty(), "other files were changed: {:?}", journal.files.keys());
        subjects
    }

    pub(crate) fn template(&self) -> &'static Template {
        &TEMPLATES[self.case.template]
    }

    /// The recording leads to the bytes that the image has: nothing is missing in it.
    pub(crate) fn assert_is_complete(&self) {
        let now = std::fs::read(&self.case.image).unwrap();
        let recorded = journal::replay(self.initial.clone(), &self.events);
        assert!(recorded == now, "the recording of {:?} is incomplete", self.case);
    }

    /// What each sector may hold after a cut.
    pub(crate) fn allowed(&self, cut: usize) -> Vec<Vec<u64>> {
        let flushes: Vec<&Done> = self
            .done
            .iter()
            .filter(|done| matches!(done.operation.what, What::Flush | What::Close) && done.failed.is_none())
            .filter(|done| done.end.is_some_and(|end| end < cut))
            .collect();
        let mut allowed: Vec<Vec<u64>> = self.before.iter().map(|id| vec![*id]).collect();
        for done in self.done.iter().filter(|done| done.start < cut) {
            let operation = &done.operation;
            // A disk that is dropped takes along what was not flushed.
            let flushed = flushes
                .iter()
                .any(|flush| flush.operation.phase == operation.phase && done.end.is_some_and(|end| end < flush.start));
            let whole = operation.what != What::Discard || self.template().discards_to_zero();
            let sectors = allowed.iter_mut().skip(operation.first as usize);
            for (id, allowed) in operation.ids.iter().zip(sectors) {
                // One that failed may have done a part: it does not take the place of what was before.
                if flushed && whole && done.failed.is_none() {
                    allowed.clear();
                }
                if !allowed.contains(id) {
                    allowed.push(*id);
                }
            }
        }
        allowed
    }

    /// When to cut: before a call on the image, in the middle of one, or after all.
    pub(crate) fn random_cut(&self, random: &mut Random) -> usize {
        let event = random.below(self.events.len() as u64 + 1) as usize;
        let middle = random.below(2) as usize;
        self.events.get(event).map_or(usize::MAX, |event| event.start + middle)
    }

    /// Operations that failed, and how.
    pub(crate) fn failures(&self) -> Vec<&str> {
        self.done.iter().filter_map(|done| done.failed.as_deref()).collect()
    }

    /// An operation that failed although no call of its phase had.
    pub(crate) fn failed_without_reason(&self) -> Option<String> {
        let failed = self.done.iter().filter_map(|done| Some((done, done.failed.as_ref()?)));
        failed
            .filter(|(done, _)| {
                let same_phase = |other: &&Done| other.operation.phase == done.operation.phase;
                let since = self.done.iter().find(same_phase).map_or(0, |opened| opened.start);
                !self.events.iter().any(|event| {
                    event.change.is_none() && event.start > since && done.end.is_some_and(|end| event.start < end)
                })
            })
            .map(|(done, why)| format!("{:?} failed, and no call on the image had: {why}", done.operation.what))
            .next()
    }

    /// Everything that happened, for people.
    pub(crate) fn story(&self, cut: Option<usize>) -> String {
        let mut lines: Vec<(usize, String)> = Vec::new();
        for Done { operation, start, end, failed } in &self.done {
            let number = operation.number;
            let range = format!("{}+{}", operation.first, operation.count);
            lines.push((*start, format!("[{number}] {:?} {range}", operation.what)));
            if let Some(end) = end {
                let how = failed.as_ref().map_or("done".to_owned(), |why| format!("failed: {why}"));
                lines.push((*end, format!("[{number}] {how}")));
            }
        }
        for event in &self.events {
            let what = match &event.change {
                Some(journal::Change::Write(offset, bytes)) => format!("{offset:#x}+{:#x}", bytes.len()),
                Some(other) => format!("{other:x?}"),
                None => "failed".to_owned(),
            };
            lines.push((event.start, format!("    {:?}: {} {what}", event.issuer, event.call)));
        }
        lines.extend(cut.map(|cut| (cut, "    the power fails".to_owned())));
        lines.sort_by_key(|(time, line)| (*time, line != "    the power fails"));
        lines.into_iter().map(|(time, line)| format!("\n  {time:>5} {line}")).collect()
    }
}
