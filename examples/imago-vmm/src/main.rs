//! A VMM's block device built on imago, opening its images natively or in a sandbox: `open.rs` has both side
//! by side, and `device.rs`, which does the work, cannot tell them apart.
//!
//! ```text
//! cargo run -p blockhouse-imago-vmm -- native    FORMAT IMAGE ro|rw REQUESTS
//! cargo run -p blockhouse-imago-vmm -- sandboxed FORMAT IMAGE ro|rw REQUESTS [GRANTED-DIRECTORY [COMPONENT]]
//! ```
//!
//! REQUESTS is a file with one request a line, as `device.rs` names them; the answers are printed.

mod device;
mod open;

use std::path::Path;

use anyhow::{Context, bail};
use blockhouse_sandbox::{Formats, Grants, Limits, Opener, Sandbox};

use crate::device::{Block, Order};

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (way, format, image, mode, requests, sandbox) = match args.as_slice() {
        [way, format, image, mode, requests, sandbox @ ..] if sandbox.len() <= 2 => {
            (way.as_str(), format, Path::new(image), mode.as_str(), requests, sandbox)
        }
        _ => bail!(
            "usage: blockhouse-imago-vmm native|sandboxed FORMAT IMAGE ro|rw REQUESTS [GRANTED-DIRECTORY [COMPONENT]]"
        ),
    };
    let writable = match mode {
        "ro" => false,
        "rw" => true,
        other => bail!("neither ro nor rw: {other}"),
    };
    let disk = match way {
        "native" => open::native(image, format, writable)?,
        "sandboxed" => open::sandboxed(&opener(format, sandbox)?, image, format, writable)?,
        other => bail!("neither native nor sandboxed: {other}"),
    };

    let device = Block::new(disk)?;
    println!("{} sectors", device.sectors());
    let requests = std::fs::read_to_string(requests).with_context(|| format!("cannot read {requests}"))?;
    for line in requests.lines() {
        match device.process(Order::parse(line)?) {
            Ok(None) => println!("ok"),
            Ok(Some(checksum)) => println!("ok {checksum:016x}"),
            // A guest would see VIRTIO_BLK_S_IOERR.
            Err(error) => println!("error {:?}: {error}", error.kind()),
        }
    }
    Ok(())
}

/// Opens images in a sandbox, with the built-in formats, or with another component for this one.
fn opener(format: &str, arguments: &[String]) -> anyhow::Result<Opener> {
    let sandbox = Sandbox::new(Limits::default())?;
    let mut formats = Formats::new();
    for builtin in blockhouse_formats::FORMATS {
        formats.add_bytes(builtin.format, builtin.format, builtin.bytes);
    }
    let mut grants = Grants::new();
    if let [directory, component @ ..] = arguments {
        grants = grants.allow(directory)?;
        if let [component] = component {
            formats.add(format, sandbox.load_file(Path::new(component))?);
        }
    }
    Ok(Opener::new(&sandbox, formats).grants(grants))
}
