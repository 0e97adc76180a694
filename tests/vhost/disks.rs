//! What a guest does with a disk, in the eyes of qemu-img.

use std::ffi::{OsStr, OsString};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use blockhouse_tests::serve::Serve;
use blockhouse_tests::{blockhouse, noise, qemu_img, run, scratch, skip};

use blockhouse_tests::client::{BUFFER, Client, Request};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

const SIZE: usize = 8 << 20;

/// A disk of the same content in several forms: the image, and the fields that open it.
fn images(directory: &Path, content: &[u8]) -> Vec<(PathBuf, String)> {
    let raw = directory.join("disk.raw");
    std::fs::write(&raw, content).unwrap();
    let base = directory.join("base.qcow2");
    let convert = ["convert", "-c", "-f", "raw", "-O", "qcow2"].map(AsRef::as_ref);
    qemu_img(convert.into_iter().chain([raw.as_os_str(), base.as_os_str()]));
    let overlay = directory.join("overlay.qcow2");
    let create = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2"].map(AsRef::as_ref);
    qemu_img(create.into_iter().chain([overlay.as_os_str()]));
    vec![
        (raw.clone(), format!("file={},format=raw", raw.display())),
        (overlay.clone(), format!("file={},format=qcow2,allow={}", overlay.display(), base.display())),
    ]
}

/// What QEMU reads. It asks for locks only if nobody was killed: then something may still be in flight, which
/// the kernel ends.
fn qemu_reads(directory: &Path, image: &Path, killed: bool) -> Vec<u8> {
    let to = directory.join("converted.raw");
    let format = image.extension().unwrap();
    let share: &[&OsStr] = if killed { &["-U".as_ref()] } else { &[] };
    let convert =
        ["convert".as_ref(), "-f".as_ref(), format, "-O".as_ref(), "raw".as_ref(), image.as_os_str(), to.as_os_str()];
    qemu_img(convert[..1].iter().chain(share).chain(&convert[1..]));
    std::fs::read(to).unwrap()
}

#[test]
fn a_guest_reads_writes_and_discards() {
    let directory = scratch();
    let mut expected = noise(3, SIZE);
    expected[1 << 20..2 << 20].fill(0);
    for (image, fields) in images(directory.path(), &expected) {
        let mut expected = expected.clone();
        let socket = directory.path().join("socket");
        let serve = Serve::disk(&socket, &fields);
        let mut client = Client::connect(&socket, 1);
        assert_eq!(client.capacity(), SIZE as u64);
        assert_eq!(client.read_all(), expected, "{fields}");

        for (offset, len) in [(0, 512), (65536 - 512, 1024), (3 << 20, BUFFER), (SIZE - 4096, 4096)] {
            let data = noise(offset as u64 + 77, len);
            client.write(offset as u64, &data).unwrap();
            expected[offset..offset + len].copy_from_slice(&data);
        }
        for (offset, len, unmap) in [(1 << 19, 4096, false), (5 << 20, 1 << 20, true)] {
            let request = Request::Zero { offset: offset as u64, len: len as u64, unmap };
            assert_eq!(client.run(0, &[request]), [Ok(vec![])]);
            expected[offset..offset + len].fill(0);
        }
        let request = Request::Discard { offset: 6 << 20, len: 1 << 20 };
        assert_eq!(client.run(0, &[request, Request::Flush]), [Ok(vec![]), Ok(vec![])]);
        // What was discarded is as before or zero, and stays.
        let discarded = client.read(6 << 20, 1 << 20).unwrap();
        expected[6 << 20..7 << 20].copy_from_slice(&discarded);
        assert_eq!(client.read_all(), expected);

        // Past the end, and not whole sectors.
        assert_eq!(client.read(SIZE as u64, 512), Err(libc::EIO));
        assert_eq!(client.write(SIZE as u64 - 512, &[0; 1024]), Err(libc::EIO));
        assert_eq!(client.read(0, 100), Err(libc::EIO));
        drop(client);
        serve.terminate();
        assert!(!socket.exists(), "the socket goes with the server");
        assert!(qemu_reads(directory.path(), &image, false) == expected, "QEMU reads other bytes from {fields}");
        if image.extension().unwrap() == "qcow2" {
            run(Command::new("qemu-img").args(["check", "-q", "-f", "qcow2"]).arg(&image)).succeeded();
        }
    }
}

/// Requests of several queues are served side by side, by threads of their own.
#[test]
fn queues_are_served_side_by_side() {
    let directory = scratch();
    let content = noise(4, SIZE);
    for (image, fields) in images(directory.path(), &content) {
        let socket = directory.path().join("socket");
        let serve = Serve::disk(&socket, &format!("{fields},queues=4"));
        let mut client = Client::connect(&socket, 4);
        let mut expected = content.clone();
        for round in 0..8 {
            for queue in 0..4 {
                let at = |index: usize| (queue << 21) + (index << 16) + (round << 12);
                let data: Vec<Vec<u8>> = (0..16).map(|index| noise((at(index) + 1) as u64, 4096)).collect();
                let writes: Vec<Request<'_>> =
                    data.iter().enumerate().map(|(i, data)| Request::Write { offset: at(i) as u64, data }).collect();
                assert!(client.run(queue, &writes).into_iter().all(|result| result.is_ok()));
                for (index, data) in data.iter().enumerate() {
                    expected[at(index)..at(index) + 4096].copy_from_slice(data);
                }
                let other = (queue + 1) % 4;
                let read = Request::Read { offset: at(3) as u64, len: 4096 };
                assert_eq!(client.run(other, &[read]), [Ok(data[3].clone())]);
            }
        }
        let threads = std::fs::read_dir(format!("/proc/{}/task", serve.id())).unwrap();
        // One that had nothing to do may end meanwhile.
        let names = threads.filter_map(|thread| std::fs::read_to_string(thread.unwrap().path().join("comm")).ok());
        assert_eq!(names.filter(|name| name.starts_with("disk0-queue")).count(), 4);
        drop(client);
        serve.terminate();
        assert!(qemu_reads(directory.path(), &image, false) == expected);
    }
}

#[test]
fn a_read_only_disk_says_so_and_is_not_written() {
    let directory = scratch();
    let content = noise(5, SIZE);
    for (image, fields) in images(directory.path(), &content) {
        let before = std::fs::read(&image).unwrap();
        let socket = directory.path().join("socket");
        let serve = Serve::disk(&socket, &format!("{fields},readonly=on"));
        let mut client = Client::connect(&socket, 1);
        assert_ne!(client.features() & 1 << 5, 0, "VIRTIO_BLK_F_RO");
        assert_eq!(client.write(0, &[7; 512]), Err(libc::EIO));
        assert_eq!(client.read(0, 4096).unwrap(), content[..4096]);
        drop(client);
        serve.terminate();
        assert!(std::fs::read(&image).unwrap() == before);
    }
}

/// What a guest flushed is in the image, whatever happens to the server.
#[test]
fn what_was_flushed_survives_a_kill() {
    let directory = scratch();
    let mut expected = noise(6, SIZE);
    let (image, fields) = images(directory.path(), &expected).pop().unwrap();
    let socket = directory.path().join("socket");
    for round in 0..4 {
        let serve = Serve::disk(&socket, &fields);
        let mut client = Client::connect(&socket, 1);
        let data = noise(round + 50, 4096);
        let at = (usize::try_from(round).unwrap() << 20) + 512;
        client.write(at as u64, &data).unwrap();
        client.flush().unwrap();
        expected[at..at + 4096].copy_from_slice(&data);
        serve.kill();
        assert!(qemu_reads(directory.path(), &image, true) == expected, "round {round}");
    }
}

/// Past the page cache, behind all walls; what cannot be used like that is refused with a reason.
#[test]
fn direct_io_works_behind_the_walls() {
    let directory = scratch();
    let path = |name: &str| directory.path().join(name);
    if std::fs::File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .custom_flags(libc::O_DIRECT)
        .open(path("probe"))
        .is_err()
    {
        return skip("the file system has no direct I/O");
    }
    let create = |name: &str, options: &str| {
        let image = path(name);
        let arguments = ["create", "-q", "-f", "qcow2", "-o", options].map(OsString::from);
        qemu_img(arguments.into_iter().chain([image.clone().into_os_string(), "4M".into()]));
        image
    };
    let small = create("small.qcow2", "cluster_size=2k");
    let fields = format!("file={},format=qcow2,direct=on", small.display());
    let outcome = run(blockhouse().args(["serve", "--disk", &fields, "--socket"]).arg(path("small.sock"))).refused();
    assert_eq!(outcome.status.code(), Some(5), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("clusters of 2048 bytes, and direct I/O needs"), "{}", outcome.stderr);

    let large = create("large.qcow2", "cluster_size=64k");
    let serve = Serve::disk(&path("large.sock"), &format!("file={},format=qcow2,direct=on", large.display()));
    let mut client = Client::connect(&path("large.sock"), 1);
    // A cluster as it is, and a sector that needs the bytes around it.
    let (bytes, sector) = (noise(1, 64 << 10), noise(2, 512));
    client.write(1 << 20, &bytes).unwrap();
    client.write((1 << 20) + 512, &sector).unwrap();
    client.flush().unwrap();
    assert_eq!(client.read((1 << 20) + 512, 512).unwrap(), sector);
    assert_eq!(client.read((1 << 20) + 1024, 4096).unwrap(), bytes[1024..5120]);
    drop(client);
    serve.terminate();
}

/// What is offered fits the queue that a machine gives the disk. cloud-hypervisor asked for config space where virtio-mmio
/// has it.
#[test]
fn config_space_says_what_a_queue_has_room_for_wherever_it_is_asked_for() {
    let directory = scratch();
    let (image, socket) = (directory.path().join("disk.raw"), directory.path().join("socket"));
    std::fs::write(&image, noise(1, SIZE)).unwrap();
    for (more, seg_max) in [("", 126_u32), (",queue-size=256", 254), (",queue-size=1024", 1022)] {
        let serve = Serve::disk(&socket, &format!("file={},format=raw{more}", image.display()));
        let mut frontend = crate::frontend::negotiate(&socket);
        let mut config = |offset| {
            let flags = VhostUserConfigFlags::WRITABLE;
            frontend.get_config(offset, 60, flags, &[0; 60]).unwrap().1
        };
        let (here, there) = (config(0), config(0x100));
        assert_eq!(here[..8], (SIZE as u64 / 512).to_le_bytes());
        assert_eq!(here[12..16], seg_max.to_le_bytes(), "{more}");
        assert_eq!(there, here);
        drop(frontend);
        serve.terminate();
    }
}
