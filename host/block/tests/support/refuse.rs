//! A kernel that fails: system calls of one thread have errors. By itself: not all who use the rest of this directory
//! have `libc`.

/// From here on the kernel answers these system calls of this thread with `error` (seccomp(2)). For a thread that
/// ends: nothing takes it back.
#[allow(unsafe_code)]
pub(crate) fn refuse_calls(calls: &[libc::c_long], error: i32) {
    // The number of a call is the first word of `struct seccomp_data`.
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let compare = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let answer = libc::BPF_RET | libc::BPF_K;
    let line = |code: u32, k: u32, jf: u8| libc::sock_filter { code: u16::try_from(code).unwrap(), jt: 0, jf, k };
    let mut lines = vec![line(load, 0, 0)];
    for call in calls {
        // Past the answer, if it is another one.
        lines.push(line(compare, u32::try_from(*call).unwrap(), 1));
        lines.push(line(answer, libc::SECCOMP_RET_ERRNO | u32::try_from(error).unwrap(), 0));
    }
    lines.push(line(answer, libc::SECCOMP_RET_ALLOW, 0));
    let program = libc::sock_fprog { len: u16::try_from(lines.len()).unwrap(), filter: lines.as_mut_ptr() };
    // SAFETY: the program is there for as long as the call takes, and is as long as it says.
    let installed = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            | libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program)
    };
    assert_eq!(installed, 0, "{}", std::io::Error::last_os_error());
}
