//! A compiler in a process of its own: this program again, with limits, and without anything to open.
//!
//! ```text
//!   program                                            compiler process
//!   ───────                                            ────────────────
//!   prepare ──── /proc/self/exe ARGUMENT ... ────────▶ descriptors closed, limits lowered
//!   (walls go up: nobody is started any more)          waits
//!   compile ──── length, component ──────────────────▶ reads all of it, walls go up
//!           ◀─── machine code, or why not ──────────── compiles, answers, ends
//!   (lets go of the pipe: too late, or ended itself)   killed, if it is still there
//! ```
//!
//! | limit | who holds it |
//! |---|---|
//! | time | the program stops waiting, and lets go of the pipe; beside that, a timer in the process, and its limit of processor time |
//! | memory | `RLIMIT_AS`; an allocation that fails ends the process |
//! | machine code | the program reads no more of it |
//! | the program's life | the kernel lets go of the pipe |
//!
//! A signal would be the usual way to end a process, but Landlock lets the program send none to a process that it
//! started before it went behind its walls, and none on its death either. So the process asks the kernel for
//! `SIGKILL` when the other end of its pipe is closed (`F_SETSIG`), before it looks at what a stranger made.
//!
//! Each process compiles one component: no component can change what becomes of the next.

use std::ffi::{OsStr, OsString};
use std::fmt::Display;
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use blockhouse_block::{Error, ErrorKind, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};

use crate::compiler::{Compiler, compile_here};
use crate::limits::Limits;
use crate::text::clean;

/// What an answer begins with that is machine code, the length of which comes next.
const CODE: &[u8; 8] = b"BHMADE1\n";
/// What one begins with that is a reason not to compile. Anything else is the last words of a process.
const REFUSAL: &[u8; 8] = b"BHDENY1\n";
/// The most of a text.
const MAX_TEXT: usize = 4096;
/// How much longer than the program's patience a process lives.
const GRACE: Duration = Duration::from_secs(1);

/// Compiles each component in a process that is started for it.
#[derive(Debug)]
pub struct CompilerProcess {
    program: PathBuf,
    argument: OsString,
    /// Started before they were needed.
    waiting: Mutex<Vec<Process>>,
    used: AtomicU64,
}

/// A process that waits for its component.
#[derive(Debug)]
struct Process {
    child: Child,
    component: ChildStdin,
    answer: PipeReader,
}

impl CompilerProcess {
    /// Processes of this program, started with `argument` and further ones. No search path and no shell are
    /// involved, and whatever the program's name leads to by now.
    ///
    /// # Safety
    /// A program that is started with `argument` calls [`serve_compiler`] with the arguments that follow, and
    /// nothing else: its answer becomes code of this process.
    #[allow(unsafe_code)]
    pub unsafe fn this_program(argument: impl Into<OsString>) -> Self {
        Self {
            program: PathBuf::from("/proc/self/exe"),
            argument: argument.into(),
            waiting: Mutex::default(),
            used: AtomicU64::new(0),
        }
    }

    /// Starts a process now, for a component that comes later: for a program that gives up the right to start any.
    /// One that is not used ends with [`dismiss`](Self::dismiss), and with the program.
    ///
    /// # Errors
    /// [`Storage`](ErrorKind::Storage) if it cannot be started.
    pub fn prepare(&self, limits: &Limits) -> Result<()> {
        let process = self.start(limits)?;
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).push(process);
        Ok(())
    }

    /// Ends the processes that were prepared and not used. One that is needed later is started then, if it can be.
    pub fn dismiss(&self) {
        let waiting = std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
        for Process { mut child, component, answer } in waiting {
            drop((component, answer));
            if ended(&mut child, Instant::now() + GRACE) == End::None {
                tracing::warn!("a process for the compiler does not end");
            }
        }
    }

    /// How many components were handed to a process so far.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    fn start(&self, limits: &Limits) -> Result<Process> {
        let failed = |error: io::Error| {
            let why = format!(
                "a process for the compiler cannot be started: {error} (it is this program, {})",
                self.program.display()
            );
            Error::new(ErrorKind::Storage, why).with_source(error)
        };
        let (answer, writer) = io::pipe().map_err(failed)?;
        let errors = writer.try_clone().map_err(failed)?;
        let mut child = Command::new(&self.program)
            .arg(&self.argument)
            .args(Terms::of(limits).to_arguments())
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(writer)
            // The last words of a process that breaks down.
            .stderr(errors)
            .spawn()
            .map_err(failed)?;
        let Some(component) = child.stdin.take() else {
            return Err(failed(io::Error::other("it has no standard input")));
        };
        Ok(Process { child, component, answer })
    }
}

// SAFETY: the answer of a process comes through a pipe that nobody else has, and was made by `serve_compiler`
// in this program: what `this_program` asks for.
#[allow(unsafe_code)]
unsafe impl Compiler for CompilerProcess {
    fn compile(&self, name: &str, component: &[u8], limits: &Limits) -> Result<Vec<u8>> {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let process = match waiting {
            Some(process) => process,
            None => self.start(limits).map_err(|error| error.on_image(name))?,
        };
        self.used.fetch_add(1, Ordering::Relaxed);
        tracing::debug!(component = name, "compiled in a process of its own");
        process.compile(component, limits).map_err(|(kind, why)| Error::new(kind, why).on_image(name))
    }
}

impl Process {
    fn compile(mut self, component: &[u8], limits: &Limits) -> std::result::Result<Vec<u8>, (ErrorKind, String)> {
        let until = Instant::now() + limits.compile_time;
        let too_long = || {
            let why = format!("it takes longer than {:?} to compile, and is not loaded", limits.compile_time);
            (ErrorKind::Limit, why)
        };
        let talked = talk(&mut self.component, &mut self.answer, component, most(limits), until);
        let whole = matches!(&talked, Ok(Some(answer)) if answer.len() <= most(limits));
        // Who has said all ends.
        let end = if whole { ended(&mut self.child, until) } else { End::None };
        // Whoever is still there is killed by this.
        drop(self.component);
        if end == End::None {
            let _ = ended(&mut self.child, Instant::now() + GRACE);
        }
        let answer = match talked {
            Ok(Some(answer)) => answer,
            Ok(None) => return Err(too_long()),
            Err(error) => return Err((ErrorKind::Component, format!("the compiler cannot be spoken to: {error}"))),
        };
        if !whole {
            let why = format!("it is more than {} bytes of machine code, and is not loaded", limits.compiled_bytes);
            return Err((ErrorKind::Limit, why));
        }
        let (status, how) = match end {
            End::None => return Err(too_long()),
            End::With(status) => (Some(status), status.to_string()),
            End::Unknown => (None, "how is not known, since it is not ours to wait for".to_owned()),
        };
        let text = |answer: &[u8]| clean(String::from_utf8_lossy(answer).trim(), MAX_TEXT);
        if status.is_none_or(|status| status.success())
            && let Some(code) = machine_code(&answer)
        {
            return Ok(code.to_vec());
        }
        if let Some(why) = answer.strip_prefix(REFUSAL) {
            return Err((ErrorKind::Component, text(why)));
        }
        let text = text(&answer);
        let by = |signal: Signal| status.and_then(|status| status.signal()) == Some(signal.as_raw());
        if by(Signal::ALARM) || by(Signal::XCPU) {
            return Err(too_long());
        }
        if text.contains("memory allocation of") {
            let bytes = limits.compile_memory_bytes;
            let why = format!("it takes more than {bytes} bytes of memory to compile, and is not loaded");
            return Err((ErrorKind::Limit, why));
        }
        let words = if text.is_empty() { String::new() } else { format!(": {text}") };
        let why = format!("the compiler broke down over it ({how}), and it is not loaded{words}");
        Err((ErrorKind::Component, why))
    }
}

/// The longest answer.
fn most(limits: &Limits) -> usize {
    usize::try_from(limits.compiled_bytes).unwrap_or(usize::MAX).saturating_add(CODE.len() + size_of::<u64>())
}

/// The machine code of an answer, if that is what it is, and whole.
fn machine_code(answer: &[u8]) -> Option<&[u8]> {
    let (length, code) = answer.strip_prefix(CODE)?.split_first_chunk()?;
    (u64::try_from(code.len()) == Ok(u64::from_le_bytes(*length))).then_some(code)
}

/// Hands over the component, and takes the answer: what is above `most` bytes of it is not the end of it. `None` if
/// that was not over in time.
fn talk(
    component: &mut ChildStdin,
    answer: &mut PipeReader,
    bytes: &[u8],
    most: usize,
    until: Instant,
) -> io::Result<Option<Vec<u8>>> {
    fcntl_setfl(&*component, fcntl_getfl(&*component)? | OFlags::NONBLOCK)?;
    fcntl_setfl(&*answer, fcntl_getfl(&*answer)? | OFlags::NONBLOCK)?;
    let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX).to_le_bytes();
    let mut left: [&[u8]; 2] = [&length, bytes];
    let mut taken = Vec::new();
    let mut part = vec![0; 64 << 10];
    while taken.len() <= most {
        let sending = left.iter().find(|part| !part.is_empty());
        let mut polled = vec![PollFd::from_borrowed_fd(answer.as_fd(), PollFlags::IN)];
        polled.extend(sending.map(|_| PollFd::from_borrowed_fd(component.as_fd(), PollFlags::OUT)));
        let Some(time) = until.checked_duration_since(Instant::now()) else { return Ok(None) };
        let time = Timespec::try_from(time).map_err(io::Error::other)?;
        match poll(&mut polled, Some(&time)) {
            Ok(0) => return Ok(None),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        drop(polled);
        if let Some(sending) = left.iter_mut().find(|part| !part.is_empty()) {
            match component.write(sending) {
                Ok(count) => *sending = sending.get(count..).unwrap_or_default(),
                Err(error) if is_temporary(&error) => {}
                // It ended: its answer says why.
                Err(_) => left = [&[]; 2],
            }
        }
        match answer.read(&mut part) {
            Ok(0) => return Ok(Some(taken)),
            Ok(count) => taken.extend_from_slice(part.get(..count).unwrap_or_default()),
            Err(error) if is_temporary(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Some(taken))
}

fn is_temporary(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// The end of a process.
#[derive(Debug, PartialEq, Eq)]
enum End {
    With(ExitStatus),
    /// It is over, and nobody can say how: whoever embeds the sandbox ignores `SIGCHLD`, or waits for all processes.
    Unknown,
    None,
}

/// How a process ends, if it does in time.
fn ended(child: &mut Child, until: Instant) -> End {
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return End::With(status),
            Ok(None) if Instant::now() < until => std::thread::sleep(Duration::from_millis(1)),
            Ok(None) => return End::None,
            Err(_) => return End::Unknown,
        }
    }
}

/// What a process is told: [`Limits`], as far as they concern it.
#[derive(Debug, PartialEq, Eq)]
struct Terms([u64; 4]);

impl Terms {
    fn of(limits: &Limits) -> Self {
        let time = u64::try_from(limits.compile_time.as_millis()).unwrap_or(u64::MAX);
        let stack = u64::try_from(limits.stack_bytes).unwrap_or(u64::MAX);
        Self([stack, limits.component_bytes, time, limits.compile_memory_bytes])
    }

    fn to_arguments(&self) -> [String; 4] {
        self.0.map(|number| number.to_string())
    }

    fn from_arguments(arguments: impl IntoIterator<Item = OsString>) -> Option<Limits> {
        let mut numbers = arguments.into_iter().map(|text| OsStr::to_str(&text)?.parse::<u64>().ok());
        let mut number = || numbers.next().flatten();
        let mut limits = Limits {
            stack_bytes: usize::try_from(number()?).ok()?,
            component_bytes: number()?,
            compile_time: Duration::from_millis(number()?),
            ..Limits::default()
        };
        limits.compile_memory_bytes = number()?;
        Some(limits)
    }
}

/// The whole of a process that [`CompilerProcess`] started, with the arguments that follow its own: it gives up what
/// it can, reads a component from standard input, calls `walls`, which take away the rest, and only then looks at the
/// component. What is returned is the exit code. To be called first of all, while the process has one thread.
pub fn serve_compiler(arguments: impl IntoIterator<Item = OsString>, walls: impl FnOnce()) -> u8 {
    match serve(arguments, walls) {
        Ok(()) => 0,
        Err(why) => {
            let mut out = io::stdout().lock();
            let _ = out.write_all(REFUSAL).and_then(|()| out.write_all(why.as_bytes())).and_then(|()| out.flush());
            1
        }
    }
}

fn serve(arguments: impl IntoIterator<Item = OsString>, walls: impl FnOnce()) -> std::result::Result<(), String> {
    fn failed<E: Display>(what: &str) -> impl Fn(E) -> String {
        move |error| format!("the compiler cannot {what}: {error}")
    }
    let limits = Terms::from_arguments(arguments).ok_or("this is started by the program itself, and by nobody else")?;
    give_up(&limits).map_err(failed("lower its limits"))?;
    let mut input = io::stdin().lock();
    let mut length = [0; 8];
    input.read_exact(&mut length).map_err(failed("read"))?;
    let length = u64::from_le_bytes(length).min(limits.component_bytes);
    let mut component = vec![0; usize::try_from(length).map_err(failed("read"))?];
    input.read_exact(&mut component).map_err(failed("read"))?;
    // From here on a stranger has a say. These two are first: behind the walls they cannot be taken back.
    end_with_input().map_err(failed("watch its input"))?;
    end_after(limits.compile_time + GRACE);
    walls();
    let code = compile_here(&component, &limits).map_err(|error| error.to_string())?;
    let length = u64::try_from(code.len()).map_err(failed("answer"))?.to_le_bytes();
    let mut out = io::stdout().lock();
    let mut answer = [CODE, &length, code.as_slice()].into_iter();
    answer.try_for_each(|part| out.write_all(part)).and_then(|()| out.flush()).map_err(failed("answer"))
}

/// Gives up what a compiler does not need.
fn give_up(limits: &Limits) -> io::Result<()> {
    close_others()?;
    let set = |resource, value: u64, hard: u64| {
        // One that is lower already stays: none may be raised, and none is to be.
        let hard = getrlimit(resource).maximum.map_or(hard, |now| now.min(hard));
        setrlimit(resource, Rlimit { current: Some(value.min(hard)), maximum: Some(hard) })
    };
    // Whole seconds; the timer is finer.
    let seconds = (limits.compile_time + GRACE).as_secs().saturating_add(1);
    set(Resource::Cpu, seconds, seconds.saturating_add(1))?;
    set(Resource::As, limits.compile_memory_bytes, limits.compile_memory_bytes)?;
    // No file grows, and none holds what the process had.
    set(Resource::Fsize, 0, 0)?;
    set(Resource::Core, 0, 0)?;
    Ok(())
}

/// Closes what was inherited by mistake, or meant for the program.
#[allow(unsafe_code)]
fn close_others() -> io::Result<()> {
    // SAFETY: the process has just begun, and uses none but the first three.
    if unsafe { libc::close_range(3, libc::c_uint::MAX, 0) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Has the kernel kill the process when something happens to its standard input, which was read: the other end is
/// closed, or whoever has that ended.
#[allow(unsafe_code)]
fn end_with_input() -> io::Result<()> {
    /// linux/fcntl.h: which signal instead of `SIGIO`.
    const F_SETSIG: libc::c_int = 10;
    let settings =
        [(libc::F_SETOWN, rustix::process::getpid().as_raw_nonzero().get()), (F_SETSIG, Signal::KILL.as_raw())];
    for (operation, value) in settings.into_iter().chain([(libc::F_SETFL, libc::O_ASYNC)]) {
        // SAFETY: these operations take a number, and change how the kernel signals readiness of a pipe.
        if unsafe { libc::fcntl(0, operation, value) } == -1 {
            return Err(io::Error::last_os_error());
        }
    }
    // It may have happened before.
    let input = io::stdin();
    let mut polled = [PollFd::new(&input, PollFlags::empty())];
    poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
    let [polled] = polled;
    if polled.revents().contains(PollFlags::HUP) {
        return Err(io::ErrorKind::BrokenPipe.into());
    }
    Ok(())
}

/// Has the process end by a signal.
#[allow(unsafe_code)]
fn end_after(time: Duration) {
    let seconds = libc::c_uint::try_from(time.as_secs().saturating_add(1)).unwrap_or(libc::c_uint::MAX);
    // SAFETY: it takes a number. Nobody else in this process has a timer.
    unsafe { libc::alarm(seconds) };
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use rustix::process::WaitOptions;

    #[test]
    fn terms_arrive_as_they_were_set() {
        let limits = Limits {
            stack_bytes: 1,
            component_bytes: 2,
            compile_time: Duration::from_millis(3),
            compile_memory_bytes: 4,
            ..Limits::default()
        };
        let arguments = || Terms::of(&limits).to_arguments().map(OsString::from);
        assert_eq!(Terms::from_arguments(arguments()).unwrap(), limits);
        assert!(Terms::from_arguments(arguments().into_iter().take(3)).is_none());
        assert!(Terms::from_arguments(["1", "2", "3", "x"].map(OsString::from)).is_none());
    }

    /// A process, from its pipes' point of view.
    fn process(script: &str) -> Process {
        let (answer, writer) = io::pipe().unwrap();
        let errors = writer.try_clone().unwrap();
        let mut command = Command::new("sh");
        command.arg("-c").arg(script).stdin(Stdio::piped()).stdout(writer).stderr(errors);
        let mut child = command.spawn().unwrap();
        let component = child.stdin.take().unwrap();
        Process { child, component, answer }
    }

    fn compile(script: &str, component: &[u8], limits: &Limits) -> std::result::Result<Vec<u8>, (ErrorKind, String)> {
        process(script).compile(component, limits)
    }

    #[test]
    fn the_answer_is_code_or_a_reason() {
        let limits = Limits::default();
        // More than a pipe holds, both ways.
        let component = vec![b'x'; 3 << 20];
        let script = "head -c 8 >/dev/null; printf 'BHMADE1\\n\\0\\0\\060\\0\\0\\0\\0\\0'; head -c 3145728";
        assert_eq!(compile(script, &component, &limits).unwrap(), component);
        let refused = |script: &str| compile(script, &component, &limits).unwrap_err();
        let no = "head -c 1000000 >/dev/null; printf 'BHDENY1\\nno\\n'; exit 1";
        assert_eq!(refused(no), (ErrorKind::Component, "no".to_owned()));
        let (kind, why) = refused("printf 'BHMADE1\\n\\5\\0\\0\\0\\0\\0\\0\\0code'");
        assert!(kind == ErrorKind::Component && why.contains("broke down"), "less than it says: {why}");
        let (kind, why) = refused("echo 'memory allocation of 5 bytes failed' >&2; kill -ABRT $$");
        assert!(kind == ErrorKind::Limit && why.contains("2147483648 bytes of memory"), "{why}");
        let (kind, why) = refused("kill -KILL $$");
        assert!(kind == ErrorKind::Component && why.contains("signal: 9"), "{why}");
        let (_, why) = refused("head -c 100000 /dev/zero; exit 1");
        assert!(why.len() <= 2 * MAX_TEXT, "{}", why.len());
        for signal in ["ALRM", "XCPU"] {
            let (kind, why) = refused(&format!("kill -{signal} $$"));
            assert!(kind == ErrorKind::Limit && why.contains("longer than 30s"), "{why}");
        }
    }

    /// As where `SIGCHLD` is ignored, or somebody waits for all processes of a program.
    #[test]
    fn an_answer_is_one_if_nobody_can_say_how_the_process_ended() {
        let compile = |script: &str| {
            let process = process(script);
            rustix::process::waitpid(Some(rustix::process::Pid::from_child(&process.child)), WaitOptions::empty())
                .unwrap();
            process.compile(b"", &Limits::default())
        };
        assert_eq!(compile("printf 'BHMADE1\\n\\4\\0\\0\\0\\0\\0\\0\\0code'").unwrap(), b"code");
        assert_eq!(compile("printf 'BHDENY1\\nno'; exit 1").unwrap_err(), (ErrorKind::Component, "no".to_owned()));
        for script in ["printf 'BHMADE1\\n\\5\\0\\0\\0\\0\\0\\0\\0code'", "kill -KILL $$"] {
            let (kind, why) = compile(script).unwrap_err();
            assert!(kind == ErrorKind::Component && why.contains("how is not known"), "{why}");
        }
    }

    #[test]
    fn who_says_too_much_or_nothing_is_not_waited_for() {
        let mut limits = Limits { compiled_bytes: 1000, ..Limits::default() };
        let (kind, why) = compile("printf 'BHMADE1\\n'; cat /dev/zero", b"x", &limits).unwrap_err();
        assert!(kind == ErrorKind::Limit && why.contains("more than 1000 bytes of machine code"), "{why}");
        limits.compile_time = Duration::from_millis(50);
        // Neither reads nor writes; has said something; has closed all.
        for script in ["exec sleep 60", "printf 'BHMADE1\\n'; exec sleep 60", "exec <&- >&- 2>&-; exec sleep 60"] {
            let (kind, why) = compile(script, &vec![0; 1 << 20], &limits).unwrap_err();
            assert!(kind == ErrorKind::Limit && why.contains("longer than 50ms"), "{why}");
        }
    }
}
