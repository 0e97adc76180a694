//! Typed bindings of the contract, generated from `wit/`.

pub(crate) mod reader {
    #![allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, clippy::restriction)]
    wasmtime::component::bindgen!({
        path: "../../wit",
        world: "blockhouse:format/read-only-format",
        with: {
            "wasi:io": wasmtime_wasi::p2::bindings::io,
            "wasi:clocks": wasmtime_wasi::p2::bindings::clocks,
            "wasi:filesystem": wasmtime_wasi::p2::bindings::filesystem,
        },
        imports: { default: trappable },
        require_store_data_send: true,
    });
}

pub(crate) mod snapshots {
    #![allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, clippy::restriction)]
    wasmtime::component::bindgen!({
        path: "../../wit",
        world: "blockhouse:format/snapshot-ability",
        with: { "blockhouse:format/types@0.1.0": super::reader::blockhouse::format::types },
        require_store_data_send: true,
    });
}

pub(crate) mod writer {
    #![allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, clippy::restriction)]
    wasmtime::component::bindgen!({
        path: "../../wit",
        world: "blockhouse:format/writer-ability",
        with: { "blockhouse:format/types@0.1.0": super::reader::blockhouse::format::types },
        require_store_data_send: true,
    });
}

pub(crate) mod creator {
    #![allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, clippy::restriction)]
    wasmtime::component::bindgen!({
        path: "../../wit",
        world: "blockhouse:format/creator-ability",
        with: {
            "blockhouse:format/types@0.1.0": super::reader::blockhouse::format::types,
            "wasi:io": wasmtime_wasi::p2::bindings::io,
            "wasi:clocks": wasmtime_wasi::p2::bindings::clocks,
            "wasi:filesystem": wasmtime_wasi::p2::bindings::filesystem,
        },
        require_store_data_send: true,
    });
}

pub(crate) mod checker {
    #![allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, clippy::restriction)]
    wasmtime::component::bindgen!({
        path: "../../wit",
        world: "blockhouse:format/checker-ability",
        with: {
            "blockhouse:format/types@0.1.0": super::reader::blockhouse::format::types,
            "wasi:io": wasmtime_wasi::p2::bindings::io,
            "wasi:clocks": wasmtime_wasi::p2::bindings::clocks,
            "wasi:filesystem": wasmtime_wasi::p2::bindings::filesystem,
        },
        require_store_data_send: true,
    });
}

pub(crate) mod resizer {
    #![allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, clippy::restriction)]
    wasmtime::component::bindgen!({
        path: "../../wit",
        world: "blockhouse:format/resizer-ability",
        with: {
            "blockhouse:format/types@0.1.0": super::reader::blockhouse::format::types,
        },
        require_store_data_send: true,
    });
}

pub(crate) mod rebaser {
    #![allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, clippy::restriction)]
    wasmtime::component::bindgen!({
        path: "../../wit",
        world: "blockhouse:format/rebaser-ability",
        with: {
            "blockhouse:format/types@0.1.0": super::reader::blockhouse::format::types,
        },
        require_store_data_send: true,
    });
}

pub(crate) mod snapshot_editor {
    #![allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, clippy::restriction)]
    wasmtime::component::bindgen!({
        path: "../../wit",
        world: "blockhouse:format/snapshot-editor-ability",
        with: {
            "blockhouse:format/types@0.1.0": super::reader::blockhouse::format::types,
        },
        require_store_data_send: true,
    });
}

pub(crate) mod packer {
    #![allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, clippy::restriction)]
    wasmtime::component::bindgen!({
        path: "../../wit",
        world: "blockhouse:format/packer-ability",
        with: {
            "blockhouse:format/types@0.1.0": super::reader::blockhouse::format::types,
        },
        require_store_data_send: true,
    });
}

pub(crate) mod prober {
    #![allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, clippy::restriction)]
    wasmtime::component::bindgen!({
        path: "../../wit",
        world: "blockhouse:format/prober-only",
        require_store_data_send: true,
    });
}
