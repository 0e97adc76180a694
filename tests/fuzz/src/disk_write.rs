//! A disk that is written, on a layer whose writer lies.
//!
//! Whatever it says: a file that was granted read-only stays as it is, and of the others no byte changes that no legal
//! answer gave to the disk. While nobody lied, the disk shows what was written to it.

use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard};

use arbitrary::{Result, Unstructured};
use blockhouse_block::{
    Access, Allocation, BlockBackend, Disk, DiskOptions, EXTENT_BYTES, Engine, Extent, FileIndex, Freed, ImageFile,
    Layer, LayerInfo, LayerPacker, LayerWriter, Located, MAX_FILE_OFFSET, Placement, VolatileSlice,
};

use crate::lies::{FILE, FILES, Liar, Place, Script, byte_of, content_of, error, places};
use crate::say;

/// Where permissions are kept for: what is past it is not looked at.
const WATCHED: usize = 64 << 10;
/// The file that an honest writer allocates in.
const OWN: usize = 1;

/// What a cluster of the disk has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cluster {
    Unallocated,
    Zero,
    /// At this cluster of the file.
    Data(u64),
}

struct State {
    clusters: Vec<Cluster>,
    /// Clusters of the file: whether each is in use.
    used: Vec<bool>,
    /// Those that the next flush frees.
    dropped: Vec<u64>,
    /// Ticket, cluster of the disk, cluster of the file.
    tickets: Vec<(u64, u64, u64)>,
    next_ticket: u64,
    script: Script,
    /// What may be written, by file.
    permitted: Vec<Vec<bool>>,
    finished: bool,
}

/// The layer on top.
struct Top {
    info: LayerInfo,
    cluster: u64,
    files: Vec<Arc<ImageFile>>,
    /// In-place and nothing else: there is no writer.
    in_place: bool,
    state: Mutex<State>,
}

impl State {
    fn permit(&mut self, file: FileIndex, offset: u64, length: u64) {
        if let Some(permitted) = self.permitted.get_mut(file.0 as usize) {
            let clamp = |at: u64| usize::try_from(at).unwrap_or(WATCHED).min(WATCHED);
            permitted[clamp(offset)..clamp(offset.saturating_add(length))].fill(true);
        }
    }
}

impl Top {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn may_write(&self, file: FileIndex, offset: u64, length: u64) -> bool {
        let writable = self.files.get(file.0 as usize).is_some_and(|file| file.access() == Access::ReadWrite);
        writable && offset.checked_add(length).is_some_and(|end| end <= MAX_FILE_OFFSET)
    }

    fn length(&self, cluster: u64) -> u64 {
        self.cluster.min(self.info.virtual_size - cluster * self.cluster)
    }
}

impl Layer for Top {
    fn info(&self) -> &LayerInfo {
        &self.info
    }

    fn locate(&self, offset: u64, length: u64, max_extents: u32) -> blockhouse_block::Result<Located> {
        let end = offset.checked_add(length).expect("a question that does not wrap");
        assert!(length > 0 && end <= self.info.virtual_size, "asked for {offset}..{end}");
        let state = &mut *self.state();
        let first = offset / self.cluster;
        let mut answer = Located { start: first * self.cluster, extents: Vec::new() };
        for (number, cluster) in
            state.clusters.iter().enumerate().skip(first as usize).take(max_extents.min(64) as usize)
        {
            let placement = match *cluster {
                Cluster::Unallocated => Placement::Unallocated,
                Cluster::Zero => Placement::Zero,
                Cluster::Data(at) => {
                    Placement::Data { file: FileIndex(OWN as u32), offset: at * self.cluster, overwrite: true }
                }
            };
            answer.extents.push(Extent { length: self.length(number as u64), placement });
        }
        let twist = state.script.twist();
        if twist == 255 {
            return Err(error(state.script.number()));
        }
        if twist != 0 {
            let number = state.script.number();
            let which = (number % answer.extents.len().max(1) as u64) as usize;
            if let Some(extent) = answer.extents.get_mut(which) {
                match twist % 6 {
                    0 => extent.length = number,
                    1 => extent.placement = Placement::Zero,
                    2 => extent.placement = Placement::Unallocated,
                    3 => extent.placement = Placement::Packed { token: number },
                    _ => {
                        let offset = state.script.number();
                        let overwrite = twist % 6 == 4;
                        extent.placement = Placement::Data { file: FileIndex((number % 4) as u32), offset, overwrite };
                    }
                }
            }
        }
        let mut at = answer.start;
        for extent in &answer.extents {
            if let Placement::Data { file, offset, overwrite: true } = extent.placement
                && at.checked_add(extent.length).is_some_and(|end| end <= self.info.virtual_size)
                && self.may_write(file, offset, extent.length)
            {
                state.permit(file, offset, extent.length);
            }
            at = at.saturating_add(extent.length);
        }
        Ok(answer)
    }

    fn unpack(&self, _token: u64, length: u64) -> blockhouse_block::Result<Vec<u8>> {
        if length > 64 << 10 { Err(error(0)) } else { Ok(vec![9; length as usize]) }
    }

    fn file(&self, index: FileIndex) -> Option<Arc<ImageFile>> {
        self.files.get(index.0 as usize).cloned()
    }

    fn writer(&self) -> Option<&dyn LayerWriter> {
        if self.in_place { None } else { Some(self) }
    }

    fn packer(&self) -> Option<&dyn LayerPacker> {
        None
    }
}

impl LayerWriter for Top {
    fn prepare(&self, offset: u64, length: u64, max_allocations: u32) -> blockhouse_block::Result<Vec<Allocation>> {
        let end = offset.checked_add(length).expect("a range that does not wrap");
        assert!(length > 0 && end <= self.info.virtual_size, "space is wanted for {offset}..{end}");
        let state = &mut *self.state();
        let mut answer = Vec::new();
        for cluster in offset / self.cluster..end.div_ceil(self.cluster) {
            if answer.len() >= max_allocations.min(7) as usize {
                break;
            }
            if matches!(state.clusters[cluster as usize], Cluster::Data(_)) {
                continue;
            }
            let reused = state.used.iter().position(|used| !used);
            let at = reused.unwrap_or(state.used.len());
            if at == state.used.len() {
                state.used.push(true);
            }
            state.used[at] = true;
            let ticket = state.next_ticket;
            state.next_ticket += 1;
            state.tickets.push((ticket, cluster, at as u64));
            let start = at as u64 * self.cluster;
            answer.push(Allocation {
                start: cluster * self.cluster,
                length: self.length(cluster),
                file: FileIndex(OWN as u32),
                offset: start,
                // Past what the file holds at first there is nothing.
                zeroed: reused.is_none() && start >= FILE,
                ticket,
            });
        }
        let twist = state.script.twist();
        if twist == 255 {
            return Err(error(state.script.number()));
        }
        if twist != 0 {
            let which = (state.script.number() % answer.len().max(1) as u64) as usize;
            let number = state.script.number();
            match (twist % 9, answer.get_mut(which)) {
                (0, _) => answer.clear(),
                (1, Some(run)) => run.start = number,
                (2, Some(run)) => run.length = number,
                (3, Some(run)) => run.file = FileIndex((number % 4) as u32),
                (4, Some(run)) => run.offset = number,
                (5, Some(run)) => run.zeroed = !run.zeroed,
                (6, Some(run)) => run.ticket = number % 3,
                (7, Some(run)) => {
                    let run = *run;
                    answer.push(run);
                }
                _ => answer.reverse(),
            }
        }
        // What is not legal elsewhere in the answer makes all of it illegal; this is what may be written at most.
        for run in &answer {
            let inside = run.start.checked_add(run.length).is_some_and(|end| end <= self.info.virtual_size);
            if inside && self.may_write(run.file, run.offset, run.length) {
                state.permit(run.file, run.offset, run.length);
            }
        }
        Ok(answer)
    }

    fn commit(&self, tickets: &[u64]) -> blockhouse_block::Result<()> {
        let state = &mut *self.state();
        if state.script.twist() != 0 {
            return Err(error(state.script.number()));
        }
        for ticket in tickets {
            let Some(at) = state.tickets.iter().position(|(known, ..)| known == ticket) else {
                assert!(state.script.lied, "a ticket that was not given");
                continue;
            };
            let (_, cluster, place) = state.tickets.remove(at);
            state.clusters[cluster as usize] = Cluster::Data(place);
        }
        Ok(())
    }

    fn abandon(&self, tickets: &[u64]) -> blockhouse_block::Result<()> {
        let state = &mut *self.state();
        for ticket in tickets {
            if let Some(at) = state.tickets.iter().position(|(known, ..)| known == ticket) {
                let (_, _, place) = state.tickets.remove(at);
                state.used[place as usize] = false;
            }
        }
        Ok(())
    }

    fn zero(&self, offset: u64, length: u64, keep: bool) -> blockhouse_block::Result<()> {
        let end = offset.checked_add(length).expect("a range that does not wrap");
        let whole = offset.is_multiple_of(self.cluster)
            && (end.is_multiple_of(self.cluster) || end == self.info.virtual_size)
            && length > 0
            && end <= self.info.virtual_size;
        assert!(whole, "{offset}..{end} are not whole clusters");
        let state = &mut *self.state();
        if keep {
            return Err(error(3));
        }
        if state.script.twist() != 0 {
            return Err(error(state.script.number()));
        }
        for cluster in offset / self.cluster..end.div_ceil(self.cluster) {
            if let Cluster::Data(place) = state.clusters[cluster as usize] {
                state.dropped.push(place);
            }
            state.clusters[cluster as usize] = Cluster::Zero;
        }
        Ok(())
    }

    fn discard(&self, offset: u64, length: u64) -> blockhouse_block::Result<()> {
        self.zero(offset, length, false)
    }

    fn flush(&self) -> blockhouse_block::Result<Vec<Freed>> {
        let state = &mut *self.state();
        let mut answer = Vec::new();
        for place in std::mem::take(&mut state.dropped) {
            state.used[place as usize] = false;
            answer.push(Freed { file: FileIndex(OWN as u32), offset: place * self.cluster, length: self.cluster });
        }
        let twist = state.script.twist();
        if twist == 255 {
            return Err(error(state.script.number()));
        }
        if twist != 0 {
            let file = FileIndex((state.script.number() % 4) as u32);
            answer.push(Freed { file, offset: state.script.number(), length: state.script.number() });
        }
        let legal = answer.iter().all(|freed| self.may_write(freed.file, freed.offset, freed.length));
        if legal {
            answer.iter().for_each(|freed| state.permit(freed.file, freed.offset, freed.length));
        }
        Ok(answer)
    }

    fn finish(&self) -> blockhouse_block::Result<()> {
        let state = &mut *self.state();
        assert!(!state.finished, "finished twice");
        assert!(state.script.lied || state.tickets.is_empty(), "space is still reserved");
        state.finished = true;
        Ok(())
    }
}

pub(crate) fn run(data: &[u8]) {
    let _input_ends = write(&mut Unstructured::new(data));
}

/// A disk, its layers and its files.
pub(crate) struct Bench {
    pub(crate) disk: Arc<Disk>,
    /// What it shows, as long as nobody lied.
    pub(crate) model: Vec<u8>,
    /// There is no writer: some things cannot be done.
    in_place: bool,
    top: Arc<Top>,
    below: Option<Arc<Liar>>,
    places: Vec<Place>,
}

impl Bench {
    pub(crate) fn lied(&self) -> bool {
        self.top.state().script.lied || self.below.as_ref().is_some_and(|base| base.script().lied)
    }

    fn is_closed(&self) -> bool {
        self.top.state().finished
    }

    /// Whether a request may end with an error.
    pub(crate) fn may_fail(&self) -> bool {
        self.lied() || self.is_closed() || self.in_place
    }

    /// Ends the use of the disk, and looks at the files.
    pub(crate) fn end(self) {
        drop(self.disk);
        check_files(&self.places, &self.top.state());
    }
}

pub(crate) fn bench(u: &mut Unstructured<'_>, engine: Engine) -> Result<Bench> {
    let places = places();
    let cluster: u64 = *u.choose(&[512, 1024, 4096, 8192])?;
    let virtual_size: u64 = 512 * u.int_in_range(1..=64)?;
    let in_place = u.ratio(1, 6)?;
    let count = virtual_size.div_ceil(cluster);
    let clusters = (0..count).map(|at| if in_place { Cluster::Data(at) } else { Cluster::Unallocated }).collect();
    let state = State {
        clusters,
        used: vec![in_place; if in_place { count as usize } else { 0 }],
        dropped: Vec::new(),
        tickets: Vec::new(),
        next_ticket: 0,
        script: Script::new(u)?,
        permitted: vec![vec![false; WATCHED]; FILES],
        finished: false,
    };
    let files: Vec<_> = places.iter().map(|place| Arc::clone(&place.image)).collect();
    let top = Arc::new(Top {
        info: LayerInfo {
            name: "/images/top".into(),
            format: "lies".into(),
            virtual_size,
            cluster_size: cluster as u32,
            overwritable: in_place,
        },
        cluster,
        files: files.clone(),
        in_place,
        state: Mutex::new(state),
    });
    let mut layers: Vec<Arc<dyn Layer>> = vec![Arc::clone(&top) as _];
    let mut model = vec![0; virtual_size as usize];
    let mut below = None;
    if !in_place && u.arbitrary()? {
        // A base that is the file that was granted read-only, and may claim to be written as well.
        let length = 512 * u.int_in_range(1..=32)?;
        let offset = u.int_in_range(0..=2000)?;
        let placement = Placement::Data { file: FileIndex(0), offset, overwrite: false };
        let base = Arc::new(Liar {
            info: LayerInfo {
                name: "/images/base".into(),
                format: "lies".into(),
                virtual_size: length,
                cluster_size: 0,
                overwritable: u.arbitrary()?,
            },
            plan: vec![Extent { length, placement }],
            per_answer: 4,
            files,
            script: Mutex::new(Script::new(u)?),
            recovers: false,
        });
        for (at, byte) in model.iter_mut().enumerate().take(length as usize) {
            *byte = byte_of(0, offset + at as u64);
        }
        layers.push(Arc::clone(&base) as _);
        below = Some(base);
    }
    if in_place {
        for (at, byte) in model.iter_mut().enumerate() {
            *byte = byte_of(OWN, at as u64);
        }
    }
    let options = DiskOptions {
        writable: true,
        engine,
        extent_map_bytes: u.int_in_range(0..=16)? * EXTENT_BYTES,
        allocate_ahead_bytes: *u.choose(&[0, 4096, 32 << 10])?,
        ..DiskOptions::default()
    };
    let disk = Arc::new(Disk::new(layers, options).expect("possible sizes"));
    Ok(Bench { disk, model, in_place, top, below, places })
}

fn write(u: &mut Unstructured<'_>) -> Result<()> {
    let mut bench = bench(u, Engine::default())?;
    let virtual_size = bench.disk.capacity();
    for _ in 0..24 {
        if u.is_empty() {
            break;
        }
        let start: u64 = 512 * u.int_in_range(0..=virtual_size / 512)?;
        let length = (512 * u.int_in_range(0..=24u64)?).min(virtual_size - start);
        let range = start as usize..(start + length) as usize;
        let what = u.int_in_range(0..=9u8)?;
        let result = match what {
            0..=4 => {
                let value = u.arbitrary()?;
                let mut bytes = vec![value; length as usize];
                let pieces = u.int_in_range(1..=5000)?;
                let buffers: Vec<_> = bytes.chunks_mut(pieces).map(VolatileSlice::from).collect();
                bench.model[range.clone()].fill(value);
                bench.disk.write(&buffers, start)
            }
            5 => {
                let mut bytes = vec![0xee; length as usize];
                let result = bench.disk.read(&[VolatileSlice::from(&mut bytes[..])], start);
                if result.is_ok() && !bench.lied() {
                    assert!(bytes == bench.model[range.clone()], "{length} bytes at {start} differ");
                }
                result
            }
            6 => {
                bench.model[range.clone()].fill(0);
                bench.disk.write_zeroes(start, length, u.arbitrary()?)
            }
            7 => {
                let result = bench.disk.discard(start, length);
                let mut bytes = vec![0xee; length as usize];
                if result.is_ok()
                    && bench.disk.read(&[VolatileSlice::from(&mut bytes[..])], start).is_ok()
                    && !bench.lied()
                {
                    for (byte, before) in bytes.iter().zip(&mut bench.model[range.clone()]) {
                        assert!(*byte == 0 || byte == before, "discarded, and now it reads as something else");
                        *before = *byte;
                    }
                }
                result
            }
            8 => bench.disk.flush(),
            _ if u.ratio(1, 4)? => {
                let result = bench.disk.close();
                assert!(bench.disk.close().is_err(), "closed twice");
                result
            }
            _ => Ok(()),
        };
        say!("{what}: {length} bytes at {start}: {result:?}");
        if let Err(error) = result {
            assert!(bench.may_fail(), "an honest layer, and: {error}");
            if bench.is_closed() || bench.in_place {
                break;
            }
        }
        let stats = bench.disk.map_stats();
        assert!(stats.extents <= stats.max_extents, "{stats:?}");
    }
    bench.end();
    Ok(())
}

fn check_files(places: &[Place], state: &State) {
    for (number, (place, permitted)) in places.iter().zip(&state.permitted).enumerate() {
        let before = content_of(number);
        let mut bytes = vec![0; WATCHED];
        let length = place.file.read_at(&mut bytes, 0).expect("a file in memory");
        if number == 0 {
            assert!(bytes[..length] == before, "the file that was granted read-only was written");
        }
        let mut before = before;
        before.resize(WATCHED, 0);
        for (start, (bytes, before)) in (0..).step_by(256).zip(bytes.chunks(256).zip(before.chunks(256))) {
            if bytes == before {
                continue;
            }
            for (at, (byte, before)) in (start..).zip(bytes.iter().zip(before)) {
                assert!(byte == before || permitted[at], "byte {at} of file {number} was written, unasked");
            }
        }
    }
}
