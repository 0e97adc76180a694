//! Commands that make files or sockets: whoever takes one over by the image that it reads finds the new file, and
//! nothing beside it that can be written or removed; and whatever ends it, nothing unfinished stays.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Instant;

use blockhouse_tests::{COMMAND_LIMIT, Outcome, blockhouse, component, finish, noise, run, skip};
use rustix::process::{Pid, Signal, kill_process};

use crate::place::Place;
use crate::tally;

/// What is in a directory.
fn names(directory: &Path) -> Vec<OsString> {
    let mut names: Vec<_> = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    names
}

/// What the program says that it planned: paths below a directory, and their uses.
fn planned(stderr: &str, directory: &Path) -> BTreeMap<String, String> {
    let lines = stderr.lines().filter(|line| line.contains(" planned path="));
    let fields = lines.map(|line| {
        let (path, uses) = line.split_once("path=").unwrap().1.split_once(" uses=").unwrap();
        (path.to_owned(), uses.to_owned())
    });
    fields.filter(|(path, _)| Path::new(path).starts_with(directory)).collect()
}

#[test]
fn only_the_new_file_can_be_written() {
    let place = Place::new();
    let directory = place.path("images/new");
    std::fs::create_dir(&directory).unwrap();
    let source = place.write("images/vm/source.raw", noise(1, 1 << 20));
    let (source, hostile) = (source.to_str().unwrap(), component("hostile"));
    let new = |name: &str| directory.join(name).to_str().unwrap().to_owned();
    let (a, b, c, d, e, f) = (new("a"), new("b"), new("c"), new("d"), new("e"), new("f"));
    let commands: [(&str, Vec<&str>, &[&str]); 6] = [
        ("a", vec!["create", "--format", "qcow2", &a, "1M"], &[]),
        ("b", vec!["create", "--format", "qcow2", "--data-file", "b.raw", &b, "1M"], &["b.raw"]),
        ("c", vec!["convert", "--format", "raw", "--to-format", "qcow2", source, &c], &[]),
        ("d", vec!["read", "--format", "raw", "--output", &d, source], &[]),
        ("e", vec!["plugin", "compile", "--output", &e, hostile.to_str().unwrap()], &[]),
        ("f", vec!["convert", "--force", "--format", "raw", "--to-format", "raw", source, &f], &["f"]),
    ];
    std::fs::write(directory.join("f"), "to be replaced").unwrap();
    let mut made = vec![OsString::from("f")];
    for (name, arguments, more) in commands {
        let outcome = run(blockhouse().arg("-vv").args(arguments)).succeeded();
        let planned = planned(&outcome.stderr, &directory);
        let partial =
            |path: &str| Path::new(path).file_name().unwrap().to_str().unwrap().starts_with(&format!(".{name}."));
        assert_eq!(planned.keys().filter(|path| partial(path)).count(), 1, "{name}: {planned:?}");
        for (path, uses) in &planned {
            let also = more.iter().any(|more| *path == new(more));
            assert!(uses == "[Write]" && (partial(path) || also), "{name}: {path} {uses}");
        }
        made.extend([name].into_iter().chain(more.iter().copied()).map(OsString::from));
        made.sort();
        made.dedup();
        assert_eq!(names(&directory), made, "{name}");
    }
    tally::image_served();
}

/// A policy grants what may be written; a command that writes nothing of it has no right to.
#[test]
fn a_command_that_reads_has_no_right_to_write() {
    let place = Place::new();
    let at = |name: &str| place.text(name);
    for name in ["data.bin", "other.raw", "disk.raw"] {
        place.write(&format!("images/{name}"), noise(1, 1 << 20));
    }
    std::fs::create_dir(place.path("images/store")).unwrap();
    let overlay = at("images/top.qcow2");
    let (disk, data, store) = (at("images/disk.raw"), at("images/data.bin"), at("images/store"));
    run(blockhouse().args(["create", "--format", "qcow2", &overlay, "1M"])).succeeded();
    let grants = [&data, &store].map(|path| format!("[[grants]]\npath = '{path}'\naccess = 'read-write'\n"));
    let policy = place.write("policy.toml", format!("version = 1\n{}", grants.concat()));
    let policy = ["--policy", policy.to_str().unwrap()];
    let target = at("images/vm/target");
    // What is planned, but for the new file.
    let outside = |stderr: &str| {
        let mut planned = planned(stderr, &place.path("images"));
        planned.retain(|path, _| Path::new(path).parent() != Some(&place.path("images/vm")));
        planned
    };
    let machine = format!("file={disk},format=raw,readonly=on");
    let new = ["create", "--force", "--backing", &disk, "--backing-format", "raw", &target];
    let of_two = ["compare", "--format-a", "raw", "--format-b", "raw", &disk, &disk];
    for arguments in [
        &["info", "--format", "raw", &disk][..],
        &["map", "--format", "raw", &disk],
        &["read", "--format", "raw", &disk],
        &of_two,
        &["convert", "--format", "raw", "--to-format", "raw", &disk, &target],
        &[&new[..], &["--format", "qcow2"]].concat(),
        &["snapshot", "list", "--format", "qcow2", &overlay],
        // Whether there is a machine or not, this is what it is planned with.
        &["run", "--memory", "64M", "--disk", &machine],
    ] {
        let outcome = run(blockhouse().arg("-vv").args(arguments).args(policy));
        assert!(arguments[0] == "run" || outcome.status.success(), "{arguments:?}: {}", outcome.stderr);
        let planned = outside(&outcome.stderr);
        assert!(planned.contains_key(&data) && planned.contains_key(&store), "{arguments:?}: {planned:?}");
        assert!(planned.values().all(|uses| uses == "[Read]"), "{arguments:?}: {planned:?}");
        tally::image_served();
    }
    // The twin: what is written may be written.
    let outcome =
        run(blockhouse().args(["-vv", "resize", "--format", "qcow2", &overlay, "2M"]).args(policy)).succeeded();
    let written = outside(&outcome.stderr);
    assert!([&overlay, &data, &store].into_iter().all(|path| written[path] == "[Write]"), "{written:?}");
    // And where no reference is followed, nothing that could be referred to is opened.
    let rebase = ["rebase", "--unsafe", "--backing", "other.raw", "--backing-format", "raw"];
    for (arguments, last, expected) in [(&rebase[..], &overlay[..], &overlay), (&new[..], "1M", &disk)] {
        let outcome = run(blockhouse().arg("-vv").args(arguments).args(["--format", "qcow2", last]).args(policy));
        let planned = outside(&outcome.succeeded().stderr);
        assert_eq!(planned.keys().collect::<Vec<_>>(), [expected], "{arguments:?}");
    }
}

/// A file that will not be overwritten, and a directory, are refused before any image is looked at, and not planned.
#[test]
fn an_output_that_is_refused_is_never_open() {
    let place = Place::new();
    let existing = place.write("images/existing", "before");
    // It would end the command if it were asked.
    let image = place.write("images/vm/hostile.img", "fail-at-open\n".to_owned() + &"x".repeat(4096));
    let plugin = format!("hostile={}", component("hostile").display());
    let (exists, directory) = ("$ROOT/images/existing exists; --force overwrites it", "a directory; name a file in it");
    let store = place.path("images/vm");
    for (output, more, why) in
        [(&existing, &[][..], exists), (&store, &[], directory), (&store, &["--force"], directory)]
    {
        for walls in [&["-vv"][..], &["--no-walls"]] {
            let outcome = run(blockhouse()
                .args(["read", "--format", "hostile", "--plugin", &plugin, "--output"])
                .arg(output)
                .args(more)
                .args(walls)
                .arg(&image));
            assert_eq!(outcome.status.code(), Some(1), "{}", outcome.stderr);
            let error = place.normalize(outcome.stderr.lines().last().unwrap());
            assert!(error.starts_with("blockhouse: ") && error.ends_with(why), "{}", outcome.stderr);
            assert!(planned(&outcome.stderr, &place.path("images")).is_empty(), "{}", outcome.stderr);
            tally::image_refused();
        }
    }
    assert_eq!(std::fs::read(&existing).unwrap(), b"before");
}

/// A machine with sockets for its operator: they are gone in the end, and so was the right to their directory before
/// the image was opened.
#[test]
fn nothing_beside_sockets_and_metrics_can_be_removed() {
    if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        return skip("/dev/kvm cannot be opened");
    }
    let place = Place::new();
    let directory = place.path("images/run");
    std::fs::create_dir(&directory).unwrap();
    let image = place.write("images/vm/disk.raw", noise(1, 1 << 20));
    let disk = format!("file={},format=raw,readonly=on", image.display());
    let path = |name: &str| directory.join(name).to_str().unwrap().to_owned();
    for (metrics, left) in [(path("metrics"), &[][..]), (format!("file:{}", path("text")), &["text"])] {
        let mut command = blockhouse();
        command.args(["-vv", "run", "--memory", "64M", "--disk", &disk, "--control", &path("control")]);
        let outcome = run(command.args(["--metrics", &metrics])).succeeded();
        let planned = planned(&outcome.stderr, &directory);
        assert!(planned.is_empty(), "{planned:?}");
        let at_first = format!("planned until components are loaded path={} uses=[MakeSockets]", directory.display());
        assert!(outcome.stderr.contains(&at_first), "{}", outcome.stderr);
        assert!(!outcome.stderr.contains(" WARN ") && !outcome.stderr.contains(" ERROR "), "{}", outcome.stderr);
        assert_eq!(names(&directory), left);
    }
    let text = std::fs::read_to_string(directory.join("text")).unwrap();
    assert!(text.contains("operation=\"read\"}"), "{text}");
    tally::image_served();
}

/// A conversion that is held up by a component that never answers.
fn held_up(place: &Place) -> Child {
    let mut bytes = b"loop-at-locate\n".to_vec();
    bytes.resize(1 << 20, b'.');
    let image = place.write("images/vm/loops.img", bytes);
    let mut command = blockhouse();
    command.arg("convert").arg("--plugin").arg(format!("hostile={}", component("hostile").display()));
    command.args(["--format", "hostile", "--to-format", "qcow2", "--data-file", "content.raw"]);
    let child = command.arg(image).arg(place.path("images/new/target")).stderr(Stdio::null()).spawn().unwrap();
    wait("begun", || names(&place.path("images/new")).len() == 2);
    child
}

#[track_caller]
fn wait(what: &str, mut happened: impl FnMut() -> bool) {
    let started = Instant::now();
    while !happened() {
        assert!(started.elapsed() < COMMAND_LIMIT, "not {what}");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

/// The process that gives names.
fn namer(process: u32) -> u32 {
    let text = std::fs::read_to_string(format!("/proc/{process}/task/{process}/children")).unwrap();
    let is_namer = |child: &&str| {
        let line = std::fs::read_to_string(format!("/proc/{child}/cmdline")).unwrap_or_default();
        line.contains("--name-for-parent")
    };
    let namers: Vec<&str> = text.split_whitespace().filter(is_namer).collect();
    // It made the files, so it is there.
    assert_eq!(namers.len(), 1, "{text}");
    namers[0].parse().unwrap()
}

#[test]
fn whatever_ends_the_program_nothing_unfinished_stays() {
    for (signal, to_all) in [(Signal::KILL, false), (Signal::INT, true), (Signal::TERM, true), (Signal::HUP, true)] {
        let place = Place::new();
        let directory = place.path("images/new");
        std::fs::create_dir(&directory).unwrap();
        let child = held_up(&place);
        // A terminal tells all of them, in any order.
        let told = to_all.then(|| namer(child.id())).into_iter().chain([child.id()]);
        for process in told {
            kill_process(Pid::from_raw(i32::try_from(process).unwrap()).unwrap(), signal).unwrap();
        }
        assert!(!finish(child).status.success());
        wait("gone", || names(&directory).is_empty());
    }
    // The twin: it is the component's ten seconds that it waits for, and then says so.
    let place = Place::new();
    std::fs::create_dir(place.path("images/new")).unwrap();
    assert_eq!(finish(held_up(&place)).status.code(), Some(6));
    assert!(names(&place.path("images/new")).is_empty());
    tally::component_stopped();
}

/// Somebody takes the name while the file is made: it is theirs.
#[test]
fn a_name_that_somebody_took_meanwhile_stays_theirs() {
    let place = Place::new();
    let directory = place.path("images/new");
    std::fs::create_dir(&directory).unwrap();
    // To compress what cannot be compressed takes a second or more.
    let source = place.write("images/vm/source.raw", noise(1, 32 << 20));
    let target = directory.join("target");
    let attempt = || {
        let mut command = blockhouse();
        command.args(["convert", "--format", "raw", "--to-format", "qcow2", "--compress"]).args([&source, &target]);
        let child = command.stderr(Stdio::piped()).spawn().unwrap();
        wait("begun", || !names(&directory).is_empty());
        let taken = std::fs::File::create_new(&target).is_ok();
        let outcome = finish(child);
        if !taken {
            std::fs::remove_file(&target).unwrap();
        }
        taken.then_some(outcome)
    };
    let Outcome { status, stderr, .. } = (0..3).find_map(|_| attempt()).expect("it was complete already, each time");
    assert!(status.code() == Some(1) && stderr.contains("target exists; --force"), "{stderr}");
    assert_eq!(names(&directory), ["target"]);
    assert!(std::fs::read(target).unwrap().is_empty());
}
