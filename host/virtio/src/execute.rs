//! What a well-formed request does: which operations it asks of the disk, and how it ends.

use std::vec;

use blockhouse_block::{Error, Operation, SECTOR_SIZE};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{Bytes, VolatileSlice};

use crate::device::{BlockDevice, CacheMode};
use crate::ranges::{self, ByteRange, Limits, Refusal};
use crate::report::Fault;
use crate::request::{Operation as Asked, Request};

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

/// What a request asks of the disk, one operation after the other.
#[derive(Debug)]
pub(crate) enum Job {
    /// A read of so many bytes.
    Read {
        offset: u64,
        len: u32,
    },
    Write {
        offset: u64,
        len: u32,
    },
    Ranges {
        ranges: vec::IntoIter<ByteRange>,
        zeroes: bool,
        offset: u64,
        /// Bytes of all ranges.
        len: u64,
    },
    /// The last operation of a request that has to be durable, or all there is.
    Flush,
}

impl Job {
    /// Bytes that the request moves, discards or makes zero, before its first operation ended.
    pub(crate) fn bytes(&self) -> u64 {
        match *self {
            Self::Read { len, .. } | Self::Write { len, .. } => len.into(),
            Self::Ranges { len, .. } => len,
            Self::Flush => 0,
        }
    }
}

/// What comes next in a request.
#[derive(Debug)]
pub(crate) enum Next {
    /// This is to be done by the disk, with the data of the request if it is a transfer.
    Operation(Operation, u64),
    /// Nothing: it has ended.
    End(Outcome),
}

impl From<Status> for Next {
    fn from(status: Status) -> Self {
        Self::End(status.into())
    }
}

impl BlockDevice {
    /// Begins what `request` asks for. Whatever goes wrong is a status for the guest and a line in the log.
    ///
    /// `features` are those that the driver accepted.
    pub(crate) fn begin(&self, request: &Request<'_>, features: u64) -> (Job, Next) {
        let mut job = Job::Flush;
        if self.has_lost() && !matches!(request.operation, Asked::GetId | Asked::Unknown(_)) {
            let detail = "the guest gets an I/O error: changes that it made are lost, and it has to be reset";
            self.report().fault(Fault::Lost, None, &detail);
            return (job, Status::IoError.into());
        }
        let next = match request.operation {
            Asked::In { sector } => self.read(sector, &request.writable, &mut job),
            Asked::Out { sector } => self.write(sector, &request.readable, &mut job),
            Asked::Flush => self.flush(),
            Asked::GetId => Next::End(self.get_id(&request.writable)),
            Asked::Discard => self.discard(&request.readable, features, &mut job),
            Asked::WriteZeroes => self.write_zeroes(&request.readable, features, &mut job),
            Asked::Unknown(code) => self.unsupported(code).into(),
        };
        (job, next)
    }

    /// Goes on with a request, one operation of which ended with `result`.
    pub(crate) fn proceed(&self, job: &mut Job, result: blockhouse_block::Result<()>, features: u64) -> Next {
        if let Err(error) = result {
            let offset = match job {
                Job::Read { offset, .. } | Job::Write { offset, .. } | Job::Ranges { offset, .. } => *offset,
                Job::Flush => 0,
            };
            return self.failed(&error, offset).into();
        }
        match job {
            Job::Read { len, .. } => Next::End(Outcome { status: Status::Ok, written: *len }),
            Job::Write { .. } => self.changed(job, features),
            Job::Ranges { .. } => self.next_range(job).unwrap_or_else(|| self.changed(job, features)),
            Job::Flush => Status::Ok.into(),
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

    fn read(&self, sector: u64, data: &[VolatileSlice<'_>], job: &mut Job) -> Next {
        let Some((offset, len)) = self.range(sector, data) else {
            return Status::IoError.into();
        };
        if len == 0 {
            return Status::Ok.into();
        }
        *job = Job::Read { offset, len };
        Next::Operation(Operation::Read, offset)
    }

    fn write(&self, sector: u64, data: &[VolatileSlice<'_>], job: &mut Job) -> Next {
        if let Err(status) = self.check_writable() {
            return status.into();
        }
        let Some((offset, len)) = self.range(sector, data) else {
            return Status::IoError.into();
        };
        if len == 0 {
            return Status::Ok.into();
        }
        *job = Job::Write { offset, len };
        Next::Operation(Operation::Write, offset)
    }

    fn discard(&self, data: &[VolatileSlice<'_>], features: u64, job: &mut Job) -> Next {
        let accepted = features & 1 << VIRTIO_BLK_F_DISCARD != 0;
        match self.ranges(VIRTIO_BLK_T_DISCARD, accepted, data, ranges::DISCARD) {
            Ok(ranges) => self.begin_ranges(ranges, false, job),
            Err(status) => status.into(),
        }
    }

    fn write_zeroes(&self, data: &[VolatileSlice<'_>], features: u64, job: &mut Job) -> Next {
        let accepted = features & 1 << VIRTIO_BLK_F_WRITE_ZEROES != 0;
        match self.ranges(VIRTIO_BLK_T_WRITE_ZEROES, accepted, data, ranges::WRITE_ZEROES) {
            Ok(ranges) => self.begin_ranges(ranges, true, job),
            Err(status) => status.into(),
        }
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

    fn begin_ranges(&self, ranges: Vec<ByteRange>, zeroes: bool, job: &mut Job) -> Next {
        // A request has few ranges, each shorter than a disk can be.
        let len = ranges.iter().fold(0_u64, |sum, range| sum.saturating_add(range.len));
        *job = Job::Ranges { ranges: ranges.into_iter(), zeroes, offset: 0, len };
        self.next_range(job).unwrap_or_else(|| Status::Ok.into())
    }

    /// The operation for the next range that is not empty.
    fn next_range(&self, job: &mut Job) -> Option<Next> {
        let Job::Ranges { ranges, zeroes, offset, .. } = job else { return None };
        let range = ranges.find(|range| range.len > 0)?;
        *offset = range.offset;
        let operation = if *zeroes {
            // The flag is a permission: where nothing is given back, it says nothing.
            Operation::WriteZeroes { length: range.len, may_unmap: range.may_unmap && self.gives_back() }
        } else {
            Operation::Discard { length: range.len }
        };
        Some(Next::Operation(operation, range.offset))
    }

    /// The end of a request that changed the disk: it is durable, unless the driver is to flush.
    fn changed(&self, job: &mut Job, features: u64) -> Next {
        if !self.writes_through(features) {
            return Status::Ok.into();
        }
        *job = Job::Flush;
        self.flush()
    }

    fn flush(&self) -> Next {
        if self.cache_mode() == CacheMode::Unsafe {
            return Status::Ok.into();
        }
        Next::Operation(Operation::Flush, 0)
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
