//! How much was tried: one line for people at the end of the run, and a row for each case in the file that
//! `BLOCKHOUSE_CATALOGUE` names, from which `cargo xtask hostile` makes its table.

use std::collections::HashMap;
use std::io::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{LazyLock, Mutex, Once};

use crate::snapshot;

static IMAGES_REFUSED: AtomicUsize = AtomicUsize::new(0);
static IMAGES_SERVED: AtomicUsize = AtomicUsize::new(0);
static COMPONENTS_STOPPED: AtomicUsize = AtomicUsize::new(0);
static COMPONENTS_NOT_LOADED: AtomicUsize = AtomicUsize::new(0);

/// A hostile image was refused, as it must be.
pub(crate) fn image_refused() {
    count(&IMAGES_REFUSED);
    row("image", "refused");
}

/// An image was served: a twin that is granted, or damage that is no reason to refuse it.
pub(crate) fn image_served() {
    count(&IMAGES_SERVED);
    row("image", "served");
}

/// A component misbehaved and cost nobody but its own disk anything.
pub(crate) fn component_stopped() {
    count(&COMPONENTS_STOPPED);
    row("component", "refused");
}

/// A component was not even loaded.
pub(crate) fn component_not_loaded() {
    count(&COMPONENTS_NOT_LOADED);
    row("component", "refused");
}

/// The test and the number of the case in it are its name.
fn row(attacker: &str, outcome: &str) {
    static CASES: LazyLock<Mutex<HashMap<String, u32>>> = LazyLock::new(Mutex::default);
    let Some(file) = std::env::var_os("BLOCKHOUSE_CATALOGUE") else { return };
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("races").to_owned();
    let number = {
        let mut cases = CASES.lock().unwrap();
        let number = cases.entry(test.clone()).or_default();
        *number += 1;
        *number
    };
    let row = serde_json::json!({ "attacker": attacker, "name": format!("{test} {number}"), "outcome": outcome });
    let mut file = std::fs::File::options().append(true).create(true).open(file).unwrap();
    // One write of a short line: rows of parallel tests stay whole.
    file.write_all(format!("{row}\n").as_bytes()).unwrap();
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
    snapshot::write();
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
