//! What people and programs read: sizes, JSON, errors, exit codes.

use std::fmt;
use std::io::{self, StdoutLock, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use blockhouse_block::{Error, ErrorKind};
use blockhouse_sandbox::json;
use serde::Serialize;

use crate::error_report::ErrorReport;
use crate::log;
use crate::remedy;
use crate::walls::MissingWalls;

/// The exit code of `check` if space is lost and nothing else is wrong.
pub(crate) const LEAKS: u8 = 7;
/// The exit code of `compare` if the disks differ.
pub(crate) const DIFFERENT: u8 = 8;

/// The exit code of `--require-walls` if a wall is missing.
pub(crate) const NO_WALLS: u8 = 9;

/// The exit code for an error of a disk. The table is in `blockhouse --help`.
pub(crate) fn exit_code(kind: ErrorKind) -> u8 {
    match kind {
        ErrorKind::Denied => 3,
        ErrorKind::Corrupt => 4,
        ErrorKind::Unsupported => 5,
        ErrorKind::Component | ErrorKind::Limit => 6,
        _ => 1,
    }
}

/// Text that may come out of an image (a path is), fit for a terminal: control characters are shown
/// escaped.
pub(crate) fn printable(text: &str) -> String {
    blockhouse_sandbox::clean(text, usize::MAX)
}

/// Standard output. Errors say that it is.
pub(crate) struct Stdout(StdoutLock<'static>);

pub(crate) fn stdout() -> Stdout {
    Stdout(io::stdout().lock())
}

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes).map_err(of_stdout)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush().map_err(of_stdout)
    }
}

/// Standard output cannot be written.
#[derive(Debug)]
struct StdoutError(io::Error);

impl fmt::Display for StdoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot write to standard output: {}", self.0)
    }
}

impl std::error::Error for StdoutError {}

fn of_stdout(error: io::Error) -> io::Error {
    match error.kind() {
        // Whoever writes tries again.
        io::ErrorKind::Interrupted => error,
        kind => io::Error::new(kind, StdoutError(error)),
    }
}

/// Whether somebody who read standard output does not any more.
fn is_reader_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::BrokenPipe && error.get_ref().is_some_and(|error| error.is::<StdoutError>())
}

/// Prints a text. Whoever has read enough of what came before makes no difference to a command that did its work.
pub(crate) fn text(text: &str) -> anyhow::Result<()> {
    print(text.as_bytes())
}

fn print(bytes: &[u8]) -> anyhow::Result<()> {
    let mut out = stdout();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if is_reader_gone(&error) => Ok(()),
        written => Ok(written?),
    }
}

/// Prints a line.
pub(crate) fn line(line: fmt::Arguments<'_>) -> anyhow::Result<()> {
    text(&format!("{line}\n"))
}

/// Prints an error with its causes on standard error, and what can be done about it with these options; for `--json`
/// as a line of JSON as well, if there is no result yet that it could be taken for a part of. Gives the exit code.
pub(crate) fn fail(error: &anyhow::Error, options: remedy::Options) -> ExitCode {
    // A reader that closed its end of a pipe has what it wanted.
    if error.chain().any(|cause| cause.downcast_ref::<io::Error>().is_some_and(is_reader_gone)) {
        return ExitCode::SUCCESS;
    }
    let causes = causes(error);
    log::line(format_args!("blockhouse: {}", printable(&error.to_string())));
    for cause in causes.iter().skip(1) {
        log::line(format_args!("  because: {}", printable(cause)));
    }
    let ours = error.chain().find_map(|cause| cause.downcast_ref::<Error>());
    if let Some(remedy) = ours.and_then(|error| remedy::of(error, options)) {
        log::line(format_args!("  {}", printable(&remedy)));
    }
    if options.json && !ANSWERED.load(Ordering::Relaxed) {
        let report = match ours {
            // The image is not twice in it.
            Some(ours) if causes.len() == 1 => ErrorReport::from(ours),
            Some(ours) => ErrorReport { message: causes.join(": "), ..ErrorReport::from(ours) },
            None => ErrorReport { kind: "other", image: None, message: causes.join(": ") },
        };
        // Standard error has it.
        let _full = json_line(&Failed { error: report });
    }
    if error.downcast_ref::<MissingWalls>().is_some() {
        return ExitCode::from(NO_WALLS);
    }
    ours.map_or(ExitCode::FAILURE, |error| ExitCode::from(exit_code(error.kind())))
}

/// An error as the only answer.
#[derive(Serialize)]
struct Failed {
    error: ErrorReport,
}

/// What an error says, and of its causes those that say more.
fn causes(error: &anyhow::Error) -> Vec<String> {
    let mut causes = vec![error.to_string()];
    for cause in error.chain().skip(1).map(ToString::to_string) {
        // What the system said, a component may have said in its own words, without a number.
        let heart = cause.split(" (os error ").next().unwrap_or_default().to_lowercase();
        let says_more = !causes.iter().any(|said| said.to_lowercase().contains(&heart));
        if says_more && cause.len() < 2000 && !cause.contains('\n') {
            causes.push(cause);
        }
    }
    causes
}

/// Whether a result went to standard output, or a part of one.
static ANSWERED: AtomicBool = AtomicBool::new(false);

/// From here on there is a result on standard output, or a part of one.
pub(crate) fn answered() {
    ANSWERED.store(true, Ordering::Relaxed);
}

fn json_text(mut json: Vec<u8>) -> anyhow::Result<()> {
    json.push(b'\n');
    print(&json)
}

/// Prints a value as JSON.
pub(crate) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    answered();
    json_text(json::pretty(value)?)
}

/// Prints a value as one line of JSON.
pub(crate) fn json_line(value: &impl Serialize) -> anyhow::Result<()> {
    json_text(json::line(value)?)
}

/// A size for people: `1.5 GiB (1610612736 bytes)`.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [(&str, u32); 6] = [("EiB", 60), ("PiB", 50), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    for (unit, shift) in UNITS {
        let one = 1u64 << shift;
        if bytes >= one {
            let whole = bytes >> shift;
            // Tenths, rounded down: the exact number follows.
            let tenths = (u128::from(bytes % one) * 10) >> shift;
            return if tenths == 0 {
                format!("{whole} {unit} ({bytes} bytes)")
            } else {
                format!("{whole}.{tenths} {unit} ({bytes} bytes)")
            };
        }
    }
    format!("{bytes} bytes")
}

/// A time for people, from seconds since 1970: `2026-03-01 12:00:05 UTC`. Not of a year past 9999.
pub(crate) fn time(seconds: u64) -> String {
    let (mut days, rest) = (seconds / 86_400, seconds % 86_400);
    if days > 2_932_896 {
        return format!("{seconds} seconds since 1970");
    }
    let leap = |year: u64| year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let mut month = 1;
    for length in [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year}-{month:02}-{:02} {hour:02}:{minute:02}:{second:02} UTC", days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_for_people() {
        assert_eq!(time(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(time(951_782_399), "2000-02-28 23:59:59 UTC");
        assert_eq!(time(951_782_400), "2000-02-29 00:00:00 UTC");
        assert_eq!(time(4_107_542_400), "2100-03-01 00:00:00 UTC");
        assert_eq!(time(1_795_539_625), "2026-11-24 17:00:25 UTC");
        assert_eq!(time(253_402_300_799), "9999-12-31 23:59:59 UTC");
        assert_eq!(time(253_402_300_800), "253402300800 seconds since 1970");
    }

    #[test]
    fn causes_say_more_or_nothing() {
        let full = || io::Error::from(rustix::io::Errno::NOSPC);
        let error = Error::new(ErrorKind::Storage, "cannot write: no space left on device").with_source(full());
        assert_eq!(causes(&error.into()), ["cannot write: no space left on device"]);
        let error = Error::new(ErrorKind::Storage, "cannot write").with_source(full());
        assert_eq!(causes(&error.into()), ["cannot write", "No space left on device (os error 28)"]);
    }

    #[test]
    fn sizes_for_people() {
        assert_eq!(size(511), "511 bytes");
        assert_eq!(size(1536), "1.5 KiB (1536 bytes)");
        assert_eq!(size(u64::MAX), "15.9 EiB (18446744073709551615 bytes)");
    }
}
