//! Backing chains without an end, and bases that are not what the overlay was made for, or do not
//! stay it.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use blockhouse_sandbox::block::ErrorKind;
use blockhouse_tests::{noise, qemu_img};

use crate::library::{self, read};
use crate::place::{Place, race};
use crate::qcow2::overlay;
use crate::tally;

/// From the start of opening to the refusal.
const REFUSAL: Duration = Duration::from_secs(1);

/// Opens a chain with the library, up to three times: what is measured is the host, not its neighbours.
fn refusal_in_time(image: &Path, grants: &[&Path]) -> (ErrorKind, String) {
    let library = library::shared();
    library.formats.load(&library.sandbox, "qcow2").unwrap();
    library.formats.load(&library.sandbox, "raw").unwrap();
    let mut times = Vec::new();
    for _ in 0..3 {
        let started = Instant::now();
        let error = library.open("qcow2", image, grants).expect_err("the chain has no end");
        times.push(started.elapsed());
        if started.elapsed() < REFUSAL {
            return (error.kind(), error.to_string());
        }
    }
    panic!("refused after {times:?}");
}

#[test]
fn loops_are_refused_within_a_second() {
    let place = Place::new();
    let make = |name: &str, backing: &str| {
        place.write(&format!("images/vm/{name}"), overlay(12, 4096, backing.as_bytes(), Some("qcow2")))
    };
    let on_itself = make("a", "a");
    let on_itself_by_path = make("b", "../vm/./b");
    let first = make("c", "d");
    make("d", "c");
    make("e", "f");
    make("f", "g");
    make("g", "e");
    let through_links = make("h", "link");
    std::os::unix::fs::symlink("h", place.path("images/vm/link")).unwrap();
    for (image, comes_back) in [
        (&on_itself, "a"),
        (&on_itself_by_path, "b"),
        (&first, "c"),
        (&place.path("images/vm/e"), "e"),
        (&through_links, "h"),
    ] {
        let attempt = place.open("info", "qcow2", image);
        let says = format!("the backing chain is a loop: it comes back to $ROOT/images/vm/{comes_back}");
        attempt.assert_error(4, &[&says]);
        let (kind, text) = refusal_in_time(image, &[&place.path("images")]);
        assert_eq!(kind, ErrorKind::Corrupt, "{text}");
        assert!(place.normalize(&text).ends_with(&says), "{text}");
        tally::image_refused();
    }
}

/// A directory for very many files: in memory if there is such a place.
fn many_files() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    // Each takes a page, and a container often has no more than 64 MiB there.
    let fits = rustix::fs::statvfs(memory).is_ok_and(|there| there.f_bavail.saturating_mul(there.f_frsize) > 1 << 30);
    if fits && let Ok(directory) = tempfile::tempdir_in(memory) {
        return directory;
    }
    blockhouse_tests::scratch()
}

/// `length` overlays, each on the next, the last on a raw file. Returns the top.
fn chain(directory: &Path, length: usize) -> PathBuf {
    for number in 0..length {
        let (backing, format) = match number + 1 {
            last if last == length => ("base".to_owned(), "raw"),
            next => (next.to_string(), "qcow2"),
        };
        std::fs::write(directory.join(number.to_string()), overlay(9, 512, backing.as_bytes(), Some(format))).unwrap();
    }
    std::fs::write(directory.join("base"), noise(1, 512)).unwrap();
    directory.join("0")
}

#[test]
fn a_chain_of_300_or_100_000_layers_is_refused_within_a_second() {
    let place = Place::new();
    for length in [300, 100_000] {
        let directory = many_files();
        let top = chain(directory.path(), length);
        let (kind, text) = refusal_in_time(&top, &[directory.path()]);
        assert_eq!(kind, ErrorKind::Limit, "{text}");
        assert!(text.contains("more than 200 layers"), "{text}");

        let attempt = place.open_with("info", "qcow2", &top, &[directory.path().to_owned()], &[]);
        attempt.assert_error(6, &["the backing chain has more than 200 layers"]);
        assert!(attempt.opens("allowed").len() <= 200, "it went on: {}", attempt.opens("allowed").len());
        tally::image_refused();
    }
}

/// The twin: the longest chain that is allowed works.
#[test]
fn a_chain_of_200_layers_is_served() {
    let place = Place::new();
    let directory = many_files();
    let top = chain(directory.path(), 199);
    let attempt = place.open_with("read", "qcow2", &top, &[directory.path().to_owned()], &[]).succeeded();
    assert!(attempt.outcome.stdout == noise(1, 512));
    assert_eq!(attempt.opens("allowed").len(), 199);
    tally::image_served();
}

/// Two overlays on one base are no loop, nor are two disks on one base at the same time.
#[test]
fn overlays_share_a_base() {
    let place = Place::new();
    let content = noise(2, 64 << 10);
    place.write("images/vm/base", &content);
    let images: Vec<PathBuf> = (0..2)
        .map(|number| place.write(&format!("images/vm/{number}"), overlay(12, 64 << 10, b"base", Some("raw"))))
        .collect();
    let images_directory = place.path("images");
    let open = |image: &Path| library::shared().open("qcow2", image, &[&images_directory]).unwrap();
    let (first, second) = (open(&images[0]), open(&images[1]));
    assert!(read(&first.disk, 0, 64 << 10).unwrap() == content);
    assert!(read(&second.disk, 0, 64 << 10).unwrap() == content);
    tally::image_served();
}

/// Past the end of a shorter base there are zeroes; what a longer base has beyond the overlay is cut.
#[test]
fn a_base_may_be_shorter_or_longer_than_its_overlay() {
    let place = Place::new();
    let content = noise(3, 64 << 10);
    place.write("images/vm/base", &content);
    for (size, format) in [(16u64 << 10, "raw"), (1 << 20, "raw"), (1 << 20, "qcow2")] {
        let base = if format == "raw" { "base" } else { "middle" };
        place.write("images/vm/middle", overlay(12, 64 << 10, b"base", Some("raw")));
        let image = place.write("images/vm/top", overlay(12, size, base.as_bytes(), Some(format)));
        let attempt = place.open("read", "qcow2", &image).succeeded();
        let mut expected = content.clone();
        expected.resize(usize::try_from(size).unwrap(), 0);
        assert!(attempt.outcome.stdout == expected, "{size} on {format}");
        tally::image_served();
    }
    // A base that does not end at a sector.
    place.write("images/vm/base", &content[..1000]);
    let image = place.write("images/vm/top", overlay(12, 4096, b"base", Some("raw")));
    let attempt = place.open("read", "qcow2", &image).succeeded();
    assert!(attempt.outcome.stdout[..1000] == content[..1000]);
    assert!(attempt.outcome.stdout[1000..].iter().all(|byte| *byte == 0));
    tally::image_served();
}

/// Reads every sector of a disk, one by one. Each is an error, or bytes.
fn sectors(opened: &blockhouse_sandbox::OpenedDisk, size: u64) -> (Vec<Option<Vec<u8>>>, usize) {
    let sectors: Vec<_> = (0..size / 512).map(|sector| read(&opened.disk, sector * 512, 512).ok()).collect();
    let errors = sectors.iter().filter(|sector| sector.is_none()).count();
    (sectors, errors)
}

#[test]
fn a_raw_base_that_shrinks_reads_as_zero_past_its_end() {
    let place = Place::new();
    let content = noise(4, 256 << 10);
    let base = place.write("images/vm/base", &content);
    let image = place.write("images/vm/top", overlay(12, 256 << 10, b"base", Some("raw")));
    let opened = library::shared().open("qcow2", &image, &[&place.path("images")]).unwrap();
    assert!(read(&opened.disk, 0, 4096).unwrap() == content[..4096]);

    std::fs::File::options().write(true).open(&base).unwrap().set_len(100_000).unwrap();
    let now = read(&opened.disk, 0, 256 << 10).unwrap();
    assert!(now[..100_000] == content[..100_000]);
    assert!(now[100_000..].iter().all(|byte| *byte == 0));
    tally::image_served();
}

#[test]
fn a_qcow2_base_that_shrinks_gives_its_bytes_or_zeroes_or_errors() {
    let place = Place::new();
    let content = noise(5, 1 << 20);
    let raw = place.write("images/vm/raw", &content);
    let base = place.path("images/vm/base");
    let arguments = ["convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4096"];
    for length in [0u64, 1, 511, 4096, 20_000, 200_000, 600_000] {
        // A file of its own for each: the one before may be locked still, by what another test starts right now.
        let _ = std::fs::remove_file(&base);
        qemu_img(
            arguments.iter().map(|argument| std::ffi::OsStr::new(*argument)).chain([raw.as_os_str(), base.as_os_str()]),
        );
        let image = place.write("images/vm/top", overlay(12, 1 << 20, b"base", Some("qcow2")));
        let opened = library::shared().open("qcow2", &image, &[&place.path("images")]).unwrap();
        assert!(read(&opened.disk, 0, 4096).unwrap() == content[..4096]);
        std::fs::File::options().write(true).open(&base).unwrap().set_len(length).unwrap();
        let (sectors, _errors) = sectors(&opened, 1 << 20);
        for (sector, bytes) in sectors.iter().enumerate() {
            let Some(bytes) = bytes else { continue };
            let right = bytes[..] == content[sector * 512..][..512];
            // A sector that the new end of the file cuts in two is cut in two.
            let cut = bytes.iter().zip(&content[sector * 512..]).all(|(byte, right)| byte == right || *byte == 0);
            assert!(right || cut, "sector {sector} with {length} bytes left is neither the base's nor zero");
        }
        tally::image_served();
    }
}

/// A base that is replaced under its name: the disk keeps the file that it opened.
#[test]
fn a_base_that_is_replaced_stays_the_file_that_was_opened() {
    let place = Place::new();
    let content = noise(6, 64 << 10);
    place.write("images/vm/base", &content);
    let image = place.write("images/vm/top", overlay(12, 64 << 10, b"base", Some("raw")));
    let opened = library::shared().open("qcow2", &image, &[&place.path("images")]).unwrap();
    std::fs::remove_file(place.path("images/vm/base")).unwrap();
    std::os::unix::fs::symlink("../../secret/canary", place.path("images/vm/base")).unwrap();
    assert!(read(&opened.disk, 0, 64 << 10).unwrap() == content);
    tally::image_served();
}

/// Metadata that somebody rewrites while it is read: whatever comes, it is a defined answer.
#[test]
fn a_base_that_is_rewritten_while_it_is_read_crashes_nothing() {
    let place = Place::new();
    let content = noise(7, 1 << 20);
    let raw = place.write("images/vm/raw", &content);
    let base = place.path("images/vm/base");
    let options = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4096"];
    qemu_img(options.iter().map(|option| std::ffi::OsStr::new(*option)).chain([raw.as_os_str(), base.as_os_str()]));
    let image = place.write("images/vm/top", overlay(12, 1 << 20, b"base", Some("qcow2")));
    let good = std::fs::read(&base).unwrap();
    let file = std::fs::File::options().write(true).open(&base).unwrap();
    let stop = AtomicBool::new(false);
    let (mut served, mut failed) = (0u32, 0u32);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut seed = 0;
            while !stop.load(Ordering::Relaxed) {
                seed += 1;
                // Any place of the first 64 KiB: header, tables, data.
                let at = u64::from(u16::from_le_bytes(noise(seed, 2).try_into().unwrap()));
                file.write_all_at(&noise(seed, 64), at).unwrap();
                if seed % 16 == 0 {
                    file.write_all_at(&good, 0).unwrap();
                }
            }
        });
        // At least as long as a race, and on a busy machine until the two have met.
        let begun = Instant::now();
        let goes_on = |served: u32, failed: u32| {
            let met = served > 0 && failed > 0;
            begun.elapsed() < if met { race() } else { Duration::from_secs(120) }
        };
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            while goes_on(served, failed) {
                let Ok(opened) = library::shared().open("qcow2", &image, &[&place.path("images")]) else {
                    failed += 1;
                    continue;
                };
                for offset in (0..1 << 20).step_by(64 << 10) {
                    match read(&opened.disk, offset, 64 << 10) {
                        Ok(_) => served += 1,
                        Err(error) => {
                            assert_ne!(error.kind(), ErrorKind::Component, "a trap or a lie: {error}");
                            failed += 1;
                        }
                    }
                }
            }
        }));
        stop.store(true, Ordering::Relaxed);
        if let Err(failure) = result {
            std::panic::resume_unwind(failure);
        }
    });
    assert!(served > 0 && failed > 0, "no race: {served} served, {failed} failed");
    tally::image_refused();
}
