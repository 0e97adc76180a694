//! Disk strings (`--disk`) and what `--allow` takes: whatever is accepted can be written down, and means the same when
//! it is read again.

use std::fmt::Write as _;
use std::path::Path;

use blockhouse_block::{Access, Engine};
use blockhouse_vhost::CacheMode;

use crate::included::disk_arg::{DiskArg, User, help};
use crate::included::grant::Grant;
use crate::included::grant_arg;

pub(crate) fn run(data: &[u8]) {
    let Some((how, rest)) = data.split_first() else { return };
    let text = String::from_utf8_lossy(rest);
    if how & 1 == 0 {
        let (parsed, again): (_, fn(&str) -> _) = match how & 2 {
            0 => (DiskArg::for_run(&text), DiskArg::for_run),
            _ => (DiskArg::for_serve(&text), DiskArg::for_serve),
        };
        match parsed {
            Ok(disk) => {
                let written = write_disk(&disk);
                assert_eq!(again(&written).as_ref(), Ok(&disk), "{text:?} as {written:?}");
                // Arithmetic that only some disks need.
                let _limits = disk.limits();
            }
            Err(why) => assert!(!why.is_empty() && why.len() < 8 * text.len() + 2000, "{why}"),
        }
        assert!(help(User::Run).lines().all(|line| line.len() <= 90), "a line of the help is too wide");
    } else {
        let access = if how & 2 == 0 { Access::ReadOnly } else { Access::ReadWrite };
        if let Ok(grant) = grant_arg::parse(Path::new(text.as_ref()), access) {
            assert_eq!(grant.access, access);
            let written = write_grant(&grant);
            let again = grant_arg::parse(Path::new(&written), access);
            assert_eq!(again.as_ref().ok(), Some(&grant), "{text:?} as {written:?}");
        }
    }
}

fn write_disk(disk: &DiskArg) -> String {
    // All of them, so that a new key is not forgotten here.
    let DiskArg {
        file,
        format,
        allow,
        allow_write,
        readonly,
        serial,
        snapshot,
        cache,
        discard,
        guard_header,
        direct,
        engine,
        map,
        poll,
        queues,
        queue_size,
        iops,
        iops_burst,
        bps,
        bps_burst,
        socket,
    } = disk;
    let mut fields = vec![("file", file.display().to_string()), ("format", format.clone())];
    fields.extend(allow.iter().map(|path| ("allow", path.display().to_string())));
    fields.extend(allow_write.iter().map(|path| ("allow-write", path.display().to_string())));
    let mut on = |name, on: bool| fields.push((name, if on { "on" } else { "off" }.to_owned()));
    on("readonly", *readonly);
    on("direct", *direct);
    if !discard {
        on("discard", false);
    }
    if *guard_header {
        on("guard-header", true);
    }
    let cache = match cache {
        CacheMode::WriteBack => "writeback",
        CacheMode::WriteThrough => "writethrough",
        CacheMode::Unsafe => "unsafe",
    };
    fields.push(("cache", cache.to_owned()));
    fields.push(("engine", if *engine == Engine::Auto { "auto" } else { "threads" }.to_owned()));
    fields.push(("poll", poll.as_micros().to_string()));
    fields.push(("queues", queues.to_string()));
    // One of the two commands has it.
    if *queue_size != DiskArg::default().queue_size {
        fields.push(("queue-size", queue_size.to_string()));
    }
    let texts = [("serial", serial), ("snapshot", snapshot), ("socket", socket)];
    fields.extend(texts.into_iter().filter_map(|(name, text)| Some((name, text.clone()?))));
    let numbers = [
        ("map", map.map(|map| map as u64)),
        ("iops", *iops),
        ("iops-burst", *iops_burst),
        ("bps", *bps),
        ("bps-burst", *bps_burst),
    ];
    fields.extend(numbers.into_iter().filter_map(|(name, number)| Some((name, number?.to_string()))));
    let fields: Vec<String> =
        fields.into_iter().map(|(name, value)| format!("{name}={}", value.replace(',', ",,"))).collect();
    fields.join(",")
}

/// With every `@` doubled that would begin an attribute.
fn escaped(text: &str) -> String {
    ["sha256:", "layer:", "image:"]
        .into_iter()
        .fold(text.to_owned(), |text, name| text.replace(&format!("@{name}"), &format!("@@{name}")))
}

fn write_grant(grant: &Grant) -> String {
    let mut text = escaped(&grant.path.display().to_string());
    if let Some(sha256) = &grant.sha256 {
        let _ = write!(text, "@sha256:{sha256}");
    }
    if let Some(layer) = grant.referrer.layer {
        let _ = write!(text, "@layer:{layer}");
    }
    if let Some(image) = &grant.referrer.image {
        let _ = write!(text, "@image:{}", escaped(image));
    }
    text
}
