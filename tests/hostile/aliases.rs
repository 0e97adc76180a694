//! Images that are written: entries that name metadata as data, and a header that a guest wrote.

use std::path::Path;

use blockhouse_sandbox::block::{Access, BlockBackend, Error, ErrorKind, VolatileSlice};
use blockhouse_sandbox::{Grants, OpenRequest, Opener};
use blockhouse_tests::{noise, qemu_img};

use crate::place::{Place, limited};
use crate::qcow2::{overlay, poke};
use crate::{library, snapshot, tally};

const CLUSTER: u64 = 64 << 10;
const COPIED: u64 = 1 << 63;

fn write(image: &Path, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
    let library = library::shared();
    let opener = Opener::new(&library.sandbox, library.formats.clone()).grants(Grants::new());
    let request = OpenRequest { access: Access::ReadWrite, ..OpenRequest::new(image, "qcow2") };
    let opened = opener.open(&request)?;
    opened.disk.write(&[VolatileSlice::from(bytes)], offset)?;
    opened.disk.close()
}

fn long(bytes: &[u8], at: u64) -> u64 {
    let at = usize::try_from(at).unwrap();
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00
}

/// cloud-hypervisor 8008, 8358, 8606: a write that an entry leads to metadata is refused, the metadata is what it
/// was, and the image is marked corrupt, so that nobody else tries.
#[test]
fn no_write_reaches_metadata() {
    let place = Place::new();
    let raw = place.write("images/content", noise(3, 1 << 20));
    let good = place.path("images/good");
    let options = ["convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=65536"];
    qemu_img(options.iter().copied().chain([raw.to_str().unwrap(), good.to_str().unwrap()]));
    let good = std::fs::read(good).unwrap();
    let l1 = long(&good, 40);
    let l2 = long(&good, l1);
    let counts = long(&good, 48);
    let block = long(&good, counts);
    let end = (good.len() as u64).next_multiple_of(CLUSTER);
    for (what, target, marked) in [
        ("the header", 0, false),
        ("the L1 table", l1, true),
        ("an L2 table", l2, true),
        ("the refcount table", counts, true),
        ("a refcount block", block, true),
        ("past the end of the file", end + (1 << 30), true),
    ] {
        let mut bytes = good.clone();
        // The entry of the fourth cluster.
        let at = usize::try_from(l2 + 3 * 8).unwrap();
        poke(&mut bytes, at, &(target | COPIED).to_be_bytes());
        let image = place.write("images/vm/image", &bytes);
        let error = match write(&image, 3 * CLUSTER, &mut noise(9, 4096)) {
            Ok(()) => {
                // An entry of zeroes names nothing: the cluster gets space of its own.
                assert_eq!(target, 0, "{what} was written");
                let now = std::fs::read(&image).unwrap();
                assert!(now[..72] == bytes[..72], "{what}: the header was changed");
                tally::image_served();
                continue;
            }
            Err(error) => error,
        };
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: {error}");
        snapshot::refusal(&place.normalize(&error.to_string()));
        let mut now = std::fs::read(&image).unwrap();
        assert_eq!(now[79] & 2 != 0, marked, "{what}: marked corrupt");
        now[79] = bytes[79];
        assert!(now[..bytes.len()] == bytes, "{what}: the image was changed");
        if marked {
            let again = write(&image, 0, &mut noise(9, 512)).expect_err(what);
            snapshot::refusal(&place.normalize(&again.to_string()));
            assert!(again.to_string().contains("corrupt"), "{what}: {again}");
        }
        tally::image_refused();
    }
}

/// CVE-2026-24708: a raw disk whose guest wrote a header is resized as what was declared.
#[test]
fn a_raw_disk_is_resized_as_raw_whatever_its_guest_wrote() {
    let place = Place::new();
    let mut bytes = overlay(16, 1 << 20, place.canary.path().to_str().unwrap().as_bytes(), Some("raw"));
    bytes.resize(1 << 20, 0);
    let image = place.write("images/vm/disk.raw", &bytes);
    let mut resize = limited();
    resize.args(["resize", "--format", "raw"]);
    let attempt = place.finish(resize, |resize| {
        resize.arg(&image).arg("2M");
    });
    place.canary.assert_untouched(&attempt.outcome);
    let attempt = attempt.succeeded();
    assert_eq!(attempt.opens("denied"), [""; 0]);
    let now = std::fs::read(&image).unwrap();
    assert_eq!(now.len(), 2 << 20);
    assert!(now[..1 << 20] == bytes && now[1 << 20..].iter().all(|byte| *byte == 0));
    tally::image_served();
}

/// Two entries name one cluster, which is counted once. Freed by one of them, it is written by the other: it may have
/// become data by then, and nothing that the image consists of.
#[test]
fn a_cluster_with_two_names_does_not_become_a_table() {
    const SMALL: u64 = 4096;
    const TABLE: u64 = SMALL / 8 * SMALL;
    let place = Place::new();
    let image = place.path("images/vm/image");
    let create = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k"];
    std::fs::create_dir_all(image.parent().unwrap()).unwrap();
    qemu_img(create.into_iter().chain([image.to_str().unwrap(), "64M"]));
    write(&image, 0, &mut noise(1, 4096)).unwrap();
    let mut bytes = std::fs::read(&image).unwrap();
    let l2 = usize::try_from(long(&bytes, long(&bytes, 40))).unwrap();
    bytes.copy_within(l2..l2 + 8, l2 + 8);
    let image = place.write("images/vm/image", &bytes);
    let corruptions = || {
        let opener = Opener::new(&library::shared().sandbox, library::shared().formats.clone());
        opener.check(&image, "qcow2", None).unwrap().corruptions
    };
    let before = corruptions();
    assert!(before > 0);

    let library = library::shared();
    let opener = Opener::new(&library.sandbox, library.formats.clone());
    let request = OpenRequest { access: Access::ReadWrite, ..OpenRequest::new(&image, "qcow2") };
    let disk = opener.open(&request).unwrap().disk;
    let put = |offset, byte| disk.write(&[VolatileSlice::from(&mut [byte; 4096][..])], offset).unwrap();
    // The host knows both by now, and that they may be overwritten.
    library::read(&disk, 0, 8192).unwrap();
    disk.discard(0, SMALL).unwrap();
    disk.flush().unwrap();
    // Each of these takes a table and a cluster, one of which is the one that was freed.
    for table in 1..=11_u8 {
        put(u64::from(table) * TABLE, table);
    }
    disk.flush().unwrap();
    put(SMALL, 0xff);
    disk.flush().unwrap();
    let right = (1..=11_u8)
        .filter(|table| library::read(&disk, u64::from(*table) * TABLE, 4096).is_ok_and(|read| read == [*table; 4096]));
    assert!(right.count() >= 10, "what one of them has is the other one's as well, and no more");
    disk.close().unwrap();
    drop(disk);
    let after = corruptions();
    assert!(after <= before, "{before} corruptions have become {after}");
    tally::image_served();
}
