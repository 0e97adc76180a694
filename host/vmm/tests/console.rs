//! A console that nobody reads: the guest waits, and the end of its machine does not.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::io::{self, Write};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use blockhouse_vmm::{ErrorKind, ExitReason, Machine, MachineConfig, Payload};

use common::skip;

/// Where the first vCPU begins, and where the second one does: page 0x50, in real mode.
const FIRST: u64 = 0x10_0000;
const SECOND: u64 = 0x5_0000;

/// Starts the second vCPU, if there is one, by way of the local APIC (INIT, a while, SIPI).
///
/// ```text
///   mov ebx, 0xfee00000
///   mov dword ptr [rbx+0x310], 1 << 24; mov dword ptr [rbx+0x300], 0x4500
///   mov ecx, 2000; wait: dec ecx; jnz wait
///   mov dword ptr [rbx+0x310], 1 << 24; mov dword ptr [rbx+0x300], 0x4650
/// ```
#[rustfmt::skip]
const START: [u8; 54] = [
    0xbb, 0x00, 0x00, 0xe0, 0xfe,
    0xc7, 0x83, 0x10, 0x03, 0x00, 0x00, 0x00, 0x00, 0x00, 0x01,
    0xc7, 0x83, 0x00, 0x03, 0x00, 0x00, 0x00, 0x45, 0x00, 0x00,
    0xb9, 0xd0, 0x07, 0x00, 0x00, 0xff, 0xc9, 0x75, 0xfc,
    0xc7, 0x83, 0x10, 0x03, 0x00, 0x00, 0x00, 0x00, 0x00, 0x01,
    0xc7, 0x83, 0x00, 0x03, 0x00, 0x00, 0x50, 0x46, 0x00, 0x00,
];

/// `mov dx, 0x3f8; mov al, 'x'; again: out dx, al; jmp again`, in real mode; in 64-bit mode with a prefix.
const WRITES: [u8; 8] = [0xba, 0xf8, 0x03, 0xb0, b'x', 0xee, 0xeb, 0xfd];
/// `mov dx, 0x3fd; again: in al, dx; jmp again`, the same.
const READS: [u8; 6] = [0xba, 0xfd, 0x03, 0xec, 0xeb, 0xfd];
/// An operand of 16 bits.
const PREFIX: u8 = 0x66;

/// A kernel of two parts, which is entered at the first one.
fn elf(parts: [(u64, &[u8]); 2]) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // An executable for x86-64, version 1; entry, program headers, no sections.
    file.extend([2u16, 62].iter().flat_map(|value| value.to_le_bytes()));
    file.extend(1u32.to_le_bytes());
    file.extend([FIRST, 64, 0].iter().flat_map(|value| value.to_le_bytes()));
    file.extend(0u32.to_le_bytes());
    file.extend([64u16, 56, 2, 64, 0, 0].iter().flat_map(|value| value.to_le_bytes()));
    let mut offset = 4096;
    for (address, content) in parts {
        // To be loaded, readable, writable, executable.
        file.extend([1u32, 7].iter().flat_map(|value| value.to_le_bytes()));
        let length = content.len() as u64;
        file.extend(
            [offset, address, address, length, length, 4096].iter().flat_map(|value: &u64| value.to_le_bytes()),
        );
        offset += 4096;
    }
    for (_, content) in parts {
        file.resize(file.len().next_multiple_of(4096), 0);
        file.extend(content);
    }
    file
}

/// A pipe that nobody reads.
struct Unread {
    pipe: io::PipeWriter,
    arrived: mpsc::SyncSender<()>,
}

impl Write for Unread {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        let _ = self.arrived.try_send(());
        // Until it is full, and then as long as it is not interrupted.
        loop {
            self.pipe.write(&[0; 4096])?;
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whichever vCPU it is that waits for the console, and which one for the serial port that the other one has.
#[test]
fn a_console_that_nobody_reads_does_not_hold_up_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = directory.path().join("guest.elf");
    for (vcpus, first, second) in
        [(1, &WRITES[..], &WRITES[..]), (2, &READS, &WRITES), (2, &WRITES, &READS), (2, &WRITES, &WRITES)]
    {
        let (reader, pipe) = io::pipe().unwrap();
        let (arrived, wait) = mpsc::sync_channel(1);
        let first = [&START, &[PREFIX][..], first].concat();
        std::fs::write(&kernel, elf([(FIRST, &first), (SECOND, second)])).unwrap();
        let machine = Machine::new(MachineConfig {
            memory_bytes: 64 << 20,
            vcpus,
            payload: Payload::Linux { kernel: kernel.clone(), initramfs: None, cmdline: String::new() },
            disks: Vec::new(),
            console: Box::new(Unread { pipe, arrived }),
        });
        let machine = match machine {
            Ok(machine) => machine,
            Err(error) if error.kind() == ErrorKind::Unavailable => return skip(&error),
            Err(error) => panic!("{error}"),
        };
        let (input, stop) = (machine.console_input(), machine.stop_handle());
        let (ended, end) = mpsc::channel();
        thread::spawn(move || ended.send(machine.run().unwrap().reason));
        wait.recv_timeout(Duration::from_secs(20)).expect("the guest must say something");
        // So that the other one waits, too. Who answers the guest must not.
        thread::sleep(Duration::from_millis(50));
        let (answered, answer) = mpsc::channel();
        let sender = input.clone();
        thread::spawn(move || answered.send(sender.send(b"x")));
        assert_eq!(answer.recv_timeout(Duration::from_secs(20)), Ok(0), "{vcpus}: it has taken the byte, or waits");
        stop.stop();
        // It would be forever.
        let reason = end.recv_timeout(Duration::from_secs(60)).expect("the machine waits for its console");
        assert_eq!(reason, ExitReason::Stopped);
        // The console is closed, although somebody could still type.
        let (closed, close) = mpsc::channel();
        thread::spawn(move || closed.send(io::copy(&mut { reader }, &mut io::sink()).map(|_| ())));
        close.recv_timeout(Duration::from_secs(20)).expect("the console is still open").unwrap();
        assert_eq!(input.send(b"xyz"), 3, "nobody takes it, ever");
    }
}
