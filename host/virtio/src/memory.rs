//! Guest memory as one queue sees it: where the last access was, the next one most likely is.
//!
//! For each descriptor, header and entry of a ring the memory is asked for its slices. Most are in one region, whole;
//! then that is an addition and two comparisons instead of a search and an iterator that goes on at its end.

use std::cell::Cell;
use std::iter::FusedIterator;

use vm_memory::guest_memory::{GuestMemorySliceIterator, Result};
use vm_memory::{
    Address, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryRegion, Permissions, VolatileSlice,
};

/// A view of guest memory, for one thread, that answers as the memory does. The regions of `M` do not change.
#[derive(Debug)]
pub(crate) struct QueueMemory<'m, M> {
    memory: &'m M,
    regions: Vec<Region<'m>>,
    /// The region of the last access.
    last: Cell<usize>,
}

#[derive(Debug)]
struct Region<'m> {
    start: GuestAddress,
    slice: VolatileSlice<'m>,
}

impl Region<'_> {
    /// The range, if all of it is here.
    fn get(&self, address: GuestAddress, count: usize) -> Option<VolatileSlice<'_>> {
        let offset = usize::try_from(address.checked_offset_from(self.start)?).ok()?;
        self.slice.subslice(offset, count).ok()
    }
}

impl<'m, M> QueueMemory<'m, M>
where
    M: GuestMemory<Bitmap = ()>,
{
    /// A view of `memory`. Where addresses are translated, the memory itself is asked each time.
    pub(crate) fn new(memory: &'m M) -> Self {
        let ranges = memory.physical_memory().into_iter().flat_map(|physical| physical.iter());
        let regions = ranges.filter_map(|region| {
            let (start, length) = (region.start_addr(), usize::try_from(region.len()).ok()?);
            let slice = memory.get_slices(start, length, Permissions::ReadWrite).ok()?.next()?.ok()?;
            (slice.len() == length).then_some(Region { start, slice })
        });
        Self { memory, regions: regions.collect(), last: Cell::new(0) }
    }

    fn in_one_region(&self, address: GuestAddress, count: usize) -> Option<VolatileSlice<'_>> {
        if count == 0 {
            return None;
        }
        if let Some(slice) = self.regions.get(self.last.get()).and_then(|region| region.get(address, count)) {
            return Some(slice);
        }
        let mut found = self.regions.iter().enumerate();
        let (index, slice) = found.find_map(|(index, region)| Some((index, region.get(address, count)?)))?;
        self.last.set(index);
        Some(slice)
    }
}

impl<M> GuestMemory for QueueMemory<'_, M>
where
    M: GuestMemory<Bitmap = ()>,
{
    type PhysicalMemory = M::PhysicalMemory;
    type Bitmap = ();

    fn check_range(&self, address: GuestAddress, count: usize, access: Permissions) -> bool {
        self.memory.check_range(address, count, access)
    }

    fn get_slices<'a>(
        &'a self,
        address: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, ()>> {
        let whole = self.in_one_region(address, count);
        let others = if whole.is_some() { None } else { Some(self.memory.get_slices(address, count, access)?) };
        Ok(Slices { whole, others })
    }

    fn physical_memory(&self) -> Option<&Self::PhysicalMemory> {
        self.memory.physical_memory()
    }
}

/// One slice, or those that the memory has.
struct Slices<'a, I> {
    whole: Option<VolatileSlice<'a>>,
    others: Option<I>,
}

impl<'a, I> Iterator for Slices<'a, I>
where
    I: GuestMemorySliceIterator<'a, ()>,
{
    type Item = Result<VolatileSlice<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        match &mut self.others {
            None => self.whole.take().map(Ok),
            Some(others) => others.next(),
        }
    }
}

impl<'a, I> FusedIterator for Slices<'a, I> where I: GuestMemorySliceIterator<'a, ()> {}

impl<'a, I> GuestMemorySliceIterator<'a, ()> for Slices<'a, I> where I: GuestMemorySliceIterator<'a, ()> {}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;
    use vm_memory::GuestMemoryMmap;

    use super::*;

    /// Two regions that touch, a hole, and one that ends shortly before the last address.
    fn memory() -> GuestMemoryMmap {
        let last = u64::MAX - 0x1fff;
        GuestMemoryMmap::from_ranges(
            &[(0x1000, 0x1000), (0x2000, 0x1000), (0x4000, 0x2000), (last, 0x1000)]
                .map(|(start, length)| (GuestAddress(start), length)),
        )
        .unwrap()
    }

    /// Where the slices of a range are, up to the first error.
    fn slices(memory: &impl GuestMemory<Bitmap = ()>, address: u64, count: usize) -> Vec<Option<(usize, usize)>> {
        let slices = memory.get_slices(GuestAddress(address), count, Permissions::Read).unwrap();
        slices.map(|slice| slice.ok().map(|slice| (slice.ptr_guard().as_ptr().addr(), slice.len()))).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn it_answers_as_the_memory_does(
            ranges in prop::collection::vec((prop_oneof![0u64..0x7000, u64::MAX - 0x2010..=u64::MAX], 0usize..0x2100), 1..20)
        ) {
            let memory = memory();
            let view = QueueMemory::new(&memory);
            prop_assert_eq!(view.regions.len(), 4);
            for (address, count) in ranges {
                prop_assert_eq!(slices(&view, address, count), slices(&memory, address, count), "{:#x}", address);
            }
        }
    }
}
