//! Standard output and standard error that cannot be written: what a command does it does all the same, and it ends as
//! it should, with a message if there is somebody to read it.

use std::fs::File;
use std::process::{Command, ExitStatus, Stdio};

use blockhouse_tests::{blockhouse, component};

use crate::lab::Lab;

/// A command, what it makes if anything, and how it ends if nothing is wrong.
struct Case {
    arguments: Vec<String>,
    makes: Option<&'static str>,
    code: i32,
}

/// One of each kind of output, as text and as JSON. What one makes the next ones use.
fn cases() -> Vec<Case> {
    let hostile = component("hostile");
    let hostile = hostile.to_str().unwrap();
    [
        ("create --format qcow2 new.qcow2 1M", Some("new.qcow2"), 0),
        ("create --json --format qcow2 new.qcow2 1M", Some("new.qcow2"), 0),
        ("create --format qcow2 -o help", None, 0),
        ("convert --format raw --to-format qcow2 a.raw new.qcow2", Some("new.qcow2"), 0),
        // A line for each percent, and many of them.
        ("convert --json --format raw --to-format qcow2 large.raw new.qcow2", Some("new.qcow2"), 0),
        ("read --format raw a.raw", None, 0),
        ("read --format raw --output new.raw a.raw", Some("new.raw"), 0),
        ("info --format qcow2 a.qcow2", None, 0),
        ("info --json --format qcow2 a.qcow2", None, 0),
        ("info --format qcow2 a.raw", None, 4),
        ("map --format qcow2 a.qcow2", None, 0),
        ("map --json --format qcow2 a.qcow2", None, 0),
        ("check --format qcow2 a.qcow2", None, 0),
        ("check --json --format qcow2 a.qcow2", None, 0),
        ("resize --format qcow2 a.qcow2 2M", None, 0),
        ("snapshot create --format qcow2 a.qcow2 one", None, 0),
        ("snapshot list --format qcow2 a.qcow2", None, 0),
        ("compare --format-a raw --format-b qcow2 a.raw a.qcow2", None, 8),
        ("probe a.qcow2", None, 0),
        ("probe --json a.qcow2", None, 0),
        ("plugin list", None, 0),
        ("plugin list --json", None, 0),
        ("plugin inspect HOSTILE", None, 0),
        ("info --format none a.raw", None, 5),
    ]
    .map(|(line, makes, code)| {
        let arguments = line.split(' ').map(|word| word.replace("HOSTILE", hostile)).collect();
        Case { arguments, makes, code }
    })
    .into()
}

/// A case with these streams: how it ends, and what it says on standard error if that is a pipe.
fn ends(lab: &Lab, case: &Case, stdout: impl Into<Stdio>, stderr: impl Into<Stdio>) -> (ExitStatus, String) {
    let mut command: Command = blockhouse();
    command.args(&case.arguments).current_dir(lab.path("")).stdin(Stdio::null()).stdout(stdout).stderr(stderr);
    let output = command.spawn().unwrap().wait_with_output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!text.contains("panicked"), "{:?}: {text}", case.arguments);
    if let Some(makes) = case.makes {
        // A missing one says that the work was not done.
        std::fs::remove_file(lab.path(makes)).unwrap_or_else(|error| panic!("{:?}: {error}: {text}", case.arguments));
    }
    (output.status, text)
}

fn lab() -> Lab {
    let lab = Lab::new();
    lab.raw("a.raw", 1 << 20, &[(0, 4096)]);
    lab.raw("large.raw", 16 << 20, &[(0, 1 << 20)]);
    lab.qemu_img("create -q -f qcow2 a.qcow2 1M");
    lab
}

fn full() -> File {
    File::options().write(true).open("/dev/full").unwrap()
}

#[test]
fn a_full_standard_output_is_said() {
    let lab = lab();
    for case in cases() {
        let (status, text) = ends(&lab, &case, full(), Stdio::piped());
        // Nothing is printed there.
        let quiet = case.makes == Some("new.raw") || matches!(case.code, 4 | 5);
        assert_eq!(status.code(), Some(if quiet { case.code } else { 1 }), "{:?}: {text}", case.arguments);
        if !quiet {
            let why = "blockhouse: cannot write to standard output: No space left on device";
            assert!(text.contains(why), "{:?}: {text}", case.arguments);
        }
    }
}

/// Whoever reads may have seen enough: that is no error, and what is made is made.
#[test]
fn a_reader_that_is_gone_is_no_error() {
    let lab = lab();
    for case in cases() {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let (status, text) = ends(&lab, &case, writer, Stdio::piped());
        assert_eq!(status.code(), Some(case.code), "{:?}: {text}", case.arguments);
        assert!(!text.contains("standard output"), "{:?}: {text}", case.arguments);
    }
}

/// The log and the messages are lost, and nothing else.
#[test]
fn standard_error_that_takes_nothing_changes_nothing() {
    let lab = lab();
    for case in cases() {
        let (reader, gone) = std::io::pipe().unwrap();
        drop(reader);
        for stderr in [Stdio::from(full()), gone.into()] {
            let (status, _) = ends(&lab, &case, Stdio::null(), stderr);
            assert_eq!(status.code(), Some(case.code), "{:?}", case.arguments);
        }
    }
}

/// The commands that `help` lists, those of groups as `snapshot list`.
fn commands() -> Vec<String> {
    let listed = |group: &[&str]| {
        let help = blockhouse().args(group).arg("--help").output().unwrap().stdout;
        let help = String::from_utf8(help).unwrap();
        let list = help.split_once("\nCommands:\n").map_or("", |(_, list)| list.split("\n\n").next().unwrap());
        let names = list.lines().filter(|line| !line.starts_with("     "));
        let names = names.filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help");
        names.map(|name| [group, &[name]].concat().join(" ")).collect::<Vec<_>>()
    };
    let groups = ["snapshot", "plugin"];
    let top = listed(&[]).into_iter().filter(|name| !groups.contains(&name.as_str()));
    top.chain(groups.iter().flat_map(|group| listed(&[group]))).collect()
}

/// With `--json` a program that reads standard output finds the error there, whatever the command is.
#[test]
fn an_error_is_json_for_who_asked_for_json() {
    let lab = lab();
    let failing = [
        ("info", "--format none a.raw", 5),
        ("map", "--format qcow2 missing.qcow2", 1),
        ("run", "--disk file=missing.qcow2,format=qcow2", 1),
        ("serve", "--socket missing/socket --disk file=a.raw,format=raw", 1),
        ("create", "--format qcow2 a.qcow2 1M", 1),
        ("check", "--format qcow2 a.raw", 4),
        ("resize", "--format qcow2 a.raw 2M", 4),
        ("convert", "--format qcow2 --to-format raw a.raw new.raw", 4),
        ("compare", "--format-a raw --format-b qcow2 a.raw a.raw", 4),
        ("commit", "--format qcow2 --base missing.raw --base-format raw a.qcow2", 1),
        ("rebase", "--format qcow2 --no-backing a.raw", 4),
        ("probe", "missing.raw", 1),
        ("control", "--socket missing status", 1),
        ("snapshot list", "--format qcow2 a.raw", 4),
        ("snapshot create", "--format qcow2 a.raw one", 4),
        ("snapshot apply", "--format qcow2 a.qcow2 none", 1),
        ("snapshot delete", "--format qcow2 a.qcow2 none", 1),
        ("plugin inspect", "missing.wasm", 1),
        ("plugin compile", "missing.wasm --output new", 1),
    ];
    for command in commands() {
        let words = || command.split(' ');
        let help = blockhouse().args(words()).arg("--help").output().unwrap().stdout;
        if !String::from_utf8(help).unwrap().contains("--json") {
            assert!(["read", "plugin list"].contains(&&*command), "{command} has no --json");
            continue;
        }
        let Some((_, arguments, code)) = failing.iter().find(|(name, ..)| *name == command) else {
            assert_eq!(command, "plugin list", "a command that is not tried");
            continue;
        };
        let mut program: Command = blockhouse();
        program.args(words()).arg("--json").args(arguments.split(' ')).current_dir(lab.path("")).stdin(Stdio::null());
        let output = program.output().unwrap();
        let (out, err) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
        assert_eq!(output.status.code(), Some(*code), "{command}: {err}");
        let answer: serde_json::Value =
            serde_json::from_str(&out).unwrap_or_else(|why| panic!("{command}: {why}: {out}"));
        let message = answer["error"]["message"].as_str().unwrap_or_else(|| panic!("{command}: {out}"));
        let first = message.split(": ").next().unwrap();
        assert!(command == "info" || err.contains(first), "{command}: {message:?} is not {err:?}");
        assert!(answer["error"]["kind"].as_str().is_some_and(|kind| !kind.is_empty()), "{command}: {out}");
    }
}
