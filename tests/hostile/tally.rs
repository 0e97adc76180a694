//! One line for people at the end of the run: how much was tried.

use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};

static IMAGES_REFUSED: AtomicUsize = AtomicUsize::new(0);
static IMAGES_SERVED: AtomicUsize = AtomicUsize::new(0);
static COMPONENTS_STOPPED: AtomicUsize = AtomicUsize::new(0);
static COMPONENTS_NOT_LOADED: AtomicUsize = AtomicUsize::new(0);

/// A hostile image was refused, as it must be.
pub(crate) fn image_refused() {
    count(&IMAGES_REFUSED);
}

/// An image was served: a twin that is granted, or damage that is no reason to refuse it.
pub(crate) fn image_served() {
    count(&IMAGES_SERVED);
}

/// A component misbehaved and cost nobody but its own disk anything.
pub(crate) fn component_stopped() {
    count(&COMPONENTS_STOPPED);
}

/// A component was not even loaded.
pub(crate) fn component_not_loaded() {
    count(&COMPONENTS_NOT_LOADED);
}

fn count(counter: &AtomicUsize) {
    static AT_EXIT: Once = Once::new();
    // libtest has no place for code after the last test; the C library has.
    AT_EXIT.call_once(|| {
        // SAFETY: `print` is a function for the life of the process that takes and returns nothing and
        // does not unwind: it writes to a descriptor and ignores errors.
        let registered = unsafe { libc::atexit(print) };
        assert_eq!(registered, 0, "the line at the end cannot be registered");
    });
    counter.fetch_add(1, Ordering::Relaxed);
}

extern "C" fn print() {
    use std::io::Write;
    let now = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
    let (refused, served) = (now(&IMAGES_REFUSED), now(&IMAGES_SERVED));
    let (stopped, not_loaded) = (now(&COMPONENTS_STOPPED), now(&COMPONENTS_NOT_LOADED));
    let _ = writeln!(
        std::io::stderr(),
        "hostile: {} images tried, {refused} refused as expected, {served} served; \
         {} components tried, {stopped} stopped, {not_loaded} not loaded\n",
        refused + served,
        stopped + not_loaded
    );
}
