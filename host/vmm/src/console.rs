//! Where the guest's text goes.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

/// The console, shared by the devices that can write to it.
///
/// A console that fails must not stop the guest, so an error is logged once and the text is lost.
#[derive(Clone)]
pub(crate) struct Console {
    inner: Arc<Mutex<Inner>>,
}

struct Inner {
    out: Box<dyn Write + Send>,
    failed: bool,
}

impl Console {
    pub(crate) fn new(out: Box<dyn Write + Send>) -> Self {
        Self { inner: Arc::new(Mutex::new(Inner { out, failed: false })) }
    }
}

impl Write for Console {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let result = inner.out.write_all(text);
        inner.note(result);
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let result = inner.out.flush();
        inner.note(result);
        Ok(())
    }
}

impl Inner {
    fn note(&mut self, result: io::Result<()>) {
        if let Err(error) = result
            && !std::mem::replace(&mut self.failed, true)
        {
            tracing::warn!(%error, "the guest's console cannot be written, its text is lost");
        }
    }
}
