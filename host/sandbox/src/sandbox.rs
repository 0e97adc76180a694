//! The engine that runs components, and loading them.

use std::fmt;
use std::io::Read;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use blockhouse_block::{Error, ErrorKind, Result};
use sha2::{Digest, Sha256};
use wasmtime::component::{Component, InstancePre};
use wasmtime::{Config, Engine, OptLevel, WasmBacktraceDetails};

use crate::authority::Authority;
use crate::bindings::checker::CheckerAbilityPre;
use crate::bindings::creator::CreatorAbilityPre;
use crate::bindings::packer::PackerAbilityPre;
use crate::bindings::prober::ProberOnlyPre;
use crate::bindings::reader::ReadOnlyFormatPre;
use crate::bindings::rebaser::RebaserAbilityPre;
use crate::bindings::resizer::ResizerAbilityPre;
use crate::bindings::snapshot_editor::SnapshotEditorAbilityPre;
use crate::bindings::snapshots::SnapshotAbilityPre;
use crate::bindings::writer::WriterAbilityPre;
use crate::cache::CodeCache;
use crate::clock::Clock;
use crate::compiler::Compiler;
use crate::host::{State, read_only_linker, read_write_linker};
use crate::inspect::{Inspection, inspect};
use crate::limits::Limits;
use crate::regular;
use crate::surface::{Surface, Unreadable};
use crate::text::clean;
use crate::{code, compiled};

/// What is wrong with bytes that are no component, or one with features that are switched off.
pub(crate) const NO_COMPONENT: &str = "it is not a WebAssembly component that this host can run";

/// Bytes of what the engine says that a message has.
const ENGINE_TEXT: usize = 2000;

/// Runs components under one set of [`Limits`]. A clone is the same sandbox.
///
/// A thread keeps the time while a component runs, so that calls have a time limit; it sleeps otherwise. It is started
/// by the first instance of a component: loading some starts no thread.
#[derive(Clone)]
pub struct Sandbox {
    engine: Engine,
    limits: Arc<Limits>,
    /// Started by the first who needs it.
    clock: Arc<Mutex<Option<Arc<Clock>>>>,
    cache: Option<Arc<CodeCache>>,
    compiler: Option<Arc<dyn Compiler>>,
}

impl fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sandbox").field("limits", &self.limits).finish_non_exhaustive()
    }
}

impl Sandbox {
    /// A sandbox with these limits: the one place where they are set.
    ///
    /// # Errors
    /// [`Component`](ErrorKind::Component) if the engine cannot run on this machine.
    pub fn new(limits: Limits) -> Result<Self> {
        let engine = engine(&limits)?;
        Ok(Self { engine, limits: Arc::new(limits), clock: Arc::default(), cache: None, compiler: None })
    }

    /// Keeps compiled components in `directory`, which is made if it does not exist, and takes them from there
    /// at the next start. Compiled code runs with the rights of this process, so the directory must belong to
    /// its user alone (mode 700).
    ///
    /// # Errors
    /// [`Denied`](ErrorKind::Denied) if somebody else could write to it;
    /// [`Storage`](ErrorKind::Storage) if it cannot be made or opened.
    pub fn code_cache(self, directory: &Path) -> Result<Self> {
        Ok(Self { cache: Some(Arc::new(CodeCache::open(directory)?)), ..self })
    }

    /// Makes the directory for [`code_cache`](Self::code_cache) beforehand: for a program that gives up the right
    /// to make directories.
    ///
    /// # Errors
    /// [`Storage`](ErrorKind::Storage) if it cannot be made.
    pub fn make_code_cache(directory: &Path) -> Result<()> {
        CodeCache::make(directory)
    }

    /// Adds nothing to the code cache from here on; what is in it is still used. For a program that gives up the right
    /// to write there before it looks at an image, so that whoever takes it over then cannot leave code for the next
    /// start. Before that, [`Formats::keep_own`](crate::Formats::keep_own) fills the cache.
    pub fn close_code_cache(&self) {
        if let Some(cache) = &self.cache {
            cache.close();
        }
    }

    /// Has components of strangers compiled by `compiler`: in a process of its own, for example
    /// ([`CompilerProcess`](crate::CompilerProcess)). Without this they are compiled in this process, where nothing
    /// bounds the time and memory that it takes.
    #[must_use]
    pub fn compiler(self, compiler: Arc<dyn Compiler>) -> Self {
        Self { compiler: Some(compiler), ..self }
    }

    /// The limits in force.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    pub(crate) fn shared_limits(&self) -> Arc<Limits> {
        Arc::clone(&self.limits)
    }

    /// Compiles a component from its bytes, and refuses it if it imports anything that its world does
    /// not offer: before it is compiled. `name` is for messages: a path, or `built-in qcow2`.
    ///
    /// # Errors
    /// [`Component`](ErrorKind::Component): not a component, or not one of Blockhouse's worlds; the
    /// message names the first imports that are too many. [`Limit`](ErrorKind::Limit): it is too large, has too many
    /// or too long names, or takes too much to compile.
    pub fn load(&self, name: &str, bytes: &[u8]) -> Result<Plugin> {
        self.load_by(self.compiler.as_deref(), name, bytes)
    }

    /// As [`load`](Self::load), for a component that is part of the program: compiled in this process.
    pub(crate) fn load_own(&self, name: &str, bytes: &[u8]) -> Result<Plugin> {
        self.load_by(None, name, bytes)
    }

    /// Sees that the code cache, if there is one, has the machine code of a component that is part of the program, and
    /// whose SHA-256 is `digest`. Whatever is wrong is said by who loads it.
    pub(crate) fn keep_own(&self, name: &str, bytes: &[u8], digest: &str) {
        if self.cache.as_ref().is_some_and(|cache| !cache.has(&self.engine, digest))
            && let Err(error) = self.load_own(name, bytes)
        {
            tracing::debug!(component = name, %error, "not compiled");
        }
    }

    fn load_by(&self, compiler: Option<&dyn Compiler>, name: &str, bytes: &[u8]) -> Result<Plugin> {
        let size = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        if size > self.limits.component_bytes {
            return Err(Error::new(
                ErrorKind::Limit,
                format!("the component has {size} bytes; the limit is {}", self.limits.component_bytes),
            )
            .on_image(name));
        }
        let inspection = Self::look(name, bytes)?;
        Self::refuse_without_world(name, &inspection)?;
        let component = self.compile(compiler, name, bytes, &inspection.sha256)?;
        self.link(name, &component, inspection)
    }

    /// Compiles a component into what [`load_precompiled`](Self::load_precompiled) takes from a file, for this
    /// machine and this version. It is refused as [`load`](Self::load) refuses it.
    ///
    /// # Errors
    /// As [`load_file`](Self::load_file).
    pub fn precompile(&self, path: &Path) -> Result<Vec<u8>> {
        let name = path.display().to_string();
        let bytes = self.read_component(path)?;
        let inspection = Self::look(&name, &bytes)?;
        Self::refuse_without_world(&name, &inspection)?;
        let component = self.compile(self.compiler.as_deref(), &name, &bytes, &inspection.sha256)?;
        let plugin = self.link(&name, &component, inspection)?;
        compiled::make(&self.engine, &component, plugin.digest(), bytes.len()).map_err(|error| {
            Error::new(ErrorKind::Component, format!("it cannot be compiled: {error}"))
                .with_source(error)
                .on_image(name)
        })
    }

    /// Takes a component that [`precompile`](Self::precompile) made from a file, which must be this user's and
    /// writable by nobody else. It is linked as [`load`](Self::load) does it, against the same functions.
    ///
    /// # Errors
    /// [`Denied`](ErrorKind::Denied) if somebody else could have written the file;
    /// [`Corrupt`](ErrorKind::Corrupt) if it is not whole; [`Unsupported`](ErrorKind::Unsupported) if it was made
    /// by another version or for another machine; else as [`load_file`](Self::load_file).
    ///
    /// # Safety
    /// The file must have been made by `precompile`. What is in it is not confined by this sandbox but run as
    /// it is, with all rights of the process; ownership and digest say that nobody changed it, not who made it.
    #[allow(unsafe_code)]
    pub unsafe fn load_precompiled(&self, path: &Path) -> Result<Plugin> {
        let name = path.display().to_string();
        let (about, whole) = compiled::open(&self.engine, path)?;
        // SAFETY: what the caller promises.
        let component = unsafe { compiled::component(&self.engine, &whole) }.map_err(|error| {
            Error::new(ErrorKind::Unsupported, format!("the compiled component is not used: {error:#}"))
                .on_image(name.as_str())
        })?;
        let surface = Surface::of_component(&self.engine, &component)
            .map_err(|error| unreadable(error).on_image(name.as_str()))?;
        let inspection = inspect(surface, about.component_sha256, about.component_bytes);
        Self::refuse_without_world(&name, &inspection)?;
        self.link(&name, &component, inspection)
    }

    /// What the bytes of a component say that it imports and exports. Compiles nothing, and takes bounded memory
    /// however the component was made (`surface.rs`).
    fn look(name: &str, bytes: &[u8]) -> Result<Inspection> {
        if compiled::is_compiled(bytes) {
            let why = "it is not a component but compiled from one, and would run outside of the sandbox. \
                       If you made it yourself, say so: --plugin FORMAT=compiled:FILE";
            return Err(Error::new(ErrorKind::Denied, why).on_image(name));
        }
        let surface = Surface::of_bytes(bytes).map_err(|error| unreadable(error).on_image(name))?;
        Ok(inspect(surface, hex(&Sha256::digest(bytes)), bytes.len()))
    }

    /// Refuses what fits no world, and says why.
    fn refuse_without_world(name: &str, inspection: &Inspection) -> Result<()> {
        inspection.refusal().map_or(Ok(()), |why| Err(Error::new(ErrorKind::Component, why).on_image(name)))
    }

    /// Sees that a component fits its world.
    fn link(&self, name: &str, component: &Component, inspection: Inspection) -> Result<Plugin> {
        let kind = match inspection.world {
            Some(Authority::Prober) => {
                let linker = wasmtime::component::Linker::<State>::new(&self.engine);
                linker.instantiate_pre(component).and_then(ProberOnlyPre::new).map(PluginKind::Prober)
            }
            Some(Authority::ReadOnly) => read_only_linker(&self.engine)
                .and_then(|linker| linker.instantiate_pre(component))
                .and_then(|pre| {
                    check_abilities(&inspection, &pre)?;
                    ReadOnlyFormatPre::new(pre)
                })
                .map(PluginKind::Format),
            Some(Authority::ReadWrite) => read_write_linker(&self.engine)
                .and_then(|linker| linker.instantiate_pre(component))
                .and_then(|pre| {
                    check_abilities(&inspection, &pre)?;
                    ReadOnlyFormatPre::new(pre)
                })
                .map(PluginKind::Format),
            None => Err(wasmtime::Error::msg("it fits no world")),
        };
        let kind = kind.map_err(|error| {
            Error::new(ErrorKind::Component, format!("it does not fit the contract: {}", said(&error))).on_image(name)
        })?;
        Ok(Plugin {
            name: name.into(),
            digest: inspection.sha256.clone().into(),
            inspection: Arc::new(inspection),
            kind,
        })
    }

    /// As [`load`](Self::load), from a file.
    ///
    /// # Errors
    /// [`Storage`](ErrorKind::Storage) if it cannot be read; else as `load`.
    pub fn load_file(&self, path: &Path) -> Result<Plugin> {
        let name = path.display().to_string();
        let bytes = self.read_component(path)?;
        self.load(&name, &bytes)
    }

    /// Says what a component imports and exports, and whether that fits a world. Runs nothing of it. One that fits
    /// a world is compiled, too, so that what is said of it holds.
    ///
    /// # Errors
    /// [`Component`](ErrorKind::Component) if the bytes are not a component, or cannot be compiled;
    /// [`Limit`](ErrorKind::Limit) if that takes too much, or it has too many or too long names.
    pub fn inspect(&self, name: &str, bytes: &[u8]) -> Result<Inspection> {
        let inspection = Self::look(name, bytes)?;
        if inspection.world.is_some() {
            self.compile(self.compiler.as_deref(), name, bytes, &inspection.sha256)?;
        }
        Ok(inspection)
    }

    /// As [`inspect`](Self::inspect), from a file.
    ///
    /// # Errors
    /// [`Storage`](ErrorKind::Storage) if it cannot be read; else as `inspect`.
    pub fn inspect_file(&self, path: &Path) -> Result<Inspection> {
        let bytes = self.read_component(path)?;
        self.inspect(&path.display().to_string(), &bytes)
    }

    /// The bytes of a component file, of which there are at most [`Limits::component_bytes`] and one more.
    ///
    /// # Errors
    /// [`Storage`](ErrorKind::Storage) if it cannot be read; [`Invalid`](ErrorKind::Invalid) if it is no regular
    /// file.
    pub fn read_component(&self, path: &Path) -> Result<Vec<u8>> {
        let name = path.display().to_string();
        let fail = |error: std::io::Error| {
            Error::new(ErrorKind::Storage, format!("cannot read the component: {error}"))
                .with_source(error)
                .on_image(name.as_str())
        };
        let file = regular::open(path, false).map_err(fail)?.map_err(|what| {
            Error::new(ErrorKind::Invalid, format!("cannot read the component: {what}")).on_image(name.as_str())
        })?;
        let mut bytes = Vec::new();
        file.take(self.limits.component_bytes.saturating_add(1)).read_to_end(&mut bytes).map_err(fail)?;
        Ok(bytes)
    }

    /// The machine code of a component: kept from before, or made now.
    fn compile(&self, compiler: Option<&dyn Compiler>, name: &str, bytes: &[u8], sha256: &str) -> Result<Component> {
        if let Some(component) = self.cache.as_ref().and_then(|cache| cache.load(&self.engine, sha256)) {
            return Ok(component);
        }
        let component = match compiler {
            None => Component::from_binary(&self.engine, bytes),
            Some(compiler) => {
                let code = compiler.compile(name, bytes, &self.limits)?;
                if u64::try_from(code.len()).unwrap_or(u64::MAX) > self.limits.compiled_bytes {
                    let why = format!("it is more than {} bytes of machine code", self.limits.compiled_bytes);
                    return Err(Error::new(ErrorKind::Limit, why).on_image(name));
                }
                from_compiler(&self.engine, &code)
            }
        };
        let component = component.map_err(|error| {
            let why = format!("{NO_COMPONENT}: {}", said(&error));
            Error::new(ErrorKind::Component, why).with_source(error).on_image(name)
        })?;
        if let Some(cache) = &self.cache {
            cache.store(&self.engine, sha256, &component);
        }
        Ok(component)
    }

    pub(crate) fn clock(&self) -> Result<Arc<Clock>> {
        let mut clock = self.clock.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(clock) = &*clock {
            return Ok(Arc::clone(clock));
        }
        let started = Clock::start(&self.engine)
            .map_err(|error| Error::new(ErrorKind::Storage, "cannot start the clock thread").with_source(error))?;
        Ok(Arc::clone(clock.insert(Arc::new(started))))
    }

    pub(crate) fn engine(&self) -> &Engine {
        &self.engine
    }
}

/// What is said of a component whose surface cannot be read.
fn unreadable(error: Unreadable) -> Error {
    match error {
        Unreadable::Excess(why) => Error::new(ErrorKind::Limit, why),
        error => Error::new(ErrorKind::Component, format!("{NO_COMPONENT}: {error}")).with_source(error),
    }
}

/// What the engine says of a component, which may have names in it that are as long as a stranger made them.
fn said(error: &wasmtime::Error) -> String {
    clean(&format!("{error:#}"), ENGINE_TEXT)
}

/// The engine of a sandbox with these limits, and of the compiler that works for it.
pub(crate) fn engine(limits: &Limits) -> Result<Engine> {
    let mut config = Config::new();
    config
        .epoch_interruption(true)
        .max_wasm_stack(limits.stack_bytes)
        .cranelift_opt_level(OptLevel::Speed)
        .wasm_backtrace_details(WasmBacktraceDetails::Disable)
        // Nothing that the built-in formats or compilers' defaults do not need.
        .wasm_relaxed_simd(false)
        .wasm_memory64(false)
        .wasm_multi_memory(false)
        .wasm_tail_call(false);
    Engine::new(&config)
        .map_err(|error| Error::new(ErrorKind::Component, "cannot start the WebAssembly engine").with_source(error))
}

#[allow(unsafe_code)]
fn from_compiler(engine: &Engine, code: &[u8]) -> wasmtime::Result<Component> {
    // SAFETY: what a `Compiler` returns is what `compile_here` returned in a program of this version: the promise
    // of that trait. `compiler.rs` says who is believed, and what if the promise is broken.
    unsafe { code::deserialize(engine, code) }
}

/// Whether each ability that a component exports is the contract's.
fn check_abilities(inspection: &Inspection, pre: &InstancePre<State>) -> wasmtime::Result<()> {
    macro_rules! check {
        ($($name:literal: $pre:path),+ $(,)?) => {
            $(if inspection.exports_ability($name) {
                <$pre>::new(pre.clone())?;
            })+
        };
    }
    check!(
        "snapshots": SnapshotAbilityPre<State>,
        "writer": WriterAbilityPre<State>,
        "packer": PackerAbilityPre<State>,
        "creator": CreatorAbilityPre<State>,
        "checker": CheckerAbilityPre<State>,
        "resizer": ResizerAbilityPre<State>,
        "rebaser": RebaserAbilityPre<State>,
        "snapshot-editor": SnapshotEditorAbilityPre<State>,
    );
    Ok(())
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    bytes.iter().fold(String::with_capacity(64), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// A loaded component, ready to be instantiated. A clone is the same component.
#[derive(Clone)]
pub struct Plugin {
    pub(crate) name: Arc<str>,
    pub(crate) digest: Arc<str>,
    inspection: Arc<Inspection>,
    pub(crate) kind: PluginKind,
}

#[derive(Clone)]
pub(crate) enum PluginKind {
    Format(ReadOnlyFormatPre<State>),
    Prober(ProberOnlyPre<State>),
}

impl fmt::Debug for Plugin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Plugin").field("name", &self.name).field("digest", &self.digest).finish_non_exhaustive()
    }
}

impl Plugin {
    /// The name under which it was loaded.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The SHA-256 of its bytes, in hexadecimal.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// What it imports and exports.
    pub fn inspection(&self) -> &Inspection {
        &self.inspection
    }
}
