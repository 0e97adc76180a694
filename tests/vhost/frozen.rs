//! A file system that stands still: who writes to it waits, and nobody else does.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use blockhouse_tests::client::{Client, Request};
use blockhouse_tests::serve::Serve;
use blockhouse_tests::{COMMAND_LIMIT, blockhouse, noise, on_path, run, scratch, skip};

/// A file system in a file, which only this thread and its children see. It stands still while it is frozen.
struct FileSystem {
    at: PathBuf,
}

impl FileSystem {
    /// `None`, and a word about it, where that cannot be.
    fn mount(directory: &Path) -> Option<Self> {
        let (file, at) = (directory.join("fs.img"), directory.join("fs"));
        if ["mkfs.ext4", "mount", "umount", "fsfreeze"].iter().any(|tool| !on_path(tool)) {
            skip("tools for file systems are not installed");
            return None;
        }
        std::fs::File::create(&file).unwrap().set_len(32 << 20).unwrap();
        std::fs::create_dir(&at).unwrap();
        run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&file)).succeeded();
        // SAFETY: it touches no memory. Only this thread moves to the new mount namespace.
        let own = unsafe { libc::unshare(libc::CLONE_NEWNS) } == 0;
        let done = |command: &mut Command| command.output().is_ok_and(|output| output.status.success());
        let mounted = own
            && done(Command::new("mount").args(["--make-rprivate", "/"]))
            && done(Command::new("mount").args(["-o", "loop"]).arg(&file).arg(&at));
        if !mounted {
            skip("cannot mount a file system");
            return None;
        }
        Some(Self { at })
    }

    /// Until what this gives is dropped.
    fn freeze(&self) -> Frozen<'_> {
        run(Command::new("fsfreeze").arg("--freeze").arg(&self.at)).succeeded();
        Frozen(self)
    }
}

/// Who waits for a frozen file system cannot even be killed: dropped before a server is.
struct Frozen<'a>(&'a FileSystem);

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze").arg("--unfreeze").arg(&self.0.at).output();
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        // Not everybody has left it by now.
        let _ = Command::new("umount").arg("--lazy").arg(&self.at).output();
    }
}

/// Requests that a pool has to make: more than it has threads.
const ZEROES: u64 = 14;

/// What one of them is about, in bytes: what requests have for themselves at a time.
const PART: u64 = 64 << 10;

/// Waits until so many threads of the server stand still in the kernel.
#[track_caller]
fn until_stuck(serve: &Serve, count: usize) {
    let started = Instant::now();
    let stuck = || {
        let threads = std::fs::read_dir(format!("/proc/{}/task", serve.id())).unwrap();
        let states = threads.filter_map(|thread| std::fs::read_to_string(thread.unwrap().path().join("stat")).ok());
        // A name in brackets, which may have any character in it, and the state.
        states.filter(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('D'))).count()
    };
    while stuck() < count {
        assert!(started.elapsed() < COMMAND_LIMIT, "{} of {count} threads stand still", stuck());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Whoever waits for the storage longer than a call of a component may take has not done anything wrong, and must not
/// be thrown away with what is not written yet.
#[test]
fn a_component_that_waits_for_the_storage_is_not_thrown_away() {
    let directory = scratch();
    let Some(still) = FileSystem::mount(directory.path()) else { return };
    let (socket, policy, image) =
        (directory.path().join("socket"), directory.path().join("policy.toml"), still.at.join("disk.qcow2"));
    run(blockhouse().args(["create", "--format", "qcow2"]).arg(&image).arg("4M")).succeeded();
    let limit = Duration::from_millis(200);
    std::fs::write(&policy, format!("version = 1\n[limits]\ncall-time-ms = {}\n", limit.as_millis())).unwrap();
    let mut command = blockhouse();
    command.args(["-v", "serve", "--socket"]).arg(&socket).arg("--policy").arg(&policy);
    command.arg("--disk").arg(format!("file={},format=qcow2", image.display()));
    let serve = Serve::start(&mut command, &directory.path().join("log"));
    let mut client = Client::connect(&socket, 1);
    let content = noise(3, 1 << 20);
    client.write(0, &content).unwrap();
    let frozen = still.freeze();
    let flush = std::thread::spawn(move || {
        let flushed = client.flush();
        (client, flushed)
    });
    // Whatever it does first, it has to write and to sync.
    until_stuck(&serve, 1);
    std::thread::sleep(5 * limit);
    drop(frozen);
    let (mut client, flushed) = flush.join().unwrap();
    flushed.unwrap();
    assert!(client.read(0, content.len()).unwrap() == content);
    client.write(2 << 20, &content).unwrap();
    client.flush().unwrap();
    drop(client);
    serve.terminate();
}

/// A small write into the page cache is made by the thread of its queue, which may have to wait for that. What
/// else the disk was asked for has all the threads of its pool wait.
#[test]
fn a_file_system_that_stands_still_holds_up_its_own_disk_only() {
    let directory = scratch();
    let Some(still) = FileSystem::mount(directory.path()) else { return };
    let sockets = ["still", "neighbour"].map(|name| directory.path().join(format!("{name}.sock")));
    let images = [still.at.join("disk.raw"), directory.path().join("disk.raw")];
    let mut command = blockhouse();
    command.args(["-v", "serve"]);
    for (socket, image) in sockets.iter().zip(&images) {
        std::fs::write(image, noise(1, 2 << 20)).unwrap();
        let fields = format!("file={},format=raw,socket={}", image.display(), socket.display());
        command.arg("--disk").arg(fields);
    }
    let serve = Serve::start(&mut command, &directory.path().join("log"));
    let mut slow = Client::connect(&sockets[0], 1);
    let mut fast = Client::connect(&sockets[1], 1);
    let small = noise(2, 4096);
    let mut content = noise(1, 2 << 20);
    // Everything is known, so that the write needs nobody else.
    assert!(slow.read_all() == content);
    content[8192..][..small.len()].copy_from_slice(&small);
    content[1 << 20..][..usize::try_from(ZEROES * PART).unwrap()].fill(0);
    let frozen = still.freeze();
    let (sender, finished) = mpsc::channel();
    let writer = std::thread::spawn(move || {
        let zeroes = (0..ZEROES).map(|part| Request::Zero { offset: (1 << 20) + part * PART, len: PART, unmap: false });
        let mut requests: Vec<_> = zeroes.collect();
        // The last one: the queue goes no further then.
        requests.push(Request::Write { offset: 8192, data: &small });
        let done = slow.run(0, &requests);
        sender.send(()).unwrap();
        (slow, done)
    });
    // Eight of the pool, and the queue's, unless the pool has to make that write as well.
    until_stuck(&serve, if serve.log().contains("no io_uring here") { 8 } else { 9 });
    for round in 0..50_u64 {
        let bytes = noise(round, 4096);
        fast.write(round * 4096, &bytes).unwrap();
        assert!(fast.read(round * 4096, 4096).unwrap() == bytes);
    }
    let zero = Request::Zero { offset: 1 << 20, len: PART, unmap: false };
    assert!(fast.run(0, &[zero, Request::Flush]).iter().all(Result::is_ok));
    fast.write(256 << 10, &noise(4, 128 << 10)).unwrap();
    assert!(finished.try_recv().is_err(), "a write to a file system that stands still ended");
    drop(frozen);
    finished.recv_timeout(Duration::from_secs(60)).unwrap();
    let (mut slow, done) = writer.join().unwrap();
    assert!(done.iter().all(Result::is_ok), "{done:?}");
    slow.flush().unwrap();
    assert!(slow.read_all() == content);
    drop((slow, fast));
    serve.terminate();
}
