//! Guests that break the rules, through KVM: descriptor chains that are none, in the memory of a real machine.
//!
//! ```text
//!   test: a script ──▶ ELF: PLAYER, script ──▶ machine: one attack after the other, a good request after each
//!   (writes, waits, reports)                       │
//!   test: what was reported ◀── serial port ───────┘
//! ```
//!
//! `host/virtio/src/queue/tests/hostile.rs` has the same attacks on the device alone, byte by byte. Here is what is
//! between: registers, notifications, threads. Each attack ends in an answer, or in a device that needs a reset; the
//! next reset brings it back, and the machine goes on.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use blockhouse_block::{BlockBackend, Lane, Pool, PoolLane, Result, Topology};
use blockhouse_vmm::{DiskConfig, ExitReason, Machine, MachineConfig, Payload};
use vm_memory::VolatileSlice;

use common::{Console, skip};

/// A program that plays a script: steps of three 64-bit words, operation, address, value.
///
/// | operation | |
/// |---|---|
/// | 1, 2, 4, 8 | writes so many bytes of the value |
/// | 16 | writes the 4 bytes at the address to the serial port |
/// | 32 | waits until the 2 bytes at the address are the value's, disk 0 needs a reset, or 20,000 looks are over |
/// | 0 | resets the machine |
///
/// ```text
///        lea rsi, [rip+script]
///  next: mov rax, [rsi]; mov rdi, [rsi+8]; mov rcx, [rsi+16]; add rsi, 24
///        cmp al, 1; je w8;  cmp al, 2; je w16;  cmp al, 4; je w32
///        cmp al, 8; je w64; cmp al, 16; je print; cmp al, 32; je wait
///  end:  mov al, 0xfe; out 0x64, al; jmp end
///  w8:   mov [rdi], cl; jmp next        w16: mov [rdi], cx; jmp next
///  w32:  mov [rdi], ecx; jmp next       w64: mov [rdi], rcx; jmp next
///  print: mov eax, [rdi]; mov dx, 0x3f8; mov cl, 4
///  each: out dx, al; shr eax, 8; dec cl; jnz each; jmp next
///  wait: mov ebx, 20000; mov rbp, 0xd0000070
///  again: cmp [rdi], cx; je next; test dword ptr [rbp], 0x40; jnz next; dec ebx; jnz again; jmp next
///  script:
/// ```
#[rustfmt::skip]
const PLAYER: [u8; 128] = [
    0x48, 0x8d, 0x35, 0x79, 0x00, 0x00, 0x00, 0x48, 0x8b, 0x06, 0x48, 0x8b, 0x7e, 0x08, 0x48, 0x8b,
    0x4e, 0x10, 0x48, 0x83, 0xc6, 0x18, 0x3c, 0x01, 0x74, 0x1a, 0x3c, 0x02, 0x74, 0x1a, 0x3c, 0x04,
    0x74, 0x1b, 0x3c, 0x08, 0x74, 0x1b, 0x3c, 0x10, 0x74, 0x1c, 0x3c, 0x20, 0x74, 0x2a, 0xb0, 0xfe,
    0xe6, 0x64, 0xeb, 0xfa, 0x88, 0x0f, 0xeb, 0xcf, 0x66, 0x89, 0x0f, 0xeb, 0xca, 0x89, 0x0f, 0xeb,
    0xc6, 0x48, 0x89, 0x0f, 0xeb, 0xc1, 0x8b, 0x07, 0x66, 0xba, 0xf8, 0x03, 0xb1, 0x04, 0xee, 0xc1,
    0xe8, 0x08, 0xfe, 0xc9, 0x75, 0xf8, 0xeb, 0xaf, 0xbb, 0x20, 0x4e, 0x00, 0x00, 0x48, 0xbd, 0x70,
    0x00, 0x00, 0xd0, 0x00, 0x00, 0x00, 0x00, 0x66, 0x39, 0x0f, 0x74, 0x9b, 0xf7, 0x45, 0x00, 0x40,
    0x00, 0x00, 0x00, 0x75, 0x92, 0xff, 0xcb, 0x75, 0xee, 0xeb, 0x8c, 0x0f, 0x1f, 0x44, 0x00, 0x00,
];

// Where things are in guest memory.
const PROGRAM: u64 = 0x20_0000;
const TABLE: u64 = 0x40_0000;
const AVAIL: u64 = 0x40_1000;
const USED: u64 = 0x40_2000;
const HEADER: u64 = 0x40_3000;
const STATUS: u64 = 0x40_4000;
const TABLE_2: u64 = 0x40_5000;
const DATA: u64 = 0x41_0000;
const MEMORY: u64 = 64 << 20;
const END: u64 = MEMORY;

const SIZE: u16 = 16;
const SECTORS: u64 = 64;

// Registers of virtio-mmio (virtio 1.3, 4.2.2) of the first disk, and bits of its status (2.1).
const REGISTERS: u64 = 0xd000_0000;
const DEVICE_STATUS: u64 = REGISTERS + 0x70;
const NEEDS_RESET: u32 = 0x40;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

const IN: u32 = 0;
const OUT: u32 = 1;
const DISCARD: u32 = 11;
const ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// What no device writes.
const UNTOUCHED: u8 = 0xee;

/// What the driver takes: FLUSH, DISCARD, WRITE_ZEROES and indirect tables (virtio 1.3, 5.2.3 and 6); not EVENT_IDX:
/// each notification is one.
const FEATURES: u32 = 1 << 9 | 1 << 13 | 1 << 14 | 1 << 28;

/// Steps for the player.
#[derive(Default)]
struct Script(Vec<[u64; 3]>);

/// A descriptor: address, length, flags, next.
type Desc = (u64, u32, u16, u16);

impl Script {
    fn put8(&mut self, at: u64, value: u8) {
        self.0.push([1, at, value.into()]);
    }

    fn put16(&mut self, at: u64, value: u16) {
        self.0.push([2, at, value.into()]);
    }

    fn put32(&mut self, at: u64, value: u32) {
        self.0.push([4, at, value.into()]);
    }

    fn put64(&mut self, at: u64, value: u64) {
        self.0.push([8, at, value]);
    }

    fn register(&mut self, offset: u64, value: u32) {
        self.put32(REGISTERS + offset, value);
    }

    /// Resets the device, and has it accept a driver with these features and a queue (3.1.1).
    fn start(&mut self, features: u32) {
        self.start_with(features, TABLE);
    }

    /// The same with the descriptor table anywhere.
    fn start_with(&mut self, features: u32, table: u64) {
        self.register(0x70, 0);
        self.register(0x70, 3);
        for (half, features) in [(0, features), (1, 1)] {
            self.register(0x24, half);
            self.register(0x20, features);
        }
        self.register(0x70, 11);
        self.register(0x30, 0);
        self.register(0x38, SIZE.into());
        for (offset, address) in [(0x80, table), (0x90, AVAIL), (0xa0, USED)] {
            self.register(offset, u32::try_from(address & 0xffff_ffff).unwrap());
            self.register(offset + 4, u32::try_from(address >> 32).unwrap());
        }
        for index in 0..2 * u64::from(SIZE) {
            self.put64(TABLE + 8 * index, 0);
        }
        for ring in [AVAIL, USED] {
            self.put32(ring, 0);
        }
        self.register(0x44, 1);
        self.register(0x70, 15);
        self.put8(STATUS, UNTOUCHED);
    }

    fn header(&mut self, kind: u32, sector: u64) {
        self.put64(HEADER, kind.into());
        self.put64(HEADER + 8, sector);
    }

    fn table(&mut self, at: u64, descriptors: &[Desc]) {
        for (index, (address, len, flags, next)) in (0..).zip(descriptors) {
            let at = at + 16 * index;
            self.put64(at, *address);
            self.put64(at + 8, u64::from(*len) | u64::from(*flags) << 32 | u64::from(*next) << 48);
        }
    }

    /// A chain in the order of its parts: address, length, and whether the device writes.
    fn chain(&mut self, parts: &[(u64, u32, bool)]) {
        let last = parts.len() - 1;
        let descriptors: Vec<Desc> = parts
            .iter()
            .enumerate()
            .map(|(index, (address, len, writes))| {
                let flags = if *writes { WRITE } else { 0 } | if index < last { NEXT } else { 0 };
                (*address, *len, flags, u16::try_from(index + 1).unwrap())
            })
            .collect();
        self.table(TABLE, &descriptors);
    }

    /// A request in the usual three parts.
    fn usual(&mut self, kind: u32, sector: u64, data: (u64, u32, bool)) {
        self.header(kind, sector);
        self.chain(&[(HEADER, 16, false), data, (STATUS, 1, true)]);
    }

    /// A discard or zeroes, with a list of ranges.
    fn list(&mut self, kind: u32, list: &[(u64, u32, u32)]) {
        for (index, (sector, count, flags)) in (0..).zip(list) {
            self.put64(DATA + 16 * index, *sector);
            self.put64(DATA + 16 * index + 8, u64::from(*count) | u64::from(*flags) << 32);
        }
        self.usual(kind, 0, (DATA, u32::try_from(16 * list.len()).unwrap(), false));
    }

    /// A chain of one descriptor that names a table.
    fn indirect(&mut self, at: u64, len: u32, table: &[Desc]) {
        self.header(IN, 0);
        self.table(TABLE_2, table);
        self.table(TABLE, &[(at, len, INDIRECT, 0)]);
    }

    /// Makes `head` available as the first of all, says so, waits, and reports.
    fn go(&mut self, head: u16, index: u16) {
        self.put16(AVAIL + 4, head);
        self.put16(AVAIL + 2, index);
        self.register(0x50, 0);
        self.0.push([32, USED + 2, 1]);
        self.report();
    }

    /// Status byte of the request, used ring, device status: twelve bytes.
    fn report(&mut self) {
        for at in [STATUS, USED, DEVICE_STATUS] {
            self.0.push([16, at, 0]);
        }
    }

    /// The program and the script as an ELF file that is loaded as it is (ELF-64 object file format).
    fn elf(mut self) -> Vec<u8> {
        self.0.push([0; 3]);
        let mut content = PLAYER.to_vec();
        content.extend(self.0.iter().flatten().flat_map(|word| word.to_le_bytes()));
        assert!(PROGRAM + content.len() as u64 <= TABLE, "the script is too long");
        elf(&content)
    }
}

/// A kernel that is loaded at [`PROGRAM`] and entered there.
fn elf(content: &[u8]) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // An executable for x86-64, version 1; entry, program headers, no sections.
    file.extend([2u16, 62].iter().flat_map(|value| value.to_le_bytes()));
    file.extend(1u32.to_le_bytes());
    file.extend([PROGRAM, 64, 0].iter().flat_map(|value| value.to_le_bytes()));
    file.extend(0u32.to_le_bytes());
    file.extend([64u16, 56, 1, 64, 0, 0].iter().flat_map(|value| value.to_le_bytes()));
    // To be loaded, readable, writable, executable.
    file.extend([1u32, 7].iter().flat_map(|value| value.to_le_bytes()));
    let length = content.len() as u64;
    file.extend([4096, PROGRAM, PROGRAM, length, length, 4096].iter().flat_map(|value: &u64| value.to_le_bytes()));
    file.resize(4096, 0);
    file.extend(content);
    file
}

/// What the guest gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// This in the status byte.
    Status(u8),
    /// The chain comes back and no status is written: there is no place for one.
    Nothing,
    /// The device needs a reset.
    Stopped,
    /// The device does not take the queue, and does nothing.
    Silent,
}
use Answer::{Nothing, Silent, Status, Stopped};

/// The guest's part: what is in memory, and then the head that is offered and the index it sets.
type Attack = fn(&mut Script) -> (u16, u16);

const ONE: (u16, u16) = (0, 1);
const GOOD: [Desc; 3] = [(HEADER, 16, NEXT, 1), (DATA, 512, NEXT | WRITE, 2), (STATUS, 1, WRITE, 0)];
const DATA_IN: (u64, u32, bool) = (DATA, 512, true);
const DATA_OUT: (u64, u32, bool) = (DATA, 512, false);

#[rustfmt::skip]
const ATTACKS: &[(&str, Answer, Attack)] = &[
    ("a descriptor that follows itself", Nothing, |s| { s.table(TABLE, &[(HEADER, 16, NEXT, 0)]); ONE }),
    ("a loop of writable descriptors", Nothing, |s| {
        s.table(TABLE, &[(HEADER, 16, NEXT, 1), (STATUS, 1, NEXT | WRITE, 0)]); ONE
    }),
    ("a next index right past the table", Nothing, |s| {
        s.table(TABLE, &[(HEADER, 16, NEXT, 1), (STATUS, 1, NEXT | WRITE, SIZE)]); ONE
    }),
    ("the largest next index", Nothing, |s| {
        s.table(TABLE, &[(HEADER, 16, NEXT, 1), (STATUS, 1, NEXT | WRITE, u16::MAX)]); ONE
    }),
    ("a table inside a table", Nothing, |s| {
        s.indirect(TABLE_2, 32, &[GOOD[0], (TABLE_2 + 0x100, 32, INDIRECT, 0)]); ONE
    }),
    ("a table that names itself", Nothing, |s| { s.indirect(TABLE_2, 16, &[(TABLE_2, 16, INDIRECT, 0)]); ONE }),
    ("a table with half a descriptor", Nothing, |s| { s.indirect(TABLE_2, 47, &GOOD); ONE }),
    ("an empty table", Nothing, |s| { s.indirect(TABLE_2, 0, &GOOD); ONE }),
    ("a table outside of memory", Nothing, |s| { s.indirect(END, 48, &GOOD); ONE }),
    ("a table across the end of memory", Nothing, |s| { s.indirect(END - 16, 48, &GOOD); ONE }),
    ("a table in the registers of the device", Nothing, |s| { s.indirect(REGISTERS, 48, &GOOD); ONE }),
    ("a table at the top of the address space", Nothing, |s| { s.indirect(u64::MAX - 8, 48, &GOOD); ONE }),
    ("a table of a million descriptors", Nothing, |s| { s.indirect(TABLE_2, 16 << 20, &GOOD); ONE }),
    ("a loop inside a table", Nothing, |s| {
        s.indirect(TABLE_2, 48, &[GOOD[0], (DATA, 512, NEXT | WRITE, 0), GOOD[2]]); ONE
    }),
    ("an index past the end of its table", Nothing, |s| {
        s.indirect(TABLE_2, 48, &[GOOD[0], (DATA, 512, NEXT | WRITE, 3), GOOD[2]]); ONE
    }),
    ("more than 4 GiB in one chain", Nothing, |s| {
        s.header(IN, 0);
        s.chain(&[(HEADER, 16, false), (DATA, u32::MAX, true), (DATA, u32::MAX, true), (STATUS, 1, true)]); ONE
    }),
    ("data outside of memory", Status(IOERR), |s| { s.usual(IN, 0, (END, 512, true)); ONE }),
    ("data in the registers of the device", Status(IOERR), |s| { s.usual(IN, 0, (REGISTERS, 512, true)); ONE }),
    ("data across the end of memory", Status(IOERR), |s| { s.usual(IN, 0, (END - 511, 512, true)); ONE }),
    ("data that wraps around the address space", Status(IOERR), |s| {
        s.usual(IN, 0, (u64::MAX - 510, 512, true)); ONE
    }),
    ("data longer than memory", Status(IOERR), |s| { s.usual(IN, 0, (DATA, 0xf000_0000, true)); ONE }),
    ("data to write outside of memory", Status(IOERR), |s| { s.usual(OUT, 0, (END, 512, false)); ONE }),
    ("a header outside of memory", Status(IOERR), |s| {
        s.chain(&[(END, 16, false), DATA_IN, (STATUS, 1, true)]); ONE
    }),
    ("a header in the registers of the device", Status(IOERR), |s| {
        s.chain(&[(REGISTERS, 16, false), DATA_IN, (STATUS, 1, true)]); ONE
    }),
    ("a status outside of memory", Nothing, |s| {
        s.header(IN, 0); s.chain(&[(HEADER, 16, false), DATA_IN, (END, 1, true)]); ONE
    }),
    ("a status in the registers of the device", Nothing, |s| {
        s.header(IN, 0); s.chain(&[(HEADER, 16, false), DATA_IN, (DEVICE_STATUS, 1, true)]); ONE
    }),
    ("no status", Nothing, |s| { s.header(IN, 0); s.chain(&[(HEADER, 16, false)]); ONE }),
    ("nothing but a status", Status(IOERR), |s| { s.chain(&[(STATUS, 1, true)]); ONE }),
    ("a header of 15 bytes", Status(IOERR), |s| {
        s.header(IN, 0); s.chain(&[(HEADER, 15, false), DATA_IN, (STATUS, 1, true)]); ONE
    }),
    ("a header that the device is to write", Status(IOERR), |s| {
        s.header(IN, 0); s.chain(&[(HEADER, 16, true), DATA_IN, (STATUS, 1, true)]); ONE
    }),
    ("a read right past the end", Status(IOERR), |s| { s.usual(IN, SECTORS, DATA_IN); ONE }),
    ("a read whose bytes wrap", Status(IOERR), |s| { s.usual(IN, 1 << 55, DATA_IN); ONE }),
    ("a read whose end wraps", Status(IOERR), |s| { s.usual(IN, u64::MAX / 512, DATA_IN); ONE }),
    ("a read of half a sector", Status(IOERR), |s| { s.usual(IN, 0, (DATA, 511, true)); ONE }),
    ("a write right past the end", Status(IOERR), |s| { s.usual(OUT, SECTORS, DATA_OUT); ONE }),
    ("a write whose bytes wrap", Status(IOERR), |s| { s.usual(OUT, u64::MAX / 512 + 1, DATA_OUT); ONE }),
    ("a discard past the end", Status(IOERR), |s| { s.list(DISCARD, &[(SECTORS, 1, 0)]); ONE }),
    ("a discard that wraps", Status(IOERR), |s| { s.list(DISCARD, &[(u64::MAX, 2, 0)]); ONE }),
    ("a discard with an unknown flag", Status(UNSUPP), |s| { s.list(DISCARD, &[(0, 1, 2)]); ONE }),
    ("a good discard and a bad one", Status(IOERR), |s| { s.list(DISCARD, &[(0, 1, 0), (63, 2, 0)]); ONE }),
    ("zeroes that wrap", Status(IOERR), |s| { s.list(ZEROES, &[(1 << 55, 1, 1)]); ONE }),
    ("half a list of zeroes", Status(IOERR), |s| { s.usual(ZEROES, 0, (DATA, 17, false)); ONE }),
    ("a request of an unknown type", Status(UNSUPP), |s| { s.usual(0xdead_beef, 0, DATA_IN); ONE }),
    ("a head right past the table", Stopped, |_| (SIZE, 1)),
    ("the largest head", Stopped, |_| (u16::MAX, 1)),
    ("an available index that jumps", Stopped, |_| (0, SIZE + 1)),
    ("an available index that runs backwards", Stopped, |_| (0, u16::MAX)),
    ("a queue outside of memory", Silent, |s| { s.start_with(FEATURES, END); ONE }),
    ("a queue in the registers of the device", Silent, |s| { s.start_with(FEATURES, REGISTERS); ONE }),
    ("a queue at the top of the address space", Silent, |s| { s.start_with(FEATURES, !15); ONE }),
];

/// A disk of zeroes that counts what changes it.
struct CountedDisk {
    changes: AtomicUsize,
}

impl BlockBackend for CountedDisk {
    fn capacity(&self) -> u64 {
        SECTORS * 512
    }

    fn is_writable(&self) -> bool {
        true
    }

    fn topology(&self) -> Topology {
        Topology { physical_block_size: 4096, optimal_io_size: 65536 }
    }

    fn read(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        let len: usize = buffers.iter().map(VolatileSlice::len).sum();
        assert!(offset + len as u64 <= self.capacity(), "the disk was asked for what it has not");
        buffers.iter().for_each(|buffer| buffer.copy_from(&vec![0x77_u8; buffer.len()]));
        Ok(())
    }

    fn write(&self, _: &[VolatileSlice<'_>], _: u64) -> Result<()> {
        self.changes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<()> {
        self.changes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn discard(&self, _: u64, _: u64) -> Result<()> {
        self.changes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn lane(self: Arc<Self>) -> Result<Box<dyn Lane>> {
        Ok(Box::new(PoolLane::new(self, Pool::new())?))
    }
}

/// One row of the table that `cargo xtask hostile` prints.
fn row(name: &str) {
    if let Some(file) = std::env::var_os("BLOCKHOUSE_CATALOGUE") {
        let mut file = std::fs::File::options().append(true).create(true).open(file).unwrap();
        let line = format!("{{\"attacker\":\"guest\",\"name\":\"kvm: {name}\",\"outcome\":\"refused\"}}\n");
        file.write_all(line.as_bytes()).unwrap();
    }
}

/// A machine that runs a kernel, or `None`, with the reason printed, where there is no KVM.
fn machine(kernel: &[u8], disks: Vec<DiskConfig>, console: &Console) -> Option<Machine> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("guest.elf");
    std::fs::write(&path, kernel).unwrap();
    let config = MachineConfig {
        memory_bytes: MEMORY,
        vcpus: 1,
        payload: Payload::Linux { kernel: path, initramfs: None, cmdline: String::new() },
        disks,
        console: Box::new(console.clone()),
    };
    match Machine::new(config) {
        Ok(machine) => Some(machine),
        Err(error) if error.kind() == blockhouse_vmm::ErrorKind::Unavailable => {
            skip(&error);
            None
        }
        Err(error) => panic!("{error}: {:?}", std::error::Error::source(&error)),
    }
}

/// Otherwise a kernel that came to nothing has done its work.
#[test]
fn a_guest_that_crashes_has_not_reset_the_machine() {
    // ud2, and no table of what to do about that: a triple fault.
    let Some(machine) = machine(&elf(&[0x0f, 0x0b]), Vec::new(), &Console::default()) else { return };
    assert_eq!(machine.run().unwrap().reason, ExitReason::Crashed);
}

#[test]
fn no_attack_of_a_guest_takes_the_machine_down() {
    let mut script = Script::default();
    for (_, _, attack) in ATTACKS {
        script.start(FEATURES);
        let (head, index) = attack(&mut script);
        script.go(head, index);
        // Whatever became of it: after a reset a good request works.
        script.start(FEATURES);
        script.usual(IN, 5, DATA_IN);
        script.put64(DATA, 0);
        script.go(0, 1);
        script.0.push([16, DATA, 0]);
    }
    let disk = Arc::new(CountedDisk { changes: AtomicUsize::new(0) });
    let reports = Console::default();
    let disks = vec![DiskConfig::new(Arc::clone(&disk) as _, "hostile")];
    let Some(machine) = machine(&script.elf(), disks, &reports) else { return };
    let exit = machine.run().unwrap();
    assert_eq!(exit.reason, ExitReason::Reset);
    let reports = reports.bytes();
    // Two reports for each attack, and four bytes of data.
    assert_eq!(reports.len(), ATTACKS.len() * 28, "the guest did not come to its end");
    let discards = ATTACKS.iter().filter(|(name, ..)| name.contains("good discard")).count();
    for ((name, answer, _), report) in ATTACKS.iter().zip(reports.chunks_exact(28)) {
        let word = |at: usize| u32::from_le_bytes(report[at..at + 4].try_into().unwrap());
        let (status, used, device) = (report[0], word(4) >> 16, word(8));
        let seen = match (used, device & NEEDS_RESET) {
            (1, 0) if status == UNTOUCHED => Nothing,
            (1, 0) => Status(status),
            (0, NEEDS_RESET) => Stopped,
            (0, 0) if *answer == Silent => Silent,
            other => panic!("{name}: it did not come back: {other:?}"),
        };
        assert_eq!(seen, *answer, "{name}");
        assert_eq!((report[12], word(16) >> 16, word(20) & NEEDS_RESET), (OK, 1, 0), "{name}: the next request fails");
        assert_eq!(report[24..], [0x77; 4], "{name}: the next request reads nothing");
        row(name);
    }
    // The good one of two.
    assert!(disk.changes.load(Ordering::Relaxed) <= discards, "the disk was changed");
    let mut names: Vec<_> = ATTACKS.iter().map(|(name, ..)| name).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), ATTACKS.len(), "two attacks have one name");
}
