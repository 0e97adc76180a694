//! `blockhouse snapshot list`.

use blockhouse_tests::{blockhouse, run};
use serde_json::Value;

use crate::case::have_qemu;
use crate::commands::ended;
use crate::lab::Lab;

#[test]
fn snapshot_list() {
    if !have_qemu() {
        return;
    }
    let lab = Lab::new();
    let list = |image: &str, more: &[&str]| {
        let image = lab.root().join(image);
        run(blockhouse().args(["snapshot", "list", "--format", "qcow2"]).args(more).arg(image))
    };
    lab.qemu_img("create -q -f qcow2 base.qcow2 1M");
    lab.qemu_img("create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2");
    assert_eq!(list("base.qcow2", &[]).succeeded().text(), "");
    // Nothing was listed and the chain does not open: not an empty list.
    ended(&list("top.qcow2", &[]), 3, &["--allow"]);

    lab.qemu_img("snapshot -q -c first top.qcow2");
    lab.qemu_img("snapshot -q -c second top.qcow2");
    let theirs: Value = serde_json::from_str(&lab.qemu_img("info --output=json top.qcow2")).unwrap();
    let ours: Value = serde_json::from_str(&list("top.qcow2", &["--json"]).succeeded().text()).unwrap();
    let (ours, theirs) = (ours.as_array().unwrap(), theirs["snapshots"].as_array().unwrap());
    assert_eq!((ours.len(), theirs.len()), (2, 2));
    for (our, their) in ours.iter().zip(theirs) {
        for (name, their_name) in
            [("id", "id"), ("name", "name"), ("vm_state_bytes", "vm-state-size"), ("created_at_seconds", "date-sec")]
        {
            assert_eq!(our[name], their[their_name], "{name}");
        }
    }
    let text = list("top.qcow2", &[]).succeeded().text();
    assert_eq!(text.lines().count(), 2, "{text}");
    assert!(text.contains("name \"second\""), "{text}");
}
