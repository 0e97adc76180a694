//! The reference page of the contract: every world, interface, type and function on one page.

use std::fmt::Write as _;
use std::path::Path;

use wit_parser::{Function, Handle, Interface, Resolve, Stability, Type, TypeDef, TypeDefKind, WorldItem, WorldKey};

fn load(wit: &Path) -> (Resolve, wit_parser::PackageId) {
    let mut resolve = Resolve { all_features: true, ..Resolve::default() };
    let (package, _) = resolve.push_dir(wit).expect("the WIT parses");
    (resolve, package)
}

/// The page, in Markdown.
pub(crate) fn generate(wit: &Path) -> String {
    let (resolve, package) = load(wit);
    let package = &resolve.packages[package];
    let mut page = format!(
        "# Reference: {}\n\nGenerated from the `.wit` files, which are the normative text. Do not edit.\n\n## Worlds\n",
        package.name
    );
    for world in package.worlds.values() {
        let world = &resolve.worlds[*world];
        let _ = write!(page, "\n### world `{}`\n\n{}{}", world.name, mark(&world.stability), text(&world.docs));
        for (title, items) in [("imports", &world.imports), ("exports", &world.exports)] {
            let mut names: Vec<String> = items
                .iter()
                .filter_map(|(key, item)| match (key, item) {
                    // Interfaces of types that others refer to come along by themselves.
                    (WorldKey::Interface(id), WorldItem::Interface { .. })
                        if !resolve.interfaces[*id].functions.is_empty() =>
                    {
                        resolve.id_of(*id)
                    }
                    (WorldKey::Name(name), _) => Some(name.clone()),
                    _ => None,
                })
                .filter(|name| !name.starts_with("wasi:io/") && !name.starts_with("wasi:clocks/"))
                .collect();
            names.sort();
            let names = if names.is_empty() { "nothing".to_owned() } else { format!("`{}`", names.join("`, `")) };
            let _ = writeln!(page, "* {title}: {names}");
        }
    }
    page.push_str("\n## Interfaces\n");
    for interface in package.interfaces.values() {
        write_interface(&mut page, &resolve, &resolve.interfaces[*interface]);
    }
    page
}

/// Items without documentation or stability mark.
pub(crate) fn undocumented(wit: &Path) -> Vec<String> {
    let (resolve, package) = load(wit);
    let mut missing = Vec::new();
    let mut need = |name: String, docs: &wit_parser::Docs, stability: Option<&Stability>| {
        if docs.contents.as_deref().is_none_or(|text| text.trim().is_empty())
            || stability.is_some_and(|stability| matches!(stability, Stability::Unknown))
        {
            missing.push(name);
        }
    };
    for world in resolve.packages[package].worlds.values() {
        let world = &resolve.worlds[*world];
        need(format!("world {}", world.name), &world.docs, Some(&world.stability));
    }
    for interface in resolve.packages[package].interfaces.values() {
        let interface = &resolve.interfaces[*interface];
        let name = interface.name.clone().unwrap_or_default();
        need(name.clone(), &interface.docs, Some(&interface.stability));
        for (function, definition) in &interface.functions {
            need(format!("{name}.{function}"), &definition.docs, Some(&definition.stability));
        }
        for (type_name, id) in &interface.types {
            let definition = &resolve.types[*id];
            if matches!(definition.kind, TypeDefKind::Type(Type::Id(_))) {
                continue; // `use` of a type that is documented where it is defined
            }
            need(format!("{name}.{type_name}"), &definition.docs, Some(&definition.stability));
            let mut part = |part: &str, docs: &wit_parser::Docs| need(format!("{name}.{type_name}.{part}"), docs, None);
            match &definition.kind {
                TypeDefKind::Record(record) => record.fields.iter().for_each(|field| part(&field.name, &field.docs)),
                TypeDefKind::Variant(variant) => variant.cases.iter().for_each(|case| part(&case.name, &case.docs)),
                TypeDefKind::Enum(cases) => cases.cases.iter().for_each(|case| part(&case.name, &case.docs)),
                TypeDefKind::Flags(flags) => flags.flags.iter().for_each(|flag| part(&flag.name, &flag.docs)),
                _ => {}
            }
        }
    }
    missing
}

fn mark(stability: &Stability) -> String {
    match stability {
        Stability::Unstable { feature, .. } => format!("*Unstable: feature `{feature}`.*\n\n"),
        Stability::Stable { .. } | Stability::Unknown => String::new(),
    }
}

fn text(docs: &wit_parser::Docs) -> String {
    docs.contents.as_deref().map(|text| format!("{}\n\n", text.trim())).unwrap_or_default()
}

fn line(docs: &wit_parser::Docs) -> String {
    docs.contents.as_deref().map(|text| text.split_whitespace().collect::<Vec<_>>().join(" ")).unwrap_or_default()
}

fn write_interface(page: &mut String, resolve: &Resolve, interface: &Interface) {
    let name = interface.name.as_deref().unwrap_or_default();
    let _ = write!(page, "\n### interface `{name}`\n\n{}{}", mark(&interface.stability), text(&interface.docs));
    for (type_name, id) in &interface.types {
        write_type(page, resolve, type_name, &resolve.types[*id]);
    }
    for function in interface.functions.values() {
        let _ = write!(page, "#### `{}`\n\n{}", signature(resolve, function), text(&function.docs));
    }
    let kept = page.trim_end().len();
    page.truncate(kept);
    page.push('\n');
}

fn write_type(page: &mut String, resolve: &Resolve, name: &str, definition: &TypeDef) {
    let (kind, rows): (&str, Vec<(String, String)>) = match &definition.kind {
        TypeDefKind::Record(record) => (
            "record",
            record
                .fields
                .iter()
                .map(|field| (format!("{}: {}", field.name, type_text(resolve, &field.ty)), line(&field.docs)))
                .collect(),
        ),
        TypeDefKind::Variant(variant) => (
            "variant",
            variant
                .cases
                .iter()
                .map(|case| {
                    let payload =
                        case.ty.as_ref().map(|ty| format!("({})", type_text(resolve, ty))).unwrap_or_default();
                    (format!("{}{payload}", case.name), line(&case.docs))
                })
                .collect(),
        ),
        TypeDefKind::Enum(cases) => {
            ("enum", cases.cases.iter().map(|case| (case.name.clone(), line(&case.docs))).collect())
        }
        TypeDefKind::Flags(flags) => {
            ("flags", flags.flags.iter().map(|flag| (flag.name.clone(), line(&flag.docs))).collect())
        }
        // A `use`; the definition stands elsewhere.
        _ => return,
    };
    let _ = write!(page, "#### {kind} `{name}`\n\n{}", text(&definition.docs));
    for (name, docs) in rows {
        let _ = writeln!(page, "* `{name}`: {docs}");
    }
    page.push('\n');
}

fn signature(resolve: &Resolve, function: &Function) -> String {
    let params: Vec<String> =
        function.params.iter().map(|param| format!("{}: {}", param.name, type_text(resolve, &param.ty))).collect();
    let result = function.result.as_ref().map(|ty| format!(" -> {}", type_text(resolve, ty))).unwrap_or_default();
    format!("{}: func({}){result}", function.name, params.join(", "))
}

fn type_text(resolve: &Resolve, ty: &Type) -> String {
    let Type::Id(id) = ty else {
        return match ty {
            Type::Bool => "bool",
            Type::U8 => "u8",
            Type::U16 => "u16",
            Type::U32 => "u32",
            Type::U64 => "u64",
            Type::S8 => "s8",
            Type::S16 => "s16",
            Type::S32 => "s32",
            Type::S64 => "s64",
            Type::F32 => "f32",
            Type::F64 => "f64",
            Type::Char => "char",
            Type::String => "string",
            Type::ErrorContext => "error-context",
            Type::Id(_) => unreachable!("handled above"),
        }
        .to_owned();
    };
    let definition = &resolve.types[*id];
    if let Some(name) = &definition.name {
        return name.clone();
    }
    let optional = |ty: &Option<Type>| ty.as_ref().map_or("_".to_owned(), |ty| type_text(resolve, ty));
    match &definition.kind {
        TypeDefKind::List(ty) => format!("list<{}>", type_text(resolve, ty)),
        TypeDefKind::Option(ty) => format!("option<{}>", type_text(resolve, ty)),
        TypeDefKind::Result(result) if result.ok.is_none() && result.err.is_none() => "result".to_owned(),
        TypeDefKind::Result(result) => format!("result<{}, {}>", optional(&result.ok), optional(&result.err)),
        TypeDefKind::Tuple(tuple) => {
            format!("tuple<{}>", tuple.types.iter().map(|ty| type_text(resolve, ty)).collect::<Vec<_>>().join(", "))
        }
        TypeDefKind::Handle(Handle::Borrow(id)) => {
            format!("borrow<{}>", resolve.types[*id].name.clone().unwrap_or_default())
        }
        TypeDefKind::Handle(Handle::Own(id)) => resolve.types[*id].name.clone().unwrap_or_default(),
        other => panic!("the contract uses a type that this page cannot show: {}", other.as_str()),
    }
}
