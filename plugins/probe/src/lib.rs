//! Guesses what a file is from its first and last bytes; the world `prober-only`, which imports nothing.
//!
//! A guess is printed for a person and nothing acts on it: a guest can write any header into its own
//! disk. A file can look like several things at once, and then there are several guesses. `raw` is
//! guessed only where there is something that a disk has: a partition table or a file system.
//!
//! ```text
//! head (64 KiB) ─┬─▶ one function per format ─▶ guess: format, evidence, confidence ─▶ surest first
//! tail (4 KiB) ──┘
//! ```

#![cfg_attr(target_family = "wasm", no_std)]
#![cfg_attr(not(target_family = "wasm"), forbid(unsafe_code))]

extern crate alloc;

#[cfg(target_family = "wasm")]
mod component;
mod disks;
mod images;
#[cfg(target_family = "wasm")]
#[path = "../../sdk/src/runtime.rs"]
mod runtime;

use alloc::string::String;
use alloc::vec::Vec;
use core::cmp::Reverse;

/// Magic and fields agree.
const SURE: u8 = 100;
/// The magic is right, and something else is not as the format wants it.
const MAGIC_ONLY: u8 = 60;

/// What a file might be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guess {
    /// The name of the format, as used with `--format`.
    pub format: &'static str,
    /// What speaks for it.
    pub evidence: String,
    /// 0 to 100.
    pub confidence: u8,
}

/// What a prober sees of a file.
#[derive(Clone, Copy, Debug)]
struct File<'a> {
    /// The first bytes: 64 KiB, or all.
    head: &'a [u8],
    /// The last bytes: 4 KiB, or all.
    tail: &'a [u8],
    /// Size in bytes.
    size: u64,
}

impl<'a> File<'a> {
    /// Up to `length` bytes at `offset` of the head.
    fn at(&self, offset: usize, length: usize) -> &'a [u8] {
        let rest = self.head.get(offset..).unwrap_or_default();
        rest.get(..length).unwrap_or(rest)
    }

    fn has(&self, offset: usize, magic: &[u8]) -> bool {
        self.at(offset, magic.len()) == magic
    }

    /// The last `length` bytes, or nothing if the file is shorter.
    fn last(&self, length: usize) -> &'a [u8] {
        self.tail.len().checked_sub(length).and_then(|start| self.tail.get(start..)).unwrap_or_default()
    }

    fn u8(&self, offset: usize) -> u8 {
        self.head.get(offset).copied().unwrap_or(0)
    }

    fn le_u32(&self, offset: usize) -> u32 {
        self.at(offset, 4).try_into().map_or(0, u32::from_le_bytes)
    }

    fn le_u64(&self, offset: usize) -> u64 {
        self.at(offset, 8).try_into().map_or(0, u64::from_le_bytes)
    }

    fn be_u16(&self, offset: usize) -> u16 {
        self.at(offset, 2).try_into().map_or(0, u16::from_be_bytes)
    }

    fn be_u32(&self, offset: usize) -> u32 {
        self.at(offset, 4).try_into().map_or(0, u32::from_be_bytes)
    }
}

/// A guess that is sure if the fields beside the magic agree with the format.
fn guess(format: &'static str, evidence: String, agrees: bool) -> Option<Guess> {
    Some(Guess { format, evidence, confidence: if agrees { SURE } else { MAGIC_ONLY } })
}

/// Guesses, the surest first; empty if nothing is recognised.
///
/// `head` is the first 64 KiB of the file, `tail` its last 4 KiB, or each the whole file if that is
/// shorter.
pub fn probe(head: &[u8], tail: &[u8], file_size: u64) -> Vec<Guess> {
    let file = File { head, tail, size: file_size };
    let mut guesses: Vec<Guess> =
        images::ALL.iter().chain(disks::ALL).filter_map(|recognise| recognise(&file)).collect();
    guesses.sort_by_key(|guess| Reverse(guess.confidence));
    guesses
}
