//! How `serve` and `run` end when a signal asks for it.
//!
//! | signal | while images are opened | while disks are served |
//! |---|---|---|
//! | `SIGTERM`, `SIGINT`, `SIGHUP` | the sockets go, and the process ends: no guest had a disk yet | the disks are stopped; the command closes the images, and ends |
//! | a second `SIGTERM` or `SIGINT` | | the process ends at once |
//!
//! `SIGHUP` says that the terminal is gone. Whoever sends that may send it twice, or another signal with it, and is in
//! no hurry.

use std::mem;
use std::process;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::{Context, anyhow, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::attendant;
use crate::log;
use crate::output;
use crate::remedy::Options;

/// Takes the signals: from here on nobody is killed in the middle of something.
pub(crate) fn signals() -> anyhow::Result<Signals> {
    let closed_terminal = blockhouse_walls::hangs_up().then_some(SIGHUP);
    Signals::new([SIGTERM, SIGINT].into_iter().chain(closed_terminal)).context("cannot handle signals")
}

/// What a signal means at the moment. Dropping it, signals mean nothing any more: the command ends by itself.
pub(crate) struct Ending<T>(Arc<Mutex<Phase<T>>>);

enum Phase<T> {
    /// Images are opened. These are the sockets that there are, whose names go when they are dropped.
    Opening(T),
    /// Disks are served, until this is called.
    Serving(Box<dyn FnOnce() + Send>),
    /// The end has come.
    Over,
}

/// How the process ends while images are opened.
#[derive(Clone, Copy)]
pub(crate) struct Early {
    /// The command did not do what it was for.
    pub(crate) fails: bool,
    /// What became of it is printed as JSON.
    pub(crate) json: bool,
}

impl<T: Send + 'static> Ending<T> {
    pub(crate) fn new(sockets: T) -> Self {
        Self(Arc::new(Mutex::new(Phase::Opening(sockets))))
    }

    /// Starts the thread that heeds the signals, those that have come already as well.
    pub(crate) fn heed(&self, mut signals: Signals, early: Early) -> anyhow::Result<()> {
        let phase = Arc::clone(&self.0);
        let wait = move || {
            let mut ordered = false;
            for signal in signals.forever() {
                if signal != SIGHUP && mem::replace(&mut ordered, true) {
                    log::line(format_args!("blockhouse: stopped by a second signal; what was not flushed may be lost"));
                    process::exit(1);
                }
                end(&phase, early);
            }
        };
        thread::Builder::new().name("signals".into()).spawn(wait).context("cannot start a thread")?;
        Ok(())
    }

    /// The images are open: has `begin` make of the sockets what serves disks at them, and what stops that. A signal
    /// waits until it has.
    pub(crate) fn serve<R>(
        &self,
        begin: impl FnOnce(T) -> anyhow::Result<(R, Box<dyn FnOnce() + Send>)>,
    ) -> anyhow::Result<R> {
        let mut phase = lock(&self.0);
        match mem::replace(&mut *phase, Phase::Over) {
            Phase::Opening(sockets) => {
                let (serving, stop) = begin(sockets)?;
                *phase = Phase::Serving(stop);
                Ok(serving)
            }
            Phase::Serving(_) | Phase::Over => bail!("disks are served once"),
        }
    }
}

impl<T> Drop for Ending<T> {
    fn drop(&mut self) {
        *lock(&self.0) = Phase::Over;
    }
}

fn lock<T>(phase: &Mutex<Phase<T>>) -> MutexGuard<'_, Phase<T>> {
    phase.lock().unwrap_or_else(PoisonError::into_inner)
}

fn end<T>(phase: &Mutex<Phase<T>>, early: Early) {
    // Held until the process has ended, if it ends here: nobody serves anything meanwhile.
    let mut phase = lock(phase);
    match mem::replace(&mut *phase, Phase::Over) {
        Phase::Opening(sockets) => {
            drop(sockets);
            attendant::dismiss();
            log::never_wait();
            process::exit(early.say());
        }
        Phase::Serving(stop) => stop(),
        Phase::Over => {}
    }
}

impl Early {
    /// Says how it ends. Gives the exit code.
    fn say(self) -> i32 {
        let why = "ended by a signal before any disk was served";
        if self.fails {
            output::fail(&anyhow!(why), Options { json: self.json, ..Options::default() });
            return 1;
        }
        log::line(format_args!("blockhouse: {why}"));
        if self.json {
            // Standard error has it.
            let _full = output::json(&[(); 0]);
        }
        0
    }
}
