//! `blockhouse resize`.

use crate::place::Place;

const MIB: u64 = 1 << 20;

/// Sizes that are not those of clusters, up and down, against `qemu-img resize` of a copy.
#[test]
fn sizes_up_and_down() {
    let Some(place) = Place::new() else { return };
    place.raw("disk.raw", 5 * MIB + 1536, &[(0, 300_000), (5 << 20, 1536)]);
    for (number, options) in
        ["", "-o cluster_size=4k", "-o extended_l2=on,cluster_size=16k", "-o compat=0.10", "-c", "-o cluster_size=512"]
            .into_iter()
            .enumerate()
    {
        let (ours, theirs) = (format!("ours{number}.qcow2"), format!("theirs{number}.qcow2"));
        place.qemu_img(&format!("convert -f raw -O qcow2 {options} disk.raw {ours}"));
        std::fs::copy(place.path(&ours), place.path(&theirs)).unwrap();
        for (size, shrink) in
            [("6M", false), ("+1536", false), ("2M", true), ("-512", true), ("70M", false), ("64K", true)]
        {
            let shrinks = if shrink { "--shrink" } else { "" };
            if shrink {
                let before = place.bytes(&ours);
                place.ends(&format!("resize --format qcow2 {ours} {size}"), 1, &["--shrink"]);
                assert!(place.bytes(&ours) == before, "{options} {size}: a refused command wrote");
            }
            let report = place.json(&format!("resize --json --format qcow2 {shrinks} {ours} {size}"));
            place.qemu_img(&format!("resize -q -f qcow2 {shrinks} {theirs} {size}"));
            let new = place.info("qcow2", &ours)["virtual-size"].clone();
            assert_eq!(report["virtual_size_bytes"], new, "{options} {size}");
            place.flawless(&ours);
            place.same(("qcow2", &ours), ("qcow2", &theirs));
            // What `-512` cuts off, QEMU shows again when the disk grows; here it is zero.
            if size != "2M" {
                // Written at the new end, by QEMU, to see that it can be.
                let last = new.as_u64().unwrap() - 512;
                for image in [&ours, &theirs] {
                    place.qemu_io("qcow2", image, &[&format!("write -P 9 {last} 512")]);
                }
            }
        }
    }
    place.ok("resize --format raw disk.raw 9M");
    assert_eq!(place.bytes("disk.raw").len() as u64, 9 * MIB);
}

/// What a longer backing file holds past the old end does not come to light.
#[test]
fn what_is_added_reads_as_zero() {
    let Some(place) = Place::new() else { return };
    place.raw("base.raw", 8 * MIB, &[(0, 8 << 20)]);
    for options in ["", "-o compat=0.10", "-o extended_l2=on"] {
        place.qemu_img(&format!("create -q -f qcow2 {options} -b base.raw -F raw top.qcow2 {}", MIB + 512));
        place.ends("resize --format qcow2 top.qcow2 6M", 3, &["--allow"]);
        if options.contains("0.10") {
            place.ends("resize --format qcow2 --allow base.raw top.qcow2 6M", 5, &["version 2"]);
            continue;
        }
        place.ok("resize --format qcow2 --allow base.raw top.qcow2 6M");
        place.flawless("top.qcow2");
        place.qemu_img("convert -f qcow2 -O raw top.qcow2 now.raw");
        let (now, base) = (place.bytes("now.raw"), place.bytes("base.raw"));
        let old = MIB as usize + 512;
        assert!(now[..old] == base[..old], "{options}: the disk changed");
        assert!(now[old..].iter().all(|byte| *byte == 0), "{options}: the backing file shows");
    }
}

#[test]
fn what_cannot_be() {
    let Some(place) = Place::new() else { return };
    place.qemu_img("create -q -f qcow2 disk.qcow2 4M");
    place.qemu_img("create -q -f vmdk disk.vmdk 4M");
    let before = place.bytes("disk.qcow2");
    for (arguments, code, words) in [
        ("--format qcow2 disk.qcow2 1000", 1, &["--shrink"][..]),
        ("--format qcow2 --shrink disk.qcow2 1000", 1, &["512"]),
        ("--format qcow2 --shrink disk.qcow2 -5M", 1, &["cannot lose"]),
        ("--format qcow2 disk.qcow2 much", 2, &["much"]),
        ("--format qcow2 disk.qcow2 ++1M", 2, &["++1M"]),
        ("--format vmdk disk.vmdk 5M", 5, &["cannot change the size"]),
        ("--format qcow2 nothing.qcow2 5M", 1, &["nothing.qcow2"]),
    ] {
        place.ends(&format!("resize {arguments}"), code, words);
    }
    // What is behind the end of the disk in a file of its own may be somebody's.
    place.qemu_img("create -q -f qcow2 -o data_file=data.raw,data_file_raw=on outside.qcow2 1000448");
    let mut data = place.bytes("data.raw");
    data.extend(b"not of the disk");
    std::fs::write(place.path("data.raw"), &data).unwrap();
    place.ends("resize --format qcow2 --allow-write data.raw outside.qcow2 +1M", 5, &["a file of its own"]);
    assert!(place.bytes("data.raw") == data);
    {
        let _user = place.in_use("qcow2", "disk.qcow2", false);
        place.ends("resize --format qcow2 disk.qcow2 5M", 1, &["in use"]);
    }
    assert!(place.bytes("disk.qcow2") == before, "a refused command wrote");
    place.ok("resize --format qcow2 disk.qcow2 4M");
    assert!(place.bytes("disk.qcow2") == before, "the same size is no change");
}
