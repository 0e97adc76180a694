//! What a component could do, read off its imports and exports without running it.
//!
//! ```text
//!   bytes of a stranger ── of_bytes: nothing is compiled ──┐
//!                                                          ├──▶ Surface ──▶ inspect
//!   compiled before ────── of_component ───────────────────┘
//! ```

use std::collections::BTreeSet;

use serde::Serialize;
use wasmparser::component_types::{ComponentAnyTypeId, ComponentEntityType};
use wasmparser::{BinaryReaderError, Encoding, Parser, Payload, ValidPayload, Validator};
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

/// The names on the outside of a component, in its order.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Surface {
    imports: Vec<(String, Import)>,
    exports: Vec<String>,
}

/// What is behind an imported name.
#[derive(Debug, PartialEq, Eq)]
enum Import {
    Interface(Vec<(String, Item)>),
    Type,
    /// A module, a component, a function or a resource without an interface.
    Other,
}

/// What an imported interface has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Item {
    Function,
    Resource,
    Type,
    Other,
}

/// Why bytes have no surface.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unreadable {
    /// Malformed, or of a kind that is not known.
    #[error(transparent)]
    Bytes(#[from] BinaryReaderError),
    /// Not WebAssembly.
    #[error("it does not begin as WebAssembly does")]
    Other,
    /// WebAssembly, but not a component.
    #[error("it is a core module")]
    CoreModule,
    /// The end is missing.
    #[error("it ends too early")]
    CutOff,
}

impl Surface {
    /// Reads it off the bytes of a component. What is between imports and exports is looked at as far as they
    /// depend on it; the code of functions is not, and nothing is compiled.
    pub(crate) fn of_bytes(bytes: &[u8]) -> Result<Self, Unreadable> {
        if !bytes.starts_with(b"\0asm") {
            return Err(Unreadable::Other);
        }
        let mut validator = Validator::new();
        let (mut imports, mut exports) = (Vec::new(), Vec::new());
        let (mut depth, mut types) = (0_u32, None);
        for payload in Parser::new(0).parse_all(bytes) {
            let payload = payload?;
            match &payload {
                Payload::Version { encoding: Encoding::Module, .. } if depth == 0 => {
                    return Err(Unreadable::CoreModule);
                }
                Payload::ModuleSection { .. } | Payload::ComponentSection { .. } => depth = depth.saturating_add(1),
                Payload::ComponentImportSection(section) if depth == 0 => {
                    for import in section.clone() {
                        imports.push(import?.name.name);
                    }
                }
                Payload::ComponentExportSection(section) if depth == 0 => {
                    for export in section.clone() {
                        exports.push(export?.name.name.to_owned());
                    }
                }
                _ => {}
            }
            if let ValidPayload::End(end) = validator.payload(&payload)? {
                if depth == 0 {
                    types = Some(end);
                }
                depth = depth.saturating_sub(1);
            }
        }
        let types = types.ok_or(Unreadable::CutOff)?;
        let types = types.as_ref();
        let item = |ty: &ComponentEntityType| match ty {
            ComponentEntityType::Func(_) => Item::Function,
            ComponentEntityType::Type { created: ComponentAnyTypeId::Resource(_), .. } => Item::Resource,
            ComponentEntityType::Type { .. } => Item::Type,
            _ => Item::Other,
        };
        let import = |name: &str| {
            let ty = types.component_item_for_import(name).ok_or(Unreadable::CutOff)?;
            Ok::<_, Unreadable>((
                name.to_owned(),
                match ty.ty {
                    ComponentEntityType::Instance(instance) => {
                        let exports = types.get(instance).ok_or(Unreadable::CutOff)?.exports.iter();
                        Import::Interface(exports.map(|(name, ty)| (name.clone(), item(&ty.ty))).collect())
                    }
                    ref ty if item(ty) == Item::Type => Import::Type,
                    _ => Import::Other,
                },
            ))
        };
        Ok(Self { imports: imports.into_iter().map(import).collect::<Result<_, Unreadable>>()?, exports })
    }

    /// Reads it off a compiled component.
    pub(crate) fn of_component(engine: &Engine, component: &Component) -> Self {
        let kind = component.component_type();
        let item = |ty: &ComponentItem| match ty {
            ComponentItem::ComponentFunc(_) => Item::Function,
            ComponentItem::Resource(_) => Item::Resource,
            ComponentItem::Type(_) => Item::Type,
            _ => Item::Other,
        };
        let import = |name: &str, ty: &ComponentItem| {
            let import = match ty {
                ComponentItem::ComponentInstance(instance) => {
                    let exports = instance.exports(engine);
                    Import::Interface(exports.map(|(name, ty)| (name.to_owned(), item(&ty.ty))).collect())
                }
                ComponentItem::Type(_) => Import::Type,
                _ => Import::Other,
            };
            (name.to_owned(), import)
        };
        Self {
            imports: kind.imports(engine).map(|(name, ty)| import(name, &ty.ty)).collect(),
            exports: kind.exports(engine).map(|(name, _)| name.to_owned()).collect(),
        }
    }
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// A component with an import of each kind that a surface knows, byte by byte (Binary.md of the component model):
    /// an interface with a resource, a function and a type; a function without an interface; and an export. (A type
    /// without an interface, which allows nothing, is not seen in what is compiled.)
    fn component() -> Vec<u8> {
        fn section(id: u8, content: &[u8]) -> Vec<u8> {
            [&[id, u8::try_from(content.len()).unwrap()][..], content].concat()
        }
        fn name(text: &str) -> Vec<u8> {
            [&[0, u8::try_from(text.len()).unwrap()][..], text.as_bytes()].concat()
        }
        // An instance type: a resource, a function, and an exported type (eq to a defined u8).
        let interface = [
            &[1, 0x42, 5][..],
            &[&[4][..], &name("thing"), &[3, 1]].concat(),
            &[1, 0x40, 0, 1, 0],
            &[&[4][..], &name("do-it"), &[1, 1]].concat(),
            &[1, 0x7d],
            &[&[4][..], &name("small"), &[3, 0, 2]].concat(),
        ]
        .concat();
        let import = [&[1][..], &name("a:b/c@0.1.0"), &[5, 0]].concat();
        let types = [2, 0x40, 0, 1, 0, 0x7d];
        let bare = [&[1][..], &name("bare"), &[1, 1]].concat();
        let export = [&[1][..], &name("again"), &[3, 2, 0]].concat();
        [
            b"\0asm\x0d\0\x01\0".to_vec(),
            section(7, &interface),
            section(10, &import),
            section(7, &types),
            section(10, &bare),
            section(11, &export),
        ]
        .concat()
    }

    #[test]
    fn bytes_and_what_is_compiled_have_the_same_surface() {
        let bytes = component();
        let surface = Surface::of_bytes(&bytes).unwrap();
        let items = [("thing", Item::Resource), ("do-it", Item::Function), ("small", Item::Type)];
        let items = items.map(|(name, item)| (name.to_owned(), item));
        let expected =
            [("a:b/c@0.1.0".to_owned(), Import::Interface(items.into())), ("bare".to_owned(), Import::Other)];
        assert_eq!(surface, Surface { imports: expected.into(), exports: vec!["again".to_owned()] });
        let engine = Engine::default();
        let compiled = Component::from_binary(&engine, &bytes).map_err(|error| format!("{error:#}")).unwrap();
        assert_eq!(Surface::of_component(&engine, &compiled), surface);
    }

    #[test]
    fn what_is_cut_off_or_no_component_has_none() {
        let bytes = component();
        for length in 0..bytes.len() {
            // The end of a section is the end of a shorter component.
            if let Ok(surface) = Surface::of_bytes(bytes.get(..length).unwrap()) {
                assert!(surface.imports.len() < 2 || surface.exports.is_empty(), "{length}");
            }
        }
        let error = Surface::of_bytes(b"\0asm\x01\0\0\0").unwrap_err();
        assert!(matches!(error, Unreadable::CoreModule), "{error}");
    }
}
