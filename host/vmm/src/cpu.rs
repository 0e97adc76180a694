//! What a vCPU is before its first instruction: identity, segments, page tables, mode.
//!
//! The guest starts in 64-bit mode with the first 4 GiB mapped to itself, in 2 MiB pages:
//!
//! ```text
//!  PML4[0] ─▶ PDPT[0..4] ─▶ 4 page directories, 512 entries each ─▶ 0, 2 MiB, 4 MiB, …
//! ```
//! That is what Linux's 64-bit boot protocol asks for (entry with the kernel in supervisor mode), and
//! it is all that the built-in guest ever needs (entry in user mode, where it stays).

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_fpu, kvm_msr_entry,
    kvm_regs, kvm_segment, kvm_sregs,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use crate::error::{Error, Result};
use crate::layout::{GDT, PAGE_TABLES};
use crate::memory::Memory;

/// The mode that the guest starts in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Privilege {
    /// Level 0, for a kernel.
    Supervisor,
    /// Level 3, for the built-in guest.
    User,
}

/// Where a guest starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) privilege: Privilege,
    /// The address of the first instruction.
    pub(crate) rip: u64,
    /// The stack pointer.
    pub(crate) rsp: u64,
    /// What register RSI holds: for Linux, the address of the boot parameters.
    pub(crate) rsi: u64,
}

// Indices of the GDT. Linux wants its code and data segments to be these two.
const GDT_CODE: u8 = 2;
const GDT_DATA: u8 = 3;
const GDT_TSS: u8 = 4;
/// A TSS descriptor takes two entries in 64-bit mode.
const GDT_LEN: u64 = 6;

const CR0_PE: u64 = 1 << 0;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of RFLAGS that is always set. Interrupts are off.
const RFLAGS: u64 = 1 << 1;

const PAGE_PRESENT: u64 = 1 << 0;
const PAGE_WRITABLE: u64 = 1 << 1;
const PAGE_USER: u64 = 1 << 2;
const PAGE_LARGE: u64 = 1 << 7;

/// CPUID for each vCPU: what KVM supports, in one socket of `vcpus` cores with
/// one thread each.
pub(crate) struct Identity {
    supported: Vec<kvm_cpuid_entry2>,
    tsc_deadline: bool,
    vcpus: u8,
}

impl Identity {
    pub(crate) fn new(kvm: &Kvm, vcpus: u8) -> Result<Self> {
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(Error::host("ask KVM for CPUID"))?;
        Ok(Self {
            supported: supported.as_slice().to_vec(),
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            vcpus,
        })
    }

    fn cpuid(&self, id: u8) -> Vec<kvm_cpuid_entry2> {
        let id = u32::from(id);
        let vcpus = u32::from(self.vcpus);
        // Bits of an APIC id that tell the cores apart.
        let core_bits = vcpus.next_power_of_two().ilog2();
        // The topology is replaced as a whole: the host's own means nothing here.
        let mut entries: Vec<_> =
            self.supported.iter().filter(|entry| !matches!(entry.function, 0xb | 0x1f)).copied().collect();
        for entry in &mut entries {
            match entry.function {
                0x1 => {
                    entry.ebx = entry.ebx & 0xffff | vcpus << 16 | id << 24;
                    entry.ecx |= 1 << 31; // there is a hypervisor
                    if self.tsc_deadline {
                        entry.ecx |= 1 << 24;
                    }
                    if vcpus > 1 {
                        entry.edx |= 1 << 28; // the count above is valid
                    }
                }
                // AMD: number of cores, bits of an APIC id; then the ids of CPU, core and node.
                0x8000_0008 => entry.ecx = entry.ecx & !0xffff | core_bits << 12 | (vcpus - 1),
                0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
                _ => {}
            }
        }
        if entries.iter().any(|entry| entry.function == 0 && entry.eax >= 0xb) {
            let levels = [(0, 0, 1, 1), (1, core_bits, vcpus, 2), (2, 0, 0, 0)];
            entries.extend(levels.map(|(index, shift, count, kind)| kvm_cpuid_entry2 {
                function: 0xb,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax: shift,
                ebx: count,
                ecx: index | kind << 8,
                edx: id,
                ..Default::default()
            }));
        }
        entries
    }

    /// Makes `vcpu` number `id` of the machine. Whether it also starts somewhere is [`start`]'s
    /// business: all but the first wait for the guest to wake them.
    pub(crate) fn apply(&self, vcpu: &VcpuFd, id: u8) -> Result<()> {
        let cpuid = CpuId::from_entries(&self.cpuid(id)).map_err(Error::host("build CPUID"))?;
        vcpu.set_cpuid2(&cpuid).map_err(Error::host("set CPUID"))?;
        // All memory is write-back unless the guest says otherwise, and string moves are fast. Not
        // every KVM knows both, and the guest runs without.
        let msrs = [(MSR_MTRR_DEF_TYPE, 1 << 11 | 6), (MSR_MISC_ENABLE, 1)];
        for (index, data) in msrs {
            let entry = kvm_msr_entry { index, data, ..Default::default() };
            let entry = Msrs::from_entries(&[entry]).map_err(Error::host("build an MSR list"))?;
            match vcpu.set_msrs(&entry) {
                Ok(1) => {}
                result => tracing::debug!(index, ?result, "KVM does not take an MSR"),
            }
        }
        set_local_interrupts(vcpu)
    }
}

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;

/// Connects LINT0 to the legacy interrupt controller and LINT1 to NMI, as firmware leaves them.
fn set_local_interrupts(vcpu: &VcpuFd) -> Result<()> {
    let mut lapic = vcpu.get_lapic().map_err(Error::host("read a local APIC"))?;
    for (lint, mode) in [(0x350, 7), (0x360, 4)] {
        // Delivery mode is bits 8 to 10, all in the register's second byte.
        if let Some(byte) = lapic.regs.get_mut(lint + 1) {
            *byte = *byte & !7 | mode;
        }
    }
    vcpu.set_lapic(&lapic).map_err(Error::host("write a local APIC"))
}

/// Makes `vcpu`, the first of the machine, start at `entry`.
pub(crate) fn start(vcpu: &VcpuFd, entry: Entry) -> Result<()> {
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(Error::host("set the FPU"))?;

    let mut sregs = vcpu.get_sregs().map_err(Error::host("read the segments"))?;
    set_long_mode(&mut sregs, entry.privilege);
    vcpu.set_sregs(&sregs).map_err(Error::host("set the segments"))?;

    let regs = kvm_regs {
        rip: entry.rip,
        rsp: entry.rsp,
        rbp: entry.rsp,
        rsi: entry.rsi,
        rflags: RFLAGS,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(Error::host("set the registers"))
}

fn set_long_mode(sregs: &mut kvm_sregs, privilege: Privilege) {
    let [_, _, code, data, tss] = segments(privilege);
    sregs.cs = code;
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = data;
    }
    sregs.tr = tss;
    sregs.gdt.base = GDT;
    sregs.gdt.limit = u16::try_from(GDT_LEN * 8 - 1).unwrap_or(u16::MAX);
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
    sregs.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT;
    sregs.efer |= EFER_LME | EFER_LMA;
}

/// The segments in the order of the GDT.
fn segments(privilege: Privilege) -> [kvm_segment; 5] {
    let dpl = match privilege {
        Privilege::Supervisor => 0,
        Privilege::User => 3,
    };
    let selector = |index: u8| u16::from(index) << 3 | u16::from(dpl);
    let flat = kvm_segment { limit: 0xffff_ffff, present: 1, dpl, s: 1, g: 1, ..Default::default() };
    let null = kvm_segment { unusable: 1, ..Default::default() };
    [
        null,
        null,
        // Code: execute, read, accessed; 64-bit.
        kvm_segment { selector: selector(GDT_CODE), type_: 0xb, l: 1, ..flat },
        // Data: read, write, accessed.
        kvm_segment { selector: selector(GDT_DATA), type_: 0x3, db: 1, ..flat },
        // A busy TSS: hardware wants one even if nobody uses it.
        kvm_segment { selector: u16::from(GDT_TSS) << 3, limit: 0x67, type_: 0xb, present: 1, ..Default::default() },
    ]
}

/// A segment as an entry of the GDT; all of ours start at 0.
fn descriptor(segment: &kvm_segment) -> u64 {
    if segment.unusable != 0 {
        return 0;
    }
    let limit = u64::from(if segment.g != 0 { segment.limit >> 12 } else { segment.limit });
    limit & 0xffff
        | u64::from(segment.type_) << 40
        | u64::from(segment.s) << 44
        | u64::from(segment.dpl) << 45
        | u64::from(segment.present) << 47
        | (limit >> 16 & 0xf) << 48
        | u64::from(segment.l) << 53
        | u64::from(segment.db) << 54
        | u64::from(segment.g) << 55
}

/// Writes the GDT and the page tables into guest memory.
pub(crate) fn write_tables(memory: &Memory, privilege: Privilege) -> Result<()> {
    let put = |address: u64, value: u64| {
        memory.write_obj(value.to_le(), GuestAddress(address)).map_err(Error::host("write the page tables"))
    };
    for (address, segment) in (GDT..).step_by(8).zip(segments(privilege)) {
        put(address, descriptor(&segment))?;
    }
    // The upper half of the TSS descriptor: address bits that are zero.
    put(GDT + (GDT_LEN - 1) * 8, 0)?;

    let flags = PAGE_PRESENT
        | PAGE_WRITABLE
        | match privilege {
            Privilege::Supervisor => 0,
            Privilege::User => PAGE_USER,
        };
    let pdpt = PAGE_TABLES + 0x1000;
    let directories = pdpt + 0x1000;
    put(PAGE_TABLES, pdpt | flags)?;
    for i in 0..4 {
        put(pdpt + i * 8, (directories + i * 0x1000) | flags)?;
    }
    for i in 0..4 * 512 {
        put(directories + i * 8, i << 21 | flags | PAGE_LARGE)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn descriptors_are_those_of_the_manual() {
        let [null, _, code, data, tss] = segments(Privilege::Supervisor).map(|segment| descriptor(&segment));
        assert_eq!(null, 0);
        assert_eq!(code, 0x00af_9b00_0000_ffff);
        assert_eq!(data, 0x00cf_9300_0000_ffff);
        assert_eq!(tss, 0x0000_8b00_0000_0067);
        let [.., code, data, _] = segments(Privilege::User).map(|segment| (segment.selector, descriptor(&segment)));
        assert_eq!(code, (0x13, 0x00af_fb00_0000_ffff));
        assert_eq!(data, (0x1b, 0x00cf_f300_0000_ffff));
    }

    #[test]
    fn every_vcpu_has_its_own_apic_id_and_one_topology() {
        let leaf = |function, eax| kvm_cpuid_entry2 { function, eax, ..Default::default() };
        let supported = vec![leaf(0, 0x1f), leaf(1, 0), leaf(0xb, 7), leaf(0xb, 7), leaf(0x1f, 7)];
        let identity = Identity { supported, tsc_deadline: true, vcpus: 3 };
        for id in 0..3 {
            let cpuid = identity.cpuid(id);
            let first = cpuid.iter().find(|entry| entry.function == 1).unwrap();
            assert_eq!(first.ebx >> 24, u32::from(id));
            assert_eq!(first.ebx >> 16 & 0xff, 3);
            assert_eq!(first.ecx, 1 << 31 | 1 << 24);
            let topology: Vec<_> =
                cpuid.iter().filter(|e| e.function == 0xb).map(|e| (e.eax, e.ebx, e.ecx, e.edx)).collect();
            let id = u32::from(id);
            assert_eq!(topology, [(0, 1, 0x100, id), (2, 3, 0x201, id), (0, 0, 2, id)]);
            assert!(cpuid.iter().all(|entry| entry.function != 0x1f));
        }
    }
}
