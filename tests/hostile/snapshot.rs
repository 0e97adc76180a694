//! The text of every refusal, compared with `refusals.txt`: what a person reads is part of what is promised.
//!
//! `UPDATE=1 cargo test --locked --workspace --test hostile` writes the file anew for the tests that ran.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{LazyLock, Mutex};

/// By test, in the order of the refusals in it.
type Texts = BTreeMap<String, Vec<String>>;

const FILE: &str = include_str!("refusals.txt");

/// Tests whose texts differ from run to run, since chance or time decides what they meet.
const BY_CHANCE: [&str; 7] = ["random", "truncated", "damaged", "flips", "rewritten", "shrinks", "a_chain_of_300"];

static KNOWN: LazyLock<Texts> = LazyLock::new(|| {
    let mut texts = Texts::new();
    let mut test = String::new();
    for line in FILE.lines() {
        match line.strip_prefix("  ") {
            Some(text) => texts.entry(test.clone()).or_default().push(without_runs(text)),
            None => test = line.to_owned(),
        }
    }
    texts
});
static SEEN: LazyLock<Mutex<Texts>> = LazyLock::new(Mutex::default);

/// Compares one text, in which paths of this run were taken out already.
#[track_caller]
pub(crate) fn refusal(text: &str) {
    let thread = std::thread::current();
    let Some(test) = thread.name().filter(|name| name.contains("::")) else { return };
    if BY_CHANCE.iter().any(|chance| test.contains(chance)) {
        return;
    }
    let text = without_runs(&without_digests(text.lines().next().unwrap_or_default()));
    let number = {
        let mut seen = SEEN.lock().unwrap();
        let texts = seen.entry(test.to_owned()).or_default();
        texts.push(text.clone());
        texts.len() - 1
    };
    // A test that was added since is held to it by `cargo xtask hostile`.
    let is_new = !KNOWN.contains_key(test) && std::env::var_os("BLOCKHOUSE_CATALOGUE").is_none();
    if std::env::var_os("UPDATE").is_none() && !is_new {
        let known = KNOWN.get(test).and_then(|texts| texts.get(number)).map(String::as_str);
        assert_eq!(Some(text.as_str()), known, "refusal {number} of {test}; UPDATE=1 renews refusals.txt");
    }
}

/// Digests of components change with every change of theirs.
fn without_digests(text: &str) -> String {
    let is_digest = |word: &str| {
        let hexadecimal = word.len() >= 12 && word.chars().all(|letter| letter.is_ascii_hexdigit());
        hexadecimal && word.contains(|letter: char| !letter.is_ascii_digit())
    };
    text.split(' ').map(|word| if is_digest(word) { "DIGEST" } else { word }).collect::<Vec<_>>().join(" ")
}

/// Names that are filled up to some length are longer or shorter where the directory of the tests is: of one or
/// two characters that are there a dozen times in a row, one occurrence stays, with a mark.
fn without_runs(text: &str) -> String {
    const LONG: usize = 12;
    let mut rest: &[char] = &text.chars().collect::<Vec<_>>();
    let mut short = String::new();
    while !rest.is_empty() {
        let run = [1, 2].into_iter().find_map(|unit| {
            let repeats = rest.chunks_exact(unit).take_while(|chunk| *chunk == &rest[..unit]).count();
            (repeats >= LONG).then_some((unit, repeats))
        });
        let (kept, taken) = run.map_or((1, 1), |(unit, repeats)| (unit, unit * repeats));
        short.extend(&rest[..kept]);
        if taken > kept {
            short += "{many}";
        }
        rest = &rest[taken..];
    }
    short
}

/// Writes what was seen, if that was asked for.
pub(crate) fn write() {
    if std::env::var_os("UPDATE").is_none() {
        return;
    }
    let mut texts = KNOWN.clone();
    let seen: HashMap<String, Vec<String>> = SEEN.lock().unwrap().clone().into_iter().collect();
    texts.extend(seen);
    let mut file = String::new();
    for (test, texts) in texts {
        file += &format!("{test}\n");
        file.extend(texts.iter().map(|text| format!("  {text}\n")));
    }
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("hostile/refusals.txt");
    if let Err(error) = std::fs::write(&path, file) {
        eprintln!("cannot write {}: {error}", path.display());
    }
}
