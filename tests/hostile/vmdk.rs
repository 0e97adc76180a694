//! CVE-2022-47951 and around it: VMDK descriptors that name files of the host as parts of the disk.

use std::path::PathBuf;
use std::process::Command;

use blockhouse_sandbox::block::ErrorKind;
use blockhouse_sandbox::{Grants, Limits, OpenRequest, Opener};
use blockhouse_tests::{noise, program, run, skip};
use rustix::process::{Resource, getrlimit};

use crate::library::{Library, shared};
use crate::place::Place;
use crate::tally;

fn descriptor(parts: &str) -> String {
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n\
         # Extent description\n{parts}"
    )
}

fn image(place: &Place, name: &str, parts: &str) -> PathBuf {
    place.write(&format!("images/vm/{name}.vmdk"), descriptor(parts))
}

fn not_granted(name: &str, reference: &str, path: &str) -> String {
    format!(
        "blockhouse: $ROOT/images/vm/{name}.vmdk: cannot open {reference:?} (that is {path}): not permitted; \
         the host refused {path:?}: it is not granted\n  If it is meant, allow it: --allow {path}"
    )
}

#[test]
fn a_flat_part_outside_of_the_grant_is_refused() {
    let place = Place::new();
    let canary = place.text("secret/canary");
    let names = [
        ("absolute", canary.clone()),
        ("climbing", "../../secret/canary".to_owned()),
        ("slashes", format!("//{canary}")),
        ("trailing", format!("{canary}/")),
        ("dots", "./../vm/.././../secret/./canary".to_owned()),
    ];
    for (name, reference) in &names {
        let image = image(&place, name, &format!("RW 128 FLAT \"{reference}\" 0\n"));
        let line = not_granted(name, &place.normalize(reference), "$ROOT/secret/canary");
        place.assert_denied("vmdk", &image, "$ROOT/secret/canary", &line);
    }
    for (name, _) in &names {
        place.assert_works_when_granted("vmdk", &place.path(&format!("images/vm/{name}.vmdk")));
    }
}

#[test]
fn a_later_part_is_judged_like_the_first() {
    let place = Place::new();
    let content = noise(1, 64 << 10);
    place.write("images/vm/good", &content);
    for (name, kind) in [("flat", "FLAT"), ("sparse", "SPARSE"), ("vmfs", "VMFS")] {
        let offset = if kind == "SPARSE" { "" } else { " 0" };
        let parts = format!("RW 128 FLAT \"good\" 0\nRW 128 ZERO\nRW 128 {kind} \"../../secret/canary\"{offset}\n");
        let image = image(&place, name, &parts);
        let attempt = place.open("read", "vmdk", &image);
        attempt.assert_denied(&not_granted(name, "../../secret/canary", "$ROOT/secret/canary"));
        assert_eq!(attempt.opens("allowed"), ["$ROOT/images/vm/good"]);
        assert_eq!(attempt.opens("denied"), ["$ROOT/secret/canary"]);
        place.canary.assert_untouched(&attempt.outcome);
        tally::image_refused();
    }
    // The twin: both parts granted, in their order.
    place.write("images/vm/second", noise(2, 64 << 10));
    let image = image(&place, "twin", "RW 128 FLAT \"good\" 0\nRW 128 FLAT \"second\" 0\n");
    let attempt = place.open("read", "vmdk", &image).succeeded();
    assert!(attempt.outcome.stdout == [content, noise(2, 64 << 10)].concat());
    tally::image_served();
}

/// Quotes, NUL bytes and line ends in names: whatever is left of the name is judged.
#[test]
fn odd_names_of_parts_go_nowhere() {
    let place = Place::new();
    let canary = place.text("secret/canary");
    let cases: &[(&str, Vec<u8>)] = &[
        ("nul", format!("RW 128 FLAT \"{canary}\0.vmdk\" 0\n").into_bytes()),
        ("quote", format!("RW 128 FLAT \"\"{canary}\"\" 0\n").into_bytes()),
        ("backslash-quote", format!("RW 128 FLAT \"\\\"{canary}\" 0\n").into_bytes()),
        ("no-quotes", format!("RW 128 FLAT {canary} 0\n").into_bytes()),
        ("half-quote", format!("RW 128 FLAT \"{canary}\n").into_bytes()),
        ("empty", b"RW 128 FLAT \"\" 0\n".to_vec()),
        ("return", format!("RW 128 FLAT \"{canary}\r\" 0\n").into_bytes()),
        ("latin", b"RW 128 FLAT \"\xff\xfe\" 0\n".to_vec()),
        ("json", format!("RW 128 FLAT \"json:{{'driver':'file','filename':'{canary}'}}\" 0\n").into_bytes()),
        ("protocol", format!("RW 128 FLAT \"file:{canary}\" 0\n").into_bytes()),
        ("percent", b"RW 128 FLAT \"..%2f..%2fsecret%2fcanary\" 0\n".to_vec()),
        ("negative", format!("RW 128 FLAT \"{canary}\" -1\n").into_bytes()),
        ("wraps", format!("RW 18446744073709551615 FLAT \"{canary}\" 18446744073709551615\n").into_bytes()),
        ("device", b"RW 128 FLAT \"/dev/zero\" 0\n".to_vec()),
        ("memory", b"RW 128 FLAT \"/proc/self/mem\" 0\n".to_vec()),
        ("block-device", b"RW 128 FLAT \"/dev/loop0\" 0\n".to_vec()),
    ];
    for (name, parts) in cases {
        let bytes = [descriptor("").as_bytes(), parts].concat();
        let image = place.write(&format!("images/vm/{name}.vmdk"), bytes);
        for command in ["info", "read"] {
            let attempt = place.open(command, "vmdk", &image);
            assert!([3, 4, 5].contains(&attempt.code()), "{name}: {:?}", attempt.outcome);
            let line = attempt.error();
            assert!(line.starts_with(&format!("blockhouse: $ROOT/images/vm/{name}.vmdk: ")), "{line}");
            assert_eq!(attempt.opens("allowed"), [""; 0], "{name}");
            place.canary.assert_untouched(&attempt.outcome);
        }
        tally::image_refused();
    }
}

/// Not even a grant of everything makes a device a part of a disk.
#[test]
fn device_types_and_device_nodes_are_refused() {
    let place = Place::new();
    let everything = [PathBuf::from("/")];
    let flat = image(&place, "flat", "RW 128 FLAT \"/dev/zero\" 0\n");
    let attempt = place.open_with("read", "vmdk", &flat, &everything, &[]);
    attempt.assert_error(3, &["\"/dev/zero\"", "it is not a regular file"]);
    tally::image_refused();
    for (name, create_type) in [("a", "fullDevice"), ("b", "partitionedDevice"), ("c", "vmfsRDMP")] {
        let text = descriptor("RW 128 FLAT \"/dev/zero\" 0\n").replace("monolithicFlat", create_type);
        let image = place.write(&format!("images/vm/{name}.vmdk"), text);
        let attempt = place.open_with("read", "vmdk", &image, &everything, &[]);
        attempt.assert_error(5, &[create_type, "is not read"]);
        assert_eq!(attempt.opens("allowed"), [""; 0]);
        tally::image_refused();
    }
}

/// A sparse header of which the embedded descriptor names a file.
#[test]
fn an_embedded_descriptor_is_judged_like_any_other() {
    let place = Place::new();
    // Capacity 0 means that the parts are those of the descriptor.
    for capacity in [0u64, 128] {
        let mut bytes = vec![0; 64 << 10];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, b"KDMV");
        put(4, &1u32.to_le_bytes());
        put(8, &1u32.to_le_bytes());
        put(12, &capacity.to_le_bytes());
        put(20, &128u64.to_le_bytes());
        put(28, &1u64.to_le_bytes());
        put(36, &20u64.to_le_bytes());
        put(44, &512u32.to_le_bytes());
        put(56, &21u64.to_le_bytes());
        put(64, &64u64.to_le_bytes());
        put(73, b"\n \r\n");
        put(
            512,
            descriptor("RW 64 FLAT \"../../secret/canary\" 0\nRW 64 FLAT \"../../secret/canary\" 64\n").as_bytes(),
        );
        let image = place.write(&format!("images/vm/embedded-{capacity}.vmdk"), &bytes);
        let attempt = place.open("read", "vmdk", &image);
        assert!([3, 4, 5].contains(&attempt.code()), "{:?}", attempt.outcome);
        assert_eq!(attempt.opens("allowed"), [""; 0]);
        place.canary.assert_untouched(&attempt.outcome);
        tally::image_refused();
    }
}

/// The bytes of one part of [`image_of_parts`].
const PART: usize = 4096;

/// A sparse file of one grain, which holds the bytes.
fn sparse(bytes: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 3 * 512];
    let mut put = |at: usize, value: &[u8]| file[at..at + value.len()].copy_from_slice(value);
    let sectors = (bytes.len() as u64 / 512).to_le_bytes();
    put(0, b"KDMV");
    put(4, &1u32.to_le_bytes());
    put(8, &1u32.to_le_bytes());
    put(12, &sectors);
    put(20, &sectors);
    put(44, &1u32.to_le_bytes());
    put(56, &1u64.to_le_bytes());
    put(73, b"\n \r\n");
    put(512, &2u32.to_le_bytes());
    put(1024, &3u32.to_le_bytes());
    file.extend(bytes);
    file
}

/// A disk of so many sparse parts, each a file that stays open. The bytes of one are noise of its number.
fn image_of_parts(place: &Place, count: usize) -> PathBuf {
    let lines = (0..count).map(|number| {
        place.write(&format!("images/vm/part-{number}"), sparse(&noise(number as u64, PART)));
        format!("RW {} SPARSE \"part-{number}\"\n", PART / 512)
    });
    let lines = lines.collect::<String>();
    image(place, "parts", &lines)
}

/// `read` of the image by the program, started with this limit of open files.
fn read_within(place: &Place, image: &PathBuf, limit: &str) -> Command {
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("ulimit {limit} && exec \"$0\" \"$@\"")).arg(program());
    command.args(["read", "--format", "vmdk", "--allow"]).arg(place.path("images")).arg(image);
    command
}

/// The largest disk of split files that is read, 4 TiB in parts of 2 GiB: each part is three descriptors, and behind
/// the walls the program has as many as the system allows.
#[test]
fn a_disk_of_2048_parts_is_served() {
    const PARTS: usize = 2048;
    let most = getrlimit(Resource::Nofile).maximum;
    if most.is_some_and(|most| most < 7000) {
        return skip(format!("a process may have no more than {most:?} files open here"));
    }
    let place = Place::new();
    let image = image_of_parts(&place, PARTS);
    let outcome = run(&mut read_within(&place, &image, "-Sn 1024")).succeeded();
    let expected: Vec<u8> = (0..PARTS).flat_map(|number| noise(number as u64, PART)).collect();
    assert!(outcome.stdout == expected);
    tally::image_served();
    let lines = std::fs::read_to_string(&image).unwrap();
    std::fs::write(&image, lines + "RW 8 ZERO\n").unwrap();
    place.open("info", "vmdk", &image).assert_error(5, &["a disk of more than 2048 parts"]);
    tally::image_refused();
}

/// Whatever it is that lacks a descriptor, the error says what to raise.
#[test]
fn a_disk_of_more_parts_than_the_process_may_open_is_refused() {
    let place = Place::new();
    let image = image_of_parts(&place, 100);
    for limit in 100..106 {
        let outcome = run(&mut read_within(&place, &image, &format!("-n {limit}")));
        assert_eq!(outcome.status.code(), Some(6), "{limit}: {}", outcome.stderr);
        let told = ["the host refused \"", "this process may have no more files open; raise its limit", "ulimit -n"];
        assert!(told.iter().all(|text| outcome.stderr.contains(text)), "{limit}: {}", outcome.stderr);
        tally::image_refused();
    }
}

/// The host does not take each file that a component opened; then it says why, and which one.
#[test]
fn a_part_that_the_host_cannot_use_is_named_with_the_reason() {
    let place = Place::new();
    let image = image_of_parts(&place, 2);
    let mut limits = Limits::default();
    limits.shared_files = 1;
    let error = Library::new(limits).open("vmdk", &image, &[&place.path("images")]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Limit, "{error}");
    let why = "the host refused \"$ROOT/images/vm/part-1\": the limit of shared files is reached (shared-files = 1)";
    assert!(place.normalize(&error.to_string()).contains(why), "{error}");
    tally::image_refused();

    // A regular file of a file system without direct I/O.
    let other = "/sys/kernel/uevent_seqnum";
    if !std::fs::metadata(other).is_ok_and(|file| file.is_file() && file.len() >= 512) {
        return skip(format!("{other} is not what it was"));
    }
    let image = self::image(&place, "direct", &format!("RW 1 FLAT \"{other}\" 0\n"));
    let grants = Grants::new().allow(other).unwrap();
    let opener = Opener::new(&shared().sandbox, shared().formats.clone()).grants(grants);
    opener.open(&OpenRequest::new(&image, "vmdk")).unwrap();
    let error = opener.direct(true).open(&OpenRequest::new(&image, "vmdk")).unwrap_err();
    let text = error.to_string();
    if text.contains("direct.vmdk: cannot be used with direct I/O") {
        return skip("the file system of the tests has no direct I/O");
    }
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{text}");
    let why = format!("the host refused {other:?}: it cannot be used with direct I/O, which was asked for: ");
    assert!(text.contains(&why), "{text}");
    tally::image_refused();
}

/// The parent of a VMDK is a reference like any other.
#[test]
fn a_parent_outside_of_the_grant_is_refused() {
    let place = Place::new();
    let canary = place.text("secret/canary");
    let images = [("absolute", canary.as_str()), ("climbing", "../../secret/canary")].map(|(name, hint)| {
        let text = descriptor("RW 128 ZERO\n")
            .replace("parentCID=ffffffff", &format!("parentCID=00000001\nparentFileNameHint=\"{hint}\""));
        let image = place.write(&format!("images/vm/{name}.vmdk"), text);
        let line = not_granted(name, &place.normalize(hint), "$ROOT/secret/canary");
        place.assert_denied("vmdk", &image, "$ROOT/secret/canary", &line);
        image
    });
    // Granted, it is opened, and is no VMDK: an error about the parent, without its content.
    for image in images {
        let attempt = place.open_with("read", "vmdk", &image, &[place.canary.path().to_owned()], &[]);
        attempt.assert_error(4, &["the parent", "cannot be read"]);
        place.canary.assert_not_in(attempt.outcome.stderr.as_bytes());
    }
}
