//! `--metrics`: what the disks did, exactly, and who may ask.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;

use blockhouse_tests::serve::Serve;
use blockhouse_tests::{COMMAND_LIMIT, blockhouse, noise, qemu_img, run, scratch};

use blockhouse_tests::client::{Client, Request};

/// A server with metrics at the socket `metrics` of the directory.
fn serve(directory: &Path, disks: &[String]) -> Serve {
    let mut command = blockhouse();
    command.args(["-v", "serve", "--metrics"]).arg(directory.join("metrics"));
    for (number, fields) in disks.iter().enumerate() {
        let socket = directory.join(format!("socket{number}"));
        command.arg("--disk").arg(format!("{fields},socket={}", socket.display()));
    }
    Serve::start(&mut command, &directory.join("log"))
}

pub(crate) fn ask(socket: &Path, question: &[u8]) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(COMMAND_LIMIT)).unwrap();
    stream.write_all(question).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

/// The values, by name and labels.
pub(crate) fn values(text: &str) -> BTreeMap<String, f64> {
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    samples
        .map(|line| line.rsplit_once(' ').unwrap())
        .map(|(name, value)| (name.into(), value.parse().unwrap()))
        .collect()
}

fn calls(values: &BTreeMap<String, f64>) -> f64 {
    values
        .iter()
        .filter(|(name, _)| name.starts_with("blockhouse_component_calls_total{"))
        .map(|(_, value)| value)
        .sum()
}

/// A qcow2 image of 4 MiB with content, over nothing.
fn image(directory: &Path) -> String {
    let (raw, image) = (directory.join("disk.raw"), directory.join("disk.qcow2"));
    std::fs::write(&raw, noise(1, 4 << 20)).unwrap();
    let convert = ["convert", "-f", "raw", "-O", "qcow2"].map(AsRef::as_ref);
    qemu_img(convert.into_iter().chain([raw.as_os_str(), image.as_os_str()]));
    format!("file={},format=qcow2", image.display())
}

#[test]
fn every_request_is_counted_once() {
    let directory = scratch();
    let (metrics, raw) = (directory.path().join("metrics"), directory.path().join("neighbour.raw"));
    std::fs::write(&raw, noise(3, 4096)).unwrap();
    let disks = [image(directory.path()) + ",queues=2", format!("file={},format=raw", raw.display())];
    let serve = serve(directory.path(), &disks);
    assert_eq!(std::fs::metadata(&metrics).unwrap().permissions().mode() & 0o777, 0o600);
    let before = values(&ask(&metrics, b""));
    assert_eq!(before["blockhouse_requests_total{disk=\"disk0\",operation=\"read\"}"], 0.0);

    let mut client = Client::connect(&directory.path().join("socket0"), 2);
    let data = noise(2, 8192);
    let reads = [4096; 10].map(|len| Request::Read { offset: 0, len });
    assert!(client.run(0, &reads).iter().all(Result::is_ok));
    for queue in 0..2 {
        let writes = [0, 1, 2].map(|at| Request::Write { offset: at << 16, data: &data });
        assert!(client.run(queue, &writes).iter().all(Result::is_ok));
    }
    let zero = Request::Zero { offset: 1 << 20, len: 65536, unmap: true };
    let discard = Request::Discard { offset: 2 << 20, len: 131_072 };
    assert!(client.run(1, &[zero, discard]).iter().all(Result::is_ok));
    client.flush().unwrap();
    assert_eq!(client.read(4 << 20, 512), Err(libc::EIO));

    let text = ask(&metrics, b"GET /metrics HTTP/1.1\r\nHost: blockhouse\r\n\r\n");
    let (head, text) = text.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.0 200 OK\r\n"), "{head}");
    let values = values(text);
    let of = |metric: &str, operation: &str| {
        values[&format!("blockhouse_{metric}{{disk=\"disk0\",operation=\"{operation}\"}}")]
    };
    for (operation, requests, errors, bytes) in [
        ("read", 11.0, 1.0, 40960.0),
        ("write", 6.0, 0.0, 49152.0),
        ("flush", 1.0, 0.0, 0.0),
        ("discard", 1.0, 0.0, 131_072.0),
        ("write_zeroes", 1.0, 0.0, 65536.0),
        ("other", 0.0, 0.0, 0.0),
    ] {
        let counted = ["requests_total", "request_errors_total", "request_bytes_total"].map(|name| of(name, operation));
        assert_eq!(counted, [requests, errors, bytes], "{operation}");
        assert_eq!(of("request_duration_seconds_count", operation), requests);
    }
    assert!(of("request_duration_seconds_sum", "write") > 0.0);
    assert_eq!(values["blockhouse_requests_in_flight{disk=\"disk0\"}"], 0.0);
    assert_eq!(values["blockhouse_disk_capacity_bytes{disk=\"disk0\"}"], 4_194_304.0);
    // The neighbour did nothing.
    assert_eq!(values["blockhouse_requests_total{disk=\"disk1\",operation=\"read\"}"], 0.0);
    drop(client);
    serve.terminate();
    assert!(!metrics.exists(), "the socket goes with the server");
}

/// The claim of the product: once it is known where bytes live, no component is asked any more.
#[test]
fn what_is_known_is_not_asked_again() {
    let directory = scratch();
    let metrics = directory.path().join("metrics");
    let serve = serve(directory.path(), &[image(directory.path())]);
    let mut client = Client::connect(&directory.path().join("socket0"), 1);
    let content = client.read_all();
    let first = values(&ask(&metrics, b"\n"));
    assert!(first["blockhouse_component_calls_total{disk=\"disk0\",function=\"locate\"}"] > 0.0);
    for _ in 0..8 {
        assert!(client.read_all() == content);
        client.write(0, &content[..65536]).unwrap();
    }
    let then = values(&ask(&metrics, b"\n"));
    assert_eq!(calls(&then), calls(&first), "a component was called for what was known");
    let hits = "blockhouse_map_lookups_total{disk=\"disk0\",result=\"hit\"}";
    let misses = "blockhouse_map_lookups_total{disk=\"disk0\",result=\"miss\"}";
    assert!(then[hits] >= first[hits] + 8.0);
    assert_eq!(then[misses], first[misses]);
    assert_eq!(then["blockhouse_component_failures_total{disk=\"disk0\"}"], 0.0);
    serve.terminate();
}

/// Whoever connects may be anything: the next one is answered all the same, and the disk is served.
#[test]
fn a_hostile_client_of_the_metrics_keeps_nobody_up() {
    let directory = scratch();
    let metrics = directory.path().join("metrics");
    let serve = serve(directory.path(), &[image(directory.path())]);
    let files = serve.open_files();
    let silent = UnixStream::connect(&metrics).unwrap();
    let mut garbage = UnixStream::connect(&metrics).unwrap();
    // It may be cut off before it has sent all of this.
    let _ = garbage.write_all(&noise(1, 65536));
    let mut trickles = UnixStream::connect(&metrics).unwrap();
    trickles.write_all(b"GET").unwrap();
    // Never reads, and asks again and again.
    let deaf: Vec<UnixStream> = (0..8).map(|_| UnixStream::connect(&metrics).unwrap()).collect();
    for mut stream in &deaf {
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    }
    let mut client = Client::connect(&directory.path().join("socket0"), 1);
    client.read(0, 4096).unwrap();
    let text = ask(&metrics, b"\n");
    assert!(text.contains("operation=\"read\"} 1\n"), "{text}");
    drop((silent, garbage, trickles, deaf, client));
    ask(&metrics, b"\n");
    serve.lets_go(files);
    serve.terminate();
}

#[test]
fn a_file_has_the_last_word_and_json_the_same() {
    let directory = scratch();
    let (file, json) = (directory.path().join("disk.prom"), directory.path().join("json"));
    let socket = directory.path().join("socket");
    let mut command = blockhouse();
    command.args(["-v", "serve", "--json", "--disk", &image(directory.path()), "--socket"]).arg(&socket);
    command.arg("--metrics").arg(format!("file:{}", file.display()));
    command.stdout(Stdio::from(std::fs::File::create(&json).unwrap()));
    let serve = Serve::start_printing(&mut command, &directory.path().join("log"));
    assert!(std::fs::read_to_string(&file).unwrap().contains("operation=\"read\"} 0\n"));
    let mut client = Client::connect(&socket, 1);
    client.read(0, 4096).unwrap();
    client.read(0, 8192).unwrap();
    drop(client);
    serve.terminate();
    let last = values(&std::fs::read_to_string(&file).unwrap());
    let rows: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    let read = &rows[0]["figures"]["requests"]["read"];
    assert_eq!(last["blockhouse_requests_total{disk=\"disk0\",operation=\"read\"}"], 2.0);
    assert_eq!((read["count"].as_u64(), read["bytes"].as_u64()), (Some(2), Some(12288)), "{rows}");
    assert_eq!(rows[0]["figures"]["component_calls"]["open"], 1);
    assert!(rows[0]["image"].as_str().unwrap().ends_with("disk.qcow2"));
    // Nothing but the file is left in the place of the file.
    let names: Vec<_> = std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!names.iter().any(|name| name.to_string_lossy().contains(".new")), "{names:?}");
}

/// It would be replaced, and with it what the guest has written and writes.
#[test]
fn no_image_is_the_file_for_metrics() {
    let directory = scratch();
    let path = |name: &str| directory.path().join(name);
    let (base, top) = (path("base.raw"), path("top.qcow2"));
    std::fs::write(&base, noise(1, 1 << 20)).unwrap();
    let create = ["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw"].map(AsRef::as_ref);
    qemu_img(create.into_iter().chain([top.as_os_str()]));
    for arguments in [&["serve", "--socket", "socket"][..], &["run"]] {
        for file in [&base, &top] {
            let mut command = blockhouse();
            command.current_dir(directory.path()).args(arguments);
            command.args(["--disk", "file=top.qcow2,format=qcow2,allow=base.raw", "--metrics"]);
            let outcome = run(command.arg(format!("file:{}", file.display())));
            assert_eq!(outcome.status.code(), Some(1), "{arguments:?}: {}", outcome.stderr);
            assert!(outcome.stderr.contains("it was not touched"), "{}", outcome.stderr);
            assert!(std::fs::read(&base).unwrap() == noise(1, 1 << 20));
            assert!(std::fs::read(&top).unwrap().starts_with(b"QFI\xfb"));
        }
    }
}

/// Clusters of 2 MiB, asked for at a time: one instance takes so long for each that others begin, also where
/// threads may not do much any more.
#[test]
fn compressed_clusters_are_unpacked_by_several_instances() {
    const CLUSTER: usize = 2 << 20;
    let directory = scratch();
    let content: Vec<u8> = (0..16).flat_map(|index| noise(index, 4096).repeat(CLUSTER / 4096)).collect();
    let (raw, image) = (directory.path().join("disk.raw"), directory.path().join("disk.qcow2"));
    std::fs::write(&raw, &content).unwrap();
    let convert = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=2M"].map(AsRef::as_ref);
    qemu_img(convert.into_iter().chain([raw.as_os_str(), image.as_os_str()]));
    let serve = serve(directory.path(), &[format!("file={},format=qcow2,readonly=on", image.display())]);
    let mut client = Client::connect(&directory.path().join("socket0"), 1);
    let at = |index: usize| index * CLUSTER + 8192;
    let reads: Vec<_> = (0..16).map(|index| Request::Read { offset: at(index) as u64, len: 4096 }).collect();
    for (index, read) in client.run(0, &reads).into_iter().enumerate() {
        assert!(read.unwrap() == content[at(index)..at(index) + 4096], "wrong bytes in cluster {index}");
    }
    let values = values(&ask(&directory.path().join("metrics"), b""));
    let calls =
        |function: &str| values[&format!("blockhouse_component_calls_total{{disk=\"disk0\",function=\"{function}\"}}")];
    assert_eq!(calls("unpack"), 16.0);
    assert!((2.0..=4.0).contains(&calls("open")), "{} instances", calls("open"));
    drop(client);
    serve.terminate();
}
