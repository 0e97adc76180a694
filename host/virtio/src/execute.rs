//! What a well-formed request does: the one place that asks the disk.

use blockhouse_block::{Error, SECTOR_SIZE};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{Bytes, VolatileSlice};

use crate::device::{BlockDevice, CacheMode};
use crate::ranges::{self, ByteRange, Limits, Refusal};
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

impl BlockDevice {
    /// Does what `request` asks for. Whatever goes wrong is a status for the guest and a line in
    /// the log.
    ///
    /// `features` are those that the driver accepted.
    pub(crate) fn execute(&self, request: &Request<'_>, features: u64) -> Outcome {
        match request.operation {
            Operation::In { sector } => self.read(sector, &request.writable),
            Operation::Out { sector } => self.write(sector, &request.readable, features).into(),
            Operation::Flush => self.flush().into(),
            Operation::GetId => self.get_id(&request.writable),
            Operation::Discard => self.discard(&request.readable, features).into(),
            Operation::WriteZeroes => self.write_zeroes(&request.readable, features).into(),
            Operation::Unknown(code) => self.unsupported(code).into(),
        }
    }

    fn unsupported(&self, code: u32) -> Status {
        let detail = format_args!("request type {code} is not supported");
        self.report().fault(Fault::Refused("type"), None, &detail);
        Status::Unsupported
    }

    /// An error if nothing may be changed (section 5.2.6.2).
    fn check_writable(&self) -> Result<(), Status> {
        if self.is_read_only() {
            self.report().fault(Fault::Refused("read-only"), None, &"the disk is read-only");
            return Err(Status::IoError);
        }
        Ok(())
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

    fn write(&self, sector: u64, data: &[VolatileSlice<'_>], features: u64) -> Status {
        if let Err(status) = self.check_writable() {
            return status;
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
        self.changed(features)
    }

    fn discard(&self, data: &[VolatileSlice<'_>], features: u64) -> Status {
        let accepted = features & 1 << VIRTIO_BLK_F_DISCARD != 0;
        let ranges = match self.ranges(VIRTIO_BLK_T_DISCARD, accepted, data, ranges::DISCARD) {
            Ok(ranges) => ranges,
            Err(status) => return status,
        };
        self.change_ranges(&ranges, features, |range| self.backend().discard(range.offset, range.len))
    }

    fn write_zeroes(&self, data: &[VolatileSlice<'_>], features: u64) -> Status {
        let accepted = features & 1 << VIRTIO_BLK_F_WRITE_ZEROES != 0;
        let ranges = match self.ranges(VIRTIO_BLK_T_WRITE_ZEROES, accepted, data, ranges::WRITE_ZEROES) {
            Ok(ranges) => ranges,
            Err(status) => return status,
        };
        self.change_ranges(&ranges, features, |range| {
            // The flag is a permission: where nothing is given back, it says nothing.
            self.backend().write_zeroes(range.offset, range.len, range.may_unmap && self.gives_back())
        })
    }

    /// The checked ranges of a request of type `code`, whose feature the driver `accepted` or not.
    fn ranges(
        &self,
        code: u32,
        accepted: bool,
        data: &[VolatileSlice<'_>],
        limits: Limits,
    ) -> Result<Vec<ByteRange>, Status> {
        self.check_writable()?;
        if !accepted {
            return Err(self.unsupported(code));
        }
        ranges::read(data, limits, self.backend().capacity()).map_err(|Refusal { status, why }| {
            self.report().fault(Fault::Refused(why), None, &why);
            status
        })
    }

    /// Does `change` to each range that is not empty, up to the first that fails.
    fn change_ranges(
        &self,
        ranges: &[ByteRange],
        features: u64,
        change: impl Fn(&ByteRange) -> blockhouse_block::Result<()>,
    ) -> Status {
        let mut any = false;
        for range in ranges.iter().filter(|range| range.len > 0) {
            if let Err(error) = change(range) {
                return self.failed(&error, range.offset);
            }
            any = true;
        }
        if any { self.changed(features) } else { Status::Ok }
    }

    /// The end of a request that changed the disk: it is durable, unless the driver is to flush.
    fn changed(&self, features: u64) -> Status {
        if self.writes_through(features) { self.flush() } else { Status::Ok }
    }

    fn flush(&self) -> Status {
        if self.cache_mode() == CacheMode::Unsafe {
            return Status::Ok;
        }
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
