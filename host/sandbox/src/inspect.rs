//! What a component could do, judged by its imports and exports without running it.

use std::collections::BTreeSet;

use serde::Serialize;

use crate::authority::{Authority, CONTRACT_VERSION, FUNCTIONS, WASI_VERSION, level_of};
use crate::surface::{Import, Item, Surface};
use crate::text::clean;

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
    /// Why it is not loaded, if it fits no world.
    pub(crate) fn refusal(&self) -> Option<String> {
        if self.world.is_some() {
            return None;
        }
        Some(if self.outside.is_empty() {
            format!(
                "it exports neither blockhouse:format/reader nor blockhouse:format/prober of contract \
                 {CONTRACT_VERSION}; it exports: {}",
                first(&self.exports)
            )
        } else {
            format!("it imports what no world offers, and is not loaded: {}", first(&self.outside))
        })
    }

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

/// How many names a message has of a list that is as long as a stranger makes it, and how many bytes of each.
const NAMED: usize = 16;
const NAME_SHOWN: usize = 160;

/// The first names of a list, fit for a message: `a, b, and 984 more`.
fn first(names: &[String]) -> String {
    if names.is_empty() {
        return "nothing".to_owned();
    }
    let mut shown: Vec<String> = names.iter().take(NAMED).map(|name| clean(name, NAME_SHOWN)).collect();
    let more = names.len().saturating_sub(NAMED);
    if more > 0 {
        shown.push(format!("and {more} more"));
    }
    shown.join(", ")
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

/// Judges a component by its surface.
pub(crate) fn inspect(surface: Surface, sha256: String, size_bytes: usize) -> Inspection {
    let Surface { imports: imported, exports } = surface;
    let mut imports = Vec::new();
    let mut type_only = Vec::new();
    let mut outside = Vec::new();
    let mut contract = None;
    let mut level = Authority::Prober;
    for (name, import) in imported {
        let (interface, version) = split(&name);
        if interface.starts_with("blockhouse:format/") {
            contract = version.map(str::to_owned);
        }
        let offered = if interface.starts_with("blockhouse:format/") { CONTRACT_VERSION } else { WASI_VERSION };
        let known_version = version.is_some_and(|version| compatible(offered, version));
        let mut functions = Vec::new();
        match import {
            Import::Interface(items) => {
                for (function, item) in items {
                    match item {
                        Item::Function => functions.push(function),
                        // A handle type by itself allows nothing but dropping it, and interfaces name
                        // those of others; one of an interface that no world has is outside.
                        Item::Resource if !is_known(interface) => functions.push(format!("[resource-drop]{function}")),
                        Item::Resource | Item::Type => {}
                        Item::Other => functions.push(format!("[item]{function}")),
                    }
                }
                if functions.is_empty() {
                    type_only.push(name.clone());
                }
            }
            Import::Type => type_only.push(name.clone()),
            // No world has them.
            Import::Other => outside.push(name.clone()),
        }
        for function in functions {
            let needs = if known_version { level_of(interface, &function) } else { None };
            match needs {
                Some(needs) => level = level.max(needs),
                None => outside.push(format!("{name} {function}")),
            }
            imports.push(ImportedFunction { interface: name.clone(), function, level: needs });
        }
    }
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
