//! The writer of the hostile component: honest, except for what it was told to do.
//!
//! Each cluster that is written for the first time moves to the end of the image file. Where it moved
//! is known to the instance alone, so a disk reads back what was written for as long as it is open.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

use blockhouse_plugin::{Access, Allocation, Error, FileIndex, Freed, Result, Writer};

use crate::{ANSWER_BYTES, Hostile, Stage};

/// The lies of a writer, in the order of the table in the crate's documentation.
pub(crate) const NAMES: &[&str] = &[
    "write-lie-no-such-file",
    "write-lie-read-only",
    "write-lie-offset",
    "write-lie-outside",
    "write-lie-too-many",
    "write-lie-runs",
    "write-lie-freed",
];

/// What the writer knows.
#[derive(Debug, Default)]
pub(crate) struct Moved {
    /// Reservations and published clusters: start in the disk, offset in the file, whether published.
    pub(crate) clusters: Vec<(u64, u64, bool)>,
    /// The image once more, shared for reading only.
    pub(crate) read_only: Option<FileIndex>,
}

impl Moved {
    /// Where the cluster at `start` was published.
    pub(crate) fn find(&self, start: u64) -> Option<u64> {
        self.clusters.iter().rev().find(|cluster| cluster.0 == start && cluster.2).map(|cluster| cluster.1)
    }
}

impl Writer for Hostile {
    fn begin(&mut self) -> Result<()> {
        self.act(Stage::Begin)
    }

    fn prepare(&mut self, offset: u64, _length: u64, _max_allocations: u32) -> Result<Vec<Allocation>> {
        self.act(Stage::Prepare)?;
        let file = self.file.ok_or_else(|| Error::Other("prepare was called before connect".into()))?;
        if self.behaviour.name == "write-lie-runs" {
            return self.runs(file);
        }
        let start = offset - offset % ANSWER_BYTES;
        let length = self.virtual_size.saturating_sub(start).min(ANSWER_BYTES);
        let image = self.image()?;
        let place = image.size()?.next_multiple_of(ANSWER_BYTES);
        image.set_size(place.saturating_add(ANSWER_BYTES))?;
        let ticket = self.moved.clusters.len() as u64;
        self.moved.clusters.push((start, place, false));
        let truth = Allocation { start, length, file, offset: place, zeroed: true, ticket };
        Ok(match self.behaviour.name.as_str() {
            "write-lie-no-such-file" => vec![Allocation { file: FileIndex(u32::MAX), ..truth }],
            "write-lie-read-only" => vec![Allocation { file: self.moved.read_only.unwrap_or(file), ..truth }],
            "write-lie-offset" => vec![Allocation { offset: self.behaviour.number(0, 1 << 63)?, ..truth }],
            "write-lie-outside" => vec![Allocation { start: self.behaviour.number(0, 1 << 62)?, ..truth }],
            "write-lie-too-many" => {
                vec![truth; usize::try_from(self.behaviour.number(0, 100_000)?).unwrap_or(usize::MAX)]
            }
            _ => vec![truth],
        })
    }

    fn commit(&mut self, tickets: &[u64]) -> Result<()> {
        self.act(Stage::Commit)?;
        for ticket in tickets {
            let index = usize::try_from(*ticket).unwrap_or(usize::MAX);
            let cluster = self.moved.clusters.get_mut(index);
            cluster.ok_or_else(|| Error::Other(format!("there is no ticket {ticket}")))?.2 = true;
        }
        Ok(())
    }

    fn abandon(&mut self, tickets: &[u64]) -> Result<()> {
        let known = self.moved.clusters.len() as u64;
        match tickets.iter().find(|ticket| **ticket >= known) {
            Some(ticket) => Err(Error::Other(format!("there is no ticket {ticket} to give back"))),
            None => Ok(()),
        }
    }

    fn zero(&mut self, _offset: u64, _length: u64, _keep: bool) -> Result<()> {
        Err(Error::unsupported("write zeroes instead"))
    }

    fn discard(&mut self, _offset: u64, _length: u64) -> Result<()> {
        Err(Error::unsupported("the content stays"))
    }

    fn flush(&mut self) -> Result<Vec<Freed>> {
        self.act(Stage::Flush)?;
        self.image()?.sync_data()?;
        if self.behaviour.name == "write-lie-freed" {
            let number = |index| self.behaviour.number(index, 0);
            let file = FileIndex(u32::try_from(number(0)?).unwrap_or(u32::MAX));
            return Ok(vec![Freed { file, offset: number(1)?, length: number(2)? }]);
        }
        Ok(Vec::new())
    }

    fn finish(&mut self) -> Result<()> {
        self.act(Stage::Finish)?;
        self.image()?.sync_data()
    }
}

fn report_tries(tries: impl IntoIterator<Item = (String, Result<()>)>) -> Error {
    crate::asking::report(tries.into_iter().map(|(what, result)| match result {
        Ok(()) => format!("done {what}"),
        Err(why) => format!("refused {what}: {why}"),
    }))
}

impl Hostile {
    /// The allocations that the behaviour names.
    fn runs(&mut self, file: FileIndex) -> Result<Vec<Allocation>> {
        let mut runs = Vec::new();
        for index in 0..self.behaviour.arguments.len() {
            let text = self.behaviour.text(index)?;
            let numbers: Vec<u64> = text.split(':').filter_map(|number| number.parse().ok()).collect();
            let [start, length, offset, ticket] = numbers[..] else {
                return Err(Error::corrupt(format!("not a run: {text:?}")));
            };
            self.moved.clusters.push((start, offset, false));
            runs.push(Allocation { start, length, file, offset, zeroed: true, ticket });
        }
        Ok(runs)
    }

    /// Tries to change a file that it holds for reading, and reports.
    pub(crate) fn try_to_change(&self, file: &blockhouse_plugin::File) -> Error {
        let tries =
            [("write", file.write_at(0, b"changed")), ("set-size", file.set_size(0)), ("sync", file.sync_data())];
        report_tries(tries.map(|(what, result)| (what.to_string(), result)))
    }

    /// Changes the image at the offsets that the behaviour names, and reports.
    pub(crate) fn change_far(&self) -> Result<Error> {
        let image = self.image()?;
        let mut tries = Vec::new();
        for index in 0..self.behaviour.arguments.len() {
            let offset = self.behaviour.number(index, 0)?;
            tries.push((format!("write {offset}"), image.write_at(offset, b"x")));
            tries.push((format!("set-size {offset}"), image.set_size(offset)));
        }
        Ok(report_tries(tries))
    }

    /// Shares the image for what `connect` was opened for.
    pub(crate) fn share_image(&mut self) -> Result<()> {
        self.file = Some(self.image()?.share(self.access)?);
        if self.access == Access::ReadWrite {
            self.moved.read_only = Some(self.image()?.share(Access::ReadOnly)?);
        }
        Ok(())
    }
}
