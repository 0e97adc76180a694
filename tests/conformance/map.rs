//! `blockhouse map --json` and `qemu-img map --output=json`: the same facts, cut into ranges differently.

use serde_json::Value;

use crate::content::Content;

/// A row of either map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) start: u64,
    pub(crate) length: u64,
    pub(crate) depth: u64,
    pub(crate) present: bool,
    pub(crate) zero: bool,
    pub(crate) data: bool,
    pub(crate) compressed: bool,
    pub(crate) offset: Option<u64>,
    /// Ours only: the file that `offset` is in.
    pub(crate) file: Option<String>,
}

impl Row {
    fn end(&self) -> u64 {
        self.start + self.length
    }
}

/// The rows, which must cover `size` bytes without gap or overlap.
pub(crate) fn parse(json: &str, size: u64) -> Result<Vec<Row>, String> {
    let rows: Vec<Value> = serde_json::from_str(json).map_err(|error| format!("{error}: {json}"))?;
    let mut parsed = Vec::new();
    let mut end = 0;
    for row in rows {
        let number = |key: &str| row[key].as_u64().ok_or_else(|| format!("no number {key:?} in {row}"));
        let flag = |key: &str| row[key].as_bool().ok_or_else(|| format!("no flag {key:?} in {row}"));
        let row = Row {
            start: number("start")?,
            length: number("length")?,
            depth: number("depth")?,
            present: flag("present")?,
            zero: flag("zero")?,
            data: flag("data")?,
            compressed: flag("compressed")?,
            offset: row["offset"].as_u64(),
            file: row["file"].as_str().map(str::to_owned),
        };
        if row.length == 0 && size == 0 {
            // QEMU has one row of nothing for a disk of nothing.
            continue;
        }
        if row.start != end || row.length == 0 {
            return Err(format!("the range after byte {end} is {row:?}"));
        }
        end = row.end();
        parsed.push(row);
    }
    if end == size { Ok(parsed) } else { Err(format!("the map ends at {end}, the disk at {size}")) }
}

/// Our map against the bytes of the disk: what it calls zero is zero, and where it says that data lies,
/// there it lies. Needs no second opinion.
pub(crate) fn tells_the_truth(ours: &[Row], content: &Content) -> Result<(), String> {
    for row in ours {
        let truth = match (row.data, row.compressed, row.zero, &row.file, row.offset) {
            (false, false, true, None, None) => match content.first_nonzero(row.start, row.length) {
                None => Ok(()),
                Some(at) => Err(format!("byte {:#x} is not zero", row.start + at)),
            },
            (true, true, false, None, None) => Ok(()),
            (true, false, false, Some(file), Some(offset)) => {
                let file = Content::open(file.as_ref());
                match content.first_difference(row.start, row.length, |done, to| file.read(offset + done, to)) {
                    None => Ok(()),
                    Some(difference) => Err(format!("at {:#x} of it, {difference}", row.start)),
                }
            }
            _ => Err("its flags contradict each other".to_owned()),
        };
        truth.map_err(|why| format!("blockhouse map says {row:?}: {why}"))?;
    }
    Ok(())
}

/// Our map against QEMU's, on each range that both have one answer for. Returns how many those are.
///
/// QEMU may know more zeroes than the format says, since it also asks the file system for holes.
pub(crate) fn agree(ours: &[Row], theirs: &[Row], content: &Content) -> Result<usize, String> {
    let (mut ours, mut theirs) = (ours.iter().peekable(), theirs.iter().peekable());
    let mut ranges = 0;
    while let (Some(our), Some(their)) = (ours.peek(), theirs.peek()) {
        let start = our.start.max(their.start);
        let end = our.end().min(their.end());
        judge(our, their, start, end, content)
            .map_err(|why| format!("map of {start:#x}..{end:#x}: {why}\n  ours {our:?}\n  QEMU {their:?}"))?;
        ranges += 1;
        if our.end() == end {
            ours.next();
        }
        // Advance the other one as well if it ends here.
        if their.end() == end {
            theirs.next();
        }
    }
    Ok(ranges)
}

fn judge(our: &Row, their: &Row, start: u64, end: u64, content: &Content) -> Result<(), &'static str> {
    let at = |row: &Row| row.offset.map(|offset| offset + (start - row.start));
    if their.data {
        return match () {
            () if !our.data => Err("QEMU has data"),
            () if our.depth != their.depth => Err("other layers"),
            () if our.compressed != their.compressed => Err("only one is compressed"),
            () if at(our) != at(their) => Err("other offsets"),
            () => Ok(()),
        };
    }
    if !their.zero {
        return Err("QEMU has neither data nor zeroes");
    }
    match () {
        () if our.data && our.compressed => Err("QEMU has zeroes"),
        // A preallocated zero cluster has an offset too, but no meaning: its bytes are not the disk's.
        () if our.data && (at(our) != at(their) || our.depth != their.depth) => Err("QEMU has zeroes elsewhere"),
        () if our.data && content.first_nonzero(start, end - start).is_some() => Err("QEMU has zeroes, the disk not"),
        () if our.data => Ok(()),
        () if our.present != their.present => Err("only one says that a layer has it"),
        () if our.present && our.depth != their.depth => Err("other layers"),
        () => Ok(()),
    }
}
