//! Policy files, and what a command may ask for under one.
//!
//! ```text
//!   input: TOML │ NUL │ what `--allow` has │ NUL │ ...
//! ```
//!
//! Whatever they say: an error names the place; no limit is raised; what a command is granted is no more than it asked
//! for, and no more than some grant of the policy has; and what the policy says of a file holds for who is granted a
//! directory around it.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};

use blockhouse_block::{Access, FileIdentity};

use crate::included::grant::Grant;
use crate::included::limits::Limits;
use crate::included::policy::{Place, Policy};
use crate::included::{grant, grant_arg};

pub(crate) fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut parts = text.split('\0');
    let text = parts.next().unwrap_or_default();
    let policy = match Policy::parse("p.toml", text) {
        Ok(policy) => policy,
        Err(error) => {
            let place = error.message().strip_prefix("p.toml:").expect("the name of the file");
            let numbers: Vec<&str> = place.splitn(3, ':').collect();
            assert!(numbers.len() == 3, "{error}");
            for number in &numbers[..2] {
                let number: usize = number.parse().expect("a line and a column");
                assert!((1..=text.len() + 1).contains(&number), "{error}");
            }
            return;
        }
    };
    for name in Limits::names() {
        let (least, most) = (policy.limits.get(name).unwrap(), Limits::default().get(name).unwrap());
        assert!(least > 0 && least <= most, "{name} is {least} of {most}");
    }
    let all = policy.grants(Vec::new()).expect("nothing that could be refused");
    for grant in &all {
        assert!(grant.path.is_absolute(), "{grant:?}");
        assert!(grant.sha256.is_none() || grant.access == Access::ReadOnly, "what is pinned can be written: {grant:?}");
    }
    for (number, asked) in parts.take(8).enumerate() {
        let access = if number.is_multiple_of(2) { Access::ReadOnly } else { Access::ReadWrite };
        let Ok(asked) = grant_arg::parse(Path::new(asked), access) else { continue };
        let Ok(granted) = policy.grants_by(vec![asked.clone()], &look) else { continue };
        assert!(!granted.is_empty(), "neither granted nor refused");
        let place = look(&asked.path).expect("it was granted");
        for grant in &granted {
            check(&asked, &place, grant, &all);
        }
        let below = |grant: &&Grant| place.directory && grant.path.starts_with(&place.real) && grant.path != place.real;
        for grant in all.iter().filter(below) {
            let at = look(&grant.path).expect("it was granted");
            let same = |granted: &&Grant| granted.path == grant.path && granted.sha256 == grant.sha256;
            assert!(at.directory || granted.iter().any(|granted| same(&granted)), "{grant:?} is not in {granted:?}");
        }
    }
}

/// A file system of text: what has a dot in its name is a file, what ends in a tilde is not there.
fn look(path: &Path) -> io::Result<Place> {
    let name = grant::absolute_name(path).map_err(io::Error::other)?;
    if name.ends_with('~') {
        return Err(io::ErrorKind::NotFound.into());
    }
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    let file = FileIdentity { device: 0, inode: hasher.finish() };
    let directory = !name.rsplit('/').next().unwrap_or_default().contains('.');
    Ok(Place { real: PathBuf::from(name), file, directory, links: 1 })
}

/// What was granted is what was asked for, or what the policy says of something below it; with no more rights and to no
/// more images than both have.
fn check(asked: &Grant, place: &Place, granted: &Grant, policy: &[Grant]) {
    let name = PathBuf::from(grant::absolute_name(&granted.path).expect("it was granted"));
    let itself = granted.path == asked.path && granted.access == asked.access;
    let below = place.directory
        && name.starts_with(&place.real)
        && (asked.access.is_writable() || !granted.access.is_writable());
    let no_more = (itself || below)
        && (asked.sha256.is_none() || granted.sha256 == asked.sha256)
        && (asked.referrer.layer.is_none() || granted.referrer.layer == asked.referrer.layer)
        && (asked.referrer.image.is_none() || granted.referrer.image == asked.referrer.image);
    assert!(no_more, "{asked:?} became {granted:?}");
    assert_eq!(granted.found, Some(look(&granted.path).expect("it was granted").file));
    let covered = policy.iter().any(|grant| {
        name.starts_with(&grant.path)
            && (grant.access == Access::ReadWrite || granted.access == Access::ReadOnly)
            && (grant.sha256.is_none() || grant.sha256 == granted.sha256)
            && (grant.referrer.layer.is_none() || grant.referrer.layer == granted.referrer.layer)
            && (grant.referrer.image.is_none() || grant.referrer.image == granted.referrer.image)
    });
    assert!(covered, "nothing in {policy:?} allows {granted:?}");
}
