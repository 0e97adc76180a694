//! The whole of Blockhouse on one screen: a stranger's disk booted, its hostile twin refused.
//!
//! ```text
//!   <target>/demo/                                       granted?
//!   ├─ images/overlay.qcow2 ──▶ ../golden/middle.qcow2     the disk
//!   ├─ golden/middle.qcow2  ──▶ base.raw                   yes
//!   ├─ images/twin.qcow2    ──▶ ../private/keys.raw        the disk
//!   └─ private/keys.raw                                    no
//! ```

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::build_plugins;
use crate::prerequisites::{self, Purpose};
use crate::tools::{self, Workspace, style};

/// Size of the disk that the guest sees.
const DISK_BYTES: usize = 64 << 20;
/// The base is shorter than the disk, as it is after somebody grew an overlay.
const BASE_BYTES: usize = 48 << 20;
/// Boot, digest of the whole disk and power-off take about a second.
const RUN_LIMIT: Duration = Duration::from_secs(120);
/// What must never leave the file that holds it.
const SECRET: &str = "-----BEGIN SOMEBODY ELSE'S KEY-----";

/// Show it: boot a guest from an untrusted qcow2 chain, and see a hostile image refused.
///
/// Needs qemu-img (installed where that is possible) and /dev/kvm.
#[derive(clap::Args)]
pub(crate) struct Arguments {}

pub(crate) fn run(workspace: &Workspace, _arguments: &Arguments) -> Result<()> {
    prerequisites::ensure(workspace, Purpose::Demo)?;
    build_plugins::build_all(workspace)?;
    let blockhouse = program(workspace)?;
    let images = Images::make(&workspace.target.join("demo"))?;
    boot(&blockhouse, &images)?;
    refuse(&blockhouse, &images)?;
    println!("\n{}", style("1;32", "The disk was right, its twin was refused."));
    println!("{}", go_on(&blockhouse, &images));
    Ok(())
}

/// Which program it was, and what to try with it.
fn go_on(blockhouse: &Path, images: &Images) -> String {
    let mut info = Command::new(blockhouse);
    info.args(["info", "--format", "qcow2", "--allow"]).args([&images.golden, &images.overlay]);
    let mut help = Command::new(blockhouse);
    help.arg("help");
    format!("The program is {}. To go on:\n   {}\n   {}", blockhouse.display(), tools::line(&info), tools::line(&help))
}

/// Builds the `blockhouse` program; `BLOCKHOUSE` names another one instead.
pub(crate) fn program(workspace: &Workspace) -> Result<PathBuf> {
    if let Some(program) = std::env::var_os("BLOCKHOUSE") {
        return Ok(PathBuf::from(program));
    }
    // `--workspace` chooses the same features of dependencies as the tests do, which then
    // find them built; with `--package` half of the sandbox would be compiled twice.
    let arguments = ["build", "--locked", "--workspace", "--bin", "blockhouse"];
    tools::run(tools::cargo().current_dir(&workspace.root).args(arguments)).context("the program does not build")?;
    Ok(workspace.target.join("debug/blockhouse"))
}

/// The demo's files.
struct Images {
    root: PathBuf,
    overlay: PathBuf,
    golden: PathBuf,
    twin: PathBuf,
    private: PathBuf,
}

impl Images {
    /// Makes them anew, always with the same content.
    fn make(root: &Path) -> Result<Self> {
        if root.exists() {
            std::fs::remove_dir_all(root).with_context(|| format!("cannot clear {}", root.display()))?;
        }
        for directory in ["images", "golden", "private"] {
            std::fs::create_dir_all(root.join(directory))?;
        }
        let images = Self {
            root: root.to_owned(),
            overlay: root.join("images/overlay.qcow2"),
            golden: root.join("golden"),
            twin: root.join("images/twin.qcow2"),
            private: root.join("private/keys.raw"),
        };

        // Each layer changes some of what lies below and leaves holes.
        let mut content = vec![0; BASE_BYTES];
        scatter(&mut content, 1, 5);
        std::fs::write(images.golden.join("base.raw"), &content)?;
        content.resize(DISK_BYTES, 0);
        scatter(&mut content, 2, 11);
        std::fs::write(root.join("middle.raw"), &content)?;
        scatter(&mut content, 3, 17);
        std::fs::write(root.join("overlay.raw"), &content)?;

        // An overlay without content of its own, moved to another base, gets what differs.
        let golden = &images.golden;
        qemu_img(golden, "create -q -f qcow2 -b ../middle.raw -F raw loose.qcow2")?;
        qemu_img(golden, "rebase -b base.raw -F raw loose.qcow2")?;
        qemu_img(golden, "convert -c -O qcow2 -B base.raw -F raw loose.qcow2 middle.qcow2")?;
        std::fs::remove_file(golden.join("loose.qcow2"))?;
        let images_directory = root.join("images");
        qemu_img(&images_directory, "create -q -f qcow2 -b ../overlay.raw -F raw overlay.qcow2")?;
        qemu_img(&images_directory, "rebase -b ../golden/middle.qcow2 -F qcow2 overlay.qcow2")?;

        // The twin differs from an honest overlay in a few bytes of its header.
        std::fs::write(&images.private, format!("{SECRET:<63}\n").repeat(1024))?;
        qemu_img(&images_directory, "create -q -f qcow2 -b ../private/keys.raw -F raw twin.qcow2")?;

        // What is left is the disk as a guest must see it, from the other implementation.
        std::fs::remove_file(root.join("middle.raw"))?;
        let expected = root.join("expected.raw");
        qemu_img(&images_directory, "convert -O raw overlay.qcow2 ../expected.raw")?;
        ensure!(
            std::fs::read(&expected)? == content,
            "qemu-img reads something else from the demo's disk than was written to it; is it broken?"
        );
        std::fs::remove_file(root.join("overlay.raw"))?;
        Ok(images)
    }

    /// A path as it is shown: short.
    fn show(&self, path: &Path) -> String {
        path.strip_prefix(&self.root).unwrap_or(path).display().to_string()
    }
}

/// Writes runs of noise and of zeroes at places that follow from the seed; a stride and a length that
/// are no multiples of any cluster size make requests cross every kind of border.
fn scatter(content: &mut [u8], seed: u64, runs: u64) {
    let mut state = seed;
    let mut next = || {
        // splitmix64
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = state;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    };
    let length = content.len() as u64;
    for run in 0..runs {
        let start = next() % length;
        let end = (start + next() % (1 << 20)).min(length);
        let bounds = usize::try_from(start).unwrap_or(0)..usize::try_from(end).unwrap_or(0);
        for chunk in content.get_mut(bounds).unwrap_or_default().chunks_mut(8) {
            // Four bits a byte, so that packed clusters have something to pack; and now and
            // then zeroes, which hide what lies below.
            let mask = if run % 4 == 3 { 0 } else { 0x0f0f_0f0f_0f0f_0f0f };
            let noise = (next() & mask).to_le_bytes();
            for (byte, noise) in chunk.iter_mut().zip(noise) {
                *byte = noise;
            }
        }
    }
}

fn qemu_img(directory: &Path, arguments: &str) -> Result<()> {
    tools::output(Command::new("qemu-img").current_dir(directory).args(arguments.split(' '))).map(drop)
}

/// Boots the built-in guest with the honest disk and compares digests.
fn boot(blockhouse: &Path, images: &Images) -> Result<()> {
    heading("A stranger's disk, booted on KVM");
    println!("   overlay.qcow2 ──▶ golden/middle.qcow2 (compressed) ──▶ golden/base.raw    64 MiB");
    let started = Instant::now();
    let output = run_disk(blockhouse, images, &images.overlay)?;
    let took = started.elapsed();
    quote(images, &output);
    ensure!(output.status.success(), "the guest did not run: {}", output.status);

    let expected = tools::sha256(&std::fs::read(images.root.join("expected.raw"))?);
    let printed = digests(&String::from_utf8_lossy(&output.stdout));
    println!("   guest     sha256 {}", printed.first().map_or("none", String::as_str));
    println!("   qemu-img  sha256 {expected}");
    ensure!(printed.contains(&expected), "the guest's digest is not that of the disk's content");
    println!("   {} the same, {:.1} s from start to power-off", tick(), took.as_secs_f64());
    Ok(())
}

/// Starts the same machine with the hostile twin, which must be refused for the right reason.
fn refuse(blockhouse: &Path, images: &Images) -> Result<()> {
    heading("Its hostile twin");
    println!("   twin.qcow2 ──▶ ../private/keys.raw, which was not granted");
    let elsewhere = Command::new("qemu-img")
        .args(["convert", "-O", "raw"])
        .arg(&images.twin)
        .arg(images.root.join("leaked.raw"))
        .stdin(Stdio::null())
        .output()?;
    if elsewhere.status.success() && holds_secret(&std::fs::read(images.root.join("leaked.raw"))?) {
        println!("   qemu-img convert reads the secret out of it; Blockhouse:");
    }
    age(&images.private)?;
    let before = traces(&images.private)?;
    let output = run_disk(blockhouse, images, &images.twin)?;
    quote(images, &output);

    ensure!(!output.status.success(), "the hostile twin was accepted");
    ensure!(
        output.status.code().is_some(),
        "the program was killed by the hostile twin instead of refusing it: {}",
        output.status
    );
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(message.contains("private/keys.raw"), "the refusal does not name the reference");
    ensure!(message.contains("allow"), "the refusal does not name the grant that would be needed");
    ensure!(!holds_secret(&output.stdout) && !holds_secret(&output.stderr), "the secret leaked");
    ensure!(traces(&images.private)? == before, "the file outside the grant was touched");
    println!("   {} refused; nobody read or touched private/keys.raw", tick());
    Ok(())
}

fn run_disk(blockhouse: &Path, images: &Images, image: &Path) -> Result<Output> {
    let disk = format!("file={},format=qcow2,allow={},readonly=on", image.display(), images.golden.display());
    let mut command = Command::new(blockhouse);
    command.args(["run", "--disk", &disk]);
    println!(
        "   {} blockhouse run --disk file={},format=qcow2,allow={},readonly=on",
        style("2", "$"),
        images.show(image),
        images.show(&images.golden)
    );
    tools::output_within(RUN_LIMIT, &mut command)?
        .with_context(|| format!("the guest was stopped after {} s: {}", RUN_LIMIT.as_secs(), tools::line(&command)))
}

/// Prints what the program said, indented, with the demo's own directory left out of paths.
fn quote(images: &Images, output: &Output) {
    let root = format!("{}/", images.root.display());
    for stream in [&output.stdout, &output.stderr] {
        for line in String::from_utf8_lossy(stream).lines().filter(|line| !line.trim().is_empty()) {
            println!("   {} {}", style("2", "│"), line.replace(&root, ""));
        }
    }
}

/// Every sha256 in a text, in order.
fn digests(text: &str) -> Vec<String> {
    text.split(|character: char| !character.is_ascii_alphanumeric())
        .filter(|word| word.len() == 64 && word.chars().all(|digit| digit.is_ascii_hexdigit()))
        .map(str::to_ascii_lowercase)
        .collect()
}

fn holds_secret(bytes: &[u8]) -> bool {
    bytes.windows(SECRET.len()).any(|window| window == SECRET.as_bytes())
}

/// What changes about a file that is read or written.
type Traces = (u64, std::time::SystemTime, std::time::SystemTime);

fn traces(path: &Path) -> Result<Traces> {
    let status = std::fs::metadata(path)?;
    Ok((status.len(), status.modified()?, status.accessed()?))
}

/// Dates a file back, because the usual mounts note a read only if the last one is long ago.
fn age(path: &Path) -> Result<()> {
    let long_ago = std::time::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    let times = std::fs::FileTimes::new().set_accessed(long_ago).set_modified(long_ago);
    std::fs::File::options().write(true).open(path)?.set_times(times)?;
    Ok(())
}

fn heading(text: &str) {
    println!("\n{}", style("1", text));
}

fn tick() -> String {
    style("32", "✓")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_names_the_program() {
        let path = |name: &str| Path::new("/a target").join(name);
        let (root, overlay, golden) = (path("demo"), path("over"), path("gold"));
        let images = Images { root, overlay, golden, twin: path("twin"), private: path("keys") };
        assert_eq!(
            go_on(&path("blockhouse"), &images),
            "The program is /a target/blockhouse. To go on:\n   \
             '/a target/blockhouse' info --format qcow2 --allow '/a target/gold' '/a target/over'\n   \
             '/a target/blockhouse' help"
        );
    }
}
