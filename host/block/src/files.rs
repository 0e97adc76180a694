//! The files of a disk under small numbers, so that a cached extent is plain data and a look-up takes
//! no lock and touches no reference count.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::file::ImageFile;
use crate::layer::FileIndex;

/// The most files that the layers of one disk may use together. A VMDK disk of split files needs one
/// for each 2 GB.
pub const MAX_FILES: usize = 4096;

/// Names a file of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct FileId(u16);

impl FileId {
    /// The number, below [`MAX_FILES`].
    pub(crate) fn bits(self) -> u16 {
        self.0
    }

    /// The id with this number. One that was not given out names no file.
    pub(crate) fn from_bits(bits: u16) -> Self {
        Self(bits)
    }
}

/// The table is full.
#[derive(Debug)]
pub(crate) struct TableFull;

/// All files that answers named so far. Entries are never removed or replaced.
#[derive(Debug)]
pub(crate) struct FileTable {
    slots: Box<[OnceLock<Arc<ImageFile>>]>,
    ids: Mutex<HashMap<(u16, FileIndex), FileId>>,
}

impl FileTable {
    pub(crate) fn new() -> Self {
        Self { slots: (0..MAX_FILES).map(|_| OnceLock::new()).collect(), ids: Mutex::default() }
    }

    /// The file under an id that [`intern`](Self::intern) gave out.
    pub(crate) fn get(&self, id: FileId) -> Option<&Arc<ImageFile>> {
        self.slots.get(usize::from(id.0))?.get()
    }

    /// All files, for flushing.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<ImageFile>> {
        self.slots.iter().map_while(OnceLock::get)
    }

    /// The id of the file that the layer at `depth` registered as `index`, which `open` returns if it
    /// is not known yet. `None` if there is no such file.
    pub(crate) fn intern(
        &self,
        depth: u16,
        index: FileIndex,
        open: impl FnOnce() -> Option<Arc<ImageFile>>,
    ) -> Result<Option<FileId>, TableFull> {
        let mut ids = self.ids.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(id) = ids.get(&(depth, index)) {
            return Ok(Some(*id));
        }
        let Some(file) = open() else { return Ok(None) };
        let next = ids.len();
        let slot = self.slots.get(next).ok_or(TableFull)?;
        let id = FileId(u16::try_from(next).map_err(|_| TableFull)?);
        slot.get_or_init(|| file);
        ids.insert((depth, index), id);
        Ok(Some(id))
    }
}
