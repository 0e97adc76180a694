//! The walls around the process, with those inside it taken away: a host that hands every component the root
//! directory, to read and to write, is what a bug in WebAssembly or in the directory capabilities would leave.
//! What keeps it from the canary then is Landlock, and without Landlock nothing does.
//!
//! The host without inner walls is this test program, started again: see [`an_ambient_host`].

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use blockhouse_sandbox::block::{Access, BlockBackend, VolatileSlice};
use blockhouse_sandbox::{Grants, Limits, OpenRequest, Opener};
use blockhouse_tests::{LANDLOCK, Outcome, landlock_is_here, noise, run, without_calls};
use blockhouse_walls::{Plan, Walls};

use crate::library::Library;
use crate::place::Place;
use crate::qcow2::{overlay, with_data_file};
use crate::tally;

const IMAGE: &str = "BLOCKHOUSE_AMBIENT_IMAGE";
const FORMAT: &str = "BLOCKHOUSE_AMBIENT_FORMAT";
const GRANTED: &str = "BLOCKHOUSE_AMBIENT_GRANTED";

/// Does nothing, unless a test of this file started it: then it opens an image with all of the file system
/// granted, behind walls that know of one directory, writes to the disk, and prints it.
#[test]
fn an_ambient_host() {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let (Some(image), Some(granted), Ok(format)) = (variable(IMAGE), variable(GRANTED), std::env::var(FORMAT)) else {
        return;
    };
    // Open before the walls are raised: that must be no way around them.
    let grants = Grants::new().allow("/").unwrap().allow_writing("/").unwrap();
    let components = Library::components();
    let mut plan = Plan::new();
    plan.write(&granted);
    plan.read("/dev/null");
    let walls = Walls::raise(&plan);
    eprintln!("walls: {walls}");

    let library = Library::with(Limits::default(), &components);
    let opener = Opener::new(&library.sandbox, library.formats.clone()).grants(grants);
    let request = OpenRequest { access: Access::ReadWrite, ..OpenRequest::new(image, format) };
    let opened = match opener.open(&request) {
        Ok(opened) => opened,
        Err(error) => {
            eprintln!("ambient host: {error}");
            std::process::exit(3);
        }
    };
    let mut bytes = vec![0; usize::try_from(opened.disk.capacity()).unwrap()];
    opened.disk.read(&[VolatileSlice::from(&mut bytes[..])], 0).unwrap();
    std::io::stdout().write_all(&bytes).unwrap();
    opened.disk.write(&[VolatileSlice::from(&mut noise(1, 4096)[..])], 0).unwrap();
    opened.disk.close().unwrap();
    std::process::exit(0);
}

/// Opens an image with the host that has no walls inside.
fn open(place: &Place, format: &str, image: &Path, landlock: bool) -> Outcome {
    let mut host = Command::new(std::env::current_exe().unwrap());
    host.args(["--exact", "walls::an_ambient_host", "--nocapture"]);
    host.env(IMAGE, image).env(FORMAT, format).env(GRANTED, place.path("images"));
    if !landlock {
        without_calls(&mut host, LANDLOCK, libc::ENOSYS);
    }
    run(&mut host)
}

/// What Landlock says.
const REFUSED: &str = "Permission denied (os error 13)";

#[test]
fn landlock_keeps_a_component_without_other_walls_from_reading() {
    if !landlock_is_here() {
        return;
    }
    let place = Place::new();
    let canary = place.text("secret/canary");
    std::os::unix::fs::symlink("../../secret/canary", place.path("images/vm/link")).unwrap();
    for (number, reference) in [canary.as_str(), "../../secret/canary", "link"].into_iter().enumerate() {
        let bytes = overlay(12, 64 << 10, reference.as_bytes(), Some("raw"));
        let image = place.write(&format!("images/vm/{number}.qcow2"), &bytes);
        let outcome = open(&place, "qcow2", &image, true);
        assert_eq!(outcome.status.code(), Some(3), "{reference}: {}", outcome.stderr);
        assert!(outcome.stderr.contains(REFUSED), "{reference}: {}", outcome.stderr);
        place.canary.assert_untouched(&outcome);
        tally::image_refused();
    }
    // The component asks by itself, for whatever it likes.
    let image = place.write("images/vm/open.img", format!("open {canary} /etc/passwd /proc/self/environ\n"));
    let outcome = open(&place, "hostile", &image, true);
    assert_eq!(outcome.stderr.matches("refused \"/").count(), 3, "{}", outcome.stderr);
    assert!(!outcome.stderr.contains("opened \"/"), "{}", outcome.stderr);
    place.canary.assert_untouched(&outcome);
    tally::component_stopped();

    // The twin: what the walls know of, by the same host.
    let content = noise(7, 64 << 10);
    place.write("images/vm/base", &content);
    let image = place.write("images/vm/twin.qcow2", overlay(12, 64 << 10, b"base", Some("raw")));
    let outcome = open(&place, "qcow2", &image, true);
    assert!(contains(&outcome.stdout, &content), "{}", outcome.stderr);
    tally::image_served();
}

#[test]
fn landlock_keeps_a_component_without_other_walls_from_writing() {
    if !landlock_is_here() {
        return;
    }
    let place = Place::new();
    let image = with_data_file(&place, "secret/canary");
    let outcome = open(&place, "qcow2", &image, true);
    assert_eq!(outcome.status.code(), Some(3), "{}", outcome.stderr);
    assert!(outcome.stderr.contains(REFUSED), "{}", outcome.stderr);
    place.canary.assert_untouched(&outcome);
    tally::image_refused();

    let file = place.write("images/vm/dat", noise(3, 64 << 10));
    let image = with_data_file(&place, "images/vm/dat");
    open(&place, "qcow2", &image, true).succeeded();
    assert!(std::fs::read(file).unwrap().starts_with(&noise(1, 4096)), "the twin was not written");
    tally::image_served();
}

/// The attacks above work where there is no Landlock: so they are attacks, and it is what stops them.
#[test]
fn without_landlock_nothing_keeps_it_from_the_canary() {
    let place = Place::new();
    let canary = std::fs::read(place.canary.path()).unwrap();
    let image =
        place.write("images/vm/a.qcow2", overlay(12, 64 << 10, place.text("secret/canary").as_bytes(), Some("raw")));
    let outcome = open(&place, "qcow2", &image, false);
    assert!(outcome.stderr.contains("walls: seccomp"), "{}", outcome.stderr);
    assert!(contains(&outcome.stdout, &canary), "it was not read: {}", outcome.stderr);

    let image = place.write("images/vm/open.img", format!("open {}\n", place.text("secret/canary")));
    let outcome = open(&place, "hostile", &image, false);
    assert!(outcome.stderr.contains("opened \"/"), "{}", outcome.stderr);

    let image = with_data_file(&place, "secret/canary");
    open(&place, "qcow2", &image, false).succeeded();
    assert!(std::fs::read(place.canary.path()).unwrap().starts_with(&noise(1, 4096)), "it was not written");
}

/// What libtest prints stands around it.
fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}
