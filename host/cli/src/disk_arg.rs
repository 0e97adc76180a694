//! The disk strings of `blockhouse run` and `serve`: `file=IMAGE,format=F[,allow=PATH][,allow-write=PATH]...`.
//!
//! [`KEYS`] is the table of what can stand there: parsing, errors and help come from it. The module knows no
//! component and opens nothing, and stands for itself with `size.rs`: a fuzz target includes both.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use blockhouse_block::Engine;
use blockhouse_vhost::{
    CacheMode, DEFAULT_POLL, DEFAULT_QUEUE_SIZE, MAX_POLL, MAX_QUEUE_SIZE, MAX_QUEUES, Rate, RateLimits,
};

use super::size::{NOT_A_SIZE, parse_size};

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
    /// Descriptors that each has.
    pub(crate) queue_size: u16,
    /// Requests in a second.
    pub(crate) iops: Option<u64>,
    /// Requests at once.
    pub(crate) iops_burst: Option<u64>,
    /// Bytes in a second.
    pub(crate) bps: Option<u64>,
    /// Bytes at once.
    pub(crate) bps_burst: Option<u64>,
    /// Where it is served.
    pub(crate) socket: Option<String>,
}

impl Default for DiskArg {
    /// What is not said.
    fn default() -> Self {
        Self {
            file: PathBuf::new(),
            format: String::new(),
            allow: Vec::new(),
            allow_write: Vec::new(),
            readonly: false,
            serial: None,
            snapshot: None,
            cache: CacheMode::default(),
            discard: true,
            guard_header: false,
            direct: false,
            engine: Engine::default(),
            map: None,
            poll: DEFAULT_POLL,
            queues: 1,
            queue_size: DEFAULT_QUEUE_SIZE,
            iops: None,
            iops_burst: None,
            bps: None,
            bps_burst: None,
            socket: None,
        }
    }
}

/// Who takes a disk string.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum User {
    /// `blockhouse run`: the machine is here.
    Run,
    /// `blockhouse serve`: the machine is somebody else's.
    Serve,
}

/// One key of a disk string.
struct Key {
    name: &'static str,
    /// What stands after the `=` in the help.
    value: &'static str,
    /// What it means, for the help, which breaks the lines.
    help: &'static str,
    /// The only command that has it, and why the other one has not.
    only: Option<(User, &'static str)>,
    /// It can be given more than once.
    repeats: bool,
    /// Takes a value that is not empty. An error is what follows `key=value`.
    set: fn(&mut DiskArg, &str) -> Result<(), String>,
}

/// A key that both commands have, once.
const KEY: Key = Key { name: "", value: "", help: "", only: None, repeats: false, set: |_, _| Ok(()) };

/// Every key, in the order of the help.
const KEYS: &[Key] = &[
    Key {
        name: "file",
        value: "IMAGE",
        help: "the image",
        set: |disk, value| {
            disk.file = PathBuf::from(value);
            Ok(())
        },
        ..KEY
    },
    Key {
        name: "format",
        value: "FORMAT",
        help: "its format: stated, never guessed",
        set: |disk, value| {
            disk.format = value.to_owned();
            Ok(())
        },
        ..KEY
    },
    Key {
        name: "allow",
        value: "PATH",
        help: "let the image refer to PATH, a file or a directory (read-only; may be repeated)",
        repeats: true,
        set: |disk, value| {
            disk.allow.push(PathBuf::from(value));
            Ok(())
        },
        ..KEY
    },
    Key {
        name: "allow-write",
        value: "PATH",
        help: "as allow, and let the image have PATH written: an external data file",
        repeats: true,
        set: |disk, value| {
            disk.allow_write.push(PathBuf::from(value));
            Ok(())
        },
        ..KEY
    },
    Key {
        name: "readonly",
        value: "on|off",
        help: "default off; formats that cannot be written need on",
        set: |disk, value| on_or_off(value).map(|on| disk.readonly = on),
        ..KEY
    },
    Key {
        name: "serial",
        value: "TEXT",
        help: "what the guest sees as the serial number, up to 20 characters",
        set: |disk, value| {
            if value.len() > 20 || !value.bytes().all(|byte| byte.is_ascii_graphic()) {
                return Err(" is not 1 to 20 printable ASCII characters".to_owned());
            }
            disk.serial = Some(value.to_owned());
            Ok(())
        },
        ..KEY
    },
    Key {
        name: "snapshot",
        value: "N",
        help: "a snapshot inside the image, by id or name (needs readonly=on)",
        set: |disk, value| {
            disk.snapshot = Some(value.to_owned());
            Ok(())
        },
        ..KEY
    },
    Key {
        name: "cache",
        value: "MODE",
        help: "when a write is durable: writeback (default), once the guest flushes; writethrough, before the \
               guest hears that it is done; unsafe, some time: flushes do nothing, a crash of the host loses \
               data and may destroy the image",
        set: |disk, value| {
            disk.cache = match value {
                "writeback" => CacheMode::WriteBack,
                "writethrough" => CacheMode::WriteThrough,
                "unsafe" => CacheMode::Unsafe,
                _ => return Err(" is not one of writeback, writethrough, unsafe".to_owned()),
            };
            Ok(())
        },
        ..KEY
    },
    Key {
        name: "discard",
        value: "on|off",
        help: "let the guest give back space (default on; off for drivers that fail)",
        set: |disk, value| on_or_off(value).map(|on| disk.discard = on),
        ..KEY
    },
    Key {
        name: "guard-header",
        value: "on",
        help: "refuse what would make a raw disk look like an image (qcow2, vmdk, vhd, ...) to programs that \
               guess formats; the guest gets an I/O error, the log a line",
        set: |disk, value| on_or_off(value).map(|on| disk.guard_header = on),
        ..KEY
    },
    Key {
        name: "direct",
        value: "on|off",
        help: "read and write past the host's page cache (default off; not every file system can)",
        set: |disk, value| on_or_off(value).map(|on| disk.direct = on),
        ..KEY
    },
    Key {
        name: "engine",
        value: "auto|threads",
        help: "what moves the bytes: io_uring where the host has it (auto, the default), or threads",
        set: |disk, value| {
            disk.engine = match value {
                "auto" => Engine::Auto,
                "threads" => Engine::Threads,
                _ => return Err(" is neither auto nor threads".to_owned()),
            };
            Ok(())
        },
        ..KEY
    },
    Key {
        name: "poll",
        value: "N",
        help: "microseconds for which a queue is looked at before its thread waits (default 20; 0 to 10000): \
               saves wake-ups, costs processor time",
        set: |disk, value| {
            let time = value.parse().ok().map(Duration::from_micros).filter(|time| *time <= MAX_POLL);
            disk.poll = time.ok_or(" is not a number from 0 to 10000")?;
            Ok(())
        },
        ..KEY
    },
    Key {
        name: "map",
        value: "SIZE",
        help: "memory for what is known about where bytes live (default 16M; K, M, G multiply)",
        set: |disk, value| {
            let bytes = parse_size(value).map_err(|_| format!(" {NOT_A_SIZE}"))?;
            disk.map = Some(usize::try_from(bytes).map_err(|_| " is too large")?);
            Ok(())
        },
        ..KEY
    },
    Key {
        name: "queues",
        value: "N",
        help: "queues, each with a thread of its own (default 1, at most 64); one per vCPU is as many as a \
               guest can use at once",
        set: |disk, value| {
            let number = value.parse().ok().filter(|number| (1..=MAX_QUEUES).contains(number));
            disk.queues = number.ok_or_else(|| format!(" is not a number from 1 to {MAX_QUEUES}"))?;
            Ok(())
        },
        ..KEY
    },
    Key {
        name: "queue-size",
        value: "N",
        help: "descriptors of a queue (default 128, as in QEMU): what queue-size= of the machine says, for requests \
               of more pieces",
        only: Some((User::Serve, "is for `blockhouse serve`: here the queue has 256")),
        set: |disk, value| {
            let number = value.parse().ok();
            let number =
                number.filter(|number: &u16| (4..=MAX_QUEUE_SIZE).contains(number) && number.is_power_of_two());
            disk.queue_size = number.ok_or_else(|| format!(" is not a power of two from 4 to {MAX_QUEUE_SIZE}"))?;
            Ok(())
        },
        ..KEY
    },
    Key {
        name: "iops",
        value: "N",
        help: "requests in a second at most; more wait in the queue",
        set: |disk, value| count(value).map(|count| disk.iops = Some(count)),
        ..KEY
    },
    Key {
        name: "iops-burst",
        value: "N",
        help: "requests that go at once after a pause (default: those of 100 ms)",
        set: |disk, value| count(value).map(|count| disk.iops_burst = Some(count)),
        ..KEY
    },
    Key {
        name: "bps",
        value: "SIZE",
        help: "bytes in a second at most, read, written or made zero; K, M, G multiply. A request that is larger \
               than what is left goes, and those after it wait for longer",
        set: |disk, value| size(value).map(|size| disk.bps = Some(size)),
        ..KEY
    },
    Key {
        name: "bps-burst",
        value: "SIZE",
        help: "bytes that go at once after a pause (default: those of 100 ms)",
        set: |disk, value| size(value).map(|size| disk.bps_burst = Some(size)),
        ..KEY
    },
    Key {
        name: "socket",
        value: "SOCKET",
        help: "where the disk is served, as --socket says",
        only: Some((User::Serve, "is for `blockhouse serve`: here the guest has the disk")),
        set: |disk, value| {
            disk.socket = Some(value.to_owned());
            Ok(())
        },
        ..KEY
    },
];

/// The keys that a command has.
fn keys(user: User) -> impl Iterator<Item = &'static Key> {
    KEYS.iter().filter(move |key| key.only.is_none_or(|(only, _)| only == user))
}

/// The column in which the meaning of a key starts in the help.
const HELP_COLUMN: usize = 18;

/// The widest line of the help: clap indents it by ten columns, and breaks lines at a hundred.
const HELP_WIDTH: usize = 90;

/// The help of `--disk`: a line or more for each key that the command has.
pub(crate) fn help(user: User) -> String {
    let mut help = String::new();
    for key in keys(user) {
        let field = format!("{}={}", key.name, key.value);
        let mut column = field.len();
        help.push_str(&field);
        if column + 2 > HELP_COLUMN {
            // Its words start on a line of their own.
            column = HELP_WIDTH;
        }
        for word in key.help.split_whitespace() {
            if column + 1 + word.len() > HELP_WIDTH {
                help.push('\n');
                column = 0;
            }
            let indentation = HELP_COLUMN.saturating_sub(column).max(1);
            let _ = write!(help, "{:indentation$}{word}", "");
            column += indentation + word.len();
        }
        help.push('\n');
    }
    help.push_str("A comma inside a value is written twice.");
    help
}

impl DiskArg {
    /// The disk of a `--disk` of `run`.
    pub(crate) fn for_run(text: &str) -> Result<Self, String> {
        Self::parse(text, User::Run)
    }

    /// The disk of a `--disk` of `serve`.
    pub(crate) fn for_serve(text: &str) -> Result<Self, String> {
        Self::parse(text, User::Serve)
    }

    fn parse(text: &str, user: User) -> Result<Self, String> {
        let mut disk = Self::default();
        let mut given: Vec<&str> = Vec::new();
        for field in split_fields(text) {
            let (name, value) =
                field.split_once('=').ok_or_else(|| format!("{field:?} is not of the form key=value"))?;
            if value.is_empty() {
                return Err(format!("{name}= has no value"));
            }
            let key = KEYS.iter().find(|key| key.name == name).ok_or_else(|| {
                let known: Vec<&str> = keys(user).map(|key| key.name).collect();
                format!("{name:?} is not a key of a disk; there is: {}", known.join(", "))
            })?;
            if let Some((only, why)) = key.only
                && only != user
            {
                return Err(format!("{name}= {why}"));
            }
            (key.set)(&mut disk, value).map_err(|why| format!("{name}={value}{why}"))?;
            if given.contains(&key.name) && !key.repeats {
                return Err(format!("{name}= is given twice"));
            }
            given.push(key.name);
        }
        disk.check(&given)?;
        Ok(disk)
    }

    /// How fast the disk may be used.
    pub(crate) fn limits(&self) -> RateLimits {
        let rate = |per_second: Option<u64>, burst: Option<u64>| {
            per_second.map(|per_second| Rate { per_second, burst: burst.unwrap_or(per_second / 10).max(1) })
        };
        RateLimits { requests: rate(self.iops, self.iops_burst), bytes: rate(self.bps, self.bps_burst) }
    }

    /// Whether the keys go together that were `given`.
    fn check(&self, given: &[&str]) -> Result<(), &'static str> {
        let given = |name| given.contains(&name);
        if !given("file") {
            return Err("file= is missing: which image?");
        }
        if !given("format") {
            return Err("format= is missing: the format is stated, never guessed (try: blockhouse probe)");
        }
        if self.snapshot.is_some() && !self.readonly {
            return Err("snapshot= needs readonly=on: a snapshot cannot be written");
        }
        if self.readonly && !self.allow_write.is_empty() {
            return Err("allow-write= needs readonly=off: nothing is written; use allow=");
        }
        if self.readonly && given("discard") && self.discard {
            return Err("discard=on needs readonly=off: a discard changes the disk");
        }
        if self.iops_burst.is_some() && self.iops.is_none() {
            return Err("iops-burst= needs iops=: without a limit all go at once");
        }
        if self.bps_burst.is_some() && self.bps.is_none() {
            return Err("bps-burst= needs bps=: without a limit all go at once");
        }
        if self.guard_header && self.format != "raw" {
            return Err("guard-header=on needs format=raw: other disks are not images of their own");
        }
        if self.guard_header && self.readonly {
            return Err("guard-header=on needs readonly=off: nothing is written");
        }
        Ok(())
    }
}

fn on_or_off(value: &str) -> Result<bool, String> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(" is neither on nor off".to_owned()),
    }
}

fn count(value: &str) -> Result<u64, String> {
    value.parse().ok().filter(|count| *count > 0).ok_or_else(|| " is not a number from 1 on".to_owned())
}

fn size(value: &str) -> Result<u64, String> {
    let bytes = parse_size(value).map_err(|_| format!(" {NOT_A_SIZE}"))?;
    if bytes == 0 { Err(" would never let anything go".to_owned()) } else { Ok(bytes) }
}

/// A value as it stands in a disk string.
pub(crate) fn escape(value: &str) -> String {
    value.replace(',', ",,")
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
        let disk =
            DiskArg::for_serve("file=/a,,b.qcow2,format=qcow2,allow=/x,allow=/y=z,readonly=on,serial=S1,snapshot=1")
                .unwrap();
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
            let disk = DiskArg::for_run(&format!("file=/a,format=raw{fields}")).unwrap();
            assert_eq!((disk.cache, disk.discard), (cache, discard), "{fields}");
        }
    }

    #[test]
    fn how_bytes_are_moved() {
        let disk = DiskArg::for_serve("file=/a,format=raw").unwrap();
        assert_eq!((disk.direct, disk.engine, disk.map), (false, Engine::Auto, None));
        let disk = DiskArg::for_serve("file=/a,format=raw,direct=on,engine=threads,map=64K").unwrap();
        assert_eq!((disk.direct, disk.engine, disk.map), (true, Engine::Threads, Some(65536)));
    }

    #[test]
    fn queues_and_socket() {
        let disk = DiskArg::for_serve("file=/a,format=raw,queues=64,socket=fd:3").unwrap();
        assert_eq!((disk.queues, disk.socket.as_deref()), (64, Some("fd:3")));
        let disk = DiskArg::for_serve("file=/a,format=raw").unwrap();
        assert_eq!((disk.queues, disk.socket), (1, None));
    }

    #[test]
    fn limits_and_their_bursts() {
        let disk = DiskArg::for_run("file=/a,format=raw,iops=500,bps=10M").unwrap();
        let rate = |per_second, burst| Some(Rate { per_second, burst });
        assert_eq!(disk.limits(), RateLimits { requests: rate(500, 50), bytes: rate(10 << 20, 1 << 20) });
        let disk = DiskArg::for_run("file=/a,format=raw,iops=5,iops-burst=7").unwrap();
        assert_eq!(disk.limits(), RateLimits { requests: rate(5, 7), bytes: None });
        assert_eq!(DiskArg::for_run("file=/a,format=raw,iops=5").unwrap().limits().requests, rate(5, 1));
        assert_eq!(DiskArg::for_run("file=/a,format=raw").unwrap().limits(), RateLimits::default());
    }

    #[test]
    fn what_may_be_written() {
        let disk = DiskArg::for_serve("file=/a,format=qcow2,allow=/x,allow-write=/y,allow-write=/z").unwrap();
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
            ("file=/a,format=raw,iops=0", "from 1 on"),
            ("file=/a,format=raw,iops=1K", "from 1 on"),
            ("file=/a,format=raw,bps=0", "never"),
            ("file=/a,format=raw,bps=fast", "bps=fast is not a size"),
            ("file=/a,format=raw,iops-burst=1", "needs iops="),
            ("file=/a,format=raw,iops=1,bps-burst=1", "needs bps="),
        ] {
            let error = DiskArg::for_serve(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn each_command_has_its_keys() {
        let error = DiskArg::for_run("file=/a,format=raw,socket=/s").unwrap_err();
        assert_eq!(error, "socket= is for `blockhouse serve`: here the guest has the disk");
        let [run, serve] = [DiskArg::for_run, DiskArg::for_serve].map(|parse| parse("colour=red").unwrap_err());
        assert!(run.ends_with("bps-burst") && serve.ends_with("bps-burst, socket"), "{run}; {serve}");
    }

    #[test]
    fn the_help_has_every_key_in_lines_that_fit() {
        let help = help(User::Serve);
        for key in KEYS {
            assert!(help.contains(&format!("\n{}={}", key.name, key.value)) || key.name == "file", "{}", key.name);
        }
        assert!(help.lines().all(|line| line.len() <= HELP_WIDTH && !line.ends_with(' ')), "{help}");
        assert!(help.contains("\nengine=auto|threads\n                  what moves the bytes"), "{help}");
        assert!(!super::help(User::Run).contains("socket="));
    }

    #[test]
    fn no_key_is_in_the_table_twice() {
        for (at, key) in KEYS.iter().enumerate() {
            assert!(KEYS.iter().skip(at + 1).all(|other| other.name != key.name), "{}", key.name);
        }
    }
}
