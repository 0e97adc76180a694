//! Snapshots made, applied and deleted, in turns with QEMU, against a model; and power cuts in the middle.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation)]

mod edit;
mod support;

use std::fmt::Write as _;
use std::path::Path;

use blockhouse_plugin::testing::Storage;
use blockhouse_plugin::{Access, Error, Resizer, Result, SnapshotEditor, Snapshots};
use blockhouse_qcow2::Qcow2;

use crate::edit::{IMAGE, View, cut, edit, flaws, info, view, view_of_qemu, write};
use crate::support::{Handmade, Lab, Random, have_qemu, material};

/// Options, cluster size, and whether there is a backing file.
const KINDS: &[(&str, u64, bool)] = &[
    ("cluster_size=512,refcount_bits=8", 512, false),
    ("cluster_size=512,refcount_bits=64", 512, true),
    ("cluster_size=1k,refcount_bits=4", 1024, true),
    ("compat=0.10,cluster_size=4k", 4096, false),
    ("cluster_size=4k", 4096, true),
    ("cluster_size=16k,extended_l2=on", 16384, true),
    ("cluster_size=64k,lazy_refcounts=on,compression_type=zstd", 65536, false),
    ("cluster_size=2M,refcount_bits=32", 2 << 20, true),
];

fn check(lab: &Lab, what: &str) {
    assert_eq!(flaws(Path::new(&lab.path("."))), None, "{what}");
}

/// An image with data, compressed clusters where it can have them, and what it reads as.
fn make(lab: &Lab, options: &str, size: u64, base: &[u8], backing: bool) -> Vec<u8> {
    lab.write("base.raw", base);
    if backing {
        lab.qemu_img(&format!("create -q -f qcow2 -o {options} -b base.raw -F raw top.qcow2 {size}"));
        let mut content = base.to_vec();
        content.resize(size as usize, 0);
        return content;
    }
    let mut content = material(size as usize / 2, 77);
    content.resize(size as usize, 0);
    lab.write("full.raw", &content);
    lab.qemu_img(&format!("convert -c -f raw -O qcow2 -o {options} full.raw top.qcow2"));
    content
}

struct Run<'a> {
    lab: &'a Lab,
    base: &'a [u8],
    model: View,
    log: String,
    random: Random,
    cluster: u64,
    v2: bool,
}

impl Run<'_> {
    /// Makes a change, and cuts the power in the middle of it on copies.
    fn cut(&mut self, change: impl FnOnce(&mut Qcow2) -> Result<()>) {
        let image = self.lab.bytes("top.qcow2");
        let seed = self.random.next();
        let new = cut(&image, &[("base.raw", self.base)], seed, 3, change);
        self.lab.write("top.qcow2", &new);
    }

    fn step(&mut self) {
        let ours = self.random.below(3) > 0;
        let who = if ours { "we" } else { "QEMU" };
        let size = self.model.disk.len() as u64;
        match self.random.below(12) {
            0..=3 if size > 0 => {
                let at = self.random.below(size);
                let length = (1 + self.random.below(3 * self.cluster)).min(size - at);
                let seed = self.random.next();
                let _ = writeln!(self.log, "{who}: write {at}+{length}");
                let mut data = material(length as usize, seed);
                if ours {
                    write(self.lab, self.base, at, &data);
                } else {
                    data = vec![seed as u8; length as usize];
                    self.lab.qemu_io("top.qcow2", &[format!("write -P {} {at} {length}", seed as u8)]);
                }
                self.model.disk[at as usize..(at + length) as usize].copy_from_slice(&data);
            }
            4..=6 if self.model.snapshots.len() < 5 => {
                let name = format!("s{}", self.random.next());
                let _ = writeln!(self.log, "{who}: create {name}");
                let id = if ours {
                    let mut id = String::new();
                    self.cut(|qcow2| {
                        id = qcow2.create_snapshot(&name, 1_700_000_000, 5)?;
                        Ok(())
                    });
                    id
                } else {
                    self.lab.qemu_img(&format!("snapshot -c {name} top.qcow2"));
                    let info = info(self.lab);
                    info["snapshots"].as_array().unwrap().last().unwrap()["id"].as_str().unwrap().to_owned()
                };
                self.model.snapshots.push((id, name, self.model.disk.clone()));
            }
            7..=8 if !self.model.snapshots.is_empty() => {
                let number = self.random.below(self.model.snapshots.len() as u64) as usize;
                let (id, _, content) = self.model.snapshots[number].clone();
                let _ = writeln!(self.log, "{who}: apply {id}");
                if ours {
                    self.cut(|qcow2| qcow2.apply_snapshot(&id));
                } else {
                    self.lab.qemu_img(&format!("snapshot -a {id} top.qcow2"));
                }
                self.model.disk = content;
            }
            9 if !self.model.snapshots.is_empty() => {
                let number = self.random.below(self.model.snapshots.len() as u64) as usize;
                let (id, name, _) = self.model.snapshots.remove(number);
                let _ = writeln!(self.log, "{who}: delete {id}");
                if ours {
                    self.cut(|qcow2| qcow2.delete_snapshot(&id));
                } else {
                    // QEMU takes names here.
                    self.lab.qemu_img(&format!("snapshot -d {name} top.qcow2"));
                }
            }
            _ if !self.v2 => {
                let size = (1 + self.random.below(60)) * self.cluster.min(65536);
                let hide = self.model.backing.is_some() && (self.model.disk.len() < self.base.len());
                let _ = writeln!(self.log, "we: resize {} to {size}, hide {hide}", self.model.disk.len());
                let old = self.model.disk.len() as u64;
                self.cut(|qcow2| qcow2.resize(size, hide));
                // As a host does that settles the end.
                let rest = size.min(old.next_multiple_of(self.cluster)).saturating_sub(old);
                if rest > 0 {
                    write(self.lab, self.base, old, &vec![0; rest as usize]);
                }
                self.model.disk.resize(size as usize, 0);
            }
            _ => {}
        }
    }
}

/// Writes, snapshots and new sizes, ours and QEMU's in turns, with power cuts in ours. `SNAPSHOT_SEEDS` says how
/// many sequences.
#[test]
fn sequences_agree_with_a_model_and_with_qemu() {
    if !have_qemu() {
        return;
    }
    let seeds = std::env::var("SNAPSHOT_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(16);
    let next = std::sync::atomic::AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    if seed >= seeds {
                        break;
                    }
                    sequence(seed);
                }
            });
        }
    });
}

fn sequence(seed: u64) {
    let (options, cluster, backing) = KINDS[seed as usize % KINDS.len()];
    let lab = Lab::new();
    let size = 40 * cluster.min(65536) + if seed.is_multiple_of(2) { 512 } else { 0 };
    let base = material(size as usize * 5 / 4, 5);
    let disk = make(&lab, options, size, &base[..], backing);
    let disk = disk[..size as usize].to_vec();
    let bases: &[(&str, &[u8])] = &[("base.raw", &base)];
    let backing = view(&lab.bytes("top.qcow2"), bases).backing;
    let v2 = options.contains("0.10");
    let model = View { backing, disk, snapshots: Vec::new() };
    let random = Random((seed + 1) * 0x9e37_79b9);
    let mut run = Run { lab: &lab, base: &base, model, log: String::new(), random, cluster, v2 };
    for number in 0..20 {
        run.step();
        let context = || format!("seed {seed}, {options}\n{}", run.log);
        if let Some(flaws) = flaws(Path::new(&lab.path("."))) {
            panic!("{flaws}: {}", context());
        }
        let ours = view(&lab.bytes("top.qcow2"), bases);
        assert!(ours == run.model, "{}\n{ours:?}\n{:?}", context(), run.model);
        if number % 5 == 4 {
            let theirs = view_of_qemu(&lab);
            assert!(theirs == run.model, "{}\nQEMU: {theirs:?}\n{:?}", context(), run.model);
        }
    }
}

#[test]
fn qemu_lists_what_was_created() {
    if !have_qemu() {
        return;
    }
    let lab = Lab::new();
    lab.qemu_img("create -q -f qcow2 top.qcow2 1M");
    lab.qemu_img("snapshot -c theirs top.qcow2");
    assert_eq!(edit(&lab, |qcow2| qcow2.create_snapshot("ours ü", 1_600_000_000, 123_456_789)).unwrap(), "2");
    let info = info(&lab);
    let snapshot = &info["snapshots"][1];
    assert_eq!(snapshot["id"], "2");
    assert_eq!(snapshot["name"], "ours ü");
    assert_eq!(snapshot["date-sec"], 1_600_000_000);
    assert_eq!(snapshot["date-nsec"], 123_456_789);
    assert_eq!(snapshot["vm-state-size"], 0);
    assert_eq!(snapshot["vm-clock-sec"], 0);
    assert!(snapshot.get("icount").is_none(), "{snapshot}");
    // A name that is used already, and an id that goes on from the highest.
    edit(&lab, |qcow2| qcow2.delete_snapshot("1")).unwrap();
    assert_eq!(edit(&lab, |qcow2| qcow2.create_snapshot("ours ü", 0, 0)).unwrap(), "3");
    check(&lab, "after");
    assert!(edit(&lab, |qcow2| qcow2.delete_snapshot("ours ü")).is_err(), "it is two");
    edit(&lab, |qcow2| qcow2.delete_snapshot("2")).unwrap();
    edit(&lab, |qcow2| qcow2.delete_snapshot("ours ü")).unwrap();
    assert!(crate::edit::info(&lab).get("snapshots").is_none());
    check(&lab, "empty");
}

/// A snapshot with the state of a machine keeps it, also when its disk is applied.
#[test]
fn the_state_of_a_machine_stays_with_its_snapshot() {
    if !have_qemu() {
        return;
    }
    let lab = Lab::new();
    lab.qemu_img("create -q -f qcow2 -o cluster_size=4k top.qcow2 4M");
    write(&lab, &[], 0, &material(100_000, 4));
    // As savevm leaves it: the state is in the L1 table past the end of the disk.
    edit(&lab, |qcow2| qcow2.resize(6 << 20, false)).unwrap();
    write(&lab, &[], 4 << 20, &material(50_000, 6));
    edit(&lab, |qcow2| qcow2.create_snapshot("machine", 0, 0)).unwrap();
    let mut image = lab.bytes("top.qcow2");
    let table = u64::from_be_bytes(image[64..72].try_into().unwrap()) as usize;
    image[table + 32..table + 36].copy_from_slice(&50_000u32.to_be_bytes());
    image[table + 40..table + 48].copy_from_slice(&50_000u64.to_be_bytes());
    image[table + 48..table + 56].copy_from_slice(&(4u64 << 20).to_be_bytes());
    lab.write("top.qcow2", &image);
    edit(&lab, |qcow2| qcow2.resize(4 << 20, false)).unwrap();
    check(&lab, "made");
    edit(&lab, |qcow2| qcow2.apply_snapshot("machine")).unwrap();
    check(&lab, "applied");
    assert_eq!(info(&lab)["snapshots"][0]["vm-state-size"], 50_000);
    // Nothing of the state is in the disk when it grows.
    edit(&lab, |qcow2| qcow2.resize(8 << 20, false)).unwrap();
    let now = view_of_qemu(&lab);
    assert!(now.disk[..100_000] == material(100_000, 4) && now.disk[100_000..].iter().all(|byte| *byte == 0));
    edit(&lab, |qcow2| qcow2.delete_snapshot("machine")).unwrap();
    check(&lab, "deleted");
}

#[test]
fn counts_that_cannot_hold_it_are_refused() {
    if !have_qemu() {
        return;
    }
    let lab = Lab::new();
    for (bits, most) in [(1, 0), (2, 2)] {
        lab.qemu_img(&format!("create -q -f qcow2 -o cluster_size=4k,refcount_bits={bits} top.qcow2 1M"));
        write(&lab, &[], 0, &material(100_000, 4));
        for number in 0..most {
            edit(&lab, |qcow2| qcow2.create_snapshot(&format!("s{number}"), 0, 0)).unwrap();
        }
        let image = lab.bytes("top.qcow2");
        let error = edit(&lab, |qcow2| qcow2.create_snapshot("more", 0, 0)).unwrap_err();
        assert!(matches!(&error, Error::Unsupported(text) if text.contains("bits")), "{error:?}");
        assert!(lab.bytes("top.qcow2") == image);
        if most > 0 {
            // Full, and applied all the same: the disk's own references go first.
            edit(&lab, |qcow2| qcow2.apply_snapshot("s0")).unwrap();
            check(&lab, "applied");
        }
    }
}

#[test]
fn names_and_times_are_checked() {
    let image = counted(Handmade::v3());
    let long = "n".repeat(256);
    for (name, seconds, nanoseconds) in
        [("", 0, 0), ("a\0b", 0, 0), (long.as_str(), 0, 0), ("a", 1 << 32, 0), ("a", 0, 1_000_000_000)]
    {
        let (result, bytes) = edit_handmade(&image, |qcow2| qcow2.create_snapshot(name, seconds, nanoseconds));
        assert!(result.is_err(), "{name:?} {seconds} {nanoseconds}");
        assert!(bytes == image.bytes);
    }
    let (result, bytes) = edit_handmade(&image, |qcow2| qcow2.create_snapshot(&long[1..], 1 << 31, 999_999_999));
    assert_eq!(result.unwrap(), "1");
    assert_eq!(view(&bytes, &[]).snapshots[0].1, long[1..]);
    for id in ["1", "", "nothing"] {
        let (result, bytes) = edit_handmade(&image, |qcow2| qcow2.apply_snapshot(id));
        assert!(matches!(&result, Err(Error::Other(text)) if text.contains("no snapshot")), "{result:?}");
        assert!(bytes == image.bytes);
        assert!(edit_handmade(&image, |qcow2| qcow2.delete_snapshot(id)).0.is_err());
    }
}

/// The counts of an image by hand are right.
fn counted(mut image: Handmade) -> Handmade {
    for cluster in 0..7 {
        set_count(&mut image, cluster, 1);
    }
    image
}

fn set_count(image: &mut Handmade, cluster: usize, count: u16) {
    let at = image.at(2) + 2 * cluster;
    image.bytes[at..at + 2].copy_from_slice(&count.to_be_bytes());
}

fn edit_handmade<T>(image: &Handmade, change: impl FnOnce(&mut Qcow2) -> Result<T>) -> (Result<T>, Vec<u8>) {
    let storage = Storage::new();
    storage.insert(IMAGE, image.bytes.clone());
    let mut qcow2 = storage.opened_image::<Qcow2>(IMAGE, Access::ReadWrite).unwrap();
    let result = change(&mut qcow2);
    (result, storage.bytes(IMAGE))
}

/// They are out of date with the change, and not before.
#[test]
fn a_change_that_is_refused_leaves_bitmaps_as_they_are() {
    let mut image = counted(Handmade::v3());
    image.be64(88, 1);
    let (refused, bytes) = edit_handmade(&image, |qcow2| qcow2.apply_snapshot("nosuch"));
    refused.unwrap_err();
    assert!(bytes == image.bytes);
    let (made, bytes) = edit_handmade(&image, |qcow2| qcow2.create_snapshot("a", 0, 0));
    made.unwrap();
    assert_eq!(bytes[72..96], [0; 24]);
}

#[test]
fn contradictions_are_found_before_anything_changes() {
    let (made, bytes) = edit_handmade(&counted(Handmade::v3()), |qcow2| qcow2.create_snapshot("a", 0, 0));
    made.unwrap();
    let good = Handmade { bytes, ..Handmade::v3() };
    let long = |at: usize| u64::from_be_bytes(good.bytes[at..at + 8].try_into().unwrap()) as usize;
    let (l1, table, block) = (long(40), long(64), long(long(48)));
    let (l2, snapshot_l1) = (long(l1), long(table));

    type Damage = Box<dyn Fn(&mut Vec<u8>)>;
    let set = |at: usize, value: u64| -> Damage {
        Box::new(move |bytes| bytes[at..at + 8].copy_from_slice(&value.to_be_bytes()))
    };
    let free = |cluster: usize| -> Damage {
        Box::new(move |bytes| bytes[block + 2 * cluster..block + 2 * cluster + 2].fill(0))
    };
    let damages: [(&str, Damage); 9] = [
        ("reserved bits in an L2 entry", set(l2 + 8, 2)),
        ("a cluster on the refcount table", set(l2 + 8, long(48) as u64)),
        ("a cluster on a refcount block", set(l2 + 8, block as u64)),
        ("a compressed cluster on the header", set(l2 + 8, 1 << 62)),
        ("a cluster past the end of the file", set(l2 + 8, 1 << 40)),
        ("a snapshot whose L2 table is a refcount block", set(snapshot_l1, block as u64)),
        ("a snapshot whose L2 table is past the end", set(snapshot_l1, 1 << 40)),
        ("data that is counted as free", free(5)),
        ("an L2 table that is counted as free", free(l2 >> 16)),
    ];
    for (what, damage) in damages {
        let mut image = Handmade { bytes: good.bytes.clone(), ..Handmade::v3() };
        damage(&mut image.bytes);
        type Change = fn(&mut Qcow2) -> Result<()>;
        let changes: [(&str, Change); 3] = [
            ("create", |qcow2| qcow2.create_snapshot("b", 0, 0).map(|_| ())),
            ("apply", |qcow2| qcow2.apply_snapshot("a")),
            ("delete", |qcow2| qcow2.delete_snapshot("a")),
        ];
        for (name, change) in changes {
            let (result, bytes) = edit_handmade(&image, change);
            // A snapshot is not looked at to make another one.
            if name == "create" && what.contains("snapshot") {
                result.unwrap();
                continue;
            }
            assert!(matches!(result, Err(Error::Corrupt(_))), "{name}, {what}: {result:?}");
            assert!(bytes == image.bytes, "{name}, {what}");
        }
    }
}

/// Two L1 entries with one L2 table would be counted twice, and a table of many of them for hours.
#[test]
fn tables_that_are_named_twice_are_refused() {
    let (made, bytes) = edit_handmade(&counted(Handmade::new(3, 9, 64)), |qcow2| qcow2.create_snapshot("a", 0, 0));
    made.unwrap();
    let mut image = Handmade { bytes, ..Handmade::v3() };
    let table = u64::from_be_bytes(image.bytes[64..72].try_into().unwrap()) as usize;
    let l1 = u64::from_be_bytes(image.bytes[table..table + 8].try_into().unwrap()) as usize;
    let entry = image.bytes[l1..l1 + 8].to_vec();
    image.bytes[l1 + 8..l1 + 16].copy_from_slice(&entry);
    image.bytes[table + 8..table + 12].copy_from_slice(&2u32.to_be_bytes());
    for change in [Qcow2::apply_snapshot, Qcow2::delete_snapshot] {
        let (result, bytes) = edit_handmade(&image, |qcow2| change(qcow2, "a"));
        assert!(matches!(&result, Err(Error::Corrupt(text)) if text.contains("another entry")), "{result:?}");
        assert!(bytes == image.bytes);
    }
}

#[test]
fn a_full_file_system_leaves_the_old_image() {
    if !have_qemu() {
        return;
    }
    let lab = Lab::new();
    lab.qemu_img("create -q -f qcow2 -o cluster_size=1k top.qcow2 400k");
    write(&lab, &[], 0, &material(300 << 10, 1));
    lab.qemu_img("snapshot -c first top.qcow2");
    write(&lab, &[], 50_000, &material(90_000, 2));
    let image = lab.bytes("top.qcow2");
    let old = view(&image, &[]);
    type Change = fn(&mut Qcow2) -> Result<()>;
    let changes: [Change; 3] = [
        |qcow2| qcow2.create_snapshot("more", 1, 2).map(|_| ()),
        |qcow2| qcow2.apply_snapshot("1"),
        |qcow2| qcow2.delete_snapshot("1"),
    ];
    for change in changes {
        for healthy in 0.. {
            let storage = Storage::new();
            storage.insert(IMAGE, image.clone());
            let mut qcow2 = storage.opened_image::<Qcow2>(IMAGE, Access::ReadWrite).unwrap();
            storage.fail_after(IMAGE, Some(healthy));
            let result = change(&mut qcow2);
            let written = storage.take_changes(IMAGE).len();
            lab.write("top.qcow2", &storage.bytes(IMAGE));
            check(&lab, &format!("after {healthy}"));
            if result.is_ok() {
                assert_ne!(view(&storage.bytes(IMAGE), &[]), old);
                break;
            }
            // The last failure is that of the sync after the header.
            assert!(view(&storage.bytes(IMAGE), &[]) == old || written == healthy, "after {healthy}");
        }
    }
}

#[test]
fn a_power_cut_leaves_the_old_snapshots_or_the_new_ones() {
    if !have_qemu() {
        return;
    }
    let factor = std::env::var("SNAPSHOT_CUTS").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    for (number, (options, cluster, backing)) in KINDS.iter().enumerate() {
        let lab = Lab::new();
        let unit = cluster.min(&65536);
        let size = 60 * unit;
        let base = material(size as usize, 5);
        make(&lab, options, size, &base, *backing);
        write(&lab, &base, 5 * unit, &material(7 * *unit as usize, 1));
        lab.qemu_img("snapshot -c first top.qcow2");
        write(&lab, &base, 8 * unit, &material(20 * *unit as usize, 2));
        lab.qemu_img("snapshot -c second top.qcow2");
        write(&lab, &base, 10 * unit, &material(3 * *unit as usize, 3));
        let mut image = lab.bytes("top.qcow2");
        let bases: &[(&str, &[u8])] = &[("base.raw", &base)];
        type Change = fn(&mut Qcow2) -> Result<()>;
        let changes: [Change; 6] = [
            |qcow2| qcow2.create_snapshot("third", 3, 3).map(|_| ()),
            |qcow2| qcow2.delete_snapshot("second"),
            |qcow2| qcow2.apply_snapshot("first"),
            |qcow2| qcow2.delete_snapshot("third"),
            |qcow2| qcow2.apply_snapshot("1"),
            |qcow2| qcow2.delete_snapshot("1"),
        ];
        let states = factor * if *cluster > 65536 { 3 } else { 20 };
        for (step, change) in changes.into_iter().enumerate() {
            image = cut(&image, bases, (number * 10 + step) as u64, states, change);
        }
        lab.write("top.qcow2", &image);
        check(&lab, options);
        assert!(view_of_qemu(&lab).snapshots.is_empty());
        let storage = edit::storage(&image, bases);
        let mut qcow2 = storage.opened_image::<Qcow2>(IMAGE, Access::ReadOnly).unwrap();
        assert!(qcow2.list_snapshots().unwrap().is_empty());
    }
}
