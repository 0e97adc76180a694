//! Waiting for a lane as the thread of a queue does. By itself: not all who use the rest of this directory have `poll`.

use std::os::fd::AsFd;

use blockhouse_block::Lane;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Waits until the lane says that there is something to do.
pub(crate) fn wait_for(lane: &mut dyn Lane) {
    let ready = lane.ready();
    let mut polled: Vec<_> =
        ready.iter().flatten().map(|ready| PollFd::from_borrowed_fd(ready.as_fd(), PollFlags::IN)).collect();
    let limit = Timespec { tv_sec: 20, tv_nsec: 0 };
    assert!(poll(&mut polled, Some(&limit)).unwrap() > 0, "no request ends");
    drop(polled);
    lane.acknowledge();
}
