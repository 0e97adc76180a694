//! fio for guests: Debian's, without what it could do over a network.
//!
//! The program is linked with libraries of network storage, and these with many more: 80 MB,
//! which every start of a guest would have to unpack. In their place a guest gets a library
//! that has the functions which fio is linked with, and nothing in them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::initramfs::Initramfs;
use super::pieces;
use crate::{on_path, run, scratch};

/// The libraries that a guest gets as they are, and the versions that their symbols have.
const LIBRARIES: [&str; 5] = ["libc.so.", "libm.so.", "libz.so.", "libaio.so.", "libnuma.so."];
const VERSIONS: [&str; 3] = ["GLIBC_", "LIBAIO_", "libnuma_"];

/// Adds `/usr/bin/fio`, or says what is missing for it.
pub fn add(archive: &mut Initramfs) -> Result<(), String> {
    let package = pieces::cache("fio")?;
    if let Some(missing) = ["cc", "nm", "readelf"].into_iter().find(|program| !on_path(program)) {
        return Err(format!("no {missing}; it comes with the package gcc"));
    }
    let fio = package.join("usr/bin/fio");
    archive.copy("/usr/bin/fio", &fio);
    for (path, library) in pieces::libraries(&fio, Some(&package)) {
        let name = library.file_name().unwrap().to_string_lossy();
        if name.starts_with("ld-linux") || is_real(&name) {
            archive.copy(path, &library);
        }
    }
    let directory = scratch();
    let hollow = hollow(&fio, directory.path());
    let dynamic = run(Command::new("readelf").arg("-d").arg(&fio)).succeeded().text();
    let needed = dynamic.lines().filter(|line| line.contains("(NEEDED)"));
    for name in needed.filter_map(|line| line.split(['[', ']']).nth(1)).filter(|name| !is_real(name)) {
        archive.copy(Path::new("/usr/lib").join(name), &hollow);
    }
    Ok(())
}

fn is_real(library: &str) -> bool {
    LIBRARIES.iter().any(|real| library.starts_with(real))
}

/// Makes a library with all functions that the real ones do not have. The loader looks for
/// each under its version, and for all of them at the start.
fn hollow(fio: &Path, directory: &Path) -> PathBuf {
    let mut source = String::new();
    let mut versions: BTreeMap<&str, String> = BTreeMap::new();
    let mut nm = Command::new("nm");
    let symbols = run(nm.args(["-D", "--undefined-only", "--with-symbol-versions"]).arg(fio)).succeeded().text();
    for symbol in symbols.split_whitespace() {
        let (name, version) = symbol.split_once('@').unwrap_or((symbol, ""));
        if version.is_empty() {
            // Of these only Ceph's: zlib's have no version either.
            if !name.starts_with("rados_") && !name.starts_with("rbd_") {
                continue;
            }
        } else if VERSIONS.iter().any(|real| version.starts_with(real)) {
            continue;
        } else {
            write!(versions.entry(version).or_default(), "{name};").unwrap();
        }
        writeln!(source, "void {name}(void) {{ __builtin_trap(); }}").unwrap();
    }
    let mut script = String::new();
    for (version, names) in versions {
        writeln!(script, "{version} {{ {names} }};").unwrap();
    }
    let [code, map, library] = ["hollow.c", "hollow.map", "hollow.so"].map(|name| directory.join(name));
    std::fs::write(&code, source).unwrap();
    std::fs::write(&map, script).unwrap();
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-nostdlib", "-ffreestanding", "-w", "-o"]).args([&library, &code]);
    run(compiler.arg(format!("-Wl,--version-script={}", map.display()))).succeeded();
    library
}
