//! A directory with images, and what is asked of them.

use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use blockhouse_tests::{Outcome, blockhouse, noise, on_path, run, scratch, skip};
use serde_json::Value;
use tempfile::TempDir;

/// A directory with images. Names are relative to it.
pub(crate) struct Place(TempDir);

impl Place {
    /// None, and the test is counted as skipped, without QEMU's tools.
    #[track_caller]
    pub(crate) fn new() -> Option<Self> {
        for program in ["qemu-img", "qemu-io"] {
            if !on_path(program) {
                skip(format!("no {program}: install qemu-utils"));
                return None;
            }
        }
        Some(Self(scratch()))
    }

    pub(crate) fn root(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    pub(crate) fn exists(&self, name: &str) -> bool {
        self.path(name).symlink_metadata().is_ok()
    }

    /// The names of all files, sorted.
    pub(crate) fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.root()).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    pub(crate) fn bytes(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap()
    }

    /// Bytes that a file has on the file system, without its holes.
    pub(crate) fn space(&self, name: &str) -> u64 {
        std::fs::metadata(self.path(name)).unwrap().blocks() * 512
    }

    /// A raw file of `size` bytes with noise at `places` (offset, length), and holes between them.
    pub(crate) fn raw(&self, name: &str, size: u64, places: &[(u64, usize)]) {
        let file = std::fs::File::create(self.path(name)).unwrap();
        file.set_len(size).unwrap();
        for (offset, length) in places {
            file.write_all_at(&noise(*offset + size, *length), *offset).unwrap();
        }
    }

    /// The program under test here. Arguments are separated by blanks.
    pub(crate) fn command(&self, arguments: &str) -> Command {
        let mut command = blockhouse();
        command.current_dir(self.root()).args(arguments.split_whitespace());
        command
    }

    #[track_caller]
    pub(crate) fn run(&self, arguments: &str) -> Outcome {
        run(&mut self.command(arguments))
    }

    /// Runs the program, which succeeds.
    #[track_caller]
    pub(crate) fn ok(&self, arguments: &str) -> String {
        self.run(arguments).succeeded().text()
    }

    /// Runs the program, which prints one JSON value.
    #[track_caller]
    pub(crate) fn json(&self, arguments: &str) -> Value {
        serde_json::from_str(&self.ok(arguments)).unwrap()
    }

    /// Runs the program, which ends with this code and these words in its message.
    #[track_caller]
    pub(crate) fn ends(&self, arguments: &str, code: i32, words: &[&str]) {
        let outcome = self.run(arguments);
        assert_eq!(outcome.status.code(), Some(code), "{arguments}\n{}\n{}", outcome.text(), outcome.stderr);
        for word in words {
            assert!(outcome.stderr.contains(word), "{arguments}: no {word:?} in: {}", outcome.stderr);
        }
    }

    pub(crate) fn qemu(&self, program: &str, arguments: &str) -> Outcome {
        run(Command::new(program).args(arguments.split_whitespace()).current_dir(self.root()))
    }

    #[track_caller]
    pub(crate) fn qemu_img(&self, arguments: &str) -> String {
        self.qemu("qemu-img", arguments).succeeded().text()
    }

    /// Runs commands of `qemu-io` on an image.
    #[track_caller]
    pub(crate) fn qemu_io(&self, format: &str, image: &str, commands: &[&str]) {
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

    /// What `qemu-img info` says about an image.
    #[track_caller]
    pub(crate) fn info(&self, format: &str, image: &str) -> Value {
        serde_json::from_str(&self.qemu_img(&format!("info --output=json -f {format} {image}"))).unwrap()
    }

    /// What `qemu-img check` counts: corruptions and leaks.
    #[track_caller]
    pub(crate) fn wrong(&self, image: &str) -> (u64, u64) {
        let outcome = self.qemu("qemu-img", &format!("check --output=json -f qcow2 {image}"));
        let found: Value = serde_json::from_str(&outcome.text()).unwrap_or_else(|_| panic!("{}", outcome.stderr));
        assert_eq!(found["check-errors"], 0, "{found}");
        (found["corruptions"].as_u64().unwrap_or(0), found["leaks"].as_u64().unwrap_or(0))
    }

    /// Nothing is wrong with an image, not even a leak, says QEMU.
    #[track_caller]
    pub(crate) fn flawless(&self, image: &str) {
        assert_eq!(self.wrong(image), (0, 0), "{image}: {}", self.qemu("qemu-img", &format!("check {image}")).text());
    }

    /// Two disks have the same content, and the same size, says QEMU.
    #[track_caller]
    pub(crate) fn same(&self, (one_format, one): (&str, &str), (other_format, other): (&str, &str)) {
        let size = |format, image| self.info(format, image)["virtual-size"].clone();
        assert_eq!(size(one_format, one), size(other_format, other), "the sizes of {one} and {other}");
        let arguments = format!("compare -f {one_format} -F {other_format} {one} {other}");
        let outcome = self.qemu("qemu-img", &arguments);
        assert!(outcome.status.success(), "{arguments}: {}{}", outcome.text(), outcome.stderr);
    }

    /// QEMU's command `arguments` is run on the disk, and held until the guard is dropped: `qemu-io` with its
    /// prompt out has the image open.
    #[track_caller]
    pub(crate) fn in_use(&self, format: &str, image: &str, read_only: bool) -> InUse {
        let mut holder = Command::new("qemu-io");
        holder.args(["-f", format]).args(read_only.then_some("-r")).arg(image).current_dir(self.root());
        let mut holder = holder.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut prompt = [0; 8];
        holder.stdout.as_mut().unwrap().read_exact(&mut prompt).unwrap();
        InUse(holder)
    }
}

/// An image that QEMU has open.
pub(crate) struct InUse(Child);

impl Drop for InUse {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}
