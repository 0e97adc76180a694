//! Rate limits: a limited disk finishes what it was asked, and its neighbour does not notice.

use std::sync::mpsc;
use std::time::Duration;

use blockhouse_tests::serve::Serve;
use blockhouse_tests::{blockhouse, noise, scratch};

use crate::metrics::{ask, values};
use blockhouse_tests::client::{Client, Request};

#[test]
fn a_limited_disk_finishes_and_its_neighbour_does_not_wait() {
    let directory = scratch();
    let metrics = directory.path().join("metrics");
    let mut command = blockhouse();
    command.args(["-v", "serve", "--metrics"]).arg(&metrics);
    let sockets = ["limited", "neighbour"].map(|name| directory.path().join(name));
    for (socket, limit) in sockets.iter().zip([",iops=1,queues=2", ""]) {
        let image = socket.with_extension("raw");
        std::fs::write(&image, noise(1, 1 << 20)).unwrap();
        let fields = format!("file={},format=raw,socket={}{limit}", image.display(), socket.display());
        command.arg("--disk").arg(fields);
    }
    let serve = Serve::start(&mut command, &directory.path().join("log"));
    let [limited, neighbour] = &sockets;

    // One goes at once. The other three take a second each, whichever queue they are in.
    let (sender, finished) = mpsc::channel();
    let mut slow = Client::connect(limited, 2);
    let worker = std::thread::spawn(move || {
        let reads = [0, 4096].map(|offset| Request::Read { offset, len: 4096 });
        let results: Vec<_> = (0..2).flat_map(|queue| slow.run(queue, &reads)).collect();
        sender.send(()).unwrap();
        results
    });
    let mut fast = Client::connect(neighbour, 1);
    for _ in 0..20 {
        fast.run(0, &[Request::Read { offset: 0, len: 4096 }; 16]).into_iter().for_each(|result| drop(result.unwrap()));
    }
    assert!(finished.try_recv().is_err(), "320 requests of the neighbour waited for 4 of a limited disk");
    let results = worker.join().unwrap();
    assert_eq!(finished.recv_timeout(Duration::ZERO), Ok(()));
    let content = noise(1, 8192);
    assert_eq!(results, [0, 4096, 0, 4096].map(|at| Ok(content[at..at + 4096].to_vec())));

    let values = values(&ask(&metrics, b"\n"));
    let of = |metric: &str, disk: usize| values[&format!("blockhouse_{metric}{{disk=\"disk{disk}\"}}")];
    assert!((1.0..100.0).contains(&of("limit_waits_total", 0)), "it waits, and does not spin");
    assert_eq!(of("limit_waits_total", 1), 0.0);
    serve.terminate();
}
