//! Grants that say more than a path: pinned files, grants for one image of a chain, and policies.

use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use blockhouse_sandbox::block::{Access, BlockBackend, Error, ErrorKind, VolatileSlice};
use blockhouse_sandbox::{Grant, Grants, OpenRequest, OpenedDisk, Opener, Referrer, Sha256Digest, Tally};
use blockhouse_tests::{COMMAND_LIMIT, component, noise, qemu_img, run, sha256, skip};
use serde_json::Value;

use crate::library::{read, shared};
use crate::place::{Place, limited};
use crate::tally;

const SIZE: usize = 1 << 20;

/// A base that is granted, and an overlay of it: `images/base.raw`, `images/vm/top.qcow2`.
fn overlay(place: &Place) -> (PathBuf, PathBuf) {
    let base = place.write("images/base.raw", noise(1, SIZE));
    let top = place.path("images/vm/top.qcow2");
    qemu_img(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", base.to_str().unwrap(), top.to_str().unwrap()]);
    (base, top)
}

fn open(top: &std::path::Path, grant: &Grant) -> Result<OpenedDisk, Error> {
    let grants = Grants::new().add(grant, &mut |_, _| {})?;
    Opener::new(&shared().sandbox, shared().formats.clone()).grants(grants).open(&OpenRequest::new(top, "qcow2"))
}

/// A base that is rewritten under a running disk: not a byte of the new content is served once it was noticed,
/// through the map, the component or a new disk.
#[test]
fn a_pinned_base_that_changes_is_not_served() {
    let place = Place::new();
    let (base, top) = overlay(&place);
    let pinned = Grant { sha256: Some(Sha256Digest::of(&noise(1, SIZE))), ..Grant::read(&base) };
    let opened = open(&top, &pinned).unwrap();
    assert!(read(&opened.disk, 0, 4096).unwrap() == noise(1, SIZE)[..4096]);
    // A second disk on the same base, which has looked nothing up.
    let other = open(&top, &pinned).unwrap();

    let writer = std::thread::spawn({
        let base = base.clone();
        // Held up by the kernel, where it can, until the host has noticed.
        move || {
            let file = std::fs::File::options().write(true).open(base).unwrap();
            file.write_all_at(&[0xbb; 4096], 0).unwrap();
        }
    });
    let mut changed = false;
    let started = Instant::now();
    let error = loop {
        assert!(started.elapsed() < COMMAND_LIMIT, "the writer was not noticed");
        match read(&opened.disk, 0, 4096) {
            Ok(bytes) if bytes == noise(1, SIZE)[..4096] => {}
            Ok(_) => changed = true,
            Err(error) => break error,
        }
    };
    // The kernel announced the writer: not a byte of his was read.
    assert!(!changed || !error.to_string().contains("somebody opened it for writing"));
    writer.join().unwrap();
    assert_eq!(error.kind(), ErrorKind::Storage);
    let text = place.normalize(&error.to_string());
    let start = "$ROOT/images/base.raw: the file cannot be used any more: it is pinned by sha256, and ";
    assert!(text.starts_with(start), "{text}");
    // Known extents and unknown ones, this disk and the other.
    for (disk, offset) in [(&opened, 0), (&opened, 65_536), (&other, 0), (&other, 900_000 / 512 * 512)] {
        let error = read(&disk.disk, offset, 512).unwrap_err();
        assert!(error.to_string().contains("pinned by sha256"), "{error}");
    }
    let error = open(&top, &pinned).map(|opened| opened.report).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert!(error.to_string().contains("its content has the sha256 "), "{error}");
    tally::image_refused();
}

/// What an overlay holds itself is its own, flushed and not: nobody has changed that.
#[test]
fn a_pinned_base_that_changes_costs_its_overlay_nothing() {
    let place = Place::new();
    let (base, top) = overlay(&place);
    let pinned = Grant { sha256: Some(Sha256Digest::of(&noise(1, SIZE))), ..Grant::read(&base) };
    let grants = Grants::new().add(&pinned, &mut |_, _| {}).unwrap();
    let opener = Opener::new(&shared().sandbox, shared().formats.clone()).grants(grants);
    let disk = opener.open(&OpenRequest { access: Access::ReadWrite, ..OpenRequest::new(&top, "qcow2") }).unwrap().disk;
    // Whole clusters: nothing of them is the base's.
    let write = |offset: u64, seed| {
        let mut bytes = noise(seed, 65_536);
        disk.write(&[VolatileSlice::from(&mut bytes[..])], offset)
    };
    write(0, 2).unwrap();
    disk.flush().unwrap();
    write(131_072, 3).unwrap();
    let writer = std::thread::spawn({
        let base = base.clone();
        move || std::fs::File::options().write(true).open(base).unwrap().write_all_at(&[0xbb; 4096], 0).unwrap()
    });
    let started = Instant::now();
    while read(&disk, 524_288, 512).is_ok() {
        assert!(started.elapsed() < COMMAND_LIMIT, "the writer was not noticed");
    }
    writer.join().unwrap();
    for (offset, seed) in [(0, 2), (131_072, 3)] {
        assert!(read(&disk, offset, 65_536).unwrap() == noise(seed, 65_536));
    }
    write(262_144, 4).unwrap();
    // A part of a cluster, the rest of which would be the base's.
    let error = disk.write(&[VolatileSlice::from(&mut [5; 512][..])], 393_216).unwrap_err();
    assert!(error.to_string().contains("pinned by sha256"), "{error}");
    // Nor does an attempt to make it larger.
    let error = disk.grow(2 * SIZE as u64).unwrap_err();
    assert!(error.to_string().contains("pinned by sha256"), "{error}");
    write(0, 5).unwrap();
    disk.flush().unwrap();
    disk.close().unwrap();
    drop((disk, opener));
    let now = open(&top, &Grant::read(&base)).unwrap().disk;
    assert_eq!(now.capacity(), SIZE as u64);
    for (offset, seed) in [(0, 5), (131_072, 3), (262_144, 4)] {
        assert!(read(&now, offset, 65_536).unwrap() == noise(seed, 65_536));
    }
    tally::image_refused();
}

/// What a component unpacks while its image is rewritten, from bytes that it read before and after, is not used, nor
/// kept.
#[test]
fn what_was_unpacked_of_a_pinned_base_that_changed_is_not_served() {
    let place = Place::new();
    // It unpacks once its last byte is another one.
    let mut content = format!("wait {}\n", SIZE - 1).into_bytes();
    content.resize(SIZE, b'.');
    let base = place.write("images/base.img", &content);
    let mut content = b"backing hostile ../base.img\n".to_vec();
    content.resize(SIZE, b'.');
    let top = place.write("images/vm/top.img", content);
    let sha256 = Sha256Digest::of(&std::fs::read(&base).unwrap());
    let grants = Grants::new().add(&Grant { sha256: Some(sha256), ..Grant::read(&base) }, &mut |_, _| {}).unwrap();
    let counts = Arc::new(Tally::default());
    let unpacks = || counts.calls().find(|(name, _)| *name == "unpack").unwrap().1;
    let opener = Opener::new(&shared().sandbox, shared().formats.clone()).grants(grants).tally(Arc::clone(&counts));
    let opened = opener.open(&OpenRequest::new(&top, "hostile")).unwrap();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| read(&opened.disk, 0, 4096).map(|_| "it was read"));
        let started = Instant::now();
        while unpacks() == 0 && started.elapsed() < COMMAND_LIMIT {
            std::thread::yield_now();
        }
        // Also if it was not asked: the reader waits for this.
        let file = std::fs::File::options().write(true).open(&base).unwrap();
        file.write_all_at(b"!", SIZE as u64 - 1).unwrap();
        let error = reader.join().unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Storage);
        assert!(error.to_string().contains("a file cannot be used any more: it is pinned by sha256"), "{error}");
    });
    read(&opened.disk, 0, 4096).unwrap_err();
    assert_eq!(unpacks(), 1);
    tally::image_refused();
}

/// QEMU does not write to a base that is pinned, nor is one pinned that QEMU writes.
#[test]
fn qemu_respects_a_pin() {
    let place = Place::new();
    let (base, top) = overlay(&place);
    let pinned = Grant { sha256: Some(Sha256Digest::of(&noise(1, SIZE))), ..Grant::read(&base) };
    // QEMU has it open until its standard input ends; its prompt comes when the image is open.
    let mut holder = Command::new("qemu-io");
    holder.args(["-f", "raw"]).arg(&base).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut holder = holder.spawn().unwrap();
    holder.stdout.as_mut().unwrap().read_exact(&mut [0; 8]).unwrap();
    let error = open(&top, &pinned).map(|opened| opened.report).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert!(error.to_string().contains("somebody writes to it, perhaps QEMU"), "{error}");
    tally::image_refused();
    drop(holder.stdin.take());
    holder.wait().unwrap();

    // Granted, and not used yet. Where there are leases, QEMU waits until the pin is revoked, and then finds the lock.
    let grants = Grants::new().add(&pinned, &mut |_, _| {}).unwrap();
    let outcome = run(Command::new("qemu-io").args(["-f", "raw", "-c", "write 0 512"]).arg(&base)).refused();
    assert!(outcome.stderr.contains("Failed to get \"write\" lock"), "{}", outcome.stderr);
    assert!(std::fs::read(&base).unwrap() == noise(1, SIZE), "QEMU wrote to a base that is pinned");
    drop(grants);
    assert!(read(&open(&top, &pinned).unwrap().disk, 0, 4096).unwrap() == noise(1, SIZE)[..4096]);
    tally::image_served();
}

/// The directory of a pinned base is granted as well, or the base under another name: it is pinned all the same, on the
/// command line and in a policy.
#[test]
fn a_pin_holds_whatever_name_leads_to_the_file() {
    let place = Place::new();
    let (base, top) = overlay(&place);
    let at = |path: &std::path::Path| path.to_str().unwrap().to_owned();
    let images = at(&place.path("images"));
    let alias = place.path("images/alias.raw");
    std::os::unix::fs::symlink("base.raw", &alias).unwrap();
    let aliased = place.path("images/vm/aliased.qcow2");
    qemu_img(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", alias.to_str().unwrap(), aliased.to_str().unwrap()]);
    let read = |image: &std::path::Path, arguments: &[&str]| {
        let mut program = limited();
        program.args(["read", "--format", "qcow2"]).args(arguments).arg(image);
        run(&mut program)
    };
    let right = format!("{}@sha256:{}", at(&base), sha256(&noise(1, SIZE)));
    let wrong = format!("{}@sha256:{}", at(&base), sha256(b"other"));
    let layer = format!("{}@layer:1", at(&base));
    let write = |policy: String| at(&place.write("policy.toml", format!("version = 1\n{policy}")));
    let grant = |path: &str, more: &str| format!("[[grants]]\npath = '{path}'\n{more}\n");
    for image in [&top, &aliased] {
        for order in [[images.as_str(), &right], [&right, images.as_str()]] {
            let outcome = read(image, &["--allow", order[0], "--allow", order[1]]).succeeded();
            assert!(outcome.stdout == noise(1, SIZE));
            tally::image_served();
        }
        for special in [&wrong, &layer] {
            for order in [[images.as_str(), special], [special, images.as_str()]] {
                let outcome = read(image, &["--allow", order[0], "--allow", order[1]]);
                assert_eq!((outcome.status.code(), outcome.stdout.len()), (Some(3), 0), "{}", outcome.stderr);
                tally::image_refused();
            }
        }
        // What the policy says of the base is not left out by asking for its directory.
        for (more, why) in [
            (format!("sha256 = '{}'", sha256(b"other")), "its content has the sha256 "),
            ("layer = 1".to_owned(), "it is granted to other images of the chain, and this is layer 0"),
            ("image = '/other'".to_owned(), "it is granted to other images of the chain, and this is layer 0"),
        ] {
            let policy = write(grant(&images, "") + &grant(&at(&base), &more));
            for asked in [&[] as &[&str], &["--allow", &at(&base)], &["--allow", &images], &["--allow", &at(&alias)]] {
                let outcome = read(image, &[&["--policy", &policy], asked].concat());
                assert_eq!((outcome.status.code(), outcome.stdout.len()), (Some(3), 0), "{}", outcome.stderr);
                let is_named = outcome.stderr.contains(why) || outcome.stderr.contains("it is not granted");
                assert!(is_named, "{more} {asked:?}: {}", outcome.stderr);
                tally::image_refused();
            }
        }
        let policy = write(grant(&images, "") + &grant(&at(&base), &format!("sha256 = '{}'", sha256(&noise(1, SIZE)))));
        assert!(read(image, &["--policy", &policy, "--allow", &images]).succeeded().stdout == noise(1, SIZE));
        tally::image_served();
    }
}

/// A path is judged by where it leads; and an image has the name that a grant is for if the name leads to it.
#[test]
fn a_policy_cannot_be_climbed_out_of() {
    let place = Place::new();
    let (base, top) = overlay(&place);
    let at = |path: &str| place.text(path);
    for directory in ["evil/x/y", "evil/images/vm", "tmp"] {
        std::fs::create_dir_all(place.path(directory)).unwrap();
    }
    let link = |to: &str, name: &str| std::os::unix::fs::symlink(place.path(to), place.path(name)).unwrap();
    link("evil/x/y", "tmp/link");
    link("secret/canary", "evil/images/base.raw");
    let program = |policy: &str, arguments: &[&str]| {
        let policy = place.write("policy.toml", format!("version = 1\n{policy}"));
        let mut program = limited();
        program.args(["read", "--format", "qcow2", "--policy"]).arg(policy).args(arguments);
        run(&mut program)
    };
    let refused = |policy: &str, arguments: &[&str], code: i32, why: &str| {
        let outcome = program(policy, arguments);
        assert_eq!((outcome.status.code(), outcome.stdout.len()), (Some(code), 0), "{}", outcome.stderr);
        assert!(place.normalize(&outcome.stderr).contains(why), "{}", outcome.stderr);
        tally::image_refused();
    };
    let top = top.to_str().unwrap().to_owned();
    let around = at("tmp/link/../../images/base.raw");
    for granted in ["images", "images/base.raw"] {
        let policy = format!("[[grants]]\npath = '{}'\n", at(granted));
        let why = "the policy $ROOT/policy.toml does not grant $ROOT/images/base.raw, which leads to $ROOT/secret/canary: \
                   there is no grant of it, or of a directory around it";
        refused(&policy, &["--allow", &around, &top], 3, why);
    }
    // The base for one image: another one cannot have its name.
    let policy = format!("[[grants]]\npath = '{}'\nimage = '{top}'\n", base.display());
    std::fs::copy(&top, place.path("evil/images/vm/top.qcow2")).unwrap();
    let why = "a link before the `..` in $ROOT/tmp/link/../../images/vm/top.qcow2 leads elsewhere than to \
               $ROOT/images/vm/top.qcow2; write the path without `..`";
    refused(&policy, &[&at("tmp/link/../../images/vm/top.qcow2")], 1, why);
    // The twins.
    assert!(program(&policy, &[&top]).succeeded().stdout == noise(1, SIZE));
    let policy = format!("[[grants]]\npath = '{}'\n", base.display());
    let plain = at("images/vm/../base.raw");
    assert!(program(&policy, &["--allow", &plain, &top]).succeeded().stdout == noise(1, SIZE));
    tally::image_served();
}

/// A base for the overlay alone: what the base itself refers to is not its business.
#[test]
fn a_grant_for_one_layer_is_none_for_another() {
    let place = Place::new();
    let (base, top) = overlay(&place);
    let for_layer = |layer| Referrer { layer: Some(layer), image: None };
    let grant = |referrer| Grant { referrer, ..Grant::read(&base) };
    let image = |name: PathBuf| Referrer { layer: None, image: Some(name.to_str().unwrap().to_owned()) };
    open(&top, &grant(for_layer(0))).unwrap();
    open(&top, &grant(image(top.clone()))).unwrap();
    for other in [for_layer(1), image(base.clone())] {
        let error = open(&top, &grant(other)).map(|opened| opened.report).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied);
        let text = place.normalize(&error.to_string());
        assert!(text.ends_with("it is granted to other images of the chain, and this is layer 0"), "{text}");
        tally::image_refused();
    }
    // Three layers: the directory for the first reference, one file for the second.
    let lower = place.write("secret/lower.raw", noise(2, SIZE));
    let middle = place.path("images/middle.qcow2");
    let upper = place.path("images/vm/upper.qcow2");
    qemu_img(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", lower.to_str().unwrap(), middle.to_str().unwrap()]);
    qemu_img(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", middle.to_str().unwrap(), upper.to_str().unwrap()]);
    let reads = |layer| {
        let mut program = limited();
        program.args(["read", "--format", "qcow2", "--allow"]).arg(place.path("images"));
        program.arg("--allow").arg(format!("{}@layer:{layer}", lower.display())).arg(&upper);
        run(&mut program)
    };
    assert!(reads(1).succeeded().stdout == noise(2, SIZE));
    assert_eq!(reads(0).status.code(), Some(3));
}

/// The program: the digest in the argument, and what it prints.
#[test]
fn the_program_pins_and_says_what_was_asked_for() {
    let place = Place::new();
    let (base, top) = overlay(&place);
    let digest = sha256(&noise(1, SIZE));
    let info = |allow: String| {
        let mut program = limited();
        program.args(["info", "--format", "qcow2", "--allow", &allow]).arg(&top);
        run(&mut program)
    };
    let shown = place.normalize(&info(format!("{}@sha256:{digest}", base.display())).succeeded().text());
    let expected = format!(
        "requested: $ROOT/images/base.raw (allowed)\ngranted: $ROOT/images/base.raw, pinned by sha256 {digest}\n"
    );
    assert!(shown.ends_with(&expected), "{shown}");

    let other = sha256(b"other");
    let outcome = info(format!("{}@sha256:{other}@layer:0", base.display()));
    assert_eq!(outcome.status.code(), Some(3));
    assert_eq!(
        place.normalize(&outcome.stderr).trim_end(),
        format!(
            "blockhouse: cannot grant $ROOT/images/base.raw, which is pinned by sha256: its content has the sha256 \
             {digest}, and {other} is wanted"
        )
    );
    let outcome = info(format!("{}@sha256:12", base.display())).refused();
    assert!(outcome.stderr.contains("\"12\" is no SHA-256: 64 hexadecimal digits"), "{}", outcome.stderr);
    tally::image_refused();

    if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        skip("/dev/kvm cannot be opened");
        return;
    }
    let mut program = limited();
    program.args(["run", "--json", "--memory", "64M", "--disk"]).arg(format!(
        "file={},format=qcow2,readonly=on,allow={}@sha256:{digest}",
        top.display(),
        base.display()
    ));
    let outcome = run(&mut program).succeeded();
    assert!(
        place
            .normalize(&outcome.stderr)
            .contains(&format!("$ROOT/images/vm/top.qcow2: {}", expected.trim_end().replace('\n', "; "))),
        "{}",
        outcome.stderr
    );
    let disks: Value = serde_json::from_slice(&outcome.stdout).unwrap();
    assert_eq!(disks[0]["sha256"], digest);
    assert_eq!(disks[0]["requested"][0]["path"], base.to_str().unwrap());
    assert_eq!(disks[0]["requested"][0]["outcome"], "allowed");
    assert_eq!(disks[0]["granted"][0]["sha256"], digest);
}

/// The policy file through the program: formats, components, limits, grants.
#[test]
fn a_policy_is_what_nobody_goes_beyond() {
    let place = Place::new();
    let (base, top) = overlay(&place);
    let digest = sha256(&noise(1, SIZE));
    let at = |path: &std::path::Path| path.to_str().unwrap().to_owned();
    let with = |policy: &str, more: &[&str]| {
        let file = place.write("policy.toml", policy);
        let mut program = limited();
        program.args(["read", "--format", "qcow2", "--policy"]).arg(file).args(more).arg(&top);
        run(&mut program)
    };
    let granting = format!("version = 1\n[[grants]]\npath = '{}'\nsha256 = '{digest}'\n", at(&base));
    // The policy grants where the command line does not, and narrows it where it does.
    let content = noise(1, SIZE);
    assert!(with(&granting, &[]).succeeded().stdout == content);
    assert!(with(&granting, &["--allow", &at(&base)]).succeeded().stdout == content);
    assert!(with("version = 1\n", &[]).refused().stderr.contains("it is not granted"));
    let mut refusals = 0;
    let mut refused = |policy: &str, more: &[&str], code: i32, why: &str| {
        let outcome = with(policy, more);
        assert_eq!(outcome.status.code(), Some(code), "{policy}: {}", outcome.stderr);
        assert!(place.normalize(&outcome.stderr).contains(why), "{policy}: {}", outcome.stderr);
        assert!(outcome.stdout.is_empty());
        refusals += 1;
    };
    let by = "the policy $ROOT/policy.toml";
    let images = at(&place.path("images"));
    refused("version = 1\n", &["--allow", &at(&base)], 3, &format!("{by} does not grant $ROOT/images/base.raw: "));
    refused(&granting, &["--allow", &images], 3, &format!("{by} does not grant $ROOT/images: "));
    let pinned_wrong = granting.replace(&digest, &sha256(b"other"));
    refused(&pinned_wrong, &["--allow", &at(&base)], 3, "its content has the sha256 ");
    // Formats and components.
    let only = |format: &str| format!("version = 1\nformats = ['{format}']\n[[grants]]\npath = '{images}'\n");
    refused(&only("raw"), &[], 3, &format!("{by} does not allow the format \"qcow2\"; it allows: raw"));
    // The backing file is raw.
    refused(&only("qcow2"), &[], 3, &format!("{by} does not allow the format \"raw\"; it allows: qcow2"));
    let component_digest = sha256(&std::fs::read(component("qcow2")).unwrap());
    let components =
        |digest: &str| format!("version = 1\n[components]\nqcow2 = ['{digest}']\n[[grants]]\npath = '{images}'\n");
    with(&components(&component_digest), &[]).succeeded();
    let why = format!("{by} does not allow the component for qcow2 with the sha256 {component_digest}");
    refused(&components(&sha256(b"x")), &[], 3, &why);
    // What is no component at all is refused by its digest, before anybody looks at it.
    let plugin = format!("qcow2={}", at(&place.write("evil.wasm", b"evil")));
    let why = format!("does not allow the component for qcow2 with the sha256 {}", sha256(b"evil"));
    refused(&components(&component_digest), &["--plugin", &plugin], 3, &why);
    refused("version = 1\nplugins = false\n", &["--plugin", &plugin], 3, &format!("{by} does not allow --plugin"));
    let why = format!("{by} does not allow --plugin \"qcow2=compiled:x\": give it the component");
    refused("version = 1\n", &["--plugin", "qcow2=compiled:x"], 3, &why);
    // Limits.
    let limits = |limit: &str| format!("version = 1\n[limits]\n{limit}\n[[grants]]\npath = '{images}'\n");
    with(&limits("chain-depth = 2"), &[]).succeeded();
    refused(&limits("chain-depth = 1"), &[], 6, "the backing chain has more than 1 layers");
    refused(&limits("host-calls = 1"), &[], 6, "it made more than 1 host calls");
    refused(
        &limits("chain-depth = 201"),
        &[],
        1,
        "$ROOT/policy.toml:3:15: limits.chain-depth: 201 is more than the 200",
    );
    // A policy that is not understood is none.
    refused("version = 1\nallow = 'all'\n", &[], 1, "$ROOT/policy.toml:2:1: allow: there is no such key");
    for _ in 0..refusals {
        tally::image_refused();
    }
    // Nothing of it reached past the place.
    let opened = open(&top, &Grant::read(&base)).unwrap();
    assert_eq!(opened.disk.capacity(), SIZE as u64);
}
