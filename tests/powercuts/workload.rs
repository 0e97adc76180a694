//! The process that is watched: it carries out plans with the real component and the real disk, and says of
//! each operation when it begins and how it ended. What it says is recorded together with what it does to the
//! image, so that the order of both is known.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use blockhouse_sandbox::block::{Access, BlockBackend, Disk, DiskOptions, Result, VolatileSlice};
use blockhouse_sandbox::{Formats, Grants, Limits, OpenRequest, Opener, Sandbox};
use blockhouse_tests::component;
use serde_json::{Value, json};

use crate::images::{SECTOR, TEMPLATES, sectors};
use crate::plan::{Kind, Operation, Plan, What};

/// Set in the process that is watched: the file that says what to do.
pub(crate) const VARIABLE: &str = "POWERCUTS_WORKLOAD";

/// One plan and the image it is for.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) image: PathBuf,
    pub(crate) template: usize,
    pub(crate) seed: u64,
    pub(crate) kind: Kind,
    /// Calls of the kind that is made to fail, on a file that nobody needs, before the image is opened.
    pub(crate) ballast: u64,
    /// Files cannot grow past that many bytes. Only for plans of one thread.
    pub(crate) file_size: Option<u64>,
    /// Calls of host functions within one call of the component, before it traps.
    pub(crate) host_calls: Option<u64>,
}

impl Case {
    pub(crate) fn new(image: PathBuf, template: usize, seed: u64, kind: Kind) -> Self {
        Self { image, template, seed, kind, ballast: 0, file_size: None, host_calls: None }
    }

    pub(crate) fn plan(&self) -> Plan {
        Plan::new(&TEMPLATES[self.template], self.seed, self.kind)
    }

    pub(crate) fn to_json(&self) -> Value {
        json!({
            "image": self.image,
            "template": self.template,
            "seed": self.seed,
            "kind": match self.kind { Kind::Work => "work", Kind::Alone => "alone", Kind::Recovery => "recovery" },
            "ballast": self.ballast,
            "file_size": self.file_size,
            "host_calls": self.host_calls,
        })
    }

    fn from_json(value: &Value) -> Self {
        Self {
            image: value["image"].as_str().unwrap().into(),
            template: value["template"].as_u64().unwrap() as usize,
            seed: value["seed"].as_u64().unwrap(),
            kind: match value["kind"].as_str().unwrap() {
                "work" => Kind::Work,
                "alone" => Kind::Alone,
                _ => Kind::Recovery,
            },
            ballast: value["ballast"].as_u64().unwrap(),
            file_size: value["file_size"].as_u64(),
            host_calls: value["host_calls"].as_u64(),
        }
    }
}

pub(crate) fn opener(directory: &Path, host_calls: Option<u64>) -> Opener {
    let mut limits = Limits::default();
    if let Some(calls) = host_calls {
        limits.host_calls = calls;
    }
    // Every process, and every limit, starts a sandbox of its own.
    let sandbox = Sandbox::new(limits).unwrap().code_cache(&directory.join("code")).unwrap();
    let mut formats = Formats::new();
    for format in ["raw", "qcow2"] {
        formats.add(format, sandbox.load_file(&component(format)).unwrap());
    }
    Opener::new(&sandbox, formats).grants(Grants::new().allow(directory).unwrap())
}

/// The part of the process that is watched.
pub(crate) fn run(work: &Path) {
    let work: Value = serde_json::from_slice(&std::fs::read(work).unwrap()).unwrap();
    let path = |name: &str| PathBuf::from(work[name].as_str().unwrap());
    let directory = path("directory");
    let said = File::options().append(true).open(path("said")).unwrap();
    let ballast = File::options().write(true).open(path("ballast")).unwrap();
    let cases: Vec<Case> = work["cases"].as_array().unwrap().iter().map(Case::from_json).collect();
    let shared = cases.iter().any(|case| case.host_calls.is_none()).then(|| opener(&directory, None));
    for (number, case) in cases.iter().enumerate() {
        let own = case.host_calls.map(|calls| opener(&directory, Some(calls)));
        let opener = own.as_ref().or(shared.as_ref()).unwrap();
        let subject = Subject { opener, case, number, said: &said };
        std::thread::scope(|scope| {
            // A thread for each case: strace counts the calls of each thread for itself.
            scope.spawn(|| {
                for _ in 0..case.ballast {
                    call_in_vain(work["failing"].as_str().unwrap_or_default(), &ballast);
                }
                subject.run();
            });
        });
        limit_file_size(None);
    }
}

fn limit_file_size(bytes: Option<u64>) {
    let limits = rustix::process::getrlimit(rustix::process::Resource::Fsize);
    let limits = rustix::process::Rlimit { current: bytes, ..limits };
    rustix::process::setrlimit(rustix::process::Resource::Fsize, limits).unwrap();
}

fn call_in_vain(name: &str, file: &File) {
    match name {
        "pwrite64" => {
            file.write_at(b"x", 0).unwrap();
        }
        "pwritev" => {
            rustix::io::pwritev(file, &[std::io::IoSlice::new(b"x")], 0).unwrap();
        }
        "fdatasync" => file.sync_data().unwrap(),
        "ftruncate" => file.set_len(0).unwrap(),
        "fallocate" => rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, 4096).unwrap(),
        _ => panic!("no such call: {name}"),
    }
}

struct Subject<'a> {
    opener: &'a Opener,
    case: &'a Case,
    number: usize,
    said: &'a File,
}

impl Subject<'_> {
    /// One call of `write`: a line in the recording.
    fn say(&self, operation: &Operation, what: &str) {
        let line = format!("{} {} {what}\n", self.number, operation.number);
        // The recording is no image: it may grow.
        limit_file_size(None);
        // What is said may be longer than an image.
        limit_file_size(None);
        let written = { self.said }.write(line.as_bytes()).unwrap();
        limit_file_size(self.case.file_size);
        limit_file_size(self.case.file_size);
        assert_eq!(written, line.len());
    }

    fn act<T>(&self, operation: &Operation, action: impl FnOnce() -> Result<T>) -> Option<T> {
        self.say(operation, "start");
        match action() {
            Ok(done) => {
                self.say(operation, "ok");
                Some(done)
            }
            Err(error) => {
                self.say(operation, &format!("failed {error}").replace('\n', " "));
                None
            }
        }
    }

    fn run(&self) {
        for phase in self.case.plan().phases {
            // As guests have it: space is reserved ahead of writes that follow each other.
            let disk = DiskOptions { allocate_ahead_bytes: 1 << 20, ..DiskOptions::default() };
            let request =
                OpenRequest { access: Access::ReadWrite, disk, ..OpenRequest::new(&self.case.image, "qcow2") };
            let Some(disk) = self.act(&phase.open, || self.opener.open(&request)) else { continue };
            let disk = disk.disk;
            if let [operations] = &phase.threads[..] {
                self.operate(&disk, operations);
            } else {
                std::thread::scope(|scope| {
                    for operations in &phase.threads {
                        scope.spawn(|| self.operate(&disk, operations));
                    }
                });
            }
            if let Some(close) = &phase.close {
                self.act(close, || disk.close());
            }
        }
    }

    fn operate(&self, disk: &Disk, operations: &[Operation]) {
        for operation in operations {
            let (offset, length) = (operation.first * SECTOR, operation.count * SECTOR);
            self.act(operation, || match operation.what {
                What::Write => {
                    let mut bytes = sectors(operation.ids.iter().copied());
                    // As guests do: more than one buffer.
                    let (one, two) = bytes.split_at_mut(length as usize / 3);
                    disk.write(&[VolatileSlice::from(one), VolatileSlice::from(two)], offset)
                }
                What::Zero { may_unmap } => disk.write_zeroes(offset, length, may_unmap),
                What::Discard => disk.discard(offset, length),
                What::Flush => disk.flush(),
                What::Open | What::Close => Ok(()),
            });
        }
    }
}
