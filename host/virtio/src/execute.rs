//! What a well-formed request does: the one place that asks the disk.

use blockhouse_block::{Error, SECTOR_SIZE};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};
use vm_memory::{Bytes, VolatileSlice};

use crate::device::BlockDevice;
use crate::report::Fault;
use crate::request::{Operation, Request};

/// The status byte of a request (section 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Ok,
    IoError,
    Unsupported,
}

impl Status {
    pub(crate) const fn code(self) -> u8 {
        let code = match self {
            Self::Ok => VIRTIO_BLK_S_OK,
            Self::IoError => VIRTIO_BLK_S_IOERR,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP,
        };
        code.to_le_bytes()[0]
    }
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) status: Status,
    /// Bytes from the start of the device-writable data that the device certainly wrote.
    pub(crate) written: u32,
}

impl From<Status> for Outcome {
    fn from(status: Status) -> Self {
        Self { status, written: 0 }
    }
}

/// How the driver wants writes to be treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WriteCache {
    /// The driver flushes where it needs durability.
    WriteBack,
    /// The driver did not accept `VIRTIO_BLK_F_FLUSH`, so it cannot ask for durability and must be
    /// able to rely on every completed write (section 5.2.6.2).
    WriteThrough,
}

impl BlockDevice {
    /// Does what `request` asks for. Whatever goes wrong is a status for the guest and a line in
    /// the log.
    pub(crate) fn execute(&self, request: &Request<'_>, cache: WriteCache) -> Outcome {
        match request.operation {
            Operation::In { sector } => self.read(sector, &request.writable),
            Operation::Out { sector } => self.write(sector, &request.readable, cache).into(),
            Operation::Flush => self.flush().into(),
            Operation::GetId => self.get_id(&request.writable),
            Operation::Unknown(code) => {
                let detail = format_args!("request type {code} is not supported");
                self.report().fault(Fault::Refused("type"), None, &detail);
                Status::Unsupported.into()
            }
        }
    }

    fn read(&self, sector: u64, data: &[VolatileSlice<'_>]) -> Outcome {
        let Some((offset, len)) = self.range(sector, data) else {
            return Status::IoError.into();
        };
        if len > 0
            && let Err(error) = self.backend().read(data, offset)
        {
            return self.failed(&error, offset).into();
        }
        Outcome { status: Status::Ok, written: len }
    }

    fn write(&self, sector: u64, data: &[VolatileSlice<'_>], cache: WriteCache) -> Status {
        if !self.backend().is_writable() {
            self.report().fault(Fault::Refused("read-only"), None, &"the disk is read-only");
            return Status::IoError;
        }
        let Some((offset, len)) = self.range(sector, data) else {
            return Status::IoError;
        };
        if len == 0 {
            return Status::Ok;
        }
        if let Err(error) = self.backend().write(data, offset) {
            return self.failed(&error, offset);
        }
        match cache {
            WriteCache::WriteBack => Status::Ok,
            WriteCache::WriteThrough => self.flush(),
        }
    }

    fn flush(&self) -> Status {
        match self.backend().flush() {
            Ok(()) => Status::Ok,
            Err(error) => self.failed(&error, 0),
        }
    }

    /// Writes the serial, padded with NUL, or as much of it as there is room for.
    fn get_id(&self, data: &[VolatileSlice<'_>]) -> Outcome {
        let mut rest = self.serial().as_slice();
        let mut written = 0;
        for slice in data {
            let (now, later) = rest.split_at(rest.len().min(slice.len()));
            if slice.write_slice(now, 0).is_err() {
                return Status::IoError.into();
            }
            // At most SERIAL_LEN in all.
            written += u32::try_from(now.len()).unwrap_or(0);
            rest = later;
        }
        Outcome { status: Status::Ok, written }
    }

    /// The byte offset and length of a transfer, if it consists of whole sectors inside the disk.
    fn range(&self, sector: u64, data: &[VolatileSlice<'_>]) -> Option<(u64, u32)> {
        // A chain holds less than 4 GiB, so this sum is exact; if that ever changes, the request is
        // refused instead of being cut short.
        let len = data.iter().try_fold(0_u32, |sum, slice| sum.checked_add(u32::try_from(slice.len()).ok()?));
        let offset = sector.checked_mul(SECTOR_SIZE);
        let inside = offset.zip(len).filter(|&(offset, len)| {
            u64::from(len) % SECTOR_SIZE == 0
                && offset.checked_add(u64::from(len)).is_some_and(|end| end <= self.backend().capacity())
        });
        if inside.is_none() {
            let detail = "the range is not made of whole sectors inside the disk";
            self.report().fault(Fault::Refused("range"), offset, &detail);
        }
        inside
    }

    fn failed(&self, error: &Error, offset: u64) -> Status {
        self.report().fault(Fault::Backend(error.kind()), Some(offset), error);
        Status::IoError
    }
}
