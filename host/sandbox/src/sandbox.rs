//! The engine that runs components, and loading them.

use std::fmt;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

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
use crate::compiled;
use crate::host::{State, read_only_linker, read_write_linker};
use crate::inspect::{Inspection, inspect};
use crate::limits::Limits;
use crate::regular;

/// Runs components under one set of [`Limits`]. A clone is the same sandbox.
///
/// A thread keeps the time while a component runs, so that calls have a time limit; it sleeps otherwise.
#[derive(Clone)]
pub struct Sandbox {
    engine: Engine,
    limits: Arc<Limits>,
    clock: Arc<Clock>,
    cache: Option<Arc<CodeCache>>,
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
        let engine = Engine::new(&config).map_err(|error| {
            Error::new(ErrorKind::Component, "cannot start the WebAssembly engine").with_source(error)
        })?;
        let clock = Clock::start(&engine)
            .map_err(|error| Error::new(ErrorKind::Storage, "cannot start the clock thread").with_source(error))?;
        Ok(Self { engine, limits: Arc::new(limits), clock: Arc::new(clock), cache: None })
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

    /// The limits in force.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    pub(crate) fn shared_limits(&self) -> Arc<Limits> {
        Arc::clone(&self.limits)
    }

    /// Compiles a component from its bytes, and refuses it if it imports anything that its world does
    /// not offer. `name` is for messages: a path, or `built-in qcow2`.
    ///
    /// # Errors
    /// [`Component`](ErrorKind::Component): not a component, or not one of Blockhouse's worlds; the
    /// message names every import that is too much.
    pub fn load(&self, name: &str, bytes: &[u8]) -> Result<Plugin> {
        let size = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        if size > self.limits.component_bytes {
            return Err(Error::new(
                ErrorKind::Limit,
                format!("the component has {size} bytes; the limit is {}", self.limits.component_bytes),
            )
            .on_image(name));
        }
        let (component, inspection) = self.compile(name, bytes)?;
        self.link(name, component, inspection)
    }

    /// Compiles a component into what [`load_precompiled`](Self::load_precompiled) takes from a file, for this
    /// machine and this version. It is refused as [`load`](Self::load) refuses it.
    ///
    /// # Errors
    /// As [`load_file`](Self::load_file).
    pub fn precompile(&self, path: &Path) -> Result<Vec<u8>> {
        let name = path.display().to_string();
        let bytes = self.read_component(path)?;
        let plugin = self.load(&name, &bytes)?;
        // From the cache, or once more.
        let (component, _) = self.compile(&name, &bytes)?;
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
        let inspection = inspect(&self.engine, &component, about.component_sha256, about.component_bytes);
        self.link(&name, component, inspection)
    }

    /// Sees that a component fits its world.
    fn link(&self, name: &str, component: Component, inspection: Inspection) -> Result<Plugin> {
        let refuse = |why: String| Err(Error::new(ErrorKind::Component, why).on_image(name));
        let kind = match inspection.world {
            Some(Authority::Prober) => {
                let linker = wasmtime::component::Linker::<State>::new(&self.engine);
                linker.instantiate_pre(&component).and_then(ProberOnlyPre::new).map(PluginKind::Prober)
            }
            Some(Authority::ReadOnly) => read_only_linker(&self.engine)
                .and_then(|linker| linker.instantiate_pre(&component))
                .and_then(|pre| {
                    check_abilities(&inspection, &pre)?;
                    ReadOnlyFormatPre::new(pre)
                })
                .map(PluginKind::Format),
            Some(Authority::ReadWrite) => read_write_linker(&self.engine)
                .and_then(|linker| linker.instantiate_pre(&component))
                .and_then(|pre| {
                    check_abilities(&inspection, &pre)?;
                    ReadOnlyFormatPre::new(pre)
                })
                .map(PluginKind::Format),
            None if inspection.outside.is_empty() => {
                return refuse(format!(
                    "it exports neither blockhouse:format/reader nor blockhouse:format/prober of contract {}; it exports: {}",
                    crate::CONTRACT_VERSION,
                    if inspection.exports.is_empty() { "nothing".to_owned() } else { inspection.exports.join(", ") }
                ));
            }
            None => {
                return refuse(format!(
                    "it imports what no world offers, and is not loaded: {}",
                    inspection.outside.join(", ")
                ));
            }
        };
        let kind = kind.map_err(|error| {
            Error::new(ErrorKind::Component, format!("it does not fit the contract: {error:#}")).on_image(name)
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

    /// Says what a component imports and exports, and whether that fits a world. Runs nothing of it.
    ///
    /// # Errors
    /// [`Component`](ErrorKind::Component) if the bytes are not a component.
    pub fn inspect(&self, name: &str, bytes: &[u8]) -> Result<Inspection> {
        self.compile(name, bytes).map(|(_, inspection)| inspection)
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
        let file = regular::open(path, false).map_err(fail)?.ok_or_else(|| {
            Error::new(ErrorKind::Invalid, "cannot read the component: it is not a regular file")
                .on_image(name.as_str())
        })?;
        let mut bytes = Vec::new();
        file.take(self.limits.component_bytes.saturating_add(1)).read_to_end(&mut bytes).map_err(fail)?;
        Ok(bytes)
    }

    fn compile(&self, name: &str, bytes: &[u8]) -> Result<(Component, Inspection)> {
        if compiled::is_compiled(bytes) {
            let why = "it is not a component but compiled from one, and would run outside of the sandbox. \
                       If you made it yourself, say so: --plugin FORMAT=compiled:FILE";
            return Err(Error::new(ErrorKind::Denied, why).on_image(name));
        }
        let digest = hex(&Sha256::digest(bytes));
        let kept = self.cache.as_ref().and_then(|cache| cache.load(&self.engine, &digest));
        let component = match kept {
            Some(component) => component,
            None => {
                let component = Component::from_binary(&self.engine, bytes).map_err(|error| {
                    Error::new(
                        ErrorKind::Component,
                        format!("it is not a WebAssembly component that this host can run: {error}"),
                    )
                    .with_source(error)
                    .on_image(name)
                })?;
                if let Some(cache) = &self.cache {
                    cache.store(&self.engine, &digest, &component);
                }
                component
            }
        };
        let inspection = inspect(&self.engine, &component, digest, bytes.len());
        Ok((component, inspection))
    }

    pub(crate) fn clock(&self) -> Arc<Clock> {
        Arc::clone(&self.clock)
    }

    pub(crate) fn engine(&self) -> &Engine {
        &self.engine
    }
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
