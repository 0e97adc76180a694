//! Closing what a front end sent, where nobody waits for it.
//!
//! The last close of a socket can take as long as its owner likes (`SO_LINGER`), and a socket closes with itself those
//! that are on the way in it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

/// How many threads there are at a time that close something.
const CLOSING: usize = 16;

/// Drops what may have sockets of a front end in it, on a thread of its own.
pub(crate) fn let_go<T: Send + 'static>(what: Option<T>) {
    static NOW: AtomicUsize = AtomicUsize::new(0);
    let Some(what) = what else { return };
    if NOW.fetch_add(1, Ordering::Relaxed) < CLOSING {
        let what = Arc::new(Mutex::new(Some(what)));
        let theirs = Arc::clone(&what);
        let close = move || {
            let what = theirs.lock().unwrap_or_else(PoisonError::into_inner).take();
            drop(what);
            NOW.fetch_sub(1, Ordering::Relaxed);
        };
        if thread::Builder::new().name("closing".into()).spawn(close).is_ok() {
            return;
        }
    }
    // Here, with what is too much.
    NOW.fetch_sub(1, Ordering::Relaxed);
}
