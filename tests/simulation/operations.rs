//! What a sequence is made of. Operations are plain data: they can be left out, and they fit any size of
//! disk, since a range is cut where the disk ends.

use crate::images::Made;

pub(crate) const SECTOR: u64 = 512;

/// Numbers that depend on the seed alone.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        // Neighbouring seeds have nothing in common.
        Self(seed.wrapping_mul(0xd134_2543_de82_ef95))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }
}

/// A range of the disk, in bytes: whole sectors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    offset: u64,
    length: u64,
}

impl Span {
    /// The part of it that a disk of `size` bytes has, as offset and length; none if that is nothing.
    pub(crate) fn within(self, size: u64) -> Option<(u64, u64)> {
        let length = self.length.min(size.checked_sub(self.offset)?);
        (length > 0).then_some((self.offset, length))
    }
}

/// One operation.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Operation {
    /// Noise of a seed.
    Write(Span, u64),
    Zero(Span, Unmap),
    Discard(Span),
    Read(Span),
    Flush,
    /// Closed and opened again.
    Reopen,
    /// Closed, written by QEMU, opened again: bytes of one value, or zeroes.
    Qemu(Span, u8),
    /// A new size of the disk, in bytes.
    Resize(u64),
    /// A new snapshot.
    Snapshot,
    /// The disk becomes what the snapshot of this number is. The number is taken modulo how many there are.
    Apply(u64),
    /// That snapshot goes.
    Delete(u64),
}

/// What the component can do to an image as a whole.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Abilities {
    pub(crate) resize: bool,
    pub(crate) snapshots: bool,
}

impl Abilities {
    fn allow(self, operation: &Operation) -> bool {
        match operation {
            Operation::Resize(_) => self.resize,
            Operation::Snapshot | Operation::Apply(_) | Operation::Delete(_) => self.snapshots,
            _ => true,
        }
    }
}

/// Whether zeroes may give space back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unmap {
    Yes,
    No,
}

/// Operations for one image: some dozens.
pub(crate) fn generate(random: &mut Random, made: &Made, abilities: Abilities) -> Vec<Operation> {
    let count = 4 + random.below(36);
    let size = made.content.len() as u64;
    let cluster = made.template.cluster;
    // QEMU takes as long to start as a sequence takes.
    let with_qemu = random.below(4) == 0;
    let with_changes = random.below(3) == 0;
    // Some sequences stay in one place, and change the same clusters again and again.
    let (first, width) = match random.below(3) {
        0 => (random.below(size), cluster * (2 + random.below(6))),
        _ => (0, size),
    };
    let span = |random: &mut Random| {
        let longest = match random.below(8) {
            0..=2 => 8 * SECTOR,
            3..=5 => 3 * cluster,
            6 => 32 * cluster,
            _ => 256 << 10,
        };
        let mut offset = (first + random.below(width)) % size;
        let mut length = 1 + random.below(longest.min(1 << 20));
        if random.below(3) == 0 {
            offset -= offset % cluster;
            length = length.next_multiple_of(cluster);
        }
        Span { offset: offset - offset % SECTOR, length: length.next_multiple_of(SECTOR) }
    };
    let mut operations = Vec::new();
    for _ in 0..count {
        let span = span(random);
        if with_changes && random.below(6) == 0 {
            let which = random.below(1 << 32);
            operations.push(match random.below(10) {
                0..=3 => Operation::Resize((1 + random.below(3 * size / 2 / SECTOR)) * SECTOR),
                4 => Operation::Resize((1 + random.below(3 * size / 2 / cluster)) * cluster),
                5..=7 => Operation::Snapshot,
                8 => Operation::Apply(which),
                _ => Operation::Delete(which),
            });
            continue;
        }
        operations.push(match random.below(40) {
            0..=15 => Operation::Write(span, random.below(1 << 32)),
            16..=19 => Operation::Zero(span, Unmap::No),
            20..=23 => Operation::Zero(span, Unmap::Yes),
            24..=28 => Operation::Discard(span),
            29..=32 => Operation::Read(span),
            33..=36 => Operation::Flush,
            37 | 38 => Operation::Reopen,
            _ if with_qemu => Operation::Qemu(span, random.below(3) as u8 * 77),
            _ => Operation::Flush,
        });
    }
    if with_qemu {
        // In any case one turn in the middle.
        operations.insert(operations.len() / 2, Operation::Qemu(span(random), 99));
    }
    operations.retain(|operation| abilities.allow(operation));
    operations
}
