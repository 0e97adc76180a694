//! Packed extents are unpacked by several instances of a component at a time, which stand and fall together.
//!
//! ```text
//!   first instance    unpack 0 ........ waits for a byte of the image ....... answers
//!   another one          unpack 64 KiB: answers, traps, or lies
//! ```

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use blockhouse_sandbox::block::{Disk, ErrorKind};
use blockhouse_sandbox::{Limits, OpenRequest, Opener, Restart, Tally};

use crate::library::{Library, read, shared};
use crate::place::Place;
use crate::tally;

const PART: u64 = 64 << 10;
/// Where the byte is that the first instance waits for.
const BYTE: u64 = 4 * PART - 1;

struct Subject {
    disk: Disk,
    image: PathBuf,
    tally: Arc<Tally>,
    now: Arc<AtomicU64>,
}

impl Subject {
    fn open(library: &Library, image: &Path) -> Self {
        let (tally, now) = (Arc::new(Tally::default()), Arc::new(AtomicU64::new(0)));
        let clock = Arc::clone(&now);
        let opener = Opener::new(&library.sandbox, library.formats.clone())
            .tally(Arc::clone(&tally))
            .restart(Restart::default())
            .restart_clock(Arc::new(move || Duration::from_millis(clock.load(Ordering::Relaxed))));
        let disk = opener.open(&OpenRequest::new(image, "hostile")).unwrap().disk;
        Self { disk, image: image.to_owned(), tally, now }
    }

    fn calls(&self, function: &str) -> u64 {
        self.tally.calls().find(|(name, _)| *name == function).unwrap().1
    }

    /// Sleeps until it is so.
    #[track_caller]
    fn until(&self, what: impl Fn(&Self) -> bool) {
        let mut patience = 20_000;
        while !what(self) {
            patience -= 1;
            assert!(patience > 0, "it never happened");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Changes the image, as those see it that are started from now on.
    fn change(&self, offset: u64, bytes: &[u8]) {
        std::fs::File::options().write(true).open(&self.image).unwrap().write_all_at(bytes, offset).unwrap();
    }

    /// Lets the first instance go on.
    fn release(&self) {
        self.change(BYTE, b"!");
    }

    #[track_caller]
    fn reads(&self, offset: u64) {
        let bytes = read(&self.disk, offset, 4096).unwrap();
        assert!(bytes.ends_with(b"...."), "wrong bytes at {offset}");
    }
}

fn image(place: &Place, what: &str) -> PathBuf {
    let mut bytes = format!("wait {BYTE} {what}\n").into_bytes();
    bytes.resize(256 << 10, b'.');
    place.write("images/vm/hostile.img", bytes)
}

/// It would hang, and then fail, if one instance did all of it.
#[test]
fn what_is_busy_unpacking_keeps_nobody_up() {
    let place = Place::new();
    let subject = Subject::open(shared(), &image(&place, ""));
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| subject.reads(0));
        subject.until(|subject| subject.calls("unpack") == 1);
        subject.reads(PART);
        subject.reads(2 * PART);
        assert!(!waits.is_finished());
        subject.release();
    });
    // One more was started, and used twice. Nothing had broken down.
    assert_eq!((subject.calls("open"), subject.calls("unpack")), (2, 3));
    assert_eq!((subject.tally.restarts(), subject.tally.failures()), (0, 0));
    // The first one serves what it can.
    subject.reads(3 * PART);
    assert_eq!(subject.calls("open"), 2);
    tally::image_served();
}

#[test]
fn there_are_no_more_than_the_limit_says() {
    let place = Place::new();
    let mut limits = Limits::default();
    limits.lower("instances", 1).unwrap();
    let library = Library::new(limits);
    let subject = Subject::open(&library, &image(&place, ""));
    std::thread::scope(|scope| {
        scope.spawn(|| subject.reads(0));
        subject.until(|subject| subject.calls("unpack") == 1);
        let beside = scope.spawn(|| subject.reads(PART));
        // Where there may be another one, it is there at once.
        for _ in 0..200 {
            assert_eq!((subject.calls("open"), beside.is_finished()), (1, false));
            std::thread::sleep(Duration::from_millis(1));
        }
        subject.release();
        beside.join().unwrap();
    });
    assert_eq!((subject.calls("open"), subject.calls("unpack")), (1, 2));
    tally::image_served();
}

/// What breaks down or lies is the component of the layer, whichever instance does.
#[test]
fn a_member_that_fails_ends_all_of_them() {
    let place = Place::new();
    for (what, failures, why) in [("trap", 1, "it is started again in 1000 ms"), ("lie", 0, "it broke its contract")] {
        let subject = Subject::open(shared(), &image(&place, what));
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| subject.reads(0));
            subject.until(|subject| subject.calls("unpack") == 1);
            let fails = scope.spawn(|| read(&subject.disk, PART, 512).map(|_| "it was read").unwrap_err());
            subject.until(|subject| subject.calls("unpack") == 2);
            subject.release();
            // What was under way is finished.
            waits.join().unwrap();
            let error = fails.join().unwrap();
            assert_eq!(error.kind(), ErrorKind::Component, "{error}");
            assert!(error.to_string().contains(why), "{why:?} is not in: {error}");
        });
        assert_eq!(subject.tally.failures(), failures);
        let error = read(&subject.disk, 2 * PART, 512).map(|_| "it was read").unwrap_err();
        assert!(error.to_string().contains(why), "{why:?} is not in: {error}");
        subject.now.fetch_add(1000, Ordering::Relaxed);
        match what {
            "trap" => subject.reads(2 * PART),
            _ => assert!(read(&subject.disk, 2 * PART, 512).is_err()),
        }
        assert_eq!(subject.tally.restarts(), failures);
        tally::component_stopped();
    }
}

/// It unpacks nothing, and costs nobody anything.
#[test]
fn a_member_that_does_not_start_is_left_out() {
    let place = Place::new();
    let (cluster_size, size) = ("lie-cluster-size 4096\n", "lie-size 131072\n");
    for (behaviour, offset, failures) in [
        // It describes another image.
        (cluster_size, 0, 0),
        (size, 0, 0),
        ("x", 300 << 10, 0),
        ("lie-backing-returned\n", 0, 0),
        // It cannot be right.
        ("lie-size 513\n", 0, 0),
        ("lie-facts\n", 0, 0),
        ("fail-at-connect\n", 0, 0),
        ("trap-at-open\n", 0, 1),
        ("panic-at-connect\n", 0, 1),
    ] {
        let subject = Subject::open(shared(), &image(&place, ""));
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| subject.reads(0));
            subject.until(|subject| subject.calls("unpack") == 1);
            subject.change(offset, behaviour.as_bytes());
            let beside = scope.spawn(|| subject.reads(PART));
            subject.until(|subject| subject.calls("open") == 2);
            subject.release();
            waits.join().unwrap();
            beside.join().unwrap();
        });
        subject.reads(2 * PART);
        subject.reads(3 * PART);
        assert_eq!((subject.calls("open"), subject.calls("unpack")), (2, 4), "{behaviour}");
        assert_eq!((subject.tally.restarts(), subject.tally.failures()), (0, failures), "{behaviour}");
        tally::component_stopped();
    }
}
