//! The host's own policy in front of `open-at`: the second wall behind wasmtime-wasi's directory
//! capabilities, and independent of them.
//!
//! What may be opened: a regular file, below a granted directory or granted by itself, with at most the
//! rights of the grant, by a relative path without tricks, a limited number of times. It is opened
//! without blocking and looked at after it was opened, so that what was checked is what is used.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;

use blockhouse_block::Access;
use cap_primitives::fs::{OpenOptions, OpenOptionsExt};
use wasmtime_wasi::p2::bindings::filesystem::types::{DescriptorFlags, ErrorCode, OpenFlags};

use crate::grants::{FileGrant, GrantTree, join};
use crate::limits::{Limits, OUT_OF_FILES, is_out_of_files};
use crate::locks::{self, LockMode};
use crate::pin::Pin;
use crate::regular;
use crate::restart::{Held, HeldFile};

/// Why what lies in no grant is not opened.
pub(crate) const NOT_GRANTED: &str = "it is not granted";
/// Why what is granted to be read is not opened to be written.
pub(crate) const GRANT_IS_READ_ONLY: &str = "the grant is read-only";

/// A request to open, as the component made it.
pub(crate) struct Request<'a> {
    /// The image whose component asks: how deep it is in the chain, and its absolute name.
    pub(crate) depth: u32,
    pub(crate) image: &'a str,
    /// What the image was opened for.
    pub(crate) access: Access,
    /// The preopened directory, by name.
    pub(crate) directory: &'a str,
    /// The path below it.
    pub(crate) path: &'a str,
    /// Flags that would create or change something.
    pub(crate) open_flags: OpenFlags,
    /// The rights wanted.
    pub(crate) flags: DescriptorFlags,
}

impl Request<'_> {
    /// The access that is wanted.
    fn wanted(&self) -> Access {
        if self.flags.contains(DescriptorFlags::WRITE) { Access::ReadWrite } else { Access::ReadOnly }
    }

    /// Why it is refused whatever is granted, if more is to be written than the image itself.
    fn writes_too_much(&self) -> Option<String> {
        if !self.wanted().is_writable() || self.access.is_writable() {
            return None;
        }
        Some(match self.depth {
            0 => "the image is opened to be read, and so is all that it refers to".to_owned(),
            depth => format!("layer {depth} is a backing file, which is only read, and so is all that it refers to"),
        })
    }
}

/// A file that the policy let through.
pub(crate) struct Opened {
    pub(crate) file: File,
    pub(crate) path: String,
    pub(crate) access: Access,
    pub(crate) grant: String,
    /// What the file is pinned by.
    pub(crate) pin: Option<Arc<Pin>>,
}

/// Why the policy said no.
#[derive(Debug)]
pub(crate) struct Denied {
    pub(crate) code: ErrorCode,
    pub(crate) path: String,
    pub(crate) grant: Option<String>,
    pub(crate) reason: String,
}

/// Judges a request and, if it may be, opens the file.
pub(crate) fn open(
    grants: &GrantTree,
    limits: &Limits,
    locks: LockMode,
    request: &Request<'_>,
) -> Result<Opened, Denied> {
    let asked = join(request.directory, request.path);
    let denied = |code: ErrorCode, grant: Option<&str>, reason: String| Denied {
        code,
        path: asked.clone(),
        grant: grant.map(str::to_owned),
        reason,
    };
    let refuse = |reason: &str| Err(denied(ErrorCode::NotPermitted, None, reason.to_owned()));

    if request.path.len() > limits.path_bytes {
        return Err(Denied {
            code: ErrorCode::NameTooLong,
            path: asked.chars().take(256).collect::<String>() + "…",
            grant: None,
            reason: format!("the path is longer than {} bytes", limits.path_bytes),
        });
    }
    if request.open_flags != OpenFlags::empty() {
        return refuse("create, truncate, exclusive and directory are never allowed");
    }
    if request.flags.intersects(!(DescriptorFlags::READ | DescriptorFlags::WRITE)) {
        return refuse("only the flags read and write are allowed");
    }
    let access = request.wanted();
    if let Some(reason) = request.writes_too_much() {
        return refuse(&reason);
    }
    if request.path.contains('\0') {
        return refuse("the path has a NUL byte");
    }
    if request.path.starts_with('/') {
        return refuse("the path is absolute; paths are relative to a preopened directory");
    }
    if request.path.ends_with('/') {
        return refuse("the path ends in a slash, and only regular files can be opened");
    }
    let Some(below) = normalize(request.path) else {
        return refuse("the path leaves its directory through `..`");
    };
    let full = join(request.directory, &below);

    // A file that was granted by itself was opened when it was granted; its name leads nowhere else.
    let (parent, leaf) = full.rsplit_once('/').unwrap_or(("", &full));
    let parent = if parent.is_empty() { "/" } else { parent };
    if let Some(files) = grants.directories.get(parent).and_then(|directory| directory.files.get(leaf)) {
        return open_granted(grants, files.iter().collect(), locks, request, access, full);
    }

    // Otherwise the nearest directory that was granted whole.
    let nearest = grants
        .directories
        .iter()
        .filter_map(|(name, directory)| {
            let rest = full.strip_prefix(name.trim_end_matches('/'))?.strip_prefix('/')?;
            let whole = directory.whole_for(request.depth, request.image, access)?;
            Some((name, &whole.dir, whole.access, rest))
        })
        .min_by_key(|(_, _, _, rest)| rest.len());
    let Some((grant, dir, granted, rest)) = nearest else {
        return Err(Denied { code: ErrorCode::NotPermitted, path: full, grant: None, reason: NOT_GRANTED.to_owned() });
    };
    let denied =
        |code: ErrorCode, reason: String| Denied { code, path: full.clone(), grant: Some(grant.clone()), reason };
    if access == Access::ReadWrite && granted == Access::ReadOnly {
        return Err(denied(ErrorCode::NotPermitted, GRANT_IS_READ_ONLY.to_owned()));
    }
    // First to be read: whoever opens a pinned file to write it ends its lease, even if nothing is written then.
    let found = open_regular(&dir.dir, Path::new(rest)).map_err(|(code, reason)| denied(code, reason))?;
    let identity = regular::identity(&found).map_err(|error| denied(ErrorCode::Io, error.to_string()))?;
    let special = grants.of_file(identity);
    if !special.is_empty() {
        // Granted by itself, under this name or another one.
        return open_granted(grants, special, locks, request, access, full);
    }
    if access.is_writable() {
        // A link may lead into a directory that was granted to be read.
        let around = grants.around(&found, request.depth, request.image);
        match around.map_err(|error| denied(ErrorCode::Io, error.to_string()))? {
            Some((_, Access::ReadWrite)) => {}
            nearest => {
                return Err(Denied {
                    code: ErrorCode::NotPermitted,
                    path: full,
                    grant: nearest.map(|(grant, _)| grant.to_owned()),
                    reason: GRANT_IS_READ_ONLY.to_owned(),
                });
            }
        }
    }
    let file = match access {
        Access::ReadOnly => lock(&found, access, locks).map(|()| found),
        Access::ReadWrite => reopen(&found, access, locks),
    };
    let file = file.map_err(|(code, reason)| denied(code, reason))?;
    Ok(Opened { file, path: full, access, grant: grant.clone(), pin: None })
}

/// Opens a file that was granted by itself, as far as one of these grants of it allows. `full` is the name by which the
/// image asks for it.
fn open_granted(
    all: &GrantTree,
    mut grants: Vec<&FileGrant>,
    locks: LockMode,
    request: &Request<'_>,
    access: Access,
    full: String,
) -> Result<Opened, Denied> {
    let includes = |grant: &&FileGrant| grant.referrer.includes(request.depth, request.image);
    let denied = |grant: Option<&FileGrant>, code: ErrorCode, reason: String| {
        Err(Denied { code, path: full.clone(), grant: grant.map(|grant| grant.name.clone()), reason })
    };
    let other = grants.first().copied();
    grants.retain(includes);
    let Some(first) = grants.first().copied() else {
        let reason = format!("it is granted to other images of the chain, and this is layer {}", request.depth);
        return denied(other, ErrorCode::NotPermitted, reason);
    };
    // Of several grants one that is enough; but a pin counts wherever it was given.
    let enough = grants.iter().copied().find(|grant| grant.access == access).unwrap_or(first);
    let pinned = all.of_file(enough.identity).into_iter().filter(includes).find(|grant| grant.pin.is_some());
    let grant = pinned.unwrap_or(enough);
    if access == Access::ReadWrite && grant.access == Access::ReadOnly {
        return denied(Some(grant), ErrorCode::NotPermitted, GRANT_IS_READ_ONLY.to_owned());
    }
    if let Some(Err(why)) = grant.pin.as_ref().map(|pin| pin.check()) {
        return denied(Some(grant), ErrorCode::NotPermitted, why);
    }
    match reopen(&grant.file, access, locks) {
        Ok(file) => Ok(Opened { file, path: full, access, grant: grant.name.clone(), pin: grant.pin.clone() }),
        Err((code, reason)) => denied(Some(grant), code, reason),
    }
}

/// As [`open`], for a component that was started again: what the one before it opened, and nothing else. No
/// name is looked up.
pub(crate) fn open_again(held: &Held, limits: &Limits, request: &Request<'_>) -> Result<Opened, Denied> {
    let access = request.wanted();
    let short = request.path.len() <= limits.path_bytes;
    let full = normalize(request.path).filter(|_| short).map(|below| join(request.directory, &below));
    let found = full.as_deref().and_then(|full| held.find(full, access));
    let denied = |code: ErrorCode, reason: String| {
        let path = full.clone().unwrap_or_else(|| request.path.chars().take(256).collect());
        Denied { code, path, grant: None, reason }
    };
    if let Some(why) = request.writes_too_much() {
        return Err(denied(ErrorCode::NotPermitted, why));
    }
    let Some(found) = found else {
        let why = "the component was started again, and its first instance did not open it";
        return Err(denied(ErrorCode::NotPermitted, why.to_owned()));
    };
    // The same open file, with its locks, and with its pin: of a file that is not what it was nothing can be read.
    let file = found.file.try_clone().map_err(|error| denied(ErrorCode::Io, error.to_string()))?;
    let HeldFile { path, access, grant, pin, .. } = found.clone();
    Ok(Opened { file, path, access, grant, pin })
}

/// `path` without `.`, `..` and empty parts; `None` if it climbs above where it starts, or is nothing.
fn normalize(path: &str) -> Option<String> {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            name => parts.push(name),
        }
    }
    if parts.is_empty() { None } else { Some(parts.join("/")) }
}

/// Opens a regular file below `directory` to be read, resolved inside it by cap-primitives (`RESOLVE_BENEATH`
/// or its equivalent), and checks what was opened.
fn open_regular(directory: &File, path: &Path) -> Result<File, (ErrorCode, String)> {
    let mut options = OpenOptions::new();
    options.read(true);
    options.custom_flags(regular::careful());
    let file = cap_primitives::fs::open(directory, path, &options).map_err(|error| {
        let code = match error.kind() {
            io::ErrorKind::NotFound => ErrorCode::NoEntry,
            io::ErrorKind::NotADirectory => ErrorCode::NotDirectory,
            io::ErrorKind::IsADirectory => ErrorCode::IsDirectory,
            _ if is_out_of_files(&error) => ErrorCode::Quota,
            _ if error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) => ErrorCode::Loop,
            _ => ErrorCode::NotPermitted,
        };
        (code, describe(&error))
    })?;
    let failed = |error: io::Error| (ErrorCode::Io, error.to_string());
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err((ErrorCode::NotPermitted, "it is not a regular file".to_owned()));
    }
    if metadata.nlink() > 1 {
        // A hard link made inside a granted directory reaches a file outside of it.
        let reason = format!(
            "it has {} hard links, so it may belong to another directory; grant the file itself to allow it",
            metadata.nlink()
        );
        return Err((ErrorCode::NotPermitted, reason));
    }
    regular::usual_mode(&file).map_err(failed)?;
    Ok(file)
}

/// A granted file for one use of it: the same file, locked, with an open file description of its own, so that
/// the lock ends with that use and not with the grant.
fn reopen(granted: &File, access: Access, locks: LockMode) -> Result<File, (ErrorCode, String)> {
    // The link leads to the open file itself, whatever its name leads to by now.
    let link = format!("/proc/self/fd/{}", granted.as_raw_fd());
    // Who has a lease on it makes nobody wait.
    let opened =
        File::options().read(true).write(access == Access::ReadWrite).custom_flags(regular::careful()).open(link);
    match opened.and_then(|file| regular::usual_mode(&file).map(|()| file)) {
        Ok(file) => lock(&file, access, locks).map(|()| file),
        // Granted files are open for reading.
        Err(error) if access.is_writable() => {
            Err((ErrorCode::NotPermitted, format!("it cannot be opened to be written: {error}")))
        }
        Err(error) => {
            // Without /proc, or without the right to open it again: the descriptor itself is the grant.
            tracing::warn!("a granted file is used without a lock, since it cannot be opened again: {error}");
            granted.try_clone().map_err(|error| (ErrorCode::Io, describe(&error)))
        }
    }
}

/// Locks a file for its use here, unless somebody else's use contradicts that.
fn lock(file: &File, access: Access, locks: LockMode) -> Result<(), (ErrorCode, String)> {
    if locks == LockMode::Off && access == Access::ReadOnly {
        return Ok(());
    }
    match locks::take(file, access, locks) {
        Ok(None) => Ok(()),
        Ok(Some(why)) => Err((ErrorCode::NotPermitted, format!("it is in use: {why}"))),
        Err(error) => Err((ErrorCode::Io, format!("it cannot be locked: {error}"))),
    }
}

fn describe(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "there is no such file".to_owned(),
        io::ErrorKind::IsADirectory => "it is a directory".to_owned(),
        io::ErrorKind::PermissionDenied if error.raw_os_error().is_none() => {
            "a symbolic link on the way leads outside of the granted directory".to_owned()
        }
        _ if is_out_of_files(error) => OUT_OF_FILES.to_owned(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;

    use super::*;
    use crate::grants::{Grant, Grants, Referrer, Sha256Digest};

    struct Place {
        temp: tempfile::TempDir,
        grants: Grants,
        depth: u32,
        access: Access,
    }

    impl Place {
        fn new() -> Self {
            let temp = tempfile::tempdir().unwrap();
            let granted = temp.path().join("granted");
            std::fs::create_dir_all(granted.join("sub")).unwrap();
            std::fs::create_dir_all(temp.path().join("secret")).unwrap();
            std::fs::write(temp.path().join("secret/canary"), "canary").unwrap();
            std::fs::write(granted.join("base.raw"), "base").unwrap();
            std::fs::write(granted.join("sub/deep.raw"), "deep").unwrap();
            let grants = Grants::new().allow(&granted).unwrap();
            Self { temp, grants, depth: 0, access: Access::ReadWrite }
        }

        fn granted(&self) -> PathBuf {
            self.temp.path().join("granted")
        }

        fn open_with(&self, path: &str, open_flags: OpenFlags, flags: DescriptorFlags) -> Result<Opened, Denied> {
            let directory = self.granted();
            let directory = directory.to_str().unwrap();
            let request = Request {
                depth: self.depth,
                image: "/images/top",
                access: self.access,
                directory,
                path,
                open_flags,
                flags,
            };
            open(self.grants.tree(), &Limits::default(), LockMode::Enforce, &request)
        }

        fn open(&self, path: &str) -> Result<Opened, Denied> {
            self.open_with(path, OpenFlags::empty(), DescriptorFlags::READ)
        }

        fn refused(&self, path: &str) -> String {
            match self.open(path) {
                Ok(opened) => panic!("{path} was opened: {}", opened.path),
                Err(denied) => denied.reason,
            }
        }
    }

    fn text(opened: &Opened) -> String {
        std::io::read_to_string(&opened.file).unwrap()
    }

    #[test]
    fn regular_files_below_the_grant_open() {
        let place = Place::new();
        assert_eq!(text(&place.open("base.raw").unwrap()), "base");
        assert_eq!(text(&place.open("./sub//../sub/deep.raw").unwrap()), "deep");
        symlink("sub/deep.raw", place.granted().join("link")).unwrap();
        assert_eq!(text(&place.open("link").unwrap()), "deep");
    }

    #[test]
    fn opened_files_are_left_in_blocking_mode() {
        let place = Place::new();
        let opened = place.open("base.raw").unwrap();
        assert!(!rustix::fs::fcntl_getfl(&opened.file).unwrap().contains(rustix::fs::OFlags::NONBLOCK));
    }

    #[test]
    fn nothing_leads_outside() {
        let place = Place::new();
        let canary = place.temp.path().join("secret/canary");
        symlink(&canary, place.granted().join("absolute")).unwrap();
        symlink("../secret/canary", place.granted().join("relative")).unwrap();
        symlink("../secret", place.granted().join("directory")).unwrap();
        symlink("relative", place.granted().join("twice")).unwrap();
        symlink("/proc/self/mem", place.granted().join("mem")).unwrap();
        for path in ["absolute", "relative", "directory/canary", "twice", "mem", "sub/../directory/canary"] {
            assert!(place.refused(path).contains("leads outside"), "{path}: {}", place.refused(path));
        }
        assert!(place.refused("../secret/canary").contains("`..`"));
        assert!(place.refused("sub/../../secret/canary").contains("`..`"));
        assert!(place.refused(canary.to_str().unwrap()).contains("absolute"));
        assert!(place.refused("base.raw/").contains("slash"));
        assert!(place.refused("relative/").contains("slash"));
        assert!(place.refused("base.raw\0x").contains("NUL"));
        assert!(place.refused(".").contains(".."), "the directory itself is no file");
        assert!(place.refused(&"x/".repeat(3000)).contains("longer"));
    }

    #[test]
    fn only_regular_files_and_none_that_makes_the_host_wait() {
        let place = Place::new();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            place.granted().join("fifo"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            0,
        )
        .unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(place.granted().join("socket")).unwrap();
        symlink("/dev/zero", place.granted().join("zero")).unwrap();
        assert!(place.refused("fifo").contains("not a regular file"));
        assert!(place.open("socket").is_err());
        assert!(place.refused("sub").contains("not a regular file"));
        assert!(place.open("zero").is_err());
    }

    #[test]
    fn a_hard_link_opens_only_if_the_file_itself_is_granted() {
        let place = Place::new();
        std::fs::hard_link(place.temp.path().join("secret/canary"), place.granted().join("hard")).unwrap();
        assert!(place.refused("hard").contains("hard links"));
        let place = Place { grants: place.grants.clone().allow(place.granted().join("hard")).unwrap(), ..place };
        assert_eq!(text(&place.open("hard").unwrap()), "canary");
    }

    #[test]
    fn nothing_is_created_truncated_or_written_through_a_read_only_grant() {
        let place = Place::new();
        for flags in [OpenFlags::CREATE, OpenFlags::TRUNCATE, OpenFlags::EXCLUSIVE, OpenFlags::DIRECTORY] {
            for rights in [DescriptorFlags::READ, DescriptorFlags::empty(), DescriptorFlags::WRITE] {
                assert!(place.open_with("base.raw", flags, rights).is_err());
            }
        }
        for rights in
            [DescriptorFlags::WRITE, DescriptorFlags::READ | DescriptorFlags::WRITE, DescriptorFlags::MUTATE_DIRECTORY]
        {
            assert!(place.open_with("base.raw", OpenFlags::empty(), rights).is_err());
        }
        assert_eq!(std::fs::read(place.granted().join("base.raw")).unwrap(), b"base");
        assert!(place.open_with("new", OpenFlags::CREATE, DescriptorFlags::READ).is_err());
        assert!(!place.granted().join("new").exists());
    }

    #[test]
    fn an_image_that_is_only_read_opens_nothing_to_write_it() {
        let mut place = Place::new();
        let base = place.granted().join("base.raw");
        place.grants = Grants::new().allow_writing(place.granted()).unwrap();
        let flags = DescriptorFlags::READ | DescriptorFlags::WRITE;
        for grants in [place.grants.clone(), place.grants.clone().allow_writing(&base).unwrap()] {
            place.grants = grants;
            for (depth, why) in
                [(0, "the image is opened to be read,"), (3, "layer 3 is a backing file, which is only")]
            {
                place.depth = depth;
                place.access = Access::ReadOnly;
                for flags in [flags, DescriptorFlags::WRITE] {
                    let denied = place.open_with("base.raw", OpenFlags::empty(), flags).err().unwrap();
                    assert!(denied.reason.starts_with(why), "{}", denied.reason);
                }
                assert!(place.open("base.raw").is_ok());
                place.access = Access::ReadWrite;
                assert!(place.open_with("base.raw", OpenFlags::empty(), flags).is_ok());
            }
        }
    }

    #[test]
    fn a_single_file_grant_reaches_that_file_only() {
        let place = Place::new();
        let place = Place { grants: Grants::new().allow(place.granted().join("base.raw")).unwrap(), ..place };
        assert_eq!(text(&place.open("base.raw").unwrap()), "base");
        assert!(place.refused("sub/deep.raw").contains("not granted"));
        // What the name leads to later does not matter: the file was opened when it was granted.
        std::fs::remove_file(place.granted().join("base.raw")).unwrap();
        symlink("../secret/canary", place.granted().join("base.raw")).unwrap();
        let opened = place.open("base.raw").unwrap();
        let mut buffer = [0; 4];
        std::os::unix::fs::FileExt::read_exact_at(&opened.file, &mut buffer, 0).unwrap();
        assert_eq!(&buffer, b"base");
    }

    #[test]
    fn a_grant_can_be_for_one_image_of_the_chain() {
        let granted = |place: &Place, path: &str, referrer: Referrer| Grant {
            referrer,
            ..Grant::read(place.granted().join(path))
        };
        let layer = |layer| Referrer { layer: Some(layer), image: None };
        let image = |name: &str| Referrer { layer: None, image: Some(name.to_owned()) };
        for (referrer, reached) in [
            (Referrer::default(), [true, true]),
            (layer(0), [true, false]),
            (layer(1), [false, true]),
            (layer(2), [false, false]),
            (image("/images/top"), [true, true]),
            (image("/images/other"), [false, false]),
            (Referrer { layer: Some(1), ..image("/images/top") }, [false, true]),
            (Referrer { layer: Some(1), ..image("/images/other") }, [false, false]),
        ] {
            for (path, name) in [("base.raw", "base.raw"), ("", "sub/deep.raw"), ("sub", "sub/deep.raw")] {
                let mut place = Place::new();
                place.grants = Grants::new().add(&granted(&place, path, referrer.clone()), &mut |_, _| {}).unwrap();
                let reaches = [0, 1].map(|depth| {
                    place.depth = depth;
                    place.open(name).is_ok()
                });
                assert_eq!(reaches, reached, "{referrer:?} {path:?}");
            }
        }
        // A file that is granted by itself is granted to nobody else by a directory around it.
        let mut place = Place::new();
        place.grants = place.grants.clone().add(&granted(&place, "base.raw", layer(1)), &mut |_, _| {}).unwrap();
        assert!(place.refused("base.raw").contains("it is granted to other images of the chain, and this is layer 0"));
        assert!(place.open("sub/deep.raw").is_ok());
        // Several grants of one path, each for its images.
        place.grants = place.grants.clone().add(&granted(&place, "base.raw", layer(0)), &mut |_, _| {}).unwrap();
        assert!(place.open("base.raw").is_ok());
        place.depth = 1;
        assert!(place.open("base.raw").is_ok());
        place.depth = 2;
        assert!(place.open("base.raw").is_err());
    }

    #[test]
    fn a_pinned_file_opens_while_it_is_what_it_was() {
        let mut place = Place::new();
        let grant =
            |text: &str| Grant { sha256: Some(text.parse().unwrap()), ..Grant::read(place.granted().join("base.raw")) };
        let digest = Sha256Digest::of(b"base").to_string();
        let right = grant(&digest);
        place.grants = place.grants.clone().add(&right, &mut |_, _| {}).unwrap();
        let opened = place.open("base.raw").unwrap();
        assert_eq!(opened.pin.as_ref().unwrap().digest().to_string(), digest);
        assert_eq!(text(&opened), "base");
        assert!(
            place.open_with("base.raw", OpenFlags::empty(), DescriptorFlags::READ | DescriptorFlags::WRITE).is_err()
        );
        assert!(place.open("sub/deep.raw").unwrap().pin.is_none());

        let path = place.granted().join("base.raw");
        let writer = std::thread::spawn(move || std::fs::write(path, "evil").unwrap());
        // Held up by a lease, if there is one, until somebody looks.
        let began = std::time::Instant::now();
        while place.open("base.raw").is_ok() {
            assert!(began.elapsed() < crate::testing::LIMIT, "the writer is not noticed");
        }
        writer.join().unwrap();
        assert!(place.refused("base.raw").starts_with("it is pinned by sha256, and "));

        for (grant, why) in [
            (Grant { access: Access::ReadWrite, ..right.clone() }, "cannot be written"),
            (Grant { path: place.granted(), ..right.clone() }, "only a file can be pinned"),
            (Grant { sha256: None, ..right.clone() }, "granted twice"),
        ] {
            let error = place.grants.clone().add(&grant, &mut |_, _| {}).unwrap_err();
            assert!(error.to_string().contains(why), "{error}");
        }
    }

    /// The directory, and a file in it that is granted by itself, one before the other and the other way round: what the
    /// grant of the file demands holds for every name of the file.
    #[test]
    fn a_file_that_is_granted_by_itself_is_no_other_one_under_another_name() {
        let flags = |access: Access| match access {
            Access::ReadOnly => DescriptorFlags::READ,
            Access::ReadWrite => DescriptorFlags::READ | DescriptorFlags::WRITE,
        };
        let sha256 = Some(Sha256Digest::of(b"base"));
        let layer = |layer| Referrer { layer: Some(layer), image: None };
        for turned in [false, true] {
            let mut place = Place::new();
            let granted = place.granted();
            symlink("base.raw", granted.join("alias")).unwrap();
            symlink("../base.raw", granted.join("sub/alias")).unwrap();
            let with = |grant: Grant| {
                let whole = Grant { access: Access::ReadWrite, ..Grant::read(&granted) };
                let both = if turned { [grant, whole] } else { [whole, grant] };
                both.iter().fold(Grants::new(), |all, one| all.add(one, &mut |_, _| {}).unwrap())
            };
            let base = Grant::read(granted.join("base.raw"));
            let names = ["base.raw", "alias", "sub/alias"];

            place.grants = with(Grant { sha256, ..base.clone() });
            for name in names {
                let opened = place.open(name).unwrap();
                assert_eq!(opened.pin.map(|pin| *pin.digest()), sha256, "{name}");
                assert_eq!(opened.grant, granted.join("base.raw").to_str().unwrap(), "{name}");
                // Refused without a try: to open it to write it would be the end of a lease, and of the pin.
                let denied = place.open_with(name, OpenFlags::empty(), flags(Access::ReadWrite)).err().unwrap();
                assert!(denied.reason.contains("the grant is read-only"), "{name}: {}", denied.reason);
                assert!(place.open(name).is_ok(), "{name}");
            }
            place.grants = with(Grant { referrer: layer(1), ..base.clone() });
            for name in names {
                assert!(place.refused(name).contains("granted to other images of the chain"), "{name}");
            }
            assert!(place.open_with("sub/deep.raw", OpenFlags::empty(), flags(Access::ReadWrite)).is_ok());
        }
        // Two names that were granted: whoever pins the file under one of them pins it.
        let mut place = Place::new();
        symlink("base.raw", place.granted().join("alias")).unwrap();
        let alias = Grant { access: Access::ReadWrite, ..Grant::read(place.granted().join("alias")) };
        let pinned = Grant { sha256, referrer: layer(0), ..Grant::read(place.granted().join("base.raw")) };
        for both in [[&alias, &pinned], [&pinned, &alias]] {
            place.grants = both.iter().fold(Grants::new(), |all, one| all.add(one, &mut |_, _| {}).unwrap());
            place.depth = 0;
            assert!(place.open("alias").unwrap().pin.is_some());
            assert!(place.open_with("alias", OpenFlags::empty(), flags(Access::ReadWrite)).is_err());
            // For others it is not pinned.
            place.depth = 1;
            assert!(place.open("alias").unwrap().pin.is_none());
        }
    }

    /// By a link into it, and by another name of the directory around it.
    #[test]
    fn a_directory_that_is_granted_to_be_read_is_not_written_under_another_name() {
        let place = Place::new();
        let granted = place.granted();
        let alias = place.temp.path().join("alias");
        symlink("granted", &alias).unwrap();
        symlink("sub", granted.join("link")).unwrap();
        symlink("sub/deep.raw", granted.join("file")).unwrap();
        let read = granted.join("sub");
        for directory in [&granted, &alias] {
            let open = |grants: &Grants, path: &str, flags| {
                let request = Request {
                    depth: 0,
                    image: "/images/top",
                    access: Access::ReadWrite,
                    directory: directory.to_str().unwrap(),
                    path,
                    open_flags: OpenFlags::empty(),
                    flags,
                };
                open(grants.tree(), &Limits::default(), LockMode::Enforce, &request)
            };
            let write = DescriptorFlags::READ | DescriptorFlags::WRITE;
            let around = Grants::new().allow_writing(directory).unwrap();
            let both = around.clone().allow(&read).unwrap();
            for path in ["sub/deep.raw", "link/deep.raw", "file"] {
                let denied = open(&both, path, write).err().expect(path);
                assert_eq!(denied.reason, GRANT_IS_READ_ONLY, "{path}");
                assert_eq!(denied.grant.as_deref(), read.to_str(), "{path}");
                assert_eq!(text(&open(&both, path, DescriptorFlags::READ).unwrap()), "deep", "{path}");
                assert!(open(&around, path, write).is_ok(), "{path}: there is no grant but the one around it");
                // Of several grants of that directory one is enough, but by the name of the other.
                let again = both.clone().allow_writing(granted.join("link")).unwrap();
                let by_that_name = directory == &granted && path == "sub/deep.raw";
                assert_eq!(open(&again, path, write).is_ok(), !by_that_name, "{path}");
            }
            assert!(open(&both, "base.raw", write).is_ok());
        }
        // Whatever its name is by now.
        let grants = Grants::new().allow_writing(&granted).unwrap().allow(&read).unwrap();
        std::fs::rename(&read, granted.join("moved")).unwrap();
        let place = Place { grants, ..place };
        let write = DescriptorFlags::READ | DescriptorFlags::WRITE;
        assert!(place.open_with("moved/deep.raw", OpenFlags::empty(), write).is_err());
        assert!(place.open_with("base.raw", OpenFlags::empty(), write).is_ok());
    }

    /// What was judged is what is granted, and a name is what its text says.
    #[test]
    fn a_path_that_leads_elsewhere_is_not_granted() {
        let place = Place::new();
        let path = place.granted().join("base.raw");
        let found = Some(regular::identity(&File::open(&path).unwrap()).unwrap());
        let grant = Grant { found, ..Grant::read(&path) };
        let add = |grant: &Grant| Grants::new().add(grant, &mut |_, _| {}).map(|grants| grants.paths());
        assert!(add(&grant).is_ok());
        std::fs::remove_file(&path).unwrap();
        symlink("../secret/canary", &path).unwrap();
        let error = add(&grant).unwrap_err();
        assert!(error.to_string().contains("it is not what it was a moment ago"), "{error}");

        symlink("../secret", place.granted().join("link")).unwrap();
        std::fs::create_dir_all(place.temp.path().join("sub")).unwrap();
        std::fs::write(place.temp.path().join("sub/deep.raw"), "").unwrap();
        let error = add(&Grant::read(place.granted().join("link/../sub/deep.raw"))).unwrap_err();
        assert!(error.to_string().contains("leads elsewhere than to "), "{error}");
        assert!(error.to_string().ends_with("granted/sub/deep.raw; write the path without `..`"), "{error}");
        assert!(add(&Grant::read(place.granted().join("sub/../sub/deep.raw"))).is_ok());
    }

    #[test]
    fn what_was_open_opens_again_and_nothing_else() {
        let place = Place::new();
        let opened = place.open("base.raw").unwrap();
        let mut held = Held::default();
        let Opened { file, path, access, grant, pin } = opened;
        held.keep(HeldFile { path, access, grant, file: Arc::new(file), pin }, 1);
        // Whatever the name leads to by now.
        std::fs::remove_file(place.granted().join("base.raw")).unwrap();
        symlink("../secret/canary", place.granted().join("base.raw")).unwrap();
        let directory = place.granted();
        let directory = directory.to_str().unwrap();
        let again = |path, flags| {
            let request = Request {
                depth: 0,
                image: "/images/top",
                access: Access::ReadWrite,
                directory,
                path,
                open_flags: OpenFlags::empty(),
                flags,
            };
            open_again(&held, &Limits::default(), &request)
        };
        let opened = again("sub/../base.raw", DescriptorFlags::READ).unwrap();
        assert_eq!(opened.grant, directory);
        assert_eq!(text(&opened), "base");
        assert!(again("base.raw", DescriptorFlags::READ | DescriptorFlags::WRITE).is_err());
        for other in ["sub/deep.raw", "../secret/canary", "", "base.raw/..", "missing"] {
            let denied = again(other, DescriptorFlags::READ).err().unwrap();
            assert!(denied.reason.contains("its first instance did not open it"), "{other}: {}", denied.reason);
        }
        // No room for another one.
        assert!(!held.incomplete);
        held.keep(HeldFile { path: "/other".to_owned(), ..held.files[0].clone() }, 1);
        assert!(held.incomplete);
    }

    /// What may be written and cannot be is not handed out as if it could.
    #[test]
    fn who_is_to_write_gets_a_file_that_is_open_for_that_or_none() {
        let place = Place::new();
        // Stands for a file on a file system that is read-only by now: it opens to be read alone.
        let granted = File::open(place.granted()).unwrap();
        let (code, why) = reopen(&granted, Access::ReadWrite, LockMode::Enforce).unwrap_err();
        assert!(code == ErrorCode::NotPermitted && why.starts_with("it cannot be opened to be written: "), "{why}");
        assert!(reopen(&granted, Access::ReadOnly, LockMode::Off).is_ok());
    }

    #[test]
    fn a_lock_ends_with_the_use_and_not_with_the_grant() {
        let place = Place::new();
        let place = Place { grants: Grants::new().allow(place.granted().join("base.raw")).unwrap(), ..place };
        let writer = File::options().read(true).write(true).open(place.granted().join("base.raw")).unwrap();
        assert_eq!(locks::take(&writer, Access::ReadWrite, LockMode::Enforce).unwrap(), None);
        assert!(place.refused("base.raw").contains("in use"));
        drop(writer);
        let used = place.open("base.raw").unwrap();
        let writer = File::options().read(true).write(true).open(place.granted().join("base.raw")).unwrap();
        assert!(locks::take(&writer, Access::ReadWrite, LockMode::Enforce).unwrap().is_some());
        drop((used, writer));
        let writer = File::options().read(true).write(true).open(place.granted().join("base.raw")).unwrap();
        assert_eq!(locks::take(&writer, Access::ReadWrite, LockMode::Enforce).unwrap(), None);
    }

    #[test]
    fn a_flipping_symbolic_link_never_leads_outside() {
        let place = Place::new();
        let stop = std::sync::atomic::AtomicBool::new(false);
        let granted = place.granted();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let new = granted.join("flip.new");
                    std::fs::write(&new, "inside").unwrap();
                    std::fs::rename(&new, granted.join("flip")).unwrap();
                    symlink("../secret/canary", &new).unwrap();
                    std::fs::rename(&new, granted.join("flip")).unwrap();
                }
            });
            let started = std::time::Instant::now();
            let mut opened_some = false;
            // A second, and longer where the other thread was given no time.
            while started.elapsed().as_secs() < if opened_some { 1 } else { 20 } {
                if let Ok(opened) = place.open("flip") {
                    assert_ne!(text(&opened), "canary");
                    opened_some = true;
                }
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(opened_some, "the race never met the regular file");
        });
    }
}
