//! Image formats, each by its magic and a field or two that must agree with it.
//!
//! Sources: QEMU's docs/interop (qcow2, qed, parallels), VMware's Virtual Disk Format 5.0, Microsoft's
//! VHD and \[MS-VHDX\], the LUKS on-disk formats 1 and 2, and the headers that the tools of the other
//! formats write.

use alloc::format;
use alloc::string::ToString;

use super::{File, Guess, MAGIC_ONLY, guess};

type Recogniser = fn(&File<'_>) -> Option<Guess>;

/// In the order in which equally sure guesses are listed.
pub(crate) const ALL: &[Recogniser] = &[
    qcow2,
    qcow,
    vmdk_sparse,
    vmdk_descriptor,
    vmdk_cowd,
    vmdk_sesparse,
    vhdx,
    vpc,
    vdi,
    qed,
    parallels,
    luks,
    dmg,
    bochs,
    cloop,
];

const QFI: &[u8] = b"QFI\xfb";

fn qcow2(file: &File<'_>) -> Option<Guess> {
    let version = file.be_u32(4);
    if !file.has(0, QFI) || version == 1 {
        return None;
    }
    let cluster_bits = file.be_u32(20);
    let agrees = matches!(version, 2 | 3) && (9..=21).contains(&cluster_bits);
    guess("qcow2", format!("magic QFI\\xfb at 0, version {version}, cluster bits {cluster_bits}"), agrees)
}

fn qcow(file: &File<'_>) -> Option<Guess> {
    if !file.has(0, QFI) || file.be_u32(4) != 1 {
        return None;
    }
    let cluster_bits = file.u8(32);
    guess(
        "qcow",
        format!("magic QFI\\xfb at 0, version 1, cluster bits {cluster_bits}"),
        (9..=16).contains(&cluster_bits),
    )
}

fn vmdk_sparse(file: &File<'_>) -> Option<Guess> {
    if !file.has(0, b"KDMV") {
        return None;
    }
    let (version, grain) = (file.le_u32(4), file.le_u64(20));
    let agrees = (1..=3).contains(&version) && grain.is_power_of_two();
    guess("vmdk", format!("magic KDMV at 0, version {version}, grains of {grain} sectors"), agrees)
}

fn vmdk_descriptor(file: &File<'_>) -> Option<Guess> {
    const TITLE: &[u8] = b"# disk descriptorfile";
    // A descriptor inside a sparse file is at sector 1 and is no evidence of its own.
    let text = file.at(0, 4096);
    let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
    let title = text.get(..TITLE.len()).is_some_and(|start| start.eq_ignore_ascii_case(TITLE));
    let has_type = text.split(|byte| *byte == b'\n').any(|line| line.starts_with(b"createType="));
    match (title, has_type) {
        (false, false) => None,
        (true, agrees) => guess("vmdk", "a text that starts with `# Disk DescriptorFile`".to_string(), agrees),
        (false, true) => guess("vmdk", "a text with a line `createType=`".to_string(), false),
    }
}

fn vmdk_cowd(file: &File<'_>) -> Option<Guess> {
    let version = file.le_u32(4);
    if !file.has(0, b"COWD") {
        return None;
    }
    guess("vmdk", format!("magic COWD at 0, version {version} (ESX Server sparse file)"), version == 1)
}

fn vmdk_sesparse(file: &File<'_>) -> Option<Guess> {
    if file.le_u64(0) != 0xcafe_babe {
        return None;
    }
    let version = file.le_u64(8);
    let agrees = version == 0x2_0000_0001;
    guess("vmdk", format!("magic 0xcafebabe at 0, version {version:#x} (ESXi seSparse file)"), agrees)
}

fn vhdx(file: &File<'_>) -> Option<Guess> {
    if !file.has(0, b"vhdxfile") {
        return None;
    }
    // Two headers and two region tables of 64 KiB each follow, and no field of theirs is in the head.
    guess("vhdx", "signature vhdxfile at 0".to_string(), file.size >= 1 << 20)
}

/// A fixed VHD is a raw disk with a footer; a dynamic one has a copy of the footer at the start.
fn vpc(file: &File<'_>) -> Option<Guess> {
    const COOKIE: &[u8] = b"conectix";
    let end = file.last(512);
    // Virtual PC before 2004 wrote a footer of 511 bytes.
    let old_end = file.last(511);
    let (place, footer) = if end.starts_with(COOKIE) {
        ("in the last 512 bytes", end)
    } else if old_end.starts_with(COOKIE) {
        ("in the last 511 bytes", old_end)
    } else if file.has(0, COOKIE) {
        ("at 0", file.at(0, 512))
    } else {
        return None;
    };
    let both = if place != "at 0" && file.has(0, COOKIE) { " and at 0" } else { "" };
    let sum = footer.iter().enumerate().filter(|(at, _)| !(64..68).contains(at));
    let sum = !sum.fold(0u32, |sum, (_, byte)| sum.wrapping_add(u32::from(*byte)));
    let agrees = footer.get(64..68) == Some(&sum.to_be_bytes()[..]);
    let checksum = if agrees { "right" } else { "wrong" };
    guess("vpc", format!("cookie conectix {place}{both}, checksum {checksum}"), agrees)
}

fn vdi(file: &File<'_>) -> Option<Guess> {
    let signature = file.le_u32(64);
    if signature != 0xbeda_107f {
        return None;
    }
    guess("vdi", format!("signature {signature:#x} at 64"), file.has(0, b"<<< "))
}

fn qed(file: &File<'_>) -> Option<Guess> {
    if !file.has(0, b"QED\0") {
        return None;
    }
    let cluster_size = file.le_u32(4);
    guess("qed", format!("magic QED at 0, clusters of {cluster_size} bytes"), cluster_size.is_power_of_two())
}

fn parallels(file: &File<'_>) -> Option<Guess> {
    let magic = [&b"WithoutFreeSpace"[..], b"WithouFreSpacExt"].into_iter().find(|magic| file.has(0, magic))?;
    let version = file.le_u32(16);
    guess(
        "parallels",
        format!("magic {} at 0, version {version}", alloc::string::String::from_utf8_lossy(magic)),
        version == 2,
    )
}

fn luks(file: &File<'_>) -> Option<Guess> {
    if !file.has(0, b"LUKS\xba\xbe") {
        return None;
    }
    let version = file.be_u16(6);
    guess("luks", format!("magic LUKS at 0, version {version}"), matches!(version, 1 | 2))
}

fn dmg(file: &File<'_>) -> Option<Guess> {
    let trailer = file.last(512);
    if !trailer.starts_with(b"koly") {
        return None;
    }
    let agrees = trailer.get(4..12) == Some(&[0, 0, 0, 4, 0, 0, 2, 0][..]);
    guess("dmg", "magic koly in the last 512 bytes".to_string(), agrees)
}

fn bochs(file: &File<'_>) -> Option<Guess> {
    if !file.has(0, b"Bochs Virtual HD Image\0") {
        return None;
    }
    guess("bochs", "magic `Bochs Virtual HD Image` at 0".to_string(), file.has(32, b"Redolog\0"))
}

fn cloop(file: &File<'_>) -> Option<Guess> {
    if !file.has(0, b"#!/bin/sh\n#V2.0 Format\n") {
        return None;
    }
    // Any shell script could start so.
    Some(Guess {
        format: "cloop",
        evidence: "a script that starts with `#V2.0 Format`".to_string(),
        confidence: MAGIC_ONLY,
    })
}
