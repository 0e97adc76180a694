//! A disk for guests: ext4 in a qcow2 overlay over a qcow2 base.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use blockhouse_tests::guest::pieces::installed;
use blockhouse_tests::{noise, qemu_img, run, sha256};

/// Size of the file system.
const SIZE: &str = "48M";

/// An overlay, its base, and what a guest must find.
pub(crate) struct Chain {
    /// `images/overlay.qcow2`, whose backing file is `../golden/base.qcow2`.
    pub(crate) overlay: PathBuf,
    /// `golden/base.qcow2`.
    pub(crate) base: PathBuf,
    /// The same content, raw.
    raw: PathBuf,
    files: BTreeMap<&'static str, Vec<u8>>,
}

impl Chain {
    /// Makes the files in `directory`, or says what is missing for it.
    pub(crate) fn make(directory: &Path) -> Result<Self, String> {
        let mke2fs = installed("mke2fs", "e2fsprogs")?;
        let images = directory.join("images");
        let golden = directory.join("golden");
        for directory in [&images, &golden] {
            std::fs::create_dir_all(directory).unwrap();
        }

        let before = BTreeMap::from([
            ("os/kernel", noise(1, 5 << 20)),
            ("os/library", noise(2, (1 << 20) + 4097)),
            ("etc/configuration", b"color = red\n".to_vec()),
            ("empty", Vec::new()),
        ]);
        let mut after = before.clone();
        after.insert("etc/configuration", b"color = blue\n".to_vec());
        after.insert("home/report", noise(3, 3 << 20));
        after.insert("home/one sector", noise(4, 512));

        let base_raw = directory.join("base.raw");
        let raw = directory.join("disk.raw");
        make_ext4(&mke2fs, &directory.join("before"), &before, &base_raw);
        make_ext4(&mke2fs, &directory.join("after"), &after, &raw);
        let base = golden.join("base.qcow2");
        let overlay = images.join("overlay.qcow2");
        qemu_img(["convert".as_ref(), "-O".as_ref(), "qcow2".as_ref(), base_raw.as_os_str(), base.as_os_str()]);
        // An overlay without content of its own, moved to another base, gets what differs.
        let in_images = |arguments: &str| {
            run(Command::new("qemu-img").current_dir(&images).args(arguments.split(' '))).succeeded();
        };
        in_images("create -q -f qcow2 -b ../disk.raw -F raw overlay.qcow2");
        in_images("rebase -b ../golden/base.qcow2 -F qcow2 overlay.qcow2");

        // A chain of which only one layer holds data would show nothing.
        let map = qemu_img(["map".as_ref(), "--output=json".as_ref(), overlay.as_os_str()]);
        for depth in [0, 1] {
            let held = map.lines().any(|line| line.contains(&format!("\"depth\": {depth},")) && has_data(line));
            assert!(held, "layer {depth} of the chain holds no data:\n{map}");
        }
        Ok(Self { overlay, base, raw, files: after })
    }

    /// Lines of `sha256sum`, sorted: what the guest must print.
    pub(crate) fn digests(&self) -> Vec<String> {
        let mut lines: Vec<String> =
            self.files.iter().map(|(name, content)| format!("{}  ./{name}", sha256(content))).collect();
        lines.sort_unstable();
        lines
    }

    /// sha256 of the whole disk.
    pub(crate) fn digest(&self) -> String {
        sha256(&std::fs::read(&self.raw).unwrap())
    }
}

fn has_data(line: &str) -> bool {
    line.contains("\"data\": true")
}

/// An ext4 file system in a file, without mounting anything. Fixed identifiers and times
/// keep two of them equal where their content is.
fn make_ext4(mke2fs: &Path, tree: &Path, files: &BTreeMap<&str, Vec<u8>>, image: &Path) {
    for (name, content) in files {
        let file = tree.join(name);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(&file, content).unwrap();
    }
    let identifier = "5f9c1f3e-0b0e-4f7e-9a52-6f2a1f6f3c11";
    run(Command::new(mke2fs)
        .env("E2FSPROGS_FAKE_TIME", "1700000000")
        .args(["-q", "-t", "ext4", "-b", "4096", "-L", "chain", "-U", identifier])
        .args(["-E", &format!("hash_seed={identifier},root_owner=0:0"), "-d"])
        .args([tree.as_os_str(), image.as_os_str(), SIZE.as_ref()]))
    .succeeded();
}
