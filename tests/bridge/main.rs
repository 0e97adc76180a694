//! The bridge to imago: the example's device over sandboxed disks and over imago's own, on the same images.
//!
//! ```text
//!   seed ─▶ requests ─▶ examples/imago-vmm native    on one copy ──▶ answers ─┐
//!               │     └▶ examples/imago-vmm sandboxed on another  ──▶ answers ─┴─ equal, and those of the model
//!               └─▶ model ◀── equal, where it is known ── qemu-img convert of both; qemu-img check: clean
//! ```
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation)]

mod images;
mod model;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use blockhouse_tests::{
    Canary, Outcome, component, on_path, qemu_img, run, run_within, scratch, sha256, skip, target_directory,
};

use crate::images::{IMAGES, Image};
use crate::model::Model;

/// Builds the example as the program under test is built, so that nothing is compiled twice.
fn example() -> &'static Path {
    static EXAMPLE: OnceLock<PathBuf> = OnceLock::new();
    EXAMPLE.get_or_init(|| {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.current_dir(env!("CARGO_MANIFEST_DIR")).args([
            "build",
            "--quiet",
            "--locked",
            "--workspace",
            "--bin",
            "blockhouse-imago-vmm",
        ]);
        run_within(Duration::from_secs(900), &mut cargo).succeeded();
        target_directory().join("debug/blockhouse-imago-vmm")
    })
}

fn have_qemu() -> bool {
    let there = on_path("qemu-img") && on_path("qemu-io");
    if !there {
        skip("qemu-img and qemu-io are not on the path");
    }
    there
}

/// Runs requests, one a line, on an image.
fn device(way: &str, image: (&Path, &str), mode: &str, requests: &[String], more: &[&Path]) -> Outcome {
    let (image, format) = image;
    let file = image.with_extension("requests");
    std::fs::write(&file, requests.join("\n")).unwrap();
    run(Command::new(example()).args([way, format]).arg(image).arg(mode).arg(file).args(more))
}

fn lines(requests: &[&str]) -> Vec<String> {
    requests.iter().map(|request| (*request).to_owned()).collect()
}

/// The disk, as QEMU reads it.
fn content(image: &Path, format: &str) -> Vec<u8> {
    let raw = image.with_extension("content");
    qemu_img(["convert", "-f", format, "-O", "raw"].map(Path::new).into_iter().chain([image, &raw]));
    std::fs::read(raw).unwrap()
}

fn check(image: &Image, file: &Path) {
    if image.format == "qcow2" {
        let found = run(Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(file)).succeeded().text();
        assert!(found.contains("No errors were found"), "{}: {found}", image.name);
    }
}

#[test]
fn a_device_cannot_tell_the_difference() {
    if !have_qemu() {
        return;
    }
    for image in IMAGES {
        let directory = scratch();
        let (native, sandboxed, first) = image.make(directory.path());
        let below = image.below(directory.path());
        let before: Vec<_> = below.iter().map(|file| sha256(&std::fs::read(file).unwrap())).collect();
        for seed in 0..2 {
            // The second time both go on from the same bytes: what a discard leaves behind may differ.
            let mut model = Model::new(if seed == 0 { first.clone() } else { content(&sandboxed, image.format) });
            std::fs::copy(&sandboxed, &native).unwrap();
            let (requests, answers) = model.requests(seed, 300);
            let expected = format!("{} sectors\n{}\n", first.len() / 512, answers.join("\n"));
            for (way, file, more) in [("native", &native, &[][..]), ("sandboxed", &sandboxed, &[directory.path()][..])]
            {
                let at = format!("{}, {way}, seed {seed}", image.name);
                let found = device(way, (file, image.format), "rw", &requests, more).succeeded().text();
                let wrong = found.lines().zip(expected.lines()).position(|(found, expected)| found != expected);
                let request = wrong.and_then(|line| requests.get(line.checked_sub(1)?));
                assert!(found == expected, "{at}: answer {wrong:?} is wrong, to {request:?}");
                check(image, file);
                let compared = model.compare(&content(file, image.format), way == "sandboxed");
                compared.unwrap_or_else(|why| panic!("{at}: {why}"));
            }
        }
        let after: Vec<_> = below.iter().map(|file| sha256(&std::fs::read(file).unwrap())).collect();
        assert_eq!(before, after, "{}: a backing file was written", image.name);
    }
}

#[test]
fn what_is_read_only_stays_as_it_is() {
    if !have_qemu() {
        return;
    }
    for image in IMAGES {
        let directory = scratch();
        let (_, file, first) = image.make(directory.path());
        let before = std::fs::read(&file).unwrap();
        let requests = lines(&["out 0 8 1", "zero 0 8", "unmap 0 128", "discard 0 128", "flush", "in 0 8"]);
        let found = device("sandboxed", (&file, image.format), "ro", &requests, &[directory.path()]).succeeded().text();
        let found: Vec<_> = found.lines().skip(1).collect();
        assert!(found[..4].iter().all(|line| line.starts_with("error ")), "{}: {found:?}", image.name);
        assert_eq!(found[4..], ["ok".to_owned(), model::read_answer(&first[..4096])], "{}", image.name);
        assert!(std::fs::read(&file).unwrap() == before, "{} was written", image.name);
    }
}

#[test]
fn a_component_that_breaks_is_an_io_error() {
    let directory = scratch();
    let hostile = component("hostile");
    for (behaviour, why) in
        [("trap-at-locate 2", "unreachable"), ("fail-at-locate 2", "fail"), ("lie-past-end", "wrong answer")]
    {
        let image = directory.path().join("image");
        let mut bytes = format!("{behaviour}\n").into_bytes();
        bytes.resize(1 << 20, b'.');
        std::fs::write(&image, &bytes).unwrap();
        // The first answer covers 64 KiB and is remembered; what comes after it is broken for good.
        let requests = lines(&["in 0 8", "in 1024 8", "in 0 8", "in 1024 8", "flush"]);
        let outcome =
            device("sandboxed", (&image, "hostile"), "ro", &requests, &[directory.path(), &hostile]).succeeded();
        let found = outcome.text();
        let found: Vec<_> = found.lines().skip(1).collect();
        let good = model::read_answer(&bytes[..4096]);
        if behaviour.ends_with('2') {
            assert_eq!([found[0], found[2]], [good.as_str(), good.as_str()], "{behaviour}: {found:?}");
        }
        for broken in [found[1], found[3]] {
            assert!(broken.starts_with("error ") && broken.contains(why), "{behaviour}: {found:?}");
        }
        assert_eq!(found[4], "ok", "{behaviour}: nothing was written, and nothing is lost");
    }
}

#[test]
fn a_stolen_file_stays_where_it_is() {
    if !have_qemu() {
        return;
    }
    let directory = scratch();
    let inside = directory.path().join("images");
    std::fs::create_dir(&inside).unwrap();
    let canary = Canary::new(directory.path().join("secret"));
    let image = inside.join("overlay.qcow2");
    let named = canary.path().display().to_string();
    qemu_img(["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", &named, image.to_str().unwrap(), "64k"]);
    let outcome = device("sandboxed", (&image, "qcow2"), "ro", &lines(&["in 0 8"]), &[&inside]).refused();
    assert!(outcome.stderr.contains("not granted"), "{}", outcome.stderr);
    canary.assert_untouched(&outcome);
    // imago's own way opens it, which is what the other line is for.
    let outcome = device("native", (&image, "qcow2"), "ro", &lines(&["in 0 8"]), &[]).succeeded();
    let secret = std::fs::read(canary.path()).unwrap();
    assert!(outcome.text().contains(&model::read_answer(&secret[..4096])), "{}", outcome.text());
}

/// imago is synchronous or asynchronous for a whole build; the driver is made of one source for both.
#[test]
fn both_modes_of_imago() {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(env!("CARGO_MANIFEST_DIR")).args([
        "test",
        "--quiet",
        "--locked",
        "--package",
        "blockhouse-imago",
        "--no-default-features",
        "--features",
        "sync",
        "--test",
        "driver",
    ]);
    let found = run_within(Duration::from_secs(900), &mut cargo).succeeded().text();
    assert!(found.contains("test result: ok."), "{found}");
}
