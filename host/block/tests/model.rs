//! Random chains of random layers against a flat model of their bytes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)]

mod support;

use std::sync::Arc;
use std::thread;

use blockhouse_block::{Access, BlockBackend, Disk, DiskOptions, EXTENT_BYTES, Layer, RunKind};
use proptest::prelude::*;
use support::{Script, data, file, packed, pattern, read_pieces, unallocated, zero};

/// An extent as a plan: kind, sectors, and where in the file.
type Plan = (u8, u64, u64);

fn layer_plan() -> impl Strategy<Value = (Vec<Plan>, usize)> {
    (prop::collection::vec((0u8..5, 1u64..40, 0u64..60_000), 1..24), 1usize..6)
}

/// Builds the chain, and the bytes that it must show.
fn build(plans: &[(Vec<Plan>, usize)]) -> (Vec<Arc<dyn Layer>>, Vec<u8>) {
    let mut below: Vec<u8> = Vec::new();
    let mut layers: Vec<Arc<dyn Layer>> = Vec::new();
    for (number, (plan, per_answer)) in plans.iter().enumerate().rev() {
        let bytes = pattern(50_000, number as u64);
        let (mut extents, mut units, mut shown) = (Vec::new(), Vec::new(), Vec::new());
        for (index, &(kind, sectors, offset)) in plan.iter().enumerate() {
            let (length, start) = (sectors * 512, shown.len());
            let end = start + length as usize;
            match kind {
                0 => {
                    extents.push(zero(length));
                    shown.resize(end, 0);
                }
                1 => {
                    extents.push(packed(length, index as u64));
                    let unit = pattern(length as usize, 1000 + index as u64 + 31 * number as u64);
                    shown.extend_from_slice(&unit);
                    units.push((index as u64, unit));
                }
                2 => {
                    extents.push(data(length, offset));
                    let from = |at| bytes.get(offset as usize + at).copied().unwrap_or(0);
                    shown.extend((0..length as usize).map(from));
                }
                _ => {
                    extents.push(unallocated(length));
                    shown.extend((start..end).map(|at| below.get(at).copied().unwrap_or(0)));
                }
            }
        }
        let layer = Script::honest(extents, *per_answer).file(file(&bytes, Access::ReadOnly).0);
        layers.push(Arc::new(units.into_iter().fold(layer, |layer, (token, unit)| layer.unit(token, unit))));
        below = shown;
    }
    layers.reverse();
    (layers, below)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn reads_equal_the_model(
        plans in prop::collection::vec(layer_plan(), 1..6),
        map_extents in prop::sample::select(vec![0usize, 1, 2, 3, 5, 20, 10_000]),
        unpacked in prop::sample::select(vec![0usize, 600, 20_000, 1 << 20]),
        requests in prop::collection::vec((any::<u64>(), 0usize..30_000, 1usize..5000), 1..30),
    ) {
        let (layers, model) = build(&plans);
        let options = DiskOptions {
            writable: false,
            extent_map_bytes: map_extents * EXTENT_BYTES,
            unpacked_cache_bytes: unpacked,
            ..DiskOptions::default()
        };
        let disk = Disk::new(layers, options).unwrap();
        prop_assert_eq!(disk.capacity(), model.len() as u64);
        for (at, length, pieces) in requests {
            let start = (at % model.len() as u64) as usize;
            let length = length.min(model.len() - start);
            let found = read_pieces(&disk, start as u64, length, pieces).unwrap();
            prop_assert!(found == model[start..start + length], "{} bytes at {} differ", length, start);
            let stats = disk.map_stats();
            prop_assert!(stats.extents <= stats.max_extents, "{:?}", stats);
            prop_assert!(disk.unpacked_bytes() <= unpacked);
        }
    }

    #[test]
    fn runs_cover_the_disk_and_agree_with_the_model(plans in prop::collection::vec(layer_plan(), 1..6)) {
        let (layers, model) = build(&plans);
        let disk = Disk::new(layers, DiskOptions::default()).unwrap();
        let mut at = 0;
        for run in disk.runs() {
            let run = run.unwrap();
            prop_assert_eq!(run.start, at);
            prop_assert!(run.length > 0);
            prop_assert!(usize::from(run.depth) < plans.len());
            let range = at as usize..(at + run.length) as usize;
            if matches!(run.kind, RunKind::Zero | RunKind::Unallocated) {
                prop_assert!(model[range].iter().all(|byte| *byte == 0));
            }
            at += run.length;
        }
        prop_assert_eq!(at, model.len() as u64);
    }

    #[test]
    fn readers_at_the_same_time_see_the_model(
        plans in prop::collection::vec(layer_plan(), 1..5),
        map_extents in 1usize..8,
    ) {
        let (layers, model) = build(&plans);
        let options = DiskOptions {
            writable: false,
            extent_map_bytes: map_extents * EXTENT_BYTES,
            unpacked_cache_bytes: 10_000,
            ..DiskOptions::default()
        };
        let disk = Disk::new(layers, options).unwrap();
        thread::scope(|scope| {
            for reader in 0..4usize {
                let (disk, model) = (&disk, &model);
                scope.spawn(move || {
                    for step in 0..20usize {
                        let start = (reader * 7919 + step * 104_729) % model.len();
                        let length = 5000.min(model.len() - start);
                        let found = read_pieces(disk, start as u64, length, 1000).unwrap();
                        assert!(found == model[start..start + length], "{length} bytes at {start} differ");
                    }
                });
            }
        });
    }
}
