//! Guests that break the rules: one row for each, all held to the same.
//!
//! Whatever a guest puts into its queue, the device neither panics nor waits for ever; it touches neither the
//! disk nor guest memory outside of the used ring and the status byte, and the next good request works (or,
//! where the queue itself makes no sense, it is stopped as a whole).

use std::io::Write as _;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::*;

/// What the guest gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// This in the status byte.
    Status(u8),
    /// The chain comes back and no status is written: there is no place for one.
    Nothing,
    /// The queue is not served any more.
    Stopped,
}
use Answer::{Nothing, Status, Stopped};

const TABLE_2: u64 = DATA + 0x10000;
const IN: u32 = VIRTIO_BLK_T_IN;
const OUT: u32 = VIRTIO_BLK_T_OUT;

/// A chain in the usual three parts.
fn usual(driver: &mut Driver, kind: u32, sector: u64, data: Desc) {
    driver.header(kind, sector);
    driver.submit(&[readable(HEADER, 16), data, writable(STATUS, 1)]);
}

/// A chain of any descriptors, with the header of a read.
fn chain(driver: &mut Driver, descriptors: &[Desc]) {
    driver.header(IN, 0);
    driver.submit(descriptors);
}

/// A chain whose first descriptor names a table.
fn indirect(driver: &mut Driver, addr: u64, len: u32, table: &[Desc]) {
    driver.header(IN, 0);
    driver.table(TABLE_2, 0, table);
    driver.raw(&[Desc { addr, len, flags: INDIRECT, next: 0 }]);
    driver.offer(0);
}

/// A list of ranges.
fn list(driver: &mut Driver, kind: u32, list: &[(u64, u32, u32)]) {
    let bytes = ranges(list);
    driver.put(DATA, &bytes);
    usual(driver, kind, 0, readable(DATA, u32::try_from(bytes.len()).unwrap()));
}

/// The guest's part of an attack.
type Attack = fn(&mut Driver);

fn linked(next: u16, flags: u32) -> [Desc; 2] {
    [Desc { addr: HEADER, len: 16, flags: NEXT, next: 1 }, Desc { addr: STATUS, len: 1, flags: NEXT | flags, next }]
}

const GOOD_TABLE: [Desc; 3] = [
    Desc { addr: HEADER, len: 16, flags: NEXT, next: 1 },
    Desc { addr: DATA, len: 512, flags: NEXT | WRITE, next: 2 },
    Desc { addr: STATUS, len: 1, flags: WRITE, next: 0 },
];

const DISCARD_KIND: u32 = VIRTIO_BLK_T_DISCARD;
const ZEROES_KIND: u32 = VIRTIO_BLK_T_WRITE_ZEROES;

#[rustfmt::skip]
const ATTACKS: &[(&str, Answer, Attack)] = &[
    ("a descriptor that follows itself", Nothing, |d| {
        d.header(IN, 0);
        d.raw(&[Desc { addr: HEADER, len: 16, flags: NEXT, next: 0 }]);
        d.offer(0);
    }),
    ("a loop of readable descriptors", Nothing, |d| { d.header(IN, 0); d.raw(&linked(0, 0)); d.offer(0); }),
    ("a loop of writable descriptors", Nothing, |d| { d.header(IN, 0); d.raw(&linked(0, WRITE)); d.offer(0); }),
    ("a next index right past the table", Nothing, |d| { d.header(IN, 0); d.raw(&linked(SIZE, WRITE)); d.offer(0); }),
    ("the largest next index", Nothing, |d| { d.header(IN, 0); d.raw(&linked(u16::MAX, WRITE)); d.offer(0); }),
    ("a table inside a table", Nothing, |d| {
        let inner = Desc { addr: TABLE_2 + 0x1000, len: 32, flags: INDIRECT, next: 0 };
        indirect(d, TABLE_2, 32, &[GOOD_TABLE[0], inner]);
    }),
    ("a table that names itself", Nothing, |d| {
        indirect(d, TABLE_2, 16, &[Desc { addr: TABLE_2, len: 16, flags: INDIRECT, next: 0 }]);
    }),
    ("a table with half a descriptor", Nothing, |d| indirect(d, TABLE_2, 47, &GOOD_TABLE)),
    ("an empty table", Nothing, |d| indirect(d, TABLE_2, 0, &GOOD_TABLE)),
    ("a table outside of memory", Nothing, |d| indirect(d, END, 48, &GOOD_TABLE)),
    ("a table across the end of memory", Nothing, |d| indirect(d, END - 16, 48, &GOOD_TABLE)),
    ("a table at the top of the address space", Nothing, |d| indirect(d, u64::MAX - 8, 48, &GOOD_TABLE)),
    ("a table of a million descriptors", Nothing, |d| indirect(d, TABLE_2, 16 << 20, &GOOD_TABLE)),
    ("a loop inside a table", Nothing, |d| {
        indirect(d, TABLE_2, 48, &[GOOD_TABLE[0], Desc { next: 0, ..GOOD_TABLE[1] }, GOOD_TABLE[2]]);
    }),
    ("an index past the end of its table", Nothing, |d| {
        indirect(d, TABLE_2, 48, &[GOOD_TABLE[0], Desc { next: 3, ..GOOD_TABLE[1] }, GOOD_TABLE[2]]);
    }),
    ("more than 4 GiB in one chain", Nothing, |d| {
        let huge = writable(DATA, u32::MAX);
        chain(d, &[readable(HEADER, 16), huge, huge, writable(STATUS, 1)]);
    }),
    ("data outside of memory", Status(IOERR), |d| usual(d, IN, 0, writable(END, 512))),
    ("data across the end of memory", Status(IOERR), |d| usual(d, IN, 0, writable(END - 511, 512))),
    ("data that wraps around the address space", Status(IOERR), |d| usual(d, IN, 0, writable(u64::MAX - 510, 512))),
    ("data at the last address", Status(IOERR), |d| usual(d, IN, 0, writable(u64::MAX, 512))),
    ("data longer than memory", Status(IOERR), |d| usual(d, IN, 0, writable(DATA, 0xf000_0000))),
    ("data to write outside of memory", Status(IOERR), |d| usual(d, OUT, 0, readable(END, 512))),
    ("a header outside of memory", Status(IOERR), |d| {
        chain(d, &[readable(END, 16), writable(DATA, 512), writable(STATUS, 1)]);
    }),
    ("a header across the end of memory", Status(IOERR), |d| {
        chain(d, &[readable(END - 8, 16), writable(DATA, 512), writable(STATUS, 1)]);
    }),
    ("a status outside of memory", Nothing, |d| {
        chain(d, &[readable(HEADER, 16), writable(DATA, 512), writable(END, 1)]);
    }),
    ("a status at the last address", Nothing, |d| {
        chain(d, &[readable(HEADER, 16), writable(DATA, 512), writable(u64::MAX, 1)]);
    }),
    ("a status of no bytes", Nothing, |d| chain(d, &[readable(HEADER, 16), writable(STATUS, 0)])),
    ("no status", Nothing, |d| chain(d, &[readable(HEADER, 16)])),
    ("nothing but a status", Status(IOERR), |d| chain(d, &[writable(STATUS, 1)])),
    ("a header of 15 bytes", Status(IOERR), |d| {
        chain(d, &[readable(HEADER, 15), writable(DATA, 512), writable(STATUS, 1)]);
    }),
    ("a header that the device is to write", Status(IOERR), |d| {
        chain(d, &[writable(HEADER, 16), writable(DATA, 512), writable(STATUS, 1)]);
    }),
    ("readable after writable", Status(IOERR), |d| {
        d.header(OUT, 0);
        d.submit(&[writable(STATUS, 1), readable(HEADER, 16), readable(DATA, 512)]);
    }),
    ("a read right past the end", Status(IOERR), |d| usual(d, IN, 64, writable(DATA, 512))),
    ("a read across the end", Status(IOERR), |d| usual(d, IN, 63, writable(DATA, 1024))),
    ("a read of the last sector there is", Status(IOERR), |d| usual(d, IN, u64::MAX, writable(DATA, 512))),
    ("a read whose bytes wrap", Status(IOERR), |d| usual(d, IN, 1 << 55, writable(DATA, 512))),
    ("a read whose end wraps", Status(IOERR), |d| usual(d, IN, u64::MAX / 512, writable(DATA, 512))),
    ("a read of half a sector", Status(IOERR), |d| usual(d, IN, 0, writable(DATA, 511))),
    ("a write right past the end", Status(IOERR), |d| usual(d, OUT, 64, readable(DATA, 512))),
    ("a write across the end", Status(IOERR), |d| usual(d, OUT, 63, readable(DATA, 1024))),
    ("a write whose bytes wrap", Status(IOERR), |d| usual(d, OUT, u64::MAX / 512 + 1, readable(DATA, 512))),
    ("a write of half a sector", Status(IOERR), |d| usual(d, OUT, 0, readable(DATA, 100))),
    ("a discard with an unknown flag", Status(UNSUPP), |d| list(d, DISCARD_KIND, &[(0, 1, 2)])),
    ("a discard with all flags", Status(UNSUPP), |d| list(d, DISCARD_KIND, &[(0, 1, u32::MAX)])),
    ("a discard past the end", Status(IOERR), |d| list(d, DISCARD_KIND, &[(64, 1, 0)])),
    ("a discard that wraps", Status(IOERR), |d| list(d, DISCARD_KIND, &[(u64::MAX, 2, 0)])),
    ("a discard of everything there is", Status(IOERR), |d| list(d, DISCARD_KIND, &[(0, u32::MAX, 0)])),
    ("a good discard and a bad one", Status(IOERR), |d| list(d, DISCARD_KIND, &[(0, 1, 0), (63, 2, 0)])),
    ("a thousand discards at a time", Status(IOERR), |d| list(d, DISCARD_KIND, &[(0, 1, 0); 1000])),
    ("half a discard", Status(IOERR), |d| usual(d, DISCARD_KIND, 0, readable(DATA, 15))),
    ("a discard of nothing", Status(IOERR), |d| chain_of(d, DISCARD_KIND)),
    ("zeroes with an unknown flag", Status(UNSUPP), |d| list(d, ZEROES_KIND, &[(0, 1, 4)])),
    ("zeroes past the end", Status(IOERR), |d| list(d, ZEROES_KIND, &[(63, 2, 0)])),
    ("zeroes that wrap", Status(IOERR), |d| list(d, ZEROES_KIND, &[(1 << 55, 1, 1)])),
    ("half a list of zeroes", Status(IOERR), |d| usual(d, ZEROES_KIND, 0, readable(DATA, 17))),
    ("a request of an unknown type", Status(UNSUPP), |d| usual(d, 0xdead_beef, 0, writable(DATA, 512))),
    ("a zone command", Status(UNSUPP), |d| usual(d, 24, 0, writable(DATA, 512))),
    ("an erase that was not offered", Status(UNSUPP), |d| usual(d, 14, 0, readable(DATA, 16))),
    ("a head right past the table", Stopped, |d| d.offer(SIZE)),
    ("the largest head", Stopped, |d| d.offer(u16::MAX)),
    ("an available index that jumps", Stopped, |d| d.set_avail_idx(SIZE + 1)),
    ("an available index that runs backwards", Stopped, |d| d.set_avail_idx(u16::MAX)),
];

fn chain_of(driver: &mut Driver, kind: u32) {
    driver.header(kind, 0);
    driver.submit(&[readable(HEADER, 16), writable(STATUS, 1)]);
}

/// One row of the table that `cargo xtask hostile` prints.
fn row(name: &str) {
    if let Some(file) = std::env::var_os("BLOCKHOUSE_CATALOGUE") {
        let mut file = std::fs::File::options().append(true).create(true).open(file).unwrap();
        let line = format!("{{\"attacker\":\"guest\",\"name\":\"{name}\",\"outcome\":\"refused\"}}\n");
        file.write_all(line.as_bytes()).unwrap();
    }
}

/// What a device may change in guest memory whatever the request is.
fn without_rings(driver: &Driver) -> Vec<u8> {
    let mut memory = driver.get(0, usize::try_from(END).unwrap());
    let used = usize::try_from(USED).unwrap();
    memory[used..used + 0x1000].fill(0);
    memory[usize::try_from(STATUS).unwrap()] = 0;
    memory
}

#[test]
fn no_attack_of_a_guest_changes_anything() {
    for &(name, answer, attack) in ATTACKS {
        let mut rig = Rig::changing();
        // Nothing that a device reads or writes by mistake looks like nothing.
        rig.driver.put(DATA, &[0x5a; 0x8000]);
        let disk = rig.disk.content(0, 64 * 512);
        rig.driver.header(IN, 0);
        attack(&mut rig.driver);
        let memory = without_rings(&rig.driver);
        let served = rig.try_process();
        let status = rig.driver.status();
        match answer {
            Stopped => assert!(served.is_err(), "{name}: the queue goes on"),
            Nothing => assert_eq!((status, served.is_ok()), (UNTOUCHED, true), "{name}"),
            Status(expected) => assert_eq!((status, served.is_ok()), (expected, true), "{name}"),
        }
        assert!(without_rings(&rig.driver) == memory, "{name}: guest memory changed");
        assert_eq!(rig.disk.take_calls(), [], "{name}: the disk was changed");
        assert!(rig.disk.content(0, 64 * 512) == disk, "{name}: the disk was changed");
        if answer != Stopped {
            assert!(rig.driver.used().is_some(), "{name}: the chain did not come back");
            rig.driver.header(IN, 5);
            rig.driver.submit(&[readable(HEADER, 16), writable(DATA, 512), writable(STATUS, 1)]);
            rig.process();
            assert_eq!(rig.driver.status(), OK, "{name}: the next request fails");
            assert_eq!(rig.driver.get(DATA, 512), rig.disk.content(5 * 512, 512), "{name}");
        }
        row(name);
    }
    let mut names: Vec<_> = ATTACKS.iter().map(|(name, ..)| name).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), ATTACKS.len(), "two attacks have one name");
}

/// The same attacks on a disk that is read-only, and writes of every kind.
#[test]
fn no_guest_writes_to_a_read_only_disk() {
    let writes: &[(&str, Attack)] = &[
        ("a write to a read-only disk", |d| usual(d, OUT, 0, readable(DATA, 512))),
        ("zeroes on a read-only disk", |d| list(d, ZEROES_KIND, &[(0, 1, 0)])),
        ("a discard on a read-only disk", |d| list(d, DISCARD_KIND, &[(0, 1, 0)])),
    ];
    for (name, attack) in writes {
        // A driver that accepts what was not offered.
        let mut rig = Rig::with(MemoryDisk::read_only(64 * 512), FLUSH | DISCARD | ZEROES);
        attack(&mut rig.driver);
        rig.process();
        assert!([IOERR, UNSUPP].contains(&rig.driver.status()), "{name}: {}", rig.driver.status());
        assert_eq!(rig.disk.take_calls(), [], "{name}");
        row(name);
    }
}

/// Another vCPU changes header and descriptors while they are read: each is read once, and what was checked is
/// what is used. The disk itself sees to it that nothing outside of it is asked for.
#[test]
fn memory_that_changes_while_it_is_read() {
    let seconds = std::env::var("HOSTILE_RACE_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(2);
    let mut rig = Rig::with(MemoryDisk::read_only(64 * 512), FLUSH);
    rig.driver.header(IN, 0);
    rig.driver.chain_in(TABLE, 0, &[readable(HEADER, 16), writable(DATA, 512), writable(STATUS, 1)]);
    let memory = rig.driver.memory.clone();
    let stop = AtomicBool::new(false);
    let (mut rounds, mut served, mut refused) = (0u64, 0u64, 0u64);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Sectors, types, addresses, lengths, flags: good ones and bad ones in turns.
            let sectors = [0, 63, 64, 1 << 55, u64::MAX];
            let addresses = [DATA, END - 512, END, u64::MAX - 511];
            let lengths = [512u32, 0, 511, u32::MAX];
            let flags = [NEXT | WRITE, NEXT, WRITE, NEXT | INDIRECT].map(|flags| u16::try_from(flags).unwrap());
            let mut turn = 0usize;
            while !stop.load(Ordering::Relaxed) {
                turn += 1;
                let put = |at: u64, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(at)).unwrap();
                put(HEADER + 8, &sectors[turn % 5].to_le_bytes());
                put(HEADER, &[0u32, 1, 4, 99][turn / 3 % 4].to_le_bytes());
                put(TABLE + 16, &addresses[turn / 5 % 4].to_le_bytes());
                put(TABLE + 24, &lengths[turn / 7 % 4].to_le_bytes());
                put(TABLE + 28, &flags[turn / 11 % 4].to_le_bytes());
            }
        });
        let end = Instant::now() + Duration::from_secs(seconds);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            while Instant::now() < end {
                rounds += 1;
                rig.driver.put(STATUS, &[UNTOUCHED]);
                rig.driver.offer(0);
                rig.process();
                assert!(rig.driver.used().is_some(), "a chain did not come back");
                if rig.driver.status() == OK { served += 1 } else { refused += 1 }
            }
        }));
        stop.store(true, Ordering::Relaxed);
        if let Err(failure) = result {
            std::panic::resume_unwind(failure);
        }
    });
    assert!(served > 0 && refused > 0, "no race: {served} served, {refused} refused of {rounds}");
    assert_eq!(rig.disk.take_calls().iter().filter(|call| **call != Call::Flush).count(), 0, "it is read-only");
    eprintln!("{rounds} requests in the race, {served} served, {refused} refused");
    row("memory that changes while it is read");
}
