//! When a component that broke down is started again, and when not.
//!
//! ```text
//!   running ── trap, time, limit ──▶ waiting ── 1 s, 2 s, 4 s … 60 s ──▶ started again ──▶ running
//!      │                                │                                    │ describes the image in another
//!      │ lied, broke its contract       │ five times,                        │ way, or opens another file
//!      └──────────────┐                 │ or it held what was not flushed    │
//!                     ▼                 ▼                                    ▼
//!                 dead: every request that needs it fails, with the reason
//! ```
//!
//! A new instance gets the files that the old one had, as open files and not by name, and nothing else: it
//! cannot open what the old one did not open. It must describe the image as the old one did. A component that
//! gave a wrong answer is not asked again: what it says next is no better. Nor is one that wrote: what it had
//! reserved or not flushed is gone with its memory, and only the next one who opens the image can tell what
//! became of it.

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockhouse_block::Access;

use crate::pin::Pin;

/// How a component that broke down is started again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restart {
    /// Time until the first attempt. It doubles with each one. Default 1 s.
    pub first_delay: Duration,
    /// The longest time until an attempt. Default 60 s.
    pub longest_delay: Duration,
    /// How often; 0 is never. Default 5.
    pub attempts: u32,
    /// A component that worked for so long starts over with all attempts. Default 10 minutes.
    pub forgiven_after: Duration,
}

impl Default for Restart {
    fn default() -> Self {
        Self {
            first_delay: Duration::from_secs(1),
            longest_delay: Duration::from_secs(60),
            attempts: 5,
            forgiven_after: Duration::from_secs(600),
        }
    }
}

impl Restart {
    /// What broke down stays down.
    pub fn never() -> Self {
        Self { attempts: 0, ..Self::default() }
    }
}

/// Time since some moment that stays the same. Tests have one that they move.
pub type Now = Arc<dyn Fn() -> Duration + Send + Sync>;

/// Time since the first call.
pub(crate) fn monotonic() -> Now {
    let start = Instant::now();
    Arc::new(move || start.elapsed())
}

/// Why nothing is started again where that was asked for.
pub(crate) const OFF: &str = "restarts are off";

/// What becomes of a component that is down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Due {
    /// It is started now.
    Now,
    /// It is started after so long.
    In(Duration),
    /// It is never started again, and why.
    Never(String),
    /// Nobody has said yet that it broke down.
    Undecided,
}

/// The state of one layer's restarts.
#[derive(Debug)]
pub(crate) struct Backoff {
    policy: Restart,
    attempts: u32,
    delay: Duration,
    /// When the next attempt is due, while the component is down.
    due: Option<Duration>,
    /// When the last attempt was.
    started: Duration,
    over: Option<String>,
}

impl Backoff {
    pub(crate) fn new(policy: Restart) -> Self {
        let delay = policy.first_delay;
        Self { policy, attempts: 0, delay, due: None, started: Duration::ZERO, over: None }
    }

    /// It broke down.
    pub(crate) fn died(&mut self, now: Duration) {
        if self.over.is_some() || self.due.is_some() {
            return;
        }
        if self.is_off() {
            self.over = Some(OFF.to_owned());
            return;
        }
        if self.attempts > 0 && now.saturating_sub(self.started) >= self.policy.forgiven_after {
            self.attempts = 0;
            self.delay = self.policy.first_delay;
        }
        if self.attempts >= self.policy.attempts {
            self.over = Some(format!("it broke down again after {} restarts", self.attempts));
            return;
        }
        self.due = Some(now.saturating_add(self.delay));
        self.delay = self.delay.saturating_mul(2).min(self.policy.longest_delay);
    }

    /// An attempt is made: how many there were with it.
    pub(crate) fn attempt(&mut self, now: Duration) -> u32 {
        self.due = None;
        self.started = now;
        self.attempts = self.attempts.saturating_add(1);
        self.attempts
    }

    /// No attempt is made any more. The first reason stays.
    pub(crate) fn give_up(&mut self, why: impl Into<String>) {
        self.due = None;
        self.over.get_or_insert_with(|| why.into());
    }

    /// There are no attempts at all.
    pub(crate) fn is_off(&self) -> bool {
        self.policy.attempts == 0
    }

    pub(crate) fn is_over(&self) -> bool {
        self.over.is_some()
    }

    pub(crate) fn due(&self, now: Duration) -> Due {
        match (&self.over, self.due) {
            (Some(why), _) => Due::Never(why.clone()),
            (None, Some(due)) if due > now => Due::In(due.saturating_sub(now)),
            (None, Some(_)) => Due::Now,
            (None, None) => Due::Undecided,
        }
    }
}

/// A file that an instance opened.
#[derive(Clone, Debug)]
pub(crate) struct HeldFile {
    /// The absolute path that was asked for.
    pub(crate) path: String,
    pub(crate) access: Access,
    pub(crate) grant: String,
    pub(crate) file: Arc<File>,
    pub(crate) pin: Option<Arc<Pin>>,
}

/// The files that instances of one layer had, to be given to the next one.
#[derive(Debug, Default)]
pub(crate) struct Held {
    pub(crate) files: Vec<HeldFile>,
    /// There are some that were not kept.
    pub(crate) incomplete: bool,
    /// Nothing else is opened any more.
    pub(crate) sealed: bool,
    /// No other instance follows: nothing is kept, so that a file, and with it its lock, ends with its use.
    pub(crate) last: bool,
}

impl Held {
    pub(crate) fn find(&self, path: &str, access: Access) -> Option<&HeldFile> {
        self.files.iter().find(|held| held.path == path && held.access == access)
    }

    /// Keeps a file, if there is room for it among `most`.
    pub(crate) fn keep(&mut self, file: HeldFile, most: usize) {
        if self.sealed || self.find(&file.path, file.access).is_some() {
            return;
        }
        if self.last || self.files.len() >= most {
            self.incomplete = true;
            return;
        }
        self.files.push(file);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn attempts_come_later_and_later_and_end() {
        let mut backoff = Backoff::new(Restart { attempts: 8, ..Restart::default() });
        let mut now = Duration::ZERO;
        for seconds in [1, 2, 4, 8, 16, 32, 60, 60] {
            backoff.died(now);
            // Asked often, it is not put off.
            backoff.died(now + SECOND / 2);
            assert_eq!(backoff.due(now), Due::In(SECOND * seconds));
            now += SECOND * seconds;
            assert_eq!(backoff.due(now - SECOND / 2), Due::In(SECOND / 2));
            assert_eq!(backoff.due(now), Due::Now);
            backoff.attempt(now);
        }
        backoff.died(now);
        assert_eq!(backoff.due(now), Due::Never("it broke down again after 8 restarts".to_owned()));
        assert!(backoff.is_over());
    }

    /// Somebody else may find it broken before it is decided what becomes of it.
    #[test]
    fn what_did_not_break_down_is_not_started() {
        let mut backoff = Backoff::new(Restart::default());
        assert_eq!(backoff.due(SECOND), Due::Undecided);
        backoff.died(SECOND);
        assert_eq!(backoff.due(SECOND * 2), Due::Now);
        backoff.attempt(SECOND * 2);
        assert_eq!(backoff.due(SECOND * 3), Due::Undecided);
        backoff.give_up("it lied");
        assert_eq!(backoff.due(SECOND * 3), Due::Never("it lied".to_owned()));
    }

    #[test]
    fn who_worked_for_long_is_forgiven() {
        let mut backoff = Backoff::new(Restart { attempts: 1, ..Restart::default() });
        backoff.died(SECOND);
        assert_eq!(backoff.attempt(SECOND * 2), 1);
        backoff.died(SECOND * 602);
        assert_eq!(backoff.due(SECOND * 602), Due::In(SECOND));
        assert_eq!(backoff.attempt(SECOND * 603), 1);
        backoff.died(SECOND * 1202);
        assert!(backoff.is_over());
    }

    #[test]
    fn never_is_never() {
        let mut backoff = Backoff::new(Restart::never());
        backoff.died(SECOND);
        assert_eq!(backoff.due(SECOND * 1000), Due::Never("restarts are off".to_owned()));
        let mut backoff = Backoff::new(Restart::default());
        backoff.died(SECOND);
        backoff.give_up("first");
        backoff.give_up("second");
        assert_eq!(backoff.due(SECOND * 1000), Due::Never("first".to_owned()));
    }
}
