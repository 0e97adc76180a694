//! What the targets of the disk share: files that know whose bytes they hold, and layers that answer from the input.
//!
//! A layer has a plan, and is honest until its input has a lie for it. What an answer allows the disk to do is written
//! down: bytes that are read have to come from there, and bytes that are written have to go there.

use std::collections::VecDeque;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard};

use arbitrary::{Result, Unstructured};
use blockhouse_block::{
    Access, Error, ErrorKind, Extent, FileIndex, ImageFile, Layer, LayerInfo, LayerPacker, LayerWriter, Located,
    MAX_FILE_OFFSET, MAX_PACKED_UNIT, Placement,
};
use rustix::fs::{MemfdFlags, memfd_create};

/// Bytes of each file at first.
pub(crate) const FILE: u64 = 16 << 10;
/// Files: the first is granted read-only.
pub(crate) const FILES: usize = 3;
/// The most bytes that a packed unit of a layer really has.
const MAX_UNIT: u64 = 64 << 10;

/// A file in memory, and what the disk has it as.
pub(crate) struct Place {
    /// Opened for writing, whatever was granted: so that a write that should not be is seen.
    pub(crate) file: File,
    pub(crate) image: Arc<ImageFile>,
}

/// The byte of a file at an offset: never 0, and of no other file.
pub(crate) fn byte_of(file: usize, offset: u64) -> u8 {
    if offset < FILE { 1 + file as u8 * 60 + (offset / 37 % 60) as u8 } else { 0 }
}

/// What a file holds at first.
pub(crate) fn content_of(file: usize) -> Vec<u8> {
    PLACES.with(|all| all[file].1.clone())
}

thread_local! {
    /// Used again by each input, because making files takes longer than most inputs.
    static PLACES: Vec<(File, Vec<u8>)> = (0..FILES)
        .map(|number| {
            let file = File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a file in memory"));
            (file, (0..FILE).map(|offset| byte_of(number, offset)).collect())
        })
        .collect();
}

/// The files, as they are at first.
pub(crate) fn places() -> Vec<Place> {
    PLACES.with(|all| {
        let places = all.iter().enumerate().map(|(number, (file, content))| {
            file.set_len(0).expect("a file in memory");
            file.write_all_at(content, 0).expect("a file in memory");
            let access = if number == 0 { Access::ReadOnly } else { Access::ReadWrite };
            let clone = || file.try_clone().expect("a descriptor");
            let image = ImageFile::new(clone(), access, format!("/files/{number}")).expect("a regular file");
            Place { file: clone(), image: Arc::new(image) }
        });
        places.collect()
    })
}

/// The byte of a packed unit.
fn unit_byte(token: u64, at: u64) -> u8 {
    200 + (token.wrapping_mul(7).wrapping_add(at / 16) % 50) as u8
}

/// The bytes of a packed unit.
pub(crate) fn unit(token: u64, length: u64) -> Vec<u8> {
    (0..length).map(|at| unit_byte(token, at)).collect()
}

/// What a layer still has to say, and what it said.
#[derive(Default)]
pub(crate) struct Script {
    /// A byte for each answer: 0 is honest.
    pub(crate) twists: VecDeque<u8>,
    /// Numbers for lies.
    numbers: VecDeque<u64>,
    /// Answers that a host may use.
    pub(crate) answers: Vec<Located>,
    /// Something was said that is not so, or went wrong.
    pub(crate) lied: bool,
}

impl Script {
    pub(crate) fn new(u: &mut Unstructured<'_>) -> Result<Self> {
        let count = u.int_in_range(0..=12)?;
        let twists = (0..count).map(|_| Ok(if u.arbitrary()? { u.arbitrary()? } else { 0 }));
        let twists = twists.collect::<Result<_>>()?;
        let numbers = (0..u.int_in_range(0..=8u8)?).map(|_| number(u)).collect::<Result<_>>()?;
        Ok(Self { twists, numbers, ..Self::default() })
    }

    /// A number for a lie: small ones when there are no more.
    pub(crate) fn number(&mut self) -> u64 {
        let number = self.numbers.pop_front().unwrap_or(3);
        self.numbers.push_back(number.rotate_left(9) ^ 5);
        number
    }

    /// What is wrong with the next answer: 0 is nothing.
    pub(crate) fn twist(&mut self) -> u8 {
        let twist = self.twists.pop_front().unwrap_or(0);
        self.lied |= twist != 0;
        twist
    }
}

/// A number that somebody may compute wrongly with.
pub(crate) fn number(u: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match u.int_in_range(0..=5u8)? {
        0 => u.arbitrary()?,
        1 => u64::MAX - u64::from(u.arbitrary::<u8>()?),
        2 => MAX_FILE_OFFSET - u64::from(u.arbitrary::<u16>()?),
        3 => u.int_in_range(0..=8)?,
        _ => 512 * u.int_in_range(0..=40)?,
    })
}

/// An error of a layer.
pub(crate) fn error(number: u64) -> Error {
    let kinds =
        [ErrorKind::Corrupt, ErrorKind::Storage, ErrorKind::Component, ErrorKind::Unsupported, ErrorKind::Limit];
    Error::new(kinds[(number % kinds.len() as u64) as usize], "the input wants an error")
}

/// A layer that is read.
pub(crate) struct Liar {
    pub(crate) info: LayerInfo,
    pub(crate) plan: Vec<Extent>,
    /// The most extents in an honest answer.
    pub(crate) per_answer: usize,
    pub(crate) files: Vec<Arc<ImageFile>>,
    pub(crate) script: Mutex<Script>,
    pub(crate) recovers: bool,
}

impl Liar {
    pub(crate) fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap()
    }

    /// What the plan says.
    fn honest(&self, offset: u64, max_extents: u32) -> Located {
        let mut located = Located::default();
        let mut at = 0;
        for extent in &self.plan {
            let end = at + extent.length;
            if end > offset && located.extents.len() < self.per_answer.min(max_extents as usize) {
                if located.extents.is_empty() {
                    located.start = at;
                }
                located.extents.push(*extent);
            }
            at = end;
        }
        located
    }

    /// Whether a host may use an answer (`wit/reader.wit`, `locate`). Written down again, on purpose.
    fn is_legal(&self, answer: &Located, offset: u64, max_extents: u32) -> bool {
        let mut at = answer.start;
        for extent in &answer.extents {
            let Some(end) = at.checked_add(extent.length) else { return false };
            if extent.length == 0 || end > self.info.virtual_size {
                return false;
            }
            match extent.placement {
                Placement::Data { file, offset, overwrite } => {
                    let Some(file) = self.files.get(file.0 as usize) else { return false };
                    let inside = offset.checked_add(extent.length).is_some_and(|end| end <= MAX_FILE_OFFSET);
                    if !inside || (overwrite && file.access() == Access::ReadOnly) {
                        return false;
                    }
                }
                Placement::Packed { .. } if extent.length > MAX_PACKED_UNIT => return false,
                _ => {}
            }
            at = end;
        }
        let count = answer.extents.len();
        count > 0 && count <= max_extents as usize && answer.start <= offset && at > offset
    }

    /// Calls `action` for each part of `range` that a legal answer speaks of: where it starts, its length, and its
    /// bytes, or `None` where they are those of the layer below.
    pub(crate) fn for_each_answer(&self, range: Range<u64>, action: &mut dyn FnMut(u64, u64, Option<Vec<u8>>)) {
        for answer in &self.script().answers {
            let mut at = answer.start;
            for extent in &answer.extents {
                let (from, to) = (at.max(range.start), (at + extent.length).min(range.end));
                if from < to {
                    let bytes = match extent.placement {
                        Placement::Data { file, offset, .. } => {
                            let (start, length) = (offset + (from - at), (to - from) as usize);
                            let start = usize::try_from(start).unwrap_or(usize::MAX);
                            PLACES.with(|all| {
                                let known = all[file.0 as usize].1.get(start..).unwrap_or_default();
                                let mut bytes = known[..known.len().min(length)].to_vec();
                                bytes.resize(length, 0);
                                Some(bytes)
                            })
                        }
                        Placement::Zero => Some(vec![0; (to - from) as usize]),
                        Placement::Packed { token } => {
                            Some((from..to).map(|place| unit_byte(token, place - at)).collect())
                        }
                        Placement::Unallocated => None,
                    };
                    action(from, to - from, bytes);
                }
                at += extent.length;
            }
        }
    }

    /// Says something else.
    fn twisted(twist: u8, script: &mut Script, answer: &mut Located, max_extents: u32) {
        let which = (script.number() % answer.extents.len().max(1) as u64) as usize;
        let number = script.number();
        match twist % 12 {
            0 => answer.start = number,
            1 => answer.start = answer.start.wrapping_sub(512),
            2 => answer.extents.clear(),
            3 => {
                if let Some(extent) = answer.extents.get(which).copied() {
                    answer.extents.resize(max_extents as usize + (number % 3) as usize, extent);
                }
            }
            4 => answer.extents.truncate(which),
            kind => {
                let Some(extent) = answer.extents.get_mut(which) else { return };
                match kind {
                    5 => extent.length = number,
                    6 => extent.length = extent.length.wrapping_add(512),
                    7 => extent.placement = Placement::Packed { token: number },
                    8 => {
                        extent.placement =
                            if number.is_multiple_of(2) { Placement::Zero } else { Placement::Unallocated }
                    }
                    _ => {
                        let index = (number % 5) as u32;
                        let offset = script.number();
                        extent.placement = Placement::Data { file: FileIndex(index), offset, overwrite: kind == 11 };
                    }
                }
            }
        }
    }
}

impl Layer for Liar {
    fn info(&self) -> &LayerInfo {
        &self.info
    }

    fn locate(&self, offset: u64, length: u64, max_extents: u32) -> blockhouse_block::Result<Located> {
        let end = offset.checked_add(length).expect("a question that does not wrap");
        assert!(length > 0 && end <= self.info.virtual_size, "asked for {offset}..{end} of {}", self.info.virtual_size);
        let mut answer = self.honest(offset, max_extents);
        let script = &mut *self.script();
        let twist = script.twist();
        if twist == 255 {
            return Err(error(script.number()));
        }
        if twist != 0 {
            Self::twisted(twist, script, &mut answer, max_extents);
        }
        if self.is_legal(&answer, offset, max_extents) {
            script.answers.push(answer.clone());
        }
        Ok(answer)
    }

    fn unpack(&self, token: u64, length: u64) -> blockhouse_block::Result<Vec<u8>> {
        assert!(length <= MAX_PACKED_UNIT, "asked to unpack {length} bytes");
        let script = &mut *self.script();
        let twist = script.twist();
        match twist {
            0 => {}
            1..=50 => return Err(error(script.number())),
            _ => {
                let length = script.number() % MAX_UNIT;
                return Ok(unit(token, length));
            }
        }
        if length > MAX_UNIT {
            script.lied = true;
            return Err(error(0));
        }
        Ok(unit(token, length))
    }

    fn may_recover(&self) -> bool {
        self.recovers
    }

    fn file(&self, index: FileIndex) -> Option<Arc<ImageFile>> {
        self.files.get(index.0 as usize).cloned()
    }

    fn writer(&self) -> Option<&dyn LayerWriter> {
        None
    }

    fn packer(&self) -> Option<&dyn LayerPacker> {
        None
    }
}
