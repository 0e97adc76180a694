//! A component that breaks under a running guest: its disk answers I/O errors, the machine goes on, and
//! the other disks do not notice.

use std::path::Path;

use blockhouse_tests::{component, noise, sha256, skip};
use serde_json::Value;

use crate::place::{Attempt, Place, limited};
use crate::tally;

/// A machine with a disk for each of `lines`, served by the hostile component, and a raw disk as the last.
fn run(place: &Place, lines: &[&str]) -> Attempt {
    let mut program = limited();
    program.args(["run", "--json", "--memory", "64M"]);
    program.arg("--plugin").arg(format!("hostile={}", component("hostile").display()));
    for (number, line) in lines.iter().enumerate() {
        let mut bytes = format!("{line}\n").into_bytes();
        bytes.resize(1 << 20, b'.');
        let image = place.write(&format!("images/vm/{number}.img"), bytes);
        program.arg("--disk").arg(format!("file={},format=hostile,readonly=on", image.display()));
    }
    let good = place.write("images/vm/good.raw", noise(1, 1 << 20));
    program.arg("--disk").arg(format!("file={},format=raw,readonly=on", good.display()));
    place.finish(program, |_| {})
}

#[test]
fn a_broken_component_costs_its_own_disk_io_errors() {
    if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        skip("/dev/kvm cannot be opened");
        return;
    }
    let place = Place::new();
    let lines = ["trap-at-locate 3", "ok", "lie-wrap", "fail-at-locate 5", "grow-memory-at-unpack 4"];
    let attempt = run(&place, &lines);
    assert_eq!(attempt.code(), 1, "{:?}", attempt.outcome.stderr);
    assert!(attempt.error().contains("the guest could not read every disk"), "{}", attempt.stderr());
    let disks: Vec<Value> = serde_json::from_slice(&attempt.outcome.stdout).unwrap();
    assert_eq!(disks.len(), lines.len() + 1);
    for (disk, line) in disks.iter().zip(lines) {
        if line == "ok" {
            let content = std::fs::read(place.path("images/vm/1.img")).unwrap();
            assert_eq!(disk["sha256"], sha256(&content), "{line}");
        } else {
            assert!(disk["sha256"].is_null(), "{line}: {disk}");
            let error = disk["error"].as_str().unwrap();
            assert!(error.starts_with("I/O error at sector "), "{line}: {error}");
            tally::component_stopped();
        }
    }
    // 64 KiB of disk per answer: two worked before the third trapped.
    let sector = disks[0]["error"].as_str().unwrap().trim_start_matches("I/O error at sector ");
    assert!(sector.parse::<u64>().unwrap() <= 256, "{sector}");
    let good = disks.last().unwrap();
    assert_eq!(good["sha256"], sha256(&noise(1, 1 << 20)));
    assert!(good["error"].is_null(), "{good}");
}

/// A component that never answers: the guest waits its ten seconds, gets an error, and reads on.
#[test]
fn a_component_that_stalls_delays_its_own_disk_only() {
    if !Path::new("/dev/kvm").exists() || std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        skip("/dev/kvm cannot be opened");
        return;
    }
    let place = Place::new();
    let mut bytes = b"loop-at-locate 2\n".to_vec();
    bytes.resize(1 << 20, b'.');
    let image = place.write("images/vm/stalls.img", bytes);
    let good = place.write("images/vm/good.raw", noise(2, 1 << 20));
    let mut program = limited();
    program.args(["run", "--json", "--memory", "64M", "--plugin"]);
    program.arg(format!("hostile={}", component("hostile").display()));
    program.arg("--disk").arg(format!("file={},format=hostile,readonly=on", image.display()));
    program.arg("--disk").arg(format!("file={},format=raw,readonly=on", good.display()));
    let outcome = blockhouse_tests::run(&mut program);
    assert_eq!(outcome.status.code(), Some(1), "{}", outcome.stderr);
    let disks: Vec<Value> = serde_json::from_slice(&outcome.stdout).unwrap();
    assert!(disks[0]["error"].as_str().unwrap().starts_with("I/O error at sector "), "{disks:?}");
    assert_eq!(disks[1]["sha256"], sha256(&noise(2, 1 << 20)));
    assert!(outcome.stderr.contains("no answer within 10s"), "{}", outcome.stderr);
    tally::component_stopped();
}

/// A component that fills the log: whoever is to read that has no room for it, or does not read it. The guest does
/// not notice, and neither does another disk.
#[test]
fn a_log_that_takes_nothing_costs_nothing() {
    if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        skip("/dev/kvm cannot be opened");
        return;
    }
    let place = Place::new();
    // A line of 4 KiB in each answer, of which there are 64 in four times what a pipe holds.
    let mut bytes = b"log-long-at-locate 1 5000\n".to_vec();
    bytes.resize(4 << 20, b'.');
    let image = place.write("images/vm/talks.img", &bytes);
    let good = place.write("images/vm/good.raw", noise(3, 1 << 20));
    let (unread, pipe) = std::io::pipe().unwrap();
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    for stderr in [std::process::Stdio::from(full), pipe.into()] {
        let mut program = limited();
        program.args(["run", "--memory", "64M", "--plugin"]);
        program.arg(format!("hostile={}", component("hostile").display()));
        program.arg("--disk").arg(format!("file={},format=hostile,readonly=on", image.display()));
        program.arg("--disk").arg(format!("file={},format=raw,readonly=on", good.display()));
        let mut child = program.stdout(std::process::Stdio::piped()).stderr(stderr).spawn().unwrap();
        let started = std::time::Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if started.elapsed() > blockhouse_tests::COMMAND_LIMIT {
                child.kill().unwrap();
                panic!("it waits for somebody to read its log");
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        };
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(status.success(), "{status}: {text}");
        for content in [&bytes, &noise(3, 1 << 20)] {
            assert!(text.contains(&sha256(content)), "{text}");
        }
        tally::component_stopped();
    }
    // As much as the pipe holds is there, and the last line says what is not.
    let said = std::io::read_to_string(unread).unwrap();
    assert!(said.len() > 32 << 10, "{} bytes", said.len());
}
