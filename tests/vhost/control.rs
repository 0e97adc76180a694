//! `--control`: a disk that gets larger under its guest, and who may ask for what.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use blockhouse_tests::serve::Serve;
use blockhouse_tests::{COMMAND_LIMIT, Outcome, blockhouse, noise, qemu_img, run, scratch, skip};
use serde_json::{Value, json};
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use crate::frontend::{Guest, READ, WRITE};

const MIB: u64 = 1 << 20;

fn serve(directory: &Path, fields: &str) -> (Serve, PathBuf, PathBuf) {
    let (socket, control) = (directory.join("socket"), directory.join("control"));
    let mut command = blockhouse();
    command.args(["-v", "serve", "--disk", fields, "--socket"]).arg(&socket).arg("--control").arg(&control);
    (Serve::start(&mut command, &directory.join("log")), socket, control)
}

fn control(socket: &Path, arguments: &[&str]) -> Outcome {
    run(blockhouse().args(["control", "--socket"]).arg(socket).args(arguments))
}

/// A connection to read answers from, which are not waited for for ever.
fn connect(socket: &Path) -> BufReader<UnixStream> {
    let stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(COMMAND_LIMIT)).unwrap();
    BufReader::new(stream)
}

fn capacity(frontend: &mut Frontend) -> u64 {
    let (_, config) = frontend.get_config(0, 8, VhostUserConfigFlags::WRITABLE, &[0; 8]).unwrap();
    u64::from_le_bytes(config.try_into().unwrap()) * 512
}

/// Has the guest do one request of 64 KiB: the status, and the data.
fn request(guest: &mut Guest, kind: u32, offset: u64, data: &[u8]) -> (u8, Vec<u8>) {
    guest.submit(0, kind, offset / 512, data);
    let (slot, status) = guest.wait(1)[0];
    (status, guest.data(slot, data.len()))
}

/// What there is to grow: the image, the fields that open it, whether its base is longer than it was.
fn images(directory: &Path) -> Vec<(PathBuf, String)> {
    let raw = directory.join("disk.raw");
    std::fs::write(&raw, noise(1, 4 << 20)).unwrap();
    let packed = directory.join("packed.qcow2");
    let convert = ["convert", "-c", "-f", "raw", "-O", "qcow2"].map(AsRef::as_ref);
    qemu_img(convert.into_iter().chain([raw.as_os_str(), packed.as_os_str()]));
    let base = directory.join("base.raw");
    std::fs::write(&base, noise(1, 16 << 20)).unwrap();
    let overlay = directory.join("overlay.qcow2");
    let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.raw"].map(AsRef::as_ref);
    qemu_img(create.into_iter().chain([overlay.as_os_str(), "4M".as_ref()]));
    vec![
        (raw.clone(), format!("file={},format=raw", raw.display())),
        (packed.clone(), format!("file={},format=qcow2", packed.display())),
        (overlay.clone(), format!("file={},format=qcow2,allow={}", overlay.display(), base.display())),
    ]
}

/// Whether files of a directory can be used past the page cache.
fn has_direct_io(directory: &Path) -> bool {
    let path = directory.join("probe");
    std::fs::write(&path, []).unwrap();
    let opened = std::fs::File::options().read(true).custom_flags(libc::O_DIRECT).open(&path);
    std::fs::remove_file(&path).unwrap();
    opened.is_ok()
}

#[test]
fn a_disk_gets_larger_under_its_guest() {
    gets_larger(scratch().path(), "");
}

#[test]
fn a_disk_gets_larger_past_the_page_cache() {
    let directory = scratch();
    if !has_direct_io(directory.path()) {
        return skip("the file system has no direct I/O");
    }
    gets_larger(directory.path(), ",direct=on");
}

fn gets_larger(directory: &Path, more: &str) {
    let content = noise(1, 4 << 20);
    for (image, fields) in images(directory) {
        let fields = fields + more;
        let (serve, socket, control_socket) = serve(directory, &fields);
        let mut guest = Guest::new();
        let mut frontend = guest.connect(&socket);
        let (mut news, theirs) = UnixStream::pair().unwrap();
        frontend.set_backend_request_fd(&theirs).unwrap();
        assert_eq!(capacity(&mut frontend), 4 * MIB);
        // Something written that is not flushed, and something that was only read.
        let (first, last) = (noise(2, 65536), noise(3, 65536));
        assert_eq!(request(&mut guest, WRITE, 2 * MIB, &first).0, 0);
        assert_eq!(request(&mut guest, READ, MIB, &[0; 65536]).1, content[1 << 20..(1 << 20) + 65536]);
        assert_eq!(request(&mut guest, WRITE, 4 * MIB, &last).0, 1, "past the end");

        let said = control(&control_socket, &["resize", "disk0", "20M"]).succeeded();
        assert_eq!(said.text(), "disk0: 20 MiB (20971520 bytes), before 4 MiB (4194304 bytes)\n");
        assert!(!said.stderr.contains("could not be told"), "{}", said.stderr);
        let mut message = [0; 12];
        news.set_read_timeout(Some(COMMAND_LIMIT)).unwrap();
        news.read_exact(&mut message).unwrap();
        assert_eq!(message[..4], 2_u32.to_ne_bytes(), "VHOST_USER_BACKEND_CONFIG_CHANGE_MSG");
        assert_eq!(capacity(&mut frontend), 20 * MIB);

        // What there was is there; what is new reads as zero, over a longer base as well, and can be written.
        assert_eq!(request(&mut guest, READ, MIB, &[0; 65536]).1, content[1 << 20..(1 << 20) + 65536]);
        assert_eq!(request(&mut guest, READ, 2 * MIB, &[0; 65536]).1, first);
        for offset in [4 * MIB, 15 * MIB, 20 * MIB - 65536] {
            let (status, data) = request(&mut guest, READ, offset, &[9; 65536]);
            assert!(status == 0 && data == [0; 65536], "{fields} at {offset}");
        }
        assert_eq!(request(&mut guest, WRITE, 20 * MIB - 65536, &last).0, 0);
        assert_eq!(request(&mut guest, WRITE, 20 * MIB, &last).0, 1, "past the new end");
        // And again, far beyond what the first size had room for.
        control(&control_socket, &["resize", "disk0", "40G"]).succeeded();
        assert_eq!(capacity(&mut frontend), 40 << 30);
        assert_eq!(request(&mut guest, WRITE, (40 << 30) - 65536, &first).0, 0);
        assert_eq!(request(&mut guest, READ, (40 << 30) - 65536, &[0; 65536]).1, first);
        drop(frontend);
        serve.terminate();

        let format = image.extension().unwrap().to_str().unwrap();
        if format == "qcow2" {
            run(Command::new("qemu-img").args(["check", "-q", "-f", "qcow2"]).arg(&image)).succeeded();
        }
        let size =
            qemu_img(["info".as_ref(), "--output=json".as_ref(), "-f".as_ref(), format.as_ref(), image.as_os_str()]);
        assert_eq!(serde_json::from_str::<Value>(&size).unwrap()["virtual-size"], 40_u64 << 30);
        for (offset, expected) in [
            (0, &content[..65536]),
            (2 * MIB, &first),
            (15 * MIB, &[0; 65536]),
            (20 * MIB - 65536, &last),
            ((40 << 30) - 65536, &first),
        ] {
            let mut read = blockhouse();
            read.args(["read", "--length", "64K", "--format", format, "--offset", &offset.to_string(), "--allow"]);
            let there = run(read.arg(directory).arg(&image)).succeeded().stdout;
            assert!(there == expected, "{} at {offset}", image.display());
        }
        std::fs::remove_file(&image).unwrap();
    }
}

/// Each change of the size has the component open the image's base again: that is one open, however often.
#[test]
fn what_is_opened_again_is_not_kept_again() {
    let directory = scratch();
    let (_, fields) = images(directory.path()).pop().unwrap();
    let audit = directory.path().join("audit");
    let (socket, control_socket) = (directory.path().join("socket"), directory.path().join("control"));
    let mut command = blockhouse();
    command.args(["serve", "--disk", &fields, "--audit"]).arg(&audit);
    command.arg("--socket").arg(&socket).arg("--control").arg(&control_socket);
    let serve = Serve::start(&mut command, &directory.path().join("log"));
    let metrics = || -> Value {
        let text = control(&control_socket, &["metrics"]).succeeded().text();
        serde_json::from_str::<Value>(&text).unwrap()[0].clone()
    };
    let (before, mut opens) = (metrics(), 0);
    for size in 5..25 {
        control(&control_socket, &["resize", "disk0", &format!("{size}M")]).succeeded();
        let after = metrics();
        let (requested, now) = (after["requested"].as_array().unwrap(), after["figures"]["opens_granted"].as_u64());
        assert_eq!(requested.len(), 1, "{after:#}");
        assert_eq!(requested[0]["path"], before["requested"][0]["path"]);
        assert_eq!((requested[0]["times"].as_u64(), after["requested_left_out"].as_u64()), (now, Some(0)));
        assert!(now > Some(opens), "the base was not opened again");
        opens = now.unwrap();
    }
    serve.terminate();
    let lines = std::fs::read_to_string(&audit).unwrap();
    assert_eq!(lines.lines().count(), 1 + usize::try_from(opens.ilog10()).unwrap(), "{lines}");
}

/// The component does not change the size of such an image. The disk goes on as it was.
#[test]
fn an_image_with_an_external_data_file_keeps_its_size() {
    let directory = scratch();
    let (image, data) = (directory.path().join("disk.qcow2"), directory.path().join("data.raw"));
    let create = ["create", "-q", "-f", "qcow2", "-o"].map(AsRef::as_ref);
    let option = std::ffi::OsString::from(format!("data_file={}", data.display()));
    qemu_img(create.into_iter().chain([option.as_os_str(), image.as_os_str(), "4M".as_ref()]));
    let direct = if has_direct_io(directory.path()) { ",direct=on" } else { "" };
    let fields = format!("file={},format=qcow2,allow-write={}", image.display(), data.display());
    for (round, more) in ["", direct].into_iter().enumerate() {
        let (serve, socket, control_socket) = serve(directory.path(), &format!("{fields}{more}"));
        let mut guest = Guest::new();
        let mut frontend = guest.connect(&socket);
        let (before, after) = (noise(round as u64, 65536), noise(10 + round as u64, 65536));
        assert_eq!(request(&mut guest, WRITE, MIB, &before).0, 0);
        let refused = control(&control_socket, &["resize", "disk0", "20M"]).refused();
        assert!(refused.stderr.contains("an image with an external data file"), "{}", refused.stderr);
        assert_eq!(refused.status.code(), Some(5), "as for `resize`");
        let refused = control(&control_socket, &["--json", "resize", "disk0", "20M"]).refused();
        let said: Value = serde_json::from_str(&refused.text()).unwrap();
        assert_eq!((&said["error"]["kind"], &said["error"]["image"]), (&json!("unsupported"), &json!(image)));
        assert_eq!(capacity(&mut frontend), 4 * MIB);
        assert_eq!(request(&mut guest, WRITE, 2 * MIB + (round as u64) * MIB, &after).0, 0);
        assert_eq!(request(&mut guest, READ, MIB, &[0; 65536]).1, before);
        assert_eq!(request(&mut guest, READ, 2 * MIB + (round as u64) * MIB, &[0; 65536]).1, after);
        drop(frontend);
        serve.terminate();
        run(Command::new("qemu-img").args(["check", "-q", "-f", "qcow2"]).arg(&image)).succeeded();
    }
}

/// Requests that are in flight all the while are answered, and none is lost.
#[test]
fn requests_go_on_while_a_disk_grows() {
    let directory = scratch();
    let image = directory.path().join("disk.qcow2");
    run(blockhouse().args(["create", "--format", "qcow2", "--size", "16M"]).arg(&image)).succeeded();
    let (serve, socket, control_socket) = serve(directory.path(), &format!("file={},format=qcow2", image.display()));
    let mut client = blockhouse_tests::client::Client::connect(&socket, 1);
    let grower = std::thread::spawn(move || {
        for size in 17..27 {
            control(&control_socket, &["resize", "disk0", &format!("{size}M")]).succeeded();
        }
    });
    let mut round = 0;
    while !grower.is_finished() || round < 16 {
        let at = (round % 16) << 20;
        let data = noise(round, 65536);
        client.write(at, &data).unwrap();
        assert!(client.read(at, 65536).unwrap() == data, "round {round}");
        round += 1;
    }
    grower.join().unwrap();
    client.flush().unwrap();
    assert_eq!(client.capacity(), 26 * MIB);
    drop(client);
    serve.terminate();
    run(Command::new("qemu-img").args(["check", "-q", "-f", "qcow2"]).arg(&image)).succeeded();
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    let directory = scratch();
    let image = directory.path().join("disk.qcow2");
    run(blockhouse().args(["create", "--format", "qcow2", "--size", "4M"]).arg(&image)).succeeded();
    let fields = format!("file={},format=qcow2", image.display());
    let (server, _, socket) = serve(directory.path(), &fields);
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    for (arguments, why) in [
        (["resize", "disk0", "2M"], "can only get larger"),
        (["resize", "disk0", "4194305"], "multiples of 512"),
        (["resize", "disk0", "large"], "is not a size"),
        (["resize", "disk1", "8M"], "there is: disk0"),
        (["resize", "disk0", "9000000T"], "below 2^63"),
    ] {
        let refused = control(&socket, &arguments).refused();
        assert!(refused.stderr.contains(why), "{arguments:?}: {}", refused.stderr);
    }
    // Nobody is there to be told.
    let said = control(&socket, &["resize", "disk0", "8M"]).succeeded();
    assert!(said.stderr.contains("could not be told"), "{}", said.stderr);
    let status = control(&socket, &["status"]).succeeded().text();
    assert_eq!(status, format!("disk0: {} (qcow2), 8 MiB (8388608 bytes)\n", image.display()));
    let metrics = control(&socket, &["metrics"]).succeeded().text();
    let metrics: Value = serde_json::from_str(&metrics).unwrap();
    assert_eq!(metrics[0]["figures"]["component_calls"]["resize"], 1);
    server.terminate();
    assert!(!socket.exists(), "the socket goes with the server");
    let gone = control(&socket, &["status"]).refused();
    assert!(gone.stderr.contains("--control"), "{}", gone.stderr);

    // Neither read-only, nor guarded, nor with an end inside of a cluster.
    let raw = directory.path().join("disk.raw");
    std::fs::write(&raw, noise(1, 4096)).unwrap();
    let odd = directory.path().join("odd.qcow2");
    run(blockhouse().args(["create", "--format", "qcow2", "--size", "4097K"]).arg(&odd)).succeeded();
    for (fields, why) in [
        (format!("file={},format=raw,readonly=on", raw.display()), "read-only"),
        (format!("file={},format=raw,guard-header=on", raw.display()), "guard-header=on keeps its size"),
        (format!("file={},format=qcow2", odd.display()), "ends inside of a cluster"),
    ] {
        let (server, _, socket) = serve(directory.path(), &fields);
        let refused = control(&socket, &["resize", "disk0", "8M"]).refused();
        assert!(refused.stderr.contains(why), "{fields}: {}", refused.stderr);
        server.terminate();
    }
    assert_eq!(std::fs::read(&raw).unwrap(), noise(1, 4096));
}

/// A process of the same user that speaks nonsense gets errors, and keeps nobody else up.
#[test]
fn a_hostile_client_of_the_control_interface_gets_errors() {
    let directory = scratch();
    let raw = directory.path().join("disk.raw");
    std::fs::write(&raw, noise(1, 4096)).unwrap();
    let (serve, _, socket) = serve(directory.path(), &format!("file={},format=raw", raw.display()));
    let files = serve.open_files();
    let garbage = noise(1, 100_000);
    let lines = garbage.iter().filter(|byte| **byte == b'\n').count();
    // With how many answers each gets: one for a line, and none for what ends before its line does.
    for (sent, expected) in [
        (garbage, lines),
        (vec![b'['; 100_000], 1),
        (b"\n\n\n".to_vec(), 3),
        (b"{\"command\":\"resize\",\"disk\":\"../../etc\",\"size\":\"1T\"}\n".to_vec(), 1),
        (b"{\"command\":\"open\",\"file\":\"/etc/shadow\"}\n".to_vec(), 1),
        (b"{\"command\":\"resize\",\"disk\":\"disk0\",\"size\":\"8K\",\"file\":\"/etc/shadow\"}\n".to_vec(), 1),
        (json!({"command": "resize", "disk": "disk0", "size": "1G"}).to_string().into_bytes(), 0),
    ] {
        let mut stream = connect(&socket);
        // It may be cut off in the middle.
        let _ = stream.get_mut().write_all(&sent);
        let _ = stream.get_mut().shutdown(Shutdown::Write);
        let answers: Vec<String> = stream.lines().map_while(Result::ok).collect();
        let start = String::from_utf8_lossy(&sent[..sent.len().min(80)]);
        assert_eq!(answers.len(), expected, "answers to {start:?}");
        for line in answers {
            let answer: Value = serde_json::from_str(&line).unwrap();
            assert!(answer["error"]["message"].is_string() && answer.get("result").is_none(), "{line}");
        }
    }
    // Asks, and takes no answer.
    let mut deaf = UnixStream::connect(&socket).unwrap();
    deaf.write_all(&b"{\"command\":\"status\"}\n".repeat(100)).unwrap();
    drop(deaf);
    assert!(control(&socket, &["status"]).succeeded().text().contains("4 KiB (4096 bytes)"));
    serve.lets_go(files);
    assert_eq!(std::fs::metadata(&raw).unwrap().len(), 4096);
    serve.terminate();
}

/// Who comes second is served when the first one has gone.
#[test]
fn connections_are_served_one_after_the_other() {
    let directory = scratch();
    let raw = directory.path().join("disk.raw");
    std::fs::write(&raw, noise(1, 4096)).unwrap();
    let (serve, _, socket) = serve(directory.path(), &format!("file={},format=raw", raw.display()));
    let ask = |stream: &mut BufReader<UnixStream>| stream.get_mut().write_all(b"{\"command\":\"status\"}\n").unwrap();
    let answer = |stream: &mut BufReader<UnixStream>| {
        let mut line = String::new();
        stream.read_line(&mut line).unwrap();
        assert!(line.contains("\"virtual_size_bytes\":4096"), "{line}");
    };
    let (mut first, mut second) = (connect(&socket), connect(&socket));
    ask(&mut first);
    answer(&mut first);
    ask(&mut second);
    for _ in 0..100 {
        ask(&mut first);
        answer(&mut first);
    }
    second.get_mut().set_nonblocking(true).unwrap();
    let nothing = second.read(&mut [0]).unwrap_err();
    assert_eq!(nothing.kind(), std::io::ErrorKind::WouldBlock, "two connections are served at a time");
    second.get_mut().set_nonblocking(false).unwrap();
    drop(first);
    answer(&mut second);
    drop(second);
    serve.terminate();
}

/// It is said what a command waits for.
#[test]
fn who_comes_second_is_told_so() {
    let directory = scratch();
    let raw = directory.path().join("disk.raw");
    std::fs::write(&raw, noise(1, 4096)).unwrap();
    let (serve, _, socket) = serve(directory.path(), &format!("file={},format=raw", raw.display()));
    let mut first = BufReader::new(UnixStream::connect(&socket).unwrap());
    let mut command = blockhouse();
    command.args(["control", "--socket"]).arg(&socket).arg("status");
    let mut second = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (sender, said) = std::sync::mpsc::channel();
    let stderr = BufReader::new(second.stderr.take().unwrap());
    std::thread::spawn(move || stderr.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
    let started = Instant::now();
    // The first one is silent for less than ten seconds.
    let line = loop {
        assert!(started.elapsed() < COMMAND_LIMIT, "nobody is told");
        first.get_mut().write_all(b"{\"command\":\"status\"}\n").unwrap();
        assert!(first.read_line(&mut String::new()).unwrap() > 0, "the first one is not served any more");
        match said.recv_timeout(Duration::from_millis(100)) {
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {}
            line => break line.expect("it ended without a word"),
        }
    };
    assert!(line.contains("still waiting"), "{line}");
    drop(first);
    let outcome = second.wait_with_output().unwrap();
    assert!(outcome.status.success() && outcome.stdout.starts_with(b"disk0: "), "{outcome:?}");
    serve.terminate();
}

/// The server ends when it is to, whoever is connected and has something to say.
#[test]
fn who_talks_on_does_not_keep_the_server() {
    let directory = scratch();
    let raw = directory.path().join("disk.raw");
    std::fs::write(&raw, noise(1, 4096)).unwrap();
    let (serve, _, socket) = serve(directory.path(), &format!("file={},format=raw", raw.display()));
    let stream = UnixStream::connect(&socket).unwrap();
    let mut answers = BufReader::new(stream.try_clone().unwrap()).lines();
    (&stream).write_all(b"{\"command\":\"status\"}\n").unwrap();
    answers.next().unwrap().unwrap();
    let ended = Arc::new(AtomicBool::new(false));
    let talker = std::thread::spawn({
        let ended = Arc::clone(&ended);
        move || {
            let ask = || (&stream).write_all(b"{\"command\":\"status\"}\n");
            while !ended.load(Ordering::Relaxed) && ask().is_ok() && answers.next().is_some_and(|line| line.is_ok()) {}
        }
    });
    serve.terminate();
    ended.store(true, Ordering::Relaxed);
    talker.join().unwrap();
    assert!(!socket.exists());
}
