//! Components that ask for more than there is, and files that are no components: refused when they are
//! loaded, before anything of them runs.

use std::path::Path;

use blockhouse_sandbox::authority::{Authority, FUNCTIONS, level_of};
use blockhouse_sandbox::block::ErrorKind;
use blockhouse_sandbox::{Limits, Sandbox};
use blockhouse_tests::{component, noise};
use wit_parser::{FunctionKind, Resolve};

use crate::library::shared;
use crate::place::{Place, limited};
use crate::tally;

/// A component that imports one function and has nothing else, byte by byte: WebAssembly component
/// model, Binary.md.
///
/// ```text
///   (component (import "INTERFACE" (instance
///     (export "RESOURCE" (type (sub resource)))                       for methods
///     (export "FUNCTION" (func (param "self" (borrow RESOURCE)))))))
/// ```
pub(crate) fn importing(interface: &str, function: &str) -> Vec<u8> {
    let resource = ["[method]", "[static]", "[constructor]"]
        .iter()
        .find_map(|kind| function.strip_prefix(kind))
        .map(|rest| rest.split('.').next().unwrap_or(rest));
    let mut declarations: Vec<Vec<u8>> = Vec::new();
    let mut types = 0u8;
    if let Some(resource) = resource {
        declarations.push([&[0x04][..], &name(resource), &[0x03, 0x01]].concat());
        types += 1;
    }
    let (parameters, result) = if function.starts_with("[method]") {
        declarations.push(vec![0x01, 0x68, 0]);
        (vec![1, 4, b's', b'e', b'l', b'f', types], vec![0x01, 0x00])
    } else if function.starts_with("[constructor]") {
        declarations.push(vec![0x01, 0x69, 0]);
        (vec![0], vec![0x00, types])
    } else {
        (vec![0], vec![0x01, 0x00])
    };
    types += u8::from(declarations.len() > usize::from(types));
    declarations.push([&[0x01, 0x40][..], &parameters, &result].concat());
    declarations.push([&[0x04][..], &name(function), &[0x01, types]].concat());
    let count = u8::try_from(declarations.len()).unwrap();
    let instance = [vec![1, 0x42, count], declarations.concat()].concat();
    let import = [vec![1], name(interface), vec![0x05, 0]].concat();
    [b"\0asm\x0d\0\x01\0".to_vec(), section(7, &instance), section(10, &import)].concat()
}

/// A name of an import or export.
pub(crate) fn name(name: &str) -> Vec<u8> {
    [&[0x00][..], &leb(name.len()), name.as_bytes()].concat()
}

pub(crate) fn section(id: u8, content: &[u8]) -> Vec<u8> {
    [&[id][..], &leb(content.len()), content].concat()
}

pub(crate) fn leb(mut value: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        let low = u8::try_from(value & 0x7f).unwrap();
        value >>= 7;
        if value == 0 {
            bytes.push(low);
            return bytes;
        }
        bytes.push(low | 0x80);
    }
}

/// The sandbox refuses the bytes as a component, and says why.
#[track_caller]
fn assert_not_loaded(bytes: &[u8], words: &[&str]) {
    let error = shared().sandbox.load("stranger.wasm", bytes).expect_err("it was loaded");
    assert_eq!(error.kind(), ErrorKind::Component, "{error}");
    let text = error.to_string();
    for word in [&["stranger.wasm: "], words].concat() {
        assert!(text.contains(word), "no {word:?} in {text:?}");
    }
    tally::component_not_loaded();
}

#[test]
fn imports_outside_of_the_world_are_refused_by_name() {
    for (interface, function) in [
        ("wasi:random/random@0.2.6", "get-random-bytes"),
        ("wasi:random/insecure-seed@0.2.6", "insecure-seed"),
        ("wasi:cli/environment@0.2.6", "get-environment"),
        ("wasi:cli/environment@0.2.6", "get-arguments"),
        ("wasi:cli/exit@0.2.6", "exit"),
        ("wasi:cli/stdout@0.2.6", "get-stdout"),
        ("wasi:clocks/wall-clock@0.2.6", "now"),
        ("wasi:clocks/monotonic-clock@0.2.6", "now"),
        ("wasi:sockets/instance-network@0.2.6", "instance-network"),
        ("wasi:sockets/tcp-create-socket@0.2.6", "create-tcp-socket"),
        ("wasi:sockets/tcp@0.2.6", "[method]tcp-socket.start-connect"),
        ("wasi:sockets/ip-name-lookup@0.2.6", "resolve-addresses"),
        ("wasi:http/outgoing-handler@0.2.6", "handle"),
        ("wasi:io/poll@0.2.6", "poll"),
        ("wasi:io/streams@0.2.6", "[method]input-stream.read"),
        ("wasi:threads/threads@0.1.0", "spawn"),
        // Interfaces and functions that look like those that there are.
        ("wasi:filesystem/types@0.3.0", "[method]descriptor.read"),
        ("wasi:filesystem/types@1.2.6", "[method]descriptor.read"),
        ("wasi:filesystem/types@0.2.6", "[method]descriptor.read2"),
        ("wasi:filesystem/types@0.2.6", "read"),
        ("wasi:filesystem/preopens@0.2.6", "get-directories2"),
        ("wasi:filesystem/types2@0.2.6", "[method]descriptor.read"),
        ("wasi:filesystem2/types@0.2.6", "[method]descriptor.read"),
        ("blockhouse:format/files@0.1.0", "open"),
        ("blockhouse:format/files@0.2.0", "share"),
        ("blockhouse:format/log@1.0.0", "write"),
        ("blockhouse:host/files@0.1.0", "share"),
    ] {
        let bytes = importing(interface, function);
        let import = format!("{interface} {function}");
        assert_not_loaded(&bytes, &["it imports what no world offers, and is not loaded: ", &import]);
        let inspection = shared().sandbox.inspect("stranger.wasm", &bytes).unwrap();
        assert!(inspection.outside.contains(&import), "{inspection:?}");
        assert_eq!(inspection.world, None);
    }
}

/// GHSA-4ch3-9j33-3pmj and all the rest of wasi:filesystem: of its functions, those in the table are
/// known, and link-at, rename-at, symlink-at, unlink-file-at, create-directory-at are not.
#[test]
fn of_wasi_filesystem_only_the_table_is_offered() {
    let wit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../wit");
    let mut resolve = Resolve::default();
    resolve.push_dir(&wit).unwrap();
    let mut outside = Vec::new();
    let mut inside = 0;
    for (_, interface) in resolve.interfaces.iter() {
        let (Some(package), Some(short)) = (interface.package, interface.name.as_deref()) else { continue };
        let package = &resolve.packages[package].name;
        if package.namespace != "wasi" {
            continue;
        }
        let version = package.version.as_ref().unwrap();
        let plain = format!("{}:{}/{short}", package.namespace, package.name);
        for (function, item) in &interface.functions {
            assert!(!matches!(item.kind, FunctionKind::AsyncFreestanding), "an asynchronous {function}");
            let interface = format!("{plain}@{version}");
            let bytes = importing(&interface, function);
            match level_of(&plain, function) {
                None => {
                    outside.push(function.clone());
                    assert_not_loaded(&bytes, &[&format!("{interface} {function}")]);
                }
                Some(level) => {
                    inside += 1;
                    let inspection = shared().sandbox.inspect("stranger.wasm", &bytes).unwrap();
                    assert!(inspection.outside.is_empty(), "{inspection:?}");
                    assert_eq!(inspection.imports[0].level, Some(level));
                    // It exports nothing, so it is not loaded either.
                    assert_not_loaded(&bytes, &["it exports neither blockhouse:format/reader nor"]);
                }
            }
        }
    }
    let table = FUNCTIONS
        .iter()
        .filter(|function| function.interface.starts_with("wasi:") && !function.name.starts_with("[resource"));
    assert_eq!(inside, table.count(), "the table has functions that wasi:filesystem has not");
    for name in [
        "link-at",
        "rename-at",
        "symlink-at",
        "unlink-file-at",
        "remove-directory-at",
        "create-directory-at",
        "readlink-at",
        "stat-at",
        "read-directory",
        "set-times",
        "set-times-at",
        "write-via-stream",
        "append-via-stream",
        "read-via-stream",
    ] {
        assert!(
            outside.contains(&format!("[method]descriptor.{name}")),
            "{name} is offered, or is not WASI's: {outside:?}"
        );
    }
    assert!(FUNCTIONS.iter().all(|function| function.level != Authority::Prober), "a prober imports nothing");
}

/// Each component wants the level that it needs: who writes nothing does not import writing.
#[test]
fn the_twins_are_loaded() {
    for (format, level) in [
        ("raw", Authority::ReadWrite),
        ("vmdk", Authority::ReadOnly),
        ("qcow2", Authority::ReadWrite),
        ("hostile", Authority::ReadWrite),
    ] {
        let plugin = shared().sandbox.load_file(&component(format)).unwrap();
        assert_eq!(plugin.inspection().world, Some(level), "{format}");
        assert!(plugin.inspection().outside.is_empty(), "{format}");
    }
}

#[test]
fn what_is_no_component_is_not_loaded() {
    let no_component = "it is not a WebAssembly component that this host can run";
    let good = std::fs::read(component("qcow2")).unwrap();
    let mut cases: Vec<(String, Vec<u8>)> = vec![
        ("nothing".into(), Vec::new()),
        ("a core module".into(), b"\0asm\x01\0\0\0".to_vec()),
        ("half a magic".into(), b"\0as".to_vec()),
        ("another version".into(), b"\0asm\x0e\0\x01\0".to_vec()),
        ("noise".into(), noise(1, 10_000)),
        ("zeroes".into(), vec![0; 10_000]),
        ("text".into(), b"(component)".to_vec()),
        ("an ELF program".into(), std::fs::read("/proc/self/exe").unwrap()[..10_000].to_vec()),
        ("a section without end".into(), b"\0asm\x0d\0\x01\0\x01\xff\xff\xff\xff\x0f".to_vec()),
        ("two components".into(), [&good[..], &good[..]].concat()),
        ("and something more".into(), [&good[..], b"more"].concat()),
    ];
    cases.extend(
        [8, 9, 100, 1000, good.len() / 2, good.len() - 1]
            .map(|length| (format!("{length} bytes"), good[..length].to_vec())),
    );
    for (what, bytes) in cases {
        let error = shared().sandbox.load("stranger.wasm", &bytes).map(|plugin| plugin.inspection().clone());
        let error = match error {
            Err(error) => error,
            // Its first 8 bytes are the empty component.
            Ok(inspection) => panic!("{what} was loaded: {inspection:?}"),
        };
        assert_eq!(error.kind(), ErrorKind::Component, "{what}: {error}");
        let text = error.to_string();
        assert!(text.contains(no_component) || text.contains("it exports neither"), "{what}: {text}");
        tally::component_not_loaded();
    }
    // A component without a world.
    assert_not_loaded(b"\0asm\x0d\0\x01\0", &["it exports neither", "it exports: nothing"]);
}

/// A component with a byte changed is another component, or none; never a crash of the host.
#[test]
fn damaged_components_do_not_crash_the_host() {
    let good = std::fs::read(component("raw")).unwrap();
    let mut limits = Limits::default();
    limits.call_time = std::time::Duration::from_millis(200);
    let sandbox = Sandbox::new(limits).unwrap();
    for round in 0..40u64 {
        let random = noise(round, 16);
        let mut bytes = good.clone();
        let at = usize::try_from(u64::from_le_bytes(random[..8].try_into().unwrap()) % good.len() as u64).unwrap();
        bytes[at] ^= random[8] | 1;
        match sandbox.load("damaged.wasm", &bytes) {
            Ok(plugin) => assert!(plugin.inspection().outside.is_empty()),
            Err(error) => assert_eq!(error.kind(), ErrorKind::Component, "{error}"),
        }
        tally::component_not_loaded();
    }
}

/// The same through the program: exit code 6, the import on standard error, and the image untouched.
#[test]
fn the_program_names_what_a_component_wants() {
    let place = Place::new();
    let image = place.write("images/vm/a.raw", noise(2, 4096));
    let stranger =
        place.write("images/stranger.wasm", importing("wasi:sockets/tcp@0.2.6", "[method]tcp-socket.listen"));
    let plugin = format!("raw={}", stranger.display());
    let attempt = place.open_with("read", "raw", &image, &[], &["--plugin", &plugin]);
    attempt.assert_error(
        6,
        &[
            "blockhouse: $ROOT/images/stranger.wasm: it imports what no world offers, and is not loaded: ",
            "wasi:sockets/tcp@0.2.6 [method]tcp-socket.listen",
        ],
    );
    assert_eq!(attempt.outcome.text(), "");
    tally::component_not_loaded();

    let mut inspect = limited();
    inspect.args(["plugin", "inspect"]).arg(&stranger);
    let outcome = blockhouse_tests::run(&mut inspect);
    assert_eq!(outcome.status.code(), Some(6), "{}", outcome.stderr);
    assert!(
        outcome.text().contains("wasi:sockets/tcp@0.2.6 [method]tcp-socket.listen  OUTSIDE every world"),
        "{}",
        outcome.text()
    );

    // Larger than any component, and no component at all.
    let huge = place.path("images/huge.wasm");
    std::fs::File::create(&huge).unwrap().set_len(1 << 40).unwrap();
    let attempt = place.open_with("read", "raw", &image, &[], &["--plugin", &format!("raw={}", huge.display())]);
    attempt.assert_error(6, &["the limit is 67108864"]);
    let attempt = place.open_with("read", "raw", &image, &[], &["--plugin", &format!("raw={}", image.display())]);
    attempt.assert_error(6, &["it is not a WebAssembly component"]);
    tally::component_not_loaded();
}
