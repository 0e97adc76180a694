//! One vCPU: runs the guest until something ends the machine.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use blockhouse_virtio::Beginning;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler, unblock_signal};

use crate::devices::Devices;
use crate::error::{Error, ErrorKind, Result};
use crate::machine::{Event, ExitReason};
use crate::memory::Memory;

/// How often a vCPU that should stop is kicked out of the guest.
const KICK_INTERVAL: Duration = Duration::from_millis(1);

/// The signal that interrupts KVM_RUN.
fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

/// Does nothing: the point of the signal is that KVM_RUN returns.
extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Takes the first real-time signal of the process for waking vCPUs. May be called any number of times.
pub(crate) fn claim_signal() -> Result<()> {
    register_signal_handler(kick_signal(), on_kick).map_err(Error::host("set up the signal that stops vCPUs"))
}

/// What every vCPU of a machine shares.
pub(crate) struct Shared {
    pub(crate) devices: Devices,
    /// Held so that guest memory outlives every vCPU.
    pub(crate) _memory: Memory,
    /// The machine ends.
    pub(crate) stop: Arc<AtomicBool>,
}

/// A vCPU on its thread.
pub(crate) struct Vcpu {
    thread: JoinHandle<()>,
}

impl Vcpu {
    /// Runs `fd` on a thread of its own. How the machine ends, if this vCPU ends it, goes to `events`.
    ///
    /// The thread calls `beginning` before the guest runs.
    pub(crate) fn spawn(
        id: u8,
        mut fd: VcpuFd,
        shared: Arc<Shared>,
        events: mpsc::Sender<Event>,
        beginning: Beginning,
    ) -> Result<Self> {
        let thread = thread::Builder::new()
            .name(format!("vcpu{id}"))
            .spawn(move || {
                // A thread inherits what its creator blocks.
                if let Err(error) = unblock_signal(kick_signal()) {
                    tracing::warn!(?error, "a vCPU may be slow to stop");
                }
                let mut end = End { id, events, result: None };
                beginning.call();
                end.result = Some(run(id, &mut fd, &shared));
            })
            .map_err(Error::host("start a vCPU's thread"))?;
        Ok(Self { thread })
    }

    /// Waits for the vCPUs to leave the guest. `Shared::stop` must be set.
    ///
    /// A signal that arrives just before KVM_RUN is entered is lost, so it is repeated until it was
    /// heard, by all of them: one may wait for a device that another one has, and that one for the console.
    pub(crate) fn join_all(mut vcpus: Vec<Self>) {
        loop {
            for ended in vcpus.extract_if(.., |vcpu| vcpu.thread.is_finished()) {
                // A panic was reported by `End`.
                let _ = ended.thread.join();
            }
            if vcpus.is_empty() {
                return;
            }
            for vcpu in &vcpus {
                if let Err(error) = vcpu.thread.kill(kick_signal()) {
                    tracing::debug!(%error, "cannot signal a vCPU");
                }
            }
            thread::sleep(KICK_INTERVAL);
        }
    }
}

/// Tells the machine how a vCPU ended, even if it ended by a panic: the machine must not wait for it.
struct End {
    id: u8,
    events: mpsc::Sender<Event>,
    result: Option<Option<Result<ExitReason>>>,
}

impl Drop for End {
    fn drop(&mut self) {
        let result = match self.result.take() {
            Some(None) => return,
            Some(Some(result)) => result,
            None => Err(Error::new(ErrorKind::Host, format!("the thread of vCPU {} panicked", self.id))),
        };
        // If nobody listens any more, the machine has ended already.
        let _ = self.events.send(Event::Ended(result));
    }
}

/// Runs the guest. Returns `None` if the machine was stopped from elsewhere.
fn run(id: u8, fd: &mut VcpuFd, shared: &Shared) -> Option<Result<ExitReason>> {
    while !shared.stop.load(Ordering::Acquire) {
        let end = match fd.run() {
            Ok(exit) => handle(id, exit, &shared.devices),
            // A signal, or nothing to do after all: look at the flag and go on.
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Ok(None),
            Err(error) => Err(Error::host("run a vCPU")(error)),
        };
        if let Some(end) = end.transpose() {
            return Some(end.map_err(|error| with_state(error, fd)));
        }
    }
    None
}

fn handle(id: u8, exit: VcpuExit<'_>, devices: &Devices) -> Result<Option<ExitReason>> {
    let stuck = |what: String| Err(Error::new(ErrorKind::Guest, format!("vCPU {id} cannot go on: {what}")));
    match exit {
        VcpuExit::IoIn(port, data) => devices.port_read(port, data),
        VcpuExit::IoOut(port, data) => return Ok(devices.port_write(port, data)),
        VcpuExit::MmioRead(address, data) => devices.mmio_read(address, data),
        VcpuExit::MmioWrite(address, data) => return Ok(devices.mmio_write(address, data)),
        // A triple fault: a crash, or how a PC is reset by software that has no better way. Nobody can tell.
        VcpuExit::Shutdown => return Ok(Some(ExitReason::Crashed)),
        VcpuExit::SystemEvent(kind, _) => match kind {
            kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => return Ok(Some(ExitReason::Shutdown)),
            kvm_bindings::KVM_SYSTEM_EVENT_RESET => return Ok(Some(ExitReason::Reset)),
            other => return stuck(format!("KVM reports system event {other}")),
        },
        // With the interrupt controllers in KVM, HLT waits there.
        VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen => {}
        VcpuExit::InternalError => {
            return stuck("KVM does not know how to execute an instruction (internal error)".to_owned());
        }
        VcpuExit::FailEntry(reason, _) => return stuck(format!("the CPU refuses to run it (reason {reason:#x})")),
        other => return stuck(format!("KVM stops for a reason that this machine does not know ({other:?})")),
    }
    Ok(None)
}

/// Adds where the guest was, which is what one wants to know of a guest that cannot go on.
fn with_state(error: Error, fd: &VcpuFd) -> Error {
    match fd.get_regs() {
        Ok(regs) => error.context(format!("at rip {:#x}, rsp {:#x}", regs.rip, regs.rsp)),
        Err(_) => error,
    }
}
