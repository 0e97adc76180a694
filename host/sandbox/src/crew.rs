//! Further instances of a layer, which unpack while the first one is busy.
//!
//! ```text
//!   locate, and unpack while it is free ──▶ the first instance
//!   unpack while that is busy ────────────▶ one of the crew: idle, or started now
//! ```
//!
//! Unpacking takes a component's time for every byte that a guest reads, and an instance does one thing at a time.
//! So layers that are only read have a crew. Its members are started as an instance is after a breakdown
//! (`restart.rs`): with the same open files, no names, and the same answers about the image. They share the
//! fate of the first one: what breaks a member down, or shows it to be a liar, is the layer's.

use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blockhouse_block::Result;

/// The instances of one layer beside the first one, each a `T`. They stay until the layer ends.
pub(crate) struct Crew<T>(Mutex<State<T>>);

struct State<T> {
    idle: Vec<Arc<T>>,
    /// All that there are: idle, at work, or being started, dismissed or not.
    members: u32,
    /// How often all were dismissed: who was at work then does not come back.
    dismissals: u64,
    /// One could not be started, and no other one will be.
    complete: bool,
}

impl<T> Default for Crew<T> {
    fn default() -> Self {
        Self(Mutex::new(State { idle: Vec::new(), members: 0, dismissals: 0, complete: false }))
    }
}

impl<T> Crew<T> {
    /// A member that has nothing to do, or `start`ed for this if there are fewer than `most`. None if the
    /// caller has to wait for the first instance.
    pub(crate) fn hire(&self, most: u32, start: impl FnOnce() -> Result<T>) -> Option<Member<'_, T>> {
        let (dismissals, idle) = {
            let mut state = self.lock();
            let idle = state.idle.pop();
            if idle.is_none() {
                if state.complete || state.members >= most {
                    return None;
                }
                state.members = state.members.saturating_add(1);
            }
            (state.dismissals, idle)
        };
        // Not under the lock: it takes a while.
        let instance = match idle.map_or_else(|| start().map(Arc::new), Ok) {
            Ok(instance) => instance,
            Err(error) => {
                tracing::warn!("no further instance of a component, to unpack beside the first: {error}");
                let mut state = self.lock();
                state.members = state.members.saturating_sub(1);
                // If all were dismissed meanwhile, the next one may find something else than this one did.
                state.complete |= state.dismissals == dismissals;
                return None;
            }
        };
        Some(Member { crew: self, dismissals, instance })
    }

    /// Ends all members, those at work after what they do.
    pub(crate) fn dismiss(&self) {
        let mut state = self.lock();
        let idle = u32::try_from(state.idle.len()).unwrap_or(u32::MAX);
        state.idle.clear();
        state.members = state.members.saturating_sub(idle);
        state.dismissals = state.dismissals.saturating_add(1);
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A member at work. It is idle again when this is dropped.
pub(crate) struct Member<'a, T> {
    crew: &'a Crew<T>,
    dismissals: u64,
    instance: Arc<T>,
}

impl<T> Deref for Member<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.instance
    }
}

impl<T> Drop for Member<'_, T> {
    fn drop(&mut self) {
        let mut state = self.crew.lock();
        if state.dismissals == self.dismissals {
            state.idle.push(Arc::clone(&self.instance));
        } else {
            state.members = state.members.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use blockhouse_block::{Error, ErrorKind};
    use tracing::field::{Field, Visit};
    use tracing::span::{Attributes, Id, Record};
    use tracing::{Event, Level, Metadata, Subscriber};

    use super::*;

    type Numbers = Crew<u32>;

    /// Who warns first decides for all threads whether anybody listens: those that warn do it one at a time.
    static WARNS: Mutex<()> = Mutex::new(());

    fn cannot<T>() -> Result<T> {
        Err(Error::new(ErrorKind::Component, "it says something else"))
    }

    /// How many there can be at work, of `most`. They have new numbers from `first` on if they are started now.
    fn at_work(crew: &Numbers, most: u32, first: u32) -> Vec<u32> {
        let numbers = first..first + 10;
        let members: Vec<_> = numbers.map_while(|number| crew.hire(most, || Ok(number))).collect();
        members.iter().map(|member| **member).collect()
    }

    #[test]
    fn who_was_started_comes_back() {
        let crew = Numbers::default();
        assert!(at_work(&crew, 0, 10).is_empty());
        assert_eq!(at_work(&crew, 3, 10), [10, 11, 12]);
        let mut again = at_work(&crew, 3, 20);
        again.sort_unstable();
        assert_eq!(again, [10, 11, 12]);
    }

    #[test]
    fn who_was_dismissed_does_not_come_back_and_counts_until_its_work_is_done() {
        let crew = Numbers::default();
        let busy = crew.hire(3, || Ok(1)).unwrap();
        drop(crew.hire(3, || Ok(2)).unwrap());
        crew.dismiss();
        assert_eq!(at_work(&crew, 3, 10), [10, 11]);
        drop(busy);
        assert_eq!(at_work(&crew, 3, 20), [11, 10, 22]);
    }

    #[test]
    fn who_was_dismissed_while_it_was_started_does_not_come_back() {
        let crew = Numbers::default();
        let late = crew.hire(3, || {
            crew.dismiss();
            Ok(3)
        });
        assert_eq!(at_work(&crew, 3, 30), [30, 31]);
        assert_eq!(late.map(|late| *late), Some(3));
        assert_eq!(at_work(&crew, 3, 40), [31, 30, 42]);
    }

    #[test]
    fn who_cannot_be_started_is_the_last_one_that_is_tried() {
        let _alone = WARNS.lock();
        let crew = Numbers::default();
        let busy = crew.hire(3, || Ok(1)).unwrap();
        assert!(crew.hire(3, cannot).is_none());
        assert!(crew.hire(3, || Ok(2)).is_none());
        drop(busy);
        assert_eq!(at_work(&crew, 3, 10), [1]);
    }

    /// Later there are as many as there may be.
    #[test]
    fn who_cannot_be_started_while_all_are_dismissed_changes_nothing() {
        let _alone = WARNS.lock();
        let crew = Numbers::default();
        let busy = crew.hire(3, || Ok(1)).unwrap();
        let failed = crew.hire(3, || {
            crew.dismiss();
            let next = crew.hire(3, || Ok(2));
            assert!(crew.hire(3, || Ok(3)).is_none(), "one works, one is started, one fails");
            drop(next);
            cannot()
        });
        assert!(failed.is_none());
        assert_eq!(at_work(&crew, 3, 10), [2, 11]);
        drop(busy);
        assert_eq!(at_work(&crew, 3, 20), [11, 2, 22]);
    }

    /// What is logged on this thread, with its level.
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<(Level, String)>>>);

    struct Message(String);

    impl Visit for Message {
        fn record_debug(&mut self, _: &Field, value: &dyn std::fmt::Debug) {
            self.0 = format!("{value:?}");
        }
    }

    impl Subscriber for Log {
        fn enabled(&self, _: &Metadata<'_>) -> bool {
            true
        }

        fn new_span(&self, _: &Attributes<'_>) -> Id {
            Id::from_u64(1)
        }

        fn record(&self, _: &Id, _: &Record<'_>) {}

        fn record_follows_from(&self, _: &Id, _: &Id) {}

        fn event(&self, event: &Event<'_>) {
            let mut message = Message(String::new());
            event.record(&mut message);
            self.0.lock().unwrap().push((*event.metadata().level(), message.0));
        }

        fn enter(&self, _: &Id) {}

        fn exit(&self, _: &Id) {}
    }

    #[test]
    fn who_cannot_be_started_is_said() {
        let _alone = WARNS.lock();
        let log = Log::default();
        tracing::subscriber::with_default(log.clone(), || drop(Numbers::default().hire(1, cannot)));
        let said = log.0.lock().unwrap();
        let why = "no further instance of a component, to unpack beside the first: it says something else";
        assert_eq!(*said, [(Level::WARN, why.to_owned())]);
    }
}
