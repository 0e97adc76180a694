//! Builds every component of the workspace into `<target>/components/NAME.wasm`.
//!
//! A component is a package that says so in its manifest:
//! `[package.metadata.blockhouse] component = "NAME"`. All are built in one go for
//! `wasm32-wasip2`, and the bytes depend on the sources, `Cargo.lock` and the toolchain,
//! not on where the tree, cargo's home or the standard library lie.
//!
//! ```text
//!   core and alloc for wasm32-wasip2                        way
//!   ├─ in the toolchain's sysroot? ──────────────────────▶ rustup
//!   ├─ Debian's compiler and library sources installed? ─▶ debian (builds core and alloc as well)
//!   ├─ `rustup target add`, with a time limit ───────────▶ rustup
//!   ├─ Debian, and root: apt-get install ────────────────▶ debian
//!   └─ otherwise: say what to install
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use serde_json::Value;

use crate::packages;
use crate::tools::{self, Workspace};

/// What components are built for.
pub(crate) const TARGET: &str = "wasm32-wasip2";
/// Names match the root manifest.
const PROFILE: &str = "component";
/// `rustup` waits for ever where the network drops packets.
const RUSTUP_LIMIT: Duration = Duration::from_secs(60);
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
/// What `apt-get` installs for [`Way::Debian`].
const DEBIAN_PACKAGES: [&str; 2] = ["rustc-web", "rust-web-src"];

/// Build the format components to `<target>/components`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Where the standard library for wasm32-wasip2 comes from; found out when left out.
    #[arg(long)]
    way: Option<Way>,
    /// Build a second time, from a copy of the tree elsewhere, and compare every byte.
    #[arg(long)]
    check_reproducible: bool,
}

/// Where `core` and `alloc` for the components come from.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Way {
    /// The precompiled target of the current toolchain, added by rustup if need be.
    Rustup,
    /// Debian's compiler and library sources (packages rustc-web and rust-web-src).
    Debian,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    let (toolchain, components) = build_and_publish(workspace, arguments.way)?;
    for (name, bytes) in &components {
        println!("{}", describe(name, bytes));
    }
    println!("in {}", directory(workspace).display());
    if arguments.check_reproducible {
        println!("{}", check_reproducible(workspace, &toolchain, &components)?);
    }
    Ok(())
}

/// What other tasks start with: all components are in `<target>/components` afterwards.
pub(crate) fn build_all(workspace: &Workspace) -> Result<()> {
    build_and_publish(workspace, None).map(drop)
}

/// Builds all, and once more elsewhere to see that the bytes are the same.
pub(crate) fn build_and_check(workspace: &Workspace) -> Result<()> {
    let (toolchain, components) = build_and_publish(workspace, None)?;
    println!("{}", check_reproducible(workspace, &toolchain, &components)?);
    Ok(())
}

/// Components, and what built them.
pub(crate) struct Built {
    /// The compiler, as it calls itself.
    pub(crate) compiler: String,
    /// The components by name.
    pub(crate) components: Components,
}

/// As [`build_and_check`], for whoever wants to tell of it: without components that are there for tests.
pub(crate) fn build_for_release(workspace: &Workspace) -> Result<Built> {
    let (toolchain, mut components) = build_and_publish(workspace, None)?;
    tools::say(check_reproducible(workspace, &toolchain, &components)?);
    let released = released(workspace)?;
    components.retain(|name, _| released.contains(name));
    let compiler = tools::text(Command::new(&toolchain.rustc).arg("--version"))?;
    Ok(Built { compiler, components })
}

/// The packages that are components.
pub(crate) fn packages(workspace: &Workspace) -> Result<Vec<String>> {
    Ok(component_names(workspace)?.into_keys().collect())
}

/// The components whose packages lie below `plugins`.
fn released(workspace: &Workspace) -> Result<BTreeSet<String>> {
    let plugins = workspace.root.join("plugins");
    let mut names = component_names(workspace)?;
    for package in &workspace.packages {
        let text = |key| package.get(key).and_then(Value::as_str).unwrap_or_default();
        if !Path::new(text("manifest_path")).starts_with(&plugins) {
            names.remove(text("name"));
        }
    }
    Ok(names.into_values().collect())
}

/// Whether the current toolchain comes with the library for [`TARGET`].
pub(crate) fn target_is_installed() -> Result<bool> {
    has_target(&rustc())
}

fn build_and_publish(workspace: &Workspace, way: Option<Way>) -> Result<(Toolchain, Components)> {
    let toolchain = Toolchain::prepare(way)?;
    let components = build(workspace, &toolchain, &workspace.root, &workspace.target)?;
    publish(&directory(workspace), &components)?;
    Ok((toolchain, components))
}

/// Where components are once they are built: `BLOCKHOUSE_COMPONENTS` for other workspaces.
fn directory(workspace: &Workspace) -> PathBuf {
    workspace.target.join("components")
}

/// Components by name, as built.
pub(crate) type Components = BTreeMap<String, Vec<u8>>;

fn describe(name: &str, bytes: &[u8]) -> String {
    let digest = tools::sha256(bytes);
    let short = digest.get(..16).unwrap_or_default();
    format!("{name:<12} {:>8} bytes  sha256 {short}", bytes.len())
}

/// A compiler that can build for [`TARGET`], and how to call it.
struct Toolchain {
    rustc: PathBuf,
    /// `PATH` with the component linker on it, where the compiler does not find it by itself.
    path: Option<OsString>,
    /// Build `core` and `alloc` from the compiler's own sources.
    build_std: bool,
    /// Path prefixes that must not show in the output, and what stands for them.
    remap: Vec<(PathBuf, String)>,
}

impl Toolchain {
    fn prepare(way: Option<Way>) -> Result<Self> {
        match way {
            Some(Way::Rustup) => Self::rustup().context(WITHOUT_RUSTUP),
            Some(Way::Debian) => Self::debian().context(WITHOUT_DEBIAN),
            // What is there already comes first: where rustup cannot reach its server, asking
            // it again takes all of the time limit.
            None if !has_target(&rustc())? && debian_is_installed()? => Self::debian(),
            None => match Self::rustup() {
                Ok(toolchain) => Ok(toolchain),
                Err(error) => {
                    tools::say(format!("{TARGET} is not to be had through rustup: {error:#}"));
                    Self::debian().context(WITHOUT_EITHER)
                }
            },
        }
    }

    fn rustup() -> Result<Self> {
        let rustc = rustc();
        if !has_target(&rustc)? {
            ensure!(
                tools::find("rustup").is_some(),
                "the compiler has no {TARGET} library, and there is no rustup to add it"
            );
            let mut add = Command::new("rustup");
            add.args(["target", "add", TARGET]);
            tools::say(tools::line(&add));
            match tools::within(RUSTUP_LIMIT, &mut add)? {
                Some(status) if status.success() && has_target(&rustc)? => {}
                Some(status) => bail!("`{}` ended with {status}", tools::line(&add)),
                None => {
                    bail!("`{}` did not end within {} s and was stopped", tools::line(&add), RUSTUP_LIMIT.as_secs())
                }
            }
        }
        let remap = library_sources(&rustc)?;
        Ok(Self { rustc, path: None, build_std: false, remap })
    }

    fn debian() -> Result<Self> {
        if !debian_is_installed()? {
            packages::install(&DEBIAN_PACKAGES)?;
            ensure!(debian_is_installed()?, "{DEBIAN_RUSTC} has no library sources after the installation");
        }
        let rustc = PathBuf::from(DEBIAN_RUSTC);
        Ok(Self {
            path: Some(tools::path_with(&component_linker_directory()?)?),
            build_std: true,
            remap: library_sources(&rustc)?,
            rustc,
        })
    }
}

const WITHOUT_RUSTUP: &str = "components cannot be built with rustup's toolchain; \
    where rustup reaches its server, `rustup target add wasm32-wasip2` is all that is needed";
const WITHOUT_DEBIAN: &str = "components cannot be built with Debian's packages; \
    as root: `apt-get install rustc-web rust-web-src`";
const WITHOUT_EITHER: &str = "components cannot be built: the compiler has no library for wasm32-wasip2. \
    Do one of: `rustup target add wasm32-wasip2` where rustup reaches its server; \
    `apt-get install rustc-web rust-web-src` as root on Debian";

/// The compiler of the current toolchain.
fn rustc() -> PathBuf {
    std::env::var_os("RUSTC").map_or_else(|| "rustc".into(), PathBuf::from)
}

/// Whether Debian's compiler is here, and with it the sources of its library.
fn debian_is_installed() -> Result<bool> {
    let rustc = Path::new(DEBIAN_RUSTC);
    Ok(rustc.is_file() && sysroot(rustc)?.join("lib/rustlib/src/rust/library/core/Cargo.toml").is_file())
}

/// Whether the compiler comes with a precompiled `core` for the target.
fn has_target(rustc: &Path) -> Result<bool> {
    let library = tools::text(Command::new(rustc).args(["--print", "target-libdir", "--target", TARGET]))?;
    let Ok(entries) = std::fs::read_dir(library) else {
        return Ok(false);
    };
    Ok(entries.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with("libcore-")))
}

fn sysroot(rustc: &Path) -> Result<PathBuf> {
    Ok(tools::text(Command::new(rustc).args(["--print", "sysroot"]))?.into())
}

/// Where the compiler keeps the sources of the standard library, if it does: with them
/// installed it writes their local path into panic messages, without them a virtual one.
fn library_sources(rustc: &Path) -> Result<Vec<(PathBuf, String)>> {
    let version = tools::text(Command::new(rustc).arg("-vV"))?;
    let field = |name: &str| version.lines().find_map(|line| line.strip_prefix(name));
    let commit = field("commit-hash: ").filter(|hash| *hash != "unknown");
    let release = field("release: ").unwrap_or("unknown");
    let virtual_path = format!("/rustc/{}", commit.unwrap_or(release));

    let sources = sysroot(rustc)?.join("lib/rustlib/src/rust");
    let real = std::fs::canonicalize(&sources).ok();
    let all = std::iter::once(sources.clone()).chain(real.filter(|real| *real != sources));
    Ok(all.map(|path| (path, virtual_path.clone())).collect())
}

/// The directory of `wasm-component-ld`, which Debian's compiler lacks and cargo's toolchain has.
fn component_linker_directory() -> Result<PathBuf> {
    let name = "wasm-component-ld";
    let host = tools::text(Command::new("rustc").arg("-vV"))?;
    let host = host.lines().find_map(|line| line.strip_prefix("host: ")).context("`rustc -vV` names no host")?;
    let bundled = sysroot(Path::new("rustc"))?.join(format!("lib/rustlib/{host}/bin"));
    if bundled.join(name).is_file() {
        return Ok(bundled);
    }
    let found = tools::find(name).and_then(|file| file.parent().map(Path::to_owned));
    found.with_context(|| format!("no {name}: neither in the toolchain nor on PATH; `cargo install {name}` builds it"))
}

/// Builds all components of the tree in `root` with its output in `target`.
fn build(workspace: &Workspace, toolchain: &Toolchain, root: &Path, target: &Path) -> Result<Components> {
    let names = component_names(workspace)?;
    if names.is_empty() {
        return Ok(Components::new());
    }
    let mut command = tools::cargo();
    command
        .current_dir(root)
        .args(["build", "--locked", "--lib", "--target", TARGET])
        .args(["--profile", PROFILE])
        .arg("--message-format=json-render-diagnostics")
        .arg("--target-dir")
        .arg(target)
        .env("RUSTC", &toolchain.rustc)
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags(toolchain, root)?)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit());
    for package in names.keys() {
        command.args(["--package", package]);
    }
    if let Some(path) = &toolchain.path {
        command.env("PATH", path);
    }
    if toolchain.build_std {
        command.arg("-Zbuild-std=core,alloc,panic_abort").env("RUSTC_BOOTSTRAP", "1");
    }
    let output = command.output().context("cannot start cargo")?;
    ensure!(
        output.status.success(),
        "the components do not build (cargo's own message is above): {}",
        tools::line(&command)
    );

    let mut components = Components::new();
    for message in String::from_utf8_lossy(&output.stdout).lines() {
        let Ok(message) = serde_json::from_str::<Value>(message) else {
            continue;
        };
        if let Some((package, file)) = artifact(&message)
            && let Some(name) = names.get(&package)
        {
            let bytes = std::fs::read(&file).with_context(|| format!("cargo built {file}, but it cannot be read"))?;
            components.insert(name.clone(), bytes);
        }
    }
    for (package, name) in &names {
        ensure!(
            components.contains_key(name),
            "{package} says that it is the component {name}, but building it made no .wasm file; \
             its manifest needs `crate-type = [\"cdylib\", \"rlib\"]`"
        );
    }
    Ok(components)
}

/// Package name to component name, for every package that declares one.
fn component_names(workspace: &Workspace) -> Result<BTreeMap<String, String>> {
    let mut names = BTreeMap::new();
    for package in &workspace.packages {
        let Some(component) = package.pointer("/metadata/blockhouse/component") else {
            continue;
        };
        let package = package.get("name").and_then(Value::as_str).unwrap_or_default();
        let component = component
            .as_str()
            .filter(|name| {
                !name.is_empty()
                    && name.chars().all(|character| {
                        character.is_ascii_lowercase() || character.is_ascii_digit() || character == '-'
                    })
            })
            .with_context(|| {
                format!(
                    "{package}: `package.metadata.blockhouse.component` must be lower-case \
                     letters, digits and hyphens; it becomes a file name"
                )
            })?;
        if let Some(other) = names.iter().find_map(|(other, name)| (name == component).then_some(other)) {
            bail!("{other} and {package} both say that they are the component {component}");
        }
        names.insert(package.to_owned(), component.to_owned());
    }
    Ok(names)
}

/// Package and file name, if this message of cargo's announces a WebAssembly file.
fn artifact(message: &Value) -> Option<(String, String)> {
    if message.get("reason")?.as_str()? != "compiler-artifact" {
        return None;
    }
    // `path+file:///somewhere/plugins/qcow2#blockhouse-qcow2@0.1.0`, or `…/name#version`
    // where directory and package have one name.
    let id = message.get("package_id")?.as_str()?;
    let (source, fragment) = id.rsplit_once('#')?;
    let package = match fragment.split_once('@') {
        Some((name, _version)) => name,
        None => source.rsplit('/').next()?,
    };
    let files = message.get("filenames")?.as_array()?;
    let file = files.iter().filter_map(Value::as_str).find(|file| file.ends_with(".wasm"))?;
    Some((package.to_owned(), file.to_owned()))
}

/// Compiler flags, in cargo's encoding: separated by the byte 0x1f, so that paths may hold blanks.
fn rustflags(toolchain: &Toolchain, root: &Path) -> Result<OsString> {
    // A command component brings an adapter for the first WASI; ours use none of it, and
    // would import all of its environment, exit and stdio.
    let mut flags = vec![OsString::from("-Clink-arg=--wasi-adapter=none")];
    let home = match std::env::var_os("CARGO_HOME") {
        Some(home) => PathBuf::from(home),
        None => std::env::home_dir().context("neither CARGO_HOME nor HOME is set")?.join(".cargo"),
    };
    // The last match wins, so the more special prefixes come after the general ones.
    let mut prefixes = vec![(home.clone(), "/cargo".to_owned())];
    // Cargo names a registry's directory after the address it is reached by.
    if let Ok(registries) = std::fs::read_dir(home.join("registry/src")) {
        prefixes.extend(registries.flatten().map(|entry| (entry.path(), "/crates".to_owned())));
    }
    prefixes.push((root.to_owned(), "/blockhouse".to_owned()));
    for (from, to) in prefixes.iter().chain(&toolchain.remap) {
        let mut flag = OsString::from("--remap-path-prefix=");
        flag.push(from);
        flag.push("=");
        flag.push(to);
        flags.push(flag);
    }
    Ok(flags.join(&OsString::from("\x1f")))
}

/// Puts the components where the host crates embed them from, and a list of digests beside them.
fn publish(directory: &Path, components: &Components) -> Result<()> {
    let mut sums = String::new();
    for (name, bytes) in components {
        tools::write_if_changed(&directory.join(format!("{name}.wasm")), bytes)?;
        sums.push_str(&format!("{}  {name}.wasm\n", tools::sha256(bytes)));
    }
    tools::write_if_changed(&directory.join("SHA256SUMS"), sums.as_bytes())?;
    // A component that was renamed or removed must not be found by accident.
    for entry in std::fs::read_dir(directory)?.flatten() {
        let path = entry.path();
        let stale = path.extension().is_some_and(|extension| extension == "wasm")
            && path.file_stem().and_then(|stem| stem.to_str()).is_none_or(|stem| !components.contains_key(stem));
        if stale {
            std::fs::remove_file(&path).with_context(|| format!("cannot remove the stale {}", path.display()))?;
        }
    }
    Ok(())
}

/// Builds again from a copy of the tree in another directory, compares, and says so.
fn check_reproducible(workspace: &Workspace, toolchain: &Toolchain, first: &Components) -> Result<String> {
    let elsewhere = tempfile::Builder::new().prefix("blockhouse-elsewhere-").tempdir()?;
    let copy = elsewhere.path().join("a/longer/path");
    copy_tree(&workspace.root, &copy)?;
    // Dependencies stay between runs; our own packages are rebuilt, since the copy's path is new.
    let second = build(workspace, toolchain, &copy, &workspace.target.join("reproducible"))?;
    for (name, bytes) in first {
        let other = second.get(name).map(Vec::as_slice).unwrap_or_default();
        if bytes != other {
            let kept = workspace.target.join(format!("reproducible/{name}.second.wasm"));
            tools::write_if_changed(&kept, other)?;
            let offset = bytes.iter().zip(other).position(|(a, b)| a != b);
            bail!(
                "{name} is not reproducible: {} and {} bytes, first difference at byte {}; \
                 the second build is in {}",
                bytes.len(),
                other.len(),
                offset.unwrap_or(bytes.len().min(other.len())),
                kept.display()
            );
        }
    }
    Ok(format!(
        "reproducible: {} components, the same bytes from {} and {}",
        first.len(),
        workspace.root.display(),
        copy.display()
    ))
}

/// Copies the files that git tracks or would track; without git, everything but output and dot directories.
fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    let listed = Command::new("git")
        .current_dir(from)
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .stderr(Stdio::null())
        .output();
    let files: Vec<PathBuf> = match listed {
        Ok(output) if output.status.success() => String::from_utf8(output.stdout)
            .context("a file name in the tree is not UTF-8")?
            .split_terminator('\0')
            .map(PathBuf::from)
            .collect(),
        _ => {
            let mut files = Vec::new();
            walk(from, Path::new(""), &mut files)?;
            files
        }
    };
    for file in files {
        let source = from.join(&file);
        // Deleted in the work tree, still in the index.
        if !source.is_file() {
            continue;
        }
        let destination = to.join(&file);
        if let Some(directory) = destination.parent() {
            std::fs::create_dir_all(directory)?;
        }
        std::fs::copy(&source, &destination).with_context(|| format!("cannot copy {}", source.display()))?;
    }
    Ok(())
}

fn walk(root: &Path, below: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(root.join(below))? {
        let entry = entry?;
        let name = entry.file_name();
        let path = below.join(&name);
        if entry.file_type()?.is_dir() {
            let skipped = name.to_string_lossy().starts_with('.') || name == "target";
            if !skipped {
                walk(root, &path, files)?;
            }
        } else {
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn components_for_tests_are_built_and_not_released() {
        let workspace = Workspace::load().unwrap();
        assert!(packages(&workspace).unwrap().contains(&"blockhouse-hostile".to_owned()));
        assert_eq!(
            released(&workspace).unwrap(),
            ["probe", "qcow2", "raw", "template", "vmdk"].map(String::from).into()
        );
    }
}
