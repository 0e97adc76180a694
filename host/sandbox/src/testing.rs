//! What unit tests share: a limit, and a way to say that a test cannot run here.
#![allow(clippy::unwrap_used)]

use std::fmt::Display;
use std::io::Write as _;
use std::time::Duration;

/// Far longer than anything in a unit test takes.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// Says that the calling test, or a part of it, cannot run here: to people, and to `cargo xtask test`, which counts the
/// lines of the file that it names.
pub(crate) fn skip(reason: impl Display) {
    let line = format!("skipped: {}: {reason}\n", std::thread::current().name().unwrap_or("the sandbox"));
    eprint!("{line}");
    if let Some(file) = std::env::var_os("BLOCKHOUSE_SKIPS") {
        let mut file = std::fs::File::options().append(true).create(true).open(file).unwrap();
        file.write_all(line.as_bytes()).unwrap();
    }
}
