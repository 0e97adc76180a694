//! The library from outside: the example `examples/embed`, run as its page says, and a workspace of somebody else.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use blockhouse_tests::{component, landlock_is_here, on_path, run, run_within, sha256, skip, target_directory};

use crate::case::have_qemu;
use crate::content::Content;
use crate::lab::{Lab, Pen};

/// Builds the example as the program under test is built, so that nothing is compiled twice.
fn example() -> PathBuf {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(env!("CARGO_MANIFEST_DIR")).args([
        "build",
        "--quiet",
        "--locked",
        "--workspace",
        "--bin",
        "blockhouse-embed",
    ]);
    run_within(Duration::from_secs(900), &mut cargo).succeeded();
    target_directory().join("debug/blockhouse-embed")
}

#[test]
fn the_embedding_example() {
    if !have_qemu() {
        return;
    }
    let lab = Lab::new();
    for directory in ["images", "elsewhere"] {
        lab.directory(directory);
    }
    let size = (2 << 20) + 512;
    lab.raw("images/base.raw", size, &[(0, 1 << 20)]);
    lab.qemu_img("create -q -f qcow2 -b base.raw -F raw images/overlay.qcow2");
    Pen::new(&lab, "qcow2", "images/overlay.qcow2", size, 64 << 10).everything().done();

    let example = example();
    let qcow2 = component("qcow2");
    let (base, overlay) = (lab.absolute("images/base.raw"), lab.absolute("images/overlay.qcow2"));
    let command = |granted: &str| {
        let mut command = Command::new(&example);
        command.arg(&qcow2).args([&lab.absolute(granted), &overlay]);
        command
    };

    // The content, by QEMU, through the example's own checksum.
    lab.qemu_img("convert -t unsafe -f qcow2 -O raw images/overlay.qcow2 expected");
    let expected = Content::open(&lab.path("expected"));
    assert_eq!(expected.size(), size);
    let mut bytes = vec![0; usize::try_from(size).unwrap()];
    expected.read(0, &mut bytes);
    let sum = bytes.iter().fold(0u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)));

    let granted = lab.absolute("images");
    let digest = sha256(&std::fs::read(&qcow2).unwrap());
    assert_eq!(
        run(&mut command("images")).succeeded().text(),
        format!(
            "component {digest} (9 imported functions)\n\
             audit: {overlay}: allowed {base:?} read-only (grant {granted})\n\
             layer 0: {overlay} (qcow2, {size} bytes)\n\
             layer 1: {base} (raw, {size} bytes)\n\
             read {size} bytes, checksum {sum:016x}\n"
        )
    );

    the_walls_stand(&lab, &mut command("images"));

    // The same image with a grant that does not hold its base.
    let refused = run(&mut command("elsewhere")).refused();
    let denied = format!("audit: {overlay}: denied {base:?} read-only: ");
    assert!(refused.text().lines().any(|line| line.starts_with(&denied)), "{}", refused.text());
    assert!(!refused.text().contains("layer") && !refused.text().contains("checksum"), "{}", refused.text());
    assert!(refused.stderr.contains(&base) && refused.stderr.contains("not granted"), "{}", refused.stderr);
}

/// The walls go up, are made narrower before an image is opened, and close; the process that compiles has its own.
fn the_walls_stand(lab: &Lab, command: &mut Command) {
    if !landlock_is_here() {
        return;
    }
    if !on_path("strace") {
        return skip("strace is not installed");
    }
    let mut strace = Command::new("strace");
    strace.args(["-f", "-e", "signal=none", "-e", "trace=execve,openat,seccomp,landlock_restrict_self", "-o"]);
    strace.arg(lab.path("trace")).arg(command.get_program()).args(command.get_args());
    run(&mut strace).succeeded();
    let trace = std::fs::read_to_string(lab.path("trace")).unwrap();
    let started: Vec<&str> = trace.lines().filter(|line| line.contains(" execve(")).collect();
    let [program, compiler] = started.as_slice() else { panic!("a program, and a compiler: {trace}") };
    assert!(compiler.contains("--compile-for-parent"), "{compiler}");
    let walls = |of: &str| {
        let (process, _) = of.split_once(' ').unwrap();
        let calls = trace.lines().filter_map(|line| line.strip_prefix(process));
        let known = ["landlock_restrict_self", "seccomp(", "qcow2.wasm\", O_RDONLY", "overlay.qcow2\", O_RDONLY"];
        // To plan a path is to find it, and not to open what is there.
        let opened = calls.filter(|call| !call.contains("O_PATH") && !call.contains("execve("));
        let mut order: Vec<&str> = opened.filter_map(|call| known.into_iter().find(|it| call.contains(it))).collect();
        order.dedup();
        order.iter().map(|call| call.split(['_', '(', '"']).next().unwrap()).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(
        walls(program),
        "landlock seccomp qcow2.wasm landlock seccomp overlay.qcow2 seccomp",
        "raised, narrowed, sealed: {trace}"
    );
    assert_eq!(walls(compiler), "landlock seccomp", "{trace}");
}

/// A section of the README.
fn section(title: &str) -> String {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let (_, section) = readme.split_once(&format!("\n## {title}\n")).expect("the section");
    section.split_once("\n## ").expect("another section").0.to_owned()
}

/// What the README has people write into a file of their own workspace.
fn written(file: &str) -> String {
    let section = section("From your own workspace");
    let mut blocks = section.split("```toml\n# ").skip(1).filter_map(|block| block.strip_prefix(file));
    blocks
        .next()
        .unwrap_or_else(|| panic!("no {file}"))
        .split_once("```")
        .unwrap()
        .0
        .split_once('\n')
        .unwrap()
        .1
        .to_owned()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// Who has not built the components, or not said where they are, is told what to do; and what README says is enough.
#[test]
fn a_workspace_of_somebody_else() {
    let lab = Lab::new();
    lab.directory("mine/src");
    lab.directory("mine/.cargo");
    // The crates of the README are there, under these names. To build the sandbox again would take minutes.
    let mut manifest = "[package]\nname = 'mine'\nedition = '2024'\n\n[workspace]\n\n".to_owned();
    for line in written("Cargo.toml").lines() {
        let Some((name, source)) = line.split_once(" = ") else {
            manifest.push_str(&format!("{line}\n"));
            continue;
        };
        let crate_directory = root().join("host").join(name.strip_prefix("blockhouse-").expect("a crate of ours"));
        let theirs = std::fs::read_to_string(crate_directory.join("Cargo.toml")).unwrap();
        assert!(theirs.contains(&format!("\nname = \"{name}\"\n")), "{name}");
        assert!(source.starts_with("{ git = \"URL\", rev = \"REVISION\" }"), "{source}");
        if name == "blockhouse-formats" {
            manifest.push_str(&format!("{name} = {{ path = {crate_directory:?} }}\n"));
        }
    }
    assert!(manifest.contains("blockhouse-formats"), "{manifest}");
    lab.write("mine/Cargo.toml", manifest.as_bytes());
    lab.write("mine/src/main.rs", b"fn main() { blockhouse_formats::FORMATS.map(|it| println!(\"{}\", it.format)); }");

    let cargo = |components: Option<&str>| {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.current_dir(lab.path("mine")).args(["run", "--quiet", "--offline", "--target-dir"]).arg(lab.path("out"));
        cargo.env_remove("BLOCKHOUSE_COMPONENTS");
        cargo.envs(components.map(|directory| ("BLOCKHOUSE_COMPONENTS", directory)));
        run_within(Duration::from_secs(300), &mut cargo)
    };
    let remedy = format!("`cargo xtask build-plugins` in {}. From another workspace, set", root().display());
    let none = cargo(None).refused();
    let components = lab.absolute("out/components");
    for part in [&*remedy, "BLOCKHOUSE_COMPONENTS", "\"From your own workspace\"", &components] {
        assert!(none.stderr.contains(part), "{part}: {}", none.stderr);
    }
    let empty = lab.absolute("mine");
    let wrong = cargo(Some(&empty)).refused();
    let missing = format!("BLOCKHOUSE_COMPONENTS names a directory without {empty}/raw.wasm. ");
    assert!(wrong.stderr.contains(&missing) && wrong.stderr.contains(&remedy), "{}", wrong.stderr);

    // The clone beside it, with what `build-plugins` made in it.
    lab.directory("blockhouse/target");
    let built = component("raw").parent().unwrap().to_owned();
    std::os::unix::fs::symlink(built, lab.path("blockhouse/target/components")).unwrap();
    lab.write("mine/.cargo/config.toml", written(".cargo/config.toml").as_bytes());
    assert_eq!(cargo(None).succeeded().text(), "qcow2\nraw\nvmdk\n");
}

/// To build it for speed takes many minutes: that the commands mean something is what can be said here.
#[test]
fn the_installation() {
    let section = section("Install");
    let (_, commands) = section.split_once("```sh\n").unwrap();
    let commands: Vec<&str> = commands.split_once("```").unwrap().0.lines().collect();
    let [components, install] = commands.as_slice() else { panic!("two commands: {commands:?}") };
    assert!(components.starts_with("cargo xtask build-plugins "), "{components}");
    let words: Vec<&str> = install.split_whitespace().collect();
    let ["cargo", "install", "--locked", "--path", path, "#", "makes", made] = words[..] else { panic!("{install}") };

    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root().join(path)).args(["metadata", "--format-version=1", "--no-deps", "--offline"]);
    let metadata: serde_json::Value = serde_json::from_slice(&run(&mut cargo).succeeded().stdout).unwrap();
    let manifest = root().join(path).join("Cargo.toml");
    let packages = metadata["packages"].as_array().unwrap();
    let package = packages.iter().find(|package| package["manifest_path"] == manifest.to_str().unwrap()).unwrap();
    let programs = package["targets"].as_array().unwrap().iter().filter(|target| target["kind"][0] == "bin");
    let programs: Vec<String> =
        programs.map(|target| format!("~/.cargo/bin/{}", target["name"].as_str().unwrap())).collect();
    assert_eq!(programs, [made]);
}
