//! The methods of the tool kit, for the author's manual: each trait and type with its signatures, and what they are for.

use std::fmt::Write as _;
use std::path::Path;

/// Where authors find something to implement or to call.
const FILES: [&str; 4] = ["format.rs", "maintenance.rs", "file.rs", "context.rs"];
/// Types whose methods are called; all traits are implemented.
const CALLED: [&str; 3] = ["ExtentList", "File", "Context"];

/// A section for each, in Markdown.
pub(crate) fn generate(sources: &Path) -> String {
    let mut sections = Vec::new();
    for file in FILES {
        let text = std::fs::read_to_string(sources.join(file)).unwrap();
        for (head, body) in items(&text) {
            let methods = methods(body);
            assert!(!methods.is_empty(), "{head} has no methods");
            let mut section = format!("### `{head}`\n\n| method | |\n|---|---|\n");
            for (signature, about) in methods {
                let _ = writeln!(section, "| `{signature}` | {about} |");
            }
            sections.push(section + "\n");
        }
    }
    // What is implemented comes before what is called.
    sections.sort_by_key(|section| !section.starts_with("### `trait "));
    sections.concat()
}

/// Each public trait, and what there is to call of a type, as `trait Writer: Format`, with its text.
fn items(text: &str) -> Vec<(String, &str)> {
    let mut items = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find("\npub trait ").into_iter().chain(rest.find("\nimpl ")).min() {
        let (head, after) = rest[at + 1..].split_once(" {\n").unwrap();
        let (body, after) = after.split_once("\n}\n").unwrap();
        rest = after;
        if let Some(head) = head.strip_prefix("pub ") {
            items.push((head.to_owned(), body));
        } else if let Some(name) = head.strip_prefix("impl ").filter(|name| CALLED.contains(name)) {
            items.push((name.to_owned(), body));
        }
    }
    items
}

/// Signatures, and the first paragraph of what is said of each. Of a type those that are public.
fn methods(body: &str) -> Vec<(String, String)> {
    let (mut methods, mut docs, mut hidden) = (Vec::new(), Vec::new(), false);
    let mut lines = body.lines().map(str::trim_start);
    while let Some(line) = lines.next() {
        if let Some(doc) = line.strip_prefix("///") {
            docs.push(doc.trim());
        } else if line.starts_with("#[") {
            hidden |= line == "#[doc(hidden)]";
        } else if line.starts_with("fn ") || line.starts_with("pub fn ") {
            let mut signature = line.to_owned();
            while !signature.ends_with([';', '{']) && !signature.ends_with(" }") {
                signature.push_str(lines.next().expect("the rest of a signature"));
            }
            let end = signature.find([';', '{']).unwrap();
            if !hidden {
                let about: Vec<&str> = docs.iter().copied().take_while(|line| !line.is_empty()).collect();
                assert!(!about.is_empty(), "{signature} says nothing");
                methods.push((signature[..end].trim_start_matches("pub ").trim().to_owned(), plain(&about.join(" "))));
            }
            (docs, hidden) = (Vec::new(), false);
        } else {
            (docs, hidden) = (Vec::new(), false);
        }
    }
    methods
}

/// Without the links of rustdoc, which lead nowhere here.
fn plain(text: &str) -> String {
    let mut plain = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("[`") {
        let (name, after) = after.split_once("`]").unwrap();
        let _ = write!(plain, "{before}`{name}`");
        rest = after.strip_prefix('(').and_then(|link| link.split_once(')')).map_or(after, |(_, after)| after);
    }
    plain + rest
}
