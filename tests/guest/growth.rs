//! A disk of `blockhouse run` that gets larger under Linux.

use blockhouse_tests::guest::pieces::{self, INIT, Linux};
use blockhouse_tests::guest::qemu::KERNEL_OPTIONS;
use blockhouse_tests::{scratch, skip};

use crate::machine::{Job, LIMIT, Machine};

/// The kernel hears of it by interrupt, while it runs, and writes to what the disk gained.
#[test]
fn linux_sees_a_disk_get_larger_and_writes_to_its_end() {
    let (machine, linux) = match Machine::find().and_then(|machine| Ok((machine, Linux::find()?))) {
        Ok(found) => found,
        Err(reason) => return skip(reason),
    };
    let directory = scratch();
    let initrd = directory.path().join("initrd");
    let mut archive = pieces::busybox().unwrap();
    let mut init = String::from(INIT);
    init.push_str(&linux.add_modules(&["virtio_mmio", "virtio_blk"], &mut archive));
    init.push_str(
        r#"
dmesg -n 1
wait=0
while [ ! -b /dev/vda ] && [ $wait -lt 100 ]; do sleep 0.1; wait=$((wait + 1)); done
echo "guest: before $(cat /sys/block/vda/size)"
echo "guest: ready"
wait=0
while [ "$(cat /sys/block/vda/size)" != 131072 ] && [ $wait -lt 600 ]; do sleep 0.1; wait=$((wait + 1)); done
echo "guest: after $(cat /sys/block/vda/size)"
echo "guest: new $(dmesg | grep -c 'new size: 131072')"
echo "the new end" | dd of=/dev/vda bs=512 seek=131071 conv=sync,fsync 2>/dev/null
echo "guest: written $?"
reboot -f
"#,
    );
    archive.file("/init", init.as_bytes());
    std::fs::write(&initrd, archive.finish()).unwrap();

    let log = machine.run(&Job {
        name: "growth",
        files: vec![("vmlinuz", linux.kernel.clone()), ("initrd", initrd)],
        script: format!(
            "./blockhouse create --format qcow2 --size 32M disk.qcow2\n\
             ./blockhouse run --control control --kernel vmlinuz --initrd initrd \
             --cmdline 'console=ttyS0 {KERNEL_OPTIONS}' --disk file=disk.qcow2,format=qcow2 > console & run=$!\n\
             until grep -q 'guest: ready' console; do kill -0 $run || break; sleep 0.2; done\n\
             ./blockhouse control --socket control resize disk0 64M\n\
             echo \"control: exit $?\"\n\
             wait $run\n\
             echo \"run: exit $?\"\n\
             cat console\n\
             ./blockhouse check --format qcow2 disk.qcow2 > /dev/null 2>&1\n\
             echo \"check: exit $?\"\n\
             echo \"end: $(./blockhouse read --format qcow2 --offset 67108352 --length 11 disk.qcow2)\"\n"
        ),
        limit: LIMIT * 2,
        results: None,
    });
    for (key, expected) in [
        ("guest: before ", "65536"),
        ("control: exit ", "0"),
        ("guest: after ", "131072"),
        ("guest: new ", "1"),
        ("guest: written ", "0"),
        ("run: exit ", "0"),
        ("check: exit ", "0"),
        ("end: ", "the new end"),
    ] {
        if log.values(key) != [expected] {
            log.fail(format!("{key}{:?}, where {expected} was expected", log.values(key)));
        }
    }
}
