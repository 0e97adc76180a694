//! `blockhouse snapshot create`, `apply` and `delete`.

use crate::place::Place;

/// Snapshots that Blockhouse made, applied and deleted by QEMU, and the other way round.
#[test]
fn in_turns_with_qemu() {
    let Some(place) = Place::new() else { return };
    place.raw("disk.raw", 4 << 20, &[(0, 1_500_000)]);
    for options in ["", "-o cluster_size=4k", "-o extended_l2=on,cluster_size=32k", "-c", "-o compat=0.10"] {
        place.qemu_img(&format!("convert -f raw -O qcow2 {options} disk.raw vm.qcow2"));
        let keep = |name: &str| place.qemu_img(&format!("convert -f qcow2 -O raw vm.qcow2 {name}.raw"));

        keep("one");
        let created = place.json("snapshot create --json --format qcow2 vm.qcow2 one");
        assert_eq!((created["id"].as_str(), created["name"].as_str()), (Some("1"), Some("one")));
        place.flawless("vm.qcow2");
        place.qemu_io("qcow2", "vm.qcow2", &["write -P 1 1M 300k", "write -P 2 3M 64k"]);
        keep("two");
        place.qemu_img("snapshot -c two vm.qcow2");
        place.qemu_io("qcow2", "vm.qcow2", &["write -P 3 0 200k", "discard 3M 64k"]);
        keep("three");
        assert!(place.ok("snapshot create --format qcow2 vm.qcow2 three").starts_with("id 3"));
        place.flawless("vm.qcow2");

        let listed = place.info("qcow2", "vm.qcow2");
        let names: Vec<_> = listed["snapshots"].as_array().unwrap().iter().map(|one| &one["name"]).collect();
        assert_eq!(names, ["one", "two", "three"], "{options}");
        let age =
            listed["snapshots"][2]["date-sec"].as_i64().unwrap() - listed["snapshots"][1]["date-sec"].as_i64().unwrap();
        assert!((0..3600).contains(&age), "{options}: {age} seconds between two snapshots");

        for (name, by_us) in [("two", true), ("one", false), ("three", true), ("one", true), ("two", false)] {
            if by_us {
                place.ok(&format!("snapshot apply --format qcow2 vm.qcow2 {name}"));
            } else {
                place.qemu_img(&format!("snapshot -a {name} vm.qcow2"));
            }
            place.flawless("vm.qcow2");
            place.same(("qcow2", "vm.qcow2"), ("raw", &format!("{name}.raw")));
            place.qemu_io("qcow2", "vm.qcow2", &["write -P 9 500k 1M"]);
        }
        // By id, by name, by QEMU.
        place.ok("snapshot delete --format qcow2 vm.qcow2 1");
        place.flawless("vm.qcow2");
        place.qemu_img("snapshot -d three vm.qcow2");
        place.qemu_img("convert -f qcow2 -l two -O raw vm.qcow2 kept.raw");
        place.same(("raw", "kept.raw"), ("raw", "two.raw"));
        place.ok("snapshot delete --format qcow2 vm.qcow2 two");
        place.flawless("vm.qcow2");
        assert_eq!(place.ok("snapshot list --format qcow2 vm.qcow2"), "");
    }
}

/// No file that an image refers to is needed to change its snapshots, and none is opened.
#[test]
fn overlays_need_no_grant() {
    let Some(place) = Place::new() else { return };
    place.raw("base.raw", 1 << 20, &[(0, 1 << 20)]);
    place.qemu_img("create -q -f qcow2 -b base.raw -F raw top.qcow2");
    place.ok("snapshot create --format qcow2 top.qcow2 clean");
    place.qemu_io("qcow2", "top.qcow2", &["write -P 1 0 1M"]);
    place.ok("snapshot apply --format qcow2 top.qcow2 clean");
    place.same(("qcow2", "top.qcow2"), ("raw", "base.raw"));
    place.flawless("top.qcow2");
}

#[test]
fn what_cannot_be() {
    let Some(place) = Place::new() else { return };
    place.qemu_img("create -q -f qcow2 vm.qcow2 1M");
    place.raw("disk.raw", 1 << 20, &[]);
    place.ok("snapshot create --format qcow2 vm.qcow2 one");
    place.ok("snapshot create --format qcow2 vm.qcow2 one");
    let before = place.bytes("vm.qcow2");
    for (arguments, code, words) in [
        ("apply --format qcow2 vm.qcow2 two", 1, &["two"][..]),
        ("delete --format qcow2 vm.qcow2 two", 1, &["two"]),
        // Two have the name.
        ("delete --format qcow2 vm.qcow2 one", 1, &["one"]),
        ("create --format raw disk.raw one", 5, &["snapshots"]),
        ("create --format qcow2 nothing.qcow2 one", 1, &["nothing.qcow2"]),
        ("create --format qcow2 vm.qcow2", 2, &["NAME"]),
    ] {
        place.ends(&format!("snapshot {arguments}"), code, words);
    }
    {
        let _user = place.in_use("qcow2", "vm.qcow2", false);
        for command in ["create --format qcow2 vm.qcow2 two", "apply --format qcow2 vm.qcow2 1"] {
            place.ends(&format!("snapshot {command}"), 1, &["in use"]);
        }
    }
    assert!(place.bytes("vm.qcow2") == before, "a refused command wrote");
}
