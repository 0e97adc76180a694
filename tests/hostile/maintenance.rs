//! Components that trap, loop, grow and lie in the calls that change or look at an image as a whole: each is an error,
//! and the image is what it was.

use std::path::{Path, PathBuf};
use std::time::Duration;

use blockhouse_sandbox::block::{Access, BlockBackend, Error, ErrorKind};
use blockhouse_sandbox::{Grants, Limits, NewImage, OpenRequest, Opener, Repair};
use blockhouse_tests::{component, noise};

use crate::library::{Library, shared};
use crate::place::{Place, limited};
use crate::{tally, wasi};

/// What a caller does, and the call of the component that it comes to.
const CALLS: [(&str, &str); 11] = [
    ("create", "create"),
    ("check", "check"),
    ("repair", "check"),
    ("resize", "resize"),
    ("rebase", "set-backing"),
    ("list", "list-snapshots"),
    ("select", "select-snapshot"),
    ("keep", "create-snapshot"),
    ("apply", "apply-snapshot"),
    ("delete", "delete-snapshot"),
    ("pack", "pack"),
];

const NEW: &str = "images/vm/new.img";

fn opener(library: &Library, place: &Place) -> Opener {
    let grants = Grants::new().allow(place.path("images")).unwrap();
    Opener::new(&library.sandbox, library.formats.clone()).grants(grants)
}

/// An image of which nobody has the locks: a child of another test has those of all files that are open here, from when
/// it begins until it is the program that it is to be.
fn image(place: &Place, line: &str) -> PathBuf {
    let _ = std::fs::remove_file(place.path("images/vm/hostile.img"));
    wasi::image(place, line)
}

/// Does one of [`CALLS`] to an image that `line` is the first line of.
fn act(opener: &Opener, place: &Place, image: &Path, line: &str, what: &str) -> Result<(), Error> {
    let request = OpenRequest::new(image, "hostile");
    match what {
        "create" => {
            let options = vec![("line".to_owned(), line.to_owned())];
            let new = NewImage { virtual_size: 1 << 20, options, ..NewImage::default() };
            opener.create(&place.path(NEW), "hostile", &new)
        }
        "check" => opener.check(image, "hostile", None).map(drop),
        "repair" => opener.check(image, "hostile", Some(Repair::All)).map(drop),
        "resize" => opener.resize(&request, 256 << 10, 512 << 10),
        "rebase" => opener.set_backing(image, "hostile", None),
        "list" => opener.describe(&request).1.map_or(Ok(()), Err),
        "select" => opener.open(&OpenRequest { snapshot: Some("1".to_owned()), ..request }).map(drop),
        "keep" => opener.create_snapshot(image, "hostile", "name").map(drop),
        "apply" => opener.apply_snapshot(image, "hostile", "1"),
        "delete" => opener.delete_snapshot(image, "hostile", "1"),
        "pack" => {
            let opened = opener.open(&OpenRequest { access: Access::ReadWrite, ..request })?;
            opened.disk.write_packed(0, &[7; 64 << 10]).map(drop)
        }
        other => panic!("{other:?} is none of them"),
    }
}

/// The error of one of [`CALLS`], after which everything is as before.
#[track_caller]
fn refused(library: &Library, place: &Place, line: &str, what: &str) -> Error {
    let image = image(place, line);
    let before = std::fs::read(&image).unwrap();
    let error = act(&opener(library, place), place, &image, line, what).expect_err(line);
    assert!(std::fs::read(&image).unwrap() == before, "{what}, {line}: the image changed");
    assert!(!place.path(NEW).exists(), "{what}, {line}: an unfinished image stays");
    error
}

/// The twin of all below.
#[test]
fn an_honest_component_is_believed() {
    let place = Place::new();
    for (what, _) in CALLS {
        let image = image(&place, "ok");
        let done = act(&opener(shared(), &place), &place, &image, "ok", what);
        if ["keep", "apply", "delete"].contains(&what) {
            assert_eq!(done.unwrap_err().kind(), ErrorKind::Unsupported, "{what}");
        } else {
            done.unwrap_or_else(|error| panic!("{what}: {error}"));
        }
        let size = if what == "resize" { 512 << 10 } else { 256 << 10 };
        assert_eq!(std::fs::metadata(&image).unwrap().len(), size, "{what}");
        tally::image_served();
    }
    let made = std::fs::read(place.path(NEW)).unwrap();
    assert!(made.len() == 1 << 20 && made.starts_with(b"ok\n"));
    let options = opener(shared(), &place).create_options("hostile").unwrap();
    assert_eq!(options.iter().map(|option| option.name.as_str()).collect::<Vec<_>>(), ["line"]);
}

#[test]
fn every_excess_in_every_call_on_a_whole_image_is_stopped() {
    let place = Place::new();
    let mut limits = Limits::default();
    limits.memory_bytes = 8 << 20;
    limits.call_time = Duration::from_secs(1);
    limits.maintenance_time = Duration::from_secs(1);
    limits.host_calls = 10_000;
    limits.maintenance_host_calls = 10_000;
    let library = Library::new(limits);
    for (action, why) in [
        ("trap", "unreachable"),
        ("panic", "panicked on command"),
        ("loop", "no answer within 1s"),
        ("call-loop", "more than 10000 host calls"),
        ("recurse", "bytes of stack"),
        ("grow-memory", "more than 8388608 bytes of memory"),
    ] {
        for (what, call) in CALLS {
            let error = refused(&library, &place, &format!("{action}-at-{call}"), what);
            assert_eq!(error.kind(), ErrorKind::Component, "{action}, {what}: {error}");
            let text = place.normalize(&error.to_string());
            assert!(text.starts_with("$ROOT/images/vm/"), "{action}, {what}: {text}");
            let failed = format!("the component failed in `{call}` and was thrown away: ");
            assert!(text.contains(&failed) && text.contains(why), "{action}, {what}: {text}");
            tally::component_stopped();
        }
    }
}

/// An error is an answer, and one that is far too long is cut.
#[test]
fn an_error_of_a_call_on_a_whole_image_changes_nothing() {
    let place = Place::new();
    for (what, call) in CALLS {
        let error = refused(shared(), &place, &format!("fail-at-{call}"), what);
        assert_eq!(error.kind(), ErrorKind::Invalid, "{what}: {error}");
        assert!(error.to_string().ends_with(&format!("{call} failed on command")), "{what}: {error}");
        let error = refused(shared(), &place, &format!("huge-error-at-{call} 1 1000000"), what);
        assert!(error.to_string().len() < 5000, "{what}: {} bytes", error.to_string().len());
        tally::component_stopped();
    }
}

#[test]
fn lies_about_a_whole_image_are_found() {
    let place = Place::new();
    let lied = ErrorKind::Component;
    for (line, whats, kind, why) in [
        ("lie-check", &["check", "repair"][..], lied, "`check` repaired more than it found"),
        ("lie-selected", &["select"], lied, "`select-snapshot` returned a virtual size of 513 bytes"),
        ("lie-selected 9223372036854775808", &["select"], lied, "returned a virtual size of 9223372036854775808"),
        ("lie-snapshots", &["list"], ErrorKind::Limit, "the image has more than 65536 snapshots"),
        ("lie-resize", &["resize"], lied, "should have made a disk of 524288 bytes, and it has 262144"),
    ] {
        for what in whats {
            let error = refused(shared(), &place, line, what);
            assert_eq!(error.kind(), kind, "{line}: {error}");
            assert!(error.to_string().contains(why), "{line}: {error}");
            tally::component_stopped();
        }
    }
}

/// Whoever decided that the disk loses nothing decided it for the size that it had.
#[test]
fn a_disk_that_has_another_size_meanwhile_is_left_alone() {
    let place = Place::new();
    let image = place.write("images/vm/disk.raw", [7; 8192]);
    let (opener, request) = (opener(shared(), &place), OpenRequest::new(&image, "raw"));
    let error = opener.resize(&request, 4096, 6144).unwrap_err();
    assert!(error.kind() == ErrorKind::Storage && error.message().contains("from 4096 bytes to 8192"), "{error}");
    assert_eq!(std::fs::read(&image).unwrap(), [7; 8192]);
    opener.resize(&request, 8192, 6144).unwrap();
    assert_eq!(std::fs::read(&image).unwrap(), [7; 6144]);
    tally::image_served();
}

/// A disk in use: the component that is started again says how large the image is.
#[test]
fn a_disk_whose_image_did_not_grow_is_used_no_more() {
    let place = Place::new();
    let grow = |line: &str| {
        let image = image(&place, line);
        let request = OpenRequest { access: Access::ReadWrite, ..OpenRequest::new(&image, "hostile") };
        let disk = opener(shared(), &place).open(&request).unwrap().disk;
        let grown = disk.grow(512 << 10);
        (grown, disk, std::fs::metadata(&image).unwrap().len())
    };
    let (grown, disk, size) = grow("lie-resize");
    let error = grown.unwrap_err();
    assert_eq!((error.kind(), size), (ErrorKind::Corrupt, 256 << 10), "{error}");
    let why = "it could not be started again after its size was changed: ";
    assert!(error.to_string().contains(why), "{error}");
    for offset in [0, 256 << 10] {
        let error = crate::library::read(&disk, offset, 512).unwrap_err();
        assert!(error.to_string().contains(why), "{offset}: {error}");
    }
    tally::component_stopped();
    drop(disk);
    // The twin.
    let (grown, disk, size) = grow("ok");
    grown.unwrap();
    assert_eq!((disk.capacity(), size), (512 << 10, 512 << 10));
    assert_eq!(crate::library::read(&disk, (512 << 10) - 512, 512).unwrap(), [0; 512]);
    tally::image_served();
}

/// The commands: the exit code says that it was the component.
#[test]
fn a_trap_in_every_command_is_an_error_of_the_component() {
    let place = Place::new();
    let plugin = format!("hostile={}", component("hostile").display());
    let source = place.text("images/vm/source.raw");
    std::fs::write(&source, noise(1, 256 << 10)).unwrap();
    let (old, new) = (place.text("images/vm/hostile.img"), place.text(NEW));
    let hostile = ["--format", "hostile"];
    for (call, command) in [
        ("create", vec!["create", "-o", "line=trap-at-create", &new, "1M"]),
        (
            "pack",
            vec![
                "convert",
                "--format",
                "raw",
                "--to-format",
                "hostile",
                "--compress",
                "-o",
                "line=trap-at-pack",
                &source,
                &new,
            ],
        ),
        ("check", vec!["check", &old]),
        ("check", vec!["check", "--repair", "all", &old]),
        ("resize", vec!["resize", &old, "1M"]),
        ("set-backing", vec!["rebase", "--no-backing", &old]),
        ("list-snapshots", vec!["snapshot", "list", &old]),
        ("list-snapshots", vec!["info", &old]),
        ("select-snapshot", vec!["read", "--snapshot", "1", &old]),
        ("create-snapshot", vec!["snapshot", "create", &old, "name"]),
        ("apply-snapshot", vec!["snapshot", "apply", &old, "1"]),
        ("delete-snapshot", vec!["snapshot", "delete", &old, "1"]),
    ] {
        let image = image(&place, &format!("trap-at-{call}"));
        let before = std::fs::read(&image).unwrap();
        let mut program = limited();
        program.args(&command).args(["--plugin", &plugin]);
        if call != "pack" {
            program.args(hostile);
        }
        let attempt = place.finish(program, |_| {});
        attempt.assert_error(6, &[&format!("the component failed in `{call}` and was thrown away: ")]);
        // What is known of an image is said beside the error.
        assert_eq!(attempt.outcome.text().is_empty(), command[0] != "info", "{command:?}");
        assert!(std::fs::read(&image).unwrap() == before, "{command:?}: the image changed");
        assert!(!place.path(NEW).exists(), "{command:?}: an unfinished image stays");
        place.canary.assert_untouched(&attempt.outcome);
        tally::component_stopped();
    }
}
