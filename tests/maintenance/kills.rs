//! Commands that are killed at any time: nothing is lost, and running them again completes them.
//!
//! `KILLS=N` makes it longer.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::process::Stdio;
use std::time::Duration;

use crate::place::Place;

const MIB: u64 = 1 << 20;

/// How often each command is killed.
fn rounds() -> u64 {
    std::env::var("KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(12)
}

/// A number below `limit` that depends on the seed alone.
fn draw(seed: u64, limit: u64) -> u64 {
    u64::from_le_bytes(blockhouse_tests::noise(seed, 8).try_into().unwrap()) % limit
}

/// Runs a command that tells its progress, and kills it some time after it has told that many lines. True
/// if it was killed, and not done before.
fn killed_after_lines(place: &Place, arguments: &str, lines: u64, then: Duration) -> bool {
    let mut child = place.command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut told = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut errors = child.stderr.take().unwrap();
    for _ in 0..lines {
        if told.next().is_none() {
            break;
        }
    }
    std::thread::sleep(then);
    child.kill().unwrap();
    // Until the pipe is empty: a command that waits for its reader is not killed where it was meant to be.
    let status = child.wait().unwrap();
    // The process that gives names has it as well, and may have been told to just before.
    std::io::copy(&mut errors, &mut std::io::sink()).unwrap();
    assert!(status.code().is_none_or(|code| code == 0), "{arguments}: {status}");
    status.code().is_none()
}

/// Runs a command and kills it some time after it has first changed the image.
fn killed_after_a_change(place: &Place, arguments: &str, image: &str, then: Duration) -> bool {
    let state = || {
        let metadata = std::fs::metadata(place.path(image)).unwrap();
        (metadata.mtime(), metadata.mtime_nsec(), metadata.len())
    };
    let before = state();
    let mut child = place.command(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    while state() == before && child.try_wait().unwrap().is_none() {
        std::hint::spin_loop();
    }
    std::thread::sleep(then);
    child.kill().unwrap();
    let status = child.wait().unwrap();
    assert!(status.code().is_none_or(|code| code == 0), "{arguments}: {status}");
    status.code().is_none()
}

fn soon(seed: u64) -> Duration {
    Duration::from_micros(draw(seed, 5) * draw(seed + 1, 1500))
}

/// A process that is killed may have lost space, and nothing else.
fn no_corruption(place: &Place, image: &str, context: &str) {
    assert_eq!(place.wrong(image).0, 0, "{context}");
}

#[test]
fn convert() {
    let Some(place) = Place::new() else { return };
    place.raw("disk.raw", 48 * MIB, &[(0, 40 << 20)]);
    place.qemu_img("convert -f raw -O qcow2 disk.raw source.qcow2");
    let before = place.bytes("source.qcow2");
    let mut killed = 0;
    for round in 0..rounds() {
        let more = if round % 2 == 0 { "" } else { "--compress -o cluster-size=2M" };
        let arguments = format!("convert --json --format qcow2 --to-format qcow2 {more} source.qcow2 new.qcow2");
        if killed_after_lines(&place, &arguments, draw(round, 22), soon(round)) {
            killed += 1;
            // Killed in its last moments, it may have been complete.
            if !place.exists("new.qcow2") {
                continue;
            }
        }
        place.flawless("new.qcow2");
        place.same(("qcow2", "new.qcow2"), ("raw", "disk.raw"));
        std::fs::remove_file(place.path("new.qcow2")).unwrap();
    }
    assert!(killed > 0, "it was never killed");
    assert!(place.bytes("source.qcow2") == before, "the source was written to");
    place.ok("convert --format qcow2 --to-format qcow2 source.qcow2 new.qcow2");
    place.same(("qcow2", "new.qcow2"), ("raw", "disk.raw"));
}

#[test]
fn commit() {
    let Some(place) = Place::new() else { return };
    place.raw("deep.raw", 32 * MIB, &[(0, 32 << 20)]);
    place.qemu_img("create -q -f qcow2 -b deep.raw -F raw base.qcow2");
    place.qemu_img(&format!("create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2 {}", 40 * MIB + 512));
    place.qemu_io("qcow2", "top.qcow2", &["write -P 3 1M 20M", "write -z 22M 3M", "write -P 4 30M 10M"]);
    place.qemu_img("convert -f qcow2 -O raw top.qcow2 want.raw");
    let before = place.bytes("top.qcow2");
    let arguments = "commit --json --format qcow2 --allow deep.raw --base base.qcow2 --base-format qcow2 top.qcow2";
    let mut killed = 0;
    for round in 0..rounds() {
        killed += u64::from(killed_after_lines(&place, arguments, draw(round + 100, 18), soon(round)));
        no_corruption(&place, "base.qcow2", &format!("round {round}"));
        // The overlay is what it was, and so is its disk.
        place.same(("qcow2", "top.qcow2"), ("raw", "want.raw"));
    }
    assert!(killed > 0, "it was never killed");
    place.ok(arguments);
    assert!(place.bytes("top.qcow2") == before, "the overlay was written to");
    no_corruption(&place, "base.qcow2", "complete");
    place.same(("qcow2", "base.qcow2"), ("raw", "want.raw"));
}

#[test]
fn rebase() {
    let Some(place) = Place::new() else { return };
    place.raw("old.raw", 40 * MIB, &[(0, 20 << 20), (30 << 20, 10 << 20)]);
    place.raw("new.raw", 33 * MIB, &[(0, 4 << 20), (15 << 20, 18 << 20)]);
    place.qemu_img("create -q -f qcow2 -b old.raw -F raw top.qcow2");
    place.qemu_io("qcow2", "top.qcow2", &["write -P 3 1M 2M", "write -z 5M 1M"]);
    place.qemu_img("convert -f qcow2 -O raw top.qcow2 want.raw");
    let pristine = place.bytes("top.qcow2");
    let arguments = "rebase --json --format qcow2 --allow old.raw --backing new.raw --backing-format raw top.qcow2";
    let mut killed = 0;
    for round in 0..rounds() {
        if killed_after_lines(&place, arguments, draw(round + 200, 16), soon(round)) {
            killed += 1;
        }
        no_corruption(&place, "top.qcow2", &format!("round {round}"));
        place.same(("qcow2", "top.qcow2"), ("raw", "want.raw"));
        if place.info("qcow2", "top.qcow2")["backing-filename"] == "new.raw" {
            std::fs::write(place.path("top.qcow2"), &pristine).unwrap();
        }
    }
    assert!(killed > 0, "it was never killed");
    place.ok(arguments);
    assert_eq!(place.info("qcow2", "top.qcow2")["backing-filename"], "new.raw");
    place.same(("qcow2", "top.qcow2"), ("raw", "want.raw"));
}

#[test]
fn resize() {
    let Some(place) = Place::new() else { return };
    place.raw("disk.raw", 16 * MIB, &[(0, 16 << 20)]);
    place.qemu_img("convert -f raw -O qcow2 -o cluster_size=512 disk.raw top.qcow2");
    let content = place.bytes("disk.raw");
    let mut size = 16 * MIB;
    let mut least = size;
    let mut killed = 0;
    for round in 0..rounds() {
        // Down a little, up a lot: a shorter disk frees clusters, a longer one needs a longer table.
        let new = if round % 2 == 0 { 16 * MIB - (round + 1) * 200 * 1024 } else { (64 + round * 64) * MIB };
        let arguments = format!("resize --format qcow2 --shrink top.qcow2 {new}");
        killed += u64::from(killed_after_a_change(&place, &arguments, "top.qcow2", soon(round)));
        no_corruption(&place, "top.qcow2", &format!("round {round}"));
        let now = place.info("qcow2", "top.qcow2")["virtual-size"].as_u64().unwrap();
        assert!(now == size || now == new, "round {round}: {size} became {now} on the way to {new}");
        size = now;
        least = least.min(now);
        place.qemu_img("convert -f qcow2 -O raw top.qcow2 now.raw");
        let kept = place.bytes("now.raw");
        assert!(kept[..least as usize] == content[..least as usize], "round {round}: content was lost");
        assert!(kept[least as usize..].iter().all(|byte| *byte == 0), "round {round}: content came back");
    }
    assert!(killed > 0, "it was never killed");
    place.ok("resize --format qcow2 --shrink top.qcow2 1M");
    place.ok("check --format qcow2 --repair leaks top.qcow2");
    place.flawless("top.qcow2");
}

#[test]
fn snapshots() {
    let Some(place) = Place::new() else { return };
    place.raw("disk.raw", 16 * MIB, &[(0, 16 << 20)]);
    place.qemu_img("convert -f raw -O qcow2 -o cluster_size=512 disk.raw vm.qcow2");
    place.ok("snapshot create --format qcow2 vm.qcow2 first");
    place.qemu_io("qcow2", "vm.qcow2", &["write -P 7 1M 6M"]);
    place.qemu_img("convert -f qcow2 -O raw vm.qcow2 later.raw");
    place.ok("snapshot create --format qcow2 vm.qcow2 later");
    let mut killed = 0;
    for round in 0..rounds() {
        let arguments = [
            "snapshot create --format qcow2 vm.qcow2 more",
            "snapshot apply --format qcow2 vm.qcow2 first",
            "snapshot delete --format qcow2 vm.qcow2 3",
            "snapshot apply --format qcow2 vm.qcow2 later",
        ][(round % 4) as usize];
        // Whatever the last one came to, this one has its snapshot to delete.
        let listed = place.ok("snapshot list --format qcow2 vm.qcow2");
        if round % 4 == 2 && !listed.contains("id 3,") {
            place.ok("snapshot create --format qcow2 vm.qcow2 more");
        }
        killed += u64::from(killed_after_a_change(&place, arguments, "vm.qcow2", soon(round)));
        let context = format!("round {round}: {arguments}");
        no_corruption(&place, "vm.qcow2", &context);
        for (name, content) in [("first", "disk.raw"), ("later", "later.raw")] {
            place.qemu_img(&format!("convert -f qcow2 -l {name} -O raw vm.qcow2 kept.raw"));
            place.same(("raw", "kept.raw"), ("raw", content));
        }
        // The disk is one of the two, all of it.
        place.qemu_img("convert -f qcow2 -O raw vm.qcow2 now.raw");
        let now = place.bytes("now.raw");
        assert!(now == place.bytes("disk.raw") || now == place.bytes("later.raw"), "{context}");
    }
    assert!(killed > 0, "it was never killed");
    place.ok("check --format qcow2 --repair leaks vm.qcow2");
    place.flawless("vm.qcow2");
    for name in ["first", "later"] {
        place.ok(&format!("snapshot apply --format qcow2 vm.qcow2 {name}"));
    }
    place.same(("qcow2", "vm.qcow2"), ("raw", "later.raw"));
}
