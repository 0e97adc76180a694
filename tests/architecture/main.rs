//! The crates have one-way edges: what a crate must not know, it cannot reach. The table is the one in
//! `host/ARCHITECTURE.md`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

/// For each of our crates: the crates of ours that it may use directly, and what must not be anywhere
/// below it.
const RULES: &[(&str, &[&str], &[&str])] = &[
    ("blockhouse-block", &[], &["wasmtime", "wasmtime-wasi", "kvm-ioctls", "virtio-queue"]),
    ("blockhouse-sandbox", &["blockhouse-block"], &["kvm-ioctls", "virtio-queue"]),
    ("blockhouse-imago", &["blockhouse-block"], &["wasmtime", "wasmtime-wasi", "kvm-ioctls", "virtio-queue"]),
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
    (
        "blockhouse-fuzz",
        &[
            "blockhouse-block",
            "blockhouse-plugin",
            "blockhouse-probe",
            "blockhouse-qcow2",
            "blockhouse-raw",
            "blockhouse-template",
            "blockhouse-vhost",
            "blockhouse-virtio",
            "blockhouse-vmdk",
        ],
        &["wasmtime", "wasmtime-wasi", "kvm-ioctls"],
    ),
];

/// Only these may use them directly: so their types are in no other crate's interface.
const OWNERS: &[(&str, &[&str])] = &[
    ("wasmtime", &["blockhouse-sandbox"]),
    ("wasmtime-wasi", &["blockhouse-sandbox"]),
    ("kvm-ioctls", &["blockhouse-vmm"]),
    ("vhost", &["blockhouse-vhost", "blockhouse-tests"]),
    ("landlock", &["blockhouse-walls"]),
    (
        "imago",
        &["blockhouse-bench", "blockhouse-block", "blockhouse-imago", "blockhouse-imago-vmm", "blockhouse-tests"],
    ),
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

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// `host/docs/threat-model.md` names a test for each boundary, as `file::test`.
#[test]
fn the_tests_of_the_threat_model_exist() {
    let page = std::fs::read_to_string(root().join("host/docs/threat-model.md")).unwrap();
    let mut missing = Vec::new();
    let mut named = 0;
    for reference in page.split('`').skip(1).step_by(2) {
        let Some((file, test)) = reference.split_once(".rs::") else { continue };
        let file = format!("{file}.rs");
        named += 1;
        let text = std::fs::read_to_string(root().join(&file)).unwrap_or_default();
        if !has_test(&text, test) {
            missing.push(reference);
        }
    }
    assert!(missing.is_empty(), "the threat model names tests that are not there:\n{}", missing.join("\n"));
    assert!(named > 40, "only {named} tests are named");
    // Each row of a boundary is held by something.
    let boundaries = page.split_once("## Boundary by boundary").unwrap().1;
    for row in boundaries.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| attack ")) {
        assert!(row.contains(".rs::") || row.contains("`cargo xtask "), "no test holds this: {row}");
    }
    let policy = std::fs::read_to_string(root().join(".github/SECURITY.md")).unwrap();
    assert!(policy.contains("../host/docs/threat-model.md"));
}

/// Whatever is written as JSON is fit for a terminal: nobody writes it past `json.rs` but for a file that nobody reads.
#[test]
fn json_is_written_in_one_place() {
    let mut elsewhere = BTreeSet::new();
    let mut directories = vec![root().join("host")];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            // Not tests, nor the tools of who works on this.
            if path.is_dir() && !["tests", "xtask"].contains(&name) {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                let product = text.split("\nmod tests {").next().unwrap();
                if ["serde_json::to_", "serde_json::ser", "serde_json::Ser", "serde_json::{", "json!"]
                    .iter()
                    .any(|way| product.contains(way))
                {
                    elsewhere.insert(path.strip_prefix(root().join("host")).unwrap().to_str().unwrap().to_owned());
                }
            }
        }
    }
    let known = ["sandbox/src/compiled.rs", "sandbox/src/json.rs"];
    assert_eq!(elsewhere, known.map(str::to_owned).into());
}

/// `host/docs/fuzzing.md` says of each target what it feeds, and of no other.
#[test]
fn the_fuzz_targets_are_those_of_the_page() {
    let page = std::fs::read_to_string(root().join("host/docs/fuzzing.md")).unwrap();
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
    let mut named: Vec<String> = rows.map(|(target, _)| target.to_owned()).collect();
    let entries = std::fs::read_dir(root().join("tests/fuzz/targets")).unwrap();
    let mut targets: Vec<String> =
        entries.map(|entry| entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned()).collect();
    named.sort();
    targets.sort();
    assert_eq!(named, targets);
}

/// Whether the text has a function of that name that is a test, and is run.
fn has_test(text: &str, name: &str) -> bool {
    let mut lines = text.lines().map(str::trim);
    // What stands before a function, down to what is not an attribute or a comment.
    let (mut is_test, mut is_ignored) = (false, false);
    lines.any(|line| {
        is_test |= line == "#[test]";
        is_ignored |= line.starts_with("#[ignore");
        if line.starts_with("#[") || line.starts_with("//") {
            return false;
        }
        let found = is_test && !is_ignored && line.starts_with(&format!("fn {name}("));
        (is_test, is_ignored) = (false, false);
        found
    })
}

#[test]
fn a_test_that_is_not_run_holds_nothing() {
    let text = "#[test]\nfn a() {}\n/// Why.\n#[test]\n#[allow(unused)]\n/// It.\nfn b() {}\nfn c() {}\n\
                #[ignore = \"slow\"]\n#[test]\nfn d() {}\n#[test]\n#[ignore]\nfn e() {}\n#[test]\nfn ab() {}\n";
    let found: Vec<&str> = ["a", "b", "c", "d", "e", "ab"].into_iter().filter(|name| has_test(text, name)).collect();
    assert_eq!(found, ["a", "b", "ab"]);
}

/// Two programs read the database of advisories, each with a list of exceptions of its own.
#[test]
fn exceptions_of_advisories_are_reasoned_and_the_same() {
    let read = |file: &str| std::fs::read_to_string(root().join(file)).unwrap();
    // The list without comments, from its bracket to the one that closes it.
    let list = |text: &str| -> String {
        let lines: Vec<&str> = text.lines().map(|line| line.split('#').next().unwrap()).collect();
        let text = lines.join("\n");
        let (_, advisories) = text.split_once("[advisories]").unwrap();
        let (_, list) = advisories.split_once("ignore = [").unwrap();
        list.split_once(']').unwrap().0.to_owned()
    };
    let ids = |list: &str| -> BTreeSet<String> {
        list.split('"').filter(|word| word.starts_with("RUSTSEC-")).map(str::to_owned).collect()
    };
    let (deny, audit) = (list(&read(".deny.toml")), list(&read(".cargo/audit.toml")));
    assert_eq!(ids(&deny), ids(&audit), "the exceptions of .deny.toml and .cargo/audit.toml differ");
    for exception in deny.split('{').skip(1) {
        assert!(exception.contains("reason = \""), "an exception has no reason: {{{exception}");
    }
    assert_eq!(deny.matches('{').count(), ids(&deny).len(), "each exception is a table with a reason");
    assert_eq!(ids("{ id = \"RUSTSEC-2026-0001\", reason = \"r\" }").len(), 1);
}
