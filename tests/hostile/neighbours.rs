//! Four disks of one server, of which one is hostile: by what its component does, or by what is in its image. The
//! other three lose no request, and no byte of an answer is wrong. (How long they take beside it is measured by
//! `cargo xtask bench --only neighbours`: a test has no opinion on time.)

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use blockhouse_tests::client::Client;
use blockhouse_tests::serve::Serve;
use blockhouse_tests::{blockhouse, component, noise, qemu_img};

use crate::place::Place;
use crate::tally;

/// Bytes of each disk.
const SIZE: usize = 8 << 20;
/// Reads of each of the other three while the one is hostile.
const READS: u64 = 200;

/// The other three: the same bytes in three formats.
fn good_disks(place: &Place) -> Vec<(PathBuf, String)> {
    let raw = place.write("images/good.raw", noise(7, SIZE));
    let convert = |format: &str, options: &[&str]| {
        let image = raw.with_extension(format);
        let arguments = [&["convert", "-f", "raw", "-O", format], options].concat();
        let files = [raw.to_str().unwrap(), image.to_str().unwrap()];
        qemu_img(arguments.into_iter().chain(files));
        image
    };
    // Small clusters, and compressed ones: their components are asked all the time.
    let qcow2 = convert("qcow2", &["-c", "-o", "cluster_size=4K"]);
    let vmdk = convert("vmdk", &[]);
    [(raw, "raw"), (qcow2, "qcow2"), (vmdk, "vmdk")].map(|(image, format)| (image, format.to_owned())).into()
}

/// A qcow2 image whose clusters are all compressed, and all damaged.
fn damaged(place: &Place) -> PathBuf {
    let image = place.path("images/damaged.qcow2");
    let raw = place.write("images/text.raw", b"text ".repeat(SIZE / 5));
    qemu_img(["convert", "-c", "-f", "raw", "-O", "qcow2", raw.to_str().unwrap(), image.to_str().unwrap()]);
    let mut bytes = std::fs::read(&image).unwrap();
    // Header, refcounts and tables have the first five clusters.
    bytes[5 << 16..].iter_mut().for_each(|byte| *byte ^= 0x55);
    std::fs::write(&image, bytes).unwrap();
    image
}

/// An image for the hostile component.
fn told(place: &Place, line: &str) -> PathBuf {
    let image = place.write("images/hostile.img", format!("{line}\n"));
    std::fs::File::options().write(true).open(&image).unwrap().set_len(SIZE as u64).unwrap();
    image
}

/// Serves four disks, attacks through one, reads the others. How many requests of the one failed.
fn neighbours(place: &Place, hostile: &Path, format: &str) -> u64 {
    let policy = place.write("images/policy.toml", "version = 1\n[limits]\ncall-time-ms = 300\n");
    let mut command = blockhouse();
    command.args(["serve", "--policy"]).arg(policy).arg("--code-cache").arg(place.path("images/code"));
    command.arg("--plugin").arg(format!("hostile={}", component("hostile").display()));
    let mut disks = good_disks(place);
    disks.push((hostile.to_owned(), format.to_owned()));
    let socket = |number: usize| place.path(&format!("images/{number}.sock"));
    for (number, (image, format)) in disks.iter().enumerate() {
        let fields =
            format!("file={},format={format},readonly=on,socket={}", image.display(), socket(number).display());
        command.arg("--disk").arg(fields);
    }
    let log = place.path("images/serve.log");
    let serve = Serve::start(&mut command, &log);
    let (over, failed, asked) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let expected = noise(7, SIZE);
    std::thread::scope(|scope| {
        let attacker = scope.spawn(|| {
            let mut client = Client::connect(&socket(3), 1);
            let mut place = 0;
            // At least twice, since some break at the second question, and until the others are through.
            while asked.fetch_add(1, Ordering::Relaxed) < 2 || !over.load(Ordering::Relaxed) {
                place = (place + (64 << 10)) % SIZE as u64;
                failed.fetch_add(u64::from(client.read(place, 4096).is_err()), Ordering::Relaxed);
            }
        });
        let readers: Vec<_> = (0..3)
            .map(|number| {
                let (expected, socket) = (&expected, socket(number));
                scope.spawn(move || {
                    let mut client = Client::connect(&socket, 1);
                    for round in 0..READS {
                        let at = usize::try_from((round * 37 + 5) % (SIZE as u64 >> 12)).unwrap() << 12;
                        let bytes = client.read(at as u64, 4096).unwrap_or_else(|e| panic!("disk {number}: error {e}"));
                        assert!(bytes == expected[at..at + 4096], "disk {number}: wrong bytes at {at}");
                    }
                })
            })
            .collect();
        let ended: Vec<_> = readers.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        over.store(true, Ordering::Relaxed);
        attacker.join().unwrap();
        for result in ended {
            result.unwrap();
        }
    });
    // A component's panic is a message in the log; one of the program, in any thread, is a line of its own.
    assert!(!serve.log().lines().any(|line| line.starts_with("thread '")), "{}", serve.log());
    // All of it ends well.
    serve.terminate();
    std::fs::remove_file(log).unwrap();
    failed.into_inner()
}

#[test]
fn a_hostile_component_costs_three_other_disks_nothing() {
    let place = Place::new();
    for line in [
        "trap-at-locate 2",
        "loop-at-locate",
        "call-loop-at-locate",
        "grow-memory-at-locate",
        "recurse-at-locate",
        "log-flood-at-locate",
        "huge-error-at-locate",
        "trap-at-unpack",
        "lie-wrap",
        "lie-past-end",
        "lie-no-such-file",
        "lie-too-many",
    ] {
        let failed = neighbours(&place, &told(&place, line), "hostile");
        // What is written to the log is cut and counted; it is no error.
        assert!(failed > 0 || line.starts_with("log-flood"), "{line}: it was to fail");
        tally::component_stopped();
    }
}

#[test]
fn a_hostile_image_costs_three_other_disks_nothing() {
    let place = Place::new();
    let failed = neighbours(&place, &damaged(&place), "qcow2");
    assert!(failed > 0, "the image was to be damaged");
    tally::image_refused();
    // Entries that lead past the end of the file.
    let mut bytes = crate::qcow2::overlay(16, SIZE as u64, b"", None);
    crate::qcow2::poke(&mut bytes, 8, &[0; 12]);
    crate::qcow2::poke(&mut bytes, 1 << 16, &((1_u64 << 63) | (1 << 40)).to_be_bytes());
    let image = place.write("images/far.qcow2", bytes);
    assert!(neighbours(&place, &image, "qcow2") > 0, "the table was to be elsewhere");
    tally::image_refused();
}
