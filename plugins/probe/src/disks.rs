//! What speaks for a raw disk: partition tables and a file system for optical media.

use alloc::format;
use alloc::string::ToString;

use super::{File, Guess};

type Recogniser = fn(&File<'_>) -> Option<Guess>;

/// In the order in which equally sure guesses are listed.
pub(crate) const ALL: &[Recogniser] = &[gpt, iso9660, mbr];

/// These structures are what a guest writes into a raw disk, so they are never more than likely.
const LIKELY: u8 = 80;
const POSSIBLE: u8 = 50;
const FAINT: u8 = 20;

fn raw(evidence: alloc::string::String, confidence: u8) -> Option<Guess> {
    Some(Guess { format: "raw", evidence, confidence })
}

fn gpt(file: &File<'_>) -> Option<Guess> {
    let sector = [512, 4096].into_iter().find(|sector| file.has(*sector, b"EFI PART"))?;
    raw(format!("GUID partition table at {sector}"), LIKELY)
}

fn iso9660(file: &File<'_>) -> Option<Guess> {
    if !file.has(32_769, b"CD001") {
        return None;
    }
    raw("ISO 9660 file system (CD001 at 32769)".to_string(), LIKELY)
}

fn mbr(file: &File<'_>) -> Option<Guess> {
    if !file.has(510, b"\x55\xaa") {
        return None;
    }
    let entries = file.at(446, 64).chunks(16);
    let sound = |entry: &[u8]| matches!(entry.first(), Some(0 | 0x80));
    let used = entries.clone().filter(|entry| entry.get(4).is_some_and(|kind| *kind != 0)).count();
    if used > 0 && entries.clone().all(sound) {
        raw(format!("partition table of the MBR kind with {used} entries"), POSSIBLE)
    } else {
        raw("a boot sector (55 aa at 510) without partitions".to_string(), FAINT)
    }
}
