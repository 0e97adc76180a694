//! Landlock: the files that a program may open, by where they are.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, AddRuleError, AddRulesError, BitFlags, CompatLevel, Compatible, LandlockStatus,
    PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope, make_bitflags,
};

/// The newest version of Landlock whose restrictions were looked at. An older kernel enforces what it knows.
const NEWEST: ABI = ABI::V7;
/// The oldest version that is as good as the newest for regular files: before, a file that may be read could be
/// emptied. What is outside of the plan is out of reach with any version.
const OLDEST: i32 = 3;

/// What a program does with a path of its [`Plan`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Use {
    /// Reads the file, or what is below the directory.
    Read,
    /// Reads and writes the file, or the files that are below the directory. Makes and removes none.
    Write,
    /// As [`Write`](Self::Write) below a directory, and makes, renames and removes files there.
    MakeFiles,
    /// Gives files of the directory other names, and removes some. Opens none of them.
    NameFiles,
    /// Makes and removes sockets in the directory, and locks it. Opens no file there.
    MakeSockets,
    /// Opens the device and controls it.
    Device,
}

impl Use {
    fn rights(self) -> BitFlags<AccessFs> {
        match self {
            Self::Read => make_bitflags!(AccessFs::{ReadFile | ReadDir}),
            Self::Write => make_bitflags!(AccessFs::{ReadFile | ReadDir | WriteFile | Truncate}),
            Self::MakeFiles => {
                make_bitflags!(AccessFs::{ReadFile | ReadDir | WriteFile | Truncate | MakeReg | RemoveFile})
            }
            Self::NameFiles => make_bitflags!(AccessFs::{ReadDir | MakeReg | RemoveFile}),
            Self::MakeSockets => make_bitflags!(AccessFs::{ReadDir | MakeSock | RemoveFile}),
            Self::Device => make_bitflags!(AccessFs::{ReadFile | WriteFile | IoctlDev}),
        }
    }
}

/// What a program will open: everything else is refused once the walls are raised.
///
/// Paths are the operator's, as the program itself will open them: the plan follows symbolic links. A path that
/// leads nowhere adds nothing; opening it fails as it would without walls.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    paths: BTreeMap<PathBuf, Vec<Use>>,
    /// Those that end with [`Walls::narrow`](crate::Walls::narrow).
    at_first: BTreeMap<PathBuf, Vec<Use>>,
    /// Sockets are made, until then.
    sockets: bool,
}

impl Plan {
    /// Nothing is opened.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a use of a path to those that it has.
    pub fn add(&mut self, path: impl Into<PathBuf>, what: Use) {
        add(&mut self.paths, path.into(), what);
    }

    /// As [`add`](Self::add), until [`Walls::narrow`](crate::Walls::narrow): for what a program does before it looks
    /// at anything of a stranger.
    pub fn add_at_first(&mut self, path: impl Into<PathBuf>, what: Use) {
        add(&mut self.at_first, path.into(), what);
    }

    /// The program makes sockets, or connects, until [`Walls::narrow`](crate::Walls::narrow). Where their names are is
    /// planned beside this.
    pub fn sockets(&mut self) {
        self.sockets = true;
    }

    /// Whether it does.
    pub(crate) fn has_sockets(&self) -> bool {
        self.sockets
    }

    /// As [`add`](Self::add), to read.
    pub fn read(&mut self, path: impl Into<PathBuf>) {
        self.add(path, Use::Read);
    }

    /// As [`add`](Self::add), to read and write.
    pub fn write(&mut self, path: impl Into<PathBuf>) {
        self.add(path, Use::Write);
    }

    /// The paths and their uses, sorted.
    pub fn paths(&self) -> impl Iterator<Item = (&Path, &[Use])> {
        self.paths.iter().map(|(path, uses)| (path.as_path(), uses.as_slice()))
    }

    /// The paths with uses that end early, sorted.
    pub fn paths_at_first(&self) -> impl Iterator<Item = (&Path, &[Use])> {
        self.at_first.iter().map(|(path, uses)| (path.as_path(), uses.as_slice()))
    }

    /// What is left of it once the program has begun.
    pub(crate) fn narrowed(&self) -> Self {
        Self { paths: self.paths.clone(), at_first: BTreeMap::new(), sockets: false }
    }

    fn rules(&self) -> impl Iterator<Item = (PathFd, BitFlags<AccessFs>)> {
        // The kernel adds up the rules of one path.
        self.paths.iter().chain(&self.at_first).filter_map(|(path, uses)| {
            let rights = uses.iter().fold(BitFlags::EMPTY, |rights, what| rights | what.rights());
            let fd = PathFd::new(path).map_err(|error| tracing::debug!(path = %path.display(), %error, "not there"));
            Some((fd.ok()?, rights))
        })
    }
}

fn add(paths: &mut BTreeMap<PathBuf, Vec<Use>>, path: PathBuf, what: Use) {
    // An empty path is nothing for `open`, and must not come to mean the working directory.
    if path.as_os_str().is_empty() {
        return;
    }
    let uses = paths.entry(path).or_default();
    if !uses.contains(&what) {
        uses.push(what);
    }
}

/// How Landlock stands around the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Landlock {
    /// The version of Landlock that the kernel and this program have in common.
    pub version: i32,
}

impl Landlock {
    /// What this version cannot enforce and should, if anything.
    pub(crate) fn lacks(self) -> Option<String> {
        (self.version < OLDEST).then(|| {
            format!(
                "this kernel has version {} of it, and version {OLDEST} is the first that keeps files to read from being emptied",
                self.version
            )
        })
    }
}

impl fmt::Display for Landlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Landlock {}", self.version)
    }
}

/// Restricts this thread, and those that it will start, to the plan. `Err` says why there is no restriction.
pub(crate) fn restrict(plan: &Plan) -> Result<Landlock, String> {
    let failed = |error: landlock::RulesetError| error.to_string();
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        // All rights, `Execute` with them: nothing here is a program to be run.
        .handle_access(AccessFs::from_all(NEWEST))
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(NEWEST)))
        .and_then(|ruleset| ruleset.scope(Scope::from_all(NEWEST)))
        .and_then(Ruleset::create)
        .map_err(failed)?;
    for (fd, rights) in plan.rules() {
        // On a file, the rights that only directories have are left out.
        match (&mut ruleset).add_rule(PathBeneath::new(fd, rights)) {
            Ok(_) => {}
            // A pipe or a memfd, which is on no file system that has names: Landlock judges none of them.
            Err(RulesetError::AddRules(AddRulesError::Fs(AddRuleError::AddRuleCall { source, .. })))
                if source.raw_os_error() == Some(libc::EBADFD) => {}
            Err(error) => return Err(failed(error)),
        }
    }
    let status = ruleset.restrict_self().map_err(failed)?;
    match (status.ruleset, status.landlock) {
        (RulesetStatus::NotEnforced, LandlockStatus::NotEnabled) => {
            Err("this kernel has it switched off (add landlock to its command line, after lsm=)".to_owned())
        }
        (RulesetStatus::NotEnforced, _) => Err("this kernel has none; Linux has it since 5.13".to_owned()),
        (_, LandlockStatus::Available { effective_abi, .. }) => Ok(Landlock { version: effective_abi as i32 }),
        (_, status) => Err(format!("this kernel enforces something that it does not have ({status:?})")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_plan_holds_each_path_once_with_all_its_uses() {
        let mut plan = Plan::new();
        plan.read("/b");
        plan.write("/a");
        plan.read("/b");
        plan.add("/b", Use::MakeSockets);
        plan.read("");
        let paths: Vec<(&Path, &[Use])> = plan.paths().collect();
        let expected: [(&Path, &[Use]); 2] =
            [(Path::new("/a"), &[Use::Write]), (Path::new("/b"), &[Use::Read, Use::MakeSockets])];
        assert_eq!(paths, expected);
    }

    #[test]
    fn a_path_that_leads_nowhere_adds_no_rule() {
        let directory = tempfile::tempdir().unwrap();
        let mut plan = Plan::new();
        plan.read(directory.path());
        plan.write(directory.path());
        plan.read(directory.path().join("nowhere"));
        let rules: Vec<_> = plan.rules().map(|(_, rights)| rights).collect();
        assert_eq!(rules, [Use::Read.rights() | Use::Write.rights()]);
    }

    /// No use lets a program be run, or a device be made.
    #[test]
    fn no_use_is_more_than_it_says() {
        let never = make_bitflags!(AccessFs::{Execute | MakeChar | MakeBlock | MakeSym | MakeFifo | MakeDir | Refer});
        for what in [Use::Read, Use::Write, Use::MakeFiles, Use::NameFiles, Use::MakeSockets, Use::Device] {
            assert!(!what.rights().intersects(never), "{what:?}");
        }
        assert!(!Use::Read.rights().intersects(AccessFs::from_write(NEWEST)));
        let content = make_bitflags!(AccessFs::{ReadFile | WriteFile | Truncate});
        assert!(!(Use::NameFiles.rights() | Use::MakeSockets.rights()).intersects(content));
        assert!(!Use::Write.rights().intersects(make_bitflags!(AccessFs::{MakeReg | MakeSock | RemoveFile})));
    }

    #[test]
    fn an_old_version_says_what_it_lacks() {
        assert!(Landlock { version: 2 }.lacks().unwrap().contains("version 2"));
        assert_eq!(Landlock { version: 3 }.lacks(), None);
    }
}
