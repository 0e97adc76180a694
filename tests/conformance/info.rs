//! `blockhouse info --json` and `qemu-img info --backing-chain`: the same layers.

use std::path::Path;

use blockhouse_tests::run;
use serde_json::Value;

use crate::case::Subject;
use crate::lab::Lab;

/// Compares the two chains, layer by layer.
pub(crate) fn compare(lab: &Lab, subject: &Subject) -> Result<(), String> {
    let ours = run(subject.command(lab, "info").arg("--json")).succeeded().text();
    let ours: Value = serde_json::from_str(&ours).map_err(|error| format!("{error}: {ours}"))?;
    let command = format!("info --backing-chain --output=json -f {} {}", subject.format, subject.image);
    let theirs: Value = serde_json::from_str(&lab.qemu_img(&command)).unwrap();
    if !ours["error"].is_null() {
        return Err(format!("blockhouse info reports an error: {}", ours["error"]));
    }
    let (ours, theirs) = (ours["layers"].as_array().ok_or("no layers")?, theirs.as_array().unwrap());
    if ours.len() != theirs.len() {
        return Err(format!("blockhouse sees {} layers, QEMU {}", ours.len(), theirs.len()));
    }
    for (depth, (our, their)) in ours.iter().zip(theirs).enumerate() {
        layer(lab, our, their).map_err(|why| format!("info of layer {depth}: {why}\n  ours {our}\n  QEMU {their}"))?;
    }
    Ok(())
}

fn layer(lab: &Lab, our: &Value, their: &Value) -> Result<(), String> {
    let same = |what: &str, ours: &Value, theirs: &Value| {
        if ours == theirs { Ok(()) } else { Err(format!("{what} is {ours}, for QEMU {theirs}")) }
    };
    same("the format", &our["format"], &their["format"])?;
    same("the virtual size", &our["virtual_size_bytes"], &their["virtual-size"])?;
    let canonical = |name: &Value| lab.root().join(name.as_str().unwrap_or_default()).canonicalize();
    if canonical(&our["image"]).ok() != canonical(&their["filename"]).ok() {
        return Err("other files".to_owned());
    }
    // An index into null is null: no backing file.
    same("the backing name", &our["backing"]["name"], &their["backing-filename"])?;
    let specific = &their["format-specific"]["data"];
    let files = our["files"].as_array().ok_or("no files")?;
    if our["format"] != "vmdk" {
        same("the backing format", &our["backing"]["format"], &their["backing-filename-format"])?;
    }
    match our["format"].as_str() {
        Some("qcow2") => {
            same("the cluster size", &our["cluster_size_bytes"], &their["cluster-size"])?;
            let version = if specific["compat"] == "1.1" { "3" } else { "2" };
            let yes_no = |flag: &Value| Some(if flag.as_bool()? { "yes" } else { "no" }.to_owned());
            let facts = [
                ("version", Some(version.to_owned())),
                ("compression", specific["compression-type"].as_str().map(str::to_owned)),
                ("extended-l2", yes_no(&specific["extended-l2"])),
                ("lazy-refcounts", yes_no(&specific["lazy-refcounts"])),
                ("refcount-bits", specific["refcount-bits"].as_u64().map(|bits| bits.to_string())),
                ("data-file-raw", yes_no(&specific["data-file-raw"])),
                ("corrupt", yes_no(&specific["corrupt"])),
            ];
            for (name, expected) in facts {
                // What QEMU does not mention does not apply to the version or the image.
                if let Some(expected) = expected {
                    same(name, &fact(our, name), &Value::String(expected))?;
                }
            }
            let data_file = specific["data-file"].as_str();
            if files.iter().map(Value::as_str).collect::<Vec<_>>()
                != data_file.iter().map(|n| Some(*n)).collect::<Vec<_>>()
            {
                return Err(format!("it refers to {files:?}, for QEMU to {data_file:?}"));
            }
            let names = |snapshots: &Value| -> Vec<(Value, Value)> {
                let list = snapshots.as_array().into_iter().flatten();
                list.map(|snapshot| (snapshot["id"].clone(), snapshot["name"].clone())).collect()
            };
            if names(&our["snapshots"]) != names(&their["snapshots"]) {
                return Err("other snapshots".to_owned());
            }
        }
        Some("vmdk") => {
            same("the kind", &fact(our, "create-type"), &specific["create-type"])?;
            let extents = specific["extents"].as_array().ok_or("QEMU shows no extents")?;
            // QEMU shows what it opened; a sparse file that holds its own descriptor is its only extent, and
            // no reference.
            let opened: Vec<_> = extents.iter().map(|extent| canonical(&extent["filename"]).ok()).collect();
            let image = canonical(&our["image"]).ok();
            let directory = image.as_deref().and_then(Path::parent).ok_or("no directory")?;
            let mut named = Vec::new();
            for file in files {
                named.push(directory.join(file.as_str().unwrap_or_default()).canonicalize().ok());
            }
            if named != opened && (!named.is_empty() || opened != [image]) {
                return Err(format!("it refers to {files:?}"));
            }
        }
        _ => {}
    }
    Ok(())
}

/// The value of a fact, or null.
pub(crate) fn fact(layer: &Value, name: &str) -> Value {
    let facts = layer["facts"].as_array().into_iter().flatten();
    facts.into_iter().find(|fact| fact["name"] == name).map_or(Value::Null, |fact| fact["value"].clone())
}
