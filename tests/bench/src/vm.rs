//! One virtual machine with four disks, one of which is hostile: what the slowest requests of the others become, as
//! its guest sees them.
//!
//! ```text
//!   QEMU (emulation), Linux ─┬─ fio ── vda raw, vdb qcow2, vdc vmdk: one random read at a time, each in turn
//!                            └─ fio ── vdd, in every second measurement, and whatever becomes of it
//!          4 × vhost-user-blk ──▶ one `blockhouse serve`
//! ```
//!
//! Each situation has a machine and a server of its own. What is measured while the fourth disk is in use is compared
//! with what was measured just before, while it was not.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use blockhouse_tests::guest::fio;
use blockhouse_tests::guest::pieces::{self, INIT, Linux};
use blockhouse_tests::guest::qemu::{KERNEL_OPTIONS, find_qemu, qemu};

use crate::groups::Place;
use crate::neighbours::{Hostile, Killed, good, serve, socket};
use crate::report::{Row, Samples};

/// What the fourth disk does while it is used. `neighbours` has them as well.
const SITUATIONS: &[(&str, Hostile)] = &[
    ("busy", Hostile::Told("ok")),
    ("component traps", Hostile::Told("trap-at-locate")),
    ("component stalls", Hostile::Told("loop-at-locate")),
    ("component lies", Hostile::Told("lie-wrap")),
    ("component floods the log", Hostile::Told("log-flood-at-locate")),
    ("image damaged", Hostile::Damaged),
];

/// How often it is measured, without the fourth disk and with it.
const ROUNDS: usize = 3;
/// For how long, in seconds.
const SECONDS: usize = 5;
/// From power-on to power-off. An endless loop takes ten seconds when the kernel looks for partitions, too.
const LIMIT: Duration = Duration::from_secs(600);

/// The 50th and 99th percentile of the good disks' latency.
pub(crate) fn vm(place: &Place<'_>) -> Result<Vec<Row>> {
    if place.quick {
        eprintln!("   it takes five minutes, and is left out by --quick");
        return Ok(Vec::new());
    }
    let missing = |why: String| anyhow!(why);
    let unpacked = find_qemu().map_err(missing)?;
    let linux = Linux::find().map_err(missing)?;
    let directory = place.directory.join("vm");
    let good = good(&directory)?;
    let initrd = directory.join("initrd");
    std::fs::write(&initrd, guest(&linux).map_err(missing)?)?;
    let mut rows = Vec::new();
    for (name, hostile) in SITUATIONS.iter().filter(|(name, _)| name.contains(place.workload)) {
        let said = machine(place, &directory, &good, *hostile, unpacked.as_deref(), &linux.kernel)
            .with_context(|| format!("with the situation {name:?}"))?;
        for percentile in [50, 99] {
            let mut samples =
                Samples::new(format!("{name}-p{percentile}"), "µs", ["quiet", "the fourth in use"].into_iter());
            for round in 1..=ROUNDS {
                let figure = |what: &str| figure(&said, &format!("{what} {round} "), percentile);
                samples.add(&[figure("quiet")?, figure("used")?]);
            }
            eprintln!("   {}", samples.summary());
            rows.extend(samples.rows("vm", &["quiet"]));
        }
    }
    Ok(rows)
}

/// Runs a machine to its end: what its guest said.
fn machine(
    place: &Place<'_>,
    directory: &Path,
    good: &[(PathBuf, &str)],
    hostile: Hostile,
    unpacked: Option<&Path>,
    kernel: &Path,
) -> Result<Vec<String>> {
    let _server = serve(place, directory, good, hostile)?;
    let begun = Instant::now();
    let console = directory.join("console");
    let mut command = qemu(unpacked);
    command
        .args(["-machine", "q35,memory-backend=memory", "-accel", "tcg", "-cpu", "max,-la57", "-m", "512"])
        .args(["-object", "memory-backend-memfd,id=memory,size=512M,share=on", "-smp", "2"])
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"]);
    for number in 0..=good.len() {
        let socket = socket(directory, number);
        while !socket.exists() {
            ensure!(begun.elapsed() < LIMIT, "there is no {}", socket.display());
            std::thread::sleep(Duration::from_millis(10));
        }
        command.args(["-chardev", &format!("socket,id=disk{number},path={}", socket.display())]);
        command.args(["-device", &format!("vhost-user-blk-pci,chardev=disk{number},num-queues=1")]);
    }
    command
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(directory.join("initrd"))
        .args(["-append", &format!("console=ttyS0 quiet reboot=t {KERNEL_OPTIONS}")])
        .stdin(Stdio::null())
        .stdout(std::fs::File::create(&console)?)
        .stderr(Stdio::inherit());
    let mut machine = Killed(start(&mut command)?);
    while machine.0.try_wait()?.is_none() {
        ensure!(begun.elapsed() < LIMIT, "the guest did not come to its end: {}", tail(&console));
        std::thread::sleep(Duration::from_millis(100));
    }
    let text = String::from_utf8_lossy(&std::fs::read(&console)?).into_owned();
    let said = text.lines().filter_map(|line| Some(line.trim_end().split_once("guest: ")?.1.to_owned()));
    let said: Vec<String> = said.collect();
    ensure!(said.iter().any(|line| line == "errors 0"), "a request was lost, or all: {}", tail(&console));
    Ok(said)
}

fn start(command: &mut Command) -> Result<std::process::Child> {
    command.spawn().with_context(|| format!("cannot start {}", command.get_program().to_string_lossy()))
}

/// The end of what a guest said.
fn tail(console: &Path) -> String {
    let text = std::fs::read(console).unwrap_or_default();
    String::from_utf8_lossy(text.get(text.len().saturating_sub(2000)..).unwrap_or(&text)).into_owned()
}

/// A percentile in fio's terse line that begins so, in microseconds.
fn figure(said: &[String], what: &str, percentile: usize) -> Result<f64> {
    let line = said.iter().find_map(|line| line.strip_prefix(what)).with_context(|| format!("no line {what:?}"))?;
    let name = format!("{percentile}.000000%=");
    let mut fields = line.split(';');
    // Version, fio's version, job, group, error; then what was read, with the percentiles of its latency.
    if fields.nth(4) != Some("0") {
        bail!("fio failed: {line}");
    }
    let value = fields.find_map(|field| field.strip_prefix(&name)).context("no percentile")?;
    value.parse().with_context(|| format!("{value:?} is no number"))
}

/// The guest: busybox, fio, and what it does.
fn guest(linux: &Linux) -> Result<Vec<u8>, String> {
    let mut archive = pieces::busybox()?;
    fio::add(&mut archive)?;
    let mut init = String::from(INIT);
    init.push_str(&linux.add_modules(&["virtio_pci", "virtio_blk"], &mut archive));
    let script = write!(
        init,
        r#"
PATH=/bin:/usr/bin
dmesg -n 1
wait=0
while [ ! -b /dev/vdd ] && [ $wait -lt 600 ]; do sleep 0.1; wait=$((wait + 1)); done
errors=0
read_as() {{
    echo "--name=global --thread --ioengine=psync --direct=1 --rw=randread --time_based --minimal $*"
}}
measure() {{
    fio $(read_as --bs=4k --runtime={SECONDS} --file_service_type=roundrobin) \
        --name=good --filename=/dev/vda:/dev/vdb:/dev/vdc >/tmp/fio 2>&1
    [ $? = 0 ] || errors=$((errors + 1))
    echo "guest: $1 $(tail -n 1 /tmp/fio)"
}}
round=1
while [ $round -le {ROUNDS} ]; do
    measure "quiet $round"
    # A thousand requests in a second, whatever they are answered: the processors are those of the others as well.
    fio $(read_as --bs=64k --runtime=600 --continue_on_error=all --thinktime=1000) \
        --name=fourth --filename=/dev/vdd >/dev/null 2>&1 & fourth=$!
    measure "used $round"
    kill -9 $fourth
    wait $fourth
    round=$((round + 1))
done
echo "guest: errors $((errors + $(dmesg | grep -cE 'I/O error, dev vd[abc]')))"
poweroff -f
"#
    );
    script.map_err(|error| error.to_string())?;
    archive.file("/init", init.as_bytes());
    Ok(archive.finish())
}
