//! The library from outside: open an untrusted overlay with its backing chain, read it, and show what
//! its components opened. With what stands around the `blockhouse` program, too: strangers' components are compiled in
//! a process of their own, and the kernel holds this one to the files that it needs.
//!
//! ```text
//! cargo run -p blockhouse-embed -- QCOW2.wasm GRANTED-DIRECTORY OVERLAY.qcow2
//! ```

use std::ffi::OsStr;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, bail};
use blockhouse_sandbox::block::{BlockBackend, VolatileSlice};
use blockhouse_sandbox::{
    Audit, AuditList, CompilerProcess, Formats, Grants, Limits, OpenRequest, Opener, Sandbox, serve_compiler,
};
use blockhouse_walls::{Plan, Role, Use, Walls};

/// What this program is started with to be a compiler.
const COMPILER: &str = "--compile-for-parent";

fn main() -> anyhow::Result<ExitCode> {
    // First of all: a process that compiles a stranger's component, and has no part in the rest.
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().as_deref() == Some(OsStr::new(COMPILER)) {
        return Ok(ExitCode::from(serve_compiler(arguments, || drop(Walls::confine_compiler()))));
    }
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [component, granted, overlay] = args.as_slice() else {
        bail!("usage: blockhouse-embed QCOW2.wasm GRANTED-DIRECTORY OVERLAY.qcow2");
    };

    // Without this, `load_file` compiles in this process, where nothing bounds time and memory. A process for each
    // component is started now: behind the walls, nobody starts any.
    let limits = Limits::default();
    // SAFETY: `main` begins with `serve_compiler` if it is started with this argument.
    let compilers = Arc::new(unsafe { CompilerProcess::this_program(COMPILER) });
    compilers.prepare(&limits)?;

    // Walls around the whole process: it opens these files and no others. What the kernel lacks is left out and said.
    // A VMM with a jail of its own leaves all calls of `walls` out, and has these paths in the jail.
    let mut plan = Plan::new();
    plan.add_at_first(component, Use::Read);
    plan.read(granted);
    plan.read(overlay);
    // What a component gets for a directory that is not granted.
    plan.read("/dev/null");
    let walls = Walls::raise(&plan);
    for missing in walls.missing() {
        eprintln!("a wall is missing: {missing}");
    }

    // One sandbox for the process: an engine, and the limits that every component gets.
    let sandbox = Sandbox::new(limits)?.compiler(Arc::clone(&compilers) as _);

    // Which component serves which format: one from a file, the others built in.
    let mut formats = Formats::new();
    for builtin in blockhouse_formats::FORMATS {
        formats.add_bytes(builtin.format, builtin.format, builtin.bytes);
    }
    let qcow2 = sandbox.load_file(Path::new(component))?;
    println!("component {} ({} imported functions)", qcow2.digest(), qcow2.inspection().imports.len());
    formats.add("qcow2", qcow2);

    // Strangers' components are loaded, and no image is open: what was for the beginning alone ends here.
    walls.narrow(&plan)?;

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
    // All is open and compiled: from here on no thread opens a file by name, or makes code.
    walls.seal(Role::Control)?;
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
    Ok(ExitCode::SUCCESS)
}
