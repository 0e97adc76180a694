//! Images that were made to break a parser: each ends in an error that says what is wrong, never in a
//! panic, and one bad entry leaves the rest of the disk readable.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod support;

use blockhouse_plugin::testing::Storage;
use blockhouse_plugin::{Access, Error, Format, Placement, Snapshots};
use blockhouse_qcow2::Qcow2;
use support::{Handmade, Lab, Random, have_qemu, material, walk};

/// The error of opening, which must hold all the words.
fn refused(image: &Handmade, words: &[&str]) -> Error {
    refused_for(image, Access::ReadOnly, words)
}

fn refused_for(image: &Handmade, access: Access, words: &[&str]) -> Error {
    let error = image.open_for(access).map(|disk| disk.info).expect_err(&format!("{words:?}"));
    for word in words {
        assert!(error.text().contains(word), "no {word:?} in {:?}", error.text());
    }
    error
}

fn changed(change: impl FnOnce(&mut Handmade)) -> Handmade {
    let mut image = Handmade::v3();
    change(&mut image);
    image
}

#[test]
fn an_image_by_hand_is_read() {
    for (version, bits) in [(2, 9), (2, 16), (3, 9), (3, 12), (3, 16), (3, 21)] {
        let image = Handmade::new(version, bits, 8);
        let mut disk = image.open().unwrap();
        let size = image.cluster_size;
        let content = disk.read(0, 8 * size).unwrap();
        assert_eq!(content[..size], material(size, 1));
        assert_eq!(content[size..2 * size], material(size, 2));
        assert!(content[2 * size..].iter().all(|byte| *byte == 0));
        // Both clusters are one extent, and the answer is for the whole table.
        let located = disk.format.locate(size as u64 + 1, 1, 16).unwrap();
        assert_eq!(located.start, 0);
        assert_eq!(located.extents.len(), 2);
        assert_eq!(located.extents[0].length, 2 * size as u64);
    }
}

#[test]
fn header_fields() {
    type Case = (&'static str, fn(&mut Handmade), &'static [&'static str]);
    let cases: [Case; 27] = [
        (
            "magic",
            |i| {
                i.be32(0, 0x4b44_4d56);
            },
            &["not a qcow2 image", "0x4b444d56"],
        ),
        (
            "version",
            |i| {
                i.be32(4, 4);
            },
            &["version 4"],
        ),
        (
            "cluster_bits",
            |i| {
                i.be32(20, 0);
            },
            &["cluster_bits is 0"],
        ),
        (
            "cluster_bits",
            |i| {
                i.be32(20, 8);
            },
            &["cluster_bits is 8"],
        ),
        (
            "cluster_bits",
            |i| {
                i.be32(20, 22);
            },
            &["cluster_bits is 22"],
        ),
        (
            "cluster_bits",
            |i| {
                i.be32(20, 63);
            },
            &["cluster_bits is 63"],
        ),
        (
            "header_length",
            |i| {
                i.be32(100, u32::MAX);
            },
            &["header_length is 4294967295"],
        ),
        (
            "header_length",
            |i| {
                i.be32(100, 0x7fff_ffff);
            },
            &["header_length"],
        ),
        (
            "header_length",
            |i| {
                i.be32(100, 72);
            },
            &["header_length is 72"],
        ),
        (
            "backing_file_offset",
            |i| {
                i.be64(8, 65537);
            },
            &["backing_file_offset"],
        ),
        (
            "backing_file_size",
            |i| {
                i.be64(8, 512).be32(16, u32::MAX);
            },
            &["backing_file_size is 4294967295"],
        ),
        (
            "backing_file_size",
            |i| {
                i.be64(8, 512).be32(16, 1024);
            },
            &["backing_file_size is 1024"],
        ),
        (
            "backing_file_size",
            |i| {
                i.be64(8, 65530).be32(16, 7);
            },
            &["backing_file_size is 7"],
        ),
        (
            "l1_size",
            |i| {
                i.be32(36, u32::MAX);
            },
            &["L1 table", "4294967295 entries", "4194304 is the limit"],
        ),
        (
            "l1_size",
            |i| {
                i.be32(36, 4_194_304);
            },
            &["the file ends", "the L1 table"],
        ),
        (
            "l1_size",
            |i| {
                i.be32(36, 0);
            },
            &["L1 table has 0 entries", "needs 1"],
        ),
        (
            "size",
            |i| {
                i.be64(24, u64::MAX);
            },
            &["L1 table has 1 entries", "needs 34359738368"],
        ),
        (
            "size",
            |i| {
                i.be64(24, (512 << 20) + 1);
            },
            &["needs 2"],
        ),
        (
            "l1_table_offset",
            |i| {
                i.be64(40, 3 * 65536 + 8);
            },
            &["L1 table", "0x30008", "multiple"],
        ),
        (
            "l1_table_offset",
            |i| {
                i.be64(40, 0);
            },
            &["L1 table is at 0"],
        ),
        (
            "l1_table_offset",
            |i| {
                i.be64(40, !0xffff);
            },
            &["L1 table", "largest file offset"],
        ),
        (
            "refcount_table_offset",
            |i| {
                i.be64(48, !0xffff);
            },
            &["refcount table", "largest file offset"],
        ),
        (
            "refcount_table_offset",
            |i| {
                i.be64(48, 513);
            },
            &["refcount table", "multiple"],
        ),
        (
            "refcount_table_clusters",
            |i| {
                i.be32(56, u32::MAX);
            },
            &["refcount_table_clusters", "limit"],
        ),
        (
            "refcount_table_clusters",
            |i| {
                i.be32(56, 0);
            },
            &["refcount_table_clusters is 0"],
        ),
        (
            "refcount_order",
            |i| {
                i.be32(96, 7);
            },
            &["refcount_order is 7"],
        ),
        (
            "refcount_order",
            |i| {
                i.be32(96, 255);
            },
            &["refcount_order is 255"],
        ),
    ];
    for (field, change, words) in cases {
        let error = refused(&changed(change), words);
        let unsupported = matches!(error, Error::Unsupported(_));
        assert_eq!(unsupported, field == "version", "{field}: {error:?}");
    }
}

#[test]
fn version_1_is_refused_by_name() {
    let error = refused(
        &changed(|i| {
            i.be32(4, 1);
        }),
        &["version 1"],
    );
    assert!(matches!(error, Error::Unsupported(_)));
}

#[test]
fn snapshot_fields() {
    refused(
        &changed(|i| {
            i.be32(60, 65537).be64(64, 5 << 16);
        }),
        &["nb_snapshots is 65537"],
    );
    refused(
        &changed(|i| {
            i.be32(60, 1).be64(64, 100);
        }),
        &["snapshot table", "multiple"],
    );
    refused(
        &changed(|i| {
            i.be32(60, 1).be64(64, 0);
        }),
        &["snapshot table is at 0"],
    );

    let list = |image: &Handmade| image.open().unwrap().format.list_snapshots();
    // Past the end of the file; extra data past its limit; names past the end of the file.
    let past = list(&changed(|i| {
        i.be32(60, 1).be64(64, 1 << 40);
    }))
    .unwrap_err();
    assert!(past.text().contains("entry 0 of the snapshot table"), "{past}");
    let extra = list(&changed(|i| {
        i.be32(60, 1).be64(64, 7 << 16).be32((7 << 16) + 36, u32::MAX);
    }));
    assert!(extra.unwrap_err().text().contains("extra data"));
    let names = list(&changed(|i| {
        i.be32(60, 2).be64(64, 7 << 16).be32((7 << 16) + 12, u32::MAX);
    }));
    assert!(names.unwrap_err().text().contains("snapshot table"));
}

#[test]
fn snapshots_are_selected_by_id_then_by_name() {
    let mut image = Handmade::v3();
    let table = image.at(7);
    image.be32(60, 3).be64(64, table as u64);
    // Version 3 entries have the disk size in their extra data; version 2 wrote none.
    let entries = [("7", "a", 65536 + 1), ("a", "b", 0), ("9", "b", 1 << 62)];
    let mut at = table;
    for (id, name, size) in entries {
        let l1 = image.cluster(3);
        image.be64(at, l1).be32(at + 8, 1);
        image.be32(at + 12, 1 << 16 | 1).be32(at + 16, 1_700_000_000).be32(at + 32, 5);
        let mut names = at + 40;
        if size > 0 {
            image.be32(at + 36, 16).be64(at + 40, 6).be64(at + 48, size);
            names += 16;
        }
        image.bytes[names] = id.as_bytes()[0];
        image.bytes[names + 1] = name.as_bytes()[0];
        at = (names + 2).next_multiple_of(8);
    }
    let mut disk = image.open().unwrap();
    let listed = disk.format.list_snapshots().unwrap();
    assert_eq!(listed.iter().map(|s| s.vm_state_size).collect::<Vec<_>>(), [6, 5, 6]);
    assert_eq!(disk.format.select_snapshot("7").unwrap(), 65536);
    assert_eq!(disk.format.select_snapshot("a").unwrap(), 8 << 16, "the id goes before the name");
    let twice = disk.format.select_snapshot("b").unwrap_err();
    assert!(twice.text().contains("2 snapshots have the name \"b\""), "{twice}");
    // A disk far larger than its L1 table: the rest is unallocated, and found at once.
    assert_eq!(disk.format.select_snapshot("9").unwrap(), 1 << 62);
    assert_eq!(walk(&mut disk.format, 1 << 62, || 16, 10).end, 1 << 62);

    for (poke, word) in [(3 << 16 | 1, "multiple"), (1 << 62, "the file ends"), (0, "at 0")] {
        image.be64(table, poke);
        let error = image.open().unwrap().format.select_snapshot("7").unwrap_err();
        assert!(error.text().contains("the L1 table of snapshot \"7\"") && error.text().contains(word), "{error}");
    }
    image.be64(table, 3 << 16).be64(table + 48, u64::MAX);
    assert!(image.open().unwrap().format.list_snapshots().is_err(), "a disk past the largest offset");
}

#[test]
fn encryption_is_refused_by_name() {
    for (method, word) in [(1, "AES"), (2, "LUKS"), (3, "unknown crypt_method, 3")] {
        let error = refused(
            &changed(|i| {
                i.be32(32, method);
            }),
            &["encryption", word],
        );
        assert!(matches!(error, Error::Unsupported(_)));
    }
}

#[test]
fn unknown_incompatible_features_are_refused_by_number_and_name() {
    for bit in 5..64u32 {
        let number = format!("bit {bit}");
        let error = refused(
            &changed(|i| {
                i.be64(72, 1 << bit);
            }),
            &["incompatible", &number],
        );
        assert!(matches!(error, Error::Unsupported(_)));
    }
    let mut names = vec![0u8; 3 * 48];
    names[..8].copy_from_slice(b"\x01\x07wrong\0");
    names[48..58].copy_from_slice(b"\x00\x07bright\n\0");
    let image = changed(|i| {
        i.be64(72, 1 << 7 | 1 << 60);
        i.extensions(104, &[(0x1234_5678, b"unknown, skipped"), (0x6803_f857, &names)]);
    });
    refused(&image, &["bit 7 (\"bright\\n\"), bit 60"]);
    // The name is wanted, and no more: a broken table does not hide the feature.
    let image = changed(|i| {
        i.be64(72, 1 << 7);
        i.be32(104, 0x6803_f857).be32(108, 0x7fff_ffff);
    });
    refused(&image, &["incompatible features: bit 7"]);
}

#[test]
fn unknown_compatible_and_autoclear_features_are_facts() {
    let disk = changed(|i| {
        i.be64(80, 1 << 9).be64(88, 1 << 63);
    })
    .open()
    .unwrap();
    let fact = |name: &str| disk.info.facts.iter().find(|fact| fact.name == name).unwrap().value.clone();
    assert_eq!(fact("compatible-features"), "bit 9");
    assert_eq!(fact("autoclear-features"), "bit 63");
}

#[test]
fn dirty_and_corrupt_images_are_read_and_corrupt_ones_not_written() {
    for (bit, word) in [(0, "dirty"), (1, "corrupt")] {
        let image = changed(|i| {
            i.be64(72, 1 << bit);
        });
        let mut disk = image.open().unwrap();
        assert_eq!(disk.read(0, 512).unwrap(), material(512, 1));
        let fact = disk.info.facts.iter().find(|fact| fact.name == word).unwrap();
        assert_eq!(fact.value, "yes");
        // A dirty one is repaired when writing begins.
        if word == "corrupt" {
            refused_for(&image, Access::ReadWrite, &["marked", word]);
        } else {
            assert!(image.open_for(Access::ReadWrite).is_ok());
        }
    }
    let disk = Handmade::v3().open_for(Access::ReadWrite).unwrap();
    assert!(!disk.info.overwritable);
}

#[test]
fn compression_types() {
    let with = |feature: u64, kind: u32| {
        changed(|i| {
            i.be32(100, 112).be64(72, feature << 3).be32(104, kind << 24);
        })
    };
    assert!(with(0, 0).open().is_ok());
    assert!(with(1, 1).open().is_ok());
    refused(&with(1, 0), &["compression type is 0"]);
    refused(&with(0, 1), &["compression type is 1", "without the feature"]);
    assert!(matches!(refused(&with(1, 8), &["compression type 8"]), Error::Unsupported(_)));
    // Without the field, the feature cannot be meant.
    refused(
        &changed(|i| {
            i.be64(72, 1 << 3);
        }),
        &["compression type is 0"],
    );
}

#[test]
fn longer_headers_and_unknown_extensions_are_skipped() {
    let image = changed(|i| {
        i.be32(100, 1024);
        i.bytes[112..1024].fill(0xff);
        let end = i.extensions(1024, &[(0xdead_beef, &[0xff; 100]), (0xe279_2aca, b"raw"), (7, b"")]);
        i.bytes[end..end + 9].copy_from_slice(b"./back up");
        i.be64(8, end as u64).be32(16, 9);
    });
    let storage = Storage::new();
    storage.insert("/images/disk.qcow2", image.bytes);
    storage.insert("/images/back up", material(1 << 20, 5));
    let disk = storage.disk::<Qcow2>("/images/disk.qcow2").unwrap();
    let backing = disk.backing().unwrap();
    assert_eq!((backing.name.as_str(), backing.format.as_deref()), ("./back up", Some("raw")));
    assert_eq!(disk.backing_bytes().unwrap(), material(1 << 20, 5));
}

#[test]
fn header_extensions() {
    for length in [0x7fff_ffff, u32::MAX, 65536 - 111] {
        refused(
            &changed(|i| {
                i.be32(104, 5).be32(108, length);
            }),
            &["header extension 0x00000005"],
        );
    }
    // Up to the last byte is legal, and there is no end mark then.
    assert!(
        changed(|i| {
            i.be32(104, 5).be32(108, 65536 - 112);
        })
        .open()
        .is_ok()
    );
    refused(
        &changed(|i| {
            i.extensions(104, &[(0xe279_2aca, b"sixteen-letters!")]);
        }),
        &["format of the backing file", "16 bytes"],
    );
    refused(
        &changed(|i| {
            i.extensions(104, &[(0x2385_2875, &[0; 25])]);
        }),
        &["bitmaps extension"],
    );
    let long = vec![b'x'; 4097];
    refused(
        &changed(|i| {
            i.extensions(104, &[(0x4441_5441, &long)]);
        }),
        &["name of the data file", "4097"],
    );
    refused(
        &changed(|i| {
            i.extensions(104, &[(0xe279_2aca, b"\xff")]);
        }),
        &["not UTF-8"],
    );
    let name = changed(|i| {
        i.be64(8, 512).be32(16, 2);
        i.bytes[512..514].copy_from_slice(b"a\xff");
    });
    assert!(matches!(refused(&name, &["not UTF-8"]), Error::Unsupported(_)));
}

#[test]
fn backing_names_are_plain_names() {
    for name in ["json:{\"driver\":\"file\"}", "nbd://host/x", "file:///x", "/abs/canary", "../../canary", "a\0b"] {
        let image = changed(|i| {
            i.be64(8, 512).be32(16, u32::try_from(name.len()).unwrap());
            i.bytes[512..512 + name.len()].copy_from_slice(name.as_bytes());
        });
        let storage = Storage::new();
        storage.insert("/images/disk.qcow2", image.bytes);
        let error = storage.disk::<Qcow2>("/images/disk.qcow2").map(drop).unwrap_err();
        assert!(matches!(error, Error::Denied(_)), "{error:?}");
        assert!(error.text().contains(&format!("{name:?}")), "{error}");
        assert!(storage.opened().iter().all(|path| path.starts_with('/') && !path.contains("//")));
    }
}

#[test]
fn external_data_files_are_opened_in_connect_only() {
    let image = changed(|i| {
        i.be64(72, 1 << 2).be64(88, 1 << 1);
        i.extensions(104, &[(0x4441_5441, b"../d.bin")]);
        // The host offset is the guest offset; 0 needs bit 63.
        i.l2(0, 1 << 63).l2(1, 1 << 16).l2(2, 3 << 16).l2(3, 1 << 62 | 512);
    });
    let storage = Storage::new();
    storage.insert("/images/disk.qcow2", image.bytes.clone());
    let denied = storage.disk::<Qcow2>("/images/disk.qcow2").map(drop).unwrap_err();
    assert!(matches!(denied, Error::Denied(_)) && denied.text().contains("\"../d.bin\""), "{denied:?}");

    storage.insert("/d.bin", material(512 << 10, 4));
    let mut disk = storage.disk::<Qcow2>("/images/disk.qcow2").unwrap();
    assert_eq!(disk.info.files, ["../d.bin"]);
    assert_eq!(disk.read(0, 128 << 10).unwrap(), material(128 << 10, 4));
    assert!(disk.read(2 << 16, 1).unwrap_err().text().contains("not the offset in the disk"));
    assert!(disk.read(3 << 16, 1).unwrap_err().text().contains("external data file"));

    refused(
        &changed(|i| {
            i.be64(72, 1 << 2);
        }),
        &["external data file", "not name"],
    );
    refused(
        &changed(|i| {
            i.be64(88, 1 << 1);
        }),
        &["raw-external-data", "without"],
    );
}

#[test]
fn a_bad_entry_costs_its_own_cluster_only() {
    let data = 5 << 16;
    for (entry, why) in [
        (data | 1 << 63 | 2, "reserved"),
        (data | 1 << 8, "reserved"),
        (data | 1 << 56, "reserved"),
        (data | 1 << 61, "reserved"),
        (data + 512, "multiple"),
        (1 << 62 | 8 << 16, "past the end of the file"),
    ] {
        let mut image = Handmade::v3();
        image.l2(1, entry);
        let mut disk = image.open().unwrap();
        assert_eq!(disk.read(0, 65536).unwrap(), material(65536, 1));
        let error = disk.read(65536, 1).unwrap_err();
        assert!(matches!(error, Error::Corrupt(_)), "{error:?}");
        for word in ["L2 table at 0x40000", "of L1 entry 0", "entry 1 is", &format!("{entry:#018x}"), why] {
            assert!(error.text().contains(word), "no {word:?} in {error}");
        }
        assert_eq!(disk.read(2 << 16, 4096).unwrap(), [0; 4096]);
    }
}

#[test]
fn compressed_offsets_have_56_bits() {
    // With small clusters, the field is wider than an offset may be.
    let mut image = Handmade::new(3, 9, 8);
    image.l2(1, 1 << 62 | 1 << 56 | 5 << 9);
    let error = image.open().unwrap().read(512, 1).unwrap_err();
    assert!(error.text().contains("reserved bits") && error.text().contains("entry 1"), "{error}");
}

#[test]
fn the_zero_flag() {
    let mut image = Handmade::v3();
    image.l2(0, 1).l2(1, 5 << 16 | 1 << 63 | 1);
    let located = image.open().unwrap().format.locate(0, 1, 16).unwrap();
    assert_eq!(located.extents[0].placement, Placement::Zero);
    assert_eq!(located.extents[0].length, 2 << 16);

    let mut image = Handmade::new(2, 16, 8);
    image.l2(1, 1);
    let mut disk = image.open().unwrap();
    assert!(disk.read(1 << 16, 1).unwrap_err().text().contains("version 2"));
}

#[test]
fn bad_l1_entries() {
    for (entry, why) in [
        (4 << 16 | 1 << 63 | 1, "reserved"),
        (4 << 16 | 1 << 56, "reserved"),
        (4 << 16 | 512, "multiple"),
        (8 << 16, "past the end"),
        (0x00ff_ffff_ffff_0000, "past the end"),
    ] {
        let mut image = Handmade::v3();
        let l1 = image.at(3);
        image.be64(l1, entry);
        let error = image.open().unwrap().read(0, 1).unwrap_err();
        for word in ["L1 table, entry 0", &format!("{entry:#018x}"), why] {
            assert!(error.text().contains(word), "no {word:?} in {error}");
        }
    }
}

#[test]
fn extended_entries() {
    let mut image = changed(|i| {
        i.be64(72, 1 << 4);
    });
    let all = u64::from(u32::MAX);
    image
        .extended(0, 5 << 16, 0b0101 | 0b1010 << 32)
        .extended(1, 0, 0b11 << 32)
        .extended(2, 5 << 16, 1 | 1 << 32)
        .extended(3, 0, 1)
        .extended(4, 5 << 16 | 1, 0)
        .extended(5, 1 << 62 | 5 << 16, 1)
        .extended(6, 5 << 16, all)
        .extended(7, 5 << 16, all << 32);
    let mut disk = image.open().unwrap();
    let unit = 2048;
    let located = disk.format.locate(0, 65536, 64).unwrap();
    let placements: Vec<_> = located.extents.iter().map(|e| (e.length, e.placement)).collect();
    assert!(matches!(placements[0], (2048, Placement::Data { offset: 0x50000, .. })));
    assert_eq!(placements[1], (2048, Placement::Zero));
    assert!(matches!(placements[2], (2048, Placement::Data { offset: 0x51000, .. })));
    assert_eq!(placements[3], (2048, Placement::Zero));
    assert_eq!(placements[4], (28 * 2048, Placement::Unallocated));
    assert_eq!(placements[5], (2 * 2048, Placement::Zero));
    // Even one extent at a time, in the middle of a cluster.
    for subcluster in 0..32 {
        let offset = subcluster * unit + 7;
        let located = disk.format.locate(offset, 1, 1).unwrap();
        assert!(located.start <= offset && located.start + located.extents[0].length > offset);
    }
    for (cluster, word) in [(2, "both"), (3, "no offset"), (4, "zero flag"), (5, "compressed")] {
        let error = disk.read(cluster << 16, 1).unwrap_err();
        assert!(error.text().contains(word) && error.text().contains("bitmap"), "{error}");
    }
    assert_eq!(disk.read(6 << 16, 65536).unwrap(), material(65536, 1));
    assert_eq!(disk.read(7 << 16, 65536).unwrap(), vec![0; 65536]);

    let mut small = Handmade::new(3, 13, 8);
    small.be64(72, 1 << 4);
    refused(&small, &["extended L2", "cluster_bits 13"]);
}

/// An image whose first cluster is compressed: `packed` at an odd place near the end of the file.
fn packed(kind: u32, packed: &[u8], sectors: u64) -> Handmade {
    let mut image = Handmade::v3();
    if kind == 1 {
        image.be32(100, 112).be64(72, 1 << 3).be32(104, kind << 24);
    }
    let at = image.at(5) + 777;
    image.bytes.truncate(at);
    image.bytes.extend_from_slice(packed);
    image.l2(0, 1 << 62 | sectors << 54 | at as u64).l2(1, 0);
    image
}

fn sectors(bytes: usize) -> u64 {
    ((777 % 512 + bytes) as u64).div_ceil(512) - 1
}

fn deflate(bytes: &[u8]) -> Vec<u8> {
    miniz_oxide::deflate::compress_to_vec(bytes, 6)
}

#[test]
fn compressed_data_may_be_cut_at_the_end_of_the_file() {
    let content = material(65536, 11);
    let data = deflate(&content);
    let image = packed(0, &data, sectors(data.len()));
    assert_ne!(image.bytes.len() % 512, 0);
    let mut disk = image.open().unwrap();
    assert_eq!(disk.read(0, 65536).unwrap(), content);
    let located = disk.format.locate(0, 1, 1).unwrap();
    let Placement::Packed { token } = located.extents[0].placement else { panic!("{located:?}") };
    assert_eq!(disk.format.unpack(token, 1000).unwrap(), content[..1000]);
    assert!(disk.format.unpack(token, 65537).is_err());
    assert!(disk.format.unpack(token, 0).is_err());
    for token in [token | 1 << 62, token | 1 << 63, u64::MAX, 0, 1] {
        assert!(disk.format.unpack(token, 65536).is_err(), "{token:#x}");
    }
}

#[test]
fn the_last_cluster_is_cut_at_the_end_of_the_disk() {
    let content = material(65536, 12);
    let data = deflate(&content);
    let mut image = packed(0, &data, sectors(data.len()));
    image.be64(24, 1536 + 100);
    let mut disk = image.open().unwrap();
    assert_eq!(disk.info.virtual_size, 1536);
    assert_eq!(disk.read(0, 1536).unwrap(), content[..1536]);
}

#[test]
fn damaged_compressed_data() {
    let corrupt = |image: &Handmade, word: &str| {
        let error = image.open().unwrap().read(0, 1).unwrap_err();
        assert!(matches!(error, Error::Corrupt(_)), "{error:?}");
        assert!(error.text().contains("compressed cluster at 0x50309") && error.text().contains(word), "{error}");
    };
    let data = deflate(&material(65536, 11));
    corrupt(&packed(0, &data[..data.len() / 2], sectors(data.len())), "less than a cluster");
    corrupt(&packed(0, &data, 3), "less than a cluster");
    corrupt(&packed(0, &[0xff; 512], 0), "not deflate data");
    corrupt(&packed(0, &deflate(&material(65535, 11)), 200), "less than a cluster");
    corrupt(&packed(0, &deflate(&material(65537, 11)), 200), "more than a cluster");
    // A bomb: 64 MiB in 64 KiB.
    let bomb = deflate(&vec![0; 64 << 20]);
    corrupt(&packed(0, &bomb, sectors(bomb.len())), "more than a cluster");
}

/// A zstd frame by hand: blocks of one repeated byte.
fn zstd(header: &[u8], blocks: &[(u32, u8)]) -> Vec<u8> {
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd];
    frame.extend_from_slice(header);
    for (number, (length, byte)) in blocks.iter().enumerate() {
        let last = u32::from(number + 1 == blocks.len());
        frame.extend_from_slice(&(last | 1 << 1 | length << 3).to_le_bytes()[..3]);
        frame.push(*byte);
    }
    frame
}

#[test]
fn zstd_frames() {
    let read = |frame: &[u8]| {
        let image = packed(1, frame, sectors(frame.len()));
        image.open().unwrap().read(0, 65536)
    };
    // The descriptor says: one segment and 4 bytes of size; or a window, of 64 KiB, 8 MiB and 2 TiB.
    let sized = |size: u32| [&[0xa0][..], &size.to_le_bytes()].concat();
    let windows = [[0, 6 << 3], [0, 13 << 3], [0, 0xff]];
    let half = 32768;
    let expected = [vec![1; half], vec![2; half]].concat();
    let blocks = [(32768, 1), (32768, 2)];
    assert_eq!(read(&zstd(&sized(65536), &blocks)).unwrap(), expected);
    assert_eq!(read(&zstd(&windows[0], &blocks)).unwrap(), expected);
    assert_eq!(read(&zstd(&windows[1], &blocks)).unwrap(), expected);

    let error = |frame: &[u8], word: &str| {
        let error = read(frame).unwrap_err();
        assert!(matches!(error, Error::Corrupt(_)) && error.text().contains(word), "no {word:?} in {error:?}");
    };
    error(&zstd(&windows[2], &blocks), "large window");
    error(&zstd(&sized(u32::MAX), &blocks), "large window");
    error(&zstd(&windows[0], &[(65536, 1), (1, 1)]), "more than a cluster");
    error(&zstd(&windows[0], &[(65535, 1)]), "less than a cluster");
    error(&zstd(&windows[0], &blocks)[..10], "damaged");
    error(b"\x50\x2a\x4d\x18\x04\0\0\0skip", "not a zstd frame");
    error(b"no frame", "not a zstd frame");
    error(b"", "past the end of the file");
    // With a dictionary.
    error(&zstd(&[0x01, 6 << 3, 9], &blocks), "dictionary");
    // Small blocks are fine, and empty ones are not without end.
    assert_eq!(read(&zstd(&windows[0], &[(256, 7); 256])).unwrap(), vec![7; 65536]);
    error(&zstd(&windows[0], &[(0, 7); 10_000]), "too many blocks");
    // A bomb: 1 GiB in 32 KiB, through the smallest and the largest window.
    let bomb = vec![(128 << 10, 0); 8 << 10];
    error(&zstd(&windows[0], &bomb), "damaged");
    error(&zstd(&windows[1], &bomb), "more than a cluster");
}

#[test]
fn data_past_the_end_of_the_file_reads_as_zero() {
    let mut image = Handmade::v3();
    image.l2(2, 1 << 40 | 1 << 63);
    let end = image.at(6) + 1000;
    image.bytes.truncate(end);
    let mut disk = image.open().unwrap();
    let content = disk.read(1 << 16, 2 << 16).unwrap();
    assert_eq!(content[..1000], material(65536, 2)[..1000]);
    assert!(content[1000..].iter().all(|byte| *byte == 0));
}

#[test]
fn metadata_can_be_read_as_data() {
    // Entries that mean the header, the L1 table, the L2 table itself, and one cluster twice.
    let mut image = Handmade::v3();
    image.l2(0, 6 << 16).l2(1, 6 << 16).l2(2, 3 << 16).l2(3, 4 << 16).l2(4, 2 << 16);
    let mut disk = image.open().unwrap();
    let content = disk.read(0, 8 << 16).unwrap();
    assert_eq!(content[..1 << 16], content[1 << 16..2 << 16]);
    assert_eq!(content[2 << 16..5 << 16], [3, 4, 2].map(|n| &image.bytes[n << 16..(n + 1) << 16]).concat());
}

#[test]
fn an_l1_table_larger_than_the_disk_needs() {
    let image = changed(|i| {
        i.be32(36, 8192);
        let rest = i.at(3) + 8;
        // Never looked at: it is about bytes past the end of the disk.
        i.bytes[rest..rest + 8 * 8191].fill(0xff);
    });
    let mut disk = image.open().unwrap();
    assert_eq!(disk.read(0, 65536).unwrap(), material(65536, 1));
    assert_eq!(walk(&mut disk.format, 8 << 16, || 4, 10).errors, 0);
}

#[test]
fn empty_disks() {
    for entries in [0, 1] {
        let image = changed(|i| {
            i.be64(24, 0).be32(36, entries);
        });
        let mut disk = image.open().unwrap();
        assert_eq!(disk.info.virtual_size, 0);
        assert!(disk.format.locate(0, 1, 1).is_err());
    }
}

#[test]
fn every_prefix_of_an_image() {
    for version in [2, 3] {
        let image = Handmade::new(version, 9, 8);
        let content = image.open().unwrap().read(0, 8 * 512).unwrap();
        for length in 0..image.bytes.len() {
            let mut cut = Handmade { bytes: image.bytes[..length].to_vec(), ..Handmade::new(version, 9, 8) };
            match cut.open() {
                Err(error) => {
                    assert!(matches!(error, Error::Corrupt(_)), "{length}: {error:?}");
                    assert!(length < 3 * 512 + 8, "{length}: {error}");
                }
                Ok(mut disk) => match disk.read(0, 8 * 512) {
                    Err(error) => assert!(length < 5 * 512, "{length}: {error}"),
                    // The data is cut: the rest reads as zero.
                    Ok(read) => {
                        cut.bytes.resize(image.bytes.len(), 0);
                        assert_eq!(read, cut.open().unwrap().read(0, 8 * 512).unwrap());
                        assert_eq!(read.len(), content.len());
                    }
                },
            }
        }
    }
}

/// Changes bytes of an image again and again; whatever comes out keeps the contract, and ends.
fn flip(bytes: &[u8], metadata: usize, rounds: u64, seed: u64) -> usize {
    let mut random = Random(seed);
    let mut opened = 0;
    for _ in 0..rounds {
        let mut bytes = bytes.to_vec();
        for _ in 0..1 + random.below(6) {
            let at = usize::try_from(random.below(metadata as u64)).unwrap();
            bytes[at] = match random.below(4) {
                0 => 0xff,
                1 => 0,
                2 => bytes[at] ^ 1 << random.below(8),
                _ => random.next().to_le_bytes()[0],
            };
        }
        let storage = Storage::new();
        storage.insert("/a.qcow2", bytes);
        storage.insert("/b.raw", vec![3; 4096]);
        let mut ids = Vec::new();
        let disk = storage.disk_with::<Qcow2>("/a.qcow2", Access::ReadOnly, |qcow2| {
            ids = qcow2.list_snapshots().unwrap_or_default();
            Ok(())
        });
        let Ok(mut disk) = disk else { continue };
        opened += 1;
        let size = disk.info.virtual_size;
        walk(&mut disk.format, size, || 1 + u32::try_from(random.below(64)).unwrap(), 200);
        for snapshot in ids {
            if let Ok(size) = disk.format.select_snapshot(&snapshot.id) {
                walk(&mut disk.format, size, || 4096, 50);
            }
        }
    }
    opened
}

#[test]
fn flipped_bytes_never_panic() {
    for (bits, seed) in [(9, 1), (12, 2), (16, 3)] {
        let mut image = Handmade::new(3, bits, 8);
        image.be32(100, 112);
        image.extensions(112, &[(0xe279_2aca, b"raw"), (0x6803_f857, &[0; 48])]);
        let header = flip(&image.bytes, 200, 3000, seed);
        let tables = flip(&image.bytes, image.bytes.len().min(6 << 12), 1000, seed + 10);
        assert!(header > 100 && tables > 100, "{header} {tables}: too few got past the header to mean anything");
    }
}

#[test]
fn flipped_bytes_of_compressed_data_never_panic() {
    let content = material(65536, 5);
    let deflated = packed(0, &deflate(&content), sectors(deflate(&content).len()));
    let tail = &deflated.bytes[deflated.at(4)..];
    assert!(tail.len() > 1000);
    let mut random = Random(77);
    for round in 0..2000 {
        let mut image = Handmade { bytes: deflated.bytes.clone(), cluster_size: deflated.cluster_size };
        let start = image.at(5) + 777;
        for _ in 0..1 + round % 4 {
            let at = start + usize::try_from(random.below(((image.bytes.len() - start) / 8) as u64)).unwrap();
            image.bytes[at] = random.next().to_le_bytes()[0];
        }
        let _ = image.open().unwrap().read(0, 65536);
    }
}

#[test]
fn flipped_bytes_of_images_by_qemu_never_panic() {
    if !have_qemu() {
        return;
    }
    let lab = Lab::new();
    lab.write("m", &material(200_000, 8));
    for (number, options) in
        ["compression_type=zstd,extended_l2=on", "compression_type=zstd", "compat=0.10"].into_iter().enumerate()
    {
        lab.qemu_img(&format!("convert -q -f raw -c -O qcow2 -o {options},cluster_size=16k m a.qcow2"));
        lab.qemu_img("snapshot -c one a.qcow2");
        lab.qemu_io("a.qcow2", &["write -z 32k 16k".into(), "write -P 5 1k 512".into()]);
        let bytes = lab.bytes("a.qcow2");
        let opened = flip(&bytes, bytes.len(), 600, number as u64 + 20);
        let header = flip(&bytes, 256, 300, number as u64 + 30);
        assert!(opened > 300, "{opened} {header}: too few got past the header to mean anything");
    }
}
