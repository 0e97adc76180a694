//! Where the images of one case are made: a scratch directory, qemu-img, qemu-io, and a pen that draws
//! on disks.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use blockhouse_tests::{noise, run, scratch};
use tempfile::TempDir;

/// A directory with images. Paths are relative to it.
pub(crate) struct Lab {
    directory: TempDir,
}

impl Lab {
    pub(crate) fn new() -> Self {
        Self { directory: scratch() }
    }

    pub(crate) fn root(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    /// The absolute path, for command lines and references.
    pub(crate) fn absolute(&self, name: &str) -> String {
        self.path(name).to_str().expect("scratch paths are UTF-8").to_owned()
    }

    /// Leaves the directory where it is, for a look at a failure.
    pub(crate) fn keep(self) -> PathBuf {
        self.directory.keep()
    }

    pub(crate) fn directory(&self, name: &str) {
        std::fs::create_dir_all(self.path(name)).unwrap();
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path(name), bytes).unwrap();
    }

    /// A raw file of `size` bytes with noise at `places` (offset, length), and holes between them.
    pub(crate) fn raw(&self, name: &str, size: u64, places: &[(u64, usize)]) {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::create(self.path(name)).unwrap();
        file.set_len(size).unwrap();
        for (offset, length) in places {
            file.write_all_at(&noise(*offset + size, *length), *offset).unwrap();
        }
    }

    /// Overwrites bytes of a file, as an attacker or a bad disk would.
    pub(crate) fn poke(&self, name: &str, offset: u64, bytes: &[u8]) {
        use std::os::unix::fs::FileExt;
        std::fs::File::options().write(true).open(self.path(name)).unwrap().write_all_at(bytes, offset).unwrap();
    }

    /// Runs `qemu-img` here. Arguments are separated by blanks.
    #[track_caller]
    pub(crate) fn qemu_img(&self, arguments: &str) -> String {
        run(Command::new("qemu-img").args(arguments.split_whitespace()).current_dir(self.root())).succeeded().text()
    }

    /// Runs commands of `qemu-io` on an image.
    #[track_caller]
    pub(crate) fn qemu_io(&self, format: &str, image: &str, commands: &[String]) {
        let mut qemu_io = Command::new("qemu-io");
        qemu_io.args(["-t", "unsafe", "-d", "unmap", "-f", format]).current_dir(self.root());
        for command in commands {
            qemu_io.args(["-c", command]);
        }
        let outcome = run(qemu_io.arg(image)).succeeded();
        // qemu-io ends well whatever became of its commands.
        let complaint = ["failed", "error", "nvalid", "not "].iter().find(|word| outcome.text().contains(**word));
        assert!(complaint.is_none() && outcome.stderr.is_empty(), "qemu-io: {}{}", outcome.text(), outcome.stderr);
    }
}

/// Draws on an image: the same strokes for the same seed.
pub(crate) struct Pen<'l> {
    lab: &'l Lab,
    format: &'static str,
    image: String,
    size: u64,
    cluster: u64,
    state: u64,
    /// Clusters that a stroke touched. QEMU compresses into free ones only.
    touched: BTreeSet<u64>,
    commands: Vec<String>,
}

impl<'l> Pen<'l> {
    /// A pen for a disk of `size` bytes whose format allocates `cluster` bytes at a time.
    pub(crate) fn new(lab: &'l Lab, format: &'static str, image: &str, size: u64, cluster: u64) -> Self {
        assert!(cluster >= 512 && cluster.is_power_of_two());
        let image = image.to_owned();
        let state = size ^ cluster.rotate_left(40);
        Self { lab, format, image, size, cluster, state, touched: BTreeSet::new(), commands: Vec::new() }
    }

    /// A number below `limit`, which is not 0.
    fn draw(&mut self, limit: u64) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let bytes = noise(self.state, 8);
        u64::from_le_bytes(bytes.try_into().unwrap()) % limit.max(1)
    }

    /// A range of whole sectors inside the disk, at most `longest` bytes.
    fn range(&mut self, longest: u64) -> (u64, u64) {
        let sectors = self.size / 512;
        let start = self.draw(sectors);
        let length = 1 + self.draw((longest / 512).min(sectors - start));
        (start * 512, length.min(sectors - start) * 512)
    }

    /// A range of one to three whole clusters, or the last partial one.
    fn clusters(&mut self) -> (u64, u64) {
        let count = self.size.div_ceil(self.cluster);
        let start = self.draw(count) * self.cluster;
        let length = (1 + self.draw(3)) * self.cluster;
        (start, length.min(self.size - start))
    }

    /// Notes that a range is in use. False if a part of it was before.
    fn touch(&mut self, offset: u64, length: u64) -> bool {
        let clusters: BTreeSet<u64> = (offset / self.cluster..(offset + length).div_ceil(self.cluster)).collect();
        let free = self.touched.is_disjoint(&clusters);
        self.touched.extend(clusters);
        free
    }

    fn material(&mut self, bytes: &[u8]) -> String {
        let name = format!("material-{}", self.draw(u64::MAX));
        self.lab.write(&name, bytes);
        name
    }

    /// Noise at a place.
    pub(crate) fn fill(mut self, offset: u64, length: u64) -> Self {
        if length > 0 {
            self.touch(offset, length);
            let bytes = noise(self.state, usize::try_from(length).unwrap());
            let name = self.material(&bytes);
            self.commands.push(format!("write -q -s {name} {offset} {length}"));
        }
        self
    }

    /// Noise all over.
    pub(crate) fn full(self) -> Self {
        let size = self.size;
        self.fill(0, size)
    }

    /// Noise in the last sectors.
    pub(crate) fn tail(self) -> Self {
        let length = (self.cluster + 512).min(self.size);
        let offset = self.size - length;
        self.fill(offset, length)
    }

    /// Small writes all over the place.
    pub(crate) fn scattered(mut self, times: u32) -> Self {
        for _ in 0..times {
            let (offset, length) = self.range((self.cluster + 1024).min(192 << 10));
            self = self.fill(offset, length);
        }
        self
    }

    /// Zeroes: of any alignment, with and without unmapping.
    pub(crate) fn zeroes(mut self, times: u32) -> Self {
        for turn in 0..times {
            let (offset, length) = if turn % 3 == 0 { self.range(self.cluster * 2) } else { self.clusters() };
            self.touch(offset, length);
            let unmap = if turn % 2 == 0 { "-u " } else { "" };
            self.commands.push(format!("write -q -z {unmap}{offset} {length}"));
        }
        self
    }

    /// Clusters given back.
    pub(crate) fn discards(mut self, times: u32) -> Self {
        for _ in 0..times {
            let (offset, length) = self.clusters();
            self.commands.push(format!("discard -q {offset} {length}"));
        }
        self
    }

    /// Clusters that are compressed, where there is room: text, one repeated byte, zeroes. On fresh
    /// images, since room is what this pen did not touch.
    pub(crate) fn packed(mut self, times: u32) -> Self {
        for turn in 0..times {
            let (offset, length) = self.clusters();
            if !self.touch(offset, length) {
                continue;
            }
            if turn % 4 == 3 {
                let byte = self.draw(2);
                self.commands.push(format!("write -q -c -P {byte} {offset} {length}"));
            } else {
                let bytes = letters(self.state, usize::try_from(length).unwrap());
                let name = self.material(&bytes);
                self.commands.push(format!("write -q -c -s {name} {offset} {length}"));
            }
        }
        self
    }

    /// Some of everything but compression.
    pub(crate) fn everything(self) -> Self {
        self.scattered(12).zeroes(6).discards(3).scattered(6).tail()
    }

    /// Compressed clusters, and all that can happen to them afterwards.
    pub(crate) fn everything_packed(self) -> Self {
        self.packed(16).zeroes(3).discards(2).scattered(4).packed(3)
    }

    /// Applies the strokes.
    pub(crate) fn done(self) {
        self.lab.qemu_io(self.format, &self.image, &self.commands);
    }
}

/// Bytes that compress to about a half, and differ for each seed.
pub(crate) fn letters(seed: u64, length: usize) -> Vec<u8> {
    noise(seed, length).into_iter().map(|byte| b'a' + (byte & 15)).collect()
}
