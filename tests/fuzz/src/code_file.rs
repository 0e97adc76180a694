//! Files of compiled code: one is taken exactly if it is whole and is what it is asked for.

use std::fs::{File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};

use rustix::fs::{MemfdFlags, memfd_create};
use sha2::{Digest, Sha256};

use crate::included::whole;

const MAGIC: &[u8; 8] = b"BHCODE1\n";

thread_local! {
    static FILE: File = {
        let file = File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a file in memory"));
        file.set_permissions(Permissions::from_mode(0o600)).expect("a file of ours");
        file
    };
}

pub(crate) fn run(data: &[u8]) {
    let [how, rest @ ..] = data else { return };
    let mut bytes = rest.to_vec();
    // No fuzzer guesses a SHA-256: half of the inputs get the right one, and some a bit of it wrong.
    if how & 1 == 1 && bytes.len() >= 40 {
        let digest: [u8; 32] = Sha256::digest(&bytes[40..]).into();
        bytes[8..40].copy_from_slice(&digest);
        if how & 6 == 6 {
            bytes[8 + usize::from(how >> 3)] ^= 1 << (how & 7);
        }
    }
    if how & 8 == 8 {
        let head = bytes.len().min(8);
        bytes[..head].copy_from_slice(&MAGIC[..head]);
    }
    let expected =
        bytes.strip_prefix(MAGIC).and_then(|rest| rest.split_at_checked(32)).and_then(|(digest, content)| {
            let right: [u8; 32] = Sha256::digest(content).into();
            (digest == right).then_some(content)
        });
    FILE.with(|file| {
        file.set_len(0).expect("a file in memory");
        file.write_all_at(&bytes, 0).expect("a file in memory");
        // Opened anew: reading starts at the beginning.
        let file = File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file))).expect("it is there");
        let found = whole::read(&file, MAGIC, 1);
        assert_eq!(found.as_ref().ok().map(whole::Whole::content), expected, "{found:?}");
        if let Some(content) = expected {
            let mut written = Vec::new();
            whole::write(&mut written, MAGIC, &[content]).expect("memory");
            assert!(written == bytes, "written in another way than it was read");
        }
    });
}
