//! What the author's manual has people write in a repository of their own, tried.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use blockhouse_tests::{blockhouse, run, run_within, skip, target_directory};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// The blocks of the section, by the language that they are marked with.
fn written(language: &str) -> String {
    let manual = std::fs::read_to_string(root().join("plugins/README.md")).unwrap();
    let (_, section) = manual.split_once("\n### In a repository of your own\n").expect("the section");
    let section = section.split_once("\n## ").expect("another section").0;
    let (_, block) = section.split_once(&format!("```{language}\n")).unwrap_or_else(|| panic!("no {language}"));
    block.split_once("```").unwrap().0.to_owned()
}

/// Whether the toolchain comes with the library for components: a crate of somebody else has no `xtask` to find one.
fn target_is_here() -> bool {
    let mut rustc = Command::new("rustc");
    let library = run(rustc.args(["--print", "target-libdir", "--target", "wasm32-wasip2"])).succeeded().text();
    let here = Path::new(library.trim()).is_dir();
    if !here {
        skip("the toolchain has no library for wasm32-wasip2");
    }
    here
}

/// The manifest, the first lines and the command make a component; without the first line, the error is the one that
/// the manual explains.
#[test]
fn a_crate_in_a_repository_of_its_own() {
    if !target_is_here() {
        return;
    }
    // It stays, so that what it depends on is compiled once.
    let mine = target_directory().join("author");
    std::fs::create_dir_all(mine.join("src")).unwrap();
    let sdk = format!("{{ path = {:?} }}", root().join("plugins/sdk"));
    let manifest = written("toml").replace("{ git = \"URL\", rev = \"REVISION\" }", &sdk);
    assert!(manifest.contains(&sdk), "{manifest}");
    std::fs::write(mine.join("Cargo.toml"), manifest + "\n[workspace]\n").unwrap();
    // The versions that are here.
    std::fs::copy(root().join("Cargo.lock"), mine.join("Cargo.lock")).unwrap();
    let template = std::fs::read_to_string(root().join("plugins/template/src/lib.rs")).unwrap();
    let template = template.replace("Template", "Mine").replace("template", "mine");
    let (_, rest) = template.split_once("extern crate alloc;\n").unwrap();

    let command = written("sh");
    let build = |top: &str| {
        std::fs::write(mine.join("src/lib.rs"), format!("{top}{rest}")).unwrap();
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.current_dir(&mine).args(command.trim().strip_prefix("cargo ").unwrap().split(' '));
        for name in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_TARGET"] {
            cargo.env_remove(name);
        }
        run_within(Duration::from_secs(600), cargo.args(["--offline", "--target-dir"]).arg(mine.join("target")))
    };
    let top = written("rust");
    let (no_std, with_std) = top.split_once('\n').unwrap();
    assert!(no_std.contains("no_std"), "{top}");
    let refused = build(with_std).refused();
    let manual = std::fs::read_to_string(root().join("plugins/README.md")).unwrap();
    for part in ["error[E0152]", "panic_impl"] {
        assert!(refused.stderr.contains(part) && manual.contains(part), "{part}: {}", refused.stderr);
    }

    let made: PathBuf = mine.join("target/wasm32-wasip2/release/mine.wasm");
    // One that was made before proves nothing.
    let _ = std::fs::remove_file(&made);
    build(&top).succeeded();
    let inspect = run(blockhouse().args(["plugin", "inspect"]).arg(made)).succeeded().text();
    assert!(inspect.contains("world     read-only-format"), "{inspect}");
}
