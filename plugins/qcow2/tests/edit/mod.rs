//! What the tests of whole-image changes share: what an image shows, and what a power cut leaves of a change.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation)]

use std::path::Path;
use std::process::Command;

use blockhouse_plugin::testing::{Change, Disk, Storage};
use blockhouse_plugin::{Access, BackingReference, Result, Snapshots, Writer};
use blockhouse_qcow2::Qcow2;

use crate::support::{Lab, Random, torn};

pub const IMAGE: &str = "/images/top.qcow2";

/// Everything that an image shows: the disk, and each snapshot.
#[derive(Clone, PartialEq, Eq)]
pub struct View {
    pub backing: Option<BackingReference>,
    pub disk: Vec<u8>,
    /// Id, name, content.
    pub snapshots: Vec<(String, String, Vec<u8>)>,
}

/// Without the bytes.
impl std::fmt::Debug for View {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sum =
            |bytes: &[u8]| bytes.iter().fold(7u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)));
        write!(f, "disk {} {:x}", self.disk.len(), sum(&self.disk))?;
        for (id, name, content) in &self.snapshots {
            write!(f, ", {id} {name:?} {} {:x}", content.len(), sum(content))?;
        }
        write!(f, ", backing {:?}", self.backing)
    }
}

/// The bytes of a raw file, and zeroes past its end.
pub fn below(base: &[u8]) -> impl FnMut(u64, &mut [u8]) {
    move |offset, to| {
        for (number, byte) in to.iter_mut().enumerate() {
            *byte = base.get(offset as usize + number).copied().unwrap_or(0);
        }
    }
}

/// The image and the files that it may name as its backing file.
pub fn storage(image: &[u8], bases: &[(&str, &[u8])]) -> Storage {
    let storage = Storage::new();
    storage.insert(IMAGE, image);
    for (name, base) in bases {
        storage.insert(format!("/images/{name}"), *base);
    }
    storage
}

fn read(storage: &Storage, snapshot: Option<&str>) -> (Vec<u8>, Disk<Qcow2>) {
    let mut size = None;
    let mut disk = storage
        .disk_with::<Qcow2>(IMAGE, Access::ReadOnly, |qcow2| {
            size = snapshot.map(|id| qcow2.select_snapshot(id)).transpose()?;
            Ok(())
        })
        .expect("the image opens");
    let size = size.unwrap_or(disk.info.virtual_size);
    let base = disk.backing_bytes().unwrap_or_default();
    let mut content = vec![0xa5; size as usize];
    disk.read_over(size, 0, &mut content, &mut below(&base)).expect("the disk can be read");
    (content, disk)
}

/// What our reader sees.
pub fn view(image: &[u8], bases: &[(&str, &[u8])]) -> View {
    let storage = storage(image, bases);
    let (content, mut disk) = read(&storage, None);
    let snapshots = disk.format.list_snapshots().expect("the snapshots can be listed");
    let snapshots = snapshots
        .into_iter()
        .map(|snapshot| {
            let content = read(&storage, Some(&snapshot.id)).0;
            assert_eq!(content.len() as u64, snapshot.virtual_size);
            (snapshot.id, snapshot.name, content)
        })
        .collect();
    View { backing: disk.info.backing, disk: content, snapshots }
}

/// What QEMU sees of `top.qcow2`.
pub fn view_of_qemu(lab: &Lab) -> View {
    let info = info(lab);
    let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
    let backing = text(&info["backing-filename"])
        .map(|name| BackingReference { name, format: text(&info["backing-filename-format"]) });
    let disk = lab.oracle("top.qcow2", "");
    assert_eq!(info["virtual-size"].as_u64(), Some(disk.len() as u64));
    let none = Vec::new();
    let snapshots = info["snapshots"].as_array().unwrap_or(&none).iter().map(|snapshot| {
        let (id, name) = (text(&snapshot["id"]).unwrap(), text(&snapshot["name"]).unwrap());
        // Applied to a copy: `convert -l` would read it at the size that the disk has now.
        lab.write("copy.qcow2", &lab.bytes("top.qcow2"));
        lab.qemu_img(&format!("snapshot -a {id} copy.qcow2"));
        let content = lab.oracle("copy.qcow2", "");
        (id, name, content)
    });
    View { backing, disk, snapshots: snapshots.collect() }
}

fn json(directory: &Path, arguments: &[&str]) -> serde_json::Value {
    let output = Command::new("qemu-img").args(arguments).current_dir(directory).output().unwrap();
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("qemu-img {arguments:?}: {}", String::from_utf8_lossy(&output.stderr)))
}

/// `qemu-img info` of `top.qcow2`.
pub fn info(lab: &Lab) -> serde_json::Value {
    json(Path::new(&lab.path(".")), &["info", "-U", "--output=json", "top.qcow2"])
}

/// What `qemu-img check` finds in `top.qcow2`, if it finds anything.
pub fn flaws(directory: &Path) -> Option<String> {
    let found = json(directory, &["check", "-U", "-f", "qcow2", "--output=json", "top.qcow2"]);
    let number = |name: &str| found[name].as_u64().unwrap_or(0);
    let (corruptions, errors, leaks) = (number("corruptions"), number("check-errors"), number("leaks"));
    (corruptions + errors + leaks > 0).then(|| format!("{corruptions} corruptions, {errors} errors, {leaks} leaks"))
}

/// Changes `top.qcow2`, and writes it back also if it fails.
pub fn edit<T>(lab: &Lab, change: impl FnOnce(&mut Qcow2) -> Result<T>) -> Result<T> {
    let storage = Storage::new();
    storage.insert(IMAGE, lab.bytes("top.qcow2"));
    let mut qcow2 = storage.opened_image::<Qcow2>(IMAGE, Access::ReadWrite)?;
    let result = change(&mut qcow2);
    lab.write("top.qcow2", &storage.bytes(IMAGE));
    result
}

/// Writes to the disk of `top.qcow2` as a host does, over `base`.
pub fn write(lab: &Lab, base: &[u8], offset: u64, bytes: &[u8]) {
    let storage = storage(&lab.bytes("top.qcow2"), &[("base.raw", base)]);
    let mut disk = storage.disk_with::<Qcow2>(IMAGE, Access::ReadWrite, |_| Ok(())).unwrap();
    disk.format.begin().unwrap();
    let base = disk.backing_bytes().unwrap_or_default();
    disk.write_over(offset, bytes, &mut below(&base)).unwrap();
    disk.flush().unwrap();
    disk.format.finish().unwrap();
    lab.write("top.qcow2", &storage.bytes(IMAGE));
}

/// Makes a change, and looks at `states` of the states that a power cut in the middle of it could leave: each
/// is the old image or the new one, and without a flaw. Returns the image with the change.
pub fn cut(
    image: &[u8],
    bases: &[(&str, &[u8])],
    seed: u64,
    states: usize,
    change: impl FnOnce(&mut Qcow2) -> Result<()>,
) -> Vec<u8> {
    let storage = storage(image, bases);
    let mut qcow2 = storage.opened_image::<Qcow2>(IMAGE, Access::ReadWrite).unwrap();
    change(&mut qcow2).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    let changes = storage.take_changes(IMAGE);
    let new_image = storage.bytes(IMAGE);
    let (old, new) = (view(image, bases), view(&new_image, bases));
    let directory = tempfile::tempdir().unwrap();
    for (name, base) in bases {
        let path = directory.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, base).unwrap();
    }
    let mut random = Random(seed | 1 << 63);
    let syncs: Vec<usize> = (0..changes.len()).filter(|at| changes[*at] == Change::Sync).collect();
    for number in 0..states {
        // Right before a sync most can be missing.
        let at = match number % 3 {
            0 => random.below(changes.len() as u64 + 1) as usize,
            _ => syncs.get(random.below(syncs.len() as u64) as usize).copied().unwrap_or(0),
        };
        let bytes = torn(image, &changes[..at], &mut random);
        std::fs::write(directory.path().join("top.qcow2"), &bytes).unwrap();
        let context = || format!("seed {seed}, state {number}, cut at {at} of {}", changes.len());
        if let Some(flaws) = flaws(directory.path()) {
            panic!("{}: qemu-img check finds {flaws}", context());
        }
        let now = view(&bytes, bases);
        assert!(now == old || now == new, "{}: neither old nor new:\n{now:?}\n{old:?}\n{new:?}", context());
        if at == changes.len() && changes.last() == Some(&Change::Sync) {
            assert_eq!(now, new, "{}: it was durable", context());
        }
    }
    // Nothing that the change did is undone by a power cut after it.
    let at = changes.iter().rposition(|change| *change == Change::Sync).expect("a sync");
    let mut durable = image.to_vec();
    changes[..=at].iter().for_each(|change| change.apply(&mut durable));
    assert_eq!(view(&durable, bases), new, "seed {seed}: not durable");
    new_image
}
