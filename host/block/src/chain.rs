//! The layers of a disk, top first, and the walk that flattens what they say.
//!
//! ```text
//!            position ──▶
//!   layer 0  [ data ][  unallocated   ][ zero ][ unallocated ]      each layer: its last answer
//!   layer 1          [ data ][ unalloc ]       [ packed ]|             and a cursor into it
//!   layer 2                  [ data    ]                 | end of layer 1: zero from here
//!            ───────────────────────────────────────────────
//!   flat     [ 0    ][ 1    ][ 2       ][ 0    ][ 1      ][ nothing ]
//! ```
//!
//! The walk goes forward only, so that the work is linear in the number of extents, whatever the
//! shape of the chain, and it is a loop, so that depth costs no stack.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::answer::{self, Question, Refusal};
use crate::error::{Error, ErrorKind, Result};
use crate::file::Access;
use crate::files::{FileId, FileTable, MAX_FILES};
use crate::flat::{Flat, Target};
use crate::layer::{Extent, FileIndex, Layer, LayerInfo, LayerWriter, Located, Placement};
use crate::space::{self, Asked, SpaceLie};

/// The most layers in one disk.
pub const MAX_CHAIN_DEPTH: usize = 1024;

/// Extents that a layer may return in one answer: more than a whole qcow2 L2 table of 64 KiB
/// clusters has in 64 MiB.
pub(crate) const MAX_EXTENTS: u32 = 1024;

/// How far ahead a layer is asked, in bytes. It may answer for more.
const ASK_AHEAD: u64 = 64 << 20;

/// Runs of space that a writer may reserve in one answer.
const MAX_ALLOCATIONS: u32 = 256;

/// How many questions one request may cause.
///
/// A component chooses how little it answers, so this is what bounds the work of a request. The most
/// finely divided honest answer is a qcow2 L2 table of 512-byte clusters, 32 KiB.
#[derive(Debug)]
pub(crate) struct Questions(u64);

impl Questions {
    /// The limit for a request of `length` bytes on a chain of `layers`.
    pub(crate) fn for_request(length: u64, layers: usize) -> Self {
        let layers = u64::try_from(layers).unwrap_or(u64::MAX);
        Self((16 + length / 4096).saturating_mul(layers))
    }

    /// No limit, for a caller that stops by itself.
    pub(crate) fn unlimited() -> Self {
        Self(u64::MAX)
    }

    fn take(&mut self) -> bool {
        let left = self.0.checked_sub(1);
        self.0 = left.unwrap_or(0);
        left.is_some()
    }
}

/// One layer, and why it is not asked any more.
struct Link {
    layer: Arc<dyn Layer>,
    /// Its size in bytes, which only that of the top layer changes.
    size: AtomicU64,
    /// Set once it broke its contract.
    failed: OnceLock<String>,
}

/// Space that the top layer reserved, checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reserved {
    /// Where it starts and ends in the disk, in bytes.
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) file: FileId,
    /// Byte offset in that file.
    pub(crate) offset: u64,
    /// It reads as zero now.
    pub(crate) zeroed: bool,
    pub(crate) ticket: u64,
}

/// The layers of a disk, top first.
pub(crate) struct Chain {
    links: Vec<Link>,
    pub(crate) files: FileTable,
}

impl Chain {
    /// Takes the layers, top first.
    pub(crate) fn new(layers: Vec<Arc<dyn Layer>>) -> Result<Self> {
        if layers.is_empty() {
            return Err(Error::new(ErrorKind::Invalid, "a disk needs at least one layer"));
        }
        if layers.len() > MAX_CHAIN_DEPTH {
            return Err(Error::new(
                ErrorKind::Limit,
                format!("a chain of {} layers, where {MAX_CHAIN_DEPTH} are allowed", layers.len()),
            ));
        }
        for info in layers.iter().map(|layer| layer.info()) {
            let invalid = |what: String| Err(Error::new(ErrorKind::Component, what).on_image(info.name.clone()));
            if info.virtual_size % crate::SECTOR_SIZE != 0 {
                return invalid(format!("a size of {} bytes, not a multiple of 512", info.virtual_size));
            }
            if info.virtual_size > crate::MAX_FILE_OFFSET {
                return invalid(format!("a size of {} bytes, 2^63 or more", info.virtual_size));
            }
            if info.cluster_size != 0 && !info.cluster_size.is_power_of_two() {
                return invalid(format!("a cluster size of {} bytes, not a power of two", info.cluster_size));
            }
        }
        let link = |layer: Arc<dyn Layer>| Link {
            size: AtomicU64::new(layer.info().virtual_size),
            layer,
            failed: OnceLock::new(),
        };
        let links = layers.into_iter().map(link).collect();
        Ok(Self { links, files: FileTable::new() })
    }

    pub(crate) fn depth(&self) -> usize {
        self.links.len()
    }

    /// Whether the top layer can write with allocation.
    pub(crate) fn has_writer(&self) -> bool {
        self.links.first().is_some_and(|top| top.layer.writer().is_some())
    }

    pub(crate) fn infos(&self) -> impl Iterator<Item = &LayerInfo> {
        self.links.iter().map(|link| link.layer.info())
    }

    /// The size of the layer at `depth`, or `None` if the chain ends above it.
    fn virtual_size(&self, depth: u16) -> Option<u64> {
        self.links.get(usize::from(depth)).map(Link::size)
    }

    fn link(&self, depth: u16) -> Result<&Link> {
        let link = self
            .links
            .get(usize::from(depth))
            .ok_or_else(|| Error::new(ErrorKind::Component, format!("there is no layer {depth} in this disk")))?;
        match link.failed.get() {
            None => Ok(link),
            Some(why) => Err(Error::new(
                ErrorKind::Component,
                format!("its component is not asked any more, since it failed: {why}"),
            )
            .on_image(link.layer.info().name.clone())),
        }
    }

    /// Asks one layer and checks what it says.
    fn locate(&self, depth: u16, offset: u64, length: u64) -> Result<Located> {
        let link = self.link(depth)?;
        let answer = link.layer.locate(offset, length, MAX_EXTENTS).map_err(|error| link.note(error))?;
        let question = Question { offset, max_extents: MAX_EXTENTS, virtual_size: link.size() };
        match answer::check(question, &answer, |index| {
            Ok(self.file(depth, index)?.and_then(|id| self.files.get(id)).map(|file| file.access()))
        }) {
            Ok(()) => Ok(answer),
            Err(Refusal::Files(error)) => Err(error),
            Err(Refusal::Lie(lie)) => Err(link.lie(format!("the component gave a wrong answer: {lie}"))),
        }
    }

    /// The bytes of a packed unit.
    pub(crate) fn unpack(&self, depth: u16, token: u64, length: u64) -> Result<Vec<u8>> {
        let link = self.link(depth)?;
        let bytes = link.layer.unpack(token, length).map_err(|error| link.note(error))?;
        if u64::try_from(bytes.len()) != Ok(length) {
            let given = bytes.len();
            return Err(link.lie(format!("the component gave {given} bytes for a packed unit of {length}")));
        }
        Ok(bytes)
    }

    /// Calls the writer of the top layer, unless writes to a file may have been lost: no flush can end well any more,
    /// and whatever the layer still changed would only be more that does not fit together.
    pub(crate) fn writer<T>(&self, call: impl FnOnce(&dyn LayerWriter) -> Result<T>) -> Result<T> {
        self.refuse_lost()?;
        self.any_writer(call)
    }

    fn refuse_lost(&self) -> Result<()> {
        self.files.iter().try_for_each(|file| file.refuse_lost())
    }

    fn any_writer<T>(&self, call: impl FnOnce(&dyn LayerWriter) -> Result<T>) -> Result<T> {
        let link = self.link(0)?;
        let writer = link.layer.writer().ok_or_else(|| Error::new(ErrorKind::Invalid, "the image on top cannot grow"));
        writer.and_then(call).map_err(|error| link.note(error))
    }

    /// Makes the top layer larger, while nobody uses the disk. Returns what became of that, and its size now.
    pub(crate) fn grow(&self, size: u64) -> Result<(Result<()>, u64)> {
        let link = self.link(0)?;
        let below = self.virtual_size(1).unwrap_or(0);
        let before = link.size();
        let grown = link.layer.grow(size, below).map_err(|error| link.note(error));
        let now = if grown.is_ok() { size } else { link.layer.size().clamp(before, size) };
        link.size.store(now, Ordering::Release);
        Ok((grown, now))
    }

    /// Whether the top layer can write packed data.
    pub(crate) fn has_packer(&self) -> bool {
        self.links.first().is_some_and(|top| top.layer.packer().is_some())
    }

    /// Writes one cluster of the top layer packed.
    pub(crate) fn pack(&self, offset: u64, bytes: &[u8]) -> Result<bool> {
        self.refuse_lost()?;
        let link = self.link(0)?;
        let packer = link.layer.packer().ok_or_else(|| {
            let format = &link.layer.info().format;
            Error::new(ErrorKind::Unsupported, format!("{format} images cannot be written compressed here"))
        });
        packer.and_then(|packer| packer.pack(offset, bytes)).map_err(|error| link.note(error))
    }

    /// Reserves space for `start..end`, which lies inside the disk, or for a prefix of it. The first run
    /// contains `start`.
    pub(crate) fn prepare(&self, start: u64, end: u64) -> Result<Vec<Reserved>> {
        let answer = self.writer(|writer| writer.prepare(start, end.saturating_sub(start), MAX_ALLOCATIONS))?;
        let link = self.link(0)?;
        let asked = Asked {
            start,
            end,
            max: usize::try_from(MAX_ALLOCATIONS).unwrap_or(usize::MAX),
            cluster: u64::from(link.layer.info().cluster_size).max(1),
            virtual_size: link.size(),
        };
        let checked = space::check_allocations(asked, &answer, |index| self.access(index));
        // There may be too many files; a liar is not asked any more.
        Self::judge(link, checked)
            .inspect_err(|_| self.abandon(&answer.iter().map(|allocation| allocation.ticket).collect::<Vec<_>>()))?;
        let reserved = answer.iter().map(|allocation| {
            Ok(Reserved {
                start: allocation.start,
                end: allocation.start.saturating_add(allocation.length),
                file: self.writable_file(allocation.file)?,
                offset: allocation.offset,
                zeroed: allocation.zeroed,
                ticket: allocation.ticket,
            })
        });
        reserved.collect()
    }

    /// Gives space back after a failure, which is what the caller reports, whatever becomes of this.
    pub(crate) fn abandon(&self, tickets: &[u64]) {
        // A layer that broke down has lost its reservations with everything else.
        if self.link(0).is_err() {
            return;
        }
        if let Err(error) = self.any_writer(|writer| writer.abandon(tickets)) {
            tracing::warn!("reserved space could not be given back: {error}");
        }
    }

    /// Makes the metadata of the top layer durable, and returns the space that this freed.
    pub(crate) fn flush(&self) -> Result<Vec<(FileId, u64, u64)>> {
        let answer = self.writer(|writer| writer.flush())?;
        let link = self.link(0)?;
        Self::judge(link, space::check_freed(&answer, |index| self.access(index)))?;
        answer.iter().map(|freed| Ok((self.writable_file(freed.file)?, freed.offset, freed.length))).collect()
    }

    /// A file of the top layer that was checked before.
    fn writable_file(&self, index: FileIndex) -> Result<FileId> {
        self.file(0, index)?
            .ok_or_else(|| Error::new(ErrorKind::Component, format!("file {} is not registered any more", index.0)))
    }

    /// The right to a file of the top layer.
    fn access(&self, index: FileIndex) -> Result<Option<Access>> {
        Ok(self.file(0, index)?.and_then(|id| self.files.get(id)).map(|file| file.access()))
    }

    /// Turns the outcome of a check into the error of the request.
    fn judge(link: &Link, checked: Result<(), Refusal<Error, SpaceLie>>) -> Result<()> {
        checked.map_err(|refusal| match refusal {
            Refusal::Files(error) => error,
            Refusal::Lie(lie) => link.lie(format!("the component gave a wrong answer: {lie}")),
        })
    }

    fn file(&self, depth: u16, index: FileIndex) -> Result<Option<FileId>> {
        let link = self.link(depth)?;
        self.files.intern(depth, index, || link.layer.file(index)).map_err(|_| {
            Error::new(ErrorKind::Limit, format!("the disk uses more than {MAX_FILES} files"))
                .on_image(link.layer.info().name.clone())
        })
    }

    /// Walks from `start` to `end`, which lie inside the disk. Every extent before `needed` is
    /// delivered or is an error; after that the walk ends as soon as it would have to ask a layer for
    /// the second time.
    pub(crate) fn walk(&self, start: u64, needed: u64, end: u64) -> Walk<'_> {
        let cursors = self.links.iter().map(|_| Cursor::default()).collect();
        Walk { chain: self, position: start, needed, end, cursors }
    }
}

impl Link {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Names the image in an error, and remembers a broken component.
    fn note(&self, error: Error) -> Error {
        if error.kind() == ErrorKind::Component && !self.layer.may_recover() {
            self.failed.get_or_init(|| error.message().to_owned());
        }
        error.on_image(self.layer.info().name.clone())
    }

    fn lie(&self, message: String) -> Error {
        tracing::warn!(image = self.layer.info().name, "{message}");
        self.failed.get_or_init(|| message.clone());
        self.note(Error::new(ErrorKind::Component, message))
    }
}

/// The last answer of one layer, and a position in it.
#[derive(Debug, Default)]
struct Cursor {
    answer: Located,
    /// The extent at the position, and where it starts.
    index: usize,
    at: u64,
    asked: bool,
}

impl Cursor {
    /// Goes forward to the extent that contains `position`, if the answer has it, and returns it with
    /// its start.
    fn seek(&mut self, position: u64) -> Option<(u64, Extent)> {
        while let Some(extent) = self.answer.extents.get(self.index) {
            let end = self.at.saturating_add(extent.length);
            if position < end {
                return Some((self.at, *extent));
            }
            self.at = end;
            self.index += 1;
        }
        None
    }

    fn rewind(&mut self) {
        self.index = 0;
        self.at = self.answer.start;
    }
}

/// What a walk finds at one position.
enum Step {
    Flat(Flat),
    /// A layer would have to be asked, and this is not worth it. Ends where the question would.
    Unknown {
        end: u64,
    },
}

/// Flattens a range of the disk, extent by extent. Made by [`Chain::walk`].
pub(crate) struct Walk<'c> {
    chain: &'c Chain,
    position: u64,
    needed: u64,
    end: u64,
    cursors: Vec<Cursor>,
}

impl Walk<'_> {
    /// Where the next extent starts.
    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    /// The next extent, or `None` at the end of the walk.
    pub(crate) fn next(&mut self, questions: &mut Questions) -> Result<Option<Flat>> {
        match self.flatten(self.position, self.end, Some(questions))? {
            Step::Flat(flat) => {
                self.position = flat.end();
                Ok(Some(flat))
            }
            Step::Unknown { .. } => Ok(None),
        }
    }

    /// What the answers at hand say about the bytes before `first`, the extent that was just found: a
    /// layer may answer for more than was asked, and all of it is worth remembering. Asks nobody; leaves
    /// gaps where it would have to. At most [`MAX_EXTENTS`] extents.
    pub(crate) fn look_back(&mut self, first: &Flat) -> Vec<Flat> {
        let consulted = self.cursors.iter_mut().take(usize::from(first.depth) + 1);
        let mut position = consulted.map(|cursor| cursor.answer.start).max().unwrap_or(first.start);
        let mut flats = Vec::new();
        if position >= first.start {
            return flats;
        }
        self.cursors.iter_mut().for_each(Cursor::rewind);
        let budget = usize::try_from(MAX_EXTENTS).unwrap_or(usize::MAX);
        while position < first.start && flats.len() < budget {
            match self.flatten(position, first.start, None) {
                Ok(Step::Flat(flat)) => {
                    position = flat.end();
                    flats.push(flat);
                }
                Ok(Step::Unknown { end }) => position = end,
                Err(_) => break,
            }
        }
        self.cursors.iter_mut().for_each(Cursor::rewind);
        flats
    }

    /// Follows the chain down at `position`. With `questions`, asks the layers that it needs; without,
    /// it uses what is at hand.
    fn flatten(&mut self, position: u64, end: u64, mut questions: Option<&mut Questions>) -> Result<Step> {
        let mut limit = end;
        let mut depth: u16 = 0;
        if position >= limit {
            return Ok(Step::Unknown { end: limit });
        }
        loop {
            let found = self.extent_at(depth, position, questions.as_deref_mut())?;
            let Some((start, extent)) = found else { return Ok(Step::Unknown { end: limit }) };
            limit = limit.min(start.saturating_add(extent.length));
            let skipped = position.saturating_sub(start);
            let target = match extent.placement {
                Placement::Unallocated => {
                    let below = depth.saturating_add(1);
                    match self.chain.virtual_size(below) {
                        Some(size) if position < size => {
                            limit = limit.min(size);
                            depth = below;
                            continue;
                        }
                        // Past the end of the layer below, or no layer below.
                        _ => Target::Unallocated,
                    }
                }
                Placement::Zero => Target::Zero,
                Placement::Data { file, offset, overwrite } => Target::Data {
                    file: self.chain.file(depth, file)?.ok_or_else(|| {
                        Error::new(ErrorKind::Component, format!("file {} is not registered any more", file.0))
                    })?,
                    offset: offset.saturating_add(skipped),
                    // A layer below the top is never written, whatever it claims.
                    overwrite: overwrite && depth == 0,
                },
                Placement::Packed { token } => Target::Packed {
                    token,
                    skip: u32::try_from(skipped).unwrap_or(u32::MAX),
                    unit: u32::try_from(extent.length).unwrap_or(u32::MAX),
                },
            };
            return Ok(Step::Flat(Flat { start: position, length: limit.saturating_sub(position), depth, target }));
        }
    }

    /// The extent of one layer at `position`, with its start, from the answer at hand or a new one.
    /// `None` if it is not needed enough to ask.
    fn extent_at(
        &mut self,
        depth: u16,
        position: u64,
        questions: Option<&mut Questions>,
    ) -> Result<Option<(u64, Extent)>> {
        let size = self.chain.virtual_size(depth).unwrap_or(0);
        let Some(cursor) = self.cursors.get_mut(usize::from(depth)) else { return Ok(None) };
        if let Some(found) = cursor.seek(position) {
            // An answer at hand may start later, when looking back.
            return Ok((found.0 <= position).then_some(found));
        }
        let Some(questions) = questions else { return Ok(None) };
        if cursor.asked && position >= self.needed {
            return Ok(None);
        }
        if !questions.take() {
            return Err(Error::new(
                ErrorKind::Limit,
                "the request needs too many answers from components: the image is divided too finely",
            ));
        }
        cursor.asked = true;
        let ahead = self.end.min(size).saturating_sub(position).min(ASK_AHEAD);
        cursor.answer = self.chain.locate(depth, position, ahead)?;
        cursor.rewind();
        Ok(cursor.seek(position))
    }
}
