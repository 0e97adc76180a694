//! `blockhouse convert`.

use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::place::Place;

const MIB: u64 = 1 << 20;

/// A source in every format that is read, as the arguments that open it, and its content in `disk.raw`.
fn sources(place: &Place) -> [(&'static str, &'static str); 5] {
    place.raw("disk.raw", 7 * MIB + 1536, &[(0, 200_000), (1_000_000, 1_500_000), (7 << 20, 1536)]);
    place.qemu_img("convert -f raw -O qcow2 -c disk.raw packed.qcow2");
    place.qemu_img("convert -f raw -O vmdk -o subformat=streamOptimized disk.raw stream.vmdk");
    place.qemu_img("convert -f raw -O qcow2 -o cluster_size=512 disk.raw small.qcow2");
    place.qemu_img(&format!("create -q -f qcow2 -b disk.raw -F raw top.qcow2 {}", 7 * MIB + 1536));
    [
        ("--format raw", "disk.raw"),
        ("--format qcow2", "packed.qcow2"),
        ("--format vmdk", "stream.vmdk"),
        ("--format qcow2", "small.qcow2"),
        ("--format qcow2 --allow disk.raw", "top.qcow2"),
    ]
}

#[test]
fn from_every_format_to_every_format() {
    let Some(place) = Place::new() else { return };
    for (how, source) in sources(&place) {
        let before = place.bytes(source);
        for (format, options) in [
            ("raw", ""),
            ("qcow2", ""),
            ("qcow2", "--compress"),
            ("qcow2", "--compress -o compression-type=zstd -o cluster-size=2M"),
            ("qcow2", "--compress -o cluster-size=512"),
            ("qcow2", "-o cluster-size=4K -o compat=v2"),
            ("qcow2", "-o extended-l2=on"),
            ("qcow2", "--preallocation metadata"),
            ("raw", "--preallocation falloc"),
        ] {
            place.ok(&format!("convert {how} --to-format {format} {options} --force {source} new"));
            // A VMDK has whole sectors, which is all that is read of any of them.
            place.same((format, "new"), ("raw", "disk.raw"));
            if format == "qcow2" {
                place.flawless("new");
            }
        }
        assert!(place.bytes(source) == before, "{source} was changed");
    }
    assert!(place.names().iter().all(|name| !name.starts_with('.')), "{:?}", place.names());
}

/// Holes stay holes, zeroes become holes, and what can be packed is.
#[test]
fn nothing_takes_more_space_than_it_needs() {
    let Some(place) = Place::new() else { return };
    place.raw("disk.raw", 1 << 40, &[(0, 65536), (512 << 30, 65536)]);
    for format in ["raw", "qcow2"] {
        place.ok(&format!("convert --format raw --to-format {format} disk.raw new.{format}"));
        assert!(place.space(&format!("new.{format}")) <= MIB, "{} bytes", place.space(&format!("new.{format}")));
    }
    place.same(("qcow2", "new.qcow2"), ("raw", "disk.raw"));

    // Zeroes that are written out, and text.
    let mut bytes = vec![0; 4 << 20];
    bytes[1 << 20..2 << 20].fill(b'x');
    std::fs::write(place.path("full.raw"), &bytes).unwrap();
    place.ok("convert --format raw --to-format raw full.raw sparse.raw");
    assert!(place.space("sparse.raw") <= MIB + 65536, "{} bytes", place.space("sparse.raw"));
    let packed = "convert --json --format raw --to-format qcow2 --compress full.raw packed.qcow2";
    let last: Value = serde_json::from_str(place.ok(packed).lines().last().unwrap()).unwrap();
    assert_eq!((&last["event"], &last["compressed_bytes"]), (&"done".into(), &MIB.into()), "{last}");
    assert!(place.bytes("packed.qcow2").len() < 512 << 10, "{} bytes", place.bytes("packed.qcow2").len());
    place.same(("qcow2", "packed.qcow2"), ("raw", "full.raw"));
    // What does not get smaller is written as it is.
    place.raw("noise.raw", MIB, &[(0, 1 << 20)]);
    place.ok("convert --format raw --to-format qcow2 --compress noise.raw noise.qcow2");
    place.flawless("noise.qcow2");
    place.same(("qcow2", "noise.qcow2"), ("raw", "noise.raw"));
}

/// With a backing file only what differs from it is written, zeroes over data among it.
#[test]
fn over_a_backing_file() {
    let Some(place) = Place::new() else { return };
    place.raw("base.raw", 4 * MIB, &[(0, 4 << 20)]);
    let mut bytes = place.bytes("base.raw");
    bytes[MIB as usize..MIB as usize + 10].fill(7);
    bytes[2 * MIB as usize..3 * MIB as usize].fill(0);
    bytes.extend(blockhouse_tests::noise(9, 70_144));
    std::fs::write(place.path("disk.raw"), &bytes).unwrap();
    for options in ["", "-o compat=v2", "-o extended-l2=on", "-o cluster-size=4K", "--compress"] {
        place.ok(&format!(
            "convert --force --format raw --to-format qcow2 {options} --backing base.raw --backing-format raw \
             disk.raw top.qcow2"
        ));
        place.flawless("top.qcow2");
        place.same(("qcow2", "top.qcow2"), ("raw", "disk.raw"));
        assert_eq!(place.info("qcow2", "top.qcow2")["backing-filename"], "base.raw");
        // Version 2 has no zero clusters: there zeroes are data.
        let most = if options.contains("v2") { 2 * MIB } else { MIB };
        assert!((place.bytes("top.qcow2").len() as u64) < most, "{} bytes", place.bytes("top.qcow2").len());
    }
}

#[test]
fn snapshots_and_data_files() {
    let Some(place) = Place::new() else { return };
    place.raw("disk.raw", 2 * MIB, &[(0, 300_000)]);
    place.qemu_img("convert -f raw -O qcow2 disk.raw vm.qcow2");
    place.qemu_img("snapshot -c before vm.qcow2");
    place.qemu_io("qcow2", "vm.qcow2", &["write -P 3 0 2M"]);
    place.ok("convert --format qcow2 --snapshot before --to-format raw vm.qcow2 before.raw");
    place.same(("raw", "before.raw"), ("raw", "disk.raw"));

    place.ok("convert --format qcow2 --to-format qcow2 --data-file content.raw -o data-file-raw=on vm.qcow2 top.qcow2");
    place.flawless("top.qcow2");
    place.same(("qcow2", "top.qcow2"), ("qcow2", "vm.qcow2"));
    place.same(("raw", "content.raw"), ("qcow2", "vm.qcow2"));
}

#[test]
fn progress_is_told() {
    let Some(place) = Place::new() else { return };
    place.raw("disk.raw", 20 * MIB, &[(0, 20 << 20)]);
    let text = place.ok("convert --json --format raw --to-format qcow2 disk.raw new.qcow2");
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let (last, before) = lines.split_last().unwrap();
    assert_eq!(
        (&last["event"], &last["virtual_size_bytes"], &last["image"]),
        (&"done".into(), &(20 * MIB).into(), &"new.qcow2".into()),
        "{last}"
    );
    assert!(before.len() >= 5, "{text}");
    assert!(before.iter().all(|line| line["event"] == "progress"), "{text}");
    assert!(before.is_sorted_by_key(|line| line["done_bytes"].as_u64()), "{text}");
    assert_eq!(before.last().unwrap()["done_bytes"], 20 * MIB);
}

#[test]
fn what_cannot_be() {
    let Some(place) = Place::new() else { return };
    place.raw("disk.raw", MIB, &[(0, 1 << 20)]);
    place.qemu_img("create -q -f qcow2 -b disk.raw -F raw top.qcow2");
    place.raw("there.raw", MIB, &[(0, 5000)]);
    let before = [place.bytes("disk.raw"), place.bytes("top.qcow2"), place.bytes("there.raw")];
    let names = place.names();
    for (arguments, code, words) in [
        ("--format raw --to-format qcow2 disk.raw there.raw", 1, &["there.raw exists", "--force"][..]),
        ("--format raw --to-format qcow2 --force disk.raw disk.raw", 1, &["not touched"]),
        // The file that the content is in.
        ("--format qcow2 --allow disk.raw --to-format raw --force top.qcow2 disk.raw", 1, &["not touched"]),
        ("--format qcow2 --to-format raw top.qcow2 new.raw", 3, &["--allow"]),
        ("--format raw --to-format vmdk disk.raw new.vmdk", 5, &["cannot make new images"]),
        ("--format raw --to-format raw --compress disk.raw new.raw", 5, &["cannot compress"]),
        ("--format raw --to-format qcow2 -o colour=red disk.raw new.qcow2", 1, &["colour"]),
        ("--format raw --to-format qcow2 -o help disk.raw new.qcow2", 1, &["create --format qcow2 -o help"]),
        ("--format raw --to-format qcow2 disk.raw nowhere/new.qcow2", 1, &["nowhere"]),
        ("--format raw --to-format qcow2 nothing.raw new.qcow2", 1, &["nothing.raw"]),
        ("--format raw --to-format qcow2 --compress --preallocation full disk.raw new.qcow2", 2, &["--compress"]),
    ] {
        place.ends(&format!("convert {arguments}"), code, words);
    }
    {
        let _user = place.in_use("raw", "disk.raw", false);
        place.ends("convert --format raw --to-format qcow2 disk.raw new.qcow2", 1, &["in use"]);
        place.ok("convert --force-share --format raw --to-format qcow2 disk.raw shared.qcow2");
        std::fs::remove_file(place.path("shared.qcow2")).unwrap();
    }
    assert!([place.bytes("disk.raw"), place.bytes("top.qcow2"), place.bytes("there.raw")] == before, "written to");
    assert_eq!(place.names(), names);
}

/// Only what was there, and locked, when the command began is replaced: somebody may have begun to use another file.
#[test]
fn what_was_made_meanwhile_is_not_replaced() {
    let Some(place) = Place::new() else { return };
    place.raw("new.raw", 64 << 20, &[(0, 64 << 20)]);
    for was_there in [false, true] {
        if was_there {
            place.qemu_img("create -q -f qcow2 old.qcow2 1M");
        }
        let mut command = place.command("convert --force --format raw --to-format qcow2 --compress new.raw old.qcow2");
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let is_partial = |name: &String| name.ends_with(".partial") && place.bytes(name).len() > 1 << 20;
        while !place.names().iter().any(is_partial) {
            assert!(child.try_wait().unwrap().is_none(), "it is complete already");
        }
        kill_process(Pid::from_child(&child), Signal::STOP).unwrap();
        assert!(child.try_wait().unwrap().is_none(), "it is complete already");
        place.qemu_img("create -q -f qcow2 theirs.qcow2 3M");
        let theirs = place.bytes("theirs.qcow2");
        std::fs::rename(place.path("theirs.qcow2"), place.path("old.qcow2")).unwrap();
        kill_process(Pid::from_child(&child), Signal::CONT).unwrap();
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(stderr.contains("old.qcow2 was made by somebody else meanwhile, and was not replaced"), "{stderr}");
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(place.bytes("old.qcow2") == theirs, "it was replaced");
        assert!(!place.names().iter().any(is_partial), "something is left behind");
    }
}

/// Who could not read an image cannot read what takes its place.
#[test]
fn what_is_replaced_leaves_its_mode() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
    let Some(place) = Place::new() else { return };
    place.raw("new.raw", 1 << 20, &[(0, 4096)]);
    // As far as the umask lets others have something.
    let usual = std::fs::metadata(place.path("new.raw")).unwrap().mode() & 0o044;
    // Only root can give files away; to which group does not matter.
    for (mode, group, expected) in [
        (0o600, None, 0o600),
        (0o640, None, 0o640),
        (0o444, None, 0o644),
        (0o777, None, 0o666),
        (0o640, Some(5678), 0o600),
        (0o644, Some(5678), 0o644),
        (0o664, Some(5678), 0o644),
        (0o666, Some(5678), 0o666),
    ] {
        for command in
            ["convert --force --format raw --to-format qcow2 new.raw", "create --force --format qcow2 --size 1M"]
        {
            let old = place.path("old.qcow2");
            place.qemu_img("create -q -f qcow2 old.qcow2 1M");
            std::fs::set_permissions(&old, std::fs::Permissions::from_mode(mode)).unwrap();
            if group.is_some_and(|group| chown(&old, None, Some(group)).is_err()) {
                continue;
            }
            place.ok(&format!("{command} old.qcow2"));
            let now = std::fs::metadata(&old).unwrap().mode() & 0o777;
            assert!(now & !expected == 0 && now & 0o600 == 0o600, "{mode:o} {group:?}: {command}: {now:o}");
            assert!(expected & usual & !now == 0, "{mode:o} {group:?}: {command}: {now:o}");
            std::fs::remove_file(&old).unwrap();
        }
    }
}

/// Nobody begins to use what is replaced in the end: all that they wrote would be gone.
#[test]
fn what_is_replaced_is_locked_until_it_is() {
    let Some(place) = Place::new() else { return };
    // To compress what cannot be compressed takes a second or more.
    place.raw("new.raw", 64 << 20, &[(0, 64 << 20)]);
    place.qemu_img("create -q -f qcow2 old.qcow2 1M");
    let mut command = place.command("convert --force --format raw --to-format qcow2 --compress new.raw old.qcow2");
    let mut child = command.stdout(Stdio::null()).spawn().unwrap();
    let is_partial = |name: &String| name.ends_with(".partial") && place.bytes(name).len() > 1 << 20;
    while !place.names().iter().any(is_partial) {
        assert!(child.try_wait().unwrap().is_none(), "it is complete already");
    }
    kill_process(Pid::from_child(&child), Signal::STOP).unwrap();
    assert!(child.try_wait().unwrap().is_none(), "it is complete already");
    place.ends("resize --format qcow2 old.qcow2 2M", 1, &["in use"]);
    let refused = place.qemu("qemu-io", "-f qcow2 -c quit old.qcow2");
    kill_process(Pid::from_child(&child), Signal::CONT).unwrap();
    assert!(!refused.status.success() && refused.stderr.contains("lock"), "{refused:?}");
    assert!(child.wait().unwrap().success());
    place.same(("qcow2", "old.qcow2"), ("raw", "new.raw"));
    place.ok("resize --format qcow2 old.qcow2 65M");
}
