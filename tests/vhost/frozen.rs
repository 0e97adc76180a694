//! A file system that stands still: who writes to it waits, and nobody else does.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use blockhouse_tests::client::{Client, Request};
use blockhouse_tests::serve::Serve;
use blockhouse_tests::{blockhouse, noise, on_path, run, scratch, skip};

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

    fn freeze(&self) {
        run(Command::new("fsfreeze").arg("--freeze").arg(&self.at)).succeeded();
    }

    fn thaw(&self) {
        run(Command::new("fsfreeze").arg("--unfreeze").arg(&self.at)).succeeded();
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        // Whoever waits for it could not even be killed. Not everybody has frozen it, or left it by now.
        let _ = Command::new("fsfreeze").arg("--unfreeze").arg(&self.at).output();
        let _ = Command::new("umount").arg("--lazy").arg(&self.at).output();
    }
}

/// A small write into the page cache is made by the thread of its queue, which may have to wait for that.
#[test]
fn a_file_system_that_stands_still_holds_up_its_own_disk_only() {
    let directory = scratch();
    let Some(still) = FileSystem::mount(directory.path()) else { return };
    let sockets = ["still", "neighbour"].map(|name| directory.path().join(format!("{name}.sock")));
    let images = [still.at.join("disk.raw"), directory.path().join("disk.raw")];
    let mut command = blockhouse();
    command.args(["-v", "serve"]);
    for (socket, image) in sockets.iter().zip(&images) {
        std::fs::write(image, noise(1, 1 << 20)).unwrap();
        let fields = format!("file={},format=raw,socket={}", image.display(), socket.display());
        command.arg("--disk").arg(fields);
    }
    let serve = Serve::start(&mut command, &directory.path().join("log"));
    let mut slow = Client::connect(&sockets[0], 1);
    let mut fast = Client::connect(&sockets[1], 1);
    let data = noise(2, 4096);
    // Everything is known, so that the write needs nobody else.
    assert!(slow.read_all() == noise(1, 1 << 20));
    still.freeze();
    let (sender, finished) = mpsc::channel();
    let bytes = data.clone();
    let writer = std::thread::spawn(move || {
        let written = slow.run(0, &[Request::Write { offset: 8192, data: &bytes }]);
        sender.send(()).unwrap();
        (slow, written)
    });
    for round in 0..50_u64 {
        let bytes = noise(round, 4096);
        fast.write(round * 4096, &bytes).unwrap();
        assert!(fast.read(round * 4096, 4096).unwrap() == bytes);
    }
    fast.flush().unwrap();
    assert!(finished.try_recv().is_err(), "a write to a file system that stands still ended");
    still.thaw();
    finished.recv_timeout(Duration::from_secs(60)).unwrap();
    let (mut slow, written) = writer.join().unwrap();
    assert!(written.iter().all(Result::is_ok));
    slow.flush().unwrap();
    assert!(slow.read(8192, 4096).unwrap() == data);
    drop((slow, fast));
    serve.terminate();
}
