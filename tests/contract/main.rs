//! The contract's documents say what the code does: the authority table is the one that the host links
//! by, and the reference page is generated from the WIT.
//!
//! `UPDATE=1 cargo test --package blockhouse-tests --test contract` writes both anew.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod reference;

use std::path::{Path, PathBuf};

fn wit() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("wit")
}

fn check(file: &Path, wanted: &str) {
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(file, wanted).unwrap();
    }
    let there = std::fs::read_to_string(file).unwrap_or_default();
    assert!(
        there == wanted,
        "{} is out of date; write it anew with: UPDATE=1 cargo test --package blockhouse-tests --test contract",
        file.display()
    );
}

#[test]
fn the_authority_table_is_the_one_the_host_links_by() {
    const START: &str = "<!-- authority table: generated, see tests -->\n";
    const END: &str = "<!-- end of authority table -->";
    let file = wit().join("README.md");
    let text = std::fs::read_to_string(&file).unwrap();
    let (before, rest) = text.split_once(START).expect("the start mark");
    let (_, after) = rest.split_once(END).expect("the end mark");
    check(&file, &format!("{before}{START}{}{END}{after}", blockhouse_sandbox::authority::table()));
}

#[test]
fn the_reference_is_generated_from_the_wit() {
    check(&wit().join("reference.md"), &reference::generate(&wit()));
}

#[test]
fn every_item_is_documented_and_says_since_when() {
    let missing = reference::undocumented(&wit());
    assert!(missing.is_empty(), "without documentation or stability mark:\n{}", missing.join("\n"));
}
