//! A Linux guest writes to a qcow2 overlay, and its machine is killed, again and again.
//!
//! ```text
//!  script                        blockhouse run           guest
//!  ┌─ start ───────────────────────▶ ┌─ boot ───────────────▶ replay the journal, e2fsck -fn
//!  │                                 │                        digests of all files       ─▶ console
//!  │                                 │                        fio: verify what it wrote  ─▶ console
//!  │                                 │                        write, fsync, digest       ─▶ console
//!  │  wait for the first digests ◀───┼─────────────────────── and so on, without end
//!  └─ kill -9 ─────────────────────▶ ╳
//!     keep a copy of the overlay
//! ```
//!
//! A kill takes what the program had in memory: whatever it knew of the image and had not
//! yet written. The pages of the files stay. Power cuts, which take those too, are simulated
//! elsewhere (`cargo xtask simulate`).
//!
//! The console is the witness: the guest names each file only after `fsync` or `sync` came
//! back, and the test then expects it on the disk for ever.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use blockhouse_tests::guest::fio;
use blockhouse_tests::guest::pieces::{self, INIT, Linux};
use blockhouse_tests::guest::qemu::KERNEL_OPTIONS;
use blockhouse_tests::{blockhouse, noise, qemu_img, run, scratch, sha256, skip};

use crate::machine::{Job, Log, Machine};

/// How many machines are killed; one more reads everything and ends by itself. 0, which is what it is without
/// `CRASH_KILLS`, leaves the test out.
fn kills() -> usize {
    std::env::var("CRASH_KILLS").ok().and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// From start to end. Half a minute for each machine is much, where it is emulated.
const LIMIT: Duration = Duration::from_secs(2400);

/// What lies where on the disk, in bytes. The guest sees the first two as partitions.
const FILE_SYSTEM: (u64, u64) = (1 << 20, 48 << 20);
const FIO: (u64, u64) = (49 << 20, 8 << 20);
const UNTOUCHED: (u64, u64) = (57 << 20, 7 << 20);
const SIZE: u64 = 64 << 20;

/// fio writes to one slot of its partition after the other. Of the last jobs that the script
/// heard of, this many are read again: few enough that what ran after them, unheard, hit other slots.
const SLOTS: usize = 16;
const REMEMBERED: usize = 4;

#[test]
fn linux_survives_kills_while_it_writes_to_qcow2() {
    if kills() == 0 {
        return skip("it takes minutes: CRASH_KILLS=20 runs it".to_owned());
    }
    let found = Machine::find().and_then(|machine| {
        let linux = Linux::find()?;
        let initrd = guest(&linux)?;
        Ok((machine, linux, initrd))
    });
    let (machine, linux, content) = match found {
        Ok(found) => found,
        Err(reason) => return skip(reason),
    };
    let directory = scratch();
    let disk = Disk::make(directory.path());
    let before = sha256(&std::fs::read(&disk.base).unwrap());
    let initrd = directory.path().join("initrd");
    std::fs::write(&initrd, content).unwrap();

    let log = machine.run(&Job {
        name: "crashes",
        files: vec![
            ("vmlinuz", linux.kernel.clone()),
            ("initrd", initrd),
            ("images/overlay.qcow2", disk.overlay.clone()),
            ("golden/base.qcow2", disk.base.clone()),
        ],
        script: script(),
        limit: LIMIT,
        results: Some((kills() as u64 + 2) * (2 * SIZE)),
    });
    check_rounds(&log);

    // The images, as they came out of the machine, in QEMU's eyes and Blockhouse's own.
    let base = log.results().join("golden/base.qcow2");
    if sha256(&std::fs::read(&base).unwrap()) != before {
        log.fail("the base is not what it was");
    }
    for round in 1..=kills() + 1 {
        let overlay = log.results().join(format!("images/round-{round}.qcow2"));
        check_image(&log, round, &overlay, &disk);
    }
}

/// The script that runs the machines.
fn script() -> String {
    format!("kills={}\noptions='{KERNEL_OPTIONS}'\n{}", kills(), include_str!("crashes/script.sh"))
}

/// The guest: busybox, e2fsprogs, fio, and a script that knows `round` and `jobs` from the kernel's command line.
fn guest(linux: &Linux) -> Result<Vec<u8>, String> {
    let mut archive = pieces::busybox()?;
    // Not under the name mke2fs: busybox has one that knows no ext4, and prefers its own.
    for name in ["mkfs.ext4", "e2fsck"] {
        let program = pieces::installed(name, "e2fsprogs")?;
        pieces::add_libraries(&program, &mut archive);
        archive.copy(Path::new("/usr/sbin").join(name), &program);
    }
    fio::add(&mut archive)?;

    let mut init = String::from(INIT);
    init.push_str(&linux.add_modules(&["virtio_mmio", "virtio_blk", "crc32c_generic", "ext4"], &mut archive));
    let slot_size = FIO.1 / SLOTS as u64;
    writeln!(init, "kills={} slots={SLOTS} slot_size={slot_size} remembered={REMEMBERED}", kills()).unwrap();
    init.push_str(include_str!("crashes/init.sh"));
    archive.file("/init", init.as_bytes());
    Ok(archive.finish())
}

/// The disk: partitioned, with content everywhere, in a compressed base; and an empty overlay over it.
struct Disk {
    /// `images/overlay.qcow2`, whose backing file is `../golden/base.qcow2`.
    overlay: PathBuf,
    base: PathBuf,
    /// What the base holds.
    content: Vec<u8>,
}

impl Disk {
    fn make(directory: &Path) -> Self {
        let cluster = 64 << 10;
        let mut content = Vec::new();
        // Content of which no two clusters are alike and which yet compresses, with holes.
        for index in 0..SIZE / cluster {
            let unique = if index % 7 == 6 { vec![0; 4096] } else { noise(index, 4096) };
            content.extend(unique.repeat(16));
        }
        content[..512].copy_from_slice(&partition_table(&[FILE_SYSTEM, FIO]));

        let (images, golden) = (directory.join("images"), directory.join("golden"));
        for directory in [&images, &golden] {
            std::fs::create_dir_all(directory).unwrap();
        }
        let raw = directory.join("base.raw");
        std::fs::write(&raw, &content).unwrap();
        let base = golden.join("base.qcow2");
        let convert = ["convert", "-c", "-f", "raw", "-O", "qcow2"].map(AsRef::as_ref);
        qemu_img(convert.into_iter().chain([raw.as_os_str(), base.as_os_str()]));
        let overlay = images.join("overlay.qcow2");
        let create = "create -q -f qcow2 -b ../golden/base.qcow2 -F qcow2 overlay.qcow2";
        run(Command::new("qemu-img").current_dir(&images).args(create.split(' '))).succeeded();
        let check = qemu_check(&base);
        assert!(check["compressed-clusters"].as_u64() > Some(800), "the base is not compressed: {check}");
        Self { overlay, base, content }
    }
}

/// A master boot record with these partitions, given in bytes.
fn partition_table(partitions: &[(u64, u64)]) -> [u8; 512] {
    let mut sector = [0; 512];
    for (entry, (start, length)) in sector[446..].chunks_exact_mut(16).zip(partitions) {
        entry[4] = 0x83; // Linux
        for (field, bytes) in [(8, start), (12, length)] {
            entry[field..field + 4].copy_from_slice(&u32::try_from(bytes / 512).unwrap().to_le_bytes());
        }
    }
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

/// What the guest said in one round: the words of each whole line.
struct Round<'a>(Vec<Vec<&'a str>>);

impl<'a> Round<'a> {
    /// What follows this word in the lines that begin with it.
    fn all(&self, key: &str) -> Vec<&[&'a str]> {
        let lines = self.0.iter().filter(|words| words.first() == Some(&key));
        lines.map(|words| &words[1..]).collect()
    }

    /// Fails the test unless the guest said this once and nothing else about it.
    #[track_caller]
    fn must_say(&self, log: &Log, round: usize, key: &str, value: &[&str]) {
        if self.all(key) != [value] {
            log.fail(format!("round {round}: expected \"{key} {}\", got {:?}", value.join(" "), self.all(key)));
        }
    }
}

/// The rounds in the log, with the exit codes.
fn rounds(log: &Log) -> Vec<(i32, Round<'_>)> {
    let mut rounds = Vec::new();
    for line in log.text.lines().map(str::trim_end) {
        if let Some((_, code)) = line.strip_prefix("round ").and_then(|rest| rest.split_once(": exit ")) {
            rounds.push((code.parse().unwrap(), Round(Vec::new())));
        } else if let Some((said, (_, round))) = line.strip_prefix("guest: ").zip(rounds.last_mut())
            && let Some(whole) = said.strip_suffix(" .")
        {
            round.0.push(whole.split(' ').collect());
        }
    }
    rounds
}

/// Every round began with all that earlier ones had made durable.
fn check_rounds(log: &Log) {
    if log.values("script: ") != ["done"] {
        log.fail("the script did not come to its end");
    }
    let rounds = rounds(log);
    assert_eq!(rounds.len(), kills() + 1);
    let mut files = BTreeMap::new();
    let mut jobs: BTreeMap<usize, &str> = BTreeMap::new();
    let (mut verified, mut failures) = (0, Vec::new());
    for (number, (code, round)) in (1..).zip(&rounds) {
        let last = number == kills() + 1;
        if *code != if last { 0 } else { 128 + 9 } {
            log.fail(format!("round {number}: the machine ended with {code}"));
        }
        round.must_say(log, number, "recoveries", if number == 1 { &["0"] } else { &["1"] });
        round.must_say(log, number, "e2fsck", &["0"]);
        round.must_say(log, number, "problems", &["0"]);

        let seen: BTreeMap<&str, &str> = round.all("file").into_iter().map(|words| (words[0], words[1])).collect();
        for (name, digest) in &files {
            if seen.get(name) != Some(digest) {
                failures.push(format!("round {number}: {name} was {digest}, is {:?}", seen.get(name)));
            }
        }
        let mut expected: Vec<[String; 3]> = Vec::new();
        for (job, digest) in jobs.iter().rev().take(REMEMBERED) {
            expected.push([job.to_string(), "0".into(), (*digest).to_owned()]);
        }
        verified += expected.len();
        if round.all("verified") != expected {
            failures.push(format!("round {number}: fio wrote {expected:?}, now is {:?}", round.all("verified")));
        }

        for words in round.all("synced") {
            files.insert(words[0], words[1]);
        }
        for words in round.all("fio") {
            let job: usize = words[0].parse().unwrap();
            if words[1] != "0" {
                failures.push(format!("round {number}: fio ended with {}", words[1]));
            }
            jobs.insert(job, words[2]);
        }
        if last {
            round.must_say(log, number, "end", &[]);
        } else if round.all("synced").is_empty() {
            log.fail(format!("round {number}: the machine was killed before it wrote"));
        }
    }
    if !failures.is_empty() {
        log.fail(failures.join("\n"));
    }
    eprintln!("crashes: {} files, {} fio jobs of which {verified} were verified", files.len(), jobs.len());
    // The job numbers go on over the rounds: else the wrong slots were looked at.
    let numbers: BTreeSet<usize> = (1..=jobs.len()).collect();
    assert_eq!(jobs.into_keys().collect::<BTreeSet<_>>(), numbers);
    assert!(verified >= kills(), "fio verified {verified} times only");
}

/// An overlay after a kill: nothing corrupt for QEMU, the same content for QEMU and
/// Blockhouse, in it a file system that its journal makes whole.
fn check_image(log: &Log, round: usize, overlay: &Path, disk: &Disk) {
    let check = qemu_check(overlay);
    if check["corruptions"].as_u64().unwrap_or(0) > 0 || check["check-errors"] != 0 {
        log.fail(format!("round {round}: qemu-img check: {check}"));
    }
    let directory = scratch();
    let [theirs, ours] = ["qemu.raw", "blockhouse.raw"].map(|name| directory.path().join(name));
    let convert = ["convert", "-f", "qcow2", "-O", "raw"].map(AsRef::as_ref);
    qemu_img(convert.into_iter().chain([overlay.as_os_str(), theirs.as_os_str()]));
    let mut read = blockhouse();
    read.args(["read", "--format", "qcow2", "--allow"]).arg(overlay.with_file_name("../golden"));
    run(read.arg("--output").arg(&ours).arg(overlay)).succeeded();
    let content = std::fs::read(&theirs).unwrap();
    if content != std::fs::read(&ours).unwrap() {
        log.fail(format!("round {round}: QEMU and Blockhouse read different bytes"));
    }
    if part(&content, UNTOUCHED) != part(&disk.content, UNTOUCHED) {
        log.fail(format!("round {round}: bytes changed that the guest never wrote"));
    }

    let partition = directory.path().join("partition");
    std::fs::write(&partition, part(&content, FILE_SYSTEM)).unwrap();
    let e2fsck = |mode| {
        let program = pieces::installed("e2fsck", "e2fsprogs").unwrap();
        let outcome = run(Command::new(program).arg(mode).arg(&partition));
        (outcome.status.code(), outcome.text())
    };
    // Replay and what a boot does without asking: 1 is "corrected".
    let (replayed, checked) = (e2fsck("-fp"), e2fsck("-fn"));
    if !matches!(replayed.0, Some(0 | 1)) || checked.0 != Some(0) {
        log.fail(format!("round {round}: e2fsck: {replayed:?}, then {checked:?}"));
    }
}

/// What `qemu-img check` finds. It fails if there is more than leaks, and says so in the JSON.
fn qemu_check(image: &Path) -> serde_json::Value {
    let outcome = run(Command::new("qemu-img").args(["check", "--output=json", "-f", "qcow2"]).arg(image));
    serde_json::from_slice(&outcome.stdout).unwrap_or_else(|error| panic!("qemu-img check: {error}: {outcome:?}"))
}

fn part(content: &[u8], (start, length): (u64, u64)) -> &[u8] {
    let start = usize::try_from(start).unwrap();
    &content[start..start + usize::try_from(length).unwrap()]
}
