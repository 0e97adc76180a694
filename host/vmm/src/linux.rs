//! A Linux kernel: a bzImage or an ELF `vmlinux`, its initramfs, its command line.
//!
//! The kernel is entered in 64-bit mode with the address of the boot parameters in RSI, as
//! `Documentation/arch/x86/boot.rst` of Linux describes it.

use std::fs::File;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress};

use crate::acpi;
use crate::cpu::{Entry, Privilege};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::{ACPI, BOOT_PARAMS, BOOT_STACK, CMDLINE, HIMEM, HOLE_START, LOW_RAM_END, RESET_VECTOR};
use crate::memory::{self, Memory};
use crate::power::RESET_CODE;

/// The 64-bit entry point of a bzImage, behind the 32-bit one.
const ENTRY_64: u64 = 0x200;

/// The kernel has a 64-bit entry point (`XLF_KERNEL_64`).
const XLF_KERNEL_64: u16 = 1 << 0;

/// "A boot loader without a number of its own."
const LOADER_OTHER: u8 = 0xff;

/// What is said of an ELF kernel, which has no header of its own: "HdrS", and the magic of a boot
/// sector.
const HEADER_MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;

/// The longest command line, without its NUL, where the kernel does not say.
const CMDLINE_MAX: u32 = 2047;

/// The highest address of an initramfs, where the kernel does not say.
const INITRD_ADDR_MAX: u32 = 0x37ff_ffff;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// What to boot.
pub(crate) struct Linux<'a> {
    pub(crate) kernel: &'a Path,
    pub(crate) initramfs: Option<&'a PathBuf>,
    pub(crate) cmdline: &'a str,
}

/// A kernel in memory.
struct Kernel {
    header: setup_header,
    entry: u64,
    /// The end of the memory that it needs before it can look at its memory map.
    end: u64,
}

/// Puts everything into memory.
pub(crate) fn load(memory: &Memory, bytes: u64, vcpus: u8, disks: usize, linux: &Linux<'_>) -> Result<Entry> {
    let low = bytes.min(HOLE_START);
    let kernel = load_kernel(memory, linux.kernel)?;
    if kernel.end > low {
        return Err(too_large(linux.kernel, kernel.end, low));
    }
    let mut header = kernel.header;
    header.type_of_loader = LOADER_OTHER;

    let limit = if header.cmdline_size == 0 { CMDLINE_MAX } else { header.cmdline_size };
    write_cmdline(memory, linux.cmdline, limit)?;
    header.cmd_line_ptr = u32::try_from(CMDLINE).unwrap_or(0);

    if let Some(path) = linux.initramfs {
        let highest = if header.initrd_addr_max == 0 { INITRD_ADDR_MAX } else { header.initrd_addr_max };
        let end = low.min(u64::from(highest) + 1);
        (header.ramdisk_image, header.ramdisk_size) = load_initramfs(memory, path, kernel.end, end)?;
    }

    let mut params = boot_params { hdr: header, ..Default::default() };
    params.acpi_rsdp_addr = acpi::write(memory, vcpus, disks)?;
    let map = memory_map(bytes);
    for (to, from) in params.e820_table.iter_mut().zip(&map) {
        *to = *from;
    }
    params.e820_entries = u8::try_from(map.len()).unwrap_or(0);
    let reset = GuestAddress(RESET_VECTOR);
    memory.write_slice(&RESET_CODE, reset).map_err(Error::host("write what resets the machine"))?;
    memory.write_obj(params, GuestAddress(BOOT_PARAMS)).map_err(Error::host("write the boot parameters"))?;

    Ok(Entry { privilege: Privilege::Supervisor, rip: kernel.entry, rsp: BOOT_STACK, rsi: BOOT_PARAMS })
}

/// A kernel would crash before it can say anything if there is less memory than it needs to unpack itself.
fn too_large(path: &Path, end: u64, low: u64) -> Error {
    let (needed, name) = (end.div_ceil(1 << 20), path.display());
    let advice = if end > HOLE_START { "pass another one" } else { "add memory" };
    let message = format!("kernel {name}: it needs {needed} MiB of memory, and has {}: {advice}", low >> 20);
    Error::new(ErrorKind::Payload, message)
}

/// What is memory and what is not, in ascending order.
fn memory_map(bytes: u64) -> Vec<boot_e820_entry> {
    let entry = |addr, end: u64, r#type| boot_e820_entry { addr, size: end - addr, r#type };
    let mut map = vec![entry(0, LOW_RAM_END, E820_RAM), entry(ACPI, HIMEM, E820_RESERVED)];
    for (start, len) in memory::ranges(bytes) {
        map.push(entry(start.max(HIMEM), start + len, E820_RAM));
    }
    map
}

fn load_kernel(memory: &Memory, path: &Path) -> Result<Kernel> {
    let name = path.display();
    let bad = |what: String| Error::new(ErrorKind::Payload, format!("kernel {name}: {what}"));
    let mut file = open(path, "kernel")?;
    let mut magic = [0; 4];
    file.read_exact(&mut magic)
        .and_then(|()| file.rewind())
        .map_err(|error| bad("it is too short to be a kernel".to_owned()).with_source(error))?;

    let himem = Some(GuestAddress(HIMEM));
    if magic == *b"\x7fELF" {
        let loaded = Elf::load(memory.as_ref(), None, &mut file, himem)
            .map_err(|error| bad("this ELF file cannot be loaded as a kernel".to_owned()).with_source(error))?;
        let header = setup_header { boot_flag: BOOT_FLAG, header: HEADER_MAGIC, ..Default::default() };
        return Ok(Kernel { header, entry: loaded.kernel_load.0, end: loaded.kernel_end });
    }

    let loaded = BzImage::load(memory.as_ref(), himem, &mut file, himem).map_err(|error| {
        bad("it is neither a bzImage nor an ELF file that fits into the guest's memory".to_owned()).with_source(error)
    })?;
    let header = loaded
        .setup_header
        .filter(|header| header.xloadflags & XLF_KERNEL_64 != 0)
        .ok_or_else(|| bad("this bzImage has no 64-bit entry point".to_owned()))?;
    // It unpacks itself, at its preferred address or at this one, whichever is higher.
    let start = if header.relocatable_kernel == 0 { header.pref_address } else { header.pref_address.max(HIMEM) };
    let end = start.saturating_add(header.init_size.into()).max(loaded.kernel_end);
    Ok(Kernel { header, entry: loaded.kernel_load.0 + ENTRY_64, end })
}

fn write_cmdline(memory: &Memory, cmdline: &str, limit: u32) -> Result<()> {
    let bad = |what: &str| Err(Error::new(ErrorKind::Config, format!("the kernel command line {what}")));
    if cmdline.contains('\0') {
        return bad("contains a NUL");
    }
    // The room for it ends where other things may be put one day.
    let limit = usize::try_from(limit.min(0xffff)).unwrap_or(0);
    if cmdline.len() > limit {
        return bad(&format!("has {} bytes, this kernel takes {limit}", cmdline.len()));
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    memory.write_slice(&bytes, GuestAddress(CMDLINE)).map_err(Error::host("write the kernel command line"))
}

/// Loads the initramfs between `start` and `end`, as high as possible, and returns where it is and how
/// long.
fn load_initramfs(memory: &Memory, path: &Path, start: u64, end: u64) -> Result<(u32, u32)> {
    let name = path.display();
    let bad = |what: String| Error::new(ErrorKind::Payload, format!("initramfs {name}: {what}"));
    let mut file = open(path, "initramfs")?;
    let size = file.metadata().map_err(|error| bad("its size is unknown".to_owned()).with_source(error))?.len();
    let place = end
        .checked_sub(size)
        .map(|place| place & !0xfff)
        .filter(|place| *place >= start)
        .and_then(|place| Some((u32::try_from(place).ok()?, u32::try_from(size).ok()?)));
    let Some((place, len)) = place else {
        let room = end.saturating_sub(start) >> 20;
        return Err(bad(format!("its {size} bytes do not fit beside the kernel ({room} MiB left): add memory")));
    };
    let count = usize::try_from(len).map_err(Error::host("address the initramfs"))?;
    memory
        .read_exact_volatile_from(GuestAddress(place.into()), &mut file, count)
        .map_err(|error| bad("it cannot be read".to_owned()).with_source(error))?;
    Ok((place, len))
}

/// Opens a regular file: opening anything else could wait forever or never end.
fn open(path: &Path, what: &str) -> Result<File> {
    use std::os::unix::fs::OpenOptionsExt;

    let name = path.display();
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(|error| {
        Error::new(ErrorKind::Payload, format!("{what} {name} cannot be opened")).with_source(error)
    })?;
    if file.metadata().is_ok_and(|metadata| metadata.is_file()) {
        Ok(file)
    } else {
        Err(Error::new(ErrorKind::Payload, format!("{what} {name} is not a regular file")))
    }
}

#[cfg(test)]
mod tests;
