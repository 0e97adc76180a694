//! What images asked for, against what was granted.

use std::borrow::Cow;
use std::collections::BTreeSet;

use blockhouse_sandbox::{GrantReport, OpenEvent, Outcome};

use crate::output::printable;

/// How many files are named; an image can ask for thousands.
const NAMED: usize = 16;

/// `requested: /images/base.raw (allowed), /etc/shadow (refused)`, each once and in order of the first attempt.
/// `left_out` is how many attempts there were that are not among the events.
pub(crate) fn requested<'e>(events: impl IntoIterator<Item = &'e OpenEvent>, left_out: u64) -> String {
    let mut seen = BTreeSet::new();
    let mut files = Vec::new();
    for event in events {
        let outcome = match event.outcome {
            Outcome::Allowed => "allowed",
            Outcome::Denied => "refused",
        };
        if seen.insert((event.path.as_str(), event.access, outcome)) {
            let write = if event.access == "read-write" { "to be written, " } else { "" };
            files.push(format!("{} ({write}{outcome})", unmistakable(&event.path)));
        }
    }
    let more = u64::try_from(files.len().saturating_sub(NAMED)).unwrap_or(u64::MAX).saturating_add(left_out);
    files.truncate(NAMED);
    if more > 0 {
        files.push(format!("and {more} more"));
    }
    format!("requested: {}", list(&files))
}

/// A path that could be taken for more than one, or for what is said of it, in quotes.
fn unmistakable(path: &str) -> Cow<'_, str> {
    if path.contains([',', '(', ')', '"', '\\']) { format!("{path:?}").into() } else { path.into() }
}

/// `granted: /images/base.raw`.
pub(crate) fn granted(grants: &[GrantReport]) -> String {
    format!("granted: {}", list(&grants.iter().map(ToString::to_string).collect::<Vec<_>>()))
}

fn list(items: &[String]) -> String {
    if items.is_empty() { "nothing".to_owned() } else { printable(&items.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(path: &str, access: &'static str, outcome: Outcome) -> OpenEvent {
        OpenEvent {
            time_ms: 0,
            image: "/i".to_owned(),
            format: "qcow2".to_owned(),
            component: String::new(),
            path: path.to_owned(),
            access,
            outcome,
            grant: None,
            reason: None,
        }
    }

    #[test]
    fn each_file_once() {
        assert_eq!(requested([], 0), "requested: nothing");
        let events = [
            event("/b", "read-only", Outcome::Allowed),
            event("/a\u{1b}", "read-only", Outcome::Denied),
            event("/b", "read-only", Outcome::Allowed),
            event("/b", "read-write", Outcome::Denied),
        ];
        assert_eq!(requested(&events, 0), "requested: /b (allowed), /a\\u{1b} (refused), /b (to be written, refused)");
        let two = [event("/x (refused), /images/base.raw (allowed)", "read-only", Outcome::Denied)];
        assert_eq!(requested(&two, 0), "requested: \"/x (refused), /images/base.raw (allowed)\" (refused)");
        let many: Vec<_> = (0..20).map(|n| event(&format!("/{n}"), "read-only", Outcome::Denied)).collect();
        assert!(requested(&many, 0).ends_with(" (refused), and 4 more"));
        assert!(requested(&many, 1000).ends_with(" (refused), and 1004 more"));
    }
}
