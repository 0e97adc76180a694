//! Where a guest test runs: on this machine's KVM, or on a KVM inside an emulated machine.
//!
//! ```text
//!   hardware virtualization here          none here (a virtual machine, CI)
//!   ┌──────────────────────────┐          ┌────────────────────────────────────┐
//!   │ blockhouse run           │          │ QEMU, emulating a CPU with SVM     │
//!   │  └─ guest                │          │  └─ Debian kernel with kvm-amd     │
//!   └──────────────────────────┘          │      └─ blockhouse run             │
//!                                         │          └─ guest                  │
//!                                         └────────────────────────────────────┘
//! ```
//!
//! The program and the guest are the same in both, and so is what KVM does; inside, time
//! passes about twenty times slower.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use blockhouse_tests::guest::pieces::{self, INIT, Linux};
use blockhouse_tests::guest::qemu::{KERNEL_OPTIONS, find_qemu, qemu};
use blockhouse_tests::{on_path, program, run, run_within, scratch, target_directory};
use tempfile::TempDir;

/// From start to power-off, for a job that starts one guest; some 15 seconds are usual.
pub(crate) const LIMIT: Duration = Duration::from_secs(240);

/// A machine that runs jobs.
pub(crate) enum Machine {
    /// This one.
    Here,
    /// An emulated one.
    Emulated(Box<Emulator>),
}

/// QEMU and what it boots.
pub(crate) struct Emulator {
    /// Where the package was unpacked; `None` when QEMU is installed.
    unpacked: Option<PathBuf>,
    linux: Linux,
}

/// Files and a script for `sh`, which runs in the directory where the files are. The
/// program under test is one of them, as `./blockhouse`.
pub(crate) struct Job<'a> {
    /// Names the log.
    pub(crate) name: &'a str,
    /// Path below the job's directory, and where the file is now.
    pub(crate) files: Vec<(&'a str, PathBuf)>,
    pub(crate) script: String,
    /// Time from start to end, after which the test fails.
    pub(crate) limit: Duration,
    /// If the job brings files out: how many bytes they have together, at most. The script
    /// writes tar archives to its file descriptor 3, one after the other.
    pub(crate) results: Option<u64>,
}

/// What a job left behind.
pub(crate) struct Log {
    /// What it printed.
    pub(crate) text: String,
    file: PathBuf,
    results: TempDir,
}

impl Machine {
    /// The machine to use here, or why there is none.
    pub(crate) fn find() -> Result<Self, String> {
        if std::env::var_os("BLOCKHOUSE_QUICK").is_some() {
            return Err("left out by --quick".into());
        }
        if !cfg!(target_arch = "x86_64") {
            return Err("the emulated machine is made for x86-64 only".into());
        }
        let processor = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let hardware = processor.split_whitespace().any(|flag| flag == "svm" || flag == "vmx");
        let kvm = std::fs::File::options().read(true).write(true).open("/dev/kvm");
        if hardware && kvm.is_ok() {
            return Ok(Self::Here);
        }
        let unpacked = find_qemu()?;
        Ok(Self::Emulated(Box::new(Emulator { unpacked, linux: Linux::find()? })))
    }

    /// Runs a job to its end and returns what it printed, which is in `<target>/guest/NAME.log` as well.
    #[track_caller]
    pub(crate) fn run(&self, job: &Job<'_>) -> Log {
        let _turn = turn();
        let logs = target_directory().join("guest");
        std::fs::create_dir_all(&logs).unwrap();
        let file = logs.join(format!("{}.log", job.name));
        let results = scratch();
        let archive = results.path().join(ARCHIVE);
        let started = Instant::now();
        let text = match self {
            Self::Here => run_here(job, &file, &archive),
            Self::Emulated(emulator) => emulator.run(job, &file, &archive),
        };
        eprintln!("{}: {:.1} s, {}", job.name, started.elapsed().as_secs_f64(), file.display());
        if job.results.is_some() {
            // Zeroes lie between the archives and after them.
            let mut tar = Command::new("tar");
            run(tar.current_dir(results.path()).args(["--extract", "--ignore-zeros", "--file", ARCHIVE])).succeeded();
        }
        Log { text, file, results }
    }
}

impl Log {
    /// Fails the test with the end of the log.
    #[track_caller]
    pub(crate) fn fail(&self, what: impl std::fmt::Display) -> ! {
        let lines: Vec<&str> = self.text.lines().collect();
        let tail = lines[lines.len().saturating_sub(40)..].join("\n");
        panic!("{what}; all of the log is in {}, its end:\n{tail}", self.file.display());
    }

    /// Where the files are that the job brought out.
    pub(crate) fn results(&self) -> &Path {
        self.results.path()
    }

    /// The rest of each line that begins with `key`, without what the serial line adds.
    pub(crate) fn values(&self, key: &str) -> Vec<&str> {
        self.text.lines().filter_map(|line| line.trim_end().strip_prefix(key)).collect()
    }
}

/// The file with the archives that a job writes.
const ARCHIVE: &str = "results.tar";

/// Runs the shell with its output in a file, which stays when the limit kills it.
#[track_caller]
fn logged(limit: Duration, command: Command, file: &Path) -> String {
    let mut shell = Command::new("sh");
    // `exec`, so that the limit hits the program itself; the log is plain text for `less`.
    shell.args(["-c", "exec \"$@\" >\"$LOG\" 2>&1", "sh"]).env("LOG", file);
    shell.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        shell.env(name, value.unwrap_or_default());
    }
    if let Some(directory) = command.get_current_dir() {
        shell.current_dir(directory);
    }
    run_within(limit, &mut shell);
    String::from_utf8_lossy(&std::fs::read(file).unwrap()).into_owned()
}

fn run_here(job: &Job<'_>, log: &Path, archive: &Path) -> String {
    let directory = scratch();
    for (name, from) in &job.files {
        let to = directory.path().join(name);
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::copy(from, to).unwrap();
    }
    std::os::unix::fs::symlink(program(), directory.path().join("blockhouse")).unwrap();
    let mut shell = Command::new("sh");
    let script = format!("exec 3>\"$RESULTS\"\n{}", job.script);
    shell.args(["-c", &script]).env("RESULTS", archive).current_dir(directory.path());
    logged(job.limit, shell, log)
}

impl Emulator {
    fn run(&self, job: &Job<'_>, log: &Path, archive: &Path) -> String {
        let directory = scratch();
        let initramfs = directory.path().join("initramfs");
        std::fs::write(&initramfs, self.initramfs(job)).unwrap();
        let mut command = self.command(&initramfs);
        if let Some(size) = job.results {
            // A disk of the emulated machine, without a file system: the archives as they are.
            std::fs::File::create(archive).unwrap().set_len(size.next_multiple_of(1 << 20)).unwrap();
            command.arg("-drive").arg(format!("if=virtio,format=raw,cache=unsafe,file={}", archive.display()));
        }
        logged(job.limit, command, log)
    }

    /// The root file system of the emulated machine: busybox, KVM, the program with its libraries, the job.
    fn initramfs(&self, job: &Job<'_>) -> Vec<u8> {
        let mut archive = pieces::busybox().unwrap();
        let disk = job.results.is_some();
        let modules: &[&str] = if disk { &["kvm_amd", "virtio_pci", "virtio_blk"] } else { &["kvm_amd"] };
        let modules = self.linux.add_modules(modules, &mut archive);
        archive.file("/job/blockhouse", &strip(program()));
        pieces::add_libraries(program(), &mut archive);
        for (name, from) in &job.files {
            archive.copy(Path::new("/job").join(name), from);
        }
        archive.file("/job/script", job.script.as_bytes());
        let mut init = String::from(INIT);
        init.push_str(&modules);
        init.push_str("[ -c /dev/kvm ] || echo 'init: no /dev/kvm'\n");
        // What KVM says about its guests would land in the middle of the job's lines.
        init.push_str("dmesg -n 1\n");
        let results = if disk { " 3>/dev/vda" } else { "" };
        write!(init, "cd /job\nsh ./script{results}\nsync\npoweroff -f\n").unwrap();
        archive.file("/init", init.as_bytes());
        archive.finish()
    }

    fn command(&self, initramfs: &Path) -> Command {
        let mut qemu = qemu(self.unpacked.as_deref());
        // q35 and not microvm, and a CPU without what the emulator's nested SVM lacks: other
        // choices hang now and then.
        qemu.args(["-machine", "q35", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max,-la57,-pku"])
            .args(["-m", "2048", "-smp", "1", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"])
            .args(["-serial", "stdio", "-kernel"])
            .arg(&self.linux.kernel)
            .arg("-initrd")
            .arg(initramfs)
            .args(["-append", &format!("console=ttyS0 quiet reboot=t {KERNEL_OPTIONS}")]);
        qemu
    }
}

/// A turn of the emulator, which takes two cores; a test that waits for another looks like one that hangs.
pub(crate) fn turn() -> MutexGuard<'static, ()> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A program without symbols, if there is a `strip`: less to unpack inside.
fn strip(program: &Path) -> Vec<u8> {
    let directory = scratch();
    let copy = directory.path().join("program");
    if on_path("strip") {
        run(Command::new("strip").arg("-o").arg(&copy).arg(program)).succeeded();
        return std::fs::read(copy).unwrap();
    }
    std::fs::read(program).unwrap()
}
