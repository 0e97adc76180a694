//! Images that are well made and not read, or not written: the message names the feature, the exit code
//! its kind.

use blockhouse_tests::{blockhouse, run};
use serde_json::Value;

use crate::case::{Subject, have_qemu};
use crate::commands::ended;
use crate::info::fact;
use crate::lab::Lab;

/// Where the incompatible features of a version 3 header are, 8 bytes with the highest first.
const INCOMPATIBLE: u64 = 72;

fn subject() -> Subject {
    Subject::new("a.qcow2", "qcow2")
}

fn image(lab: &Lab) {
    let _ = std::fs::remove_file(lab.path("a.qcow2"));
    lab.qemu_img("create -q -f qcow2 a.qcow2 1M");
    lab.qemu_io("qcow2", "a.qcow2", &["write -q -P 5 0 64k".to_owned()]);
}

/// Every command refuses the image as unsupported, with these words.
#[track_caller]
fn refused(lab: &Lab, words: &[&str]) {
    for command in ["info", "map", "read"] {
        let outcome = run(&mut subject().command(lab, command));
        ended(&outcome, 5, words);
        assert_eq!(outcome.text(), "", "{command}");
    }
    // The same for programs.
    let outcome = run(subject().command(lab, "info").arg("--json"));
    assert_eq!(outcome.status.code(), Some(5));
    let report: Value = serde_json::from_str(&outcome.text()).unwrap();
    assert_eq!(report["error"]["kind"], "unsupported");
    assert_eq!(report["error"]["image"], lab.absolute("a.qcow2"));
    let message = report["error"]["message"].as_str().unwrap();
    assert!(words.iter().all(|word| message.contains(word)), "{message}");
}

#[test]
fn encrypted_images() {
    if !have_qemu() {
        return;
    }
    let lab = Lab::new();
    for (method, name) in [("luks,encrypt.iter-time=10", "LUKS"), ("aes", "AES")] {
        let _ = std::fs::remove_file(lab.path("a.qcow2"));
        lab.qemu_img(&format!(
            "create -q -f qcow2 --object secret,id=s,data=secret \
             -o encrypt.key-secret=s,encrypt.format={method} a.qcow2 1M"
        ));
        refused(&lab, &["encryption", name]);
    }
}

#[test]
fn unknown_incompatible_features() {
    if !have_qemu() {
        return;
    }
    let lab = Lab::new();
    for bit in [5u32, 17, 40, 63] {
        image(&lab);
        lab.poke("a.qcow2", INCOMPATIBLE, &(1u64 << bit).to_be_bytes());
        refused(&lab, &["unknown incompatible features", &format!("bit {bit}")]);
    }
    // By the name that the image has for it, where it has one.
    image(&lab);
    let mut bytes = std::fs::read(lab.path("a.qcow2")).unwrap();
    let name = b"lazy refcounts";
    let at = bytes.windows(name.len()).position(|window| window == name).unwrap();
    // An entry of the feature name table: kind 0 is incompatible, then the bit.
    bytes[at - 2..at].copy_from_slice(&[0, 9]);
    bytes[at..at + name.len()].copy_from_slice(b"time travelled");
    bytes[72..80].copy_from_slice(&(1u64 << 9).to_be_bytes());
    lab.write("a.qcow2", &bytes);
    refused(&lab, &["unknown incompatible features", "time travelled"]);
}

/// Dirty and corrupt images are read, with a word about it. To be written, a dirty one is repaired, and a
/// corrupt one is refused.
#[test]
fn dirty_and_corrupt_images() {
    if !have_qemu() {
        return;
    }
    let lab = Lab::new();
    for (bit, name) in [(0u32, "dirty"), (1, "corrupt")] {
        image(&lab);
        lab.poke("a.qcow2", INCOMPATIBLE, &(1u64 << bit).to_be_bytes());
        let info = run(subject().command(&lab, "info").arg("--json")).succeeded();
        let report: Value = serde_json::from_str(&info.text()).unwrap();
        assert_eq!(fact(&report["layers"][0], name), "yes");
        let read = run(subject().command(&lab, "read").args(["--length", "64K"])).succeeded();
        assert!(read.stdout == [5; 64 << 10]);
        if name == "corrupt" {
            assert!(read.stderr.contains("marked corrupt"), "{}", read.stderr);
        }
        let disk = format!("file={},format=qcow2", lab.absolute("a.qcow2"));
        let outcome = run(blockhouse().args(["run", "--disk", &disk]));
        if name == "corrupt" {
            ended(&outcome, 4, &["a.qcow2", "marked corrupt"]);
        } else {
            outcome.succeeded();
            let info = run(subject().command(&lab, "info").arg("--json")).succeeded();
            let report: Value = serde_json::from_str(&info.text()).unwrap();
            assert_eq!(fact(&report["layers"][0], name), "no", "it was written, and not repaired before");
        }
    }
}

/// A snapshot is named by id or by a name that only it has; else the choice is shown.
#[test]
fn snapshots_that_are_not_there() {
    if !have_qemu() {
        return;
    }
    let lab = Lab::new();
    image(&lab);
    for name in ["first", "twice", "twice"] {
        lab.qemu_img(&format!("snapshot -q -c {name} a.qcow2"));
    }
    let snapshot = |key: &str| run(&mut subject().snapshot(key, "").command(&lab, "read"));
    let choice = "\"1\": \"first\", \"2\": \"twice\", \"3\": \"twice\"";
    for key in ["none", "", "4", "0", "firs"] {
        ended(&snapshot(key), 1, &["there is no snapshot", choice]);
    }
    ended(&snapshot("twice"), 1, &["2 snapshots have the name", choice]);
    assert_eq!(snapshot("2").succeeded().stdout.len(), 1 << 20);
}

/// What VMDK images may be and QEMU does not make.
#[test]
fn vmdk_kinds_that_are_not_read() {
    let lab = Lab::new();
    for kind in ["fullDevice", "vmfsSparse", "seSparse"] {
        lab.write(
            "a.vmdk",
            format!(
                "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"{kind}\"\n\
                 RW 8 FLAT \"secret\" 0\n"
            )
            .as_bytes(),
        );
        let outcome = run(&mut Subject::new("a.vmdk", "vmdk").allow(&["."]).command(&lab, "info"));
        ended(&outcome, 5, &[kind]);
    }
}
