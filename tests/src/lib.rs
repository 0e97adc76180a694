//! What tests with real parts share: the program under test, other programs with a time
//! limit, scratch directories, canaries, and a way to say that a test cannot run here.
//!
//! Everything here panics when it fails: that is how a test fails.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

pub mod client;
pub mod guest;
pub mod serve;

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use sha2::{Digest, Sha256};

/// Time that a command may take before [`run`] kills it and fails the test.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// The `blockhouse` program under test: `BLOCKHOUSE` if set, else built now.
pub fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        if let Some(program) = std::env::var_os("BLOCKHOUSE") {
            let program = PathBuf::from(program);
            assert!(program.is_file(), "BLOCKHOUSE={} is no file", program.display());
            return program;
        }
        let status = cargo()
            .args(["build", "--quiet", "--locked", "--workspace", "--bin", "blockhouse"])
            .status()
            .expect("cargo can be started");
        assert!(status.success(), "the program under test does not build");
        target_directory().join("debug/blockhouse")
    })
}

/// A new command line of the program under test. It heeds SIGHUP, which a program that whoever runs the tests has started
/// by nohup would have inherited as ignored.
pub fn blockhouse() -> Command {
    let mut command = Command::new(program());
    // SAFETY: the call is async-signal-safe, and the program's own.
    unsafe {
        command.pre_exec(|| {
            libc::signal(libc::SIGHUP, libc::SIG_DFL);
            Ok(())
        });
    }
    command
}

/// The built component of that name, from `cargo xtask build-plugins`.
pub fn component(name: &str) -> PathBuf {
    let file = target_directory().join(format!("components/{name}.wasm"));
    assert!(file.is_file(), "{} is missing: run `cargo xtask build-plugins`", file.display());
    file
}

/// Cargo's target directory, wherever configuration put it.
pub fn target_directory() -> &'static Path {
    static TARGET: OnceLock<PathBuf> = OnceLock::new();
    TARGET.get_or_init(|| {
        let output = cargo()
            .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
            .output()
            .expect("cargo can be started");
        let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON");
        PathBuf::from(metadata["target_directory"].as_str().expect("a path"))
    })
}

fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    command
}

/// Says that the calling test cannot run here, and why. The test then returns.
///
/// libtest knows no skipped tests and calls this one passed; `cargo xtask test` reads the
/// file named by `BLOCKHOUSE_SKIPS` and counts it as what it is.
#[track_caller]
pub fn skip(reason: impl std::fmt::Display) {
    let thread = std::thread::current();
    let caller = std::panic::Location::caller();
    // libtest names its threads after the tests, except when it runs them on the main one.
    let name = thread.name().filter(|name| *name != "main").map_or_else(|| caller.to_string(), str::to_owned);
    let line = format!("skipped: {name}: {reason}\n");
    eprint!("{line}");
    if let Some(file) = std::env::var_os("BLOCKHOUSE_SKIPS") {
        // One write of a short line in append mode: lines of parallel tests stay whole.
        let mut file = std::fs::OpenOptions::new().append(true).create(true).open(file).unwrap();
        file.write_all(line.as_bytes()).unwrap();
    }
}

/// Makes a command run on a kernel that answers these system calls with this error: an older one, or one that has
/// them switched off.
pub fn without_calls(command: &mut Command, calls: &[libc::c_long], errno: i32) {
    let rules = calls.iter().map(|call| (*call, Vec::new())).collect();
    let error = SeccompAction::Errno(errno.unsigned_abs());
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, error, arch).unwrap();
    let program = BpfProgram::try_from(filter).unwrap();
    // SAFETY: it runs between fork and exec, where nothing may be allocated: installing a filter that is compiled
    // makes two system calls.
    unsafe {
        command.pre_exec(move || seccompiler::apply_filter(&program).map_err(|_| std::io::ErrorKind::Other.into()));
    }
}

/// The calls of Landlock, for [`without_calls`].
pub const LANDLOCK: &[libc::c_long] =
    &[libc::SYS_landlock_create_ruleset, libc::SYS_landlock_add_rule, libc::SYS_landlock_restrict_self];

/// Whether this kernel has Landlock. If not, says that the calling test cannot run here.
#[track_caller]
pub fn landlock_is_here() -> bool {
    // SAFETY: 1 asks for the version of the interface; nothing is pointed to.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0usize, 1u32) };
    if version < 1 {
        skip("this kernel has no Landlock");
    }
    version >= 1
}

/// Whether a program is on the path.
pub fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program).is_file())
}

/// What a finished command left behind.
#[derive(Debug)]
pub struct Outcome {
    /// How it ended.
    pub status: ExitStatus,
    /// Everything on standard output.
    pub stdout: Vec<u8>,
    /// Standard error as text.
    pub stderr: String,
    /// From start to end.
    pub elapsed: Duration,
}

impl Outcome {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Fails the test unless the command succeeded.
    #[track_caller]
    pub fn succeeded(self) -> Self {
        assert!(self.status.success(), "{}\nstdout: {}\nstderr: {}", self.status, self.text(), self.stderr);
        self
    }

    /// Fails the test unless the command ended by itself with an error code.
    #[track_caller]
    pub fn refused(self) -> Self {
        assert!(
            self.status.code().is_some_and(|code| code != 0),
            "expected an error, got {}\nstdout: {}\nstderr: {}",
            self.status,
            self.text(),
            self.stderr
        );
        self
    }
}

/// Runs a command to its end, within [`COMMAND_LIMIT`].
#[track_caller]
pub fn run(command: &mut Command) -> Outcome {
    run_within(COMMAND_LIMIT, command)
}

/// Runs a command to its end; when the limit passes, kills it with its children and fails the test.
#[track_caller]
pub fn run_within(limit: Duration, command: &mut Command) -> Outcome {
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    finish_within(limit, child, &format!("{command:?}"))
}

/// Waits for the end of a program that was started, as [`run`] does, and takes what it prints into pipes.
#[track_caller]
pub fn finish(child: Child) -> Outcome {
    let name = format!("process {}", child.id());
    finish_within(COMMAND_LIMIT, child, &name)
}

#[track_caller]
fn finish_within(limit: Duration, mut child: Child, name: &str) -> Outcome {
    let started = Instant::now();
    let stdout = child.stdout.take().map(drain);
    let stderr = child.stderr.take().map(drain);
    let mut in_time = true;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if in_time && started.elapsed() > limit {
            in_time = false;
            // The group, if it has one of its own, so that no child keeps the pipes open.
            let group = format!("-{}", child.id());
            let _ = Command::new("kill").args(["-KILL", "--", &group]).status();
            let _ = child.kill();
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let outcome = Outcome {
        status,
        elapsed: started.elapsed(),
        stdout: stdout.map_or_else(Vec::new, |thread| thread.join().unwrap()),
        stderr: stderr.map_or_else(String::new, |thread| String::from_utf8_lossy(&thread.join().unwrap()).into_owned()),
    };
    assert!(in_time, "killed after {limit:?}: {name}\nstdout: {}\nstderr: {}", outcome.text(), outcome.stderr);
    outcome
}

fn drain(mut pipe: impl std::io::Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        pipe.read_to_end(&mut bytes).unwrap();
        bytes
    })
}

/// Runs `qemu-img` and returns what it printed. It is not under test: on a busy machine it may take its time.
#[track_caller]
pub fn qemu_img<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> String {
    run_within(COMMAND_LIMIT * 10, Command::new("qemu-img").args(arguments)).succeeded().text()
}

/// A directory for one test, removed afterwards. It lies under the target directory, since
/// `/tmp` may be a small memory file system.
pub fn scratch() -> tempfile::TempDir {
    let parent = target_directory().join("scratch");
    std::fs::create_dir_all(&parent).unwrap();
    tempfile::tempdir_in(parent).unwrap()
}

/// Deterministic bytes without repetition, different for each seed: content that shows when
/// it ends up in the wrong place.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    // splitmix64, so that neighbouring seeds have nothing in common.
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut bytes = Vec::with_capacity(length.next_multiple_of(8));
    while bytes.len() < length {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = state;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bytes.extend_from_slice(&(value ^ (value >> 31)).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Lower-case hexadecimal sha256.
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

/// A file that nothing may touch: what an attack would reach for.
///
/// Its content is secret to everybody but the test, so output that holds it proves a read;
/// its size, content and time stamps prove that nobody wrote.
#[derive(Debug)]
pub struct Canary {
    path: PathBuf,
    secret: String,
    before: Traces,
}

#[derive(Debug, PartialEq, Eq)]
struct Traces {
    inode: u64,
    size: u64,
    modified: (i64, i64),
    accessed: (i64, i64),
    mode: u32,
    links: u64,
}

impl Traces {
    fn of(path: &Path) -> Self {
        let status = std::fs::symlink_metadata(path)
            .unwrap_or_else(|error| panic!("the canary {} is gone: {error}", path.display()));
        Self {
            inode: status.ino(),
            size: status.size(),
            modified: (status.mtime(), status.mtime_nsec()),
            accessed: (status.atime(), status.atime_nsec()),
            mode: status.mode(),
            links: status.nlink(),
        }
    }
}

impl Canary {
    /// Makes the file: 64 KiB of lines that hold the secret, so that any sector of it gives it away.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        let unique = format!("{}-{:?}", path.display(), std::time::SystemTime::now());
        let secret = format!("canary-{}", &sha256(unique.as_bytes())[..24]);
        let content = format!("{secret:<63}\n").repeat(1024);
        std::fs::write(&path, content).unwrap();
        // An access time that is older than the modification is updated by the next read
        // on every mount (relatime), unless mounted noatime.
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        let long_ago = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        let times = std::fs::FileTimes::new().set_accessed(long_ago).set_modified(long_ago + Duration::from_secs(1));
        file.set_times(times).unwrap();
        drop(file);
        let before = Traces::of(&path);
        Self { path, secret, before }
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Fails the test if the file was read, written, truncated, replaced or linked, or if the
    /// outcome shows its content.
    #[track_caller]
    pub fn assert_untouched(&self, outcome: &Outcome) {
        self.assert_not_in(&outcome.stdout);
        self.assert_not_in(outcome.stderr.as_bytes());
        assert_eq!(
            self.before,
            Traces::of(&self.path),
            "the canary {} was touched (before, after)",
            self.path.display()
        );
    }

    /// Fails the test if these bytes hold the secret.
    #[track_caller]
    pub fn assert_not_in(&self, bytes: &[u8]) {
        let leaked = bytes.windows(self.secret.len()).any(|window| window == self.secret.as_bytes());
        assert!(!leaked, "the content of {} leaked", self.path.display());
    }
}
