//! A component that misbehaves on command: the first line of the image says how.
//!
//! ```text
//!   image file:   BEHAVIOUR [ARGUMENT]...\n  anything else
//!                 trap-at-locate 3\n         in arguments, %XX is the byte XX: %20 a space, %00 NUL
//! ```
//!
//! Apart from the one thing that it was told to do, it serves the image as a raw disk, the first line
//! included, 64 KiB of disk per answer, so that a disk can work first and break later. The last
//! sector is filled up with zeroes.
//!
//! # What a call can do
//! `ACTION-at-STAGE [N] [AMOUNT]`: from the Nth call of a stage on (default 1). The stages are `open`,
//! `connect`, `locate` and `unpack`; for `unpack` the whole disk is packed extents. Opened for writing there are
//! also `begin`, `prepare`, `commit`, `flush`, `finish` and `pack`. Of an image as a whole there are `create`, whose
//! option `line` is the first line, `check`, `resize`, `set-backing`, `list-snapshots`, `select-snapshot`,
//! `create-snapshot`, `apply-snapshot` and `delete-snapshot`.
//!
//! | action | what happens | AMOUNT (default) |
//! |---|---|---|
//! | `trap` | executes `unreachable` | |
//! | `panic` | panics, which logs one line and traps | |
//! | `fail` | returns an ordinary error | |
//! | `storage` | returns the error of a file that cannot be read | |
//! | `loop` | never returns, calls nobody | |
//! | `call-loop` | never returns, calls a cheap host function all the time | |
//! | `recurse` | recurses without end | |
//! | `grow-memory` | allocates 1 MiB at a time until AMOUNT is reached, and touches it | bytes (2^64 - 1) |
//! | `host-calls` | calls `files.size` AMOUNT times, then goes on | calls (10,000,000) |
//! | `huge-error` | returns an error text of AMOUNT bytes | bytes (41,943,040) |
//! | `log-flood` | writes AMOUNT messages, then goes on | messages (100,000) |
//! | `log-long` | writes one message of AMOUNT bytes with line ends and escapes, then goes on | bytes (10,000,000) |
//! | `get-directories` | asks for the preopened directories AMOUNT times and keeps all handles | times (1,000,000) |
//! | `share` | registers the image AMOUNT times | times (1,000,000) |
//! | `open-many` | opens its own image through the grants AMOUNT times, and keeps what it gets | times (100,000) |
//!
//! The defaults are far above the limits of the host, and fit into the memory of an instance: so that it is the
//! host that notices, and not the allocator.
//!
//! What was refused on the way (`open-many`, `share`) is an error that says how often it worked.
//!
//! # Lies
//! | behaviour | the lie |
//! |---|---|
//! | `lie-past-end` | an extent that goes past the virtual size |
//! | `lie-empty` | an answer without extents |
//! | `lie-zero-length` | an extent of length 0 before the right one |
//! | `lie-only-zero-length` | nothing but extents of length 0 |
//! | `lie-wrap` | two extents whose lengths add up to 2^64 and a bit |
//! | `lie-start-after` | an answer that starts after the offset asked for |
//! | `lie-start-far` | an answer that starts at 2^64 - 1 |
//! | `lie-ends-before` | an answer that ends at the offset asked for |
//! | `lie-no-such-file [INDEX]` | a data extent in a file that was never shared (4294967295) |
//! | `lie-too-many [COUNT]` | more extents than asked for (100,000) |
//! | `lie-overwrite` | a data extent with `overwrite` in a file shared read-only |
//! | `lie-offset [OFFSET]` | a data extent at a file offset above 2^63 - 1 (2^63 - 512) |
//! | `lie-packed-length [BYTES]` | one packed extent that is too long (16 MiB + 512) |
//! | `lie-unpack [BYTES]` | `unpack` returns BYTES bytes, not what was asked for (0) |
//! | `lie-changing` | the same place is data in one answer and zeroes in the next |
//! | `lie-size SIZE` | this virtual size, whatever it is |
//! | `lie-cluster-size SIZE` | this cluster size, whatever it is |
//! | `lie-overwritable` | `overwritable`, though opened read-only |
//! | `lie-backing-reported` | `open` reports a backing file and `connect` returns none |
//! | `lie-backing-returned` | `open` reports none and `connect` returns the image |
//! | `lie-facts [COUNT]` | this many facts (100,000) |
//! | `lie-files [COUNT]` | this many further files (100,000) |
//! | `lie-text [BYTES]` | a fact and a file name of this length, full of control characters (1,000,000) |
//!
//! | `write-lie-no-such-file` | space in a file that was never shared |
//! | `write-lie-read-only` | space in a file shared read-only |
//! | `write-lie-offset [OFFSET]` | space at this file offset (2^63) |
//! | `write-lie-outside [START]` | space for this place of the disk (2^62) |
//! | `write-lie-too-many [COUNT]` | this many allocations (100,000) |
//! | `write-lie-runs START:LENGTH:OFFSET:TICKET...` | these allocations, whatever was asked for; tickets that are numbers from 0 on, in this order, can be committed |
//! | `write-lie-freed FILE OFFSET LENGTH` | a flush sets this range of a registered file free |
//! | `lie-resize` | `resize` succeeds, and the image is as large as it was |
//! | `lie-check` | `check` repaired what it did not find |
//! | `lie-selected [SIZE]` | this size of a snapshot (513) |
//! | `lie-snapshots [COUNT]` | this many snapshots (70,000) |
//!
//! # Well-behaved, and attacks that only ask
//! | behaviour | what happens |
//! |---|---|
//! | `ok` | nothing but the disk |
//! | `zero SIZE` | a disk of SIZE zero bytes, in one extent |
//! | `wait OFFSET [trap or lie]` | all is packed, and located in one answer; the first 64 KiB are unpacked when the byte of the image at OFFSET is `!`; the second trap, or are too short |
//! | `backing FORMAT NAME [N]` | all of the disk is in the backing file NAME of format FORMAT; from the Nth call of `locate` on it traps |
//! | `backing-undeclared NAME` | as `backing`, without a format |
//! | `backing-self FORMAT` | returns the image itself as its backing file: a chain without end |
//! | `open PATH...` | `connect` opens each path as a format does, and reports |
//! | `open-early PATH...` | as `open`, before `connect` |
//! | `open-raw FLAGS PATH...` | `connect` calls `open-at` on each preopened directory with the path as it is |
//! | `preopens` | `connect` reports the names of the preopened directories |
//! | `share-read-write` | `connect` registers the image for writing, and reports |
//! | `change-image` | `connect` writes to, resizes and syncs the image, and reports |
//! | `change-backing FORMAT NAME` | the same with the backing file NAME of format FORMAT |
//! | `change-far OFFSET...` | `connect` writes a byte at each of these offsets of the image, resizes it to each, and reports |
//! | `read LENGTH OFFSET` | `connect` reads so much of the image in one host call, and reports |
//!
//! FLAGS are joined by commas: `read`, `write`, `mutate`, `sync`, `create`, `directory`, `exclusive`,
//! `truncate`, `follow`, or `none`. A report is an error of the case `other` with one line per attempt.
//!
//! An unknown behaviour is an error of the case `unsupported`, so that a misspelt test fails.

#![cfg_attr(target_family = "wasm", no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

mod actions;
mod asking;
mod lies;
mod maintenance;
mod writing;

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

use blockhouse_plugin::{
    Access, BackingReference, Context, Error, Extent, File, FileIndex, Format, ImageInfo, Located, Placement, Result,
};

/// How much of the disk one answer covers.
pub const ANSWER_BYTES: u64 = 64 << 10;
/// The longest first line.
const LINE_BYTES: usize = 1 << 20;

/// A call of the contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Open,
    Connect,
    Locate,
    Unpack,
    Begin,
    Prepare,
    Commit,
    Flush,
    Finish,
    Pack,
    Create,
    Check,
    Resize,
    SetBacking,
    ListSnapshots,
    SelectSnapshot,
    CreateSnapshot,
    ApplySnapshot,
    DeleteSnapshot,
}

/// All of them, with the words for them in the first line of an image.
const STAGES: [(Stage, &str); 19] = [
    (Stage::Open, "open"),
    (Stage::Connect, "connect"),
    (Stage::Locate, "locate"),
    (Stage::Unpack, "unpack"),
    (Stage::Begin, "begin"),
    (Stage::Prepare, "prepare"),
    (Stage::Commit, "commit"),
    (Stage::Flush, "flush"),
    (Stage::Finish, "finish"),
    (Stage::Pack, "pack"),
    (Stage::Create, "create"),
    (Stage::Check, "check"),
    (Stage::Resize, "resize"),
    (Stage::SetBacking, "set-backing"),
    (Stage::ListSnapshots, "list-snapshots"),
    (Stage::SelectSnapshot, "select-snapshot"),
    (Stage::CreateSnapshot, "create-snapshot"),
    (Stage::ApplySnapshot, "apply-snapshot"),
    (Stage::DeleteSnapshot, "delete-snapshot"),
];

impl Stage {
    fn parse(name: &str) -> Option<Self> {
        STAGES.iter().find(|(_, known)| *known == name).map(|(stage, _)| *stage)
    }

    fn name(self) -> &'static str {
        STAGES.iter().find(|(stage, _)| *stage == self).map_or("", |(_, name)| name)
    }
}

/// The first line of the image, taken apart.
#[derive(Debug)]
struct Behaviour {
    name: String,
    arguments: Vec<String>,
}

impl Behaviour {
    fn parse(line: &[u8]) -> Result<Self> {
        let line = line.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let text = core::str::from_utf8(line).map_err(|_| Error::corrupt("the first line is not text"))?;
        let mut words = text.split_whitespace();
        let name = words.next().ok_or_else(|| Error::corrupt("the first line is empty"))?.to_string();
        let arguments = words.map(unescape).collect::<Option<_>>();
        let arguments = arguments.ok_or_else(|| Error::corrupt("a bad %XX in the first line"))?;
        Ok(Self { name, arguments })
    }

    /// The first line of an image.
    fn of(image: &File) -> Result<Self> {
        let mut line = vec![0; usize::try_from(image.size()?).unwrap_or(usize::MAX).min(LINE_BYTES)];
        image.read_at(0, &mut line)?;
        Self::parse(&line)
    }

    fn text(&self, index: usize) -> Result<&str> {
        self.arguments
            .get(index)
            .map(String::as_str)
            .ok_or_else(|| Error::corrupt(format!("{} needs argument {}", self.name, index.saturating_add(1))))
    }

    fn number(&self, index: usize, default: u64) -> Result<u64> {
        match self.arguments.get(index) {
            None => Ok(default),
            Some(text) => text.parse().map_err(|_| Error::corrupt(format!("not a number: {text:?}"))),
        }
    }

    /// The action and stage of `ACTION-at-STAGE`.
    fn action(&self) -> Option<(&str, Stage)> {
        let (action, stage) = self.name.rsplit_once("-at-")?;
        Some((action, Stage::parse(stage)?))
    }
}

/// `text` with each `%XX` replaced by that byte.
fn unescape(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        if *first == b'%' {
            let (digits, after) = rest.split_at_checked(2)?;
            bytes.push(u8::from_str_radix(core::str::from_utf8(digits).ok()?, 16).ok()?);
            rest = after;
        } else {
            bytes.push(*first);
        }
    }
    String::from_utf8(bytes).ok()
}

/// An opened hostile image.
#[derive(Debug)]
pub struct Hostile {
    /// `None` after it was handed over as a backing file.
    image: Option<File>,
    /// `None` for calls that take an image and nothing else.
    context: Option<Context>,
    behaviour: Behaviour,
    virtual_size: u64,
    file: Option<FileIndex>,
    calls: [u64; STAGES.len()],
    access: Access,
    moved: writing::Moved,
    /// What actions keep, so that nothing is given back before the instance ends.
    hoard: actions::Hoard,
}

impl Format for Hostile {
    fn open(image: File, context: Context, access: Access) -> Result<(Self, ImageInfo)> {
        let behaviour = Behaviour::of(&image)?;
        let mut hostile = Self::new(image, Some(context), access, behaviour)?;
        hostile.act(Stage::Open)?;
        let info = hostile.describe()?;
        hostile.virtual_size = info.virtual_size;
        Ok((hostile, info))
    }

    fn connect(&mut self) -> Result<Option<File>> {
        self.act(Stage::Connect)?;
        self.ask()?;
        self.share_image()?;
        match self.behaviour.name.as_str() {
            "backing" => Ok(Some(self.context()?.open(self.behaviour.text(1)?, Access::ReadOnly)?)),
            "backing-undeclared" => Ok(Some(self.context()?.open(self.behaviour.text(0)?, Access::ReadOnly)?)),
            "backing-self" | "lie-backing-returned" => Ok(self.image.take()),
            _ => Ok(None),
        }
    }

    fn locate(&mut self, offset: u64, _length: u64, max_extents: u32) -> Result<Located> {
        self.act(Stage::Locate)?;
        if self.behaviour.name == "backing"
            && self.calls.get(Stage::Locate as usize) >= Some(&self.behaviour.number(2, u64::MAX)?)
        {
            actions::trap();
        }
        let mut truth = self.truth(offset)?;
        if self.behaviour.name == "wait" {
            truth.extents = self.packed_from(truth.start).take(usize::try_from(max_extents).unwrap_or(0)).collect();
        }
        self.lie_about(truth, offset, max_extents)
    }

    fn unpack(&mut self, token: u64, length: u64) -> Result<Vec<u8>> {
        self.act(Stage::Unpack)?;
        let length = match self.behaviour.name.as_str() {
            "lie-unpack" => self.behaviour.number(0, 0)?,
            "wait" => self.wait(token, length)?,
            _ => length,
        };
        let length = usize::try_from(length).map_err(|_| Error::Other("too long to unpack".into()))?;
        let mut bytes = vec![0; length];
        self.image()?.read_at(token, &mut bytes)?;
        Ok(bytes)
    }
}

impl Hostile {
    fn new(image: File, context: Option<Context>, access: Access, behaviour: Behaviour) -> Result<Self> {
        if !is_known(&behaviour) {
            return Err(Error::unsupported(format!("there is no behaviour {:?}", behaviour.name)));
        }
        Ok(Self {
            virtual_size: image.size()?.next_multiple_of(512),
            image: Some(image),
            context,
            behaviour,
            file: None,
            calls: [0; STAGES.len()],
            access,
            moved: writing::Moved::default(),
            hoard: actions::Hoard::default(),
        })
    }

    fn image(&self) -> Result<&File> {
        self.image.as_ref().ok_or_else(|| Error::Other("the image was handed over".into()))
    }

    fn context(&self) -> Result<&Context> {
        self.context.as_ref().ok_or_else(|| Error::Other("there is nowhere to open files from".into()))
    }

    /// The disk in packed extents, up to its end.
    fn packed_from(&self, start: u64) -> impl Iterator<Item = Extent> {
        let end = self.virtual_size;
        let next = move |token: &u64| token.checked_add(ANSWER_BYTES).filter(|token| *token < end);
        core::iter::successors(Some(start), next).map(move |token| Extent {
            length: end.saturating_sub(token).min(ANSWER_BYTES),
            placement: Placement::Packed { token },
        })
    }

    /// The part of `wait` that its first argument, and the second, are about.
    fn wait(&self, token: u64, length: u64) -> Result<u64> {
        match (token / ANSWER_BYTES, self.behaviour.arguments.get(1).map(String::as_str)) {
            (0, _) => {
                let mut byte = [0];
                while byte != *b"!" {
                    // So long that the calls of the host last for all of the time.
                    for turn in 0..100_000 {
                        core::hint::black_box(turn);
                    }
                    self.image()?.read_at(self.behaviour.number(0, 0)?, &mut byte)?;
                }
                Ok(length)
            }
            (1, Some("trap")) => actions::trap(),
            (1, Some("lie")) => Ok(0),
            _ => Ok(length),
        }
    }

    fn describe(&self) -> Result<ImageInfo> {
        let mut info = ImageInfo { virtual_size: self.virtual_size, ..ImageInfo::default() };
        if self.access == Access::ReadWrite {
            info.cluster_size = u32::try_from(ANSWER_BYTES).unwrap_or(0);
        }
        let reference = |name: &str, format: Option<&str>| {
            Some(BackingReference { name: name.to_string(), format: format.map(str::to_string) })
        };
        match self.behaviour.name.as_str() {
            "zero" => info.virtual_size = self.behaviour.number(0, 1 << 20)?,
            "backing" | "change-backing" => {
                info.backing = reference(self.behaviour.text(1)?, Some(self.behaviour.text(0)?))
            }
            "backing-undeclared" => info.backing = reference(self.behaviour.text(0)?, None),
            "backing-self" => info.backing = reference("itself", Some(self.behaviour.text(0)?)),
            "open-early" => return Err(self.open_as_a_format_does(0)),
            _ => self.lie_about_info(&mut info)?,
        }
        Ok(info)
    }

    /// What an honest component would answer.
    fn truth(&self, offset: u64) -> Result<Located> {
        let file = self.file.ok_or_else(|| Error::Other("locate was called before connect".into()))?;
        if self.behaviour.name == "zero" {
            let extents = vec![Extent { length: self.virtual_size, placement: Placement::Zero }];
            return Ok(Located { start: 0, extents });
        }
        let start = offset - offset % ANSWER_BYTES;
        let length = self.virtual_size.saturating_sub(start).min(ANSWER_BYTES);
        let packed = matches!(self.behaviour.name.as_str(), "lie-unpack" | "wait")
            || self.behaviour.name.ends_with("-at-unpack");
        let placement = match self.behaviour.name.as_str() {
            "backing" | "backing-undeclared" | "backing-self" => Placement::Unallocated,
            _ if packed => Placement::Packed { token: start },
            _ => match self.moved.find(start) {
                Some(offset) => Placement::Data { file, offset, overwrite: true },
                None => Placement::Data { file, offset: start, overwrite: false },
            },
        };
        Ok(Located { start, extents: vec![Extent { length, placement }] })
    }
}

/// Behaviours that are neither `ACTION-at-STAGE` nor lies.
const PLAIN: &[&str] = &[
    "ok",
    "zero",
    "wait",
    "backing",
    "backing-undeclared",
    "backing-self",
    "open",
    "open-early",
    "open-raw",
    "preopens",
    "share-read-write",
    "read",
    "change-image",
    "change-backing",
    "change-far",
];

fn is_known(behaviour: &Behaviour) -> bool {
    let name = behaviour.name.as_str();
    PLAIN.contains(&name)
        || lies::NAMES.contains(&name)
        || maintenance::NAMES.contains(&name)
        || writing::NAMES.contains(&name)
        || behaviour.action().is_some_and(|(action, _)| actions::NAMES.contains(&action))
}

blockhouse_plugin::export!(
    Hostile: writer, packer, creator, checker, resizer, rebaser, snapshots, snapshot_editor
);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use super::*;
    use blockhouse_plugin::testing::{Disk, Storage};

    fn disk(line: &str, length: usize) -> Result<Disk<Hostile>> {
        let storage = Storage::new();
        let mut bytes = format!("{line}\n").into_bytes();
        bytes.resize(length, b'x');
        storage.insert("/a", bytes);
        storage.insert("/b", "below");
        storage.disk("/a")
    }

    #[test]
    fn every_behaviour_is_in_the_table_and_every_row_is_a_behaviour() {
        let source = include_str!("lib.rs");
        let documented: Vec<&str> =
            source.lines().filter_map(|line| line.strip_prefix("//! | `")?.split(['`', ' ']).next()).collect();
        let lists = [actions::NAMES, lies::NAMES, maintenance::NAMES, writing::NAMES, PLAIN];
        let mut known: Vec<&str> = lists.concat();
        known.sort_unstable();
        let mut rows = documented.clone();
        rows.sort_unstable();
        assert_eq!(known, rows);
    }

    #[test]
    fn an_honest_disk_is_the_image() {
        let mut disk = disk("ok", 200_000).unwrap();
        assert_eq!(disk.info.virtual_size, 200_192);
        let all = disk.read(0, 200_192).unwrap();
        assert!(all.starts_with(b"ok\nxxx"));
        assert!(all[3..200_000].iter().all(|byte| *byte == b'x'));
        assert!(all[200_000..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_disk_can_break_later() {
        let mut disk = disk("fail-at-locate 3", 300_000).unwrap();
        assert!(disk.read(0, 512).is_ok());
        assert!(disk.read(65_536, 512).is_ok());
        assert!(disk.read(2 * 65_536, 512).is_err());
        assert!(disk.read(0, 512).is_err(), "and stays broken");
    }

    #[test]
    fn packed_disks_unpack() {
        let mut disk = disk("fail-at-unpack 2", 100_000).unwrap();
        assert!(disk.read(0, 20).unwrap().starts_with(b"fail-at-unpack 2\nxx"));
        assert!(disk.read(65_536, 20).is_err());
    }

    #[test]
    fn stages_are_told_apart() {
        assert_eq!(disk("fail-at-open", 600).unwrap_err().text(), "open failed on command");
        assert_eq!(disk("fail-at-connect", 600).unwrap_err().text(), "connect failed on command");
        assert!(matches!(disk("fail-at-lunch", 600).unwrap_err(), Error::Unsupported(_)));
        assert!(matches!(disk("make-tea", 600).unwrap_err(), Error::Unsupported(_)));
    }

    #[test]
    fn lies_are_lies() {
        let mut lying = disk("lie-empty", 600).unwrap();
        assert!(lying.format.locate(0, 1, 1).unwrap().extents.is_empty());
        let mut lying = disk("lie-too-many 100", 600).unwrap();
        assert_eq!(lying.format.locate(0, 1, 1).unwrap().extents.len(), 100);
        let mut lying = disk("lie-unpack 7", 600).unwrap();
        assert_eq!(lying.format.unpack(0, 512).unwrap().len(), 7);
        assert_eq!(disk("lie-size 18446744073709551615", 600).unwrap().info.virtual_size, u64::MAX);
    }

    #[test]
    fn opens_are_reported() {
        let report = disk("open /b missing a%00b", 600).unwrap_err();
        let lines: Vec<&str> = report.text().lines().collect();
        assert_eq!(lines.len(), 3);
        assert_eq!(lines[0], "opened \"/b\": 5 bytes");
        assert!(lines[1].starts_with("refused \"missing\": "));
        assert!(lines[2].starts_with("refused \"a\\0b\": "));
    }
}
