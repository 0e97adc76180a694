//! The host's side of one component instance: its state, and the functions it is offered.

use std::collections::HashMap;
use std::error::Error as _;
use std::fs::File;
use std::future::Future;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::pin::pin;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use blockhouse_block::{Access, ErrorKind, FileIdentity, ImageFile};
use rustix::io::Errno;
use wasmtime::component::{HasSelf, Linker, Resource, ResourceTable, ResourceType};
use wasmtime::{Engine, ResourceLimiter, StoreContextMut, bail};
use wasmtime_wasi::filesystem::{
    Descriptor, File as WasiFile, FsPerms, OpenMode, WasiFilesystemCtx, WasiFilesystemCtxView,
};
use wasmtime_wasi::p2::FsResult;
use wasmtime_wasi::p2::bindings::filesystem::types::{
    DescriptorFlags, DescriptorStat, DescriptorType, ErrorCode, HostDescriptor, OpenFlags, PathFlags,
};

use crate::audit::{Audit, OpenEvent, Outcome, now_ms};
use crate::authority::{PREOPENS, TYPES, WASI_VERSION};
use crate::bindings::reader::blockhouse::format::{files, log, types};
use crate::grants::Grants;
use crate::limits::{Limits, OUT_OF_FILES, TICK, is_out_of_files};
use crate::locks::LockMode;
use crate::pin::Pin;
use crate::policy;
use crate::regular;
use crate::restart::{Held, HeldFile};
use crate::text::clean;

/// Files that an instance registered, by index. The layer reads it without the store.
pub(crate) type SharedFiles = Arc<Mutex<Vec<Arc<ImageFile>>>>;

/// What a descriptor stands for, beside what wasmtime-wasi knows of it.
enum Node {
    /// A preopened directory, by its absolute name.
    Directory(String),
    /// A file.
    File { path: String, access: Access, pin: Option<Arc<Pin>> },
}

/// An open file with all that the host knows of it.
pub(crate) struct OpenFile {
    pub(crate) file: Arc<File>,
    /// The absolute path under which it was opened.
    pub(crate) path: String,
    /// What it is pinned by.
    pub(crate) pin: Option<Arc<Pin>>,
}

/// A file that the host did not register for its own I/O. A component is only told that it was not.
pub(crate) struct Unshared {
    pub(crate) kind: ErrorKind,
    /// The absolute path under which it was opened.
    pub(crate) path: String,
    /// Why, and what to do about it.
    pub(crate) reason: String,
}

/// Who an instance is, for audit events and messages.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    /// The image, by the name under which it was opened.
    pub(crate) image: String,
    /// How deep it is in its chain: 0 is the top.
    pub(crate) depth: u32,
    /// The declared format.
    pub(crate) format: String,
    /// SHA-256 of the component, in hexadecimal.
    pub(crate) component: String,
}

/// What one call may use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    pub(crate) time: Duration,
    host_calls: u64,
    /// What is left of the time that it may wait for the storage.
    storage_time: Duration,
    /// For how long it did, since it was last asked about.
    waited: Duration,
}

impl Budget {
    /// Of a call that serves a request.
    pub(crate) fn usual(limits: &Limits) -> Self {
        Self::new(limits, limits.call_time, limits.host_calls)
    }

    /// Of a call that works on a whole image.
    pub(crate) fn maintenance(limits: &Limits) -> Self {
        Self::new(limits, limits.maintenance_time, limits.maintenance_host_calls)
    }

    fn new(limits: &Limits, time: Duration, host_calls: u64) -> Self {
        Self { time, host_calls, storage_time: limits.storage_time, waited: Duration::ZERO }
    }
}

/// The state of one instance.
pub(crate) struct State {
    table: ResourceTable,
    /// Without preopens and without rights: only its functions on open descriptors are used.
    wasi: WasiFilesystemCtx,
    nodes: HashMap<u32, Node>,
    pub(crate) identity: Identity,
    /// What its image was opened for. Whose image is only read opens nothing to write it.
    pub(crate) access: Access,
    pub(crate) limits: Arc<Limits>,
    grants: Grants,
    locks: LockMode,
    audit: Audit,
    /// Whether the host's own I/O of shared files goes past the page cache.
    pub(crate) direct: bool,
    opens: u32,
    host_calls: u64,
    /// What the present call may use.
    pub(crate) budget: Budget,
    log_messages: u32,
    /// Attempts to open, in order, until somebody takes them; of an instance that is the first of its layer.
    pub(crate) events: Arc<Mutex<Vec<OpenEvent>>>,
    pub(crate) shared: SharedFiles,
    /// The last file that was not registered in the present call, or in the last one.
    pub(crate) unshared: Option<Unshared>,
    /// What it opened, for the next instance if this one breaks down.
    pub(crate) held: Arc<Mutex<Held>>,
    /// What files that it opened are pinned by, each once.
    pub(crate) pins: Vec<Arc<Pin>>,
    /// The last error that the component logged: after a trap, its last words.
    pub(crate) last_words: Option<String>,
    /// Which limit stopped it, if one did.
    pub(crate) exceeded: Option<String>,
    /// What the storage said last of what it did not do in the present call.
    refused: Option<ErrorCode>,
    memory_bytes: usize,
    table_elements: usize,
}

impl State {
    pub(crate) fn new(identity: Identity, limits: Arc<Limits>, grants: Grants, locks: LockMode, audit: Audit) -> Self {
        let mut table = ResourceTable::new();
        table.set_max_capacity(limits.handles);
        Self {
            table,
            wasi: WasiFilesystemCtx::default(),
            nodes: HashMap::new(),
            identity,
            access: Access::ReadOnly,
            budget: Budget::usual(&limits),
            limits,
            grants,
            locks,
            audit,
            direct: false,
            opens: 0,
            host_calls: 0,
            log_messages: 0,
            events: Arc::default(),
            shared: SharedFiles::default(),
            unshared: None,
            held: Arc::default(),
            pins: Vec::new(),
            last_words: None,
            exceeded: None,
            refused: None,
            memory_bytes: 0,
            table_elements: 0,
        }
    }

    /// Starts a new call of the component: limits per call start over.
    pub(crate) fn begin_call(&mut self, budget: Budget) {
        self.host_calls = 0;
        self.budget = budget;
        self.unshared = None;
        self.refused = None;
    }

    /// Counts a call of a host function.
    fn count(&mut self) -> wasmtime::Result<()> {
        self.host_calls = self.host_calls.saturating_add(1);
        if self.host_calls > self.budget.host_calls {
            return self.exceed(format!("it made more than {} host calls in one call", self.budget.host_calls));
        }
        Ok(())
    }

    fn exceed<T>(&mut self, what: String) -> wasmtime::Result<T> {
        self.exceeded = Some(what.clone());
        bail!(what)
    }

    /// How long the present call has waited for the storage since this was last asked, as far as it may.
    pub(crate) fn waited(&mut self) -> Option<Duration> {
        let waited = std::mem::take(&mut self.budget.waited).min(self.budget.storage_time);
        self.budget.storage_time = self.budget.storage_time.saturating_sub(waited);
        (!waited.is_zero()).then_some(waited)
    }

    /// Whether the present call has waited for the storage as long as it may.
    pub(crate) fn storage_was_slow(&self) -> bool {
        self.budget.storage_time.is_zero()
    }

    /// Does what the storage may take its time for.
    fn wait<T>(&mut self, act: impl FnOnce(&mut Self) -> T) -> T {
        let began = Instant::now();
        let result = act(self);
        let time = began.elapsed();
        if time >= TICK {
            self.budget.waited = self.budget.waited.saturating_add(time);
        }
        result
    }

    /// Has the storage do something, and remembers why it did not.
    fn on_storage<T>(
        &mut self,
        act: impl FnOnce(&mut Self) -> wasmtime::Result<Result<T, ErrorCode>>,
    ) -> wasmtime::Result<Result<T, ErrorCode>> {
        let result = self.wait(act)?;
        if let Err(code) = &result {
            self.refused = Some(*code);
        }
        Ok(result)
    }

    /// What the storage said last of what it did not do in the present call, if it is something that a program can
    /// do something about: a component has texts alone for it.
    pub(crate) fn refusal(&self) -> Option<io::Error> {
        let error = match self.refused? {
            ErrorCode::InsufficientSpace => Errno::NOSPC,
            ErrorCode::Quota => Errno::DQUOT,
            ErrorCode::FileTooLarge => Errno::FBIG,
            ErrorCode::ReadOnly => Errno::ROFS,
            _ => return None,
        };
        Some(error.into())
    }

    fn view(&mut self) -> WasiFilesystemCtxView<'_> {
        WasiFilesystemCtxView { ctx: &mut self.wasi, table: &mut self.table }
    }

    /// Hands an open file to the component.
    pub(crate) fn add_file(
        &mut self,
        file: File,
        path: String,
        access: Access,
        pin: Option<Arc<Pin>>,
    ) -> wasmtime::Result<Resource<Descriptor>> {
        // Of what is revoked already nothing is read any more: a component that was started again is none the worse.
        if let Some(pin) = &pin
            && !pin.is_revoked()
            && !self.pins.iter().any(|known| Arc::ptr_eq(known, pin))
        {
            self.pins.push(Arc::clone(pin));
        }
        let (perms, mode) = match access {
            Access::ReadOnly => (FsPerms::ReadOnly, OpenMode::READ),
            Access::ReadWrite => (FsPerms::ReadWrite, OpenMode::READ | OpenMode::WRITE),
        };
        self.push(Descriptor::File(WasiFile::new(file, perms, mode, true)), Node::File { path, access, pin })
    }

    fn push(&mut self, descriptor: Descriptor, node: Node) -> wasmtime::Result<Resource<Descriptor>> {
        match self.table.push(descriptor) {
            Ok(resource) => {
                self.nodes.insert(resource.rep(), node);
                Ok(resource)
            }
            Err(_) => self.exceed(format!("it held more than {} handles", self.limits.handles)),
        }
    }

    /// Whether a component may change what is behind a handle. Checked here, and again by
    /// wasmtime-wasi, and again by the kernel: a file that may not be written is not open for writing.
    fn writable(&self, fd: &Resource<Descriptor>) -> Result<(), ErrorCode> {
        match self.nodes.get(&fd.rep()) {
            Some(Node::File { access: Access::ReadWrite, .. }) => Ok(()),
            Some(Node::File { access: Access::ReadOnly, .. }) => Err(ErrorCode::NotPermitted),
            Some(Node::Directory(_)) | None => Err(ErrorCode::BadDescriptor),
        }
    }

    /// Looks into the file `fd`. What was found counts only if by then the file is still what it was pinned as: so
    /// nothing else reaches the component, which could write it elsewhere.
    fn look<T>(
        &mut self,
        fd: u32,
        look: impl FnOnce(&mut Self) -> wasmtime::Result<Result<T, ErrorCode>>,
    ) -> wasmtime::Result<Result<T, ErrorCode>> {
        let found = look(self)?;
        match self.nodes.get(&fd) {
            Some(Node::File { pin: Some(pin), .. }) if pin.is_revoked() => Ok(Err(ErrorCode::Io)),
            _ => Ok(found),
        }
    }

    fn read(&mut self, fd: Fd, length: u64, offset: u64) -> wasmtime::Result<Result<(Vec<u8>, bool), ErrorCode>> {
        let rep = fd.rep();
        self.on_storage(|state| {
            state.look(rep, |state| ready(HostDescriptor::read(&mut state.view(), fd, length, offset)))
        })
    }

    /// Writes to the file `fd`, perhaps not all of it. Returns how much.
    pub(crate) fn write(&mut self, fd: Fd, bytes: Vec<u8>, offset: u64) -> wasmtime::Result<Result<u64, ErrorCode>> {
        if let Err(code) = self.writable(&fd) {
            return Ok(Err(code));
        }
        if !in_a_file(offset, bytes.len()) {
            return Ok(Err(ErrorCode::FileTooLarge));
        }
        self.on_storage(|state| ready(HostDescriptor::write(&mut state.view(), fd, bytes, offset)))
    }

    fn set_size(&mut self, fd: Fd, size: u64) -> wasmtime::Result<Result<(), ErrorCode>> {
        if let Err(code) = self.writable(&fd) {
            return Ok(Err(code));
        }
        if !in_a_file(size, 0) {
            return Ok(Err(ErrorCode::FileTooLarge));
        }
        self.on_storage(|state| ready(HostDescriptor::set_size(&mut state.view(), fd, size)))
    }

    fn stat(&mut self, fd: Fd) -> wasmtime::Result<Result<DescriptorStat, ErrorCode>> {
        self.look(fd.rep(), |state| ready(HostDescriptor::stat(&mut state.view(), fd)))
    }

    /// Takes back a file that the component returned.
    pub(crate) fn take_file(&mut self, resource: Resource<Descriptor>) -> Option<OpenFile> {
        let node = self.nodes.remove(&resource.rep());
        let descriptor = self.table.delete(resource).ok()?;
        // What was read of it was looked at after the call that returned it, and no more of it can be read.
        let nodes = &self.nodes;
        self.pins.retain(|pin| {
            let is_held = |node: &Node| matches!(node, Node::File { pin: Some(held), .. } if Arc::ptr_eq(held, pin));
            nodes.values().any(is_held)
        });
        match (descriptor, node) {
            (Descriptor::File(file), Some(Node::File { path, pin, .. })) => {
                Some(OpenFile { file: file.file, path, pin })
            }
            _ => None,
        }
    }

    /// The open file behind a handle.
    pub(crate) fn file_of(&self, resource: &Resource<Descriptor>) -> Option<Arc<File>> {
        match self.table.get(resource) {
            Ok(Descriptor::File(file)) => Some(Arc::clone(&file.file)),
            _ => None,
        }
    }

    fn open_at(
        &mut self,
        directory: &Resource<Descriptor>,
        path: &str,
        open_flags: OpenFlags,
        flags: DescriptorFlags,
    ) -> wasmtime::Result<Result<Resource<Descriptor>, ErrorCode>> {
        self.opens = self.opens.saturating_add(1);
        if self.opens > self.limits.opens {
            return self.exceed(format!("it tried to open files more than {} times", self.limits.opens));
        }
        let access = if flags.contains(DescriptorFlags::WRITE) { "read-write" } else { "read-only" };
        let mut event = OpenEvent {
            time_ms: now_ms(),
            image: self.identity.image.clone(),
            format: self.identity.format.clone(),
            component: self.identity.component.clone(),
            path: String::new(),
            access,
            outcome: Outcome::Denied,
            grant: None,
            reason: None,
        };
        // Who uses the file may be given time to stop.
        let judged = self.wait(|state| match state.nodes.get(&directory.rep()) {
            Some(Node::Directory(name)) => {
                let (depth, image) = (state.identity.depth, state.identity.image.as_str());
                let request =
                    policy::Request { depth, image, access: state.access, directory: name, path, open_flags, flags };
                let held = state.held.lock().unwrap_or_else(PoisonError::into_inner);
                if held.sealed {
                    policy::open_again(&held, &state.limits, &request)
                } else {
                    drop(held);
                    policy::open(state.grants.tree(), &state.limits, state.locks, &request)
                }
            }
            Some(Node::File { .. }) | None => Err(policy::Denied {
                code: ErrorCode::NotDirectory,
                path: path.chars().take(256).collect(),
                grant: None,
                reason: "it was opened below something that is not a directory".to_owned(),
            }),
        });
        match judged {
            Ok(opened) => {
                event.path.clone_from(&opened.path);
                event.outcome = Outcome::Allowed;
                event.grant = Some(opened.grant.clone());
                self.record(event);
                let policy::Opened { file, path, access, grant, pin } = opened;
                let resource = self.add_file(file, path.clone(), access, pin.clone())?;
                if let Some(file) = self.file_of(&resource) {
                    let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
                    held.keep(HeldFile { path, access, grant, file, pin }, self.limits.handles);
                }
                Ok(Ok(resource))
            }
            Err(denied) => {
                event.path = denied.path;
                event.grant = denied.grant;
                event.reason = Some(denied.reason);
                self.record(event);
                Ok(Err(denied.code))
            }
        }
    }

    fn record(&mut self, event: OpenEvent) {
        self.audit.record(&event);
        // Once it was described nobody asks for them.
        if !self.held.lock().unwrap_or_else(PoisonError::into_inner).sealed {
            self.events.lock().unwrap_or_else(PoisonError::into_inner).push(event);
        }
    }

    /// The preopened directories: the granted ones, with no more rights than the image was opened with, the parents of
    /// granted files, and the root, below which everything else is denied and recorded.
    fn get_directories(&mut self) -> wasmtime::Result<Vec<(Resource<Descriptor>, String)>> {
        let (depth, image) = (self.identity.depth, self.identity.image.as_str());
        let mut directories: Vec<(Option<Descriptor>, String)> = self
            .grants
            .tree()
            .directories
            .iter()
            .filter(|(_, directory)| directory.concerns(depth, image))
            .map(|(name, directory)| {
                let whole = directory.whole_for(depth, image, self.access);
                (whole.map(|grant| Descriptor::Dir(grant.dir_for(self.access))), name.clone())
            })
            .collect();
        if !directories.iter().any(|(_, name)| name == "/") {
            directories.push((None, "/".to_owned()));
        }
        let mut preopens = Vec::with_capacity(directories.len());
        for (descriptor, name) in directories {
            let descriptor = match descriptor {
                Some(descriptor) => descriptor,
                None => nowhere()?,
            };
            preopens.push((self.push(descriptor, Node::Directory(name.clone()))?, name));
        }
        Ok(preopens)
    }
}

/// The descriptor behind a directory that is not granted as a whole. It is `/dev/null`: should the
/// policy ever fail to stop an operation on it, there is no directory behind it to operate on.
fn nowhere() -> wasmtime::Result<Descriptor> {
    // Opened once: a component may be started again by a thread that can open nothing any more.
    static NULL: OnceLock<WasiFile> = OnceLock::new();
    let null = match NULL.get() {
        Some(null) => null,
        None => {
            let null = WasiFile::new(File::open("/dev/null")?, FsPerms::ReadOnly, OpenMode::empty(), true);
            NULL.get_or_init(|| null)
        }
    };
    Ok(Descriptor::File(null.clone()))
}

impl ResourceLimiter for State {
    fn memory_growing(&mut self, current: usize, desired: usize, _maximum: Option<usize>) -> wasmtime::Result<bool> {
        let total = self.memory_bytes.saturating_add(desired.saturating_sub(current));
        if total > self.limits.memory_bytes {
            self.exceeded = Some(format!("it asked for more than {} bytes of memory", self.limits.memory_bytes));
            return Ok(false);
        }
        self.memory_bytes = total;
        Ok(true)
    }

    fn table_growing(&mut self, current: usize, desired: usize, _maximum: Option<usize>) -> wasmtime::Result<bool> {
        let total = self.table_elements.saturating_add(desired.saturating_sub(current));
        if total > self.limits.table_elements {
            self.exceeded = Some(format!("it asked for more than {} table elements", self.limits.table_elements));
            return Ok(false);
        }
        self.table_elements = total;
        Ok(true)
    }

    fn instances(&self) -> usize {
        self.limits.core_instances
    }

    fn tables(&self) -> usize {
        self.limits.core_instances
    }

    fn memories(&self) -> usize {
        self.limits.core_instances
    }
}

impl types::Host for State {}

impl files::Host for State {
    fn share(
        &mut self,
        file: Resource<Descriptor>,
        access: types::Access,
    ) -> wasmtime::Result<Result<u32, files::ShareError>> {
        self.count()?;
        let Some(Node::File { path, access: held, pin }) = self.nodes.get(&file.rep()) else {
            return Ok(Err(files::ShareError::NotPermitted));
        };
        let access = match access {
            types::Access::ReadOnly => Access::ReadOnly,
            types::Access::ReadWrite if *held == Access::ReadWrite => Access::ReadWrite,
            types::Access::ReadWrite => return Ok(Err(files::ShareError::NotPermitted)),
        };
        let Descriptor::File(open) = self.table.get(&file)? else {
            return Ok(Err(files::ShareError::NotPermitted));
        };
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let sealed = self.held.lock().unwrap_or_else(PoisonError::into_inner).sealed;
        if sealed {
            // Extents name files by index: a file that an instance before this one registered keeps its own.
            let identity = open.file.metadata().map(|file| FileIdentity { device: file.dev(), inode: file.ino() });
            let same = |file: &Arc<ImageFile>| {
                identity.as_ref().is_ok_and(|identity| *identity == file.identity())
                    && file.access() == access
                    && file.name() == path
            };
            if let Some(index) = shared.iter().position(same) {
                return Ok(Ok(u32::try_from(index).unwrap_or(u32::MAX)));
            }
        }
        let index = u32::try_from(shared.len()).unwrap_or(u32::MAX);
        let most = self.limits.shared_files;
        let registered = if index >= most {
            Err((ErrorKind::Limit, format!("the limit of shared files is reached (shared-files = {most})")))
        } else {
            host_file(&open.file, access, path, self.direct, sealed)
        };
        match registered {
            Ok(file) => {
                shared.push(Arc::new(match pin {
                    Some(pin) => file.with_validity(pin.validity()),
                    None => file,
                }));
                Ok(Ok(index))
            }
            Err((kind, reason)) => {
                // Once in a call: a component can ask for ever.
                if self.unshared.is_none() {
                    tracing::info!(image = %self.identity.image, %path, %reason, "cannot register a file");
                }
                self.unshared = Some(Unshared { kind, path: path.clone(), reason });
                Ok(Err(files::ShareError::TooMany))
            }
        }
    }

    fn size(&mut self, file: Resource<Descriptor>) -> wasmtime::Result<Option<u64>> {
        self.count()?;
        let size = self.look(file.rep(), |state| match (state.table.get(&file)?, state.nodes.get(&file.rep())) {
            (Descriptor::File(file), Some(Node::File { .. })) => {
                Ok(file.file.metadata().map(|metadata| metadata.len()).map_err(|_| ErrorCode::Io))
            }
            _ => Ok(Err(ErrorCode::BadDescriptor)),
        })?;
        Ok(size.ok())
    }
}

/// An open file of a component for the host's own I/O, past the page cache if that was asked for; or why that cannot be.
/// Nothing is opened for a layer that is `sealed`: a later instance registers more only where it changes the size, and
/// then it serves nothing; and the process may not be able to by then.
fn host_file(
    open: &File,
    access: Access,
    path: &str,
    direct: bool,
    sealed: bool,
) -> Result<ImageFile, (ErrorKind, String)> {
    let storage = |error: io::Error| unless_out_of_files(&error, ErrorKind::Storage, error.to_string());
    let file = match access {
        _ if sealed => open.try_clone().map_err(storage),
        _ if direct => regular::direct(open, access.is_writable()).map_err(|error| {
            let why = format!("it cannot be used with direct I/O, which was asked for: {error}");
            unless_out_of_files(&error, ErrorKind::Unsupported, why)
        }),
        Access::ReadWrite => regular::beside(open).map_err(storage),
        Access::ReadOnly => open.try_clone().map_err(storage),
    };
    let file = ImageFile::new(file?, access, path).map_err(|error| {
        match error.source().and_then(|source| source.downcast_ref()) {
            Some(source) => unless_out_of_files(source, error.kind(), error.message().to_owned()),
            None => (error.kind(), error.message().to_owned()),
        }
    })?;
    // Locks are those of the component's description, and must not end before the host has done with the file.
    if direct || access.is_writable() { Ok(file.keeping(open.try_clone().map_err(storage)?)) } else { Ok(file) }
}

/// That, or that the process can have no more files, if that is the error.
fn unless_out_of_files(error: &io::Error, kind: ErrorKind, why: String) -> (ErrorKind, String) {
    if is_out_of_files(error) { (ErrorKind::Limit, OUT_OF_FILES.to_owned()) } else { (kind, why) }
}

impl log::Host for State {
    fn write(&mut self, level: log::Level, message: String) -> wasmtime::Result<()> {
        self.count()?;
        let message = clean(&message, self.limits.text_bytes);
        if message.is_empty() {
            return Ok(());
        }
        if level == log::Level::Error {
            self.last_words = Some(message.clone());
        }
        self.log_messages = self.log_messages.saturating_add(1);
        if self.log_messages > self.limits.log_messages {
            if self.log_messages == self.limits.log_messages.saturating_add(1) {
                tracing::warn!(image = %self.identity.image, "too many log messages of this component; dropping the rest");
            }
            return Ok(());
        }
        let (image, format) = (&self.identity.image, &self.identity.format);
        match level {
            log::Level::Error => tracing::error!(target: "blockhouse::component", %image, %format, "{message}"),
            log::Level::Warn => tracing::warn!(target: "blockhouse::component", %image, %format, "{message}"),
            log::Level::Info => tracing::info!(target: "blockhouse::component", %image, %format, "{message}"),
            log::Level::Debug => tracing::debug!(target: "blockhouse::component", %image, %format, "{message}"),
        }
        Ok(())
    }
}

/// Finishes a wasmtime-wasi call. Its futures are ready at once, because every descriptor here was
/// made with leave to block the current thread.
fn ready<T>(future: impl Future<Output = FsResult<T>>) -> wasmtime::Result<Result<T, ErrorCode>> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(Ok(value)) => Ok(Ok(value)),
        Poll::Ready(Err(error)) => Ok(Err(error.downcast()?)),
        Poll::Pending => bail!("a file operation did not finish on the thread that asked for it"),
    }
}

/// Whether `length` bytes from `offset` on end at or before 2^63 - 1, the end of the largest file.
fn in_a_file(offset: u64, length: usize) -> bool {
    let end = u64::try_from(length).ok().and_then(|length| offset.checked_add(length));
    end.is_some_and(|end| i64::try_from(end).is_ok())
}

type Caller<'a> = StoreContextMut<'a, State>;
type Fd = Resource<Descriptor>;

/// The functions of the level `read-only-format`, and nothing else.
///
/// Each name here stands in [`crate::authority::FUNCTIONS`]; a test compares the two.
pub(crate) fn read_only_linker(engine: &Engine) -> wasmtime::Result<Linker<State>> {
    let mut linker = Linker::new(engine);

    let mut fs = linker.instance(&format!("{TYPES}@{WASI_VERSION}"))?;
    fs.resource("descriptor", ResourceType::host::<Descriptor>(), |mut store: Caller<'_>, rep| {
        let state = store.data_mut();
        state.nodes.remove(&rep);
        state.table.delete(Resource::<Descriptor>::new_own(rep))?;
        Ok(())
    })?;
    fs.func_wrap("[method]descriptor.read", |mut store: Caller<'_>, (fd, length, offset): (Fd, u64, u64)| {
        let state = store.data_mut();
        state.count()?;
        Ok((state.read(fd, length, offset)?,))
    })?;
    fs.func_wrap("[method]descriptor.stat", |mut store: Caller<'_>, (fd,): (Fd,)| {
        let state = store.data_mut();
        state.count()?;
        // No clock, not even through a file; and how many names a file has is not the component's business.
        let stat = state.stat(fd)?.map(|stat| DescriptorStat {
            link_count: 1,
            data_access_timestamp: None,
            data_modification_timestamp: None,
            status_change_timestamp: None,
            ..stat
        });
        Ok((stat,))
    })?;
    fs.func_wrap("[method]descriptor.get-type", |mut store: Caller<'_>, (fd,): (Fd,)| {
        let state = store.data_mut();
        state.count()?;
        let kind = match state.nodes.get(&fd.rep()) {
            Some(Node::Directory(_)) => Ok(DescriptorType::Directory),
            Some(Node::File { .. }) => Ok(DescriptorType::RegularFile),
            None => Err(ErrorCode::BadDescriptor),
        };
        Ok((kind,))
    })?;
    fs.func_wrap("[method]descriptor.get-flags", |mut store: Caller<'_>, (fd,): (Fd,)| {
        let state = store.data_mut();
        state.count()?;
        let flags = match state.nodes.get(&fd.rep()) {
            Some(Node::File { access: Access::ReadWrite, .. }) => Ok(DescriptorFlags::READ | DescriptorFlags::WRITE),
            Some(Node::File { access: Access::ReadOnly, .. } | Node::Directory(_)) => Ok(DescriptorFlags::READ),
            None => Err(ErrorCode::BadDescriptor),
        };
        Ok((flags,))
    })?;
    fs.func_wrap(
        "[method]descriptor.open-at",
        |mut store: Caller<'_>,
         (fd, _follow, path, open_flags, flags): (Fd, PathFlags, String, OpenFlags, DescriptorFlags)| {
            // Symbolic links are followed whatever the flag says: they are resolved inside the grant.
            let state = store.data_mut();
            state.count()?;
            Ok((state.open_at(&fd, &path, open_flags, flags)?,))
        },
    )?;

    let mut preopens = linker.instance(&format!("{PREOPENS}@{WASI_VERSION}"))?;
    preopens.func_wrap("get-directories", |mut store: Caller<'_>, (): ()| {
        let state = store.data_mut();
        state.count()?;
        Ok((state.get_directories()?,))
    })?;

    types::add_to_linker::<_, HasSelf<State>>(&mut linker, |state| state)?;
    files::add_to_linker::<_, HasSelf<State>>(&mut linker, |state| state)?;
    log::add_to_linker::<_, HasSelf<State>>(&mut linker, |state| state)?;
    Ok(linker)
}

/// The functions of the level `read-write-format`: those of `read-only-format`, and four that change
/// or sync an open file. Each is done when it returns.
pub(crate) fn read_write_linker(engine: &Engine) -> wasmtime::Result<Linker<State>> {
    let mut linker = read_only_linker(engine)?;
    let mut fs = linker.instance(&format!("{TYPES}@{WASI_VERSION}"))?;
    fs.func_wrap("[method]descriptor.write", |mut store: Caller<'_>, (fd, bytes, offset): (Fd, Vec<u8>, u64)| {
        let state = store.data_mut();
        state.count()?;
        Ok((state.write(fd, bytes, offset)?,))
    })?;
    fs.func_wrap("[method]descriptor.set-size", |mut store: Caller<'_>, (fd, size): (Fd, u64)| {
        let state = store.data_mut();
        state.count()?;
        Ok((state.set_size(fd, size)?,))
    })?;
    fs.func_wrap("[method]descriptor.sync-data", |mut store: Caller<'_>, (fd,): (Fd,)| {
        let state = store.data_mut();
        state.count()?;
        if let Err(code) = state.writable(&fd) {
            return Ok((Err(code),));
        }
        Ok((state.on_storage(|state| ready(HostDescriptor::sync_data(&mut state.view(), fd)))?,))
    })?;
    fs.func_wrap("[method]descriptor.sync", |mut store: Caller<'_>, (fd,): (Fd,)| {
        let state = store.data_mut();
        state.count()?;
        if let Err(code) = state.writable(&fd) {
            return Ok((Err(code),));
        }
        Ok((state.on_storage(|state| ready(HostDescriptor::sync(&mut state.view(), fd)))?,))
    })?;
    Ok(linker)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use std::collections::BTreeSet;

    use super::*;
    use crate::CONTRACT_VERSION;
    use crate::authority::{Authority, FILES, FUNCTIONS, LOG, level_of};
    use crate::pin::tests::{file, stamped};

    /// Every function of a WIT file, as `interface` and `name`, the name as the component model spells it.
    fn functions(package: &str, text: &str) -> Vec<(String, String)> {
        let (mut found, mut interface, mut resource) = (Vec::new(), String::new(), None::<String>);
        for line in text.lines() {
            let word = |line: &str| line.trim_end_matches([' ', '{', ';']).to_owned();
            if let Some(name) = line.strip_prefix("interface ") {
                interface = format!("{package}/{}", word(name));
            } else if let Some(name) = line.trim_start().strip_prefix("resource ") {
                let name = word(name);
                found.push((interface.clone(), format!("[resource-drop]{name}")));
                resource = line.ends_with('{').then_some(name);
            } else if line == "  }" {
                resource = None;
            } else if let Some((name, _)) = line.split_once(": func(") {
                let name = name.trim();
                let name = resource.as_ref().map_or(name.to_owned(), |resource| format!("[method]{resource}.{name}"));
                found.push((interface.clone(), name));
            }
        }
        found
    }

    /// Whether the linker has a function of that name: it can be defined only once.
    fn is_offered(linker: &mut Linker<State>, interface: &str, function: &str) -> bool {
        let version = if interface.starts_with("wasi:") { WASI_VERSION } else { CONTRACT_VERSION };
        let mut instance = linker.instance(&format!("{interface}@{version}")).unwrap();
        let defined = match function.strip_prefix("[resource-drop]") {
            Some(resource) => instance.resource(resource, ResourceType::host::<u8>(), |_, _| Ok(())),
            None => instance.func_wrap(function, |_: StoreContextMut<'_, State>, (): ()| Ok(())),
        };
        defined.is_err()
    }

    #[test]
    fn the_linkers_offer_the_functions_of_the_table_and_no_others() {
        let mut candidates = functions("wasi:filesystem", include_str!("../../../wit/deps/filesystem/filesystem.wit"));
        candidates.extend(functions("wasi:io", include_str!("../../../wit/deps/io/io.wit")));
        candidates.extend(functions("wasi:clocks", include_str!("../../../wit/deps/clocks/clocks.wit")));
        candidates.extend(functions("blockhouse:format", include_str!("../../../wit/files.wit")));
        candidates.extend(functions("blockhouse:format", include_str!("../../../wit/log.wit")));
        for (interface, function) in [
            ("wasi:random/random", "get-random-bytes"),
            ("wasi:cli/environment", "get-environment"),
            ("wasi:cli/exit", "exit"),
            ("wasi:cli/stdout", "get-stdout"),
            ("wasi:clocks/wall-clock", "now"),
            ("wasi:clocks/monotonic-clock", "now"),
            ("wasi:sockets/tcp-create-socket", "create-tcp-socket"),
            (FILES, "open"),
            (LOG, "read"),
        ] {
            candidates.push((interface.to_owned(), function.to_owned()));
        }

        // Each once: what is defined below cannot be defined again.
        let candidates: BTreeSet<_> = candidates.into_iter().collect();
        let engine = Engine::default();
        for (level, linker) in
            [(Authority::ReadOnly, read_only_linker(&engine)), (Authority::ReadWrite, read_write_linker(&engine))]
        {
            let mut linker = linker.unwrap();
            let offered: BTreeSet<_> = candidates
                .iter()
                .filter(|(interface, function)| is_offered(&mut linker, interface, function))
                .cloned()
                .collect();
            let table: BTreeSet<_> = FUNCTIONS
                .iter()
                .filter(|function| function.level <= level)
                .map(|function| (function.interface.to_owned(), function.name.to_owned()))
                .collect();
            assert_eq!(offered, table, "{level}");
        }

        // What can change a file, a name or a directory is known here, and not offered for reading.
        for name in ["write", "set-size", "link-at", "rename-at", "symlink-at", "unlink-file-at", "create-directory-at"]
        {
            let name = format!("[method]descriptor.{name}");
            assert!(candidates.contains(&(TYPES.to_owned(), name.clone())), "{name} is not in wit/deps");
            assert!(level_of(TYPES, &name).is_none_or(|level| level == Authority::ReadWrite), "{name}");
        }
    }

    #[test]
    fn offsets_end_at_the_largest_file() {
        let largest = u64::try_from(i64::MAX).unwrap();
        assert!(in_a_file(0, 0) && in_a_file(largest, 0) && in_a_file(largest - 1, 1));
        assert!(!in_a_file(largest, 1) && !in_a_file(largest + 1, 0) && !in_a_file(u64::MAX, usize::MAX));
    }

    /// A second wall behind the policy: what wasmtime-wasi lets a component do below a directory.
    #[test]
    fn a_directory_has_no_more_rights_than_the_image() {
        let place = tempfile::tempdir().unwrap();
        let name = place.path().canonicalize().unwrap().to_str().unwrap().to_owned();
        for (access, perms) in [(Access::ReadOnly, FsPerms::ReadOnly), (Access::ReadWrite, FsPerms::ReadWrite)] {
            let identity = Identity { image: String::new(), depth: 0, format: String::new(), component: String::new() };
            let grants = Grants::new().allow_writing(&name).unwrap();
            let mut state = State::new(identity, Arc::new(Limits::default()), grants, LockMode::Enforce, Audit::new());
            state.access = access;
            let preopens = state.get_directories().unwrap();
            let (preopen, _) = preopens.iter().find(|(_, preopen)| *preopen == name).unwrap();
            let Descriptor::Dir(dir) = state.table.get(preopen).unwrap() else { panic!("no directory") };
            assert_eq!((dir.perms, dir.open_mode.contains(OpenMode::WRITE)), (perms, access.is_writable()));
        }
    }

    /// What could not be written is said once to each open file description: the host has another one than the component
    /// where it writes. The locks stay where they were taken, for as long as the host has the file.
    #[test]
    fn a_file_that_is_written_is_opened_again_and_stays_locked() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("image");
        std::fs::write(&path, [1; 4096]).unwrap();
        let open = || File::options().read(true).write(true).open(&path).unwrap();
        for (access, direct) in [(Access::ReadOnly, false), (Access::ReadWrite, false), (Access::ReadWrite, true)] {
            if direct && regular::direct(&open(), true).is_err() {
                // Not on this file system.
                continue;
            }
            let identity = Identity { image: String::new(), depth: 0, format: String::new(), component: String::new() };
            let limits = Arc::new(Limits::default());
            let mut state = State::new(identity, limits, Grants::new(), LockMode::Enforce, Audit::new());
            state.direct = direct;
            let image = open();
            assert_eq!(crate::locks::take(&image, Access::ReadWrite, LockMode::Enforce).unwrap(), None);
            let own = image.try_clone().unwrap();
            let handed = state.add_file(image, "/image".to_owned(), Access::ReadWrite, None).unwrap();
            let asked = match access {
                Access::ReadOnly => types::Access::ReadOnly,
                Access::ReadWrite => types::Access::ReadWrite,
            };
            assert!(matches!(files::Host::share(&mut state, handed, asked), Ok(Ok(0))), "{access:?} {direct}");
            let file = Arc::clone(state.shared.lock().unwrap().first().unwrap());
            // The position is the description's.
            rustix::fs::seek(&*file, rustix::fs::SeekFrom::Start(7)).unwrap();
            assert_eq!(rustix::fs::tell(&own).unwrap() == 7, access == Access::ReadOnly, "{access:?} {direct}");
            // As a component does that breaks down.
            drop((own, state));
            let locked = || crate::locks::take(&open(), Access::ReadWrite, LockMode::Enforce).unwrap().is_some();
            assert!(locked(), "{access:?} {direct}: the host still has it");
            drop(file);
            assert!(!locked(), "{access:?} {direct}");
        }
    }

    #[test]
    fn what_is_read_while_a_pin_breaks_does_not_reach_the_component() {
        let content = file(b"hello");
        let pin = Arc::new(stamped(content.path(), b"hello"));
        let identity = Identity { image: String::new(), depth: 0, format: String::new(), component: String::new() };
        let mut state =
            State::new(identity, Arc::new(Limits::default()), Grants::new(), LockMode::Enforce, Audit::new());
        let open = || File::open(content.path()).unwrap();
        let pinned = state.add_file(open(), "/a".to_owned(), Access::ReadOnly, Some(Arc::clone(&pin))).unwrap().rep();
        let other = state.add_file(open(), "/b".to_owned(), Access::ReadOnly, None).unwrap().rep();
        let read = |state: &mut State, fd| state.read(Fd::new_borrow(fd), 5, 0).unwrap().map(|(bytes, _)| bytes);
        let stat = |state: &mut State, fd| state.stat(Fd::new_borrow(fd)).unwrap().map(|stat| stat.size);
        let size = |state: &mut State, fd| files::Host::size(state, Fd::new_borrow(fd)).unwrap();
        assert_eq!(read(&mut state, pinned).unwrap(), b"hello");
        // After the bytes were read, and before the component has them.
        let found = state.look(pinned, |state| {
            let found = read(state, pinned);
            assert_eq!(found.as_ref().unwrap(), b"hello");
            pin.validity().revoke("it changed");
            Ok(found)
        });
        assert_eq!(found.unwrap().unwrap_err(), ErrorCode::Io);
        // And never again.
        assert_eq!(read(&mut state, pinned).unwrap_err(), ErrorCode::Io);
        assert_eq!(stat(&mut state, pinned).unwrap_err(), ErrorCode::Io);
        assert_eq!(size(&mut state, pinned), None);
        // What is not pinned is read as ever.
        assert_eq!(read(&mut state, other).unwrap(), b"hello");
        assert_eq!((stat(&mut state, other).unwrap(), size(&mut state, other)), (5, Some(5)));
    }

    #[test]
    fn only_a_file_that_was_handed_over_for_writing_can_be_changed() {
        let identity = Identity { image: String::new(), depth: 0, format: String::new(), component: String::new() };
        let mut state =
            State::new(identity, Arc::new(Limits::default()), Grants::new(), LockMode::Enforce, Audit::new());
        let null = || File::options().read(true).write(true).open("/dev/null").unwrap();
        let read_only = state.add_file(null(), "/a".to_owned(), Access::ReadOnly, None).unwrap();
        let read_write = state.add_file(null(), "/b".to_owned(), Access::ReadWrite, None).unwrap();
        let directory = state.get_directories().unwrap().remove(0).0;
        assert_eq!(state.writable(&read_only).unwrap_err(), ErrorCode::NotPermitted);
        assert!(state.writable(&read_write).is_ok());
        assert_eq!(state.writable(&directory).unwrap_err(), ErrorCode::BadDescriptor);
        assert_eq!(state.writable(&Resource::new_own(12345)).unwrap_err(), ErrorCode::BadDescriptor);
    }
}
