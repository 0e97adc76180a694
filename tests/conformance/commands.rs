//! The commands themselves: ranges, output files, errors and exit codes; `probe`; `plugin`.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use blockhouse_tests::{
    LANDLOCK, Outcome, blockhouse, component, landlock_is_here, on_path, program, run, sha256, skip, without_calls,
};
use serde_json::Value;

use crate::case::{Subject, convert, have_qemu};
use crate::lab::{Lab, Pen, letters};

/// Fails unless the command ended with this exit code, and its message has these words.
#[track_caller]
pub(crate) fn ended(outcome: &Outcome, code: i32, words: &[&str]) {
    assert_eq!(outcome.status.code(), Some(code), "{}\n{}", outcome.text(), outcome.stderr);
    for word in words {
        assert!(outcome.stderr.contains(word), "no {word:?} in: {}", outcome.stderr);
    }
}

/// A chain of qcow2 (compressed clusters in it) over qcow2 over raw.
fn chain(lab: &Lab, size: u64) -> Subject {
    lab.raw("base.raw", size, &[(0, 200_000), (512_000, 100_000)]);
    lab.qemu_img("create -q -f qcow2 -o cluster_size=4k -b base.raw -F raw middle.qcow2");
    Pen::new(lab, "qcow2", "middle.qcow2", size, 4096).everything_packed().done();
    lab.qemu_img("create -q -f qcow2 -b middle.qcow2 -F qcow2 top.qcow2");
    Pen::new(lab, "qcow2", "top.qcow2", size, 65536).scattered(3).done();
    Subject::new("top.qcow2", "qcow2").allow(&["middle.qcow2", "base.raw"])
}

#[test]
fn parts_of_disks() {
    if !have_qemu() {
        return;
    }
    let lab = Lab::new();
    let size = (1 << 20) + 1536;
    lab.write("disk.raw", &letters(4, usize::try_from(size).unwrap()));
    lab.qemu_img("convert -t unsafe -f raw -O vmdk -o subformat=streamOptimized disk.raw stream.vmdk");
    lab.write("odd.raw", &blockhouse_tests::noise(6, 700_001));
    let subjects = [chain(&lab, size), Subject::new("stream.vmdk", "vmdk"), Subject::new("odd.raw", "raw")];
    for subject in subjects {
        let expected = convert(&lab, &subject);
        let end = expected.size();
        // One byte, across a sector, across clusters and grains, the last byte, nothing at the very end.
        for (offset, length) in [(0, 1), (511, 2), (65_535, 3), (4095, 140_001), (end - 1, 1), (end - 70_001, 70_001)] {
            let mut slice = vec![0; usize::try_from(length).unwrap()];
            expected.read(offset, &mut slice);
            let [offset, length] = [offset, length].map(|number: u64| number.to_string());
            let range = ["--offset", &offset, "--length", &length];
            let read = run(subject.command(&lab, "read").args(range)).succeeded();
            assert!(read.stdout == slice, "{}: {length} bytes at {offset} differ", subject.image);
        }
        let end = end.to_string();
        assert_eq!(run(subject.command(&lab, "read").args(["--offset", &end])).succeeded().stdout, b"");
    }
    // With a unit, to the end, into a file.
    let subject = chain(&lab, size);
    let expected = convert(&lab, &subject);
    run(subject.command(&lab, "read").args(["--offset", "512K", "--output", "part"])).succeeded();
    let part = std::fs::read(lab.path("part")).unwrap();
    assert_eq!(part.len() as u64, size - (512 << 10));
    let mut slice = vec![0; part.len()];
    expected.read(512 << 10, &mut slice);
    assert!(part == slice);
    // A part of a map is that part of the whole map.
    let map = run(subject.command(&lab, "map").args(["--json", "--offset", "5000", "--length", "100"])).succeeded();
    let rows: Vec<Value> = serde_json::from_str(&map.text()).unwrap();
    assert_eq!(rows[0]["start"], 5000);
    assert_eq!(rows.iter().map(|row| row["length"].as_u64().unwrap()).sum::<u64>(), 100);
}

#[test]
fn ranges_past_the_end() {
    let lab = Lab::new();
    lab.write("a.raw", &[1; 1000]);
    let subject = Subject::new("a.raw", "raw");
    let read = |arguments: &[&str]| run(subject.command(&lab, "read").args(arguments));
    ended(&read(&["--offset", "1025"]), 1, &["--offset 1025", "1024 bytes"]);
    ended(&read(&["--offset", "1000", "--length", "25"]), 1, &["--length 25", "1024 bytes"]);
    ended(&read(&["--length", "1025"]), 1, &["1024 bytes"]);
    ended(&read(&["--offset", "1", "--length", "18446744073709551615"]), 1, &["1024 bytes"]);
    ended(&read(&["--offset", "99999999999T"]), 2, &["not a size"]);
    ended(&read(&["--offset", "-1"]), 2, &[]);
    // Nothing was created for a range that does not exist.
    ended(&read(&["--offset", "1025", "--output", "out"]), 1, &["1024 bytes"]);
    let map = |offset| run(subject.command(&lab, "map").args(["--json", "--offset", offset]));
    ended(&map("0x401"), 1, &["--offset 1025", "1024 bytes"]);
    assert_eq!(map("0x400").succeeded().text(), "[]\n");
    assert!(!lab.path("out").exists());
}

/// A reader that has seen enough is no error.
#[test]
fn a_pipe_that_closes_early() {
    use std::io::Read as _;
    let lab = Lab::new();
    lab.raw("a.raw", 64 << 20, &[(0, 512)]);
    let mut command = Subject::new("a.raw", "raw").command(&lab, "read");
    let mut child = command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    let mut first = [0; 512];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    assert_eq!(first.as_slice(), std::fs::read(lab.path("a.raw")).unwrap()[..512].to_vec());
}

#[test]
fn existing_files_are_not_overwritten_by_accident() {
    let lab = Lab::new();
    lab.write("a.raw", &[1; 1024]);
    lab.write("precious", b"do not lose this, which is longer than the disk".repeat(100).as_slice());
    let before = std::fs::read(lab.path("precious")).unwrap();
    let subject = Subject::new("a.raw", "raw");
    let read = |arguments: &[&str]| run(subject.command(&lab, "read").args(arguments));
    ended(&read(&["--output", "precious"]), 1, &["precious exists", "--force"]);
    assert_eq!(std::fs::read(lab.path("precious")).unwrap(), before);
    // --force alone means nothing.
    ended(&read(&["--force"]), 2, &["--output"]);
    read(&["--output", "precious", "--force"]).succeeded();
    assert_eq!(std::fs::read(lab.path("precious")).unwrap(), [1; 1024]);
    // A directory that is not there.
    ended(&read(&["--output", "nowhere/out"]), 1, &["nowhere/out"]);
    // A link that leads nowhere is neither a file to overwrite nor one to replace.
    std::os::unix::fs::symlink("gone", lab.path("link")).unwrap();
    for force in [&[][..], &["--force"]] {
        ended(
            &read(&[&["--output", "link"], force].concat()),
            1,
            &["link is a symbolic link to a file that is not there"],
        );
    }
    assert!(!lab.path("gone").exists());
}

/// What has no size and keeps nothing takes all of it in order, zeroes too.
#[test]
fn pipes_and_devices_are_written_as_they_are() {
    let lab = Lab::new();
    lab.raw("a.raw", 8 << 20, &[(1 << 20, 5000), (7 << 20, 512)]);
    let read = |output: &str| {
        let mut command = Subject::new("a.raw", "raw").command(&lab, "read");
        run(command.args(["--force", "--output", output]))
    };
    read("/dev/null").succeeded();
    ended(&read("/dev/full"), 1, &["cannot write /dev/full"]);
    let pipe = lab.path("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let reader = std::thread::spawn(move || std::fs::read(pipe).unwrap());
    read("pipe").succeeded();
    assert!(reader.join().unwrap() == std::fs::read(lab.path("a.raw")).unwrap());
}

/// What a command that succeeded has written is there after a power cut.
#[test]
fn what_is_overwritten_is_durable() {
    if !on_path("strace") {
        return skip("no strace: install strace");
    }
    let lab = Lab::new();
    lab.write("a.raw", &[1; 1024]);
    lab.write("old", b"old");
    let mut command = Command::new("strace");
    command.current_dir(lab.root()).args(["-f", "-y", "-e", "trace=fsync", "-o", "trace"]).arg(program());
    run(command.args(["read", "--format", "raw", "--force", "--output", "old", "a.raw"])).succeeded();
    let trace = std::fs::read_to_string(lab.path("trace")).unwrap();
    assert!(trace.lines().any(|line| line.contains("/old>") && line.ends_with("= 0")), "{trace}");
}

/// Not even with --force, and under no other name either.
#[test]
fn files_of_the_chain_are_never_overwritten() {
    if !have_qemu() {
        return;
    }
    let lab = Lab::new();
    lab.raw("base.raw", 1 << 20, &[(0, 1 << 20)]);
    lab.qemu_img("create -q -f qcow2 -b base.raw -F raw top.qcow2");
    lab.qemu_img("create -q -f qcow2 -o data_file=d.bin data.qcow2 1M");
    lab.qemu_io("qcow2", "data.qcow2", &["write -q -P 5 0 1M".to_owned()]);
    lab.qemu_img("convert -f raw -O vmdk -o subformat=monolithicFlat base.raw flat.vmdk");
    std::fs::hard_link(lab.path("base.raw"), lab.path("hard")).unwrap();
    std::os::unix::fs::symlink("base.raw", lab.path("soft")).unwrap();
    let chain = Subject::new("top.qcow2", "qcow2").allow(&["base.raw"]);
    let data = Subject::new("data.qcow2", "qcow2").allow(&["d.bin"]);
    let flat = Subject::new("flat.vmdk", "vmdk").allow(&["flat-flat.vmdk"]);
    for (subject, target) in [
        (&chain, "top.qcow2"),
        (&chain, "base.raw"),
        (&chain, "hard"),
        (&chain, "soft"),
        (&chain, "./base.raw"),
        (&data, "data.qcow2"),
        (&data, "d.bin"),
        (&flat, "flat.vmdk"),
        (&flat, "flat-flat.vmdk"),
    ] {
        let digest = || sha256(&std::fs::read(lab.path(target)).unwrap());
        let before = digest();
        let outcome = run(subject.command(&lab, "read").args(["--output", target, "--force"]));
        assert_eq!(digest(), before, "{target} was overwritten: {}", outcome.stderr);
        ended(&outcome, 1, &[target, "not touched"]);
    }
}

#[test]
fn probe_guesses_and_opens_nothing_else() {
    if !have_qemu() {
        return;
    }
    let lab = Lab::new();
    lab.write("secret", &[7; 4096]);
    let secret = lab.absolute("secret");
    let backed = format!("create -q -u -f qcow2 -b {secret} -F raw a 1M");
    let images = [
        ("qcow2", "create -q -f qcow2 -o compat=0.10 a 1M"),
        ("qcow2", "create -q -f qcow2 -o extended_l2=on,compression_type=zstd a 1M"),
        ("qcow2", &backed),
        ("vmdk", "create -q -f vmdk a 1M"),
        ("vmdk", "create -q -f vmdk -o subformat=streamOptimized a 1M"),
        ("vmdk", "create -q -f vmdk -o subformat=monolithicFlat a 1M"),
        ("vmdk", "create -q -f vmdk -o subformat=twoGbMaxExtentSparse a 1M"),
        ("vmdk", "create -q -f vmdk -o subformat=twoGbMaxExtentFlat a 1M"),
        ("vhdx", "create -q -f vhdx a 1M"),
        ("vpc", "create -q -f vpc a 1M"),
        ("vdi", "create -q -f vdi a 1M"),
        ("qed", "create -q -f qed a 1M"),
        ("parallels", "create -q -f parallels a 1M"),
        ("qcow", "create -q -f qcow a 1M"),
    ];
    let probe = |arguments: &[&str]| run(blockhouse().current_dir(lab.root()).arg("probe").args(arguments));
    for (format, create) in images {
        let _ = std::fs::remove_file(lab.path("a"));
        lab.qemu_img(create);
        let guesses: Vec<Value> = serde_json::from_str(&probe(&["--json", "a"]).succeeded().text()).unwrap();
        let first = guesses.first().unwrap_or_else(|| panic!("{create}: nothing recognised"));
        assert_eq!(first["format"], format, "{create}: {guesses:?}");
        assert!(first["confidence"].as_u64().unwrap() >= 50, "{create}: {guesses:?}");
        assert!(!first["evidence"].as_str().unwrap().is_empty());
        assert!(probe(&["a"]).succeeded().text().starts_with(&format!("{format} ")));
    }
    lab.write("a", &[0; 4096]);
    assert_eq!(probe(&["--json", "a"]).succeeded().text().trim(), "[]");
    assert!(probe(&["a"]).succeeded().text().contains("nothing recognised"));
    lab.write("a", b"");
    assert_eq!(probe(&["--json", "a"]).succeeded().text().trim(), "[]");
    ended(&probe(&["missing"]), 1, &["missing"]);
    ended(&probe(&["."]), 1, &["not a regular file"]);
}

#[test]
fn built_in_components_are_listed() {
    let list = run(blockhouse().args(["plugin", "list", "--json"])).succeeded().text();
    let list: Vec<Value> = serde_json::from_str(&list).unwrap();
    let rows: Vec<_> = list.iter().map(|row| (row["name"].as_str().unwrap(), row["world"].as_str().unwrap())).collect();
    assert_eq!(rows, [("qcow2", "read-write"), ("raw", "read-write"), ("vmdk", "read-only"), ("probe", "prober")]);
    for row in &list {
        let file = std::fs::read(component(row["name"].as_str().unwrap())).unwrap();
        assert_eq!(row["sha256"], sha256(&file).as_str(), "the program holds another {}", row["name"]);
        assert_eq!(row["size_bytes"], file.len());
        assert_eq!(row["outside"], Value::Array(Vec::new()));
    }
    let text = run(blockhouse().args(["plugin", "list"])).succeeded().text();
    assert!(list.iter().all(|row| text.contains(row["sha256"].as_str().unwrap())));
}

/// All that the parser of hostile qcow2 images can call.
const QCOW2_IMPORTS: [(&str, &str); 9] = [
    ("blockhouse:format/files@0.1.0", "share"),
    ("blockhouse:format/files@0.1.0", "size"),
    ("blockhouse:format/log@0.1.0", "write"),
    ("wasi:filesystem/preopens@0.2.6", "get-directories"),
    ("wasi:filesystem/types@0.2.6", "[method]descriptor.open-at"),
    ("wasi:filesystem/types@0.2.6", "[method]descriptor.read"),
    ("wasi:filesystem/types@0.2.6", "[method]descriptor.set-size"),
    ("wasi:filesystem/types@0.2.6", "[method]descriptor.sync-data"),
    ("wasi:filesystem/types@0.2.6", "[method]descriptor.write"),
];

#[test]
fn qcow2_imports_files_and_a_log() {
    let file = component("qcow2");
    let json = run(blockhouse().args(["plugin", "inspect", "--json"]).arg(&file)).succeeded().text();
    let report: Value = serde_json::from_str(&json).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let mut imports: Vec<(String, String)> = report["imports"]
        .as_array()
        .unwrap()
        .iter()
        .map(|import| (text(&import["interface"]), text(&import["function"])))
        .collect();
    imports.sort();
    let expected = QCOW2_IMPORTS.map(|(interface, function)| (interface.to_owned(), function.to_owned()));
    assert_eq!(imports, expected);
    assert_eq!(report["world"], "read-write");
    assert_eq!(report["contract"], "0.1.0");
    assert_eq!(report["outside"], Value::Array(Vec::new()));
    assert_eq!(report["sha256"], sha256(&std::fs::read(&file).unwrap()).as_str());
    let mut exports: Vec<String> = report["exports"].as_array().unwrap().iter().map(text).collect();
    exports.sort();
    let abilities =
        ["checker", "creator", "packer", "reader", "rebaser", "resizer", "snapshot-editor", "snapshots", "writer"];
    assert_eq!(exports, abilities.map(|name| format!("blockhouse:format/{name}@0.1.0")));

    let shown = run(blockhouse().args(["plugin", "inspect"]).arg(&file)).succeeded().text();
    assert!(shown.starts_with("world     read-write-format: "), "{shown}");
    assert!(!shown.contains("OUTSIDE") && !shown.contains("outside"), "{shown}");
}

#[test]
fn files_that_are_no_components() {
    let lab = Lab::new();
    lab.write("text.wasm", b"(component)");
    lab.write("empty.wasm", b"");
    // The magic number and version of a core module without sections.
    lab.write("core.wasm", b"\0asm\x01\0\0\0");
    // Without a writer at its other end, a FIFO would keep the program waiting for ever.
    let (fifo, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR);
    rustix::fs::mknodat(rustix::fs::CWD, lab.root().join("fifo.wasm"), fifo, mode, 0).unwrap();
    lab.write("a.raw", &[0; 512]);
    for file in ["text.wasm", "empty.wasm", "core.wasm", "fifo.wasm"] {
        let inspect = run(blockhouse().current_dir(lab.root()).args(["plugin", "inspect", file])).refused();
        assert!(inspect.stderr.contains(file), "{}", inspect.stderr);
        let plugin = format!("raw={file}");
        let subject = Subject::new("a.raw", "raw");
        let read = run(subject.command(&lab, "read").args(["--plugin", &plugin])).refused();
        assert!(read.stderr.contains(file), "{}", read.stderr);
    }
}

#[test]
fn a_component_from_a_file_serves_its_format() {
    let lab = Lab::new();
    lab.write("a.raw", &[3; 1024]);
    let plugin = format!("mine={}", component("raw").display());
    let read = |format: &str| {
        let mut command: Command = blockhouse();
        run(command.current_dir(lab.root()).args(["read", "--plugin", &plugin, "--format", format, "a.raw"]))
    };
    assert_eq!(read("mine").succeeded().stdout, [3; 1024]);
    ended(&read("other"), 5, &["\"other\"", "mine, qcow2, raw, vmdk"]);
}

/// Compiled ahead, it is taken when it is asked for by that word, and trusted only if it is the user's own.
#[test]
fn a_component_compiled_ahead() {
    let lab = Lab::new();
    lab.write("a.raw", &[3; 1024]);
    let compile = |arguments: &[&str]| {
        let mut command = blockhouse();
        run(command.current_dir(lab.root()).args(["plugin", "compile"]).arg(component("raw")).args(arguments))
    };
    let read = |plugin: &str| {
        let mut command = blockhouse();
        command.env("BLOCKHOUSE_CODE_CACHE", "off").current_dir(lab.root());
        run(command.args(["read", "--format", "mine", "--plugin", plugin, "a.raw"]))
    };
    assert_eq!(compile(&["-o", "raw.compiled"]).succeeded().text(), "");
    let file = lab.root().join("raw.compiled");
    let mode = |mode| std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    mode(0o644);
    assert_eq!(read("mine=compiled:raw.compiled").succeeded().stdout, [3; 1024]);
    // It is known by what it was made of.
    let mut info = blockhouse();
    info.current_dir(lab.root()).args(["info", "--json", "--format", "mine", "--plugin", "mine=compiled:raw.compiled"]);
    let report = run(info.arg("a.raw")).succeeded().text();
    assert!(report.contains(&sha256(&std::fs::read(component("raw")).unwrap())), "{report}");

    // Not by mistake: a stranger's file may be one.
    ended(&read("mine=raw.compiled"), 3, &["raw.compiled", "outside of the sandbox", "compiled:FILE"]);
    let mut inspect = blockhouse();
    inspect.current_dir(lab.root()).args(["plugin", "inspect", "raw.compiled"]);
    ended(&run(&mut inspect), 3, &["outside of the sandbox"]);
    // And a component is not one.
    let wasm = format!("mine=compiled:{}", component("raw").display());
    ended(&read(&wasm), 1, &["raw.wasm", "it is a component, not yet compiled"]);

    mode(0o664);
    ended(&read("mine=compiled:raw.compiled"), 3, &["somebody else can have written it", "mode 664"]);
    mode(0o644);
    let good = std::fs::read(&file).unwrap();
    let mut bad = good.clone();
    *bad.last_mut().unwrap() ^= 1;
    std::fs::write(&file, bad).unwrap();
    ended(&read("mine=compiled:raw.compiled"), 4, &["it is damaged"]);

    ended(&compile(&["-o", "raw.compiled"]), 1, &["raw.compiled exists"]);
    // The component itself, under a name of its own.
    let (source, link) = (lab.root().join("mine.wasm"), lab.root().join("link.wasm"));
    std::fs::copy(component("raw"), &source).unwrap();
    std::os::unix::fs::symlink("mine.wasm", &link).unwrap();
    for file in ["mine.wasm", "link.wasm"] {
        let mut compile = blockhouse();
        compile.current_dir(lab.root()).args(["plugin", "compile", file, "-o", "mine.wasm", "--force"]);
        ended(&run(&mut compile), 1, &["not touched"]);
    }
    assert!(std::fs::read(&source).unwrap() == std::fs::read(component("raw")).unwrap());
    std::fs::remove_file(link).unwrap();
    std::fs::remove_file(source).unwrap();
    compile(&["-o", "raw.compiled", "--force"]).succeeded();
    assert_eq!(read("mine=compiled:raw.compiled").succeeded().stdout, [3; 1024]);
    let mut compile = blockhouse();
    compile.current_dir(lab.root()).args(["plugin", "compile", "a.raw", "-o", "nothing"]);
    ended(&run(&mut compile), 6, &["a.raw", "not a WebAssembly component"]);
    let names: Vec<_> = std::fs::read_dir(lab.root()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "a draft stayed: {names:?}");
}

/// The component that authors start from, as `plugins/README.md` has them try it.
#[test]
fn the_template_is_a_format() {
    let lab = Lab::new();
    let mut image = b"template disk 1 1024\n".to_vec();
    image.resize(512, 0);
    image.extend_from_slice(b"hello");
    lab.write("a.disk", &image);
    let file = component("template");
    let plugin = format!("template={}", file.display());
    let subject = Subject::new("a.disk", "template");
    let content = run(subject.command(&lab, "read").args(["--plugin", &plugin])).succeeded().stdout;
    assert_eq!((content.len(), &content[..6]), (1024, &b"hello\0"[..]));
    let inspect = run(blockhouse().args(["plugin", "inspect"]).arg(&file)).succeeded().text();
    assert!(inspect.contains("world     read-only-format"), "{inspect}");
}

#[test]
fn usage() {
    let lab = Lab::new();
    lab.write("a.raw", &[3; 1024]);
    for command in ["info", "map", "read"] {
        let run = |arguments: &[&str]| run(blockhouse().current_dir(lab.root()).arg(command).args(arguments));
        ended(&run(&["a.raw"]), 2, &["--format <FORMAT>"]);
        ended(&run(&["--format", "raw"]), 2, &["<IMAGE>"]);
        ended(&run(&["--format", "", "a.raw"]), 5, &["no component serves"]);
        ended(&run(&["--format", "vhdx", "a.raw"]), 5, &["\"vhdx\"", "qcow2, raw, vmdk"]);
        ended(&run(&["--format", "qcow2", "a.raw"]), 4, &["not a qcow2 image"]);
        ended(&run(&["--format", "raw", "missing"]), 1, &["missing", "cannot open the image"]);
        ended(&run(&["--format", "raw", "."]), 1, &["not a regular file"]);
        ended(&run(&["--format", "raw", "--allow", "missing", "a.raw"]), 1, &["cannot grant", "missing"]);
        ended(&run(&["--format", "raw", "--snapshot", "1", "a.raw"]), 5, &["snapshots", "\"1\""]);
        ended(&run(&["--format", "raw", "--plugin", "raw", "a.raw"]), 1, &["FORMAT=FILE"]);
    }
}

/// Where the kernel lacks a wall, that is a warning, or with --require-walls an error with a code of its own.
#[test]
fn missing_walls_are_said_and_can_be_required() {
    let lab = Lab::new();
    lab.raw("a.raw", 1 << 20, &[(0, 4096)]);
    let read = |options: &[&str], without: &[libc::c_long], errno: i32| {
        let mut command = blockhouse();
        command.current_dir(lab.root()).args(["read", "--format", "raw", "--code-cache", "off"]).args(options);
        command.arg("a.raw");
        without_calls(&mut command, without, errno);
        run(&mut command)
    };
    let content = std::fs::read(lab.path("a.raw")).unwrap();
    let none = "Landlock: this kernel has none; Linux has it since 5.13";
    let off = "Landlock: this kernel has it switched off (add landlock to its command line, after lsm=)";
    let seccomp = "seccomp: Invalid argument (os error 22)";
    let mut cases = vec![(LANDLOCK, libc::ENOSYS, none), (LANDLOCK, libc::EOPNOTSUPP, off)];
    if landlock_is_here() {
        cases.push((&[libc::SYS_seccomp], libc::EINVAL, seccomp));
    }
    for (without, errno, why) in cases {
        let outcome = read(&[], without, errno).succeeded();
        assert_eq!(outcome.stderr, format!(" WARN blockhouse::walls: a wall around the program is missing. {why}\n"));
        assert!(outcome.stdout == content);

        let outcome = read(&["--require-walls"], without, errno);
        let required = "blockhouse: --require-walls: the walls around the program cannot be raised: ";
        assert_eq!(outcome.stderr, format!("{required}{why}. No image was opened\n"));
        assert_eq!((outcome.status.code(), outcome.stdout.len()), (Some(9), 0));

        let outcome = read(&["--no-walls"], without, errno).succeeded();
        assert_eq!((outcome.stderr.as_str(), outcome.stdout == content), ("", true));
    }
    if landlock_is_here() {
        let outcome = read(&["--require-walls"], &[libc::SYS_bpf], libc::ENOSYS).succeeded();
        assert_eq!((outcome.stderr.as_str(), outcome.stdout == content), ("", true));
    }
    ended(&read(&["--require-walls", "--no-walls"], &[libc::SYS_bpf], libc::ENOSYS), 2, &["cannot be used with"]);
}

/// A program that ended well would have a script go on after a machine that did nothing.
#[test]
fn a_guest_that_crashes_is_an_error() {
    if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        blockhouse_tests::skip("/dev/kvm cannot be opened");
        return;
    }
    let lab = Lab::new();
    lab.raw("a.raw", 1 << 20, &[]);
    for (memory, words) in
        [(4096, ["triple fault", "--memory"]), (80 << 20, ["kernel k.elf: it needs 82 MiB", "add memory"])]
    {
        // An executable for x86-64 of one part, loaded at 2 MiB and entered there: ud2, which nobody handles.
        let mut kernel = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
        kernel.extend([2_u64 << 20, 64, 0].map(u64::to_le_bytes).as_flattened());
        kernel.extend([0_u16, 0, 64, 56, 1, 64, 0, 0].map(u16::to_le_bytes).as_flattened());
        kernel.extend([1_u32, 7].map(u32::to_le_bytes).as_flattened());
        kernel.extend([120, 2 << 20, 2 << 20, 2, memory, 1].map(u64::to_le_bytes).as_flattened());
        kernel.extend([0x0f, 0x0b]);
        std::fs::write(lab.path("k.elf"), kernel).unwrap();
        let mut command = blockhouse();
        command.current_dir(lab.root()).args(["run", "--memory", "64M", "--kernel", "k.elf"]);
        ended(&run(command.args(["--disk", "file=a.raw,format=raw,readonly=on"])), 1, &words);
    }
}

/// What people read first is reviewed like code. `UPDATE=1` writes the file anew.
#[test]
fn help_texts() {
    let mut text = String::new();
    let inspect = ["plugin", "inspect", "--help"];
    let compile = ["plugin", "compile", "--help"];
    for arguments in [
        &["--help"][..],
        &["info", "--help"],
        &["map", "--help"],
        &["read", "--help"],
        &["run", "--help"],
        &["serve", "--help"],
        &["create", "--help"],
        &["check", "--help"],
        &["resize", "--help"],
        &["snapshot", "--help"],
        &["convert", "--help"],
        &["compare", "--help"],
        &["commit", "--help"],
        &["rebase", "--help"],
        &inspect,
        &compile,
        &["probe", "--help"],
        &["control", "--help"],
    ] {
        let help = run(blockhouse().args(arguments)).succeeded().text();
        // On any terminal, what is to be copied is as it was written.
        let examples = help.split_once("\nExample").map_or("", |(_, examples)| examples);
        assert!(examples.lines().all(|line| line.len() <= 80), "{arguments:?}: {examples}");
        text.push_str(&format!("$ blockhouse {}\n{help}\n", arguments.join(" ")));
    }
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/conformance/help.txt");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(file, &text).unwrap();
    }
    let there = std::fs::read_to_string(file).unwrap_or_default();
    assert!(there == text, "{file} is not what the program prints; with UPDATE=1 this test writes it anew");
}
