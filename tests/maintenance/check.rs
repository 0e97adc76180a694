//! `blockhouse check`.

use std::os::unix::fs::FileExt;

use serde_json::Value;

use crate::place::Place;

const EXAMINED: &str = "check --format qcow2";

/// What `blockhouse check --json` says, and its exit code.
#[track_caller]
fn check(place: &Place, more: &str) -> (Value, i32) {
    let outcome = place.run(&format!("{EXAMINED} --json {more}"));
    let report = serde_json::from_str(&outcome.text()).unwrap_or_else(|_| panic!("{}", outcome.stderr));
    (report, outcome.status.code().unwrap())
}

fn poke(place: &Place, image: &str, offset: u64, bytes: &[u8]) {
    std::fs::File::options().write(true).open(place.path(image)).unwrap().write_all_at(bytes, offset).unwrap();
}

fn number(place: &Place, image: &str, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    std::fs::File::open(place.path(image)).unwrap().read_exact_at(&mut bytes, offset).unwrap();
    u64::from_be_bytes(bytes)
}

/// Images that QEMU made, consistent ones, and what QEMU counts in them.
#[test]
fn consistent_images() {
    let Some(place) = Place::new() else { return };
    place.raw("disk.raw", 6 << 20, &[(0, 1_000_000), (5 << 20, 70_000)]);
    for (number, options) in
        ["", "-c", "-o cluster_size=4k,extended_l2=off", "-o extended_l2=on", "-o refcount_bits=1", "-o compat=0.10"]
            .into_iter()
            .enumerate()
    {
        let image = format!("{number}.qcow2");
        place.qemu_img(&format!("convert -f raw -O qcow2 {options} disk.raw {image}"));
        if !options.contains("refcount_bits=1") {
            place.qemu_img(&format!("snapshot -c one {image}"));
            place.qemu_io("qcow2", &image, &["write -P 7 100k 200k"]);
        }
        let (ours, code) = check(&place, &image);
        let theirs: Value = serde_json::from_str(&place.qemu_img(&format!("check --output=json {image}"))).unwrap();
        assert_eq!(code, 0, "{options}: {ours}");
        assert_eq!((&ours["corruptions"], &ours["leaks"]), (&0.into(), &0.into()), "{options}: {ours}");
        for (our, their) in [
            ("total_clusters", "total-clusters"),
            ("allocated_clusters", "allocated-clusters"),
            ("compressed_clusters", "compressed-clusters"),
            ("image_end_bytes", "image-end-offset"),
        ] {
            assert_eq!(ours[our].as_u64(), Some(theirs[their].as_u64().unwrap_or(0)), "{options}: {our}: {theirs}");
        }
        assert!(place.ok(&format!("{EXAMINED} {image}")).contains("consistent"));
    }
}

/// Space that is lost is no harm: found, told by its own exit code, and given back if asked.
#[test]
fn leaks() {
    let Some(place) = Place::new() else { return };
    place.raw("disk.raw", 1 << 20, &[(0, 1 << 20)]);
    place.qemu_img("convert -f raw -O qcow2 disk.raw leaky.qcow2");
    // The entry of an L2 table that maps guest cluster 3 is forgotten: its data cluster is leaked.
    let l2 = number(&place, "leaky.qcow2", number(&place, "leaky.qcow2", 40)) & 0x00ff_ffff_ffff_fe00;
    poke(&place, "leaky.qcow2", l2 + 3 * 8, &[0; 8]);
    assert_eq!(place.wrong("leaky.qcow2"), (0, 1));

    let before = place.bytes("leaky.qcow2");
    let (report, code) = check(&place, "leaky.qcow2");
    assert_eq!((code, &report["leaks"], &report["leaks_repaired"]), (7, &1.into(), &0.into()), "{report}");
    assert!(!report["findings"].as_array().unwrap().is_empty(), "{report}");
    let text = place.run(&format!("{EXAMINED} leaky.qcow2")).text();
    assert!(text.contains("--repair leaks"), "{text}");
    assert!(place.bytes("leaky.qcow2") == before, "a check without repair wrote");

    let (report, code) = check(&place, "--repair leaks leaky.qcow2");
    assert_eq!((code, &report["leaks"], &report["leaks_repaired"]), (0, &1.into(), &1.into()), "{report}");
    place.flawless("leaky.qcow2");
    assert_eq!(check(&place, "leaky.qcow2").1, 0);
}

/// A data cluster that is counted as free is a corruption: found, left alone by `leaks`, repaired by `all`.
#[test]
fn corruptions() {
    let Some(place) = Place::new() else { return };
    place.raw("disk.raw", 1 << 20, &[(0, 1 << 20)]);
    place.qemu_img("convert -f raw -O qcow2 disk.raw bad.qcow2");
    let l2 = number(&place, "bad.qcow2", number(&place, "bad.qcow2", 40)) & 0x00ff_ffff_ffff_fe00;
    let data = number(&place, "bad.qcow2", l2) & 0x00ff_ffff_ffff_fe00;
    let block = number(&place, "bad.qcow2", number(&place, "bad.qcow2", 48));
    poke(&place, "bad.qcow2", block + data / 65536 * 2, &[0, 0]);
    assert!(place.wrong("bad.qcow2").0 > 0);

    let (report, code) = check(&place, "bad.qcow2");
    assert_eq!(code, 4, "{report}");
    assert!(report["corruptions"].as_u64().unwrap() > 0, "{report}");
    assert_eq!(check(&place, "--repair leaks bad.qcow2").1, 4);
    let (report, code) = check(&place, "--repair all bad.qcow2");
    assert_eq!((code, &report["corruptions"]), (0, &report["corruptions_repaired"]), "{report}");
    place.flawless("bad.qcow2");
    place.same(("qcow2", "bad.qcow2"), ("raw", "disk.raw"));
}

#[test]
fn what_cannot_be_checked() {
    let Some(place) = Place::new() else { return };
    place.raw("disk.raw", 1 << 20, &[(0, 100)]);
    place.ends("check --format raw disk.raw", 5, &["cannot check images"]);
    place.ends("check --format qcow2 disk.raw", 4, &["disk.raw"]);
    place.ends("check --format qcow2 nothing.qcow2", 1, &["nothing.qcow2"]);
    place.ends("check --format qcow2 --repair some disk.raw", 2, &["leaks"]);
    place.ends("check --format qcow2 --repair all --force-share disk.raw", 2, &["--force-share"]);
}
