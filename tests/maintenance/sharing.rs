//! Images that are in use, and what `--force-share` lets be read of them; `--allow-write`.

use std::process::Command;

use blockhouse_tests::run;

use crate::place::Place;

#[test]
fn what_is_in_use_is_read_only_if_asked_for() {
    let Some(place) = Place::new() else { return };
    place.raw("disk.raw", 1 << 20, &[(0, 1 << 20)]);
    place.qemu_img("convert -f raw -O qcow2 disk.raw base.qcow2");
    place.qemu_img("create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2");
    place.qemu_img("snapshot -c one top.qcow2");
    let before = [place.bytes("base.qcow2"), place.bytes("top.qcow2")];
    {
        let _user = place.in_use("qcow2", "top.qcow2", false);
        for command in [
            "info --format qcow2 --allow base.qcow2 top.qcow2",
            "map --format qcow2 --allow base.qcow2 top.qcow2",
            "read --format qcow2 --allow base.qcow2 --output out.raw --force top.qcow2",
            "compare --format-a qcow2 --format-b raw --allow base.qcow2 top.qcow2 disk.raw",
            "check --format qcow2 top.qcow2",
            "snapshot list --format qcow2 --allow base.qcow2 top.qcow2",
            "convert --format qcow2 --allow base.qcow2 --to-format raw --force top.qcow2 new.raw",
        ] {
            place.ends(command, 1, &["in use"]);
            place.ok(&format!("{command} --force-share"));
        }
        place.same(("raw", "new.raw"), ("raw", "disk.raw"));
        assert!(place.bytes("out.raw") == place.bytes("disk.raw"));
    }
    assert!([place.bytes("base.qcow2"), place.bytes("top.qcow2")] == before, "reading wrote");
}

/// Whoever uses an image, `read` does not empty it.
#[test]
fn an_image_that_is_in_use_is_no_output() {
    let Some(place) = Place::new() else { return };
    place.raw("disk.raw", 1 << 20, &[(0, 1 << 20)]);
    place.qemu_img("create -q -f qcow2 used.qcow2 1M");
    let before = place.bytes("used.qcow2");
    let read = "read --format raw --force --output used.qcow2";
    for read_only in [false, true] {
        let _user = place.in_use("qcow2", "used.qcow2", read_only);
        place.ends(&format!("{read} disk.raw"), 1, &["cannot overwrite used.qcow2", "in use"]);
        place.ends(&format!("{read} --force-share disk.raw"), 1, &["cannot overwrite used.qcow2", "in use"]);
        assert!(place.bytes("used.qcow2") == before, "an image that is in use was emptied");
    }
    place.ok(&format!("{read} disk.raw"));
    assert!(place.bytes("used.qcow2") == place.bytes("disk.raw"));
}

/// An external data file is written if that was allowed, and otherwise not even the image is.
#[test]
fn data_files_are_written_if_allowed() {
    let Some(place) = Place::new() else { return };
    place.raw("new.raw", 2 << 20, &[(0, 2 << 20)]);
    place.qemu_img("create -q -f qcow2 -o data_file=content.raw -b new.raw -F raw top.qcow2 2M");
    let before = place.bytes("top.qcow2");
    let rebase = "rebase --format qcow2 --allow new.raw --no-backing top.qcow2";
    place.ends(rebase, 3, &["content.raw"]);
    place.ends(&format!("{rebase} --allow content.raw"), 3, &["content.raw"]);
    assert!(place.bytes("top.qcow2") == before, "a refused command wrote");
    place.ok(&format!("{rebase} --allow-write content.raw"));
    place.flawless("top.qcow2");
    place.same(("qcow2", "top.qcow2"), ("raw", "new.raw"));
}

/// Nothing that came out of an image reaches the terminal as it is.
#[test]
fn names_from_images_are_escaped() {
    let Some(place) = Place::new() else { return };
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-u", "-F", "raw", "-b", "\u{1b}[2Jbase.raw", "top.qcow2", "1M"]);
    run(create.current_dir(place.root())).succeeded();
    for command in [
        "resize --format qcow2 top.qcow2 2M",
        "commit --format qcow2 --base top.qcow2 --base-format qcow2 top.qcow2",
        "rebase --format qcow2 --no-backing top.qcow2",
        "convert --format qcow2 --to-format raw top.qcow2 new.raw",
        "check --format qcow2 top.qcow2",
    ] {
        let outcome = place.run(command);
        assert!(
            !outcome.stderr.contains('\u{1b}') && !outcome.text().contains('\u{1b}'),
            "{command}: {}",
            outcome.stderr
        );
    }
}
