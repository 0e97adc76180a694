//! What a name leads to inside a granted directory: links, devices, pipes, and files that change
//! while they are opened. Whoever made the directory is not trusted to have made regular files.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use blockhouse_sandbox::block::{BlockBackend, VolatileSlice};
use blockhouse_sandbox::{Grants, OpenRequest, Opener};
use blockhouse_tests::{noise, skip};

use crate::library;
use crate::place::{Place, race};
use crate::qcow2::overlay;
use crate::tally;

const SIZE: u64 = 64 << 10;

/// An overlay in `images/vm` whose backing file is `name`, raw.
fn overlay_on(place: &Place, name: &str) -> PathBuf {
    let file = format!("images/vm/on-{}.qcow2", name.replace('/', "-"));
    place.write(&file, overlay(12, SIZE, name.as_bytes(), Some("raw")))
}

/// The reference is refused for this reason, by this code that the component sees.
#[track_caller]
fn assert_refused(place: &Place, name: &str, code: &str, reason: &str) {
    let image = overlay_on(place, name);
    let path = format!("$ROOT/images/vm/{name}");
    let file = place.normalize(image.to_str().unwrap());
    let line = format!(
        "blockhouse: {file}: cannot open {name:?} (that is {path}): {code}; the host refused {path:?}: {reason}"
    );
    place.assert_denied("qcow2", &image, &path, &line);
}

const OUTSIDE: &str = "a symbolic link on the way leads outside of the granted directory";

#[test]
fn symbolic_links_do_not_lead_outside() {
    let place = Place::new();
    let link = |target: &Path, name: &str| symlink(target, place.path("images/vm").join(name)).unwrap();
    link(&place.path("secret/canary"), "absolute");
    link(Path::new("../../secret/canary"), "relative");
    link(Path::new("relative"), "twice");
    link(Path::new("twice"), "three-times");
    link(Path::new("../../secret"), "directory");
    link(&place.path("secret"), "absolute-directory");
    link(Path::new("/"), "root");
    // GHSA-vqjp-4c8c-hfgg, GHSA-m9f7-9w4p-gv38: slashes at the end, of the link and of the name.
    link(Path::new("../../secret/canary/"), "slash");
    link(Path::new("../../secret/"), "directory-slash");
    for name in ["absolute", "relative", "twice", "three-times", "slash"] {
        assert_refused(&place, name, "not permitted", OUTSIDE);
    }
    for name in ["directory/canary", "absolute-directory/canary", "directory-slash/canary"] {
        assert_refused(&place, name, "not permitted", OUTSIDE);
    }
    let through_root = format!("root{}", place.text("secret/canary"));
    let image = overlay_on(&place, &through_root);
    let attempt = place.open("read", "qcow2", &image);
    attempt.assert_error(3, &[OUTSIDE]);
    place.canary.assert_untouched(&attempt.outcome);

    // GHSA-m9f7-9w4p-gv38: a link that was renamed is the same link.
    std::fs::rename(place.path("images/vm/slash"), place.path("images/vm/renamed")).unwrap();
    assert_refused(&place, "renamed", "not permitted", OUTSIDE);

    // The twin: links that stay inside.
    let content = noise(1, 64 << 10);
    std::fs::create_dir(place.path("images/store")).unwrap();
    place.write("images/store/base", &content);
    link(Path::new("../store/base"), "inside");
    link(Path::new("inside"), "inside-twice");
    link(Path::new("../store"), "inside-directory");
    for name in ["inside", "inside-twice", "inside-directory/base"] {
        let attempt = place.open("read", "qcow2", &overlay_on(&place, name)).succeeded();
        assert!(attempt.outcome.stdout == content, "{name}");
        tally::image_served();
    }
}

#[test]
fn links_in_a_circle_and_to_nothing_are_refused() {
    let place = Place::new();
    let vm = place.path("images/vm");
    symlink("around", vm.join("around")).unwrap();
    symlink("b", vm.join("a")).unwrap();
    symlink("a", vm.join("b")).unwrap();
    symlink("nowhere", vm.join("dangling")).unwrap();
    for name in ["around", "a"] {
        let attempt = place.open("read", "qcow2", &overlay_on(&place, name));
        attempt.assert_error(3, &[&format!("cannot open {name:?}"), "symbolic links"]);
        tally::image_refused();
    }
    assert_refused(&place, "dangling", "no such file", "there is no such file");
    assert!(!vm.join("nowhere").exists());
}

/// A hard link in a granted directory is the file of somebody else.
#[test]
fn a_hard_link_is_refused_unless_it_is_granted_by_itself() {
    let place = Place::new();
    // Not the canary: the link itself would count as touching it.
    let content = noise(2, 64 << 10);
    place.write("secret/other", &content);
    let link = place.path("images/vm/hard");
    std::fs::hard_link(place.path("secret/other"), &link).unwrap();
    let image = overlay_on(&place, "hard");
    let attempt = place.open("read", "qcow2", &image);
    attempt.assert_denied(
        "blockhouse: $ROOT/images/vm/on-hard.qcow2: cannot open \"hard\" (that is $ROOT/images/vm/hard): \
         not permitted; the host refused \"$ROOT/images/vm/hard\": it has 2 hard links, so it may belong to another \
         directory; grant the file itself to allow it",
    );
    assert_eq!(attempt.opens("denied"), ["$ROOT/images/vm/hard"]);
    tally::image_refused();
    let attempt = place.open_with("read", "qcow2", &image, &[link], &[]).succeeded();
    assert!(attempt.outcome.stdout == content);
    tally::image_served();
}

#[test]
fn only_regular_files_are_opened_and_nothing_hangs() {
    let place = Place::new();
    let vm = place.path("images/vm");
    assert!(Command::new("mkfifo").arg(vm.join("fifo")).status().unwrap().success());
    let _socket = std::os::unix::net::UnixListener::bind(vm.join("socket")).unwrap();
    std::fs::create_dir(vm.join("directory")).unwrap();
    for name in ["fifo", "directory"] {
        assert_refused(&place, name, "not permitted", "it is not a regular file");
    }
    // A socket cannot even be opened.
    assert_refused(&place, "socket", "not permitted", "No such device or address (os error 6)");
}

/// Links out of the grant to what the kernel offers.
#[test]
fn links_to_devices_and_to_proc_are_refused() {
    let place = Place::new();
    let vm = place.path("images/vm");
    let mut targets = vec![
        ("zero", "/dev/zero".to_owned()),
        ("mem", "/proc/self/mem".to_owned()),
        ("environ", "/proc/self/environ".to_owned()),
        ("stdin", "/dev/stdin".to_owned()),
        ("cwd", "/proc/self/cwd/Cargo.toml".to_owned()),
        ("root", format!("/proc/self/root{}", place.text("secret/canary"))),
    ];
    let names: Vec<String> = (0..24).map(|number| format!("fd-{number}")).collect();
    targets.extend(names.iter().map(|name| (name.as_str(), format!("/proc/self/fd/{}", &name[3..]))));
    for (name, target) in &targets {
        symlink(target, vm.join(name)).unwrap();
        let image = overlay_on(&place, name);
        let attempt = place.open("read", "qcow2", &image);
        attempt.assert_error(3, &[&format!("cannot open {name:?}"), OUTSIDE]);
        assert_eq!(attempt.opens("denied"), [format!("$ROOT/images/vm/{name}")]);
        assert_eq!(attempt.opens("allowed"), [""; 0]);
        place.canary.assert_untouched(&attempt.outcome);
        tally::image_refused();
    }
}

/// The same where the link does not leave the grant, because everything is granted.
#[test]
fn not_even_a_grant_of_everything_opens_devices() {
    let place = Place::new();
    for target in ["/dev/zero", "/dev/full", "/dev/null"] {
        let image = place.write("images/vm/a.qcow2", overlay(12, SIZE, target.as_bytes(), Some("raw")));
        let attempt = place.open_with("read", "qcow2", &image, &[PathBuf::from("/")], &[]);
        attempt.assert_error(3, &[&format!("cannot open {target:?}"), "it is not a regular file"]);
        tally::image_refused();
    }
    // The twin: a regular file, of the same grant.
    let content = noise(3, 64 << 10);
    let base = place.write("images/vm/base", &content);
    let image = place.write("images/vm/a.qcow2", overlay(12, SIZE, base.to_str().unwrap().as_bytes(), Some("raw")));
    let attempt = place.open_with("read", "qcow2", &image, &[PathBuf::from("/")], &[]).succeeded();
    assert!(attempt.outcome.stdout == content);
    tally::image_served();
}

/// Device nodes inside the granted directory.
#[test]
fn device_nodes_are_refused() {
    let place = Place::new();
    for (name, kind, major, minor) in [("character", "c", "1", "5"), ("block", "b", "7", "250")] {
        let node = place.path("images/vm").join(name);
        let made = Command::new("mknod").arg(&node).args([kind, major, minor]).output().unwrap();
        if !made.status.success() {
            skip("device nodes cannot be made here (that takes root)");
            return;
        }
        let image = overlay_on(&place, name);
        let attempt = place.open("read", "qcow2", &image);
        attempt.assert_error(3, &[&format!("cannot open {name:?}"), "the host refused"]);
        assert_eq!(attempt.opens("allowed"), [""; 0]);
        tally::image_refused();
    }
}

/// The image itself, and a grant, come from the operator; they too must be what they seem.
#[test]
fn an_image_or_a_grant_that_is_no_file_does_not_hang() {
    let place = Place::new();
    let vm = place.path("images/vm");
    let fifo = vm.join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    for image in [fifo.as_path(), Path::new("/dev/zero"), &vm] {
        let attempt = place.open("read", "raw", image);
        attempt.assert_error(1, &["cannot open the image: it is not a regular file"]);
    }
    let image = place.write("images/vm/a.raw", noise(4, 512));
    for grant in [fifo.as_path(), Path::new("/dev/zero")] {
        let attempt = place.open_with("read", "raw", &image, &[grant.to_owned()], &[]);
        attempt.assert_error(1, &["it is neither a directory nor a regular file"]);
    }
}

/// CVE-2025-64324, CVE-2026-1386, CVE-2026-24054: the name is a file when it is checked and a link when
/// it is used. Here, what was opened is what was checked.
#[test]
fn a_link_that_flips_during_the_open_never_leads_outside() {
    let place = Place::new();
    let vm = place.path("images/vm");
    let inside = vec![b'i'; 64 << 10];
    std::fs::create_dir(vm.join("sub")).unwrap();
    std::fs::write(vm.join("sub/canary"), &inside).unwrap();
    let file = place.write("images/vm/file.qcow2", overlay(12, SIZE, b"flip", Some("raw")));
    let directory = place.write("images/vm/directory.qcow2", overlay(12, SIZE, b"sub/canary", Some("raw")));
    let stop = AtomicBool::new(false);
    let library = library::shared();
    let opener = Opener::new(&library.sandbox, library.formats.clone())
        .grants(Grants::new().allow(place.path("images")).unwrap());
    // Compiled before the race, so that the race is all opens.
    library.formats.load(&library.sandbox, "qcow2").unwrap();
    library.formats.load(&library.sandbox, "raw").unwrap();

    let (mut opened, mut refused) = (0u32, 0u32);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                // Each name is replaced in one step, so that it always leads somewhere.
                let new = vm.join("new");
                std::fs::write(&new, &inside).unwrap();
                std::fs::rename(&new, vm.join("flip")).unwrap();
                symlink("../../secret/canary", &new).unwrap();
                std::fs::rename(&new, vm.join("flip")).unwrap();
            }
        });
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                symlink("../../secret", vm.join("new-sub")).unwrap();
                std::fs::rename(vm.join("sub"), vm.join("real-sub")).unwrap();
                std::fs::rename(vm.join("new-sub"), vm.join("sub")).unwrap();
                std::fs::remove_file(vm.join("sub")).unwrap();
                std::fs::rename(vm.join("real-sub"), vm.join("sub")).unwrap();
            }
        });
        let end = Instant::now() + race();
        let mut turn = || {
            for image in [&file, &directory] {
                match opener.open(&OpenRequest::new(image, "qcow2")) {
                    Ok(disk) => {
                        let mut bytes = vec![0; 64 << 10];
                        disk.disk.read(&[VolatileSlice::from(&mut bytes[..])], 0).unwrap();
                        place.canary.assert_not_in(&bytes);
                        assert!(bytes == inside, "neither the file nor the canary");
                        opened += 1;
                    }
                    Err(_) => refused += 1,
                }
            }
        };
        // The threads are stopped even if an assertion fails.
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            while Instant::now() < end {
                turn();
            }
        }));
        stop.store(true, Ordering::Relaxed);
        if let Err(failure) = result {
            std::panic::resume_unwind(failure);
        }
    });
    assert!(opened > 0 && refused > 0, "no race: {opened} opened, {refused} refused");
    tally::image_refused();
}
