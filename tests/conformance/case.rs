//! One image of the catalogue: made, then put to every question that somebody else can answer too.
//!
//! ```text
//!            ┌── blockhouse read ── the same bytes as ── qemu-img convert, imago where it can
//!   image ───┼── blockhouse map ─── true by itself; the same meaning as ── qemu-img map
//!            └── blockhouse info ── the same chain as ── qemu-img info --backing-chain
//! ```

use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;
use std::time::Instant;

use blockhouse_tests::{blockhouse, on_path, run, skip};

use crate::content::Content;
use crate::lab::Lab;
use crate::{imago, info, map};

/// What native imago 0.2.6 does not read. It must refuse images that have any of these, and no others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Beyond {
    /// qcow2 with `compression_type=zstd`.
    Zstd,
    /// qcow2 with `extended_l2=on`.
    ExtendedL2,
    /// VMDK with sparse or compressed extents.
    SparseVmdk,
    /// VMDK with a parent.
    VmdkParent,
    /// qcow2 whose backing file is a VMDK.
    VmdkBacking,
}

/// The version of QEMU whose answers count. Older ones say less in their maps.
const REFERENCE: u32 = 10;

/// An image and how to open it. Paths are relative to the lab.
pub(crate) struct Subject {
    pub(crate) image: String,
    pub(crate) format: &'static str,
    pub(crate) allow: Vec<String>,
    /// What `--snapshot` gets, and what `qemu-img convert -l` gets.
    pub(crate) snapshot: Option<(String, String)>,
    pub(crate) beyond: Vec<Beyond>,
}

impl Subject {
    pub(crate) fn new(image: &str, format: &'static str) -> Self {
        Self { image: image.to_owned(), format, allow: Vec::new(), snapshot: None, beyond: Vec::new() }
    }

    /// Grants files or directories.
    pub(crate) fn allow(mut self, paths: &[&str]) -> Self {
        self.allow.extend(paths.iter().map(|path| (*path).to_owned()));
        self
    }

    /// Says that imago does not read it.
    pub(crate) fn beyond(mut self, features: &[Beyond]) -> Self {
        self.beyond.extend(features);
        self
    }

    /// Reads a snapshot.
    pub(crate) fn snapshot(mut self, key: &str, oracle: &str) -> Self {
        self.snapshot = Some((key.to_owned(), oracle.to_owned()));
        self
    }

    /// A blockhouse command on this image, up to its own options.
    pub(crate) fn command(&self, lab: &Lab, command: &str) -> Command {
        let mut program = blockhouse();
        program.current_dir(lab.root()).args([command, "--format", self.format]);
        for path in &self.allow {
            program.args(["--allow", path]);
        }
        if let Some((key, _)) = &self.snapshot {
            program.args(["--snapshot", key]);
        }
        program.arg(&self.image);
        program
    }
}

/// An image to be.
pub(crate) struct Case {
    pub(crate) name: String,
    make: Box<dyn Fn(&Lab) -> Subject>,
}

impl Case {
    pub(crate) fn new(name: impl Into<String>, make: impl Fn(&Lab) -> Subject + 'static) -> Self {
        Self { name: name.into(), make: Box::new(make) }
    }
}

/// What was compared.
#[derive(Default)]
struct Tally {
    images: usize,
    bytes: u64,
    ranges: usize,
    imago_agrees: usize,
    imago_refuses: usize,
}

/// Makes and checks every image, and fails with the list of those that are wrong.
pub(crate) fn check_all((topic, cases): crate::Topic) {
    if !have_qemu() {
        return;
    }
    let started = Instant::now();
    let mut tally = Tally::default();
    let mut failures = Vec::new();
    for case in cases() {
        let lab = Lab::new();
        let result = catch_unwind(AssertUnwindSafe(|| check(&lab, &(case.make)(&lab), &mut tally)));
        let why = match result {
            Ok(Ok(())) => continue,
            Ok(Err(why)) => why,
            Err(panic) => match panic.downcast::<String>() {
                Ok(text) => *text,
                Err(panic) => panic.downcast::<&str>().map_or("panicked".to_owned(), |text| (*text).to_owned()),
            },
        };
        failures.push(format!("{}: {why}\n  kept in {}", case.name, lab.keep().display()));
    }
    // Past the capture of libtest: how much was checked is worth knowing when all is well.
    let _ = writeln!(
        std::io::stderr(),
        "conformance: {topic}: {} images, {} MiB, {} map ranges as QEMU; imago reads {} and refuses {}; {:.1} s",
        tally.images,
        tally.bytes >> 20,
        tally.ranges,
        tally.imago_agrees,
        tally.imago_refuses,
        started.elapsed().as_secs_f64()
    );
    assert!(failures.is_empty(), "{} of the images of {topic} fail:\n{}", failures.len(), failures.join("\n"));
}

/// Whether there is something to compare with; says so if not.
#[track_caller]
pub(crate) fn have_qemu() -> bool {
    if !on_path("qemu-img") || !on_path("qemu-io") {
        skip("there is no qemu-img or no qemu-io (Debian: qemu-utils)");
        return false;
    }
    // `qemu-img version 10.0.2 (Debian ...)`
    let version = run(Command::new("qemu-img").arg("--version")).succeeded().text();
    let major = version.split_whitespace().nth(2).and_then(|version| version.split('.').next()?.parse::<u32>().ok());
    if major.is_none_or(|major| major < REFERENCE) {
        skip(format!(
            "the reference is qemu-img {REFERENCE} or later, and here is: {}",
            version.lines().next().unwrap_or_default()
        ));
        return false;
    }
    true
}

fn check(lab: &Lab, subject: &Subject, tally: &mut Tally) -> Result<(), String> {
    let expected = convert(lab, subject);
    let size = expected.size();
    read_whole(lab, subject, &expected)?;

    let ours = run(subject.command(lab, "map").arg("--json")).succeeded().text();
    let ours = map::parse(&ours, size)?;
    map::tells_the_truth(&ours, &expected)?;
    // qemu-img map and info know no snapshots.
    if subject.snapshot.is_none() {
        let theirs = lab.qemu_img(&format!("map --output=json -f {} {}", subject.format, subject.image));
        tally.ranges += map::agree(&ours, &map::parse(&theirs, size)?, &expected)?;
        info::compare(lab, subject)?;

        match imago::open(&lab.path(&subject.image), subject.format) {
            Ok(disk) if subject.beyond.is_empty() => {
                imago::compare(&disk, &expected)?;
                tally.imago_agrees += 1;
            }
            Ok(_) => return Err(format!("imago opens it in spite of {:?}: it may serve as an oracle", subject.beyond)),
            Err(_) if !subject.beyond.is_empty() => tally.imago_refuses += 1,
            Err(error) => return Err(format!("imago does not open it: {error}")),
        }
    }
    tally.images += 1;
    tally.bytes += size;
    Ok(())
}

/// The content as QEMU sees it.
pub(crate) fn convert(lab: &Lab, subject: &Subject) -> Content {
    let snapshot = subject.snapshot.as_ref().map_or(String::new(), |(_, oracle)| format!("-l {oracle}"));
    lab.qemu_img(&format!("convert -t unsafe {snapshot} -f {} -O raw {} expected", subject.format, subject.image));
    Content::open(&lab.path("expected"))
}

fn read_whole(lab: &Lab, subject: &Subject, expected: &Content) -> Result<(), String> {
    run(subject.command(lab, "read").args(["--output", "found"])).succeeded();
    let found = Content::open(&lab.path("found"));
    if found.size() != expected.size() {
        return Err(format!("blockhouse reads {} bytes, QEMU {}", found.size(), expected.size()));
    }
    match expected.first_difference(0, expected.size(), |done, to| found.read(done, to)) {
        None => Ok(()),
        Some(difference) => Err(format!("blockhouse and QEMU read other bytes: {difference}")),
    }
}
