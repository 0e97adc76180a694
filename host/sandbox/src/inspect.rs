//! What a component could do, read off its imports and exports without running it.

use std::collections::BTreeSet;

use serde::Serialize;
use wasmtime::Engine;
use wasmtime::component::Component;
use wasmtime::component::types::ComponentItem;

use crate::authority::{Authority, CONTRACT_VERSION, FUNCTIONS, WASI_VERSION, level_of};

/// One function that a component imports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ImportedFunction {
    /// The interface with its version: `wasi:filesystem/types@0.2.6`.
    pub interface: String,
    /// The function.
    pub function: String,
    /// The lowest level of authority that is given it; `None` if none is.
    pub level: Option<Authority>,
}

/// What a component imports and exports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Inspection {
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: String,
    /// Size of the file in bytes.
    pub size_bytes: usize,
    /// The lowest world that offers all that it imports and wants all that it exports; `None` if it
    /// fits no world.
    pub world: Option<Authority>,
    /// The version of `blockhouse:format` that it was built against.
    pub contract: Option<String>,
    /// Every imported function.
    pub imports: Vec<ImportedFunction>,
    /// Interfaces of which it imports types only, no function.
    pub type_only: Vec<String>,
    /// Every exported interface.
    pub exports: Vec<String>,
    /// Imports that no world offers, as `interface function`. Not empty means that it is not loaded.
    pub outside: Vec<String>,
}

impl Inspection {
    /// Whether it exports the interface `name` of `blockhouse:format`: `snapshots`.
    pub(crate) fn exports_ability(&self, name: &str) -> bool {
        let ability = |export: &String| {
            let (interface, version) = split(export);
            interface.strip_prefix("blockhouse:format/") == Some(name)
                && version.is_some_and(|version| compatible(CONTRACT_VERSION, version))
        };
        self.exports.iter().any(ability)
    }
}

/// Splits `wasi:filesystem/types@0.2.6` into name and version.
fn split(interface: &str) -> (&str, Option<&str>) {
    match interface.split_once('@') {
        Some((name, version)) => (name, Some(version)),
        None => (interface, None),
    }
}

/// Whether a component built against `wanted` links against `offered`: the same major version, and
/// before 1.0 the same minor version.
fn compatible(offered: &str, wanted: &str) -> bool {
    let mut offered = offered.split('.');
    let mut wanted = wanted.split('.');
    match (offered.next(), wanted.next()) {
        (Some("0"), Some("0")) => offered.next() == wanted.next(),
        (offered, wanted) => offered == wanted,
    }
}

/// Whether any world offers a function of this interface.
fn is_known(interface: &str) -> bool {
    FUNCTIONS.iter().any(|function| function.interface == interface)
}

pub(crate) fn inspect(engine: &Engine, component: &Component, sha256: String, size_bytes: usize) -> Inspection {
    let kind = component.component_type();
    let mut imports = Vec::new();
    let mut type_only = Vec::new();
    let mut outside = Vec::new();
    let mut contract = None;
    let mut level = Authority::Prober;
    for (name, item) in kind.imports(engine) {
        let (interface, version) = split(name);
        if interface.starts_with("blockhouse:format/") {
            contract = version.map(str::to_owned);
        }
        let offered = if interface.starts_with("blockhouse:format/") { CONTRACT_VERSION } else { WASI_VERSION };
        let known_version = version.is_some_and(|version| compatible(offered, version));
        let mut functions = Vec::new();
        match item.ty {
            ComponentItem::ComponentInstance(instance) => {
                for (function, item) in instance.exports(engine) {
                    match item.ty {
                        ComponentItem::ComponentFunc(_) => functions.push(function.to_owned()),
                        // A handle type by itself allows nothing but dropping it, and interfaces name
                        // those of others; one of an interface that no world has is outside.
                        ComponentItem::Resource(_) if !is_known(interface) => {
                            functions.push(format!("[resource-drop]{function}"));
                        }
                        ComponentItem::Resource(_) | ComponentItem::Type(_) => {}
                        _ => functions.push(format!("[item]{function}")),
                    }
                }
                if functions.is_empty() {
                    type_only.push(name.to_owned());
                }
            }
            ComponentItem::Type(_) => type_only.push(name.to_owned()),
            // Modules, components, functions and resources without an interface: no world has them.
            _ => outside.push(name.to_owned()),
        }
        for function in functions {
            let needs = if known_version { level_of(interface, &function) } else { None };
            match needs {
                Some(needs) => level = level.max(needs),
                None => outside.push(format!("{name} {function}")),
            }
            imports.push(ImportedFunction { interface: name.to_owned(), function, level: needs });
        }
    }
    let exports: Vec<String> = kind.exports(engine).map(|(name, _)| name.to_owned()).collect();
    let mut exported = BTreeSet::new();
    for name in &exports {
        let (interface, version) = split(name);
        if let Some(interface) = interface.strip_prefix("blockhouse:format/") {
            contract = version.map(str::to_owned);
            if version.is_some_and(|version| compatible(CONTRACT_VERSION, version)) {
                exported.insert(interface);
            }
        }
    }
    let world = if !outside.is_empty() {
        None
    } else if exported.contains("reader") {
        let level = if exported.contains("writer") { Authority::ReadWrite } else { level };
        Some(level.max(Authority::ReadOnly))
    } else if exported.contains("prober") && level == Authority::Prober {
        Some(Authority::Prober)
    } else {
        None
    };
    Inspection { sha256, size_bytes, world, contract, imports, type_only, exports, outside }
}
