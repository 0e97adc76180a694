//! The policy file of `--policy`: what no command on a host may go beyond.
//!
//! `host/docs/policy.md` has every key, and an example.
//!
//! A policy narrows what the command line asks for. `--allow PATH` needs a grant of that path, or of a directory
//! around it, and gets its pin and its images on top of its own: those of the path itself, or else of the nearest
//! directory. Paths are judged by where they lead, links followed. With a directory come the grants of the policy below
//! it, so that what is pinned there stays pinned; where the command line grants nothing, the grants of the policy are
//! in force as they are. A key that is not known is an error, as everything is that cannot be meant: a policy that is
//! half understood is none.
//!
//! The module knows no component: a fuzz target includes it, and says itself what stands at a path.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::Context;
use blockhouse_block::{Access, Error, ErrorKind, FileIdentity};
use blockhouse_sandbox::{Grant, Limits, Referrer, Sha256Digest, absolute_name};
use rustix::fs::OFlags;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// The largest policy file that is read.
const MAX_BYTES: u64 = 1 << 20;

/// A policy that was read.
#[derive(Clone, Debug)]
pub(crate) struct Policy {
    /// How messages name it.
    name: String,
    formats: Option<BTreeSet<String>>,
    pub(crate) plugins: bool,
    components: BTreeMap<String, BTreeSet<Sha256Digest>>,
    pub(crate) limits: Limits,
    grants: Vec<Grant>,
}

impl Policy {
    /// Reads a policy.
    pub(crate) fn read(file: &Path) -> anyhow::Result<Self> {
        let name = file.display().to_string();
        let size = std::fs::metadata(file).with_context(|| format!("cannot read the policy {name}"))?.len();
        if size > MAX_BYTES {
            anyhow::bail!("the policy {name} has {size} bytes; the limit is {MAX_BYTES}");
        }
        let text = std::fs::read_to_string(file).with_context(|| format!("cannot read the policy {name}"))?;
        Ok(Self::parse(&name, &text)?)
    }

    /// Reads the text of a policy. `name` is what messages call it.
    pub(crate) fn parse(name: &str, text: &str) -> Result<Self, Error> {
        let reader = Reader { name, text };
        let document = DeTable::parse(text).map_err(|error| {
            let at = error.span().unwrap_or(0..0);
            reader.error(&at, reader.key_at(&at), error.message())
        })?;
        let mut policy = Self {
            name: name.to_owned(),
            formats: None,
            plugins: true,
            components: BTreeMap::new(),
            limits: Limits::default(),
            grants: Vec::new(),
        };
        let mut version = None;
        for (key, value) in document.get_ref() {
            let path = key.get_ref().as_ref();
            match path {
                "version" => version = Some(reader.number(path, value)?),
                "formats" => {
                    let formats = reader.array(path, value)?.iter();
                    policy.formats = Some(formats.map(|format| reader.text(path, format)).collect::<Result<_, _>>()?);
                }
                "plugins" => policy.plugins = reader.boolean(path, value)?,
                "components" => policy.components = reader.components(value)?,
                "limits" => reader.limits(value, &mut policy.limits)?,
                "grants" => {
                    let grants = reader.array(path, value)?.iter();
                    policy.grants = grants.map(|grant| reader.grant(grant)).collect::<Result<_, _>>()?;
                }
                _ => {
                    return Err(reader.unknown(
                        path,
                        &key.span(),
                        "version, formats, plugins, components, limits, grants",
                    ));
                }
            }
        }
        match version {
            Some(1) => Ok(policy),
            Some(other) => Err(reader.error(&(0..0), "version", &format!("{other} is not known; there is 1"))),
            None => Err(reader.error(&(0..0), "version", "is missing; write: version = 1")),
        }
    }

    /// How messages name it.
    pub(crate) fn by(&self) -> String {
        format!("the policy {}", self.name)
    }

    /// The formats that may be used, or `None` for all of them.
    pub(crate) fn formats(&self) -> Option<&BTreeSet<String>> {
        self.formats.as_ref()
    }

    /// By format, the digests of the components that may serve it. Any may, for formats that are not here.
    pub(crate) fn components(&self) -> &BTreeMap<String, BTreeSet<Sha256Digest>> {
        &self.components
    }

    /// The grants of a command that asks for `asked`.
    ///
    /// # Errors
    /// What is asked for and not granted, or not there.
    pub(crate) fn grants(&self, asked: Vec<Grant>) -> anyhow::Result<Vec<Grant>> {
        self.grants_by(asked, &Place::look)
    }

    /// As [`grants`](Self::grants), with what `look` says of paths.
    pub(crate) fn grants_by(&self, asked: Vec<Grant>, look: &Look<'_>) -> anyhow::Result<Vec<Grant>> {
        if asked.is_empty() {
            return Ok(self.grants.clone());
        }
        let mut granted = Vec::new();
        for grant in asked {
            granted.extend(self.narrow(&grant, look)?);
        }
        Ok(granted)
    }

    /// What of a grant the policy grants. Grants of the path itself decide; else those of the nearest directory around
    /// it. With a directory comes all that the policy says of what is below it.
    fn narrow(&self, asked: &Grant, look: &Look<'_>) -> anyhow::Result<Vec<Grant>> {
        let name = absolute_name(&asked.path)?;
        let failed = |path: &Path, more: &str, error: io::Error| {
            let why = format!("cannot grant {}{more}: {error}", path.display());
            Error::new(ErrorKind::Storage, why).with_source(error)
        };
        let place = look(&asked.path).map_err(|error| failed(&asked.path, "", error))?;
        let shown = if place.real == Path::new(&name) {
            format!("{} does not grant {name}", self.by())
        } else {
            format!("{} does not grant {name}, which leads to {}", self.by(), place.real.display())
        };
        let refuse = |why: &str| Err(Error::new(ErrorKind::Denied, format!("{shown}: {why}")).into());
        let placed: Vec<_> = self.grants.iter().map(|grant| (grant, look(&grant.path))).collect();
        let there = placed.iter().filter_map(|(grant, place)| Some((*grant, place.as_ref().ok()?)));

        let mut of: Vec<&Grant> =
            there.clone().filter(|(_, at)| at.file == place.file).map(|(grant, _)| grant).collect();
        if of.is_empty() {
            let around = there.filter(|(_, at)| at.directory && place.real.starts_with(&at.real));
            let nearest = around.clone().map(|(_, at)| at.real.components().count()).max();
            let is_nearest = |at: &Place| Some(at.real.components().count()) == nearest;
            of = around.filter(|(_, at)| is_nearest(at)).map(|(grant, _)| grant).collect();
            if !of.is_empty() && !place.directory && place.links > 1 {
                // Of a directory it would not be opened either.
                return refuse("it has several hard links, so it may belong to another directory");
            }
        }
        if of.is_empty() {
            return refuse("there is no grant of it, or of a directory around it");
        }
        let mut why = "";
        let mut granted = Vec::new();
        for grant in of {
            if asked.access.is_writable() && !grant.access.is_writable() {
                why = "it is granted to be read only";
                continue;
            }
            let sha256 = match (asked.sha256, grant.sha256) {
                (Some(asked), Some(pinned)) if asked != pinned => {
                    why = "it is pinned by another sha256";
                    continue;
                }
                (asked, pinned) => pinned.or(asked),
            };
            let Some(referrer) = both_referrers(&asked.referrer, &grant.referrer) else {
                why = "it is granted to other images";
                continue;
            };
            granted.push(Grant { sha256, referrer, found: Some(place.file), ..asked.clone() });
        }
        if granted.is_empty() {
            return refuse(why);
        }
        if !place.directory {
            return Ok(granted);
        }

        for (grant, at) in placed {
            let at = match at {
                Ok(at) if at.file != place.file && at.real.starts_with(&place.real) => at,
                Err(error) if would_be_below(&grant.path, &place.real, look) => {
                    let more = format!(": {} says more of {} in it", self.by(), grant.path.display());
                    return Err(failed(&asked.path, &more, error).into());
                }
                _ => continue,
            };
            match both_referrers(&asked.referrer, &grant.referrer) {
                Some(referrer) => {
                    let access = if grant.access.is_writable() { asked.access } else { grant.access };
                    granted.push(Grant { access, referrer, found: Some(at.file), ..grant.clone() });
                }
                // Of a directory that is for other images, these get what the directory around it gives.
                None if at.directory => {}
                None => {
                    let file = grant.path.display();
                    return refuse(&format!(
                        "{file} in it is granted to other images; allow what is meant of it alone"
                    ));
                }
            }
        }
        Ok(granted)
    }
}

/// What stands at a path.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// The path without links.
    pub(crate) real: PathBuf,
    pub(crate) file: FileIdentity,
    pub(crate) directory: bool,
    /// How many names it has.
    pub(crate) links: u64,
}

/// Looks at a path.
pub(crate) type Look<'a> = dyn Fn(&Path) -> io::Result<Place> + 'a;

impl Place {
    /// Looks at a path as the kernel follows it, once: what it leads to is judged, and nothing else is granted then.
    fn look(path: &Path) -> io::Result<Self> {
        // Not opened for any use: it may be a pipe, or a device.
        let flags = i32::try_from(OFlags::PATH.bits()).unwrap_or(0);
        let file = File::options().read(true).custom_flags(flags).open(path)?;
        let metadata = file.metadata()?;
        let link = format!("/proc/self/fd/{}", file.as_raw_fd());
        Ok(Self {
            // Without /proc, the name is followed once more.
            real: std::fs::read_link(link).or_else(|_| path.canonicalize())?,
            file: FileIdentity { device: metadata.dev(), inode: metadata.ino() },
            directory: metadata.is_dir(),
            links: metadata.nlink(),
        })
    }
}

/// Whether what is not there would be below `directory`.
fn would_be_below(path: &Path, directory: &Path, look: &Look<'_>) -> bool {
    path.ancestors().find_map(|part| look(part).ok()).is_some_and(|part| part.real.starts_with(directory))
}

/// Both conditions in one, or `None` if no image meets both.
fn both_referrers(a: &Referrer, b: &Referrer) -> Option<Referrer> {
    Some(Referrer { layer: both(a.layer, b.layer)?, image: both(a.image.clone(), b.image.clone())? })
}

/// Both conditions in one, or `None` if nothing meets both.
fn both<T: PartialEq>(a: Option<T>, b: Option<T>) -> Option<Option<T>> {
    match (a, b) {
        (Some(a), Some(b)) => (a == b).then_some(Some(a)),
        (a, b) => Some(a.or(b)),
    }
}

/// Turns values into what they mean, and knows where they stand.
struct Reader<'a> {
    name: &'a str,
    text: &'a str,
}

impl Reader<'_> {
    /// An error at a place of the file.
    fn error(&self, at: &Range<usize>, key: &str, why: &(impl Display + ?Sized)) -> Error {
        let before = self.text.get(..at.start).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        let column = before.chars().rev().take_while(|character| *character != '\n').count() + 1;
        let message = format!("{}:{line}:{column}: {key}: {why}", self.name);
        Error::new(ErrorKind::Invalid, message)
    }

    /// What stands before the `=` of a line that could not be read at all.
    fn key_at(&self, at: &Range<usize>) -> &str {
        let start = self.text.get(..at.start).and_then(|before| before.rfind('\n')).map_or(0, |end| end + 1);
        let line = self.text.get(start..).and_then(|rest| rest.lines().next()).unwrap_or_default();
        line.split('=').next().unwrap_or_default().trim()
    }

    fn unknown(&self, path: &str, at: &Range<usize>, known: &str) -> Error {
        self.error(at, path, &format!("there is no such key; there is: {known}"))
    }

    fn wrong<T>(&self, path: &str, value: &Spanned<DeValue<'_>>, wanted: &str) -> Result<T, Error> {
        Err(self.error(&value.span(), path, &format!("{wanted} is wanted here")))
    }

    fn text(&self, path: &str, value: &Spanned<DeValue<'_>>) -> Result<String, Error> {
        match value.get_ref() {
            DeValue::String(text) => Ok(text.clone().into_owned()),
            _ => self.wrong(path, value, "a string"),
        }
    }

    fn number(&self, path: &str, value: &Spanned<DeValue<'_>>) -> Result<u64, Error> {
        let number = match value.get_ref() {
            DeValue::Integer(number) => u64::from_str_radix(&number.as_str().replace('_', ""), number.radix()).ok(),
            _ => None,
        };
        number.map_or_else(|| self.wrong(path, value, "a whole number, 0 or more,"), Ok)
    }

    fn boolean(&self, path: &str, value: &Spanned<DeValue<'_>>) -> Result<bool, Error> {
        match value.get_ref() {
            DeValue::Boolean(value) => Ok(*value),
            _ => self.wrong(path, value, "true or false"),
        }
    }

    fn array<'v, 'i>(&self, path: &str, value: &'v Spanned<DeValue<'i>>) -> Result<&'v [Spanned<DeValue<'i>>], Error> {
        match value.get_ref() {
            DeValue::Array(values) => Ok(values),
            _ => self.wrong(path, value, "an array"),
        }
    }

    fn table<'v, 'i>(&self, path: &str, value: &'v Spanned<DeValue<'i>>) -> Result<&'v DeTable<'i>, Error> {
        match value.get_ref() {
            DeValue::Table(table) => Ok(table),
            _ => self.wrong(path, value, "a table"),
        }
    }

    fn digest(&self, path: &str, value: &Spanned<DeValue<'_>>) -> Result<Sha256Digest, Error> {
        self.text(path, value)?.parse().map_err(|error: Error| self.error(&value.span(), path, error.message()))
    }

    fn path(&self, path: &str, value: &Spanned<DeValue<'_>>) -> Result<String, Error> {
        let text = self.text(path, value)?;
        let absolute = Path::new(&text).is_absolute();
        match absolute_name(Path::new(&text)) {
            Ok(name) if absolute => Ok(name),
            _ => self.wrong(path, value, "an absolute path"),
        }
    }

    fn components(&self, value: &Spanned<DeValue<'_>>) -> Result<BTreeMap<String, BTreeSet<Sha256Digest>>, Error> {
        let mut components = BTreeMap::new();
        for (format, digests) in self.table("components", value)? {
            let path = format!("components.{}", format.get_ref());
            let digests = self.array(&path, digests)?.iter().map(|digest| self.digest(&path, digest));
            components.insert(format.get_ref().clone().into_owned(), digests.collect::<Result<_, _>>()?);
        }
        Ok(components)
    }

    fn limits(&self, value: &Spanned<DeValue<'_>>, limits: &mut Limits) -> Result<(), Error> {
        for (key, value) in self.table("limits", value)? {
            let path = format!("limits.{}", key.get_ref());
            if Limits::default().get(key.get_ref()).is_none() {
                return Err(self.unknown(&path, &key.span(), &Limits::names().collect::<Vec<_>>().join(", ")));
            }
            let number = self.number(&path, value)?;
            limits.lower(key.get_ref(), number).map_err(|why| self.error(&value.span(), &path, &why))?;
        }
        Ok(())
    }

    fn grant(&self, value: &Spanned<DeValue<'_>>) -> Result<Grant, Error> {
        let mut grant = Grant::read("");
        for (key, value) in self.table("grants", value)? {
            let path = format!("grants.{}", key.get_ref());
            match key.get_ref().as_ref() {
                "path" => grant.path = PathBuf::from(self.path(&path, value)?),
                "access" => {
                    grant.access = match self.text(&path, value)?.as_str() {
                        "read-only" => Access::ReadOnly,
                        "read-write" => Access::ReadWrite,
                        _ => return self.wrong(&path, value, "\"read-only\" or \"read-write\""),
                    }
                }
                "sha256" => grant.sha256 = Some(self.digest(&path, value)?),
                "layer" => {
                    let layer = u32::try_from(self.number(&path, value)?);
                    grant.referrer.layer = Some(layer.or_else(|_| self.wrong(&path, value, "a layer"))?);
                }
                "image" => grant.referrer.image = Some(self.path(&path, value)?),
                _ => return Err(self.unknown(&path, &key.span(), "path, access, sha256, layer, image")),
            }
        }
        if grant.path.as_os_str().is_empty() {
            return Err(self.error(&value.span(), "grants.path", "is missing: what is granted?"));
        }
        if grant.sha256.is_some() && grant.access.is_writable() {
            return Err(self.error(&value.span(), "grants.access", "what is pinned by sha256 cannot be written"));
        }
        Ok(grant)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use super::*;

    const ONE: &str = "1111111111111111111111111111111111111111111111111111111111111111";
    const TWO: &str = "2222222222222222222222222222222222222222222222222222222222222222";

    fn parse(text: &str) -> Policy {
        Policy::parse("p.toml", text).unwrap()
    }

    #[test]
    fn a_full_policy() {
        let policy = parse(&format!(
            "version = 1\nformats = [\"raw\", 'qcow2']\nplugins = false\n[components]\nqcow2 = [\"{ONE}\"]\n\
             [limits]\ncall-time-ms = 2_000\nchain-depth = 0x10\n\
             [[grants]]\npath = \"/images\"\n[[grants]]\npath = \"/images/../data\"\naccess = \"read-write\"\n\
             layer = 0\nimage = \"/vm\"\n[[grants]]\npath = \"/b\"\nsha256 = \"{TWO}\"\n"
        ));
        assert_eq!(policy.formats.unwrap(), ["qcow2".to_owned(), "raw".to_owned()].into());
        assert!(!policy.plugins);
        assert_eq!(policy.components["qcow2"], [ONE.parse().unwrap()].into());
        assert_eq!(policy.limits.call_time, std::time::Duration::from_secs(2));
        assert_eq!(policy.limits.chain_depth, 16);
        let referrer = Referrer { layer: Some(0), image: Some("/vm".to_owned()) };
        let data = Grant { access: Access::ReadWrite, referrer, ..Grant::read("/data") };
        let pinned = Grant { sha256: Some(TWO.parse().unwrap()), ..Grant::read("/b") };
        assert_eq!(policy.grants, [Grant::read("/images"), data, pinned]);

        let empty = parse("version = 1");
        assert!(empty.formats.is_none() && empty.plugins && empty.components.is_empty() && empty.grants.is_empty());
        assert_eq!(empty.limits, Limits::default());
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        for (text, why) in [
            ("", "p.toml:1:1: version: is missing; write: version = 1"),
            ("version = 2", "p.toml:1:1: version: 2 is not known; there is 1"),
            ("version = 1\nformat = []", "p.toml:2:1: format: there is no such key; there is: version, formats"),
            ("version = 1\nformats = \"raw\"", "p.toml:2:11: formats: an array is wanted here"),
            ("version = 1\nformats = [1]", "p.toml:2:12: formats: a string is wanted here"),
            ("version = 1\nplugins = 1", "p.toml:2:11: plugins: true or false is wanted here"),
            (
                "version = 1\n\n[limits]\n memory = 5",
                "p.toml:4:2: limits.memory: there is no such key; there is: memory-",
            ),
            ("version = 1\n[limits]\nhandles = \"x\"", "p.toml:3:11: limits.handles: a whole number"),
            ("version = 1\n[limits]\nhandles = -1", "p.toml:3:11: limits.handles: a whole number"),
            ("version = 1\n[limits]\nhandles = 2113", "p.toml:3:11: limits.handles: 2113 is more than the 2112"),
            ("version = 1\n[limits]\nhandles = 0", "p.toml:3:11: limits.handles: 0 is"),
            ("version = 1\n[components]\nraw = [\"12\"]", "p.toml:3:8: components.raw: \"12\" is no SHA-256"),
            ("version = 1\n[[grants]]\nlayer = 1", "p.toml:2:1: grants.path: is missing"),
            ("version = 1\n[[grants]]\npath = \"x\"", "p.toml:3:8: grants.path: an absolute path is wanted here"),
            ("version = 1\n[[grants]]\npath = \"/x\"\nlayer = 5000000000", "p.toml:4:9: grants.layer: a layer is"),
            ("version = 1\n[[grants]]\npath = \"/x\"\nmode = 1", "p.toml:4:1: grants.mode: there is no such key"),
            (
                "version = 1\n[[grants]]\npath = \"/x\"\naccess = \"all\"",
                "p.toml:4:10: grants.access: \"read-only\" or",
            ),
            ("version = 1\nplugins = maybe", "p.toml:2:11: plugins: "),
            ("version = 1\nversion = 1", "p.toml:2:1: version: "),
            ("version = 1\n[limits", "p.toml:2:"),
        ] {
            let error = Policy::parse("p.toml", text).unwrap_err();
            assert!(error.to_string().starts_with(why), "{text:?}: {error}");
        }
    }

    /// What a policy grants, without what it found there.
    fn narrow(policy: &Policy, grant: Grant) -> anyhow::Result<Vec<Grant>> {
        let granted = policy.grants(vec![grant])?;
        assert!(granted.iter().all(|grant| grant.found == Some(Place::look(&grant.path).unwrap().file)));
        Ok(granted.into_iter().map(|grant| Grant { found: None, ..grant }).collect())
    }

    #[test]
    fn a_policy_judges_where_a_path_leads() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().canonicalize().unwrap();
        let at = |name: &str| root.join(name).to_str().unwrap().to_owned();
        for name in ["images", "evil/x/y", "evil/images", "tmp"] {
            std::fs::create_dir_all(root.join(name)).unwrap();
        }
        for file in ["images/base", "images/other", "secret"] {
            std::fs::write(root.join(file), "").unwrap();
        }
        let link = |to: &str, name: &str| std::os::unix::fs::symlink(root.join(to), root.join(name)).unwrap();
        link("evil/x/y", "tmp/link");
        link("secret", "evil/images/base");
        link("images/base", "images/alias");
        link("images", "tmp/images");
        let grants = |of: &[(&str, &str)]| {
            let grant = |(path, more): &(&str, &str)| format!("[[grants]]\npath = '{}'\n{more}\n", at(path));
            parse(&format!("version = 1\n{}", of.iter().map(grant).collect::<String>()))
        };
        let read = |name: &str| Grant::read(at(name));

        // The kernel follows the link before it climbs: this is the secret.
        for policy in [grants(&[("images/base", "")]), grants(&[("images", "")])] {
            for access in [Access::ReadOnly, Access::ReadWrite] {
                let error = narrow(&policy, Grant { access, ..read("tmp/link/../../images/base") }).unwrap_err();
                let (name, real) = (at("images/base"), at("secret"));
                let expected = format!("the policy p.toml does not grant {name}, which leads to {real}: there is no");
                assert!(error.to_string().starts_with(&expected), "{error}");
            }
        }
        // An alias is the file that it leads to, and has its pin; so has a policy that names it by an alias.
        let sha256 = format!("sha256 = '{ONE}'");
        for name in ["images/base", "images/alias", "tmp/images/base"] {
            let policy = grants(&[("images", ""), (name, &sha256)]);
            let pinned = |name: &str| Grant { sha256: Some(ONE.parse().unwrap()), ..read(name) };
            for asked in ["images/base", "images/alias", "tmp/images/base"] {
                assert_eq!(narrow(&policy, read(asked)).unwrap(), [pinned(asked)], "{name} {asked}");
            }
            assert_eq!(narrow(&policy, read("tmp/images")).unwrap(), [read("tmp/images"), pinned(name)], "{name}");
        }
        // Neither is a hard link another file.
        std::fs::hard_link(root.join("images/base"), root.join("images/hard")).unwrap();
        std::fs::hard_link(root.join("secret"), root.join("images/stranger")).unwrap();
        let policy = grants(&[("images", ""), ("images/base", "layer = 1")]);
        assert_eq!(narrow(&policy, read("images/hard")).unwrap()[0].referrer.layer, Some(1));
        let error = narrow(&policy, read("images/stranger")).unwrap_err().to_string();
        assert!(error.ends_with("it has several hard links, so it may belong to another directory"), "{error}");
        assert!(narrow(&grants(&[("images/stranger", "")]), read("images/stranger")).is_ok());
    }

    #[test]
    fn the_nearest_grant_of_a_policy_decides_and_those_below_come_with_a_directory() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().canonicalize().unwrap();
        let at = |name: &str| root.join(name).to_str().unwrap().to_owned();
        std::fs::create_dir_all(root.join("store/private")).unwrap();
        for file in ["store/data", "store/mine", "store/private/x"] {
            std::fs::write(root.join(file), "").unwrap();
        }
        let store = format!("[[grants]]\npath = '{}'\naccess = 'read-write'\n", at("store"));
        let policy =
            |name: &str, more: &str| parse(&format!("version = 1\n{store}[[grants]]\npath = '{}'\n{more}\n", at(name)));
        let read = |name: &str| Grant::read(at(name));
        let write = |name: &str| Grant { access: Access::ReadWrite, ..read(name) };
        let for_image = |grant: Grant, image: &str| {
            let referrer = Referrer { layer: None, image: Some(image.to_owned()) };
            Grant { referrer, ..grant }
        };

        // Less than the directory around it.
        let private = policy("store/private", "");
        assert!(narrow(&private, write("store/private/x")).unwrap_err().to_string().contains("to be read only"));
        assert_eq!(narrow(&private, write("store")).unwrap(), [write("store"), read("store/private")]);
        assert_eq!(narrow(&private, write("store/data")).unwrap(), [write("store/data")]);
        // More than was asked for it does not become.
        let data = policy("store/data", "access = 'read-write'");
        assert_eq!(narrow(&data, read("store")).unwrap(), [read("store"), read("store/data")]);
        assert_eq!(narrow(&data, write("store")).unwrap(), [write("store"), write("store/data")]);
        // What is for one image alone is for no other one; a directory around a directory is for all.
        let mine = policy("store/mine", "image = '/a'");
        let granted = [read("store"), for_image(read("store/mine"), "/a")];
        assert_eq!(narrow(&mine, read("store")).unwrap(), granted);
        let granted = granted.map(|grant| for_image(grant, "/a"));
        assert_eq!(narrow(&mine, for_image(read("store"), "/a")).unwrap(), granted);
        let error = narrow(&mine, for_image(read("store"), "/b")).unwrap_err().to_string();
        let end = format!("{} in it is granted to other images; allow what is meant of it alone", at("store/mine"));
        assert!(error.ends_with(&end), "{error}");
        let private = policy("store/private", "image = '/a'");
        let granted = [for_image(read("store"), "/b")];
        assert_eq!(narrow(&private, granted[0].clone()).unwrap(), granted);
        // What the policy says of a file that is not there cannot be held.
        let error = narrow(&policy("store/none/gone", ""), read("store")).unwrap_err().to_string();
        let gone = at("store/none/gone");
        let start = format!("cannot grant {}: the policy p.toml says more of {gone} in it: No such file", at("store"));
        assert!(error.starts_with(&start), "{error}");
    }

    #[test]
    fn a_policy_narrows_what_is_asked_for_and_adds_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().canonicalize().unwrap();
        let at = |name: &str| root.join(name).to_str().unwrap().to_owned();
        std::fs::create_dir_all(root.join("images/sub")).unwrap();
        for file in ["images/base", "images/sub/x", "secret", "data"] {
            std::fs::write(root.join(file), "").unwrap();
        }
        std::os::unix::fs::symlink("../secret", root.join("images/link")).unwrap();
        let policy = parse(&format!(
            "version = 1\n[[grants]]\npath = '{}'\n[[grants]]\npath = '{}'\nsha256 = '{ONE}'\nlayer = 1\n\
             [[grants]]\npath = '{}'\naccess = 'read-write'\n",
            at("images"),
            at("images/base"),
            at("data")
        ));
        let ask = |grant: Grant| narrow(&policy, grant);
        let why = |grant: Grant| ask(grant).unwrap_err().to_string();
        let read = |name: &str| Grant::read(at(name));

        // With a directory comes what is said of files in it.
        let referrer = Referrer { layer: Some(1), image: None };
        let base = Grant { sha256: Some(ONE.parse().unwrap()), referrer, ..read("images/base") };
        assert_eq!(ask(read("images")).unwrap(), [read("images"), base.clone()]);
        assert_eq!(ask(read("images/sub")).unwrap(), [read("images/sub")]);
        assert_eq!(ask(read("images/sub/x")).unwrap(), [read("images/sub/x")]);
        // The grant of the file itself decides: its pin and its layer come on top.
        let referrer = Referrer { layer: Some(1), image: Some("/vm".to_owned()) };
        let pinned = Grant { sha256: Some(ONE.parse().unwrap()), referrer, ..read("images/base") };
        let asked = Grant { referrer: Referrer { layer: None, image: Some("/vm".to_owned()) }, ..read("images/base") };
        assert_eq!(ask(asked).unwrap(), [pinned]);
        assert!(why(Grant { sha256: Some(TWO.parse().unwrap()), ..read("images/base") }).contains("another sha256"));
        let layer = Referrer { layer: Some(0), image: None };
        assert!(why(Grant { referrer: layer, ..read("images/base") }).contains("granted to other images"));
        // More rights than there are, or something else.
        assert!(why(Grant { access: Access::ReadWrite, ..read("images/sub") }).contains("to be read only"));
        assert!(ask(Grant { access: Access::ReadWrite, ..read("data") }).is_ok());
        for other in ["secret", "images/../secret", "images/link", ""] {
            let error = why(read(other));
            assert!(error.starts_with("the policy p.toml does not grant /"), "{other}: {error}");
        }
        // What is not there is not granted either.
        let error = why(read("images/missing"));
        assert!(error.starts_with(&format!("cannot grant {}: No such file", at("images/missing"))), "{error}");
        // Where nothing is asked for, the policy is what is granted.
        assert_eq!(policy.grants(Vec::new()).unwrap(), policy.grants);
    }
}
