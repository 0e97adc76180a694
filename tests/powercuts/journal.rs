//! The recording: what strace saw of a process that writes images, as changes of files in their order.
//!
//! Times are lines of the recording. A call that strace had to tell of in two lines, since another thread was
//! busy meanwhile, has two.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use blockhouse_tests::run_within;
use serde_json::json;

use crate::images::SECTOR;
use crate::plan::Random;
use crate::workload::{self, Case};

/// All calls that change a file. One that is seen and not understood ends the test.
const CALLS: &str = "write,writev,pwrite64,pwritev,pwritev2,fallocate,truncate,ftruncate,fsync,fdatasync,\
                     sync_file_range,copy_file_range,sendfile,splice";

/// What a call did to its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    Write(u64, Vec<u8>),
    /// Zeroes, and a hole or space that was set aside; the size stays.
    Zero(u64, u64),
    /// The file is at least so long.
    Reach(u64),
    Size(u64),
    Sync,
}

impl Change {
    pub(crate) fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Write(offset, new) => {
                let (offset, end) = (*offset as usize, *offset as usize + new.len());
                if bytes.len() < end {
                    bytes.resize(end, 0);
                }
                bytes[offset..end].copy_from_slice(new);
            }
            Self::Zero(offset, length) => {
                let size = bytes.len() as u64;
                bytes[(*offset).min(size) as usize..(offset + length).min(size) as usize].fill(0);
            }
            Self::Reach(end) => bytes.resize(bytes.len().max(*end as usize), 0),
            Self::Size(size) => bytes.resize(*size as usize, 0),
            Self::Sync => {}
        }
    }

    /// Its parts that a power cut may tear from each other.
    fn parts(&self) -> Vec<Self> {
        let pieces = |offset: u64, length: u64| {
            let end = offset + length;
            let mut starts = vec![offset];
            starts.extend((offset / SECTOR + 1..end.div_ceil(SECTOR)).map(|sector| sector * SECTOR));
            starts.into_iter().map(move |start| (start, end.min((start / SECTOR + 1) * SECTOR)))
        };
        match self {
            Self::Write(offset, bytes) => {
                let part = |start: u64, stop: u64| bytes[(start - offset) as usize..(stop - offset) as usize].to_vec();
                let end = offset + bytes.len() as u64;
                // The size of the file is kept elsewhere than the bytes.
                std::iter::once(Self::Reach(end))
                    .chain(
                        pieces(*offset, bytes.len() as u64).map(|(start, stop)| Self::Write(start, part(start, stop))),
                    )
                    .collect()
            }
            Self::Zero(offset, length) => {
                pieces(*offset, *length).map(|(start, stop)| Self::Zero(start, stop - start)).collect()
            }
            other => vec![other.clone()],
        }
    }
}

/// Who made a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Issuer {
    Host,
    Component,
    /// A sync on a descriptor that is used for nothing else.
    Unknown,
}

impl Issuer {
    /// Only the host writes from several buffers and makes holes; only components write from one, and change
    /// the size of a file. Both sync.
    fn of(call: &str) -> Self {
        match call {
            "pwritev" | "pwritev2" | "fallocate" => Self::Host,
            "pwrite64" | "ftruncate" => Self::Component,
            _ => Self::Unknown,
        }
    }
}

/// One call on an image. `change` is `None` if it failed.
#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) start: usize,
    pub(crate) end: usize,
    pub(crate) call: String,
    pub(crate) issuer: Issuer,
    /// By number: the host and the component have one each.
    descriptor: u32,
    pub(crate) change: Option<Change>,
    /// Made to fail by strace.
    pub(crate) injected: bool,
    /// Not all that it was to write.
    pub(crate) partial: bool,
}

/// Whether a change happened, and was durable, when the power was cut at `cut`.
fn is_durable(event: &Event, events: &[Event], cut: usize) -> bool {
    events.iter().any(|sync| sync.change == Some(Change::Sync) && event.end < sync.start && sync.end < cut)
}

/// The bytes of a file after all of `events`.
pub(crate) fn replay(mut bytes: Vec<u8>, events: &[Event]) -> Vec<u8> {
    events.iter().filter_map(|event| event.change.as_ref()).for_each(|change| change.apply(&mut bytes));
    bytes
}

/// A state that a power cut could leave: of what was not durable, any part.
pub(crate) fn torn(mut bytes: Vec<u8>, events: &[Event], cut: usize, random: &mut Random) -> Vec<u8> {
    // Sometimes nearly nothing is lost, sometimes nearly everything, and if only the program died, nothing.
    let kept = [5, 50, 95, 100][random.below(4) as usize];
    for event in events.iter().filter(|event| event.start < cut) {
        let Some(change) = &event.change else { continue };
        if is_durable(event, events, cut) {
            change.apply(&mut bytes);
        } else {
            for part in change.parts() {
                if random.below(100) < kept {
                    part.apply(&mut bytes);
                }
            }
        }
    }
    bytes
}

#[derive(Debug, Default)]
pub(crate) struct Journal {
    /// By image.
    pub(crate) files: HashMap<PathBuf, Vec<Event>>,
    /// What the process said, and when.
    pub(crate) said: Vec<(usize, String)>,
}

/// How strace is to interfere.
pub(crate) struct Failing {
    pub(crate) call: &'static str,
    pub(crate) error: &'static str,
    /// Each thread's call of that number.
    pub(crate) number: u64,
}

/// Runs `cases` in a process of their own. Returns the recording as a file.
pub(crate) fn record(directory: &Path, name: &str, cases: &[Case], failing: Option<&Failing>) -> PathBuf {
    let path = |what: &str| directory.join(format!("{name}.{what}"));
    let (work, said, ballast, trace) = (path("work"), path("said"), path("ballast"), path("trace"));
    std::fs::write(&said, "").unwrap();
    std::fs::write(&ballast, "").unwrap();
    let content = json!({
        "directory": directory,
        "said": said,
        "ballast": ballast,
        "failing": failing.map(|failing| failing.call),
        "cases": cases.iter().map(Case::to_json).collect::<Vec<_>>(),
    });
    std::fs::write(&work, content.to_string()).unwrap();

    let mut command = Command::new("strace");
    command.args(["-f", "--seccomp-bpf", "-y", "-xx", "-s", "16777216", "-e", "signal=none", "-o"]).arg(&trace);
    command.args(["-e", &format!("trace={CALLS}")]);
    for file in cases.iter().map(|case| case.image.as_path()).chain([said.as_path(), ballast.as_path()]) {
        command.arg("-P").arg(file);
    }
    if let Some(Failing { call, error, number }) = failing {
        command.args(["-e", &format!("inject={call}:error={error}:when={number}")]);
    }
    // A file that cannot grow is an error, as on a full file system, and no signal.
    command.args(["sh", "-c", "trap '' XFSZ; exec \"$@\"", "sh"]).arg(std::env::current_exe().unwrap());
    command.args(["--exact", "the_process_that_is_watched", "--nocapture"]).env(workload::VARIABLE, &work);
    run_within(std::time::Duration::from_secs(300), &mut command).succeeded();
    trace
}

/// Reads a recording.
pub(crate) fn read(trace: &Path) -> Journal {
    let mut journal = Journal::default();
    // Calls that were going on when strace had to tell of another thread.
    let mut unfinished: BTreeMap<&str, (usize, &str)> = BTreeMap::new();
    let text = std::fs::read_to_string(trace).unwrap();
    for (number, line) in text.lines().enumerate() {
        let Some((thread, line)) = line.split_once(' ') else { continue };
        let line = line.trim_start();
        if let Some(begun) = line.strip_suffix(" <unfinished ...>") {
            unfinished.insert(thread, (number, begun));
        } else if let Some(resumed) = line.strip_prefix("<... ") {
            let (start, begun) = unfinished.remove(thread).unwrap();
            let whole = format!("{begun}{}", resumed.split_once("resumed>").unwrap().1);
            journal.add(&whole, start, number);
        } else if !line.starts_with("+++") && !line.starts_with("---") {
            journal.add(line, number, number);
        }
    }
    assert!(unfinished.is_empty(), "calls without an end");
    for events in journal.files.values_mut() {
        events.sort_by_key(|event| event.end);
        name_syncs(events);
    }
    journal
}

/// A sync is by whoever used its descriptor otherwise, at the time that is next to it.
fn name_syncs(events: &mut [Event]) {
    for at in 0..events.len() {
        if events[at].issuer != Issuer::Unknown {
            continue;
        }
        let by_descriptor =
            |other: &&Event| other.descriptor == events[at].descriptor && Issuer::of(&other.call) != Issuer::Unknown;
        let nearest = events.iter().filter(by_descriptor).min_by_key(|other| other.start.abs_diff(events[at].start));
        events[at].issuer = nearest.map_or(Issuer::Unknown, |other| Issuer::of(&other.call));
    }
}

fn bytes(hexadecimal: &str) -> Vec<u8> {
    let digit = |byte: u8| (byte as char).to_digit(16).unwrap() as u8;
    hexadecimal
        .as_bytes()
        .chunks(4)
        .map(|text| {
            assert!(text.len() == 4 && text.starts_with(b"\\x"), "not a byte");
            digit(text[2]) << 4 | digit(text[3])
        })
        .collect()
}

impl Journal {
    /// `call(descriptor<path>, arguments) = result`.
    fn add(&mut self, line: &str, start: usize, end: usize) {
        let excerpt = || line.chars().take(300).collect::<String>();
        let misunderstood = || -> ! { panic!("not understood: {}", excerpt()) };
        let (call, rest) = line.split_once('(').unwrap_or_else(|| misunderstood());
        let (arguments, result) = rest.rsplit_once(" = ").unwrap_or_else(|| misunderstood());
        let arguments = arguments.trim_end().strip_suffix(')').unwrap_or_else(|| misunderstood());
        let (descriptor, arguments) = arguments.split_once('>').unwrap_or_else(|| misunderstood());
        let (descriptor, path) = descriptor.split_once('<').unwrap_or_else(|| misunderstood());
        let descriptor = descriptor.parse().unwrap_or_else(|_| misunderstood());
        let path = PathBuf::from(OsString::from_vec(bytes(path)));
        let result_word = result.split(' ').next().unwrap();
        let result: Option<u64> = result_word.parse().ok();
        if result.is_none() && result_word != "-1" {
            misunderstood();
        }
        assert!(!arguments.contains("\"..."), "strace left out bytes");

        // The bytes of all buffers, and what is no bytes.
        let (mut data, mut numbers) = (Vec::new(), Vec::new());
        for (at, part) in arguments.split('"').enumerate() {
            if at % 2 == 1 {
                data.extend(bytes(part));
            } else {
                numbers.push(part);
            }
        }
        let last = numbers.last().copied().unwrap_or_default();
        let fields: Vec<&str> = last.split(", ").collect();
        let field = |from_the_end: usize| -> u64 {
            let field = fields.get(fields.len().wrapping_sub(from_the_end)).unwrap_or_else(|| misunderstood());
            field.parse().unwrap_or_else(|_| misunderstood())
        };
        let partial = result.is_some_and(|written| written < data.len() as u64);
        data.truncate(result.unwrap_or(0) as usize);
        if call == "write" && path.extension().is_some_and(|extension| extension == "said") {
            let text = String::from_utf8(data).unwrap();
            assert!(text.ends_with('\n'), "half a line: {text}");
            self.said.push((end, text.trim_end().to_owned()));
            return;
        }
        if path.extension().is_some_and(|extension| extension == "ballast") {
            return;
        }
        let change = result.map(|_| match call {
            "pwrite64" | "pwritev" => Change::Write(field(1), data),
            "pwritev2" => Change::Write(field(2), data),
            "ftruncate" => Change::Size(field(1)),
            "fsync" | "fdatasync" => Change::Sync,
            "fallocate" => {
                let (mode, offset, length) = (fields[1], field(2), field(1));
                match mode {
                    "0" => Change::Reach(offset + length),
                    "FALLOC_FL_KEEP_SIZE|FALLOC_FL_PUNCH_HOLE" | "FALLOC_FL_KEEP_SIZE|FALLOC_FL_ZERO_RANGE" => {
                        Change::Zero(offset, length)
                    }
                    _ => misunderstood(),
                }
            }
            _ => misunderstood(),
        });
        let injected = line.ends_with("(INJECTED)");
        self.files.entry(path).or_default().push(Event {
            start,
            end,
            call: call.to_owned(),
            issuer: Issuer::of(call),
            descriptor,
            change,
            injected,
            partial,
        });
    }
}

/// Copies what a recording says of one image, and what case number `place` said, as the first case of its own
/// recording.
pub(crate) fn extract(trace: &Path, place: usize, image: &Path, to: &Path) {
    let hexadecimal = |text: &str| text.bytes().map(|byte| format!("\\x{byte:02x}")).collect::<String>();
    let of_image = format!("<{}>", hexadecimal(image.to_str().unwrap()));
    let said = format!("{}>, \"{}", hexadecimal(".said"), hexadecimal(&format!("{place} ")));
    let mut kept = String::new();
    let mut open: BTreeMap<&str, bool> = BTreeMap::new();
    let text = std::fs::read_to_string(trace).unwrap();
    for line in text.lines() {
        let Some((thread, call)) = line.split_once(' ') else { continue };
        let resumed = call.trim_start().starts_with("<... ");
        let wanted = if resumed {
            open.remove(thread).unwrap_or(false)
        } else {
            call.contains(&of_image) || call.contains(&said)
        };
        if call.ends_with("<unfinished ...>") {
            open.insert(thread, wanted);
        }
        // Times are lines: the others stay, empty.
        if wanted {
            kept += &line.replacen(&said, &said.replace(&hexadecimal(&format!("{place} ")), &hexadecimal("0 ")), 1);
        }
        kept.push('\n');
    }
    std::fs::write(to, kept).unwrap();
}
