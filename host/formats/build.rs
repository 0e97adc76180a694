//! Finds the components that `cargo xtask build-plugins` made, and embeds them.

use std::path::{Path, PathBuf};
use std::{env, fs};

/// The formats that are built in, and the prober.
const COMPONENTS: [&str; 4] = ["raw", "qcow2", "vmdk", "probe"];

fn main() {
    println!("cargo::rerun-if-env-changed=BLOCKHOUSE_COMPONENTS");
    println!("cargo::rerun-if-changed=build.rs");
    let directory = match find() {
        Ok(directory) => directory,
        Err(why) => {
            println!("cargo::error={why}. {}", remedy());
            return;
        }
    };
    let mut code = String::new();
    for name in COMPONENTS {
        let file = directory.join(format!("{name}.wasm"));
        println!("cargo::rerun-if-changed={}", file.display());
        code.push_str(&format!(
            "pub(crate) static {}: &[u8] = include_bytes!({:?});\n",
            name.to_uppercase(),
            file.display().to_string()
        ));
    }
    let out = env::var_os("OUT_DIR").map(PathBuf::from).unwrap_or_default().join("components.rs");
    if let Err(error) = fs::write(&out, code) {
        println!("cargo::error=cannot write {}: {error}", out.display());
    }
}

/// The directory with all of them: `BLOCKHOUSE_COMPONENTS`, or `components` in the target directory, which is where
/// they are if this is built in its own workspace.
fn find() -> Result<PathBuf, String> {
    if let Some(named) = env::var_os("BLOCKHOUSE_COMPONENTS") {
        let directory = std::path::absolute(&named).map_err(|error| format!("BLOCKHOUSE_COMPONENTS: {error}"))?;
        return match missing(&directory) {
            None => Ok(directory),
            Some(file) => Err(format!("BLOCKHOUSE_COMPONENTS names a directory without {}", file.display())),
        };
    }
    let out = env::var_os("OUT_DIR").map(PathBuf::from).unwrap_or_default();
    let mut targets = out.ancestors().skip(3).take(3).map(|target| target.join("components"));
    targets.find(|directory| missing(directory).is_none()).ok_or_else(|| {
        let target = out.ancestors().nth(4).unwrap_or(&out).display();
        format!("the built-in components are not in {target}/components: they are not built yet, or not there")
    })
}

/// The first that is not in a directory.
fn missing(directory: &Path) -> Option<PathBuf> {
    COMPONENTS.iter().map(|name| directory.join(format!("{name}.wasm"))).find(|file| !file.is_file())
}

/// What to do, one command and one variable: whoever builds this from another workspace knows neither.
fn remedy() -> String {
    let package = env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from).unwrap_or_default();
    let root = package.ancestors().nth(2).unwrap_or(&package).display();
    format!(
        "To build them: `cargo xtask build-plugins` in {root}. From another workspace, set the environment variable \
         BLOCKHOUSE_COMPONENTS to the directory that it prints (README.md, \"From your own workspace\")"
    )
}
