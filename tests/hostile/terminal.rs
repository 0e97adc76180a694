//! Names that do something to a terminal that shows them, in what is written for programs: people look at that as well.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use blockhouse_tests::serve::Serve;
use blockhouse_tests::{COMMAND_LIMIT, blockhouse, program, run};
use serde_json::Value;

use crate::place::{Place, limited};

/// An escape of one byte, one of the upper half, DEL, marks that reorder, an end of line, what nobody sees.
const EVIL: &str = "\u{1b}[2J\u{9b}31m\u{7f}\u{202e}\u{2066}\u{61c}\u{2028}\u{200b}\u{e0041}";

/// The text is JSON, has the name in it if it should, and nothing of it is raw.
#[track_caller]
fn assert_escaped(what: &str, text: &str, named: bool) {
    let raw = EVIL.chars().filter(|character| !"[2J31m".contains(*character)).find(|evil| text.contains(*evil));
    assert_eq!(raw, None, "{what}: {text:?}");
    let values = serde_json::Deserializer::from_str(text).into_iter::<Value>();
    let values: Vec<Value> = values.collect::<Result<_, _>>().unwrap_or_else(|error| panic!("{what}: {error}: {text}"));
    if named {
        assert!(
            text.contains("\\u001b[2J\\u009b31m\\u007f\\u202e\\u2066\\u061c\\u2028\\u200b\\udb40\\udc41"),
            "{what}: {text}"
        );
        assert!(
            format!("{values:?}").contains(&format!("{EVIL:?}").trim_matches('"').to_owned()),
            "{what}: {values:?}"
        );
    }
}

/// An image with a base, both with such a name.
fn images(place: &Place) -> (String, String) {
    let base = format!("images/vm/base{EVIL}.raw");
    place.write(&base, [1; 65536]);
    let (base, image) = (place.text(&base), place.text(&format!("images/vm/top{EVIL}.qcow2")));
    let create = ["create", "--format", "qcow2", "--backing", &base, "--backing-format", "raw", &image];
    run(blockhouse().args(create)).succeeded();
    (image, base)
}

/// Every command that writes JSON, and the audit file of each.
#[test]
fn no_name_reaches_a_terminal_raw_as_json() {
    let place = Place::new();
    let (image, base) = images(&place);
    let broken = place.write(&format!("images/vm/broken{EVIL}.qcow2"), [0; 512]).to_str().unwrap().to_owned();
    let stranger = place.write(&format!("images/{EVIL}.wasm"), crate::surfaces::importing_evil(EVIL));
    let (new, copy) = (place.text(&format!("images/new{EVIL}.qcow2")), place.text(&format!("images/copy{EVIL}.raw")));
    let (granted, snapshot) = (place.text("images"), format!("before{EVIL}"));
    let (qcow2, raw) = (["--format", "qcow2"], ["--format", "raw"]);
    let allow = ["--allow", &granted];
    // Whether it has a name of an image in it, and whether it opens one, so that it has an audit file.
    let commands: Vec<(Vec<&str>, bool, bool)> = vec![
        ([&["info", "--json"], &qcow2[..], &allow, &[&image]].concat(), true, true),
        ([&["info", "--json"], &qcow2[..], &[&image]].concat(), true, true),
        ([&["info", "--json"], &qcow2[..], &[&broken]].concat(), true, true),
        ([&["map", "--json"], &qcow2[..], &allow, &[&image]].concat(), true, true),
        ([&["check", "--json"], &qcow2[..], &[&image]].concat(), false, true),
        ([&["snapshot", "create", "--json"], &qcow2[..], &[&image, &snapshot]].concat(), true, true),
        // What a component says of its image is escaped as text by then.
        ([&["snapshot", "list", "--json"], &qcow2[..], &allow, &[&image]].concat(), false, true),
        (vec!["probe", "--json", &image], false, false),
        (
            [&["create", "--json"], &qcow2[..], &["--backing", &base, "--backing-format", "raw", &new]].concat(),
            true,
            true,
        ),
        (
            [&["convert", "--json", "--format", "qcow2", "--to-format", "raw"], &allow[..], &[&image, &copy]].concat(),
            true,
            true,
        ),
        (
            [&["compare", "--json", "--format-a", "qcow2", "--format-b", "raw"], &allow[..], &[&image, &copy]].concat(),
            false,
            true,
        ),
        ([&["resize", "--json"], &raw[..], &[&copy, "128K"]].concat(), false, true),
        ([&["rebase", "--json"], &qcow2[..], &allow, &["--no-backing", &new]].concat(), false, true),
        (
            [&["commit", "--json"], &qcow2[..], &allow, &["--base", &base, "--base-format", "raw", &image]].concat(),
            false,
            true,
        ),
        (vec!["plugin", "inspect", "--json", stranger.to_str().unwrap()], true, false),
        (vec!["plugin", "list", "--json"], false, false),
    ];
    let mut tried = 0;
    for (number, (arguments, named, audited)) in commands.iter().enumerate() {
        let audit = place.path(&format!("audit-{number}"));
        let mut command = limited();
        command.args(arguments);
        if *audited {
            command.arg("--audit").arg(&audit);
        }
        let outcome = run(&mut command);
        let what = format!("{arguments:?}, {}", outcome.stderr);
        assert_ne!(outcome.text(), "", "nothing was printed: {what}");
        assert_escaped(&what, &outcome.text(), *named);
        assert_escaped(&format!("the errors of {what}"), &Value::from(outcome.stderr.as_str()).to_string(), false);
        if let Ok(audit) = std::fs::read_to_string(&audit) {
            assert_escaped(&format!("the audit of {what}"), &audit, !audit.is_empty());
            tried += usize::from(!audit.is_empty());
        }
    }
    assert!(tried > 3, "{tried} audit files had something in them");
}

/// What a server says at its end, and at its control socket.
#[test]
fn no_name_reaches_a_terminal_raw_from_a_server() {
    let place = Place::new();
    let (image, base) = images(&place);
    let (socket, control, printed) = (place.path("socket"), place.path("control"), place.path("printed"));
    let mut command = blockhouse();
    command.args(["serve", "--json", "--disk", &format!("file={image},format=qcow2,allow={base}")]);
    command.arg("--socket").arg(&socket).arg("--control").arg(&control);
    command.stdout(std::fs::File::create(&printed).unwrap());
    let serve = Serve::start_printing(&mut command, &place.path("log"));
    for (line, named) in [
        ("{\"command\":\"status\"}", true),
        ("{\"command\":\"metrics\"}", true),
        ("{\"command\":\"resize\",\"disk\":\"\u{9b}\u{202e}\u{7f}\",\"size\":\"1M\"}", false),
        ("\u{9b}\u{202e}", false),
    ] {
        let mut stream = UnixStream::connect(&control).unwrap();
        stream.set_read_timeout(Some(COMMAND_LIMIT)).unwrap();
        stream.write_all(format!("{line}\n").as_bytes()).unwrap();
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).unwrap();
        assert_escaped(line, &answer, named);
    }
    for what in ["status", "metrics"] {
        let mut client = Command::new(program());
        let outcome = run(client.args(["control", "--json", "--socket"]).arg(&control).arg(what).stdin(Stdio::null()));
        assert_escaped(what, &outcome.text(), true);
    }
    serve.terminate();
    assert_escaped("serve", &std::fs::read_to_string(Path::new(&printed)).unwrap(), true);
}

/// The log, with all that there is: an image is named by it as well as what it refers to.
#[test]
fn no_name_reaches_a_terminal_raw_in_the_log() {
    let place = Place::new();
    let (image, base) = images(&place);
    let granted = place.text("images");
    for allow in [&["--allow", &*granted][..], &[]] {
        for command in ["info", "read"] {
            let mut program = limited();
            program.env("RUST_LOG", "trace").args([command, "--format", "qcow2"]).args(allow).arg(&image);
            let outcome = run(&mut program);
            let log = &outcome.stderr;
            let raw = EVIL.chars().filter(|character| !"[2J31m".contains(*character)).find(|evil| log.contains(*evil));
            assert_eq!(raw, None, "{command}: {log:?}");
            for name in [&image, &base] {
                let escaped = name.escape_default().to_string();
                assert!(log.contains(&escaped), "{command}: {name:?} is not in {log}");
            }
        }
    }
}
