//! Finds the components that `cargo xtask build-plugins` made, and embeds them.

use std::path::{Path, PathBuf};
use std::{env, fs};

/// The formats that are built in, and the prober.
const COMPONENTS: [&str; 4] = ["raw", "qcow2", "vmdk", "probe"];

fn main() {
    println!("cargo::rerun-if-env-changed=BLOCKHOUSE_COMPONENTS");
    println!("cargo::rerun-if-changed=build.rs");
    let Some(directory) = find() else {
        println!("cargo::error=the built-in components are not built yet; run: cargo xtask build-plugins");
        return;
    };
    let mut code = String::new();
    for name in COMPONENTS {
        let file = directory.join(format!("{name}.wasm"));
        println!("cargo::rerun-if-changed={}", file.display());
        if !file.is_file() {
            println!("cargo::error=the component {} is missing; run: cargo xtask build-plugins", file.display());
            return;
        }
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

/// `BLOCKHOUSE_COMPONENTS`, or `components` in the target directory.
fn find() -> Option<PathBuf> {
    if let Some(directory) = env::var_os("BLOCKHOUSE_COMPONENTS") {
        return Some(directory.into());
    }
    let out = env::var_os("OUT_DIR").map(PathBuf::from)?;
    out.ancestors().skip(3).take(3).map(|target: &Path| target.join("components")).find(|directory| directory.is_dir())
}
