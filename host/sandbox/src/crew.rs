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

use crate::layer::Incarnation;

/// The instances of one layer beside the first one. They stay until the layer ends.
#[derive(Default)]
pub(crate) struct Crew(Mutex<State>);

#[derive(Default)]
struct State {
    idle: Vec<Arc<Incarnation>>,
    /// Idle ones, and those that are at work.
    members: u32,
    /// How often all were dismissed: who was at work then does not come back.
    dismissals: u64,
    /// One could not be started, and no other one will be.
    complete: bool,
}

impl Crew {
    /// A member that has nothing to do, or `start`ed for this if there are fewer than `most`. None if the
    /// caller has to wait for the first instance.
    pub(crate) fn hire(&self, most: u32, start: impl FnOnce() -> Result<Incarnation>) -> Option<Member<'_>> {
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
        let incarnation = match idle.map_or_else(|| start().map(Arc::new), Ok) {
            Ok(incarnation) => incarnation,
            Err(error) => {
                tracing::warn!("no further instance of a component, to unpack beside the first: {error}");
                let mut state = self.lock();
                state.complete = true;
                // Those that were dismissed meanwhile are not counted any more.
                if state.dismissals == dismissals {
                    state.members = state.members.saturating_sub(1);
                }
                return None;
            }
        };
        Some(Member { crew: self, dismissals, incarnation })
    }

    /// Ends all members, those at work after what they do.
    pub(crate) fn dismiss(&self) {
        let mut state = self.lock();
        state.idle.clear();
        state.members = 0;
        state.dismissals = state.dismissals.saturating_add(1);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A member at work. It is idle again when this is dropped.
pub(crate) struct Member<'a> {
    crew: &'a Crew,
    dismissals: u64,
    incarnation: Arc<Incarnation>,
}

impl Deref for Member<'_> {
    type Target = Incarnation;

    fn deref(&self) -> &Incarnation {
        &self.incarnation
    }
}

impl Drop for Member<'_> {
    fn drop(&mut self) {
        let mut state = self.crew.lock();
        if state.dismissals == self.dismissals {
            state.idle.push(Arc::clone(&self.incarnation));
        }
    }
}
