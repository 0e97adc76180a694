//! Components that use the file functions against their meaning. wasmtime-wasi itself was escaped in
//! 2026 (the advisories are named below); the host's own policy has to stop each of those calls too.
//!
//! The attacker is `component/`: the first line of an image says what it does, and what it was told
//! comes back as its error.

use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;

use blockhouse_tests::{Canary, component, noise};

use crate::place::{Attempt, Place};
use crate::tally;

/// An image for the hostile component that does `line`.
pub(crate) fn image(place: &Place, line: &str) -> PathBuf {
    let mut bytes = format!("{line}\n").into_bytes();
    bytes.resize(256 << 10, b'.');
    place.write("images/vm/hostile.img", bytes)
}

/// Runs the hostile component on an image, with these grants.
pub(crate) fn attack(place: &Place, line: &str, grants: &[PathBuf]) -> Attempt {
    let image = image(place, line);
    let plugin = format!("hostile={}", component("hostile").display());
    place.open_with("read", "hostile", &image, grants, &["--plugin", &plugin])
}

/// What the component reported, one line per attempt.
fn report(attempt: &Attempt) -> Vec<String> {
    assert_eq!(attempt.code(), 1, "{:?}", attempt.outcome);
    let error = attempt.error();
    let report = error.strip_prefix("blockhouse: $ROOT/images/vm/hostile.img: ").expect("a report");
    report.split("\\n").map(str::to_owned).collect()
}

fn images(place: &Place) -> [PathBuf; 1] {
    [place.path("images")]
}

/// GHSA-2r75-cxrj-cmph: open-at with only TRUNCATE goes through read-only permissions. And every other
/// flag that makes or changes something.
#[test]
fn no_flag_of_open_at_writes_creates_or_truncates() {
    let place = Place::new();
    // Granted this time: read-only is what has to hold.
    std::fs::create_dir(place.path("images/granted")).unwrap();
    let granted = Canary::new(place.path("images/granted/file"));
    let flags = [
        "truncate",
        "none,truncate",
        "read,truncate",
        "write,truncate",
        "create",
        "read,create",
        "write,create",
        "read,create,exclusive",
        "exclusive",
        "write",
        "read,write",
        "mutate",
        "read,mutate",
        "sync",
        "read,sync",
        "directory",
        "read,directory",
        "read,write,mutate,sync,create,truncate",
    ];
    for flags in flags {
        let line = format!("open-raw {flags} vm/../granted/file granted/new file new");
        let attempt = attack(&place, &line, &images(&place));
        let report = report(&attempt);
        assert!(report.iter().all(|line| line.starts_with("refused ")), "{flags}: {report:#?}");
        assert_eq!(attempt.opens("allowed"), [""; 0], "{flags}");
        assert_eq!(attempt.opens("denied").len(), report.len(), "{flags}");
        granted.assert_untouched(&attempt.outcome);
        place.canary.assert_untouched(&attempt.outcome);
        assert!(!place.path("images/granted/new").exists() && !place.path("images/new").exists(), "{flags} created");
        tally::component_stopped();
    }
    // The twin: read, and read alone, opens it.
    for flags in ["read", "read,follow", "none"] {
        let report = report(&attack(&place, &format!("open-raw {flags} granted/file"), &images(&place)));
        assert_eq!(report[0], "opened \"granted/file\" in \"$ROOT/images\"", "{flags}");
        assert_eq!(report[1], "refused \"granted/file\" in \"/\": not-permitted", "{flags}");
    }
}

/// GHSA-vqjp-4c8c-hfgg, GHSA-m9f7-9w4p-gv38: slashes at the end of paths, of links and of renamed links;
/// and every other path that a component can think of.
#[test]
fn no_path_leads_out_of_a_preopened_directory() {
    let place = Place::new();
    let top = place.path("images");
    symlink("../secret/canary", top.join("link")).unwrap();
    symlink("../secret/canary/", top.join("link-slash")).unwrap();
    symlink("../secret/", top.join("dir-slash")).unwrap();
    symlink("../secret", top.join("dir")).unwrap();
    symlink(place.path("secret"), top.join("absolute-dir")).unwrap();
    symlink("/", top.join("root")).unwrap();
    symlink("../secret/canary/", top.join("old")).unwrap();
    std::fs::rename(top.join("old"), top.join("renamed")).unwrap();
    let canary = place.text("secret/canary");
    let paths = [
        "../secret/canary",
        "../secret/canary/",
        "./../secret/canary",
        "vm/../../secret/canary",
        "vm/../../../x",
        "/",
        ".",
        "..",
        "./",
        "../",
        "%00",
        "link",
        "link/",
        "link//",
        "link/.",
        "link/..",
        "link-slash",
        "link-slash/",
        "renamed",
        "renamed/",
        "dir/canary",
        "dir/canary/",
        "dir-slash/canary",
        "dir-slash//canary",
        "dir/./canary",
        "dir/../secret/canary",
        "absolute-dir/canary",
        "dir",
        "dir/",
        "root/etc/hostname",
        "vm/hostile.img/",
        "vm/hostile.img/.",
        "vm/hostile.img%00",
        "vm",
        "vm/",
        "//",
        "///../secret/canary",
        canary.as_str(),
    ];
    let flags = ["read", "read,follow", "none,follow"];
    // A report has 4 KiB at most, so a few paths at a time.
    for (flags, paths) in flags.into_iter().flat_map(|flags| paths.chunks(12).map(move |paths| (flags, paths))) {
        let attempt = attack(&place, &format!("open-raw {flags} {}", paths.join(" ")), &images(&place));
        let report = report(&attempt);
        assert_eq!(report.len(), 2 * paths.len(), "two directories: the grant and the root");
        let opened: Vec<&String> = report.iter().filter(|line| !line.starts_with("refused ")).collect();
        // Resolved as text, `hostile.img/.` is the image, which is granted.
        let inside = |line: &&&String| line.starts_with("opened \"vm/hostile.img/.\" in ");
        assert_eq!(opened.iter().filter(|line| !inside(line)).count(), 0, "{opened:#?}");
        place.canary.assert_untouched(&attempt.outcome);
        tally::component_stopped();
    }
}

/// GHSA-4ch3-9j33-3pmj: a hard link or a rename from a read-only directory into a writable one. There is
/// no function for it: see `loading.rs`. And there is no writable directory.
#[test]
fn a_component_cannot_register_a_file_for_writing() {
    let place = Place::new();
    let attempt = attack(&place, "share-read-write", &images(&place));
    let report = report(&attempt);
    assert!(report[0].starts_with("refused: "), "{report:?}");
    tally::component_stopped();
}

/// A component sees the names of what was granted, and the root, below which nothing opens.
#[test]
fn preopened_directories_are_the_grants() {
    let place = Place::new();
    assert_eq!(report(&attack(&place, "preopens", &[])), ["/"]);
    let granted = report(&attack(&place, "preopens", &[place.path("images"), place.canary.path().to_owned()]));
    assert_eq!(granted, ["$ROOT/images", "$ROOT/secret", "/"]);
    // Of a directory with one granted file, it is that file.
    let attempt = attack(
        &place,
        "open-raw read canary ./canary canary2 ../images/vm/hostile.img",
        &[place.canary.path().to_owned()],
    );
    let opened: Vec<String> = report(&attempt).into_iter().filter(|line| line.starts_with("opened ")).collect();
    assert_eq!(opened, ["opened \"canary\" in \"$ROOT/secret\"", "opened \"./canary\" in \"$ROOT/secret\""]);
    tally::component_stopped();
}

/// `open` is for the image alone; what a component opens there is judged and recorded all the same.
#[test]
fn opening_early_is_judged_like_opening_in_time() {
    let place = Place::new();
    let canary = place.text("secret/canary");
    for stage in ["open", "open-early"] {
        let attempt = attack(&place, &format!("{stage} {canary} ../../secret/canary"), &images(&place));
        // Two names of one file, which the audit file has once.
        assert_eq!(attempt.opens("denied"), ["$ROOT/secret/canary"], "{stage}");
        assert!(report(&attempt).iter().all(|line| line.starts_with("refused ")), "{stage}");
        place.canary.assert_untouched(&attempt.outcome);
        tally::component_stopped();
    }
}

/// GHSA-852m-cvvp-9p4w: one host call cannot be made to allocate without limit.
#[test]
fn a_read_of_everything_gives_a_piece() {
    let place = Place::new();
    for (length, offset) in [(u64::MAX, 0), (u64::MAX, 1), (1 << 40, 100), (u64::MAX, u64::MAX), (1, i64::MAX as u64)] {
        let attempt = attack(&place, &format!("read {length} {offset}"), &images(&place));
        let report = report(&attempt);
        let read = report[0].strip_prefix("read ").and_then(|rest| rest.split(' ').next());
        match read {
            Some(bytes) => assert!(bytes.parse::<usize>().unwrap() <= 256 << 10, "{report:?}"),
            None => assert!(report[0].starts_with("refused: "), "{report:?}"),
        }
        tally::component_stopped();
    }
}

/// A FIFO in the grant: the component asks for it, and nobody waits.
#[test]
fn a_fifo_does_not_stop_the_host() {
    let place = Place::new();
    assert!(Command::new("mkfifo").arg(place.path("images/fifo")).status().unwrap().success());
    let attempt = attack(&place, "open-raw read fifo", &images(&place));
    assert!(report(&attempt).iter().all(|line| line.starts_with("refused ")));
    tally::component_stopped();
}

/// What a component says about its backing file is judged like what an image says.
#[test]
fn a_component_cannot_choose_what_lies_below_it() {
    let place = Place::new();
    place.write("images/vm/base", noise(1, 4096));
    for (line, code, words) in [
        ("backing-undeclared base", 3, "without its format"),
        ("backing nbd base", 5, "no component serves the format \"nbd\""),
        ("backing raw ../../secret/canary", 3, "it is not granted"),
        ("backing-self hostile", 4, "the backing chain is a loop"),
        ("backing hostile hostile.img", 4, "the backing chain is a loop"),
    ] {
        let attempt = attack(&place, line, &images(&place));
        attempt.assert_error(code, &[words]);
        place.canary.assert_untouched(&attempt.outcome);
        tally::component_stopped();
    }
    let plugin = format!("hostile={}", component("hostile").display());
    let image = image(&place, "backing raw base");
    let attempt = place.open_with("read", "hostile", &image, &images(&place), &["--plugin", &plugin]).succeeded();
    assert!(attempt.outcome.stdout.starts_with(&noise(1, 4096)));
    tally::image_served();
}
