//! The built-in guest on this machine's own KVM: what a guest sees of its disks.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use blockhouse_block::{BlockBackend, Error, ErrorKind, Lane, Pool, PoolLane, Result, Topology};
use blockhouse_vmm::{DiskConfig, DiskReport, DiskResult, Exit, ExitReason, Machine, MachineConfig, Payload};
use sha2::{Digest, Sha256};
use vm_memory::VolatileSlice;

use common::{Console, skip};

const SECTOR: u64 = 512;

/// A disk in memory that can refuse to read some sectors.
struct TestDisk {
    content: Vec<u8>,
    writable: bool,
    bad_sectors: Range<u64>,
    reads: AtomicUsize,
}

impl TestDisk {
    /// A disk of `sectors` sectors, all different and different for each `seed`.
    fn new(sectors: u64, seed: u64) -> Self {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let words = (0..sectors * SECTOR / 8).flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        });
        Self { content: words.collect(), writable: true, bad_sectors: 0..0, reads: AtomicUsize::new(0) }
    }

    fn sha256(&self) -> String {
        Sha256::digest(&self.content).iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// The built-in guest changes nothing; a disk of these tests that is asked to says no, and the digests
/// then tell.
fn refused() -> Error {
    Error::new(ErrorKind::Invalid, "the built-in guest does not write")
}

impl BlockBackend for TestDisk {
    fn capacity(&self) -> u64 {
        self.content.len() as u64
    }

    fn is_writable(&self) -> bool {
        self.writable
    }

    fn topology(&self) -> Topology {
        Topology { physical_block_size: 4096, optimal_io_size: 65536 }
    }

    fn read(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let len: u64 = buffers.iter().map(|buffer| buffer.len() as u64).sum();
        let sectors = offset / SECTOR..(offset + len).div_ceil(SECTOR);
        if sectors.start < self.bad_sectors.end && self.bad_sectors.start < sectors.end {
            return Err(Error::new(ErrorKind::Storage, "this sector is bad"));
        }
        let mut at = usize::try_from(offset).unwrap();
        for buffer in buffers {
            buffer.copy_from(&self.content[at..at + buffer.len()]);
            at += buffer.len();
        }
        Ok(())
    }

    fn write(&self, _: &[VolatileSlice<'_>], _: u64) -> Result<()> {
        Err(refused())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<()> {
        Err(refused())
    }

    fn discard(&self, _: u64, _: u64) -> Result<()> {
        Err(refused())
    }

    fn lane(self: Arc<Self>) -> Result<Box<dyn Lane>> {
        Ok(Box::new(PoolLane::new(self, Pool::new())?))
    }
}

/// What the guest printed.
fn text(console: &Console) -> String {
    String::from_utf8(console.bytes()).unwrap()
}

fn machine_config(disks: Vec<DiskConfig>, vcpus: u8, console: &Console) -> MachineConfig {
    MachineConfig {
        memory_bytes: 64 << 20,
        vcpus,
        payload: Payload::BuiltinGuest,
        disks,
        console: Box::new(console.clone()),
    }
}

/// A machine, or `None`, with the reason printed, where there is no KVM.
fn new_machine(config: MachineConfig) -> Option<Machine> {
    match Machine::new(config) {
        Ok(machine) => Some(machine),
        Err(error) if error.kind() == blockhouse_vmm::ErrorKind::Unavailable => {
            skip(&error);
            None
        }
        Err(error) => panic!("{error}: {:?}", std::error::Error::source(&error)),
    }
}

/// A machine with the built-in guest.
fn machine(disks: Vec<DiskConfig>, vcpus: u8, console: &Console) -> Option<Machine> {
    new_machine(machine_config(disks, vcpus, console))
}

fn run(disks: Vec<DiskConfig>) -> Option<(Exit, String)> {
    let console = Console::default();
    let exit = machine(disks, 1, &console)?.run().expect("the guest must end by itself");
    Some((exit, text(&console)))
}

fn config(disk: &Arc<TestDisk>, serial: &str) -> DiskConfig {
    DiskConfig::new(disk.clone(), serial)
}

#[test]
fn every_disk_is_read_whole_and_its_digest_is_right() {
    // Around the sizes at which the guest's requests end: 64 KiB parts, 128 KiB requests, 4 at once.
    let disks: Vec<_> = [1, 7, 127, 256, 257, 1024, 1025, 20_001]
        .into_iter()
        .zip(1..)
        .map(|(sectors, seed)| Arc::new(TestDisk::new(sectors, seed)))
        .collect();
    let configs = disks.iter().enumerate().map(|(i, disk)| config(disk, &format!("disk-{i}"))).collect();
    let Some((exit, console)) = run(configs) else { return };
    assert_eq!(exit.reason, ExitReason::Guest(0), "{console}");
    let expected: Vec<_> = disks
        .iter()
        .zip(0..)
        .map(|(disk, number)| DiskReport {
            disk: number,
            bytes: disk.content.len() as u64,
            read_only: false,
            serial: format!("disk-{number}"),
            result: DiskResult::Sha256(disk.sha256()),
        })
        .collect();
    assert_eq!(exit.disks, expected);
    for report in &expected {
        let DiskResult::Sha256(digest) = &report.result else { panic!("{report:?}") };
        let line =
            format!("disk {}: {} bytes sha256 {digest} serial disk-{}\n", report.disk, report.bytes, report.disk);
        assert!(console.contains(&line), "{line} is missing in {console}");
    }
}

#[test]
fn an_empty_disk_is_a_disk() {
    let disk = Arc::new(TestDisk::new(0, 1));
    let Some((exit, _)) = run(vec![config(&disk, "")]) else { return };
    assert_eq!(exit.disks[0].result, DiskResult::Sha256(disk.sha256()));
    assert_eq!(disk.reads.load(Ordering::Relaxed), 0);
}

#[test]
fn a_disk_that_fails_disturbs_no_other() {
    let good = Arc::new(TestDisk::new(5000, 1));
    let bad = Arc::new(TestDisk { bad_sectors: 3333..3400, ..TestDisk::new(5000, 2) });
    let also_good = Arc::new(TestDisk::new(300, 3));
    let Some((exit, console)) = run(vec![config(&good, "a"), config(&bad, "b"), config(&also_good, "c")]) else {
        return;
    };
    assert_eq!(exit.reason, ExitReason::Guest(1));
    let results: Vec<_> = exit.disks.into_iter().map(|disk| disk.result).collect();
    assert_eq!(
        results,
        [
            DiskResult::Sha256(good.sha256()),
            DiskResult::ReadError { sector: 3333 },
            DiskResult::Sha256(also_good.sha256()),
        ]
    );
    assert!(console.contains("disk 1: 2560000 bytes I/O error at sector 3333"), "{console}");
}

#[test]
fn read_only_is_visible_to_the_guest() {
    let disk = Arc::new(TestDisk { writable: false, ..TestDisk::new(100, 1) });
    let Some((exit, console)) = run(vec![config(&disk, "fixed")]) else { return };
    assert!(exit.disks[0].read_only);
    assert_eq!(exit.disks[0].result, DiskResult::Sha256(disk.sha256()));
    assert!(console.contains("read-only serial fixed"), "{console}");
}

#[test]
fn a_machine_without_disks_ends_at_once() {
    let Some((exit, console)) = run(Vec::new()) else { return };
    assert_eq!(exit, Exit { reason: ExitReason::Guest(0), disks: Vec::new() });
    assert_eq!(console, "");
}

/// A disk whose reads wait until the test lets them go.
struct Gate {
    disk: TestDisk,
    open: Mutex<bool>,
    changed: Condvar,
    arrived: mpsc::SyncSender<()>,
}

impl Gate {
    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.changed.notify_all();
    }
}

impl BlockBackend for Gate {
    fn capacity(&self) -> u64 {
        self.disk.capacity()
    }

    fn is_writable(&self) -> bool {
        true
    }

    fn topology(&self) -> Topology {
        self.disk.topology()
    }

    fn read(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        let _ = self.arrived.try_send(());
        let mut open = self.open.lock().unwrap();
        while !*open {
            open = self.changed.wait(open).unwrap();
        }
        drop(open);
        self.disk.read(buffers, offset)
    }

    fn write(&self, _: &[VolatileSlice<'_>], _: u64) -> Result<()> {
        Err(refused())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<()> {
        Err(refused())
    }

    fn discard(&self, _: u64, _: u64) -> Result<()> {
        Err(refused())
    }

    fn lane(self: Arc<Self>) -> Result<Box<dyn Lane>> {
        Ok(Box::new(PoolLane::new(self, Pool::new())?))
    }
}

#[test]
fn stopping_waits_for_the_request_in_flight() {
    let (arrived, wait) = mpsc::sync_channel(1);
    let gate =
        Arc::new(Gate { disk: TestDisk::new(5000, 1), open: Mutex::new(false), changed: Condvar::new(), arrived });
    let console = Console::default();
    // Three vCPUs that nobody wakes: they must stop, too.
    let Some(machine) = machine(vec![DiskConfig::new(gate.clone(), "gate")], 4, &console) else { return };
    let stop = machine.stop_handle();
    let runner = thread::spawn(move || machine.run().map(|exit| (exit, Instant::now())));
    wait.recv_timeout(Duration::from_secs(10)).expect("the guest must read its disk");
    stop.stop();
    thread::sleep(Duration::from_millis(50));
    assert!(!runner.is_finished(), "a request is in flight, its buffers are guest memory");
    let opened = Instant::now();
    gate.open();
    let (exit, ended) = runner.join().unwrap().unwrap();
    assert_eq!(exit, Exit { reason: ExitReason::Stopped, disks: Vec::new() });
    assert!(ended - opened < Duration::from_secs(5));
    stop.stop();
}

/// A disk with a bug.
struct Panics {
    /// In the thread of its queue, not in a request.
    at_once: bool,
}

impl BlockBackend for Panics {
    fn capacity(&self) -> u64 {
        1 << 20
    }

    fn is_writable(&self) -> bool {
        false
    }

    fn topology(&self) -> Topology {
        Topology { physical_block_size: 512, optimal_io_size: 512 }
    }

    fn read(&self, _: &[VolatileSlice<'_>], _: u64) -> Result<()> {
        panic!("this disk panics, as the test wants");
    }

    fn write(&self, _: &[VolatileSlice<'_>], _: u64) -> Result<()> {
        Err(refused())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<()> {
        Err(refused())
    }

    fn discard(&self, _: u64, _: u64) -> Result<()> {
        Err(refused())
    }

    fn lane(self: Arc<Self>) -> Result<Box<dyn Lane>> {
        assert!(!self.at_once, "this disk panics, as the test wants");
        Ok(Box::new(PoolLane::new(self, Pool::new())?))
    }
}

#[test]
fn a_worker_that_dies_costs_its_own_disk_only() {
    let good = Arc::new(TestDisk::new(300, 1));
    let panics = |at_once| DiskConfig::new(Arc::new(Panics { at_once }), "");
    let Some((exit, _)) = run(vec![panics(true), config(&good, ""), panics(false)]) else { return };
    assert_eq!(exit.reason, ExitReason::Guest(1));
    let results: Vec<_> = exit.disks.into_iter().map(|disk| disk.result).collect();
    assert_eq!(
        results,
        [
            DiskResult::Device("the device stopped working".to_owned()),
            DiskResult::Sha256(good.sha256()),
            DiskResult::ReadError { sector: 0 }
        ]
    );
}

#[test]
fn a_stop_before_the_start_is_not_forgotten() {
    let disk = Arc::new(TestDisk::new(200_000, 1));
    let console = Console::default();
    let Some(machine) = machine(vec![config(&disk, "")], 1, &console) else { return };
    machine.stop_handle().stop();
    assert_eq!(machine.run().unwrap().reason, ExitReason::Stopped);
}

#[test]
fn impossible_machines_are_refused_before_anything_starts() {
    let make = |memory_bytes, vcpus, disks| {
        let disk = Arc::new(TestDisk::new(1, 1));
        Machine::new(MachineConfig {
            memory_bytes,
            vcpus,
            payload: Payload::BuiltinGuest,
            disks: (0..disks).map(|_| config(&disk, "")).collect(),
            console: Box::new(io::sink()),
        })
    };
    for (memory, vcpus, disks) in [(64 << 20, 0, 1), (64 << 20, 65, 1), (64 << 20, 1, 17), (1 << 20, 1, 1)] {
        let error = make(memory, vcpus, disks).unwrap_err();
        assert_eq!(error.kind(), blockhouse_vmm::ErrorKind::Config, "{error}");
    }
}
