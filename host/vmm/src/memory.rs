//! Guest memory, with the hole below 4 GiB where devices are.

use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::error::{Error, ErrorKind, Result};
use crate::layout::{HOLE_END, HOLE_START, MAX_MEMORY, MIN_MEMORY};

/// The guest's memory. Devices and workers share it.
pub(crate) type Memory = Arc<GuestMemoryMmap>;

/// The ranges of guest memory for `bytes` in all, as (start, length).
pub(crate) fn ranges(bytes: u64) -> Vec<(u64, u64)> {
    let low = bytes.min(HOLE_START);
    let mut ranges = vec![(0, low)];
    if bytes > low {
        ranges.push((HOLE_END, bytes - low));
    }
    ranges
}

/// Allocates `bytes` of guest memory, whole MiB, rounded down. The host spends a page when the guest
/// first touches it.
pub(crate) fn allocate(bytes: u64) -> Result<Memory> {
    if !(MIN_MEMORY..=MAX_MEMORY).contains(&bytes) {
        let message = format!(
            "a machine cannot have {bytes} bytes of memory: ask for {} MiB to {} MiB",
            MIN_MEMORY >> 20,
            MAX_MEMORY >> 20
        );
        return Err(Error::new(ErrorKind::Config, message));
    }
    let bytes = bytes & !((1 << 20) - 1);
    let ranges = ranges(bytes)
        .into_iter()
        .map(|(start, len)| Ok((GuestAddress(start), usize::try_from(len)?)))
        .collect::<Result<Vec<_>, std::num::TryFromIntError>>()
        .map_err(Error::host("address the guest's memory"))?;
    let memory = GuestMemoryMmap::from_ranges(&ranges).map_err(Error::host("allocate the guest's memory"))?;
    Ok(Arc::new(memory))
}

/// Shows `memory` to the guest.
///
/// The caller keeps `memory` alive for as long as a vCPU of `vm` can run; [`Machine`](crate::Machine)
/// does, and so does every vCPU thread.
#[allow(unsafe_code, reason = "KVM takes the address of memory that it will write to")]
pub(crate) fn register(vm: &VmFd, memory: &Memory) -> Result<()> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let start = memory.get_host_address(region.start_addr()).map_err(Error::host("find the guest's memory"))?;
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: start.expose_provenance() as u64,
        };
        // SAFETY: the range is one mapping of exactly this length, owned by `memory`, which outlives
        // the vCPUs (see above), and everyone accesses it by volatile operations.
        unsafe { vm.set_user_memory_region(region) }.map_err(Error::host("give the guest its memory"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_goes_around_the_hole() {
        assert_eq!(ranges(64 << 20), [(0, 64 << 20)]);
        assert_eq!(ranges(HOLE_START), [(0, HOLE_START)]);
        assert_eq!(ranges(5 << 30), [(0, HOLE_START), (HOLE_END, 2 << 30)]);
    }

    #[test]
    fn sizes_that_no_machine_has_are_refused() {
        for bytes in [0, MIN_MEMORY - 1, MAX_MEMORY + 1, u64::MAX] {
            let kind = allocate(bytes).map(drop).map_err(|error| error.kind());
            assert_eq!(kind, Err(ErrorKind::Config), "{bytes}");
        }
    }
}
