//! What a release says about what it consists of, so that whoever has it can check that, or build it again.

use std::fmt::Write as _;
use std::process::Command;

use anyhow::Result;

use crate::build_plugins::{self, Built};
use crate::sbom;
use crate::tools::{self, Workspace};

/// Print the part of the release notes that is made by a program: components with their digests.
///
/// Builds the components twice, from two places, and fails if a byte differs.
#[derive(clap::Args)]
pub(crate) struct Arguments {}

pub(crate) fn run(workspace: &Workspace, _: &Arguments) -> Result<()> {
    let built = build_plugins::build_for_release(workspace)?;
    let bill = sbom::text(workspace)?;
    // Without git, or outside of a clone, the notes do without.
    let commit = tools::text(Command::new("git").current_dir(&workspace.root).args(["rev-parse", "HEAD"])).ok();
    print!("{}", render(&built, &tools::sha256(bill.as_bytes()), commit.as_deref()));
    Ok(())
}

fn render(built: &Built, bill: &str, commit: Option<&str>) -> String {
    let mut text = String::from("## Components\n\n");
    if let Some(commit) = commit {
        let _ = writeln!(text, "Commit `{commit}`.");
    }
    let _ = writeln!(text, "Built by `{}` for `{}`.\n", built.compiler, build_plugins::TARGET);
    text.push_str("| component | bytes | sha256 |\n|---|---:|---|\n");
    for (name, bytes) in &built.components {
        let _ = writeln!(text, "| `{name}.wasm` | {} | `{}` |", bytes.len(), tools::sha256(bytes));
    }
    text.push_str(
        "\nThe same sources, `Cargo.lock` and compiler give the same bytes, wherever they lie: \
         `cargo xtask build-plugins --check-reproducible`, then `sha256sum --check SHA256SUMS` in \
         `target/components`. `blockhouse plugin list` shows the digests of what a program has built in.\n\n\
         ## Bill of materials\n\n",
    );
    let _ = writeln!(text, "`cargo xtask sbom` writes it (CycloneDX 1.5, sha256 `{bill}`).");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_notes_name_every_component_with_its_whole_digest() {
        let components = [("one".to_owned(), b"1".to_vec()), ("two".to_owned(), b"22".to_vec())].into();
        let built = Built { compiler: "rustc 1.95.0".to_owned(), components };
        let text = render(&built, "abcd", Some("1234"));
        for part in [
            "Commit `1234`.",
            "`rustc 1.95.0`",
            "| `one.wasm` | 1 | `6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b` |",
            "| `two.wasm` | 2 | `785f3ec7eb32f30b90cd0fcf3657d388b5ff4297f2f9716ff66e9b69c05ddd09` |",
            "sha256 `abcd`",
        ] {
            assert!(text.contains(part), "no {part:?} in:\n{text}");
        }
        assert!(!render(&built, "abcd", None).contains("Commit"));
    }
}
