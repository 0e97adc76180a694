//! Calls that change an image as a whole, or look at all of it. Each takes an instance of its own, which
//! is gone when the call has returned.
//!
//! ```text
//!   create, check                       file ──▶ one call
//!   resize, set-backing, snapshots      file ── open ──▶ one call       (connect is never called: no
//!                                                                        other file is opened)
//! ```
//!
//! The component keeps the image whole at every instant; the host keeps others out (`locks.rs`).

use std::fs::File;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use blockhouse_block::{Access, BlockBackend, Error, ErrorKind, Result};
use serde::Serialize;

use crate::bindings::checker::CheckerAbility;
use crate::bindings::checker::exports::blockhouse::format::checker as wit_checker;
use crate::bindings::creator::CreatorAbility;
use crate::bindings::creator::exports::blockhouse::format::creator as wit_creator;
use crate::bindings::reader::blockhouse::format::types::BackingReference as WitBacking;
use crate::bindings::rebaser::RebaserAbility;
use crate::bindings::resizer::ResizerAbility;
use crate::bindings::snapshot_editor::SnapshotEditorAbility;
use crate::chain::{BackingReference, OpenRequest, Opener, Started, open_image};
use crate::grants::absolute_name;
use crate::instance::Instance;
use crate::sandbox::Plugin;
use crate::text::clean;

/// How much of a backing file is hidden by one call.
const HIDDEN_AT_ONCE: u64 = 64 << 30;

/// A disk does not stay at a size inside of a cluster on its way: the largest cluster of qcow2.
const LARGEST_CLUSTER: u64 = 2 << 20;

/// What a component without the ability cannot do.
const RESIZER: &str = "cannot change the size of a disk";

/// An option of [`Opener::create`], for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OptionHelp {
    /// The name: `cluster-size`.
    pub name: String,
    /// What it may be.
    pub values: String,
    /// What it is if it is not given.
    pub default: String,
    /// What it is for.
    pub about: String,
}

/// An image to be made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewImage {
    /// Size of the disk in bytes: a multiple of 512.
    pub virtual_size: u64,
    /// The backing file to name: it is not opened. The format must be given.
    pub backing: Option<BackingReference>,
    /// Options of the format, by name and value.
    pub options: Vec<(String, String)>,
}

/// What [`Opener::check`] repairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Space that is counted as used and is not.
    Leaks,
    /// Everything that can be.
    All,
}

/// What [`Opener::check`] found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CheckReport {
    /// Contradictions that can lose data, before any repair.
    pub corruptions: u64,
    /// Clusters that are counted as used and are not, before any repair.
    pub leaks: u64,
    /// How many of the corruptions were repaired.
    pub corruptions_repaired: u64,
    /// How many of the leaks were repaired.
    pub leaks_repaired: u64,
    /// The first of the findings, a line each.
    pub findings: Vec<String>,
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// Of these, those with space of their own in the image.
    pub allocated_clusters: u64,
    /// Of these, those that are compressed.
    pub compressed_clusters: u64,
    /// The end of the last cluster in use, in bytes of the file.
    pub image_end_bytes: u64,
}

impl Opener {
    /// Lists the options that the creator of a format understands.
    ///
    /// # Errors
    /// [`Unsupported`](ErrorKind::Unsupported) if the format cannot be created.
    pub fn create_options(&self, format: &str) -> Result<Vec<OptionHelp>> {
        let plugin = self.able(format, "creator", "cannot make new images")?;
        // The instance wants a file; this one is never handed over.
        let nothing = File::open("/dev/null").map_err(|error| storage("cannot open /dev/null", error))?;
        let started = self.start(&plugin, nothing, format, format, Access::ReadOnly)?;
        let options = started.instance.call("create-options", |call| {
            let creator = CreatorAbility::new(&mut *call.store, call.instance)?;
            creator.blockhouse_format_creator().call_create_options(call.store).map(Ok)
        })?;
        let limits = self.sandbox().limits();
        let text = |text: &str| clean(text, limits.text_bytes);
        Ok(options
            .iter()
            .take(limits.description_entries)
            .map(|option| OptionHelp {
                name: text(&option.name),
                values: text(&option.values),
                default: text(&option.default),
                about: text(&option.about),
            })
            .collect())
    }

    /// Makes an image at `path`, where nothing may be yet. Durable when it returns; after an error there is
    /// nothing.
    ///
    /// # Errors
    /// [`Unsupported`](ErrorKind::Unsupported) if the format cannot be created;
    /// [`Invalid`](ErrorKind::Invalid) for options that cannot be; [`Storage`](ErrorKind::Storage) if the
    /// file is there already or cannot be written.
    pub fn create(&self, path: &Path, format: &str, new: &NewImage) -> Result<()> {
        let name = absolute_name(path)?;
        new.check()?;
        // Before there is a file.
        self.able(format, "creator", "cannot make new images")?;
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
            .map_err(|error| storage("cannot create the image", error).on_image(&*name))?;
        let written = self.create_in(file, path, format, new);
        if written.is_err()
            && let Err(error) = std::fs::remove_file(path)
        {
            tracing::warn!(image = %name, %error, "the unfinished image could not be removed");
        }
        written?;
        // A file whose name is not durable is not there after a power cut.
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(directory)
            .and_then(|directory| directory.sync_all())
            .map_err(|error| storage("cannot make the name of the image durable", error).on_image(&*name))
    }

    /// As [`create`](Self::create), in a new and empty `file`, open to be read and written, that is called `path`.
    /// The file is durable when it returns, its name need not be, and what becomes of it after an error is for the
    /// caller to say.
    ///
    /// # Errors
    /// As [`create`](Self::create); [`Invalid`](ErrorKind::Invalid) if the file is none that is new.
    pub fn create_in(&self, file: File, path: &Path, format: &str, new: &NewImage) -> Result<()> {
        let name = &*absolute_name(path)?;
        new.check()?;
        let plugin = self.able(format, "creator", "cannot make new images")?;
        let metadata = file.metadata().map_err(|error| storage("cannot look at the image", error).on_image(name))?;
        if !metadata.is_file() || metadata.len() != 0 {
            let why = "a new image is made in an empty regular file, and this is none";
            return Err(Error::new(ErrorKind::Invalid, why).on_image(name));
        }
        let Started { instance, handle, .. } = self.start(&plugin, file, name, format, Access::ReadWrite)?;
        let what = wit_creator::NewImage {
            virtual_size_bytes: new.virtual_size,
            backing: new.backing.as_ref().map(lower_backing),
            options: new
                .options
                .iter()
                .map(|(name, value)| wit_creator::CreateOption { name: name.clone(), value: value.clone() })
                .collect(),
        };
        instance.maintain("create", |call| {
            let creator = CreatorAbility::new(&mut *call.store, call.instance)?;
            creator.blockhouse_format_creator().call_create(call.store, handle, &what)
        })
    }

    /// Checks an image, and repairs it if asked to. Finds also what keeps the image from being opened.
    ///
    /// # Errors
    /// [`Unsupported`](ErrorKind::Unsupported) if the format cannot be checked; a header that cannot be
    /// used; failures of the storage. What else is wrong is in the report.
    pub fn check(&self, path: &Path, format: &str, repair: Option<Repair>) -> Result<CheckReport> {
        let name = absolute_name(path)?;
        let plugin = self.able(format, "checker", "cannot check images")?;
        let access = if repair.is_some() { Access::ReadWrite } else { Access::ReadOnly };
        let file = open_image(path, access, self.lock_mode()).map_err(|error| error.on_image(&*name))?;
        let Started { instance, handle, .. } = self.start(&plugin, file, &name, format, access)?;
        let repair = repair.map(|repair| match repair {
            Repair::Leaks => wit_checker::Repair::Leaks,
            Repair::All => wit_checker::Repair::All,
        });
        let report = instance.maintain("check", |call| {
            let checker = CheckerAbility::new(&mut *call.store, call.instance)?;
            checker.blockhouse_format_checker().call_check(call.store, handle, repair)
        })?;
        if report.corruptions_repaired > report.corruptions || report.leaks_repaired > report.leaks {
            return Err(instance.condemn("`check` repaired more than it found"));
        }
        let limits = self.sandbox().limits();
        Ok(CheckReport {
            corruptions: report.corruptions,
            leaks: report.leaks,
            corruptions_repaired: report.corruptions_repaired,
            leaks_repaired: report.leaks_repaired,
            findings: report
                .findings
                .iter()
                .take(limits.description_entries)
                .map(|finding| clean(finding, limits.text_bytes))
                .collect(),
            total_clusters: report.total_clusters,
            allocated_clusters: report.allocated_clusters,
            compressed_clusters: report.compressed_clusters,
            image_end_bytes: report.image_end_bytes,
        })
    }

    /// Changes the size of a disk. What a disk loses is gone; what it gains reads as zero, also where its
    /// backing file is longer. A power cut leaves the old size or the new one; over a backing file that is
    /// longer than the disk was, perhaps a size in between.
    ///
    /// `request` opens the disk with what it refers to, and is made read-write. `before` is the size that the caller
    /// decided on, and not whether the disk loses something since.
    ///
    /// # Errors
    /// [`Unsupported`](ErrorKind::Unsupported) if the format cannot do it; [`Storage`](ErrorKind::Storage) if the disk
    /// has another size than `before`; what opening and the component answer.
    pub fn resize(&self, request: &OpenRequest, before: u64, size: u64) -> Result<()> {
        check_size(size)?;
        let (path, format) = (request.path.as_path(), request.format.as_str());
        self.able(format, "resizer", RESIZER)?;
        let opened = self.open(&OpenRequest { access: Access::ReadWrite, ..request.clone() })?;
        let now = opened.disk.capacity();
        if now != before {
            let why = format!("somebody has changed its size meanwhile, from {before} bytes to {now}; try again");
            return Err(Error::new(ErrorKind::Storage, why).on_image(absolute_name(path)?));
        }
        let below = opened.disk.layers().nth(1).map_or(0, |below| below.virtual_size);
        if size > now {
            // In a file of its own, what lies behind the end of the disk may be somebody's.
            if let Some(top) = opened.report.layers.first().filter(|top| !top.files.is_empty())
                && !now.is_multiple_of(u64::from(top.cluster_size_bytes).max(1))
            {
                let why = "the disk ends inside of a cluster, and its content is in a file of its own, which may go on \
                           behind the end";
                return Err(Error::new(ErrorKind::Unsupported, why).on_image(&*top.image));
            }
            opened.disk.settle_end()?;
        }
        opened.disk.close()?;
        drop(opened);
        if size < now {
            return self.resize_image(path, format, size, false);
        }
        each_size(now, size, below, |next, hide_backing| self.resize_image(path, format, next, hide_backing))
    }

    /// One step of it, and a look at what has become of that, by another instance.
    fn resize_image(&self, path: &Path, format: &str, size: u64, hide_backing: bool) -> Result<()> {
        self.edit(path, format, "resizer", RESIZER, |instance| resize(instance, size, hide_backing))?;
        let name = absolute_name(path)?;
        let plugin = self.able(format, "resizer", RESIZER)?;
        let file = open_image(path, Access::ReadOnly, self.lock_mode()).map_err(|error| error.on_image(&*name))?;
        let Started { instance, handle, .. } = self.start(&plugin, file, &name, format, Access::ReadOnly)?;
        let now = self.open_format(&instance, handle, &name, Access::ReadOnly)?.virtual_size_bytes;
        if now == size {
            return Ok(());
        }
        Err(instance.condemn(&format!("`resize` should have made a disk of {size} bytes, and it has {now}")))
    }

    /// Makes an image name another backing file, or none. Opens neither, and changes no data: the disk reads
    /// as before only if the caller has seen to that.
    ///
    /// # Errors
    /// As [`create_snapshot`](Self::create_snapshot); [`Invalid`](ErrorKind::Invalid) for a reference without its
    /// format.
    pub fn set_backing(&self, path: &Path, format: &str, backing: Option<&BackingReference>) -> Result<()> {
        check_backing(backing)?;
        let backing = backing.map(lower_backing);
        self.edit(path, format, "rebaser", "cannot change the backing file of an image", |instance| {
            instance.maintain("set-backing", |call| {
                let rebaser = RebaserAbility::new(&mut *call.store, call.instance)?;
                rebaser.blockhouse_format_rebaser().call_set_backing(call.store, backing.as_ref())
            })
        })
    }

    /// Keeps the present state of an image as a snapshot inside it, and returns the id.
    ///
    /// # Errors
    /// [`Unsupported`](ErrorKind::Unsupported) if the format cannot do it; what the component answers.
    pub fn create_snapshot(&self, path: &Path, format: &str, name: &str) -> Result<String> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let id = self.edit_snapshots(path, format, |instance| {
            instance.maintain("create-snapshot", |call| {
                let editor = SnapshotEditorAbility::new(&mut *call.store, call.instance)?;
                let editor = editor.blockhouse_format_snapshot_editor();
                editor.call_create_snapshot(call.store, name, now.as_secs(), now.subsec_nanos())
            })
        })?;
        Ok(clean(&id, self.sandbox().limits().text_bytes))
    }

    /// Makes the disk of an image what it was at a snapshot.
    ///
    /// # Errors
    /// As [`create_snapshot`](Self::create_snapshot).
    pub fn apply_snapshot(&self, path: &Path, format: &str, id: &str) -> Result<()> {
        self.edit_snapshots(path, format, |instance| {
            instance.maintain("apply-snapshot", |call| {
                let editor = SnapshotEditorAbility::new(&mut *call.store, call.instance)?;
                editor.blockhouse_format_snapshot_editor().call_apply_snapshot(call.store, id)
            })
        })
    }

    /// Deletes a snapshot inside an image.
    ///
    /// # Errors
    /// As [`create_snapshot`](Self::create_snapshot).
    pub fn delete_snapshot(&self, path: &Path, format: &str, id: &str) -> Result<()> {
        self.edit_snapshots(path, format, |instance| {
            instance.maintain("delete-snapshot", |call| {
                let editor = SnapshotEditorAbility::new(&mut *call.store, call.instance)?;
                editor.blockhouse_format_snapshot_editor().call_delete_snapshot(call.store, id)
            })
        })
    }

    fn edit_snapshots<T>(&self, path: &Path, format: &str, call: impl FnOnce(&Instance) -> Result<T>) -> Result<T> {
        self.edit(path, format, "snapshot-editor", "cannot change snapshots", call)
    }

    /// Opens an image for writing, without what it refers to, for one call.
    fn edit<T>(
        &self,
        path: &Path,
        format: &str,
        ability: &str,
        cannot: &str,
        call: impl FnOnce(&Instance) -> Result<T>,
    ) -> Result<T> {
        let name = absolute_name(path)?;
        let plugin = self.able(format, ability, cannot)?;
        let file = open_image(path, Access::ReadWrite, self.lock_mode()).map_err(|error| error.on_image(&*name))?;
        let Started { instance, handle, .. } = self.start(&plugin, file, &name, format, Access::ReadWrite)?;
        self.open_format(&instance, handle, &name, Access::ReadWrite)?;
        call(&instance)
    }

    /// The component of a format that has an ability.
    fn able(&self, format: &str, ability: &str, cannot: &str) -> Result<Plugin> {
        let plugin = self.plugin(format)?;
        if plugin.inspection().exports_ability(ability) {
            return Ok(plugin);
        }
        let why = format!("the component for {} {cannot}", clean(format, 64));
        Err(Error::new(ErrorKind::Unsupported, why).on_image(plugin.name()))
    }
}

/// Has an opened image changed to another size: the last call of its instance.
pub(crate) fn resize(instance: &Instance, size: u64, hide_backing: bool) -> Result<()> {
    instance.maintain("resize", |call| {
        let resizer = ResizerAbility::new(&mut *call.store, call.instance)?;
        resizer.blockhouse_format_resizer().call_resize(call.store, size, hide_backing)
    })
}

/// Calls `step` with each size that a disk of `now` bytes has on its way to `size`, and whether what it gains has
/// to be hidden from a backing file of `below` bytes: that is done in steps.
pub(crate) fn each_size(
    mut now: u64,
    size: u64,
    below: u64,
    mut step: impl FnMut(u64, bool) -> Result<()>,
) -> Result<()> {
    while now < size {
        let hide_backing = below > now;
        let hidden = below.checked_next_multiple_of(LARGEST_CLUSTER).unwrap_or(size);
        let next = if hide_backing { size.min(hidden).min(now.saturating_add(HIDDEN_AT_ONCE)) } else { size };
        step(next, hide_backing)?;
        now = next;
    }
    Ok(())
}

impl NewImage {
    /// Sees that a component is asked for what can be only.
    fn check(&self) -> Result<()> {
        check_size(self.virtual_size)?;
        check_backing(self.backing.as_ref())
    }
}

fn check_size(size: u64) -> Result<()> {
    if size.is_multiple_of(512) && i64::try_from(size).is_ok() {
        return Ok(());
    }
    let why = format!("a disk cannot have {size} bytes: sizes are multiples of 512, below 2^63");
    Err(Error::new(ErrorKind::Invalid, why))
}

/// An image that names a backing file without its format cannot be opened by anybody who does not guess.
fn check_backing(backing: Option<&BackingReference>) -> Result<()> {
    match backing {
        Some(BackingReference { name, format: None }) => {
            let why = format!("the backing file {name:?} would be named without its format: state it");
            Err(Error::new(ErrorKind::Invalid, why))
        }
        _ => Ok(()),
    }
}

fn lower_backing(backing: &BackingReference) -> WitBacking {
    WitBacking { name: backing.name.clone(), format: backing.format.clone() }
}

fn storage(what: &str, error: std::io::Error) -> Error {
    Error::new(ErrorKind::Storage, format!("{what}: {error}")).with_source(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(now: u64, size: u64, below: u64) -> Vec<(u64, bool)> {
        let mut steps = Vec::new();
        let done = each_size(now, size, below, |next, hides| {
            steps.push((next, hides));
            Ok(())
        });
        assert!(done.is_ok());
        steps
    }

    #[test]
    fn a_disk_grows_past_what_lies_below_in_steps_that_end_between_clusters() {
        const MIB: u64 = 1 << 20;
        assert_eq!(steps(4 * MIB, 20 * MIB, 0), [(20 * MIB, false)]);
        assert_eq!(steps(4 * MIB, 20 * MIB, 64 * MIB), [(20 * MIB, true)]);
        // Whoever fails after the first of these goes on from there.
        assert_eq!(steps(4 * MIB, 20 * MIB, 9 * MIB + 512), [(10 * MIB, true), (20 * MIB, false)]);
        let (far, at_once) = (1 << 40, HIDDEN_AT_ONCE);
        let far_steps = steps(4 * MIB, far, 100 << 30);
        assert_eq!(far_steps, [(4 * MIB + at_once, true), (100 << 30, true), (far, false)]);
        assert_eq!(steps(4 * MIB, 20 * MIB, u64::MAX), [(20 * MIB, true)]);
    }
}
