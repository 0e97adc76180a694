//! The contract's documents say what the code does: the authority table is the one that the host links
//! by, the reference page is generated from the WIT, and the author's manual has each method of the tool kit.
//!
//! `UPDATE=1 cargo test --package blockhouse-tests --test contract` writes both anew.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod methods;
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

/// As [`check`], for what is between two marks.
fn check_part(file: &Path, name: &str, wanted: &str) {
    let (start, end) = (format!("<!-- {name}: generated, see tests -->\n"), format!("<!-- end of {name} -->"));
    let text = std::fs::read_to_string(file).unwrap();
    let (before, rest) = text.split_once(&start).expect("the start mark");
    let (_, after) = rest.split_once(&end).expect("the end mark");
    check(file, &format!("{before}{start}{wanted}{end}{after}"));
}

#[test]
fn the_authority_table_is_the_one_the_host_links_by() {
    check_part(&wit().join("README.md"), "authority table", &blockhouse_sandbox::authority::table());
}

#[test]
fn the_manual_has_every_method() {
    let plugins = wit().with_file_name("plugins");
    check_part(&plugins.join("README.md"), "every method", &methods::generate(&plugins.join("sdk/src")));
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
