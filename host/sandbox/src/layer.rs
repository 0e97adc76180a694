//! A component instance as a layer of a disk.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blockhouse_block::{
    Allocation, Error, ErrorKind, Extent, FileIndex, Freed, ImageFile, Layer, LayerInfo, LayerPacker, LayerWriter,
    Located, Placement, Result,
};
use wasmtime::Store;

use crate::bindings::packer::PackerAbility;
use crate::bindings::reader::blockhouse::format::types::Error as WitError;
use crate::bindings::reader::exports::blockhouse::format::reader as wit;
use crate::bindings::writer::WriterAbility;
use crate::bindings::writer::exports::blockhouse::format::writer as wit_writer;
use crate::crew::{Crew, Member};
use crate::direct::refuse_odd_end;
use crate::host::{SharedFiles, State};
use crate::instance::Instance;
use crate::restart::{Backoff, Due, Held, HeldFile, Now, OFF};

/// Where the tokens of packed extents are remembered for one instance.
const TOKENS: usize = 4096;

/// One image, served by one component: by one instance, and by another one once that has broken down.
pub(crate) struct ComponentLayer {
    info: LayerInfo,
    /// The size of the image, in bytes.
    size: AtomicU64,
    current: Mutex<Arc<Incarnation>>,
    /// More instances, if the image is only read.
    crew: Crew<Incarnation>,
    shared: SharedFiles,
    /// What a writer has promised and not kept yet; `None` if the image is not written by its component.
    ledger: Option<Mutex<Ledger>>,
    revival: Revival,
}

/// An instance with the abilities that were looked up in it.
pub(crate) struct Incarnation {
    pub(crate) instance: Instance,
    /// The writer exports, if the image is written through them.
    pub(crate) writer: Option<WriterAbility>,
    /// The packer exports, if it has them as well.
    pub(crate) packer: Option<PackerAbility>,
    /// The instance's own name of the packed extent that starts at an offset; see [`ComponentLayer::locate`].
    tokens: Mutex<HashMap<u64, u64>>,
}

impl Incarnation {
    pub(crate) fn new(instance: Instance, writer: Option<WriterAbility>, packer: Option<PackerAbility>) -> Self {
        Self { instance, writer, packer, tokens: Mutex::default() }
    }
}

/// What a writer holds that would be lost with its memory.
#[derive(Debug, Default)]
struct Ledger {
    /// Reservations that were neither committed nor given back.
    tickets: u64,
    /// Something changed since the last flush.
    unflushed: bool,
    /// Packed extents were given out under names that another instance does not know.
    packed: bool,
}

/// Starts a new instance that describes the image as the one before it.
pub(crate) type Start = Box<dyn Fn() -> Result<Incarnation> + Send + Sync>;

/// Makes the image larger, with an instance that does nothing else: of `size` bytes, over a layer of `below`.
/// Returns what became of that, and the size that the image has.
pub(crate) type Grow = Box<dyn Fn(u64, u64) -> (Result<()>, u64) + Send + Sync>;

/// How the layer comes back to life.
pub(crate) struct Revival {
    pub(crate) start: Start,
    /// `None` if the component cannot do it.
    pub(crate) grow: Option<Grow>,
    pub(crate) held: Arc<Mutex<Held>>,
    pub(crate) backoff: Mutex<Backoff>,
    pub(crate) now: Now,
    /// How many instances there may be at a time: [`Limits::instances`](crate::Limits::instances).
    pub(crate) instances: u32,
}

impl ComponentLayer {
    pub(crate) fn new(info: LayerInfo, first: Incarnation, shared: SharedFiles, revival: Revival) -> Self {
        let ledger = first.writer.is_some().then(Mutex::default);
        let size = AtomicU64::new(info.virtual_size);
        let current = Mutex::new(Arc::new(first));
        Self { info, size, current, crew: Crew::default(), shared, ledger, revival }
    }

    /// Prepares the image for writing: once, before any other call of the writer.
    pub(crate) fn begin(&self) -> Result<()> {
        self.with(|from| from.begin().unwrap_or_else(|| Err(self.not_written())))
    }

    /// Reservations have come to their end.
    fn settled(&self, tickets: &[u64]) {
        let count = u64::try_from(tickets.len()).unwrap_or(u64::MAX);
        self.note(|ledger| ledger.tickets = ledger.tickets.saturating_sub(count));
    }

    fn not_written(&self) -> Error {
        let why = "the image was not opened for writing by its component";
        Error::new(ErrorKind::Unsupported, why).on_image(&*self.info.name)
    }

    /// Calls the instance, which is started again before if it is time.
    fn with<T>(&self, call: impl FnOnce(&Incarnation) -> Result<T>) -> Result<T> {
        let now = self.current()?;
        call(&now).map_err(|error| {
            let next = if now.instance.is_dead() { self.lost(&now.instance) } else { None };
            match next {
                None => error,
                Some(next) => {
                    let why = format!("{}; {next}", error.message());
                    Error::new(error.kind(), why).on_image(&*self.info.name).with_source(error)
                }
            }
        })
    }

    /// The instance that is called.
    fn current(&self) -> Result<Arc<Incarnation>> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if !current.instance.is_dead() {
            return Ok(Arc::clone(&current));
        }
        // Whoever's call it was may not have come to that yet.
        self.lost(&current.instance);
        let down = |what: String| {
            let why = format!("{}; {what}", current.instance.cause());
            Err(Error::new(ErrorKind::Component, why).on_image(&*self.info.name))
        };
        let attempt = {
            let mut backoff = self.backoff();
            let now = (self.revival.now)();
            match backoff.due(now) {
                Due::Never(why) => return down(format!("it is not started again: {why}")),
                Due::In(time) => return down(format!("it is started again in {} ms", time.as_millis())),
                Due::Undecided => return down("it is not decided yet whether it is started again".to_owned()),
                Due::Now => backoff.attempt(now),
            }
        };
        let image = &self.info.name;
        self.held().sealed = true;
        match (self.revival.start)() {
            Ok(next) => {
                tracing::warn!(%image, attempt, "the component was started again");
                next.instance.count_restart();
                *current = Arc::new(next);
                Ok(Arc::clone(&current))
            }
            Err(error) => {
                tracing::error!(%image, attempt, "the component could not be started again: {error}");
                let mut backoff = self.backoff();
                // Storage that fails now says nothing about the image.
                if matches!(error.kind(), ErrorKind::Component | ErrorKind::Storage) {
                    backoff.died((self.revival.now)());
                } else {
                    // It says something else about the image than before.
                    backoff.give_up(error.message());
                }
                Err(error)
            }
        }
    }

    /// The instance has broken down. Decides what becomes of it, if that is not decided, and says so if there is
    /// something to say.
    fn lost(&self, instance: &Instance) -> Option<String> {
        if !instance.is_new_loss() {
            return self.verdict();
        }
        let ledger = self.ledger.as_ref().map(|ledger| ledger.lock().unwrap_or_else(PoisonError::into_inner));
        let mut backoff = self.backoff();
        if backoff.is_over() || backoff.is_off() {
            backoff.give_up(OFF);
            return None;
        }
        let never = if instance.is_condemned() {
            Some("it broke its contract")
        } else if self.held().incomplete {
            Some("it opened more files than are kept for a restart")
        } else {
            match ledger.as_deref() {
                Some(Ledger { tickets: 1.., .. } | Ledger { unflushed: true, .. }) => {
                    Some("it was writing, and what it had not flushed is lost; check the image and open it again")
                }
                Some(Ledger { packed: true, .. }) => Some("it was writing, and gave out packed data"),
                _ => None,
            }
        };
        match never {
            Some(why) => backoff.give_up(why),
            None => backoff.died((self.revival.now)()),
        }
        let over = backoff.is_over();
        drop(backoff);
        let verdict = self.verdict();
        let image = &self.info.name;
        match verdict.as_deref().unwrap_or("it is started again now") {
            verdict if over => tracing::error!(%image, "the component broke down: {verdict}"),
            verdict => tracing::warn!(%image, "the component broke down: {verdict}"),
        }
        verdict
    }

    /// What was decided about an instance that is down, for a person.
    fn verdict(&self) -> Option<String> {
        let backoff = self.backoff();
        match backoff.due((self.revival.now)()) {
            Due::Never(why) if why == OFF => None,
            Due::Never(why) => Some(format!("it is not started again: {why}")),
            Due::In(time) => Some(format!("it is started again in {} ms", time.as_millis())),
            Due::Now | Due::Undecided => None,
        }
    }

    /// Another instance than the first, if that is busy and there may be one.
    fn member(&self) -> Option<Member<'_, Incarnation>> {
        let busy = self.current.lock().unwrap_or_else(PoisonError::into_inner).instance.is_busy();
        // Without restarts nothing is kept that another instance could be started with.
        if !busy || self.backoff().is_off() || self.held().incomplete {
            return None;
        }
        self.crew.hire(self.revival.instances.saturating_sub(1), || {
            self.held().sealed = true;
            (self.revival.start)()
        })
    }

    fn backoff(&self) -> MutexGuard<'_, Backoff> {
        self.revival.backoff.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.revival.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the ledger, if there is one.
    fn note(&self, change: impl FnOnce(&mut Ledger)) {
        if let Some(ledger) = &self.ledger {
            change(&mut ledger.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// Makes one call of a writer export. `what` names it in messages: `prepare`.
    fn write<T>(
        &self,
        what: &str,
        call: impl FnOnce(&wit_writer::Guest, &mut Store<State>) -> wasmtime::Result<std::result::Result<T, WitError>>,
    ) -> Result<T> {
        self.with(|from| {
            let Some(writer) = &from.writer else { return Err(self.not_written()) };
            from.instance.call(what, |to| call(writer.blockhouse_format_writer(), to.store))
        })
    }

    /// As `write`, for a call that leaves something to be flushed, also if it fails.
    fn change<T>(
        &self,
        what: &str,
        call: impl FnOnce(&wit_writer::Guest, &mut Store<State>) -> wasmtime::Result<std::result::Result<T, WitError>>,
    ) -> Result<T> {
        self.write(what, |writer, store| {
            self.note(|ledger| ledger.unflushed = true);
            call(writer, store)
        })
    }

    /// The instance's name of the packed extent that starts at `start`.
    fn token(&self, from: &Incarnation, start: u64, length: u64) -> Result<u64> {
        let known = from.tokens.lock().unwrap_or_else(PoisonError::into_inner).get(&start).copied();
        if let Some(token) = known {
            return Ok(token);
        }
        let located = locate(from, start, length, 1)?;
        match located.extents.first() {
            Some(Extent { length: found, placement: Placement::Packed { token } })
                if located.start == start && *found == length =>
            {
                from.remember(start, *token);
                Ok(*token)
            }
            _ => {
                let why = format!("`locate` does not say of the {length} packed bytes at {start} what it said before");
                Err(from.instance.condemn(&why))
            }
        }
    }
}

impl Incarnation {
    /// Calls `begin`; `None` without a writer.
    pub(crate) fn begin(&self) -> Option<Result<()>> {
        let writer = self.writer.as_ref()?;
        // It may have to repair the image.
        Some(self.instance.maintain("begin", |from| writer.blockhouse_format_writer().call_begin(from.store)))
    }

    /// The bytes of a packed extent, by the instance's own token.
    fn unpack(&self, token: u64, length: u64) -> Result<Vec<u8>> {
        let bytes = self
            .instance
            .call("unpack", |call| call.format.blockhouse_format_reader().call_unpack(call.store, token, length))?;
        if u64::try_from(bytes.len()) == Ok(length) {
            Ok(bytes)
        } else {
            Err(self.instance.condemn(&format!("`unpack` gave {} bytes for an extent of {length}", bytes.len())))
        }
    }

    fn remember(&self, start: u64, token: u64) {
        let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        if tokens.len() >= TOKENS {
            // They are asked for again.
            tokens.clear();
        }
        tokens.insert(start, token);
    }
}

/// Makes one call of `locate`, with the instance's own tokens.
fn locate(from: &Incarnation, offset: u64, length: u64, max_extents: u32) -> Result<Located> {
    let located = from.instance.call("locate", |call| {
        call.format.blockhouse_format_reader().call_locate(call.store, offset, length, max_extents)
    })?;
    let extents = located
        .extents
        .into_iter()
        .map(|extent| Extent {
            length: extent.length_bytes,
            placement: match extent.placement {
                wit::Placement::Data(data) => {
                    Placement::Data { file: FileIndex(data.file), offset: data.offset_bytes, overwrite: data.overwrite }
                }
                wit::Placement::Zero => Placement::Zero,
                wit::Placement::Unallocated => Placement::Unallocated,
                wit::Placement::Packed(token) => Placement::Packed { token },
            },
        })
        .collect();
    Ok(Located { start: located.start_bytes, extents })
}

impl Layer for ComponentLayer {
    fn info(&self) -> &LayerInfo {
        &self.info
    }

    /// A token is known to the instance that gave it, and to no other one. So of an image that is only read an
    /// extent is named by where it starts, and the token asked for again where it is not known. Of one that is
    /// written, the same place can be packed anew under another token, and tokens stay what they are.
    fn locate(&self, offset: u64, length: u64, max_extents: u32) -> Result<Located> {
        self.with(|from| {
            let mut located = locate(from, offset, length, max_extents)?;
            let mut start = located.start;
            for extent in &mut located.extents {
                if let Placement::Packed { token } = &mut extent.placement {
                    if self.ledger.is_some() {
                        self.note(|ledger| ledger.packed = true);
                    } else {
                        from.remember(start, *token);
                        *token = start;
                    }
                }
                start = start.saturating_add(extent.length);
            }
            Ok(located)
        })
    }

    fn unpack(&self, token: u64, length: u64) -> Result<Vec<u8>> {
        if self.ledger.is_some() {
            return self.with(|from| from.unpack(token, length));
        }
        let unpack = |from: &Incarnation| from.unpack(self.token(from, token, length)?, length);
        let Some(member) = self.member() else { return self.with(unpack) };
        let result = unpack(&member);
        if !member.instance.is_dead() {
            return result;
        }
        self.crew.dismiss();
        self.with(|first| {
            first.instance.end_as(&member.instance);
            result
        })
    }

    fn may_recover(&self) -> bool {
        !self.backoff().is_over()
    }

    /// By another instance than the one that serves the image: that one is finished before, and the next one, which
    /// finds the new size, takes its place.
    fn grow(&self, size: u64, below: u64) -> Result<()> {
        let Some(grow) = &self.revival.grow else {
            let why = format!("the component for {} cannot change the size of a disk", self.info.format);
            return Err(Error::new(ErrorKind::Unsupported, why).on_image(&*self.info.name));
        };
        if self.ledger.is_none() {
            refuse_odd_end(self, size)?;
        }
        if self.held().incomplete {
            let why = "files that the image refers to were not kept for another instance of its component: close the \
                       disk, and change the size of the image";
            return Err(Error::new(ErrorKind::Unsupported, why).on_image(&*self.info.name));
        }
        // One that asks for it while it is started would not be started.
        let revoked = |file: &HeldFile| file.pin.as_ref().and_then(|pin| pin.check().err());
        if let Some(why) = self.held().files.iter().find_map(revoked) {
            let why = format!("the size stays what it is, since a file of the image cannot be used any more: {why}");
            return Err(Error::new(ErrorKind::Storage, why).on_image(&*self.info.name));
        }
        let before = self.current()?;
        if let Some(writer) = &before.writer {
            before.instance.call("finish", |to| writer.blockhouse_format_writer().call_finish(to.store))?;
        }
        self.held().sealed = true;
        let (grown, now) = grow(size, below);
        self.size.store(now, Ordering::Release);
        self.crew.dismiss();
        // Also if it failed: the one before was finished.
        let next = (self.revival.start)();
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        match next {
            Ok(next) => {
                *current = Arc::new(next);
                self.note(|ledger| *ledger = Ledger::default());
                grown
            }
            Err(error) => {
                let why = format!("it could not be started again after its size was changed: {}", error.message());
                current.instance.retire(&why);
                self.backoff().give_up(why.clone());
                // If something failed before, that says more.
                let (why, first) = match grown {
                    Err(first) => (format!("{}; {why}", first.message()), first),
                    Ok(()) => (why, error),
                };
                Err(Error::new(first.kind(), why).on_image(&*self.info.name).with_source(first))
            }
        }
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn file(&self, index: FileIndex) -> Option<Arc<ImageFile>> {
        let index = usize::try_from(index.0).ok()?;
        self.shared.lock().unwrap_or_else(PoisonError::into_inner).get(index).cloned()
    }

    fn writer(&self) -> Option<&dyn LayerWriter> {
        self.ledger.as_ref().map(|_| self as &dyn LayerWriter)
    }

    fn packer(&self) -> Option<&dyn LayerPacker> {
        let packs = self.current.lock().unwrap_or_else(PoisonError::into_inner).packer.is_some();
        packs.then_some(self as &dyn LayerPacker)
    }
}

impl LayerPacker for ComponentLayer {
    fn pack(&self, offset: u64, bytes: &[u8]) -> Result<bool> {
        self.with(|from| {
            let Some(packer) = &from.packer else { return Err(self.not_written()) };
            from.instance.call("pack", |to| {
                self.note(|ledger| ledger.unflushed = true);
                packer.blockhouse_format_packer().call_pack(to.store, offset, bytes)
            })
        })
    }
}

impl LayerWriter for ComponentLayer {
    fn prepare(&self, offset: u64, length: u64, max_allocations: u32) -> Result<Vec<Allocation>> {
        let allocations =
            self.change("prepare", |writer, store| writer.call_prepare(store, offset, length, max_allocations))?;
        let count = u64::try_from(allocations.len()).unwrap_or(u64::MAX);
        self.note(|ledger| ledger.tickets = ledger.tickets.saturating_add(count));
        if count > u64::from(max_allocations) {
            let why = format!("`prepare` gave {count} allocations where {max_allocations} were allowed");
            return self.with(|from| Err(from.instance.condemn(&why)));
        }
        Ok(allocations
            .into_iter()
            .map(|allocation| Allocation {
                start: allocation.start_bytes,
                length: allocation.length_bytes,
                file: FileIndex(allocation.file),
                offset: allocation.offset_bytes,
                zeroed: allocation.zeroed,
                ticket: allocation.ticket,
            })
            .collect())
    }

    fn commit(&self, tickets: &[u64]) -> Result<()> {
        self.change("commit", |writer, store| writer.call_commit(store, tickets))?;
        self.settled(tickets);
        Ok(())
    }

    fn abandon(&self, tickets: &[u64]) -> Result<()> {
        self.change("abandon", |writer, store| writer.call_abandon(store, tickets))?;
        self.settled(tickets);
        Ok(())
    }

    fn zero(&self, offset: u64, length: u64, keep: bool) -> Result<()> {
        self.change("zero", |writer, store| writer.call_zero(store, offset, length, keep))
    }

    fn discard(&self, offset: u64, length: u64) -> Result<()> {
        self.change("discard", |writer, store| writer.call_discard(store, offset, length))
    }

    fn flush(&self) -> Result<Vec<Freed>> {
        // How many there are is bounded by what may cross into the host in one call.
        let freed = self.write("flush", |writer, store| writer.call_flush(store))?;
        // No other call of the writer is under way: the disk makes one at a time.
        self.note(|ledger| ledger.unflushed = false);
        Ok(freed
            .into_iter()
            .map(|freed| Freed { file: FileIndex(freed.file), offset: freed.offset_bytes, length: freed.length_bytes })
            .collect())
    }

    fn finish(&self) -> Result<()> {
        self.write("finish", |writer, store| writer.call_finish(store))
    }
}

impl std::fmt::Debug for ComponentLayer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ComponentLayer").field("info", &self.info).finish_non_exhaustive()
    }
}
