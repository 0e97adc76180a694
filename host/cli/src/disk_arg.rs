//! The disk strings of `blockhouse run` and `serve`: `file=IMAGE,format=F[,allow=PATH][,allow-write=PATH]...`.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use blockhouse_block::Engine;
use blockhouse_vhost::{CacheMode, DEFAULT_POLL, MAX_POLL, MAX_QUEUES};

use crate::output::parse_size;

/// What the fields mean, for the help of the commands that take them.
macro_rules! field_help {
    () => {
        "\
file=IMAGE        the image
format=FORMAT     its format: stated, never guessed
allow=PATH        let the image refer to PATH, a file or a directory (read-only; may be repeated)
allow-write=PATH  as allow, and let the image have PATH written: an external data file
readonly=on|off   default off; formats that cannot be written need on
serial=TEXT       what the guest sees as the serial number, up to 20 characters
snapshot=N        a snapshot inside the image, by id or name (needs readonly=on)
cache=MODE        when a write is durable: writeback (default), once the guest flushes;
                  writethrough, before the guest hears that it is done; unsafe, some time:
                  flushes do nothing, a crash of the host loses data and may destroy the image
discard=on|off    let the guest give back space (default on; off for drivers that fail)
guard-header=on   refuse what would make a raw disk look like an image (qcow2, vmdk, vhd, ...) to
                  programs that guess formats; the guest gets an I/O error, the log a line
direct=on|off     read and write past the host's page cache (default off; not every file system can)
engine=auto|threads
                  what moves the bytes: io_uring where the host has it (auto, the default), or threads
poll=N            microseconds for which a queue is looked at before its thread waits (default 20; 0 to
                  10000): saves wake-ups, costs processor time
map=SIZE          memory for what is known about where bytes live (default 16M; K, M, G multiply)
queues=N          queues, each with a thread of its own (default 1, at most 64); one per vCPU is
                  as many as a guest can use at once
"
    };
}
pub(crate) use field_help;

/// The end of the help.
macro_rules! comma_help {
    () => {
        "A comma inside a value is written twice."
    };
}
pub(crate) use comma_help;

/// One disk, as the operator describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DiskArg {
    /// The image.
    pub(crate) file: PathBuf,
    /// Its format.
    pub(crate) format: String,
    /// What it may refer to.
    pub(crate) allow: Vec<PathBuf>,
    /// Of that, what may be written: external data files.
    pub(crate) allow_write: Vec<PathBuf>,
    /// Nothing is written.
    pub(crate) readonly: bool,
    /// The serial number that the guest sees, up to 20 bytes.
    pub(crate) serial: Option<String>,
    /// A snapshot inside the image.
    pub(crate) snapshot: Option<String>,
    /// When a write is durable.
    pub(crate) cache: CacheMode,
    /// The guest may discard.
    pub(crate) discard: bool,
    /// The guest cannot make a raw disk look like an image.
    pub(crate) guard_header: bool,
    /// The page cache is left out.
    pub(crate) direct: bool,
    /// What moves the bytes.
    pub(crate) engine: Engine,
    /// Memory for the extent map, in bytes.
    pub(crate) map: Option<usize>,
    /// How long a queue is looked at before its thread waits.
    pub(crate) poll: Duration,
    /// Queues that the device has.
    pub(crate) queues: u16,
    /// Where it is served.
    pub(crate) socket: Option<String>,
}

impl FromStr for DiskArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut file = None;
        let mut format = None;
        let mut allow = Vec::new();
        let mut allow_write = Vec::new();
        let mut readonly = None;
        let mut serial = None;
        let mut snapshot = None;
        let mut cache = None;
        let mut discard = None;
        let mut guard_header = None;
        let mut direct = None;
        let mut engine = None;
        let mut map = None;
        let mut poll = None;
        let mut queues = None;
        let mut socket = None;
        for field in split_fields(text) {
            let (key, value) =
                field.split_once('=').ok_or_else(|| format!("{field:?} is not of the form key=value"))?;
            if value.is_empty() {
                return Err(format!("{key}= has no value"));
            }
            let twice = match key {
                "file" => file.replace(PathBuf::from(value)).is_some(),
                "format" => format.replace(value.to_owned()).is_some(),
                "allow" => {
                    allow.push(PathBuf::from(value));
                    false
                }
                "allow-write" => {
                    allow_write.push(PathBuf::from(value));
                    false
                }
                "readonly" => readonly.replace(on_or_off(key, value)?).is_some(),
                "guard-header" => guard_header.replace(on_or_off(key, value)?).is_some(),
                "discard" => discard.replace(on_or_off(key, value)?).is_some(),
                "cache" => {
                    let mode = match value {
                        "writeback" => CacheMode::WriteBack,
                        "writethrough" => CacheMode::WriteThrough,
                        "unsafe" => CacheMode::Unsafe,
                        other => return Err(format!("cache={other} is not one of writeback, writethrough, unsafe")),
                    };
                    cache.replace(mode).is_some()
                }
                "serial" => {
                    if value.len() > 20 || !value.bytes().all(|byte| byte.is_ascii_graphic()) {
                        return Err(format!("serial={value} is not 1 to 20 printable ASCII characters"));
                    }
                    serial.replace(value.to_owned()).is_some()
                }
                "snapshot" => snapshot.replace(value.to_owned()).is_some(),
                "direct" => direct.replace(on_or_off(key, value)?).is_some(),
                "engine" => {
                    let chosen = match value {
                        "auto" => Engine::Auto,
                        "threads" => Engine::Threads,
                        other => return Err(format!("engine={other} is neither auto nor threads")),
                    };
                    engine.replace(chosen).is_some()
                }
                "map" => {
                    let bytes = parse_size(value).map_err(|why| format!("map={value}: {why}"))?;
                    let bytes = usize::try_from(bytes).map_err(|_| format!("map={value} is too large"))?;
                    map.replace(bytes).is_some()
                }
                "poll" => {
                    let time = value.parse().ok().map(Duration::from_micros).filter(|time| *time <= MAX_POLL);
                    let time = time.ok_or_else(|| format!("poll={value} is not a number from 0 to 10000"))?;
                    poll.replace(time).is_some()
                }
                "queues" => {
                    let number = value.parse().ok().filter(|number| (1..=MAX_QUEUES).contains(number));
                    let number =
                        number.ok_or_else(|| format!("queues={value} is not a number from 1 to {MAX_QUEUES}"))?;
                    queues.replace(number).is_some()
                }
                "socket" => socket.replace(value.to_owned()).is_some(),
                other => {
                    return Err(format!(
                        "{other:?} is not a key of a disk; there is: file, format, allow, allow-write, readonly, \
                         serial, snapshot, cache, discard, guard-header, direct, engine, map, poll, queues, socket"
                    ));
                }
            };
            if twice {
                return Err(format!("{key}= is given twice"));
            }
        }
        let disk = Self {
            file: file.ok_or("file= is missing: which image?")?,
            format: format.ok_or("format= is missing: the format is stated, never guessed (try: blockhouse probe)")?,
            allow,
            allow_write,
            readonly: readonly.unwrap_or(false),
            serial,
            snapshot,
            cache: cache.unwrap_or_default(),
            discard: discard.unwrap_or(true),
            guard_header: guard_header.unwrap_or(false),
            direct: direct.unwrap_or(false),
            engine: engine.unwrap_or_default(),
            map,
            poll: poll.unwrap_or(DEFAULT_POLL),
            queues: queues.unwrap_or(1),
            socket,
        };
        if disk.snapshot.is_some() && !disk.readonly {
            return Err("snapshot= needs readonly=on: a snapshot cannot be written".to_owned());
        }
        if disk.readonly && !disk.allow_write.is_empty() {
            return Err("allow-write= needs readonly=off: nothing is written; use allow=".to_owned());
        }
        if disk.readonly && discard == Some(true) {
            return Err("discard=on needs readonly=off: a discard changes the disk".to_owned());
        }
        if disk.guard_header && disk.format != "raw" {
            return Err("guard-header=on needs format=raw: other disks are not images of their own".to_owned());
        }
        if disk.guard_header && disk.readonly {
            return Err("guard-header=on needs readonly=off: nothing is written".to_owned());
        }
        Ok(disk)
    }
}

fn on_or_off(key: &str, value: &str) -> Result<bool, String> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        other => Err(format!("{key}={other} is neither on nor off")),
    }
}

/// Splits at commas; a doubled comma is a comma.
fn split_fields(text: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        if character == ',' && characters.next_if_eq(&',').is_none() {
            fields.push(String::new());
        } else if let Some(field) = fields.last_mut() {
            field.push(character);
        }
    }
    fields
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_full_disk_string() {
        let disk: DiskArg =
            "file=/a,,b.qcow2,format=qcow2,allow=/x,allow=/y=z,readonly=on,serial=S1,snapshot=1".parse().unwrap();
        assert_eq!(disk.file, PathBuf::from("/a,b.qcow2"));
        assert_eq!(disk.allow, [PathBuf::from("/x"), PathBuf::from("/y=z")]);
        assert!(disk.readonly);
        assert_eq!(disk.serial.as_deref(), Some("S1"));
    }

    #[test]
    fn cache_and_discard() {
        for (fields, cache, discard) in [
            ("", CacheMode::WriteBack, true),
            (",readonly=on", CacheMode::WriteBack, true),
            (",cache=writeback,discard=on", CacheMode::WriteBack, true),
            (",cache=writethrough,discard=off", CacheMode::WriteThrough, false),
            (",cache=unsafe,readonly=on,discard=off", CacheMode::Unsafe, false),
        ] {
            let disk: DiskArg = format!("file=/a,format=raw{fields}").parse().unwrap();
            assert_eq!((disk.cache, disk.discard), (cache, discard), "{fields}");
        }
    }

    #[test]
    fn how_bytes_are_moved() {
        let disk: DiskArg = "file=/a,format=raw".parse().unwrap();
        assert_eq!((disk.direct, disk.engine, disk.map), (false, Engine::Auto, None));
        let disk: DiskArg = "file=/a,format=raw,direct=on,engine=threads,map=64K".parse().unwrap();
        assert_eq!((disk.direct, disk.engine, disk.map), (true, Engine::Threads, Some(65536)));
    }

    #[test]
    fn queues_and_socket() {
        let disk: DiskArg = "file=/a,format=raw,queues=64,socket=fd:3".parse().unwrap();
        assert_eq!((disk.queues, disk.socket.as_deref()), (64, Some("fd:3")));
        let disk: DiskArg = "file=/a,format=raw".parse().unwrap();
        assert_eq!((disk.queues, disk.socket), (1, None));
    }

    #[test]
    fn what_may_be_written() {
        let disk: DiskArg = "file=/a,format=qcow2,allow=/x,allow-write=/y,allow-write=/z".parse().unwrap();
        assert_eq!(disk.allow, [PathBuf::from("/x")]);
        assert_eq!(disk.allow_write, [PathBuf::from("/y"), PathBuf::from("/z")]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, why) in [
            ("", "key=value"),
            ("file=/a", "format= is missing"),
            ("format=raw", "file= is missing"),
            ("file=/a,format=raw,colour=red", "colour"),
            ("file=/a,file=/b,format=raw", "twice"),
            ("file=,format=raw", "no value"),
            ("file=/a,format=raw,readonly=yes", "neither on nor off"),
            ("file=/a,format=raw,serial=123456789012345678901", "20"),
            ("file=/a,format=qcow2,snapshot=1", "readonly=on"),
            ("file=/a,format=qcow2,engine=libaio", "neither auto nor threads"),
            ("file=/a,format=qcow2,map=lots", "map=lots"),
            ("file=/a,format=qcow2,poll=10001", "0 to 10000"),
            ("file=/a,format=raw,cache=none", "writethrough"),
            ("file=/a,format=raw,cache=unsafe,cache=unsafe", "twice"),
            ("file=/a,format=raw,discard=unmap", "discard=unmap is neither on nor off"),
            ("file=/a,format=raw,discard=on,discard=off", "twice"),
            ("file=/a,format=raw,discard=on,readonly=on", "readonly=off"),
            ("file=/a,format=raw,allow-write=/b,readonly=on", "use allow="),
            ("file=/a,format=raw,guard-header=yes", "neither on nor off"),
            ("file=/a,format=qcow2,guard-header=on", "needs format=raw"),
            ("file=/a,format=raw,guard-header=on,readonly=on", "readonly=off"),
            ("file=/a,format=raw,", "key=value"),
            ("file=/a,format=raw,queues=0", "from 1 to 64"),
            ("file=/a,format=raw,queues=65", "from 1 to 64"),
            ("file=/a,format=raw,queues=two", "from 1 to 64"),
            ("file=/a,format=raw,queues=1,queues=1", "twice"),
            ("file=/a,format=raw,socket=/s,socket=/t", "twice"),
        ] {
            let error = text.parse::<DiskArg>().unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
