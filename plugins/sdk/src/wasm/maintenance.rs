//! Glue for the abilities that change an image as a whole: bindings of their worlds, and the functions
//! and macros that lead from an export to the trait.

use alloc::string::String;
use alloc::vec::Vec;

use super::{OpenFile, Slot, lower_error};
use crate::{BackingReference, Checker, Creator, File, NewImage, Packer, Rebaser, Repair, Resizer, SnapshotEditor};

use super::bindings::blockhouse::format::types;
use super::bindings::wasi::filesystem::types::Descriptor;
use checker_bindings::exports::blockhouse::format::checker as wit_checker;
use creator_bindings::exports::blockhouse::format::creator as wit_creator;

/// Bindings of the world `creator-ability`.
#[allow(missing_docs, unsafe_op_in_unsafe_fn, clippy::all, clippy::pedantic, clippy::restriction, unreachable_pub)]
pub mod creator_bindings {
    wit_bindgen::generate!({
        path: "../../wit",
        world: "blockhouse:format/creator-ability",
        with: {
            "blockhouse:format/types@0.1.0": super::super::bindings::blockhouse::format::types,
            "wasi:filesystem/types@0.2.6": super::super::bindings::wasi::filesystem::types,
            "wasi:io/error@0.2.6": super::super::bindings::wasi::io::error,
            "wasi:io/poll@0.2.6": super::super::bindings::wasi::io::poll,
            "wasi:io/streams@0.2.6": super::super::bindings::wasi::io::streams,
            "wasi:clocks/wall-clock@0.2.6": super::super::bindings::wasi::clocks::wall_clock,
        },
        pub_export_macro: true,
        export_macro_name: "export_creator",
        default_bindings_module: "blockhouse_plugin::wasm::maintenance::creator_bindings",
    });
}

/// Bindings of the world `checker-ability`.
#[allow(missing_docs, unsafe_op_in_unsafe_fn, clippy::all, clippy::pedantic, clippy::restriction, unreachable_pub)]
pub mod checker_bindings {
    wit_bindgen::generate!({
        path: "../../wit",
        world: "blockhouse:format/checker-ability",
        with: {
            "blockhouse:format/types@0.1.0": super::super::bindings::blockhouse::format::types,
            "wasi:filesystem/types@0.2.6": super::super::bindings::wasi::filesystem::types,
            "wasi:io/error@0.2.6": super::super::bindings::wasi::io::error,
            "wasi:io/poll@0.2.6": super::super::bindings::wasi::io::poll,
            "wasi:io/streams@0.2.6": super::super::bindings::wasi::io::streams,
            "wasi:clocks/wall-clock@0.2.6": super::super::bindings::wasi::clocks::wall_clock,
        },
        pub_export_macro: true,
        export_macro_name: "export_checker",
        default_bindings_module: "blockhouse_plugin::wasm::maintenance::checker_bindings",
    });
}

/// Bindings of the world `resizer-ability`.
#[allow(missing_docs, unsafe_op_in_unsafe_fn, clippy::all, clippy::pedantic, clippy::restriction, unreachable_pub)]
pub mod resizer_bindings {
    wit_bindgen::generate!({
        path: "../../wit",
        world: "blockhouse:format/resizer-ability",
        with: {
            "blockhouse:format/types@0.1.0": super::super::bindings::blockhouse::format::types,
        },
        pub_export_macro: true,
        export_macro_name: "export_resizer",
        default_bindings_module: "blockhouse_plugin::wasm::maintenance::resizer_bindings",
    });
}

/// Bindings of the world `rebaser-ability`.
#[allow(missing_docs, unsafe_op_in_unsafe_fn, clippy::all, clippy::pedantic, clippy::restriction, unreachable_pub)]
pub mod rebaser_bindings {
    wit_bindgen::generate!({
        path: "../../wit",
        world: "blockhouse:format/rebaser-ability",
        with: {
            "blockhouse:format/types@0.1.0": super::super::bindings::blockhouse::format::types,
        },
        pub_export_macro: true,
        export_macro_name: "export_rebaser",
        default_bindings_module: "blockhouse_plugin::wasm::maintenance::rebaser_bindings",
    });
}

/// Bindings of the world `snapshot-editor-ability`.
#[allow(missing_docs, unsafe_op_in_unsafe_fn, clippy::all, clippy::pedantic, clippy::restriction, unreachable_pub)]
pub mod snapshot_editor_bindings {
    wit_bindgen::generate!({
        path: "../../wit",
        world: "blockhouse:format/snapshot-editor-ability",
        with: {
            "blockhouse:format/types@0.1.0": super::super::bindings::blockhouse::format::types,
        },
        pub_export_macro: true,
        export_macro_name: "export_snapshot_editor",
        default_bindings_module: "blockhouse_plugin::wasm::maintenance::snapshot_editor_bindings",
    });
}

/// Bindings of the world `packer-ability`.
#[allow(missing_docs, unsafe_op_in_unsafe_fn, clippy::all, clippy::pedantic, clippy::restriction, unreachable_pub)]
pub mod packer_bindings {
    wit_bindgen::generate!({
        path: "../../wit",
        world: "blockhouse:format/packer-ability",
        with: {
            "blockhouse:format/types@0.1.0": super::super::bindings::blockhouse::format::types,
        },
        pub_export_macro: true,
        export_macro_name: "export_packer",
        default_bindings_module: "blockhouse_plugin::wasm::maintenance::packer_bindings",
    });
}

fn lift_backing(backing: types::BackingReference) -> BackingReference {
    BackingReference { name: backing.name, format: backing.format }
}

#[doc(hidden)]
pub fn create_options<F: Creator>() -> Vec<wit_creator::OptionHelp> {
    let help = F::create_options().into_iter().map(|option| wit_creator::OptionHelp {
        name: option.name,
        values: option.values,
        default: option.default,
        about: option.about,
    });
    help.collect()
}

#[doc(hidden)]
pub fn create<F: Creator>(image: Descriptor, what: wit_creator::NewImage) -> Result<(), types::Error> {
    let new = NewImage {
        virtual_size: what.virtual_size_bytes,
        backing: what.backing.map(lift_backing),
        options: what.options.into_iter().map(|option| (option.name, option.value)).collect(),
    };
    F::create(File(OpenFile(image)), new).map_err(lower_error)
}

#[doc(hidden)]
pub fn check<F: Checker>(
    image: Descriptor,
    repair: Option<wit_checker::Repair>,
) -> Result<wit_checker::CheckReport, types::Error> {
    let repair = repair.map(|repair| match repair {
        wit_checker::Repair::Leaks => Repair::Leaks,
        wit_checker::Repair::All => Repair::All,
    });
    let report = F::check(File(OpenFile(image)), repair).map_err(lower_error)?;
    Ok(wit_checker::CheckReport {
        corruptions: report.corruptions,
        leaks: report.leaks,
        corruptions_repaired: report.corruptions_repaired,
        leaks_repaired: report.leaks_repaired,
        findings: report.findings,
        total_clusters: report.total_clusters,
        allocated_clusters: report.allocated_clusters,
        compressed_clusters: report.compressed_clusters,
        image_end_bytes: report.image_end,
    })
}

#[doc(hidden)]
pub fn resize<F: Resizer>(slot: &Slot<F>, virtual_size: u64, hide_backing: bool) -> Result<(), types::Error> {
    slot.with(|format| format.resize(virtual_size, hide_backing))
}

#[doc(hidden)]
pub fn set_backing<F: Rebaser>(slot: &Slot<F>, backing: Option<types::BackingReference>) -> Result<(), types::Error> {
    slot.with(|format| format.set_backing(backing.map(lift_backing)))
}

#[doc(hidden)]
pub fn create_snapshot<F: SnapshotEditor>(
    slot: &Slot<F>,
    name: &str,
    seconds: u64,
    nanoseconds: u32,
) -> Result<String, types::Error> {
    slot.with(|format| format.create_snapshot(name, seconds, nanoseconds))
}

#[doc(hidden)]
pub fn apply_snapshot<F: SnapshotEditor>(slot: &Slot<F>, id: &str) -> Result<(), types::Error> {
    slot.with(|format| format.apply_snapshot(id))
}

#[doc(hidden)]
pub fn delete_snapshot<F: SnapshotEditor>(slot: &Slot<F>, id: &str) -> Result<(), types::Error> {
    slot.with(|format| format.delete_snapshot(id))
}

#[doc(hidden)]
pub fn pack<F: Packer>(slot: &Slot<F>, offset: u64, bytes: &[u8]) -> Result<bool, types::Error> {
    slot.with(|format| format.pack(offset, bytes))
}

#[doc(hidden)]
#[macro_export]
macro_rules! __export_creator {
    ($format:ident) => {
        const _: () = {
            use $crate::wasm::bindings::blockhouse::format::types;
            use $crate::wasm::maintenance::creator_bindings::exports::blockhouse::format::creator;

            struct Component;
            impl creator::Guest for Component {
                fn create_options() -> ::alloc::vec::Vec<creator::OptionHelp> {
                    $crate::wasm::maintenance::create_options::<$format>()
                }
                fn create(image: $crate::wasm::bindings::wasi::filesystem::types::Descriptor, what: creator::NewImage) -> Result<(), types::Error> {
                    $crate::wasm::maintenance::create::<$format>(image, what)
                }
            }
    $crate::wasm::maintenance::creator_bindings::export_creator!(Component with_types_in $crate::wasm::maintenance::creator_bindings);
        };
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __export_checker {
    ($format:ident) => {
        const _: () = {
            use $crate::wasm::bindings::blockhouse::format::types;
            use $crate::wasm::maintenance::checker_bindings::exports::blockhouse::format::checker;

            struct Component;
            impl checker::Guest for Component {
                fn check(
                    image: $crate::wasm::bindings::wasi::filesystem::types::Descriptor,
                    repair: Option<checker::Repair>,
                ) -> Result<checker::CheckReport, types::Error> {
                    $crate::wasm::maintenance::check::<$format>(image, repair)
                }
            }
    $crate::wasm::maintenance::checker_bindings::export_checker!(Component with_types_in $crate::wasm::maintenance::checker_bindings);
        };
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __export_resizer {
    ($format:ident) => {
        const _: () = {
            use $crate::wasm::bindings::blockhouse::format::types;
            use $crate::wasm::maintenance::resizer_bindings::exports::blockhouse::format::resizer;

            struct Component;
            impl resizer::Guest for Component {
                fn resize(virtual_size: u64, hide_backing: bool) -> Result<(), types::Error> {
                    $crate::wasm::maintenance::resize::<$format>(&BLOCKHOUSE_IMAGE, virtual_size, hide_backing)
                }
            }
    $crate::wasm::maintenance::resizer_bindings::export_resizer!(Component with_types_in $crate::wasm::maintenance::resizer_bindings);
        };
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __export_rebaser {
    ($format:ident) => {
        const _: () = {
            use $crate::wasm::bindings::blockhouse::format::types;
            use $crate::wasm::maintenance::rebaser_bindings::exports::blockhouse::format::rebaser;

            struct Component;
            impl rebaser::Guest for Component {
                fn set_backing(backing: Option<types::BackingReference>) -> Result<(), types::Error> {
                    $crate::wasm::maintenance::set_backing::<$format>(&BLOCKHOUSE_IMAGE, backing)
                }
            }
    $crate::wasm::maintenance::rebaser_bindings::export_rebaser!(Component with_types_in $crate::wasm::maintenance::rebaser_bindings);
        };
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __export_snapshot_editor {
    ($format:ident) => {
        const _: () = {
            use $crate::wasm::bindings::blockhouse::format::types;
            use $crate::wasm::maintenance::snapshot_editor_bindings::exports::blockhouse::format::snapshot_editor;

            struct Component;
            impl snapshot_editor::Guest for Component {
                fn create_snapshot(
                    name: ::alloc::string::String,
                    seconds: u64,
                    nanoseconds: u32,
                ) -> Result<::alloc::string::String, types::Error> {
                    $crate::wasm::maintenance::create_snapshot::<$format>(&BLOCKHOUSE_IMAGE, &name, seconds, nanoseconds)
                }
                fn apply_snapshot(id: ::alloc::string::String) -> Result<(), types::Error> {
                    $crate::wasm::maintenance::apply_snapshot::<$format>(&BLOCKHOUSE_IMAGE, &id)
                }
                fn delete_snapshot(id: ::alloc::string::String) -> Result<(), types::Error> {
                    $crate::wasm::maintenance::delete_snapshot::<$format>(&BLOCKHOUSE_IMAGE, &id)
                }
            }
    $crate::wasm::maintenance::snapshot_editor_bindings::export_snapshot_editor!(Component with_types_in $crate::wasm::maintenance::snapshot_editor_bindings);
        };
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __export_packer {
    ($format:ident) => {
        const _: () = {
            use $crate::wasm::bindings::blockhouse::format::types;
            use $crate::wasm::maintenance::packer_bindings::exports::blockhouse::format::packer;

            struct Component;
            impl packer::Guest for Component {
                fn pack(offset: u64, bytes: ::alloc::vec::Vec<u8>) -> Result<bool, types::Error> {
                    $crate::wasm::maintenance::pack::<$format>(&BLOCKHOUSE_IMAGE, offset, &bytes)
                }
            }
    $crate::wasm::maintenance::packer_bindings::export_packer!(Component with_types_in $crate::wasm::maintenance::packer_bindings);
        };
    };
}
