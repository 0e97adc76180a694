//! A long run: whether a server that works, is attacked and is left by its front ends stays as it was.
//!
//! ```text
//!   one server that lives for the whole run          servers that live for 20 s, one after the other
//!     raw, qcow2, overlay on qcow2, vmdk      ◀── verified reads and writes ──▶  raw, overlay
//!     twelve disks whose components trap             ended by SIGTERM and SIGKILL in turn
//!            │                                              │
//!            └── memory, descriptors, threads: samples ─────┘ one at the end of each life
//! ```
//!
//! Front ends come and go all the time. At the end, the median of the first quarter of the samples, without the
//! warm-up, is compared with that of the last.
//!
//! | file | what it holds |
//! |---|---|
//! | `work.rs` | what the front ends do |
//! | `samples.rs` | what is measured, and how it is judged and drawn |
// A run that cannot go on has nothing better to do than to say so and end.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_precision_loss
)]

mod samples;
mod work;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use blockhouse_tests::serve::Serve;
use blockhouse_tests::{blockhouse, component, noise, qemu_img};
use clap::Parser;

use crate::samples::{Sample, Series};
use crate::work::{Counts, Disk};

/// Disks whose components trap.
const TRAPS: usize = 12;
/// How long one of the short-lived servers lives.
const LIFE: Duration = Duration::from_secs(20);
/// How long a front end stays.
const STAY: Duration = Duration::from_secs(15);
/// Bytes of each disk that is verified.
const SIZE: usize = 32 << 20;

/// Run disks under work, traps and restarts, and see that the server stays as large as it was.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// How long.
    #[arg(long, value_name = "N", default_value = "60")]
    minutes: f64,
    /// Draw memory, descriptors and threads over time to FILE.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Write all samples to FILE as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where the images are made.
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
}

fn main() {
    let arguments = Arguments::parse();
    let scratch = match &arguments.directory {
        Some(directory) => tempfile::tempdir_in(directory).unwrap(),
        None => blockhouse_tests::scratch(),
    };
    let directory = scratch.path();
    let length = Duration::from_secs_f64(arguments.minutes * 60.0);
    let counts = Counts::default();
    let over = AtomicBool::new(false);
    let begun = Instant::now();
    let server = Steady::start(&directory.join("steady"));
    let (steady, short) = std::thread::scope(|scope| {
        let short = directory.join("short");
        let server = &server;
        let (counts, over) = (&counts, &over);
        // A thread that fails ends the others.
        let guard = move |work: &dyn Fn()| {
            struct End<'a>(&'a AtomicBool);
            impl Drop for End<'_> {
                fn drop(&mut self) {
                    self.0.store(true, Ordering::Relaxed);
                }
            }
            let end = End(over);
            work();
            std::mem::forget(end);
        };
        let short = scope.spawn(move || short_lives(&short, counts, over, begun));
        for disk in &server.disks {
            scope.spawn(move || guard(&|| work::keep_writing(disk, STAY, counts, over)));
        }
        for (number, socket) in server.traps.iter().enumerate() {
            scope.spawn(move || guard(&|| work::keep_trapping(number, socket, counts, over)));
        }
        let every = (length / 60).clamp(Duration::from_secs(1), Duration::from_secs(60));
        let mut series = Series::new("one server all the time");
        while begun.elapsed() < length && !over.load(Ordering::Relaxed) {
            std::thread::sleep(every);
            let sample = Sample::of(server.process.id(), begun.elapsed());
            eprintln!("{}: {}", sample, counts);
            series.samples.push(sample);
        }
        over.store(true, Ordering::Relaxed);
        (series, short.join().unwrap())
    });
    server.process.terminate();
    let all = [steady, short];
    let flat = all.iter().all(Series::is_flat);
    for series in &all {
        println!("{series}");
    }
    println!(
        "soak: {:.1} minutes, {counts}; {}",
        begun.elapsed().as_secs_f64() / 60.0,
        if flat { "flat" } else { "NOT flat" }
    );
    if let Some(file) = &arguments.json {
        samples::json(&all, &counts, file);
    }
    if let Some(file) = &arguments.svg {
        samples::svg(&all, file);
    }
    assert!(flat, "the server grew");
}

/// The server that lives for the whole run.
struct Steady {
    process: Serve,
    disks: Vec<Disk>,
    traps: Vec<PathBuf>,
}

impl Steady {
    fn start(directory: &Path) -> Self {
        std::fs::create_dir(directory).unwrap();
        let mut command = blockhouse();
        command.args(["serve", "--code-cache"]).arg(directory.join("code"));
        command.arg("--plugin").arg(format!("hostile={}", component("hostile").display()));
        let disks = vec![
            Disk::raw(directory, "raw"),
            Disk::qcow2(directory, "qcow2"),
            Disk::overlay(directory, "overlay"),
            Disk::vmdk(directory, "vmdk"),
        ];
        for disk in &disks {
            command.arg("--disk").arg(&disk.fields);
        }
        let mut traps = Vec::new();
        for number in 0..TRAPS {
            let image = directory.join(format!("trap-{number}.img"));
            std::fs::write(&image, b"trap-at-locate 2\n").unwrap();
            std::fs::File::options().write(true).open(&image).unwrap().set_len(work::TRAP_SIZE).unwrap();
            let socket = image.with_extension("sock");
            command.arg("--disk").arg(format!(
                "file={},format=hostile,readonly=on,socket={}",
                image.display(),
                socket.display()
            ));
            traps.push(socket);
        }
        let process = Serve::start(&mut command, &directory.join("log"));
        Self { process, disks, traps }
    }
}

/// One server after the other, over the same images.
fn short_lives(directory: &Path, counts: &Counts, over: &AtomicBool, begun: Instant) -> Series {
    std::fs::create_dir(directory).unwrap();
    let disks = [Disk::raw(directory, "raw"), Disk::overlay(directory, "overlay")];
    let mut series = Series::new("each of the short-lived servers, at its end");
    let mut life = 0_u64;
    while !over.load(Ordering::Relaxed) {
        let mut command = blockhouse();
        command.args(["serve", "--code-cache"]).arg(directory.join("code"));
        for disk in &disks {
            command.arg("--disk").arg(&disk.fields);
        }
        let server = Serve::start(&mut command, &directory.join("log"));
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for disk in &disks {
                let ended = &ended;
                scope.spawn(move || work::keep_writing(disk, STAY / 4, counts, ended));
            }
            let started = Instant::now();
            while started.elapsed() < LIFE && !over.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(100));
            }
            series.samples.push(Sample::of(server.id(), begun.elapsed()));
            ended.store(true, Ordering::Relaxed);
        });
        // Everything was flushed.
        if life.is_multiple_of(2) {
            server.terminate()
        } else {
            server.kill()
        }
        counts.restarts.fetch_add(1, Ordering::Relaxed);
        life += 1;
    }
    series
}

/// Makes an image of bytes that show when they end up in the wrong place.
fn content(directory: &Path, name: &str) -> (PathBuf, Vec<u8>) {
    let path = directory.join(format!("{name}.content"));
    let bytes = noise(name.len() as u64, SIZE);
    std::fs::write(&path, &bytes).unwrap();
    (path, bytes)
}

impl Disk {
    fn new(directory: &Path, name: &str, format: &str, more: &str, content: Vec<u8>) -> Self {
        let (image, socket) = (directory.join(format!("{name}.{format}")), directory.join(format!("{name}.sock")));
        let fields = format!("file={},format={format},socket={}{more}", image.display(), socket.display());
        Self::with(fields, socket, content, !more.contains("readonly"))
    }

    fn raw(directory: &Path, name: &str) -> Self {
        let (file, bytes) = content(directory, name);
        std::fs::rename(file, directory.join(format!("{name}.raw"))).unwrap();
        Self::new(directory, name, "raw", "", bytes)
    }

    fn qcow2(directory: &Path, name: &str) -> Self {
        let (file, bytes) = content(directory, name);
        let image = directory.join(format!("{name}.qcow2"));
        convert(&file, &image, "qcow2");
        Self::new(directory, name, "qcow2", "", bytes)
    }

    fn overlay(directory: &Path, name: &str) -> Self {
        let (file, bytes) = content(directory, name);
        let (base, image) = (directory.join(format!("{name}-base.qcow2")), directory.join(format!("{name}.qcow2")));
        convert(&file, &base, "qcow2");
        let create = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"].map(AsRef::as_ref);
        qemu_img(create.into_iter().chain([base.as_os_str(), image.as_os_str()]));
        Self::new(directory, name, "qcow2", &format!(",allow={}", base.display()), bytes)
    }

    fn vmdk(directory: &Path, name: &str) -> Self {
        let (file, bytes) = content(directory, name);
        convert(&file, &directory.join(format!("{name}.vmdk")), "vmdk");
        Self::new(directory, name, "vmdk", ",readonly=on", bytes)
    }
}

fn convert(from: &Path, to: &Path, format: &str) {
    let arguments = ["convert", "-f", "raw", "-O", format].map(AsRef::as_ref);
    qemu_img(arguments.into_iter().chain([from.as_os_str(), to.as_os_str()]));
}
