//! What the program asks of the kernel while it is attacked, as strace sees it.
//!
//! While a hostile image is opened and served, no system call names a path that comes out of it and lies
//! outside of the grants, not even to be refused. And once the guest runs, no thread names any file at all.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::net::UnixStream;
use std::path::{Component, Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use blockhouse_tests::{component, landlock_is_here, noise, on_path, program, qemu_img, run, sha256, skip};

use crate::place::Place;
use crate::qcow2::{overlay, with_data_file};
use crate::tally;

/// Calls that take names; who a thread is, and that it begins; where the walls go up; rings, through which no filter
/// sees.
const CALLS: &str =
    "%file,prctl,clone,seccomp,landlock_restrict_self,io_uring_setup,io_uring_register,open_by_handle_at";

/// Far longer than anything here takes.
const LIMIT: Duration = Duration::from_secs(60);

/// One call, from its first line to its end.
#[derive(Debug)]
struct Call {
    thread: u32,
    name: String,
    arguments: String,
}

/// A recorded run of the program.
struct Trace {
    calls: Vec<Call>,
    /// Those of the processes that compile components of strangers.
    compilers: Vec<Call>,
    /// Those of the processes that make new files and give them their names, and of those that remove sockets.
    namers: Vec<Call>,
    text: String,
}

impl Trace {
    /// Runs the program under strace. It fails or not; what it asked for is recorded.
    fn of(place: &Place, arguments: &[&str]) -> Self {
        Self::with_cache(place, "off", arguments)
    }

    /// As [`of`](Self::of), with compiled components kept in a directory.
    fn with_cache(place: &Place, cache: &str, arguments: &[&str]) -> Self {
        let outcome = run(&mut Self::command(place, cache, arguments));
        assert!(!outcome.stderr.contains("panicked"), "{}", outcome.stderr);
        place.canary.assert_not_in(&outcome.stdout);
        Self::read(place)
    }

    /// The program under strace.
    fn command(place: &Place, cache: &str, arguments: &[&str]) -> Command {
        let mut strace = Command::new("strace");
        // Not with --seccomp-bpf: a call that a filter of the program refuses would not be seen.
        strace.args(["-f", "-y", "-s", "8192", "-e", "signal=none", "-e", &format!("trace={CALLS}"), "-o"]);
        strace.arg(place.path("trace")).arg(program()).args(arguments).args(["--code-cache", cache]);
        strace
    }

    /// What strace wrote.
    fn read(place: &Place) -> Self {
        let text = std::fs::read_to_string(place.path("trace")).unwrap();
        let mut calls = Vec::new();
        let mut unfinished: BTreeMap<u32, usize> = BTreeMap::new();
        for line in text.lines() {
            let (thread, line) = line.split_once(' ').unwrap();
            let (thread, line) = (thread.parse().unwrap(), line.trim_start());
            if let Some(resumed) = line.strip_prefix("<... ") {
                let begun: usize = unfinished.remove(&thread).unwrap();
                let call: &mut Call = &mut calls[begun];
                call.arguments.push_str(resumed.split_once("resumed>").unwrap().1);
            } else if let Some((name, rest)) = line.split_once('(') {
                if line.starts_with("+++") || line.starts_with("---") {
                    continue;
                }
                let begun = rest.strip_suffix(" <unfinished ...>");
                if begun.is_some() {
                    unfinished.insert(thread, calls.len());
                }
                calls.push(Call { thread, name: name.to_owned(), arguments: begun.unwrap_or(rest).to_owned() });
            }
        }
        assert!(calls.len() > 10, "strace saw nothing: {text}");
        let processes = |argument: &str| -> BTreeSet<u32> {
            let starts = |call: &&Call| call.name == "execve" && call.arguments.contains(argument);
            calls.iter().filter(starts).map(|call| call.thread).collect()
        };
        let compilers = processes("--compile-for-parent");
        let namers = &processes("--name-for-parent") | &processes("--attend-parent");
        let (compilers, calls): (Vec<_>, Vec<_>) =
            calls.into_iter().partition(|call: &Call| compilers.contains(&call.thread));
        let (namers, calls) = calls.into_iter().partition(|call: &Call| namers.contains(&call.thread));
        Self { calls, compilers, namers, text }
    }

    /// So many processes compile, and once they have their walls, and with them a component, they name no file.
    #[track_caller]
    fn assert_compilers_name_nothing(&self, count: usize) {
        let processes: BTreeSet<u32> = self.compilers.iter().map(|call| call.thread).collect();
        assert_eq!(processes.len(), count, "{}", self.text);
        for process in processes {
            let calls = || self.compilers.iter().filter(|call| call.thread == process);
            let behind = calls().skip_while(|call| call.name != "seccomp");
            assert!(behind.clone().filter(|call| call.name == "seccomp").count() >= 3, "{}", self.text);
            for call in behind {
                assert!(call.names().is_empty(), "a compiler: {call:?}");
            }
        }
    }

    /// The calls after the walls were raised: there the program begins.
    fn behind_the_walls(&self) -> &[Call] {
        let first = self.calls.iter().position(|call| call.name == "seccomp");
        &self.calls[first.expect("the program raises walls")..]
    }

    /// Where the walls are made narrower: Landlock's second layer.
    #[track_caller]
    fn closed(&self) -> usize {
        let layers: Vec<usize> =
            (0..self.calls.len()).filter(|at| self.calls[*at].name == "landlock_restrict_self").collect();
        assert_eq!(layers.len(), 2, "the walls are narrowed once:\n{}", self.text);
        layers[1]
    }

    /// Where filters for all threads at once are installed: three with the walls, two before the first image is
    /// opened, and two more after start-up.
    fn filters(&self) -> Vec<usize> {
        let for_all = |call: &Call| call.name == "seccomp" && call.arguments.contains("FLAG_TSYNC");
        (0..self.calls.len()).filter(|at| for_all(&self.calls[*at])).collect()
    }

    /// The calls after start-up: after the last filter for all threads at once.
    fn after_start_up(&self) -> &[Call] {
        let filters = self.filters();
        assert_eq!(filters.len(), 7, "the program was not sealed: {}", self.text);
        &self.calls[filters[6]..]
    }

    /// So many rings are made, all of them before the first image is opened.
    #[track_caller]
    fn assert_rings_are_made_first(&self, count: usize) {
        let is_ring = |call: &&Call| call.name == "io_uring_setup";
        let all = self.calls.iter().filter(is_ring).count();
        if all == 1 && self.calls.iter().any(|call| is_ring(&call) && call.arguments.contains(") = -1")) {
            // Not on this kernel: it was asked once.
            return;
        }
        assert_eq!(all, count, "{}", self.text);
        assert_eq!(self.calls[self.filters()[3]..].iter().filter(is_ring).count(), 0, "{}", self.text);
    }

    /// The threads with names like this.
    fn threads(&self, like: &str) -> BTreeSet<u32> {
        let named = self.calls.iter().filter(|call| call.name == "prctl");
        let these = named.filter(|call| call.arguments.starts_with(&format!("PR_SET_NAME, \"{like}")));
        these.map(|call| call.thread).collect()
    }

    /// A ring can open files unless it is restricted to what needs none, before its first request.
    #[track_caller]
    fn assert_rings_are_restricted(&self) {
        let rings = self.calls.iter().filter(|call| call.name == "io_uring_setup");
        let made = rings.filter(|call| !call.arguments.contains(") = -1")).collect::<Vec<_>>();
        let restricted = self.calls.iter().filter(|call| {
            call.name == "io_uring_register"
                && call.arguments.contains("IORING_REGISTER_RESTRICTIONS")
                && !call.arguments.contains(") = -1")
        });
        for ring in &made {
            assert!(ring.arguments.contains("IORING_SETUP_R_DISABLED"), "it starts without restrictions: {ring:?}");
        }
        assert_eq!(made.len(), restricted.count(), "each ring is restricted once:\n{}", self.text);
    }
}

impl Call {
    /// The files that the call names, as absolute paths. A name that is empty means a descriptor.
    fn names(&self) -> Vec<PathBuf> {
        let mut names = Vec::new();
        let nameless = ["prctl", "clone", "seccomp", "landlock_restrict_self", "io_uring_setup", "io_uring_register"];
        if nameless.contains(&self.name.as_str()) {
            return names;
        }
        // Results are not names: `readlink("/proc/self/exe", "/usr/…"`, `) = 3</file>`.
        let arguments = self.arguments.split(") = ").next().unwrap();
        let mut directory = PathBuf::from("/");
        let mut rest = arguments;
        let renames = self.name.starts_with("rename") || self.name.starts_with("link");
        let most = if renames { 2 } else { 1 };
        while names.len() < most {
            let Some(quote) = rest.find('"') else { break };
            // `-y` says what a descriptor is: `AT_FDCWD</here>, "name"`.
            if let Some(start) = rest[..quote].rfind('<') {
                directory = PathBuf::from(rest[start + 1..quote].split('>').next().unwrap());
            } else if quote == 0 && names.is_empty() {
                directory = std::env::current_dir().unwrap();
            }
            let end = quote + 1 + rest[quote + 1..].find('"').unwrap();
            let name = &rest[quote + 1..end];
            if !name.is_empty() {
                names.push(normal(&directory.join(name)));
            } else if names.is_empty() {
                break;
            }
            rest = &rest[end + 1..];
        }
        names
    }
}

/// Without `.` and `..`, by text: where a name without symbolic links leads.
fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::ParentDir => {
                normal.pop();
            }
            Component::Normal(part) => normal.push(part),
            _ => {}
        }
    }
    normal
}

/// strace is here; if not, says so.
fn strace_is_here() -> bool {
    let here = on_path("strace");
    if !here {
        skip("strace is not installed");
    }
    here
}

/// Every name is that of the image, of something granted, or one of the host's own, which are few.
#[track_caller]
fn assert_only_granted(place: &Place, trace: &Trace) {
    let images = place.path("images");
    let own = ["/dev/null", "/dev/kvm"].map(Path::new);
    let mut seen = 0;
    for call in trace.behind_the_walls() {
        for name in call.names() {
            let granted = name.starts_with(&images);
            seen += usize::from(granted);
            let open_already = name.strip_prefix("/proc/self/fd").is_ok();
            assert!(granted || open_already || own.contains(&name.as_path()), "{call:?} names {}", name.display());
        }
    }
    assert!(seen > 0, "not even the image was opened:\n{}", trace.text);
    // Before as well, where the operator's own paths are looked at, and what the program is made of.
    for call in &trace.calls {
        for name in call.names() {
            assert!(!name.starts_with(place.path("secret")), "{call:?} names {}", name.display());
        }
    }
    trace.assert_rings_are_restricted();
}

/// Images that refer to the canary, with their formats. Nothing else of theirs is outside of the grant.
fn attacks(place: &Place) -> Vec<(&'static str, PathBuf)> {
    let canary = place.text("secret/canary");
    let mut images = Vec::new();
    let references = [
        canary.clone(),
        "../../secret/canary".to_owned(),
        format!("/{}/../..{canary}", "x/..".repeat(20)),
        format!("file:{canary}"),
        format!("/proc/self/root{canary}"),
        "/etc/passwd".to_owned(),
        "/dev/sda".to_owned(),
    ];
    for (number, reference) in references.iter().enumerate() {
        let bytes = overlay(12, 64 << 10, reference.as_bytes(), Some("raw"));
        images.push(("qcow2", place.write(&format!("images/vm/{number}.qcow2"), bytes)));
        let text = format!(
            "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n\
             # Extent description\nRW 128 FLAT \"{reference}\" 0\n"
        );
        images.push(("vmdk", place.write(&format!("images/vm/{number}.vmdk"), text)));
    }
    images.push(("qcow2", with_data_file(place, "secret/canary")));
    images
}

#[test]
fn no_call_names_a_path_of_the_image_outside_of_the_grants() {
    if !strace_is_here() {
        return;
    }
    let place = Place::new();
    let images = place.text("images");
    for (format, image) in attacks(&place) {
        let image = image.to_str().unwrap().to_owned();
        let trace = Trace::of(&place, &["info", "--format", format, "--allow", &images, &image]);
        assert_only_granted(&place, &trace);
        tally::image_refused();
    }
    // What a component asks for by itself. Directories of the system with it.
    let asks = place.write("images/vm/asks.img", format!("open {} /etc/shadow ../.. /\n", place.text("secret/canary")));
    let plugin = format!("hostile={}", component("hostile").display());
    let arguments = ["info", "--plugin", &plugin, "--format", "hostile", "--allow", &images, asks.to_str().unwrap()];
    let trace = Trace::of(&place, &arguments);
    let names: Vec<PathBuf> = trace.behind_the_walls().iter().flat_map(Call::names).collect();
    for outside in ["/etc/shadow", &place.text("secret/canary")] {
        assert!(!names.contains(&PathBuf::from(outside)), "{outside} is named:\n{}", trace.text);
    }
    tally::component_stopped();
}

/// The twin: granted, the same reference is named. So a name is seen where there is one.
#[test]
fn a_name_that_is_granted_is_seen() {
    if !strace_is_here() {
        return;
    }
    let place = Place::new();
    let image = place.write("images/vm/a.qcow2", overlay(12, 64 << 10, b"../../secret/canary", Some("raw")));
    let (secret, image) = (place.text("secret"), image.to_str().unwrap().to_owned());
    let trace = Trace::of(&place, &["info", "--format", "qcow2", "--allow", &secret, &image]);
    let names: Vec<PathBuf> = trace.behind_the_walls().iter().flat_map(Call::names).collect();
    assert!(names.contains(&place.path("secret/canary")), "{names:?}\n{}", trace.text);
    tally::image_served();
}

/// Whoever takes the program over by an image must not leave code for the next start: the cache is closed for writing
/// before any image is opened, and before there is a second thread, which would keep the right to write.
#[test]
fn the_code_cache_is_closed_before_an_image_is_opened() {
    if !strace_is_here() || !landlock_is_here() {
        return;
    }
    let place = Place::new();
    let base = place.write("images/vm/base", noise(1, 64 << 10));
    let digest = place.text("images/vm/base@sha256:") + &sha256(&std::fs::read(&base).unwrap());
    let chain = place.write("images/vm/a.qcow2", overlay(12, 64 << 10, b"base", Some("raw")));
    let chain = chain.to_str().unwrap();
    let hostile = place.write("images/vm/h.img", [b'.'; 4096]);
    let plugin = format!("hostile={}", component("hostile").display());
    let disk = format!("file={chain},format=qcow2,allow={digest},readonly=on");
    let new = place.text("images/vm/new.qcow2");
    let out = place.text("images/vm/out");
    // What each is about, the file that it makes, how many components are kept: the base's before anybody knows that
    // there is one.
    let commands: [(&str, Option<&str>, usize, &[&str]); 5] = [
        ("own", Some(&out), 3, &["read", "--format", "qcow2", "--allow", &digest, "--output", &out, chain]),
        ("stranger", None, 4, &["map", "--plugin", &plugin, "--format", "hostile", hostile.to_str().unwrap()]),
        ("run", None, 3, &["run", "--json", "--memory", "64M", "--disk", &disk]),
        (
            "two images",
            Some(&new),
            3,
            &["convert", "--format", "qcow2", "--allow", &digest, "--to-format", "qcow2", chain, &new],
        ),
        ("changed", None, 3, &["resize", "--format", "qcow2", &new, "1M"]),
    ];
    for (what, makes, kept, arguments) in commands {
        let cache = place.path(&format!("cache/{what}"));
        std::fs::create_dir_all(place.path("cache")).unwrap();
        let files = || -> BTreeMap<_, _> {
            let entries = std::fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap());
            entries.map(|entry| (entry.file_name(), entry.metadata().unwrap().modified().unwrap())).collect()
        };
        let mut before = None;
        for _ in 0..2 {
            makes.map(std::fs::remove_file);
            let trace = Trace::with_cache(&place, cache.to_str().unwrap(), arguments);
            let closed = trace.closed();
            let (beginning, later) = trace.calls.split_at(closed);
            for call in beginning {
                let image = |name: &PathBuf| name.starts_with(place.path("images")) && name.is_file();
                let opens = call.name == "openat" && !call.arguments.contains("O_PATH");
                assert!(!opens || !call.names().iter().any(image), "{what}: opened too early: {call:?}");
            }
            let walls = beginning.iter().position(|call| call.name == "seccomp").unwrap();
            let threads = beginning[walls..].iter().filter(|call| call.name == "clone").count();
            assert_eq!(
                threads, 0,
                "{what}: a thread keeps the right to write:
{}",
                trace.text
            );
            for call in later {
                let writes = call.name != "openat" || call.arguments.contains("O_CREAT");
                let kept = call.names().iter().any(|name| name.starts_with(&cache));
                assert!(!writes || !kept, "{what}: {call:?}");
            }
            // Who makes new files opens no image either, and none of their bytes once it has its walls.
            let image = |name: &PathBuf| place.path("images/vm/a.qcow2") == *name || base == *name;
            assert!(!trace.namers.iter().flat_map(Call::names).any(|name| image(&name)), "{what}:\n{}", trace.text);
            let behind = trace.namers.iter().skip_while(|call| call.name != "seccomp");
            assert!(!behind.clone().any(|call| call.name.starts_with("open")), "{what}:\n{}", trace.text);
            assert_eq!(behind.count() > 0, makes.is_some(), "{what}:\n{}", trace.text);
            // What is there is used: the second run neither makes nor replaces anything.
            assert_eq!(files().len(), kept, "{what}: {:?}", files());
            if let Some(before) = before.replace(files()) {
                assert_eq!(before, files(), "{what}: written again");
            }
        }
    }
}

/// Four disks: a chain, a component that breaks while it is asked, a raw disk, one that is written to.
#[test]
fn while_a_guest_runs_no_thread_names_a_file() {
    if !strace_is_here() {
        return;
    }
    if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        return skip("/dev/kvm cannot be opened");
    }
    let place = Place::new();
    place.write("images/vm/base", noise(1, 64 << 10));
    let chain = place.write("images/vm/chain.qcow2", overlay(12, 64 << 10, b"base", Some("raw")));
    let mut bytes = b"trap-at-locate 3\n".to_vec();
    bytes.resize(1 << 20, b'.');
    let breaks = place.write("images/vm/breaks.img", bytes);
    let raw = place.write("images/vm/good.raw", noise(2, 1 << 20));
    let written = place.path("images/vm/written.qcow2");
    qemu_img(["create", "-q", "-f", "qcow2", written.to_str().unwrap(), "1M"]);
    let plugin = format!("hostile={}", component("hostile").display());
    let disks = [
        format!("file={},format=qcow2,allow={},readonly=on", chain.display(), place.text("images")),
        format!("file={},format=hostile,readonly=on", breaks.display()),
        format!("file={},format=raw,readonly=on", raw.display()),
        format!("file={},format=qcow2", written.display()),
    ];
    let mut arguments = vec!["run", "--json", "--memory", "64M", "--cpus", "2", "--plugin", &plugin];
    disks.iter().for_each(|disk| arguments.extend(["--disk", disk]));
    let trace = Trace::of(&place, &arguments);

    let plugin_file = component("hostile");
    for call in trace.behind_the_walls() {
        for name in call.names() {
            let own = ["/dev/null", "/dev/kvm"].map(Path::new).contains(&name.as_path()) || name == plugin_file;
            let open_already = name.strip_prefix("/proc/self/fd").is_ok();
            assert!(own || open_already || name.starts_with(place.path("images")), "{call:?}");
        }
    }
    let vcpus = trace.threads("vcpu");
    let workers = trace.threads("disk");
    assert!(!vcpus.is_empty() && workers.len() >= disks.len(), "{vcpus:?} {workers:?}\n{}", trace.text);
    for thread in vcpus.union(&workers) {
        let calls = || trace.calls.iter().filter(|call| call.thread == *thread);
        // Its first act is to narrow itself, before anything of the guest reaches it.
        let filters = calls().filter(|call| call.name == "seccomp").count();
        assert!(filters >= 2, "thread {thread} has no filter of its own:\n{}", trace.text);
        assert!(calls().all(|call| call.names().is_empty()), "thread {thread} names a file:\n{}", trace.text);
    }
    for call in trace.after_start_up() {
        assert!(call.names().is_empty(), "after start-up: {call:?}");
    }
    trace.assert_compilers_name_nothing(1);
    trace.assert_rings_are_restricted();
    trace.assert_rings_are_made_first(disks.len());
    tally::component_stopped();
    tally::image_served();
}

/// The same for `serve`: the thread that speaks with a front end sees what kind of descriptors it was sent, and
/// no thread but the first names a file, which removes the socket in the end.
#[test]
fn while_a_front_end_is_served_no_thread_of_it_names_a_file() {
    use std::io::{Read as _, Write as _};
    if !strace_is_here() {
        return;
    }
    let place = Place::new();
    place.write("images/vm/base", noise(1, 64 << 10));
    let chain = place.write("images/vm/chain.qcow2", overlay(12, 64 << 10, b"base", Some("raw")));
    std::fs::create_dir(place.path("run")).unwrap();
    let socket = place.path("run/socket");
    let disk = format!("file={},format=qcow2,allow={},readonly=on", chain.display(), place.text("images"));
    let arguments = ["serve", "--socket", socket.to_str().unwrap(), "--disk", &disk];
    let mut strace = Trace::command(&place, "off", &arguments).spawn().unwrap();
    let deadline = Instant::now() + LIMIT;
    let mut front_end = loop {
        match UnixStream::connect(&socket) {
            Ok(stream) => break stream,
            Err(error) => assert!(Instant::now() < deadline, "nobody listens: {error}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    front_end.set_read_timeout(Some(LIMIT)).unwrap();
    // VHOST_USER_GET_FEATURES, in version 1 of the protocol: a header without a payload.
    front_end.write_all(&[1u32, 1, 0].map(u32::to_le_bytes).concat()).unwrap();
    let mut answer = [0; 20];
    front_end.read_exact(&mut answer).unwrap();
    assert_eq!(answer[..4], 1u32.to_le_bytes());
    drop(front_end);
    // strace follows the program to its end, and does not pass signals on.
    let children = format!("/proc/{}/task/{0}/children", strace.id());
    let child = std::fs::read_to_string(children).unwrap();
    run(Command::new("kill").args(["-TERM", child.trim()])).succeeded();
    assert!(strace.wait().unwrap().success());
    assert!(!socket.exists());

    let trace = Trace::read(&place);
    let first = trace.calls[0].thread;
    let sessions = trace.threads("disk0-session");
    assert!(!sessions.is_empty(), "{}", trace.text);
    let mut filtered = 0;
    for call in trace.behind_the_walls() {
        filtered += usize::from(call.thread != first && call.name == "seccomp");
        for name in call.names() {
            let own = name.starts_with(place.path("images")) || name.starts_with(place.path("run"));
            let of_all = name.starts_with("/proc/self/fd") || name == Path::new("/dev/null");
            assert!(of_all || call.thread == first && own, "{call:?}");
        }
    }
    assert!(filtered >= 2, "no thread has a filter of its own:\n{}", trace.text);
    for call in trace.after_start_up() {
        // What a front end sent is looked at.
        assert!(call.names().iter().all(|name| name.starts_with("/proc/self/fd")), "after start-up: {call:?}");
    }
    trace.assert_rings_are_restricted();
    tally::image_served();
}
