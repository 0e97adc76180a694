//! Every format against its reference implementation: images by QEMU, read by Blockhouse as QEMU and
//! imago read them.
//!
//! | file | what |
//! |---|---|
//! | `qcow2.rs`, `chains.rs`, `vmdk.rs` | the catalogue: how each image is made |
//! | `case.rs` | what is compared for each: content, map, chain |
//! | `map.rs`, `info.rs`, `imago.rs`, `content.rs` | how it is compared |
//! | `lab.rs` | qemu-img, qemu-io, a pen that draws on disks |
//! | `golden.rs` | the images under `tests/images`, for machines without QEMU |
//! | `commands.rs`, `refusals.rs` | `read`, `probe`, `plugin`; what is refused, and how |
//! | `maintenance.rs` | `snapshot list` |
//! | `policy.rs` | the page about policies |
//! | `streams.rs` | standard output and error that cannot be written |
//! | `embed.rs`, `author.rs` | the example `examples/embed`; workspaces of other people, and the installation, as the README and the manual have them |
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod author;
mod case;
mod chains;
mod commands;
mod content;
mod embed;
mod golden;
mod imago;
mod info;
mod lab;
mod maintenance;
mod map;
mod policy;
mod qcow2;
mod refusals;
mod streams;
mod vmdk;

use std::collections::BTreeSet;

use case::{Case, check_all};

/// A part of the catalogue: what it is called, and its images.
type Topic = (&'static str, fn() -> Vec<Case>);

const PLAIN: Topic = ("qcow2, clusters and versions", qcow2::plain);
const COMPRESSED: Topic = ("qcow2, compressed", qcow2::compressed);
const EXTENDED_L2: Topic = ("qcow2, extended L2", qcow2::extended_l2);
const LAYOUT: Topic = ("qcow2, preallocation and refcounts", qcow2::layout);
const SIZES: Topic = ("qcow2, sizes", qcow2::sizes);
const RESIZED: Topic = ("qcow2, resized", qcow2::resized);
const DATA_FILES: Topic = ("qcow2, data files", qcow2::data_files);
const SNAPSHOTS: Topic = ("qcow2, snapshots", qcow2::snapshots);
const CHAINS: Topic = ("chains", chains::chains);
const RAW: Topic = ("raw", chains::raw);
const VMDK: Topic = ("vmdk", vmdk::vmdk);

#[test]
fn qcow2_clusters_and_versions() {
    check_all(PLAIN);
}

#[test]
fn qcow2_compressed() {
    check_all(COMPRESSED);
}

#[test]
fn qcow2_extended_l2() {
    check_all(EXTENDED_L2);
}

#[test]
fn qcow2_preallocation_and_refcounts() {
    check_all(LAYOUT);
}

#[test]
fn qcow2_sizes() {
    check_all(SIZES);
}

#[test]
fn qcow2_resized() {
    check_all(RESIZED);
}

#[test]
fn qcow2_data_files() {
    check_all(DATA_FILES);
}

#[test]
fn qcow2_snapshots() {
    check_all(SNAPSHOTS);
}

#[test]
fn backing_chains() {
    check_all(CHAINS);
}

#[test]
fn raw_images() {
    check_all(RAW);
}

#[test]
fn vmdk_images() {
    check_all(VMDK);
}

/// The promise is at least 60 images, each of which can be told apart in a message.
#[test]
fn the_catalogue_is_as_large_as_promised() {
    let topics = [PLAIN, COMPRESSED, EXTENDED_L2, LAYOUT, SIZES, RESIZED, DATA_FILES, SNAPSHOTS, CHAINS, RAW, VMDK];
    let names: Vec<String> = topics.iter().flat_map(|(_, cases)| cases()).map(|case| case.name).collect();
    let distinct: BTreeSet<&String> = names.iter().collect();
    assert_eq!(distinct.len(), names.len(), "two images have one name");
    assert!(names.len() >= 150, "{} images", names.len());
}
