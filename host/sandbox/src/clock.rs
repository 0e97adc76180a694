//! The thread that makes time limits work: it moves the engine's epoch while a component runs, and
//! sleeps while none does, so that an idle machine is left alone. It is started by the first instance: a program
//! that only loads components has one thread, and can still put walls around all of itself.

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use wasmtime::Engine;

use crate::limits::TICK;

#[derive(Default)]
struct State {
    /// Calls of components that are under way.
    calls: usize,
    /// Nobody will make a call any more.
    ended: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// Owns the thread. Sandboxes and instances share one clock for each engine.
pub(crate) struct Clock(Arc<Shared>);

impl Clock {
    /// Starts the thread.
    pub(crate) fn start(engine: &Engine) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let engine = engine.weak();
        let thread = Arc::clone(&shared);
        std::thread::Builder::new().name("blockhouse-clock".to_owned()).spawn(move || {
            loop {
                {
                    let state = thread.state.lock().unwrap_or_else(PoisonError::into_inner);
                    let state = thread
                        .changed
                        .wait_while(state, |state| state.calls == 0 && !state.ended)
                        .unwrap_or_else(PoisonError::into_inner);
                    if state.ended {
                        return;
                    }
                }
                std::thread::sleep(TICK);
                match engine.upgrade() {
                    Some(engine) => engine.increment_epoch(),
                    None => return,
                }
            }
        })?;
        Ok(Self(shared))
    }

    /// Time passes while the guard lives.
    pub(crate) fn running(&self) -> Running<'_> {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.calls = state.calls.saturating_add(1);
        if state.calls == 1 {
            self.0.changed.notify_one();
        }
        Running(&self.0)
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner).ended = true;
        self.0.changed.notify_one();
    }
}

/// One call under way.
pub(crate) struct Running<'a>(&'a Shared);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.calls = state.calls.saturating_sub(1);
    }
}
