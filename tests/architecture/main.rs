//! The crates have one-way edges: what a crate must not know, it cannot reach. The table is the one in
//! `host/ARCHITECTURE.md`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

/// For each of our crates: the crates of ours that it may use directly, and what must not be anywhere
/// below it.
const RULES: &[(&str, &[&str], &[&str])] = &[
    ("blockhouse-block", &[], &["wasmtime", "wasmtime-wasi", "kvm-ioctls", "virtio-queue"]),
    ("blockhouse-sandbox", &["blockhouse-block"], &["kvm-ioctls", "virtio-queue"]),
    ("blockhouse-formats", &[], &["wasmtime", "kvm-ioctls", "virtio-queue"]),
    ("blockhouse-virtio", &["blockhouse-block"], &["wasmtime", "wasmtime-wasi", "kvm-ioctls"]),
    ("blockhouse-guest", &[], &["wasmtime", "kvm-ioctls", "virtio-queue"]),
    ("blockhouse-vhost", &["blockhouse-block", "blockhouse-virtio"], &["wasmtime", "wasmtime-wasi", "kvm-ioctls"]),
    ("blockhouse-vmm", &["blockhouse-block", "blockhouse-virtio", "blockhouse-guest"], &["wasmtime", "wasmtime-wasi"]),
    ("blockhouse-walls", &[], &["wasmtime", "wasmtime-wasi", "kvm-ioctls", "virtio-queue"]),
    ("blockhouse-plugin", &[], &["wasmtime", "kvm-ioctls", "imago", "vm-memory"]),
    ("blockhouse-raw", &["blockhouse-plugin"], &["wasmtime", "imago", "vm-memory"]),
    ("blockhouse-qcow2", &["blockhouse-plugin"], &["wasmtime", "imago", "vm-memory"]),
    ("blockhouse-vmdk", &["blockhouse-plugin"], &["wasmtime", "imago", "vm-memory"]),
    ("blockhouse-probe", &["blockhouse-plugin"], &["wasmtime", "imago", "vm-memory"]),
    ("blockhouse-template", &["blockhouse-plugin"], &["wasmtime", "imago", "vm-memory"]),
];

/// Only these may use them directly: so their types are in no other crate's interface.
const OWNERS: &[(&str, &[&str])] = &[
    ("wasmtime", &["blockhouse-sandbox"]),
    ("wasmtime-wasi", &["blockhouse-sandbox"]),
    ("kvm-ioctls", &["blockhouse-vmm"]),
    ("vhost", &["blockhouse-vhost", "blockhouse-tests"]),
    ("landlock", &["blockhouse-walls"]),
    ("imago", &["blockhouse-block", "blockhouse-tests"]),
    ("wit-bindgen", &["blockhouse-plugin", "blockhouse-probe"]),
];

struct Graph {
    ours: BTreeSet<String>,
    /// Normal dependencies by name, for every package in the tree.
    direct: BTreeMap<String, BTreeSet<String>>,
}

impl Graph {
    fn load() -> Self {
        let output = Command::new(env!("CARGO"))
            .args(["metadata", "--format-version=1", "--offline", "--locked"])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .expect("cargo runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let names: BTreeMap<&str, &str> = metadata["packages"]
            .as_array()
            .unwrap()
            .iter()
            .map(|package| (package["id"].as_str().unwrap(), package["name"].as_str().unwrap()))
            .collect();
        let ours = metadata["workspace_members"]
            .as_array()
            .unwrap()
            .iter()
            .map(|id| names[id.as_str().unwrap()].to_owned())
            .collect();
        let mut direct: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for node in metadata["resolve"]["nodes"].as_array().unwrap() {
            let from = direct.entry(names[node["id"].as_str().unwrap()].to_owned()).or_default();
            for dependency in node["deps"].as_array().unwrap() {
                // Development dependencies do not ship.
                let ships =
                    dependency["dep_kinds"].as_array().unwrap().iter().any(|kind| kind["kind"].as_str() != Some("dev"));
                if ships {
                    from.insert(names[dependency["pkg"].as_str().unwrap()].to_owned());
                }
            }
        }
        Self { ours, direct }
    }

    fn below(&self, name: &str) -> BTreeSet<String> {
        let mut seen = BTreeSet::new();
        let mut left = vec![name.to_owned()];
        while let Some(name) = left.pop() {
            for dependency in self.direct.get(&name).into_iter().flatten() {
                if seen.insert(dependency.clone()) {
                    left.push(dependency.clone());
                }
            }
        }
        seen
    }
}

#[test]
fn crates_know_only_what_they_may() {
    let graph = Graph::load();
    let mut wrong = Vec::new();
    for (name, may, must_not) in RULES {
        let direct = graph.direct.get(*name).unwrap_or_else(|| panic!("there is no crate {name}"));
        for dependency in direct.intersection(&graph.ours) {
            if !may.contains(&dependency.as_str()) {
                wrong.push(format!("{name} uses {dependency}"));
            }
        }
        let below = graph.below(name);
        for forbidden in *must_not {
            if below.contains(*forbidden) {
                wrong.push(format!("{name} reaches {forbidden}"));
            }
        }
    }
    assert!(wrong.is_empty(), "edges that host/ARCHITECTURE.md forbids:\n{}", wrong.join("\n"));
}

#[test]
fn each_engine_has_one_owner() {
    let graph = Graph::load();
    for (engine, owners) in OWNERS {
        for ours in &graph.ours {
            let uses = graph.direct.get(ours).is_some_and(|direct| direct.contains(*engine));
            assert!(!uses || owners.contains(&ours.as_str()), "{ours} uses {engine}; only {owners:?} may");
        }
    }
}

#[test]
fn the_named_packages_are_in_real_use() {
    let graph = Graph::load();
    for package in
        ["wasmtime", "wasmtime-wasi", "wit-bindgen", "imago", "virtio-queue", "vm-memory", "kvm-ioctls", "anyhow"]
    {
        let users: Vec<&String> =
            graph.ours.iter().filter(|ours| graph.direct.get(*ours).is_some_and(|d| d.contains(package))).collect();
        assert!(!users.is_empty(), "no crate of ours uses {package}");
    }
}
