//! Components that loop, grow, recurse, trap, flood and lie. Each costs its own disk an error, and
//! nobody else anything.
//!
//! Through the program where the default limits are what is shown; through the library, with small
//! limits, where waiting for the default ones would take long.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use blockhouse_sandbox::block::{Access, BlockBackend, Error, ErrorKind};
use blockhouse_sandbox::{BackingReference, Limits, NewImage, OpenRequest, OpenedDisk, Opener, Tally};
use blockhouse_tests::{component, noise};

use crate::library::{Library, read, shared};
use crate::place::Place;
use crate::wasi::{attack, image};
use crate::{snapshot, tally};

/// Limits that are reached soon.
fn small() -> &'static Library {
    static SMALL: OnceLock<Library> = OnceLock::new();
    SMALL.get_or_init(|| {
        let mut limits = Limits::default();
        limits.call_time = Duration::from_secs(1);
        limits.memory_bytes = 8 << 20;
        limits.handles = 64;
        limits.opens = 100;
        limits.shared_files = 32;
        limits.host_calls = 10_000;
        limits.transfer_bytes = 4 << 20;
        limits.log_messages = 20;
        Library::new(limits)
    })
}

fn open(library: &Library, place: &Place, line: &str) -> Result<OpenedDisk, Error> {
    library.open("hostile", &image(place, line), &[&place.path("images")])
}

/// Opens and reads the whole disk.
fn use_all(library: &Library, place: &Place, line: &str) -> Result<Vec<u8>, Error> {
    let all = || {
        let opened = open(library, place, line)?;
        let size = usize::try_from(opened.disk.capacity()).unwrap().min(1 << 20);
        read(&opened.disk, 0, size)
    };
    all().inspect_err(|error| snapshot::refusal(&place.normalize(&error.to_string())))
}

/// The right bytes of a disk that `line` is the first line of.
fn right(line: &str) -> Vec<u8> {
    let mut bytes = format!("{line}\n").into_bytes();
    bytes.resize(256 << 10, b'.');
    bytes
}

const STAGES: [&str; 4] = ["open", "connect", "locate", "unpack"];

#[test]
fn a_well_behaved_component_is_served() {
    let place = Place::new();
    for line in ["ok", "fail-at-unpack 1000"] {
        assert!(use_all(small(), &place, line).unwrap() == right(line));
    }
}

/// Whatever it does, and wherever: the error names the image, the call and the limit.
#[test]
fn every_excess_in_every_call_is_stopped() {
    let place = Place::new();
    let actions = [
        ("trap", "", "unreachable"),
        ("panic", "", "panicked on command"),
        ("loop", "", "no answer within 1s"),
        ("call-loop", "", "more than 10000 host calls"),
        ("recurse", "", "bytes of stack"),
        ("grow-memory", "", "more than 8388608 bytes of memory"),
        ("host-calls", " 1 20000", "more than 10000 host calls"),
        ("get-directories", "", "more than 64 handles"),
        ("log-flood", "", "more than 10000 host calls"),
    ];
    for (action, arguments, why) in actions {
        for stage in STAGES {
            let line = format!("{action}-at-{stage}{arguments}");
            let started = Instant::now();
            let error = use_all(small(), &place, &line).expect_err(&line);
            assert!(started.elapsed() < Duration::from_secs(5), "{line} took {:?}", started.elapsed());
            let text = place.normalize(&error.to_string());
            assert_eq!(error.kind(), ErrorKind::Component, "{line}: {text}");
            assert!(text.starts_with("$ROOT/images/vm/hostile.img: "), "{line}: {text}");
            let call = format!("the component failed in `{stage}` and was thrown away: ");
            assert!(text.contains(&call) && text.contains(why), "{line}: {text}");
            tally::component_stopped();
        }
    }
}

/// An error is an answer: the component lives on, and so does what is known.
#[test]
fn an_ordinary_error_costs_one_request() {
    let place = Place::new();
    let line = "fail-at-locate 2";
    let opened = open(small(), &place, line).unwrap();
    assert!(read(&opened.disk, 0, 512).unwrap() == right(line)[..512]);
    let error = read(&opened.disk, 128 << 10, 512).unwrap_err();
    assert!(error.to_string().ends_with("locate failed on command"), "{error}");
    assert!(read(&opened.disk, 0, 512).unwrap() == right(line)[..512]);
}

/// What is shared, opened or returned past a limit.
#[test]
fn floods_of_files_and_texts_are_bounded() {
    let place = Place::new();
    for stage in STAGES {
        // `share` refuses, and the component reports how far it came.
        let error = use_all(small(), &place, &format!("share-at-{stage}")).unwrap_err();
        // By then connect has shared the image once, if the stage comes after it.
        let worked = if ["open", "connect"].contains(&stage) { "worked 32 times" } else { "worked 31 times" };
        assert!(error.to_string().contains(worked), "{stage}: {error}");
        // What ends `connect` has the host's own word about it.
        let limit = "the host refused \"$ROOT/images/vm/hostile.img\": the limit of shared files is reached (shared-files = 32)";
        let (kind, told) = (error.kind(), place.normalize(&error.to_string()).contains(limit));
        let explained = (kind == ErrorKind::Limit, told);
        assert_eq!(explained, (stage == "connect", stage == "connect"), "{stage}: {error}");
        tally::component_stopped();

        // 64 handles, of which the image and the directories take some.
        let error = use_all(small(), &place, &format!("open-many-at-{stage}")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Component, "{stage}: {error}");
        assert!(error.to_string().contains("more than 64 handles"), "{stage}: {error}");
        tally::component_stopped();

        // An error text of 64 MiB in 8 MiB of memory, and one that fits the memory but not the crossing.
        for (length, why) in [(64 << 20, "memory"), (5 << 20, "")] {
            let error = use_all(small(), &place, &format!("huge-error-at-{stage} 1 {length}")).unwrap_err();
            assert!(error.to_string().len() < 5000, "{stage}: {} bytes", error.to_string().len());
            assert!(error.to_string().contains(why), "{stage}: {error}");
            tally::component_stopped();
        }

        // A message may be long; what is kept of it is not, and the disk is served.
        let line = format!("log-long-at-{stage} 1 2000000");
        assert!(use_all(small(), &place, &line).unwrap() == right(&line), "{stage}");
        tally::component_stopped();
    }
}

/// Opening 100,000 files, with so many handles that the limit of opens is what counts.
#[test]
fn a_flood_of_opens_ends_at_its_limit() {
    let place = Place::new();
    let mut limits = Limits::default();
    limits.opens = 100;
    let library = Library::new(limits);
    let error = use_all(&library, &place, "open-many-at-connect 1 100000").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Component, "{error}");
    assert!(error.to_string().contains("it tried to open files more than 100 times"), "{error}");
    tally::component_stopped();
}

/// Every lie about where bytes are is an error of that disk, and no byte of any file.
#[test]
fn every_lie_is_found() {
    let place = Place::new();
    let lies = [
        ("lie-past-end", "the component gave a wrong answer: an extent of"),
        ("lie-empty", "no extents"),
        ("lie-zero-length", "an extent of no bytes"),
        ("lie-only-zero-length", "an extent of no bytes"),
        ("lie-wrap", "the component gave a wrong answer: an extent of"),
        ("lie-start-after", "after the offset"),
        ("lie-start-far", "it starts at 18446744073709551615"),
        ("lie-no-such-file", "file 4294967295"),
        ("lie-no-such-file 1", "file 1 for"),
        ("lie-too-many 5000", "5000 extents where 1024 were allowed"),
        ("lie-overwrite", "overwrite at 0 in file 0, which is read-only"),
        ("lie-offset", "past the largest file offset"),
        ("lie-offset 18446744073709551615", "past the largest file offset"),
        ("lie-packed-length", "a packed unit of"),
        ("lie-unpack", "`unpack` gave 0 bytes for an extent of"),
        ("lie-unpack 65535", "`unpack` gave 65535 bytes for an extent of 65536"),
        ("lie-unpack 65537", "`unpack` gave 65537 bytes for an extent of 65536"),
    ];
    for (line, why) in lies {
        let opened = open(shared(), &place, line).unwrap_or_else(|error| panic!("{line}: {error}"));
        let error = read(&opened.disk, 0, 512).expect_err(line);
        assert_eq!(error.kind(), ErrorKind::Component, "{line}: {error}");
        let text = place.normalize(&error.to_string());
        assert!(text.starts_with("$ROOT/images/vm/hostile.img: ") && text.contains(why), "{line}: {text}");
        // It is not asked again, and says so.
        let again = read(&opened.disk, 0, 512).expect_err(line);
        assert_eq!(again.kind(), ErrorKind::Component, "{line}: {again}");
        tally::component_stopped();
    }
    // A lie that needs a second question.
    let opened = open(shared(), &place, "lie-ends-before").unwrap();
    read(&opened.disk, 0, 512).unwrap();
    let error = read(&opened.disk, 128 << 10, 512).unwrap_err();
    assert!(error.to_string().contains("before the offset"), "{error}");
    tally::component_stopped();
}

/// A million extents, a million facts, a million files: more than may cross at all.
#[test]
fn huge_answers_are_stopped_on_the_way() {
    let place = Place::new();
    for (line, kind) in [
        ("lie-too-many 200000", ErrorKind::Component),
        ("lie-facts 200000", ErrorKind::Component),
        ("lie-files 100000", ErrorKind::Limit),
        ("lie-text 3000000", ErrorKind::Component),
    ] {
        let started = Instant::now();
        let error = use_all(small(), &place, line).expect_err(line);
        assert_eq!(error.kind(), kind, "{line}: {error}");
        assert!(error.to_string().len() < 5000, "{line}");
        assert!(started.elapsed() < Duration::from_secs(5), "{line}");
        tally::component_stopped();
    }
}

/// What `open` and `connect` report about the image.
#[test]
fn lies_about_the_image_are_found() {
    let place = Place::new();
    for (line, why) in [
        ("lie-size 513", "virtual size of 513 bytes"),
        ("lie-size 1", "virtual size of 1 bytes"),
        ("lie-size 18446744073709551615", "virtual size of 18446744073709551615 bytes"),
        ("lie-size 9223372036854775808", "virtual size of 9223372036854775808 bytes"),
        ("lie-cluster-size 513", "cluster size of 513 bytes"),
        ("lie-cluster-size 4294967295", "cluster size of 4294967295 bytes"),
        ("lie-overwritable", "overwritable that was opened read-only"),
        ("lie-backing-reported", "did not return the backing file that `open` reported"),
        ("lie-backing-returned", "returned a backing file that `open` did not report"),
    ] {
        let error = open(shared(), &place, line).map(|opened| opened.report).expect_err(line);
        assert_eq!(error.kind(), ErrorKind::Component, "{line}: {error}");
        assert!(
            error.to_string().contains(&format!(
                "broke its contract and was thrown away: `{}",
                if line.contains("backing") { "connect" } else { "open" }
            )),
            "{line}: {error}"
        );
        assert!(error.to_string().contains(why), "{line}: {error}");
        tally::component_stopped();
    }
    // An image can want these as well: nobody says that its component lied.
    for (line, why) in [
        ("lie-facts 70000", "more than 65536 facts or further files"),
        ("lie-files 70000", "more than 65536 facts or further files"),
        ("lie-text 100000", "the image names another file, or its format, with 100000 bytes; 4096 are read"),
    ] {
        let error = open(shared(), &place, line).map(|opened| opened.report).expect_err(line);
        assert_eq!(error.kind(), ErrorKind::Limit, "{line}: {error}");
        assert!(error.to_string().contains(why), "{line}: {error}");
        tally::component_stopped();
    }
    // The largest disk there is, of zeroes: nothing grows with it.
    let opened = open(shared(), &place, "zero 9223372036854775296").unwrap();
    assert_eq!(opened.disk.capacity(), (1 << 63) - 512);
    assert_eq!(read(&opened.disk, (1 << 63) - 1024, 512).unwrap(), [0; 512]);
    tally::component_stopped();
}

/// What the contract rules out is refused before a component hears of it.
#[test]
fn components_are_asked_for_what_can_be_only() {
    let place = Place::new();
    let opener = Opener::new(&shared().sandbox, shared().formats.clone());
    let path = image(&place, "ok");
    let tally = Arc::new(Tally::default());
    let both =
        OpenRequest { access: Access::ReadWrite, snapshot: Some("1".to_owned()), ..OpenRequest::new(&path, "hostile") };
    let error = opener.clone().tally(Arc::clone(&tally)).open(&both).map(|opened| opened.report).unwrap_err();
    assert!(error.to_string().contains("a snapshot inside an image can only be read"), "{error}");
    assert_eq!(tally.calls().map(|(_, count)| count).sum::<u64>(), 0);

    let new = place.path("images/vm/new.qcow2");
    let backing = BackingReference { name: "base.raw".to_owned(), format: None };
    for (wrong, why) in [
        (NewImage { virtual_size: 513, ..NewImage::default() }, "a disk cannot have 513 bytes"),
        (NewImage { virtual_size: 1 << 63, ..NewImage::default() }, "a disk cannot have 9223372036854775808 bytes"),
        (NewImage { backing: Some(backing.clone()), ..NewImage::default() }, "named without its format"),
    ] {
        let error = opener.create(&new, "qcow2", &wrong).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        assert!(error.to_string().contains(why), "{error}");
        assert!(!new.exists(), "{why}");
    }
    opener.create(&new, "qcow2", &NewImage { virtual_size: 1 << 20, ..NewImage::default() }).unwrap();
    let before = std::fs::read(&new).unwrap();
    let error = opener.set_backing(&new, "qcow2", Some(&backing)).unwrap_err();
    assert!(error.to_string().contains("named without its format"), "{error}");
    assert_eq!(std::fs::read(&new).unwrap(), before);
}

/// A component that changes its mind about the same place only changes its own disk.
#[test]
fn changing_answers_are_still_answers() {
    let place = Place::new();
    let opened = open(shared(), &place, "lie-changing").unwrap();
    let content = right("lie-changing");
    for _ in 0..100 {
        for offset in (0..256 << 10).step_by(512) {
            let sector = read(&opened.disk, offset as u64, 512).unwrap();
            assert!(sector == content[offset..offset + 512] || sector == [0; 512]);
        }
        opened.disk.invalidate(0, 256 << 10);
    }
    tally::component_stopped();
}

/// Invariant 7: after a trap, what is known is served, the rest is an error, and nothing runs again.
#[test]
fn a_disk_outlives_its_component_as_far_as_it_is_known() {
    let place = Place::new();
    for line in ["trap-at-locate 3", "loop-at-locate 3", "grow-memory-at-locate 3"] {
        let opened = open(small(), &place, line).unwrap();
        let content = right(line);
        assert!(read(&opened.disk, 0, 4096).unwrap() == content[..4096]);
        assert!(read(&opened.disk, 100 << 10, 4096).unwrap() == content[100 << 10..104 << 10]);
        let first = read(&opened.disk, 200 << 10, 4096).expect_err(line);
        assert_eq!(first.kind(), ErrorKind::Component, "{first}");
        // What was answered is served for as long as the disk lives.
        for _ in 0..10 {
            assert!(read(&opened.disk, 0, 128 << 10).unwrap() == content[..128 << 10]);
        }
        // The rest fails at once, the same way: nothing is started again, nothing waits.
        let started = Instant::now();
        for _ in 0..10 {
            let again = read(&opened.disk, 200 << 10, 4096).expect_err(line);
            assert_eq!(again.kind(), ErrorKind::Component);
            assert!(again.to_string().contains("the component failed in `locate`"), "{again}");
        }
        // Asked again, the loop alone would take a second each time.
        assert!(started.elapsed() < Duration::from_secs(2), "{line}: it was asked again");
        // A request over both is an error, not half an answer.
        read(&opened.disk, 0, 256 << 10).expect_err(line);
        tally::component_stopped();
    }
    // Packed units too: what was unpacked stays.
    let line = "trap-at-unpack 2";
    let opened = open(small(), &place, line).unwrap();
    assert!(read(&opened.disk, 0, 512).unwrap() == right(line)[..512]);
    read(&opened.disk, 64 << 10, 512).expect_err(line);
    assert!(read(&opened.disk, 512, 60 << 10).unwrap() == right(line)[512..][..60 << 10]);
    tally::component_stopped();
}

/// One process, a disk whose component breaks in every way, and disks beside it that do not notice.
#[test]
fn other_disks_do_not_notice() {
    let place = Place::new();
    let content = noise(1, 256 << 10);
    place.write("images/vm/good.raw", &content);
    let raw = small().open("raw", &place.path("images/vm/good.raw"), &[]).unwrap();
    let other = place.write("images/vm/other.img", right("ok"));
    // The same component, in an instance of its own.
    let other = small().open("hostile", &other, &[]).unwrap();
    let disks = Arc::new((raw, other));
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..2u64)
            .map(|thread| {
                let (disks, done, content) = (Arc::clone(&disks), &done, &content);
                scope.spawn(move || {
                    let mut turns = 0u64;
                    while !done.load(std::sync::atomic::Ordering::Relaxed) || turns < 100 {
                        turns += 1;
                        let offset = (turns * 7 + thread) % 500 * 512;
                        let at = usize::try_from(offset).unwrap();
                        disks.1.disk.invalidate(offset, 4096);
                        assert!(read(&disks.0.disk, offset, 4096).unwrap() == content[at..at + 4096]);
                        assert!(read(&disks.1.disk, offset, 4096).unwrap() == right("ok")[at..at + 4096]);
                    }
                    turns
                })
            })
            .collect();
        for line in [
            "trap-at-locate",
            "loop-at-locate",
            "grow-memory-at-locate",
            "recurse-at-locate",
            "lie-wrap",
            "loop-at-unpack",
        ] {
            use_all(small(), &place, line).expect_err(line);
            tally::component_stopped();
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        for reader in readers {
            assert!(reader.join().unwrap() >= 100);
        }
    });
}

/// While one component loops, another disk is served at its usual speed.
#[test]
fn a_loop_does_not_delay_another_disk() {
    let place = Place::new();
    let content = noise(2, 64 << 10);
    place.write("images/vm/good.raw", &content);
    let good = small().open("raw", &place.path("images/vm/good.raw"), &[]).unwrap();
    let looping = open(small(), &place, "loop-at-locate").unwrap();
    std::thread::scope(|scope| {
        let stuck = scope.spawn(|| read(&looping.disk, 0, 512));
        let mut served = 0;
        while !stuck.is_finished() {
            good.disk.invalidate(0, 64 << 10);
            assert!(read(&good.disk, 0, 64 << 10).unwrap() == content);
            served += 1;
        }
        assert!(served > 10, "only {served} reads beside the loop");
        let error = stuck.join().unwrap().unwrap_err();
        assert!(error.to_string().contains("no answer within"), "{error}");
    });
    tally::component_stopped();
}

/// The default limits, through the program: exit code 6 and one line that says which limit.
#[test]
fn the_default_limits_stop_it_as_well() {
    let place = Place::new();
    let limits = Limits::default();
    for (line, why) in [
        ("trap-at-open", "unreachable".to_owned()),
        ("panic-at-locate", "it last said: panicked at ".to_owned()),
        ("recurse-at-connect", format!("it used more than {} bytes of stack", limits.stack_bytes)),
        ("grow-memory-at-unpack", format!("it asked for more than {} bytes of memory", limits.memory_bytes)),
        ("host-calls-at-locate", format!("it made more than {} host calls in one call", limits.host_calls)),
        ("get-directories-at-open", format!("it held more than {} handles", limits.handles)),
        // Of the two limits that concern it, the lower one.
        ("open-many-at-connect", "more than ".to_owned()),
        ("huge-error-at-locate", format!("it sent more than {} bytes to the host in one call", limits.transfer_bytes)),
        ("lie-wrap", "wrong answer".to_owned()),
        ("lie-facts", format!("the image has more than {} facts", limits.description_entries)),
    ] {
        let attempt = attack(&place, line, &[place.path("images")]);
        attempt.assert_error(6, &["$ROOT/images/vm/hostile.img: ", &why]);
        assert!(attempt.outcome.stderr.len() < 20_000, "{line}: {} bytes", attempt.outcome.stderr.len());
        tally::component_stopped();
    }
    // Floods that are no error: dropped, and the disk served.
    for line in ["log-flood-at-open 1 900000", "log-long-at-locate"] {
        let attempt = attack(&place, line, &[place.path("images")]).succeeded();
        assert!(attempt.outcome.stdout == right(line), "{line}");
        assert!(attempt.outcome.stderr.len() < 400_000, "{line}: {} bytes of log", attempt.outcome.stderr.len());
        assert!(!attempt.outcome.stderr.contains('\u{1b}'), "{line}: escapes in the log");
        tally::component_stopped();
    }
}

/// The time limit that users have: ten seconds, and then an error.
#[test]
fn an_endless_loop_ends_after_ten_seconds() {
    let place = Place::new();
    let image = image(&place, "loop-at-open");
    let plugin = format!("hostile={}", component("hostile").display());
    let mut program = crate::place::limited();
    program.args(["info", "--format", "hostile", "--plugin", &plugin]).arg(&image);
    let outcome = blockhouse_tests::run(&mut program);
    assert_eq!(outcome.status.code(), Some(6), "{}", outcome.stderr);
    assert!(
        outcome.stderr.contains("the component failed in `open` and was thrown away: no answer within 10s"),
        "{}",
        outcome.stderr
    );
    assert!(outcome.elapsed < Duration::from_secs(40), "{:?}", outcome.elapsed);
    tally::component_stopped();
}
