//! `blockhouse serve` as a service: its sockets, its start, its end.

use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use blockhouse_tests::serve::Serve;
use blockhouse_tests::{COMMAND_LIMIT, blockhouse, noise, program, run, scratch, skip};
use rustix::process::{Pid, Signal, kill_process};

use crate::frontend::{Guest, SLOTS, WRITE};
use blockhouse_tests::client::Client;

const SIZE: usize = 1 << 20;

fn raw(directory: &Path, name: &str, seed: u64) -> String {
    let image = directory.join(name);
    std::fs::write(&image, noise(seed, SIZE)).unwrap();
    format!("file={},format=raw", image.display())
}

#[test]
fn guests_come_one_after_the_other() {
    let directory = scratch();
    let socket = directory.path().join("socket");
    let fields = raw(directory.path(), "disk.raw", 1);
    let serve = Serve::disk(&socket, &fields);
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    for round in 0..3_u8 {
        let mut client = Client::connect(&socket, 1);
        if round > 0 {
            assert_eq!(client.read(0, 512).unwrap(), [round - 1; 512]);
        }
        client.write(0, &[round; 512]).unwrap();
    }
    // Who comes while another one is served waits for it to leave.
    let first = Client::connect(&socket, 1);
    let path = socket.clone();
    let second = std::thread::spawn(move || Client::connect(&path, 1).read(0, 512).unwrap());
    drop(first);
    assert_eq!(second.join().unwrap(), [2; 512]);
    serve.terminate();
}

#[test]
fn a_live_socket_is_refused_and_a_dead_one_replaced() {
    let directory = scratch();
    let socket = directory.path().join("socket");
    let fields = raw(directory.path(), "disk.raw", 2);
    let other = raw(directory.path(), "other.raw", 3);
    let serve = Serve::disk(&socket, &fields);
    let serve_other = || {
        let mut command = blockhouse();
        command.args(["serve", "--disk", &other, "--socket"]).arg(&socket);
        run(&mut command)
    };
    let refused = serve_other().refused();
    assert!(refused.stderr.contains("is served by another process"), "{}", refused.stderr);
    Client::connect(&socket, 1).read(0, 512).unwrap();
    serve.kill();
    assert!(socket.exists());
    let serve = Serve::disk(&socket, &fields);
    Client::connect(&socket, 1).read(0, 512).unwrap();
    serve.terminate();

    std::fs::write(&socket, "precious").unwrap();
    let refused = serve_other().refused();
    assert!(refused.stderr.contains("is no socket"), "{}", refused.stderr);
    assert_eq!(std::fs::read(&socket).unwrap(), b"precious");
}

#[test]
fn several_disks_have_several_sockets() {
    let directory = scratch();
    let [a, b] = ["a", "b"].map(|name| directory.path().join(name));
    let disks = [(&a, 4), (&b, 5)].map(|(socket, seed)| {
        let name = format!("{seed}.raw");
        format!("{},socket={}", raw(directory.path(), &name, seed), socket.display())
    });
    let mut command = blockhouse();
    command.args(["-v", "serve", "--disk", &disks[0], "--disk", &disks[1]]);
    let serve = Serve::start(&mut command, &directory.path().join("log"));
    let mut clients = [&a, &b].map(|socket| Client::connect(socket, 1));
    for (client, seed) in clients.iter_mut().zip([4, 5]) {
        assert_eq!(client.read_all(), noise(seed, SIZE));
    }
    // The process ends although both are connected.
    serve.terminate();
    assert!(!a.exists() && !b.exists());
}

#[test]
fn what_is_missing_is_said() {
    let directory = scratch();
    let disk = raw(directory.path(), "disk.raw", 6);
    let with_socket = format!("{disk},socket=/s");
    for (arguments, why) in [
        (vec!["--disk", &disk], "where is"),
        (vec!["--disk", &disk, "--disk", &with_socket], "where is"),
        (vec!["--socket", "/s", "--disk", &disk, "--disk", &disk], "a socket of its own"),
        (vec!["--socket", "/s", "--disk", &with_socket], "two sockets"),
        (vec!["--socket", "fd:x", "--disk", &disk], "as in fd:3"),
        (vec!["--socket", "fd:1", "--disk", &disk], "fd:3"),
        (vec!["--socket", "fd:77", "--disk", &disk], "fd:77 is not open"),
        (vec!["--socket", "/nowhere/at/all", "--disk", &disk], "/nowhere/at/all"),
    ] {
        let refused = run(blockhouse().arg("serve").args(&arguments)).refused();
        assert!(refused.stderr.contains(why), "{arguments:?}: {}", refused.stderr);
    }
    let refused = run(blockhouse().args(["run", "--disk", &with_socket])).refused();
    assert!(refused.stderr.contains("blockhouse serve"), "{}", refused.stderr);
}

/// As a service manager passes one: file descriptor 3.
#[test]
fn a_socket_can_be_passed() {
    let directory = scratch();
    let socket = directory.path().join("socket");
    let fields = raw(directory.path(), "disk.raw", 7);
    let listener = UnixListener::bind(&socket).unwrap();
    // Who connects before there is a server waits.
    let waits = UnixStream::connect(&socket).unwrap();
    for _ in 0..2 {
        let mut command = blockhouse();
        command.args(["-v", "serve", "--socket", "fd:3", "--disk", &fields, "--control"]);
        command.arg(directory.path().join("control"));
        let fd = listener.as_raw_fd();
        // SAFETY: dup2 is async-signal-safe, and `listener` is open as long as the child starts.
        unsafe {
            command.pre_exec(move || {
                // Its copy has no close-on-exec.
                if fd == 3 {
                    libc::fcntl(3, libc::F_SETFD, 0)
                } else {
                    libc::dup2(fd, 3)
                };
                Ok(())
            });
        }
        let serve = Serve::start(&mut command, &directory.path().join("log"));
        let _ = waits.shutdown(std::net::Shutdown::Both);
        assert_eq!(Client::connect(&socket, 1).read_all(), noise(7, SIZE));
        // The process that will remove the other one does not keep it open when the server has ended.
        let started = std::time::Instant::now();
        while sockets_of_the_attendant(&serve) != Some(0) {
            assert!(started.elapsed() < blockhouse_tests::COMMAND_LIMIT, "a socket that was passed is held open");
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        serve.terminate();
        assert!(socket.exists(), "the name is its owner's");
        assert!(!directory.path().join("control").exists());
    }
}

/// Whoever starts a server may have a directory open, or a file that is none of the server's business.
#[test]
fn what_was_passed_and_is_not_named_is_closed() {
    let directory = scratch();
    let path = |name: &str| directory.path().join(name);
    std::fs::write(path("secret"), "secret").unwrap();
    raw(directory.path(), "disk.raw", 8);
    let script = r#"exec "$0" -v serve --disk file=/dev/fd/9,format=raw --socket "$1/socket" \
        7<"$1" 8<>"$1/secret" 9<>"$1/disk.raw""#;
    let mut command = Command::new("sh");
    command.args(["-c", script]).arg(program()).arg(directory.path());
    let serve = Serve::start(&mut command, &path("log"));
    assert_eq!(Client::connect(&path("socket"), 1).read_all(), noise(8, SIZE), "what is named is not closed");
    let files = std::fs::read_dir(format!("/proc/{}/fd", serve.id())).unwrap();
    let open: Vec<_> = files.filter_map(|file| std::fs::read_link(file.unwrap().path()).ok()).collect();
    assert!(open.contains(&path("disk.raw")), "{open:?}");
    assert!(!open.contains(&path("secret")) && !open.iter().any(|file| file == directory.path()), "{open:?}");
    serve.terminate();
}

/// As a program starts it that takes its own signals from a descriptor, or does not wait for its processes.
#[test]
fn signals_arrive_whatever_was_blocked_or_ignored() {
    let directory = scratch();
    let socket = directory.path().join("socket");
    let mut command = blockhouse();
    command.args(["-v", "serve", "--disk", &raw(directory.path(), "disk.raw", 9), "--socket"]).arg(&socket);
    // SAFETY: these calls are async-signal-safe, and the set is the child's own.
    unsafe {
        command.pre_exec(|| {
            let mut all = std::mem::zeroed::<libc::sigset_t>();
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut());
            libc::signal(libc::SIGCHLD, libc::SIG_IGN);
            Ok(())
        });
    }
    let mut serve = Serve::start(&mut command, &directory.path().join("log"));
    assert_eq!(Client::connect(&socket, 1).read_all(), noise(9, SIZE));
    serve.signal(Signal::TERM);
    assert_eq!(serve.wait().code(), Some(0), "{}", serve.log());
    // The process that removes sockets was waited for, and how it ended is known.
    assert!(!socket.exists() && !serve.log().contains("does not end"), "{}", serve.log());
}

/// Sockets that are open in the process that removes sockets, if there is one.
fn sockets_of_the_attendant(serve: &Serve) -> Option<usize> {
    let process = serve.id();
    let children = std::fs::read_to_string(format!("/proc/{process}/task/{process}/children")).unwrap();
    let attends = |child: &&str| {
        std::fs::read_to_string(format!("/proc/{child}/cmdline")).is_ok_and(|line| line.contains("--attend-parent"))
    };
    let attendant = children.split_whitespace().find(attends)?;
    let files = std::fs::read_dir(format!("/proc/{attendant}/fd")).ok()?;
    let targets = files.filter_map(|file| std::fs::read_link(file.ok()?.path()).ok());
    Some(targets.filter(|target| target.to_string_lossy().starts_with("socket:")).count())
}

/// Whatever was taken is answered before the end, and made durable; the image is closed.
#[test]
fn the_end_is_clean_in_the_middle_of_work() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let directory = scratch();
        let socket = directory.path().join("socket");
        let image = directory.path().join("disk.qcow2");
        run(blockhouse().args(["create", "--format", "qcow2", "--size", "4M"]).arg(&image)).succeeded();
        let mut serve = Serve::disk(&socket, &format!("file={},format=qcow2", image.display()));
        let mut guest = Guest::new();
        let _frontend = guest.connect(&socket);
        for slot in 0..SLOTS {
            guest.prepare(slot, WRITE, u64::from(slot) * 128, &noise(slot.into(), 65536));
            guest.offer(slot);
        }
        guest.kick.write(1).unwrap();
        serve.signal(signal);
        if signal == Signal::HUP {
            // The shell in the terminal says it as well, and is in no hurry.
            serve.signal(signal);
        }
        assert_eq!(serve.wait().code(), Some(0), "{}", serve.log());
        let answered = guest.answered();
        assert!(answered.iter().all(|(_, status)| *status == 0));
        let mut check = std::process::Command::new("qemu-img");
        run(check.args(["check", "-q", "-f", "qcow2"]).arg(&image)).succeeded();
        for (slot, _) in answered {
            let mut read = blockhouse();
            read.args(["read", "--format", "qcow2", "--offset", &(65536 * u64::from(slot)).to_string()]);
            let content = run(read.args(["--length", "64K"]).arg(&image)).succeeded().stdout;
            assert!(content == noise(slot.into(), 65536), "slot {slot}");
        }
    }
}

/// Who has it go on when the terminal is closed has it ignore the signal.
#[test]
fn under_nohup_a_closed_terminal_ends_nothing() {
    let directory = scratch();
    let socket = directory.path().join("socket");
    let heeds = |ignored: bool| {
        let mut command = blockhouse();
        command.args(["-v", "serve", "--disk", &raw(directory.path(), "disk.raw", 10), "--socket"]).arg(&socket);
        // SAFETY: the call is async-signal-safe.
        unsafe {
            command.pre_exec(move || {
                libc::signal(libc::SIGHUP, if ignored { libc::SIG_IGN } else { libc::SIG_DFL });
                Ok(())
            });
        }
        let serve = Serve::start(&mut command, &directory.path().join("log"));
        let status = std::fs::read_to_string(format!("/proc/{}/status", serve.id())).unwrap();
        serve.signal(Signal::HUP);
        if ignored {
            assert_eq!(Client::connect(&socket, 1).read_all(), noise(10, SIZE));
            serve.terminate();
        }
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap().trim();
        u64::from_str_radix(caught, 16).unwrap() & (1 << (libc::SIGHUP - 1)) != 0
    };
    assert!(!heeds(true) && heeds(false));
}

/// Sends a signal to a program, and waits for its end.
#[track_caller]
fn ended_by(signal: Signal, mut child: Child) -> Output {
    kill_process(Pid::from_child(&child), signal).unwrap();
    let started = std::time::Instant::now();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > COMMAND_LIMIT {
            child.kill().unwrap();
            panic!("{signal:?}: it does not end");
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    child.wait_with_output().unwrap()
}

/// To see what is in a pinned file takes as long as that is.
fn pinned(directory: &Path) -> String {
    let (base, overlay) = (directory.join("base.raw"), directory.join("overlay.qcow2"));
    std::fs::File::create(&base).unwrap().set_len(1 << 40).unwrap();
    let mut create = blockhouse();
    create.args(["create", "--format", "qcow2", "--size", "1M", "--backing-format", "raw", "--backing"]);
    run(create.args([&base, &overlay])).succeeded();
    let digest = "0".repeat(64);
    format!("file={},format=qcow2,allow={}@sha256:{digest}", overlay.display(), base.display())
}

/// Minutes may pass before a disk is served.
#[test]
fn a_signal_ends_what_is_not_served_yet() {
    for (signal, command) in [(Signal::TERM, "serve"), (Signal::INT, "serve"), (Signal::HUP, "run")] {
        let directory = scratch();
        let path = |name: &str| directory.path().join(name);
        let mut program = blockhouse();
        program.args([command, "--json", "--disk", &pinned(directory.path()), "--control"]).arg(path("control"));
        if command == "serve" {
            program.arg("--socket").arg(path("socket"));
        }
        let mut child = program.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let started = std::time::Instant::now();
        while !path("control").exists() {
            assert!(child.try_wait().unwrap().is_none() && started.elapsed() < COMMAND_LIMIT, "it does not start");
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        let output = ended_by(signal, child);
        let (said, printed) = (String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout));
        assert!(said.contains("ended by a signal before any disk was served"), "{command}: {said}");
        if command == "serve" {
            assert!(output.status.code() == Some(0) && printed == "[]\n", "{output:?}");
        } else {
            assert!(output.status.code() == Some(1) && printed.starts_with("{\"error\":"), "{output:?}");
        }
        assert!(!path("control").exists() && !path("socket").exists(), "{command}: sockets stay");
    }
}

/// A machine ends as a server does: what it was stopped in is told from what it came to the end of.
#[test]
fn a_signal_switches_a_machine_off() {
    if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        return skip("/dev/kvm cannot be opened");
    }
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let directory = scratch();
        let path = |name: &str| directory.path().join(name);
        // The built-in guest reads all of it.
        std::fs::File::create(path("disk.raw")).unwrap().set_len(1 << 40).unwrap();
        let disk = format!("file={},format=raw", path("disk.raw").display());
        let mut program = blockhouse();
        program.args(["run", "--memory", "64M", "--disk", &disk, "--control"]).arg(path("control"));
        let mut child = program.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let started = std::time::Instant::now();
        let asked = |child: &mut Child| {
            let mut ask = blockhouse();
            let ask = ask.args(["control", "--socket"]).arg(path("control")).arg("metrics");
            let outcome = path("control").exists().then(|| run(ask));
            assert!(child.try_wait().unwrap().is_none() && started.elapsed() < COMMAND_LIMIT, "it does not run");
            outcome.is_some_and(|outcome| outcome.status.success())
        };
        while !asked(&mut child) {}
        let output = ended_by(signal, child);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(1), "{output:?}");
        assert!(said.contains("ended by a signal before the guest had read every disk"), "{said}");
        assert!(!path("control").exists(), "the socket stays");
    }
}

/// A limit of the size of files is a file system that is full.
#[test]
fn a_file_that_may_not_grow_is_an_error_of_the_disk() {
    let directory = scratch();
    let socket = directory.path().join("socket");
    let mut command = blockhouse();
    command.args(["-v", "serve", "--disk", &raw(directory.path(), "disk.raw", 11), "--socket"]).arg(&socket);
    let half = SIZE as u64 / 2;
    // SAFETY: the calls are async-signal-safe, and the limit is the child's own.
    unsafe {
        command.pre_exec(move || {
            libc::signal(libc::SIGXFSZ, libc::SIG_DFL);
            let limit = libc::rlimit { rlim_cur: half, rlim_max: half };
            libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit);
            Ok(())
        });
    }
    let serve = Serve::start(&mut command, &directory.path().join("log"));
    let mut client = Client::connect(&socket, 1);
    client.write(half, &[1; 512]).unwrap_err();
    client.write(0, &[1; 512]).unwrap();
    client.flush().unwrap();
    assert_eq!(client.read(half, 512).unwrap(), noise(11, SIZE)[SIZE / 2..][..512]);
    drop(client);
    serve.terminate();
}
