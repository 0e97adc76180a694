//! What to do about a refusal, as options of this program that can be pasted into a shell.
//!
//! The names are a stranger's: what a shell would read as anything but this name is quoted, what `--allow` would read
//! as more than a path is doubled, and of a name that a terminal does not show as it is nothing is offered.

use blockhouse_block::{Access, Error, Remedy};
use clap::ArgMatches;

use super::disk_arg;
use super::grant_arg;
use super::output::printable;

/// The options of a command that an error is said in.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Options {
    /// `--allow PATH`.
    pub(crate) allow: bool,
    /// `--allow-write PATH`.
    pub(crate) allow_write: bool,
    /// `--force-share`.
    pub(crate) force_share: bool,
    /// `--disk file=IMAGE,allow=PATH,...`.
    pub(crate) disk_string: bool,
    /// `--json`, and it was given.
    pub(crate) json: bool,
}

impl Options {
    /// Those of the command that was given.
    pub(crate) fn of(mut matches: &ArgMatches) -> Self {
        while let Some((_, command)) = matches.subcommand() {
            matches = command;
        }
        let has = |option| matches.try_contains_id(option).is_ok();
        Self {
            allow: has("allow"),
            allow_write: has("allow_write"),
            force_share: has("force_share"),
            disk_string: has("disks"),
            json: matches.try_get_one("json").ok().flatten().copied().unwrap_or(false),
        }
    }
}

/// What would let pass what `error` is about, if the command has an option for it.
pub(crate) fn of(error: &Error, options: Options) -> Option<String> {
    match error.remedy()? {
        Remedy::Grant { path, access } => {
            let path = grant_arg::escape(path);
            let key = if *access == Access::ReadWrite { "allow-write" } else { "allow" };
            let has_option = if *access == Access::ReadWrite { options.allow_write } else { options.allow };
            if options.disk_string {
                let word = shell_word(&disk_arg::escape(&path))?;
                Some(format!("If it is meant, add this to its --disk: ,{key}={word}"))
            } else if has_option {
                Some(format!("If it is meant, allow it: --{key} {}", shell_word(&path)?))
            } else {
                None
            }
        }
        Remedy::StateBackingFormat { backing } => {
            let backing = option_value("--backing", backing)?;
            // The image is what the operator called it, made absolute.
            let image = shell_word(error.image()?)?;
            Some(format!(
                "If you trust the image, state it there: blockhouse rebase --unsafe --format FORMAT {backing} \
                 --backing-format BACKING-FORMAT {image}"
            ))
        }
        Remedy::OpenReadOnly => {
            options.disk_string.then(|| "To serve it read-only: readonly=on in its --disk".to_owned())
        }
        Remedy::Share => options
            .force_share
            .then(|| "--force-share reads it while it changes: what is found may make no sense".to_owned()),
        _ => None,
    }
}

/// An option and its value, which may begin with a dash.
fn option_value(option: &str, value: &str) -> Option<String> {
    Some(if value.starts_with('-') {
        format!("{option}={}", shell_word(value)?)
    } else {
        format!("{option} {}", shell_word(value)?)
    })
}

/// `text` as one word of a POSIX shell (Shell & Utilities, 2.2.2 Single-Quotes); nothing if it has characters that a
/// terminal would not show as they are.
fn shell_word(text: &str) -> Option<String> {
    let plain = |character: char| character.is_ascii_alphanumeric() || "/._-+:,@".contains(character);
    if text.is_empty() || printable(text) != text {
        return None;
    }
    Some(if text.chars().all(plain) { text.to_owned() } else { format!("'{}'", text.replace('\'', "'\\''")) })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::path::Path;
    use std::process::Command;

    use blockhouse_block::ErrorKind;

    use super::*;

    const NAMES: [&str; 12] = [
        "/a/b.raw",
        "/a b/it's",
        "/$(touch x)",
        "/`touch x`",
        "/\"; touch x #",
        "/a\\",
        "/*?[a]~!{b,c}",
        "/a,b,,c",
        "/a@layer:0@@sha256:1",
        "/a&b|c<d>e",
        "/ä/日本",
        "/'",
    ];

    fn words(line: &str) -> Vec<String> {
        let script = format!("printf '%s\\0' {line}");
        let output = Command::new("sh").args(["-c", &script]).output().unwrap();
        assert!(output.status.success(), "{line}");
        let text = String::from_utf8(output.stdout).unwrap();
        text.split_terminator('\0').map(str::to_owned).collect()
    }

    fn hint(remedy: Remedy, options: Options) -> Option<String> {
        of(&Error::new(ErrorKind::Denied, "x").on_image("/i m").with_remedy(remedy), options)
    }

    #[test]
    fn what_is_pasted_grants_this_file_and_runs_nothing() {
        let options = Options { allow: true, allow_write: true, ..Options::default() };
        for (name, access) in NAMES.iter().flat_map(|name| [(name, Access::ReadOnly), (name, Access::ReadWrite)]) {
            let grant = || Remedy::Grant { path: (*name).to_owned(), access };
            let hint_text = hint(grant(), options).unwrap();
            let (_, pasted) = hint_text.split_once("allow it: ").unwrap();
            let [option, path] = words(pasted).try_into().unwrap();
            assert_eq!(option, if access.is_writable() { "--allow-write" } else { "--allow" });
            let granted = grant_arg::parse(Path::new(&path), access).unwrap();
            assert_eq!((granted.path.as_path(), granted.referrer.layer), (Path::new(name), None));

            let hint_text = hint(grant(), Options { disk_string: true, ..Options::default() }).unwrap();
            let (_, pasted) = hint_text.split_once("to its --disk: ").unwrap();
            let [string] = words(&format!("file=/i,format=qcow2{pasted}")).try_into().unwrap();
            let disk = disk_arg::DiskArg::for_serve(&string).unwrap();
            let [path] = if access.is_writable() { disk.allow_write } else { disk.allow }.try_into().unwrap();
            assert_eq!(grant_arg::parse(&path, access).unwrap().path, Path::new(name));

            assert_eq!(hint(grant(), Options::default()), None, "an option that the command does not have");
        }
    }

    #[test]
    fn a_backing_file_is_named_in_one_word() {
        for name in NAMES.into_iter().chain(["-x", "--no-backing"]) {
            let text = hint(Remedy::StateBackingFormat { backing: name.to_owned() }, Options::default()).unwrap();
            let (_, pasted) = text.split_once("blockhouse ").unwrap();
            let words = words(pasted);
            assert!(words.contains(&name.to_owned()) || words.contains(&format!("--backing={name}")), "{text}");
            assert_eq!(words.last().unwrap(), "/i m");
        }
    }

    #[test]
    fn a_name_that_is_not_shown_as_it_is_is_not_offered() {
        for name in ["/a\nb", "/a\x1b[2J", "/a\u{202e}b", "/a\u{85}"] {
            let options = Options { allow: true, ..Options::default() };
            let grant = || Remedy::Grant { path: name.to_owned(), access: Access::ReadOnly };
            assert_eq!(hint(grant(), options), None);
            assert_eq!(hint(grant(), Options { disk_string: true, ..Options::default() }), None);
            assert_eq!(hint(Remedy::StateBackingFormat { backing: name.to_owned() }, options), None);
        }
    }
}
