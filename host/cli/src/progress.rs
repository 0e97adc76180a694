//! How far long work has come: a bar on a terminal, lines of JSON where they were asked for.

use std::io::{self, IsTerminal};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::output;

/// The progress of work on a known number of bytes.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: ProgressBar,
    json: bool,
    total: u64,
    done: u64,
    told_percent: u64,
}

/// A line of JSON: the first key says which.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
enum Event {
    Progress { done_bytes: u64, total_bytes: u64 },
}

impl Progress {
    /// Work on `total` bytes. With `json`, a line on standard output for each percent.
    pub(crate) fn new(total: u64, json: bool) -> Self {
        let bar = if json || !io::stderr().is_terminal() {
            ProgressBar::hidden()
        } else {
            let style = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(total).with_style(style)
        };
        Self { bar, json, total, done: 0, told_percent: 0 }
    }

    /// All up to `done` is done. If that cannot be told, the work goes on, in silence: its result is what fails then.
    pub(crate) fn at(&mut self, done: u64) {
        self.done = self.done.max(done);
        self.bar.set_position(self.done);
        let percent = u128::from(self.done) * 100 / u128::from(self.total.max(1));
        let percent = u64::try_from(percent).unwrap_or(100);
        if self.json && percent > self.told_percent {
            self.told_percent = percent;
            let event = Event::Progress { done_bytes: self.done, total_bytes: self.total };
            self.json = output::json_line(&event).is_ok();
        }
    }

    /// Takes the bar away.
    pub(crate) fn finish(self) {
        self.bar.finish_and_clear();
    }
}

/// Prints the result of the work as the last line of JSON.
pub(crate) fn done(result: &impl Serialize) -> anyhow::Result<()> {
    #[derive(Serialize)]
    struct Done<'r, R> {
        event: &'static str,
        #[serde(flatten)]
        result: &'r R,
    }
    output::json_line(&Done { event: "done", result })
}

/// Shows on a terminal that one long call is under way, until it is dropped.
#[derive(Debug)]
pub(crate) struct Spinner(ProgressBar);

impl Spinner {
    pub(crate) fn new(what: &'static str) -> Self {
        if !io::stderr().is_terminal() {
            return Self(ProgressBar::hidden());
        }
        let style = ProgressStyle::with_template("{spinner} {msg} {elapsed}")
            .unwrap_or_else(|_| ProgressStyle::default_spinner());
        let bar = ProgressBar::new_spinner().with_style(style).with_message(what);
        bar.enable_steady_tick(Duration::from_millis(100));
        Self(bar)
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
