//! Components that break down and are started again: the disk serves again after a while, from the same files,
//! or stays dead with a reason. The clock is the test's.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use blockhouse_sandbox::block::{Access, BlockBackend, Disk, ErrorKind, VolatileSlice};
use blockhouse_sandbox::{Audit, AuditList, Grant, Grants, OpenRequest, Opener, Restart, Sha256Digest, Tally};
use blockhouse_tests::COMMAND_LIMIT;

use crate::library::{read, shared};
use crate::place::Place;
use crate::tally;
use crate::wasi::image;

/// A disk, and the time by which its component is started again.
struct Subject {
    disk: Disk,
    now: Arc<AtomicU64>,
    audit: Arc<AuditList>,
    tally: Arc<Tally>,
}

impl Subject {
    fn open(image: &Path, access: Access, attempts: u32) -> Self {
        Self::with(Grants::new(), image, access, attempts)
    }

    fn with(grants: Grants, image: &Path, access: Access, attempts: u32) -> Self {
        let now = Arc::new(AtomicU64::new(0));
        let clock = Arc::clone(&now);
        let audit = Arc::new(AuditList::default());
        let tally = Arc::new(Tally::default());
        let opener = Opener::new(&shared().sandbox, shared().formats.clone())
            .grants(grants)
            .tally(Arc::clone(&tally))
            .audit(Audit::new().with(Arc::clone(&audit) as Arc<_>))
            .restart(Restart { attempts, ..Restart::default() })
            .restart_clock(Arc::new(move || Duration::from_millis(clock.load(Ordering::Relaxed))));
        let opened = opener.open(&OpenRequest { access, ..OpenRequest::new(image, "hostile") }).unwrap();
        Self { disk: opened.disk, now, audit, tally }
    }

    fn wait(&self, millis: u64) {
        self.now.fetch_add(millis, Ordering::Relaxed);
    }

    #[track_caller]
    fn reads(&self, offset: u64, content: &[u8]) {
        let at = usize::try_from(offset).unwrap();
        assert!(read(&self.disk, offset, 4096).unwrap() == content[at..at + 4096], "wrong bytes at {offset}");
    }

    #[track_caller]
    fn fails(&self, offset: u64, why: &str) {
        let error = read(&self.disk, offset, 4096).map(|_| "it was read").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Component, "{error}");
        assert!(error.to_string().contains(why), "{why:?} is not in: {error}");
    }
}

/// 256 KiB, of which one answer covers 64.
fn content(line: &str) -> Vec<u8> {
    let mut bytes = format!("{line}\n").into_bytes();
    bytes.resize(256 << 10, b'.');
    bytes
}

const PART: u64 = 64 << 10;

#[test]
fn a_component_that_trapped_serves_again_after_a_while() {
    let place = Place::new();
    for line in ["trap-at-locate 3", "panic-at-locate 3", "grow-memory-at-locate 3", "recurse-at-locate 3"] {
        let content = content(line);
        let subject = Subject::open(&image(&place, line), Access::ReadOnly, 2);
        let beside = Subject::open(&place.write("images/vm/beside.img", self::content("ok")), Access::ReadOnly, 0);
        subject.reads(0, &content);
        subject.reads(PART, &content);
        subject.fails(2 * PART, "the component failed in `locate` and was thrown away");
        for wait in [1000, 2000] {
            // What is known is served all the time, and so are other disks.
            subject.reads(PART, &content);
            beside.disk.invalidate(0, 4 * PART);
            beside.reads(PART, &self::content("ok"));
            subject.fails(2 * PART, &format!("it is started again in {wait} ms"));
            subject.wait(wait - 1);
            subject.fails(2 * PART, "it is started again in 1 ms");
            subject.wait(1);
            subject.reads(2 * PART, &content);
            subject.reads(3 * PART, &content);
            // The third question of this instance as well.
            subject.disk.invalidate(2 * PART, 2 * PART);
            subject.fails(2 * PART, "the component failed in `locate` and was thrown away");
        }
        subject.wait(3_600_000);
        subject.fails(2 * PART, "it is not started again: it broke down again after 2 restarts");
        subject.reads(PART, &content);
        // What the operator is told.
        assert_eq!((subject.tally.failures(), subject.tally.restarts()), (3, 2), "{line}");
        assert_eq!((beside.tally.failures(), beside.tally.restarts()), (0, 0));
        tally::component_stopped();
    }
}

#[test]
fn packed_extents_that_were_given_out_before_are_unpacked_after() {
    let place = Place::new();
    let line = "trap-at-unpack 2";
    let content = content(line);
    let subject = Subject::open(&image(&place, line), Access::ReadOnly, 1);
    subject.reads(0, &content);
    subject.fails(PART, "the component failed in `unpack`");
    subject.fails(PART, "it is started again in 1000 ms");
    subject.wait(1000);
    subject.reads(PART, &content);
    subject.reads(0, &content);
    tally::component_stopped();
}

/// A base that is not what it was pinned as costs what is in it, and not the overlay.
#[test]
fn an_overlay_is_started_again_whatever_became_of_its_base() {
    let place = Place::new();
    let content = content("a base");
    let base = place.write("images/base.img", &content);
    let top = place.write("images/vm/top.img", self::content("backing raw ../base.img 2"));
    let pinned = Grant { sha256: Some(Sha256Digest::of(&content)), ..Grant::read(&base) };
    let grants = Grants::new().add(&pinned, &mut |_, _| {}).unwrap();
    let subject = Subject::with(grants, &top, Access::ReadOnly, 2);
    subject.reads(0, &content);
    let writer = std::thread::spawn(move || std::fs::File::options().write(true).open(base).unwrap());
    let started = std::time::Instant::now();
    while read(&subject.disk, 0, 512).is_ok() {
        assert!(started.elapsed() < COMMAND_LIMIT, "the writer was not noticed");
    }
    writer.join().unwrap();
    subject.fails(PART, "the component failed in `locate` and was thrown away");
    subject.wait(1000);
    let error = read(&subject.disk, PART, 4096).map(|_| "it was read").unwrap_err();
    assert!(error.to_string().contains("pinned by sha256"), "{error}");
    assert_eq!((subject.tally.failures(), subject.tally.restarts()), (1, 1));
    tally::component_stopped();
}

/// What a component says after a lie is no better.
#[test]
fn a_liar_is_not_started_again() {
    let place = Place::new();
    for (line, reason) in [
        ("lie-unpack 7", "it is not started again: it broke its contract"),
        ("lie-wrap", "its component is not asked any more"),
        ("lie-empty", "its component is not asked any more"),
    ] {
        let subject = Subject::open(&image(&place, line), Access::ReadOnly, 5);
        read(&subject.disk, 0, 512).unwrap_err();
        for _ in 0..10 {
            subject.wait(3_600_000);
            subject.fails(0, reason);
        }
        tally::component_stopped();
    }
}

/// The files are those that the first instance had, whatever their names lead to by now.
#[test]
fn it_gets_the_same_files_and_no_names() {
    let place = Place::new();
    let line = "trap-at-locate 2";
    let content = content(line);
    let path = image(&place, line);
    let subject = Subject::open(&path, Access::ReadOnly, 1);
    subject.reads(0, &content);
    subject.fails(PART, "thrown away");
    std::fs::rename(&path, place.path("images/vm/old")).unwrap();
    std::fs::write(&path, self::content("ok")).unwrap();
    subject.wait(1000);
    subject.disk.invalidate(0, PART);
    subject.reads(0, &content);
    assert!(subject.audit.events().is_empty(), "{:?}", subject.audit.events());
    tally::component_stopped();
}

/// An image that is another one by now is not served.
#[test]
fn it_describes_the_same_image_or_stays_dead() {
    let place = Place::new();
    let line = "trap-at-locate 2";
    let path = image(&place, line);
    let subject = Subject::open(&path, Access::ReadOnly, 5);
    subject.reads(0, &content(line));
    subject.fails(PART, "thrown away");
    std::fs::File::options().write(true).open(&path).unwrap().write_all_at(b"x", 300 << 10).unwrap();
    subject.wait(1000);
    let error = read(&subject.disk, PART, 512).unwrap_err();
    assert!(error.to_string().contains("describes another image: its size"), "{error}");
    subject.wait(3_600_000);
    subject.fails(PART, "it is not started again: the component that was started again describes another image");
    subject.reads(0, &content(line));
    tally::component_stopped();
}

/// The same storage may be what a component broke down of.
#[test]
fn storage_that_fails_in_the_meantime_costs_an_attempt() {
    let place = Place::new();
    let line = "trap-at-locate 2";
    let path = image(&place, line);
    let subject = Subject::open(&path, Access::ReadOnly, 3);
    subject.reads(0, &content(line));
    subject.fails(PART, "thrown away");
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.write_all_at(b"storage-at-open 1\n", 0).unwrap();
    for wait in [1000, 2000] {
        subject.wait(wait);
        let error = read(&subject.disk, PART, 512).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Storage, "{error}");
        subject.fails(PART, &format!("it is started again in {} ms", 2 * wait));
    }
    file.write_all_at(&content(line)[..64], 0).unwrap();
    subject.wait(4000);
    subject.reads(PART, &content(line));
    assert_eq!((subject.tally.failures(), subject.tally.restarts()), (1, 1));
    tally::component_stopped();
}

fn write(disk: &Disk, offset: u64) -> Result<(), blockhouse_sandbox::block::Error> {
    let mut bytes = vec![0xaa; 4096];
    disk.write(&[VolatileSlice::from(&mut bytes[..])], offset)
}

/// A writer comes back if it had nothing to lose, and not otherwise.
#[test]
fn a_writer_that_held_anything_is_not_started_again() {
    let place = Place::new();
    for line in ["trap-at-prepare", "trap-at-commit", "panic-at-prepare"] {
        let subject = Subject::open(&image(&place, line), Access::ReadWrite, 5);
        write(&subject.disk, 0).unwrap_err();
        subject.wait(3_600_000);
        subject.fails(3 * PART, "it is not started again: it was writing, and what it had not flushed is lost");
        write(&subject.disk, 0).unwrap_err();
        tally::component_stopped();
    }
    let line = "trap-at-locate 3";
    let subject = Subject::open(&image(&place, line), Access::ReadWrite, 5);
    subject.reads(0, &content(line));
    subject.reads(PART, &content(line));
    subject.fails(2 * PART, "thrown away");
    subject.wait(1000);
    subject.reads(2 * PART, &content(line));
    tally::component_stopped();
}

#[test]
fn restarts_can_be_off() {
    let place = Place::new();
    let subject = Subject::open(&image(&place, "trap-at-locate"), Access::ReadOnly, 0);
    for _ in 0..2 {
        let error = read(&subject.disk, 0, 512).unwrap_err();
        assert!(!error.to_string().contains("started again"), "{error}");
        subject.fails(0, "thrown away");
        subject.wait(3_600_000);
    }
    tally::component_stopped();
}
