//! The component side: generated bindings, and what a `no_std` component needs to stand alone.
//!
//! The only unsafe code of the tool kit is here and in `runtime.rs`: the cell that holds the open image,
//! and the allocator's C entry point. Format crates forbid it.

#[doc(hidden)]
pub mod maintenance;

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::cell::RefCell;

use crate::file::NotShared;
use crate::{Access, Context, Error, File, FileIndex, Format, Level, Placement, Snapshots, Writer};

/// Bindings of the world `read-only-format`.
#[allow(missing_docs, unsafe_op_in_unsafe_fn, clippy::all, clippy::pedantic, clippy::restriction, unreachable_pub)]
pub mod bindings {
    wit_bindgen::generate!({
        path: "../../wit",
        world: "blockhouse:format/read-only-format",
        generate_all,
        pub_export_macro: true,
        export_macro_name: "export_reader",
        default_bindings_module: "blockhouse_plugin::wasm::bindings",
    });
}

/// Bindings of the world `snapshot-ability`.
#[allow(missing_docs, unsafe_op_in_unsafe_fn, clippy::all, clippy::pedantic, clippy::restriction, unreachable_pub)]
pub mod snapshot_bindings {
    wit_bindgen::generate!({
        path: "../../wit",
        world: "blockhouse:format/snapshot-ability",
        with: { "blockhouse:format/types@0.1.0": super::bindings::blockhouse::format::types },
        pub_export_macro: true,
        export_macro_name: "export_snapshots",
        default_bindings_module: "blockhouse_plugin::wasm::snapshot_bindings",
    });
}

/// Bindings of the world `writer-ability`.
#[allow(missing_docs, unsafe_op_in_unsafe_fn, clippy::all, clippy::pedantic, clippy::restriction, unreachable_pub)]
pub mod writer_bindings {
    wit_bindgen::generate!({
        path: "../../wit",
        world: "blockhouse:format/writer-ability",
        features: ["writer"],
        with: { "blockhouse:format/types@0.1.0": super::bindings::blockhouse::format::types },
        pub_export_macro: true,
        export_macro_name: "export_writer",
        default_bindings_module: "blockhouse_plugin::wasm::writer_bindings",
    });
}

use bindings::blockhouse::format::{files, log as host_log, types};
use bindings::exports::blockhouse::format::reader as wit;
use bindings::wasi::filesystem::types as fs;
use snapshot_bindings::exports::blockhouse::format::snapshots as wit_snapshots;
use writer_bindings::exports::blockhouse::format::writer as wit_writer;

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    log(Level::Error, &info.to_string());
    core::arch::wasm32::unreachable()
}

pub(crate) fn log(level: Level, message: &str) {
    let level = match level {
        Level::Error => host_log::Level::Error,
        Level::Warn => host_log::Level::Warn,
        Level::Info => host_log::Level::Info,
        Level::Debug => host_log::Level::Debug,
    };
    host_log::write(level, message);
}

/// Bytes that one call of `descriptor.write` is given at most.
const WRITE_PIECE: usize = 1 << 20;

/// A file behind a `wasi:filesystem` descriptor.
#[derive(Debug)]
pub struct OpenFile(fs::Descriptor);

impl OpenFile {
    pub(crate) fn descriptor(&self) -> &fs::Descriptor {
        &self.0
    }

    pub(crate) fn size(&self) -> Result<u64, &'static str> {
        files::size(&self.0).ok_or("it is not a regular file")
    }

    pub(crate) fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize, &'static str> {
        let (bytes, _end) = self.0.read(buffer.len() as u64, offset).map_err(error_name)?;
        let to = buffer.get_mut(..bytes.len()).ok_or("more bytes than asked for")?;
        to.copy_from_slice(&bytes);
        Ok(bytes.len())
    }

    pub(crate) fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<usize, &'static str> {
        // A piece at a time: what crosses into the host in one call is limited.
        let piece = bytes.get(..WRITE_PIECE).unwrap_or(bytes);
        let written = self.0.write(piece, offset).map_err(error_name)?;
        usize::try_from(written).map_err(|_| "more bytes than were given")
    }

    pub(crate) fn set_size(&self, size: u64) -> Result<(), &'static str> {
        self.0.set_size(size).map_err(error_name)
    }

    pub(crate) fn sync_data(&self) -> Result<(), &'static str> {
        self.0.sync_data().map_err(error_name)
    }

    pub(crate) fn share(&self, access: Access) -> Result<FileIndex, NotShared> {
        let access = match access {
            Access::ReadOnly => types::Access::ReadOnly,
            Access::ReadWrite => types::Access::ReadWrite,
        };
        files::share(&self.0, access).map(FileIndex).map_err(|error| match error {
            files::ShareError::NotPermitted => NotShared::Rights,
            files::ShareError::TooMany => NotShared::Host,
        })
    }
}

/// Opens an absolute path below the preopened directory that is nearest to it.
pub(crate) fn open(path: &str, access: Access) -> Result<File, &'static str> {
    let below = |directory: &str| -> Option<String> {
        let directory = directory.trim_end_matches('/');
        let rest = path.strip_prefix(directory)?.strip_prefix('/')?;
        Some(rest.to_string())
    };
    let (directory, rest) = bindings::wasi::filesystem::preopens::get_directories()
        .into_iter()
        .filter_map(|(descriptor, name)| below(&name).map(|rest| (descriptor, rest)))
        .min_by_key(|(_, rest)| rest.len())
        .ok_or("it is below no directory that was granted")?;
    let flags = match access {
        Access::ReadOnly => fs::DescriptorFlags::READ,
        Access::ReadWrite => fs::DescriptorFlags::READ | fs::DescriptorFlags::WRITE,
    };
    directory
        .open_at(fs::PathFlags::SYMLINK_FOLLOW, &rest, fs::OpenFlags::empty(), flags)
        .map(|descriptor| File(OpenFile(descriptor)))
        .map_err(error_name)
}

fn error_name(code: fs::ErrorCode) -> &'static str {
    match code {
        fs::ErrorCode::Access | fs::ErrorCode::NotPermitted => "not permitted",
        fs::ErrorCode::NoEntry => "no such file",
        fs::ErrorCode::Loop => "too many symbolic links",
        fs::ErrorCode::NameTooLong => "the name is too long",
        fs::ErrorCode::NotDirectory => "a part of the path is not a directory",
        fs::ErrorCode::IsDirectory => "it is a directory",
        fs::ErrorCode::Invalid => "invalid",
        fs::ErrorCode::Quota => "a limit was reached",
        fs::ErrorCode::Unsupported => "not supported",
        fs::ErrorCode::ReadOnly => "read-only",
        fs::ErrorCode::InsufficientSpace => "no space left on the device",
        fs::ErrorCode::FileTooLarge => "the file would be too large",
        _ => "I/O error",
    }
}

/// The one image of an instance.
pub struct Slot<F>(RefCell<Option<F>>);

// SAFETY: a component has one thread, and the host never calls it twice at a time, so nothing is
// shared between threads. Needed because a static must be Sync.
unsafe impl<F> Sync for Slot<F> {}

impl<F> Slot<F> {
    /// No image yet.
    #[allow(clippy::new_without_default)]
    pub const fn new() -> Self {
        Self(RefCell::new(None))
    }

    fn with<T>(&self, call: impl FnOnce(&mut F) -> crate::Result<T>) -> Result<T, types::Error> {
        let mut slot = self.0.borrow_mut();
        let format = slot.as_mut().ok_or_else(|| types::Error::Other("no image is open".to_string()))?;
        call(format).map_err(lower_error)
    }
}

fn lower_error(error: Error) -> types::Error {
    match error {
        Error::Corrupt(text) => types::Error::Corrupt(text),
        Error::Unsupported(text) => types::Error::Unsupported(text),
        Error::Denied(text) => types::Error::Denied(text),
        Error::Storage(text) => types::Error::Storage(text),
        Error::Other(text) => types::Error::Other(text),
    }
}

#[doc(hidden)]
pub fn reader_open<F: Format>(
    slot: &Slot<F>,
    image: fs::Descriptor,
    location: String,
    access: types::Access,
) -> Result<wit::ImageInfo, types::Error> {
    let access = match access {
        types::Access::ReadOnly => Access::ReadOnly,
        types::Access::ReadWrite => Access::ReadWrite,
    };
    let (format, info) = F::open(File(OpenFile(image)), Context::new(location), access).map_err(lower_error)?;
    *slot.0.borrow_mut() = Some(format);
    Ok(wit::ImageInfo {
        virtual_size_bytes: info.virtual_size,
        cluster_size_bytes: info.cluster_size,
        overwritable: info.overwritable,
        backing: info.backing.map(|backing| types::BackingReference { name: backing.name, format: backing.format }),
        files: info.files,
        facts: info.facts.into_iter().map(|fact| wit::Fact { name: fact.name, value: fact.value }).collect(),
    })
}

#[doc(hidden)]
pub fn reader_connect<F: Format>(slot: &Slot<F>) -> Result<Option<fs::Descriptor>, types::Error> {
    Ok(slot.with(Format::connect)?.map(|File(OpenFile(descriptor))| descriptor))
}

#[doc(hidden)]
pub fn reader_locate<F: Format>(
    slot: &Slot<F>,
    offset: u64,
    length: u64,
    max_extents: u32,
) -> Result<wit::Located, types::Error> {
    let located = slot.with(|format| format.locate(offset, length, max_extents))?;
    Ok(wit::Located {
        start_bytes: located.start,
        extents: located
            .extents
            .into_iter()
            .map(|extent| wit::Extent {
                length_bytes: extent.length,
                placement: match extent.placement {
                    Placement::Data { file, offset, overwrite } => {
                        wit::Placement::Data(wit::DataExtent { file: file.0, offset_bytes: offset, overwrite })
                    }
                    Placement::Zero => wit::Placement::Zero,
                    Placement::Unallocated => wit::Placement::Unallocated,
                    Placement::Packed { token } => wit::Placement::Packed(token),
                },
            })
            .collect(),
    })
}

#[doc(hidden)]
pub fn reader_unpack<F: Format>(slot: &Slot<F>, token: u64, length: u64) -> Result<Vec<u8>, types::Error> {
    slot.with(|format| format.unpack(token, length))
}

#[doc(hidden)]
pub fn snapshots_list<F: Snapshots>(slot: &Slot<F>) -> Result<Vec<wit_snapshots::Snapshot>, types::Error> {
    let list = slot.with(Snapshots::list_snapshots)?;
    Ok(list
        .into_iter()
        .map(|snapshot| wit_snapshots::Snapshot {
            id: snapshot.id,
            name: snapshot.name,
            virtual_size_bytes: snapshot.virtual_size,
            vm_state_bytes: snapshot.vm_state_size,
            created_at_seconds: snapshot.created_at,
        })
        .collect())
}

#[doc(hidden)]
pub fn snapshots_select<F: Snapshots>(slot: &Slot<F>, id: &str) -> Result<u64, types::Error> {
    slot.with(|format| format.select_snapshot(id))
}

#[doc(hidden)]
pub fn writer_begin<F: Writer>(slot: &Slot<F>) -> Result<(), types::Error> {
    slot.with(Writer::begin)
}

#[doc(hidden)]
pub fn writer_prepare<F: Writer>(
    slot: &Slot<F>,
    offset: u64,
    length: u64,
    max_allocations: u32,
) -> Result<Vec<wit_writer::Allocation>, types::Error> {
    let allocations = slot.with(|format| format.prepare(offset, length, max_allocations))?;
    Ok(allocations
        .into_iter()
        .map(|allocation| wit_writer::Allocation {
            start_bytes: allocation.start,
            length_bytes: allocation.length,
            file: allocation.file.0,
            offset_bytes: allocation.offset,
            zeroed: allocation.zeroed,
            ticket: allocation.ticket,
        })
        .collect())
}

#[doc(hidden)]
pub fn writer_commit<F: Writer>(slot: &Slot<F>, tickets: &[u64]) -> Result<(), types::Error> {
    slot.with(|format| format.commit(tickets))
}

#[doc(hidden)]
pub fn writer_abandon<F: Writer>(slot: &Slot<F>, tickets: &[u64]) -> Result<(), types::Error> {
    slot.with(|format| format.abandon(tickets))
}

#[doc(hidden)]
pub fn writer_zero<F: Writer>(slot: &Slot<F>, offset: u64, length: u64, keep: bool) -> Result<(), types::Error> {
    slot.with(|format| format.zero(offset, length, keep))
}

#[doc(hidden)]
pub fn writer_discard<F: Writer>(slot: &Slot<F>, offset: u64, length: u64) -> Result<(), types::Error> {
    slot.with(|format| format.discard(offset, length))
}

#[doc(hidden)]
pub fn writer_flush<F: Writer>(slot: &Slot<F>) -> Result<Vec<wit_writer::Freed>, types::Error> {
    let freed = slot.with(Writer::flush)?;
    Ok(freed
        .into_iter()
        .map(|freed| wit_writer::Freed { file: freed.file.0, offset_bytes: freed.offset, length_bytes: freed.length })
        .collect())
}

#[doc(hidden)]
pub fn writer_finish<F: Writer>(slot: &Slot<F>) -> Result<(), types::Error> {
    slot.with(Writer::finish)
}

#[doc(hidden)]
#[macro_export]
macro_rules! __export_reader {
    ($format:ident) => {
        static BLOCKHOUSE_IMAGE: $crate::wasm::Slot<$format> = $crate::wasm::Slot::new();

        const _: () = {
            use $crate::wasm::bindings::blockhouse::format::types;
            use $crate::wasm::bindings::exports::blockhouse::format::reader;
            use $crate::wasm::bindings::wasi::filesystem::types::Descriptor;

            struct Component;
            impl reader::Guest for Component {
                fn open(
                    image: Descriptor,
                    location: ::alloc::string::String,
                    access: types::Access,
                ) -> Result<reader::ImageInfo, types::Error> {
                    $crate::wasm::reader_open::<$format>(&BLOCKHOUSE_IMAGE, image, location, access)
                }
                fn connect() -> Result<Option<Descriptor>, types::Error> {
                    $crate::wasm::reader_connect::<$format>(&BLOCKHOUSE_IMAGE)
                }
                fn locate(offset: u64, length: u64, max_extents: u32) -> Result<reader::Located, types::Error> {
                    $crate::wasm::reader_locate::<$format>(&BLOCKHOUSE_IMAGE, offset, length, max_extents)
                }
                fn unpack(token: u64, length: u64) -> Result<::alloc::vec::Vec<u8>, types::Error> {
                    $crate::wasm::reader_unpack::<$format>(&BLOCKHOUSE_IMAGE, token, length)
                }
            }
    $crate::wasm::bindings::export_reader!(Component with_types_in $crate::wasm::bindings);
        };
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __export_snapshots {
    ($format:ident) => {
        const _: () = {
            use $crate::wasm::bindings::blockhouse::format::types;
            use $crate::wasm::snapshot_bindings::exports::blockhouse::format::snapshots;

            struct Component;
            impl snapshots::Guest for Component {
                fn list_snapshots() -> Result<::alloc::vec::Vec<snapshots::Snapshot>, types::Error> {
                    $crate::wasm::snapshots_list::<$format>(&BLOCKHOUSE_IMAGE)
                }
                fn select_snapshot(id: ::alloc::string::String) -> Result<u64, types::Error> {
                    $crate::wasm::snapshots_select::<$format>(&BLOCKHOUSE_IMAGE, &id)
                }
            }
    $crate::wasm::snapshot_bindings::export_snapshots!(Component with_types_in $crate::wasm::snapshot_bindings);
        };
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __export_writer {
    ($format:ident) => {
        const _: () = {
            use $crate::wasm::bindings::blockhouse::format::types;
            use $crate::wasm::writer_bindings::exports::blockhouse::format::writer;

            struct Component;
            impl writer::Guest for Component {
                fn begin() -> Result<(), types::Error> {
                    $crate::wasm::writer_begin::<$format>(&BLOCKHOUSE_IMAGE)
                }
                fn prepare(
                    offset: u64,
                    length: u64,
                    max_allocations: u32,
                ) -> Result<::alloc::vec::Vec<writer::Allocation>, types::Error> {
                    $crate::wasm::writer_prepare::<$format>(&BLOCKHOUSE_IMAGE, offset, length, max_allocations)
                }
                fn commit(tickets: ::alloc::vec::Vec<u64>) -> Result<(), types::Error> {
                    $crate::wasm::writer_commit::<$format>(&BLOCKHOUSE_IMAGE, &tickets)
                }
                fn abandon(tickets: ::alloc::vec::Vec<u64>) -> Result<(), types::Error> {
                    $crate::wasm::writer_abandon::<$format>(&BLOCKHOUSE_IMAGE, &tickets)
                }
                fn zero(offset: u64, length: u64, keep: bool) -> Result<(), types::Error> {
                    $crate::wasm::writer_zero::<$format>(&BLOCKHOUSE_IMAGE, offset, length, keep)
                }
                fn discard(offset: u64, length: u64) -> Result<(), types::Error> {
                    $crate::wasm::writer_discard::<$format>(&BLOCKHOUSE_IMAGE, offset, length)
                }
                fn flush() -> Result<::alloc::vec::Vec<writer::Freed>, types::Error> {
                    $crate::wasm::writer_flush::<$format>(&BLOCKHOUSE_IMAGE)
                }
                fn finish() -> Result<(), types::Error> {
                    $crate::wasm::writer_finish::<$format>(&BLOCKHOUSE_IMAGE)
                }
            }
    $crate::wasm::writer_bindings::export_writer!(Component with_types_in $crate::wasm::writer_bindings);
        };
    };
}
