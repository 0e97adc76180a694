//! VMDK, the disk format of VMware, read-only: one file or many, sparse, flat or compressed.
//!
//! ```text
//!                 ┌─ text file ────── parts: FLAT "a-flat.vmdk", SPARSE "a-s001.vmdk", ZERO, ...
//! image ── is a ──┤                          each opened through the grant, by `connect`
//!                 └─ sparse file ──── its own only part; descriptor inside (or none: a part of another)
//! descriptor ──▶ parentFileNameHint: the backing file, always a VMDK, checked by its content id
//! ```
//!
//! Read: monolithicSparse, streamOptimized, monolithicFlat, twoGbMaxExtentSparse, twoGbMaxExtentFlat,
//! vmfs (flat files of ESX), and any mix of FLAT, VMFS, SPARSE, ZERO and NOACCESS parts. Refused by
//! name: vmfsSparse (COWD), seSparse, devices, encryption.
//!
//! Source: VMware, Virtual Disk Format 5.0; where it is silent, what QEMU 10 does.
//!
//! Differences to QEMU, on purpose:
//!
//! * Parts that are read-only, ZERO or NOACCESS keep their place in the disk (QEMU leaves them out, so that all after
//!   them moves).
//! * A part of no sectors or of an unknown type is refused (QEMU leaves it out as well).
//! * A SPARSE part is as long as its line in the descriptor says (for QEMU as its header says), also if it ends inside
//!   of a grain: what follows is the next part (QEMU reads on in the grain).
//! * A file that is the whole disk is as long as its embedded descriptor says, where its header has that rounded up to
//!   whole grains (QEMU goes by the header).
//! * A parent that is named by nothing but VirtualBox's `ddb.uuid.parent` is refused (QEMU takes the image for a disk
//!   without one).
//! * Unknown flags of features that a reader has to know are refused (QEMU ignores them).
//! * A part whose file is too short is an error, not zeroes, and so is a grain past the end of its file.
//! * A parent whose content id does not match is refused when the chain is opened, not at the first read from it.
//! * A content id is hexadecimal digits and nothing else (QEMU takes a 0x before them).

#![cfg_attr(target_family = "wasm", no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

mod compressed;
mod descriptor;
mod header;
mod tables;

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use blockhouse_plugin::{
    Access, BackingReference, Context, Error, Extent, Fact, File, FileIndex, Format, ImageInfo, Level, Located,
    Placement, Result, log,
};

use descriptor::{Content, Descriptor, Line, NO_PARENT};
use header::{Header, Kind};
use tables::{Cache, Sparse};

/// An opened VMDK.
#[derive(Debug)]
pub struct Vmdk {
    context: Context,
    plan: Option<Plan>,
    /// The parent's name and the content id that it must have.
    parent: Option<(String, Option<u32>)>,
    parts: Vec<Part>,
    cache: Cache,
}

/// What `connect` has to do.
#[derive(Debug)]
enum Plan {
    /// The image is the only part, and the disk has so many bytes.
    Alone(File, Header, u64),
    /// The descriptor names the parts.
    Named(Vec<Line>),
}

/// A part of the disk, ready to be read.
#[derive(Debug)]
struct Part {
    /// Byte offset in the disk.
    start: u64,
    /// Length in bytes.
    length: u64,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Zero,
    NoAccess,
    Flat { file: FileIndex, offset: u64 },
    Sparse(Sparse),
}

impl Format for Vmdk {
    fn open(image: File, context: Context, access: Access) -> Result<(Self, ImageInfo)> {
        if access == Access::ReadWrite {
            return Err(Error::unsupported("vmdk is read-only here; open the image read-only"));
        }
        let (header, descriptor) = read_descriptor(&image)?;
        let descriptor = descriptor.ok_or_else(|| {
            Error::unsupported("this file has no descriptor: it is one part of a split disk; open the descriptor file")
        })?;
        let mut info = ImageInfo::default();
        let mut fact = |name: &str, value: String| info.facts.push(Fact::new(name, value));
        if let Some(kind) = &descriptor.create_type {
            fact("create-type", kind.clone());
        }
        if let Some(id) = descriptor.content_id {
            fact("content-id", format!("{id:08x}"));
        }
        let parent = parent(&descriptor)?;
        if let Some(id) = descriptor.parent_content_id.filter(|id| *id != NO_PARENT) {
            fact("parent-content-id", format!("{id:08x}"));
        }
        let plan = match header.filter(|header| header.capacity > 0) {
            Some(header) => {
                if descriptor.parts.len() > 1 {
                    return Err(Error::corrupt(format!(
                        "the embedded descriptor names {} parts, and the file holds the whole disk itself",
                        descriptor.parts.len()
                    )));
                }
                for (name, value) in header_facts(&header) {
                    fact(name, value);
                }
                info.virtual_size =
                    descriptor.own_length().filter(|length| is_rounded_up(&header, *length)).unwrap_or(header.capacity);
                info.cluster_size = u32::try_from(header.grain).unwrap_or(0);
                if header.unclean {
                    log(Level::Warn, "the image was not closed by the program that wrote it last");
                }
                Plan::Alone(image, header, info.virtual_size)
            }
            None => {
                let lines = descriptor.lines()?;
                if lines.is_empty() {
                    return Err(Error::corrupt("the descriptor names no parts"));
                }
                fact("parts", lines.len().to_string());
                info.virtual_size = descriptor::size(&lines)?;
                info.files = lines.iter().filter_map(|line| line.content.name()).map(str::to_string).collect();
                Plan::Named(lines)
            }
        };
        info.backing =
            parent.as_ref().map(|(name, _)| BackingReference { name: name.clone(), format: Some("vmdk".to_string()) });
        Ok((Self { context, plan: Some(plan), parent, parts: Vec::new(), cache: Cache::default() }, info))
    }

    fn connect(&mut self) -> Result<Option<File>> {
        match self.plan.take() {
            Some(Plan::Alone(image, header, length)) => {
                let source = Source::Sparse(sparse(image, header, 0)?);
                self.parts.push(Part { start: 0, length, source });
            }
            Some(Plan::Named(lines)) => {
                for line in lines {
                    let start = self.parts.last().map_or(0, |part| part.start.saturating_add(part.length));
                    let source = self.open_part(&line)?;
                    self.parts.push(Part { start, length: line.length, source });
                }
            }
            None => return Err(Error::Other("connect was called twice".into())),
        }
        match &self.parent {
            Some((name, id)) => Ok(Some(self.open_parent(name, *id)?)),
            None => Ok(None),
        }
    }

    fn locate(&mut self, offset: u64, _length: u64, max_extents: u32) -> Result<Located> {
        let after = self.parts.partition_point(|part| part.start <= offset);
        let part = after
            .checked_sub(1)
            .and_then(|index| self.parts.get(index))
            .filter(|part| offset - part.start < part.length)
            .ok_or_else(|| Error::Other(format!("byte {offset} is in no part of the disk")))?;
        let placement = match &part.source {
            Source::Zero => Placement::Zero,
            Source::NoAccess => {
                return Err(Error::unsupported(format!(
                    "{} bytes at {} of the disk are marked NOACCESS in the descriptor",
                    part.length, part.start
                )));
            }
            Source::Flat { file, offset } => Placement::Data { file: *file, offset: *offset, overwrite: false },
            Source::Sparse(sparse) => {
                return sparse.locate(&mut self.cache, part.start, part.length, offset - part.start, max_extents);
            }
        };
        Ok(Located { start: part.start, extents: alloc::vec![Extent { length: part.length, placement }] })
    }

    fn unpack(&mut self, token: u64, length: u64) -> Result<Vec<u8>> {
        let (part, sector) = (token >> 32, token & u64::from(u32::MAX));
        let part = usize::try_from(part).ok().and_then(|part| self.parts.get(part));
        match part.map(|part| &part.source) {
            Some(Source::Sparse(sparse)) if sparse.header.compressed && length <= sparse.header.grain => {
                compressed::unpack(sparse, sector, length)
            }
            _ => Err(Error::Other(format!("there is no packed extent with token {token}"))),
        }
    }
}

impl Vmdk {
    fn open_part(&self, line: &Line) -> Result<Source> {
        let Some(name) = line.content.name() else {
            return Ok(if line.content == Content::Zero { Source::Zero } else { Source::NoAccess });
        };
        let file = self.context.open(name, Access::ReadOnly)?;
        let named = |error: Error| match error {
            Error::Corrupt(text) => Error::Corrupt(format!("{name:?}: {text}")),
            Error::Unsupported(text) => Error::Unsupported(format!("{name:?}: {text}")),
            other => other,
        };
        if let Content::Flat { offset, .. } = line.content {
            let size = file.size()?;
            if offset.checked_add(line.length).is_none_or(|end| end > size) {
                return Err(named(Error::ends_early("a flat part of the disk", offset, line.length, size)));
            }
            return Ok(Source::Flat { file: file.share(Access::ReadOnly)?, offset });
        }
        let mut head = [0; 8];
        file.read_at(0, &mut head)?;
        if header::kind(&head).map_err(named)? != Kind::Sparse {
            return Err(named(Error::corrupt("a SPARSE part without the magic KDMV")));
        }
        let header = Header::read(&file).map_err(named)?;
        if !is_rounded_up(&header, line.length) {
            return Err(named(Error::corrupt(format!(
                "the part is {} bytes in the descriptor and {} bytes in its header",
                line.length, header.capacity
            ))));
        }
        let part = u32::try_from(self.parts.len()).unwrap_or(u32::MAX);
        Ok(Source::Sparse(sparse(file, header, part)?))
    }

    /// Opens the parent, and checks that it is still what the image was made on.
    fn open_parent(&self, name: &str, expected: Option<u32>) -> Result<File> {
        let parent = self.context.open(name, Access::ReadOnly)?;
        let about = |why: &str| format!("the parent {name:?} {why}");
        let found = match read_descriptor(&parent) {
            Ok((_, descriptor)) => descriptor.and_then(|descriptor| descriptor.content_id),
            Err(Error::Storage(text)) => return Err(Error::Storage(text)),
            Err(Error::Unsupported(text)) => {
                return Err(Error::unsupported(about(&format!("cannot be read: {text}"))));
            }
            Err(error) => return Err(Error::corrupt(about(&format!("cannot be read: {error}")))),
        };
        match (found, expected) {
            (Some(found), Some(expected)) if found == expected => Ok(parent),
            (Some(found), Some(expected)) => Err(Error::corrupt(about(&format!(
                "was changed after the image was made: its content id is {found:08x}, and {expected:08x} is expected"
            )))),
            _ => Err(Error::corrupt(about("has no content id to compare, or the image has none for it"))),
        }
    }
}

/// Whether a capacity is that length, or what VMware and VirtualBox make of it: a multiple of the grain.
fn is_rounded_up(header: &Header, length: u64) -> bool {
    header.capacity.checked_sub(length).is_some_and(|more| more < header.grain.max(1))
}

fn sparse(file: File, header: Header, part: u32) -> Result<Sparse> {
    let size = file.size()?;
    let index = file.share(Access::ReadOnly)?;
    Ok(Sparse { file, index, header, size, part })
}

/// The header, if the file is sparse, and the descriptor, if it has one.
fn read_descriptor(file: &File) -> Result<(Option<Header>, Option<Descriptor>)> {
    let mut head = [0; 8];
    file.read_at(0, &mut head)?;
    match header::kind(&head)? {
        Kind::Sparse => {
            let header = Header::read(file)?;
            let (offset, length) = header.descriptor;
            let descriptor = if length == 0 { None } else { Descriptor::read(file, offset, length)? };
            // A file that is the disk itself is known by its header.
            if header.capacity == 0 && descriptor.as_ref().is_some_and(|descriptor| descriptor.create_type.is_none()) {
                return Err(Error::corrupt("the embedded descriptor has no createType, and the file has no capacity"));
            }
            Ok((Some(header), descriptor))
        }
        Kind::Text => {
            let descriptor = Descriptor::read(file, 0, file.size()?)?;
            let descriptor = descriptor.filter(|descriptor| descriptor.create_type.is_some()).ok_or_else(|| {
                Error::corrupt("this is no VMDK: there is neither the magic KDMV nor a descriptor with a createType")
            })?;
            Ok((None, Some(descriptor)))
        }
    }
}

fn parent(descriptor: &Descriptor) -> Result<Option<(String, Option<u32>)>> {
    match (descriptor.parent_hint.as_ref().filter(|hint| !hint.is_empty()), descriptor.parent_content_id) {
        (Some(hint), id) => Ok(Some((hint.clone(), id))),
        (None, None | Some(NO_PARENT)) if descriptor.parent_uuid.as_ref().is_some_and(|id| !is_nil(id)) => {
            Err(Error::unsupported(
                "a differencing image of VirtualBox, which names its parent by a UUID and not by a file, is not read; \
                 clone it there",
            ))
        }
        (None, None | Some(NO_PARENT)) => Ok(None),
        (None, Some(id)) => Err(Error::corrupt(format!("the image has a parent (content id {id:08x}) without a name"))),
    }
}

/// Whether a UUID says that there is none.
fn is_nil(uuid: &str) -> bool {
    uuid.bytes().all(|byte| b"0-".contains(&byte))
}

fn header_facts(header: &Header) -> Vec<(&'static str, String)> {
    let yes_no = |yes: bool| if yes { "yes" } else { "no" }.to_string();
    alloc::vec![
        ("version", header.version.to_string()),
        ("compressed", yes_no(header.compressed)),
        ("footer", yes_no(header.footer)),
        ("zeroed-grains", yes_no(header.zeroed_grains)),
        ("redundant-directory", yes_no(header.redundant_directory.is_some())),
        ("unclean-shutdown", yes_no(header.unclean)),
    ]
}

blockhouse_plugin::export!(Vmdk);
