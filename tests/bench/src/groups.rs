//! What is compared with what.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::Pace;
use crate::images::{self, SIZE};
use crate::inside::{Bare, Native, Sandboxed};
use crate::instructions::instructions;
use crate::neighbours::neighbours;
use crate::report::{Row, Samples};
use crate::servers::{self, Served};
use crate::vm::vm;
use crate::workload::{Kind, System, Workload};

/// Where, with what, and how long.
pub(crate) struct Place<'a> {
    pub(crate) directory: &'a Path,
    pub(crate) blockhouse: &'a Path,
    pub(crate) pace: Pace,
    /// What takes long is left out.
    pub(crate) quick: bool,
    /// What the name of a workload must contain.
    pub(crate) workload: &'a str,
}

type Group = fn(&Place<'_>) -> Result<Vec<Row>>;

/// All groups by name.
pub(crate) const ALL: &[(&str, Group)] = &[
    ("inside", inside),
    ("instructions", instructions),
    ("served", served),
    ("queues", queues),
    ("chains", chains),
    ("fragmented", fragmented),
    ("compressed", compressed),
    ("allocate", allocate),
    ("sizes", sizes),
    ("cold", cold),
    ("memory", memory),
    ("neighbours", neighbours),
    ("vm", vm),
];

/// Bytes of a request of a pass over everything.
const PASS: usize = 256 << 10;

const READ: Workload = Workload::new(Kind::Read, true, 4096, 32);

/// Runs a workload on each system in turn, round after round. One pass over all that it may touch comes before, so
/// that the host has the pages and each system knows where they are; the first round is not counted.
fn interleave(
    place: &Place<'_>,
    workload: &Workload,
    systems: &mut [(&'static str, &mut dyn System)],
) -> Result<Samples> {
    let mut samples = Samples::new(workload.name(), "requests/s", systems.iter().map(|(name, _)| *name));
    if !workload.name().contains(place.workload) {
        return Ok(samples);
    }
    // The host may have taken pages away, from one file and not from another.
    let all = Workload { once: true, random: false, size: PASS, step: PASS, depth: 8, kind: Kind::Read, ..*workload };
    for (name, system) in systems.iter_mut() {
        system.run(&all, 0, Duration::from_secs(60)).with_context(|| format!("{name} failed"))?;
    }
    for round in 0..=place.pace.rounds {
        let mut rates = Vec::new();
        for (name, system) in systems.iter_mut() {
            let limit = if round == 0 { place.pace.round / 2 } else { place.pace.round };
            let (count, took) =
                system.run(workload, round, limit).with_context(|| format!("{name} failed at {}", workload.name()))?;
            rates.push(count as f64 / took.as_secs_f64().max(1e-9));
        }
        if round > 0 {
            samples.add(&rates);
        }
    }
    eprintln!("   {}", samples.summary());
    Ok(samples)
}

/// In this process, without a transport.
fn inside(place: &Place<'_>) -> Result<Vec<Row>> {
    let raw = images::raw(place.directory, "full.raw", SIZE)?;
    let qcow2 = images::qcow2(place.directory, "full.qcow2", &raw, &[])?;
    let mut bare = Bare::new(&raw)?;
    let mut ours = Sandboxed::new(&qcow2, "qcow2")?;
    let mut ours_raw = Sandboxed::new(&raw, "raw")?;
    let mut native = Native::new(&qcow2)?;
    let mut rows = Vec::new();
    for depth in [1, 32, 128] {
        let workload = Workload { depth, ..READ };
        let samples = interleave(
            place,
            &workload,
            &mut [
                ("io_uring raw", &mut bare),
                ("imago qcow2", &mut native),
                ("blockhouse disk raw", &mut ours_raw),
                ("blockhouse disk qcow2", &mut ours),
            ],
        )?;
        rows.extend(samples.rows("inside", &["io_uring raw", "imago qcow2"]));
    }
    Ok(rows)
}

/// Through vhost-user, beside QEMU's storage daemon.
fn served(place: &Place<'_>) -> Result<Vec<Row>> {
    let raw = images::raw(place.directory, "full.raw", SIZE)?;
    let qcow2 = images::qcow2(place.directory, "full.qcow2", &raw, &[])?;
    // Both have the same files, since it matters how the page cache holds them. All is allocated, so that nobody
    // changes metadata.
    let mut our_raw = servers::blockhouse(place.blockhouse, (&raw, "raw"), 1, true)?;
    let mut our_qcow2 = servers::blockhouse(place.blockhouse, (&qcow2, "qcow2"), 1, true)?;
    let mut their_raw = servers::storage_daemon((&raw, "raw"), 1, true)?;
    let mut their_qcow2 = servers::storage_daemon((&qcow2, "qcow2"), 1, true)?;
    let mut workloads = vec![
        Workload { depth: 1, ..READ },
        READ,
        Workload { depth: 64, ..READ },
        Workload::new(Kind::Write, true, 4096, 1),
        Workload::new(Kind::Write, true, 4096, 32),
        Workload::new(Kind::Write, true, 4096, 64),
    ];
    for size in [4 << 10, 64 << 10, 1 << 20] {
        for depth in [1, 32] {
            workloads.push(Workload::new(Kind::Read, false, size, depth));
            workloads.push(Workload::new(Kind::Write, false, size, depth));
        }
    }
    let mut rows = Vec::new();
    for workload in workloads {
        let samples = interleave(
            place,
            &workload,
            &mut [
                ("blockhouse raw", &mut our_raw),
                ("blockhouse qcow2", &mut our_qcow2),
                ("storage-daemon raw", &mut their_raw),
                ("storage-daemon qcow2", &mut their_qcow2),
            ],
        )?;
        rows.extend(samples.rows("served", &["blockhouse raw", "storage-daemon qcow2"]));
    }
    Ok(rows)
}

/// Two queues, two client threads.
fn queues(place: &Place<'_>) -> Result<Vec<Row>> {
    let raw = images::raw(place.directory, "full.raw", SIZE)?;
    let qcow2 = images::qcow2(place.directory, "full.qcow2", &raw, &[])?;
    let mut ours = servers::blockhouse(place.blockhouse, (&qcow2, "qcow2"), 2, false)?;
    let mut theirs = servers::storage_daemon((&qcow2, "qcow2"), 2, false)?;
    let mut rows = Vec::new();
    for depth in [1, 32] {
        let workload = Workload { depth, queues: 2, ..READ };
        let systems: &mut [(&'static str, &mut dyn System)] =
            &mut [("blockhouse qcow2", &mut ours), ("storage-daemon qcow2", &mut theirs)];
        rows.extend(interleave(place, &workload, systems)?.rows("queues", &["storage-daemon qcow2"]));
    }
    Ok(rows)
}

/// Reads through empty layers to a full one at the bottom.
fn chains(place: &Place<'_>) -> Result<Vec<Row>> {
    let raw = images::raw(place.directory, "full.raw", SIZE)?;
    let base = images::qcow2(place.directory, "base.qcow2", &raw, &[])?;
    let mut ours = Vec::new();
    for layers in [1, 4, 16, 64] {
        let top = images::chain(place.directory, &base, layers)?;
        ours.push(servers::blockhouse(place.blockhouse, (&top, "qcow2"), 1, false)?);
    }
    let mut theirs = Vec::new();
    for layers in [1, 16, 64] {
        let top = images::chain(place.directory, &base, layers)?;
        theirs.push(servers::storage_daemon((&top, "qcow2"), 1, false)?);
    }
    let names = ["blockhouse 1 layer", "blockhouse 4 layers", "blockhouse 16 layers", "blockhouse 64 layers"];
    let their_names = ["storage-daemon 1 layer", "storage-daemon 16 layers", "storage-daemon 64 layers"];
    let mut systems: Vec<(&'static str, &mut dyn System)> = Vec::new();
    systems.extend(names.into_iter().zip(ours.iter_mut().map(|served| served as &mut dyn System)));
    systems.extend(their_names.into_iter().zip(theirs.iter_mut().map(|served| served as &mut dyn System)));
    let samples = interleave(place, &READ, &mut systems)?;
    Ok(samples.rows("chains", &["blockhouse 1 layer", "storage-daemon 16 layers"]))
}

/// Reads of an image of which no two clusters lie together.
fn fragmented(place: &Place<'_>) -> Result<Vec<Row>> {
    let image = images::fragmented(place.directory, "fragmented.qcow2", SIZE, 64 << 10)?;
    let mut ours = servers::blockhouse(place.blockhouse, (&image, "qcow2"), 1, false)?;
    let mut theirs = servers::storage_daemon((&image, "qcow2"), 1, false)?;
    let systems: &mut [(&'static str, &mut dyn System)] =
        &mut [("blockhouse qcow2", &mut ours), ("storage-daemon qcow2", &mut theirs)];
    Ok(interleave(place, &READ, systems)?.rows("fragmented", &["storage-daemon qcow2"]))
}

/// Reads of compressed clusters.
fn compressed(place: &Place<'_>) -> Result<Vec<Row>> {
    let raw = images::raw(place.directory, "part.raw", 64 << 20)?;
    // Bytes that compress: the random ones, thinned.
    let text = place.directory.join("text.raw");
    if !text.exists() {
        let bytes: Vec<u8> = std::fs::read(&raw)?.into_iter().map(|byte| byte & 3).collect();
        std::fs::write(&text, bytes)?;
    }
    let image = images::qcow2(place.directory, "compressed.qcow2", &text, &["-c"])?;
    let mut ours = servers::blockhouse(place.blockhouse, (&image, "qcow2"), 1, false)?;
    let mut theirs = servers::storage_daemon((&image, "qcow2"), 1, false)?;
    let mut rows = Vec::new();
    for (size, random) in [(64 << 10, false), (4096, true)] {
        let workload = Workload { length: 64 << 20, ..Workload::new(Kind::Read, random, size, 32) };
        let systems: &mut [(&'static str, &mut dyn System)] =
            &mut [("blockhouse qcow2", &mut ours), ("storage-daemon qcow2", &mut theirs)];
        rows.extend(interleave(place, &workload, systems)?.rows("compressed", &["storage-daemon qcow2"]));
    }
    Ok(rows)
}

/// Writes to an empty image, a new one for each round.
fn allocate(place: &Place<'_>) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (random, size, length) in
        [(false, 64 << 10, SIZE / 2), (false, 1 << 20, SIZE / 2), (true, 4096, SIZE), (false, 4096, 64 << 20)]
    {
        // Each random request is in a cluster of its own.
        let step = if random { 64 << 10 } else { size };
        let workload = Workload { once: true, length, step, ..Workload::new(Kind::Write, random, size, 32) };
        if !workload.name().contains(place.workload) {
            continue;
        }
        let mut samples =
            Samples::new(workload.name(), "requests/s", ["blockhouse qcow2", "storage-daemon qcow2"].into_iter());
        for round in 0..=place.pace.rounds.min(7) {
            let mut rates = Vec::new();
            for ours in [true, false] {
                let image = images::empty(place.directory, "allocate.qcow2", &(2 * SIZE).to_string())?;
                let mut system = if ours {
                    servers::blockhouse(place.blockhouse, (&image, "qcow2"), 1, true)?
                } else {
                    servers::storage_daemon((&image, "qcow2"), 1, true)?
                };
                let (count, took) = system.run(&workload, round, Duration::from_secs(60))?;
                rates.push(count as f64 / took.as_secs_f64());
                drop(system);
                images::qemu_img(&["check", "-q", image.to_str().context("a path is not UTF-8")?])
                    .or_else(|error| if ours { Err(error) } else { Ok(()) })?;
            }
            if round > 0 {
                samples.add(&rates);
            }
        }
        eprintln!("   {}", samples.summary());
        rows.extend(samples.rows("allocate", &["storage-daemon qcow2"]));
    }
    Ok(rows)
}

/// The same part of disks of very different sizes, and the same disk after a million requests.
fn sizes(place: &Place<'_>) -> Result<Vec<Row>> {
    let mut systems = Vec::new();
    for (name, gigabytes) in [("1 GiB", 1_u64), ("64 GiB", 64), ("4 TiB", 4096)] {
        let image = images::empty(place.directory, &format!("size-{gigabytes}.qcow2"), &format!("{gigabytes}G"))?;
        // The last gigabyte is written, by us, in one pass.
        let from = (gigabytes - 1) << 30;
        let mut writer = servers::blockhouse(place.blockhouse, (&image, "qcow2"), 1, true)?;
        let fill = Workload { from, once: true, ..Workload::new(Kind::Write, false, 1 << 20, 8) };
        writer.run(&fill, 0, Duration::from_secs(60))?;
        drop(writer);
        systems.push((name, from, servers::blockhouse(place.blockhouse, (&image, "qcow2"), 1, false)?));
    }
    let mut samples = Samples::new("random-read-4k-d32".into(), "requests/s", systems.iter().map(|(name, ..)| *name));
    for round in 0..=place.pace.rounds {
        let mut rates = Vec::new();
        for (_, from, system) in &mut systems {
            let (count, took) = system.run(&Workload { from: *from, ..READ }, round, place.pace.round)?;
            rates.push(count as f64 / took.as_secs_f64());
        }
        if round > 0 {
            samples.add(&rates);
        }
    }
    eprintln!("   {}", samples.summary());
    let mut rows = samples.rows("sizes", &["1 GiB"]);
    // One server has answered a million requests, the other is new.
    let image = place.directory.join("size-1.qcow2");
    let mut old = servers::blockhouse(place.blockhouse, (&image, "qcow2"), 1, false)?;
    let mut served = 0;
    while served < 1_000_000 {
        served += old.run(&READ, 1, Duration::from_secs(1))?.0;
    }
    let mut new = servers::blockhouse(place.blockhouse, (&image, "qcow2"), 1, false)?;
    let systems: &mut [(&'static str, &mut dyn System)] = &mut [("new", &mut new), ("after a million", &mut old)];
    rows.extend(interleave(place, &READ, systems)?.rows("sizes", &["new"]));
    Ok(rows)
}

/// From the start of a process to the first sector.
fn cold(place: &Place<'_>) -> Result<Vec<Row>> {
    let raw = images::raw(place.directory, "full.raw", SIZE)?;
    let image = images::qcow2(place.directory, "full.qcow2", &raw, &[])?;
    let image = image.to_str().context("a path is not UTF-8")?;
    let cache = place.directory.join("code");
    let ours = || {
        let mut command = Command::new(place.blockhouse);
        command.args(["read", "--format", "qcow2", "--length", "512", "--code-cache"]).arg(&cache).arg(image);
        command
    };
    let theirs = || {
        let mut command = Command::new("qemu-io");
        command.args(["-r", "-f", "qcow2", "-c", "read 0 512", image]);
        command
    };
    let time = |mut command: Command| -> Result<f64> {
        let begun = Instant::now();
        let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status().context("cannot start")?;
        ensure!(status.success(), "{command:?} failed");
        Ok(begun.elapsed().as_secs_f64() * 1000.0)
    };
    let mut samples = Samples::new("first-sector".into(), "ms", ["blockhouse read", "qemu-io"].into_iter());
    for round in 0..=place.pace.rounds.max(10) {
        let times = [time(ours())?, time(theirs())?];
        if round > 0 {
            samples.add(&times);
        }
    }
    eprintln!("   {}", samples.summary());
    Ok(samples.rows("cold", &["qemu-io"]))
}

/// Disks beside the first one, in the server that says what one more costs.
const MORE_DISKS: usize = 8;

/// Memory of a server: idle, for each disk more, and after reads all over an image that is larger than its map.
fn memory(place: &Place<'_>) -> Result<Vec<Row>> {
    let small = images::empty(place.directory, "idle.qcow2", "1G")?;
    // The first one may have to compile the component.
    drop(servers::blockhouse(place.blockhouse, (&small, "qcow2"), 1, false)?);
    let idle = servers::blockhouse(place.blockhouse, (&small, "qcow2"), 1, false)?;
    let disks = (0..=MORE_DISKS)
        .map(|number| images::empty(place.directory, &format!("idle-{number}.qcow2"), "1G"))
        .collect::<Result<Vec<_>>>()?;
    let one = servers::blockhouse_disks(place.blockhouse, disks.get(..1).context("no disk")?)?.resident()?;
    let all = servers::blockhouse_disks(place.blockhouse, &disks)?.resident()?;
    let each = all.saturating_sub(one) / MORE_DISKS as u64;
    let large = images::reversed(place.directory, "large.qcow2", 1 << 40)?;
    let mut busy = servers::blockhouse(place.blockhouse, (&large, "qcow2"), 1, false)?;
    let before = busy.resident()?;
    let everywhere = Workload { length: 1 << 40, ..READ };
    let mut served = 0;
    while served < 100_000 {
        served += busy.run(&everywhere, 1, Duration::from_secs(1))?.0;
    }
    let row = |system: &str, bytes: u64| Row::single("memory", "resident", system, "MiB", bytes as f64 / 1_048_576.0);
    let theirs = servers::storage_daemon((&small, "qcow2"), 1, false)?;
    let resident = |served: &Served| served.resident();
    Ok(vec![
        row("blockhouse idle", resident(&idle)?),
        row("blockhouse, each idle disk more", each),
        row("blockhouse 1 TiB fragmented, before", before),
        row("blockhouse 1 TiB fragmented, after 100,000 reads", busy.resident()?),
        row("storage-daemon idle", theirs.resident()?),
    ])
}
