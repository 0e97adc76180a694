//! The machine: put together from a configuration, run once, taken apart.

use std::fmt;
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, TryLockError, Weak, mpsc};
use std::time::Duration;

use blockhouse_block::BlockBackend;
use blockhouse_virtio::{Beginning, BlockDevice, BlockDeviceOptions, CacheMode, DEFAULT_POLL, DeviceStats, RateLimits};
use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{IoEventAddress, Kvm, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::builtin::{self, DiskReport};
use crate::console::Console;
use crate::control::Control;
use crate::cpu::{self, Identity};
use crate::devices::{Devices, lock};
use crate::error::{Error, ErrorKind, Result};
use crate::interrupt::Interrupt;
use crate::layout::{DiskSlot, KVM_IDENTITY_MAP, KVM_TSS, MAX_DISKS, MAX_VCPUS, SERIAL_GSI, disk_slots};
use crate::linux::{self, Linux};
use crate::memory::{self, Memory};
use crate::mmio::{MmioDevice, NOTIFY_OFFSET};
use crate::serial::SerialPort;
use crate::vcpu::{self, Shared, Vcpu};

/// What a machine consists of.
pub struct MachineConfig {
    /// Memory in bytes, rounded down to whole MiB, within [`MIN_MEMORY`](crate::layout::MIN_MEMORY)
    /// and [`MAX_MEMORY`](crate::layout::MAX_MEMORY).
    pub memory_bytes: u64,
    /// The number of vCPUs, from 1 to [`MAX_VCPUS`]. The built-in guest uses one of them.
    pub vcpus: u8,
    /// What runs.
    pub payload: Payload,
    /// The disks, in order: the first is `/dev/vda` in Linux. At most [`MAX_DISKS`].
    pub disks: Vec<DiskConfig>,
    /// Where the guest's text goes. It is written to from vCPU threads, each of which waits for as long as it takes
    /// nothing. At the end of the machine these are interrupted, and drop the text on
    /// [`Interrupted`](std::io::ErrorKind::Interrupted), as a [`File`](std::fs::File) has it. A writer that goes on by
    /// itself instead, as the buffered ones of std do, [`Stdout`](std::io::Stdout) among them, holds up the end until
    /// somebody reads.
    pub console: Box<dyn Write + Send>,
}

/// What the machine runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Payload {
    /// A Linux kernel for x86_64.
    Linux {
        /// A bzImage (as distributions ship it) or an ELF `vmlinux`.
        kernel: PathBuf,
        /// An initramfs; the modules for the disks (`virtio_mmio`, `virtio_blk`) must be in it if they
        /// are not in the kernel.
        initramfs: Option<PathBuf>,
        /// The kernel command line; `console=ttyS0` makes the kernel talk to the console.
        cmdline: String,
    },
    /// The guest that is part of this crate: it reads every disk whole and reports a digest of each.
    BuiltinGuest,
}

/// One disk of a machine.
#[derive(Clone)]
pub struct DiskConfig {
    /// The disk. The guest is offered writing exactly if it can be written and `read_only` is not set.
    pub backend: Arc<dyn BlockBackend>,
    /// The serial, up to 20 bytes; what is longer is cut off.
    pub serial: String,
    /// The number of queues, each with a thread of its own; 1 is usual.
    pub queues: u16,
    /// Refuse every change in the device, even if the disk can be written.
    pub read_only: bool,
    /// When a write of the guest is durable.
    pub cache: CacheMode,
    /// Let the guest discard, and give back the space of zeroes.
    pub discard: bool,
    /// How long the thread of a queue looks for more requests before it waits to be notified.
    pub poll: Duration,
    /// How fast the guest may use it.
    pub limits: RateLimits,
    /// What the thread of each queue calls first: to lower its own rights.
    pub beginning: Beginning,
}

impl DiskConfig {
    /// A disk with one queue, a write-back cache and discards.
    pub fn new(backend: Arc<dyn BlockBackend>, serial: impl Into<String>) -> Self {
        Self {
            backend,
            serial: serial.into(),
            queues: 1,
            read_only: false,
            cache: CacheMode::WriteBack,
            discard: true,
            poll: DEFAULT_POLL,
            limits: RateLimits::default(),
            beginning: Beginning::default(),
        }
    }
}

impl fmt::Debug for DiskConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DiskConfig")
            .field("serial", &self.serial)
            .field("queues", &self.queues)
            .field("read_only", &self.read_only)
            .field("cache", &self.cache)
            .field("discard", &self.discard)
            .finish_non_exhaustive()
    }
}

/// Why a machine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExitReason {
    /// The built-in guest ended with this code: 0 if it could read every disk, 1 if not, 2 if it
    /// failed itself.
    Guest(u32),
    /// The guest switched the machine off.
    Shutdown,
    /// The guest reset the machine.
    Reset,
    /// The guest crashed so hard that a PC would reset: a fault while the fault of a fault was delivered (triple
    /// fault), as of a kernel that comes to nothing before it has a console. Some resets are made of it, too.
    Crashed,
    /// A [`StopHandle`] was used.
    Stopped,
}

/// What is known after the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Why the machine ended.
    pub reason: ExitReason,
    /// What the built-in guest reported, in order of disks. Empty for Linux. A disk is missing if the
    /// guest ended before it came to it.
    pub disks: Vec<DiskReport>,
}

/// What [`Machine::run`] waits for.
pub(crate) enum Event {
    /// A vCPU ended the machine.
    Ended(Result<ExitReason>),
    /// Somebody asked for the end.
    Stop,
}

/// Ends a machine from another thread. May be used before, during and after the run, any number of
/// times.
#[derive(Clone)]
pub struct StopHandle {
    events: mpsc::Sender<Event>,
}

impl StopHandle {
    /// Makes [`Machine::run`] return [`ExitReason::Stopped`], unless the machine ends by itself first. Two things hold
    /// that up: a disk whose backend does not return from a call, and a [`console`](MachineConfig::console) that does
    /// not let itself be interrupted.
    pub fn stop(&self) {
        // An error means that the machine is gone.
        let _ = self.events.send(Event::Stop);
    }
}

/// The way of what a user types into the guest's serial port. It keeps no console open whose machine has ended.
#[derive(Clone)]
pub struct ConsoleInput {
    serial: Weak<Mutex<SerialPort>>,
}

impl ConsoleInput {
    /// Hands bytes to the guest. Returns how many the serial port's buffer had room for; try the rest
    /// again a little later, when the guest has read some. Never waits, not for the console either. Once the machine
    /// has ended, all bytes are taken, and nobody gets them.
    pub fn send(&self, bytes: &[u8]) -> usize {
        let Some(serial) = self.serial.upgrade() else { return bytes.len() };
        match serial.try_lock() {
            Ok(mut serial) => serial.input(bytes),
            Err(TryLockError::Poisoned(serial)) => serial.into_inner().input(bytes),
            // A vCPU has it, perhaps until somebody reads the console: whoever calls this, perhaps.
            Err(TryLockError::WouldBlock) => 0,
        }
    }
}

/// Sees what a disk of a machine does, from any thread, also after the end of the machine.
#[derive(Clone)]
pub struct DiskHandle {
    device: Arc<BlockDevice>,
    interrupt: Arc<Interrupt>,
}

impl DiskHandle {
    /// What the device did so far.
    pub fn stats(&self) -> DeviceStats {
        self.device.stats()
    }

    /// Tells the guest that the disk has another size.
    pub fn config_changed(&self) {
        self.interrupt.config_changed();
    }
}

/// A machine that is ready to run.
pub struct Machine {
    // In this order they are dropped: vCPUs and VM before what they refer to.
    vcpus: Vec<VcpuFd>,
    vm: VmFd,
    shared: Arc<Shared>,
    sender: mpsc::Sender<Event>,
    events: mpsc::Receiver<Event>,
    beginning: Beginning,
}

impl Machine {
    /// Puts a machine together and loads what it will run. Every file that the machine needs is opened
    /// here; [`run`](Self::run) opens none.
    ///
    /// The process gives up its first real-time signal (`SIGRTMIN`): vCPUs are woken by it.
    ///
    /// # Errors
    /// [`Unavailable`](ErrorKind::Unavailable) if there is no usable `/dev/kvm`,
    /// [`Config`](ErrorKind::Config) if a number is out of range, [`Payload`](ErrorKind::Payload) if
    /// the kernel or the initramfs is no good, [`Host`](ErrorKind::Host) for the rest.
    pub fn new(config: MachineConfig) -> Result<Self> {
        check(&config)?;
        let memory = memory::allocate(config.memory_bytes)?;
        let kvm = open_kvm()?;
        vcpu::claim_signal()?;
        let vm = create_vm(&kvm)?;
        memory::register(&vm, &memory)?;

        let stop = Arc::new(AtomicBool::new(false));
        let console = Console::new(config.console, Arc::clone(&stop));
        let irq = irqfd(&vm, SERIAL_GSI)?;
        let serial = SerialPort::new(irq, console.clone());
        let disks = disk_slots()
            .zip(config.disks.iter().enumerate())
            .map(|(slot, (number, disk))| plug_in(&vm, &memory, slot, number, disk).map(Mutex::new))
            .collect::<Result<Vec<_>>>()?;

        let (entry, control) = match &config.payload {
            Payload::Linux { kernel, initramfs, cmdline } => {
                let linux = Linux { kernel, initramfs: initramfs.as_ref(), cmdline };
                let bytes = config.memory_bytes & !((1 << 20) - 1);
                (linux::load(&memory, bytes, config.vcpus, disks.len(), &linux)?, None)
            }
            Payload::BuiltinGuest => {
                let count = u32::try_from(disks.len()).unwrap_or(u32::MAX);
                let control = Control::new(count, memory.clone(), console);
                (builtin::load(&memory)?, Some(Mutex::new(control)))
            }
        };
        cpu::write_tables(&memory, entry.privilege)?;

        let identity = Identity::new(&kvm, config.vcpus)?;
        let vcpus = (0..config.vcpus)
            .map(|id| {
                let vcpu = vm.create_vcpu(id.into()).map_err(Error::host("create a vCPU"))?;
                identity.apply(&vcpu, id)?;
                if id == 0 {
                    cpu::start(&vcpu, entry)?;
                }
                Ok(vcpu)
            })
            .collect::<Result<Vec<_>>>()?;

        let devices = Devices { serial: Arc::new(Mutex::new(serial)), disks, control };
        let shared = Arc::new(Shared { devices, _memory: memory, stop });
        let (sender, events) = mpsc::channel();
        Ok(Self { vcpus, vm, shared, sender, events, beginning: Beginning::default() })
    }

    /// Makes the thread of each vCPU call `beginning` first: to lower its own rights. Threads of queues come
    /// from those of vCPUs, and inherit what they lowered.
    #[must_use]
    pub fn vcpus_beginning_with(self, beginning: Beginning) -> Self {
        Self { beginning, ..self }
    }

    /// A handle that ends the machine from another thread.
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle { events: self.sender.clone() }
    }

    /// A handle for each disk, in their order.
    pub fn disks(&self) -> Vec<DiskHandle> {
        self.shared
            .devices
            .disks
            .iter()
            .map(|disk| {
                let (device, interrupt) = lock(disk).parts();
                DiskHandle { device, interrupt }
            })
            .collect()
    }

    /// The way into the guest's serial port.
    pub fn console_input(&self) -> ConsoleInput {
        ConsoleInput { serial: Arc::downgrade(&self.shared.devices.serial) }
    }

    /// Runs the guest until it ends. When this returns, no thread of the machine is left, no request
    /// is in flight, and the disks are as the guest left them; whether they are flushed is the
    /// guest's doing. What holds up the end is at [`StopHandle::stop`].
    ///
    /// # Errors
    /// [`Guest`](ErrorKind::Guest) if KVM cannot go on with what the guest does,
    /// [`Host`](ErrorKind::Host) if the host fails.
    pub fn run(self) -> Result<Exit> {
        let Self { vcpus, vm, shared, sender, events, beginning } = self;
        let mut running = Vec::new();
        let mut started = Ok(());
        for (id, fd) in (0..).zip(vcpus) {
            match Vcpu::spawn(id, fd, shared.clone(), sender.clone(), beginning.clone()) {
                Ok(vcpu) => running.push(vcpu),
                Err(error) => {
                    started = Err(error);
                    break;
                }
            }
        }
        drop(sender);
        let end = started.and_then(|()| match events.recv() {
            Ok(Event::Ended(result)) => result,
            Ok(Event::Stop) => Ok(ExitReason::Stopped),
            Err(mpsc::RecvError) => Err(Error::new(ErrorKind::Host, "every vCPU ended without saying why")),
        });
        shared.stop.store(true, Ordering::Release);
        Vcpu::join_all(running);

        // With the vCPUs gone this is the last reference: taking it apart stops the disks' workers.
        let control = Arc::into_inner(shared).and_then(|shared| shared.devices.control);
        drop(vm);
        let records =
            control.map(|control| control.into_inner().unwrap_or_else(PoisonError::into_inner).into_records());
        let disks = records.iter().flatten().map(DiskReport::from).collect();
        let reason = end?;
        Ok(Exit { reason, disks })
    }
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine")
            .field("vcpus", &self.vcpus.len())
            .field("disks", &self.shared.devices.disks.len())
            .finish_non_exhaustive()
    }
}

fn check(config: &MachineConfig) -> Result<()> {
    let bad = |message: String| Err(Error::new(ErrorKind::Config, message));
    if !(1..=MAX_VCPUS).contains(&config.vcpus) {
        return bad(format!("a machine cannot have {} vCPUs: ask for 1 to {MAX_VCPUS}", config.vcpus));
    }
    if config.disks.len() > MAX_DISKS {
        return bad(format!("a machine cannot have {} disks: it has room for {MAX_DISKS}", config.disks.len()));
    }
    Ok(())
}

fn open_kvm() -> Result<Kvm> {
    let kvm = Kvm::new().map_err(|error| {
        let advice = match error.errno() {
            libc::ENOENT | libc::ENXIO | libc::ENODEV => {
                "this machine has no KVM: switch on virtualization in its firmware (or nested virtualization in \
                 its host) and load the module kvm_intel or kvm_amd"
            }
            libc::EACCES | libc::EPERM => {
                "you may not use it: become a member of the group that owns it (often \"kvm\")"
            }
            _ => "it cannot be opened",
        };
        Error::new(ErrorKind::Unavailable, format!("/dev/kvm: {advice}")).with_source(error)
    })?;
    /// The one version of the interface that there ever was.
    const API_VERSION: i32 = 12;
    if kvm.get_api_version() == API_VERSION {
        Ok(kvm)
    } else {
        Err(Error::new(ErrorKind::Unavailable, "/dev/kvm speaks another version of its interface than 12"))
    }
}

/// A VM with interrupt controllers and timer inside of KVM.
fn create_vm(kvm: &Kvm) -> Result<VmFd> {
    let vm = kvm.create_vm().map_err(Error::host("create a virtual machine"))?;
    vm.set_identity_map_address(KVM_IDENTITY_MAP).map_err(Error::host("place KVM's identity map"))?;
    vm.set_tss_address(KVM_TSS).map_err(Error::host("place KVM's TSS"))?;
    vm.create_irq_chip().map_err(Error::host("create the interrupt controllers"))?;
    // The dummy speaker answers port 0x61, by which kernels calibrate their clock.
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(Error::host("create the timer"))?;
    Ok(vm)
}

/// An eventfd that raises an interrupt line.
fn irqfd(vm: &VmFd, gsi: u32) -> Result<EventFd> {
    let irq = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(Error::host("create an eventfd"))?;
    vm.register_irqfd(&irq, gsi).map_err(Error::host("connect an interrupt"))?;
    Ok(irq)
}

/// Makes one disk a device of `vm`.
fn plug_in(vm: &VmFd, memory: &Memory, slot: DiskSlot, number: usize, disk: &DiskConfig) -> Result<MmioDevice> {
    let options = BlockDeviceOptions {
        serial: disk.serial.clone(),
        queues: disk.queues,
        queue_size: None,
        read_only: disk.read_only,
        cache: disk.cache,
        discard: disk.discard,
        poll: disk.poll,
        limits: disk.limits,
        beginning: disk.beginning.clone(),
    };
    let device = Arc::new(BlockDevice::new(disk.backend.clone(), &options));
    let kicks = (0..u32::from(device.queues()))
        .map(|queue| {
            // Blocking: a worker waits on it.
            let kick = EventFd::new(libc::EFD_CLOEXEC).map_err(Error::host("create an eventfd"))?;
            let register = IoEventAddress::Mmio(slot.base + NOTIFY_OFFSET);
            vm.register_ioevent(&kick, &register, queue).map_err(Error::host("connect a notification"))?;
            Ok(kick)
        })
        .collect::<Result<Vec<_>>>()?;
    MmioDevice::new(format!("disk{number}"), device, memory.clone(), kicks, irqfd(vm, slot.gsi)?)
}
