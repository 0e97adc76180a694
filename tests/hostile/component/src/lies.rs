//! Answers that break the contract, for the host to notice.

use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

use blockhouse_plugin::{BackingReference, Extent, Fact, FileIndex, ImageInfo, Located, Placement, Result};

use crate::Hostile;

/// The lies, in the order of the table in the crate's documentation.
pub(crate) const NAMES: &[&str] = &[
    "lie-past-end",
    "lie-empty",
    "lie-zero-length",
    "lie-only-zero-length",
    "lie-wrap",
    "lie-start-after",
    "lie-start-far",
    "lie-ends-before",
    "lie-no-such-file",
    "lie-too-many",
    "lie-overwrite",
    "lie-offset",
    "lie-packed-length",
    "lie-unpack",
    "lie-changing",
    "lie-size",
    "lie-cluster-size",
    "lie-overwritable",
    "lie-backing-reported",
    "lie-backing-returned",
    "lie-facts",
    "lie-files",
    "lie-text",
];

impl Hostile {
    /// `truth`, or what the behaviour makes of it.
    pub(crate) fn lie_about(&self, truth: Located, offset: u64, max_extents: u32) -> Result<Located> {
        let behaviour = &self.behaviour;
        let Some(honest) = truth.extents.first().copied() else { return Ok(truth) };
        let with = |start, extents| Ok(Located { start, extents });
        let data =
            |file, offset, overwrite| Extent { placement: Placement::Data { file, offset, overwrite }, ..honest };
        let file = self.file.unwrap_or(FileIndex(0));
        let start = truth.start;
        match behaviour.name.as_str() {
            "lie-past-end" => {
                let length = self.virtual_size.saturating_sub(start).saturating_add(512);
                with(start, vec![Extent { length, ..honest }])
            }
            "lie-empty" => with(start, Vec::new()),
            "lie-zero-length" => with(start, vec![Extent { length: 0, ..honest }, honest]),
            "lie-only-zero-length" => {
                let count = usize::try_from(max_extents.min(64)).unwrap_or(1);
                with(start, vec![Extent { length: 0, ..honest }; count])
            }
            "lie-wrap" => {
                let long = Extent { length: 1 << 63, placement: Placement::Zero };
                with(start, vec![long, Extent { length: (1 << 63) + 512, ..honest }])
            }
            "lie-start-after" => with(offset.saturating_add(512), vec![honest]),
            "lie-start-far" => with(u64::MAX, vec![honest]),
            // Only an offset above 0 has room for it; the honest answer lets a test get that far.
            "lie-ends-before" if offset > 0 => with(0, vec![Extent { length: offset, placement: Placement::Zero }]),
            "lie-no-such-file" => {
                let index = u32::try_from(behaviour.number(0, u32::MAX.into())?).unwrap_or(u32::MAX);
                with(start, vec![data(FileIndex(index), start, false)])
            }
            "lie-too-many" => {
                let count = usize::try_from(behaviour.number(0, 100_000)?).unwrap_or(usize::MAX);
                with(start, vec![Extent { length: 1, placement: Placement::Zero }; count])
            }
            "lie-overwrite" => with(start, vec![data(file, start, true)]),
            "lie-offset" => with(start, vec![data(file, behaviour.number(0, (1 << 63) - 512)?, false)]),
            "lie-packed-length" => {
                let length = behaviour.number(0, (16 << 20) + 512)?;
                with(0, vec![Extent { length, placement: Placement::Packed { token: 0 } }])
            }
            "lie-changing" if self.calls.iter().sum::<u64>() % 2 == 0 => {
                with(start, vec![Extent { placement: Placement::Zero, ..honest }])
            }
            _ => Ok(truth),
        }
    }

    /// Lies in what `open` reports.
    pub(crate) fn lie_about_info(&self, info: &mut ImageInfo) -> Result<()> {
        let behaviour = &self.behaviour;
        let count = |default| behaviour.number(0, default);
        match behaviour.name.as_str() {
            "lie-size" => info.virtual_size = count(513)?,
            // Room for the packed extent, so that only its length is wrong.
            "lie-packed-length" => info.virtual_size = count((16 << 20) + 512)?.next_multiple_of(512),
            "lie-cluster-size" => info.cluster_size = u32::try_from(count(513)?).unwrap_or(u32::MAX),
            "lie-overwritable" => info.overwritable = true,
            "lie-backing-reported" => {
                info.backing = Some(BackingReference { name: "nothing".into(), format: Some("raw".into()) });
            }
            "lie-facts" => {
                let count = usize::try_from(count(100_000)?).unwrap_or(usize::MAX);
                info.facts = vec![Fact::new("fact", "value"); count];
            }
            "lie-files" => {
                info.files = (0..count(100_000)?).map(|number| format!("file-{number}")).collect();
            }
            "lie-text" => {
                let times = usize::try_from(count(1_000_000)? / 8).unwrap_or(usize::MAX);
                let text = "\u{1b}[31m\n\r\0".repeat(times);
                info.facts = vec![Fact::new(text.clone(), text.clone())];
                info.files = vec![text];
            }
            _ => {}
        }
        Ok(())
    }
}
