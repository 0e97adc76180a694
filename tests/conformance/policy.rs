//! `host/docs/policy.md`: every key of a policy is there, and its example is a policy.

use std::collections::BTreeSet;
use std::path::Path;

use blockhouse_sandbox::Limits;
use blockhouse_tests::{blockhouse, component, noise, run, sha256};

use crate::commands::ended;
use crate::lab::Lab;

fn page() -> String {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("host/docs/policy.md");
    std::fs::read_to_string(file).unwrap()
}

/// The first example, and the digests in it: of a component, and of a base.
fn example(page: &str) -> (&str, &str, &str) {
    let example = page.split_once("```toml\n").unwrap().1.split_once("```").unwrap().0;
    let mut digests = example.split('"').filter(|text| text.len() == 64);
    (example, digests.next().unwrap(), digests.next().unwrap())
}

/// The rows of the table below a heading.
fn rows<'p>(page: &'p str, heading: &str) -> Vec<Vec<&'p str>> {
    let section = page.split("\n## ").find(|section| section.lines().next() == Some(heading)).unwrap();
    let rows = section.lines().filter(|line| line.starts_with("| `"));
    rows.map(|row| row.split('|').map(|cell| cell.trim().trim_matches('`')).collect()).collect()
}

/// The program says which keys there are, where it finds one that there is not.
#[test]
fn every_key_is_on_the_page() {
    let (lab, page) = (Lab::new(), page());
    let (example, ..) = example(&page);
    for (heading, table) in [("Keys", ""), ("Keys of `[[grants]]`", "[[grants]]"), ("Keys of `[limits]`", "[limits]")] {
        lab.write("policy.toml", format!("version = 1\n{table}\nno-key = 1\n").as_bytes());
        let command = ["create", "--format", "raw", "-o", "help", "--policy"];
        let outcome = run(blockhouse().args(command).arg(lab.path("policy.toml")));
        let message = outcome.refused().stderr;
        let known = message.trim().split_once("no-key: there is no such key; there is: ").unwrap().1;
        let known: BTreeSet<&str> = known.split(", ").collect();
        let rows = rows(&page, heading);
        assert_eq!(rows.iter().map(|row| row[1]).collect::<BTreeSet<_>>(), known, "{heading}");
        for row in rows {
            let key = row[1];
            if table == "[limits]" {
                assert_eq!(row[2].replace(',', "").parse().ok(), Limits::default().get(key), "{key}");
                continue;
            }
            let uses = |line: &str| {
                line.starts_with(&format!("{key} = "))
                    || [format!("[{key}]"), format!("[[{key}]]")].contains(&line.into())
            };
            assert!(example.lines().any(uses), "{key} is not in the example");
        }
    }
}

/// What the page says of its example, with files of that kind.
#[test]
fn the_example_is_a_policy() {
    let (lab, page) = (Lab::new(), page());
    let (example, of_component, of_base) = example(&page);
    let (content, built_in) = (noise(1, 1 << 20), std::fs::read(component("qcow2")).unwrap());
    lab.directory("bases");
    lab.write("bases/debian.raw", &content);
    let new = ["create", "--backing", "bases/debian.raw", "--backing-format", "raw", "--data-file", "vm1.data"];
    run(blockhouse().args(new).args(["--format", "qcow2", "vm1.qcow2"]).current_dir(lab.root())).succeeded();
    let policy = example.replace("/images", lab.root().canonicalize().unwrap().to_str().unwrap());
    let policy = policy.replace(of_component, &sha256(&built_in)).replace(of_base, &sha256(&content));
    let read = |policy: &str, more: &[&str]| {
        lab.write("policy.toml", policy.as_bytes());
        let arguments = ["read", "--format", "qcow2", "--policy", "policy.toml"];
        run(blockhouse().args(arguments).args(more).current_dir(lab.root()))
    };
    assert!(read(&policy, &["vm1.qcow2"]).succeeded().stdout == content);
    // Each part of it holds.
    std::fs::copy(lab.path("vm1.qcow2"), lab.path("vm2.qcow2")).unwrap();
    ended(&read(&policy, &["vm2.qcow2"]), 3, &["granted to other images of the chain"]);
    ended(&read(&policy, &["--allow", "vm2.qcow2", "vm1.qcow2"]), 3, &["does not grant"]);
    ended(&read(&policy, &["--plugin", "qcow2=x.wasm", "vm1.qcow2"]), 3, &["does not allow --plugin"]);
    let other = policy.replace(&sha256(&built_in), of_component);
    ended(&read(&other, &["vm1.qcow2"]), 3, &["does not allow the component for qcow2"]);
    let other = policy.replace(&sha256(&content), of_base);
    ended(&read(&other, &["vm1.qcow2"]), 3, &["its content has the sha256 "]);
}

/// A file is locked before it is overwritten or replaced, whichever formats images may have.
#[test]
fn a_policy_without_raw_images_lets_files_be_overwritten() {
    let lab = Lab::new();
    lab.write("policy.toml", b"version = 1\nformats = [\"qcow2\"]");
    let command = |arguments: &str| {
        run(blockhouse().current_dir(lab.root()).args(arguments.split(' ')).args(["--policy", "policy.toml"]))
    };
    command("create --format qcow2 a.qcow2 1M").succeeded();
    for _ in 0..2 {
        command("read --format qcow2 --force --output content a.qcow2").succeeded();
        command("convert --format qcow2 --to-format qcow2 --force a.qcow2 b.qcow2").succeeded();
    }
    assert_eq!(std::fs::read(lab.path("content")).unwrap(), vec![0; 1 << 20]);
}
