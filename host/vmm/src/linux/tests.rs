#![allow(clippy::unwrap_used)]

use std::io::Write;

use super::*;

const MEMORY: u64 = 32 << 20;

fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// A bzImage of one setup sector and `size` bytes, with a 64-bit entry point.
fn bzimage(size: usize) -> Vec<u8> {
    let mut image = vec![0; 1024 + size];
    let mut put = |offset: usize, bytes: &[u8]| {
        image.get_mut(offset..offset + bytes.len()).unwrap().copy_from_slice(bytes);
    };
    put(0x1f1, &[1]); // setup_sects
    put(0x1fe, &BOOT_FLAG.to_le_bytes());
    put(0x202, b"HdrS");
    put(0x206, &0x020f_u16.to_le_bytes());
    put(0x211, &[1]); // loadflags: loaded high
    put(0x214, &0x10_0000_u32.to_le_bytes()); // code32_start
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes()); // initrd_addr_max
    put(0x234, &[1]); // relocatable
    put(0x236, &XLF_KERNEL_64.to_le_bytes());
    put(0x238, &255_u32.to_le_bytes()); // cmdline_size
    put(0x258, &0x10_0000_u64.to_le_bytes()); // pref_address
    put(0x260, &0x10_0000_u32.to_le_bytes()); // init_size
    image
}

struct Booted {
    memory: Memory,
    entry: Entry,
}

fn boot(kernel: &[u8], initramfs: Option<&[u8]>, cmdline: &str) -> Result<Booted> {
    let kernel = file(kernel);
    let initramfs = initramfs.map(file);
    let initramfs = initramfs.as_ref().map(|file| file.path().to_owned());
    let memory = memory::allocate(MEMORY).unwrap();
    let linux = Linux { kernel: kernel.path(), initramfs: initramfs.as_ref(), cmdline };
    let entry = load(&memory, MEMORY, 2, 3, &linux)?;
    Ok(Booted { memory, entry })
}

fn failure(kernel: &[u8], initramfs: Option<&[u8]>, cmdline: &str) -> (ErrorKind, String) {
    let error = boot(kernel, initramfs, cmdline).map(|_| ()).unwrap_err();
    (error.kind(), error.to_string())
}

#[test]
fn a_bzimage_is_entered_at_its_64_bit_entry_with_everything_in_place() {
    let initramfs: Vec<u8> = (0..5000_u32).map(|i| i.to_le_bytes()[0]).collect();
    let Booted { memory, entry } = boot(&bzimage(4096), Some(&initramfs), "console=ttyS0 quiet").unwrap();
    assert_eq!(entry.privilege, Privilege::Supervisor);
    assert_eq!((entry.rip, entry.rsi), (0x10_0200, BOOT_PARAMS));

    let params: boot_params = memory.read_obj(GuestAddress(BOOT_PARAMS)).unwrap();
    let header = params.hdr;
    let (place, len) = (header.ramdisk_image, header.ramdisk_size);
    assert_eq!(u64::from(place), (MEMORY - 5000) & !0xfff);
    assert_eq!(len, 5000);
    let mut loaded = vec![0; 5000];
    memory.read_slice(&mut loaded, GuestAddress(place.into())).unwrap();
    assert_eq!(loaded, initramfs);

    let mut cmdline = [0xff; 20];
    memory.read_slice(&mut cmdline, GuestAddress(u64::from(header.cmd_line_ptr))).unwrap();
    assert_eq!(&cmdline, b"console=ttyS0 quiet\0");

    let rsdp = params.acpi_rsdp_addr;
    let mut signature = [0; 8];
    memory.read_slice(&mut signature, GuestAddress(rsdp)).unwrap();
    assert_eq!(&signature, b"RSD PTR ");
    // A guest that starts over like a PC resets the machine.
    let mut code = [0; RESET_CODE.len()];
    memory.read_slice(&mut code, GuestAddress(RESET_VECTOR)).unwrap();
    assert_eq!(code, RESET_CODE);
    let entries = params.e820_entries;
    assert_eq!(entries, 3);
}

#[test]
fn the_memory_map_leaves_out_the_hole() {
    let map: Vec<_> = memory_map(4 << 30).iter().map(|e| ({ e.addr }, { e.size }, { e.r#type })).collect();
    assert_eq!(
        map,
        [
            (0, LOW_RAM_END, E820_RAM),
            (ACPI, HIMEM - ACPI, E820_RESERVED),
            (HIMEM, HOLE_START - HIMEM, E820_RAM),
            (4 << 30, 1 << 30, E820_RAM),
        ]
    );
}

#[test]
fn what_is_no_kernel_is_refused_with_its_name() {
    let mut old = bzimage(4096);
    old.get_mut(0x236..0x238).unwrap().fill(0);
    let elf = [b"\x7fELF".as_slice(), &[0; 200]].concat();
    let large = bzimage(usize::try_from(MEMORY).unwrap());
    let cases: [(&[u8], &str); 6] = [
        (b"", "too short"),
        (b"abc", "too short"),
        (&[0; 4096], "neither a bzImage nor"),
        (&old, "no 64-bit entry"),
        (&elf, "ELF file cannot be loaded"),
        (&large, "fits into the guest's memory"),
    ];
    for (kernel, message) in cases {
        let (kind, text) = failure(kernel, None, "");
        assert_eq!(kind, ErrorKind::Payload);
        assert!(text.contains(message) && text.contains("/"), "{text}");
    }
    let every_prefix = bzimage(0);
    for len in 0..every_prefix.len() {
        // Whatever is cut off, this must come back.
        let _ = boot(every_prefix.get(..len).unwrap(), None, "");
    }
}

/// It would crash in silence.
#[test]
fn a_kernel_that_needs_more_memory_than_there_is_says_so() {
    let needs = |init_size: u64| {
        let mut kernel = bzimage(4096);
        let init_size = u32::try_from(init_size).unwrap();
        kernel.get_mut(0x260..0x264).unwrap().copy_from_slice(&init_size.to_le_bytes());
        kernel
    };
    boot(&needs(MEMORY - HIMEM), None, "").unwrap();
    let initramfs = [0; 100];
    for (init_size, initramfs, message) in [
        (MEMORY - HIMEM + 1, None, "needs 33 MiB of memory, and has 32: add memory"),
        (MEMORY - HIMEM + 1, Some(&initramfs[..]), "needs 33 MiB of memory, and has 32: add memory"),
        (HOLE_START, None, "needs 3073 MiB of memory, and has 32: pass another one"),
    ] {
        let (kind, text) = failure(&needs(init_size), initramfs, "");
        assert_eq!(kind, ErrorKind::Payload);
        assert!(text.contains(message), "{text}");
    }
}

#[test]
fn an_initramfs_that_does_not_fit_says_so() {
    let large = vec![0; usize::try_from(MEMORY).unwrap() - (1 << 20)];
    let (kind, text) = failure(&bzimage(4096), Some(&large), "");
    assert_eq!(kind, ErrorKind::Payload);
    assert!(text.contains("add memory"), "{text}");
}

#[test]
fn the_command_line_has_the_length_that_the_kernel_takes() {
    boot(&bzimage(4096), None, &"x".repeat(255)).unwrap();
    for cmdline in ["x".repeat(256), "a\0b".to_owned()] {
        assert_eq!(failure(&bzimage(4096), None, &cmdline).0, ErrorKind::Config);
    }
}

#[test]
fn special_files_are_no_kernels() {
    for path in ["/dev/zero", "/", "/nonexistent"] {
        let memory = memory::allocate(MEMORY).unwrap();
        let linux = Linux { kernel: Path::new(path), initramfs: None, cmdline: "" };
        let error = load(&memory, MEMORY, 1, 0, &linux).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Payload);
        assert!(error.to_string().contains(path), "{error}");
    }
}
