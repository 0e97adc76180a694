//! A disk that is used on a lane, many requests at a time, on a layer whose writer may lie.
//!
//! What holds for `disk_write` holds here. No two requests of a batch are for the same bytes, so that the model knows
//! the outcome; for the same clusters they are, all the time.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use blockhouse_block::{BlockBackend, Engine, Lane, LaneRequest, Operation, VolatileSlice};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;

use crate::disk_write::{Bench, bench};
use crate::say;

/// Longer than any request takes, on a machine that has other work.
const PATIENCE: Duration = Duration::from_secs(20);

/// A request of a batch.
struct Asked {
    operation: Operation,
    start: usize,
    bytes: Vec<u8>,
}

pub(crate) fn run(data: &[u8]) {
    let _input_ends = drive(&mut Unstructured::new(data));
}

fn drive(u: &mut Unstructured<'_>) -> Result<()> {
    let engine = if u.arbitrary()? { Engine::Auto } else { Engine::Threads };
    let mut bench = bench(u, engine)?;
    let mut lane = Arc::clone(&bench.disk).lane().expect("descriptors");
    for _ in 0..6 {
        if u.is_empty() {
            break;
        }
        let batch = batch(u, bench.model.len())?;
        let results = together(lane.as_mut(), &batch, u.int_in_range(1..=5000)?);
        for (asked, result) in batch.iter().zip(results) {
            judge(&mut bench, asked, result);
        }
        let stats = bench.disk.map_stats();
        assert!(stats.extents <= stats.max_extents, "{stats:?}");
    }
    drop(lane);
    bench.end();
    Ok(())
}

/// Requests, no two of which are for the same bytes.
fn batch(u: &mut Unstructured<'_>, size: usize) -> Result<Vec<Asked>> {
    let mut batch: Vec<Asked> = Vec::new();
    for _ in 0..u.int_in_range(1..=16)? {
        let start = 512 * u.int_in_range(0..=size / 512 - 1)?;
        let length = (512 * u.int_in_range(1..=12)?).min(size - start);
        let (mut operation, value) = match u.int_in_range(0..=9u8)? {
            0..=4 => (Operation::Write, u.arbitrary()?),
            5 | 6 => (Operation::Read, 0xee),
            7 => (Operation::WriteZeroes { length: length as u64, may_unmap: u.arbitrary()? }, 0),
            8 => (Operation::Discard { length: length as u64 }, 0),
            _ => (Operation::Flush, 0),
        };
        if batch.iter().any(|other| start < other.start + other.bytes.len() && other.start < start + length) {
            operation = Operation::Flush;
        }
        // A flush is for no bytes.
        let bytes = vec![value; if operation == Operation::Flush { 0 } else { length }];
        batch.push(Asked { operation, start, bytes });
    }
    Ok(batch)
}

/// Starts all of them, waits for all of them, and gives their outcomes in their order.
fn together(lane: &mut dyn Lane, batch: &[Asked], pieces: usize) -> Vec<blockhouse_block::Result<Vec<u8>>> {
    let mut memory: Vec<Vec<u8>> = batch.iter().map(|asked| asked.bytes.clone()).collect();
    for (token, (asked, bytes)) in (0..).zip(batch.iter().zip(&mut memory)) {
        let moves = matches!(asked.operation, Operation::Read | Operation::Write);
        let buffers: Vec<_> =
            if moves { bytes.chunks_mut(pieces).map(VolatileSlice::from).collect() } else { Vec::new() };
        let request = LaneRequest { token, operation: asked.operation, offset: asked.start as u64, buffers: &buffers };
        // SAFETY: the memory is not touched before all have ended, or this process panics, which ends it.
        unsafe { lane.start(&request) };
    }
    lane.submit();
    let mut results = HashMap::new();
    loop {
        lane.complete(&mut |token, result| {
            assert!(results.insert(token, result).is_none(), "a request ended twice");
        });
        if lane.in_flight() == 0 {
            break;
        }
        wait(&lane.ready());
        lane.acknowledge();
    }
    assert_eq!(results.len(), batch.len(), "requests that never ended");
    let result = |(token, bytes)| results.remove(&token).expect("a token that was given").map(|()| bytes);
    (0..).zip(memory).map(result).collect()
}

fn wait(ready: &[Option<BorrowedFd<'_>>; 2]) {
    let mut fds: Vec<_> = ready.iter().flatten().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
    let patience = Timespec::try_from(PATIENCE).expect("seconds");
    let count = retry_on_intr(|| poll(&mut fds, Some(&patience)));
    assert!(count.is_ok_and(|count| count > 0), "a request never ends");
}

fn judge(bench: &mut Bench, asked: &Asked, result: blockhouse_block::Result<Vec<u8>>) {
    let Asked { operation, start, bytes: given } = asked;
    say!("{operation:?} of {} bytes at {start}: {:?}", given.len(), result.as_ref().map(|_| ()));
    let range = *start..start + given.len();
    let bytes = match result {
        Ok(bytes) => bytes,
        Err(error) => {
            assert!(bench.may_fail(), "an honest layer, and: {error}");
            // Nobody knows how much of it was done.
            if matches!(operation, Operation::Read | Operation::Flush) {
                return;
            }
            let mut now = vec![0; given.len()];
            if bench.disk.read(&[VolatileSlice::from(&mut now[..])], *start as u64).is_ok() {
                bench.model[range].copy_from_slice(&now);
            }
            return;
        }
    };
    match operation {
        Operation::Read => assert!(bench.lied() || bytes == bench.model[range.clone()], "{range:?} differs"),
        Operation::Write | Operation::WriteZeroes { .. } => bench.model[range].copy_from_slice(given),
        Operation::Discard { .. } => {
            let mut now = vec![0xee; given.len()];
            if bench.disk.read(&[VolatileSlice::from(&mut now[..])], *start as u64).is_ok() && !bench.lied() {
                for (byte, before) in now.iter().zip(&mut bench.model[range]) {
                    assert!(*byte == 0 || byte == before, "discarded, and now it reads as something else");
                    *before = *byte;
                }
            }
        }
        Operation::Flush => {}
    }
}
