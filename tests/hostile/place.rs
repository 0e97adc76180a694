//! Where an attack happens: a directory that is granted, a canary beside it, and the program that
//! must not be led from the one to the other.
//!
//! ```text
//!   root/
//!     images/            granted, unless a test says otherwise
//!       vm/              where the hostile image usually lies
//!     secret/canary      not granted: what the attack is after
//!     audit-N.jsonl      what the program says that it opened
//! ```

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use blockhouse_tests::{Canary, Outcome, program, run_within, scratch};
use serde_json::Value;

use crate::{snapshot, tally};

/// Any command of the program on any image ends within this time.
pub(crate) const TIME_LIMIT: Duration = Duration::from_secs(10);

/// How long two sides race for a name or for bytes. `HOSTILE_RACE_SECONDS` makes it longer.
pub(crate) fn race() -> Duration {
    let seconds = std::env::var("HOSTILE_RACE_SECONDS").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(3))
}

/// Private memory that the program may have, in KiB: RLIMIT_DATA. It is not the address space, of
/// which a WebAssembly memory reserves 4 GiB without using them.
const MEMORY_LIMIT_KIB: u32 = 256 << 10;

/// The scene of an attack. See the picture above.
pub(crate) struct Place {
    pub(crate) canary: Canary,
    root: PathBuf,
    audits: AtomicUsize,
    _temp: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        let temp = scratch();
        let root = temp.path().canonicalize().unwrap();
        std::fs::create_dir_all(root.join("images/vm")).unwrap();
        std::fs::create_dir(root.join("secret")).unwrap();
        let canary = Canary::new(root.join("secret/canary"));
        Self { canary, root, audits: AtomicUsize::new(0), _temp: temp }
    }

    pub(crate) fn path(&self, below: &str) -> PathBuf {
        self.root.join(below)
    }

    /// An absolute path as text.
    pub(crate) fn text(&self, below: &str) -> String {
        self.path(below).to_str().unwrap().to_owned()
    }

    pub(crate) fn write(&self, below: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(below);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// Text of the program with the paths of this run taken out, and the lines of source.
    pub(crate) fn normalize(&self, text: &str) -> String {
        let text = text.replace(self.root.to_str().unwrap(), "$ROOT");
        // Where a component panics is not what it is about.
        let mut parts = text.split(".rs:");
        let first = parts.next().unwrap_or_default().to_owned();
        let rest = parts.map(|part| part.trim_start_matches(|at: char| at.is_ascii_digit() || at == ':'));
        rest.fold(first, |text, part| text + ".rs:LINE:" + part)
    }

    /// Opens an image with a command of the program, with `images/` granted.
    pub(crate) fn open(&self, command: &str, format: &str, image: &Path) -> Attempt {
        self.open_with(command, format, image, &[self.path("images")], &[])
    }

    /// Opens an image with a command of the program, with these grants and further arguments.
    pub(crate) fn open_with(
        &self,
        command: &str,
        format: &str,
        image: &Path,
        grants: &[PathBuf],
        more: &[&str],
    ) -> Attempt {
        let mut program = limited();
        program.arg(command).args(["--format", format]);
        for grant in grants {
            program.arg("--allow").arg(grant);
        }
        program.args(more);
        self.finish(program, |program| {
            program.arg(image);
        })
    }

    /// Runs a command line of the program with an audit file.
    pub(crate) fn finish(&self, mut program: Command, rest: impl FnOnce(&mut Command)) -> Attempt {
        let audit = self.path(&format!("audit-{}.jsonl", self.audits.fetch_add(1, Ordering::Relaxed)));
        program.arg("--audit").arg(&audit);
        rest(&mut program);
        let outcome = run_within(TIME_LIMIT * 2, &mut program);
        assert!(outcome.elapsed < TIME_LIMIT, "it took {:?}: {program:?}", outcome.elapsed);
        let opens = std::fs::read_to_string(&audit).unwrap_or_default();
        let opens = opens.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let attempt = Attempt { outcome, opens, root: self.root.to_str().unwrap().to_owned() }.without_a_crash();
        if attempt.code() != 0 {
            snapshot::refusal(&attempt.error());
        }
        attempt
    }

    /// The reference is refused by `info` and `read` with this line on standard error and exit code
    /// 3, the audit shows that one refused open and no other, and the canary is untouched.
    ///
    /// In the line, `$ROOT` stands for the root of this place.
    #[track_caller]
    pub(crate) fn assert_denied(&self, format: &str, image: &Path, asked: &str, line: &str) {
        for command in ["info", "read"] {
            let attempt = self.open(command, format, image);
            attempt.assert_denied(line);
            assert_eq!(attempt.opens("denied"), [asked], "denied opens of {command}");
            assert_eq!(attempt.opens("allowed"), [""; 0], "allowed opens of {command}");
            if command != "info" {
                assert_eq!(attempt.outcome.text(), "", "{command} printed something");
            }
            self.canary.assert_untouched(&attempt.outcome);
        }
        self.assert_nothing_new();
        tally::image_refused();
    }

    /// The twin of an attack: the same reference, granted, gives the bytes that it names.
    #[track_caller]
    pub(crate) fn assert_works_when_granted(&self, format: &str, image: &Path) {
        let grants = [self.path("images"), self.canary.path().to_owned()];
        let attempt = self.open_with("read", format, image, &grants, &[]);
        let attempt = attempt.succeeded();
        let content = std::fs::read(self.canary.path()).unwrap();
        assert!(attempt.outcome.stdout.starts_with(&content), "the granted file is not what was read");
        tally::image_served();
    }

    /// No attack leaves a file behind.
    #[track_caller]
    fn assert_nothing_new(&self) {
        let names = |directory: &str| -> Vec<_> {
            std::fs::read_dir(self.path(directory)).unwrap().map(|entry| entry.unwrap().file_name()).collect()
        };
        assert_eq!(names("secret"), ["canary"], "something was made beside the canary");
        for name in names("") {
            let name = name.into_string().unwrap();
            assert!(
                ["images", "secret"].contains(&name.as_str()) || name.starts_with("audit-"),
                "{name} was made by the attack"
            );
        }
    }
}

/// The program, with its memory limited.
pub(crate) fn limited() -> Command {
    limited_to(MEMORY_LIMIT_KIB)
}

/// The same, with so many KiB.
pub(crate) fn limited_to(kib: u32) -> Command {
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("ulimit -d {kib} && exec \"$0\" \"$@\"")).arg(program());
    command
}

/// What came of running the program on an image.
#[derive(Debug)]
pub(crate) struct Attempt {
    pub(crate) outcome: Outcome,
    /// The lines of the audit file.
    opens: Vec<Value>,
    root: String,
}

impl Attempt {
    /// Whatever the image is, the program ends by itself and without a panic.
    #[track_caller]
    fn without_a_crash(self) -> Self {
        let Outcome { status, stderr, .. } = &self.outcome;
        assert_eq!(status.signal(), None, "killed: {stderr}");
        assert_ne!(status.code(), Some(101), "a panic: {stderr}");
        // A component's panic is a message in the log; one of the host, in any thread, is a line of its own.
        assert!(!stderr.lines().any(|line| line.starts_with("thread '")), "a panic: {stderr}");
        self
    }

    pub(crate) fn code(&self) -> i32 {
        self.outcome.status.code().unwrap()
    }

    /// Standard error with the paths of this run taken out.
    pub(crate) fn stderr(&self) -> String {
        // Also in names that are made of it.
        let dashed = self.root.replace('/', "-");
        self.outcome.stderr.replace(&self.root, "$ROOT").replace(&dashed, "-ROOT")
    }

    /// The error itself, after what was logged: with its causes and what to do about it, in one line.
    pub(crate) fn error(&self) -> String {
        let stderr = self.stderr();
        let lines: Vec<&str> = stderr.lines().collect();
        let start = lines.iter().rposition(|line| line.starts_with("blockhouse: ")).unwrap_or(lines.len().max(1) - 1);
        lines.get(start..).unwrap_or_default().concat()
    }

    /// The paths of opens with this outcome, in order.
    pub(crate) fn opens(&self, outcome: &str) -> Vec<String> {
        let these = self.opens.iter().filter(|open| open["outcome"] == outcome);
        these.map(|open| open["path"].as_str().unwrap().replace(&self.root, "$ROOT")).collect()
    }

    #[track_caller]
    pub(crate) fn succeeded(self) -> Self {
        assert_eq!(self.code(), 0, "stderr: {}", self.outcome.stderr);
        self
    }

    #[track_caller]
    pub(crate) fn assert_denied(&self, line: &str) {
        assert_eq!((self.code(), self.stderr().trim_end()), (3, line));
    }

    /// The program ended with this code and an error that has all the words.
    #[track_caller]
    pub(crate) fn assert_error(&self, code: i32, words: &[&str]) {
        let stderr = self.stderr();
        assert_eq!(self.code(), code, "stderr: {stderr}");
        for word in words {
            assert!(stderr.contains(word), "no {word:?} in {stderr:?}");
        }
    }
}
