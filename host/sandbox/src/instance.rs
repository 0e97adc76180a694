//! One running component: calls with limits, and what happens when it breaks.
//!
//! A call that traps, stalls, or goes over a limit ends the instance: its store is dropped, memory,
//! handles and all, and every later call answers the same error. Nothing of it is used again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::Duration;

use blockhouse_block::{Error, ErrorKind, Result};
use wasmtime::component::Instance as WasmInstance;
use wasmtime::{Store, Trap, UpdateDeadline};

use crate::bindings::packer::PackerAbility;
use crate::bindings::reader::blockhouse::format::types::Error as WitError;
use crate::bindings::reader::{ReadOnlyFormat, ReadOnlyFormatPre};
use crate::bindings::writer::WriterAbility;
use crate::clock::Clock;
use crate::host::{Budget, State};
use crate::limits::{Limits, TICK};
use crate::sandbox::Sandbox;
use crate::tally::Tally;
use crate::text::clean;

struct Running {
    store: Store<State>,
    format: ReadOnlyFormat,
    instance: WasmInstance,
}

enum Health {
    Running(Box<Running>),
    Dead { kind: ErrorKind, why: String },
}

/// One instance of a format component, serving one image.
pub(crate) struct Instance {
    health: Mutex<Health>,
    /// It was thrown away.
    dead: AtomicBool,
    /// Because an answer broke the contract.
    condemned: AtomicBool,
    /// What becomes of it was decided.
    mourned: AtomicBool,
    /// How messages name the image.
    image: String,
    clock: Arc<Clock>,
    tally: Arc<Tally>,
}

/// What a call works with.
pub(crate) struct Call<'a> {
    pub(crate) store: &'a mut Store<State>,
    pub(crate) format: &'a ReadOnlyFormat,
    pub(crate) instance: &'a WasmInstance,
}

impl Instance {
    pub(crate) fn start(
        sandbox: &Sandbox,
        plugin: &ReadOnlyFormatPre<State>,
        state: State,
        tally: Arc<Tally>,
    ) -> Result<Self> {
        let image = state.identity.image.clone();
        let mut store = new_store(sandbox, state);
        let clock = sandbox.clock()?;
        let time = clock.running();
        set_deadline(&mut store);
        let started = plugin.instance_pre().instantiate(&mut store).and_then(|instance| {
            let format = ReadOnlyFormat::new(&mut store, &instance)?;
            Ok((instance, format))
        });
        drop(time);
        match started {
            Ok((instance, format)) => {
                let running = Box::new(Running { store, format, instance });
                Ok(Self {
                    health: Mutex::new(Health::Running(running)),
                    dead: AtomicBool::new(false),
                    condemned: AtomicBool::new(false),
                    mourned: AtomicBool::new(false),
                    image,
                    clock,
                    tally,
                })
            }
            Err(error) => {
                let (kind, why) = diagnose(&error, store.data());
                Err(Error::new(kind, format!("the component could not start: {why}"))
                    .with_source(error)
                    .on_image(image))
            }
        }
    }

    /// Makes one call. `what` names it in messages: `locate`.
    pub(crate) fn call<T>(
        &self,
        what: &str,
        call: impl FnOnce(Call<'_>) -> wasmtime::Result<Result<T, WitError>>,
    ) -> Result<T> {
        self.call_within(Budget::usual, what, call)
    }

    /// Makes one call that works on a whole image: it may take long.
    pub(crate) fn maintain<T>(
        &self,
        what: &str,
        call: impl FnOnce(Call<'_>) -> wasmtime::Result<Result<T, WitError>>,
    ) -> Result<T> {
        self.call_within(Budget::maintenance, what, call)
    }

    fn call_within<T>(
        &self,
        budget: impl FnOnce(&Limits) -> Budget,
        what: &str,
        call: impl FnOnce(Call<'_>) -> wasmtime::Result<Result<T, WitError>>,
    ) -> Result<T> {
        let mut health = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        let running = match &mut *health {
            Health::Running(running) => running,
            Health::Dead { kind, why } => return Err(Error::new(*kind, why.clone()).on_image(&*self.image)),
        };
        // What it would read may be something else by now than what was granted.
        if let Some(why) = revoked(running.store.data()) {
            return Err(Error::new(ErrorKind::Storage, why).on_image(&*self.image));
        }
        self.tally.called(what);
        let time = self.clock.running();
        let budget = budget(&running.store.data().limits);
        running.store.data_mut().begin_call(budget);
        set_deadline(&mut running.store);
        let Running { store, format, instance } = &mut **running;
        let result = ask(store, |store| call(Call { store, format, instance }));
        drop(time);
        match result {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(error.on_image(&*self.image)),
            Err(error) => {
                let (kind, why) = diagnose(&error, running.store.data());
                let why = format!("the component failed in `{what}` and was thrown away: {why}");
                tracing::error!(image = %self.image, "{why}");
                self.tally.failed();
                // Dropping the store frees all that the component held.
                *health = Health::Dead { kind, why: why.clone() };
                self.dead.store(true, Ordering::Release);
                Err(Error::new(kind, why).with_source(error).on_image(&*self.image))
            }
        }
    }

    /// Whether it does something now, so that a call would have to wait.
    pub(crate) fn is_busy(&self) -> bool {
        matches!(self.health.try_lock(), Err(TryLockError::WouldBlock))
    }

    /// Whether it was thrown away.
    pub(crate) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    /// Whether it is yet to be decided what becomes of it, which is up to the caller then.
    pub(crate) fn is_new_loss(&self) -> bool {
        !self.mourned.swap(true, Ordering::AcqRel)
    }

    /// Whether it was thrown away because an answer broke the contract.
    pub(crate) fn is_condemned(&self) -> bool {
        self.condemned.load(Ordering::Acquire)
    }

    /// Why it was thrown away.
    pub(crate) fn cause(&self) -> String {
        match &*self.health.lock().unwrap_or_else(PoisonError::into_inner) {
            Health::Running(_) => "the component runs".to_owned(),
            Health::Dead { why, .. } => why.clone(),
        }
    }

    /// The writer exports of the component.
    pub(crate) fn writer(&self) -> Result<WriterAbility> {
        self.call("writer", |call| WriterAbility::new(&mut *call.store, call.instance).map(Ok))
    }

    /// The packer exports of the component.
    pub(crate) fn packer(&self) -> Result<PackerAbility> {
        self.call("packer", |call| PackerAbility::new(&mut *call.store, call.instance).map(Ok))
    }

    /// Looks at the state of a living instance.
    pub(crate) fn with_state<T>(&self, look: impl FnOnce(&mut State) -> T) -> Result<T> {
        let mut health = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *health {
            Health::Running(running) => Ok(look(running.store.data_mut())),
            Health::Dead { kind, why } => Err(Error::new(*kind, why.clone()).on_image(&*self.image)),
        }
    }

    /// Throws the instance away because it is of no use any more.
    pub(crate) fn retire(&self, why: &str) {
        let mut health = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        tracing::error!(image = %self.image, "{why}");
        *health = Health::Dead { kind: ErrorKind::Component, why: why.to_owned() };
        self.dead.store(true, Ordering::Release);
    }

    /// Throws the instance away for what another one of the same component was thrown away for.
    pub(crate) fn end_as(&self, other: &Self) {
        let (kind, why) = match &*other.health.lock().unwrap_or_else(PoisonError::into_inner) {
            Health::Running(_) => return,
            Health::Dead { kind, why } => (*kind, why.clone()),
        };
        let mut health = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        *health = Health::Dead { kind, why };
        self.condemned.store(other.is_condemned(), Ordering::Release);
        self.dead.store(true, Ordering::Release);
    }

    /// It took the place of one that broke down.
    pub(crate) fn count_restart(&self) {
        self.tally.restarted();
    }

    /// Throws the instance away because an answer broke the contract.
    pub(crate) fn condemn(&self, why: &str) -> Error {
        let mut health = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        let why = format!("the component broke its contract and was thrown away: {why}");
        tracing::error!(image = %self.image, "{why}");
        *health = Health::Dead { kind: ErrorKind::Component, why: why.clone() };
        self.condemned.store(true, Ordering::Release);
        self.dead.store(true, Ordering::Release);
        Error::new(ErrorKind::Component, why).on_image(&*self.image)
    }
}

/// Makes a call. Its answer, whatever it is, counts only if after it all files that the component had are still
/// what they were pinned as. Otherwise it may have been made from other bytes, and would be remembered.
fn ask<T>(
    store: &mut Store<State>,
    call: impl FnOnce(&mut Store<State>) -> wasmtime::Result<Result<T, WitError>>,
) -> wasmtime::Result<Result<T>> {
    let answer = call(store)?;
    if let Some(why) = revoked(store.data()) {
        return Ok(Err(Error::new(ErrorKind::Storage, why)));
    }
    let limit = store.data().limits.text_bytes;
    Ok(answer.map_err(|error| {
        let (kind, text) = match error {
            WitError::Corrupt(text) => (ErrorKind::Corrupt, text),
            WitError::Unsupported(text) => (ErrorKind::Unsupported, text),
            WitError::Denied(text) => (ErrorKind::Denied, text),
            WitError::Storage(text) => (ErrorKind::Storage, text),
            WitError::Other(text) => (ErrorKind::Invalid, text),
        };
        let text = clean(&text, limit);
        // It names the feature, which says nothing by itself.
        let text = if kind == ErrorKind::Unsupported { format!("not supported: {text}") } else { text };
        let error = Error::new(kind, text);
        // A component says it in words, and programs match on it.
        match store.data().refusal().filter(|_| kind == ErrorKind::Storage) {
            Some(refusal) => error.with_source(refusal),
            None => error,
        }
    }))
}

/// Why a file that the component has, or had, is not what it was pinned as, if there is one. The kernel is asked.
fn revoked(state: &State) -> Option<String> {
    let why = state.pins.iter().find_map(|pin| pin.check().err())?;
    Some(format!("a file cannot be used any more: {why}"))
}

pub(crate) fn new_store(sandbox: &Sandbox, state: State) -> Store<State> {
    let limits = Arc::clone(&state.limits);
    let mut store = Store::new(sandbox.engine(), state);
    store.limiter(|state| state);
    store.set_hostcall_fuel(limits.transfer_bytes);
    store.set_max_component_handles(limits.handles);
    // What the storage took of a call's time is given back when that is over.
    store.epoch_deadline_callback(|mut context| match context.data_mut().waited() {
        Some(time) => Ok(UpdateDeadline::Continue(ticks(time))),
        None => Err(Trap::Interrupt.into()),
    });
    store
}

pub(crate) fn set_deadline(store: &mut Store<State>) {
    let ticks = ticks(store.data().budget.time);
    store.set_epoch_deadline(ticks);
}

/// How often the epoch moves in that time. It may be about to: one more, so that nobody gets less than that.
fn ticks(time: Duration) -> u64 {
    u64::try_from(time.as_millis().div_ceil(TICK.as_millis().max(1))).unwrap_or(u64::MAX).saturating_add(1)
}

/// Puts into words why a call ended without an answer.
pub(crate) fn diagnose(error: &wasmtime::Error, state: &State) -> (ErrorKind, String) {
    if let Some(what) = &state.exceeded {
        return (ErrorKind::Component, what.clone());
    }
    let why = match error.downcast_ref::<Trap>() {
        Some(Trap::Interrupt) => {
            let beside = match state.storage_was_slow() {
                true => format!(", and {:?} that it could wait for the storage", state.limits.storage_time),
                false => String::new(),
            };
            format!("no answer within {:?}{beside}", state.budget.time)
        }
        Some(Trap::StackOverflow) => format!("it used more than {} bytes of stack", state.limits.stack_bytes),
        Some(trap) => format!("{trap}"),
        // The engine has no public type for this one.
        None if error.root_cause().to_string().contains("fuel allocated for hostcalls") => {
            format!("it sent more than {} bytes to the host in one call", state.limits.transfer_bytes)
        }
        None => clean(&error.root_cause().to_string(), state.limits.text_bytes),
    };
    match &state.last_words {
        Some(words) => (ErrorKind::Component, format!("{why}; it last said: {words}")),
        None => (ErrorKind::Component, why),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs::File;
    use std::io;

    use blockhouse_block::Access;
    use wasmtime::Engine;
    use wasmtime::component::Resource;

    use super::*;
    use crate::audit::Audit;
    use crate::grants::Grants;
    use crate::host::Identity;
    use crate::locks::LockMode;
    use crate::pin::tests::{file, stamped};

    /// What a component says of bytes that changed before it had said it is neither an answer nor an error of its own,
    /// also if it got the file during the call.
    #[test]
    fn an_answer_counts_only_if_its_files_are_as_they_were_pinned() {
        for (had, right) in [(true, true), (true, false), (false, true), (false, false)] {
            let content = file(b"hello");
            let identity = Identity { image: String::new(), depth: 0, format: String::new(), component: String::new() };
            let limits = Arc::new(Limits::default());
            let state = State::new(identity, limits, Grants::new(), LockMode::Enforce, Audit::new());
            let mut store = Store::new(&Engine::default(), state);
            let open = |store: &mut Store<State>| {
                let pin = Some(Arc::new(stamped(content.path(), b"hello")));
                let handed = File::open(content.path()).unwrap();
                store.data_mut().add_file(handed, "/a".to_owned(), Access::ReadOnly, pin).unwrap();
            };
            if had {
                open(&mut store);
            }
            assert_eq!(ask(&mut store, |_| Ok(Ok(7))).unwrap().unwrap(), 7);
            let answer = ask(&mut store, |store| {
                if !had {
                    open(store);
                }
                std::fs::write(content.path(), b"other").unwrap();
                Ok(if right { Ok(7) } else { Err(WitError::Corrupt("that is no image".to_owned())) })
            });
            let error = answer.unwrap().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Storage);
            assert_eq!(
                error.message(),
                "a file cannot be used any more: it is pinned by sha256, and it was written to"
            );
        }
    }

    /// What the storage says of a write of the component is inside of the error that it makes of that.
    #[test]
    fn a_full_file_system_is_told_from_other_failures() {
        let identity = Identity { image: String::new(), depth: 0, format: String::new(), component: String::new() };
        let limits = Arc::new(Limits::default());
        let state = State::new(identity, limits, Grants::new(), LockMode::Enforce, Audit::new());
        let mut store = Store::new(&Engine::default(), state);
        let full = File::options().read(true).write(true).open("/dev/full").unwrap();
        let full = store.data_mut().add_file(full, "/a".to_owned(), Access::ReadWrite, None).unwrap().rep();
        let mut answer = |writes: bool, answer: WitError| {
            let error = ask::<()>(&mut store, |store| {
                if writes {
                    store.data_mut().write(Resource::new_borrow(full), vec![1; 512], 0)?.unwrap_err();
                }
                Ok(Err(answer))
            });
            let error = error.unwrap().unwrap_err();
            let budget = Budget::usual(&store.data().limits);
            store.data_mut().begin_call(budget);
            std::error::Error::source(&error).map(|source| source.downcast_ref::<io::Error>().unwrap().kind())
        };
        let storage = || WitError::Storage("cannot write".to_owned());
        assert_eq!(answer(true, storage()), Some(io::ErrorKind::StorageFull));
        assert_eq!(answer(false, storage()), None, "of the call before");
        assert_eq!(answer(true, WitError::Corrupt("broken".to_owned())), None);
    }
}
