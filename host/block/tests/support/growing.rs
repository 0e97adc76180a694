//! A layer that grows: a native writer with its allocator in memory and its bytes in a temporary file.
//!
//! It reuses space as eagerly as the contract allows, the last freed first, and fills what it hands out with
//! rubbish, so that a byte which the disk forgot to write, or wrote to a place that it did not own any more, is
//! seen. Some of the space that it reuses becomes a *table*, as L2 tables do: a known pattern that nobody
//! but the layer may touch, checked at every call.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use blockhouse_block::{
    Access, Allocation, Error, ErrorKind, Extent, FileIndex, Freed, ImageFile, Layer, LayerInfo, LayerPacker,
    LayerWriter, Located, Placement, Result,
};

pub const CLUSTER: u64 = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guest {
    Unallocated,
    Zero,
    /// In a host cluster.
    Data(u64),
    Packed(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Host {
    Free,
    Reserved,
    Data,
    /// Unmapped; free after the next flush.
    Unmapped,
    Table,
}

struct State {
    guest: Vec<Guest>,
    host: Vec<Host>,
    free: Vec<u64>,
    tickets: HashMap<u64, (u64, u64)>,
    next_ticket: u64,
    calls: u64,
    finished: bool,
}

/// What a test does to an answer of `prepare`.
pub type Twist = Box<dyn Fn(&mut Vec<Allocation>) + Send + Sync>;

pub struct Growing {
    info: LayerInfo,
    file: Arc<ImageFile>,
    /// A file that may only be read.
    other: Arc<ImageFile>,
    outside: File,
    packed: HashMap<u64, Vec<u8>>,
    state: Mutex<State>,
    /// Whether whole clusters can be zeroed and discarded.
    pub unmaps: bool,
    /// Runs in one answer at most.
    pub per_answer: usize,
    /// Changes what `prepare` answers.
    pub twist: Option<Twist>,
    /// Called at the end of `flush`, when space is free already but the disk does not know.
    pub after_flush: Option<Box<dyn Fn() + Send + Sync>>,
    /// Called at the start of `locate`.
    pub before_locate: Option<Box<dyn Fn() + Send + Sync>>,
    pub fail_commit: AtomicBool,
}

fn table(host: u64) -> Vec<u8> {
    super::pattern(CLUSTER as usize, 1_000_003 + host)
}

impl Growing {
    /// A layer of `size` bytes; `packed` are clusters that are packed at first.
    pub fn new(size: u64, packed: HashMap<u64, Vec<u8>>) -> Self {
        let outside = tempfile::tempfile().unwrap();
        outside.write_all_at(&table(0), 0).unwrap();
        let file = ImageFile::new(outside.try_clone().unwrap(), Access::ReadWrite, "/images/growing").unwrap();
        let other = ImageFile::new(tempfile::tempfile().unwrap(), Access::ReadOnly, "/images/other").unwrap();
        let mut guest = vec![Guest::Unallocated; size.div_ceil(CLUSTER) as usize];
        packed.keys().for_each(|cluster| guest[*cluster as usize] = Guest::Packed(*cluster));
        Self {
            info: LayerInfo {
                name: "/images/growing".into(),
                format: "growing".into(),
                virtual_size: size,
                cluster_size: CLUSTER as u32,
                overwritable: false,
            },
            file: Arc::new(file),
            other: Arc::new(other),
            outside,
            packed,
            state: Mutex::new(State {
                guest,
                host: vec![Host::Table],
                free: Vec::new(),
                tickets: HashMap::new(),
                next_ticket: 1,
                calls: 0,
                finished: false,
            }),
            unmaps: true,
            per_answer: usize::MAX,
            twist: None,
            after_flush: None,
            before_locate: None,
            fail_commit: AtomicBool::new(false),
        }
    }

    /// Space that was reserved and neither published nor given back.
    pub fn reserved(&self) -> usize {
        self.state.lock().unwrap().tickets.len()
    }

    /// How often it was asked to change something.
    pub fn calls(&self) -> u64 {
        self.state.lock().unwrap().calls
    }

    pub fn is_finished(&self) -> bool {
        self.state.lock().unwrap().finished
    }

    /// All bytes of the file.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.outside.metadata().unwrap().len() as usize];
        self.outside.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    /// Where the last host cluster that holds data ends in the file.
    pub fn allocated_end(&self) -> u64 {
        let state = self.state.lock().unwrap();
        state.host.iter().rposition(|used| *used == Host::Data).map_or(0, |host| (host as u64 + 1) * CLUSTER)
    }

    /// Blocks of 512 bytes that the file takes.
    pub fn blocks(&self) -> u64 {
        std::os::unix::fs::MetadataExt::blocks(&self.outside.metadata().unwrap())
    }

    /// Nobody touched a table.
    pub fn check_tables(&self) {
        let state = self.state.lock().unwrap();
        self.check_tables_of(&state);
    }

    fn check_tables_of(&self, state: &State) {
        for (host, used) in state.host.iter().enumerate().filter(|(_, used)| **used == Host::Table) {
            let mut found = vec![0; CLUSTER as usize];
            self.outside.read_exact_at(&mut found, host as u64 * CLUSTER).unwrap();
            assert!(found == table(host as u64), "the table at host cluster {host} ({used:?}) was overwritten");
        }
    }

    /// The start of a call that changes something: every eighth takes a free cluster for a table, and gives
    /// one back.
    fn enter(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock().unwrap();
        assert!(!state.finished, "a call after finish");
        self.check_tables_of(&state);
        state.calls += 1;
        if state.calls.is_multiple_of(8) {
            let old = state.host.iter().skip(1).position(|used| *used == Host::Table).map(|at| at as u64 + 1);
            if let Some(host) = state.free.pop() {
                state.host[host as usize] = Host::Table;
                self.outside.write_all_at(&table(host), host * CLUSTER).unwrap();
            }
            if let Some(old) = old {
                state.host[old as usize] = Host::Free;
                state.free.push(old);
            }
        }
        state
    }

    fn clusters(&self, offset: u64, length: u64) -> std::ops::Range<u64> {
        assert!(length > 0 && offset + length <= self.info.virtual_size, "asked outside of the layer");
        offset / CLUSTER..(offset + length).div_ceil(CLUSTER)
    }

    fn whole_clusters(&self, offset: u64, length: u64) -> std::ops::Range<u64> {
        let end = offset + length;
        assert!(offset.is_multiple_of(CLUSTER), "{offset} is not the start of a cluster");
        assert!(end.is_multiple_of(CLUSTER) || end == self.info.virtual_size, "{end} is not the end of a cluster");
        self.clusters(offset, length)
    }

    fn unmap(&self, offset: u64, length: u64) -> Result<()> {
        let clusters = self.whole_clusters(offset, length);
        if !self.unmaps {
            return Err(Error::new(ErrorKind::Unsupported, "clusters cannot be unmapped"));
        }
        let mut state = self.enter();
        for cluster in clusters {
            if let Guest::Data(host) = state.guest[cluster as usize] {
                assert_eq!(state.host[host as usize], Host::Data);
                state.host[host as usize] = Host::Unmapped;
            }
            state.guest[cluster as usize] = Guest::Zero;
        }
        Ok(())
    }
}

impl Layer for Growing {
    fn info(&self) -> &LayerInfo {
        &self.info
    }
    fn locate(&self, offset: u64, length: u64, max_extents: u32) -> Result<Located> {
        if let Some(before) = &self.before_locate {
            before();
        }
        let state = self.state.lock().unwrap();
        assert!(!state.finished, "a call after finish");
        let clusters = self.clusters(offset, length);
        let start = clusters.start * CLUSTER;
        let extents = clusters.take(max_extents as usize).map(|cluster| {
            let placement = match state.guest[cluster as usize] {
                Guest::Unallocated => Placement::Unallocated,
                Guest::Zero => Placement::Zero,
                Guest::Data(host) => Placement::Data { file: FileIndex(0), offset: host * CLUSTER, overwrite: true },
                Guest::Packed(token) => Placement::Packed { token },
            };
            Extent { length: CLUSTER.min(self.info.virtual_size - cluster * CLUSTER), placement }
        });
        Ok(Located { start, extents: extents.collect() })
    }
    fn unpack(&self, token: u64, _length: u64) -> Result<Vec<u8>> {
        Ok(self.packed[&token].clone())
    }
    fn file(&self, index: FileIndex) -> Option<Arc<ImageFile>> {
        match index.0 {
            0 => Some(self.file.clone()),
            1 => Some(self.other.clone()),
            _ => None,
        }
    }
    fn writer(&self) -> Option<&dyn LayerWriter> {
        Some(self)
    }

    fn packer(&self) -> Option<&dyn LayerPacker> {
        None
    }
}

impl LayerWriter for Growing {
    fn prepare(&self, offset: u64, length: u64, max_allocations: u32) -> Result<Vec<Allocation>> {
        let mut state = self.enter();
        let mut answer = Vec::new();
        for cluster in self.clusters(offset, length) {
            if answer.len() >= self.per_answer.min(max_allocations as usize) {
                break;
            }
            if matches!(state.guest[cluster as usize], Guest::Data(_)) {
                continue;
            }
            let reused = state.free.pop();
            let host = reused.unwrap_or_else(|| {
                state.host.push(Host::Free);
                state.host.len() as u64 - 1
            });
            assert_eq!(state.host[host as usize], Host::Free);
            if reused.is_some() {
                self.outside.write_all_at(&[0xee; CLUSTER as usize], host * CLUSTER).unwrap();
            }
            state.host[host as usize] = Host::Reserved;
            let ticket = state.next_ticket;
            state.next_ticket += 1;
            state.tickets.insert(ticket, (cluster, host));
            answer.push(Allocation {
                start: cluster * CLUSTER,
                length: CLUSTER.min(self.info.virtual_size - cluster * CLUSTER),
                file: FileIndex(0),
                offset: host * CLUSTER,
                zeroed: reused.is_none(),
                ticket,
            });
        }
        if let Some(twist) = &self.twist {
            twist(&mut answer);
        }
        Ok(answer)
    }
    fn commit(&self, tickets: &[u64]) -> Result<()> {
        let mut state = self.enter();
        if self.fail_commit.load(Ordering::SeqCst) {
            return Err(Error::new(ErrorKind::Storage, "the table could not be read"));
        }
        for ticket in tickets {
            let (cluster, host) = state.tickets.remove(ticket).expect("a ticket is used once");
            assert!(
                !matches!(state.guest[cluster as usize], Guest::Data(_)),
                "cluster {cluster} was given space twice"
            );
            state.host[host as usize] = Host::Data;
            state.guest[cluster as usize] = Guest::Data(host);
        }
        Ok(())
    }
    fn abandon(&self, tickets: &[u64]) -> Result<()> {
        let mut state = self.enter();
        for ticket in tickets {
            let (_, host) = state.tickets.remove(ticket).expect("a ticket is used once");
            state.host[host as usize] = Host::Free;
            state.free.push(host);
        }
        Ok(())
    }
    fn zero(&self, offset: u64, length: u64, keep: bool) -> Result<()> {
        if keep {
            self.whole_clusters(offset, length);
            return Err(Error::new(ErrorKind::Unsupported, "zeroes cannot keep their space"));
        }
        self.unmap(offset, length)
    }
    fn discard(&self, offset: u64, length: u64) -> Result<()> {
        self.unmap(offset, length)
    }
    fn flush(&self) -> Result<Vec<Freed>> {
        let mut state = self.enter();
        let mut freed = Vec::new();
        for host in 0..state.host.len() {
            if state.host[host] == Host::Unmapped {
                state.host[host] = Host::Free;
                state.free.push(host as u64);
                freed.push(Freed { file: FileIndex(0), offset: host as u64 * CLUSTER, length: CLUSTER });
            }
        }
        drop(state);
        if let Some(after) = &self.after_flush {
            after();
        }
        Ok(freed)
    }
    fn finish(&self) -> Result<()> {
        let mut state = self.enter();
        assert!(state.tickets.is_empty() && !state.host.contains(&Host::Unmapped), "finish before flush");
        state.finished = true;
        Ok(())
    }
}
