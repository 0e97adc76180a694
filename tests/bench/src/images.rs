//! The images of the benchmarks, all made by qemu-img.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

/// Size of the disks that are read and overwritten: small enough for the page cache.
pub(crate) const SIZE: u64 = 1 << 30;

pub(crate) fn qemu_img(arguments: &[&str]) -> Result<()> {
    let output = Command::new("qemu-img").args(arguments).stdin(Stdio::null()).output();
    let output = output.context("cannot start qemu-img: install qemu-utils")?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "qemu-img {} failed: {error}", arguments.join(" "));
    Ok(())
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path is not UTF-8")
}

/// A raw file of bytes that do not compress.
pub(crate) fn raw(directory: &Path, name: &str, size: u64) -> Result<PathBuf> {
    let path = directory.join(name);
    if path.exists() {
        return Ok(path);
    }
    let mut file = File::create(&path)?;
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut block = vec![0; 1 << 20];
    for _ in 0..size >> 20 {
        for word in block.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        write_in_pages(&mut file, &block)?;
    }
    Ok(path)
}

/// Writes to a file a page at a time. The page cache holds what is written at a time in one piece, where it can, and how
/// fast a file is depends on that: two files that are compared have to be held alike.
fn write_in_pages(file: &mut File, bytes: &[u8]) -> std::io::Result<()> {
    bytes.chunks(4096).try_for_each(|page| file.write_all(page))
}

/// A fully allocated qcow2 with the bytes of `raw`.
pub(crate) fn qcow2(directory: &Path, name: &str, raw: &Path, options: &[&str]) -> Result<PathBuf> {
    let path = directory.join(name);
    if !path.exists() {
        let made = path.with_extension("made");
        let convert = [&["convert", "-f", "raw", "-O", "qcow2"], options, &[text(raw)?, text(&made)?]].concat();
        qemu_img(&convert)?;
        let (mut from, mut to) = (File::open(&made)?, File::create(&path)?);
        let mut block = Vec::new();
        while (&mut from).take(1 << 20).read_to_end(&mut block)? > 0 {
            write_in_pages(&mut to, &block)?;
            block.clear();
        }
        std::fs::remove_file(&made)?;
    }
    Ok(path)
}

/// An empty qcow2.
pub(crate) fn empty(directory: &Path, name: &str, size: &str) -> Result<PathBuf> {
    let path = directory.join(name);
    let _ = std::fs::remove_file(&path);
    qemu_img(&["create", "-f", "qcow2", text(&path)?, size])?;
    Ok(path)
}

/// A chain of so many qcow2 layers over a full one, each empty: all that is read is at the bottom.
pub(crate) fn chain(directory: &Path, base: &Path, layers: usize) -> Result<PathBuf> {
    let mut below = base.to_owned();
    for layer in 1..layers {
        let path = directory.join(format!("layer-{layer}.qcow2"));
        if !path.exists() {
            qemu_img(&["create", "-f", "qcow2", "-b", text(&below)?, "-F", "qcow2", text(&path)?])?;
        }
        below = path;
    }
    Ok(below)
}

/// A full qcow2 whose clusters lie in random order in its file: each is an extent of its own.
pub(crate) fn fragmented(directory: &Path, name: &str, size: u64, step: u64) -> Result<PathBuf> {
    let path = directory.join(name);
    if path.exists() {
        return Ok(path);
    }
    empty(directory, name, &size.to_string())?;
    // Written by QEMU, a cluster at a time, in an order in which no two neighbours follow each other.
    let clusters = size / step;
    let mut script = String::new();
    let mut place = 0;
    for _ in 0..clusters {
        place = (place + clusters / 2 + 3) % clusters;
        script.push_str(&format!("write -q {} 512\n", place * step));
    }
    let mut child = Command::new("qemu-io")
        .args(["-f", "qcow2", "-t", "unsafe", text(&path)?])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .context("cannot start qemu-io: install qemu-utils")?;
    child.stdin.take().context("qemu-io has no input")?.write_all(script.as_bytes())?;
    ensure!(child.wait()?.success(), "qemu-io failed");
    Ok(path)
}

/// A large image whose clusters are all allocated, and in each L2 table in reverse: no two lie together. Its
/// data is a hole.
pub(crate) fn reversed(directory: &Path, name: &str, size: u64) -> Result<PathBuf> {
    let path = directory.join(name);
    if path.exists() {
        return Ok(path);
    }
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", text(&path)?, &size.to_string()])?;
    let file = File::options().read(true).write(true).open(&path)?;
    let word = |offset: u64| -> Result<u64> {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, offset)?;
        Ok(u64::from_be_bytes(bytes))
    };
    // The header of qcow2 (docs/interop/qcow2.txt): l1_size at 36, l1_table_offset at 40.
    let (entries, table) = (word(32)? & u64::from(u32::MAX), word(40)?);
    let mut l2 = vec![0; 64 << 10];
    for index in 0..entries {
        let offset = word(table + index * 8)? & 0x00ff_ffff_ffff_fe00;
        if offset != 0 {
            file.read_exact_at(&mut l2, offset)?;
            let reversed: Vec<u8> = l2.chunks_exact(8).rev().flatten().copied().collect();
            file.write_all_at(&reversed, offset)?;
        }
    }
    Ok(path)
}
