//! QEMU is the machine monitor, and its guest's disk comes from `blockhouse serve`, which is killed under it.
//!
//! ```text
//!  test                    blockhouse serve         QEMU (emulation)        guest
//!  ┌─ start ────────────────▶ ┌─ overlay ◀─ socket ──▶ vhost-user-blk ◀─────▶ fio writes, and verifies
//!  │  "begin 1" ◀─────────────┼────────────────────────────────────────────── console
//!  ├─ kill -9 ──────────────▶ ╳                        reconnects               waits
//!  └─ start again ──────────▶ ┌─ requests in flight, again ─────────────────▶ goes on
//! ```

use std::fmt::Write as _;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use blockhouse_tests::guest::fio;
use blockhouse_tests::guest::pieces::{self, INIT, Linux};
use blockhouse_tests::guest::qemu::{KERNEL_OPTIONS, find_qemu, qemu};
use blockhouse_tests::serve::Serve;
use blockhouse_tests::{noise, qemu_img, run, scratch, skip, target_directory};
use rustix::process::Signal;

use crate::machine::turn;

/// How often the server is killed.
const KILLS: usize = 3;

/// From start to power-off.
const LIMIT: Duration = Duration::from_secs(400);

/// Each job of fio writes one slot, and all are verified at the end.
const SLOT_MIB: usize = 8;
const SLOTS: usize = KILLS + 1;

#[test]
fn linux_under_qemu_survives_kills_of_its_disk() {
    if std::env::var_os("BLOCKHOUSE_QUICK").is_some() {
        return skip("left out by --quick");
    }
    let found = find_qemu().and_then(|qemu| {
        let linux = Linux::find()?;
        let initrd = guest(&linux)?;
        Ok((qemu, linux, initrd))
    });
    let (unpacked, linux, content) = match found {
        Ok(found) => found,
        Err(reason) => return skip(reason),
    };
    let _turn = turn();
    let directory = scratch();
    let initrd = directory.path().join("initrd");
    std::fs::write(&initrd, content).unwrap();
    let (overlay, fields) = disk(directory.path());
    let socket = directory.path().join("socket");
    let console = target_directory().join("guest/vhost-user.log");
    std::fs::create_dir_all(console.parent().unwrap()).unwrap();
    std::fs::write(&console, "").unwrap();

    let mut serve = Serve::disk(&socket, &fields);
    let mut command = qemu(unpacked.as_deref());
    let reconnect = reconnect_option(unpacked.as_deref());
    command
        .args(["-machine", "q35,memory-backend=memory", "-accel", "tcg", "-cpu", "max,-la57", "-m", "512"])
        .args(["-object", "memory-backend-memfd,id=memory,size=512M,share=on", "-smp", "2"])
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"])
        .arg("-chardev")
        .arg(format!("socket,id=disk,path={},{reconnect}", socket.display()))
        .args(["-device", "vhost-user-blk-pci,chardev=disk,num-queues=2"])
        .arg("-kernel")
        .arg(&linux.kernel)
        .arg("-initrd")
        .arg(&initrd)
        .args(["-append", &format!("console=ttyS0 quiet reboot=t {KERNEL_OPTIONS}")])
        .stdin(Stdio::null())
        .stdout(std::fs::File::options().append(true).open(&console).unwrap())
        .stderr(std::fs::File::options().append(true).open(&console).unwrap());
    let mut machine = Killed(command.spawn().unwrap());
    let started = Instant::now();
    let text = || String::from_utf8_lossy(&std::fs::read(&console).unwrap()).into_owned();
    let fail = |what: &str, serve: &Serve| -> ! {
        panic!("{what}\nconsole ({}):\n{}\nserver:\n{}", console.display(), text(), serve.log())
    };
    for kill in 1..=KILLS {
        while !text().contains(&format!("guest: begin {kill} .")) {
            if machine.0.try_wait().unwrap().is_some() || started.elapsed() > LIMIT {
                fail(&format!("the guest did not come to job {kill}"), &serve);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        // Some way into the job, when the image grows.
        let blocks = || std::fs::metadata(&overlay).unwrap().blocks();
        let before = blocks();
        while blocks() < before + 512 && started.elapsed() < LIMIT {
            std::thread::sleep(Duration::from_millis(1));
        }
        // The guest fills the queues of a server that stands still, so that it is killed with work in hand.
        serve.signal(Signal::STOP);
        std::thread::sleep(Duration::from_millis(500));
        serve.signal(Signal::CONT);
        std::thread::sleep(Duration::from_millis(1));
        serve.kill();
        serve = Serve::disk(&socket, &fields);
    }
    while machine.0.try_wait().unwrap().is_none() {
        if started.elapsed() > LIMIT {
            fail("the guest did not come to its end", &serve);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let said: Vec<String> =
        text().lines().filter_map(|line| line.trim_end().strip_prefix("guest: ").map(str::to_owned)).collect();
    let mut expected = vec!["serial blockhouse-0 .".to_owned(), "queues 2 .".to_owned()];
    for job in 1..=SLOTS {
        expected.extend([format!("begin {job} ."), format!("wrote {job} 0 .")]);
    }
    expected.extend((1..=SLOTS).map(|job| format!("verified {job} 0 .")));
    expected.extend(["problems 0 .".to_owned(), "end .".to_owned()]);
    if said != expected {
        fail(&format!("the guest said {said:?}, not {expected:?}"), &serve);
    }
    let again = serve.log().matches("requests that were in flight are executed again").count();
    eprintln!("vhost-user: in {again} queues requests were in flight at a kill");
    // A kill that met none would prove little.
    assert!(again > 0, "{}", serve.log());
    eprintln!("vhost-user: {:.1} s, {}", started.elapsed().as_secs_f64(), console.display());
    serve.terminate();
    // Space that a killed server had reserved may be lost (3); nothing else may be.
    let check = run(Command::new("qemu-img").args(["check", "-q", "-f", "qcow2"]).arg(overlay));
    assert!(matches!(check.status.code(), Some(0 | 3)), "{}{}", check.text(), check.stderr);
}

/// A process that does not outlive its test.
struct Killed(std::process::Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An overlay over a base with content, and the fields that open it.
fn disk(directory: &Path) -> (std::path::PathBuf, String) {
    let raw = directory.join("base.raw");
    std::fs::write(&raw, noise(21, (SLOTS * SLOT_MIB) << 20)).unwrap();
    let (base, overlay) = (directory.join("base.qcow2"), directory.join("overlay.qcow2"));
    let convert = ["convert", "-f", "raw", "-O", "qcow2"].map(AsRef::as_ref);
    qemu_img(convert.into_iter().chain([raw.as_os_str(), base.as_os_str()]));
    let create = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2"].map(AsRef::as_ref);
    qemu_img(create.into_iter().chain([overlay.as_os_str()]));
    // Each write waits for the storage, so that a kill comes while some do.
    let fields =
        format!("file={},format=qcow2,allow={},queues=2,cache=writethrough", overlay.display(), base.display());
    (overlay, fields)
}

/// How this QEMU is told to connect again: in milliseconds since 9.2, in seconds before.
fn reconnect_option(unpacked: Option<&Path>) -> &'static str {
    let version = run(qemu(unpacked).arg("--version")).succeeded().text();
    let numbers = version.split("version ").nth(1).unwrap_or_default();
    let mut numbers = numbers.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    if (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (9, 2) {
        "reconnect-ms=200"
    } else {
        "reconnect=1"
    }
}

/// The guest: busybox, fio, and what it does.
fn guest(linux: &Linux) -> Result<Vec<u8>, String> {
    let mut archive = pieces::busybox()?;
    fio::add(&mut archive)?;
    let mut init = String::from(INIT);
    init.push_str(&linux.add_modules(&["virtio_pci", "virtio_blk", "crc32c_generic"], &mut archive));
    write!(
        init,
        r#"
PATH=/bin:/usr/bin
dmesg -n 1
say() {{ echo "guest: $* ."; }}
wait=0
while [ ! -b /dev/vda ] && [ $wait -lt 100 ]; do sleep 0.1; wait=$((wait + 1)); done
say "serial $(cat /sys/block/vda/serial)"
say "queues $(ls /sys/block/vda/mq | wc -l)"
job() {{
    echo "--thread --filename=/dev/vda --ioengine=libaio --iodepth=16 --direct=1 --verify_state_save=0 --minimal \
        --size={SLOT_MIB}m --name=write --rw=randwrite --bsrange=4k-64k --offset=$((($1 - 1) * {SLOT_MIB}))m \
        --randseed=$1 --verify=crc32c --verify_interval=4k"
}}
n=1
while [ $n -le {SLOTS} ]; do
    say "begin $n"
    fio $(job $n) --end_fsync=1 >/tmp/fio 2>&1
    code=$?
    [ $code = 0 ] || cat /tmp/fio
    say "wrote $n $code"
    n=$((n + 1))
done
n=1
while [ $n -le {SLOTS} ]; do
    fio $(job $n) --verify_only >/tmp/fio 2>&1
    say "verified $n $?"
    n=$((n + 1))
done
say "problems $(dmesg | grep -ciE 'i/o error|buffer error')"
say end
poweroff -f
"#
    )
    .unwrap();
    archive.file("/init", init.as_bytes());
    Ok(archive.finish())
}
