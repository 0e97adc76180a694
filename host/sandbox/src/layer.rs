//! A component instance as a layer of a disk.

use std::sync::{Arc, PoisonError};

use blockhouse_block::{Extent, FileIndex, ImageFile, Layer, LayerInfo, LayerWriter, Located, Placement, Result};

use crate::bindings::reader::exports::blockhouse::format::reader as wit;
use crate::host::SharedFiles;
use crate::instance::Instance;

/// One image, served by one component instance.
pub(crate) struct ComponentLayer {
    pub(crate) info: LayerInfo,
    pub(crate) instance: Instance,
    pub(crate) shared: SharedFiles,
}

impl Layer for ComponentLayer {
    fn info(&self) -> &LayerInfo {
        &self.info
    }

    fn locate(&self, offset: u64, length: u64, max_extents: u32) -> Result<Located> {
        let located = self.instance.call("locate", |call| {
            call.format.blockhouse_format_reader().call_locate(call.store, offset, length, max_extents)
        })?;
        let extents = located
            .extents
            .into_iter()
            .map(|extent| Extent {
                length: extent.length_bytes,
                placement: match extent.placement {
                    wit::Placement::Data(data) => Placement::Data {
                        file: FileIndex(data.file),
                        offset: data.offset_bytes,
                        overwrite: data.overwrite,
                    },
                    wit::Placement::Zero => Placement::Zero,
                    wit::Placement::Unallocated => Placement::Unallocated,
                    wit::Placement::Packed(token) => Placement::Packed { token },
                },
            })
            .collect();
        Ok(Located { start: located.start_bytes, extents })
    }

    fn unpack(&self, token: u64, length: u64) -> Result<Vec<u8>> {
        let bytes = self
            .instance
            .call("unpack", |call| call.format.blockhouse_format_reader().call_unpack(call.store, token, length))?;
        if u64::try_from(bytes.len()) == Ok(length) {
            Ok(bytes)
        } else {
            Err(self.instance.condemn(&format!("`unpack` gave {} bytes for an extent of {length}", bytes.len())))
        }
    }

    fn file(&self, index: FileIndex) -> Option<Arc<ImageFile>> {
        let index = usize::try_from(index.0).ok()?;
        self.shared.lock().unwrap_or_else(PoisonError::into_inner).get(index).cloned()
    }

    fn writer(&self) -> Option<&dyn LayerWriter> {
        None
    }
}

impl std::fmt::Debug for ComponentLayer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ComponentLayer").field("info", &self.info).finish_non_exhaustive()
    }
}
