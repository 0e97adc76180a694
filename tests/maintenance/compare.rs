//! `blockhouse compare`.

use std::os::unix::fs::FileExt;

use crate::place::Place;

const MIB: u64 = 1 << 20;

#[test]
fn across_formats_and_to_the_byte() {
    let Some(place) = Place::new() else { return };
    place.raw("disk.raw", 6 * MIB, &[(0, 100_000), (3 << 20, 1 << 20)]);
    place.qemu_img("convert -f raw -O qcow2 -c disk.raw a.qcow2");
    place.qemu_img("convert -f raw -O vmdk disk.raw a.vmdk");
    assert_eq!(place.ok("compare --format-a raw --format-b qcow2 disk.raw a.qcow2"), "equal\n");
    assert_eq!(place.ok("compare --strict --format-a vmdk --format-b qcow2 a.vmdk a.qcow2"), "equal\n");

    // In data, in a hole, in the last byte; each way round.
    for at in [0, 99_999, 2 * MIB + 17, 3 * MIB + 70_000, 6 * MIB - 1] {
        std::fs::copy(place.path("disk.raw"), place.path("other.raw")).unwrap();
        let file = std::fs::File::options().read(true).write(true).open(place.path("other.raw")).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
        for arguments in
            ["--format-a raw --format-b qcow2 other.raw a.qcow2", "--format-a vmdk --format-b raw a.vmdk other.raw"]
        {
            let outcome = place.run(&format!("compare {arguments}"));
            assert_eq!(outcome.status.code(), Some(8), "{arguments}: {}{}", outcome.text(), outcome.stderr);
            assert!(outcome.text().contains(&format!("byte {at}\n")), "{at}: {}", outcome.text());
            let outcome = place.run(&format!("compare --json {arguments}"));
            let report: serde_json::Value = serde_json::from_str(&outcome.text()).unwrap();
            assert_eq!((&report["equal"], &report["first_difference"]), (&false.into(), &at.into()), "{report}");
        }
    }
}

#[test]
fn sizes() {
    let Some(place) = Place::new() else { return };
    place.raw("short.raw", MIB, &[(0, 1 << 20)]);
    std::fs::copy(place.path("short.raw"), place.path("long.raw")).unwrap();
    let long = std::fs::File::options().write(true).open(place.path("long.raw")).unwrap();
    long.set_len(1 << 40).unwrap();
    for (one, other) in [("short.raw", "long.raw"), ("long.raw", "short.raw")] {
        let arguments = format!("--format-a raw --format-b raw {one} {other}");
        let text = place.ok(&format!("compare {arguments}"));
        assert!(text.starts_with("equal, but the sizes are"), "{text}");
        place.ends(&format!("compare --strict {arguments}"), 8, &[]);
    }
    long.write_all_at(&[0, 1], 5 << 20).unwrap();
    let outcome = place.run("compare --format-a raw --format-b raw short.raw long.raw");
    assert_eq!(outcome.status.code(), Some(8));
    assert!(outcome.text().contains(&format!("byte {}\n", (5 << 20) + 1)), "{}", outcome.text());
}

#[test]
fn errors_are_no_difference() {
    let Some(place) = Place::new() else { return };
    place.raw("disk.raw", MIB, &[]);
    place.qemu_img("create -q -f qcow2 -b disk.raw -F raw top.qcow2");
    place.ends("compare --format-a raw --format-b qcow2 disk.raw top.qcow2", 3, &["--allow"]);
    place.ok("compare --format-a raw --format-b qcow2 --allow disk.raw disk.raw top.qcow2");
    place.ends("compare --format-a raw --format-b qcow2 disk.raw disk.raw", 4, &["disk.raw"]);
    place.ends("compare --format-a raw --format-b raw disk.raw nothing.raw", 1, &["nothing.raw"]);
}
