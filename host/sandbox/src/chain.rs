//! From an image and its declared format to a disk: layer by layer, one component instance each.
//!
//! ```text
//!   image + format ──▶ instance ── open ──▶ what it says, what it refers to     (nothing opened yet)
//!                          │── connect ──▶ opens its references through the grants
//!                          ▼
//!              backing file (open) + declared format ──▶ next instance … ──▶ Disk
//! ```

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use blockhouse_block::{Access, Disk, DiskOptions, Error, ErrorKind, FileIdentity, Layer, LayerInfo, Remedy, Result};
use serde::Serialize;
use sha2::{Digest, Sha256};
use wasmtime::component::Resource;
use wasmtime_wasi::filesystem::Descriptor;

use crate::audit::{Audit, OpenEvent, Outcome};
use crate::bindings::reader::blockhouse::format::types::Access as WitAccess;
use crate::bindings::reader::exports::blockhouse::format::reader::ImageInfo;
use crate::bindings::snapshots::SnapshotAbility;
use crate::direct::{refuse_odd_end, refuse_shared_pages};
use crate::grants::{GrantReport, Grants, Sha256Digest, absolute_name};
use crate::host::{Identity, OpenFile, SharedFiles, State, Unshared};
use crate::instance::Instance;
use crate::layer::{ComponentLayer, Incarnation, Revival};
use crate::limits::{Limits, OUT_OF_FILES};
use crate::locks::{self, LockMode};
use crate::maintenance::{each_size, resize};
use crate::pin::Pin;
use crate::policy::{GRANT_IS_READ_ONLY, NOT_GRANTED};
use crate::regular;
use crate::restart::{Backoff, Held, Now, Restart, monotonic};
use crate::sandbox::{Plugin, PluginKind, Sandbox, hex};
use crate::tally::Tally;
use crate::text::clean;

/// Components by the name of the format they serve. Names are what operators write after `--format`
/// and what images declare for their backing files.
///
/// A component that was added as bytes is compiled when an image first needs it.
#[derive(Clone, Debug, Default)]
pub struct Formats {
    sources: BTreeMap<String, Arc<Source>>,
    /// The formats that may be used at all, and who says so.
    only: Option<(BTreeSet<String>, String)>,
    /// The components that may serve a format, and who says so.
    required: BTreeMap<String, (BTreeSet<String>, String)>,
}

#[derive(Debug)]
struct Source {
    name: String,
    bytes: Cow<'static, [u8]>,
    /// SHA-256 of the bytes.
    digest: OnceLock<String>,
    loaded: OnceLock<Plugin>,
}

impl Source {
    fn digest(&self) -> &str {
        self.digest.get_or_init(|| hex(&Sha256::digest(&self.bytes)))
    }
}

impl Formats {
    /// No formats.
    pub fn new() -> Self {
        Self::default()
    }

    /// Serves `format` with a loaded component, instead of what served it before.
    pub fn add(&mut self, format: impl Into<String>, plugin: Plugin) {
        let name = plugin.name().to_owned();
        let source =
            Source { name, bytes: Cow::Borrowed(&[]), digest: OnceLock::new(), loaded: OnceLock::from(plugin) };
        self.sources.insert(format.into(), Arc::new(source));
    }

    /// Serves `format` with the component in `bytes`, instead of what served it before. `name` is for
    /// messages.
    ///
    /// A component that is part of the program (`&'static [u8]`) is trusted not to harm the compiler, and is always
    /// compiled in this process; another one by the sandbox's [`Compiler`](crate::Compiler).
    pub fn add_bytes(
        &mut self,
        format: impl Into<String>,
        name: impl Into<String>,
        bytes: impl Into<Cow<'static, [u8]>>,
    ) {
        let (name, bytes) = (name.into(), bytes.into());
        let source = Source { name, bytes, digest: OnceLock::new(), loaded: OnceLock::new() };
        self.sources.insert(format.into(), Arc::new(source));
    }

    /// The names of the formats, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.sources.keys().map(String::as_str)
    }

    /// Refuses all formats but these. `by` is who says so, for messages: `the policy p.toml`.
    pub fn only(&mut self, formats: impl IntoIterator<Item = String>, by: impl Into<String>) {
        self.only = Some((formats.into_iter().collect(), by.into()));
    }

    /// Has `format` be served by a component with one of these digests, or not at all. `by` is who says so.
    pub fn require(&mut self, format: &str, digests: impl IntoIterator<Item = Sha256Digest>, by: impl Into<String>) {
        let digests = digests.into_iter().map(|digest| digest.to_string()).collect();
        self.required.insert(format.to_owned(), (digests, by.into()));
    }

    /// Whether a component with this digest may serve a format.
    ///
    /// # Errors
    /// [`Denied`](ErrorKind::Denied) if not, with who says so.
    pub fn check(&self, format: &str, digest: &str) -> Result<()> {
        let format_text = clean(format, 64);
        let denied = |why: String| Err(Error::new(ErrorKind::Denied, why));
        if let Some((only, by)) = &self.only
            && !only.contains(format)
        {
            let allowed = only.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
            return denied(format!("{by} does not allow the format {format_text:?}; it allows: {allowed}"));
        }
        if let Some((required, by)) = self.required.get(format)
            && !required.contains(digest)
        {
            return denied(format!("{by} does not allow the component for {format_text} with the sha256 {digest}"));
        }
        Ok(())
    }

    /// Compiles what the sandbox's code cache lacks of the components that are part of the program and may be used
    /// ([`check`](Self::check)), and keeps it there. Whoever then gives up the right to write to the cache
    /// ([`Sandbox::close_code_cache`]) finds them all the same at the next start.
    pub fn keep_own(&self, sandbox: &Sandbox) {
        for (format, source) in &self.sources {
            if let Cow::Borrowed(bytes) = &source.bytes
                && source.loaded.get().is_none()
                && self.check(format, source.digest()).is_ok()
            {
                sandbox.keep_own(&source.name, bytes, source.digest());
            }
        }
    }

    /// The component that serves `format`, compiled now if it was not yet.
    ///
    /// # Errors
    /// [`Unsupported`](ErrorKind::Unsupported) if no component serves the format; what
    /// [`check`](Self::check) and [`Sandbox::load`] answer.
    pub fn load(&self, sandbox: &Sandbox, format: &str) -> Result<Plugin> {
        let Some(source) = self.sources.get(format) else {
            let known = self.sources.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
            let known = if known.is_empty() { "none" } else { &known };
            let why = format!("no component serves the format {:?}; there is: {known}", clean(format, 64));
            return Err(Error::new(ErrorKind::Unsupported, why));
        };
        if let Some(plugin) = source.loaded.get() {
            self.check(format, plugin.digest())?;
            return Ok(plugin.clone());
        }
        self.check(format, source.digest())?;
        let plugin = match &source.bytes {
            Cow::Borrowed(bytes) => sandbox.load_own(&source.name, bytes),
            Cow::Owned(bytes) => sandbox.load(&source.name, bytes),
        }?;
        Ok(source.loaded.get_or_init(|| plugin).clone())
    }
}

/// What to open, and how.
#[derive(Clone, Debug)]
pub struct OpenRequest {
    /// The image. Opened by the host with its own rights: this path comes from the operator.
    pub path: PathBuf,
    /// The format of the image, as the operator states it. Never guessed.
    pub format: String,
    /// Read-write makes the top layer writable, if its format can. Backing files are never written.
    pub access: Access,
    /// Read a snapshot inside the image instead of its current state: id, or name.
    pub snapshot: Option<String>,
    /// Whether the chain below the image is opened as well.
    pub below: Below,
    /// Memory bounds of the disk.
    pub disk: DiskOptions,
}

impl OpenRequest {
    /// A request to open `path` read-only.
    pub fn new(path: impl Into<PathBuf>, format: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            format: format.into(),
            access: Access::ReadOnly,
            snapshot: None,
            below: Below::Follow,
            disk: DiskOptions::default(),
        }
    }
}

/// What becomes of the backing file that an image names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Below {
    /// It is opened, and so is what it names.
    #[default]
    Follow,
    /// It is left closed after its image was connected to it: the disk has one layer, and what is not in
    /// that reads as zero.
    Leave,
}

/// A name and a value that a component reports about an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fact {
    /// The name.
    pub name: String,
    /// The value.
    pub value: String,
}

/// A reference to a backing file, as it stands in the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BackingReference {
    /// The name in the image.
    pub name: String,
    /// The format that the image declares for it.
    pub format: Option<String>,
}

/// A snapshot inside an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SnapshotReport {
    /// The id in the image.
    pub id: String,
    /// The name that a person gave.
    pub name: String,
    /// Size of the disk then, in bytes.
    pub virtual_size_bytes: u64,
    /// Size of the saved machine state in bytes.
    pub vm_state_bytes: u64,
    /// When it was taken, in seconds since 1970-01-01 UTC.
    pub created_at_seconds: u64,
}

/// One layer of a chain, for people and programs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LayerReport {
    /// The absolute path of the image.
    pub image: String,
    /// The declared format.
    pub format: String,
    /// The component that serves it.
    pub component: String,
    /// Its SHA-256.
    pub component_sha256: String,
    /// Size of the layer in bytes.
    pub virtual_size_bytes: u64,
    /// The allocation unit in bytes, 0 if the format has none.
    pub cluster_size_bytes: u32,
    /// What the component says about the image.
    pub facts: Vec<Fact>,
    /// Snapshots inside the image; empty where the format has none.
    pub snapshots: Vec<SnapshotReport>,
    /// The backing file that the image names.
    pub backing: Option<BackingReference>,
    /// Further files that the image names.
    pub files: Vec<String>,
    /// What the component tried to open, allowed or denied, in order.
    pub opens: Vec<OpenEvent>,
    /// The path of the backing file that was opened, and its identity: device and inode.
    #[serde(skip)]
    pub backing_file: Option<(String, FileIdentity)>,
}

/// A chain as far as it could be opened.
#[derive(Clone, Debug, Serialize)]
pub struct ChainReport {
    /// The layers, the top first.
    pub layers: Vec<LayerReport>,
    /// The paths that are granted.
    pub grants: Vec<String>,
    /// The grants in force, in detail.
    pub granted: Vec<GrantReport>,
}

/// An opened disk, and what there is to know about it.
#[derive(Debug)]
pub struct OpenedDisk {
    /// The disk.
    pub disk: Disk,
    /// Its layers.
    pub report: ChainReport,
}

/// Opens disks: a sandbox, the formats it may use, and what images may refer to.
#[derive(Clone, Debug)]
pub struct Opener {
    sandbox: Sandbox,
    formats: Formats,
    grants: Grants,
    locks: LockMode,
    direct: bool,
    audit: Audit,
    restart: Restart,
    now: Clock,
    tally: Arc<Tally>,
}

/// A clock that can be printed.
#[derive(Clone)]
struct Clock(Now);

impl std::fmt::Debug for Clock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Clock")
    }
}

/// What the next layer is made of.
struct Next {
    file: File,
    name: String,
    format: String,
    access: Access,
    snapshot: Option<String>,
    /// What it is pinned by.
    pin: Option<Arc<Pin>>,
}

/// An image as it is handed to an instance.
struct Hand {
    file: File,
    name: String,
    access: Access,
    pin: Option<Arc<Pin>>,
}

#[derive(Default)]
struct Chain {
    layers: Vec<Arc<dyn Layer>>,
    /// The top layer, if it is to be written by its component.
    writable: Option<Arc<ComponentLayer>>,
    reports: Vec<LayerReport>,
    /// Identity of each layer's file (device, inode), to find loops.
    seen: HashMap<(u64, u64), String>,
}

impl Opener {
    /// An opener without grants: images that refer to nothing open.
    pub fn new(sandbox: &Sandbox, formats: Formats) -> Self {
        Self {
            sandbox: sandbox.clone(),
            formats,
            grants: Grants::new(),
            locks: LockMode::Enforce,
            direct: false,
            audit: Audit::new(),
            restart: Restart::default(),
            now: Clock(monotonic()),
            tally: Arc::default(),
        }
    }

    /// Sets what images may refer to.
    #[must_use]
    pub fn grants(self, grants: Grants) -> Self {
        Self { grants, ..self }
    }

    /// Sets whether image locks are set and respected. [`LockMode::Off`] is for looking at images that are in
    /// use, read-only; it has no effect on what is opened for writing.
    #[must_use]
    pub fn locks(self, locks: LockMode) -> Self {
        Self { locks, ..self }
    }

    /// Sets whether the bytes of disks are read and written past the page cache (`O_DIRECT`). Files that cannot
    /// be used like that are refused, and so are images to be written whose clusters are smaller than a page, and
    /// raw ones that end inside of a block. Components read and write metadata through the page cache all the same.
    #[must_use]
    pub fn direct(self, direct: bool) -> Self {
        Self { direct, ..self }
    }

    /// Sets where audit events go.
    #[must_use]
    pub fn audit(self, audit: Audit) -> Self {
        Self { audit, ..self }
    }

    /// Sets how components that break down are started again.
    #[must_use]
    pub fn restart(self, restart: Restart) -> Self {
        Self { restart, ..self }
    }

    /// Counts the calls of components there, for everything that is opened.
    #[must_use]
    pub fn tally(self, tally: Arc<Tally>) -> Self {
        Self { tally, ..self }
    }

    /// Sets the clock by which they are, in place of the system's: for tests.
    #[must_use]
    pub fn restart_clock(self, now: Now) -> Self {
        Self { now: Clock(now), ..self }
    }

    /// Opens an image and its whole chain.
    ///
    /// # Errors
    /// The first thing that went wrong, naming the image of the chain that it concerns.
    pub fn open(&self, request: &OpenRequest) -> Result<OpenedDisk> {
        let mut chain = Chain::default();
        self.open_chain(request, &mut chain, false)?;
        // Only now: an image whose chain does not open is not touched.
        if let Some(layer) = chain.writable {
            if self.direct {
                refuse_shared_pages(&*layer)?;
            }
            layer.begin()?;
        } else if request.access == Access::ReadWrite
            && let Some(top) = chain.layers.first()
        {
            refuse_odd_end(&**top, top.info().virtual_size)?;
        }
        let options = DiskOptions { writable: request.access == Access::ReadWrite, ..request.disk.clone() };
        let disk = Disk::new(chain.layers, options)?;
        Ok(OpenedDisk { disk, report: self.report(chain.reports) })
    }

    /// Describes an image and its chain as far as they can be opened, with snapshots, and says what
    /// stopped it, if anything did.
    pub fn describe(&self, request: &OpenRequest) -> (ChainReport, Option<Error>) {
        let mut chain = Chain::default();
        let error = self.open_chain(request, &mut chain, true).err();
        (self.report(chain.reports), error)
    }

    fn report(&self, layers: Vec<LayerReport>) -> ChainReport {
        ChainReport { layers, grants: self.grants.paths(), granted: self.grants.list() }
    }

    fn open_chain(&self, request: &OpenRequest, chain: &mut Chain, describe: bool) -> Result<()> {
        let name = absolute_name(&request.path)?;
        let mut next = Some(Next {
            file: open_image(&request.path, request.access, self.locks).map_err(|error| error.on_image(&*name))?,
            name,
            format: request.format.clone(),
            access: request.access,
            snapshot: request.snapshot.clone(),
            pin: None,
        });
        while let Some(image) = next {
            let name = image.name.clone();
            next = self.open_layer(image, chain, describe).map_err(|error| error.on_image(name))?;
            if let (Some(below), Some(report)) = (&next, chain.reports.last_mut()) {
                let identity = regular::identity(&below.file).map_err(|error| {
                    Error::new(ErrorKind::Storage, format!("cannot look at the image: {error}"))
                        .with_source(error)
                        .on_image(&*below.name)
                })?;
                report.backing_file = Some((below.name.clone(), identity));
            }
            if request.below == Below::Leave {
                break;
            }
        }
        Ok(())
    }

    /// Opens one layer, adds it to the chain, and returns its backing file.
    fn open_layer(&self, image: Next, chain: &mut Chain, describe: bool) -> Result<Option<Next>> {
        let limits = self.sandbox.shared_limits();
        if chain.layers.len() >= limits.chain_depth {
            let why = format!("the backing chain has more than {} layers", limits.chain_depth);
            return Err(Error::new(ErrorKind::Limit, why));
        }
        let storage = |error: std::io::Error| {
            Error::new(ErrorKind::Storage, format!("cannot look at the image: {error}")).with_source(error)
        };
        let metadata = image.file.metadata().map_err(storage)?;
        if let Some(before) = chain.seen.insert((metadata.dev(), metadata.ino()), image.name.clone()) {
            let why = format!("the backing chain is a loop: it comes back to {before}");
            return Err(Error::new(ErrorKind::Corrupt, why));
        }

        if image.access == Access::ReadWrite && image.snapshot.is_some() {
            let why = "a snapshot inside an image can only be read; open it read-only (readonly=on)";
            return Err(Error::new(ErrorKind::Unsupported, why));
        }
        let plugin = &self.formats.load(&self.sandbox, &image.format)?;
        let depth = u32::try_from(chain.layers.len()).unwrap_or(u32::MAX);
        let hand = Hand { file: image.file, name: image.name.clone(), access: image.access, pin: image.pin.clone() };
        let started = self.start_layer(plugin, hand, &image.format, depth, None)?;
        let Started { instance, handle, shared, held, file: held_image, events } = started;

        let info = self.open_format(&instance, handle, &image.name, image.access)?;

        let text = |text: &str| clean(text, limits.text_bytes);
        let mut report = LayerReport {
            image: image.name.clone(),
            format: image.format.clone(),
            component: plugin.name().to_owned(),
            component_sha256: plugin.digest().to_owned(),
            virtual_size_bytes: info.virtual_size_bytes,
            cluster_size_bytes: info.cluster_size_bytes,
            facts: info.facts.iter().map(|fact| Fact { name: text(&fact.name), value: text(&fact.value) }).collect(),
            snapshots: Vec::new(),
            backing: info.backing.as_ref().map(|backing| BackingReference {
                name: text(&backing.name),
                format: backing.format.as_deref().map(text),
            }),
            files: info.files.iter().map(|name| text(name)).collect(),
            opens: Vec::new(),
            backing_file: None,
        };
        // From here on the layer is in the report, whatever happens.
        let connected = (|| {
            let mut virtual_size = info.virtual_size_bytes;
            if describe {
                report.snapshots = list_snapshots(plugin, &instance, limits.description_entries, limits.text_bytes)?;
            }
            if let Some(id) = &image.snapshot {
                virtual_size = select_snapshot(plugin, &instance, &image.format, id)?;
                report.virtual_size_bytes = virtual_size;
            }
            // Refused before anything is opened: a missing format is an invitation to guess.
            if let Some(backing) = &report.backing
                && backing.format.is_none()
            {
                let why = format!(
                    "the image names the backing file {:?} without its format, and formats are never guessed",
                    backing.name
                );
                let remedy = Remedy::StateBackingFormat { backing: backing.name.clone() };
                return Err(Error::new(ErrorKind::Denied, why).with_remedy(remedy));
            }
            let backing = instance
                .call("connect", |call| call.format.blockhouse_format_reader().call_connect(call.store))
                .map_err(|error| {
                    let unshared = instance.with_state(|state| state.unshared.take()).ok().flatten();
                    explain_refusal(error, &events.lock().unwrap_or_else(PoisonError::into_inner), unshared)
                })?;
            Ok((virtual_size, backing))
        })();
        report.opens = std::mem::take(&mut *events.lock().unwrap_or_else(PoisonError::into_inner));
        chain.reports.push(report);
        let (virtual_size, backing) = connected?;

        let described = Described::new(&info, virtual_size);
        let mut backing_file = None;
        let next = match (backing, info.backing) {
            (Some(handle), Some(reference)) => {
                let OpenFile { file, path, pin, .. } = instance
                    .with_state(|state| state.take_file(handle))?
                    .ok_or_else(|| instance.condemn("`connect` returned something that is not a file it opened"))?;
                let file = match Arc::try_unwrap(file) {
                    Ok(file) => file,
                    Err(shared) => shared.try_clone().map_err(storage)?,
                };
                backing_file = Some(regular::identity(&file).map_err(storage)?);
                // The host never opens a path that came out of an image: `file` is what the component
                // opened through its grants, `path` is the host's own record of that.
                let format = reference.format.unwrap_or_default();
                Some(Next { file, name: path, format, access: Access::ReadOnly, snapshot: None, pin })
            }
            (None, None) => None,
            (Some(_), None) => {
                return Err(instance.condemn("`connect` returned a backing file that `open` did not report"));
            }
            (None, Some(_)) => {
                return Err(instance.condemn("`connect` did not return the backing file that `open` reported"));
            }
        };
        let mut writer = None;
        if image.access == Access::ReadWrite && !info.overwritable {
            if !plugin.inspection().exports_ability("writer") {
                let why = format!(
                    "the component for {} cannot write yet; open the image read-only (readonly=on)",
                    image.format
                );
                return Err(Error::new(ErrorKind::Unsupported, why));
            }
            writer = Some(instance.writer()?);
        }
        let packer = match &writer {
            Some(_) if plugin.inspection().exports_ability("packer") => Some(instance.packer()?),
            _ => None,
        };
        let begins = writer.is_some();
        let again = Arc::new(Again {
            opener: self.clone(),
            plugin: plugin.clone(),
            image: held_image,
            name: image.name.clone(),
            format: image.format.clone(),
            access: image.access,
            pin: image.pin,
            depth,
            snapshot: image.snapshot,
            described: Mutex::new(described),
            backing_file,
            writes: writer.is_some(),
            packs: packer.is_some(),
            shared: Arc::clone(&shared),
            held: Arc::clone(&held),
        });
        let grows = image.access == Access::ReadWrite && plugin.inspection().exports_ability("resizer");
        let grow = grows.then(|| {
            let again = Arc::clone(&again);
            Box::new(move |size, below| again.grow(size, below)) as _
        });
        let revival = Revival {
            start: Box::new(move || again.start()),
            grow,
            held,
            backoff: Mutex::new(Backoff::new(self.restart.clone())),
            now: Arc::clone(&self.now.0),
            instances: self.sandbox.limits().instances,
        };
        let info = LayerInfo {
            name: image.name,
            format: image.format,
            virtual_size,
            cluster_size: info.cluster_size_bytes,
            overwritable: info.overwritable,
        };
        let first = Incarnation::new(instance, writer, packer);
        let layer = Arc::new(ComponentLayer::new(info, first, shared, revival));
        if begins {
            chain.writable = Some(Arc::clone(&layer));
        }
        chain.layers.push(layer);
        Ok(next)
    }
}

/// What an image is, as far as the layers above and the disk depend on it.
#[derive(Debug, PartialEq, Eq)]
struct Described {
    /// Of the image, and of the snapshot in its place.
    sizes: (u64, u64),
    cluster_size: u32,
    overwritable: bool,
    backing: Option<(String, Option<String>)>,
}

impl Described {
    fn new(info: &ImageInfo, virtual_size: u64) -> Self {
        Self {
            sizes: (info.virtual_size_bytes, virtual_size),
            cluster_size: info.cluster_size_bytes,
            overwritable: info.overwritable,
            backing: info.backing.as_ref().map(|backing| (backing.name.clone(), backing.format.clone())),
        }
    }
}

/// All that it takes to start a layer's component again.
struct Again {
    opener: Opener,
    plugin: Plugin,
    image: Arc<File>,
    name: String,
    format: String,
    access: Access,
    pin: Option<Arc<Pin>>,
    depth: u32,
    snapshot: Option<String>,
    described: Mutex<Described>,
    backing_file: Option<FileIdentity>,
    writes: bool,
    packs: bool,
    shared: SharedFiles,
    held: Arc<Mutex<Held>>,
}

impl Again {
    /// Changes the size of the image with instances that do nothing else, and that get the image as the open file
    /// that it is: its locks stay.
    fn grow(&self, size: u64, below: u64) -> (Result<()>, u64) {
        let size_now = || self.described.lock().unwrap_or_else(PoisonError::into_inner).sizes.0;
        let grown = each_size(size_now(), size, below, |next, hide_backing| {
            let file = self.image.try_clone().map_err(|error| {
                let why = format!("cannot look at the image: {error}");
                Error::new(ErrorKind::Storage, why).with_source(error)
            })?;
            let hand = Hand { file, name: self.name.clone(), access: self.access, pin: self.pin.clone() };
            // Nothing that it would register is of any use to anybody.
            let before = Some((SharedFiles::default(), Arc::clone(&self.held)));
            let started = self.opener.start_layer(&self.plugin, hand, &self.format, self.depth, before)?;
            self.opener.open_format(&started.instance, started.handle, &self.name, self.access)?;
            resize(&started.instance, next, hide_backing)?;
            self.described.lock().unwrap_or_else(PoisonError::into_inner).sizes = (next, next);
            Ok(())
        });
        (grown, size_now())
    }

    /// A new instance with the files of the old one, which says of the image what the old one said. Otherwise
    /// an error, of another kind than [`Component`](ErrorKind::Component) if it is not worth another attempt.
    fn start(&self) -> Result<Incarnation> {
        let storage = |error: std::io::Error| {
            Error::new(ErrorKind::Storage, format!("cannot look at the image: {error}")).with_source(error)
        };
        let file = self.image.try_clone().map_err(storage)?;
        let hand = Hand { file, name: self.name.clone(), access: self.access, pin: self.pin.clone() };
        let before = Some((Arc::clone(&self.shared), Arc::clone(&self.held)));
        let Started { instance, handle, .. } =
            self.opener.start_layer(&self.plugin, hand, &self.format, self.depth, before)?;
        let changed = |what: &str| {
            let why = format!("the component that was started again describes another image: {what}");
            Error::new(ErrorKind::Corrupt, why).on_image(&*self.name)
        };
        let info = self.opener.open_format(&instance, handle, &self.name, self.access)?;
        let size = match &self.snapshot {
            Some(id) => select_snapshot(&self.plugin, &instance, &self.format, id)?,
            None => info.virtual_size_bytes,
        };
        if Described::new(&info, size) != *self.described.lock().unwrap_or_else(PoisonError::into_inner) {
            return Err(changed("its size, its clusters or its backing file are not what they were"));
        }
        let backing = instance
            .call("connect", |call| call.format.blockhouse_format_reader().call_connect(call.store))?
            .map(|handle| instance.with_state(|state| state.take_file(handle)))
            .transpose()?;
        let backing_file = match backing {
            None => None,
            Some(Some(open)) => Some(regular::identity(&open.file).map_err(storage)?),
            Some(None) => return Err(instance.condemn("`connect` returned something that is not a file it opened")),
        };
        if backing_file != self.backing_file {
            return Err(changed("it has another backing file"));
        }
        let writer = self.writes.then(|| instance.writer()).transpose()?;
        let packer = self.packs.then(|| instance.packer()).transpose()?;
        let next = Incarnation::new(instance, writer, packer);
        next.begin().transpose()?;
        Ok(next)
    }
}

impl Opener {
    /// Starts an instance of `plugin` for an image that is no part of a chain, and hands it the open file.
    pub(crate) fn start(
        &self,
        plugin: &Plugin,
        file: File,
        name: &str,
        format: &str,
        access: Access,
    ) -> Result<Started> {
        self.start_layer(plugin, Hand { file, name: name.to_owned(), access, pin: None }, format, 0, None)
    }

    /// Starts an instance of `plugin` for the image at `depth` of a chain, and hands it the open file. `before` is
    /// what an instance before it registered and opened.
    fn start_layer(
        &self,
        plugin: &Plugin,
        image: Hand,
        format: &str,
        depth: u32,
        before: Option<(SharedFiles, Arc<Mutex<Held>>)>,
    ) -> Result<Started> {
        let PluginKind::Format(pre) = &plugin.kind else {
            let why = format!("it is a prober and cannot serve the format {format:?}");
            return Err(Error::new(ErrorKind::Component, why).on_image(plugin.name()));
        };
        let Hand { file, name, access, pin } = image;
        let component = plugin.digest().to_owned();
        let identity = Identity { image: name.clone(), depth, format: format.to_owned(), component };
        let limits = self.sandbox.shared_limits();
        let mut state = State::new(identity, limits, self.grants.clone(), self.locks, self.audit.clone());
        (state.access, state.direct) = (access, self.direct);
        let again = before.is_some();
        if let Some((shared, held)) = before {
            (state.shared, state.held) = (shared, held);
        } else {
            state.held.lock().unwrap_or_else(PoisonError::into_inner).last = self.restart.attempts == 0;
        }
        if self.direct && !again {
            regular::direct(&file, access == Access::ReadWrite).map_err(|error| {
                let why = format!("cannot be used with direct I/O, which was asked for: {error}");
                Error::new(ErrorKind::Unsupported, why).with_source(error).on_image(&*name)
            })?;
        }
        let shared = Arc::clone(&state.shared);
        let held = Arc::clone(&state.held);
        let events = Arc::clone(&state.events);
        let handle = state.add_file(file, name, access, pin).map_err(|error| {
            Error::new(ErrorKind::Component, "cannot hand the image to the component").with_source(error)
        })?;
        let file = state
            .file_of(&handle)
            .ok_or_else(|| Error::new(ErrorKind::Component, "cannot hand the image to the component"))?;
        let instance = Instance::start(&self.sandbox, pre, state, Arc::clone(&self.tally))?;
        Ok(Started { instance, handle, shared, held, file, events })
    }

    /// Makes the component read what the image says, and checks what it reports.
    pub(crate) fn open_format(
        &self,
        instance: &Instance,
        handle: Resource<Descriptor>,
        name: &str,
        access: Access,
    ) -> Result<ImageInfo> {
        let wit_access = match access {
            Access::ReadOnly => WitAccess::ReadOnly,
            Access::ReadWrite => WitAccess::ReadWrite,
        };
        let info = instance.call("open", |call| {
            call.format.blockhouse_format_reader().call_open(call.store, handle, name, wit_access)
        })?;
        check_info(&info, access).map_err(|why| instance.condemn(&why))?;
        check_length(&info, self.sandbox.limits())?;
        Ok(info)
    }

    pub(crate) fn sandbox(&self) -> &Sandbox {
        &self.sandbox
    }

    pub(crate) fn plugin(&self, format: &str) -> Result<Plugin> {
        self.formats.load(&self.sandbox, format)
    }

    pub(crate) fn lock_mode(&self) -> LockMode {
        self.locks
    }
}

/// An instance that holds its image and was not called yet.
pub(crate) struct Started {
    pub(crate) instance: Instance,
    pub(crate) handle: Resource<Descriptor>,
    shared: SharedFiles,
    held: Arc<Mutex<Held>>,
    /// The image.
    file: Arc<File>,
    events: Arc<Mutex<Vec<OpenEvent>>>,
}

/// Opens the image that the operator named. It may lie anywhere, and must be a regular file.
pub(crate) fn open_image(path: &Path, access: Access, locks: LockMode) -> Result<File> {
    let failed = |error: std::io::Error| {
        use std::io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem};
        let may_be_read = access == Access::ReadWrite && matches!(error.kind(), PermissionDenied | ReadOnlyFilesystem);
        Error::new(ErrorKind::Storage, format!("cannot open the image: {error}"))
            .with_remedy(may_be_read.then_some(Remedy::OpenReadOnly))
            .with_source(error)
    };
    let file = regular::open(path, access == Access::ReadWrite).map_err(failed)?;
    let file = file.map_err(|what| Error::new(ErrorKind::Invalid, format!("cannot open the image: {what}")))?;
    // A grant may be for the image of that name.
    regular::refuse_detour(path, &file)
        .map_err(|why| Error::new(ErrorKind::Invalid, format!("cannot open the image: {why}")))?;
    if locks == LockMode::Off && access == Access::ReadOnly {
        return Ok(file);
    }
    match locks::take(&file, access, locks).map_err(failed)? {
        None => Ok(file),
        Some(why) => Err(Error::new(
            ErrorKind::Storage,
            format!("the image is in use: {why}. Stop the machine or the tool that has it open, then try again"),
        )
        .with_remedy((access == Access::ReadOnly).then_some(Remedy::Share))),
    }
}

/// Checks what `open` reported against `wit/reader.wit`.
fn check_info(info: &ImageInfo, access: Access) -> Result<(), String> {
    const LARGEST: u64 = (1 << 63) - 512;
    let size = info.virtual_size_bytes;
    if !size.is_multiple_of(512) || size > LARGEST {
        return Err(format!("`open` reported a virtual size of {size} bytes, not a multiple of 512 up to 2^63 - 512"));
    }
    let cluster = info.cluster_size_bytes;
    if cluster != 0 && !cluster.is_power_of_two() {
        return Err(format!("`open` reported a cluster size of {cluster} bytes, not a power of two"));
    }
    if info.overwritable && access == Access::ReadOnly {
        return Err("`open` reported an image as overwritable that was opened read-only".to_owned());
    }
    Ok(())
}

/// What `open` reported is bounded, whoever wants it to be long: an image may, as well as a component.
fn check_length(info: &ImageInfo, limits: &Limits) -> Result<()> {
    let over = |why: String| Err(Error::new(ErrorKind::Limit, why));
    let entries = limits.description_entries;
    if info.facts.len() > entries || info.files.len() > entries {
        return over(format!("the image has more than {entries} facts or further files"));
    }
    let text = limits.text_bytes;
    let names = info.files.iter().chain(info.backing.iter().map(|backing| &backing.name));
    let mut names = names.chain(info.backing.iter().filter_map(|backing| backing.format.as_ref()));
    if let Some(name) = names.find(|name| name.len() > text) {
        let length = name.len();
        return over(format!("the image names another file, or its format, with {length} bytes; {text} are read"));
    }
    Ok(())
}

/// Adds the host's own record of what it refused, an open or a file for its own I/O, and what to do about it.
fn explain_refusal(error: Error, events: &[OpenEvent], unshared: Option<Unshared>) -> Error {
    let refused = events.iter().rev().find(|event| event.outcome == Outcome::Denied);
    let (kind, path, reason, remedy) = match (error.kind(), refused, &unshared) {
        (ErrorKind::Denied, Some(event), _) => {
            let reason = event.reason.as_deref().unwrap_or("refused");
            let writes = event.access == "read-write";
            let remedy = (reason == NOT_GRANTED || writes && reason == GRANT_IS_READ_ONLY).then(|| Remedy::Grant {
                path: event.path.clone(),
                access: if writes { Access::ReadWrite } else { Access::ReadOnly },
            });
            let kind = if reason == OUT_OF_FILES { ErrorKind::Limit } else { ErrorKind::Denied };
            (kind, &event.path, reason, remedy)
        }
        (ErrorKind::Denied | ErrorKind::Invalid, _, Some(file)) => (file.kind, &file.path, file.reason.as_str(), None),
        _ => return error,
    };
    let why = format!("{}; the host refused {path:?}: {reason}", error.message());
    let explained = Error::new(kind, why).with_remedy(remedy);
    match error.image() {
        Some(image) => explained.on_image(image),
        None => explained,
    }
}

fn has_snapshots(plugin: &Plugin) -> bool {
    plugin.inspection().exports_ability("snapshots")
}

fn list_snapshots(plugin: &Plugin, instance: &Instance, entries: usize, text: usize) -> Result<Vec<SnapshotReport>> {
    if !has_snapshots(plugin) {
        return Ok(Vec::new());
    }
    let list = instance.call("list-snapshots", |call| {
        let ability = SnapshotAbility::new(&mut *call.store, call.instance)?;
        ability.blockhouse_format_snapshots().call_list_snapshots(call.store)
    })?;
    if list.len() > entries {
        return Err(Error::new(ErrorKind::Limit, format!("the image has more than {entries} snapshots")));
    }
    let text = |value: &str| clean(value, text);
    Ok(list
        .into_iter()
        .map(|snapshot| SnapshotReport {
            id: text(&snapshot.id),
            name: text(&snapshot.name),
            virtual_size_bytes: snapshot.virtual_size_bytes,
            vm_state_bytes: snapshot.vm_state_bytes,
            created_at_seconds: snapshot.created_at_seconds,
        })
        .collect())
}

fn select_snapshot(plugin: &Plugin, instance: &Instance, format: &str, id: &str) -> Result<u64> {
    if !has_snapshots(plugin) {
        let why = format!("the component for {format} does not read snapshots, and {id:?} was asked for");
        return Err(Error::new(ErrorKind::Unsupported, why));
    }
    let size = instance.call("select-snapshot", |call| {
        let ability = SnapshotAbility::new(&mut *call.store, call.instance)?;
        ability.blockhouse_format_snapshots().call_select_snapshot(call.store, id)
    })?;
    if size.is_multiple_of(512) && i64::try_from(size).is_ok() {
        Ok(size)
    } else {
        Err(instance.condemn(&format!("`select-snapshot` returned a virtual size of {size} bytes")))
    }
}
