//! Guests under `blockhouse run` on a KVM that can boot Linux: a stock Debian kernel, and
//! the built-in guest.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod crashes;
mod disks;
mod growth;
mod machine;
mod vhost_user;

use std::fmt::Write as _;

use blockhouse_tests::guest::pieces::{self, INIT, Linux};
use blockhouse_tests::guest::qemu::KERNEL_OPTIONS;
use blockhouse_tests::{scratch, skip};

use crate::disks::Chain;
use crate::machine::{Job, LIMIT, Machine};

/// Debian's kernel finds the disk through ACPI, mounts the ext4 on it and reads every file right.
#[test]
fn linux_reads_ext4_on_a_qcow2_chain() {
    let (machine, linux) = match Machine::find().and_then(|machine| Ok((machine, Linux::find()?))) {
        Ok(found) => found,
        Err(reason) => return skip(reason),
    };
    let directory = scratch();
    let chain = match Chain::make(directory.path()) {
        Ok(chain) => chain,
        Err(reason) => return skip(reason),
    };
    let initrd = directory.path().join("initrd");
    std::fs::write(&initrd, guest_initramfs(&linux)).unwrap();

    let log = machine.run(&Job {
        name: "linux",
        files: vec![
            ("vmlinuz", linux.kernel.clone()),
            ("initrd", initrd),
            ("images/overlay.qcow2", chain.overlay.clone()),
            ("golden/base.qcow2", chain.base.clone()),
        ],
        script: format!(
            "./blockhouse run --kernel vmlinuz --initrd initrd --cmdline 'console=ttyS0 {KERNEL_OPTIONS}' \
             --disk file=images/overlay.qcow2,format=qcow2,allow=$PWD/golden,readonly=on,serial=chain-0\n\
             echo \"run: exit $?\"\n"
        ),
        limit: LIMIT,
        results: None,
    });
    if log.values("guest: done").is_empty() {
        log.fail("the guest did not come to its end");
    }
    if log.values("guest: serial ") != ["chain-0"] {
        log.fail("the disk's serial number is not what was asked for");
    }
    if log.values("guest: errors ") != ["0"] {
        log.fail("the guest's kernel reports errors");
    }
    let mut seen: Vec<&str> = log.values("guest: file ");
    seen.sort_unstable();
    if seen != chain.digests() {
        log.fail(format!("the files differ: expected {:#?}, the guest read {seen:#?}", chain.digests()));
    }
    if log.values("run: exit ") != ["0"] {
        log.fail("the machine did not end well");
    }
}

/// The built-in guest, which development machines run on a KVM made in software, also runs on
/// one that is the processor's own.
#[test]
fn built_in_guest_runs_on_hardware_kvm() {
    let machine = match Machine::find() {
        Ok(machine) => machine,
        Err(reason) => return skip(reason),
    };
    let directory = scratch();
    let chain = match Chain::make(directory.path()) {
        Ok(chain) => chain,
        Err(reason) => return skip(reason),
    };
    let log = machine.run(&Job {
        name: "built-in",
        files: vec![("images/overlay.qcow2", chain.overlay.clone()), ("golden/base.qcow2", chain.base.clone())],
        script: "./blockhouse run --disk file=images/overlay.qcow2,format=qcow2,allow=$PWD/golden,readonly=on\n\
                 echo \"run: exit $?\"\n"
            .into(),
        limit: LIMIT,
        results: None,
    });
    if !log.text.contains(&chain.digest()) {
        log.fail(format!("the guest did not print the disk's digest, {}", chain.digest()));
    }
    if log.values("run: exit ") != ["0"] {
        log.fail("the machine did not end well");
    }
}

/// An initramfs that mounts the first disk and prints the digest of each file.
fn guest_initramfs(linux: &Linux) -> Vec<u8> {
    let mut archive = pieces::busybox().unwrap();
    let modules = linux.add_modules(&["virtio_mmio", "virtio_blk", "crc32c_generic", "ext4"], &mut archive);
    let mut init = String::from(INIT);
    init.push_str(&modules);
    write!(
        init,
        r#"
# From here on the console is for the lines that the test reads, whole.
dmesg -n 1
wait=0
while [ ! -b /dev/vda ] && [ $wait -lt 100 ]; do sleep 0.1; wait=$((wait + 1)); done
echo "guest: serial $(cat /sys/block/vda/serial)"
mount -t ext4 -o ro /dev/vda /mnt || echo "guest: no mount"
cd /mnt && find . -type f -exec sha256sum {{}} \; | sort -k 2 | sed 's/^/guest: file /'
echo "guest: errors $(dmesg | grep -ciE 'i/o error|ext4-fs error|buffer error')"
echo "guest: done"
reboot -f
"#
    )
    .unwrap();
    archive.file("/init", init.as_bytes());
    archive.finish()
}
