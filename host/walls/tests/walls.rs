//! Walls of a real kernel. Each test that raises some does so in a process of its own: this program again, with
//! the name of the part that it plays in its environment.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::cast_sign_loss)]

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use blockhouse_walls::{Plan, Role, Use, Walls};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

const PART: &str = "WALLS_TEST_PART";
const PLACE: &str = "WALLS_TEST_PLACE";

/// What a process did: each line is `what: outcome`.
struct Played {
    status: ExitStatus,
    text: String,
}

impl Played {
    /// The outcome of one thing that was tried.
    #[track_caller]
    fn of(&self, what: &str) -> &str {
        self.text
            .lines()
            .find_map(|line| line.strip_prefix(what)?.strip_prefix(": "))
            .unwrap_or_else(|| panic!("{what:?} was not tried: {:?}\n{}", self.status, self.text))
    }
}

fn play(part: &str, place: &Path) -> Played {
    play_on(part, place, |_| {})
}

/// Plays a part on a kernel that was prepared.
fn play_on(part: &str, place: &Path, prepare: impl FnOnce(&mut Command)) -> Played {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "the_part", "--nocapture"]).env(PART, part).env(PLACE, place);
    prepare(&mut command);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    Played { status: output.status, text }
}

/// A kernel that answers these calls with this error.
fn without(command: &mut Command, calls: &'static [libc::c_long], errno: i32) {
    let rules = calls.iter().map(|call| (*call, Vec::new())).collect();
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let error = SeccompAction::Errno(errno.unsigned_abs());
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, error, arch).unwrap();
    let program = BpfProgram::try_from(filter).unwrap();
    // SAFETY: between fork and exec; installing a compiled filter makes two system calls and allocates nothing.
    unsafe {
        command.pre_exec(move || seccompiler::apply_filter(&program).map_err(|_| io::Error::other("no filter")));
    }
}

const LANDLOCK: &[libc::c_long] =
    &[libc::SYS_landlock_create_ruleset, libc::SYS_landlock_add_rule, libc::SYS_landlock_restrict_self];

/// Says that the calling test cannot run here: to people, and to `cargo xtask test`, which counts the lines of the
/// file that it names.
fn skip(reason: &str) {
    let line = format!("skipped: {}: {reason}\n", std::thread::current().name().unwrap_or("walls"));
    eprint!("{line}");
    if let Some(file) = std::env::var_os("BLOCKHOUSE_SKIPS") {
        let mut file = File::options().append(true).create(true).open(file).unwrap();
        file.write_all(line.as_bytes()).unwrap();
    }
}

/// Whether Landlock is here; if not, says so.
fn landlock_is_here() -> bool {
    // SAFETY: the call asks for a version: it takes no pointer, and 1 is LANDLOCK_CREATE_RULESET_VERSION.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0usize, 1u32) };
    if version < 1 {
        skip("this kernel has no Landlock");
    }
    version >= 1
}

/// A directory with `granted/file`, `granted/other`, `outside/file`.
fn place() -> tempfile::TempDir {
    let place = tempfile::tempdir().unwrap();
    for name in ["granted/file", "granted/other", "outside/file"] {
        let path = place.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, name).unwrap();
    }
    place
}

fn tell<T>(what: &str, result: io::Result<T>) {
    match result {
        Ok(_) => println!("{what}: done"),
        Err(error) => println!("{what}: {}", error.raw_os_error().unwrap_or(-1)),
    }
}

/// Makes a system call with up to three arguments.
fn call(number: libc::c_long, arguments: [usize; 3]) -> io::Result<()> {
    let [one, two, three] = arguments;
    // SAFETY: all callers pass null, or strings and numbers for calls that only read them.
    if unsafe { libc::syscall(number, one, two, three, 0usize, 0usize, 0usize) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Runs in the processes that the tests start, and does nothing otherwise.
#[test]
fn the_part() {
    let (Ok(part), Some(place)) = (std::env::var(PART), std::env::var_os(PLACE).map(PathBuf::from)) else { return };
    let (granted, outside) = (place.join("granted"), place.join("outside"));
    let mut plan = Plan::new();
    match part.as_str() {
        "files" => {
            plan.read(&granted);
            // A directory that is open already must be no way around.
            let root = File::open("/").unwrap();
            let walls = Walls::raise(&plan);
            println!("walls: {walls}");
            println!("missing: {:?}", walls.missing());
            tell("read granted", std::fs::read(granted.join("file")));
            tell("write granted", File::options().write(true).open(granted.join("file")));
            tell("truncate granted", File::options().write(true).truncate(true).open(granted.join("file")));
            tell("make granted", File::create_new(granted.join("new")));
            tell("read outside", std::fs::read(outside.join("file")));
            tell("read through", std::fs::read(granted.join("../outside/file")));
            tell("list outside", std::fs::read_dir(&outside));
            tell("missing file", File::open(granted.join("nowhere")));
            let name = CString::new(outside.join("file").strip_prefix("/").unwrap().to_str().unwrap()).unwrap();
            let below_root = [std::os::fd::AsRawFd::as_raw_fd(&root) as usize, name.as_ptr() as usize, 0];
            tell("read below root", call(libc::SYS_openat, below_root));
            // Threads have the walls of the thread that started them.
            let path = outside.join("file");
            tell("read in thread", std::thread::spawn(move || std::fs::read(path)).join().unwrap());
            tell("remove outside", std::fs::remove_file(outside.join("file")));
            tell("rename out", std::fs::rename(granted.join("file"), outside.join("stolen")));
            tell("run", Command::new("/bin/true").status());
        }
        "uses" => {
            plan.write(granted.join("file"));
            plan.add(granted.join("other"), Use::Read);
            plan.add(&outside, Use::MakeFiles);
            plan.read("");
            plan.sockets();
            // On no file system that Landlock knows: no reason to go without it.
            let (_reader, pipe) = io::pipe().unwrap();
            let pipe = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&pipe));
            plan.write(&pipe);
            Walls::raise(&plan);
            tell("write pipe", File::options().write(true).open(&pipe));
            tell("write file", File::options().write(true).truncate(true).open(granted.join("file")));
            tell("read other", std::fs::read(granted.join("other")));
            tell("write other", File::options().write(true).open(granted.join("other")));
            tell("make sibling", File::create_new(granted.join("new")));
            tell("make outside", File::create_new(outside.join("new")));
            tell("rename outside", std::fs::rename(outside.join("new"), outside.join("newer")));
            tell("remove outside", std::fs::remove_file(outside.join("newer")));
            tell("socket outside", std::os::unix::net::UnixListener::bind(outside.join("socket")));
            tell("working directory", std::fs::read_dir("."));
        }
        "narrow" => {
            plan.read(&granted);
            plan.read(&outside);
            plan.add_at_first(&outside, Use::MakeFiles);
            plan.sockets();
            let walls = Walls::raise(&plan);
            what_sockets_there_are("at first");
            what_becomes_of_names("at first", &granted);
            tell("make at first", File::create_new(outside.join("new")));
            println!("narrow: {:?}", walls.narrow(&plan).map_err(|missing| missing.to_string()));
            for who in ["here", "in a thread"] {
                let outside = outside.clone();
                let granted = granted.clone();
                let try_all = move || {
                    tell(&format!("make {who}"), File::create_new(outside.join("newer")));
                    tell(&format!("write {who}"), File::options().write(true).open(outside.join("new")));
                    tell(&format!("rename {who}"), std::fs::rename(outside.join("new"), outside.join("file")));
                    tell(&format!("remove {who}"), std::fs::remove_file(outside.join("new")));
                    tell(&format!("read {who}"), std::fs::read(outside.join("new")));
                    tell(&format!("granted {who}"), std::fs::read(granted.join("file")));
                    what_sockets_there_are(who);
                    what_becomes_of_names(who, &granted);
                };
                if who == "here" { try_all() } else { std::thread::spawn(try_all).join().unwrap() }
            }
        }
        "threads" => {
            plan.read("/");
            plan.sockets();
            let mut child = Command::new("sleep").arg("0").spawn().unwrap();
            let walls = Walls::raise(&plan);
            let path = granted.join("file");
            for role in [Role::DataPath, Role::Vcpu, Role::FrontEnd] {
                let (start, path) = (walls.thread_start(role), path.clone());
                let open = File::open(&path).unwrap();
                std::thread::spawn(move || {
                    start();
                    what_a_thread_may(&format!("{role:?}"), &path, &open);
                })
                .join()
                .unwrap();
            }
            tell("Program open", File::open(&path));
            tell("Program ring", call(libc::SYS_io_uring_setup, [1, 0, 0]));
            tell("Program restrictions", call(libc::SYS_io_uring_register, [usize::MAX, 11, 0]));
            what_signals_others("Program", &File::open(&path).unwrap());
            // One that is there before the seal has it as well.
            let (send, receive) = std::sync::mpsc::channel::<()>();
            let early = std::thread::spawn({
                let path = path.clone();
                move || {
                    let _ = receive.recv();
                    tell("early open", File::open(path));
                }
            });
            let open = File::open(&path).unwrap();
            assert!(walls.missing().iter().all(|missing| missing.wall == "Landlock"), "{:?}", walls.missing());
            walls.seal(Role::Control).unwrap();
            drop(send);
            early.join().unwrap();
            what_a_thread_may("Control", &path, &open);
            tell("Control child", child.wait());
            // Threads can still be started, and narrow themselves.
            let start = walls.thread_start(Role::DataPath);
            std::thread::spawn(move || {
                start();
                what_a_thread_may("sealed", &path, &open);
            })
            .join()
            .unwrap();
        }
        "no sockets" => {
            plan.read(&granted);
            // A socket that is there can be used.
            let (one, other) = std::os::unix::net::UnixStream::pair().unwrap();
            let walls = Walls::raise(&plan);
            what_sockets_there_are("planned");
            let open = File::open(granted.join("file")).unwrap();
            what_signals_others("planned", &open);
            tell("planned ring", call(libc::SYS_io_uring_setup, [1, 0, 0]));
            tell("planned fchmod", call(libc::SYS_fchmod, [0, 0o600, 0]));
            tell("planned use", (&one).write(b"x").and_then(|_| io::Read::read(&mut &other, &mut [0; 1])));
            println!("narrow: {:?}", walls.narrow(&plan).map_err(|missing| missing.to_string()));
            what_sockets_there_are("narrow");
            what_signals_others("narrow", &open);
            tell("narrow ring", call(libc::SYS_io_uring_setup, [1, 0, 0]));
        }
        "no walls" => what_signals_others("nobody", &File::open(granted.join("file")).unwrap()),
        "server" => {
            plan.read("/");
            let mut child = Command::new("sleep").arg("0").spawn().unwrap();
            let walls = Walls::raise(&plan);
            let path = granted.join("file");
            let open = File::open(&path).unwrap();
            walls.seal(Role::Server).unwrap();
            what_a_thread_may("Server", &path, &open);
            tell("Server child", child.wait());
            for role in [Role::FrontEnd, Role::Operator, Role::DataPath] {
                let (start, path, open) = (walls.thread_start(role), path.clone(), open.try_clone().unwrap());
                std::thread::spawn(move || {
                    start();
                    what_a_thread_may(&format!("sealed {role:?}"), &path, &open);
                })
                .join()
                .unwrap();
            }
            // A filter for all threads is none for those that have gone their own way.
            let (start, (send, receive)) = (walls.thread_start(Role::DataPath), std::sync::mpsc::channel::<()>());
            let (narrowed, wait) = std::sync::mpsc::channel::<()>();
            let other = std::thread::spawn(move || {
                start();
                drop(narrowed);
                let _ = receive.recv();
            });
            let _ = wait.recv();
            println!("sealed again: {:?}", walls.seal(Role::Server).map_err(|missing| missing.wall));
            drop(send);
            other.join().unwrap();
        }
        "compiler" => {
            let path = granted.join("file");
            let open = File::open(&path).unwrap();
            let walls = Walls::confine_compiler();
            println!("walls: {walls}");
            what_a_thread_may("Compiler", &path, &open);
            tell("plain read", io::Read::read(&mut &open, &mut [0; 4]));
            tell("ring", call(libc::SYS_io_uring_setup, [1, 0, 0]));
            tell("memory", call(libc::SYS_memfd_create, [0, 0, 0]));
            tell("timer", call(libc::SYS_setitimer, [0, 0, 0]));
            tell("limits", call(libc::SYS_prlimit64, [0, 0, 0]));
            tell("death", call(libc::SYS_prctl, [libc::PR_SET_PDEATHSIG as usize, 0, 0]));
        }
        fatal if fatal.starts_with("fatal ") => {
            let number: libc::c_long = fatal["fatal ".len()..].parse().unwrap();
            Walls::raise(&plan);
            println!("before: done");
            io::stdout().flush().unwrap();
            tell("after", call(number, [0, 0, 0]));
        }
        other => panic!("there is no part {other:?}"),
    }
    // Not through libtest, whose threads are not of these roles.
    io::stdout().flush().unwrap();
    std::process::exit(0);
}

fn what_a_thread_may(who: &str, path: &Path, open: &File) {
    use std::os::unix::fs::FileExt;
    let name = CString::new(path.to_str().unwrap()).unwrap();
    let name = name.as_ptr() as usize;
    let here = libc::AT_FDCWD as usize;
    tell(&format!("{who} openat"), call(libc::SYS_openat, [here, name, 0]));
    tell(&format!("{who} openat2"), call(libc::SYS_openat2, [here, name, 0]));
    #[cfg(target_arch = "x86_64")]
    {
        tell(&format!("{who} open"), call(libc::SYS_open, [name, 0, 0]));
        tell(&format!("{who} creat"), call(libc::SYS_creat, [name, 0o600, 0]));
        tell(&format!("{who} stat"), call(libc::SYS_stat, [name, 0, 0]));
    }
    tell(&format!("{who} link"), std::fs::read_link("/proc/self/exe"));
    tell(&format!("{who} unlink"), std::fs::remove_file(path));
    tell(&format!("{who} socket"), std::os::unix::net::UnixDatagram::unbound());
    let executable = (libc::PROT_READ | libc::PROT_EXEC) as usize;
    tell(&format!("{who} code"), call(libc::SYS_mprotect, [0x1000, 0x1000, executable]));
    tell(&format!("{who} process"), call(libc::SYS_clone, [libc::SIGCHLD as usize, 0, 0]));
    tell(&format!("{who} signal"), call(libc::SYS_tgkill, [1, 1, 0]));
    tell(&format!("{who} ioctl"), call(libc::SYS_ioctl, [0, 0x5412, 0]));
    what_signals_others(who, open);
    // Without memory that it could use, or a ring: other errors.
    let no_file = usize::MAX;
    tell(&format!("{who} ring"), call(libc::SYS_io_uring_setup, [1, 0, 0]));
    tell(&format!("{who} restrictions"), call(libc::SYS_io_uring_register, [no_file, 11, 0]));
    tell(&format!("{who} ring begins"), call(libc::SYS_io_uring_register, [no_file, 12, 0]));
    tell(&format!("{who} files of a ring"), call(libc::SYS_io_uring_register, [no_file, 6, 0]));
    // What it is for.
    tell(&format!("{who} read"), open.read_at(&mut [0; 4], 0));
    tell(&format!("{who} size"), open.metadata());
    tell(&format!("{who} thread"), std::thread::Builder::new().spawn(|| {}).map(|thread| thread.join().unwrap()));
    let moment = libc::timespec { tv_sec: 0, tv_nsec: 1 };
    tell(&format!("{who} wait"), call(libc::SYS_nanosleep, [std::ptr::from_ref(&moment) as usize, 0, 0]));
}

/// Of which kinds sockets can be made, and whether they reach anybody.
fn what_sockets_there_are(who: &str) {
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
    tell(&format!("{who} pair"), UnixStream::pair());
    tell(&format!("{who} datagram"), UnixDatagram::unbound());
    tell(&format!("{who} udp"), std::net::UdpSocket::bind("127.0.0.1:0"));
    // Nobody is there, which is said by who has been asked.
    tell(&format!("{who} connect"), UnixStream::connect("/nowhere/socket"));
    tell(&format!("{who} listen"), UnixListener::bind("/nowhere/socket"));
}

/// Rights and names of what is in a directory, and of what is open. Each would be refused by the file system as well:
/// with another error.
fn what_becomes_of_names(who: &str, granted: &Path) {
    let name = CString::new(granted.join("nowhere").to_str().unwrap()).unwrap();
    let name = name.as_ptr() as usize;
    let (here, nobody, no_file) = (libc::AT_FDCWD as usize, usize::MAX, usize::MAX);
    #[cfg(target_arch = "x86_64")]
    {
        tell(&format!("{who} chmod"), call(libc::SYS_chmod, [name, 0o777, 0]));
        tell(&format!("{who} chown"), call(libc::SYS_chown, [name, nobody, nobody]));
    }
    tell(&format!("{who} fchmodat"), call(libc::SYS_fchmodat, [here, name, 0o777]));
    tell(&format!("{who} fchownat"), call(libc::SYS_fchownat, [here, name, nobody]));
    tell(&format!("{who} fchown"), call(libc::SYS_fchown, [no_file, nobody, nobody]));
    tell(&format!("{who} xattr"), call(libc::SYS_setxattr, [name, name, name]));
    tell(&format!("{who} times"), call(libc::SYS_utimensat, [here, name, 0]));
    tell(&format!("{who} chdir"), call(libc::SYS_chdir, [name, 0, 0]));
    tell(&format!("{who} fchmod"), call(libc::SYS_fchmod, [no_file, 0o777, 0]));
    tell(&format!("{who} mkdir"), call(libc::SYS_mkdirat, [no_file, 0, 0]));
    tell(&format!("{who} link"), call(libc::SYS_linkat, [no_file, name, no_file]));
    tell(&format!("{who} list"), call(libc::SYS_getdents64, [no_file, 0, 0]));
}

/// The calls that send a signal to a process. Here it is no signal, or to nobody: the kernel only says whether one
/// could be sent.
const SIGNALS: [(&str, libc::c_long, [usize; 3]); 5] = [
    ("kill", libc::SYS_kill, [1, 0, 0]),
    ("tkill", libc::SYS_tkill, [1, 0, 0]),
    ("rt_sigqueueinfo", libc::SYS_rt_sigqueueinfo, [1, 0, 0]),
    ("rt_tgsigqueueinfo", libc::SYS_rt_tgsigqueueinfo, [1, 1, 0]),
    ("pidfd_send_signal", libc::SYS_pidfd_send_signal, [usize::MAX, 0, 0]),
];

/// These, ways past them, and into the shell that the program was started from.
fn what_signals_others(who: &str, open: &File) {
    use std::os::fd::AsRawFd;
    for (what, number, arguments) in SIGNALS {
        tell(&format!("{who} {what}"), call(number, arguments));
    }
    let (file, stdin) = (open.as_raw_fd() as usize, 0);
    let first = 1_i32;
    // F_OWNER_PID, and who.
    let owner = [1_i32, 1];
    let at = |words: *const i32| words as usize;
    let (set_owner, set_owner_ex) = (libc::F_SETOWN as usize, 15);
    tell(&format!("{who} owner"), call(libc::SYS_fcntl, [file, set_owner, 1]));
    tell(&format!("{who} group as owner"), call(libc::SYS_fcntl, [file, set_owner, usize::MAX]));
    tell(&format!("{who} owner as it is put now"), call(libc::SYS_fcntl, [file, set_owner_ex, at(owner.as_ptr())]));
    let (own_socket, theirs) = std::os::unix::net::UnixStream::pair().map_or((None, None), |(a, b)| (Some(a), Some(b)));
    let socket = own_socket.as_ref().map_or(stdin, |socket| socket.as_raw_fd() as usize);
    for (what, request) in [("FIOSETOWN", 0x8901), ("SIOCSPGRP", 0x8902)] {
        tell(&format!("{who} {what}"), call(libc::SYS_ioctl, [socket, request, at(&raw const first)]));
    }
    drop(theirs);
    for (what, request) in [("TIOCSTI", 0x5412), ("TIOCLINUX", 0x541c), ("TIOCSPGRP", 0x5410)] {
        tell(&format!("{who} {what}"), call(libc::SYS_ioctl, [stdin, request, at(&raw const first)]));
    }
    tell(&format!("{who} nobody as owner"), call(libc::SYS_fcntl, [file, set_owner, 0]));
    tell(&format!("{who} flags"), call(libc::SYS_fcntl, [file, libc::F_GETFL as usize, 0]));
    let set_flags = libc::F_SETFL as usize;
    tell(&format!("{who} own flags"), call(libc::SYS_fcntl, [file, set_flags, libc::O_NONBLOCK as usize]));
    let signals = (libc::O_NONBLOCK | libc::O_ASYNC) as usize;
    tell(&format!("{who} signals for whom is in the foreground"), call(libc::SYS_fcntl, [file, set_flags, signals]));
    // Processor time of another process, which ends it. There is none with this number.
    let (nobody, time, nowhere) = (i32::MAX as usize, libc::RLIMIT_CPU as usize, 1);
    tell(&format!("{who} limits of another"), call(libc::SYS_prlimit64, [nobody, time, at(owner.as_ptr())]));
    tell(&format!("{who} sight of another"), call(libc::SYS_prlimit64, [nobody, time, 0]));
    tell(&format!("{who} other limits"), call(libc::SYS_prlimit64, [0, time, nowhere]));
    tell(&format!("{who} own limits"), call(libc::SYS_prlimit64, [0, time, 0]));
}

const SOCKETS: [&str; 5] = ["pair", "datagram", "udp", "connect", "listen"];

/// A program that has no use for sockets makes none, and one that has makes them before it looks at an image: an
/// agent or a container engine listens at a name that Landlock says nothing about.
#[test]
fn nobody_connects_who_has_an_image_open() {
    let refused = libc::EPERM.to_string();
    let played = play("no sockets", place().path());
    for what in SOCKETS {
        assert_eq!(played.of(&format!("planned {what}")), refused, "{what}");
        assert_eq!(played.of(&format!("narrow {what}")), refused, "{what}");
    }
    assert_eq!(played.of("planned use"), "done");
    assert_eq!(played.of("narrow"), "Ok(())");

    let without_landlock = play_on("narrow", place().path(), |command| without(command, LANDLOCK, libc::ENOSYS));
    for played in [play("narrow", place().path()), without_landlock] {
        for what in SOCKETS {
            assert_ne!(played.of(&format!("at first {what}")), refused, "{what}");
            for who in ["here", "in a thread"] {
                assert_eq!(played.of(&format!("{who} {what}")), refused, "{who} {what}");
            }
        }
    }
}

/// Landlock knows of signals since its version 6, and nothing of a terminal that is open already.
#[test]
fn nobody_signals_another_process_or_types_for_the_operator() {
    let [threads, plain, server] = ["threads", "no sockets", "server"].map(|part| play(part, place().path()));
    let none = libc::ENOSYS.to_string();
    let with_sockets = ["Program", "DataPath", "Vcpu", "FrontEnd", "Control", "sealed"].map(|who| (&threads, who));
    let without = ["planned", "narrow"].map(|who| (&plain, who));
    let of_server = ["Server", "sealed FrontEnd", "sealed Operator", "sealed DataPath"].map(|who| (&server, who));
    for (played, who) in with_sockets.into_iter().chain(without).chain(of_server) {
        // Before all is open there are leases, and a library that asks for limits.
        let opens = ["Program", "planned", "narrow"].contains(&who);
        for (what, ..) in SIGNALS {
            assert_eq!(played.of(&format!("{who} {what}")), none, "{who} {what}");
        }
        for what in ["owner", "group as owner", "owner as it is put now"] {
            assert_eq!(played.of(&format!("{who} {what}")), none, "{who} {what}");
        }
        for what in ["FIOSETOWN", "SIOCSPGRP", "TIOCSTI", "TIOCLINUX", "TIOCSPGRP"] {
            assert_eq!(played.of(&format!("{who} {what}")), none, "{who} {what}");
        }
        let nobody = played.of(&format!("{who} nobody as owner"));
        assert_eq!(nobody, if opens { "done" } else { none.as_str() }, "{who}");
        for what in ["signals for whom is in the foreground", "limits of another", "sight of another", "other limits"] {
            assert_eq!(played.of(&format!("{who} {what}")), none, "{who} {what}");
        }
        assert_eq!(played.of(&format!("{who} flags")), "done", "{who}");
        assert_eq!(played.of(&format!("{who} own flags")), "done", "{who}");
        let own = played.of(&format!("{who} own limits"));
        assert_eq!(own, if opens { "done" } else { none.as_str() }, "{who}");
    }
    // The twin: a process without walls may.
    let played = play("no walls", place().path());
    for (what, ..) in SIGNALS {
        assert_ne!(played.of(&format!("nobody {what}")), none, "{what}");
    }
    for what in ["owner", "owner as it is put now", "FIOSETOWN", "SIOCSPGRP", "signals for whom is in the foreground"] {
        assert_eq!(played.of(&format!("nobody {what}")), "done", "{what}");
    }
    for what in ["limits of another", "sight of another"] {
        assert_eq!(played.of(&format!("nobody {what}")), libc::ESRCH.to_string(), "{what}");
    }
    assert_eq!(played.of("nobody other limits"), libc::EFAULT.to_string());
}

/// A compiler reads and writes what is open, and nothing else.
#[test]
fn a_compiler_has_memory_and_what_is_open() {
    let place = place();
    let played = play("compiler", place.path());
    let names: &[&str] =
        if cfg!(target_arch = "x86_64") { &["openat", "openat2", "open", "creat", "stat"] } else { &["openat"] };
    for what in names.iter().chain(&["link", "unlink", "socket"]) {
        assert_eq!(played.of(&format!("Compiler {what}")), libc::EPERM.to_string(), "{what}");
    }
    for (what, ..) in SIGNALS {
        assert_eq!(played.of(&format!("Compiler {what}")), libc::ENOSYS.to_string(), "{what}");
    }
    for what in ["code", "process", "thread", "signal", "ioctl", "owner", "FIOSETOWN", "TIOCSTI", "flags"] {
        assert_ne!(played.of(&format!("Compiler {what}")), "done", "{what}");
    }
    for what in ["ring", "memory", "timer", "limits", "death"] {
        assert_ne!(played.of(what), "done", "{what}");
    }
    assert_eq!(played.of("plain read"), "done");
    assert!(played.of("walls").ends_with("seccomp"), "{}", played.of("walls"));
}

#[test]
fn only_what_is_planned_can_be_opened() {
    if !landlock_is_here() {
        return;
    }
    let place = place();
    let played = play("files", place.path());
    assert_eq!(played.of("missing"), "[]");
    assert!(played.of("walls").starts_with("Landlock "), "{}", played.of("walls"));
    assert!(played.of("walls").ends_with(", seccomp"), "{}", played.of("walls"));
    let denied = libc::EACCES.to_string();
    assert_eq!(played.of("read granted"), "done");
    for what in ["write granted", "truncate granted", "make granted", "read outside", "read through", "list outside"] {
        assert_eq!(played.of(what), denied, "{what}");
    }
    for what in ["remove outside", "read below root", "read in thread"] {
        assert_eq!(played.of(what), denied, "{what}");
    }
    let renamed = played.of("rename out");
    assert!(renamed == denied || renamed == libc::EXDEV.to_string(), "{renamed}");
    assert_eq!(played.of("missing file"), libc::ENOENT.to_string());
    // No process, before Landlock is even asked about the program.
    assert_eq!(played.of("run"), libc::ENOSYS.to_string());
    assert_eq!(std::fs::read(place.path().join("outside/file")).unwrap(), b"outside/file");
}

#[test]
fn each_use_is_what_it_says() {
    if !landlock_is_here() {
        return;
    }
    let place = place();
    let played = play("uses", place.path());
    let denied = libc::EACCES.to_string();
    for what in ["write pipe", "write file", "read other", "make outside", "rename outside", "remove outside"] {
        assert_eq!(played.of(what), "done", "{what}");
    }
    for what in ["write other", "make sibling", "socket outside", "working directory"] {
        assert_eq!(played.of(what), denied, "{what}");
    }
}

/// What was planned for the beginning alone ends, and the rest stays.
#[test]
fn what_is_for_the_beginning_ends() {
    if !landlock_is_here() {
        return;
    }
    let place = place();
    let played = play("narrow", place.path());
    assert_eq!(played.of("make at first"), "done");
    assert_eq!(played.of("narrow"), "Ok(())");
    let (denied, refused) = (libc::EACCES.to_string(), libc::EPERM.to_string());
    for who in ["here", "in a thread"] {
        for (what, expected) in [("make", &denied), ("write", &denied), ("rename", &refused), ("remove", &refused)] {
            assert_eq!(played.of(&format!("{what} {who}")), expected, "{what} {who}");
        }
        for what in ["read", "granted"] {
            assert_eq!(played.of(&format!("{what} {who}")), "done", "{what} {who}");
        }
    }
    // Where there is no Landlock, nothing was raised that could be narrower.
    let played = play_on("narrow", self::place().path(), |command| without(command, LANDLOCK, libc::ENOSYS));
    assert_eq!(played.of("narrow"), "Ok(())");
    assert_eq!(played.of("make here"), "done");
    for what in ["rename", "remove"] {
        assert_eq!(played.of(&format!("{what} here")), refused, "{what}");
    }
}

/// Rights of files, of which Landlock knows nothing; and names, once an image may be open.
#[test]
fn nobody_changes_the_rights_of_a_file() {
    let refused = libc::EPERM.to_string();
    let without_landlock = play_on("narrow", place().path(), |command| without(command, LANDLOCK, libc::ENOSYS));
    for played in [play("narrow", place().path()), without_landlock] {
        for who in ["at first", "here", "in a thread"] {
            let by_name: &[&str] = if cfg!(target_arch = "x86_64") { &["chmod", "chown"] } else { &[] };
            for what in by_name.iter().chain(&["fchmodat", "fchownat", "fchown", "xattr", "times", "chdir"]) {
                assert_eq!(played.of(&format!("{who} {what}")), refused, "{who} {what}");
            }
        }
        for what in ["fchmod", "mkdir", "link", "list"] {
            assert_ne!(played.of(&format!("at first {what}")), refused, "{what}");
            for who in ["here", "in a thread"] {
                assert_eq!(played.of(&format!("{who} {what}")), refused, "{who} {what}");
            }
        }
    }
    // A program without sockets sets no rights from the beginning.
    assert_eq!(play("no sockets", place().path()).of("planned fchmod"), refused);
}

/// The test that fails where there are no walls at all.
#[test]
fn without_landlock_the_rest_stands_and_what_is_missing_is_said() {
    let place = place();
    let played = play_on("files", place.path(), |command| without(command, LANDLOCK, libc::ENOSYS));
    assert_eq!(played.of("walls"), "seccomp");
    assert!(played.of("missing").contains("this kernel has none"), "{}", played.of("missing"));
    for what in ["read granted", "write granted", "read outside", "read below root"] {
        assert_eq!(played.of(what), "done", "{what}");
    }
    assert_eq!(played.of("run"), libc::ENOSYS.to_string());

    let played = play_on("files", place.path(), |command| without(command, LANDLOCK, libc::EOPNOTSUPP));
    assert!(played.of("missing").contains("switched off"), "{}", played.of("missing"));
}

#[test]
fn without_seccomp_landlock_stands_and_what_is_missing_is_said() {
    if !landlock_is_here() {
        return;
    }
    let place = place();
    let played = play_on("files", place.path(), |command| without(command, &[libc::SYS_seccomp], libc::EINVAL));
    assert!(!played.of("walls").contains("seccomp"), "{}", played.of("walls"));
    assert!(played.of("missing").contains("seccomp"), "{}", played.of("missing"));
    assert_eq!(played.of("read outside"), libc::EACCES.to_string());
}

#[test]
fn a_thread_of_the_data_path_opens_nothing_and_does_its_work() {
    let place = place();
    let played = play("threads", place.path());
    let (refused, unknown) = (libc::EPERM.to_string(), libc::ENOSYS.to_string());
    assert_eq!(played.of("Program open"), "done");
    assert_eq!(played.of("early open"), refused);
    for who in ["DataPath", "Vcpu", "Control", "sealed"] {
        for what in ["openat", "openat2", "unlink", "socket"] {
            assert_eq!(played.of(&format!("{who} {what}")), refused, "{who} {what}");
        }
        if cfg!(target_arch = "x86_64") {
            for what in ["open", "creat", "stat"] {
                assert_eq!(played.of(&format!("{who} {what}")), refused, "{who} {what}");
            }
        }
        assert_eq!(played.of(&format!("{who} link")), refused, "{who} link");
        for what in ["code", "process", "signal", "ioctl"] {
            assert_eq!(played.of(&format!("{who} {what}")), unknown, "{who} {what}");
        }
        for what in ["read", "size", "thread", "wait"] {
            assert_eq!(played.of(&format!("{who} {what}")), "done", "{who} {what}");
        }
    }
}

/// A ring of `io_uring` that nothing restricts does what it is asked to, past every filter: files are opened, sockets
/// connected. So there is none but those that were made first.
#[test]
fn no_ring_is_made_later() {
    let unknown = libc::ENOSYS.to_string();
    let (threads, server) = (play("threads", place().path()), play("server", place().path()));
    if threads.of("Program ring") == unknown {
        return skip("this kernel has no io_uring");
    }
    assert_ne!(threads.of("Program restrictions"), unknown);
    let of_machine = ["DataPath", "Vcpu", "FrontEnd", "Control", "sealed"].map(|who| (&threads, who));
    let of_server = ["Server", "sealed FrontEnd", "sealed Operator", "sealed DataPath"].map(|who| (&server, who));
    for (played, who) in of_machine.into_iter().chain(of_server) {
        for what in ["ring", "restrictions", "ring begins"] {
            assert_eq!(played.of(&format!("{who} {what}")), unknown, "{who} {what}");
        }
        assert_ne!(played.of(&format!("{who} files of a ring")), unknown, "{who}");
    }
    let played = play("no sockets", place().path());
    assert_ne!(played.of("planned ring"), unknown);
    assert_eq!(played.of("narrow ring"), unknown);
}

/// As the threads of a machine are, so are those of a server, whatever they are for.
#[test]
fn no_thread_of_a_server_opens_anything() {
    let place = place();
    let played = play("server", place.path());
    let (refused, unknown) = (libc::EPERM.to_string(), libc::ENOSYS.to_string());
    for who in ["Server", "sealed FrontEnd", "sealed Operator", "sealed DataPath"] {
        for what in ["openat", "openat2", "unlink", "socket"] {
            assert_eq!(played.of(&format!("{who} {what}")), refused, "{who} {what}");
        }
        for what in ["code", "process", "signal", "ioctl", "owner", "FIOSETOWN", "TIOCSTI"] {
            assert_eq!(played.of(&format!("{who} {what}")), unknown, "{who} {what}");
        }
        for what in ["read", "size", "thread", "wait"] {
            assert_eq!(played.of(&format!("{who} {what}")), "done", "{who} {what}");
        }
        // What front ends send is looked at.
        let link = played.of(&format!("{who} link"));
        assert_eq!(link, if matches!(who, "Server" | "sealed FrontEnd") { "done" } else { &refused }, "{who}");
    }
    assert_eq!(played.of("sealed again"), "Err(\"seccomp\")");
    // Processes that were started before are waited for.
    assert_eq!(played.of("Server child"), "done");
    assert_eq!(play("threads", place.path()).of("Control child"), "done");
}

/// Who speaks with a front end is sent descriptors, and sees what they are.
#[test]
fn a_thread_of_a_front_end_opens_nothing_either() {
    let place = place();
    let played = play("threads", place.path());
    let refused = libc::EPERM.to_string();
    for what in ["openat", "openat2", "unlink", "socket"] {
        assert_eq!(played.of(&format!("FrontEnd {what}")), refused, "{what}");
    }
    assert_eq!(played.of("FrontEnd link"), "done");
}

#[test]
fn what_nobody_needs_ends_the_process() {
    let place = place();
    for call in [libc::SYS_execve, libc::SYS_ptrace, libc::SYS_bpf, libc::SYS_unshare, libc::SYS_setuid] {
        let played = play(&format!("fatal {call}"), place.path());
        assert_eq!(played.of("before"), "done");
        assert_eq!(played.status.signal(), Some(libc::SIGSYS), "call {call}: {}", played.text);
    }
}
