//! Boots a kernel, or the built-in guest, with raw files as disks: read-only, or with `--writable`.
//!
//! ```text
//! cargo run -p blockhouse-vmm --example boot -- DISK...
//! cargo run -p blockhouse-vmm --example boot -- --kernel vmlinuz --initrd initrd.img --cmdline console=ttyS0 DISK...
//! ```
//! The program `blockhouse` does this with real formats; here the disk is the few lines below, which
//! is all that the machine asks of one.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use blockhouse_block::{BlockBackend, Error, ErrorKind, Lane, Pool, PoolLane, Result, SECTOR_SIZE, Topology};
use blockhouse_vmm::{DiskConfig, ExitReason, Machine, MachineConfig, Payload};
use vm_memory::VolatileSlice;

/// A raw file.
struct RawFile {
    file: File,
    sectors: u64,
    writable: bool,
}

impl RawFile {
    fn check_change(&self, offset: u64, length: u64) -> Result<()> {
        if !self.writable {
            return Err(Error::new(ErrorKind::Invalid, "the file is read-only"));
        }
        if offset.checked_add(length).is_none_or(|end| end > self.capacity()) {
            return Err(Error::new(ErrorKind::Invalid, "the range does not lie inside the disk"));
        }
        Ok(())
    }
}

impl BlockBackend for RawFile {
    fn capacity(&self) -> u64 {
        self.sectors * SECTOR_SIZE
    }

    fn is_writable(&self) -> bool {
        self.writable
    }

    fn topology(&self) -> Topology {
        Topology { physical_block_size: 4096, optimal_io_size: 65536 }
    }

    fn read(&self, buffers: &[VolatileSlice<'_>], mut offset: u64) -> Result<()> {
        for buffer in buffers {
            // Simple rather than fast: by way of memory of our own.
            let mut bytes = vec![0; buffer.len()];
            self.file
                .read_exact_at(&mut bytes, offset)
                .map_err(|error| Error::new(ErrorKind::Storage, "the file cannot be read").with_source(error))?;
            buffer.copy_from(&bytes);
            offset += buffer.len() as u64;
        }
        Ok(())
    }

    fn write(&self, buffers: &[VolatileSlice<'_>], mut offset: u64) -> Result<()> {
        if !self.writable {
            return Err(Error::new(ErrorKind::Invalid, "the file is read-only"));
        }
        for buffer in buffers {
            let mut bytes = vec![0; buffer.len()];
            buffer.copy_to(&mut bytes);
            self.file
                .write_all_at(&bytes, offset)
                .map_err(|error| Error::new(ErrorKind::Storage, "the file cannot be written").with_source(error))?;
            offset += buffer.len() as u64;
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.file
            .sync_data()
            .map_err(|error| Error::new(ErrorKind::Storage, "the file cannot be flushed").with_source(error))
    }

    fn write_zeroes(&self, mut offset: u64, length: u64, _may_unmap: bool) -> Result<()> {
        self.check_change(offset, length)?;
        let end = offset + length;
        while offset < end {
            let zeroes = vec![0; usize::try_from(end - offset).unwrap_or(usize::MAX).min(1 << 16)];
            self.file
                .write_all_at(&zeroes, offset)
                .map_err(|error| Error::new(ErrorKind::Storage, "the file cannot be written").with_source(error))?;
            offset += zeroes.len() as u64;
        }
        Ok(())
    }

    /// Keeps the bytes, as it may.
    fn discard(&self, offset: u64, length: u64) -> Result<()> {
        self.check_change(offset, length)
    }

    fn lane(self: Arc<Self>) -> Result<Box<dyn Lane>> {
        Ok(Box::new(PoolLane::new(self, Pool::new())?))
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(ExitReason::Guest(0) | ExitReason::Shutdown | ExitReason::Reset) => ExitCode::SUCCESS,
        Ok(reason) => {
            eprintln!("the machine ended: {reason:?}");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("error: {error}");
            let mut source = error.source();
            while let Some(cause) = source {
                eprintln!("  because: {cause}");
                source = cause.source();
            }
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<ExitReason, Box<dyn std::error::Error>> {
    let (mut kernel, mut initramfs, mut cmdline) = (None, None, String::new());
    let (mut memory_bytes, mut vcpus, mut queues, mut disks) = (256 << 20, 1, 1, Vec::new());
    let mut writable = false;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or_else(|| format!("{argument} needs a value"));
        match argument.as_str() {
            "--kernel" => kernel = Some(PathBuf::from(value()?)),
            "--initrd" => initramfs = Some(PathBuf::from(value()?)),
            "--cmdline" => cmdline = value()?,
            "--memory-mib" => memory_bytes = value()?.parse::<u64>()? << 20,
            "--cpus" => vcpus = value()?.parse()?,
            "--queues" => queues = value()?.parse()?,
            "--writable" => writable = true,
            path => {
                let file = File::options().read(true).write(writable).open(path)?;
                let sectors = file.metadata()?.len() / SECTOR_SIZE;
                let disk =
                    DiskConfig::new(Arc::new(RawFile { file, sectors, writable }), format!("boot-{}", disks.len()));
                disks.push(DiskConfig { queues, ..disk });
            }
        }
    }
    let payload = match kernel {
        Some(kernel) => Payload::Linux { kernel, initramfs, cmdline },
        None => Payload::BuiltinGuest,
    };
    let console = Box::new(std::io::stdout());
    let machine = Machine::new(MachineConfig { memory_bytes, vcpus, payload, disks, console })?;
    Ok(machine.run()?.reason)
}
