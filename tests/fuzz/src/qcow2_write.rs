//! The qcow2 writer: an image is made, perhaps damaged, and then changed in every way that there is, with a storage
//! that fails now and then, and a host that is killed now and then.
//!
//! Whatever happens, a check finds no corruption afterwards that it did not find before; what was written and not
//! touched by a failure is read back, from the disk and from every snapshot; and an image that was never damaged,
//! on a storage that never failed, takes every write and leaks nothing.

use arbitrary::{Result, Unstructured};
use blockhouse_plugin::testing::{Disk, Failure, Storage};
use blockhouse_plugin::{
    Access, BackingReference, Checker, Creator, Error, NewImage, Packer, Rebaser, Repair, Resizer, SnapshotEditor,
    Snapshots, Writer,
};
use blockhouse_qcow2::Qcow2;

use crate::image::IMAGE;
use crate::say;

const BASE: &str = "/images/b";
const DATA: &str = "/images/d";
const MAX_FILE: u64 = 16 << 20;
const MAX_DISK: u64 = 192 << 10;
const SECTOR: u64 = 512;

/// Bytes, as far as they are known.
#[derive(Clone)]
struct Model {
    bytes: Vec<u8>,
    known: Vec<bool>,
}

impl Model {
    fn new(mut bytes: Vec<u8>, size: u64) -> Self {
        bytes.resize(size as usize, 0);
        Self { known: vec![true; bytes.len()], bytes }
    }

    fn unknown(size: u64) -> Self {
        Self { bytes: vec![0; size as usize], known: vec![false; size as usize] }
    }

    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn resize(&mut self, size: u64, known: bool) {
        self.bytes.resize(size as usize, 0);
        self.known.resize(size as usize, known);
    }

    fn fill(&mut self, start: u64, end: u64, value: Option<u8>) {
        let range = start as usize..end as usize;
        self.bytes[range.clone()].fill(value.unwrap_or(0));
        self.known[range].fill(value.is_some());
    }

    fn check(&self, what: &str, start: u64, found: &[u8]) {
        // In pieces, because coverage makes comparing byte by byte slow.
        for (at, found) in (start as usize..).step_by(256).zip(found.chunks(256)) {
            let expected = &self.bytes[at..at + found.len()];
            if found == expected {
                continue;
            }
            for (at, (found, expected)) in (at..).zip(found.iter().zip(expected)) {
                assert!(found == expected || !self.known[at], "{what}: byte {at} is {found}, not {expected}");
            }
        }
    }
}

struct Run {
    storage: Storage,
    cluster: u64,
    /// What the backing file has, if there is one.
    base: Vec<u8>,
    model: Model,
    /// Id and content; `None` once nobody knows which there are.
    snapshots: Option<Vec<(String, Model)>>,
    disk: Option<Disk<Qcow2>>,
    /// Nothing was damaged, failed or killed so far.
    clean: bool,
    /// The image was made as it should be.
    sound: bool,
    /// Changed since the last flush: a kill loses it, or not.
    loose: Vec<(u64, u64)>,
}

fn below(base: &[u8]) -> impl FnMut(u64, &mut [u8]) + '_ {
    move |at, to| {
        let there = base.get(at as usize..).unwrap_or_default();
        let (known, past) = to.split_at_mut(there.len().min(to.len()));
        known.copy_from_slice(&there[..known.len()]);
        past.fill(0);
    }
}

pub(crate) fn run(data: &[u8]) {
    let _input_ends = Run::make(&mut Unstructured::new(data));
}

impl Run {
    fn make(u: &mut Unstructured<'_>) -> Result<()> {
        let extended = u.ratio(1, 5)?;
        let cluster_bits = if extended { 14 } else { u.int_in_range(9..=12)? };
        let old = !extended && u.ratio(1, 5)?;
        let mut options = vec![("cluster-size", (1u32 << cluster_bits).to_string())];
        if old {
            options.push(("compat", "v2".into()));
        } else {
            options.push(("refcount-bits", (1u32 << u.int_in_range(0..=6)?).to_string()));
            options.push(("compression-type", if u.arbitrary()? { "zstd" } else { "zlib" }.into()));
            options.push(("extended-l2", if extended { "on" } else { "off" }.into()));
            options.push(("lazy-refcounts", if u.ratio(1, 4)? { "on" } else { "off" }.into()));
        }
        let data_file = !old && u.ratio(1, 8)?;
        let backing =
            (!data_file && u.arbitrary()?).then(|| BackingReference { name: "b".into(), format: Some("raw".into()) });
        if data_file {
            options.push(("data-file", "d".into()));
            options.push(("data-file-raw", if u.arbitrary()? { "on" } else { "off" }.into()));
        }
        let virtual_size = u.int_in_range(1..=MAX_DISK / SECTOR)? * SECTOR;
        let base: Vec<u8> = if backing.is_some() {
            (0..u.int_in_range(0..=64u64 << 10)? / SECTOR * SECTOR).map(|at| (at / 700) as u8 | 0x80).collect()
        } else {
            Vec::new()
        };
        let storage = Storage::new();
        storage.limit_sizes(MAX_FILE);
        storage.insert(IMAGE, Vec::new());
        storage.insert(BASE, base.clone());
        storage.insert(DATA, Vec::new());
        let options = options.into_iter().map(|(name, value)| (name.to_string(), value)).collect();
        let new = NewImage { virtual_size, backing, options };
        say!("create {new:?}, {} bytes below", base.len());
        Qcow2::create(storage.file(IMAGE, Access::ReadWrite), new).expect("the options can be");
        let model = Model::new(base.clone(), virtual_size);
        let mut run = Self {
            storage,
            cluster: 1 << cluster_bits,
            base,
            model,
            snapshots: Some(Vec::new()),
            disk: None,
            clean: true,
            sound: true,
            loose: Vec::new(),
        };
        for _ in 0..48 {
            if u.is_empty() {
                break;
            }
            run.step(u)?;
        }
        run.end();
        Ok(())
    }

    /// A range of the disk: of sectors, or of whole clusters.
    fn range(&self, u: &mut Unstructured<'_>, unit: u64, max: u64) -> Result<(u64, u64)> {
        let size = self.model.size();
        let start = u.int_in_range(0..=size.saturating_sub(1) / unit)? * unit;
        let length = u.int_in_range(1..=max.div_ceil(unit))? * unit;
        Ok((start, size.min(start + length)))
    }

    fn step(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        match u.int_in_range(0..=19u8)? {
            0..=5 => {
                let (start, end) = self.range(u, SECTOR, 12 << 10)?;
                let value = u.arbitrary()?;
                self.change(start, end, Some(value), |disk, base| {
                    disk.write_over(start, &vec![value; (end - start) as usize], &mut below(base))
                });
            }
            6 | 7 => {
                let (start, end) = self.range(u, self.cluster, 24 << 10)?;
                let keep = u.arbitrary()?;
                self.change(start, end, Some(0), |disk, _| disk.format.zero(start, end - start, keep));
            }
            8 => {
                let (start, end) = self.range(u, self.cluster, 24 << 10)?;
                self.change(start, end, Some(0), |disk, _| disk.format.discard(start, end - start));
            }
            9 => {
                let (start, end) = self.range(u, self.cluster, self.cluster)?;
                let value = u.arbitrary()?;
                let bytes = vec![value; (end - start) as usize];
                let mut packed = false;
                self.change(start, end, Some(value), |disk, base| {
                    packed = disk.format.pack(start, &bytes)?;
                    if packed { Ok(()) } else { disk.write_over(start, &bytes, &mut below(base)) }
                });
            }
            10 => {
                let (start, end) = self.range(u, SECTOR, 12 << 10)?;
                self.prepare_and_abandon(start, end);
            }
            11 | 12 => self.flush(),
            13 => {
                self.close();
            }
            14 => {
                say!("kill");
                self.disk = None;
                self.clean = false;
                for (start, end) in std::mem::take(&mut self.loose) {
                    let end = end.min(self.model.size());
                    self.model.fill(start.min(end), end, None);
                }
            }
            15 => {
                let failing = match u.int_in_range(0..=3u8)? {
                    0 => None,
                    1 => Some((u.int_in_range(0..=20)?, Failure::Full)),
                    2 => Some((u.int_in_range(0..=20)?, Failure::Short)),
                    _ => Some((u.int_in_range(0..=20)?, Failure::Once)),
                };
                say!("failing: {failing:?}");
                self.clean &= failing.is_none();
                self.storage.fail_at(if u.ratio(1, 4)? { DATA } else { IMAGE }, failing);
            }
            16 => {
                let (start, end) = self.range(u, SECTOR, 24 << 10)?;
                self.read(start, end);
            }
            17 | 18 => self.edit(u)?,
            _ => self.damage(u)?,
        }
        Ok(())
    }

    fn open(&mut self) -> Option<&mut Disk<Qcow2>> {
        if self.disk.is_none() {
            let opened = self.storage.disk_with::<Qcow2>(IMAGE, Access::ReadWrite, |_| Ok(())).and_then(|mut disk| {
                disk.format.begin()?;
                Ok(disk)
            });
            match opened {
                Ok(disk) => self.disk = Some(disk),
                Err(error) => assert!(!self.clean, "a sound image does not open: {error}"),
            }
        }
        self.disk.as_mut()
    }

    /// Changes a range so that each byte has `value`, or is not known if that fails.
    fn change(
        &mut self,
        start: u64,
        end: u64,
        value: Option<u8>,
        change: impl FnOnce(&mut Disk<Qcow2>, &[u8]) -> blockhouse_plugin::Result<()>,
    ) {
        let base = std::mem::take(&mut self.base);
        let result = self.open().map(|disk| change(disk, &base));
        self.base = base;
        say!("change {start}..{end} to {value:?}: {result:?}");
        match result {
            None => {}
            Some(Ok(())) => {
                self.model.fill(start, end, if self.sound { value } else { None });
                self.loose.push((start, end));
            }
            // Nothing changed.
            Some(Err(Error::Unsupported(_))) => {}
            Some(Err(error)) => {
                assert!(!self.clean, "{error}");
                self.model.fill(start, end, None);
                self.loose.push((start, end));
            }
        }
    }

    fn prepare_and_abandon(&mut self, start: u64, end: u64) {
        let Some(disk) = self.open() else { return };
        let Ok(allocations) = disk.format.prepare(start, end - start, 4) else { return };
        let tickets: Vec<u64> = allocations.iter().map(|allocation| allocation.ticket).collect();
        disk.format.abandon(&tickets).expect("tickets that were given");
    }

    fn flush(&mut self) {
        if let Some(disk) = &mut self.disk {
            let result = disk.flush();
            say!("flush: {result:?}");
            match result {
                Ok(()) => self.loose.clear(),
                Err(error) => assert!(!self.clean, "{error}"),
            }
        }
    }

    /// Closes the image, so that something else can be done to it. What cannot be closed is dropped.
    fn close(&mut self) {
        let Some(mut disk) = self.disk.take() else { return };
        let result = disk.flush().and_then(|()| disk.format.finish());
        say!("close: {result:?}");
        match result {
            Ok(()) => self.loose.clear(),
            Err(error) => {
                assert!(!self.clean, "{error}");
                self.lost();
            }
        }
    }

    /// Nobody knows what the disk shows now.
    fn lost(&mut self) {
        self.loose.clear();
        let size = self.storage.disk::<Qcow2>(IMAGE).map_or(0, |disk| disk.info.virtual_size.min(2 * MAX_DISK));
        self.model = Model::unknown(if size == 0 { self.model.size() } else { size });
    }

    fn read(&mut self, start: u64, end: u64) {
        let base = std::mem::take(&mut self.base);
        let mut bytes = vec![0xa5; (end - start) as usize];
        // A damaged image may have a disk that is larger than the model gets.
        let result = self.open().map(|disk| {
            let size = disk.info.virtual_size;
            disk.read_over(size, start, &mut bytes, &mut below(&base))
        });
        self.base = base;
        match result {
            Some(Ok(())) => self.model.check("read", start, &bytes),
            Some(Err(error)) => assert!(!self.sound, "{error}"),
            None => {}
        }
    }

    /// Something that is done to the image as a whole.
    fn edit(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        self.close();
        let image = |storage: &Storage| storage.opened_image::<Qcow2>(IMAGE, Access::ReadWrite);
        let which = u.arbitrary::<u8>()?;
        let id = match &self.snapshots {
            Some(snapshots) if !snapshots.is_empty() => snapshots[usize::from(which) % snapshots.len()].0.clone(),
            _ => (which % 4).to_string(),
        };
        let what = u.int_in_range(0..=7u8)?;
        let result = match what {
            0 | 1 => {
                let size = u.int_in_range(1..=MAX_DISK / SECTOR)? * SECTOR;
                let old = self.model.size();
                // As a host does: what is added reads as zero. It zeroes the rest of the last cluster itself.
                let hide = self.base.len() as u64 > old;
                image(&self.storage).and_then(|mut qcow2| qcow2.resize(size, hide)).map(|()| {
                    self.model.resize(size, self.sound);
                    if size > old {
                        self.model.fill(old, old.next_multiple_of(self.cluster).min(size), None);
                    }
                })
            }
            2 | 3 => image(&self.storage).and_then(|mut qcow2| qcow2.create_snapshot("s", 1, 2)).map(|id| {
                if let Some(snapshots) = &mut self.snapshots {
                    snapshots.push((id, self.model.clone()));
                }
            }),
            4 => image(&self.storage).and_then(|mut qcow2| qcow2.apply_snapshot(&id)).map(|()| {
                let known = self.snapshots.as_ref().and_then(|all| all.iter().find(|(known, _)| *known == id));
                match known {
                    Some((_, model)) => self.model = model.clone(),
                    None => self.lost(),
                }
            }),
            5 => image(&self.storage).and_then(|mut qcow2| qcow2.delete_snapshot(&id)).map(|()| {
                if let Some(snapshots) = &mut self.snapshots {
                    snapshots.retain(|(known, _)| *known != id);
                }
            }),
            6 => {
                let repair = if u.arbitrary()? { Repair::All } else { Repair::Leaks };
                Qcow2::check(self.storage.file(IMAGE, Access::ReadWrite), Some(repair)).map(|_| ())
            }
            // The same name: what the disk shows stays.
            _ => image(&self.storage).and_then(|mut qcow2| {
                let backing = BackingReference { name: "./b".into(), format: Some("raw".into()) };
                if self.base.is_empty() { qcow2.set_backing(None) } else { qcow2.set_backing(Some(backing)) }
            }),
        };
        say!("edit {what} of snapshot {id}: {result:?}, {} bytes", self.model.size());
        match result {
            Ok(()) => {}
            Err(Error::Storage(_)) if !self.clean => {
                // It is as before or as afterwards.
                self.lost();
                self.snapshots = None;
            }
            // Limits of the format, and no such snapshot.
            Err(_) => {}
        }
        Ok(())
    }

    /// Changes a byte of the image, and goes on if a check finds nothing wrong with that.
    fn damage(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        if !self.clean || u.ratio(1, 2)? {
            return Ok(());
        }
        self.close();
        let mut bytes = self.storage.bytes(IMAGE);
        for _ in 0..u.int_in_range(1..=3)? {
            // Mostly where the numbers are: at the start of a cluster.
            let cluster = u.choose_index(bytes.len().div_ceil(self.cluster as usize).max(1))?;
            let at = cluster * self.cluster as usize + usize::from(u.arbitrary::<u8>()?);
            if let Some(byte) = bytes.get_mut(at) {
                *byte = u.arbitrary()?;
            }
        }
        let before = [IMAGE, DATA].map(|file| (file, self.storage.bytes(file)));
        self.storage.insert(IMAGE, bytes);
        let report = Qcow2::check(self.storage.file(IMAGE, Access::ReadOnly), None);
        say!("damage: {report:?}");
        match report {
            Ok(report) if report.corruptions == 0 => {
                self.clean = false;
                self.sound = false;
                self.snapshots = None;
                self.lost();
            }
            _ => {
                // A damaged image may get worse; it must not make anybody panic.
                let damaged = self.storage.bytes(IMAGE);
                let _whatever = Qcow2::check(self.storage.file(IMAGE, Access::ReadWrite), Some(Repair::All));
                self.storage.insert(IMAGE, damaged);
                if let Ok(mut disk) = self.storage.disk_with::<Qcow2>(IMAGE, Access::ReadWrite, |_| Ok(()))
                    && disk.format.begin().is_ok()
                {
                    let size = disk.info.virtual_size.min(64 << 10);
                    for at in (0..size.saturating_sub(SECTOR)).step_by(24 << 10) {
                        let _whatever = disk.write_over(at, &[1; 512], &mut below(&[]));
                    }
                    let _whatever = disk.format.discard(0, self.cluster.min(size));
                    let _whatever = disk.flush();
                    let _whatever = disk.format.finish();
                }
                if let Ok(mut qcow2) = self.storage.opened_image::<Qcow2>(IMAGE, Access::ReadWrite) {
                    let _whatever = qcow2.create_snapshot("x", 1, 1);
                }
                for (file, bytes) in before {
                    self.storage.insert(file, bytes);
                }
            }
        }
        Ok(())
    }

    fn end(mut self) {
        for file in [IMAGE, DATA] {
            self.storage.fail_at(file, None);
        }
        self.close();
        let report = Qcow2::check(self.storage.file(IMAGE, Access::ReadOnly), None).expect("it can be checked");
        say!("end: {report:?}");
        assert_eq!(report.corruptions, 0, "{report:?}");
        if self.clean {
            assert_eq!(report.leaks, 0, "{report:?}");
        }
        if !self.sound {
            return;
        }
        let whole = self.model.size();
        let mut disk = self.storage.disk::<Qcow2>(IMAGE).expect("the image opens");
        assert_eq!(disk.info.virtual_size, whole, "another size");
        let mut bytes = vec![0xa5; whole as usize];
        disk.read_over(whole, 0, &mut bytes, &mut below(&self.base)).expect("it can be read");
        self.model.check("at the end", 0, &bytes);
        let Some(snapshots) = self.snapshots else { return };
        let listed = disk.format.list_snapshots().expect("snapshots can be listed");
        let ids: Vec<&str> = listed.iter().map(|snapshot| snapshot.id.as_str()).collect();
        let known: Vec<&str> = snapshots.iter().map(|(id, _)| id.as_str()).collect();
        assert_eq!(ids, known, "other snapshots");
        for (id, model) in &snapshots {
            let mut disk = self
                .storage
                .disk_with::<Qcow2>(IMAGE, Access::ReadOnly, |qcow2| qcow2.select_snapshot(id).map(|_| ()))
                .expect("a snapshot opens");
            let whole = model.size();
            let mut bytes = vec![0xa5; whole as usize];
            disk.read_over(whole, 0, &mut bytes, &mut below(&self.base)).expect("a snapshot can be read");
            model.check(id, 0, &bytes);
        }
    }
}
