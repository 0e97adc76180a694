//! Images that were made to break a parser: each ends in an answer or an error, never in a panic.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation)]

use blockhouse_plugin::testing::{Disk, Storage};
use blockhouse_plugin::{Error, Format, Placement, Result};
use blockhouse_vmdk::Vmdk;

const GRAIN: usize = 65_536;
/// Sectors of the pieces of [`image`].
const DIRECTORY: usize = 21;
const TABLE: usize = 22;
const FIRST_GRAIN: usize = 128;

fn put<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) {
    bytes[at..at + N].copy_from_slice(&value);
}

fn descriptor(rest: &str) -> String {
    format!("# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"custom\"\n{rest}")
}

/// A sparse image of ten grains, the first three allocated; compressed ones hold `packed`.
fn image(packed: Option<&[u8]>) -> Vec<u8> {
    let mut bytes = vec![0; (FIRST_GRAIN + 3 * 128) * 512];
    put(&mut bytes, 0, *b"KDMV");
    put(&mut bytes, 4, 1u32.to_le_bytes());
    put(&mut bytes, 8, if packed.is_some() { 0x3_0001u32 } else { 1 }.to_le_bytes());
    put(&mut bytes, 12, 1280u64.to_le_bytes());
    put(&mut bytes, 20, 128u64.to_le_bytes());
    put(&mut bytes, 28, 1u64.to_le_bytes());
    put(&mut bytes, 36, 20u64.to_le_bytes());
    put(&mut bytes, 44, 512u32.to_le_bytes());
    put(&mut bytes, 56, (DIRECTORY as u64).to_le_bytes());
    put(&mut bytes, 64, (FIRST_GRAIN as u64).to_le_bytes());
    put(&mut bytes, 73, *b"\n \r\n");
    put(&mut bytes, 77, u16::from(packed.is_some()).to_le_bytes());
    let text = descriptor("RW 1280 SPARSE \"self.vmdk\"\n");
    bytes[512..512 + text.len()].copy_from_slice(text.as_bytes());
    put(&mut bytes, DIRECTORY * 512, (TABLE as u32).to_le_bytes());
    for grain in 0..3 {
        let sector = FIRST_GRAIN + grain * 128;
        put(&mut bytes, TABLE * 512 + grain * 4, (sector as u32).to_le_bytes());
        match packed {
            None => bytes[sector * 512..][..GRAIN].fill(grain as u8 + 1),
            Some(packed) => {
                put(&mut bytes, sector * 512, (grain as u64 * 128).to_le_bytes());
                put(&mut bytes, sector * 512 + 8, (packed.len() as u32).to_le_bytes());
                bytes[sector * 512 + 12..][..packed.len()].copy_from_slice(packed);
            }
        }
    }
    bytes
}

fn zlib(bytes: &[u8]) -> Vec<u8> {
    miniz_oxide::deflate::compress_to_vec_zlib(bytes, 9)
}

fn open(bytes: impl Into<Vec<u8>>) -> Result<Disk<Vmdk>> {
    let storage = Storage::new();
    storage.insert("/vm/disk.vmdk", bytes);
    storage.insert("/vm/flat", vec![5; 4096]);
    storage.insert("/canary", vec![6; 4096]);
    storage.disk("/vm/disk.vmdk")
}

/// Reads all of a disk, grain by grain, as far as it goes. Sees every error and no panic.
fn read_all(disk: &mut Disk<Vmdk>) -> (usize, Vec<Error>) {
    let size = usize::try_from(disk.info.virtual_size).unwrap_or(usize::MAX).min(4 << 20);
    let mut errors = Vec::new();
    let mut read = 0;
    for at in (0..size).step_by(GRAIN) {
        match disk.read(at as u64, GRAIN.min(size - at)) {
            Ok(_) => read += 1,
            Err(error) => errors.push(error),
        }
    }
    (read, errors)
}

fn poked<const N: usize>(at: usize, value: [u8; N]) -> Result<Disk<Vmdk>> {
    let mut bytes = image(None);
    put(&mut bytes, at, value);
    open(bytes)
}

#[test]
fn the_image_under_attack_is_good() {
    let mut disk = open(image(None)).unwrap();
    let read = disk.read(0, 10 * GRAIN).unwrap();
    for (grain, bytes) in read.chunks(GRAIN).enumerate() {
        let expected = if grain < 3 { grain as u8 + 1 } else { 0 };
        assert!(bytes.iter().all(|byte| *byte == expected), "grain {grain}");
    }
    // One answer for the whole table: the grains are neighbours in the file.
    let located = disk.format.locate(9 * GRAIN as u64, 1, 64).unwrap();
    assert_eq!((located.start, located.extents.len()), (0, 2));
    // And with a budget of one, an answer that still contains the offset.
    let located = disk.format.locate(9 * GRAIN as u64, 1, 1).unwrap();
    assert_eq!((located.start, located.extents[0].length), (9 * GRAIN as u64, GRAIN as u64));
}

#[test]
fn header_fields() {
    for (name, result) in [
        ("version", poked(4, 4u32.to_le_bytes())),
        ("version 0", poked(4, [0; 4])),
        ("capacity", poked(12, [0xff; 8])),
        ("capacity without directory", poked(12, (1u64 << 40).to_le_bytes())),
        ("grain 0", poked(20, [0; 8])),
        ("grain 3", poked(20, 3u64.to_le_bytes())),
        ("grain huge", poked(20, (1u64 << 22).to_le_bytes())),
        ("grain huger", poked(20, (1u64 << 63).to_le_bytes())),
        ("descriptor position", poked(28, [0xff; 8])),
        ("descriptor past the end", poked(28, 0xffff_ffffu64.to_le_bytes())),
        ("descriptor length", poked(36, [0xff; 8])),
        ("entries 0", poked(44, [0; 4])),
        ("entries huge", poked(44, [0xff; 4])),
        ("entries 513", poked(44, 513u32.to_le_bytes())),
        ("directory 0", poked(56, [0; 8])),
        ("directory past the end", poked(56, 0xffff_ffffu64.to_le_bytes())),
        ("directory wraps", poked(56, (u64::MAX / 512).to_le_bytes())),
        ("directory at a footer that is not there", poked(56, [0xff; 8])),
        ("line ends", poked(73, *b"\n \n\n")),
        ("algorithm", poked(77, 2u16.to_le_bytes())),
        ("flag without algorithm", poked(8, 0x3_0001u32.to_le_bytes())),
        ("unknown incompatible flag", poked(8, 0x4_0001u32.to_le_bytes())),
    ] {
        let error = result.map(|_| ()).expect_err(name);
        assert!(matches!(error, Error::Corrupt(_) | Error::Unsupported(_)), "{name}: {error:?}");
    }
}

#[test]
fn damaged_entries_cost_their_own_grain_only() {
    let mut bytes = image(None);
    put(&mut bytes, TABLE * 512 + 4, [0xff; 4]);
    let mut disk = open(bytes).unwrap();
    let (read, errors) = read_all(&mut disk);
    assert_eq!(read, 9);
    assert!(matches!(&errors[..], [Error::Corrupt(_)]), "{errors:?}");
    // An answer stops before it, or starts after it.
    let grain = GRAIN as u64;
    let located = disk.format.locate(0, 1, 64).unwrap();
    assert_eq!((located.start, located.extents[0].length, located.extents.len()), (0, grain, 1));
    assert_eq!(disk.format.locate(4 * grain, 1, 64).unwrap().start, 2 * grain);

    // The last grain of a truncated file is an error, not zeroes.
    let mut bytes = image(None);
    bytes.truncate(bytes.len() - 1);
    assert_eq!(read_all(&mut open(bytes).unwrap()).1.len(), 1);

    // A table past the end of the file takes all that it covers with it.
    let mut bytes = image(None);
    put(&mut bytes, DIRECTORY * 512, [0xff; 4]);
    assert_eq!(read_all(&mut open(bytes).unwrap()).0, 0);
}

#[test]
fn an_entry_of_one_is_zeroes_only_with_the_flag() {
    let mut bytes = image(None);
    put(&mut bytes, TABLE * 512, 1u32.to_le_bytes());
    let placement = |bytes: Vec<u8>| open(bytes).unwrap().format.locate(0, 1, 1).unwrap().extents[0].placement;
    assert!(matches!(placement(bytes.clone()), Placement::Data { offset: 512, .. }));
    put(&mut bytes, 8, 5u32.to_le_bytes());
    put(&mut bytes, 4, 2u32.to_le_bytes());
    assert_eq!(placement(bytes), Placement::Zero);
}

#[test]
fn compressed_grains_are_whole_or_an_error() {
    let good = vec![0x42; GRAIN];
    let mut disk = open(image(Some(&zlib(&good)))).unwrap();
    assert!(disk.read(0, GRAIN).unwrap() == good);

    let mut bad_sum = zlib(&good);
    let last = bad_sum.len() - 1;
    bad_sum[last] ^= 1;
    let half = zlib(&good);
    for (name, packed, why) in [
        ("too short (CVE-2026-2243)", zlib(&good[..GRAIN - 1]), "holds 65535 bytes, and 65536 are needed"),
        ("nothing", zlib(&[]), "holds 0 bytes"),
        ("a byte too long", zlib(&vec![0x42; GRAIN + 1]), "more than a grain"),
        ("a bomb", zlib(&vec![0; 20 << 20]), "more than a grain"),
        ("cut off", half[..half.len() / 2].to_vec(), "cut off"),
        ("checksum", bad_sum, "checksum"),
        ("no zlib at all", vec![0x55; 100], "no valid zlib"),
        ("empty", Vec::new(), "says 0 bytes"),
    ] {
        let (read, errors) = read_all(&mut open(image(Some(&packed))).unwrap());
        assert_eq!(read, 7, "{name}: the grains that are not allocated");
        let told = |error: &Error| matches!(error, Error::Corrupt(text) if text.contains(why));
        assert!(errors.len() == 3 && errors.iter().all(told), "{name}: {errors:?}");
    }
    // A marker that lies about the length.
    for length in [u32::MAX, 2 * GRAIN as u32 + 1, 0] {
        let mut bytes = image(Some(&zlib(&good)));
        put(&mut bytes, FIRST_GRAIN * 512 + 8, length.to_le_bytes());
        assert!(matches!(open(bytes).unwrap().read(0, 512), Err(Error::Corrupt(_))));
    }
    // A grain at the very end of the file.
    let mut bytes = image(Some(&zlib(&good)));
    let sectors = bytes.len() / 512;
    bytes.extend([1; 7]);
    put(&mut bytes, TABLE * 512, (sectors as u32).to_le_bytes());
    assert!(matches!(open(bytes).unwrap().read(0, 512), Err(Error::Corrupt(_))));
}

#[test]
fn unpack_takes_its_own_tokens_only() {
    let mut disk = open(image(Some(&zlib(&vec![1; GRAIN])))).unwrap();
    assert!(disk.format.unpack(FIRST_GRAIN as u64, GRAIN as u64).is_ok());
    for (token, length) in [(u64::MAX, 512), (1 << 32, 512), (FIRST_GRAIN as u64, u64::MAX), (0, GRAIN as u64)] {
        assert!(disk.format.unpack(token, length).is_err(), "{token} {length}");
    }
}

#[test]
fn names_of_parts_are_plain_names() {
    for (name, opened) in [
        ("/canary", "/canary"),
        ("../canary", "/canary"),
        ("../../../canary", "/canary"),
        ("json:{'driver':'file'}", "/vm/json:{'driver':'file'}"),
        ("nbd://host/x", "/vm/nbd:/host/x"),
        ("/dev/zero", "/dev/zero"),
        ("C:\\x", "/vm/C:\\x"),
        (" flat ", "/vm/ flat "),
    ] {
        let storage = Storage::new();
        storage.insert("/vm/disk.vmdk", descriptor(&format!("RW 8 FLAT \"{name}\" 0\n")));
        let error = storage.disk::<Vmdk>("/vm/disk.vmdk").map(|_| ()).unwrap_err();
        assert!(matches!(&error, Error::Denied(text) if text.contains(&format!("{name:?}"))), "{error:?}");
        assert_eq!(storage.opened(), ["/vm/disk.vmdk", opened]);
    }
    // A NUL ends the text, as in QEMU, so the name has no closing quote.
    assert!(matches!(open(descriptor("RW 8 FLAT \"fl\0at\" 0\n")), Err(Error::Corrupt(_))));
    assert!(matches!(open(descriptor("RW 8 FLAT \"\" 0\n")), Err(Error::Denied(_))));
    // The second part is judged as the first is.
    assert!(matches!(open(descriptor("RW 8 FLAT \"flat\" 0\nRW 8 FLAT \"/other\" 0\n")), Err(Error::Denied(_))));
}

#[test]
fn a_descriptor_inside_a_sparse_file_names_files_only_without_a_capacity() {
    let text = descriptor("RW 8 FLAT \"../canary\" 0\n");
    let mut bytes = image(None);
    bytes[512..21 * 512].fill(0);
    bytes[512..512 + text.len()].copy_from_slice(text.as_bytes());
    // With a capacity the file is the disk, whatever the text says.
    let disk = open(bytes.clone()).unwrap();
    assert_eq!(disk.info.virtual_size, 10 * GRAIN as u64);
    assert!(disk.info.files.is_empty());
    // Without, the text names the parts, and they are reported before they are opened.
    put(&mut bytes, 12, [0; 8]);
    let mut disk = open(bytes).unwrap();
    assert_eq!(disk.info.files, ["../canary"]);
    assert_eq!(disk.read(0, 1).unwrap(), [6]);
    // Both at once contradict each other.
    let text = descriptor("RW 8 FLAT \"flat\" 0\nRW 8 FLAT \"../canary\" 0\n");
    let mut bytes = image(None);
    bytes[512..512 + text.len()].copy_from_slice(text.as_bytes());
    assert!(matches!(open(bytes), Err(Error::Corrupt(_))));
}

/// [`image`] with this text for its descriptor.
fn embedded(text: &[u8]) -> Vec<u8> {
    let mut bytes = image(None);
    bytes[512..21 * 512].fill(0);
    bytes[512..512 + text.len()].copy_from_slice(text);
    bytes
}

/// A file that is the whole disk has a line about itself, which nobody uses.
#[test]
fn what_an_embedded_descriptor_says_of_its_own_file_does_not_matter() {
    for line in [
        &b"RW 1280 SPARSE \"caf\xe9.vmdk\""[..],
        b"RW 1280 SPARSE \"q\"x.vmdk\"",
        b"RW 1280 SPARSE",
        b"RW 0 ZERO",
        b"RW 1280 SESPARSE \"x\"",
        b"",
    ] {
        let text = [descriptor("").as_bytes(), line, b"\n"].concat();
        let shown = String::from_utf8_lossy(line);
        let bytes = embedded(&text);
        let mut disk = open(bytes.clone()).unwrap_or_else(|error| panic!("{shown}: {error}"));
        assert_eq!(disk.read(GRAIN as u64, 1).unwrap(), [2], "{shown}");
        // Nor does it in a parent, of which only the content id is read.
        let storage = Storage::new();
        storage.insert("/child", descriptor("parentFileNameHint=\"parent\"\nRW 8 ZERO\n").replace("ffffffff", "1"));
        storage.insert("/parent", bytes);
        storage.disk::<Vmdk>("/child").unwrap_or_else(|error| panic!("{shown}: {error}"));
        // Where the lines are the disk it does.
        assert!(open(text).is_err(), "{shown}");
    }
}

/// VMware and VirtualBox round the capacity up to whole grains, and the line has the size of the disk.
#[test]
fn a_capacity_may_be_rounded_up() {
    for (line, expected) in [
        ("RW 1279 SPARSE \"caf\u{e9}.vmdk\"", 1279),
        ("RDONLY  1153\tSPARSE \"self.vmdk\"", 1153),
        ("RW 1280 SPARSE \"self.vmdk\"", 1280),
        // These do not say how long it is.
        ("RW 1152 SPARSE \"self.vmdk\"", 1280),
        ("RW 1281 SPARSE \"self.vmdk\"", 1280),
        ("RW 0 SPARSE \"self.vmdk\"", 1280),
        ("RW 1279 FLAT \"self.vmdk\" 0", 1280),
        ("RW 1279", 1280),
    ] {
        let mut disk = open(embedded(descriptor(&format!("{line}\n")).as_bytes())).unwrap();
        assert_eq!(disk.info.virtual_size, expected * 512, "{line}");
        let located = disk.format.locate(9 * GRAIN as u64, 1, 64).unwrap();
        let end = located.start + located.extents.iter().map(|extent| extent.length).sum::<u64>();
        assert_eq!(end, expected * 512, "{line}");
        assert!(disk.format.locate(expected * 512, 1, 1).is_err(), "{line}");
    }
}

/// A text has to say that it is a descriptor; a file with the magic and a capacity has said what it is.
#[test]
fn a_create_type_is_asked_for_where_the_text_is_the_disk() {
    let typeless = |parts: &str| descriptor(parts).replace("createType=\"custom\"\n", "");
    let mut disk = open(embedded(typeless("RW 1280 SPARSE \"self.vmdk\"\n").as_bytes())).unwrap();
    assert_eq!(disk.read(GRAIN as u64, 1).unwrap(), [2]);
    assert!(disk.info.facts.iter().all(|fact| fact.name != "create-type"));
    let error = open(typeless("RW 8 FLAT \"flat\" 0\n")).map(|_| ()).unwrap_err();
    assert!(matches!(&error, Error::Corrupt(text) if text.contains("this is no VMDK")), "{error:?}");
    let mut bytes = embedded(typeless("RW 8 FLAT \"flat\" 0\n").as_bytes());
    put(&mut bytes, 12, [0; 8]);
    let error = open(bytes).map(|_| ()).unwrap_err();
    assert!(matches!(&error, Error::Corrupt(text) if text.contains("no createType")), "{error:?}");
}

#[test]
fn zero_and_forbidden_parts_keep_their_place() {
    let mut disk =
        open(descriptor("RDONLY 2 FLAT \"flat\" 0\nRW 2 ZERO\nNOACCESS 2 FLAT \"/dev/sda\" 0\nRW 2 FLAT \"flat\" 6\n"))
            .unwrap();
    assert_eq!(disk.info.virtual_size, 4096);
    assert_eq!(disk.info.files, ["flat", "flat"]);
    assert_eq!(disk.read(0, 1024).unwrap(), [5; 1024]);
    assert_eq!(disk.read(1024, 1024).unwrap(), [0; 1024]);
    assert!(matches!(disk.read(2048, 1), Err(Error::Unsupported(text)) if text.contains("NOACCESS")));
    assert_eq!(disk.read(3072, 1024).unwrap(), [5; 1024]);
}

#[test]
fn parts_that_do_not_fit_their_files() {
    for text in ["RW 9 FLAT \"flat\" 0\n", "RW 1 FLAT \"flat\" 8\n", "RW 8 SPARSE \"flat\"\n"] {
        assert!(matches!(open(descriptor(text)), Err(Error::Corrupt(_))), "{text}");
    }
    for sectors in [1, 1152, 1281, 100_000] {
        let storage = Storage::new();
        storage.insert("/disk.vmdk", descriptor(&format!("RW {sectors} SPARSE \"part\"\n")));
        storage.insert("/part", image(None));
        assert!(matches!(storage.disk::<Vmdk>("/disk.vmdk"), Err(Error::Corrupt(_))), "{sectors}");
    }
    // Less by a part of a grain: VMware rounds up.
    let storage = Storage::new();
    storage.insert("/disk.vmdk", descriptor("RW 1153 SPARSE \"part\"\nRW 1280 SPARSE \"part\"\n"));
    storage.insert("/part", image(None));
    let mut disk = storage.disk::<Vmdk>("/disk.vmdk").unwrap();
    assert_eq!(disk.info.virtual_size, (1153 + 1280) * 512);
    assert_eq!(disk.read(1153 * 512, 1).unwrap(), [1]);
    assert_eq!(disk.read((1153 + 256) * 512, 1).unwrap(), [3]);
}

#[test]
fn other_sparse_files_are_named() {
    for (head, named) in [(&b"COWD\x01\0\0\0"[..], "COWD"), (&[0xbe, 0xba, 0xfe, 0xca, 0, 0, 0, 0], "seSparse")] {
        let mut bytes = head.to_vec();
        bytes.resize(4096, 0);
        assert!(matches!(open(bytes.clone()), Err(Error::Unsupported(text)) if text.contains(named)));
        let storage = Storage::new();
        storage.insert("/disk.vmdk", descriptor("RW 8 SPARSE \"delta\"\n"));
        storage.insert("/delta", bytes);
        let error = storage.disk::<Vmdk>("/disk.vmdk").map(|_| ()).unwrap_err();
        assert!(matches!(&error, Error::Unsupported(text) if text.contains(named) && text.contains("\"delta\"")));
    }
    let parted = {
        let mut bytes = image(None);
        bytes[512..21 * 512].fill(0);
        bytes
    };
    assert!(matches!(open(parted), Err(Error::Unsupported(text)) if text.contains("one part of a split disk")));
}

#[test]
fn sizes_that_overflow() {
    let lines = "RW 18014398509481983 ZERO\n".repeat(3);
    assert!(matches!(open(descriptor(&lines)), Err(Error::Corrupt(_))));
    assert!(matches!(open(descriptor(&"RW 1 ZERO\n".repeat(2049))), Err(Error::Unsupported(_))));
    assert!(matches!(open(descriptor("")), Err(Error::Corrupt(_))));
    assert!(matches!(open(vec![b'#'; 2 << 20]), Err(Error::Corrupt(_))));
    assert!(matches!(open(Vec::new()), Err(Error::Corrupt(_))));
}

#[test]
fn every_prefix_of_an_image() {
    let whole = image(Some(&zlib(&vec![3; GRAIN])));
    for length in (0..=DIRECTORY * 512 + 3000).chain([whole.len() - 1]) {
        if let Ok(mut disk) = open(&whole[..length]) {
            read_all(&mut disk);
        }
    }
    let text = descriptor("RW 8 FLAT \"flat\" 0\nRW 8 ZERO\n");
    for length in 0..text.len() {
        if let Ok(mut disk) = open(&text.as_bytes()[..length]) {
            read_all(&mut disk);
        }
    }
}

#[test]
fn every_bit_of_the_metadata_flipped() {
    for packed in [None, Some(zlib(&vec![3; GRAIN]))] {
        let whole = image(packed.as_deref());
        let metadata = (0..80)
            .chain(512..512 + 140)
            .chain(DIRECTORY * 512..DIRECTORY * 512 + 8)
            .chain(TABLE * 512..TABLE * 512 + 16)
            .chain(FIRST_GRAIN * 512..FIRST_GRAIN * 512 + 64);
        for at in metadata {
            for bit in 0..8 {
                let mut bytes = whole.clone();
                bytes[at] ^= 1 << bit;
                let storage = Storage::new();
                storage.insert("/disk.vmdk", bytes);
                if let Ok(mut disk) = storage.disk::<Vmdk>("/disk.vmdk") {
                    for offset in [0, GRAIN as u64, 5 * GRAIN as u64, disk.info.virtual_size.saturating_sub(1)] {
                        if offset < disk.info.virtual_size {
                            let _error_or_bytes = disk.read(offset, 1);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn calls_out_of_order_are_errors() {
    let mut disk = open(image(None)).unwrap();
    assert!(disk.format.connect().is_err());
    assert!(disk.format.locate(10 * GRAIN as u64, 1, 1).is_err());
    assert!(disk.format.locate(u64::MAX, 1, 1).is_err());
}

#[test]
fn the_content_of_a_parent_is_checked() {
    let child = |id: &str, hint: &str| {
        format!("CID=2\nparentCID={id}\ncreateType=\"custom\"\nparentFileNameHint=\"{hint}\"\nRW 8 ZERO\n")
    };
    let chain = |child: String, parent: &[u8]| {
        let storage = Storage::new();
        storage.insert("/child", child);
        storage.insert("/parent", parent);
        storage.disk::<Vmdk>("/child").map(|disk| disk.info.backing.unwrap())
    };
    let parent = image(None);
    assert_eq!(chain(child("00000001", "parent"), &parent).unwrap().name, "parent");
    assert!(matches!(chain(child("00000003", "parent"), &parent), Err(Error::Corrupt(_))));
    assert!(matches!(chain(child("ffffffff", "parent"), &parent), Err(Error::Corrupt(_))));
    assert!(matches!(chain(child("00000001", "parent"), &[7; 4096]), Err(Error::Corrupt(_))));
    assert!(matches!(chain(child("00000001", "gone"), &parent), Err(Error::Denied(_))));
    // A disk that is its own parent is stopped by the depth of the chain, not here.
    assert_eq!(chain(child("00000002", "child"), &parent).unwrap().name, "child");
    let nameless = "CID=2\nparentCID=00000001\ncreateType=custom\nRW 8 ZERO\n";
    assert!(matches!(open(nameless), Err(Error::Corrupt(_))));
    // An empty name is none.
    assert!(matches!(open(child("00000001", "")), Err(Error::Corrupt(text)) if text.contains("without a name")));
    assert!(open(child("ffffffff", "")).unwrap().info.backing.is_none());
    // What is not read is not damaged.
    let error = chain(child("00000001", "parent"), b"COWD\x01\0\0\0").unwrap_err();
    assert!(matches!(&error, Error::Unsupported(text) if text.contains("\"parent\"") && text.contains("COWD")));
}

/// It names no file, and what is not in the image would be read as zeroes.
#[test]
fn a_parent_that_only_virtualbox_finds_is_refused() {
    let with = |line: &str| open(descriptor(&format!("RW 8 ZERO\nddb.uuid.parent=\"{line}\"\n")));
    with("00000000-0000-0000-0000-000000000000").unwrap();
    for bytes in [
        descriptor("RW 8 ZERO\nddb.uuid.parent=\"72c44ba8-f0d5-4db2-a0f9-c4d3a5e4cbb5\"\n").into_bytes(),
        embedded(descriptor("ddb.uuid.parent=\"72c44ba8-f0d5-4db2-a0f9-c4d3a5e4cbb5\"\n").as_bytes()),
    ] {
        let error = open(bytes).map(|_| ()).unwrap_err();
        assert!(matches!(&error, Error::Unsupported(text) if text.contains("VirtualBox")), "{error:?}");
    }
}

#[test]
fn an_empty_disk_of_8_tib_takes_few_answers() {
    let size = 8u64 << 40;
    let mut bytes = image(None);
    put(&mut bytes, 12, (size / 512).to_le_bytes());
    bytes.truncate(DIRECTORY * 512);
    bytes.resize(bytes.len() + usize::try_from(size / (32 << 20) * 4).unwrap(), 0);
    let mut disk = open(bytes).unwrap();
    let (mut at, mut answers) = (0, 0);
    while at < size {
        let located = disk.format.locate(at, 1, 64).unwrap();
        assert_eq!(located.start, at, "nothing is said twice");
        assert!(located.extents.iter().all(|extent| extent.placement == Placement::Unallocated));
        at += located.extents.iter().map(|extent| extent.length).sum::<u64>();
        answers += 1;
    }
    assert_eq!((at, answers), (size, 256), "1024 tables of 32 MiB at a time");
}

#[test]
fn all_tables_on_one_table_and_all_grains_on_one_grain() {
    // A file of 300 KiB can claim terabytes of data; the answers stay as small as those of any image.
    let tables = 4096u64;
    let mut bytes = image(None);
    put(&mut bytes, 12, (tables * 512 * 128).to_le_bytes());
    put(&mut bytes, 56, 1024u64.to_le_bytes());
    bytes.resize(1024 * 512, 0);
    for entry in bytes[TABLE * 512..][..2048].chunks_mut(4) {
        entry.copy_from_slice(&(FIRST_GRAIN as u32).to_le_bytes());
    }
    bytes.extend((0..tables).flat_map(|_| (TABLE as u32).to_le_bytes()));
    let mut disk = open(bytes).unwrap();
    for table in [0, 1, 2000, tables - 1] {
        let at = table * (32 << 20) + 77 * GRAIN as u64;
        let located = disk.format.locate(at, 1, 100).unwrap();
        assert_eq!(located.extents.len(), 100);
        assert_eq!(disk.read(at, 1).unwrap(), [1]);
    }
}

#[test]
fn parts_are_not_mistaken_for_each_other() {
    // The same layout and the same places, but other grains: flat ones, and packed ones.
    let mut swapped = image(None);
    put(&mut swapped, TABLE * 512, (FIRST_GRAIN as u32 + 256).to_le_bytes());
    for (first, second, expected) in [
        (image(None), swapped, [1, 3]),
        (image(Some(&zlib(&vec![4; GRAIN]))), image(Some(&zlib(&vec![5; GRAIN]))), [4, 5]),
    ] {
        let storage = Storage::new();
        storage.insert("/disk.vmdk", descriptor("RW 1280 SPARSE \"a\"\nRW 1280 SPARSE \"b\"\n"));
        storage.insert("/a", first);
        storage.insert("/b", second);
        let mut disk = storage.disk::<Vmdk>("/disk.vmdk").unwrap();
        let read = [disk.read(0, 1).unwrap()[0], disk.read(10 * GRAIN as u64, 1).unwrap()[0]];
        assert_eq!(read, expected);
    }
}

#[test]
fn the_footer_is_the_header() {
    let mut bytes = image(None);
    let header = bytes[..512].to_vec();
    put(&mut bytes, 56, [0xff; 8]);
    let mut marker = vec![0; 512];
    marker[12] = 3;
    bytes.extend([marker, header, vec![0; 512]].concat());
    assert_eq!(open(bytes.clone()).unwrap().read(GRAIN as u64, 1).unwrap(), [2]);
    let footer = bytes.len() - 1536;
    for (name, at) in [
        ("kind of the first marker", footer + 12),
        ("length of the first marker", footer + 8),
        ("magic", footer + 512),
        ("last marker, sector", footer + 1024),
        ("last marker, length", footer + 1024 + 8),
        ("last marker, kind", footer + 1024 + 12),
    ] {
        let mut bytes = bytes.clone();
        bytes[at] ^= 1;
        assert!(matches!(open(bytes), Err(Error::Corrupt(_))), "{name}");
    }
    // A footer that points to a footer.
    put(&mut bytes, footer + 512 + 56, [0xff; 8]);
    assert!(matches!(open(bytes), Err(Error::Corrupt(_))));
}
