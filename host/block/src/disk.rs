//! A disk: a chain of layers, the map of what is known about it, and the native movement of its bytes.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use vm_memory::VolatileSlice;

use crate::backend::{BlockBackend, SECTOR_SIZE, Topology, UnflushedWatch};
use crate::buffers::Buffers;
use crate::chain::{Chain, MAX_EXTENTS, Questions};
use crate::error::{Error, ErrorKind, Result};
use crate::file::ImageFile;
use crate::files::FileId;
use crate::flat::{Flat, Target};
use crate::inflight::InFlight;
use crate::lane::{DiskLane, Lane, Pool, Rings};
use crate::layer::{Layer, LayerInfo};
use crate::map::{ExtentMap, MapStats};
use crate::runs::Runs;
use crate::units::UnitCache;
use crate::write::Source;

/// The block size that guests are told at least: the page of the host, below which a write costs a read.
const MIN_PHYSICAL_BLOCK: u32 = 4096;

/// The largest preferred request that guests are told: the largest qcow2 cluster.
const MAX_OPTIMAL_IO: u32 = 2 << 20;

/// The most that is reserved ahead of a write: what one answer of a writer can hold, and what can be held
/// alone without holding up others for long.
const MAX_ALLOCATE_AHEAD: u64 = 16 << 20;

/// Locks that keep threads from asking for the same range at the same time.
const ASKING_LOCKS: usize = 64;

/// Locks that keep threads from unpacking the same unit at the same time.
const UNPACK_LOCKS: usize = 16;

/// What moves the bytes of requests on lanes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// io_uring; threads where the host refuses it.
    #[default]
    Auto,
    /// Threads that wait for each request.
    Threads,
}

/// How a disk is used, and how much memory it may take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskOptions {
    /// Whether writes are accepted. The top layer must be `overwritable` or have a writer. Default: no.
    pub writable: bool,
    /// Memory for the extent map in bytes: [`EXTENT_BYTES`](crate::EXTENT_BYTES) for each run of bytes
    /// that lie together. Default: 16 MiB.
    pub extent_map_bytes: usize,
    /// Memory for unpacked units in bytes. Default: 32 MiB.
    pub unpacked_cache_bytes: usize,
    /// How far space is reserved ahead of writes that follow each other, in bytes. Saves calls of the layer;
    /// when the writes end, up to this much space that holds nothing stays allocated in the image. Default: 0.
    pub allocate_ahead_bytes: u64,
    /// What moves the bytes of requests on lanes.
    pub engine: Engine,
}

impl Default for DiskOptions {
    fn default() -> Self {
        Self {
            writable: false,
            extent_map_bytes: 16 << 20,
            unpacked_cache_bytes: 32 << 20,
            allocate_ahead_bytes: 0,
            engine: Engine::Auto,
        }
    }
}

/// Writes that follow each other, as far as a disk notices.
#[derive(Debug, Default)]
pub(crate) struct Stream {
    /// Where the last allocation ended.
    pub(crate) end: AtomicU64,
    /// How far space was reserved ahead of the last write.
    pub(crate) ahead: AtomicU64,
}

/// A chain of layers as one disk. See [`BlockBackend`] for what can be done with it.
pub struct Disk {
    pub(crate) chain: Chain,
    pub(crate) map: ExtentMap,
    pub(crate) units: UnitCache,
    /// Held while layers are asked, by the stripe of the map, so that threads which miss the same range ask
    /// once.
    asking: Box<[Mutex<()>]>,
    unpacking: Box<[Mutex<()>]>,
    /// Only ever gets more.
    capacity: AtomicU64,
    pub(crate) writable: bool,
    /// Whether the top layer is written through its writer.
    pub(crate) allocates: bool,
    /// Which parts a request is using. A disk that is not writable needs none of it.
    pub(crate) inflight: InFlight,
    /// The most that is reserved ahead of a write, in bytes.
    pub(crate) allocate_ahead: u64,
    pub(crate) stream: Stream,
    /// Held during every call of the writer; see [`flush`](BlockBackend::flush).
    pub(crate) space: Mutex<()>,
    /// Whether the layer on top has changes in its memory. Set and cleared with `space` held.
    pub(crate) unflushed: AtomicBool,
    pub(crate) unflushed_watch: RwLock<Option<UnflushedWatch>>,
    /// Set once, while nothing is in flight.
    pub(crate) closed: AtomicBool,
    topology: Topology,
    pool: Pool,
    rings: Rings,
    engine: Engine,
}

impl Disk {
    /// A disk of `layers`, top first: the size is that of the top layer.
    ///
    /// # Errors
    /// [`Invalid`](ErrorKind::Invalid) if there is no layer, or if it is to be writable and the top
    /// layer is not; [`Limit`](ErrorKind::Limit) if there are too many layers;
    /// [`Component`](ErrorKind::Component) if a layer has an impossible size.
    pub fn new(layers: Vec<Arc<dyn Layer>>, options: DiskOptions) -> Result<Self> {
        let chain = Chain::new(layers)?;
        let top =
            chain.infos().next().ok_or_else(|| Error::new(ErrorKind::Invalid, "a disk needs at least one layer"))?;
        if options.writable && !top.overwritable && !chain.has_writer() {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("a {} image opened this way cannot be written: open the disk read-only", top.format),
            )
            .on_image(top.name.clone()));
        }
        let allocates = options.writable && chain.has_writer();
        if allocates && top.cluster_size == 0 {
            return Err(
                Error::new(ErrorKind::Component, "it can grow but has no cluster size").on_image(top.name.clone())
            );
        }
        let inflight = InFlight::new(top.cluster_size);
        let capacity = top.virtual_size;
        let physical_block_size = MIN_PHYSICAL_BLOCK;
        let optimal_io_size = top.cluster_size.clamp(MIN_PHYSICAL_BLOCK, MAX_OPTIMAL_IO);
        let map = ExtentMap::new(capacity, top.cluster_size, options.extent_map_bytes);
        Ok(Self {
            chain,
            map,
            units: UnitCache::new(options.unpacked_cache_bytes),
            asking: (0..ASKING_LOCKS).map(|_| Mutex::default()).collect(),
            unpacking: (0..UNPACK_LOCKS).map(|_| Mutex::default()).collect(),
            capacity: AtomicU64::new(capacity),
            writable: options.writable,
            allocates,
            inflight,
            allocate_ahead: options.allocate_ahead_bytes.min(MAX_ALLOCATE_AHEAD),
            stream: Stream::default(),
            space: Mutex::default(),
            unflushed: AtomicBool::new(false),
            unflushed_watch: RwLock::new(None),
            closed: AtomicBool::new(false),
            topology: Topology { physical_block_size, optimal_io_size },
            pool: Pool::new(),
            rings: Rings::default(),
            engine: options.engine,
        })
    }

    /// What is fixed about each layer, top first.
    pub fn layers(&self) -> impl Iterator<Item = &LayerInfo> {
        self.chain.infos()
    }

    /// The whole disk as runs, in order: what is where, asked of the layers anew.
    pub fn runs(&self) -> Runs<'_> {
        Runs::new(&self.chain, 0, self.capacity())
    }

    /// What the extent map did so far.
    pub fn map_stats(&self) -> MapStats {
        self.map.stats()
    }

    /// Bytes that unpacked units take now.
    pub fn unpacked_bytes(&self) -> usize {
        self.units.bytes()
    }

    /// Forgets what is known about a range, which a layer now answers differently.
    pub fn invalidate(&self, offset: u64, length: u64) {
        self.map.invalidate(offset, length);
    }

    /// Has lanes use these threads for what may wait, instead of threads of the disk's own.
    #[must_use]
    pub fn with_pool(self, pool: Pool) -> Self {
        Self { pool, ..self }
    }

    /// Has lanes use these rings, and make some of their own only where there are not enough.
    #[must_use]
    pub fn with_rings(self, rings: Rings) -> Self {
        Self { rings, ..self }
    }

    pub(crate) fn set_capacity(&self, capacity: u64) {
        self.capacity.store(capacity, Ordering::Release);
    }

    pub(crate) fn engine(&self) -> Engine {
        self.engine
    }

    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }

    pub(crate) fn rings(&self) -> &Rings {
        &self.rings
    }

    /// The end of a request that starts at `offset`.
    pub(crate) fn request_end(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> Result<u64> {
        buffers
            .iter()
            .try_fold(offset, |end, buffer| end.checked_add(buffer.len() as u64))
            .filter(|end| *end <= self.capacity())
            .ok_or_else(|| {
                let capacity = self.capacity();
                Error::new(ErrorKind::Invalid, format!("a request at {offset} ends past the disk of {capacity} bytes"))
            })
    }

    /// Calls `action` for the extents of `start..end`, in order; neighbours that continue each other are
    /// one.
    pub(crate) fn for_each_extent(
        &self,
        start: u64,
        end: u64,
        questions: &mut Questions,
        mut action: impl FnMut(&Flat) -> Result<()>,
    ) -> Result<()> {
        let mut pending: Option<Flat> = None;
        let mut push = |flat: Flat| {
            let flat = flat.head(end);
            if pending.as_mut().is_some_and(|current| current.merge(&flat)) {
                return Ok(());
            }
            pending.replace(flat).map_or(Ok(()), |complete| action(&complete))
        };
        let mut position = start;
        while position < end {
            if let Some(flat) = self.map.lookup(position) {
                position = flat.end();
                push(flat)?;
                continue;
            }
            for flat in self.resolve(position, end, questions)? {
                if position >= end {
                    break;
                }
                position = flat.end();
                push(flat)?;
            }
        }
        pending.map_or(Ok(()), |last| action(&last))
    }

    /// Asks the layers where `start..end` lives, as far as one lock reaches, and remembers the answer
    /// with whatever else they said.
    fn resolve(&self, start: u64, end: u64, questions: &mut Questions) -> Result<Vec<Flat>> {
        let lock = self.asking.get(self.map.stripe_of(start) % ASKING_LOCKS);
        let _asking = lock.map(|lock| lock.lock().unwrap_or_else(PoisonError::into_inner));
        // Another thread may have asked while this one waited.
        if let Some(flat) = self.map.lookup(start) {
            return Ok(vec![flat]);
        }
        let since = self.map.generation();
        let mut walk = self.chain.walk(start, end, self.capacity());
        let mut flats: Vec<Flat> = Vec::new();
        let mut before: Vec<Flat> = Vec::new();
        let budget = usize::try_from(MAX_EXTENTS).unwrap_or(usize::MAX);
        loop {
            let position = walk.position();
            // Looking ahead is a favour: it ends at the budget and at the first error.
            if flats.len() >= budget && position > start {
                break;
            }
            match walk.next(questions) {
                Ok(Some(flat)) => {
                    if flats.is_empty() {
                        before = walk.look_back(&flat);
                    }
                    if !flats.last_mut().is_some_and(|last| last.merge(&flat)) {
                        flats.push(flat);
                    }
                }
                Ok(None) => break,
                Err(error) if flats.is_empty() => return Err(error),
                Err(_) => break,
            }
        }
        if flats.is_empty() {
            return Err(Error::new(ErrorKind::Component, format!("no layer says where the bytes at {start} are")));
        }
        // What was asked for first: only so much of one answer is kept, and what lies before could be all of that.
        let first = flats.first().copied();
        if let (Some(found), Some(last)) = (flats.first_mut(), before.last()) {
            // The map has whole sectors: one that the question cut in two is whole again.
            let mut whole = last.tail(last.start.max(start / SECTOR_SIZE * SECTOR_SIZE));
            if whole.merge(found) {
                *found = whole;
            }
        }
        self.map.insert(&flats, since);
        self.map.insert(&before, since);
        if let (Some(found), Some(first)) = (flats.first_mut(), first) {
            *found = first;
        }
        Ok(flats)
    }

    /// The limit for a request.
    pub(crate) fn questions(&self, start: u64, end: u64) -> Questions {
        Questions::for_request(end.saturating_sub(start), self.chain.depth())
    }

    pub(crate) fn file(&self, id: FileId) -> Result<&Arc<ImageFile>> {
        self.chain
            .files
            .get(id)
            .ok_or_else(|| Error::new(ErrorKind::Component, "an extent names a file that is not known"))
    }

    /// The bytes of a packed unit, from the cache or from the layer.
    fn unit(&self, depth: u16, token: u64, length: u32) -> Result<Arc<[u8]>> {
        let key = (depth, token, length);
        if let Some(bytes) = self.units.get(key) {
            return Ok(bytes);
        }
        // Tokens are often offsets of clusters: mix the high bits in.
        let mixed = token.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let lock = usize::try_from(mixed).ok().and_then(|mixed| self.unpacking.get(mixed % UNPACK_LOCKS));
        let _unpacking = lock.map(|lock| lock.lock().unwrap_or_else(PoisonError::into_inner));
        if let Some(bytes) = self.units.get(key) {
            return Ok(bytes);
        }
        let bytes: Arc<[u8]> = self.chain.unpack(depth, token, u64::from(length))?.into();
        self.units.insert(key, Arc::clone(&bytes));
        Ok(bytes)
    }

    pub(crate) fn read_extent(&self, flat: &Flat, buffers: &mut Buffers<'_, '_>) -> Result<()> {
        match flat.target {
            Target::Data { file, offset, .. } => self.file(file)?.read(&buffers.take(flat.length), offset),
            Target::Zero | Target::Unallocated => {
                buffers.zero(flat.length);
                Ok(())
            }
            Target::Packed { token, skip, unit } => {
                let bytes = self.unit(flat.depth, token, unit)?;
                let part = usize::try_from(skip)
                    .ok()
                    .zip(usize::try_from(flat.length).ok())
                    .and_then(|(skip, length)| bytes.get(skip..skip.checked_add(length)?));
                let part =
                    part.ok_or_else(|| Error::new(ErrorKind::Component, "an extent goes past its packed unit"))?;
                buffers.copy_from(part);
                Ok(())
            }
        }
    }
}

impl BlockBackend for Disk {
    fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Acquire)
    }

    fn is_writable(&self) -> bool {
        self.writable
    }

    fn topology(&self) -> Topology {
        self.topology
    }

    fn read(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        let end = self.request_end(buffers, offset)?;
        // Where bytes live cannot change on a disk that is not written: no lock.
        let _in_flight = if self.writable { Some(self.share(offset, end)?) } else { None };
        let mut questions = self.questions(offset, end);
        let mut buffers = Buffers::new(buffers);
        self.for_each_extent(offset, end, &mut questions, |flat| self.read_extent(flat, &mut buffers))
    }

    fn write(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        self.refuse_read_only()?;
        let end = self.request_end(buffers, offset)?;
        self.write_range(&Source::new(buffers, offset), offset, end)
    }

    /// Data first, then the metadata that refers to it, then the space that nothing refers to any more.
    fn flush(&self) -> Result<()> {
        // Most of the work without the lock; what is written from here on is little.
        self.sync_files()?;
        if !self.allocates {
            return Ok(());
        }
        let space = self.lock_space();
        self.refuse_closed()?;
        self.publish(&space)
    }

    fn watch_unflushed(&self, watch: Option<UnflushedWatch>) {
        let _space = self.lock_space();
        *self.unflushed_watch.write().unwrap_or_else(PoisonError::into_inner) = watch;
        self.note_unflushed(self.unflushed.load(Ordering::Relaxed));
    }

    fn write_zeroes(&self, offset: u64, length: u64, may_unmap: bool) -> Result<()> {
        let end = self.change_end(offset, length)?;
        self.zero_range(offset, end, may_unmap)
    }

    fn discard(&self, offset: u64, length: u64) -> Result<()> {
        let end = self.change_end(offset, length)?;
        self.discard_range(offset, end)
    }

    fn lane(self: Arc<Self>) -> Result<Box<dyn Lane>> {
        Ok(Box::new(DiskLane::new(self)?))
    }
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk")
            .field("layers", &self.chain.infos().collect::<Vec<_>>())
            .field("capacity", &self.capacity())
            .field("writable", &self.writable)
            .finish_non_exhaustive()
    }
}

const _: () = assert!((MIN_PHYSICAL_BLOCK as u64).is_multiple_of(SECTOR_SIZE));
