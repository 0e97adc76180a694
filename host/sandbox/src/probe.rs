//! Guessing a format, by a component without any import. A guess is printed; nothing acts on it.

use std::sync::Arc;

use blockhouse_block::{Error, ErrorKind, Result};
use serde::Serialize;

use crate::audit::Audit;
use crate::grants::Grants;
use crate::host::{Identity, State};
use crate::instance::{diagnose, new_store, set_deadline};
use crate::locks::LockMode;
use crate::sandbox::{Plugin, PluginKind, Sandbox};
use crate::text::clean;

/// Bytes of the head of a file that a prober sees.
pub const PROBE_HEAD: usize = 64 << 10;
/// Bytes of the tail of a file that a prober sees.
pub const PROBE_TAIL: usize = 4 << 10;

/// One guess.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Guess {
    /// The name of the format.
    pub format: String,
    /// What speaks for it.
    pub evidence: String,
    /// 0 to 100.
    pub confidence: u8,
}

impl Sandbox {
    /// Asks a prober what a file might be. `head` and `tail` are at most [`PROBE_HEAD`] and
    /// [`PROBE_TAIL`] bytes.
    ///
    /// # Errors
    /// [`Component`](ErrorKind::Component) if the component is no prober, or broke down.
    pub fn probe(&self, prober: &Plugin, head: &[u8], tail: &[u8], file_size: u64) -> Result<Vec<Guess>> {
        let PluginKind::Prober(pre) = &prober.kind else {
            return Err(Error::new(ErrorKind::Component, "it is not a prober").on_image(prober.name()));
        };
        let identity = Identity {
            depth: 0,
            image: prober.name().to_owned(),
            format: String::new(),
            component: prober.digest().to_owned(),
        };
        let limits = self.shared_limits();
        let state = State::new(identity, Arc::clone(&limits), Grants::new(), LockMode::Enforce, Audit::new());
        let mut store = new_store(self, state);
        let clock = self.clock()?;
        let _time = clock.running();
        set_deadline(&mut store);
        let guesses = pre
            .instantiate(&mut store)
            .and_then(|instance| instance.blockhouse_format_prober().call_probe(&mut store, head, tail, file_size));
        let guesses = guesses.map_err(|error| {
            let (kind, why) = diagnose(&error, store.data());
            Error::new(kind, format!("the prober failed: {why}")).with_source(error).on_image(prober.name())
        })?;
        Ok(guesses
            .into_iter()
            .take(64)
            .map(|guess| Guess {
                format: clean(&guess.format, 64),
                evidence: clean(&guess.evidence, limits.text_bytes),
                confidence: guess.confidence.min(100),
            })
            .collect())
    }
}
