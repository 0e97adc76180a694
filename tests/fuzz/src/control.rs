//! The lines of the control interface, from a client that may be anything.
//!
//! ```text
//!   input: disks │ bytes that come at a time │ bytes
//! ```
//!
//! Whatever it sends: each line is answered with a line of JSON, which is a result or an error and no longer than it
//! has to be; and a disk is asked to grow exactly if the line says so, that disk, to that size, once.

use std::cell::{Cell, RefCell};

use blockhouse_block::{Error, ErrorKind};
use serde::Serialize;
use serde_json::{Value, json};

use crate::included::control_line::{Controlled, MAX_LINE, Next, next};
use crate::say;

/// The first disk, in bytes. The second one has no room for more.
const CAPACITY: u64 = 1 << 20;

struct Disk<'a> {
    number: usize,
    capacity: Cell<u64>,
    /// Who was asked to grow, and to what.
    asked: &'a RefCell<Vec<(String, u64)>>,
}

impl Controlled for Disk<'_> {
    fn name(&self) -> String {
        format!("disk{}", self.number)
    }

    fn capacity(&self) -> u64 {
        self.capacity.get()
    }

    fn status(&self) -> impl Serialize {
        json!({ "disk": self.name(), "virtual_size_bytes": self.capacity() })
    }

    fn metrics(&self) -> impl Serialize {
        self.status()
    }

    fn grow(&self, size: u64) -> blockhouse_block::Result<bool> {
        self.asked.borrow_mut().push((self.name(), size));
        if self.number == 1 || size < self.capacity() {
            return Err(Error::new(ErrorKind::Storage, "no space left on device"));
        }
        self.capacity.set(size);
        Ok(size.is_multiple_of(3))
    }
}

pub(crate) fn run(data: &[u8]) {
    let [count, piece, bytes @ ..] = data else { return };
    let asked = RefCell::new(Vec::new());
    let disk = |number| Disk { number, capacity: Cell::new(CAPACITY << number), asked: &asked };
    let disks: Vec<Disk<'_>> = (0..usize::from(count % 4)).map(disk).collect();
    let mut pieces = bytes.chunks(usize::from(*piece) * 4 + 1);
    let mut received = Vec::new();
    loop {
        // As from a socket: no more than a line needs.
        while received.len() < MAX_LINE
            && !received.contains(&b'\n')
            && let Some(piece) = pieces.next()
        {
            received.extend_from_slice(piece);
        }
        let before = received.clone();
        let sizes: Vec<u64> = disks.iter().map(Disk::capacity).collect();
        asked.borrow_mut().clear();
        match next(&mut received, &disks).expect("every answer is JSON") {
            Next::Answer(answer) => {
                let end = before.iter().position(|byte| *byte == b'\n').expect("an answer to a line");
                let (line, rest) = before.split_at(end + 1);
                assert!(received == rest, "more than a line was taken, or less");
                judge(&line[..end], &answer, &disks, &sizes, &asked.borrow());
            }
            Next::Last(answer) => {
                // One may end behind that: it is too long all the same.
                let too_long = before.get(..MAX_LINE).is_some_and(|start| !start.contains(&b'\n'));
                assert!(too_long, "a line was not waited for");
                assert!(parsed(&answer).get("error").is_some(), "too long, and no error");
                assert!(asked.borrow().is_empty(), "a disk grows by half a line");
                return;
            }
            Next::Incomplete => {
                assert!(before.len() < MAX_LINE && !before.contains(&b'\n') && received == before, "a line is left");
                assert!(asked.borrow().is_empty(), "a disk grows by half a line");
                return;
            }
        }
    }
}

/// An answer: one line, which is a result or an error.
fn parsed(answer: &[u8]) -> Value {
    let line = answer.strip_suffix(b"\n").expect("an answer is a line");
    assert!(!line.contains(&b'\n'), "an answer of two lines");
    let value: Value = serde_json::from_slice(line).expect("an answer is JSON");
    let fields = value.as_object().expect("an answer is an object");
    assert!(fields.len() == 1 && (fields.contains_key("result") || fields.contains_key("error")), "{value}");
    if let Some(error) = fields.get("error") {
        assert!(!error["kind"].as_str().unwrap().is_empty() && !error["message"].as_str().unwrap().is_empty());
    }
    value
}

fn judge(line: &[u8], answer: &[u8], disks: &[Disk<'_>], sizes: &[u64], asked: &[(String, u64)]) {
    let value = parsed(answer);
    say!("{:?}: {value}", String::from_utf8_lossy(line));
    // A name that is none is repeated, in the worst case as escaped bytes.
    let most = 8 * line.len() + 1000 * (disks.len() + 1);
    assert!(answer.len() <= most, "{} bytes for a line of {}", answer.len(), line.len());
    let wanted = wanted(line).filter(|(name, _)| disks.iter().any(|disk| disk.name() == *name));
    match (asked, &wanted) {
        ([], None) => {}
        // The same key twice: what is wanted is not what JSON says, and it is refused.
        ([], Some((name, size))) => {
            assert!(!is_plain(line, name, *size) && value.get("error").is_some(), "{name} was not asked: {value}");
        }
        ([one], Some(wanted)) => assert_eq!(one, wanted),
        _ => panic!("{asked:?} were asked, and {wanted:?} was to be"),
    }
    for (disk, before) in disks.iter().zip(sizes) {
        let grew = disk.capacity() != *before;
        assert!(!grew || asked == [(disk.name(), disk.capacity())], "{} became {}", disk.name(), disk.capacity());
    }
    if let Some(result) = value["result"].as_object() {
        let [(name, size)] = asked else { panic!("nothing was asked, and {value}") };
        assert_eq!(result["disk"].as_str(), Some(name.as_str()));
        assert_eq!(result["virtual_size_bytes"].as_u64(), Some(*size));
    }
}

/// The disk that the line wants to grow, and to what, as JSON and the help have it.
fn wanted(line: &[u8]) -> Option<(String, u64)> {
    let value: Value = serde_json::from_slice(line).ok()?;
    let fields = value.as_object()?;
    if fields.len() != 3 || fields.get("command")?.as_str()? != "resize" {
        return None;
    }
    let size = fields.get("size")?.as_str()?;
    let (digits, unit) = match size.find(|c: char| !c.is_ascii_digit()) {
        None => (size, 1),
        Some(at) => {
            let shift = "KMGT".find(&size[at..].to_ascii_uppercase()).filter(|_| size.len() == at + 1)?;
            (&size[..at], 1 << (10 * (shift + 1)))
        }
    };
    let size = u64::try_from(digits.parse::<u128>().ok()?.checked_mul(unit)?).ok()?;
    Some((fields.get("disk")?.as_str()?.to_owned(), size))
}

/// Whether nothing can be said against the line.
fn is_plain(line: &[u8], name: &str, size: u64) -> bool {
    line == format!("{{\"command\":\"resize\",\"disk\":\"{name}\",\"size\":\"{size}\"}}").as_bytes()
}
