//! Back ends that are killed, and others that take over.

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use blockhouse_tests::serve::Serve;
use blockhouse_tests::{COMMAND_LIMIT, noise, qemu_img, run, scratch};

use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserInflight};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use crate::frontend::{BUFFER, FLUSH, Guest, READ, SLOTS, WRITE};

/// The slots that are marked as in flight.
fn marked(guest: &Guest) -> Vec<u16> {
    let mut marked = Vec::new();
    for slot in 0..SLOTS {
        let mut byte = [0];
        guest.inflight().read_exact_at(&mut byte, 16 + 16 * 3 * u64::from(slot)).unwrap();
        if byte[0] != 0 {
            marked.push(slot);
        }
    }
    marked
}

/// The mark of a request goes a moment after its answer is there.
#[track_caller]
fn nothing_stays_marked(guest: &Guest) {
    let started = Instant::now();
    while !marked(guest).is_empty() {
        assert!(started.elapsed() < COMMAND_LIMIT, "{:?} stay marked", marked(guest));
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// What a slot writes the `version`th time.
fn content(slot: u16, version: u64) -> Vec<u8> {
    noise(version * 1000 + u64::from(slot), BUFFER)
}

/// Writes all the time while `serve` is killed again and again: every request is answered, once, and the
/// last bytes that were written are those that are read.
fn survives_kills(directory: &Path, disk: &str) {
    const ROUNDS: u64 = 60;
    let socket = directory.join("socket");
    // Each write waits for the storage, so that a kill comes while one does.
    let disk = format!("{disk},cache=writethrough");
    let mut guest = Guest::new();
    let mut versions = [0_u64; SLOTS as usize];
    let (mut rounds, mut rounds_in_flight) = (0, 0);
    for round in 0..ROUNDS {
        let serve = Serve::disk(&socket, &disk);
        let _frontend = guest.connect(&socket);
        if round > 0 {
            let taken_up = guest.wait(usize::from(SLOTS));
            assert!(taken_up.iter().all(|(_, status)| *status == 0), "{taken_up:?}");
            let mut slots: Vec<u16> = taken_up.iter().map(|(slot, _)| *slot).collect();
            slots.sort_unstable();
            assert_eq!(slots, (0..SLOTS).collect::<Vec<_>>(), "each is answered once");
        }
        for slot in 0..SLOTS {
            versions[usize::from(slot)] += 1;
            guest.prepare(slot, WRITE, u64::from(slot) * 128, &content(slot, versions[usize::from(slot)]));
        }
        // In another order each time, so that ring and descriptors tell different stories.
        for index in 0..SLOTS {
            guest.offer((index * 5 + 3) % SLOTS);
        }
        guest.kick.write(1).unwrap();
        // Somewhere in the middle.
        let started = Instant::now();
        while u64::from(guest.waiting()) < 1 + round % u64::from(SLOTS - 2) {
            assert!(started.elapsed() < COMMAND_LIMIT, "{} requests were answered", guest.waiting());
            std::hint::spin_loop();
        }
        serve.kill();
        for (slot, status) in guest.answered() {
            assert_eq!(status, 0);
            versions[usize::from(slot)] += 1;
            guest.submit(slot, WRITE, u64::from(slot) * 128, &content(slot, versions[usize::from(slot)]));
        }
        rounds_in_flight += u64::from(!marked(&guest).is_empty());
        rounds = round + 1;
        if rounds >= 8 && rounds_in_flight >= 3 {
            break;
        }
    }
    let serve = Serve::disk(&socket, &disk);
    let _frontend = guest.connect(&socket);
    guest.wait(usize::from(SLOTS));
    nothing_stays_marked(&guest);
    for slot in 0..SLOTS {
        guest.submit(slot, READ, u64::from(slot) * 128, &vec![0; BUFFER]);
    }
    guest.wait(usize::from(SLOTS));
    for slot in 0..SLOTS {
        assert_eq!(guest.data(slot, BUFFER), content(slot, versions[usize::from(slot)]), "slot {slot}");
    }
    eprintln!("{rounds_in_flight} of {rounds} kills came while a request was executed");
    assert!(rounds_in_flight > 0, "no kill came while a request was executed");
    assert!(serve.log().contains("executed again"), "{}", serve.log());
    serve.terminate();
}

#[test]
fn requests_on_a_raw_disk_survive_kills() {
    let directory = scratch();
    let image = directory.path().join("disk.raw");
    std::fs::File::create(&image).unwrap().set_len(4 << 20).unwrap();
    survives_kills(directory.path(), &format!("file={},format=raw", image.display()));
}

#[test]
fn requests_on_a_qcow2_chain_survive_kills() {
    let directory = scratch();
    let image = chain(directory.path());
    let fields = format!("file={},format=qcow2,allow={}", image.display(), directory.path().display());
    survives_kills(directory.path(), &fields);
    let mut check = std::process::Command::new("qemu-img");
    let outcome = run(check.args(["check", "-f", "qcow2"]).arg(&image));
    assert!(matches!(outcome.status.code(), Some(0 | 3)), "{}{}", outcome.text(), outcome.stderr);
}

/// An empty qcow2 overlay, over a qcow2 base with content everywhere.
fn chain(directory: &Path) -> std::path::PathBuf {
    let raw = directory.join("base.raw");
    std::fs::write(&raw, noise(9, 4 << 20)).unwrap();
    let (base, overlay) = (directory.join("base.qcow2"), directory.join("overlay.qcow2"));
    qemu_img(
        ["convert", "-f", "raw", "-O", "qcow2"]
            .map(AsRef::as_ref)
            .into_iter()
            .chain([raw.as_os_str(), base.as_os_str()]),
    );
    let create = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2"].map(AsRef::as_ref);
    qemu_img(create.into_iter().chain([overlay.as_os_str()]));
    overlay
}

/// `writeback` in config space: whether writes may stay volatile until the guest flushes.
const WRITEBACK: u32 = 32;

fn writeback(frontend: &mut Frontend) -> u8 {
    frontend.get_config(WRITEBACK, 1, VhostUserConfigFlags::WRITABLE, &[0]).unwrap().1[0]
}

fn set_writeback(frontend: &mut Frontend, value: u8) {
    frontend.set_config(WRITEBACK, VhostUserConfigFlags::WRITABLE, &[value]).unwrap();
}

/// A guest that wants its writes to be durable at once says that once, and its front end does not repeat it to
/// the process that takes over.
#[test]
fn writes_through_the_cache_survive_kills() {
    let directory = scratch();
    let image = directory.path().join("disk.raw");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let socket = directory.path().join("socket");
    let fields = format!("file={},format=raw", image.display());
    let mut guest = Guest::new();
    // What is said in each round, and what holds after the kill that follows it.
    for (round, (said, expected)) in [(None, 1), (Some(0), 0), (None, 0), (Some(1), 1), (None, 1)].iter().enumerate() {
        let serve = Serve::disk(&socket, &fields);
        let mut frontend = guest.connect(&socket);
        if let Some(value) = said {
            set_writeback(&mut frontend, *value);
        }
        assert_eq!(writeback(&mut frontend), *expected, "round {round}");
        guest.submit(0, WRITE, 0, &[1; 512]);
        assert_eq!(guest.wait(1), [(0, 0)]);
        serve.kill();
        let serve = Serve::disk(&socket, &fields);
        let mut frontend = guest.connect(&socket);
        assert_eq!(writeback(&mut frontend), *expected, "after round {round}");
        // The guest starts again in this session; its front end goes on to show it what it knows.
        frontend.reset_device().unwrap();
        drop(frontend);
        serve.kill();
    }
}

/// The guest's requests, one after the other, and how each is answered.
fn statuses(guest: &mut Guest, requests: &[(u32, u64, u8)]) -> Vec<u8> {
    let each = |(kind, sector, byte): &(u32, u64, u8)| {
        guest.submit(0, *kind, *sector, &[*byte; 512]);
        guest.wait(1)[0].1
    };
    requests.iter().map(each).collect()
}

const OK: u8 = 0;
const IO_ERROR: u8 = 1;

/// Another server, to which the front end comes with what it kept.
fn take_over(guest: &mut Guest, frontend: &mut Frontend, socket: &Path, fields: &str) -> Serve {
    let serve = Serve::disk(socket, fields);
    *frontend = guest.connect(socket);
    serve
}

/// With a format that allocates, where bytes lie is known to a component alone until a flush. If it is gone with its
/// process, no later flush promises what was lost, and nothing of before is read.
#[test]
fn what_was_answered_and_not_flushed_is_lost_with_a_process_and_the_guest_is_told() {
    let directory = scratch();
    let image = directory.path().join("disk.qcow2");
    qemu_img(["create", "-q", "-f", "qcow2"].map(AsRef::as_ref).into_iter().chain([image.as_os_str(), "4M".as_ref()]));
    let socket = directory.path().join("socket");
    let fields = format!("file={},format=qcow2", image.display());
    let mut guest = Guest::new();
    let mut serve = Serve::disk(&socket, &fields);
    let mut frontend = guest.connect(&socket);

    // Flushed, or in place in a cluster that is: both are in the file.
    assert_eq!(statuses(&mut guest, &[(WRITE, 0, 1), (FLUSH, 0, 0), (WRITE, 1, 2)]), [OK; 3]);
    serve.kill();
    serve = take_over(&mut guest, &mut frontend, &socket, &fields);
    assert_eq!(statuses(&mut guest, &[(FLUSH, 0, 0), (READ, 0, 9)]), [OK; 2]);
    assert_eq!(guest.data(0, 512), [1; 512]);
    assert_eq!(statuses(&mut guest, &[(READ, 1, 9)]), [OK]);
    assert_eq!(guest.data(0, 512), [2; 512]);

    // A new cluster. A front end that comes back to the same process has lost nothing, nor has a server that ends well.
    assert_eq!(statuses(&mut guest, &[(WRITE, 1024, 3)]), [OK]);
    drop(frontend);
    frontend = guest.connect(&socket);
    assert_eq!(statuses(&mut guest, &[(READ, 1024, 9), (WRITE, 2048, 4)]), [OK; 2]);
    serve.terminate();
    serve = take_over(&mut guest, &mut frontend, &socket, &fields);
    assert_eq!(statuses(&mut guest, &[(FLUSH, 0, 0), (READ, 2048, 9)]), [OK; 2]);
    assert_eq!(guest.data(0, 512), [4; 512]);

    // What is written through is not answered before it is flushed.
    set_writeback(&mut frontend, 0);
    assert_eq!(statuses(&mut guest, &[(WRITE, 3072, 5)]), [OK]);
    serve.kill();
    serve = take_over(&mut guest, &mut frontend, &socket, &fields);
    assert_eq!(statuses(&mut guest, &[(FLUSH, 0, 0), (READ, 3072, 9)]), [OK; 2]);
    assert_eq!(guest.data(0, 512), [5; 512]);
    set_writeback(&mut frontend, 1);

    assert_eq!(statuses(&mut guest, &[(WRITE, 4096, 6)]), [OK]);
    // Who writes through from here on has not flushed what was before.
    set_writeback(&mut frontend, 0);
    serve.kill();
    for _ in 0..2 {
        serve = take_over(&mut guest, &mut frontend, &socket, &fields);
        assert_eq!(statuses(&mut guest, &[(FLUSH, 0, 0), (READ, 0, 9), (WRITE, 0, 9), (FLUSH, 0, 0)]), [IO_ERROR; 4]);
        serve.expect("They are lost: the guest gets I/O errors until it is reset");
        serve.kill();
    }

    // The guest starts again: it reads what is there.
    serve = Serve::disk(&socket, &fields);
    frontend = guest.connect(&socket);
    frontend.reset_device().unwrap();
    drop(frontend);
    let _frontend = guest.connect(&socket);
    assert_eq!(statuses(&mut guest, &[(READ, 4096, 9), (FLUSH, 0, 0)]), [OK; 2]);
    assert_eq!(guest.data(0, 512), [0; 512], "it was lost, and the guest knows");
    serve.terminate();
}

/// In a session: before the features are set, and after a reset, and for the memory that comes next.
#[test]
fn writes_through_the_cache_stay_when_a_guest_starts_again() {
    let directory = scratch();
    let image = directory.path().join("disk.raw");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let socket = directory.path().join("socket");
    let serve = Serve::disk(&socket, &format!("file={},format=raw", image.display()));
    let mut guest = Guest::new();
    let mut frontend = guest.connect(&socket);
    let features = frontend.get_features().unwrap() & !(1 << 29);
    frontend.reset_device().unwrap();
    set_writeback(&mut frontend, 0);
    frontend.set_features(features).unwrap();
    assert_eq!(writeback(&mut frontend), 0, "said before the features");
    frontend.reset_device().unwrap();
    frontend.set_features(features).unwrap();
    assert_eq!(writeback(&mut frontend), 0, "the front end did not say anything else");
    let asked = VhostUserInflight::new(0, 0, 1, 64);
    let (told, file) = frontend.get_inflight_fd(&asked).unwrap();
    drop(frontend);
    // Another front end knows nothing of it, and has the default; the memory knows.
    let mut other = crate::frontend::negotiate(&socket);
    assert_eq!(writeback(&mut other), 1);
    other.set_inflight_fd(&told, file.as_raw_fd()).unwrap();
    assert_eq!(writeback(&mut other), 0);
    set_writeback(&mut other, 1);
    assert_eq!(writeback(&mut other), 1);
    serve.terminate();
}

/// What another back end left in flight is executed, each once; and so is what it did not take yet.
#[test]
fn requests_of_another_back_end_are_executed() {
    let directory = scratch();
    let image = directory.path().join("disk.raw");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let socket = directory.path().join("socket");
    let fields = format!("file={},format=raw", image.display());
    let mut guest = Guest::new();
    // The memory comes from a first back end, which has nothing to do.
    let serve = Serve::disk(&socket, &fields);
    drop(guest.connect(&socket));
    serve.kill();

    // Three writes, of which two were taken, and one is in the ring after them.
    for slot in 0..3_u8 {
        guest.prepare(slot.into(), WRITE, u64::from(slot), &[b'a' + slot; 512]);
    }
    for (slot, counter) in [(2_u16, 7_u64), (0, 8)] {
        guest.offer(slot);
        let entry = 16 + 16 * 3 * u64::from(slot);
        guest.inflight().write_all_at(&counter.to_ne_bytes(), entry + 8).unwrap();
        guest.inflight().write_all_at(&[1], entry).unwrap();
    }
    guest.offer(1);

    let serve = Serve::disk(&socket, &fields);
    let frontend = guest.connect(&socket);
    let mut answered = guest.wait(3);
    answered.sort_unstable();
    assert_eq!(answered, [(0, 0), (1, 0), (2, 0)]);
    nothing_stays_marked(&guest);
    assert!(guest.answered().is_empty());
    drop(frontend);
    serve.terminate();
    let expected: Vec<u8> = b"abc".iter().flat_map(|byte| [*byte; 512]).collect();
    assert_eq!(std::fs::read(&image).unwrap()[..3 * 512], expected);
}

/// Whoever goes on from where a queue ended may have no record of what was in flight.
#[test]
fn what_another_back_end_left_is_done_before_a_queue_ends() {
    const LEFT: u16 = 12;
    for disabled in [false, true] {
        let directory = scratch();
        let image = directory.path().join("disk.raw");
        std::fs::write(&image, vec![0; 1 << 20]).unwrap();
        let socket = directory.path().join("socket");
        let fields = format!("file={},format=raw", image.display());
        let mut guest = Guest::new();
        let serve = Serve::disk(&socket, &fields);
        drop(guest.connect(&socket));
        serve.kill();
        for slot in 0..LEFT {
            guest.prepare(slot, WRITE, slot.into(), &[7; 512]);
            guest.offer(slot);
            let entry = 16 + 16 * 3 * u64::from(slot);
            guest.inflight().write_all_at(&u64::from(slot + 1).to_ne_bytes(), entry + 8).unwrap();
            guest.inflight().write_all_at(&[1], entry).unwrap();
        }
        // At this rate it would take them an hour.
        let serve = Serve::disk(&socket, &format!("{fields},bps=1"));
        let mut frontend = guest.connect(&socket);
        if disabled {
            // As QEMU does.
            frontend.set_vring_enable(0, false).unwrap();
        }
        assert_eq!(frontend.get_vring_base(0).unwrap(), u32::from(LEFT));
        assert_eq!(usize::from(guest.waiting()), usize::from(LEFT));
        assert!(guest.answered().iter().all(|(_, status)| *status == 0));
        assert!(marked(&guest).is_empty());
        // A front end that leaves is another matter: the record is there for the next one.
        drop(frontend);
        serve.terminate();
        assert_eq!(std::fs::read(&image).unwrap()[..512 * usize::from(LEFT)], [7; 512 * LEFT as usize]);
    }
}

/// A front end that moves a region of memory, or makes it larger, takes it away first.
#[test]
fn a_queue_rests_while_its_memory_is_away() {
    let directory = scratch();
    let image = directory.path().join("disk.raw");
    std::fs::write(&image, noise(4, 1 << 20)).unwrap();
    let socket = directory.path().join("socket");
    let serve = Serve::disk(&socket, &format!("file={},format=raw", image.display()));
    let (mut guest, other) = (Guest::new(), Guest::new());
    let mut frontend = guest.connect(&socket);
    let apart = 1 << 40;
    let (mut elsewhere, region) = (other.region(), guest.region());
    elsewhere.guest_phys_addr += apart;
    elsewhere.userspace_addr += apart;
    frontend.add_mem_region(&elsewhere).unwrap();
    frontend.remove_mem_region(&region).unwrap();
    guest.submit(0, READ, 0, &[0; 512]);
    // Other messages are answered all the same.
    frontend.set_vring_call(0, &guest.call).unwrap();
    frontend.get_features().unwrap();
    assert_eq!(guest.waiting(), 0);
    frontend.add_mem_region(&region).unwrap();
    assert_eq!(guest.wait(1), [(0, 0)]);
    assert_eq!(guest.data(0, 512), noise(4, 1 << 20)[..512]);
    serve.terminate();
}

/// A front end that leaves, rather than a back end: nothing is in flight afterwards, and the same memory can
/// be served on.
#[test]
fn a_front_end_that_reconnects_goes_on_where_it_was() {
    let directory = scratch();
    let image = directory.path().join("disk.raw");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let socket = directory.path().join("socket");
    let serve = Serve::disk(&socket, &format!("file={},format=raw", image.display()));
    let mut guest = Guest::new();
    for round in 0..20 {
        let frontend = guest.connect(&socket);
        for slot in 0..SLOTS {
            guest.submit(slot, WRITE, u64::from(slot), &[round; 512]);
        }
        // It does not wait for the answers.
        drop(frontend);
        let _frontend = guest.connect(&socket);
        let answered = guest.wait(usize::from(SLOTS));
        assert!(answered.iter().all(|(_, status)| *status == 0));
        nothing_stays_marked(&guest);
    }
    serve.terminate();
    assert_eq!(std::fs::read(&image).unwrap()[..8192], [19; 8192]);
}
