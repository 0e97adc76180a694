//! A disk gets larger while a call on its image fails: the first one that growth makes, the second, and so on.
//!
//! ```text
//!   a thread of this process:   disk.grow ──▶ calls on the image ◀── strace: the Nth one of a kind is EIO
//! ```
//!
//! Whatever fails, the disk holds what it held, and has the size that its image says; if the image says more, because
//! nobody knows whether that is durable, the disk is not used any more. What it can do depends on what failed:
//!
//! | what failed | writes | flush | grows later |
//! |---|---|---|---|
//! | a call of the component that made the image larger | yes | yes | yes |
//! | a sync of the host's, before that | yes | no: an earlier one failed | no |
//! | a sync of the component's, before that | no: it is not written any more | no | no |
//! | the sync that makes the new size durable, or a call of the component that is started again | no | no | no |

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{PoisonError, mpsc};

use blockhouse_sandbox::OpenRequest;
use blockhouse_sandbox::block::{Access, BlockBackend, Disk, Error, ErrorKind, VolatileSlice};
use blockhouse_tests::{noise, on_path, skip};

use crate::full::{damage, virtual_size};
use crate::{PROGRAM, Place, read};

const IMAGE: &str = "top.qcow2";
const BEFORE: usize = 1 << 20;
const AFTER: usize = 96 << 20;
/// Longer than the disk at first, and not as long as at last.
const BELOW: usize = 80 << 20;

/// What fails, and which one on the thread.
#[derive(Clone, Copy, Debug)]
struct Fault {
    call: &'static str,
    number: u32,
}

/// Attaches to a thread of this process and has a call on the image fail; `None` if it may not.
fn attach(place: &Place, thread: i32, fault: Fault) -> Option<Child> {
    let Fault { call, number } = fault;
    let mut command = Command::new("strace");
    command.args(["-e", &format!("trace={call}"), "-e", &format!("inject={call}:error=EIO:when={number}")]);
    command.arg("-P").arg(place.path(IMAGE).canonicalize().unwrap());
    command.arg("-o").arg(place.path("trace")).args(["-p", &thread.to_string()]);
    let _alone = PROGRAM.lock().unwrap_or_else(PoisonError::into_inner);
    let mut strace = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = String::new();
    BufReader::new(strace.stderr.as_mut().unwrap()).read_line(&mut said).unwrap();
    if said.contains("attached") {
        return Some(strace);
    }
    strace.wait().unwrap();
    skip(format!("strace may not trace here: {said}"));
    None
}

/// Makes the disk larger on a thread of its own. Returns what became of it, and the call that failed.
fn grow(place: &Place, disk: &Disk, fault: Fault) -> Option<(Result<(), Error>, Option<String>)> {
    let (told_thread, thread) = mpsc::channel();
    let (go, told_to_go) = mpsc::channel::<()>();
    let (grown, strace) = std::thread::scope(|scope| {
        let grows = scope.spawn(move || {
            // SAFETY: it touches no memory.
            told_thread.send(unsafe { libc::gettid() }).unwrap();
            told_to_go.recv().is_ok().then(|| disk.grow(AFTER as u64))
        });
        let strace = attach(place, thread.recv().unwrap(), fault);
        match strace {
            Some(_) => go.send(()).unwrap(),
            None => drop(go),
        }
        (grows.join().unwrap(), strace)
    });
    // It ends with the thread.
    strace?.wait().unwrap();
    let trace = std::fs::read_to_string(place.path("trace")).unwrap();
    let failed = trace.lines().find(|line| line.contains("(INJECTED)")).map(str::to_owned);
    Some((grown?, failed))
}

/// What a disk can do after it could not grow: writes, flushes, grows.
type Able = (bool, bool, bool);

const NOT_STARTED: &str = "it could not be started again after its size was changed";

/// Why it can do no more than that.
const REFUSALS: [(Able, ErrorKind, &str); 3] = [
    ((false, false, false), ErrorKind::Storage, "an earlier flush failed"),
    ((false, false, false), ErrorKind::Storage, "the image is not written any more"),
    ((false, false, false), ErrorKind::Component, NOT_STARTED),
];

fn case(place: &Place, options: &str, fault: Fault) -> Option<Option<Able>> {
    place.qemu_img(&format!("create -q -f qcow2 {options} {IMAGE} {BEFORE}"));
    let mut content = if options.contains("-b ") { noise(0, BELOW)[..BEFORE].to_vec() } else { vec![0; BEFORE] };
    let disk = place.open(IMAGE);
    let write = |content: &mut Vec<u8>, offset: usize, seed, length| {
        let mut bytes = noise(seed, length);
        let written = disk.write(&[VolatileSlice::from(&mut bytes[..])], offset as u64);
        if written.is_ok() {
            content[offset..offset + length].copy_from_slice(&bytes);
        }
        written
    };
    write(&mut content, 4096, 1, 100 << 10).unwrap();
    disk.flush().unwrap();
    write(&mut content, 512 << 10, 2, 64 << 10).unwrap();

    let (grown, failed) = grow(place, &disk, fault)?;
    let mut log = format!("{options}, {fault:?}\n{failed:?}\ngrow: {grown:?}\n");
    let size = disk.capacity() as usize;
    content.resize(size, 0);
    let error = match grown {
        Ok(()) => {
            assert_eq!((size, virtual_size(place, IMAGE)), (AFTER, AFTER), "{log}");
            disk.close().unwrap_or_else(|error| panic!("{error}\n{log}"));
            drop(disk);
            place.check(IMAGE, &content, &log);
            return Some(failed.map(|_| (true, true, true)));
        }
        Err(error) => error,
    };
    assert!(failed.is_some(), "{log}");
    let text = error.to_string();
    assert_eq!(error.kind(), ErrorKind::Storage, "{log}");
    assert!(text.contains("I/O error") || text.contains("Input/output error"), "{log}");

    // What is written is read, and what is past the end is refused.
    let written = write(&mut content, size - (64 << 10), 3, 64 << 10);
    log += &format!("write: {written:?}\n");
    if written.is_ok() {
        assert!(read(&disk, 0, BEFORE) == content[..BEFORE], "{log}");
        assert!(read(&disk, (size - BEFORE) as u64, BEFORE) == content[size - BEFORE..], "{log}");
    }
    assert!(disk.read(&[VolatileSlice::from(&mut [0; 512][..])], size as u64).is_err(), "{log}");
    let flushed = disk.flush();
    log += &format!("flush: {flushed:?}\n");
    // The size that it has would be nothing to do.
    let wanted = if size == AFTER { 2 * AFTER } else { AFTER };
    let again = disk.grow(wanted as u64);
    log += &format!("grow: {again:?}\n");
    let now = disk.capacity() as usize;
    let (image, dead) = (virtual_size(place, IMAGE), text.contains(NOT_STARTED));
    // Larger than anybody heard only if nobody uses it any more.
    assert!(image == now || dead && image > now && image <= AFTER, "the image has {image} bytes\n{log}");
    if again.is_ok() {
        assert_eq!(now, wanted, "{log}");
        content.resize(wanted, 0);
        let written = write(&mut content, wanted - (64 << 10), 4, 64 << 10);
        assert!(written.is_ok(), "{log}{written:?}");
    } else {
        assert_eq!(now, size, "{log}");
        content.resize(image, 0);
    }
    let able = (written.is_ok(), flushed.is_ok(), again.is_ok());
    let closed = disk.close();
    log += &format!("close: {closed:?}\n");
    assert_eq!(closed.is_ok(), able.1, "{log}");
    drop(disk);
    // Whoever opens it next finds it whole, with all that it held if it was closed, else with all that was flushed.
    assert_eq!(damage(place, IMAGE).0, 0, "{log}");
    let next = place.open(IMAGE);
    if closed.is_ok() {
        assert!(read(&next, 0, content.len()) == content, "{log}");
    } else {
        let end = 4096 + (100 << 10);
        assert!(read(&next, 0, end) == content[..end], "{log}");
    }
    next.grow(3 * AFTER as u64).unwrap_or_else(|error| panic!("{error}\n{log}"));
    next.close().unwrap();
    let refused = [written.err(), flushed.err(), again.err()].into_iter().flatten();
    for error in refused {
        let known = REFUSALS
            .iter()
            .any(|(what, kind, why)| *what == able && error.kind() == *kind && error.to_string().contains(why));
        assert!(known, "{log}");
    }
    Some(Some(able))
}

/// Lets whoever is started from here trace this process.
fn let_trace() {
    // SAFETY: it touches no memory.
    unsafe { libc::prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY) };
}

/// The same for a raw image: the size of the file, the sync of the host before that, and that of the component after it.
#[test]
fn growth_of_a_raw_image_with_calls_that_fail() {
    if !on_path("strace") {
        return skip("strace is not installed");
    }
    let_trace();
    let place = Place::new();
    let open = || {
        let request = OpenRequest { access: Access::ReadWrite, ..OpenRequest::new(place.path(IMAGE), "raw") };
        place.opener.open(&request).unwrap().disk
    };
    // What fails, which size the image has then, and whether the disk is used any more.
    for (call, number, size, serves) in
        [("ftruncate", 1, BEFORE, true), ("fdatasync", 1, BEFORE, true), ("fdatasync", 2, AFTER, false)]
    {
        let fault = Fault { call, number };
        std::fs::write(place.path(IMAGE), noise(0, BEFORE)).unwrap();
        let disk = open();
        // Else the host would have nothing to sync.
        disk.write(&[VolatileSlice::from(&mut noise(0, 4096)[..])], 0).unwrap();
        let Some((grown, failed)) = grow(&place, &disk, fault) else { return };
        assert!(failed.is_some(), "{fault:?}: no such call: {grown:?}");
        let error = grown.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Storage, "{fault:?}: {error}");
        assert_eq!(disk.capacity(), BEFORE as u64, "{fault:?}: a size was seen that may not be durable");
        assert_eq!(std::fs::metadata(place.path(IMAGE)).unwrap().len(), size as u64, "{fault:?}");
        let again = disk.grow(AFTER as u64);
        assert!(serves || again.as_ref().is_err_and(|error| error.to_string().contains(NOT_STARTED)), "{again:?}");
        drop(disk);
        let next = open();
        assert!(read(&next, 0, BEFORE) == noise(0, BEFORE), "{fault:?}");
        next.close().unwrap();
    }
}

#[test]
fn growth_with_calls_that_fail() {
    if !on_path("strace") || !on_path("qemu-img") {
        return skip("strace and qemu-img are not installed");
    }
    let_trace();
    let place = Place::new();
    std::fs::write(place.path("base.raw"), noise(0, BELOW)).unwrap();
    for options in ["-o cluster_size=512", "-o cluster_size=4k -b base.raw -F raw"] {
        for call in ["pwrite64", "fdatasync", "pread64"] {
            let mut tally = BTreeMap::<Able, u32>::new();
            // All of those of an image of its own. Over a longer base there are many that are alike.
            for number in (1..20).chain((20..).step_by(7)) {
                let Some(able) = case(&place, options, Fault { call, number }) else { return };
                std::fs::remove_file(place.path(IMAGE)).unwrap();
                let Some(able) = able else { break };
                *tally.entry(able).or_default() += 1;
            }
            eprintln!("{options}, {call}: {tally:?}");
            let able = |able| tally.contains_key(&able);
            assert!(able((true, true, true)), "{call}");
            assert!(!able((true, false, false)), "{call}: something was built on what is lost");
            assert_eq!(able((false, false, false)), call != "pwrite64", "{call}");
        }
    }
}
