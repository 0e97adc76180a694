//! One sequence: the disk and the model, side by side.

use std::path::Path;

use blockhouse_sandbox::block::{Access, BlockBackend, Disk, Error, ErrorKind, VolatileSlice};
use blockhouse_sandbox::{OpenRequest, Opener};
use blockhouse_tests::noise;

use crate::Tally;
use crate::images::Made;
use crate::operations::{Operation, SECTOR, Unmap};
use crate::oracles;

const QCOW2: &str = "qcow2";

struct Sequence<'a> {
    opener: &'a Opener,
    made: &'a Made,
    image: &'a Path,
    disk: Option<Disk>,
    model: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
}

/// Copies the image, applies the operations, and looks at what is left.
pub(crate) fn run(
    opener: &Opener,
    made: &Made,
    image: &Path,
    operations: &[Operation],
    verbose: bool,
) -> Result<Tally, String> {
    // A new file: what is left of the one before may still be locked.
    let _ = std::fs::remove_file(image);
    std::fs::copy(&made.path, image).map_err(|error| error.to_string())?;
    let mut sequence =
        Sequence { opener, made, image, disk: None, model: made.content.clone(), snapshots: made.snapshots.clone() };
    if verbose {
        eprintln!("image {}, {} bytes", made.template.name, sequence.model.len());
    }
    sequence.open()?;
    let mut tally = Tally::new();
    for (number, operation) in operations.iter().enumerate() {
        if verbose {
            eprintln!("{number}: {operation:?}");
        }
        let done = sequence.apply(*operation).map_err(|why| format!("operation {number}, {operation:?}: {why}"))?;
        *tally.entry(done).or_default() += 1;
    }
    sequence.end(&mut tally).map_err(|why| format!("after the last operation: {why}"))?;
    Ok(tally)
}

fn said(error: &Error) -> String {
    format!("{}: {error}", error.kind())
}

/// Where two contents differ first.
fn compare(found: &[u8], expected: &[u8]) -> Result<(), String> {
    if found == expected {
        return Ok(());
    }
    if found.len() != expected.len() {
        return Err(format!("{} bytes, expected {}", found.len(), expected.len()));
    }
    let at = found.iter().zip(expected).position(|(one, other)| one != other).unwrap_or_default();
    Err(format!("byte {at:#x} is {:#04x}, expected {:#04x}", found[at], expected[at]))
}

fn read(disk: &Disk, offset: u64, length: u64) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0xee; length as usize];
    disk.read(&[VolatileSlice::from(bytes.as_mut_slice())], offset).map_err(|error| said(&error))?;
    Ok(bytes)
}

impl Sequence<'_> {
    fn open(&mut self) -> Result<(), String> {
        let request = OpenRequest { access: Access::ReadWrite, ..OpenRequest::new(self.image, QCOW2) };
        self.disk = Some(self.opener.open(&request).map_err(|error| said(&error))?.disk);
        Ok(())
    }

    fn close(&mut self) -> Result<(), String> {
        let disk = self.disk.take().ok_or("the disk is closed")?;
        disk.close().map_err(|error| said(&error))?;
        drop(disk);
        oracles::wait_for_locks(self.image)
    }

    fn disk(&self) -> Result<&Disk, String> {
        self.disk.as_ref().ok_or_else(|| "the disk is closed".to_owned())
    }

    fn model(&mut self, offset: u64, length: u64) -> &mut [u8] {
        &mut self.model[offset as usize..(offset + length) as usize]
    }

    /// Does it to both. Returns its name.
    fn apply(&mut self, operation: Operation) -> Result<&'static str, String> {
        let size = self.model.len() as u64;
        match operation {
            Operation::Write(span, seed) => {
                let Some((offset, length)) = span.within(size) else { return Ok("nothing") };
                let mut bytes = noise(seed, length as usize);
                let disk = self.disk()?;
                // As guests do: buffers of any length.
                let split = bytes.len() / 3;
                let (one, two) = bytes.split_at_mut(split);
                disk.write(&[VolatileSlice::from(one), VolatileSlice::from(two)], offset)
                    .map_err(|error| said(&error))?;
                self.model(offset, length).copy_from_slice(&bytes);
                Ok("write")
            }
            Operation::Zero(span, unmap) => {
                let Some((offset, length)) = span.within(size) else { return Ok("nothing") };
                self.disk()?.write_zeroes(offset, length, unmap == Unmap::Yes).map_err(|error| said(&error))?;
                self.model(offset, length).fill(0);
                Ok("zero")
            }
            Operation::Discard(span) => {
                let Some((offset, length)) = span.within(size) else { return Ok("nothing") };
                self.disk()?.discard(offset, length).map_err(|error| said(&error))?;
                self.discarded(offset, length)?;
                Ok("discard")
            }
            Operation::Read(span) => {
                let Some((offset, length)) = span.within(size) else { return Ok("nothing") };
                let found = read(self.disk()?, offset, length)?;
                compare(&found, self.model(offset, length))?;
                Ok("read")
            }
            Operation::Flush => {
                self.disk()?.flush().map_err(|error| said(&error))?;
                Ok("flush")
            }
            Operation::Reopen => {
                self.close()?;
                self.open()?;
                let found = read(self.disk()?, 0, size)?;
                compare(&found, &self.model)?;
                Ok("reopen")
            }
            Operation::Resize(new) => {
                // Version 2 has no zeroes that hide a backing file, and its snapshots do not know their sizes.
                let refusable = self.made.template.is_version_2();
                let before = size;
                let resize =
                    |opener: &Opener, image: &Path| opener.resize(&OpenRequest::new(image, QCOW2), before, new);
                self.whole("resize", refusable, resize)?.map_or(Ok("refused"), |()| {
                    self.model.resize(new as usize, 0);
                    Ok("resize")
                })
            }
            Operation::Snapshot => {
                // More references than a count can hold.
                let refusable = self.made.template.refcount_bits() < 16;
                self.whole("snapshot", refusable, |opener, image| opener.create_snapshot(image, QCOW2, "a name"))?
                    .map_or(Ok("refused"), |id| {
                        self.snapshots.push((id, self.model.clone()));
                        Ok("new snapshot")
                    })
            }
            Operation::Apply(which) => {
                let Some((id, content)) = self.snapshot(which).cloned() else { return Ok("nothing") };
                let refusable = self.made.template.refcount_bits() < 16;
                self.whole("apply", refusable, |opener, image| opener.apply_snapshot(image, QCOW2, &id))?.map_or(
                    Ok("refused"),
                    |()| {
                        self.model = content;
                        Ok("apply")
                    },
                )
            }
            Operation::Delete(which) => {
                let Some((id, _)) = self.snapshot(which).cloned() else { return Ok("nothing") };
                self.whole("delete", false, |opener, image| opener.delete_snapshot(image, QCOW2, &id))?;
                self.snapshots.retain(|(other, _)| *other != id);
                Ok("delete")
            }
            Operation::Qemu(span, byte) => {
                self.close()?;
                if let Some((offset, length)) = span.within(size) {
                    let how = if byte == 0 { "-z -u".to_owned() } else { format!("-P {byte}") };
                    let image = self.image.to_str().ok_or("not UTF-8")?;
                    oracles::qemu_io(image, &[format!("write -q {how} {offset} {length}")])?;
                    self.model(offset, length).fill(byte);
                }
                self.open()?;
                Ok("QEMU")
            }
        }
    }

    fn snapshot(&self, which: u64) -> Option<&(String, Vec<u8>)> {
        self.snapshots.get((which % self.snapshots.len().max(1) as u64) as usize)
    }

    /// Closes the disk, changes the image as a whole, and opens it again. `None` if the change was refused,
    /// which is allowed if it is `refusable`.
    fn whole<T>(
        &mut self,
        what: &str,
        refusable: bool,
        change: impl Fn(&Opener, &Path) -> blockhouse_sandbox::block::Result<T>,
    ) -> Result<Option<T>, String> {
        self.close()?;
        let mut attempts = 0;
        let changed = loop {
            oracles::wait_for_locks(self.image)?;
            attempts += 1;
            match change(self.opener, self.image) {
                Ok(changed) => break Some(changed),
                // It opens the image more than once, and a child that starts may have it in between.
                Err(error) if attempts < 100 && error.message().contains("the image is in use") => {}
                Err(error) if refusable && error.kind() == ErrorKind::Unsupported => break None,
                Err(error) => return Err(format!("{what}: {}", said(&error))),
            }
        };
        oracles::wait_for_locks(self.image)?;
        self.open()?;
        Ok(changed)
    }

    /// What was discarded is zero where that is whole clusters, and elsewhere old or zero; which, stays so.
    fn discarded(&mut self, offset: u64, length: u64) -> Result<(), String> {
        let template = self.made.template;
        // Version 2 has no zeroes that hide a backing file.
        let exact = !template.is_version_2() || template.below.is_none();
        let size = self.model.len() as u64;
        let end = offset + length;
        let from = offset.next_multiple_of(template.cluster);
        let to = if end == size { end } else { end - end % template.cluster };
        let found = read(self.disk()?, offset, length)?;
        let sectors = found.chunks(SECTOR as usize).zip(self.model(offset, length).chunks_mut(SECTOR as usize));
        for (number, (found, model)) in sectors.enumerate() {
            let at = offset + number as u64 * SECTOR;
            let zero = found.iter().all(|byte| *byte == 0);
            let whole = exact && (from..to).contains(&at);
            if !zero && (whole || found != model) {
                return Err(format!("sector at {at:#x} is neither zero nor, if it may be, what it was"));
            }
            model.copy_from_slice(found);
        }
        Ok(())
    }

    /// Closes the disk, and asks everybody.
    fn end(mut self, tally: &mut Tally) -> Result<(), String> {
        self.close()?;
        oracles::check(self.image)?;
        compare(&oracles::content(self.image, None)?, &self.model).map_err(|why| format!("QEMU reads {why}"))?;
        if self.made.template.imago {
            compare(&oracles::imago(self.image)?, &self.model).map_err(|why| format!("imago reads {why}"))?;
            *tally.entry("imago").or_default() += 1;
        }
        let request = OpenRequest::new(self.image, QCOW2);
        let disk = self.opener.open(&request).map_err(|error| said(&error))?.disk;
        compare(&read(&disk, 0, disk.capacity())?, &self.model).map_err(|why| format!("it reads {why}"))?;
        drop(disk);
        for (name, content) in &self.snapshots {
            let request = OpenRequest { snapshot: Some(name.clone()), ..OpenRequest::new(self.image, QCOW2) };
            let disk = self.opener.open(&request).map_err(|error| said(&error))?.disk;
            compare(&read(&disk, 0, disk.capacity())?, content).map_err(|why| format!("snapshot {name}: {why}"))?;
            *tally.entry("snapshot").or_default() += 1;
        }
        Ok(())
    }
}
