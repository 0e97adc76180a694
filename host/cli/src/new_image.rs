//! What `create` and `convert` share: a new image under a temporary name.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use blockhouse_block::{Access, BlockBackend, Preallocation};
use blockhouse_sandbox::{BackingReference, Grants, NewImage, OpenRequest, OpenedDisk, Opener};
use blockhouse_walls::Plan;
use clap::ValueEnum;
use serde::Serialize;

use crate::args::{HostArgs, beside};
use crate::progress::Progress;
use crate::target::{NewFile, Target, identity};

/// What a new image is to be like.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct NewArgs {
    /// An option of the format; `blockhouse create --format FORMAT -o help` lists them
    #[arg(short, value_name = "NAME=VALUE")]
    options: Vec<String>,

    /// Make an overlay: what is not written to the new image is read from PATH. The name is recorded as it
    /// stands here; a relative one starts at the directory of the new image
    #[arg(long, value_name = "PATH", requires = "backing_format")]
    pub(crate) backing: Option<String>,

    /// The format of the backing file. Stated by you, never guessed
    #[arg(long, value_name = "FORMAT", requires = "backing")]
    pub(crate) backing_format: Option<String>,

    /// Set space aside for all of the disk
    #[arg(long, value_name = "HOW", default_value = "off", conflicts_with = "backing")]
    preallocation: How,

    /// Keep the content in PATH, a new file, and in the image only where it is. The name is recorded as that
    /// of a backing file
    #[arg(long, value_name = "PATH")]
    data_file: Option<String>,

    /// Replace the image if it exists and nobody uses it
    #[arg(long)]
    force: bool,
}

/// How far a new image is preallocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum How {
    /// Nothing: the image grows as it is written
    Off,
    /// Every cluster has its place; the file has holes there
    Metadata,
    /// The file system sets the space aside
    Falloc,
    /// Zeroes are written
    Full,
}

/// A new image that does not have its name yet.
pub(crate) struct Made {
    pub(crate) target: Target,
    format: String,
    opener: Opener,
}

/// What was made, for programs.
#[derive(Debug, Serialize)]
pub(crate) struct MadeReport {
    image: PathBuf,
    format: String,
    virtual_size_bytes: u64,
    backing: Option<BackingReference>,
    data_file: Option<String>,
    preallocation: How,
}

impl NewArgs {
    /// Options as the component gets them.
    fn parsed_options(&self) -> anyhow::Result<Vec<(String, String)>> {
        let mut options = Vec::new();
        for option in &self.options {
            let Some((name, value)) = option.split_once('=').filter(|(name, _)| !name.is_empty()) else {
                bail!("-o {option:?} is not of the form NAME=VALUE, as in -o cluster-size=64K; -o help lists them");
            };
            // QEMU's spelling is as good.
            options.push((name.replace('_', "-"), value.to_owned()));
        }
        if let Some(data_file) = &self.data_file {
            options.push(("data-file".to_owned(), data_file.clone()));
        }
        Ok(options)
    }

    /// What is opened to make the image, which is begun.
    pub(crate) fn plan(&self, plan: &mut Plan, image: &Path) -> anyhow::Result<()> {
        if let Some(name) = &self.backing {
            plan.read(beside(image, name.as_ref()));
        }
        self.new_file(image).plan(plan)
    }

    fn new_file<'a>(&self, image: &'a Path) -> NewFile<'a> {
        let data_file = self.data_file.iter().map(|name| beside(image, name.as_ref()));
        NewFile { with: data_file.collect(), ..NewFile::new(image, self.force) }
    }

    /// Whether the operator asks for the list of options.
    pub(crate) fn wants_help(&self) -> bool {
        self.options.iter().any(|option| option == "help")
    }

    /// What the image shall name as its backing file.
    pub(crate) fn backing(&self) -> Option<BackingReference> {
        let name = self.backing.clone()?;
        Some(BackingReference { name, format: self.backing_format.clone() })
    }

    /// Opens the backing chain, read-only, for an image at `image`. The backing file is granted by naming it.
    pub(crate) fn open_backing(
        &self,
        image: &Path,
        opener: &Opener,
        grants: &Grants,
    ) -> anyhow::Result<Option<OpenedDisk>> {
        let (Some(name), Some(format)) = (&self.backing, &self.backing_format) else { return Ok(None) };
        Ok(Some(open_backing(image, name, format, opener, grants)?))
    }

    /// Makes the image, complete but for its content. `in_use` are files that must not be replaced.
    pub(crate) fn make(
        &self,
        image: &Path,
        format: &str,
        virtual_size: u64,
        host: &HostArgs,
        grants: &Grants,
        in_use: &[PathBuf],
    ) -> anyhow::Result<Made> {
        if !virtual_size.is_multiple_of(512) {
            bail!("a disk cannot have {virtual_size} bytes: sizes are multiples of 512");
        }
        let options = self.parsed_options()?;
        let mut in_use = in_use.to_vec();
        in_use.extend(self.backing.iter().map(|name| beside(image, name.as_ref())));
        let mut target = Target::take(&self.new_file(image))?;
        if let Some(name) = &self.data_file {
            refuse_same(image, &beside(image, name.as_ref()))?;
        }
        target.refuse_used(host, &in_use)?;
        let opener = host.opener()?;
        let new = NewImage { virtual_size, backing: self.backing(), options };
        opener.create_in(target.open()?, image, format, &new)?;

        let mut grants = grants.clone();
        if let Some(name) = &self.backing {
            let path = beside(image, name.as_ref());
            // With --no-check it need not be there.
            if path.exists() {
                grants = grants.allow(path)?;
            }
        }
        if let Some(name) = &self.data_file {
            let path = beside(image, name.as_ref());
            let file = File::options().write(true).open(&path);
            file.and_then(|file| file.set_len(virtual_size).and_then(|()| file.sync_all()))
                .with_context(|| format!("cannot write the data file {}", path.display()))?;
            grants = grants.allow_writing(path)?;
        }
        let made = Made { target, format: format.to_owned(), opener: opener.grants(grants) };
        match self.preallocate(&made) {
            Ok(()) => Ok(made),
            Err(error) => Err(made.target.about(error)),
        }
    }

    fn preallocate(&self, made: &Made) -> anyhow::Result<()> {
        let how = match self.preallocation {
            How::Off => return Ok(()),
            How::Metadata => Preallocation::Metadata,
            How::Falloc => Preallocation::Falloc,
            How::Full => Preallocation::Full,
        };
        let opened = made.open()?;
        let mut progress = Progress::new(opened.disk.capacity(), false);
        opened.disk.preallocate(how, |done| {
            progress.at(done);
        })?;
        opened.disk.flush()?;
        opened.disk.close()?;
        progress.finish();
        Ok(())
    }

    /// Says what was made.
    pub(crate) fn report(&self, image: &Path, format: &str, virtual_size: u64) -> MadeReport {
        MadeReport {
            image: image.to_owned(),
            format: format.to_owned(),
            virtual_size_bytes: virtual_size,
            backing: self.backing(),
            data_file: self.data_file.clone(),
            preallocation: self.preallocation,
        }
    }
}

impl Made {
    /// Opens the image, read-write, with its backing chain and its data file.
    pub(crate) fn open(&self) -> anyhow::Result<OpenedDisk> {
        let request =
            OpenRequest { access: Access::ReadWrite, ..OpenRequest::new(self.target.partial(), &self.format) };
        Ok(self.opener.open(&request)?)
    }
}

/// Fails if an image would take the place of its own data file, which was just made.
fn refuse_same(image: &Path, data_file: &Path) -> anyhow::Result<()> {
    match (fs::symlink_metadata(image), fs::symlink_metadata(data_file)) {
        (Ok(one), Ok(other)) if identity(&one) == identity(&other) => {
            let (image, data_file) = (image.display(), data_file.display());
            bail!("{image} and its data file {data_file} are one file; give the data file another name")
        }
        _ => Ok(()),
    }
}

/// Opens what `image` shall name as its backing file, with the chain below, read-only.
pub(crate) fn open_backing(
    image: &Path,
    name: &str,
    format: &str,
    opener: &Opener,
    grants: &Grants,
) -> anyhow::Result<OpenedDisk> {
    let path = beside(image, name.as_ref());
    if !fs::metadata(&path).with_context(|| format!("cannot find the backing file {}", path.display()))?.is_file() {
        bail!("the backing file {} is not a regular file", path.display());
    }
    let request = OpenRequest::new(&path, format);
    Ok(opener.clone().grants(grants.clone()).open(&request)?)
}
