//! What QEMU creates is read as QEMU reads it: a matrix of images by qemu-img and qemu-io, each read whole
//! and at random places, and compared with `qemu-img convert -O raw`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod support;

use blockhouse_plugin::testing::Storage;
use blockhouse_plugin::{Access, Snapshots};
use blockhouse_qcow2::Qcow2;
use support::{Chain, Lab, have_qemu, material};

/// Cluster size, and a disk size that is no multiple of it.
const SHAPES: [(usize, usize); 4] =
    [(512, (1 << 20) + 3 * 512), (4096, (4 << 20) + 512), (65536, (8 << 20) + 1536), (2 << 20, (32 << 20) + 4096)];

/// Writes all over an image: whole and partial clusters, zeroes of every kind, discards, the last cluster.
fn scribble(lab: &Lab, image: &str, cluster: usize, size: usize, compressed: bool) {
    lab.write("material", &material(5 * cluster + 512, cluster as u64));
    let c = cluster;
    let write = |flags: &str, offset: usize, length: usize| format!("write {flags} {offset} {length}");
    let mut commands = vec![
        write("-s material", 0, 5 * c),
        // Parts of clusters: the middle, and over a boundary.
        write("-P 0x11", 6 * c, (c / 2).max(512)),
        write("-P 0x12", 8 * c - 512, 1024.min(c)),
        // Zeroes: over nothing, over data and keeping it, over data and freeing it, part of a cluster.
        write("-z", c, c),
        write("-z -u", 2 * c, c),
        write("-z", size / 2 / c * c, 2 * c),
        write("-z", 3 * c + c / 2 / 512 * 512, (c / 4).max(512)),
        format!("discard {} {}", 4 * c, c),
    ];
    if compressed {
        let far = size / 4 * 3 / c * c;
        commands.push(write("-c -s material", far, 2 * c));
        commands.push(write("-c -P 0", far - 2 * c, c));
        commands.push(write("-c -P 0x14", (size - 512) / c * c, (size - 1) % c + 1));
        // A compressed cluster that became a normal one again.
        commands.push(write("-P 0x15", far + c, 512));
    } else {
        // The end of the disk, which may be inside a cluster.
        commands.push(write("-P 0x13", size - 512, 512));
    }
    lab.qemu_io(image, &commands);
}

/// One lab for each; the images are read by the same code.
fn matrix(versions: &[&str], options: &str, shapes: &[(usize, usize)], compressed: bool) {
    for version in versions {
        for (cluster, size) in shapes {
            let lab = Lab::new();
            lab.qemu_img(&format!(
                "create -q -f qcow2 -o compat={version},cluster_size={cluster}{options} a.qcow2 {size}"
            ));
            lab.compare("a.qcow2");
            scribble(&lab, "a.qcow2", *cluster, *size, compressed);
            let map = lab.compare("a.qcow2");
            assert!(map.data > 0 && map.unallocated + map.zero > 0, "{map:?}");
            assert_eq!(map.packed > 0, compressed, "{map:?}");
            // With preallocation, QEMU also asks the file system where its holes are.
            if !options.contains("preallocation") {
                lab.compare_map("a.qcow2");
            }
        }
    }
}

#[test]
fn every_cluster_size_and_version() {
    if !have_qemu() {
        return;
    }
    matrix(&["0.10", "1.1"], "", &SHAPES, false);
}

#[test]
fn compressed_with_zlib() {
    if !have_qemu() {
        return;
    }
    matrix(&["0.10", "1.1"], "", &SHAPES, true);
}

#[test]
fn compressed_with_zstd() {
    if !have_qemu() {
        return;
    }
    matrix(&["1.1"], ",compression_type=zstd", &SHAPES, true);
}

#[test]
fn extended_l2() {
    if !have_qemu() {
        return;
    }
    let shapes = [(16 << 10, (4 << 20) + 512), (64 << 10, (8 << 20) + 1536), (2 << 20, (32 << 20) + 4096)];
    matrix(&["1.1"], ",extended_l2=on", &shapes, false);
    matrix(&["1.1"], ",extended_l2=on", &shapes, true);
    matrix(&["1.1"], ",extended_l2=on,compression_type=zstd", &shapes, true);
}

#[test]
fn every_preallocation_and_refcount_width() {
    if !have_qemu() {
        return;
    }
    for preallocation in ["metadata", "falloc", "full"] {
        matrix(&["0.10", "1.1"], &format!(",preallocation={preallocation}"), &SHAPES[..3], false);
    }
    for bits in [1, 2, 8, 64] {
        matrix(&["1.1"], &format!(",refcount_bits={bits},lazy_refcounts=on"), &SHAPES[1..2], bits > 1);
    }
}

#[test]
fn whole_disks_through_convert() {
    if !have_qemu() {
        return;
    }
    let lab = Lab::new();
    let mut disk = material((3 << 20) + 512, 7);
    disk[1 << 20..2 << 20].fill(0);
    lab.write("disk.raw", &disk);
    for options in ["compression_type=zlib", "compression_type=zstd", "compression_type=zstd,extended_l2=on"] {
        for cluster in ["16k", "64k", "2M"] {
            lab.qemu_img(&format!(
                "convert -f raw -c -O qcow2 -o cluster_size={cluster},{options} disk.raw packed.qcow2"
            ));
            assert!(lab.compare("packed.qcow2").packed > 0);
        }
    }
    assert_eq!(lab.oracle("packed.qcow2", ""), disk);
}

#[test]
fn backing_chains() {
    if !have_qemu() {
        return;
    }
    let lab = Lab::new();
    lab.write("base/base.raw", &material((2 << 20) + 512, 3));
    lab.write("deep/er/x", b"");
    // Longer than its base; named relative to itself, through other directories.
    lab.qemu_img("create -q -f qcow2 -o cluster_size=4k -b ../base/base.raw -F raw deep/a.qcow2 3M");
    scribble(&lab, "deep/a.qcow2", 4096, 3 << 20, true);
    // Shorter than its base, extended L2, another cluster size.
    lab.qemu_img("create -q -f qcow2 -o cluster_size=64k,extended_l2=on -b ../a.qcow2 -F qcow2 deep/er/b.qcow2 2M");
    scribble(&lab, "deep/er/b.qcow2", 65536, 2 << 20, false);
    // Version 2, by an absolute name, of the default size.
    lab.qemu_img(&format!(
        "create -q -f qcow2 -o compat=0.10,cluster_size=512 -b {} -F qcow2 c.qcow2",
        lab.path("deep/er/b.qcow2")
    ));
    scribble(&lab, "c.qcow2", 512, 2 << 20, true);
    // Longer again: zero past the end of what is below.
    lab.qemu_img("create -q -f qcow2 -b c.qcow2 -F qcow2 d.qcow2 5M");
    for image in ["deep/a.qcow2", "deep/er/b.qcow2", "c.qcow2", "d.qcow2"] {
        lab.compare(image);
    }
}

#[test]
fn resized_images() {
    if !have_qemu() {
        return;
    }
    for options in ["compat=0.10,cluster_size=4k", "cluster_size=4k", "cluster_size=64k,extended_l2=on"] {
        let lab = Lab::new();
        lab.qemu_img(&format!("create -q -f qcow2 -o {options} a.qcow2 2M"));
        scribble(&lab, "a.qcow2", 64 << 10, 2 << 20, false);
        lab.qemu_img("resize -q -f qcow2 a.qcow2 7M");
        lab.compare("a.qcow2");
        scribble(&lab, "a.qcow2", 64 << 10, 7 << 20, false);
        lab.compare("a.qcow2");
        lab.qemu_img("resize -q -f qcow2 --shrink a.qcow2 1049088");
        lab.compare("a.qcow2");
    }
}

#[test]
fn external_data_files() {
    if !have_qemu() {
        return;
    }
    for options in ["data_file_raw=off", "data_file_raw=on", "data_file_raw=on,extended_l2=on", "extended_l2=on"] {
        let lab = Lab::new();
        lab.write("data/.x", b"");
        let size = (6 << 20) + 512;
        lab.qemu_img(&format!("create -q -f qcow2 -o data_file=data/d.bin,{options} a.qcow2 {size}"));
        scribble(&lab, "a.qcow2", 65536, size, false);
        lab.compare("a.qcow2");
        if options.contains("raw=off") {
            lab.compare_map("a.qcow2");
        }
        let storage = lab.storage();
        let disk = storage.disk::<Qcow2>(&lab.path("a.qcow2")).unwrap();
        assert_eq!(disk.info.files, ["data/d.bin"]);
        assert!(storage.opened().contains(&lab.path("data/d.bin")));
        let raw = disk.info.facts.iter().find(|fact| fact.name == "data-file-raw").unwrap();
        assert_eq!(raw.value, if options.contains("raw=on") { "yes" } else { "no" });
    }
}

#[test]
fn internal_snapshots() {
    if !have_qemu() {
        return;
    }
    for options in ["compat=0.10,cluster_size=4k", "cluster_size=64k", "cluster_size=64k,extended_l2=on"] {
        let lab = Lab::new();
        let size = 4 << 20;
        lab.write("base.raw", &material(3 << 20, 9));
        lab.qemu_img(&format!("create -q -f qcow2 -o {options} -b base.raw -F raw a.qcow2 {size}"));
        lab.qemu_img("snapshot -c empty a.qcow2");
        scribble(&lab, "a.qcow2", 65536, size, true);
        lab.qemu_img("snapshot -c first a.qcow2");
        lab.qemu_io("a.qcow2", &["write -P 0x77 0 1M".into(), "discard 2M 1M".into()]);
        lab.qemu_img("snapshot -c second a.qcow2");
        lab.qemu_io("a.qcow2", &["write -P 0x78 512k 1M".into(), "write -z 0 128k".into()]);
        if !options.contains("0.10") {
            lab.qemu_img("resize -q -f qcow2 a.qcow2 9M");
        }
        lab.compare("a.qcow2");

        let storage = lab.storage();
        let path = lab.path("a.qcow2");
        let mut listed = Vec::new();
        storage
            .disk_with::<Qcow2>(&path, Access::ReadOnly, |qcow2| {
                listed = qcow2.list_snapshots()?;
                Ok(())
            })
            .unwrap();
        let names: Vec<_> = listed.iter().map(|snapshot| (&*snapshot.id, &*snapshot.name)).collect();
        assert_eq!(names, [("1", "empty"), ("2", "first"), ("3", "second")]);
        assert!(listed.iter().all(|snapshot| snapshot.virtual_size == size as u64 && snapshot.vm_state_size == 0));
        assert!(listed.iter().all(|snapshot| snapshot.created_at > 1_600_000_000));

        for (id, name) in names {
            // QEMU keeps the size of the current state; the snapshot's own is what a guest saw.
            let mut expected = lab.oracle("a.qcow2", &format!("-l snapshot.name={name}"));
            expected.truncate(size);
            for key in [id, name] {
                let mut chain = Chain::open(&storage, &path, "qcow2", Some(key));
                assert_eq!(chain.size(), size as u64);
                chain.compare(&expected);
            }
        }
        let error = storage
            .disk_with::<Qcow2>(&path, Access::ReadOnly, |qcow2| qcow2.select_snapshot("none").map(drop))
            .unwrap_err();
        assert!(error.text().contains("\"2\": \"first\""), "{error}");
    }
}

#[test]
fn sixty_four_pebibytes_of_nothing() {
    if !have_qemu() {
        return;
    }
    let lab = Lab::new();
    lab.qemu_img("create -q -f qcow2 -o cluster_size=2M big.qcow2 64P");
    lab.qemu_io("big.qcow2", &["write -P 1 30P 4M".into()]);
    let storage = Storage::new();
    storage.insert("/big.qcow2", lab.bytes("big.qcow2"));
    let mut disk = storage.disk::<Qcow2>("/big.qcow2").unwrap();
    let walk = support::walk(&mut disk.format, 64 << 50, || 4096, 1000);
    assert_eq!((walk.end, walk.errors), (64 << 50, 0));
    assert!(walk.calls < 10, "{walk:?}");
    assert_eq!(disk.read(30 << 50, 4096).unwrap(), [1; 4096]);
    assert_eq!(disk.read((64 << 50) - 4096, 4096).unwrap(), [0; 4096]);
}

#[test]
fn features_are_named() {
    if !have_qemu() {
        return;
    }
    let lab = Lab::new();
    lab.qemu_img("create -q -f qcow2 -o compression_type=zstd,extended_l2=on,lazy_refcounts=on a.qcow2 1M");
    lab.qemu_img("bitmap --add a.qcow2 one");
    lab.qemu_img("bitmap --add a.qcow2 two");
    lab.qemu_img("snapshot -c s a.qcow2");
    let disk = lab.storage().disk::<Qcow2>(&lab.path("a.qcow2")).unwrap();
    let facts: Vec<_> = disk.info.facts.iter().map(|fact| format!("{}={}", fact.name, fact.value)).collect();
    assert_eq!(
        facts,
        [
            "version=3",
            "compression=zstd",
            "extended-l2=yes",
            "lazy-refcounts=yes",
            "refcount-bits=16",
            "snapshots=1",
            "bitmaps=2",
            "dirty=no",
            "corrupt=no",
            "incompatible-features=compression-type, extended-l2",
            "compatible-features=lazy-refcounts",
            "autoclear-features=bitmaps",
        ]
    );
}

#[test]
fn encrypted_images_are_refused_by_name() {
    if !have_qemu() {
        return;
    }
    let lab = Lab::new();
    for (format, name) in [("aes", "AES"), ("luks", "LUKS")] {
        lab.qemu_img(&format!(
            "create -q -f qcow2 --object secret,id=s,data=secret \
             -o encrypt.format={format},encrypt.key-secret=s{} {format}.qcow2 1M",
            if format == "luks" { ",encrypt.iter-time=10" } else { "" }
        ));
        let error = lab.storage().disk::<Qcow2>(&lab.path(&format!("{format}.qcow2"))).unwrap_err();
        assert!(matches!(error, blockhouse_plugin::Error::Unsupported(_)), "{error:?}");
        assert!(error.text().contains(&format!("encryption with {name}")), "{error}");
    }
}
