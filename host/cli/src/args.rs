//! What every command that opens an image shares.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use anyhow::{Context, bail};
use blockhouse_block::{Access, Error, ErrorKind};
use blockhouse_formats::FORMATS;
use blockhouse_sandbox::{
    Audit, AuditFile, Formats, Grant, Grants, Limits, LockMode, OpenRequest, OpenedDisk, Opener, Plugin, Restart,
    Sandbox, Sha256Digest,
};
use blockhouse_walls::{Plan, Use};
use clap::Args;

use crate::compiler;
use crate::grant_arg;
use crate::policy::Policy;
use crate::progress::Progress;
use crate::size::parse_size;

/// What stands before the name of a file that `plugin compile` made.
const COMPILED: &str = "compiled:";

/// Components and the record of what they open.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct HostArgs {
    /// Serve FORMAT with the component in FILE instead of the built-in one; with FORMAT=compiled:FILE, with
    /// what `plugin compile` made of it
    #[arg(long = "plugin", value_name = "FORMAT=FILE", help_heading = "Components")]
    pub(crate) plugins: Vec<String>,

    /// Append a JSON line to FILE for every file that a component tries to open. Of what is tried again and again
    /// there is a line at the tenth attempt, the hundredth and so on
    #[arg(long, value_name = "FILE", help_heading = "Components")]
    pub(crate) audit: Option<PathBuf>,

    /// Keep compiled components in DIR, which must be yours alone, for a quick start; `off` keeps none.
    /// ~/.cache/blockhouse if left out
    #[arg(long, value_name = "DIR", env = "BLOCKHOUSE_CODE_CACHE", help_heading = "Components")]
    pub(crate) code_cache: Option<PathBuf>,

    /// Go nowhere beyond the policy in FILE (TOML): formats, components, limits, and what images may refer
    /// to. Where nothing is allowed on the command line, what FILE grants is. See host/docs/policy.md
    #[arg(long, value_name = "FILE", help_heading = "Components")]
    pub(crate) policy: Option<PathBuf>,

    /// The policy once it was read.
    #[arg(skip)]
    read_policy: OnceLock<Policy>,

    /// The components once they were loaded.
    #[arg(skip)]
    loaded: OnceLock<(Sandbox, Formats)>,
}

impl HostArgs {
    /// The policy, if one is in force. Read once, before the walls go up.
    pub(crate) fn policy(&self) -> anyhow::Result<Option<&Policy>> {
        let Some(file) = &self.policy else { return Ok(None) };
        if self.read_policy.get().is_none() {
            let policy = Policy::read(file)?;
            return Ok(Some(self.read_policy.get_or_init(|| policy)));
        }
        Ok(self.read_policy.get())
    }

    /// What is opened beside images. Makes the code cache and the audit file, so that they can be planned, and starts
    /// compilers, which cannot be started later.
    pub(crate) fn plan(&self, plan: &mut Plan) -> anyhow::Result<()> {
        // What a component gets for a directory that is not granted.
        plan.read("/dev/null");
        let mut strangers = 0;
        for plugin in &self.plugins {
            if let Some((_, file)) = plugin.split_once('=') {
                plan.read(file.strip_prefix(COMPILED).unwrap_or(file));
                strangers += usize::from(!file.starts_with(COMPILED));
            }
        }
        compiler::prepare(strangers, &self.limits()?)?;
        if let Some(audit) = &self.audit {
            self.audit()?;
            plan.write(audit);
        }
        if let Some(cache) = self.cache_directory() {
            // What is wrong with it is said when it is used.
            let _ = Sandbox::make_code_cache(&cache);
            plan.read(&cache);
            // What is compiled is code of the next start: once an image is open, nobody leaves any.
            plan.add_at_first(cache, Use::MakeFiles);
        }
        Ok(())
    }

    fn limits(&self) -> anyhow::Result<Limits> {
        Ok(self.policy()?.map_or_else(Limits::default, |policy| policy.limits.clone()))
    }

    /// The components that open images, with a sandbox for them. The first call is made before any image is opened
    /// and any thread is started: it takes away what is needed up to here and no longer.
    pub(crate) fn components(&self) -> anyhow::Result<&(Sandbox, Formats)> {
        if self.loaded.get().is_none() {
            let sandbox = self.sandbox()?;
            let formats = self.formats(&sandbox)?;
            formats.keep_own(&sandbox);
            sandbox.close_code_cache();
            crate::walls::narrow()?;
            let _ = self.loaded.set((sandbox, formats));
        }
        self.loaded.get().context("the components were just loaded")
    }

    fn sandbox(&self) -> anyhow::Result<Sandbox> {
        let sandbox = compiler::sandbox(self.limits()?)?;
        match self.cache_directory() {
            None => Ok(sandbox),
            // Asked for: what is wrong with it is an error.
            Some(directory) if self.code_cache.is_some() => Ok(sandbox.code_cache(&directory)?),
            Some(directory) => Ok(sandbox.clone().code_cache(&directory).unwrap_or_else(|error| {
                tracing::info!("compiled components are not kept: {error}");
                sandbox
            })),
        }
    }

    /// Where compiled components are kept, if they are.
    fn cache_directory(&self) -> Option<PathBuf> {
        match &self.code_cache {
            Some(directory) if directory == Path::new("off") => None,
            Some(directory) => Some(directory.clone()),
            None => usual_cache(),
        }
    }

    /// The built-in formats, with those of `--plugin` in their place.
    fn formats(&self, sandbox: &Sandbox) -> anyhow::Result<Formats> {
        let mut formats = Formats::new();
        for builtin in FORMATS {
            formats.add_bytes(builtin.format, format!("built-in {}", builtin.format), builtin.bytes);
        }
        let policy = self.policy()?;
        if let Some(policy) = policy {
            restrict(&mut formats, policy);
            if !policy.plugins && !self.plugins.is_empty() {
                let why = format!("{} does not allow --plugin", policy.by());
                return Err(Error::new(ErrorKind::Denied, why).into());
            }
        }
        for plugin in &self.plugins {
            let Some((format, file)) =
                plugin.split_once('=').filter(|(format, file)| !format.is_empty() && !file.is_empty())
            else {
                bail!("--plugin {plugin:?} is not of the form FORMAT=FILE, as in --plugin qcow2=./qcow2.wasm");
            };
            if let Some(policy) = policy.filter(|_| file.starts_with(COMPILED)) {
                // Which component it was made of is what the file says of itself.
                let why = format!("{} does not allow --plugin {plugin:?}: give it the component", policy.by());
                return Err(Error::new(ErrorKind::Denied, why).into());
            }
            let plugin = load(sandbox, &formats, format, file)?;
            formats.add(format, plugin);
        }
        compiler::dismiss();
        Ok(formats)
    }

    pub(crate) fn audit(&self) -> anyhow::Result<Audit> {
        let audit = Audit::new();
        match &self.audit {
            None => Ok(audit),
            Some(path) => {
                let file = AuditFile::append(path)
                    .with_context(|| format!("cannot open the audit file {}", path.display()))?;
                Ok(audit.with(Arc::new(file)))
            }
        }
    }

    /// What is asked for with `--allow` and `--allow-write`, or `allow=` and `allow-write=`, as far as the policy
    /// goes; what the policy grants if it is nothing. `access` is that of the image, and the most that is granted.
    fn grant_list(&self, read: &[PathBuf], write: &[PathBuf], access: Access) -> anyhow::Result<Vec<Grant>> {
        let read = read.iter().map(|path| grant_arg::parse(path, Access::ReadOnly));
        let write = write.iter().map(|path| grant_arg::parse(path, Access::ReadWrite));
        let asked = read.chain(write).collect::<anyhow::Result<Vec<_>>>()?;
        let granted = match self.policy()? {
            Some(policy) => policy.grants(asked)?,
            None => asked,
        };
        let lower = |grant: Grant| Grant { access: if access.is_writable() { grant.access } else { access }, ..grant };
        Ok(granted.into_iter().map(lower).collect())
    }

    /// Plans what [`grants`](Self::grants) grants.
    pub(crate) fn plan_grants(
        &self,
        plan: &mut Plan,
        read: &[PathBuf],
        write: &[PathBuf],
        access: Access,
    ) -> anyhow::Result<()> {
        for grant in self.grant_list(read, write, access)? {
            plan.add(&grant.path, if grant.access.is_writable() { Use::Write } else { Use::Read });
        }
        Ok(())
    }

    /// The grants of a command for an image that is opened with `access`.
    pub(crate) fn grants(&self, read: &[PathBuf], write: &[PathBuf], access: Access) -> anyhow::Result<Grants> {
        let mut grants = Grants::new();
        for grant in &self.grant_list(read, write, access)? {
            // Hashing a large file takes a while.
            let mut progress = None;
            let mut tell = |done: u64, total: u64| {
                let bar = progress.get_or_insert_with(|| Progress::new(total, false));
                bar.at(done);
            };
            let added = grants.add(grant, &mut tell);
            progress.into_iter().for_each(Progress::finish);
            grants = added?;
        }
        Ok(grants)
    }

    /// An opener that grants nothing yet.
    pub(crate) fn opener(&self) -> anyhow::Result<Opener> {
        let (sandbox, formats) = self.components()?;
        // A command that ends with its first error waits for nobody.
        Ok(Opener::new(sandbox, formats.clone()).audit(self.audit()?).restart(Restart::never()))
    }

    /// Locks a file that is to be overwritten or replaced, as long as what this gives is there. Whoever uses it as an
    /// image, in whichever way, is an error.
    ///
    /// For its lock alone it is opened as what every file is, by a component of our own, whatever may open images here:
    /// it is to be none any more.
    pub(crate) fn lock(&self, path: &Path) -> anyhow::Result<OpenedDisk> {
        let (sandbox, _) = self.components()?;
        let mut formats = Formats::new();
        for builtin in FORMATS.iter().filter(|builtin| builtin.format == RAW) {
            formats.add_bytes(builtin.format, format!("built-in {}", builtin.format), builtin.bytes);
        }
        let request = OpenRequest { access: Access::ReadWrite, ..OpenRequest::new(path, RAW) };
        Ok(Opener::new(sandbox, formats).restart(Restart::never()).open(&request)?)
    }
}

/// The format that every file is an image of.
const RAW: &str = "raw";

/// Has formats be served as a policy wants it.
fn restrict(formats: &mut Formats, policy: &Policy) {
    if let Some(allowed) = policy.formats() {
        formats.only(allowed.iter().cloned(), policy.by());
    }
    for (format, digests) in policy.components() {
        formats.require(format, digests.iter().copied(), policy.by());
    }
}

/// A component, or what was compiled from one: said by the operator, never seen from the file.
#[allow(unsafe_code)]
fn load(sandbox: &Sandbox, formats: &Formats, format: &str, file: &str) -> anyhow::Result<Plugin> {
    match file.strip_prefix(COMPILED) {
        None => {
            let bytes = sandbox.read_component(file.as_ref())?;
            // Before it is compiled.
            formats.check(format, &Sha256Digest::of(&bytes).to_string())?;
            Ok(sandbox.load(file, &bytes)?)
        }
        // SAFETY: that `plugin compile` made it is what the operator says with the word, of a file that nobody
        // else can have changed.
        Some(file) => Ok(unsafe { sandbox.load_precompiled(file.as_ref()) }?),
    }
}

/// Where compiled components are kept if nobody says otherwise.
fn usual_cache() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?;
    Some(base.join("blockhouse"))
}

/// Looking at an image that is in use.
#[derive(Clone, Copy, Debug, Default, Args)]
pub(crate) struct ShareArgs {
    /// Open images although somebody may be writing them, read-only. What is found then may be neither
    /// the old nor the new, or make no sense at all
    #[arg(long)]
    pub(crate) force_share: bool,
}

impl ShareArgs {
    pub(crate) fn locks(self) -> LockMode {
        if self.force_share { LockMode::Off } else { LockMode::Enforce }
    }
}

/// What an image that is opened for writing may refer to.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct GrantArgs {
    /// Let the image, and its backing files, refer to PATH: a file, or every regular file below a
    /// directory. Read-only. Relative references resolve from the directory of the image that has them.
    /// PATH@sha256:HEX is a file with that content, PATH@layer:N for references of layer N alone, and
    /// PATH@image:IMAGE for those of one image; a path that has such a part has its @ twice
    #[arg(long, value_name = "PATH")]
    pub(crate) allow: Vec<PathBuf>,

    /// As --allow, and let the image have PATH written: an external data file. Backing files stay
    /// read-only
    #[arg(long, value_name = "PATH")]
    pub(crate) allow_write: Vec<PathBuf>,
}

impl GrantArgs {
    /// What may be opened by reference.
    pub(crate) fn plan(&self, plan: &mut Plan, host: &HostArgs) -> anyhow::Result<()> {
        host.plan_grants(plan, &self.allow, &self.allow_write, Access::ReadWrite)
    }

    pub(crate) fn grants(&self, host: &HostArgs) -> anyhow::Result<Grants> {
        host.grants(&self.allow, &self.allow_write, Access::ReadWrite)
    }
}

/// One image, its format, and what it may refer to.
#[derive(Clone, Debug, Args)]
pub(crate) struct ImageArgs {
    /// The image
    #[arg(value_name = "IMAGE")]
    pub(crate) image: PathBuf,

    /// The format of the image. Stated by you, never guessed
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: String,

    /// Let the image, and its backing files, refer to PATH: a file, or every regular file below a
    /// directory. Read-only. Relative references resolve from the directory of the image that has them.
    /// PATH@sha256:HEX is a file with that content, PATH@layer:N for references of layer N alone, and
    /// PATH@image:IMAGE for those of one image; a path that has such a part has its @ twice
    #[arg(long, value_name = "PATH")]
    pub(crate) allow: Vec<PathBuf>,

    /// Read a snapshot inside the image: its id, or its name
    #[arg(long, value_name = "N")]
    pub(crate) snapshot: Option<String>,

    #[command(flatten)]
    pub(crate) share: ShareArgs,

    #[command(flatten)]
    pub(crate) host: HostArgs,
}

impl ImageArgs {
    /// What is opened to read the image.
    pub(crate) fn plan(&self, plan: &mut Plan) -> anyhow::Result<()> {
        plan.read(&self.image);
        self.host.plan_grants(plan, &self.allow, &[], Access::ReadOnly)?;
        self.host.plan(plan)
    }

    pub(crate) fn opener(&self) -> anyhow::Result<Opener> {
        let opener = self.host.opener()?;
        let grants = self.host.grants(&self.allow, &[], Access::ReadOnly)?;
        Ok(opener.grants(grants).locks(self.share.locks()))
    }

    pub(crate) fn request(&self) -> OpenRequest {
        OpenRequest {
            access: Access::ReadOnly,
            snapshot: self.snapshot.clone(),
            ..OpenRequest::new(&self.image, &self.format)
        }
    }
}

/// A part of a disk.
#[derive(Clone, Debug, Args)]
pub(crate) struct RangeArgs {
    /// Start at byte N of the disk; K, M, G, T multiply, 0x is hexadecimal
    #[arg(long, value_name = "N", default_value = "0", value_parser = parse_size)]
    pub(crate) offset: u64,

    /// Stop after N bytes; at the end of the disk if left out
    #[arg(long, value_name = "N", value_parser = parse_size)]
    pub(crate) length: Option<u64>,
}

/// Where a name that is to stand in an image leads: relative names start at the directory of the image.
pub(crate) fn beside(image: &Path, name: &Path) -> PathBuf {
    directory_of(image).join(name)
}

/// The directory that a file is in.
pub(crate) fn directory_of(file: &Path) -> &Path {
    file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
