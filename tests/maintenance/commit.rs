//! `blockhouse commit`.

use crate::place::Place;

const MIB: u64 = 1 << 20;

/// What overlays of every kind hold ends up in bases of every kind, as `qemu-img commit` does it to copies.
#[test]
fn overlays_and_bases() {
    let Some(place) = Place::new() else { return };
    place.raw("deep.raw", 5 * MIB, &[(0, 2 << 20)]);
    let bases = [
        ("raw", "create -q -f raw base 5M"),
        ("qcow2", "create -q -f qcow2 -o cluster_size=2M base 5M"),
        ("qcow2", "create -q -f qcow2 -o compat=0.10,cluster_size=4k -b deep.raw -F raw base"),
        ("qcow2", "create -q -f qcow2 -o extended_l2=on -b deep.raw -F raw base"),
    ];
    let overlays = ["", "-o cluster_size=512", "-o extended_l2=on,cluster_size=16k", "-o compat=0.10"];
    for (number, ((base_format, base), overlay)) in
        bases.iter().flat_map(|base| overlays.iter().map(move |overlay| (base, overlay))).enumerate()
    {
        // The overlay may be shorter, as long, or longer: by a part of a cluster.
        let size = [5 * MIB, 4 * MIB + 512, 6 * MIB + 1536][number % 3];
        let context = format!("{base}; {overlay}; {size}");
        place.qemu_img(base);
        place.qemu_io(base_format, "base", &["write -P 1 512k 700k", "write -P 2 4M 64k"]);
        place.qemu_img(&format!("create -q -f qcow2 {overlay} -b base -F {base_format} top.qcow2 {size}"));
        place.qemu_io("qcow2", "top.qcow2", &["write -P 3 1M 5000", "write -z 600k 100k", "write -P 4 3M 200k"]);
        place.qemu_io("qcow2", "top.qcow2", &[&format!("write -P 5 {} 512", size - 512)]);
        place.qemu_img("convert -f qcow2 -O raw top.qcow2 want.raw");
        std::fs::copy(place.path("base"), place.path("old")).unwrap();

        let before = place.bytes("top.qcow2");
        place.ok(&format!("commit --format qcow2 --allow deep.raw --base base --base-format {base_format} top.qcow2"));
        assert!(place.bytes("top.qcow2") == before, "{context}: the overlay was written to");
        place.same(("qcow2", "top.qcow2"), ("raw", "want.raw"));
        if *base_format == "qcow2" {
            place.flawless("base");
        }
        let virtual_size = place.info(base_format, "base")["virtual-size"].as_u64().unwrap();
        assert_eq!(virtual_size, size.max(5 * MIB), "{context}");
        place.qemu_img(&format!("convert -f {base_format} -O raw base now.raw"));
        place.qemu_img(&format!("convert -f {base_format} -O raw old old.raw"));
        let (now, old, want) = (place.bytes("now.raw"), place.bytes("old.raw"), place.bytes("want.raw"));
        assert!(now[..want.len()] == want[..], "{context}: the base does not read as the overlay");
        if now.len() > want.len() {
            assert!(now[want.len()..] == old[want.len()..], "{context}: the end of the base changed");
        }
    }
}

/// A raw base of an odd size, zeroes that give space back, progress and report.
#[test]
fn zeroes_give_space_back() {
    let Some(place) = Place::new() else { return };
    place.raw("base.raw", 8 * MIB, &[(0, 8 << 20)]);
    place.qemu_img("create -q -f qcow2 -b base.raw -F raw top.qcow2");
    place.qemu_io("qcow2", "top.qcow2", &["write -z 0 6M", "write -P 1 7M 100k"]);
    let text = place.ok("commit --json --format qcow2 --base base.raw --base-format raw top.qcow2");
    let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!((&last["event"], &last["zeroed_bytes"]), (&"done".into(), &(6 * MIB).into()), "{last}");
    assert!(place.space("base.raw") <= 3 * MIB, "{} bytes", place.space("base.raw"));
    place.same(("qcow2", "top.qcow2"), ("raw", "base.raw"));
}

#[test]
fn what_cannot_be() {
    let Some(place) = Place::new() else { return };
    place.raw("base.raw", MIB, &[(0, 1 << 20)]);
    place.raw("other.raw", MIB, &[(0, 1 << 20)]);
    place.qemu_img("create -q -f qcow2 -b base.raw -F raw top.qcow2 2M");
    place.qemu_img("create -q -f qcow2 alone.qcow2 2M");
    // The file, under another name.
    std::os::unix::fs::symlink("base.raw", place.path("link.raw")).unwrap();
    let before = [place.bytes("base.raw"), place.bytes("other.raw"), place.bytes("top.qcow2")];
    for (arguments, code, words) in [
        ("--allow base.raw --base other.raw --base-format raw top.qcow2", 1, &["not the backing file", "base.raw"][..]),
        ("--base other.raw --base-format raw top.qcow2", 3, &["--allow"]),
        ("--base base.raw --base-format qcow2 top.qcow2", 1, &["states the format"]),
        ("--base base.raw --base-format raw alone.qcow2", 1, &["no backing file"]),
        ("--base nothing.raw --base-format raw top.qcow2", 1, &["nothing.raw"]),
        ("--base base.raw top.qcow2", 2, &["--base-format"]),
    ] {
        place.ends(&format!("commit --format qcow2 {arguments}"), code, words);
    }
    for (image, format, code) in [("base.raw", "raw", 3), ("top.qcow2", "qcow2", 1)] {
        let _user = place.in_use(format, image, false);
        place.ends("commit --format qcow2 --base base.raw --base-format raw top.qcow2", code, &["in use"]);
    }
    assert!([place.bytes("base.raw"), place.bytes("other.raw"), place.bytes("top.qcow2")] == before, "written to");
    place.ok("commit --format qcow2 --allow base.raw --base link.raw --base-format raw top.qcow2");
    assert_eq!(place.bytes("base.raw").len() as u64, 2 * MIB);
}
