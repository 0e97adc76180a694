//! `blockhouse rebase`.

use crate::place::Place;

const MIB: u64 = 1 << 20;

/// The disk reads as before, whatever the old and the new backing file are.
#[test]
fn the_disk_stays_what_it_is() {
    let Some(place) = Place::new() else { return };
    place.raw("old.raw", 5 * MIB, &[(0, 1_500_000), (4 << 20, 300_000)]);
    place.qemu_img("convert -f raw -O qcow2 -c old.raw same.qcow2");
    place.raw("short.raw", MIB + 700, &[(0, 1 << 20)]);
    place.qemu_img("create -q -f qcow2 -b old.raw -F raw deep.qcow2");
    place.qemu_io("qcow2", "deep.qcow2", &["write -P 6 3M 300k", "write -z 0 400k"]);
    place.qemu_img("create -q -f raw long.raw 9M");
    place.qemu_io("raw", "long.raw", &["write -P 8 0 9M"]);
    for overlay in ["", "-o cluster_size=512", "-o extended_l2=on", "-o compat=0.10", "-o cluster_size=2M"] {
        for (format, new) in
            [("qcow2", "same.qcow2"), ("raw", "short.raw"), ("qcow2", "deep.qcow2"), ("raw", "long.raw")]
        {
            let context = format!("{overlay}; {new}");
            place.qemu_img(&format!("create -q -f qcow2 {overlay} -b old.raw -F raw top.qcow2 {}", 6 * MIB + 512));
            place.qemu_io("qcow2", "top.qcow2", &["write -P 3 1M 5000", "write -z 600k 100k", "write -P 4 3M 200k"]);
            place.qemu_img("convert -f qcow2 -O raw top.qcow2 want.raw");
            let report = place.ok(&format!(
                "rebase --json --format qcow2 --allow old.raw --backing {new} --backing-format {format} top.qcow2"
            ));
            let last: serde_json::Value = serde_json::from_str(report.lines().last().unwrap()).unwrap();
            assert_eq!(last["backing"]["name"], new, "{last}");
            // Where a cluster is the overlay's in parts, all of it is copied.
            if new == "same.qcow2" && !overlay.contains("extended_l2") {
                assert_eq!(last["written_bytes"], 0, "{context}: what is alike was copied");
            }
            let info = place.info("qcow2", "top.qcow2");
            assert_eq!((&info["backing-filename"], &info["backing-filename-format"]), (&new.into(), &format.into()));
            place.flawless("top.qcow2");
            place.same(("qcow2", "top.qcow2"), ("raw", "want.raw"));
            // And back to none.
            place.ok(&format!("rebase --format qcow2 --allow {new} --allow old.raw --no-backing top.qcow2"));
            assert!(place.info("qcow2", "top.qcow2")["backing-filename"].is_null(), "{context}");
            place.flawless("top.qcow2");
            place.same(("qcow2", "top.qcow2"), ("raw", "want.raw"));
        }
    }
}

/// An image without a backing file gets one that is full of data: zeroes have to be said.
#[test]
fn onto_a_first_backing_file() {
    let Some(place) = Place::new() else { return };
    place.raw("base.raw", 4 * MIB, &[(0, 4 << 20)]);
    for options in ["", "-o compat=0.10", "-o extended_l2=on"] {
        place.qemu_img(&format!("create -q -f qcow2 {options} alone.qcow2 5M"));
        place.qemu_io("qcow2", "alone.qcow2", &["write -P 3 1M 5000"]);
        place.qemu_img("convert -f qcow2 -O raw alone.qcow2 want.raw");
        place.ok("rebase --format qcow2 --backing base.raw --backing-format raw alone.qcow2");
        assert_eq!(place.info("qcow2", "alone.qcow2")["backing-filename"], "base.raw");
        place.flawless("alone.qcow2");
        place.same(("qcow2", "alone.qcow2"), ("raw", "want.raw"));
    }
}

/// Only the name changes; nothing is opened, and nothing need be there.
#[test]
fn unsafe_changes_the_name() {
    let Some(place) = Place::new() else { return };
    place.raw("base.raw", MIB, &[(0, 1 << 20)]);
    place.qemu_img("create -q -f qcow2 -b base.raw -F raw top.qcow2");
    std::fs::rename(place.path("base.raw"), place.path("moved.raw")).unwrap();
    place.ends("rebase --format qcow2 --backing moved.raw --backing-format raw top.qcow2", 3, &["base.raw"]);
    place.ok("rebase --format qcow2 --unsafe --backing moved.raw --backing-format raw top.qcow2");
    place.flawless("top.qcow2");
    place.same(("qcow2", "top.qcow2"), ("raw", "moved.raw"));
    place.ok("rebase --format qcow2 --unsafe --backing elsewhere/gone.raw --backing-format raw top.qcow2");
    assert_eq!(place.info("qcow2", "top.qcow2")["backing-filename"], "elsewhere/gone.raw");
    // A reference without a format is not followed, and this is the way to give it one.
    place.qemu_img("create -q -f qcow2 old.qcow2 1M");
    place.qemu_img("rebase -u -f qcow2 -b moved.raw -F raw old.qcow2");
    place.ok("rebase --format qcow2 --unsafe --no-backing old.qcow2");
    assert!(place.info("qcow2", "old.qcow2")["backing-filename"].is_null());
}

/// What a snapshot does not hold itself it reads from the backing file, which nobody copies to it.
#[test]
fn snapshots_inside_keep_their_backing_file() {
    let Some(place) = Place::new() else { return };
    place.raw("base.raw", MIB, &[(0, 1 << 20)]);
    place.raw("other.raw", MIB, &[]);
    place.qemu_img("create -q -f qcow2 -b base.raw -F raw top.qcow2");
    place.qemu_img("create -q -f qcow2 alone.qcow2 1M");
    for image in ["top.qcow2", "alone.qcow2"] {
        place.ok(&format!("snapshot create --format qcow2 {image} before"));
    }
    let before = ["top.qcow2", "alone.qcow2"].map(|image| place.bytes(image));
    for arguments in [
        "--allow base.raw --no-backing top.qcow2",
        "--allow base.raw --backing other.raw --backing-format raw top.qcow2",
        "--backing base.raw --backing-format raw alone.qcow2",
    ] {
        place.ends(&format!("rebase --format qcow2 {arguments}"), 5, &["its snapshots (1)", "--unsafe"]);
    }
    assert!(["top.qcow2", "alone.qcow2"].map(|image| place.bytes(image)) == before, "written to");
    // A file that moved is still the same one.
    std::fs::rename(place.path("base.raw"), place.path("moved.raw")).unwrap();
    place.ok("rebase --format qcow2 --unsafe --backing moved.raw --backing-format raw top.qcow2");
    place.ok("read --format qcow2 --allow moved.raw --snapshot before --output before.raw top.qcow2");
    assert!(place.bytes("before.raw") == place.bytes("moved.raw"));
    // Without its snapshots it is an overlay as any other.
    place.ok("snapshot delete --format qcow2 top.qcow2 before");
    place.ok("rebase --format qcow2 --allow moved.raw --no-backing top.qcow2");
    place.same(("qcow2", "top.qcow2"), ("raw", "moved.raw"));
}

#[test]
fn what_cannot_be() {
    let Some(place) = Place::new() else { return };
    place.raw("base.raw", MIB, &[(0, 1 << 20)]);
    place.qemu_img("create -q -f qcow2 -b base.raw -F raw top.qcow2");
    place.qemu_img("create -q -f qcow2 -b top.qcow2 -F qcow2 above.qcow2");
    let before = [place.bytes("base.raw"), place.bytes("top.qcow2"), place.bytes("above.qcow2")];
    for (arguments, code, words) in [
        (
            "--format qcow2 --allow base.raw --backing top.qcow2 --backing-format qcow2 top.qcow2",
            1,
            &["below itself"][..],
        ),
        ("--format qcow2 --unsafe --backing ./top.qcow2 --backing-format qcow2 top.qcow2", 1, &["below itself"]),
        (
            "--format qcow2 --allow base.raw --allow top.qcow2 --backing above.qcow2 --backing-format qcow2 top.qcow2",
            1,
            &["below itself"],
        ),
        ("--format qcow2 --allow base.raw --backing gone.raw --backing-format raw top.qcow2", 1, &["gone.raw"]),
        ("--format qcow2 --no-backing top.qcow2", 3, &["--allow"]),
        ("--format raw --unsafe --no-backing base.raw", 5, &["cannot change the backing file"]),
        ("--format qcow2 --backing base.raw top.qcow2", 2, &["--backing-format"]),
        ("--format qcow2 top.qcow2", 2, &["--backing"]),
    ] {
        place.ends(&format!("rebase {arguments}"), code, words);
    }
    {
        let _user = place.in_use("qcow2", "top.qcow2", true);
        place.ends("rebase --format qcow2 --unsafe --no-backing top.qcow2", 1, &["in use"]);
    }
    assert!([place.bytes("base.raw"), place.bytes("top.qcow2"), place.bytes("above.qcow2")] == before, "written to");
}
