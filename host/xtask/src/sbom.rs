//! The software bill of materials: every package that the program and the components are made of.
//!
//! CycloneDX 1.5 as JSON, of what cargo resolved and `Cargo.lock` pinned: the same tree gives the same bytes.
//! Packages that are only needed to build (macros, build scripts) have the scope `excluded`; what only tests
//! use is not in it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::build_plugins;
use crate::tools::{self, Workspace};

/// What the program is built for.
const HOST: &str = "x86_64-unknown-linux-gnu";
/// The package of the program.
const PROGRAM: &str = "blockhouse";

/// Write the software bill of materials of the program and the components (CycloneDX JSON).
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Where to; `-` is standard output. [default: blockhouse.cdx.json in the target directory]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    let text = text(workspace)?;
    if arguments.output.as_deref().is_some_and(|path| path.as_os_str() == "-") {
        print!("{text}");
        return Ok(());
    }
    let path = arguments.output.clone().unwrap_or_else(|| workspace.target.join("blockhouse.cdx.json"));
    tools::write_if_changed(&path, text.as_bytes())?;
    println!("{}  {}", tools::sha256(text.as_bytes()), path.display());
    Ok(())
}

/// The document for the tree as it is.
pub(crate) fn text(workspace: &Workspace) -> Result<String> {
    let lock = workspace.root.join("Cargo.lock");
    let lock = std::fs::read_to_string(&lock).with_context(|| format!("cannot read {}", lock.display()))?;
    let components = build_plugins::packages(workspace)?;
    let program = [PROGRAM.to_owned()];
    let trees = [
        (metadata(workspace, HOST)?, program.as_slice()),
        (metadata(workspace, build_plugins::TARGET)?, components.as_slice()),
    ];
    let bill = bill(&trees.each_ref().map(|(metadata, roots)| (metadata, *roots)), &checksums(&lock))?;
    Ok(serde_json::to_string_pretty(&bill)? + "\n")
}

/// What cargo resolves for a target.
fn metadata(workspace: &Workspace, target: &str) -> Result<Value> {
    let output = tools::output(tools::cargo().current_dir(&workspace.root).args([
        "metadata",
        "--format-version=1",
        "--locked",
        "--filter-platform",
        target,
    ]))?;
    serde_json::from_slice(&output.stdout).context("`cargo metadata` did not print JSON")
}

/// The SHA-256 of each package from a registry, by name and version. `Cargo.lock` is written by cargo, one key
/// a line.
fn checksums(lock: &str) -> BTreeMap<(String, String), String> {
    let mut sums = BTreeMap::new();
    for package in lock.split("[[package]]").skip(1) {
        let value = |key: &str| {
            let line = package.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(" = \""))?;
            line.strip_suffix('"').map(str::to_owned)
        };
        if let (Some(name), Some(version), Some(sum)) = (value("name"), value("version"), value("checksum")) {
            sums.insert((name, version), sum);
        }
    }
    sums
}

/// One package, as the document lists it.
struct Package {
    value: Value,
    /// Whether it ends up in what is shipped.
    ships: bool,
    needs: BTreeSet<String>,
}

/// The document: from each tree, the packages below its roots.
fn bill(trees: &[(&Value, &[String])], checksums: &BTreeMap<(String, String), String>) -> Result<Value> {
    let mut packages: BTreeMap<String, Package> = BTreeMap::new();
    let mut program = None;
    for (metadata, roots) in trees {
        let by_id = index(metadata, "/packages")?;
        let nodes = index(metadata, "/resolve/nodes")?;
        let reference = |id: &str| by_id.get(id).with_context(|| format!("{id} is no package")).and_then(|it| purl(it));
        // A package that ships is visited as such even if it was met as a tool before.
        let mut left: Vec<(&str, bool)> = Vec::new();
        for root in *roots {
            let package = by_id.iter().find(|(id, package)| {
                package.get("name").and_then(Value::as_str) == Some(root) && nodes.contains_key(**id)
            });
            let (id, package) = package.with_context(|| format!("there is no package {root}"))?;
            if root == PROGRAM {
                program = Some(component(package, "application", checksums)?);
            }
            left.push((id, true));
        }
        while let Some((id, ships)) = left.pop() {
            let package = by_id.get(id).with_context(|| format!("{id} is no package"))?;
            let known = packages.get(&purl(package)?);
            if known.is_some_and(|known| known.ships || !ships) {
                continue;
            }
            let macros = has_target(package, "proc-macro");
            let ships = ships && !macros;
            let mut needs = known.map(|known| known.needs.clone()).unwrap_or_default();
            for dependency in nodes.get(id).and_then(|node| node.get("deps")?.as_array()).into_iter().flatten() {
                let kinds = dependency.get("dep_kinds").and_then(Value::as_array).into_iter().flatten();
                let kinds: Vec<Option<&str>> = kinds.map(|kind| kind.get("kind").and_then(Value::as_str)).collect();
                let below = dependency.get("pkg").and_then(Value::as_str).context("a dependency has no package")?;
                let normal = kinds.contains(&None);
                if normal || kinds.contains(&Some("build")) {
                    needs.insert(reference(below)?);
                    left.push((below, ships && normal));
                }
            }
            let value = component(package, "library", checksums)?;
            packages.insert(purl(package)?, Package { value, ships, needs });
        }
    }
    let Some(program) = program else { bail!("the program is not in the tree") };
    let mut components = Vec::new();
    let mut dependencies = Vec::new();
    for (reference, Package { mut value, ships, needs }) in packages {
        let is_program = program.get("bom-ref").and_then(Value::as_str) == Some(&reference);
        if let (false, Some(fields)) = (is_program, value.as_object_mut()) {
            fields.insert("scope".to_owned(), json!(if ships { "required" } else { "excluded" }));
            components.push(value);
        }
        dependencies.push(json!({ "ref": reference, "dependsOn": needs }));
    }
    Ok(json!({
        "$schema": "http://cyclonedx.org/schema/bom-1.5.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": { "component": program },
        "components": components,
        "dependencies": dependencies,
    }))
}

/// The objects of a list by their ids.
fn index<'v>(metadata: &'v Value, list: &str) -> Result<BTreeMap<&'v str, &'v Value>> {
    let list =
        metadata.pointer(list).and_then(Value::as_array).with_context(|| format!("no {list} in the metadata"))?;
    Ok(list.iter().filter_map(|value| Some((value.get("id")?.as_str()?, value))).collect())
}

fn field<'v>(package: &'v Value, name: &str) -> Result<&'v str> {
    package.get(name).and_then(Value::as_str).with_context(|| format!("a package has no {name}"))
}

/// The name of a package for people and tools: `pkg:cargo/serde@1.0.228`.
fn purl(package: &Value) -> Result<String> {
    // The plus of build metadata has a meaning in URLs.
    Ok(format!("pkg:cargo/{}@{}", field(package, "name")?, field(package, "version")?.replace('+', "%2B")))
}

fn has_target(package: &Value, kind: &str) -> bool {
    let targets = package.get("targets").and_then(Value::as_array).into_iter().flatten();
    let mut kinds = targets.flat_map(|target| target.get("kind").and_then(Value::as_array).into_iter().flatten());
    kinds.any(|found| found.as_str() == Some(kind))
}

/// A package as a component of the document.
fn component(package: &Value, kind: &str, checksums: &BTreeMap<(String, String), String>) -> Result<Value> {
    let (name, version) = (field(package, "name")?, field(package, "version")?);
    let reference = purl(package)?;
    let mut value = json!({
        "type": kind,
        "bom-ref": reference,
        "name": name,
        "version": version,
        "purl": reference,
    });
    let fields = value.as_object_mut().context("an object")?;
    if let Some(license) = package.get("license").and_then(Value::as_str) {
        // An older way to write it.
        let expression = if license.contains(" OR ") { license.to_owned() } else { license.replace('/', " OR ") };
        fields.insert("licenses".to_owned(), json!([{ "expression": expression }]));
    }
    if let Some(sum) = checksums.get(&(name.to_owned(), version.to_owned())) {
        fields.insert("hashes".to_owned(), json!([{ "alg": "SHA-256", "content": sum }]));
    } else if package.get("source").is_some_and(|source| !source.is_null()) {
        bail!("{name} {version} has no checksum in Cargo.lock");
    }
    Ok(value)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    fn package(name: &str, kind: &str, source: Option<&str>) -> Value {
        json!({
            "id": format!("{name}#1"), "name": name, "version": "1.0.0+x", "license": "MIT/Apache-2.0",
            "source": source, "targets": [{ "kind": [kind] }],
        })
    }

    fn needs(name: &str, kinds: &[Option<&str>]) -> Value {
        let kinds: Vec<Value> = kinds.iter().map(|kind| json!({ "kind": kind })).collect();
        json!({ "pkg": format!("{name}#1"), "dep_kinds": kinds })
    }

    fn tree() -> Value {
        let registry = Some("registry+somewhere");
        json!({
            "packages": [
                package("blockhouse", "bin", None),
                package("used", "lib", registry),
                package("both", "lib", registry),
                package("builder", "lib", registry),
                package("derive", "proc-macro", registry),
                package("below-derive", "lib", registry),
                package("tests", "lib", registry),
            ],
            "resolve": { "nodes": [
                { "id": "blockhouse#1", "deps": [
                    needs("builder", &[Some("build")]), needs("used", &[None]), needs("derive", &[None]),
                    needs("tests", &[Some("dev")]),
                ] },
                { "id": "used#1", "deps": [needs("both", &[None, Some("dev")])] },
                { "id": "both#1", "deps": [] },
                { "id": "builder#1", "deps": [needs("both", &[None])] },
                { "id": "derive#1", "deps": [needs("below-derive", &[None])] },
                { "id": "below-derive#1", "deps": [] },
                { "id": "tests#1", "deps": [] },
            ] },
        })
    }

    fn sums() -> BTreeMap<(String, String), String> {
        let names = ["used", "both", "builder", "derive", "below-derive"];
        names.map(|name| ((name.to_owned(), "1.0.0+x".to_owned()), format!("sum of {name}"))).into()
    }

    #[test]
    fn what_ships_what_builds_and_what_is_left_out() {
        let roots = ["blockhouse".to_owned()];
        let bill = bill(&[(&tree(), &roots)], &sums()).unwrap();
        assert_eq!(bill["metadata"]["component"]["bom-ref"], "pkg:cargo/blockhouse@1.0.0%2Bx");
        let scopes: Vec<(&str, &str)> = bill["components"]
            .as_array()
            .unwrap()
            .iter()
            .map(|it| (it["name"].as_str().unwrap(), it["scope"].as_str().unwrap()))
            .collect();
        let expected = [
            ("below-derive", "excluded"),
            ("both", "required"),
            ("builder", "excluded"),
            ("derive", "excluded"),
            ("used", "required"),
        ];
        assert_eq!(scopes, expected);
        let both = &bill["components"][1];
        assert_eq!(both["licenses"][0]["expression"], "MIT OR Apache-2.0");
        assert_eq!(both["hashes"][0], json!({ "alg": "SHA-256", "content": "sum of both" }));
        let edges = bill["dependencies"].as_array().unwrap();
        assert_eq!(edges.len(), 6);
        let program = edges.iter().find(|edge| edge["ref"] == "pkg:cargo/blockhouse@1.0.0%2Bx").unwrap();
        assert_eq!(program["dependsOn"].as_array().unwrap().len(), 3);
    }

    #[test]
    fn a_package_without_a_checksum_is_an_error() {
        let mut sums = sums();
        sums.remove(&("used".to_owned(), "1.0.0+x".to_owned()));
        let error = bill(&[(&tree(), &["blockhouse".to_owned()])], &sums).unwrap_err().to_string();
        assert_eq!(error, "used 1.0.0+x has no checksum in Cargo.lock");
        assert!(bill(&[(&tree(), &["nothing".to_owned()])], &sums).is_err());
    }

    #[test]
    fn checksums_are_read_from_the_lock_file() {
        let lock = "version = 4\n\n[[package]]\nname = \"a\"\nversion = \"1.0.0\"\nsource = \"registry+x\"\n\
                    checksum = \"12ab\"\ndependencies = [\n \"b\",\n]\n\n[[package]]\nname = \"b\"\nversion = \"0.1.0\"\n";
        assert_eq!(checksums(lock), [(("a".to_owned(), "1.0.0".to_owned()), "12ab".to_owned())].into());
    }

    /// The document of this very tree: the same twice, and complete.
    #[test]
    fn this_tree() {
        let workspace = Workspace::load().unwrap();
        let text = super::text(&workspace).unwrap();
        assert_eq!(text, super::text(&workspace).unwrap());
        let bill: Value = serde_json::from_str(&text).unwrap();
        let components = bill["components"].as_array().unwrap();
        let by_name = |name: &str| components.iter().find(|it| it["name"] == name);
        for name in ["wasmtime", "blockhouse-sandbox", "blockhouse-qcow2", "kvm-ioctls", "landlock", "ruzstd"] {
            assert_eq!(by_name(name).unwrap()["scope"], "required", "{name}");
        }
        assert_eq!(by_name("syn").unwrap()["scope"], "excluded");
        assert!(by_name("proptest").is_none(), "only tests use it");
        let known: BTreeSet<&str> = components.iter().map(|it| it["bom-ref"].as_str().unwrap()).collect();
        assert_eq!(known.len(), components.len());
        for component in components {
            assert!(component["licenses"][0]["expression"].is_string(), "{component}");
            let ours = component["name"].as_str().unwrap().starts_with("blockhouse-");
            assert!(ours || component["hashes"][0]["content"].as_str().unwrap().len() == 64, "{component}");
        }
        for edge in bill["dependencies"].as_array().unwrap() {
            for below in edge["dependsOn"].as_array().unwrap() {
                assert!(known.contains(below.as_str().unwrap()), "{below} is not listed");
            }
        }
        for place in [workspace.root.to_str().unwrap(), "registry+", "index."] {
            assert!(!text.contains(place), "the document tells of this machine: {place}");
        }
    }
}
