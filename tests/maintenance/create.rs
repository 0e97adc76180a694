//! `blockhouse create`.

use crate::place::Place;

const MIB: u64 = 1 << 20;

/// Options as Blockhouse and as QEMU write them.
const OPTIONS: [(&str, &str); 9] = [
    ("", ""),
    ("-o cluster-size=512", "-o cluster_size=512"),
    ("-o cluster-size=2M -o refcount-bits=64", "-o cluster_size=2M,refcount_bits=64"),
    ("-o refcount-bits=1 -o cluster-size=4K", "-o refcount_bits=1,cluster_size=4k"),
    ("-o compat=v2", "-o compat=0.10"),
    ("-o extended-l2=on -o cluster-size=32K", "-o extended_l2=on,cluster_size=32k"),
    ("-o compression-type=zstd", "-o compression_type=zstd"),
    ("-o lazy-refcounts=on", "-o lazy_refcounts=on"),
    ("-o lazy_refcounts=off -o cluster_size=16K", "-o cluster_size=16k"),
];

/// QEMU finds the same in our images as in its own, nothing wrong with them, and writes to them.
#[test]
fn images_like_those_of_qemu() {
    let Some(place) = Place::new() else { return };
    place.raw("base.raw", 5 * MIB, &[(0, 100_000), (3 << 20, 4096)]);
    for (number, (ours, theirs)) in OPTIONS.iter().enumerate() {
        for (backing, backing_theirs) in [("", ""), ("--backing base.raw --backing-format raw", "-b base.raw -F raw")] {
            let image = format!("ours{number}.qcow2");
            place.ok(&format!("create --force --format qcow2 --size 20M {ours} {backing} {image}"));
            place.qemu_img(&format!("create -q -f qcow2 {theirs} {backing_theirs} theirs.qcow2 20M"));
            let (our, their) = (place.info("qcow2", &image), place.info("qcow2", "theirs.qcow2"));
            for key in
                ["virtual-size", "cluster-size", "backing-filename", "backing-filename-format", "format-specific"]
            {
                assert_eq!(our[key], their[key], "{key}: {ours} {backing}");
            }
            place.flawless(&image);
            place.same(("qcow2", &image), ("qcow2", "theirs.qcow2"));
            place.qemu_io("qcow2", &image, &["write -P 5 1M 70000", "write -P 6 19M 512k"]);
            place.qemu_io("qcow2", "theirs.qcow2", &["write -P 5 1M 70000", "write -P 6 19M 512k"]);
            place.flawless(&image);
            place.same(("qcow2", &image), ("qcow2", "theirs.qcow2"));
        }
    }
    assert!(place.names().iter().all(|name| !name.starts_with('.')), "{:?}", place.names());
}

#[test]
fn sizes_come_from_the_backing_chain() {
    let Some(place) = Place::new() else { return };
    std::fs::create_dir(place.path("deep")).unwrap();
    place.raw("deep/base.raw", 3 * MIB + 100, &[(0, 9000)]);
    place.qemu_img("create -q -f qcow2 -b base.raw -F raw deep/middle.qcow2");
    // A relative name starts at the directory of the image, wherever the command runs.
    place.ends(
        "create --format qcow2 --backing middle.qcow2 --backing-format qcow2 deep/top.qcow2",
        3,
        &["--allow", "base.raw"],
    );
    let arguments = "create --json --format qcow2 --backing middle.qcow2 --backing-format qcow2";
    let made = place.json(&format!("{arguments} --allow deep/base.raw deep/top.qcow2"));
    assert_eq!(made["virtual_size_bytes"], 3 * MIB + 512, "{made}");
    assert_eq!(made["backing"]["name"], "middle.qcow2", "{made}");
    assert_eq!(made["backing"]["format"], "qcow2", "{made}");
    place.same(("qcow2", "deep/top.qcow2"), ("qcow2", "deep/middle.qcow2"));
    // A size of one's own needs no look into the chain.
    place.ok("create --format qcow2 --size 1M --backing middle.qcow2 --backing-format qcow2 deep/short.qcow2");
    assert_eq!(place.info("qcow2", "deep/short.qcow2")["virtual-size"], MIB);
}

#[test]
fn raw_images_and_preallocation() {
    let Some(place) = Place::new() else { return };
    place.ok("create --format raw --size 3M plain.raw");
    assert_eq!((place.bytes("plain.raw").len() as u64, place.space("plain.raw")), (3 * MIB, 0));
    for (how, least) in [("off", 0), ("falloc", 3 * MIB), ("full", 3 * MIB)] {
        for format in ["raw", "qcow2"] {
            let image = format!("{how}.{format}");
            let made = place.json(&format!("create --json --format {format} --size 3M --preallocation {how} {image}"));
            assert_eq!(made["preallocation"], how);
            assert!(place.space(&image) >= least, "{image}: {} bytes", place.space(&image));
            if least == 0 {
                assert!(place.space(&image) < MIB, "{image}: {} bytes", place.space(&image));
            }
            place.same((format, &image), ("raw", "plain.raw"));
        }
    }
    place.ok("create --format qcow2 --size 3M --preallocation metadata metadata.qcow2");
    assert!(place.space("metadata.qcow2") < MIB, "{} bytes", place.space("metadata.qcow2"));
    for image in ["falloc.qcow2", "full.qcow2", "metadata.qcow2"] {
        place.flawless(image);
        // Every cluster has its place.
        let map = place.qemu_img(&format!("map --output=json -f qcow2 {image}"));
        let map: serde_json::Value = serde_json::from_str(&map).unwrap();
        for run in map.as_array().unwrap() {
            assert_eq!((&run["present"], &run["depth"]), (&true.into(), &0.into()), "{image}: {map}");
            assert!(run["offset"].is_u64(), "{image}: {map}");
        }
        let size = place.bytes(image).len();
        place.qemu_io("qcow2", image, &["write -P 1 0 3M"]);
        assert_eq!(place.bytes(image).len(), size, "{image} grew");
    }
}

#[test]
fn external_data_files() {
    let Some(place) = Place::new() else { return };
    place.ok("create --format qcow2 --size 4M --data-file content.raw top.qcow2");
    assert_eq!(place.bytes("content.raw").len() as u64, 4 * MIB);
    assert_eq!(place.info("qcow2", "top.qcow2")["format-specific"]["data"]["data-file"], "content.raw");
    place.qemu_io("qcow2", "top.qcow2", &["write -P 5 1M 70000"]);
    place.flawless("top.qcow2");
    // A file that is there is not taken, and nothing is left of the image.
    place.ends("create --format qcow2 --size 4M --data-file content.raw other.qcow2", 1, &["content.raw"]);
    assert_eq!(place.names(), ["content.raw", "top.qcow2"]);
    // A data file without its image is of no use.
    place.ends("create --format qcow2 --size 4M --data-file new.raw -o data-file=twice other.qcow2", 1, &["twice"]);
    assert_eq!(place.names(), ["content.raw", "top.qcow2"]);

    // It would be gone when the image gets its name.
    std::os::unix::fs::symlink(".", place.path("here")).unwrap();
    for command in ["create --format qcow2 --size 4M", "convert --format raw --to-format qcow2 top.qcow2"] {
        for data_file in ["new", "./new", "here/new"] {
            for force in ["", "--force"] {
                place.ends(&format!("{command} {force} --data-file {data_file} new"), 1, &["are one file"]);
            }
        }
    }
    std::fs::remove_file(place.path("here")).unwrap();
    assert_eq!(place.names(), ["content.raw", "top.qcow2"]);

    place.ok("create --format qcow2 --size 4M --data-file raw.raw -o data-file-raw=on raw.qcow2");
    place.qemu_io("qcow2", "raw.qcow2", &["write -P 6 1M 64k"]);
    place.flawless("raw.qcow2");
    place.same(("qcow2", "raw.qcow2"), ("raw", "raw.raw"));
}

#[test]
fn an_image_that_exists_is_kept() {
    let Some(place) = Place::new() else { return };
    place.raw("disk.raw", MIB, &[(0, 5000)]);
    let before = place.bytes("disk.raw");
    place.ends("create --format qcow2 --size 1M disk.raw", 1, &["disk.raw exists", "--force"]);
    assert_eq!(place.bytes("disk.raw"), before);
    // In use, not a file, its own backing file: not even with --force.
    place.qemu_img("create -q -f qcow2 used.qcow2 1M");
    {
        let _user = place.in_use("qcow2", "used.qcow2", false);
        place.ends("create --force --format qcow2 --size 1M used.qcow2", 1, &["in use"]);
    }
    std::fs::create_dir(place.path("directory")).unwrap();
    place.ends("create --force --format qcow2 --size 1M directory", 1, &["not a regular file"]);
    let itself = "--backing disk.raw --backing-format raw disk.raw";
    place.ends(&format!("create --force --format qcow2 {itself}"), 1, &["not touched"]);
    // What its backing file is over, neither, by any name.
    place.qemu_img("create -q -f qcow2 -b disk.raw -F raw over.qcow2");
    std::fs::hard_link(place.path("disk.raw"), place.path("link.raw")).unwrap();
    for image in ["disk.raw", "link.raw"] {
        let over = "--allow disk.raw --backing over.qcow2 --backing-format qcow2";
        place.ends(&format!("create --force --format qcow2 {over} {image}"), 1, &["not touched"]);
    }
    for left in ["link.raw", "over.qcow2"] {
        std::fs::remove_file(place.path(left)).unwrap();
    }
    assert_eq!(place.bytes("disk.raw"), before);
    place.ok("create --force --format qcow2 --size 2M disk.raw");
    assert_eq!(place.info("qcow2", "disk.raw")["virtual-size"], 2 * MIB);
    assert_eq!(place.names(), ["directory", "disk.raw", "used.qcow2"]);
}

#[test]
fn what_cannot_be_made_is_said() {
    let Some(place) = Place::new() else { return };
    for (arguments, code, words) in [
        ("--format qcow2 --size 1000 x", 1, &["512"][..]),
        ("--format qcow2 --size 1M -o colour=red x", 1, &["colour"]),
        ("--format qcow2 --size 1M -o cluster-size=3 x", 1, &["cluster-size=3"]),
        ("--format qcow2 --size 1M -o cluster-size x", 1, &["NAME=VALUE"]),
        ("--format raw --size 1M -o cluster-size=4096 x", 1, &["no options"]),
        ("--format vmdk --size 1M x", 5, &["cannot make new images"]),
        ("--format floppy --size 1M x", 5, &["floppy", "qcow2"]),
        ("--format qcow2 x", 2, &["SIZE", "--backing"]),
        ("--format qcow2 --size 1M", 2, &["IMAGE"]),
        ("--format qcow2 --size 1M --backing b x", 2, &["--backing-format"]),
        ("--format qcow2 --size 1M --backing b --backing-format raw x", 1, &["backing file", "--no-check"]),
        ("--format qcow2 --backing b --backing-format raw x", 1, &["backing file"]),
        ("--format raw --size 1M --no-check --backing b --backing-format raw x", 5, &["backing"]),
        ("--format qcow2 --size 1M --preallocation some x", 2, &["falloc"]),
        ("--format qcow2 --size 1M nowhere/x", 1, &["nowhere"]),
    ] {
        place.ends(&format!("create {arguments}"), code, words);
    }
    assert!(place.names().is_empty(), "{:?}", place.names());
    place.ok("create --format qcow2 --size 1M --no-check --backing b --backing-format raw x");
    assert_eq!(place.info("qcow2", "x")["backing-filename"], "b");
}

#[test]
fn options_are_listed() {
    let Some(place) = Place::new() else { return };
    let list = place.ok("create --format qcow2 -o help");
    assert_eq!(place.ok("create --format qcow2 --help-options"), list);
    let options = place.json("create --format qcow2 -o help --json");
    for option in options.as_array().unwrap() {
        let name = option["name"].as_str().unwrap();
        assert!(list.contains(name), "{name} is not in: {list}");
    }
    for name in ["cluster-size", "compat", "extended-l2", "data-file"] {
        assert!(list.contains(name), "{list}");
    }
    assert!(place.ok("create --format raw -o help").contains("no options"));
}
