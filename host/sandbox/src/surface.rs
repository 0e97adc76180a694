//! The names on the outside of a component.
//!
//! ```text
//!   bytes of a stranger ── of_bytes: nothing is compiled ──┐
//!                                                          ├──▶ Surface ──▶ inspect (inspect.rs)
//!   compiled before ────── of_component ───────────────────┘
//! ```
//!
//! A stranger can make a component to be read: types in types in types, one type of many functions that many imports
//! share, one of which each instance is a copy. So only that is read which says what the names are, nothing is copied
//! for a use of it, and each bound below is one of memory: nothing here grows with a component beyond them. What is
//! within other components, and whether all of it is valid, is for the compiler to say: in a process that has bounds
//! of its own (`compiler.rs`).

use std::collections::BTreeSet;
use std::rc::Rc;

use wasmparser::{
    BinaryReader, BinaryReaderError, Chunk, ComponentAlias, ComponentExternName, ComponentExternalKind,
    ComponentImport, ComponentOuterAliasKind, ComponentType, ComponentTypeRef, Encoding, Parser, Payload, TypeBounds,
};
use wasmtime::Engine;
use wasmtime::component::Component;
use wasmtime::component::types::ComponentItem;

/// Names: imports, what each imported interface has, exports. The built-in formats have some 40.
const NAMES: usize = 4096;
/// Bytes of one name.
const NAME_BYTES: usize = 1024;
/// Bytes of all names, with that of an interface once more for each that it has.
const ALL_BYTES: usize = 1 << 20;
/// Types, instances and names of interfaces that are remembered while a component is read.
const ENTRIES: usize = 65_536;
/// Types within types. An interface is one within a component.
const DEPTH: usize = 16;

/// The names on the outside of a component, in its order.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Surface {
    pub(crate) imports: Vec<(String, Import)>,
    pub(crate) exports: Vec<String>,
}

/// What is behind an imported name.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Import {
    Interface(Vec<(String, Item)>),
    Type,
    /// A module, a component, a function or a resource without an interface.
    Other,
}

/// What an imported interface has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Item {
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
    /// A part that components do not have.
    #[error("it has a part that is not known")]
    Unknown,
    /// A type is used before it is there, or as what it is not.
    #[error("it names a type that is not there")]
    NoType,
    /// An interface with a type that no interface of a world has.
    #[error("it has an interface with core types in it")]
    CoreType,
    /// More than what is read.
    #[error("{0}")]
    Excess(String),
}

/// How many names there are so far, and how long they are.
#[derive(Debug, Default)]
struct Names {
    count: usize,
    bytes: usize,
}

impl Names {
    /// One more, that begins with the name of its interface if it has one.
    fn add(&mut self, interface: &str, name: &str) -> Result<(), Unreadable> {
        let length = interface.len().max(name.len());
        if length > NAME_BYTES {
            return Err(Unreadable::Excess(format!("it has a name of {length} bytes; the limit is {NAME_BYTES}")));
        }
        self.count = self.count.saturating_add(1);
        if self.count > NAMES {
            return Err(Unreadable::Excess(format!("it imports and exports more than {NAMES} names")));
        }
        self.bytes = self.bytes.saturating_add(interface.len()).saturating_add(name.len());
        if self.bytes > ALL_BYTES {
            let why = format!("the names that it imports and exports have more than {ALL_BYTES} bytes");
            return Err(Unreadable::Excess(why));
        }
        Ok(())
    }

    /// An imported interface.
    fn interface<'n>(
        &mut self,
        name: &str,
        items: impl Iterator<Item = (&'n str, Item)>,
    ) -> Result<Import, Unreadable> {
        let mut kept = Vec::new();
        for (item, kind) in items {
            self.add(name, item)?;
            kept.push((item.to_owned(), kind));
        }
        Ok(Import::Interface(kept))
    }
}

impl Surface {
    /// Reads it off the bytes of a component.
    pub(crate) fn of_bytes(bytes: &[u8]) -> Result<Self, Unreadable> {
        if !bytes.starts_with(b"\0asm") {
            return Err(Unreadable::Other);
        }
        let (mut parser, mut rest) = (Parser::new(0), bytes);
        let (mut reading, mut names, mut surface) = (Reading::default(), Names::default(), Self::default());
        loop {
            let Chunk::Parsed { consumed, payload } = parser.parse(rest, true)? else {
                return Err(Unreadable::CutOff);
            };
            rest = rest.get(consumed..).ok_or(Unreadable::CutOff)?;
            match payload {
                Payload::Version { encoding: Encoding::Module, .. } => return Err(Unreadable::CoreModule),
                Payload::UnknownSection { .. } => return Err(Unreadable::Unknown),
                Payload::End(_) => return Ok(surface),
                Payload::ModuleSection { unchecked_range: within, .. }
                | Payload::ComponentSection { unchecked_range: within, .. } => {
                    rest = rest.get(within.len()..).ok_or(Unreadable::CutOff)?;
                }
                Payload::ComponentTypeSection(section) => {
                    let range = section.range();
                    let content = bytes.get(range.clone()).ok_or(Unreadable::CutOff)?;
                    reading.types(&mut BinaryReader::new(content, range.start))?;
                }
                Payload::ComponentAliasSection(section) => {
                    section.into_iter().try_for_each(|alias| reading.alias(&alias?))?;
                }
                Payload::ComponentInstanceSection(section) => {
                    (0..section.count()).try_for_each(|_| reading.instance(Kind::Other))?;
                }
                Payload::ComponentImportSection(section) => {
                    for import in section {
                        let import = import?;
                        let name = import.name.name;
                        names.add("", name)?;
                        surface.imports.push((name.to_owned(), reading.import(&mut names, &import)?));
                    }
                }
                Payload::ComponentExportSection(section) => {
                    for export in section {
                        let export = export?;
                        let name = export.name.name;
                        names.add("", name)?;
                        surface.exports.push(name.to_owned());
                        match export.kind {
                            ComponentExternalKind::Type => {
                                let kind = reading.type_at(0, export.index)?;
                                reading.ty(kind)?;
                            }
                            ComponentExternalKind::Instance => {
                                let kind = reading.instance_at(export.index);
                                reading.instance(kind)?;
                            }
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
    }

    /// Reads it off a compiled component.
    pub(crate) fn of_component(engine: &Engine, component: &Component) -> Result<Self, Unreadable> {
        let kind = component.component_type();
        let item = |ty: &ComponentItem| match ty {
            ComponentItem::ComponentFunc(_) => Item::Function,
            ComponentItem::Resource(_) => Item::Resource,
            ComponentItem::Type(_) => Item::Type,
            _ => Item::Other,
        };
        let (mut names, mut surface) = (Names::default(), Self::default());
        for (name, ty) in kind.imports(engine) {
            names.add("", name)?;
            let import = match &ty.ty {
                ComponentItem::ComponentInstance(instance) => {
                    names.interface(name, instance.exports(engine).map(|(name, ty)| (name, item(&ty.ty))))?
                }
                ComponentItem::Type(_) => Import::Type,
                _ => Import::Other,
            };
            surface.imports.push((name.to_owned(), import));
        }
        for (name, _) in kind.exports(engine) {
            names.add("", name)?;
            surface.exports.push(name.to_owned());
        }
        Ok(surface)
    }
}

/// What a type or an instance is.
#[derive(Clone)]
enum Kind<'a> {
    Interface(Rc<Interface<'a>>),
    /// Or one that may be: what comes out of an instance that is not imported.
    Resource,
    Other,
}

/// An instance type.
#[derive(Default)]
struct Interface<'a> {
    items: Vec<(&'a str, Item)>,
    resources: BTreeSet<&'a str>,
}

/// What is remembered of the part of a component that was read.
struct Reading<'a> {
    /// The types of the component, of the type in it that is being read, of the one in that.
    scopes: Vec<Vec<Kind<'a>>>,
    /// The instances of the component.
    instances: Vec<Kind<'a>>,
    /// How many entries there are.
    entries: usize,
}

impl Default for Reading<'_> {
    fn default() -> Self {
        Self { scopes: vec![Vec::new()], instances: Vec::new(), entries: 0 }
    }
}

impl<'a> Reading<'a> {
    fn entry(&mut self) -> Result<(), Unreadable> {
        self.entries = self.entries.saturating_add(1);
        if self.entries > ENTRIES {
            return Err(Unreadable::Excess(format!("it has more than {ENTRIES} types, instances and names in them")));
        }
        Ok(())
    }

    /// One more type.
    fn ty(&mut self, kind: Kind<'a>) -> Result<(), Unreadable> {
        self.entry()?;
        self.scopes.last_mut().ok_or(Unreadable::NoType)?.push(kind);
        Ok(())
    }

    /// A type by its number, in the scope that is so many further out.
    fn type_at(&self, out: u32, index: u32) -> Result<Kind<'a>, Unreadable> {
        let scope = self.scopes.iter().rev().nth(usize::try_from(out).unwrap_or(usize::MAX));
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        scope.and_then(|scope| scope.get(index)).cloned().ok_or(Unreadable::NoType)
    }

    /// One more instance; only those of the component itself are remembered.
    fn instance(&mut self, kind: Kind<'a>) -> Result<(), Unreadable> {
        if self.scopes.len() == 1 {
            self.entry()?;
            self.instances.push(kind);
        }
        Ok(())
    }

    fn instance_at(&self, index: u32) -> Kind<'a> {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        self.instances.get(index).filter(|_| self.scopes.len() == 1).cloned().unwrap_or(Kind::Other)
    }

    /// A section of types.
    fn types(&mut self, reader: &mut BinaryReader<'a>) -> Result<(), Unreadable> {
        for _ in 0..reader.read_var_u32()? {
            let kind = self.type_in(reader)?;
            self.ty(kind)?;
        }
        if reader.eof() { Ok(()) } else { Err(Unreadable::Unknown) }
    }

    /// Reads a type.
    fn type_in(&mut self, reader: &mut BinaryReader<'a>) -> Result<Kind<'a>, Unreadable> {
        let kind = reader.clone().read_u8()?;
        if let 0x41 | 0x42 = kind {
            reader.read_u8()?;
            return self.declarations(reader, kind == 0x41);
        }
        Ok(match reader.read()? {
            ComponentType::Resource { .. } => Kind::Resource,
            _ => Kind::Other,
        })
    }

    /// Reads the type of an instance, or of a component.
    fn declarations(&mut self, reader: &mut BinaryReader<'a>, component: bool) -> Result<Kind<'a>, Unreadable> {
        if self.scopes.len() > DEPTH {
            return Err(Unreadable::Excess(format!("it has types within types, more than {DEPTH} deep")));
        }
        self.scopes.push(Vec::new());
        let mut interface = Interface::default();
        for _ in 0..reader.read_var_u32()? {
            match reader.read_u8()? {
                0 => return Err(Unreadable::CoreType),
                1 => {
                    let kind = self.type_in(reader)?;
                    self.ty(kind)?;
                }
                2 => self.alias(&reader.read()?)?,
                3 if component => {
                    let import: ComponentImport<'_> = reader.read()?;
                    self.item(import.ty)?;
                }
                4 => {
                    let (name, ty): (ComponentExternName<'_>, ComponentTypeRef) = (reader.read()?, reader.read()?);
                    let item = self.item(ty)?;
                    self.entry()?;
                    interface.items.push((name.name, item));
                    if item == Item::Resource {
                        interface.resources.insert(name.name);
                    }
                }
                _ => return Err(Unreadable::Unknown),
            }
        }
        self.scopes.pop();
        Ok(if component { Kind::Other } else { Kind::Interface(Rc::new(interface)) })
    }

    fn alias(&mut self, alias: &ComponentAlias<'a>) -> Result<(), Unreadable> {
        let kind = match *alias {
            ComponentAlias::InstanceExport { kind: ComponentExternalKind::Type, instance_index, name } => {
                match self.instance_at(instance_index) {
                    Kind::Interface(interface) if !interface.resources.contains(name) => Kind::Other,
                    _ => Kind::Resource,
                }
            }
            ComponentAlias::InstanceExport { kind: ComponentExternalKind::Instance, .. } => {
                return self.instance(Kind::Other);
            }
            ComponentAlias::Outer { kind: ComponentOuterAliasKind::Type, count, index } => {
                self.type_at(count, index)?
            }
            _ => return Ok(()),
        };
        self.ty(kind)
    }

    /// What is imported or exported with this type, which may make a type of its own.
    fn item(&mut self, ty: ComponentTypeRef) -> Result<Item, Unreadable> {
        let kind = match ty {
            ComponentTypeRef::Func(_) => return Ok(Item::Function),
            ComponentTypeRef::Type(TypeBounds::SubResource) => Kind::Resource,
            ComponentTypeRef::Type(TypeBounds::Eq(index)) => self.type_at(0, index)?,
            _ => return Ok(Item::Other),
        };
        let item = if matches!(kind, Kind::Resource) { Item::Resource } else { Item::Type };
        self.ty(kind)?;
        Ok(item)
    }

    fn import(&mut self, names: &mut Names, import: &ComponentImport<'a>) -> Result<Import, Unreadable> {
        if let ComponentTypeRef::Instance(index) = import.ty {
            let kind = self.type_at(0, index)?;
            let Kind::Interface(interface) = &kind else { return Err(Unreadable::NoType) };
            let imported = names.interface(import.name.name, interface.items.iter().copied())?;
            self.instance(kind)?;
            return Ok(imported);
        }
        Ok(if self.item(import.ty)? == Item::Type { Import::Type } else { Import::Other })
    }
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
        assert_eq!(Surface::of_component(&engine, &compiled).unwrap(), surface);
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
