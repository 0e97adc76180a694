//! What `--allow` and `allow=` take: `PATH[@sha256:HEX][@layer:N][@image:PATH]`.
//!
//! An `@` is itself, except where it begins one of these three; there a doubled one is itself:
//! `disk@@layer:1` is a file of the name `disk@layer:1`.
//!
//! The module knows no component: a fuzz target includes it.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use blockhouse_block::Access;
use blockhouse_sandbox::{Grant, absolute_name};

/// What can stand after a path.
const ATTRIBUTES: [&str; 3] = ["sha256", "layer", "image"];

/// Reads one argument.
pub(crate) fn parse(argument: &Path, access: Access) -> anyhow::Result<Grant> {
    // What is not UTF-8 is refused where it is granted, with its name.
    let Some(text) = argument.to_str() else { return Ok(Grant { access, ..Grant::read(argument) }) };
    let (path, attributes) = split(text);
    let mut grant = Grant { access, ..Grant::read(PathBuf::from(path)) };
    for (name, value) in attributes {
        let twice = match name {
            "sha256" => grant.sha256.replace(value.parse().with_context(|| format!("in {text:?}"))?).is_some(),
            "layer" => {
                let layer = value.parse().ok().with_context(|| {
                    format!("in {text:?}: {value:?} is no layer: 0 is the image itself, 1 its backing file")
                })?;
                grant.referrer.layer.replace(layer).is_some()
            }
            _ => grant.referrer.image.replace(absolute_name(Path::new(&value))?).is_some(),
        };
        if twice {
            bail!("in {text:?}: @{name}: is given twice");
        }
    }
    Ok(grant)
}

/// A path as an argument that is this path and nothing more.
pub(crate) fn escape(path: &str) -> String {
    let mut escaped = String::new();
    for (at, part) in path.split('@').enumerate() {
        if at > 0 {
            escaped.push('@');
            if begins_attribute(part).is_some() {
                escaped.push('@');
            }
        }
        escaped.push_str(part);
    }
    escaped
}

/// The attribute that begins here.
fn begins_attribute(rest: &str) -> Option<&'static str> {
    ATTRIBUTES.into_iter().find(|name| rest.strip_prefix(name).is_some_and(|after| after.starts_with(':')))
}

/// The path, and the attributes after it.
fn split(text: &str) -> (String, Vec<(&'static str, String)>) {
    let mut path = String::new();
    let mut attributes: Vec<(&'static str, String)> = Vec::new();
    let mut rest = text;
    while let Some(character) = rest.chars().next() {
        let after = rest.get(character.len_utf8()..).unwrap_or_default();
        let escaped = after.strip_prefix('@').filter(|escaped| begins_attribute(escaped).is_some());
        match (character, escaped, begins_attribute(after)) {
            ('@', None, Some(name)) => {
                attributes.push((name, String::new()));
                rest = after.get(name.len() + 1..).unwrap_or_default();
                continue;
            }
            ('@', Some(escaped), _) => rest = escaped,
            _ => rest = after,
        }
        attributes.last_mut().map_or(&mut path, |(_, value)| value).push(character);
    }
    (path, attributes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn paths_and_attributes() {
        let hex = "00112233445566778899aabbccddeeff00112233445566778899AABBCCDDEEFF";
        for (text, path, sha256, layer, image) in [
            ("/a/b.raw", "/a/b.raw", false, None, None),
            (&*format!("/a@sha256:{hex}"), "/a", true, None, None),
            ("/a@layer:0", "/a", false, Some(0), None),
            ("/a@image:/b/../c", "/a", false, None, Some("/c")),
            (&*format!("a b@layer:7@sha256:{hex}@image:/x@y"), "a b", true, Some(7), Some("/x@y")),
            // An `@` that begins none of them.
            ("me@home", "me@home", false, None, None),
            ("a@", "a@", false, None, None),
            ("a@@b", "a@@b", false, None, None),
            ("a@layers:1", "a@layers:1", false, None, None),
            // One that would, doubled.
            ("a@@layer:1", "a@layer:1", false, None, None),
            ("a@@@layer:1", "a@@layer:1", false, None, None),
            ("a@@sha256:x@layer:2", "a@sha256:x", false, Some(2), None),
            ("a@image:/b@@layer:1", "a", false, None, Some("/b@layer:1")),
            ("ä@layer:1", "ä", false, Some(1), None),
        ] {
            let grant = parse(Path::new(text), Access::ReadWrite).unwrap();
            assert_eq!(grant.path, PathBuf::from(path), "{text}");
            let expected = sha256.then(|| hex.to_lowercase());
            assert_eq!(grant.sha256.map(|digest| digest.to_string()), expected, "{text}");
            assert_eq!((grant.referrer.layer, grant.referrer.image.as_deref()), (layer, image), "{text}");
            assert_eq!(grant.access, Access::ReadWrite);
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, why) in [
            ("/a@sha256:12", "\"12\" is no SHA-256: 64 hexadecimal digits"),
            ("/a@layer:one", "\"one\" is no layer"),
            ("/a@layer:-1", "\"-1\" is no layer"),
            ("/a@layer:1@layer:1", "@layer: is given twice"),
            ("/a@image:", "the path"),
        ] {
            let error = format!("{:#}", parse(Path::new(text), Access::ReadOnly).unwrap_err());
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
