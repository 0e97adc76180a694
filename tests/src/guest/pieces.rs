//! What a Linux guest is made of: Debian's kernel with its modules, and busybox.
//!
//! `cargo xtask prerequisites` unpacks them below `<target>/cache`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::initramfs::Initramfs;
use crate::{run, target_directory};

/// A stock kernel, as its package has it.
pub struct Linux {
    /// The bzImage.
    pub kernel: PathBuf,
    /// Module files by name, with `_` for `-`.
    modules: BTreeMap<String, PathBuf>,
}

impl Linux {
    /// The unpacked package, or why there is none.
    pub fn find() -> Result<Self, String> {
        let package = cache("linux")?;
        let kernel = files(&package.join("boot"))
            .into_iter()
            .find(|file| file.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-")))
            .ok_or("the kernel package holds no boot/vmlinuz-*")?;
        let modules = files(&package)
            .into_iter()
            .filter_map(|file| {
                let name = file.file_name()?.to_str()?;
                let name = name.strip_suffix(".xz").unwrap_or(name).strip_suffix(".ko")?;
                Some((name.replace('-', "_"), file))
            })
            .collect();
        Ok(Self { kernel, modules })
    }

    /// Adds modules to an initramfs, and lines to load them in an order in which each finds
    /// what it needs. A name that the package has no file for is built into the kernel.
    pub fn add_modules(&self, names: &[&str], archive: &mut Initramfs) -> String {
        let mut script = String::new();
        let mut loaded = Vec::new();
        for name in names {
            self.add_module(name, archive, &mut script, &mut loaded);
        }
        script
    }

    fn add_module(&self, name: &str, archive: &mut Initramfs, script: &mut String, loaded: &mut Vec<String>) {
        let Some(file) = self.modules.get(name) else {
            return;
        };
        if loaded.iter().any(|other| other == name) {
            return;
        }
        loaded.push(name.to_owned());
        let module = read_module(file);
        for dependency in depends(&module) {
            self.add_module(&dependency, archive, script, loaded);
        }
        let path = format!("/lib/modules/{name}.ko");
        archive.file(&path, &module);
        script.push_str(&format!("insmod {path} || echo 'init: no module {name}'\n"));
    }
}

/// The content of a module file, unpacked: busybox loads plain ones only.
fn read_module(file: &Path) -> Vec<u8> {
    if file.extension().is_some_and(|extension| extension == "xz") {
        return run(Command::new("xz").args(["--decompress", "--stdout"]).arg(file)).succeeded().stdout;
    }
    std::fs::read(file).unwrap()
}

/// The modules that one names as its needs: `depends=a,b` in the section `.modinfo`, which
/// is a row of such strings with zero bytes between them.
fn depends(module: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    let Some(start) = module.windows(key.len()).position(|window| window == key) else {
        return Vec::new();
    };
    let value = module[start + key.len()..].split(|&byte| byte == 0).next().unwrap();
    String::from_utf8_lossy(value)
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

/// An initramfs with busybox, and its commands under their names.
pub fn busybox() -> Result<Initramfs, String> {
    let mut archive = Initramfs::default();
    archive.copy("/bin/busybox", cache("busybox")?.join("bin/busybox"));
    for directory in ["/proc", "/sys", "/dev", "/tmp", "/mnt"] {
        archive.directory(directory);
    }
    Ok(archive)
}

/// How every `/init` begins.
pub const INIT: &str = "#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
";

/// Adds the shared libraries that a program of this machine loads, and the loader itself.
pub fn add_libraries(program: &Path, archive: &mut Initramfs) {
    for (path, library) in libraries(program, None) {
        archive.copy(path, library);
    }
}

/// The shared libraries that a program loads, and the loader itself: where each belongs, and
/// where it is. Those of an unpacked package belong where installing it would put them.
pub fn libraries(program: &Path, package: Option<&Path>) -> Vec<(PathBuf, PathBuf)> {
    let mut ldd = Command::new("ldd");
    ldd.arg(program);
    if let Some(package) = package {
        ldd.env("LD_LIBRARY_PATH", std::env::join_paths(library_directories(package)).unwrap());
    }
    // A static program has none, and ldd says so with an error.
    let listed = run(&mut ldd).text();
    let files = listed.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from);
    let installed = |file: &Path| Some(Path::new("/").join(file.strip_prefix(package?).ok()?));
    files.map(|file| (installed(&file).unwrap_or_else(|| file.clone()), file)).collect()
}

/// The directories of an unpacked package that hold shared libraries.
fn library_directories(package: &Path) -> BTreeSet<PathBuf> {
    let is_library = |file: &&PathBuf| file.file_name().is_some_and(|name| name.to_string_lossy().contains(".so"));
    files(package).iter().filter(is_library).filter_map(|file| file.parent()).map(Path::to_owned).collect()
}

/// A program of this machine, which need not be root's to be found, or what would bring it.
pub fn installed(name: &str, package: &str) -> Result<PathBuf, String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|directory| directory.join(name))
        .find(|file| file.is_file())
        .ok_or_else(|| format!("no {name}; it comes with the package {package}"))
}

/// A directory that `cargo xtask prerequisites` makes, or why there is none.
pub fn cache(name: &str) -> Result<PathBuf, String> {
    let directory = target_directory().join("cache").join(name);
    if directory.is_dir() {
        return Ok(directory);
    }
    Err(format!("no {}; `cargo xtask prerequisites` fetches it", directory.display()))
}

/// All files below a directory, without following links.
fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut pending = vec![directory.to_owned()];
    while let Some(directory) = pending.pop() {
        let Ok(entries) = std::fs::read_dir(directory) else {
            continue;
        };
        for entry in entries {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                pending.push(entry.path());
            } else {
                found.push(entry.path());
            }
        }
    }
    found.sort();
    found
}

#[test]
fn dependencies_are_read_from_modinfo() {
    let module = b"\x7fELF...\0license=GPL\0depends=virtio,virtio-ring\0name=x\0";
    assert_eq!(depends(module), ["virtio", "virtio_ring"]);
    assert!(depends(b"\0depends=\0").is_empty());
    assert!(depends(b"nothing").is_empty());
}
