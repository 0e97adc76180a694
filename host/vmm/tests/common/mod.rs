//! What the tests with machines share.
// Each of them has some of it.
#![allow(clippy::unwrap_used, dead_code)]

use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use std::thread;

/// A console that the test can look at.
#[derive(Clone, Default)]
pub(crate) struct Console(Arc<Mutex<Vec<u8>>>);

impl Console {
    /// What the guest wrote.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap().clone()
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Says that the calling test cannot run here: to people, and to `cargo xtask test`, which counts the
/// lines of the file that it names.
pub(crate) fn skip(reason: &dyn std::fmt::Display) {
    let line = format!("skipped: {}: {reason}\n", thread::current().name().unwrap_or("a machine"));
    eprint!("{line}");
    if let Some(file) = std::env::var_os("BLOCKHOUSE_SKIPS") {
        let mut file = std::fs::File::options().append(true).create(true).open(file).unwrap();
        file.write_all(line.as_bytes()).unwrap();
    }
}
