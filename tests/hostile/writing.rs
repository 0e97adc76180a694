//! Components that are given the right to write, and use it against its meaning: each costs its own
//! disk an error; no other file changes by a byte.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use blockhouse_sandbox::block::{Access, BlockBackend, Error, ErrorKind, VolatileSlice};
use blockhouse_sandbox::{Grants, Limits, OpenRequest, OpenedDisk, Opener};
use blockhouse_tests::noise;

use crate::library::{Library, read, shared};
use crate::place::Place;
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

/// A component that breaks in the middle of a write: an error, the old bytes, and no second try. A disk
/// beside it goes on.
#[test]
fn a_writer_that_breaks_ends_its_own_disk() {
    let place = Place::new();
    let (base, bytes) = bystander(&place);
    let other = shared().open("raw", &base, &[]).unwrap();
    let mut limits = Limits::default();
    limits.call_time = Duration::from_secs(1);
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
