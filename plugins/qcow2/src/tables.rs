//! The map from the disk to the file: L1 and L2 tables.
//!
//! ```text
//!   disk offset:  │ L1 index │ L2 index │ within the cluster │
//!                      │          │
//!   L1 table  ─────────┘          │        8-byte entries: where each L2 table is, or 0
//!      └─▶ L2 table (1 cluster) ──┘        8-byte entries (16 with extended L2):
//!             └─▶ cluster                  where the data is, or zero, or compressed, or nothing
//! ```
//!
//! Both kinds of table are read in pieces of 64 KiB at most, when an answer needs them, and a small
//! number of pieces is kept. So the largest L1 table (32 MiB) costs no more than a small one, and
//! neither does a cluster size of 2 MiB.
//!
//! Bit by bit: QEMU, docs/interop/qcow2.rst, "Cluster mapping" and "Extended L2 Entries".

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use blockhouse_plugin::bytes::be_u64;
use blockhouse_plugin::{Error, ExtentList, File, FileIndex, Located, Placement, Result};

use crate::areas::Areas;
use crate::cache::{Cache, PIECE};
use crate::compressed::Descriptor;
use crate::header::{EXTENDED_L2, EXTERNAL_DATA, Header, Table};
use crate::refcounts::Refcounts;

/// An answer stops after reading this much of tables, in bytes, where each step counts as
/// [`STEP`] at least. It bounds the time of a call.
const WORK: u64 = 1 << 20;
const STEP: u64 = 4 << 10;

/// Bits 9-55 of an entry of either table: an offset in the file.
pub(crate) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The reference count is exactly one. Nothing that a reader needs.
pub(crate) const COPIED: u64 = 1 << 63;
pub(crate) const COMPRESSED: u64 = 1 << 62;
/// Reads as zero (version 3, without extended L2).
pub(crate) const ZERO: u64 = 1;
/// With extended L2, a cluster has so many subclusters.
const SUBCLUSTERS: u32 = 32;

/// What one L2 entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cluster {
    /// With the offset of a cluster that is kept for it, if there is one, which takes extended L2.
    Unallocated(Option<u64>),
    /// With the offset of a cluster that is kept for it, if there is one.
    Zero(Option<u64>),
    Data(u64),
    Packed(Descriptor),
    /// Extended L2: bit n of each map is about subcluster n; where neither is set, it is unallocated. Data has
    /// a place.
    Subclusters {
        place: Option<u64>,
        data: u32,
        zero: u32,
    },
}

impl Cluster {
    /// Where a cluster of its own is, used or kept, if it has one.
    pub(crate) fn place(self) -> Option<u64> {
        match self {
            Self::Data(offset) => Some(offset),
            Self::Unallocated(place) | Self::Zero(place) | Self::Subclusters { place, .. } => place,
            Self::Packed(_) => None,
        }
    }
}

/// The shape of the tables of an image.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) version: u32,
    cluster_bits: u32,
    pub(crate) extended: bool,
    pub(crate) external_data: bool,
}

impl Shape {
    pub(crate) fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    pub(crate) fn cluster_bits(self) -> u32 {
        self.cluster_bits
    }

    pub(crate) fn entry_bytes(self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// Bytes of the disk that one L2 table describes.
    pub(crate) fn table_span(self) -> u64 {
        self.cluster_size() / self.entry_bytes() * self.cluster_size()
    }

    /// Bytes of one piece of an L2 table.
    pub(crate) fn piece_bytes(self) -> u64 {
        self.cluster_size().min(PIECE)
    }

    /// Bytes of the disk that one piece of an L2 table describes.
    fn piece_span(self) -> u64 {
        self.piece_bytes() / self.entry_bytes() * self.cluster_size()
    }

    /// The smallest unit with an answer of its own.
    fn unit(self) -> u64 {
        if self.extended { self.cluster_size() / u64::from(SUBCLUSTERS) } else { self.cluster_size() }
    }

    /// What the L2 entry for the cluster at disk offset `guest` says, or why it cannot be right.
    pub(crate) fn decode(self, entry: u64, bitmap: u64, guest: u64) -> Result<Cluster, &'static str> {
        if entry & COMPRESSED != 0 {
            if self.external_data {
                return Err("compressed, in an image with an external data file");
            }
            if bitmap != 0 {
                return Err("compressed, with subclusters");
            }
            return Descriptor::from_entry(entry, self.cluster_bits).map(Cluster::Packed);
        }
        let zero = entry & ZERO != 0;
        let offset = entry & OFFSET;
        if entry & !(OFFSET | COPIED | ZERO) != 0 {
            return Err("reserved bits are set");
        }
        if zero && self.version < 3 {
            return Err("the zero flag is set, which version 2 does not have");
        }
        if zero && self.extended {
            return Err("the zero flag is set in an extended entry");
        }
        if !offset.is_multiple_of(self.cluster_size()) {
            return Err("the offset is not a multiple of the cluster size");
        }
        // With an external data file, 0 is a place like any other: bit 63 tells.
        let place = (offset != 0 || (self.external_data && entry & COPIED != 0)).then_some(offset);
        if self.external_data && place.is_some_and(|place| place != guest) {
            return Err("the offset in the external data file is not the offset in the disk");
        }
        if !self.extended {
            return Ok(match (zero, place) {
                (true, place) => Cluster::Zero(place),
                (false, Some(offset)) => Cluster::Data(offset),
                (false, None) => Cluster::Unallocated(None),
            });
        }
        let (zeroes, data) = halves(bitmap);
        if zeroes & data != 0 {
            return Err("a subcluster is both data and zero");
        }
        if data != 0 && place.is_none() {
            return Err("a subcluster is data, and the cluster has no offset");
        }
        Ok(match (data, zeroes) {
            (u32::MAX, _) => Cluster::Data(offset),
            (_, u32::MAX) => Cluster::Zero(place),
            (0, 0) => Cluster::Unallocated(place),
            _ => Cluster::Subclusters { place, data, zero: zeroes },
        })
    }

    /// Appends what `cluster` says, from the end of `list`, which is inside the cluster at disk offset
    /// `guest`, to `end`. Returns false if the budget of the list is used up.
    fn push(
        self,
        list: &mut ExtentList,
        cluster: Cluster,
        overwrite: bool,
        file: FileIndex,
        guest: u64,
        end: u64,
    ) -> bool {
        let within = list.end().saturating_sub(guest);
        let length = end.saturating_sub(list.end());
        let data =
            |offset: u64, within: u64| Placement::Data { file, offset: offset.saturating_add(within), overwrite };
        match cluster {
            Cluster::Unallocated(_) => list.push(length, Placement::Unallocated),
            Cluster::Zero(_) => list.push(length, Placement::Zero),
            Cluster::Data(offset) => list.push(length, data(offset, within)),
            // A packed extent is whole: an answer that has to start inside a cluster is about subclusters.
            Cluster::Packed(descriptor) => {
                within == 0 && list.push(length, Placement::Packed { token: descriptor.token() })
            }
            Cluster::Subclusters { place, data: data_map, zero } => (1..=SUBCLUSTERS).all(|number| {
                let bit = 1 << (number - 1);
                let stop = guest.saturating_add(self.unit() * u64::from(number)).min(end);
                let within = list.end().saturating_sub(guest);
                let placement = match place {
                    Some(offset) if data_map & bit != 0 => data(offset, within),
                    _ if zero & bit != 0 => Placement::Zero,
                    _ => Placement::Unallocated,
                };
                // Nothing is left of a subcluster before the start or past the end.
                list.push(stop.saturating_sub(list.end()), placement)
            }),
        }
    }
}

/// The upper and the lower half.
fn halves(bits: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = bits.to_be_bytes();
    (u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h]))
}

/// What the L1 table says about one index.
enum L1 {
    /// Nothing is allocated for so many entries, from this one on.
    Empty(u64),
    /// The L2 table is at this offset.
    Table(u64),
}

/// The way from the disk to the file, for the current state or for one snapshot.
#[derive(Debug)]
pub(crate) struct Map {
    pub(crate) shape: Shape,
    l1: Table,
    virtual_size: u64,
    image_size: u64,
    cache: Cache,
}

impl Map {
    pub(crate) fn new(header: &Header, image_size: u64) -> Self {
        Self {
            shape: Shape {
                version: header.version,
                cluster_bits: header.cluster_bits,
                extended: header.has(EXTENDED_L2),
                external_data: header.has(EXTERNAL_DATA),
            },
            l1: header.l1,
            virtual_size: header.virtual_size,
            image_size,
            cache: Cache::default(),
        }
    }

    /// Answers for another L1 table from now on: that of a snapshot.
    pub(crate) fn select(&mut self, l1: Table, virtual_size: u64) {
        self.l1 = l1;
        self.virtual_size = virtual_size;
    }

    /// See `locate` in `wit/reader.wit`. `data` is the file in which the clusters are.
    ///
    /// An answer covers one piece of an L2 table or, where that was not all that was asked for, several. An
    /// entry that cannot be right ends the answer before it; it is an error where `offset` is in it.
    pub(crate) fn locate(
        &mut self,
        image: &File,
        data: FileIndex,
        (offset, length): (u64, u64),
        max_extents: u32,
        mut owners: Option<&mut Owners<'_>>,
    ) -> Result<Located> {
        if offset >= self.virtual_size {
            return Err(Error::Other(format!("offset {offset} is past the end of the disk, {}", self.virtual_size)));
        }
        let goal = offset.saturating_add(length.max(1)).min(self.virtual_size);
        let shape = self.shape;
        // As many clusters as the budget is sure to hold, if none is divided.
        let group = shape.cluster_size().saturating_mul(1 << max_extents.max(1).ilog2()).min(shape.piece_span());
        let mut failed = None;
        // From the start of the piece, if the budget allows; else from that of the group, so that answers about a
        // divided table meet and never overlap; else from the cluster or subcluster itself.
        for unit in [shape.piece_span(), group, shape.cluster_size(), shape.unit()] {
            let mut list = ExtentList::new(offset - offset % unit, max_extents);
            let outcome = self.walk(image, data, goal, &mut list, owners.as_deref_mut());
            if list.end() > offset {
                return Ok(list.finish());
            }
            failed = outcome.err();
        }
        Err(failed.unwrap_or_else(|| Error::Other(format!("{max_extents} extents are too few for an answer"))))
    }

    /// Appends to `list` until it reaches `goal`, its budget is used up, or the work is enough.
    fn walk(
        &mut self,
        image: &File,
        data: FileIndex,
        goal: u64,
        list: &mut ExtentList,
        mut owners: Option<&mut Owners<'_>>,
    ) -> Result<()> {
        let shape = self.shape;
        let mut work = WORK;
        while list.end() < goal && work > 0 {
            let at = list.end();
            let index = at / shape.table_span();
            let done = match self.l1_entry(image, index)? {
                L1::Empty(entries) => {
                    let end = index.saturating_add(entries).saturating_mul(shape.table_span()).min(self.virtual_size);
                    work = work.saturating_sub(entries.saturating_mul(8).max(STEP));
                    list.push(end.saturating_sub(at), Placement::Unallocated)
                }
                L1::Table(table) => {
                    work = work.saturating_sub(shape.piece_bytes().max(STEP));
                    self.l2_piece(image, data, (index, table), list, owners.as_deref_mut())?
                }
            };
            if !done {
                break;
            }
        }
        Ok(())
    }

    fn l1_entry(&mut self, image: &File, index: u64) -> Result<L1> {
        // A snapshot may have a shorter table than its disk needs: the rest is unallocated.
        if index >= self.l1.entries {
            return Ok(L1::Empty(u64::MAX - index));
        }
        let first = index - index % (PIECE / 8);
        let entries = (self.l1.entries - first).min(PIECE / 8);
        let offset = self.l1.offset.saturating_add(first.saturating_mul(8));
        let piece = self.cache.piece(image, offset, entries.saturating_mul(8), format_args!("the L1 table"))?;
        let (words, _) = piece.as_chunks::<8>();
        let mut rest = words.iter().skip(usize::try_from(index - first).unwrap_or(usize::MAX));
        let entry = rest.next().map(|word| u64::from_be_bytes(*word)).unwrap_or_default();
        if entry == 0 {
            let empty = rest.take_while(|word| **word == [0; 8]).count();
            return Ok(L1::Empty(1 + empty as u64));
        }
        let offset = entry & OFFSET;
        let why = if entry & !(OFFSET | COPIED) != 0 {
            "reserved bits are set"
        } else if !offset.is_multiple_of(self.shape.cluster_size()) {
            "the offset is not a multiple of the cluster size"
        } else if offset == 0 {
            // Bit 63 alone: no table.
            return Ok(L1::Empty(1));
        } else if offset.saturating_add(self.shape.cluster_size()) > self.image_size {
            "the L2 table is past the end of the file"
        } else {
            return Ok(L1::Table(offset));
        };
        Err(Error::corrupt(format!("L1 table, entry {index} is {entry:#018x}: {why}")))
    }

    /// Appends what is left of one piece of the L2 table at `table`. Returns false if the budget of the
    /// list is used up.
    fn l2_piece(
        &mut self,
        image: &File,
        file: FileIndex,
        (l1_index, table): (u64, u64),
        list: &mut ExtentList,
        mut owners: Option<&mut Owners<'_>>,
    ) -> Result<bool> {
        let shape = self.shape;
        let in_piece = list.end() % shape.piece_span();
        let piece_in_table = (list.end() - in_piece) % shape.table_span() / shape.piece_span();
        let offset = table.saturating_add(piece_in_table.saturating_mul(shape.piece_bytes()));
        let piece = self.cache.piece(
            image,
            offset,
            shape.piece_bytes(),
            format_args!("the L2 table of L1 entry {l1_index}"),
        )?;

        let entry_bytes = usize::try_from(shape.entry_bytes()).unwrap_or(8);
        let first = usize::try_from(in_piece / shape.cluster_size()).unwrap_or(usize::MAX);
        for (number, entry) in piece.chunks_exact(entry_bytes).enumerate().skip(first) {
            let at = list.end();
            if at >= self.virtual_size {
                break;
            }
            let guest = at - at % shape.cluster_size();
            let bitmap = if shape.extended { be_u64(entry, 8).unwrap_or_default() } else { 0 };
            let entry = be_u64(entry, 0).unwrap_or_default();
            let cluster = match shape.decode(entry, bitmap, guest) {
                Ok(Cluster::Packed(descriptor)) if descriptor.offset() >= self.image_size => {
                    Err("the compressed data is past the end of the file")
                }
                decoded => decoded,
            };
            let cluster = cluster.map_err(|why| {
                let index = piece_in_table * (shape.piece_bytes() / shape.entry_bytes()) + number as u64;
                let bitmap = if shape.extended { format!(" with bitmap {bitmap:#018x}") } else { String::new() };
                Error::corrupt(format!(
                    "L2 table at {table:#x} (of L1 entry {l1_index}), entry {index} is {entry:#018x}{bitmap}: {why}"
                ))
            })?;
            let end = guest.saturating_add(shape.cluster_size()).min(self.virtual_size);
            let overwrite = match (cluster, owners.as_deref_mut()) {
                (Cluster::Data(offset), Some(owners)) if entry & COPIED != 0 => owners.owns(image, offset),
                _ => false,
            };
            if !shape.push(list, cluster, overwrite, file, guest, end) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The size of the image file, which grows.
    pub(crate) fn grow_image(&mut self, size: u64) {
        self.image_size = self.image_size.max(size);
    }

    /// Entries of the L1 table.
    pub(crate) fn l1(&self) -> Table {
        self.l1
    }

    /// The piece of the L1 table with entry `index`: offset, length, and the byte of the entry in it.
    fn l1_place(&self, index: u64) -> (u64, u64, usize) {
        let first = index - index % (PIECE / 8);
        let entries = self.l1.entries.saturating_sub(first).min(PIECE / 8);
        let at = usize::try_from((index - first) * 8).unwrap_or(usize::MAX);
        (self.l1.offset.saturating_add(first.saturating_mul(8)), entries.saturating_mul(8), at)
    }

    /// The L1 entry of a disk offset as it stands: the index, where the L2 table is, and whether the
    /// entry says that nothing else refers to it. `None` if there is no table.
    pub(crate) fn table_of(&mut self, image: &File, guest: u64) -> Result<(u64, Option<(u64, bool)>)> {
        let index = guest / self.shape.table_span();
        let L1::Table(table) = self.l1_entry(image, index)? else { return Ok((index, None)) };
        let (offset, length, at) = self.l1_place(index);
        let piece = self.cache.piece(image, offset, length, format_args!("the L1 table"))?;
        let copied = be_u64(piece, at).unwrap_or_default() & COPIED != 0;
        Ok((index, Some((table, copied))))
    }

    /// Makes an L1 entry name a table that nothing else refers to.
    pub(crate) fn set_table(&mut self, image: &File, index: u64, table: u64) -> Result<()> {
        let (offset, length, at) = self.l1_place(index);
        self.cache.change(image, offset, length, at, &(table | COPIED).to_be_bytes(), format_args!("the L1 table"))
    }

    /// Makes the cluster at `table` an L2 table that is not in the file yet: empty, or a copy of another.
    pub(crate) fn create_table(&mut self, image: &File, table: u64, copy_of: Option<u64>) -> Result<()> {
        let length = self.shape.piece_bytes();
        for number in 0..self.shape.cluster_size() / length {
            let bytes = match copy_of {
                None => vec![0; usize::try_from(length).unwrap_or_default()],
                Some(old) => {
                    let at = old.saturating_add(number * length);
                    self.cache.piece(image, at, length, format_args!("an L2 table"))?.to_vec()
                }
            };
            self.cache.create(table.saturating_add(number * length), bytes);
        }
        Ok(())
    }

    /// The piece of the L2 table at `table` with the entry of a disk offset, and the byte in it.
    fn l2_place(&self, table: u64, guest: u64) -> (u64, u64, usize) {
        let length = self.shape.piece_bytes();
        let at = guest % self.shape.table_span() / self.shape.cluster_size() * self.shape.entry_bytes();
        let within = at % length;
        (table.saturating_add(at - within), length, usize::try_from(within).unwrap_or(usize::MAX))
    }

    /// The L2 entry of a disk offset in the table at `table`, with its bitmap, and what they say.
    pub(crate) fn entry(&mut self, image: &File, table: u64, guest: u64) -> Result<(u64, Cluster)> {
        let (offset, length, at) = self.l2_place(table, guest);
        let shape = self.shape;
        let piece = self.cache.piece(image, offset, length, format_args!("the L2 table at {table:#x}"))?;
        let entry = be_u64(piece, at).unwrap_or_default();
        let bitmap = if shape.extended { be_u64(piece, at.saturating_add(8)).unwrap_or_default() } else { 0 };
        let cluster = shape
            .decode(entry, bitmap, guest - guest % shape.cluster_size())
            .map_err(|why| Error::corrupt(format!("the L2 entry of disk offset {guest:#x} is {entry:#018x}: {why}")))?;
        Ok((entry, cluster))
    }

    /// Changes an L2 entry in a table that nothing else refers to. With `None` the entry stays as it is,
    /// and is in memory when it returns.
    pub(crate) fn set_entry(&mut self, image: &File, table: u64, guest: u64, new: Option<(u64, u64)>) -> Result<()> {
        let (offset, length, at) = self.l2_place(table, guest);
        let bytes = match new {
            None => Vec::new(),
            Some((entry, bitmap)) if self.shape.extended => [entry.to_be_bytes(), bitmap.to_be_bytes()].concat(),
            Some((entry, _)) => entry.to_be_bytes().to_vec(),
        };
        self.cache.change(image, offset, length, at, &bytes, format_args!("the L2 table at {table:#x}"))
    }

    /// The tables in memory.
    pub(crate) fn cache(&mut self) -> &mut Cache {
        &mut self.cache
    }
}

/// What tells whether a data cluster belongs to this disk alone and holds no metadata, so that it may be
/// overwritten in place.
#[derive(Debug)]
pub(crate) struct Owners<'a> {
    pub(crate) refcounts: &'a mut Refcounts,
    pub(crate) areas: &'a Areas,
    pub(crate) cluster_size: u64,
    /// Data has a file of its own, with nothing else in it.
    pub(crate) external: bool,
}

impl Owners<'_> {
    /// Whether it does. Where the count cannot be read the answer is no for now.
    pub(crate) fn owns(&mut self, image: &File, offset: u64) -> bool {
        let count = |refcounts: &mut Refcounts| refcounts.get(image, offset / self.cluster_size);
        self.external
            || self.areas.find(offset, self.cluster_size).is_none()
                && count(self.refcounts).is_ok_and(|count| count == 1)
    }
}
