//! Images that qemu-img made, read whole and compared with what qemu-img reads.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation)]

use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::Command;

use blockhouse_plugin::testing::Storage;
use blockhouse_plugin::{Access, Error, Format, Placement};
use blockhouse_vmdk::Vmdk;

const SUBFORMATS: [&str; 5] =
    ["monolithicSparse", "streamOptimized", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"];

/// False, with a word about it, on machines without qemu-img.
fn have_qemu() -> bool {
    let have = Command::new("qemu-img").arg("--version").output().is_ok_and(|output| output.status.success());
    if !have {
        println!("SKIPPED: there is no qemu-img");
    }
    have
}

fn qemu_img(directory: &Path, arguments: &[&str]) {
    let output = Command::new("qemu-img").args(arguments).current_dir(directory).output().unwrap();
    assert!(output.status.success(), "qemu-img {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// All files of a directory, at `/`. Zeroes of a sparse file stay untouched memory.
fn load(directory: &Path) -> Storage {
    let storage = Storage::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if name.contains(".vmdk") {
            storage.insert(format!("/{name}"), load_file(&entry.path()));
        }
    }
    storage
}

fn load_file(path: &Path) -> Vec<u8> {
    let mut file = std::fs::File::open(path).unwrap();
    let length = usize::try_from(file.metadata().unwrap().len()).unwrap();
    let mut bytes = vec![0; length];
    let mut block = vec![0; 1 << 20];
    for at in (0..length).step_by(block.len()) {
        let take = block.len().min(length - at);
        file.read_exact(&mut block[..take]).unwrap();
        if block[..take].iter().any(|byte| *byte != 0) {
            bytes[at..at + take].copy_from_slice(&block[..take]);
        }
    }
    bytes
}

/// Bytes that differ from place to place, and do not compress to nothing.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

/// A raw disk of `size` bytes with data at `places`.
fn raw(path: &Path, size: u64, places: &[(u64, usize)]) {
    let mut file = std::fs::File::create(path).unwrap();
    file.set_len(size).unwrap();
    for (seed, (offset, length)) in places.iter().enumerate() {
        file.seek(SeekFrom::Start(*offset)).unwrap();
        file.write_all(&noise(seed as u64 + 1, *length)).unwrap();
    }
}

fn patterns(size: u64) -> Vec<(&'static str, Vec<(u64, usize)>)> {
    let end = size.saturating_sub(512);
    let all = usize::try_from(size).unwrap();
    vec![
        ("empty", vec![]),
        ("full", vec![(0, all)]),
        ("ends", vec![(0, 512), (end, 512)]),
        ("scattered", (0..size / 300_000).map(|i| (i * 300_000 / 512 * 512, 70_000.min(all / 8))).collect()),
    ]
}

#[test]
fn every_subformat_size_and_pattern_reads_as_qemu_reads_it() {
    if !have_qemu() {
        return;
    }
    for subformat in SUBFORMATS {
        // One sector; odd; one grain; a bit more than a grain table covers.
        for size in [512, 65_536, 3_000_320, (33 << 20) + 1536] {
            for (pattern, places) in patterns(size) {
                let directory = tempfile::tempdir().unwrap();
                let directory = directory.path();
                raw(&directory.join("disk.raw"), size, &places);
                let option = format!("subformat={subformat}");
                qemu_img(
                    directory,
                    &["convert", "-t", "unsafe", "-f", "raw", "-O", "vmdk", "-o", &option, "disk.raw", "disk.vmdk"],
                );
                let what = format!("{subformat}, {size} bytes, {pattern}");
                let mut disk = load(directory).disk::<Vmdk>("/disk.vmdk").unwrap_or_else(|e| panic!("{what}: {e}"));
                assert_eq!(disk.info.virtual_size, size, "{what}");
                let read = disk.read(0, usize::try_from(size).unwrap()).unwrap_or_else(|e| panic!("{what}: {e}"));
                assert!(read == load_file(&directory.join("disk.raw")), "{what}: other bytes");
            }
        }
    }
}

#[test]
fn zeroed_grains_are_zeroes_and_not_the_parent() {
    if !have_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    raw(&directory.join("base.raw"), 1 << 20, &[(0, 1 << 20)]);
    qemu_img(directory, &["convert", "-t", "unsafe", "-f", "raw", "-O", "vmdk", "base.raw", "base.vmdk"]);
    qemu_img(
        directory,
        &["create", "-q", "-f", "vmdk", "-F", "vmdk", "-b", "base.vmdk", "-o", "zeroed_grain=on", "top.vmdk"],
    );
    qemu_io(directory, "top.vmdk", "write -z 128k 256k");
    qemu_io(directory, "top.vmdk", "write -P 7 512k 64k");
    assert_chain_reads_as_qemu(directory, 1 << 20);
    let mut top = load(directory).disk::<Vmdk>("/top.vmdk").unwrap();
    let located = top.format.locate(128 << 10, 1, 64).unwrap();
    assert!(located.extents.iter().any(|e| e.placement == Placement::Zero && e.length == 256 << 10), "{located:?}");
}

fn qemu_io(directory: &Path, image: &str, command: &str) {
    let output =
        Command::new("qemu-io").args(["-f", "vmdk", "-c", command, image]).current_dir(directory).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// `top.vmdk` over `base.vmdk`.
fn assert_chain_reads_as_qemu(directory: &Path, size: usize) {
    let storage = load(directory);
    let mut top = storage.disk::<Vmdk>("/top.vmdk").unwrap();
    let backing = top.info.backing.clone().unwrap();
    assert_eq!((backing.name.as_str(), backing.format.as_deref()), ("base.vmdk", Some("vmdk")));
    let below = storage.disk::<Vmdk>("/base.vmdk").unwrap().read(0, size).unwrap();
    let mut read = vec![0; size];
    top.read_over(size as u64, 0, &mut read, &mut |at, to| {
        let at = usize::try_from(at).unwrap();
        to.copy_from_slice(&below[at..at + to.len()]);
    })
    .unwrap();
    qemu_img(directory, &["convert", "-t", "unsafe", "-f", "vmdk", "-O", "raw", "top.vmdk", "top.raw"]);
    assert!(read == load_file(&directory.join("top.raw")), "other bytes than QEMU");
}

#[test]
fn parents_are_followed_and_checked() {
    if !have_qemu() {
        return;
    }
    for subformat in ["monolithicSparse", "twoGbMaxExtentSparse"] {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        raw(&directory.join("base.raw"), 5 << 20, &[(0, 100_000), (1 << 20, 3 << 20)]);
        let option = format!("subformat={subformat}");
        qemu_img(
            directory,
            &["convert", "-t", "unsafe", "-f", "raw", "-O", "vmdk", "-o", &option, "base.raw", "base.vmdk"],
        );
        qemu_img(
            directory,
            &["create", "-q", "-f", "vmdk", "-F", "vmdk", "-b", "base.vmdk", "-o", &option, "top.vmdk"],
        );
        qemu_io(directory, "top.vmdk", "write -P 9 1100k 300k");
        assert_chain_reads_as_qemu(directory, 5 << 20);

        // A parent that changed afterwards has another content id: QEMU fails reads from it.
        qemu_io(directory, "base.vmdk", "write -P 1 0 64k");
        let error = load(directory).disk::<Vmdk>("/top.vmdk").unwrap_err();
        assert!(matches!(&error, Error::Corrupt(text) if text.contains("was changed")), "{error:?}");
        // And one that is gone is named.
        let storage = load(directory);
        let lonely = Storage::new();
        lonely.insert("/top.vmdk", load_file(&directory.join("top.vmdk")));
        if subformat == "monolithicSparse" {
            let error = lonely.disk::<Vmdk>("/top.vmdk").unwrap_err();
            assert!(matches!(&error, Error::Denied(text) if text.contains("\"base.vmdk\"")), "{error:?}");
        }
        drop(storage);
    }
}

#[test]
fn disks_of_several_files_above_2_gib() {
    if !have_qemu() {
        return;
    }
    let gib = 1u64 << 30;
    // Flat files are as long as they say, so only a little more than one.
    for (subformat, size) in
        [("twoGbMaxExtentSparse", 4 * gib + (100 << 20)), ("twoGbMaxExtentFlat", 2 * gib + (2 << 20))]
    {
        let boundaries = [0, 2 * gib - 65_536, 2 * gib, size - 70_144, size - 512];
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        let places: Vec<(u64, usize)> =
            boundaries.iter().map(|at| (*at, usize::try_from((size - at).min(140_800)).unwrap())).collect();
        raw(&directory.join("disk.raw"), size, &places);
        let option = format!("subformat={subformat}");
        qemu_img(
            directory,
            &["convert", "-t", "unsafe", "-f", "raw", "-O", "vmdk", "-o", &option, "disk.raw", "disk.vmdk"],
        );
        let storage = load(directory);
        let mut disk = storage.disk::<Vmdk>("/disk.vmdk").unwrap();
        assert_eq!(disk.info.virtual_size, size);
        let files = usize::try_from(size.div_ceil(2 * gib)).unwrap();
        assert_eq!(disk.info.files.len(), files);
        assert_eq!(storage.opened().len(), 1 + files, "the image and its files");
        let mut file = std::fs::File::open(directory.join("disk.raw")).unwrap();
        for at in boundaries.iter().flat_map(|at| [at.saturating_sub(200_192), *at]) {
            let length = usize::try_from((size - at).min(500_736)).unwrap();
            let mut expected = vec![0; length];
            file.seek(SeekFrom::Start(at)).unwrap();
            file.read_exact(&mut expected).unwrap();
            assert!(disk.read(at, length).unwrap() == expected, "{subformat} at {at}");
        }
    }
}

#[test]
fn a_stream_with_a_footer() {
    if !have_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let size = 2_000_384;
    raw(&directory.join("disk.raw"), size, &[(0, 700_000), (1_500_160, 500_224)]);
    qemu_img(
        directory,
        &[
            "convert",
            "-t",
            "unsafe",
            "-f",
            "raw",
            "-O",
            "vmdk",
            "-o",
            "subformat=streamOptimized",
            "disk.raw",
            "disk.vmdk",
        ],
    );
    // As ovftool writes it: the header points to the end, where the true one is between two markers.
    let mut bytes = load_file(&directory.join("disk.vmdk"));
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    let header = bytes[..512].to_vec();
    bytes[56..64].copy_from_slice(&[0xff; 8]);
    let mut marker = vec![0; 512];
    marker[12] = 3;
    bytes.extend([marker, header, vec![0; 512]].concat());
    std::fs::write(directory.join("disk.vmdk"), &bytes).unwrap();
    qemu_img(directory, &["convert", "-t", "unsafe", "-f", "vmdk", "-O", "raw", "disk.vmdk", "again.raw"]);
    let mut disk = load(directory).disk::<Vmdk>("/disk.vmdk").unwrap();
    assert!(disk.info.facts.iter().any(|fact| fact.name == "footer" && fact.value == "yes"));
    let read = disk.read(0, usize::try_from(size).unwrap()).unwrap();
    assert!(read == load_file(&directory.join("disk.raw")));
    assert!(read == load_file(&directory.join("again.raw")));
    // A file cut off before the footer is an error.
    let storage = Storage::new();
    storage.insert("/cut.vmdk", &bytes[..bytes.len() - 512]);
    assert!(matches!(storage.disk::<Vmdk>("/cut.vmdk"), Err(Error::Corrupt(_))));
}

#[test]
fn a_handwritten_descriptor_of_flat_pieces_reads_as_qemu_reads_it() {
    if !have_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    std::fs::write(directory.join("a b.vmdk.bin"), noise(1, 10_240)).unwrap();
    std::fs::write(directory.join("c.vmdk.bin"), noise(2, 5_120)).unwrap();
    std::fs::write(
        directory.join("disk.vmdk"),
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"twoGbMaxExtentFlat\"\n\
         RW 8 FLAT \"a b.vmdk.bin\" 12\nRW 10 FLAT \"c.vmdk.bin\" 0\nRW 4 FLAT \"a b.vmdk.bin\" 3\n",
    )
    .unwrap();
    qemu_img(directory, &["convert", "-t", "unsafe", "-f", "vmdk", "-O", "raw", "disk.vmdk", "disk.raw"]);
    let mut disk = load(directory).disk::<Vmdk>("/disk.vmdk").unwrap();
    assert_eq!(disk.info.files, ["a b.vmdk.bin", "c.vmdk.bin", "a b.vmdk.bin"]);
    assert!(disk.read(0, 22 * 512).unwrap() == load_file(&directory.join("disk.raw")));
    assert_eq!(disk.info.virtual_size, 22 * 512);
}

#[test]
fn writing_is_refused_by_name() {
    if !have_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    qemu_img(directory.path(), &["create", "-q", "-f", "vmdk", "disk.vmdk", "1M"]);
    let storage = load(directory.path());
    let error = storage.disk_with::<Vmdk>("/disk.vmdk", Access::ReadWrite, |_| Ok(())).unwrap_err();
    assert!(matches!(&error, Error::Unsupported(text) if text.contains("vmdk is read-only")), "{error:?}");
}
