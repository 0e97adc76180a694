//! What every task needs: the workspace as cargo sees it, and other programs, run with errors worth reading.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{IsTerminal, Read, Seek, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// The workspace as `cargo metadata` describes it.
pub(crate) struct Workspace {
    /// Directory of the root manifest.
    pub(crate) root: PathBuf,
    /// Target directory; follows `CARGO_TARGET_DIR` and cargo's configuration.
    pub(crate) target: PathBuf,
    /// Workspace members, in manifest order, as cargo prints them.
    pub(crate) packages: Vec<Value>,
}

impl Workspace {
    /// Asks cargo. Nothing is resolved, so this works offline.
    pub(crate) fn load() -> Result<Self> {
        // Set by `cargo run`; the tree that this program was built from otherwise.
        let package =
            std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
        let output = output(
            cargo()
                .args(["metadata", "--format-version=1", "--no-deps"])
                .arg("--manifest-path")
                .arg(package.join("Cargo.toml")),
        )?;
        let metadata: Value = serde_json::from_slice(&output.stdout)
            .context("`cargo metadata` did not print JSON; is `cargo` on the path really cargo?")?;
        let path = |key: &str| -> Result<PathBuf> {
            let text = metadata.get(key).and_then(Value::as_str);
            Ok(PathBuf::from(text.with_context(|| format!("`cargo metadata` printed no {key}"))?))
        };
        Ok(Self {
            root: path("workspace_root")?,
            target: path("target_directory")?,
            packages: metadata.get("packages").and_then(Value::as_array).cloned().unwrap_or_default(),
        })
    }
}

/// The cargo that runs this program, so that every step uses one toolchain.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // Set by `cargo run` for this package only; a nested cargo must not inherit them,
    // or build scripts that read them are rebuilt each time.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    command
}

/// Runs to the end with output on the terminal; anything but success is an error that names the command.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| not_started(command))?;
    if !status.success() {
        bail!("{status}: {}", line(command));
    }
    Ok(())
}

/// Runs to the end and returns what it printed; anything but success is an error that quotes stderr.
pub(crate) fn output(command: &mut Command) -> Result<Output> {
    let output = command.stdin(Stdio::null()).output().with_context(|| not_started(command))?;
    if !output.status.success() {
        bail!("{}: {}\n{}", output.status, line(command), String::from_utf8_lossy(&output.stderr).trim_end());
    }
    Ok(output)
}

/// Like [`output`], but the text of stdout, trimmed.
pub(crate) fn text(command: &mut Command) -> Result<String> {
    let output = output(command)?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Runs with a time limit; `None` when the limit passed and the whole process group was killed.
///
/// For programs that may wait for a network for ever.
pub(crate) fn within(limit: Duration, command: &mut Command) -> Result<Option<ExitStatus>> {
    let mut child = command.stdin(Stdio::null()).process_group(0).spawn().with_context(|| not_started(command))?;
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            kill_group(&mut child);
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Like [`within`], with what the program printed, whether it succeeded or not.
pub(crate) fn output_within(limit: Duration, command: &mut Command) -> Result<Option<Output>> {
    // Files, because a pipe that nobody empties would stop the program.
    let (mut stdout, mut stderr) = (tempfile::tempfile()?, tempfile::tempfile()?);
    command.stdout(stdout.try_clone()?).stderr(stderr.try_clone()?);
    let Some(status) = within(limit, command)? else {
        return Ok(None);
    };
    let read = |file: &mut File| -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        file.rewind()?;
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    Ok(Some(Output { status, stdout: read(&mut stdout)?, stderr: read(&mut stderr)? }))
}

/// Kills a child that leads a process group of its own, with everything that it started.
fn kill_group(child: &mut Child) {
    let id = i32::try_from(child.id()).ok();
    if let Some(group) = id.and_then(rustix::process::Pid::from_raw) {
        // A group that is gone already is what we want.
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
    }
    let _ = child.wait();
}

/// Where a program is: on the path, or where Debian keeps what only root has on the path.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain([PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")])
        .map(|directory| directory.join(program))
        .find(|file| file.is_file())
}

/// A command as one would type it.
pub(crate) fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let quoted = words.map(|word| {
        let word = word.to_string_lossy();
        if word.is_empty() || word.contains([' ', '\'', '"', '$', '*']) {
            format!("'{}'", word.replace('\'', r"'\''"))
        } else {
            word.into_owned()
        }
    });
    quoted.collect::<Vec<_>>().join(" ")
}

fn not_started(command: &Command) -> String {
    format!("cannot start {}", command.get_program().to_string_lossy())
}

/// `first` in front of the search path: for programs that must win over others of the same name.
pub(crate) fn path_with(first: &Path) -> Result<OsString> {
    let rest = std::env::var_os("PATH").unwrap_or_default();
    let all = std::iter::once(first.to_owned()).chain(std::env::split_paths(&rest));
    std::env::join_paths(all).with_context(|| format!("{} cannot be part of PATH", first.display()))
}

/// Lower-case hexadecimal sha256.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    use std::fmt::Write;
    Sha256::digest(bytes).iter().fold(String::with_capacity(64), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Replaces a file in one step, and only if its content changes, so that whoever watches
/// its time stamp (cargo, for `include_bytes!`) rebuilds only when there is a reason to.
pub(crate) fn write_if_changed(path: &Path, bytes: &[u8]) -> Result<()> {
    if std::fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let directory = path.parent().context("a file needs a directory")?;
    let write = || -> Result<()> {
        std::fs::create_dir_all(directory)?;
        let mut file = tempfile::Builder::new()
            .prefix(".new-")
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
            .tempfile_in(directory)?;
        file.write_all(bytes)?;
        file.persist(path)?;
        Ok(())
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// Whether the process may install packages.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Says what happens now, on stderr.
pub(crate) fn say(what: impl std::fmt::Display) {
    eprintln!("{}", style("1", &what.to_string()));
}

/// Prints what happened, then why, on stderr; a backtrace of this program would help nobody.
pub(crate) fn print_error(error: &anyhow::Error) {
    eprintln!("{} {error}", style("1;31", "error:"));
    for cause in error.chain().skip(1) {
        eprintln!("  because: {}", cause.to_string().replace('\n', "\n  "));
    }
}

/// ANSI style for a terminal, plain text elsewhere.
pub(crate) fn style(code: &str, text: &str) -> String {
    let plain =
        std::env::var_os("NO_COLOR").is_some_and(|value| value != OsStr::new("")) || !std::io::stderr().is_terminal();
    if plain { text.to_owned() } else { format!("\x1b[{code}m{text}\x1b[0m") }
}
