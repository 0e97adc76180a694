//! Which system calls a thread may make, by its role: the tables that a reviewer reads.
//!
//! A call is answered in one of four ways:
//!
//! | answer | for | why this one |
//! |---|---|---|
//! | it is made | what the role needs | |
//! | `ENOSYS` | what no table names | a library that tries a newer call finds a kernel without it, and falls back to an older one that is named here. So `clone3`, whose flags no filter can see, becomes `clone`, whose flags one can |
//! | `EPERM` | calls of [`OPENING`], [`NAMING`], [`SOCKETS`], [`SHARING`] and [`CONNECTING`] that the role does not have, and [`NAMES_OF_NOBODY`] | code that can cope makes them (a panic looks for its own program); the error says what is the matter |
//! | the process ends | calls of [`FATAL`] | nothing in the program makes one: who does has taken it over |

/// What a thread is for, which decides what it may ask of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Role {
    /// Every thread from the moment the walls are raised, in a program that makes sockets or connects: all that
    /// [`Program`](Self::Program) may, and that.
    Sockets,
    /// Every thread from the moment the walls are raised: opens files and gives them names (Landlock says which),
    /// compiles components. Starts no program, and has no use for new sockets: Landlock knows nothing of one that has
    /// a name in the file system, an agent's or a container engine's.
    Program,
    /// Every thread once an image may be opened: opens files, gives and takes no names, and changes no rights, of which
    /// Landlock knows nothing either. Whether an open makes or empties a file is for Landlock to say: the flags of
    /// `openat2` are in memory, which no filter sees.
    Images,
    /// Every thread of a machine once all is open: speaks on sockets it has, moves bytes. Opens nothing.
    Control,
    /// Every thread of a server once all is open: as [`Control`](Self::Control), without a machine, and with what those
    /// need that come from it ([`FrontEnd`](Self::FrontEnd)). Opens nothing.
    Server,
    /// Speaks with a front end (vhost-user): takes descriptors and memory from it, sees what kind they are, and
    /// makes memory to share. Opens nothing.
    FrontEnd,
    /// Answers the operator on a socket that is there: says what disks do, makes one larger. Opens nothing, and has
    /// no device.
    Operator,
    /// Runs a vCPU.
    Vcpu,
    /// Moves bytes between files and a guest: queue workers, threads of an I/O pool.
    ///
    /// A ring of `io_uring` is made before, in a thread with the first role of its process, and restricted there
    /// (`IORING_SETUP_R_DISABLED`, `IORING_REGISTER_RESTRICTIONS`) to reads and writes of files that are registered
    /// with it: one without restrictions opens files and connects for a thread whose filter forbids that. The test
    /// `tests/hostile/traces.rs` looks at every ring that the program makes.
    DataPath,
    /// A whole process that turns bytes that it reads into bytes that it writes: a compiler. Opens nothing, and has
    /// no part of the others' calls that it does not need. Not a thread of a program with other roles.
    Compiler,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Sockets,
        Self::Program,
        Self::Images,
        Self::Control,
        Self::Server,
        Self::FrontEnd,
        Self::Operator,
        Self::Vcpu,
        Self::DataPath,
        Self::Compiler,
    ];

    /// What it may do without a condition, beside what the other functions say.
    pub(crate) fn base(self) -> impl Iterator<Item = libc::c_long> {
        let more = if matches!(self, Self::Compiler) { &[] } else { SERVING };
        COMPUTING.iter().chain(more).copied()
    }

    /// Is the first role of a process.
    pub(crate) const fn is_first(self) -> bool {
        matches!(self, Self::Sockets | Self::Program | Self::Compiler)
    }

    /// May be given threads.
    pub(crate) const fn threads(self) -> bool {
        !matches!(self, Self::Compiler)
    }

    /// May pass the kernel the name of a file, to open it or to look at it.
    pub(crate) const fn names(self) -> bool {
        matches!(self, Self::Sockets | Self::Program | Self::Images)
    }

    /// May make, rename and remove files.
    pub(crate) const fn naming(self) -> bool {
        matches!(self, Self::Sockets | Self::Program)
    }

    /// May make rings of `io_uring`, and restrict them.
    pub(crate) const fn rings(self) -> bool {
        matches!(self, Self::Sockets | Self::Program)
    }

    /// May add to the restrictions of Landlock: `narrow`.
    pub(crate) const fn narrowing(self) -> bool {
        matches!(self, Self::Sockets | Self::Program)
    }

    /// May make memory executable.
    pub(crate) const fn code(self) -> bool {
        matches!(self, Self::Sockets | Self::Program | Self::Images)
    }

    /// May wait for the end of processes that were started before.
    pub(crate) const fn waits(self) -> bool {
        matches!(self, Self::Sockets | Self::Program | Self::Images | Self::Control | Self::Server)
    }

    /// May use sockets that are there.
    pub(crate) const fn sockets(self) -> bool {
        matches!(
            self,
            Self::Sockets
                | Self::Program
                | Self::Images
                | Self::Control
                | Self::Server
                | Self::FrontEnd
                | Self::Operator
        )
    }

    /// May see what a descriptor is that it was sent (a link of `/proc`), and make memory to be shared.
    pub(crate) const fn sharing(self) -> bool {
        matches!(self, Self::Sockets | Self::Program | Self::Images | Self::Server | Self::FrontEnd)
    }

    /// May make sockets of its own.
    pub(crate) const fn connecting(self) -> bool {
        matches!(self, Self::Sockets)
    }

    /// The `ioctl` requests that the role makes.
    pub(crate) const fn ioctls(self) -> &'static [u64] {
        match self {
            Self::Control => CONTROL_IOCTLS,
            Self::Vcpu => VCPU_IOCTLS,
            Self::Sockets
            | Self::Program
            | Self::Images
            | Self::Server
            | Self::FrontEnd
            | Self::Operator
            | Self::DataPath
            | Self::Compiler => USUAL_IOCTLS,
        }
    }

    /// May make any `ioctl` request of KVM beside these: a machine is built.
    pub(crate) const fn machines(self) -> bool {
        matches!(self, Self::Sockets | Self::Program | Self::Images)
    }

    /// The `fcntl` operations that the role makes, whatever their argument.
    pub(crate) const fn fcntls(self) -> &'static [i32] {
        match self {
            Self::Compiler => &[],
            _ => FCNTLS,
        }
    }

    /// May set the flags of what is open, but for one that has it send signals.
    pub(crate) const fn flags(self) -> bool {
        !matches!(self, Self::Compiler)
    }

    /// May take leases on files, whose signal nobody gets.
    pub(crate) const fn leases(self) -> bool {
        matches!(self, Self::Sockets | Self::Program | Self::Images)
    }
}

/// Of terminals and descriptors: what the standard library asks of any. None that puts characters into the input of
/// the operator's terminal, which the shell would run (`TIOCSTI`), or has a descriptor signal another process
/// (`FIOSETOWN`): Landlock judges neither for what was open before, and signals not before version 6.
const USUAL_IOCTLS: &[u64] = &[FIONBIO, FIOCLEX, TCGETS, TCGETS2, TIOCGWINSZ];
/// Running a vCPU, and where it was when it could not go on.
const VCPU_IOCTLS: &[u64] = &[FIONBIO, FIOCLEX, TCGETS, TCGETS2, TIOCGWINSZ, KVM_RUN, KVM_GET_REGS];
/// Taking a machine apart: notifications and interrupts are disconnected.
const CONTROL_IOCTLS: &[u64] =
    &[FIONBIO, FIOCLEX, TCGETS, TCGETS2, TIOCGWINSZ, KVM_RUN, KVM_GET_REGS, KVM_IOEVENTFD, KVM_IRQFD];

// asm-generic/ioctls.h and linux/kvm.h.
const TCGETS: u64 = 0x5401;
const TCGETS2: u64 = 0x802c_542a;
const TIOCGWINSZ: u64 = 0x5413;
const FIONBIO: u64 = 0x5421;
const FIOCLEX: u64 = 0x5451;
/// What all requests of KVM have in common (`KVMIO`), and which bits say so (`_IOC_TYPE`).
pub(crate) const KVM_TYPE: u64 = 0xae00;
pub(crate) const IOCTL_TYPE: u64 = 0xff00;
const KVM_RUN: u64 = 0xae80;
const KVM_GET_REGS: u64 = 0x8090_ae81;
const KVM_IRQFD: u64 = 0x4020_ae76;
const KVM_IOEVENTFD: u64 = 0x4040_ae79;

/// The `fcntl` operations on what is open: duplicates, flags, locks, leases that are there, seals. None that has a
/// descriptor signal another process: `F_SETOWN` is a way around the condition on `tgkill`, and so is `F_SETFL` with
/// `O_ASYNC`, which makes whoever is in the foreground the owner of a terminal. It has a condition of its own.
pub(crate) const FCNTLS: &[i32] = &[
    libc::F_DUPFD_CLOEXEC,
    libc::F_GETFD,
    libc::F_SETFD,
    libc::F_GETFL,
    libc::F_OFD_GETLK,
    libc::F_OFD_SETLK,
    libc::F_GETLEASE,
    libc::F_SETLEASE,
    libc::F_ADD_SEALS,
    libc::F_GET_SEALS,
];

/// linux/fcntl.h: which signal a descriptor sends. To whom is another question.
pub(crate) const F_SETSIG: i32 = 10;

/// The `prctl` operations that threads make: their name, the name of memory, and what installing a filter
/// begins with.
pub(crate) const PRCTLS: &[i32] = &[libc::PR_SET_NAME, libc::PR_SET_VMA, libc::PR_SET_NO_NEW_PRIVS];

/// What every thread may do, and all that one does which computes: have memory, read and write what is open, and end.
pub(crate) const COMPUTING: &[libc::c_long] = &[
    // Memory. `mmap` and `mprotect` have conditions of their own.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // Threads. `tgkill` and `prctl` have conditions of their own.
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    // A further filter only takes away.
    libc::SYS_seccomp,
    libc::SYS_sigaltstack,
    // Time and chance.
    libc::SYS_clock_gettime,
    libc::SYS_getrandom,
    // Open files. `fstat` is here, `statx` has a condition of its own.
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
];

/// What every thread of a program may do beside [`COMPUTING`]: start others, sleep, and use open files in every way.
pub(crate) const SERVING: &[libc::c_long] = &[
    // Threads. `clone` has conditions of its own.
    libc::SYS_membarrier,
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    // Time.
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_nanosleep,
    // Open files. `fcntl` and `ioctl` have conditions of their own.
    libc::SYS_copy_file_range,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_lseek,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_sync_file_range,
    // Waiting for them.
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_pipe2,
    libc::SYS_ppoll,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_gettime,
    libc::SYS_timerfd_settime,
    // What passes through a ring is seen by no filter: so none is made once an image may be open, and those that are
    // there are restricted (`Role::DataPath`). `io_uring_register` has a condition of its own.
    libc::SYS_io_uring_enter,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
];

/// Making rings, with whatever can be registered with one.
pub(crate) const RINGS: &[libc::c_long] = &[libc::SYS_io_uring_register, libc::SYS_io_uring_setup];

/// What is registered with a ring that is there: files (`IORING_REGISTER_FILES_UPDATE` of linux/io_uring.h).
pub(crate) const RING_FILES: u64 = 6;

/// A further layer of Landlock, which only takes away.
pub(crate) const NARROWING: &[libc::c_long] =
    &[libc::SYS_landlock_add_rule, libc::SYS_landlock_create_ruleset, libc::SYS_landlock_restrict_self];

/// Opening files by their names, and looking at them.
pub(crate) const OPENING: &[libc::c_long] = &[
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_getcwd,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_statfs,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_access,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lstat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_stat,
];

/// Giving names and taking them away, and what goes with it: the cache of compiled components, new files.
pub(crate) const NAMING: &[libc::c_long] = &[
    libc::SYS_getdents64,
    libc::SYS_linkat,
    libc::SYS_mkdirat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_unlinkat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_link,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mkdir,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rename,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rmdir,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_unlink,
];

/// Of the same kind, those that no program of ours makes. Landlock does not judge most of them: who has an image may
/// otherwise change the rights of every file that is the user's.
pub(crate) const NAMES_OF_NOBODY: &[libc::c_long] = &[
    libc::SYS_chdir,
    libc::SYS_fchdir,
    libc::SYS_fchmodat,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_fsetxattr,
    libc::SYS_setxattr,
    libc::SYS_symlinkat,
    libc::SYS_truncate,
    libc::SYS_utimensat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_chmod,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_chown,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_creat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lchown,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_symlink,
];

/// What a program does beside opening files: who it is. What its limits are (`prlimit64`) has a condition.
pub(crate) const STARTING: &[libc::c_long] = &[
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getuid,
    libc::SYS_sysinfo,
    libc::SYS_umask,
    libc::SYS_uname,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_getrlimit,
];

/// How a process ended that was started before.
pub(crate) const WAITING: &[libc::c_long] = &[libc::SYS_wait4, libc::SYS_waitid];

/// Speaking on sockets that are there. Descriptors of a guest's memory come through them.
pub(crate) const SOCKETS: &[libc::c_long] = &[
    libc::SYS_accept4,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
];

/// What a front end's descriptors are, and memory for it. Neither opens a file.
pub(crate) const SHARING: &[libc::c_long] = &[
    libc::SYS_memfd_create,
    libc::SYS_readlinkat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
];

/// Making sockets, and giving them to one user and in one piece.
pub(crate) const CONNECTING: &[libc::c_long] = &[
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_fchmod,
    libc::SYS_flock,
    libc::SYS_listen,
    libc::SYS_socket,
    libc::SYS_socketpair,
];

/// What nothing in the program ever asks for.
pub(crate) const FATAL: &[libc::c_long] = &[
    // Another program, or another's memory.
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_pidfd_getfd,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    // Files by number, past every name and every directory.
    libc::SYS_open_by_handle_at,
    // Another view of the system.
    libc::SYS_chroot,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_mount,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_pivot_root,
    libc::SYS_setns,
    libc::SYS_umount2,
    libc::SYS_unshare,
    // Other rights.
    libc::SYS_capset,
    libc::SYS_setgid,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    libc::SYS_setuid,
    // The kernel itself, and where its bugs are found.
    libc::SYS_add_key,
    libc::SYS_bpf,
    libc::SYS_delete_module,
    libc::SYS_finit_module,
    libc::SYS_init_module,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_perf_event_open,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_userfaultfd,
];
