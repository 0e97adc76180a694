//! qcow2 images that name a file of the host: as backing file, as external data file, under any
//! spelling, with any protocol in front.
//!
//! Each attack has a twin: the same reference, granted, works. So what refused the attack is the grant.

use std::path::{Path, PathBuf};

use blockhouse_tests::{Canary, noise, qemu_img};

use crate::place::Place;
use crate::qcow2::{self, BACKING_FORMAT, find_extension, overlay};
use crate::tally;

/// The size of the canary, so that a twin's disk is exactly its content.
const SIZE: u64 = 64 << 10;

/// An overlay by qemu-img, which does not look at the backing file.
fn qemu_overlay(image: &Path, backing: &str, format: &str) -> PathBuf {
    qemu_img(["create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", format, image.to_str().unwrap(), "64K"]);
    image.to_owned()
}

/// The line for a reference that no grant covers.
fn not_granted(image: &str, reference: &str, path: &str) -> String {
    format!(
        "blockhouse: $ROOT/images/{image}: cannot open {reference:?} (that is {path}): not permitted; \
         the host refused {path:?}: it is not granted\n  If it is meant, allow it: --allow {path}"
    )
}

/// CVE-2011-3147, CVE-2014-0134, CVE-2015-1851, CVE-2015-5163.
#[test]
fn a_backing_file_outside_of_the_grant_is_refused() {
    let place = Place::new();
    let canary = place.text("secret/canary");
    for (name, reference) in [("absolute", canary.as_str()), ("climbing", "../../secret/canary")] {
        let image = qemu_overlay(&place.path(&format!("images/vm/{name}.qcow2")), reference, "raw");
        let line = not_granted(&format!("vm/{name}.qcow2"), &place.normalize(reference), "$ROOT/secret/canary");
        place.assert_denied("qcow2", &image, "$ROOT/secret/canary", &line);
    }
    for name in ["absolute", "climbing"] {
        place.assert_works_when_granted("qcow2", &place.path(&format!("images/vm/{name}.qcow2")));
    }
}

/// Other spellings of the same path mean the same file, and are refused and granted alike.
#[test]
fn no_spelling_of_a_name_gets_around_the_grant() {
    let place = Place::new();
    let root = place.text("");
    let root = root.trim_end_matches('/');
    let longest = |tail: &str| {
        let slashes = 1023 - tail.len();
        format!("{}{tail}", "/".repeat(slashes))
    };
    let spellings = [
        format!("{root}//secret//canary"),
        format!("{root}/secret/canary/"),
        format!("{root}/secret/./canary"),
        format!("{root}/./secret/../secret/canary/."),
        format!("{root}/images/../secret/canary"),
        format!("{root}/images/vm/../../secret/canary"),
        "./../.././secret//canary".to_owned(),
        "../../../../../../../../../../../../../..".to_owned() + &format!("{root}/secret/canary"),
        "no-such-directory/../../../secret/canary".to_owned(),
        longest(&format!("{root}/secret/canary")),
        format!("{}{root}/secret/canary", "/.".repeat((1023 - root.len() - "/secret/canary".len()) / 2)),
    ];
    let images: Vec<PathBuf> = spellings
        .iter()
        .enumerate()
        .map(|(number, spelling)| {
            let name = format!("images/vm/{number}.qcow2");
            place.write(&name, overlay(12, SIZE, spelling.as_bytes(), Some("raw")))
        })
        .collect();
    for (number, (image, spelling)) in images.iter().zip(&spellings).enumerate() {
        let line = not_granted(&format!("vm/{number}.qcow2"), &place.normalize(spelling), "$ROOT/secret/canary");
        place.assert_denied("qcow2", image, "$ROOT/secret/canary", &line);
    }
    for image in &images {
        place.assert_works_when_granted("qcow2", image);
    }
}

/// Percent signs, format directives and shell words are characters of a name.
#[test]
fn names_are_not_decoded() {
    let place = Place::new();
    let cases = [
        ("..%2f..%2fsecret%2fcanary", "$ROOT/images/vm/..%2f..%2fsecret%2fcanary"),
        ("%2e%2e/%2e%2e/secret/canary", "$ROOT/images/vm/%2e%2e/%2e%2e/secret/canary"),
        ("%s%s%n%x", "$ROOT/images/vm/%s%s%n%x"),
        ("~/canary", "$ROOT/images/vm/~/canary"),
        ("$HOME/canary", "$ROOT/images/vm/$HOME/canary"),
        ("`cat canary`", "$ROOT/images/vm/`cat canary`"),
        ("..\\..\\secret\\canary", "$ROOT/images/vm/..\\..\\secret\\canary"),
        ("*", "$ROOT/images/vm/*"),
    ];
    for (number, (reference, path)) in cases.into_iter().enumerate() {
        let name = format!("{number}.qcow2");
        let image = place.write(&format!("images/vm/{name}"), overlay(12, SIZE, reference.as_bytes(), Some("raw")));
        let line = format!(
            "blockhouse: $ROOT/images/vm/{name}: cannot open {reference:?} (that is {path}): no such file; \
             the host refused {path:?}: there is no such file"
        );
        place.assert_denied("qcow2", &image, path, &line);
    }
    // The twin: files of those names.
    let content = noise(1, 4096);
    for (number, (reference, path)) in cases.into_iter().enumerate() {
        let file = path.replace("$ROOT/", "");
        std::fs::create_dir_all(place.path(&file).parent().unwrap()).unwrap();
        place.write(&file, &content);
        let image = place.path(&format!("images/vm/{number}.qcow2"));
        let attempt = place.open("read", "qcow2", &image).succeeded();
        assert!(attempt.outcome.stdout.starts_with(&content), "{reference}");
        tally::image_served();
    }
}

/// A NUL byte ends a name for C, and for nobody else.
#[test]
fn a_nul_byte_in_a_name_is_refused_before_anything_is_opened() {
    let place = Place::new();
    let canary = place.text("secret/canary");
    let names = [format!("{canary}\0"), format!("{canary}\0.qcow2"), "\0".to_owned(), format!("a\0/../{canary}")];
    for (number, name) in names.iter().enumerate() {
        let image = place.write(&format!("images/vm/{number}.qcow2"), overlay(12, SIZE, name.as_bytes(), Some("raw")));
        let attempt = place.open("read", "qcow2", &image);
        attempt.assert_denied(&format!(
            "blockhouse: $ROOT/images/vm/{number}.qcow2: the reference {:?} has a NUL byte",
            place.normalize(name)
        ));
        assert_eq!(attempt.opens("denied"), [""; 0], "it was not even asked for");
        place.canary.assert_untouched(&attempt.outcome);
        tally::image_refused();
    }
}

/// Names that are not text cannot be granted, and are refused as such.
#[test]
fn a_name_that_is_not_text_is_refused() {
    let place = Place::new();
    let image = place.write("images/vm/a.qcow2", overlay(12, SIZE, b"../../secret/\xff\xfe", Some("raw")));
    let attempt = place.open("read", "qcow2", &image);
    attempt.assert_error(5, &["$ROOT/images/vm/a.qcow2", "the name of the backing file is not UTF-8"]);
    place.canary.assert_untouched(&attempt.outcome);
    tally::image_refused();
}

/// The name in an error message cannot rewrite the terminal of the one who reads it.
#[test]
fn a_name_cannot_reach_the_terminal_raw() {
    let place = Place::new();
    let name = "\u{1b}]0;title\u{7}\u{1b}[2Jgone\r\n\u{202e}txt.\u{9b}31m";
    let image = place.write("images/vm/a.qcow2", overlay(12, SIZE, name.as_bytes(), Some("raw")));
    for command in ["info", "read"] {
        let attempt = place.open(command, "qcow2", &image);
        assert_eq!(attempt.code(), 3);
        let shown = attempt.outcome.text() + &attempt.outcome.stderr;
        let raw: Vec<char> = shown
            .chars()
            .filter(|shown| (shown.is_control() && *shown != '\n') || ('\u{202a}'..='\u{202e}').contains(shown))
            .collect();
        assert!(raw.is_empty(), "{raw:?} in {shown:?}");
        assert!(!shown.contains("gone\r"), "{shown:?}");
    }
    tally::image_refused();
}

/// CVE-2024-4467 and its like: protocols and `json:` are not interpreted, wherever a name stands.
#[test]
fn protocols_are_plain_names() {
    let place = Place::new();
    let canary = place.text("secret/canary");
    let names = [
        format!("json:{{\"driver\":\"file\",\"filename\":\"{canary}\"}}"),
        format!("json:{{\"driver\":\"raw\",\"file\":{{\"driver\":\"file\",\"filename\":\"{canary}\"}}}}"),
        format!("file:{canary}"),
        format!("file://{canary}"),
        format!("fat:{}", place.text("secret")),
        format!("fat:rw:{}", place.text("secret")),
        format!("host_device:{canary}"),
        "nbd://127.0.0.1:10809/x".to_owned(),
        "nbd:unix:/run/x.sock".to_owned(),
        "https://127.0.0.1/x".to_owned(),
        "ssh://root@127.0.0.1/x".to_owned(),
        format!("blkdebug::{canary}"),
    ];
    for (number, name) in names.iter().enumerate() {
        // What such a name means as a path: below the directory of the image, dots and slashes resolved.
        let parts: Vec<&str> = name.split('/').filter(|part| !part.is_empty()).collect();
        let path = format!("$ROOT/images/vm/{}", parts.join("/"));
        let as_path = place.path(&format!("images/vm/{number}.qcow2"));
        std::fs::write(&as_path, overlay(12, SIZE, name.as_bytes(), Some("raw"))).unwrap();
        let reference = place.normalize(&format!("{name:?}"));
        let attempt = place.open("read", "qcow2", &as_path);
        assert_eq!(attempt.code(), 3, "{}", attempt.outcome.stderr);
        let line = attempt.stderr();
        let start = format!("blockhouse: $ROOT/images/vm/{number}.qcow2: cannot open {reference} (that is ");
        assert!(line.starts_with(&start), "{line}\n{start}");
        assert!(line.trim_end().ends_with("there is no such file"), "{line}");
        assert_eq!(attempt.opens("denied"), [place.normalize(&path)]);
        assert_eq!(attempt.opens("allowed"), [""; 0]);
        place.canary.assert_untouched(&attempt.outcome);
        tally::image_refused();
    }
    // The twin: a file of such a name, beside the image, is that file.
    let content = noise(2, 4096);
    for (number, name) in ["json:{\"driver\":\"null-co\"}", "nbd:x", "file:x"].into_iter().enumerate() {
        place.write(&format!("images/vm/{name}"), &content);
        let image =
            place.write(&format!("images/vm/twin-{number}.qcow2"), overlay(12, SIZE, name.as_bytes(), Some("raw")));
        let attempt = place.open("read", "qcow2", &image).succeeded();
        assert!(attempt.outcome.stdout.starts_with(&content), "{name}");
        tally::image_served();
    }
}

/// A backing format is the name of a component, never of a driver, a protocol or a device.
#[test]
fn unknown_backing_formats_are_refused_by_name() {
    let place = Place::new();
    place.write("images/vm/base", noise(3, 4096));
    for format in ["nbd", "file", "host_device", "luks", "../raw", "RAW", "raw\0", "json:{}"] {
        let image = place.write("images/vm/a.qcow2", overlay(12, SIZE, b"base", Some(format)));
        let attempt = place.open("read", "qcow2", &image);
        attempt.assert_error(5, &["$ROOT/images/vm/base: no component serves the format", "there is: "]);
        tally::image_refused();
    }
}

/// CVE-2010-2237, CVE-2010-2238, CVE-2010-2239: without a declared format, the base would be guessed.
#[test]
fn a_backing_file_of_undeclared_format_is_refused_before_it_is_opened() {
    let place = Place::new();
    // The base is a raw disk into which its guest wrote a header that names the canary.
    let trap = overlay(12, SIZE, place.text("secret/canary").as_bytes(), Some("raw"));
    place.write("images/vm/base", &trap);
    let image = qemu_overlay(&place.path("images/vm/a.qcow2"), "base", "raw");
    let mut bytes = std::fs::read(&image).unwrap();
    let at = find_extension(&bytes, BACKING_FORMAT);
    qcow2::poke(&mut bytes, at, &0x1234_5678u32.to_be_bytes());
    let undeclared = place.write("images/vm/undeclared.qcow2", &bytes);
    for command in ["info", "map", "read"] {
        let attempt = place.open(command, "qcow2", &undeclared);
        attempt.assert_denied(
            "blockhouse: $ROOT/images/vm/undeclared.qcow2: the image names the backing file \"base\" without its \
             format, and formats are never guessed\n  If you trust the image, state it there: \
             blockhouse rebase --unsafe --format FORMAT --backing base --backing-format BACKING-FORMAT \
             $ROOT/images/vm/undeclared.qcow2",
        );
        assert_eq!(attempt.opens("denied"), [""; 0]);
        assert_eq!(attempt.opens("allowed"), [""; 0]);
        place.canary.assert_untouched(&attempt.outcome);
    }
    tally::image_refused();

    // The twin: declared as raw, it stays raw; the header in it is data.
    let attempt = place.open("read", "qcow2", &image).succeeded();
    assert!(attempt.outcome.stdout.starts_with(&trap));
    assert_eq!(attempt.opens("allowed"), ["$ROOT/images/vm/base"]);
    place.canary.assert_untouched(&attempt.outcome);
    tally::image_served();

    // Declared as qcow2, the header counts, and its reference is judged like any other.
    let image = qemu_overlay(&place.path("images/vm/b.qcow2"), "base", "qcow2");
    let attempt = place.open("read", "qcow2", &image);
    attempt.assert_denied(&not_granted("vm/base", "$ROOT/secret/canary", "$ROOT/secret/canary"));
    assert_eq!(attempt.opens("allowed"), ["$ROOT/images/vm/base"]);
    place.canary.assert_untouched(&attempt.outcome);
    tally::image_refused();

    // And the hint of the message works.
    let fixed = undeclared.to_str().unwrap();
    qemu_img(["rebase", "-u", "-b", "base", "-F", "raw", fixed]);
    let attempt = place.open("read", "qcow2", &undeclared).succeeded();
    assert!(attempt.outcome.stdout.starts_with(&trap));
    tally::image_served();
}

/// CVE-2026-27211, CVE-2008-2004, CVE-2013-1922: a guest writes an image header into its raw disk.
#[test]
fn a_raw_disk_stays_raw_whatever_its_guest_wrote() {
    let place = Place::new();
    let canary = place.text("secret/canary");
    let qcow2 = std::fs::read(qemu_overlay(&place.path("images/vm/header.qcow2"), &canary, "raw")).unwrap();
    let vmdk = format!(
        "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n\
         RW 128 FLAT \"{canary}\" 0\n"
    );
    for (name, header) in [("qcow2", qcow2.as_slice()), ("vmdk", vmdk.as_bytes())] {
        let mut disk = noise(4, 1 << 20);
        qcow2::poke(&mut disk, 0, header);
        let image = place.write(&format!("images/vm/{name}.raw"), &disk);

        let attempt = place.open("read", "raw", &image).succeeded();
        assert!(attempt.outcome.stdout == disk, "a raw disk is its file, byte for byte");
        assert_eq!(attempt.opens("allowed"), [""; 0]);
        let info = place.open("info", "raw", &image).succeeded();
        assert!(!info.outcome.text().contains("canary"), "{}", info.outcome.text());
        place.canary.assert_untouched(&attempt.outcome);
        tally::image_served();

        // The operator who states the wrong format gets no further than the grant.
        let attempt = place.open("read", name, &image);
        assert_eq!(attempt.code(), 3, "{}", attempt.outcome.stderr);
        assert_eq!(attempt.opens("denied"), ["$ROOT/secret/canary"]);
        place.canary.assert_untouched(&attempt.outcome);
        tally::image_refused();
    }
}

/// There is no open without a format.
#[test]
fn no_command_guesses_a_format() {
    let place = Place::new();
    let image = qemu_overlay(&place.path("images/vm/a.qcow2"), &place.text("secret/canary"), "raw");
    for command in ["info", "map", "read"] {
        let program = crate::place::limited();
        let attempt = place.finish(program_with(program, &[command]), |program| {
            program.arg(&image);
        });
        assert_eq!(attempt.code(), 2, "{}", attempt.outcome.stderr);
        assert!(attempt.outcome.stderr.contains("--format"), "{}", attempt.outcome.stderr);
        place.canary.assert_untouched(&attempt.outcome);
    }
    let disk = format!("file={},readonly=on", image.display());
    let attempt = place.finish(program_with(crate::place::limited(), &["run", "--disk", &disk]), |_| {});
    attempt.assert_error(2, &["format= is missing: the format is stated, never guessed"]);

    // Guessing is a command of its own, which opens nothing that the image names.
    let outcome = blockhouse_tests::run(blockhouse_tests::blockhouse().arg("probe").arg(&image)).succeeded();
    assert!(outcome.text().contains("qcow2"), "{}", outcome.text());
    place.canary.assert_untouched(&outcome);
}

fn program_with(mut program: std::process::Command, arguments: &[&str]) -> std::process::Command {
    program.args(arguments);
    program
}

/// CVE-2024-32498, CVE-2024-40767, CVE-2024-44082: the external data file names a host file.
#[test]
fn an_external_data_file_outside_of_the_grant_is_refused() {
    let mut place = Place::new();
    let canary = place.text("secret/canary");
    for (name, options) in [("plain", "data_file_raw=off"), ("raw", "data_file_raw=on")] {
        let image = place.text(&format!("images/vm/{name}.qcow2"));
        let data = place.text(&format!("images/vm/{name}.data"));
        qemu_img(["create", "-q", "-f", "qcow2", "-o", &format!("data_file={data},{options}"), &image, "64K"]);
        let content = place.write("images/vm/content", noise(5, 64 << 10));
        qemu_img(["convert", "-n", "-f", "raw", "-O", "qcow2", content.to_str().unwrap(), &image]);

        // First the twin: with its own data file, which is granted, it works.
        let attempt = place.open("read", "qcow2", image.as_ref()).succeeded();
        assert!(attempt.outcome.stdout == noise(5, 64 << 10));
        assert_eq!(attempt.opens("allowed"), [place.normalize(&data)]);
        tally::image_served();

        for reference in [canary.as_str(), "../../secret/canary"] {
            qemu_img(["amend", "-f", "qcow2", "-o", &format!("data_file={reference}"), &image]);
            // qemu-img itself opened the data file while it amended the image.
            place.canary = Canary::new(&canary);
            let shown = place.normalize(reference);
            let line = not_granted(&format!("vm/{name}.qcow2"), &shown, "$ROOT/secret/canary");
            place.assert_denied("qcow2", image.as_ref(), "$ROOT/secret/canary", &line);

            // Declared raw, the same file is data, header and all.
            let attempt = place.open("read", "raw", image.as_ref()).succeeded();
            let mut bytes = std::fs::read(&image).unwrap();
            bytes.resize(bytes.len().next_multiple_of(512), 0);
            assert!(attempt.outcome.stdout == bytes);
            place.canary.assert_untouched(&attempt.outcome);
            tally::image_served();
        }
        place.assert_works_when_granted("qcow2", image.as_ref());
    }
}

#[test]
fn protocols_in_the_names_of_data_files_are_plain_too() {
    let place = Place::new();
    let image = place.text("images/vm/a.qcow2");
    qemu_img(["create", "-q", "-f", "qcow2", "-o", &format!("data_file={}", place.text("images/vm/d")), &image, "64K"]);
    let original = std::fs::read(&image).unwrap();
    let at = find_extension(&original, 0x4441_5441);
    let length = u32::from_be_bytes(original[at + 4..at + 8].try_into().unwrap()) as usize;
    for name in ["json:{\"driver\":\"null-co\"}", "nbd://h/x", "file:x", "fat:/"] {
        let mut bytes = original.clone();
        // The same length: the rest of the header stays where it is.
        let mut padded = name.as_bytes().to_vec();
        assert!(padded.len() <= length);
        padded.resize(length, b'x');
        qcow2::poke(&mut bytes, at + 8, &padded);
        std::fs::write(&image, &bytes).unwrap();
        let attempt = place.open("read", "qcow2", image.as_ref());
        attempt.assert_error(3, &["cannot open ", "there is no such file"]);
        tally::image_refused();
    }
}

/// A hostile overlay over a good base, and a good overlay over a hostile base.
#[test]
fn every_layer_of_a_chain_is_judged() {
    let place = Place::new();
    place.write("images/vm/base.raw", noise(6, 64 << 10));
    qemu_overlay(&place.path("images/vm/1.qcow2"), &place.text("secret/canary"), "raw");
    qemu_overlay(&place.path("images/vm/2.qcow2"), "1.qcow2", "qcow2");
    let top = qemu_overlay(&place.path("images/vm/3.qcow2"), "2.qcow2", "qcow2");
    let attempt = place.open("info", "qcow2", &top);
    attempt.assert_denied(&not_granted("vm/1.qcow2", "$ROOT/secret/canary", "$ROOT/secret/canary"));
    assert_eq!(attempt.opens("allowed"), ["$ROOT/images/vm/2.qcow2", "$ROOT/images/vm/1.qcow2"]);
    assert_eq!(attempt.opens("denied"), ["$ROOT/secret/canary"]);
    let shown = attempt.outcome.text();
    assert!(place.normalize(&shown).contains("layer 2: $ROOT/images/vm/1.qcow2"), "{shown}");
    assert!(place.normalize(&shown).contains("refused         \"$ROOT/secret/canary\": it is not granted"), "{shown}");
    place.canary.assert_untouched(&attempt.outcome);
    tally::image_refused();

    // Relative names resolve from the layer that has them, not from the top.
    std::fs::create_dir(place.path("images/vm/deep")).unwrap();
    qemu_overlay(&place.path("images/vm/deep/mid.qcow2"), "../base.raw", "raw");
    let top = qemu_overlay(&place.path("images/vm/top.qcow2"), "deep/mid.qcow2", "qcow2");
    let attempt = place.open("read", "qcow2", &top).succeeded();
    assert!(attempt.outcome.stdout == noise(6, 64 << 10));
    tally::image_served();
}

/// Without any grant, not even the neighbour of the image can be opened; one file granted is one file.
#[test]
fn a_single_file_grant_gives_no_sibling() {
    let place = Place::new();
    let content = noise(7, 64 << 10);
    place.write("images/vm/mine.raw", &content);
    place.write("images/vm/other.raw", noise(8, 64 << 10));
    let mine = qemu_overlay(&place.path("images/vm/mine.qcow2"), "mine.raw", "raw");
    let other = qemu_overlay(&place.path("images/vm/other.qcow2"), "other.raw", "raw");
    let granted = [place.path("images/vm/mine.raw")];

    let attempt = place.open_with("read", "qcow2", &mine, &granted, &[]).succeeded();
    assert!(attempt.outcome.stdout == content);
    tally::image_served();
    let line = not_granted("vm/other.qcow2", "other.raw", "$ROOT/images/vm/other.raw");
    place.open_with("read", "qcow2", &other, &granted, &[]).assert_denied(&line);
    place.open_with("read", "qcow2", &other, &[], &[]).assert_denied(&line);
    tally::image_refused();

    // A name that starts like the granted one is another name.
    for sibling in ["mine.raw2", "mine.raw/x", "mine.rawmine.raw", "min"] {
        let image = place.write("images/vm/a.qcow2", overlay(12, SIZE, sibling.as_bytes(), Some("raw")));
        let attempt = place.open_with("read", "qcow2", &image, &granted, &[]);
        attempt.assert_error(3, &["it is not granted"]);
        tally::image_refused();
    }
    // And the same of directories.
    std::fs::create_dir(place.path("images-of-others")).unwrap();
    place.write("images-of-others/x.raw", noise(9, 512));
    let image = place.write("images/vm/b.qcow2", overlay(12, SIZE, b"../../images-of-others/x.raw", Some("raw")));
    place.open("read", "qcow2", &image).assert_denied(&not_granted(
        "vm/b.qcow2",
        "../../images-of-others/x.raw",
        "$ROOT/images-of-others/x.raw",
    ));
    tally::image_refused();
}

/// The refusal is the same when a machine is to be started, and the machine is not.
#[test]
fn no_machine_starts_with_a_refused_disk() {
    let place = Place::new();
    let canary = place.text("secret/canary");
    let image = qemu_overlay(&place.path("images/vm/a.qcow2"), &canary, "raw");
    let disk = format!("file={},format=qcow2,allow={},readonly=on", image.display(), place.text("images"));
    let attempt = place.finish(program_with(crate::place::limited(), &["run", "--disk", &disk]), |_| {});
    let refusal = not_granted("vm/a.qcow2", "$ROOT/secret/canary", "$ROOT/secret/canary")
        .replace("allow it: --allow ", "add this to its --disk: ,allow=");
    assert_eq!(attempt.code(), 3, "{}", attempt.outcome.stderr);
    assert!(attempt.stderr().contains(refusal.trim_start_matches("blockhouse: ")), "{}", attempt.stderr());
    assert!(attempt.stderr().contains("cannot open disk 0"), "{}", attempt.stderr());
    assert_eq!(attempt.opens("denied"), ["$ROOT/secret/canary"]);
    place.canary.assert_untouched(&attempt.outcome);
    tally::image_refused();
}

/// Who pastes what an error suggests runs nothing that the image chose, and grants that file and no other.
#[test]
fn what_is_suggested_runs_nothing_of_a_name() {
    let place = Place::new();
    let refused = |number: u32, backing: &str| {
        let bytes = overlay(12, SIZE, backing.as_bytes(), Some("raw"));
        let image = place.write(&format!("images/vm/{number}.qcow2"), bytes);
        let stderr = place.open_with("info", "qcow2", &image, &[], &[]).stderr();
        tally::image_refused();
        stderr.lines().find_map(|line| Some(line.split_once("allow it: ")?.1.to_owned()))
    };
    let hint = |number, backing| refused(number, backing).unwrap_or_else(|| panic!("no suggestion for {backing:?}"));
    assert_eq!(hint(1, "/$(reboot)`reboot`\";reboot #"), "--allow '/$(reboot)`reboot`\";reboot #'");
    assert_eq!(hint(2, "/it's"), "--allow '/it'\\''s'");
    assert_eq!(hint(3, "/disk@layer:1"), "--allow /disk@@layer:1");
    assert_eq!(refused(4, "/a\u{202e}war.b"), None, "a name that a terminal shows as another");
}

/// A name with terminal escapes in it, of a file that is granted, so that it is named everywhere.
#[test]
fn no_name_reaches_the_terminal_raw() {
    let place = Place::new();
    place.write("images/vm/b\u{1b}[2J.raw", [1; 4096]);
    let image = place.write("images/vm/top.qcow2", overlay(12, 4096, "b\u{1b}[2J.raw".as_bytes(), Some("raw")));
    let broken = place.write("images/vm/broken.qcow2", overlay(12, 4096, b"c\x1b[2J.qcow2", Some("qcow2")));
    place.write("images/vm/c\u{1b}[2J.qcow2", [1; 4096]);
    for (command, image) in [("info", &image), ("map", &image), ("info", &broken), ("map", &broken)] {
        let attempt = place.open(command, "qcow2", image);
        let text = attempt.outcome.text() + &attempt.outcome.stderr;
        assert!(text.contains("\\u{1b}[2J") && !text.contains('\u{1b}'), "{command}: {text:?}");
    }
}
