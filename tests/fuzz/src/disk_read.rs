//! A disk that is read, on layers that lie.
//!
//! Whatever they say: each byte that a read gives is one that a legal answer named, nothing is written anywhere, and
//! what is remembered stays within its bounds. While nobody lied, every read gives what the layers' plans say.

use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use arbitrary::{Result, Unstructured};
use blockhouse_block::{
    BlockBackend, Disk, DiskOptions, EXTENT_BYTES, Extent, FileIndex, Layer, LayerInfo, Placement, VolatileSlice,
};

use crate::lies::{FILE, FILES, Liar, Script, byte_of, content_of, number, places, unit};
use crate::say;

/// The largest honest disk.
const MAX_PLAN: u64 = 48 << 10;
/// The longest read.
const MAX_READ: u64 = 6 << 10;

pub(crate) fn run(data: &[u8]) {
    let _input_ends = read(&mut Unstructured::new(data));
}

fn plan(u: &mut Unstructured<'_>, depth: usize) -> Result<Vec<Extent>> {
    let mut plan = Vec::new();
    let mut length = 0;
    for _ in 0..u.int_in_range(1..=8u8)? {
        let extent = 512 * u.int_in_range(1..=16)?;
        length += extent;
        if length > MAX_PLAN {
            break;
        }
        let placement = match u.int_in_range(0..=5u8)? {
            0 => Placement::Zero,
            1 => Placement::Packed { token: u64::from(u.arbitrary::<u16>()?) + depth as u64 },
            2 | 3 => Placement::Unallocated,
            _ => Placement::Data {
                file: FileIndex(u.int_in_range(0..=FILES as u32 - 1)?),
                offset: u.int_in_range(0..=FILE)?,
                overwrite: false,
            },
        };
        plan.push(Extent { length: extent, placement });
    }
    if plan.is_empty() {
        plan.push(Extent { length: 512, placement: Placement::Zero });
    }
    Ok(plan)
}

/// What a plan shows, over what is below.
fn shown(plan: &[Extent], below: &[u8]) -> Vec<u8> {
    let mut shown: Vec<u8> = Vec::new();
    for extent in plan {
        let at = shown.len() as u64;
        match extent.placement {
            Placement::Zero => shown.resize((at + extent.length) as usize, 0),
            Placement::Unallocated => {
                shown.extend((at..at + extent.length).map(|at| below.get(at as usize).copied().unwrap_or(0)));
            }
            Placement::Packed { token } => shown.extend(unit(token, extent.length)),
            Placement::Data { file, offset, .. } => {
                shown.extend((0..extent.length).map(|at| byte_of(file.0 as usize, offset + at)));
            }
        }
    }
    shown
}

fn read(u: &mut Unstructured<'_>) -> Result<()> {
    let places = places();
    let mut model = Vec::new();
    let mut layers = Vec::new();
    for depth in 0..u.int_in_range(1..=3usize)? {
        let plan = plan(u, depth)?;
        model = shown(&plan, &model);
        let mut virtual_size = model.len() as u64;
        let mut script = Script::new(u)?;
        if u.ratio(1, 10)? {
            // The size is a claim as well.
            virtual_size = number(u)?;
            script.lied = true;
        }
        let info = LayerInfo {
            name: format!("/images/{depth}"),
            format: "lies".into(),
            virtual_size,
            cluster_size: if u.ratio(1, 10)? { u.arbitrary()? } else { *u.choose(&[0, 512, 4096, 65536])? },
            overwritable: u.arbitrary()?,
        };
        layers.push(Arc::new(Liar {
            info,
            plan,
            per_answer: u.int_in_range(1..=6)?,
            files: places.iter().map(|place| Arc::clone(&place.image)).collect(),
            script: Mutex::new(script),
            recovers: u.arbitrary()?,
        }));
    }
    layers.reverse();
    let options = DiskOptions {
        extent_map_bytes: u.int_in_range(0..=12)? * EXTENT_BYTES,
        unpacked_cache_bytes: *u.choose(&[0, 600, 9000, 1 << 20])?,
        ..DiskOptions::default()
    };
    let unpacked_cache_bytes = options.unpacked_cache_bytes;
    let lied = || layers.iter().any(|layer| layer.script().lied);
    let disk = match Disk::new(layers.iter().map(|layer| Arc::clone(layer) as Arc<dyn Layer>).collect(), options) {
        Ok(disk) => disk,
        Err(error) => {
            say!("refused: {error}");
            let strange =
                |layer: &Arc<Liar>| !(layer.info.cluster_size.is_power_of_two() || layer.info.cluster_size == 0);
            assert!(lied() || layers.iter().any(strange), "honest layers are refused: {error}");
            return Ok(());
        }
    };
    for _ in 0..12 {
        if u.is_empty() {
            break;
        }
        let offset = if u.ratio(1, 8)? { number(u)? } else { u.int_in_range(0..=disk.capacity().min(MAX_PLAN))? };
        let length = u.int_in_range(0..=MAX_READ)?;
        let pieces = u.int_in_range(1..=3000usize)?;
        let mut bytes = vec![0xee; length as usize];
        let buffers: Vec<_> = bytes.chunks_mut(pieces).map(VolatileSlice::from).collect();
        let result = disk.read(&buffers, offset);
        drop(buffers);
        say!("read {length} bytes at {offset}: {result:?}");
        let inside = offset.checked_add(length).is_some_and(|end| end <= disk.capacity());
        match result {
            Ok(()) => {
                assert!(inside, "{length} bytes at {offset} of a disk of {}", disk.capacity());
                if lied() {
                    check_origin(&layers, offset, &bytes);
                } else {
                    let at = offset as usize;
                    assert!(bytes == model[at..at + bytes.len()], "{length} bytes at {offset} differ");
                }
            }
            Err(error) => assert!(!inside || lied(), "honest layers, and: {error}"),
        }
        let stats = disk.map_stats();
        assert!(stats.extents <= stats.max_extents, "{stats:?}");
        assert!(disk.unpacked_bytes() <= unpacked_cache_bytes, "the cache of units is too large");
    }
    let mut at = 0;
    for run in disk.runs().take(64) {
        let Ok(run) = run else { break };
        assert!(run.start == at && run.length > 0, "a gap in the runs: {run:?}");
        at += run.length;
        assert!(at <= disk.capacity() && usize::from(run.depth) < layers.len(), "{run:?}");
    }
    drop(disk);
    for (number, place) in places.iter().enumerate() {
        let mut bytes = vec![0; FILE as usize + 1];
        let length = place.file.read_at(&mut bytes, 0).expect("a file in memory");
        assert!(bytes[..length] == content_of(number), "file {number} was written");
    }
    Ok(())
}

/// Each byte is one that an answer named: in this layer, or in one below where this one said so.
fn check_origin(layers: &[Arc<Liar>], offset: u64, bytes: &[u8]) {
    let end = offset + bytes.len() as u64;
    let mut possible = vec![false; bytes.len()];
    // What the layer is asked for.
    let mut asked = vec![true; bytes.len()];
    for (depth, layer) in layers.iter().enumerate() {
        let mut below = vec![false; bytes.len()];
        layer.for_each_answer(offset..end, &mut |start, length, said| {
            let start = (start - offset) as usize;
            let range = start..start + length as usize;
            match said {
                Some(said) => mark(&mut possible[range.clone()], &asked[range.clone()], &bytes[range], &said),
                None => below[range].fill(true),
            }
        });
        // Past the end of what is below, or below everything, is zero.
        let size = layers.get(depth + 1).map_or(0, |layer| layer.info.virtual_size);
        let past = size.clamp(offset, end) - offset;
        let zeroes = vec![0; bytes.len()];
        let past = past as usize..;
        for (below, asked) in below.iter_mut().zip(&asked) {
            *below &= asked;
        }
        mark(&mut possible[past.clone()], &below[past.clone()], &bytes[past.clone()], &zeroes[past]);
        asked = below;
    }
    if let Some(at) = possible.iter().position(|possible| !possible) {
        panic!("nobody said that byte {} is {:#04x}", offset + at as u64, bytes[at]);
    }
}

/// Marks the bytes that are as somebody said. By halves, because coverage makes comparing byte by byte slow.
fn mark(possible: &mut [bool], asked: &[bool], bytes: &[u8], said: &[u8]) {
    if bytes.len() <= 1 || bytes == said {
        let equal = bytes == said;
        for (possible, asked) in possible.iter_mut().zip(asked) {
            *possible |= equal & asked;
        }
        return;
    }
    let half = bytes.len() / 2;
    let (first, second) = possible.split_at_mut(half);
    mark(first, &asked[..half], &bytes[..half], &said[..half]);
    mark(second, &asked[half..], &bytes[half..], &said[half..]);
}
