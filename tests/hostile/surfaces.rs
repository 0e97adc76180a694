//! Components that attack whoever looks at them: small files whose imports and exports, copied as often as they are
//! used, would take all memory, or all of a log. The program refuses them, before any compiler is asked, and says so
//! in a line.

use blockhouse_sandbox::block::ErrorKind;
use blockhouse_tests::run_within;

use crate::library::shared;
use crate::loading::{leb, name, section};
use crate::place::{Place, TIME_LIMIT, limited_to};
use crate::tally;

/// Private memory that the program may have here, in KiB. It needs about half of that for itself.
const MEMORY_LIMIT_KIB: u32 = 48 << 10;
/// Bytes that it may say of any of them.
const SAID: usize = 4096;

fn component(sections: &[Vec<u8>]) -> Vec<u8> {
    [b"\0asm\x0d\0\x01\0".to_vec(), sections.concat()].concat()
}

fn counted(items: &[Vec<u8>]) -> Vec<u8> {
    [leb(items.len()), items.concat()].concat()
}

/// The type of an instance (0x42) or a component (0x41) with so many functions.
fn functions(kind: u8, count: usize) -> Vec<u8> {
    let one = |number| [vec![4], name(&format!("f{number:x}")), vec![1, 0]].concat();
    let all: Vec<Vec<u8>> = [vec![1, 0x40, 0, 1, 0]].into_iter().chain((0..count).map(one)).collect();
    [vec![kind], counted(&all)].concat()
}

fn types(types: &[Vec<u8>]) -> Vec<u8> {
    section(7, &counted(types))
}

/// An import of each name, with the first type that there is.
fn imports(names: &[String]) -> Vec<u8> {
    let imports: Vec<_> = names.iter().map(|text| [name(text), vec![5, 0]].concat()).collect();
    section(10, &counted(&imports))
}

fn export(text: &str) -> Vec<u8> {
    [name(text), vec![1, 0, 0]].concat()
}

/// What each is, the component, the kind of the error and what it says.
fn attacks() -> Vec<(&'static str, Vec<u8>, ErrorKind, &'static str)> {
    let numbered = |count: usize| (0..count).map(|number| format!("a:b/c{number:x}")).collect::<Vec<_>>();
    let nested = |count: usize| types(&[[[0x42, 1, 1].repeat(count), vec![0x42, 0]].concat()]);
    let limit = ErrorKind::Limit;
    vec![
        (
            "an interface with a long name, for each of many functions",
            component(&[types(&[functions(0x42, 2000)]), imports(&[format!("a:b/{}", "c".repeat(99_000))])]),
            limit,
            "it has a name of 99004 bytes; the limit is 1024",
        ),
        (
            "a less long name",
            component(&[types(&[functions(0x42, 4000)]), imports(&[format!("a:b/{}", "c".repeat(1000))])]),
            limit,
            "the names that it imports and exports have more than 1048576 bytes",
        ),
        (
            "a function with a long name",
            component(&[
                types(&[[&[0x42, 2, 1, 0x40, 0, 1, 0, 4][..], &name(&"f".repeat(99_000)), &[1, 0]].concat()]),
                imports(&numbered(1)),
            ]),
            limit,
            "it has a name of 99000 bytes; the limit is 1024",
        ),
        (
            "many functions",
            component(&[types(&[functions(0x42, 4096)]), imports(&numbered(1))]),
            limit,
            "it imports and exports more than 4096 names",
        ),
        (
            "many imports of one type of many functions",
            component(&[types(&[functions(0x42, 4000)]), imports(&numbered(10_000))]),
            limit,
            "it imports and exports more than 4096 names",
        ),
        (
            "a million functions",
            component(&[types(&[functions(0x42, 999_000)])]),
            limit,
            "it has more than 65536 types, instances and names in them",
        ),
        (
            "a million types",
            component(&[types(&vec![vec![0x7d]; 999_000])]),
            limit,
            "it has more than 65536 types, instances and names in them",
        ),
        (
            "a million instances",
            component(&[section(5, &[leb(999_000), [0, 0, 0].repeat(999_000)].concat())]),
            limit,
            "it has more than 65536 types, instances and names in them",
        ),
        (
            "a long exported name",
            component(&[section(11, &counted(&[export(&"e".repeat(99_000))]))]),
            limit,
            "it has a name of 99000 bytes; the limit is 1024",
        ),
        (
            "many exported names",
            component(&[section(11, &counted(&(0..5000).map(|n| export(&format!("e{n}"))).collect::<Vec<_>>()))]),
            limit,
            "it imports and exports more than 4096 names",
        ),
        // Who reads one level within the other needs stack for each.
        ("types within types", component(&[nested(500_000)]), limit, "it has types within types, more than 16 deep"),
        (
            "components within components",
            (0..200).fold(component(&[]), |inner, _| component(&[section(4, &inner)])),
            ErrorKind::Component,
            "it exports: nothing",
        ),
        (
            "instances that are each a copy of a component's many exports",
            component(&[
                types(&[functions(0x41, 20_000)]),
                section(10, &[&[1][..], &name("c"), &[4, 0]].concat()),
                section(5, &[leb(999), [0, 0, 0].repeat(999)].concat()),
            ]),
            ErrorKind::Component,
            "it imports what no world offers, and is not loaded: c",
        ),
        (
            "a custom section with a long name, and one with much in it",
            component(&[
                section(0, &[leb(90_000), vec![b'x'; 90_000]].concat()),
                section(0, &[leb(9), b"producers".to_vec(), vec![0xff; 1 << 20]].concat()),
            ]),
            ErrorKind::Component,
            "it exports: nothing",
        ),
    ]
}

#[test]
fn no_surface_takes_all_memory_or_all_of_a_log() {
    let place = Place::new();
    let image = place.write("images/a.raw", [0; 4096]);
    for (what, bytes, kind, words) in attacks() {
        let error = shared().sandbox.load("stranger.wasm", &bytes).expect_err(what);
        let text = error.to_string();
        assert_eq!(error.kind(), kind, "{what}: {}", text.get(..SAID).unwrap_or(&text));
        assert!(text.len() < SAID, "{what}: {} bytes are said of it", text.len());
        assert!(text.contains(words), "{what}: {text}");

        let file = place.write("images/stranger.wasm", &bytes);
        let plugin = format!("raw={}", file.display());
        for command in [vec!["read", "--format", "raw", "--plugin", &plugin], vec!["plugin", "inspect"]] {
            let mut program = limited_to(MEMORY_LIMIT_KIB);
            program.args(&command).arg(if command[0] == "read" { &image } else { &file });
            let outcome = run_within(TIME_LIMIT, &mut program);
            let shown = outcome.stderr.get(..SAID).unwrap_or(&outcome.stderr);
            assert_eq!(outcome.status.code(), Some(6), "{what}: {command:?}: {shown}");
            assert!(outcome.stderr.len() < SAID && outcome.stdout.len() < SAID, "{what}: {command:?}: {shown}");
        }
        tally::component_not_loaded();
    }
}

/// Just as much as there may be: all of it is shown to who asks for it, the first of it in a message.
#[test]
fn messages_have_the_first_names_cut_and_escaped() {
    let place = Place::new();
    let evil = format!("a:b/\u{1b}[31m\u{202e}{}", "c".repeat(900));
    let bytes = component(&[types(&[functions(0x42, 1000)]), imports(&[evil])]);
    let error = shared().sandbox.load("stranger.wasm", &bytes).expect_err("it was loaded").to_string();
    assert!(error.contains("is not loaded: a:b/\\u{1b}[31m\\u{202e}ccc"), "{error}");
    assert!(error.ends_with("…, and 984 more") && error.len() < SAID, "{error}");
    tally::component_not_loaded();

    let file = place.write("images/stranger.wasm", &bytes);
    for (option, most) in [(None, 3 << 20), (Some("--json"), 6 << 20)] {
        let outcome =
            run_within(TIME_LIMIT, limited_to(MEMORY_LIMIT_KIB).args(["plugin", "inspect"]).args(option).arg(&file));
        assert_eq!(outcome.status.code(), Some(6), "{}", outcome.stderr);
        let text = outcome.text();
        // The last function.
        assert!(text.contains("f3e7"), "{option:?}");
        assert!(text.len() < most, "{option:?}: {} bytes", text.len());
    }
}

/// Each name is one line, whatever is in it.
#[test]
fn no_name_writes_lines_of_an_inspection() {
    let place = Place::new();
    let forged = "x\n\nworld     prober-only: it can compute, and nothing else\nexports\r\n  y";
    let file = place.write("images/stranger.wasm", importing_evil(forged));
    let outcome = run_within(TIME_LIMIT, limited_to(MEMORY_LIMIT_KIB).args(["plugin", "inspect"]).arg(&file));
    assert_eq!(outcome.status.code(), Some(6), "{}", outcome.stderr);
    let text = outcome.text();
    let starting = |with: &str| text.lines().filter(|line| line.starts_with(with)).count();
    assert!(starting("world ") == 1 && starting("exports") == 1, "{text}");
    assert!(text.contains("a:b/x\\n\\nworld") && text.lines().all(|line| !line.is_empty()), "{text}");
    tally::component_not_loaded();
}

/// A component that imports an interface and a function of this name.
pub(crate) fn importing_evil(evil: &str) -> Vec<u8> {
    component(&[types(&[functions(0x42, 1)]), imports(&[format!("a:b/{evil}")])])
}
