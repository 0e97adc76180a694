//! A component instance as a layer of a disk.

use std::sync::{Arc, PoisonError};

use blockhouse_block::{
    Allocation, Error, ErrorKind, Extent, FileIndex, Freed, ImageFile, Layer, LayerInfo, LayerPacker, LayerWriter,
    Located, Placement, Result,
};
use wasmtime::Store;

use crate::bindings::packer::PackerAbility;
use crate::bindings::reader::blockhouse::format::types::Error as WitError;
use crate::bindings::reader::exports::blockhouse::format::reader as wit;
use crate::bindings::writer::WriterAbility;
use crate::bindings::writer::exports::blockhouse::format::writer as wit_writer;
use crate::host::{SharedFiles, State};
use crate::instance::Instance;

/// One image, served by one component instance.
pub(crate) struct ComponentLayer {
    pub(crate) info: LayerInfo,
    pub(crate) instance: Instance,
    pub(crate) shared: SharedFiles,
    /// The writer exports, if the image is written through them.
    pub(crate) writer: Option<WriterAbility>,
    /// The packer exports, if it has them as well.
    pub(crate) packer: Option<PackerAbility>,
}

impl ComponentLayer {
    /// Prepares the image for writing: once, before any other call of the writer.
    pub(crate) fn begin(&self) -> Result<()> {
        let Some(writer) = &self.writer else { return Err(self.not_written()) };
        // It may have to repair the image.
        self.instance.maintain("begin", |from| writer.blockhouse_format_writer().call_begin(from.store))
    }

    fn not_written(&self) -> Error {
        let why = "the image was not opened for writing by its component";
        Error::new(ErrorKind::Unsupported, why).on_image(&*self.info.name)
    }

    /// Makes one call of a writer export. `what` names it in messages: `prepare`.
    fn write<T>(
        &self,
        what: &str,
        call: impl FnOnce(&wit_writer::Guest, &mut Store<State>) -> wasmtime::Result<std::result::Result<T, WitError>>,
    ) -> Result<T> {
        let Some(writer) = &self.writer else { return Err(self.not_written()) };
        self.instance.call(what, |from| call(writer.blockhouse_format_writer(), from.store))
    }
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
        self.writer.as_ref().map(|_| self as &dyn LayerWriter)
    }

    fn packer(&self) -> Option<&dyn LayerPacker> {
        self.packer.as_ref().map(|_| self as &dyn LayerPacker)
    }
}

impl LayerPacker for ComponentLayer {
    fn pack(&self, offset: u64, bytes: &[u8]) -> Result<bool> {
        let Some(packer) = &self.packer else { return Err(self.not_written()) };
        self.instance.call("pack", |from| packer.blockhouse_format_packer().call_pack(from.store, offset, bytes))
    }
}

impl LayerWriter for ComponentLayer {
    fn prepare(&self, offset: u64, length: u64, max_allocations: u32) -> Result<Vec<Allocation>> {
        let allocations =
            self.write("prepare", |writer, store| writer.call_prepare(store, offset, length, max_allocations))?;
        if u32::try_from(allocations.len()).map_or(true, |count| count > max_allocations) {
            let why = format!("`prepare` gave {} allocations where {max_allocations} were allowed", allocations.len());
            return Err(self.instance.condemn(&why));
        }
        Ok(allocations
            .into_iter()
            .map(|allocation| Allocation {
                start: allocation.start_bytes,
                length: allocation.length_bytes,
                file: FileIndex(allocation.file),
                offset: allocation.offset_bytes,
                zeroed: allocation.zeroed,
                ticket: allocation.ticket,
            })
            .collect())
    }

    fn commit(&self, tickets: &[u64]) -> Result<()> {
        self.write("commit", |writer, store| writer.call_commit(store, tickets))
    }

    fn abandon(&self, tickets: &[u64]) -> Result<()> {
        self.write("abandon", |writer, store| writer.call_abandon(store, tickets))
    }

    fn zero(&self, offset: u64, length: u64, keep: bool) -> Result<()> {
        self.write("zero", |writer, store| writer.call_zero(store, offset, length, keep))
    }

    fn discard(&self, offset: u64, length: u64) -> Result<()> {
        self.write("discard", |writer, store| writer.call_discard(store, offset, length))
    }

    fn flush(&self) -> Result<Vec<Freed>> {
        // How many there are is bounded by what may cross into the host in one call.
        let freed = self.write("flush", |writer, store| writer.call_flush(store))?;
        Ok(freed
            .into_iter()
            .map(|freed| Freed { file: FileIndex(freed.file), offset: freed.offset_bytes, length: freed.length_bytes })
            .collect())
    }

    fn finish(&self) -> Result<()> {
        self.write("finish", |writer, store| writer.call_finish(store))
    }
}

impl std::fmt::Debug for ComponentLayer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ComponentLayer").field("info", &self.info).finish_non_exhaustive()
    }
}
