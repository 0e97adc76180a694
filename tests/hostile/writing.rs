//! Components that are given the right to write, and use it against its meaning: each costs its own
//! disk an error; no other file changes by a byte.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockhouse_sandbox::block::{Access, BlockBackend, Error, ErrorKind, VolatileSlice};
use blockhouse_sandbox::{Audit, AuditList, Grants, Limits, OpenRequest, OpenedDisk, Opener, Tally};
use blockhouse_tests::{component, noise};

use crate::library::{Library, read, shared};
use crate::place::{Place, limited};
use crate::tally;
use crate::wasi::image;

fn open(library: &Library, place: &Place, image: &Path, access: Access) -> Result<OpenedDisk, Error> {
    let grants = Grants::new().allow(place.path("images")).unwrap();
    let request = OpenRequest { access, ..OpenRequest::new(image, "hostile") };
    Opener::new(&library.sandbox, library.formats.clone()).grants(grants).open(&request)
}

fn write(opened: &OpenedDisk, offset: u64, length: usize) -> Result<(), Error> {
    let mut bytes = vec![0xd5; length];
    opened.disk.write(&[VolatileSlice::from(&mut bytes[..])], offset)
}

/// A file beside the image that must not change.
fn bystander(place: &Place) -> (PathBuf, Vec<u8>) {
    let bytes = noise(9, 128 << 10);
    (place.write("images/vm/base", &bytes), bytes)
}

/// The twin of all below: what is written reads back, and the old bytes around it stay.
#[test]
fn an_honest_writer_is_served() {
    let place = Place::new();
    let image = image(&place, "ok");
    let before = std::fs::read(&image).unwrap();
    let opened = open(shared(), &place, &image, Access::ReadWrite).unwrap();
    write(&opened, (64 << 10) + 512, 1024).unwrap();
    opened.disk.flush().unwrap();
    let mut expected = before.clone();
    expected[(64 << 10) + 512..(64 << 10) + 1536].fill(0xd5);
    assert!(read(&opened.disk, 0, 256 << 10).unwrap() == expected);
    // Beside the old bytes, not over them.
    assert!(std::fs::read(&image).unwrap().starts_with(&before));
    tally::image_served();
}

/// A handle for reading stays one, whatever the component may import.
#[test]
fn a_read_only_handle_cannot_be_changed() {
    let place = Place::new();
    let (base, bytes) = bystander(&place);
    for (line, access) in [
        ("change-image", Access::ReadOnly),
        ("change-backing raw base", Access::ReadOnly),
        ("change-backing raw base", Access::ReadWrite),
    ] {
        let image = image(&place, line);
        let before = std::fs::read(&image).unwrap();
        let error = open(shared(), &place, &image, access).expect_err(line);
        for what in ["write", "set-size", "sync"] {
            assert!(error.to_string().contains(&format!("refused {what}: ")), "{line}: {error}");
        }
        assert_eq!(error.to_string().matches("not permitted").count(), 3, "{line}: {error}");
        assert!(std::fs::read(&image).unwrap() == before, "{line}: the image changed");
        assert!(std::fs::read(&base).unwrap() == bytes, "{line}: the base changed");
        tally::component_stopped();
    }
}

/// A file is granted to be written: by the image that is opened for that, and neither by one that is read nor by a
/// backing file, whatever is above it.
#[test]
fn what_an_image_that_is_only_read_refers_to_is_not_written() {
    let place = Place::new();
    std::fs::create_dir(place.path("images/data")).unwrap();
    let (data, bytes) = (place.write("images/data/victim", noise(9, 4096)), noise(9, 4096));
    let base = image(&place, "open-raw read,write victim data/victim");
    let top = place.path("images/vm/top.img");
    let mut first = b"backing hostile hostile.img\n".to_vec();
    first.resize(64 << 10, b'.');
    std::fs::write(&top, first).unwrap();
    let open = |image: &Path, access: Access, grant: &Path| {
        let audit = Arc::new(AuditList::default());
        let grants = Grants::new().allow(&base).unwrap().allow_writing(grant).unwrap();
        let request = OpenRequest { access, ..OpenRequest::new(image, "hostile") };
        let opener = Opener::new(&shared().sandbox, shared().formats.clone()).grants(grants);
        let error = opener.audit(Audit::new().with(Arc::clone(&audit) as _)).open(&request).expect_err("a report");
        let written = audit.events().into_iter().filter(|event| event.access == "read-write");
        let reasons: Vec<_> = written.filter(|event| event.path == data.to_str().unwrap()).collect();
        assert!(!reasons.is_empty());
        (error.to_string(), reasons.into_iter().map(|event| event.reason).collect::<Vec<_>>())
    };
    // By a whole directory, and by itself.
    for grant in [place.path("images/data"), data.clone(), place.path("images")] {
        for (image, access, why) in [
            (&base, Access::ReadOnly, "the image is opened to be read, and so is all that it refers to"),
            (&top, Access::ReadOnly, "layer 1 is a backing file, which is only read, and so is all that it refers to"),
            (&top, Access::ReadWrite, "layer 1 is a backing file, which is only read, and so is all that it refers to"),
        ] {
            let (report, reasons) = open(image, access, &grant);
            assert!(!report.contains("opened"), "{report}");
            assert!(reasons.iter().all(|reason| reason.as_deref() == Some(why)), "{reasons:?}");
            tally::component_stopped();
        }
        // The twin: the image that is opened to be written.
        let (report, reasons) = open(&base, Access::ReadWrite, &grant);
        assert!(report.contains("opened \"") && reasons.contains(&None), "{report}");
        tally::component_stopped();
    }

    // The program.
    let plugin = format!("hostile={}", component("hostile").display());
    for (image, opened) in [(&top, false), (&base, true)] {
        let mut program = limited();
        program.args(["rebase", "--no-backing", "--format", "hostile", "--plugin", &plugin, "--allow"]).arg(&base);
        program.arg("--allow-write").arg(place.path("images/data")).arg(image);
        let attempt = place.finish(program, |_| {});
        let report = attempt.error();
        assert_eq!((attempt.code(), report.contains("opened \"")), (1, opened), "{report}");
        let asked = attempt.opens(if opened { "allowed" } else { "denied" });
        assert!(asked.contains(&"$ROOT/images/data/victim".to_owned()), "{asked:?}");
        tally::component_stopped();
    }
    assert!(std::fs::read(&data).unwrap() == bytes, "the file changed");
}

/// Offsets that no file has. What a file system makes of those that a file can have is its own affair.
#[test]
fn no_file_is_changed_where_it_cannot_be() {
    let place = Place::new();
    let largest = i64::MAX.unsigned_abs();
    let far = [largest + 1, u64::MAX - 1, u64::MAX];
    let path = image(&place, &format!("change-far {} {} {}", far[0], far[1], far[2]));
    let before = std::fs::read(&path).unwrap();
    let error = open(shared(), &place, &path, Access::ReadWrite).expect_err("a report");
    for offset in far {
        for what in ["write", "set-size"] {
            let refused = format!("refused {what} {offset}: ");
            assert!(error.to_string().contains(&refused), "{refused:?} is not in: {error}");
        }
    }
    // By the host, before the file system was asked.
    assert_eq!(error.to_string().matches("the file would be too large").count(), 6, "{error}");
    assert!(std::fs::read(&path).unwrap() == before, "the image changed");
    tally::component_stopped();
    // The twin: one that there is.
    let path = image(&place, "change-far 262144");
    let error = open(shared(), &place, &path, Access::ReadWrite).expect_err("a report");
    assert!(error.to_string().contains("done write 262144"), "{error}");
    assert!(error.to_string().contains("done set-size 262144"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap().len(), 256 << 10);
    tally::component_stopped();
}

/// Space that is not there, not its own, or not what was asked for.
#[test]
fn every_lie_about_space_is_found() {
    let place = Place::new();
    let (base, bytes) = bystander(&place);
    for (line, why) in [
        ("write-lie-no-such-file", "file 4294967295, which is not registered"),
        ("write-lie-read-only", "which is read-only"),
        ("write-lie-offset", "past the largest file offset"),
        ("write-lie-offset 18446744073709551615", "past the largest file offset"),
        ("write-lie-outside", "4611686018427387904"),
        ("write-lie-outside 18446744073709486080", "18446744073709486080"),
        ("write-lie-too-many", "100000 allocations where "),
        ("write-lie-too-many 0", "no space was reserved"),
    ] {
        let image = image(&place, line);
        let before = std::fs::read(&image).unwrap();
        let opened = open(shared(), &place, &image, Access::ReadWrite).unwrap();
        let error = write(&opened, 4096, 512).expect_err(line);
        assert_eq!(error.kind(), ErrorKind::Component, "{line}: {error}");
        assert!(error.to_string().contains(why), "{line}: {error}");
        write(&opened, 4096, 512).expect_err(line);
        assert!(std::fs::read(&image).unwrap().starts_with(&before), "{line}: the image changed");
        assert!(std::fs::read(&base).unwrap() == bytes, "{line}: the base changed");
        tally::component_stopped();
    }
}

/// Runs of space that do not fit what was asked for, or each other. The first one does, and is written.
#[test]
fn every_lie_about_runs_of_space_is_found() {
    const HONEST: &str = "0:65536:262144:0 65536:65536:327680:1 131072:65536:393216:2";
    let place = Place::new();
    for (offset, length, runs, why) in [
        (4096, 188 << 10, HONEST, ""),
        // Not from where it was asked for, below that, past its end.
        (4096, 188 << 10, "65536:65536:262144:0", "space from 65536 on, after the offset asked for"),
        (68 << 10, 512, "0:65536:262144:0", "outside of what was asked for"),
        (4096, 512, "0:131072:262144:0", "outside of what was asked for"),
        (4096, 188 << 10, "0:65536:262144:0 65536:196608:327680:1", "outside of what was asked for"),
        // No clusters, or parts of them.
        (4096, 188 << 10, "0:0:262144:0", "space for 0 bytes at 0, not whole clusters"),
        (4096, 188 << 10, "512:65024:262144:0", "space for 65024 bytes at 512, not whole clusters"),
        (4096, 188 << 10, "0:66048:262144:0", "space for 66048 bytes at 0, not whole clusters"),
        // The same place of the disk twice, or backwards.
        (
            4096,
            188 << 10,
            "0:131072:262144:0 65536:65536:393216:1",
            "space for 65536 before the end of the run before it",
        ),
        (
            4096,
            188 << 10,
            "0:65536:262144:0 131072:65536:327680:1 65536:65536:393216:2",
            "space for 65536 before the end of the run before it",
        ),
        // The same place of the file twice.
        (4096, 188 << 10, "0:65536:262144:0 65536:65536:262144:1", "the space at 262144 in file 0 twice"),
        (4096, 188 << 10, "0:65536:294912:0 65536:65536:262144:1", "the space at 294912 in file 0 twice"),
        (4096, 188 << 10, "0:65536:262144:7 65536:65536:327680:7", "the ticket 7 twice"),
    ] {
        let image = image(&place, &format!("write-lie-runs {runs}"));
        let before = std::fs::read(&image).unwrap();
        let opened = open(shared(), &place, &image, Access::ReadWrite).unwrap();
        let written = write(&opened, offset, length);
        assert!(std::fs::read(&image).unwrap().starts_with(&before), "{runs}: old bytes changed");
        if runs == HONEST {
            written.unwrap();
            assert!(read(&opened.disk, 0, 192 << 10).unwrap()[4096..].iter().all(|byte| *byte == 0xd5));
            tally::image_served();
            continue;
        }
        let error = written.expect_err(runs);
        assert_eq!(error.kind(), ErrorKind::Component, "{runs}: {error}");
        assert!(error.to_string().contains(why), "{runs}: {error}");
        let error = write(&opened, offset, length).expect_err(runs);
        assert!(error.to_string().contains("its component is not asked any more"), "{runs}: {error}");
        assert_eq!(std::fs::metadata(&image).unwrap().len(), 256 << 10, "{runs}: something was written");
        tally::component_stopped();
    }
}

/// Space that is given back to the file system and is nobody's to give.
#[test]
fn every_lie_about_freed_space_is_found() {
    let place = Place::new();
    for (freed, why) in [
        ("4294967295 0 65536", "file 4294967295, which is not registered"),
        // The image once more, shared for reading.
        ("1 0 65536", "file 1, which is read-only"),
        ("0 9223372036854775807 1", "past the largest file offset"),
        ("0 65536 18446744073709551615", "past the largest file offset"),
    ] {
        let image = image(&place, &format!("write-lie-freed {freed}"));
        let before = std::fs::read(&image).unwrap();
        let opened = open(shared(), &place, &image, Access::ReadWrite).unwrap();
        write(&opened, 4096, 512).unwrap();
        let error = opened.disk.flush().expect_err(freed);
        assert_eq!(error.kind(), ErrorKind::Component, "{freed}: {error}");
        assert!(error.to_string().contains(why), "{freed}: {error}");
        assert!(std::fs::read(&image).unwrap().starts_with(&before), "{freed}: old bytes changed");
        let error = opened.disk.flush().expect_err(freed);
        assert!(error.to_string().contains("its component is not asked any more"), "{freed}: {error}");
        assert!(opened.disk.close().is_err(), "{freed}: closed as if nothing had happened");
        tally::component_stopped();
    }
}

/// An answer that says that something failed is believed: nothing of it counts as done, and all else goes on.
#[test]
fn an_answer_that_it_failed_is_the_answer_of_the_request() {
    let place = Place::new();
    // A ticket that the component then does not know, neither to publish it nor to give it back.
    let unknown = "write-lie-runs 0:65536:262144:9";
    for (line, request, why, abandoned) in [
        ("fail-at-prepare", "write", "prepare failed on command", 0),
        ("fail-at-commit", "write", "commit failed on command", 1),
        (unknown, "write", "there is no ticket 9", 1),
        ("fail-at-flush", "flush", "flush failed on command", 0),
        ("fail-at-finish", "close", "finish failed on command", 0),
        ("trap-at-finish", "close", "the component failed in `finish` and was thrown away", 0),
    ] {
        let image = image(&place, line);
        let mut expected = std::fs::read(&image).unwrap();
        let calls = Arc::new(Tally::default());
        let opener = Opener::new(&shared().sandbox, shared().formats.clone()).tally(Arc::clone(&calls));
        let wanted = OpenRequest { access: Access::ReadWrite, ..OpenRequest::new(&image, "hostile") };
        let opened = opener.open(&wanted).unwrap();
        let refused = |what: &str, result: Result<(), Error>| {
            if what != request {
                return result.unwrap();
            }
            let error = result.expect_err(line);
            assert!(error.to_string().contains(why) && !error.to_string().contains("to give back"), "{line}: {error}");
        };
        refused("write", write(&opened, 4096, 512));
        if request != "write" {
            expected[4096..4608].fill(0xd5);
        }
        assert!(read(&opened.disk, 0, 256 << 10).unwrap() == expected, "{line}");
        refused("flush", opened.disk.flush());
        if request != "flush" {
            refused("close", opened.disk.close());
        }
        let gave_back = calls.calls().find(|(name, _)| *name == "abandon").unwrap().1;
        assert_eq!(gave_back, abandoned, "{line}");
        tally::component_stopped();
    }
}

/// What is durable cannot be lost: the component is started again. (`restart.rs` has those that held anything.)
#[test]
fn a_writer_that_flushed_everything_is_started_again() {
    let place = Place::new();
    let image = image(&place, "trap-at-flush 2");
    let opened = open(shared(), &place, &image, Access::ReadWrite).unwrap();
    write(&opened, 4096, 512).unwrap();
    opened.disk.flush().unwrap();
    let error = opened.disk.flush().unwrap_err();
    assert!(error.to_string().contains("it is started again in "), "{error}");
    tally::component_stopped();
}

/// A component that breaks in the middle of a write: an error, the old bytes, and no second try. A disk
/// beside it goes on.
#[test]
fn a_writer_that_breaks_ends_its_own_disk() {
    let place = Place::new();
    let (base, bytes) = bystander(&place);
    let other = shared().open("raw", &base, &[]).unwrap();
    let mut limits = Limits::default();
    limits.call_time = Duration::from_secs(3);
    let library = Library::new(limits);
    for line in ["trap-at-prepare", "trap-at-commit", "trap-at-flush", "loop-at-flush"] {
        let image = image(&place, line);
        let before = std::fs::read(&image).unwrap();
        let opened = open(&library, &place, &image, Access::ReadWrite).unwrap();
        let started = Instant::now();
        let error = write(&opened, 4096, 512).and_then(|()| opened.disk.flush()).expect_err(line);
        assert_eq!(error.kind(), ErrorKind::Component, "{line}: {error}");
        assert!(error.to_string().contains("was thrown away"), "{line}: {error}");
        assert!(started.elapsed() < Duration::from_secs(10), "{line}");
        // A cluster that was not asked for yet needs the component.
        let size = std::fs::metadata(&image).unwrap().len();
        write(&opened, 128 << 10, 512).expect_err(line);
        opened.disk.flush().expect_err(line);
        assert_eq!(std::fs::metadata(&image).unwrap().len(), size, "{line}");
        assert!(std::fs::read(&image).unwrap().starts_with(&before), "{line}: old bytes changed");
        assert!(read(&other.disk, 0, bytes.len()).unwrap() == bytes, "{line}: the other disk changed");
        tally::component_stopped();
    }
    // Before anything is served.
    let image = image(&place, "trap-at-begin");
    let error = open(&library, &place, &image, Access::ReadWrite).unwrap_err();
    assert!(error.to_string().contains("the component failed in `begin`"), "{error}");
    tally::component_stopped();
}
