//! One hostile disk beside three others of the same server: what the others' slowest requests become.
//!
//! ```text
//!   raw, qcow2, vmdk ◀── one read at a time, each in turn: how long? ── their client
//!   the fourth       ◀── all the time, and whatever becomes of it ───── its client
//! ```
//!
//! Each situation has a server of its own in each round, and is compared with the quiet one of the same round.
//! "quiet again" says how much of a ratio is chance.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::client::Client;
use crate::groups::Place;
use crate::images;
use crate::report::{Row, Samples};

/// Bytes of each disk.
const SIZE: u64 = 64 << 20;

/// What the fourth disk does.
const SITUATIONS: &[(&str, Hostile)] = &[
    ("quiet", Hostile::No),
    ("quiet again", Hostile::No),
    ("busy", Hostile::Told("ok")),
    ("component traps", Hostile::Told("trap-at-locate")),
    ("component stalls", Hostile::Told("loop-at-locate")),
    ("component lies", Hostile::Told("lie-wrap")),
    ("component floods the log", Hostile::Told("log-flood-at-locate")),
    ("image damaged", Hostile::Damaged),
];

#[derive(Clone, Copy)]
pub(crate) enum Hostile {
    /// Nobody asks it anything.
    No,
    /// The hostile component of the tests, with this first line of its image (`tests/hostile/component`).
    Told(&'static str),
    /// Compressed clusters that are none.
    Damaged,
}

/// A process, killed in the end.
pub(crate) struct Killed(pub(crate) Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The 99th percentile of the others' latency.
pub(crate) fn neighbours(place: &Place<'_>) -> Result<Vec<Row>> {
    let directory = place.directory.join("neighbours");
    let good = good(&directory)?;
    let names = SITUATIONS.iter().map(|(name, _)| *name);
    let mut samples = [
        Samples::new("read-4k-d1-p50".into(), "µs", names.clone()),
        Samples::new("read-4k-d1-p99".into(), "µs", names),
    ];
    for round in 0..=place.pace.rounds {
        let mut values = [Vec::new(), Vec::new()];
        for (name, hostile) in SITUATIONS {
            let [half, most] = measure(place, &directory, &good, *hostile, round)
                .with_context(|| format!("with the situation {name:?}"))?;
            values[0].push(half);
            values[1].push(most);
        }
        if round > 0 {
            samples.iter_mut().zip(&values).for_each(|(samples, values)| samples.add(values));
        }
    }
    samples.iter().for_each(|samples| eprintln!("   {}", samples.summary()));
    Ok(samples.iter().flat_map(|samples| samples.rows("neighbours", &["quiet"])).collect())
}

/// The three disks that keep to the rules.
pub(crate) fn good(directory: &Path) -> Result<[(PathBuf, &'static str); 3]> {
    std::fs::create_dir_all(directory)?;
    let raw = images::raw(directory, "good.raw", SIZE)?;
    let qcow2 = images::qcow2(directory, "good.qcow2", &raw, &[])?;
    let vmdk = directory.join("good.vmdk");
    let text = |path: &Path| path.to_str().map(str::to_owned).context("a path is not UTF-8");
    images::qemu_img(&["convert", "-f", "raw", "-O", "vmdk", &text(&raw)?, &text(&vmdk)?])?;
    Ok([(raw, "raw"), (qcow2, "qcow2"), (vmdk, "vmdk")])
}

/// The socket of a disk.
pub(crate) fn socket(directory: &Path, number: usize) -> PathBuf {
    directory.join(format!("{number}.sock"))
}

/// Serves the good disks, and a fourth one.
pub(crate) fn serve(place: &Place<'_>, directory: &Path, good: &[(PathBuf, &str)], hostile: Hostile) -> Result<Killed> {
    let component = std::env::var_os("BLOCKHOUSE_HOSTILE").context("BLOCKHOUSE_HOSTILE names no component")?;
    let (fourth, format) = match hostile {
        Hostile::Damaged => (damaged(directory)?, "qcow2"),
        Hostile::No => (told(directory, "ok")?, "hostile"),
        Hostile::Told(line) => (told(directory, line)?, "hostile"),
    };
    let mut command = Command::new(place.blockhouse);
    command.arg("serve").arg("--code-cache").arg(directory.join("code"));
    command.arg("--plugin").arg(format!("hostile={}", Path::new(&component).display()));
    let disks = good.iter().map(|(image, format)| (image.as_path(), *format)).chain([(fourth.as_path(), format)]);
    for (number, (image, format)) in disks.enumerate() {
        let socket = socket(directory, number);
        let _ = std::fs::remove_file(&socket);
        let (image, socket) = (image.display(), socket.display());
        command.arg("--disk").arg(format!("file={image},format={format},readonly=on,socket={socket}"));
    }
    let log = std::fs::File::create(directory.join("log"))?;
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().context("cannot start")?;
    Ok(Killed(child))
}

/// One situation in one round: the 50th and the 99th percentile in microseconds.
fn measure(
    place: &Place<'_>,
    directory: &Path,
    good: &[(PathBuf, &str)],
    hostile: Hostile,
    round: usize,
) -> Result<[f64; 2]> {
    let _server = serve(place, directory, good, hostile)?;
    let socket = |number| socket(directory, number);
    let mut clients = (0..good.len()).map(|number| Client::connect(&socket(number), 1)).collect::<Result<Vec<_>>>()?;
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        if !matches!(hostile, Hostile::No) {
            let (over, path) = (&over, socket(good.len()));
            scope.spawn(move || {
                // What it is answered is its own affair.
                let Ok(mut client) = Client::connect(&path, 1) else { return };
                let mut offset = 0;
                while !over.load(Ordering::Relaxed) && client.wait_for(offset % SIZE, over).is_ok() {
                    offset += 64 << 10;
                }
            });
        }
        let measured = latencies(place, &mut clients, round);
        over.store(true, Ordering::Relaxed);
        measured
    })
}

/// Reads of each disk in turn, one at a time.
fn latencies(place: &Place<'_>, clients: &mut [Client], round: usize) -> Result<[f64; 2]> {
    let mut random = (round as u64) << 32 | 1;
    let mut all = Vec::new();
    let begun = Instant::now();
    let never = AtomicBool::new(false);
    while begun.elapsed() < place.pace.round {
        for client in clients.iter_mut() {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let offset = ((random >> 33) % (SIZE >> 12)) << 12;
            let asked = Instant::now();
            ensure!(client.wait_for(offset, &never)?, "a request of another disk failed");
            all.push(asked.elapsed());
        }
    }
    all.sort_unstable();
    let at = |hundredths: usize| -> Result<f64> {
        let value: Duration = *all.get(all.len() * hundredths / 100).context("nothing was read")?;
        Ok(value.as_secs_f64() * 1e6)
    };
    Ok([at(50)?, at(99)?])
}

/// An image that tells the hostile component what to do.
fn told(directory: &Path, line: &str) -> Result<PathBuf> {
    let image = directory.join("fourth.img");
    std::fs::write(&image, format!("{line}\n"))?;
    std::fs::File::options().write(true).open(&image)?.set_len(SIZE)?;
    Ok(image)
}

/// A qcow2 image of compressed clusters of which none can be unpacked.
fn damaged(directory: &Path) -> Result<PathBuf> {
    let image = directory.join("fourth.qcow2");
    if !image.exists() {
        let text = directory.join("text.raw");
        std::fs::write(&text, b"text ".repeat(usize::try_from(SIZE)? / 5))?;
        images::qcow2(directory, "fourth.qcow2", &text, &["-c"])?;
        let mut bytes = std::fs::read(&image)?;
        // Header, refcounts and tables have the first five clusters.
        bytes.iter_mut().skip(5 << 16).for_each(|byte| *byte ^= 0x55);
        std::fs::write(&image, bytes)?;
    }
    Ok(image)
}
