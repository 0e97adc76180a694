//! What a call can be told to do: `ACTION-at-STAGE`.

use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use core::hint::black_box;

use blockhouse_plugin::{Access, Error, File, Level, Result, log};

use crate::{Hostile, Stage};

/// The actions, in the order of the table in the crate's documentation.
pub(crate) const NAMES: &[&str] = &[
    "trap",
    "panic",
    "fail",
    "storage",
    "loop",
    "call-loop",
    "recurse",
    "grow-memory",
    "host-calls",
    "huge-error",
    "log-flood",
    "log-long",
    "get-directories",
    "share",
    "open-many",
];

/// Things that are kept for as long as the image is open.
#[derive(Debug, Default)]
pub(crate) struct Hoard {
    memory: Vec<Vec<u8>>,
    files: Vec<File>,
    #[cfg(target_family = "wasm")]
    directories: Vec<(blockhouse_plugin::wasm::bindings::wasi::filesystem::types::Descriptor, alloc::string::String)>,
}

impl Hostile {
    /// Does what this stage was told to do, if anything and if its turn has come.
    pub(crate) fn act(&mut self, stage: Stage) -> Result<()> {
        let count = match self.calls.get_mut(stage as usize) {
            Some(count) => {
                *count = count.saturating_add(1);
                *count
            }
            None => 0,
        };
        let Some((action, chosen)) = self.behaviour.action() else { return Ok(()) };
        if chosen != stage || count < self.behaviour.number(0, 1)? {
            return Ok(());
        }
        let amount = |default: u64| self.behaviour.number(1, default);
        match action {
            "trap" => trap(),
            "panic" => told_to_panic(stage),
            "fail" => return Err(Error::Other(format!("{} failed on command", stage.name()))),
            "storage" => return Err(Error::Storage(format!("{} was to read, and could not", stage.name()))),
            "loop" => {
                let mut turns = 0u64;
                loop {
                    turns = black_box(turns.wrapping_add(1));
                }
            }
            "call-loop" => loop {
                black_box(self.image()?.size()?);
            },
            "recurse" => {
                black_box(recurse(1));
            }
            "grow-memory" => {
                let mut left = amount(u64::MAX)?;
                while left > 0 {
                    self.hoard.memory.push(vec![0xa5; 1 << 20]);
                    left = left.saturating_sub(1 << 20);
                }
            }
            "host-calls" => {
                for _ in 0..amount(10_000_000)? {
                    black_box(self.image()?.size()?);
                }
            }
            "huge-error" => {
                let length = usize::try_from(amount(40 << 20)?).unwrap_or(usize::MAX);
                return Err(Error::Other("e".repeat(length)));
            }
            "log-flood" => {
                for number in 0..amount(100_000)? {
                    log(Level::Warn, &format!("message {number}"));
                }
            }
            "log-long" => {
                let times = usize::try_from(amount(10_000_000)? / 10).unwrap_or(usize::MAX);
                log(Level::Warn, &"long\u{1b}[31m\n".repeat(times));
            }
            "get-directories" => {
                let times = amount(1_000_000)?;
                self.hoard_directories(times);
            }
            "share" => {
                for number in 0..amount(1_000_000)? {
                    self.image()?.share(Access::ReadOnly).map_err(|why| worked(number, &why))?;
                }
            }
            "open-many" => {
                let times = amount(100_000)?;
                for number in 0..times {
                    let context = self.context()?;
                    let file =
                        context.open(context.location(), Access::ReadOnly).map_err(|why| worked(number, &why))?;
                    self.hoard.files.push(file);
                }
            }
            _ => {}
        }
        Ok(())
    }

    #[cfg(target_family = "wasm")]
    fn hoard_directories(&mut self, times: u64) {
        for _ in 0..times {
            let directories = blockhouse_plugin::wasm::bindings::wasi::filesystem::preopens::get_directories();
            self.hoard.directories.extend(directories);
        }
    }

    /// Natively there are no preopened directories.
    #[cfg(not(target_family = "wasm"))]
    fn hoard_directories(&mut self, _times: u64) {}
}

fn worked(times: u64, why: &Error) -> Error {
    Error::Other(format!("worked {times} times, then: {why}"))
}

#[cfg(target_family = "wasm")]
pub(crate) fn trap() -> ! {
    core::arch::wasm32::unreachable()
}

#[cfg(not(target_family = "wasm"))]
pub(crate) fn trap() -> ! {
    std::process::abort()
}

#[allow(clippy::panic)]
fn told_to_panic(stage: Stage) -> ! {
    panic!("{} panicked on command", stage.name())
}

/// Uses a little stack, for ever. The result depends on every frame, so that none can be left out.
#[inline(never)]
#[allow(unconditional_recursion)]
fn recurse(depth: u64) -> u64 {
    let frame = black_box([depth; 8]);
    let below = recurse(black_box(depth.wrapping_add(1)));
    below.wrapping_add(black_box(frame).iter().fold(0, |sum, value| sum ^ value))
}
