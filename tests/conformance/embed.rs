//! The example `examples/embed`: the library from outside, run as its page says.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use blockhouse_tests::{component, run, run_within, sha256, target_directory};

use crate::case::have_qemu;
use crate::content::Content;
use crate::lab::{Lab, Pen};

/// Builds the example as the program under test is built, so that nothing is compiled twice.
fn example() -> PathBuf {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(env!("CARGO_MANIFEST_DIR")).args([
        "build",
        "--quiet",
        "--locked",
        "--workspace",
        "--bin",
        "blockhouse-embed",
    ]);
    run_within(Duration::from_secs(900), &mut cargo).succeeded();
    target_directory().join("debug/blockhouse-embed")
}

#[test]
fn the_embedding_example() {
    if !have_qemu() {
        return;
    }
    let lab = Lab::new();
    for directory in ["images", "elsewhere"] {
        lab.directory(directory);
    }
    let size = (2 << 20) + 512;
    lab.raw("images/base.raw", size, &[(0, 1 << 20)]);
    lab.qemu_img("create -q -f qcow2 -b base.raw -F raw images/overlay.qcow2");
    Pen::new(&lab, "qcow2", "images/overlay.qcow2", size, 64 << 10).everything().done();

    let example = example();
    let qcow2 = component("qcow2");
    let (base, overlay) = (lab.absolute("images/base.raw"), lab.absolute("images/overlay.qcow2"));
    let command = |granted: &str| {
        let mut command = Command::new(&example);
        command.arg(&qcow2).args([&lab.absolute(granted), &overlay]);
        command
    };

    // The content, by QEMU, through the example's own checksum.
    lab.qemu_img("convert -t unsafe -f qcow2 -O raw images/overlay.qcow2 expected");
    let expected = Content::open(&lab.path("expected"));
    assert_eq!(expected.size(), size);
    let mut bytes = vec![0; usize::try_from(size).unwrap()];
    expected.read(0, &mut bytes);
    let sum = bytes.iter().fold(0u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)));

    let granted = lab.absolute("images");
    let digest = sha256(&std::fs::read(&qcow2).unwrap());
    assert_eq!(
        run(&mut command("images")).succeeded().text(),
        format!(
            "component {digest} (9 imported functions)\n\
             audit: {overlay}: allowed {base:?} read-only (grant {granted})\n\
             layer 0: {overlay} (qcow2, {size} bytes)\n\
             layer 1: {base} (raw, {size} bytes)\n\
             read {size} bytes, checksum {sum:016x}\n"
        )
    );

    // The same image with a grant that does not hold its base.
    let refused = run(&mut command("elsewhere")).refused();
    let denied = format!("audit: {overlay}: denied {base:?} read-only: ");
    assert!(refused.text().lines().any(|line| line.starts_with(&denied)), "{}", refused.text());
    assert!(!refused.text().contains("layer") && !refused.text().contains("checksum"), "{}", refused.text());
    assert!(refused.stderr.contains(&base) && refused.stderr.contains("not granted"), "{}", refused.stderr);
}
