//! Where the guest's text goes.

use std::io::{self, ErrorKind, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// The console, shared by the devices that can write to it.
///
/// A console that fails must not stop the guest, so an error is logged once and the text is lost. One that takes
/// nothing holds up the vCPU that writes to it, until the machine ends.
#[derive(Clone)]
pub(crate) struct Console {
    inner: Arc<Mutex<Inner>>,
    /// The machine ends: vCPUs are interrupted until they notice.
    stop: Arc<AtomicBool>,
}

struct Inner {
    out: Box<dyn Write + Send>,
    failed: bool,
    /// It took nothing at the end of the machine.
    given_up: bool,
}

impl Console {
    pub(crate) fn new(out: Box<dyn Write + Send>, stop: Arc<AtomicBool>) -> Self {
        Self { inner: Arc::new(Mutex::new(Inner { out, failed: false, given_up: false })), stop }
    }

    /// Does something to the console, again for as long as it is interrupted. At the end of the machine that is not
    /// done again, nor anything after it.
    fn act(&self, mut act: impl FnMut(&mut (dyn Write + Send)) -> io::Result<()>) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        while !inner.given_up {
            match act(&mut *inner.out) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {
                    inner.given_up = self.stop.load(Ordering::Acquire);
                }
                Err(error) => return inner.note(&error),
                Ok(()) => return,
            }
        }
    }
}

impl Write for Console {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        let mut rest = text;
        // What is interrupted wrote nothing.
        self.act(|out| {
            while !rest.is_empty() {
                match out.write(rest)? {
                    0 => return Err(ErrorKind::WriteZero.into()),
                    count => rest = rest.get(count..).unwrap_or_default(),
                }
            }
            Ok(())
        });
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.act(|out| out.flush());
        Ok(())
    }
}

impl Inner {
    fn note(&mut self, error: &io::Error) {
        if !std::mem::replace(&mut self.failed, true) {
            tracing::warn!(%error, "the guest's console cannot be written, its text is lost");
        }
    }
}
