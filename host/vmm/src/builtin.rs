//! The built-in guest: a program of a few kilobytes in place of an operating system.
//!
//! `host/guest` is its source and says how it talks to the machine; `build.rs` builds it and this
//! module embeds it.

use std::io::Cursor;

use blockhouse_guest::{Finding, MEMORY_LEN, Record};
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::GuestAddress;

use crate::cpu::{Entry, Privilege};
use crate::error::{Error, Result};
use crate::layout::{HIMEM, MIN_MEMORY};
use crate::memory::Memory;

/// The guest as an ELF program.
const PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest.elf"));

const _: () = assert!(MEMORY_LEN <= MIN_MEMORY, "every machine has the memory that the guest needs");

/// What the built-in guest found out about one disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskReport {
    /// The number of the disk, from 0, in the order of the configuration.
    pub disk: u32,
    /// The capacity in bytes that the guest saw.
    pub bytes: u64,
    /// Whether the guest was offered no writing.
    pub read_only: bool,
    /// The serial that the guest saw.
    pub serial: String,
    /// How reading the whole disk went.
    pub result: DiskResult,
}

/// How the built-in guest got on with a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskResult {
    /// The SHA-256 of all bytes of the disk, in lower-case hexadecimal.
    Sha256(String),
    /// The device answered with an I/O error.
    ReadError {
        /// The first sector that cannot be read, in units of 512 bytes.
        sector: u64,
    },
    /// The guest could not use the device; the reason.
    Device(String),
}

impl From<&Record> for DiskReport {
    fn from(record: &Record) -> Self {
        let serial: Vec<u8> = record.serial.iter().copied().take_while(|byte| *byte != 0).collect();
        Self {
            disk: record.disk,
            bytes: record.bytes,
            read_only: record.read_only,
            serial: String::from_utf8_lossy(&serial).into_owned(),
            result: match record.finding {
                Finding::Digest(digest) => {
                    DiskResult::Sha256(digest.iter().map(|byte| format!("{byte:02x}")).collect())
                }
                Finding::ReadError { sector } => DiskResult::ReadError { sector },
                Finding::Device(fault) => DiskResult::Device(fault.as_str().to_owned()),
            },
        }
    }
}

/// Puts the guest into memory.
pub(crate) fn load(memory: &Memory) -> Result<Entry> {
    let loaded = Elf::load(memory.as_ref(), None, &mut Cursor::new(PROGRAM), Some(GuestAddress(HIMEM)))
        .map_err(Error::host("load the built-in guest"))?;
    // The guest sets up its own stack.
    Ok(Entry { privilege: Privilege::User, rip: loaded.kernel_load.0, rsp: 0, rsi: 0 })
}
