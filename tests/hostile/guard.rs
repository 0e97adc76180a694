//! A guest that turns its raw disk into an image for programs that guess: `guard-header=on`.
//!
//! QEMU guesses what the disk is afterwards, and makes the headers that are tried.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use blockhouse_sandbox::block::{Access, BlockBackend, HeaderGuard, VolatileSlice};
use blockhouse_sandbox::{OpenRequest, Opener};
use blockhouse_tests::{qemu_img, run};

use crate::library::shared;
use crate::place::{Place, limited};
use crate::tally;

const SIZE: usize = 1 << 20;

/// The disk at `image` behind a guard.
fn guarded(image: &Path) -> HeaderGuard {
    let request = OpenRequest { access: Access::ReadWrite, ..OpenRequest::new(image, "raw") };
    let opened = Opener::new(&shared().sandbox, shared().formats.clone()).open(&request).unwrap();
    HeaderGuard::new(Arc::new(opened.disk), image.display().to_string()).unwrap()
}

/// What QEMU guesses that a file is. An image that it recognises and cannot open (these are cut short) is none
/// that it takes for raw.
fn guess(image: &Path) -> String {
    let info = run(Command::new("qemu-img").args(["info", "--force-share", "--output=json"]).arg(image));
    if !info.status.success() {
        return "an image".to_owned();
    }
    let info: serde_json::Value = serde_json::from_slice(&info.stdout).unwrap();
    info["format"].as_str().unwrap().to_owned()
}

/// Images of every format that qemu-img makes, with what it guesses of them.
fn images(place: &Place) -> Vec<(String, Vec<u8>)> {
    let mut images = Vec::new();
    for (number, (format, options)) in [
        ("qcow2", "compat=1.1"),
        ("qcow2", "compat=0.10"),
        ("qcow", ""),
        ("qed", ""),
        ("vmdk", "subformat=monolithicSparse"),
        ("vmdk", "subformat=monolithicFlat"),
        ("vmdk", "subformat=streamOptimized"),
        ("vpc", "subformat=dynamic"),
        ("vhdx", ""),
        ("vdi", ""),
        ("parallels", ""),
        ("luks", "key-secret=key,iter-time=10"),
    ]
    .into_iter()
    .enumerate()
    {
        let image = place.path(&format!("images/{number}.{format}"));
        let mut arguments = vec!["create", "-q", "-f", format];
        if format == "luks" {
            arguments.extend(["--object", "secret,id=key,data=1234"]);
        }
        if !options.is_empty() {
            arguments.extend(["-o", options]);
        }
        arguments.extend([image.to_str().unwrap(), "4M"]);
        qemu_img(&arguments);
        let mut bytes = std::fs::read(&image).unwrap();
        bytes.resize(SIZE, 0);
        images.push((guess(&image), bytes));
    }
    images
}

#[test]
fn no_writer_makes_a_raw_disk_look_like_an_image() {
    let place = Place::new();
    let disk = place.path("images/vm/disk.raw");
    for (format, image) in images(&place) {
        assert_ne!(format, "raw");
        // First the twin: without the guard, the guess of others is what the guest wrote.
        std::fs::write(&disk, &image).unwrap();
        assert_ne!(guess(&disk), "raw", "{format}");

        let boot: Vec<u8> = [vec![0xfa; 510], vec![0x55, 0xaa]].concat();
        for size in [1, 7, 512, 4096, SIZE] {
            std::fs::write(&disk, [boot.clone(), vec![0; SIZE - 512]].concat()).unwrap();
            let guard = guarded(&disk);
            let mut refused = 0;
            // The front in small pieces, all else at once.
            let front = 4096.max(size);
            let mut pieces: Vec<(usize, usize)> =
                (0..front).step_by(size).map(|start| (start, (start + size).min(front))).collect();
            pieces.push((front, SIZE));
            for (start, end) in pieces.into_iter().filter(|(start, end)| start < end) {
                let mut bytes = image[start..end].to_vec();
                if let Err(error) = guard.write(&[VolatileSlice::from(&mut bytes[..])], start as u64) {
                    assert!(error.to_string().contains("would look like an image"), "{error}");
                    refused += 1;
                }
            }
            assert!(refused > 0, "{format} in pieces of {size}");
            assert_eq!(guard.refused(), refused);
            drop(guard);
            assert_eq!(guess(&disk), "raw", "{format} in pieces of {size}");
            tally::image_refused();
        }
    }
}

/// The program: the disk is looked at when it is opened, and a good one runs.
#[test]
fn a_disk_that_looks_like_an_image_is_refused_at_the_start() {
    let place = Place::new();
    let disk = place.path("images/vm/disk.raw");
    qemu_img(["create", "-q", "-f", "qcow2", disk.to_str().unwrap(), "1M"]);
    let mut program = limited();
    program.args(["run", "--disk"]).arg(format!("file={},format=raw,guard-header=on", disk.display()));
    let outcome = run(&mut program).refused();
    assert_eq!(
        place.normalize(&outcome.stderr).trim_end(),
        "blockhouse: $ROOT/images/vm/disk.raw: the raw disk already looks like an image: qcow or qcow2 at 0. Find out \
         who wrote that; without guard-header=on it is served as it is"
    );
    tally::image_refused();
    // The last 512 bytes of a file are no sector of its disk.
    std::fs::write(&disk, vec![0; 1000]).unwrap();
    let mut program = limited();
    program.args(["run", "--disk"]).arg(format!("file={},format=raw,guard-header=on", disk.display()));
    let outcome = run(&mut program).refused();
    assert!(
        outcome.stderr.contains("needs a file of whole sectors, and this one has 1000 bytes"),
        "{}",
        outcome.stderr
    );
    tally::image_refused();
}
