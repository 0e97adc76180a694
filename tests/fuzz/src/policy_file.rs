//! Policy files, and what a command may ask for under one.
//!
//! ```text
//!   input: TOML │ NUL │ what `--allow` has │ NUL │ ...
//! ```
//!
//! Whatever they say: an error names the place; no limit is raised; and what a command is granted is no more than
//! it asked for, and no more than some grant of the policy has.

use std::path::{Path, PathBuf};

use blockhouse_block::Access;

use crate::included::grant::Grant;
use crate::included::limits::Limits;
use crate::included::policy::Policy;
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
    let all = policy.grants(Vec::new(), Access::ReadWrite).expect("nothing that could be refused");
    let read = policy.grants(Vec::new(), Access::ReadOnly).expect("nothing that could be refused");
    assert_eq!(all.len(), read.len());
    assert!(read.iter().all(|grant| grant.access == Access::ReadOnly), "{read:?}");
    for grant in &all {
        assert!(grant.path.is_absolute(), "{grant:?}");
        assert!(grant.sha256.is_none() || grant.access == Access::ReadOnly, "what is pinned can be written: {grant:?}");
    }
    for (number, asked) in parts.take(8).enumerate() {
        let access = if number.is_multiple_of(2) { Access::ReadOnly } else { Access::ReadWrite };
        let Ok(asked) = grant_arg::parse(Path::new(asked), access) else { continue };
        let Ok(granted) = policy.grants(vec![asked.clone()], Access::ReadWrite) else { continue };
        assert!(!granted.is_empty(), "neither granted nor refused");
        for grant in &granted {
            check(&asked, grant, &all);
        }
    }
}

fn check(asked: &Grant, granted: &Grant, policy: &[Grant]) {
    let no_more = granted.path == asked.path
        && granted.access == asked.access
        && (asked.sha256.is_none() || granted.sha256 == asked.sha256)
        && (asked.referrer.layer.is_none() || granted.referrer.layer == asked.referrer.layer)
        && (asked.referrer.image.is_none() || granted.referrer.image == asked.referrer.image);
    assert!(no_more, "{asked:?} became {granted:?}");
    let name = PathBuf::from(grant::absolute_name(&asked.path).expect("it was granted"));
    let covered = policy.iter().any(|grant| {
        name.starts_with(&grant.path)
            && (grant.access == Access::ReadWrite || granted.access == Access::ReadOnly)
            && (grant.sha256.is_none() || grant.sha256 == granted.sha256)
            && (grant.referrer.layer.is_none() || grant.referrer.layer == granted.referrer.layer)
            && (grant.referrer.image.is_none() || grant.referrer.image == granted.referrer.image)
    });
    assert!(covered, "nothing in {policy:?} allows {granted:?}");
}
