//! The guest's memory, as the front end shares it: files that are mapped here.
//!
//! ```text
//!  front end's addresses   ├── user .. user + len ──┤      rings are named in these
//!  guest's addresses       ├── guest .. guest + len ┤      descriptors are written in these
//!  file                    ├── offset .. offset + len      mapped here
//! ```
//! A region that overlaps another, wraps, or goes past the end of its file is refused, and with it the
//! whole change: the memory stays what it was. What cannot be refused is a front end that shortens a file
//! later; touching what is gone ends this process with SIGBUS.

use std::fs::File;
use std::sync::Arc;

use rustix::fs::{FsWord, fstatfs};
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::refusal::{Refusal, Result, refuse};

/// The most regions at a time. Front ends of virtual machines have a handful, one per DIMM.
pub(crate) const MAX_REGIONS: usize = 128;

/// A page of the host, and of what a front end may choose as an offset into a file.
pub(crate) const PAGE: u64 = 4096;

/// `HUGETLBFS_MAGIC` (linux/magic.h): files of huge pages.
const HUGETLBFS: FsWord = 0x9584_58f6;

/// Guest memory. Every worker holds it for as long as it runs.
pub(crate) type Memory = Arc<GuestMemoryMmap>;

/// What a front end says about one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    guest: u64,
    user: u64,
    len: u64,
}

impl Place {
    /// The place, if neither range wraps.
    fn new(region: &VhostUserMemoryRegion) -> Result<Self> {
        let place = Self { guest: region.guest_phys_addr, user: region.user_addr, len: region.memory_size };
        let ends = place.guest.checked_add(place.len).zip(place.user.checked_add(place.len));
        if place.len == 0 || ends.is_none() {
            return refuse!("{place} is empty or wraps");
        }
        Ok(place)
    }

    fn overlaps(&self, other: &Self) -> bool {
        let meet = |a: u64, b: u64| a < b.saturating_add(other.len) && b < a.saturating_add(self.len);
        meet(self.guest, other.guest) || meet(self.user, other.user)
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { guest, user, len } = self;
        write!(f, "the memory region of {len:#x} bytes at {guest:#x} (at {user:#x} in the front end)")
    }
}

/// All regions, and the memory that they make up.
#[derive(Default)]
pub(crate) struct MemoryMap {
    regions: Vec<(Place, Arc<GuestRegionMmap>)>,
    memory: Option<Memory>,
}

impl MemoryMap {
    /// The memory, if there is any.
    pub(crate) fn memory(&self) -> Option<&Memory> {
        self.memory.as_ref()
    }

    /// Takes these regions for the old ones.
    pub(crate) fn replace(&mut self, regions: &[VhostUserMemoryRegion], files: Vec<File>) -> Result<()> {
        let mut new = Self::default();
        for (region, file) in regions.iter().zip(files) {
            new.push(region, file)?;
        }
        new.assemble()?;
        *self = new;
        Ok(())
    }

    /// Adds a region.
    pub(crate) fn add(&mut self, region: &VhostUserMemoryRegion, file: File) -> Result<()> {
        self.push(region, file)?;
        self.assemble().inspect_err(|_| {
            self.regions.pop();
        })
    }

    /// Removes a region, which must be named as it was added.
    pub(crate) fn remove(&mut self, region: &VhostUserMemoryRegion) -> Result<()> {
        let place = Place::new(region)?;
        let Some(index) = self.regions.iter().position(|(other, _)| *other == place) else {
            return refuse!("{place} was never added");
        };
        self.regions.remove(index);
        self.assemble()
    }

    /// Where the front end's address `user` is in guest memory.
    pub(crate) fn guest_address(&self, user: u64) -> Option<GuestAddress> {
        self.regions.iter().find_map(|(place, _)| {
            let offset = user.checked_sub(place.user).filter(|offset| *offset < place.len)?;
            Some(GuestAddress(place.guest.checked_add(offset)?))
        })
    }

    fn push(&mut self, region: &VhostUserMemoryRegion, file: File) -> Result<()> {
        let place = Place::new(region)?;
        if self.regions.len() >= MAX_REGIONS {
            return refuse!("{place} is one too many: there are {MAX_REGIONS}");
        }
        if let Some((other, _)) = self.regions.iter().find(|(other, _)| other.overlaps(&place)) {
            return refuse!("{place} overlaps another one, {other}");
        }
        let mapped = map(file, region.mmap_offset, place.len).map_err(|refusal| refusal.about(&place))?;
        let Some(mapped) = GuestRegionMmap::new(mapped, GuestAddress(place.guest)) else {
            return refuse!("{place} wraps");
        };
        self.regions.push((place, Arc::new(mapped)));
        Ok(())
    }

    fn assemble(&mut self) -> Result<()> {
        let mut regions = self.regions.clone();
        regions.sort_by_key(|(place, _)| place.guest);
        let regions: Vec<_> = regions.into_iter().map(|(_, region)| region).collect();
        self.memory = if regions.is_empty() {
            None
        } else {
            Some(Arc::new(GuestMemoryMmap::from_arc_regions(regions).map_err(Refusal::because)?))
        };
        Ok(())
    }
}

/// Maps a part of a file for reading and writing, shared with everybody who has it.
pub(crate) fn map(file: File, offset: u64, len: u64) -> Result<MmapRegion> {
    let metadata = file.metadata().map_err(Refusal::because)?;
    if !metadata.is_file() {
        return refuse!("what was sent for it is no file that can be shared memory (use memfd, tmpfs or hugetlbfs)");
    }
    if offset.checked_add(len).is_none_or(|end| end > metadata.len()) {
        let size = metadata.len();
        return refuse!("{len:#x} bytes at {offset:#x} go past the end of its file, which has {size:#x}");
    }
    if !offset.is_multiple_of(PAGE) {
        return refuse!("it starts at {offset:#x} in its file, which is not the start of a page");
    }
    // What begins or ends inside of a huge page can be mapped, and never be unmapped.
    let system = fstatfs(&file).map_err(Refusal::because)?;
    let page = u64::try_from(system.f_bsize).unwrap_or(PAGE);
    if system.f_type == HUGETLBFS && !(offset | len).is_multiple_of(page) {
        return refuse!("{len:#x} bytes at {offset:#x} are not whole huge pages of {page:#x} bytes");
    }
    let len = usize::try_from(len).map_err(Refusal::because)?;
    MmapRegion::from_file(FileOffset::new(file, offset), len).map_err(Refusal::because)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

    use vm_memory::{Bytes, GuestMemoryBackend};

    use super::*;

    /// Says that a test cannot run here, also in the file that the test run counts.
    fn skip(reason: &str) {
        use std::io::Write;
        let line = format!("skipped: {}: {reason}\n", std::thread::current().name().unwrap_or("memory"));
        eprint!("{line}");
        if let Some(file) = std::env::var_os("BLOCKHOUSE_SKIPS") {
            let file = File::options().append(true).create(true).open(file);
            file.unwrap().write_all(line.as_bytes()).unwrap();
        }
    }

    fn file(len: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        file
    }

    fn region(guest: u64, len: u64, user: u64, offset: u64) -> VhostUserMemoryRegion {
        VhostUserMemoryRegion::new(guest, len, user, offset)
    }

    #[test]
    fn memory_is_what_the_files_hold() {
        let (a, b) = (file(0x3000), file(0x1000));
        let mut map = MemoryMap::default();
        let regions = [region(0x10000, 0x2000, 0x7000_0000, 0x1000), region(0, 0x1000, 0x1000, 0)];
        map.replace(&regions, vec![a.try_clone().unwrap(), b]).unwrap();
        let memory = map.memory().unwrap();
        memory.write_slice(b"here", GuestAddress(0x10ffe)).unwrap();
        let mut bytes = [0; 4];
        std::os::unix::fs::FileExt::read_exact_at(&a, &mut bytes, 0x1ffe).unwrap();
        assert_eq!(&bytes, b"here");
        assert!(memory.read_slice(&mut bytes, GuestAddress(0x1000)).is_err());
        for (user, guest) in [
            (0x7000_0000, Some(0x10000)),
            (0x7000_1fff, Some(0x11fff)),
            (0x7000_2000, None),
            (0, None),
            (0x1000, Some(0)),
        ] {
            assert_eq!(map.guest_address(user), guest.map(GuestAddress), "{user:#x}");
        }
    }

    #[test]
    fn what_cannot_be_memory_is_refused_and_changes_nothing() {
        let mut map = MemoryMap::default();
        map.add(&region(0x10000, 0x2000, 0x50000, 0), file(0x2000)).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let (pipe, _other) = std::io::pipe().unwrap();
        let pipe = File::from(std::os::fd::OwnedFd::from(pipe));
        for (region, file, why) in [
            (region(0x11fff, 0x1000, 0x90000, 0), file(0x1000), "overlaps"),
            (region(0xf001, 0x1000, 0x90000, 0), file(0x1000), "overlaps"),
            (region(0, 0x1000, 0x51000, 0), file(0x1000), "overlaps"),
            (region(0, u64::MAX, 0, 0), file(0x1000), "overlaps"),
            (region(u64::MAX, 0x1000, 0, 0), file(0x1000), "wraps"),
            (region(0, 0x1000, u64::MAX - 0xfff, 0), file(0x1000), "wraps"),
            (region(0, 0, 0, 0), file(0x1000), "empty"),
            (region(0, 0x1001, 0, 0), file(0x1000), "past the end"),
            (region(0, 0x1000, 0, 0x1000), file(0x1000), "past the end"),
            (region(0, 0x1000, 0, u64::MAX - 0xfff), file(0x1000), "past the end"),
            (region(0, 0x1000, 0, 0x200), file(0x2000), "page"),
            (region(0, 0x1000, 0, 0), File::open(directory.path()).unwrap(), "no file"),
            (region(0, 0x1000, 0, 0), pipe, "no file"),
            (region(0, 0x1000, 0, 0), File::open(std::env::current_exe().unwrap()).unwrap(), "ermission denied"),
        ] {
            let error = map.add(&region, file).unwrap_err().to_string();
            assert!(error.contains(why), "{why}: {error}");
            assert_eq!(map.memory().unwrap().num_regions(), 1);
        }
        let error =
            map.replace(&[region(0, 0x1000, 0, 0), region(0x800, 0x1000, 0x8000, 0)], vec![file(0x1000), file(0x1000)]);
        assert!(error.unwrap_err().to_string().contains("overlaps"));
        assert_eq!(map.guest_address(0x50001), Some(GuestAddress(0x10001)));
    }

    /// Linux maps it as if it were a whole one, and does not unmap less than that.
    #[test]
    fn a_part_of_a_huge_page_is_refused() {
        use rustix::fs::{MemfdFlags, memfd_create};
        const HUGE: u64 = 2 << 20;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        let pages = match memfd_create("huge", flags) {
            Ok(pages) => File::from(pages),
            Err(error) => return skip(&format!("there are no files of huge pages: {error}")),
        };
        pages.set_len(2 * HUGE).unwrap();
        let mut map = MemoryMap::default();
        for (len, offset) in [(0x1000, 0), (HUGE, 0x1000), (HUGE + 0x1000, 0)] {
            let error = map.add(&region(0, len, 0, offset), pages.try_clone().unwrap()).unwrap_err().to_string();
            assert!(error.contains("huge pages of 0x200000 bytes"), "{error}");
        }
        map.add(&region(0, HUGE, 0, HUGE), pages).unwrap();
    }

    #[test]
    fn regions_come_and_go() {
        let mut map = MemoryMap::default();
        for index in 0..MAX_REGIONS as u64 {
            let at = index * 0x2000;
            map.add(&region(at, 0x1000, at, 0), file(0x1000)).unwrap();
        }
        let more = region(0x100_0000, 0x1000, 0x100_0000, 0);
        assert!(map.add(&more, file(0x1000)).unwrap_err().to_string().contains("too many"));
        assert!(map.remove(&region(0x2000, 0x1000, 0, 0)).unwrap_err().to_string().contains("never added"));
        map.remove(&region(0x2000, 0x1000, 0x2000, 0)).unwrap();
        assert_eq!(map.guest_address(0x2000), None);
        map.add(&more, file(0x1000)).unwrap();
        assert_eq!(map.memory().unwrap().num_regions(), MAX_REGIONS);
    }
}
