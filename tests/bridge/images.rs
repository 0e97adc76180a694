//! The images: one of each kind that imago and Blockhouse both write, made by QEMU, in two copies.

use std::path::{Path, PathBuf};
use std::process::Command;

use blockhouse_tests::{noise, qemu_img, run};

/// The end of the disk is not the end of a cluster.
const SIZE: u64 = (3 << 20) + 9 * 512;

pub(crate) struct Image {
    pub(crate) name: &'static str,
    pub(crate) format: &'static str,
    options: &'static str,
    /// The backing file is a qcow2 with compressed clusters.
    overlay: bool,
}

pub(crate) const IMAGES: &[Image] = &[
    Image { name: "raw", format: "raw", options: "", overlay: false },
    Image { name: "qcow2", format: "qcow2", options: "cluster_size=64k", overlay: false },
    Image { name: "small clusters", format: "qcow2", options: "cluster_size=4k", overlay: false },
    Image { name: "overlay", format: "qcow2", options: "cluster_size=64k", overlay: true },
    Image { name: "overlay of small clusters", format: "qcow2", options: "cluster_size=4k", overlay: true },
];

impl Image {
    /// Two images with the same content, and the content.
    pub(crate) fn make(&self, directory: &Path) -> (PathBuf, PathBuf, Vec<u8>) {
        let (native, sandboxed) = (directory.join("native"), directory.join("sandboxed"));
        let mut content = noise(7, SIZE as usize);
        content[1 << 20..2 << 20].fill(0);
        let raw = directory.join("raw");
        std::fs::write(&raw, &content).unwrap();
        let base = directory.join("base.qcow2");
        let create = ["create", "-q", "-f", self.format, "-o", self.options];
        if self.overlay {
            qemu_img(["convert", "-c", "-f", "raw", "-O", "qcow2"].map(Path::new).into_iter().chain([&*raw, &*base]));
            let name = base.to_str().unwrap();
            let of = ["-F", "qcow2", "-b", name];
            qemu_img(create.into_iter().chain(of).map(Path::new).chain([native.as_path()]));
            // Some of it is its own.
            let bytes = noise(8, 200_000);
            let piece = directory.join("piece");
            std::fs::write(&piece, &bytes[..512 * 300]).unwrap();
            content[2_097_152 + 1024..][..512 * 300].copy_from_slice(&bytes[..512 * 300]);
            let write = format!("write -s {} {} {}", piece.display(), 2_097_152 + 1024, 512 * 300);
            run(Command::new("qemu-io").args(["-f", "qcow2", "-c", &write]).arg(&native)).succeeded();
        } else if self.format == "raw" {
            std::fs::copy(&raw, &native).unwrap();
        } else {
            let convert = ["convert", "-f", "raw", "-O", self.format, "-o", self.options];
            qemu_img(convert.map(Path::new).into_iter().chain([&*raw, &*native]));
        }
        std::fs::copy(&native, &sandboxed).unwrap();
        (native, sandboxed, content)
    }

    /// The files that must not change.
    pub(crate) fn below(&self, directory: &Path) -> Vec<PathBuf> {
        if self.overlay { vec![directory.join("base.qcow2")] } else { Vec::new() }
    }
}
