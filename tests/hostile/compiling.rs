//! Components that attack the compiler: with code that takes for ever, with code that takes all memory, with code
//! that is wrong. It is a process of its own; the program lives, and says what was the matter.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use blockhouse_sandbox::block::{ErrorKind, Result};
use blockhouse_sandbox::{Compiler, Limits, Sandbox, compile_here};
use blockhouse_tests::{Outcome, blockhouse, component, finish, noise, run_within};
use rustix::process::{Pid, Signal, kill_process};

use crate::loading::{importing, leb, section};
use crate::place::{Attempt, Place, TIME_LIMIT, limited};
use crate::tally;

/// The built-in raw component with a further core module, which nothing in it uses: it has to be compiled.
fn with_module(functions: &[Vec<u8>]) -> Vec<u8> {
    let mut module = b"\0asm\x01\0\0\0".to_vec();
    // One type: no parameters, no results.
    module.extend(section(1, &[1, 0x60, 0, 0]));
    module.extend(section(3, &[leb(functions.len()), vec![0; functions.len()]].concat()));
    let bodies = functions.iter().map(|body| [leb(body.len()), body.clone()].concat());
    let code = [vec![leb(functions.len())], bodies.collect()].concat().concat();
    module.extend(section(10, &code));
    [std::fs::read(component("raw")).unwrap(), section(1, &module)].concat()
}

/// A function with so many `i32` locals and this body.
fn function(locals: usize, body: &[u8]) -> Vec<u8> {
    [vec![1], leb(locals), vec![0x7f], body.to_vec(), vec![0x0b]].concat()
}

/// `local.get` and `local.set`.
const GET: u8 = 0x20;
const SET: u8 = 0x21;

/// Blocks that each may be left early, with another local changed in each.
fn blocks(count: usize) -> Vec<u8> {
    let mut body = Vec::new();
    for number in 0..count {
        let (this, other) = (leb(number % 2000), leb((number * 7 + 1) % 2000));
        // block; local.get this; br_if 0; local.get other; i32.const 1; i32.add; local.set this; end
        body.extend([&[0x02, 0x40, GET][..], &this, &[0x0d, 0, GET], &other, &[0x41, 1, 0x6a, SET], &this].concat());
        body.push(0x0b);
    }
    function(2000, &body)
}

/// A table of 200,000 ways to go on, over 300 blocks.
fn giant_table() -> Vec<u8> {
    let mut body = Vec::new();
    body.extend([0x02, 0x40].repeat(300));
    body.extend([&[GET, 0, 0x0e][..], &leb(200_000)].concat());
    (0..=200_000_usize).for_each(|number| body.extend(leb(number % 300)));
    for number in 0..300_usize {
        body.push(0x0b);
        body.extend([&[GET, 0, 0x41, 1, 0x6a, SET][..], &leb(number % 50)].concat());
    }
    function(50, &body)
}

/// 40,000 locals that all live through a long row of loops.
fn many_locals() -> Vec<u8> {
    let mut body = Vec::new();
    for number in 0..4000_usize {
        let (this, other) = (leb(number * 10), leb((number * 17 + 5) % 40_000));
        // loop; local.get this; local.get other; i32.add; local.set this; local.get other; br_if 0; end
        body.extend([&[0x03, 0x40, GET][..], &this, &[GET], &other, &[0x6a, SET], &this, &[GET], &other].concat());
        body.extend([0x0d, 0, 0x0b]);
    }
    (0..40_000_usize).for_each(|local| body.extend([&[GET][..], &leb(local), &[0x1a]].concat()));
    function(40_000, &body)
}

/// Straight code without end: so many additions.
fn long_row(count: usize) -> Vec<u8> {
    let mut body = vec![GET, 0];
    body.extend([0x41, 3, 0x6c, GET, 1, 0x6a].repeat(count));
    body.extend([SET, 0]);
    function(2, &body)
}

/// Slow enough for any machine, and never large: small functions, many of them.
fn for_ever() -> Vec<u8> {
    with_module(&vec![blocks(500); 3000])
}

/// What reads an image with this component, under a policy with these limits.
fn reading(place: &Place, bytes: &[u8], limits: &str) -> (PathBuf, Vec<String>) {
    let image = place.write("images/vm/a.raw", noise(2, 4096));
    let stranger = place.write("images/stranger.wasm", bytes);
    let policy = place.write("images/policy.toml", format!("version = 1\n[limits]\n{limits}\n"));
    let more = ["--code-cache", "off", "--policy", policy.to_str().unwrap(), "--plugin"].map(str::to_owned);
    (image, [&more[..], &[format!("raw={}", stranger.display())]].concat())
}

/// Opens it.
fn open(place: &Place, bytes: &[u8], limits: &str) -> Attempt {
    let (image, more) = reading(place, bytes, limits);
    let more: Vec<&str> = more.iter().map(String::as_str).collect();
    place.open_with("read", "raw", &image, &[], &more)
}

/// The same where what is said depends on the machine, or on the offset of a byte.
fn outcome(place: &Place, bytes: &[u8], limits: &str) -> Outcome {
    let (image, more) = reading(place, bytes, limits);
    let mut program = limited();
    program.args(["read", "--format", "raw"]).args(more).arg(image);
    let outcome = run_within(TIME_LIMIT, &mut program);
    assert!(matches!(outcome.status.code(), Some(0 | 6)), "{}: {}", outcome.status, outcome.stderr);
    outcome
}

/// Whatever the code is, an answer comes in time: the disk, or an error that says what was too much.
#[test]
fn what_takes_long_to_compile_is_refused_in_time() {
    let place = Place::new();
    let attempt = open(&place, &for_ever(), "compile-time-ms = 1000");
    attempt.assert_error(6, &["images/stranger.wasm: it takes longer than 1s to compile, and is not loaded"]);
    assert_eq!(attempt.outcome.text(), "");
    tally::component_not_loaded();
    for (what, function) in [
        ("blocks", blocks(100_000)),
        ("a table", giant_table()),
        ("locals", many_locals()),
        ("a row", long_row(200_000)),
    ] {
        let outcome = outcome(&place, &with_module(&[function]), "compile-time-ms = 2000");
        match outcome.status.code() {
            Some(0) => assert!(outcome.stdout == noise(2, 4096), "{what}"),
            // Too long, or a limit of the compiler itself.
            _ => assert!(outcome.stderr.contains("stranger.wasm: it "), "{what}: {}", outcome.stderr),
        }
        tally::component_not_loaded();
    }
}

#[test]
fn what_takes_much_memory_to_compile_is_refused() {
    let place = Place::new();
    let bytes = with_module(&[long_row(400_000)]);
    let attempt = open(&place, &bytes, "compile-memory-bytes = 120_000_000");
    attempt.assert_error(6, &["stranger.wasm: it takes more than 120000000 bytes of memory to compile"]);
    tally::component_not_loaded();
    // Less than the compiler itself is large.
    let attempt = open(&place, &bytes, "compile-memory-bytes = 1");
    attempt.assert_error(6, &["stranger.wasm: "]);
    let bytes = with_module(&[long_row(100_000)]);
    let attempt = open(&place, &bytes, "compiled-bytes = 100_000");
    attempt.assert_error(6, &["stranger.wasm: it is more than 100000 bytes of machine code, and is not loaded"]);
    tally::component_not_loaded();
}

/// The code of a function is looked at by the compiler alone.
#[test]
fn code_that_is_wrong_is_an_error_of_the_compiler() {
    let place = Place::new();
    for body in [&[0x6a][..], &[0xff], &[GET, 9], &[0x0c, 5]] {
        let outcome = outcome(&place, &with_module(&[function(1, body)]), "");
        let why = "stranger.wasm: it is not a WebAssembly component that this host can run: failed to compile: ";
        assert!(outcome.stderr.contains(why), "{}", outcome.stderr);
        tally::component_not_loaded();
    }
    // And the twin.
    assert_eq!(open(&place, &with_module(&[function(1, &[0x01])]), "").succeeded().outcome.stdout, noise(2, 4096));
}

/// The process that compiles for `program`, once it does.
fn compiler_of(program: &Child) -> Pid {
    let began = Instant::now();
    loop {
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
            let read = |name: &str| std::fs::read_to_string(entry.path().join(name)).unwrap_or_default();
            // proc_pid_stat(5), after the name in brackets: state, parent; user time in ticks is the 14th of all.
            let stat = read("stat");
            let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
            let of_it = fields.get(1).is_some_and(|parent| *parent == program.id().to_string());
            if of_it && fields.get(11).is_some_and(|ticks| ticks.parse::<u64>().unwrap() > 5) {
                return Pid::from_raw(pid).unwrap();
            }
        }
        assert!(began.elapsed() < Duration::from_secs(20), "nothing is compiled");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Who was given less than a compiler would give itself compiles with that.
#[test]
fn limits_that_are_lower_already_stay() {
    let place = Place::new();
    let (image, stranger) = (place.write("images/vm/a.raw", noise(2, 4096)), component("raw"));
    let mut program = std::process::Command::new("sh");
    if rustix::process::geteuid().is_root() {
        // Who could raise them.
        program = std::process::Command::new("setpriv");
        program.args(["--bounding-set=-sys_resource", "--inh-caps=-sys_resource", "sh"]);
    }
    program.args(["-c", "ulimit -t 20 && exec \"$0\" \"$@\""]).arg(blockhouse_tests::program());
    program.args(["read", "--format", "raw", "--code-cache", "off"]);
    program.arg("--plugin").arg(format!("raw={}", stranger.display())).arg(image);
    let outcome = run_within(TIME_LIMIT, &mut program);
    assert!(outcome.stdout == noise(2, 4096), "{:?}: {}", outcome.status, outcome.stderr);
}

fn start(place: &Place, arguments: &[&str]) -> Child {
    let image = place.write("images/vm/a.raw", noise(2, 4096));
    let stranger = place.write("images/stranger.wasm", for_ever());
    let mut program = blockhouse();
    program.args(["read", "--format", "raw", "--code-cache", "off"]).args(arguments);
    program.arg("--plugin").arg(format!("raw={}", stranger.display())).arg(image);
    program.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn a_compiler_that_is_killed_is_an_error() {
    let place = Place::new();
    for arguments in [&[][..], &["--no-walls"]] {
        let program = start(&place, arguments);
        kill_process(compiler_of(&program), Signal::KILL).unwrap();
        let Outcome { status, stderr, .. } = finish(program);
        assert_eq!(status.code(), Some(6), "{stderr}");
        let why = "stranger.wasm: the compiler broke down over it (signal: 9 (SIGKILL)), and it is not loaded";
        assert!(stderr.contains(why), "{stderr}");
        tally::component_not_loaded();
    }
}

/// What a compiler has, while it works for a stranger; and it does not outlive the program.
#[test]
fn a_compiler_has_nothing_and_ends_with_the_program() {
    let place = Place::new();
    let mut program = start(&place, &[]);
    let compiler = compiler_of(&program);
    let directory = PathBuf::from(format!("/proc/{}", compiler.as_raw_nonzero()));
    // It may be about to have its walls.
    let began = Instant::now();
    let status = loop {
        let status = std::fs::read_to_string(directory.join("status")).unwrap();
        if status.contains("\nSeccomp:\t2\n") || began.elapsed() > Duration::from_secs(10) {
            break status;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
    assert_eq!((field("NoNewPrivs:"), field("Seccomp:"), field("Threads:")), ("1", "2", "1"), "{status}");
    let limits = std::fs::read_to_string(directory.join("limits")).unwrap();
    let limit = |name: &str| limits.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
    assert!(limit("Max address space").starts_with("2147483648 "), "{limits}");
    assert!(limit("Max cpu time").starts_with("32 "), "{limits}");
    assert!(limit("Max file size").starts_with("0 "), "{limits}");
    // Whoever may not look at it (it cannot be dumped) is not root.
    if let (Ok(files), Ok(environment)) =
        (std::fs::read_dir(directory.join("fd")), std::fs::read(directory.join("environ")))
    {
        let names: Vec<_> = files.map(|file| std::fs::read_link(file.unwrap().path()).unwrap()).collect();
        assert!(names.len() == 3 && names.iter().all(|name| is_pipe(name)), "{names:?}");
        assert!(environment.is_empty(), "{}", String::from_utf8_lossy(&environment));
    }
    program.kill().unwrap();
    assert_eq!(program.wait().unwrap().signal(), Some(9));
    let began = Instant::now();
    while std::fs::read_to_string(directory.join("stat")).is_ok_and(|stat| !stat.contains(") Z ")) {
        assert!(began.elapsed() < Duration::from_secs(10), "the compiler did not end with the program");
        std::thread::sleep(Duration::from_millis(5));
    }
    tally::component_stopped();
}

fn is_pipe(name: &Path) -> bool {
    name.to_str().is_some_and(|name| name.starts_with("pipe:"))
}

/// Counts how often it is asked.
#[derive(Debug, Default)]
struct Counting(AtomicUsize);

// SAFETY: it returns what `compile_here` returned for the same bytes and limits in this process.
#[allow(unsafe_code)]
unsafe impl Compiler for Counting {
    fn compile(&self, _name: &str, component: &[u8], limits: &Limits) -> Result<Vec<u8>> {
        self.0.fetch_add(1, Ordering::Relaxed);
        compile_here(component, limits)
    }
}

/// What wants more than there is, or is nothing that is served, is refused before any of it is compiled.
#[test]
fn the_compiler_sees_only_what_fits_a_world() {
    let counting = Arc::new(Counting::default());
    let sandbox = Sandbox::new(Limits::default()).unwrap().compiler(Arc::clone(&counting) as _);
    let compiled = || counting.0.load(Ordering::Relaxed);
    let outside = [importing("wasi:sockets/tcp@0.2.6", "[method]tcp-socket.listen"), b"\0asm\x0d\0\x01\0".to_vec()];
    for bytes in &outside {
        assert_eq!(sandbox.load("stranger.wasm", bytes).unwrap_err().kind(), ErrorKind::Component);
        assert_eq!(sandbox.inspect("stranger.wasm", bytes).unwrap().world, None);
    }
    // However much is wrong with the rest: it is not looked at.
    let broken = [&with_module(&[function(1, &[0xff])])[..], &importing("wasi:cli/exit@0.2.6", "exit")[8..]].concat();
    let error = sandbox.load("stranger.wasm", &broken).unwrap_err().to_string();
    assert!(error.contains("it imports what no world offers, and is not loaded: wasi:cli/exit@0.2.6 "), "{error}");
    assert_eq!(compiled(), 0, "the compiler was started");
    let good = std::fs::read(component("raw")).unwrap();
    sandbox.load("raw.wasm", &good).unwrap();
    sandbox.inspect("raw.wasm", &good).unwrap();
    assert_eq!(compiled(), 2);
    tally::component_not_loaded();

    // The same through the program.
    let place = Place::new();
    for (name, bytes) in [("outside", &outside[0]), ("good", &good)] {
        let file = place.write(&format!("images/{name}.wasm"), bytes);
        let outcome = blockhouse_tests::run(blockhouse().args(["-vv", "plugin", "inspect"]).arg(file));
        assert_eq!(outcome.stderr.contains("compiled in a process of its own"), name == "good", "{}", outcome.stderr);
    }
}

/// What is read off the bytes is what is read off the compiled component.
#[test]
fn a_surface_is_the_same_before_and_after() {
    let place = Place::new();
    let sandbox = Sandbox::new(Limits::default()).unwrap();
    for format in ["raw", "qcow2", "vmdk", "hostile", "probe"] {
        let file = place.write(&format!("images/{format}.compiled"), sandbox.precompile(&component(format)).unwrap());
        // SAFETY: it was made on the line above.
        #[allow(unsafe_code)]
        let compiled = unsafe { sandbox.load_precompiled(&file) }.unwrap();
        let before = sandbox.inspect(format, &std::fs::read(component(format)).unwrap()).unwrap();
        assert_eq!(compiled.inspection(), &before, "{format}");
    }
}
