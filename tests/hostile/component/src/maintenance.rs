//! What changes or looks at an image as a whole: as much as there is to a raw image, and the lies about it.

use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

use blockhouse_plugin::{
    Access, BackingReference, CheckReport, Checker, Creator, Error, File, NewImage, OptionHelp, Packer, Rebaser,
    Repair, Resizer, Result, Snapshot, SnapshotEditor, Snapshots,
};

use crate::{Behaviour, Hostile, Stage};

/// The lies about a whole image, in the order of the table in the crate's documentation.
pub(crate) const NAMES: &[&str] = &["lie-resize", "lie-check", "lie-selected", "lie-snapshots"];

impl Creator for Hostile {
    fn create_options() -> Vec<OptionHelp> {
        vec![OptionHelp::new("line", "a behaviour", "ok", "What the first line of the image says.")]
    }

    fn create(image: File, new: NewImage) -> Result<()> {
        let line = new.options.iter().find(|(name, _)| name == "line").map_or("ok", |(_, line)| line);
        let mut hostile = Self::new(image, None, Access::ReadWrite, Behaviour::parse(line.as_bytes())?)?;
        hostile.act(Stage::Create)?;
        let image = hostile.image()?;
        image.set_size(new.virtual_size)?;
        image.write_at(0, line.as_bytes())?;
        image.write_at(line.len() as u64, b"\n")?;
        image.sync_data()
    }
}

impl Checker for Hostile {
    fn check(image: File, repair: Option<Repair>) -> Result<CheckReport> {
        let behaviour = Behaviour::of(&image)?;
        let access = if repair.is_some() { Access::ReadWrite } else { Access::ReadOnly };
        let mut hostile = Self::new(image, None, access, behaviour)?;
        hostile.act(Stage::Check)?;
        let corruptions_repaired = u64::from(hostile.behaviour.name == "lie-check");
        Ok(CheckReport { corruptions_repaired, ..CheckReport::default() })
    }
}

impl Resizer for Hostile {
    fn resize(&mut self, virtual_size: u64, _hide_backing: bool) -> Result<()> {
        self.act(Stage::Resize)?;
        if self.behaviour.name == "lie-resize" {
            return Ok(());
        }
        self.image()?.set_size(virtual_size)?;
        self.image()?.sync_data()
    }
}

impl Rebaser for Hostile {
    fn set_backing(&mut self, backing: Option<BackingReference>) -> Result<()> {
        self.act(Stage::SetBacking)?;
        backing.map_or(Ok(()), |_| Err(Error::unsupported("the first line says what is below")))
    }
}

impl Snapshots for Hostile {
    fn list_snapshots(&mut self) -> Result<Vec<Snapshot>> {
        self.act(Stage::ListSnapshots)?;
        if self.behaviour.name != "lie-snapshots" {
            return Ok(Vec::new());
        }
        let snapshot = Snapshot {
            id: "1".to_string(),
            name: String::new(),
            virtual_size: self.virtual_size,
            vm_state_size: 0,
            created_at: 0,
        };
        Ok(vec![snapshot; usize::try_from(self.behaviour.number(0, 70_000)?).unwrap_or(usize::MAX)])
    }

    fn select_snapshot(&mut self, _id: &str) -> Result<u64> {
        self.act(Stage::SelectSnapshot)?;
        if self.behaviour.name == "lie-selected" { self.behaviour.number(0, 513) } else { Ok(self.virtual_size) }
    }
}

/// One that keeps nothing.
impl SnapshotEditor for Hostile {
    fn create_snapshot(&mut self, _name: &str, _seconds: u64, _nanoseconds: u32) -> Result<String> {
        self.act(Stage::CreateSnapshot)?;
        Err(Error::unsupported("nothing is kept"))
    }

    fn apply_snapshot(&mut self, _id: &str) -> Result<()> {
        self.act(Stage::ApplySnapshot)?;
        Err(Error::unsupported("nothing was kept"))
    }

    fn delete_snapshot(&mut self, _id: &str) -> Result<()> {
        self.act(Stage::DeleteSnapshot)?;
        Err(Error::unsupported("nothing was kept"))
    }
}

impl Packer for Hostile {
    fn pack(&mut self, _offset: u64, _bytes: &[u8]) -> Result<bool> {
        self.act(Stage::Pack)?;
        // It does not get smaller.
        Ok(false)
    }
}
