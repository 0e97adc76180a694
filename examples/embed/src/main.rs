//! The library from outside: open an untrusted overlay with its backing chain, read it, and show what
//! its components opened.
//!
//! ```text
//! cargo run -p blockhouse-embed -- QCOW2.wasm GRANTED-DIRECTORY OVERLAY.qcow2
//! ```

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use blockhouse_sandbox::block::{BlockBackend, VolatileSlice};
use blockhouse_sandbox::{Audit, AuditList, Formats, Grants, Limits, OpenRequest, Opener, Sandbox};

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [component, granted, overlay] = args.as_slice() else {
        bail!("usage: blockhouse-embed QCOW2.wasm GRANTED-DIRECTORY OVERLAY.qcow2");
    };

    // One sandbox for the process: an engine, and the limits that every component gets.
    let sandbox = Sandbox::new(Limits::default())?;

    // Which component serves which format: one from a file, the others built in.
    let mut formats = Formats::new();
    for builtin in blockhouse_formats::FORMATS {
        formats.add_bytes(builtin.format, builtin.format, builtin.bytes);
    }
    let qcow2 = sandbox.load_file(Path::new(component))?;
    println!("component {} ({} imported functions)", qcow2.digest(), qcow2.inspection().imports.len());
    formats.add("qcow2", qcow2);

    // What the overlay, and its backing files, may refer to: regular files below one directory.
    let grants = Grants::new().allow(granted)?;
    let events = Arc::new(AuditList::default());
    let opener = Opener::new(&sandbox, formats).grants(grants).audit(Audit::new().with(Arc::clone(&events) as Arc<_>));

    // The format is stated, never guessed. The image is opened read-only unless asked otherwise.
    let opened = opener.open(&OpenRequest::new(overlay, "qcow2"));
    for event in events.events() {
        println!("audit: {}: {event}", event.image);
    }
    let opened = opened?;
    for (depth, layer) in opened.report.layers.iter().enumerate() {
        println!("layer {depth}: {} ({}, {} bytes)", layer.image, layer.format, layer.virtual_size_bytes);
    }

    // The disk is what a virtio device, or anything else, reads from. Any number of threads may.
    let disk: &dyn BlockBackend = &opened.disk;
    let mut buffer = vec![0; 1 << 20];
    let mut sum: u64 = 0;
    let mut offset = 0;
    while offset < disk.capacity() {
        let length = usize::try_from(disk.capacity() - offset).unwrap_or(buffer.len()).min(buffer.len());
        let chunk = buffer.get_mut(..length).context("a chunk fits the buffer")?;
        disk.read(&[VolatileSlice::from(&mut *chunk)], offset)?;
        sum = chunk.iter().fold(sum, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)));
        offset += length as u64;
    }
    println!("read {offset} bytes, checksum {sum:016x}");
    Ok(())
}
