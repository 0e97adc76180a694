//! One sequence of operations, and what each sector and each snapshot may hold after a cut in it.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use blockhouse_plugin::testing::{Disk, Failure, Storage};
use blockhouse_plugin::{Access, Error, Result, SnapshotEditor, Writer};
use blockhouse_qcow2::Qcow2;

use crate::images::{Made, Template, sectors};
use crate::random::Random;
use crate::states::{Files, Numbered};
use crate::{BASE, DATA, IMAGE, SECTOR};

/// Snapshots that an image has at most.
const MAX_SNAPSHOTS: usize = 3;

pub(crate) fn storage(files: Files, base: &[u8]) -> Storage {
    let storage = Storage::new();
    let [image, data] = files;
    storage.insert(IMAGE, image);
    storage.insert(DATA, data);
    storage.insert(BASE, base);
    storage
}

pub(crate) fn open(storage: &Storage, access: Access) -> Disk<Qcow2> {
    let mut disk = storage.disk_with::<Qcow2>(IMAGE, access, |_| Ok(())).expect("the image opens");
    if access == Access::ReadWrite {
        disk.format.begin().expect("the image can be written");
    }
    disk
}

/// A base under the disk: the bytes of the raw file, and zeroes past its end.
pub(crate) fn below(base: &[u8], used: bool) -> impl FnMut(u64, &mut [u8]) {
    let base = if used { base } else { &[] };
    move |offset, to| {
        let there = base.get(offset as usize..).unwrap_or_default();
        let (known, past) = to.split_at_mut(there.len().min(to.len()));
        known.copy_from_slice(&there[..known.len()]);
        past.fill(0);
    }
}

/// What an operation left in the sectors from `first` on, and when it began, in changes.
struct Done {
    /// It failed, and may have done a part.
    failed: bool,
    first: usize,
    ids: Vec<u64>,
    start: usize,
}

/// A snapshot, and between which changes it was made and deleted. After the end it is durable.
pub(crate) struct Kept {
    pub(crate) id: String,
    content: Vec<u64>,
    made: (usize, usize),
    deleted: Option<(usize, usize)>,
}

impl Kept {
    /// Whether it is there after a cut, if that is sure.
    fn is_there(&self, cut: usize) -> Option<bool> {
        let (start, end) = self.made;
        match self.deleted {
            Some((_, end)) if cut >= end => Some(false),
            Some((start, _)) if cut > start => None,
            _ if cut >= end => Some(true),
            _ if cut <= start => Some(false),
            _ => None,
        }
    }
}

pub(crate) struct Run<'a> {
    template: &'a Template,
    made: &'a Made,
    pub(crate) random: Random,
    pub(crate) log: String,
    pub(crate) changes: Vec<Numbered>,
    operations: Vec<Done>,
    /// Acknowledged flushes: how many changes and how many operations were before.
    flushes: Vec<(usize, usize)>,
    /// Of each sector what was written to it: number of the operation, id.
    history: Vec<Vec<(usize, u64)>>,
    snapshots: Vec<Kept>,
    next_id: u64,
}

impl<'a> Run<'a> {
    /// Does up to 38 operations. Errors are allowed where the storage was made to fail.
    pub(crate) fn new(template: &'a Template, made: &'a Made, random: Random) -> Self {
        let snapshots = made.snapshots.iter().map(|id| Kept {
            id: id.clone(),
            content: made.ids.clone(),
            made: (0, 0),
            deleted: None,
        });
        let mut run = Self {
            template,
            made,
            random,
            log: String::new(),
            changes: Vec::new(),
            operations: Vec::new(),
            flushes: Vec::new(),
            history: vec![Vec::new(); made.ids.len()],
            snapshots: snapshots.collect(),
            next_id: 5_000_000,
        };
        let storage = storage(crate::states::files(made), &made.base);
        let mut disk = open(&storage, Access::ReadWrite);
        run.take(&storage);
        let count = 4 + run.random.below(34);
        for _ in 0..count {
            if !run.operate(&mut disk, &storage) {
                break;
            }
        }
        assert!(storage.bytes(BASE) == made.base, "the base was changed");
        for (number, done) in run.operations.iter().enumerate() {
            for (id, history) in done.ids.iter().zip(&mut run.history[done.first..]) {
                history.push((number, *id));
            }
        }
        run
    }

    fn take(&mut self, storage: &Storage) {
        self.changes.extend(storage.take_changes_of(&[IMAGE, DATA]));
    }

    /// One operation. False if the image is not written any more.
    fn operate(&mut self, disk: &mut Disk<Qcow2>, storage: &Storage) -> bool {
        let size = self.template.size;
        let start = self.changes.len();
        let kind = self.random.below(14);
        let failing = kind < 11 && self.random.below(12) == 0;
        if failing {
            let how = [Failure::Full, Failure::Short, Failure::Once][self.random.below(3) as usize];
            let file = if self.template.has_data_file() && self.random.below(2) == 0 { DATA } else { IMAGE };
            storage.fail_at(file, Some((self.random.below(6) as usize, how)));
        }
        let result = match kind {
            0..=4 => {
                let first = self.random.below(size / SECTOR as u64);
                let most = (3 * self.template.cluster / SECTOR as u64).min(size / SECTOR as u64 - first);
                let count = 1 + self.random.below(most);
                let ids: Vec<u64> = (0..count).map(|number| self.next_id + number).collect();
                self.next_id += count;
                self.note(start, first, ids.clone(), &format!("write {first}+{count}"));
                let mut below = below(&self.made.base, self.template.backing);
                disk.write_over(first * SECTOR as u64, &sectors(ids), &mut below)
            }
            5..=7 => {
                let clusters = size.div_ceil(self.template.cluster);
                let first = self.random.below(clusters);
                let count = 1 + self.random.below((clusters - first).min(6));
                let offset = first * self.template.cluster;
                let length = (count * self.template.cluster).min(size - offset);
                let (keep, discard) = (kind == 6, kind == 7);
                let ids = vec![0; length as usize / SECTOR];
                let what = if discard { "discard" } else { "zero" };
                self.note(start, offset / SECTOR as u64, ids, &format!("{what} {offset}+{length} keep {keep}"));
                if discard { disk.format.discard(offset, length) } else { disk.format.zero(offset, length, keep) }
            }
            11 => {
                self.say(start, "closed and opened");
                self.close(disk, storage).map(|()| *disk = open(storage, Access::ReadWrite))
            }
            12 | 13 if self.template.can_share() => self.edit(disk, storage),
            _ => {
                self.say(start, "flush");
                let operations = self.operations.len();
                let result = disk.flush();
                if result.is_ok() {
                    self.take(storage);
                    self.flushes.push((self.changes.len(), operations));
                }
                result
            }
        };
        self.take(storage);
        storage.fail_at(IMAGE, None);
        storage.fail_at(DATA, None);
        let Err(error) = result else { return true };
        if matches!(error, Error::Unsupported(_)) && self.template.refuses_zeroes() {
            // Refused as a whole.
            self.operations.pop();
            return true;
        }
        // A sync that failed ends writing for good.
        if error.text().contains("not written any more") {
            return false;
        }
        assert!(failing, "an operation failed, and the storage did not: {error}\n{}", self.log);
        let _ = writeln!(self.log, "   failed: {error}");
        if let Some(done) = self.operations.last_mut().filter(|_| kind < 8) {
            done.failed = true;
        }
        true
    }

    fn say(&mut self, start: usize, what: &str) {
        let _ = writeln!(self.log, "{start}: {what}");
    }

    fn note(&mut self, start: usize, first: u64, ids: Vec<u64>, what: &str) {
        self.say(start, what);
        self.operations.push(Done { failed: false, first: first as usize, ids, start });
    }

    /// Closes the image, which flushes it.
    fn close(&mut self, disk: &mut Disk<Qcow2>, storage: &Storage) -> Result<()> {
        let operations = self.operations.len();
        disk.flush()?;
        disk.format.finish()?;
        self.take(storage);
        self.flushes.push((self.changes.len(), operations));
        Ok(())
    }

    /// A snapshot is made or deleted.
    fn edit(&mut self, disk: &mut Disk<Qcow2>, storage: &Storage) -> Result<()> {
        self.close(disk, storage)?;
        let start = self.changes.len();
        let mut image = storage.opened_image::<Qcow2>(IMAGE, Access::ReadWrite)?;
        let there: Vec<usize> =
            (0..self.snapshots.len()).filter(|number| self.snapshots[*number].deleted.is_none()).collect();
        if there.len() < MAX_SNAPSHOTS && (there.is_empty() || self.random.below(2) == 0) {
            let content = read_all(&mut open(storage, Access::ReadOnly), self.template.size, self.made, self.template);
            let content = content.map_err(Error::Other)?;
            let id = image.create_snapshot(&format!("at {start}"), 1, 1)?;
            self.say(start, &format!("snapshot {id} is made"));
            self.take(storage);
            self.snapshots.push(Kept { id, content, made: (start, self.changes.len()), deleted: None });
        } else {
            let number = there[self.random.below(there.len() as u64) as usize];
            let id = self.snapshots[number].id.clone();
            self.say(start, &format!("snapshot {id} is deleted"));
            image.delete_snapshot(&id)?;
            self.take(storage);
            self.snapshots[number].deleted = Some((start, self.changes.len()));
        }
        drop(image);
        *disk = open(storage, Access::ReadWrite);
        Ok(())
    }

    /// Whether a sector may hold an id after a cut at change `cut`.
    pub(crate) fn allows(&self, sector: usize, id: u64, cut: usize) -> bool {
        let flushed = self.flushes.iter().rev().find(|(end, _)| *end <= cut).map_or(0, |(_, operations)| *operations);
        for (number, written) in self.history[sector].iter().rev() {
            let done = &self.operations[*number];
            if done.start > cut {
                continue;
            }
            if *written == id {
                return true;
            }
            // A failed operation may have done a part: it does not take the place of what was before.
            if *number < flushed && !done.failed {
                return false;
            }
        }
        self.made.ids[sector] == id
    }

    /// What is wrong with the snapshots after a cut: those that must be there are, and each holds what the disk
    /// held when it was made. `content` reads one.
    pub(crate) fn judge_snapshots(
        &self,
        cut: usize,
        listed: &[String],
        mut content: impl FnMut(&str) -> Result<Vec<u64>, String>,
    ) -> Result<(), String> {
        let mut known: BTreeMap<&str, &Kept> = BTreeMap::new();
        for kept in &self.snapshots {
            match kept.is_there(cut) {
                Some(true) if !listed.contains(&kept.id) => return Err(format!("snapshot {} is gone", kept.id)),
                Some(false) => {}
                _ => drop(known.insert(&kept.id, kept)),
            }
        }
        for id in listed {
            let kept = known.get(id.as_str()).ok_or_else(|| format!("nobody made a snapshot {id}"))?;
            if content(id)? != kept.content {
                return Err(format!("snapshot {id} holds something else"));
            }
        }
        Ok(())
    }
}

/// Who wrote each sector of a disk or a snapshot of it.
pub(crate) fn read_all(
    disk: &mut Disk<Qcow2>,
    size: u64,
    made: &Made,
    template: &Template,
) -> Result<Vec<u64>, String> {
    let mut content = vec![0xee; size as usize];
    disk.read_over(size, 0, &mut content, &mut below(&made.base, template.backing))
        .map_err(|error| format!("reading: {error}"))?;
    content
        .chunks(SECTOR)
        .enumerate()
        .map(|(number, bytes)| {
            crate::images::writer_of(bytes).ok_or_else(|| format!("sector {number} was not written by one write"))
        })
        .collect()
}
