//! Images that break parsers: fields out of range, tables that point anywhere, bombs, truncations and
//! polyglots. Each ends in bytes or in an error that names the image, within 10 seconds and 256 MiB.

use std::path::{Path, PathBuf};

use blockhouse_sandbox::block::{BlockBackend, ErrorKind};
use blockhouse_tests::{noise, qemu_img};

use crate::library::{self, read};
use crate::place::Place;
use crate::qcow2::poke;
use crate::tally;

/// What has to come of an image.
enum Expect {
    /// An error with this exit code and this word.
    Error(i32, &'static str),
    /// The bytes that were written before the attack.
    Served,
    /// Bytes or an error: the field is one that a reader may ignore, or that only moves bytes about.
    Defined,
}
use Expect::{Defined, Error, Served};

const SIZE: usize = 1 << 20;

/// What an image may be refused for. Another kind would be a trap, a lie or a limit.
const OF_THE_IMAGE: [ErrorKind; 3] = [ErrorKind::Corrupt, ErrorKind::Unsupported, ErrorKind::Denied];

/// The disk of the images below: noise in its first quarter, zeroes after it.
fn content() -> Vec<u8> {
    let mut content = noise(40, SIZE / 4);
    content.resize(SIZE, 0);
    content
}

/// An image of `content()` by qemu-img.
fn image_of(place: &Place, format: &str, arguments: &[&str]) -> Vec<u8> {
    let raw = place.write("images/content", content());
    let image = place.path("images/good");
    let fixed = ["convert", "-f", "raw", "-O", format];
    let ends = [raw.to_str().unwrap(), image.to_str().unwrap()];
    qemu_img(fixed.iter().chain(arguments).chain(&ends));
    std::fs::read(image).unwrap()
}

#[track_caller]
fn check(place: &Place, format: &str, name: &str, bytes: &[u8], expect: &Expect) {
    let image = place.write("images/vm/image", bytes);
    let attempt = place.open("read", format, &image);
    let shown = &attempt.outcome.stderr;
    match expect {
        Error(code, word) => {
            assert_eq!(attempt.code(), *code, "{name}: {shown}");
            let line = attempt.error();
            assert!(line.contains("$ROOT/images/vm/image: ") && line.contains(word), "{name}: no {word:?} in {shown}");
            tally::image_refused();
        }
        Served => {
            assert_eq!(attempt.code(), 0, "{name}: {shown}");
            assert!(attempt.outcome.stdout == content(), "{name}: other bytes");
            tally::image_served();
        }
        Defined => {
            // 6 would be a trap, a lie or a limit: the built-in parsers have to see it coming.
            assert!([0, 3, 4, 5].contains(&attempt.code()), "{name}: {}: {shown}", attempt.code());
            if attempt.code() == 0 { tally::image_served() } else { tally::image_refused() }
        }
    }
    assert_eq!(attempt.opens("allowed"), [""; 0], "{name}");
    place.canary.assert_untouched(&attempt.outcome);
    // `info` walks other paths: facts, snapshots.
    if let Some(error) = library::shared().describe(format, &image) {
        assert!(OF_THE_IMAGE.contains(&error.kind()), "info, {name}: {}: {error}", error.kind());
    }
}

fn check_pokes(format: &str, good: &[u8], place: &Place, pokes: &[(&str, usize, &[u8], Expect)]) {
    for (name, at, value, expect) in pokes {
        let mut bytes = good.to_vec();
        poke(&mut bytes, *at, value);
        check(place, format, &format!("{name} at {at} = {value:x?}"), &bytes, expect);
    }
}

/// CVE-2014-0143, CVE-2014-0144, CVE-2014-0145, CVE-2014-0146, CVE-2014-0147.
#[test]
fn fields_of_a_qcow2_header() {
    let place = Place::new();
    let good = image_of(&place, "qcow2", &["-o", "compat=1.1"]);
    check(&place, "qcow2", "the image itself", &good, &Served);
    let l1_at = u64::from_be_bytes(good[40..48].try_into().unwrap());
    assert_eq!(good[100..104], 112u32.to_be_bytes(), "where extensions start");
    const ONES: &[u8] = &[0xff; 8];
    const HUGE: &[u8] = &0x7fff_ffffu32.to_be_bytes();
    let misaligned = (l1_at + 1).to_be_bytes();
    check_pokes(
        "qcow2",
        &good,
        &place,
        &[
            ("magic", 0, b"KDMV", Error(4, "not a qcow2 image")),
            ("magic", 0, b"\0\0\0\0", Error(4, "not a qcow2 image")),
            ("version", 4, &[0, 0, 0, 0], Error(5, "qcow version 0")),
            ("version", 4, &[0, 0, 0, 1], Error(5, "qcow version 1")),
            ("version", 4, &[0, 0, 0, 4], Error(5, "qcow version 4")),
            ("backing_file_offset", 8, ONES, Error(4, "backing_file_offset")),
            (
                "backing_file_offset and size",
                8,
                &[0, 0, 0, 0, 0, 0, 4, 0, 255, 255, 255, 255],
                Error(4, "backing_file_size"),
            ),
            ("backing_file_size", 8, &[0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 4, 0], Error(4, "backing_file_size is 1024")),
            ("cluster_bits", 20, &[0, 0, 0, 0], Error(4, "cluster_bits is 0")),
            ("cluster_bits", 20, &[0, 0, 0, 8], Error(4, "cluster_bits is 8")),
            ("cluster_bits", 20, &[0, 0, 0, 22], Error(4, "cluster_bits is 22")),
            ("cluster_bits", 20, &[0, 0, 0, 63], Error(4, "cluster_bits is 63")),
            ("cluster_bits", 20, &[255, 255, 255, 255], Error(4, "cluster_bits is 4294967295")),
            // Other sizes of cluster than the image was made with.
            ("cluster_bits", 20, &[0, 0, 0, 9], Defined),
            ("cluster_bits", 20, &[0, 0, 0, 21], Defined),
            ("size", 24, ONES, Error(4, "the L1 table has")),
            ("size", 24, &[0x80, 0, 0, 0, 0, 0, 0, 0], Error(4, "the L1 table has")),
            ("size", 24, &[0, 0, 0, 1, 0, 0, 0, 0], Error(4, "the L1 table has")),
            ("size", 24, &[0; 8], Defined),
            ("size", 24, &[0, 0, 0, 0, 0, 0, 2, 1], Defined),
            ("crypt_method", 32, &[0, 0, 0, 1], Error(5, "encryption with AES")),
            ("crypt_method", 32, &[0, 0, 0, 2], Error(5, "encryption with LUKS")),
            ("crypt_method", 32, HUGE, Error(5, "crypt_method")),
            ("l1_size", 36, &[0; 4], Error(4, "the L1 table has 0 entries")),
            ("l1_size", 36, &[255; 4], Error(4, "the L1 table has 4294967295 entries")),
            ("l1_size", 36, HUGE, Error(4, "the L1 table has")),
            ("l1_size", 36, &0x3f_ffffu32.to_be_bytes(), Error(4, "the L1 table")),
            ("l1_table_offset", 40, &[0; 8], Error(4, "the L1 table is at 0")),
            ("l1_table_offset", 40, &misaligned, Error(4, "not a multiple of the cluster size")),
            ("l1_table_offset", 40, &[0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0], Error(4, "the L1 table")),
            ("l1_table_offset", 40, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0], Error(4, "the L1 table")),
            ("refcount_table_offset", 48, &misaligned, Error(4, "the refcount table")),
            ("refcount_table_offset", 48, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0], Error(4, "the refcount table")),
            // Reading needs no reference counts.
            ("refcount_table_offset", 48, &[0, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0], Served),
            ("refcount_table_clusters", 56, &[0; 4], Error(4, "refcount_table_clusters is 0")),
            ("refcount_table_clusters", 56, &[255; 4], Error(4, "refcount_table_clusters is 4294967295")),
            ("nb_snapshots", 60, &[255; 4], Error(4, "nb_snapshots is 4294967295")),
            ("nb_snapshots", 60, &[0, 1, 0, 0], Defined),
            ("nb_snapshots at the L1", 60, &[&[0, 0, 0, 1][..], &l1_at.to_be_bytes()].concat(), Defined),
            ("snapshots_offset", 60, &[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1], Error(4, "the snapshot table")),
            ("snapshots_offset", 60, &[0, 0, 0, 1, 255, 255, 255, 255, 255, 255, 0, 0], Error(4, "the snapshot table")),
            ("dirty", 72, &1u64.to_be_bytes(), Served),
            ("corrupt", 72, &2u64.to_be_bytes(), Served),
            ("external data", 72, &4u64.to_be_bytes(), Error(5, "an external data file that the image does not name")),
            ("compression bit", 72, &8u64.to_be_bytes(), Error(4, "compression")),
            ("extended L2", 72, &16u64.to_be_bytes(), Defined),
            ("bit 5", 72, &32u64.to_be_bytes(), Error(5, "unknown incompatible features: bit 5")),
            ("bit 63", 72, &(1u64 << 63).to_be_bytes(), Error(5, "unknown incompatible features: bit 63")),
            ("all bits", 72, ONES, Error(5, "unknown incompatible features")),
            ("compatible", 80, ONES, Served),
            ("autoclear", 88, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfd], Served),
            ("autoclear, raw data file", 88, ONES, Error(4, "raw-external-data")),
            ("refcount_order", 96, &[0, 0, 0, 7], Error(4, "refcount_order is 7")),
            ("refcount_order", 96, &[0, 0, 0, 255], Error(4, "refcount_order is 255")),
            ("header_length", 100, &[0; 4], Error(4, "header_length is 0")),
            ("header_length", 100, &[0, 0, 0, 72], Error(4, "header_length is 72")),
            ("header_length", 100, HUGE, Error(4, "header_length is 2147483647")),
            ("header_length", 100, &[255; 4], Error(4, "header_length is 4294967295")),
            ("compression_type", 104, &[1], Error(4, "compression")),
            ("compression_type", 104, &[255], Error(5, "compression type 255")),
            ("extension length", 116, HUGE, Error(4, "the header extension")),
            ("extension length", 116, &[255; 4], Error(4, "the header extension")),
        ],
    );
}

/// A snapshot table that lies about names, sizes and its own length.
#[test]
fn fields_of_a_snapshot_table() {
    let place = Place::new();
    let mut good = image_of(&place, "qcow2", &["-o", "compat=1.1"]);
    let image = place.write("images/good", &good);
    qemu_img(["snapshot", "-c", "first", image.to_str().unwrap()]);
    good = std::fs::read(&image).unwrap();
    let table = usize::try_from(u64::from_be_bytes(good[64..72].try_into().unwrap())).unwrap();
    let extra_at = table + 36;
    for (name, at, value) in [
        ("l1 offset", table, &[0xff; 8][..]),
        ("l1 offset", table, &[0, 0, 0, 0, 0, 0, 0, 1]),
        ("l1 entries", table + 8, &[0xff; 4]),
        ("id length", table + 12, &[0xff; 2]),
        ("name length", table + 14, &[0xff; 2]),
        ("extra data", extra_at, &[0xff; 4]),
        ("extra data", extra_at, &[0x7f, 0xff, 0xff, 0xff]),
        ("virtual size", extra_at + 12, &[0xff; 8]),
        ("entries", 60, &[0, 0, 0xff, 0xff]),
    ] {
        let mut bytes = good.clone();
        poke(&mut bytes, at, value);
        let image = place.write("images/vm/image", &bytes);
        for arguments in [&["--snapshot", "first"][..], &[]] {
            let attempt = place.open_with("read", "qcow2", &image, &[], arguments);
            let shown = format!("{name} = {value:x?}: {:?}", attempt.outcome.stderr);
            assert!([0, 4, 5].contains(&attempt.code()), "{} {shown}", attempt.code());
            // Without the snapshot, the disk is not concerned.
            assert!(!arguments.is_empty() || attempt.outcome.stdout == content(), "{shown}");
        }
        let info = place.open("info", "qcow2", &image);
        assert!([0, 4, 5].contains(&info.code()), "info, {name}: {:?}", info.outcome);
        tally::image_refused();
    }
    // The twin.
    let attempt = place.open_with("read", "qcow2", &image, &[], &["--snapshot", "first"]).succeeded();
    assert!(attempt.outcome.stdout == content());
    tally::image_served();
}

/// cloud-hypervisor 8008, 8358, 8606: entries that point at metadata, at each other, and past the end.
#[test]
fn tables_that_point_anywhere() {
    let place = Place::new();
    let good = image_of(&place, "qcow2", &["-o", "cluster_size=65536"]);
    let at = |offset: usize| usize::try_from(u64::from_be_bytes(good[offset..offset + 8].try_into().unwrap())).unwrap();
    let l1 = at(40);
    let l2 = at(l1) & 0xff_ffff_ffff;
    let refcounts = at(48);
    const COPIED: u64 = 1 << 63;
    let entry = |offset: usize| (offset as u64 | COPIED).to_be_bytes();

    // Reading metadata as data gives those bytes, no more and no less.
    for (name, target) in
        [("L1", l1), ("L2", l2), ("refcount table", refcounts), ("the same data", at(l2) & 0xff_ffff_ffff)]
    {
        let mut bytes = good.clone();
        poke(&mut bytes, l2 + 8, &entry(target));
        let image = place.write("images/vm/image", &bytes);
        let attempt = place.open("read", "qcow2", &image).succeeded();
        let mut expected = content();
        let cluster: Vec<u8> = (target..target + 65536).map(|at| bytes.get(at).copied().unwrap_or(0)).collect();
        poke(&mut expected, 65536, &cluster);
        assert!(attempt.outcome.stdout == expected, "{name}");
        tally::image_served();
    }
    let past = [0x00, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0];
    check_pokes(
        "qcow2",
        &good,
        &place,
        &[
            ("L1 entry, past the end", l1, &past, Error(4, "")),
            ("L1 entry, misaligned", l1, &entry(l2 + 512), Error(4, "")),
            ("L1 entry, the header", l1, &entry(0), Defined),
            ("L1 entry, the L1", l1, &entry(l1), Defined),
            ("L1 entry, the refcounts", l1, &entry(refcounts), Defined),
            ("L1 entry, ones", l1, &[0xff; 8], Error(4, "")),
            ("L2 entry, past the end", l2, &past, Defined),
            ("L2 entry, misaligned", l2, &entry(l2 + 512), Error(4, "")),
            ("L2 entry, ones", l2, &[0xff; 8], Error(4, "")),
            ("L2 entry, compressed at the header", l2, &[0x40, 0, 0, 0, 0, 0, 0, 0], Error(4, "")),
            ("L2 entry, compressed at the end", l2, &[0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], Error(4, "")),
        ],
    );
}

/// Compressed data that is damaged, for both ways to compress.
#[test]
fn damaged_compressed_clusters() {
    let place = Place::new();
    for compression in ["zlib", "zstd"] {
        // Noise does not compress; this does.
        let raw: Vec<u8> = noise(41, SIZE / 16).iter().flat_map(|byte| [*byte; 16]).collect();
        let raw = place.write("images/raw", raw);
        let image = place.path("images/vm/image");
        let (raw, path) = (raw.to_str().unwrap(), image.to_str().unwrap());
        qemu_img([
            "convert",
            "-c",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "-o",
            &format!("compression_type={compression}"),
            raw,
            path,
        ]);
        let good = std::fs::read(&image).unwrap();
        for (number, at) in (5 * 65536..good.len()).step_by(good.len() / 16).enumerate() {
            let mut bytes = good.clone();
            let end = (at + 64).min(bytes.len());
            bytes[at..end].copy_from_slice(&noise(number as u64, end - at));
            std::fs::write(&image, &bytes).unwrap();
            let attempt = place.open("read", "qcow2", &image);
            assert!([0, 4].contains(&attempt.code()), "{compression} at {at}: {:?}", attempt.outcome.stderr);
            tally::image_refused();
        }
    }
}

/// A few bytes that cost much memory or time: huge disks, huge tables, bombs.
#[test]
fn small_files_that_are_large_disks() {
    let place = Place::new();
    // CVE-2015-5162, CVE-2018-10908; and the largest L1 table, 32 MiB for 128 GiB.
    for (size, bytes, cluster) in [("64P", 64u64 << 50, "2M"), ("127G", 127 << 30, "512")] {
        let image = place.path("images/vm/big");
        qemu_img([
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            &format!("cluster_size={cluster}"),
            image.to_str().unwrap(),
            size,
        ]);
        place.open("info", "qcow2", &image).succeeded();
        let last = (bytes - 512).to_string();
        let attempt = place.open_with("read", "qcow2", &image, &[], &["--offset", &last]).succeeded();
        assert!(attempt.outcome.stdout == [0; 512]);
        let map = place.open_with("map", "qcow2", &image, &[], &["--json"]).succeeded();
        let runs: Vec<serde_json::Value> = serde_json::from_slice(&map.outcome.stdout).unwrap();
        let sum: u64 = runs.iter().map(|run| run["length"].as_u64().unwrap()).sum();
        assert_eq!(sum, bytes, "{size}");
        tally::image_served();
    }
}

#[test]
fn a_gibibyte_of_zeroes_in_a_megabyte() {
    let place = Place::new();
    let raw = place.path("images/raw");
    std::fs::File::create(&raw).unwrap().set_len(1 << 30).unwrap();
    let image = place.path("images/vm/bomb");
    let options = ["convert", "-c", "-S", "0", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=2M"];
    qemu_img(options.iter().map(|option| std::ffi::OsStr::new(*option)).chain([raw.as_os_str(), image.as_os_str()]));
    let size = image.metadata().unwrap().len();
    assert!(size < 16 << 20, "no bomb: {size} bytes");
    for offset in ["0", "500M", "960M"] {
        let attempt =
            place.open_with("read", "qcow2", &image, &[], &["--offset", offset, "--length", "64M"]).succeeded();
        assert_eq!(attempt.outcome.stdout.len(), 64 << 20);
        assert!(attempt.outcome.stdout.iter().all(|byte| *byte == 0));
    }
    tally::image_served();
}

/// Every way to cut an image off.
#[test]
fn truncated_images() {
    let place = Place::new();
    let lengths =
        [0, 1, 3, 4, 8, 71, 72, 103, 104, 111, 112, 120, 511, 512, 4096, 65535, 65536, 131072, 196608, 262144];
    for (format, arguments) in [
        ("qcow2", &["-o", "compat=1.1"][..]),
        ("vmdk", &["-o", "subformat=monolithicSparse"]),
        ("vmdk", &["-o", "subformat=streamOptimized"]),
    ] {
        let good = image_of(&place, format, arguments);
        check(&place, format, "whole", &good, &Served);
        // Some through the program, all through the library.
        for length in lengths.into_iter().step_by(3) {
            check(&place, format, &format!("{length} bytes of {arguments:?}"), &good[..length], &Defined);
        }
        let image = place.path("images/vm/cut");
        let every = (0..640).chain((640..good.len()).step_by(4096 - 1));
        for length in every.chain(lengths).chain([good.len() - 1, good.len() - 512]) {
            std::fs::write(&image, &good[..length]).unwrap();
            defined(&format!("{length} bytes of {arguments:?}"), format, &image);
        }
    }
}

/// Opens an image with the library and reads it: bytes, or an error of the image.
#[track_caller]
fn defined(name: &str, format: &str, image: &Path) {
    let result = library::shared().open(format, image, &[]).and_then(|opened| {
        let size = usize::try_from(opened.disk.capacity()).unwrap_or(usize::MAX).min(SIZE);
        for offset in (0..size).step_by(64 << 10) {
            read(&opened.disk, offset as u64, (size - offset).min(64 << 10))?;
        }
        Ok(())
    });
    match result {
        Ok(()) => tally::image_served(),
        Err(error) => {
            assert!(OF_THE_IMAGE.contains(&error.kind()), "{name}: {}: {error}", error.kind());
            assert_eq!(error.image(), image.to_str(), "{name}: {error}");
            tally::image_refused();
        }
    }
}

/// Bytes flipped at random in the metadata of images of every kind.
#[test]
fn images_with_random_damage() {
    let place = Place::new();
    let image = place.path("images/vm/damaged");
    for (number, (format, arguments)) in [
        ("qcow2", &["-o", "compat=0.10"][..]),
        ("qcow2", &["-o", "extended_l2=on"]),
        ("qcow2", &["-c", "-o", "cluster_size=512"]),
        ("qcow2", &["-c", "-o", "compression_type=zstd"]),
        ("vmdk", &["-o", "subformat=monolithicSparse"]),
        ("vmdk", &["-o", "subformat=streamOptimized"]),
    ]
    .into_iter()
    .enumerate()
    {
        let good = image_of(&place, format, arguments);
        for round in 0..60 {
            let seed = number as u64 * 1000 + round;
            let random = noise(seed, 64);
            let mut bytes = good.clone();
            // One to four places, most of them in the first 4 KiB, where the header is.
            for place in random.chunks(16).take(1 + usize::from(random[0] % 4)) {
                let within = if place[1] % 4 == 0 { bytes.len() } else { bytes.len().min(4096) };
                let at = usize::try_from(u32::from_le_bytes(place[4..8].try_into().unwrap())).unwrap() % within;
                let width = [1, 2, 4, 8][usize::from(place[2] % 4)];
                for (byte, value) in bytes[at..].iter_mut().zip(&place[8..8 + width]) {
                    *byte = if place[3] % 2 == 0 { *value } else { 0xff };
                }
            }
            std::fs::write(&image, &bytes).unwrap();
            defined(&format!("{format} {arguments:?}, seed {seed}"), format, &image);
        }
    }
}

/// Files that are valid in two formats are what the operator says.
#[test]
fn polyglots_are_what_was_declared() {
    let place = Place::new();
    let good = image_of(&place, "qcow2", &["-o", "compat=1.1"]);
    let vmdk = image_of(&place, "vmdk", &["-o", "subformat=monolithicSparse"]);
    let check_both = |name: &str, bytes: &[u8]| {
        let image = place.write("images/vm/image", bytes);
        let attempt = place.open("read", "raw", &image).succeeded();
        let mut whole = bytes.to_vec();
        whole.resize(bytes.len().next_multiple_of(512), 0);
        assert!(attempt.outcome.stdout == whole, "{name}: raw is raw");
        tally::image_served();
    };
    // A boot sector, an ISO 9660 label and a VMDK inside a qcow2 image: still the qcow2 image.
    let mut bytes = good.clone();
    poke(&mut bytes, 510, &[0x55, 0xaa]);
    poke(&mut bytes, 0x8001, b"CD001");
    bytes.extend_from_slice(&vmdk);
    check_both("qcow2, MBR, ISO, VMDK", &bytes);
    check(&place, "qcow2", "qcow2, MBR, ISO, VMDK", &bytes, &Served);
    check(&place, "vmdk", "qcow2, MBR, ISO, VMDK", &bytes, &Error(4, "no VMDK"));
    // The same the other way round.
    let mut bytes = vmdk.clone();
    bytes.extend_from_slice(&good);
    check_both("VMDK, qcow2", &bytes);
    check(&place, "vmdk", "VMDK, qcow2", &bytes, &Served);
    check(&place, "qcow2", "VMDK, qcow2", &bytes, &Error(4, "not a qcow2 image"));
    // A program with an image behind it.
    let mut bytes = std::fs::read(std::env::current_exe().unwrap()).unwrap();
    bytes.truncate(1 << 16);
    bytes.extend_from_slice(&good);
    check_both("ELF, qcow2", &bytes);
    check(&place, "qcow2", "ELF, qcow2", &bytes, &Error(4, "not a qcow2 image"));
    check(&place, "vmdk", "ELF, qcow2", &bytes, &Defined);
}

#[test]
fn fields_of_a_vmdk_header() {
    let place = Place::new();
    for subformat in ["monolithicSparse", "streamOptimized"] {
        let good = image_of(&place, "vmdk", &["-o", &format!("subformat={subformat}")]);
        check(&place, "vmdk", "the image itself", &good, &Served);
        let fields: &[(&str, usize, usize)] = &[
            ("version", 4, 4),
            ("flags", 8, 4),
            ("capacity", 12, 8),
            ("grain", 20, 8),
            ("descriptor offset", 28, 8),
            ("descriptor size", 36, 8),
            ("entries per table", 44, 4),
            ("redundant directory", 48, 8),
            ("directory", 56, 8),
            ("overhead", 64, 8),
            ("line ends", 73, 4),
            ("compression", 77, 2),
        ];
        for (name, at, width) in fields {
            for value in [&[0u8; 8][..], &[0xff; 8], &[1, 0, 0, 0, 0, 0, 0, 0x80]] {
                let mut bytes = good.clone();
                poke(&mut bytes, *at, &value[..*width]);
                let image = place.write("images/vm/field", &bytes);
                defined(&format!("{subformat} {name} = {:x?}", &value[..*width]), "vmdk", &image);
            }
        }
        check_pokes(
            "vmdk",
            &good,
            &place,
            &[
                ("magic", 0, b"COWD", Error(5, "")),
                ("version", 4, &[0xff; 4], Error(5, "")),
                ("capacity", 12, &[0xff; 8], Error(4, "")),
                ("grain", 20, &[0; 8], Error(4, "")),
                ("grain", 20, &(1u64 << 40).to_le_bytes(), Error(4, "")),
                ("descriptor size", 36, &[0xff; 8], Error(4, "")),
            ],
        );
    }
}

/// Nothing that reads repairs: what a writer would change in the header stays as it is.
#[test]
fn no_image_makes_the_program_write() {
    let place = Place::new();
    let good = image_of(&place, "qcow2", &["-o", "compat=1.1,lazy_refcounts=on"]);
    let mut bytes = good.clone();
    // Dirty, corrupt, unknown autoclear features.
    poke(&mut bytes, 72, &3u64.to_be_bytes());
    poke(&mut bytes, 88, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfc]);
    let image: PathBuf = place.write("images/vm/image", &bytes);
    for command in ["info", "map", "read"] {
        place.open(command, "qcow2", &image).succeeded();
    }
    assert!(std::fs::read(&image).unwrap() == bytes, "the image was changed");
    tally::image_served();
}
