//! What an operating system and a C library would have provided.

use core::arch::{asm, global_asm};
use core::fmt::Write;
use core::panic::PanicInfo;

use blockhouse_guest::EXIT_PANIC;

use crate::console::Console;

// The machine sets the instruction pointer and nothing else. A function expects the stack to be
// aligned to 16 bytes before the call that entered it.
global_asm!(
    ".section .text.start, \"ax\"",
    ".global _start",
    "_start:",
    "lea rsp, [rip + {stack} + {size}]",
    "xor ebp, ebp",
    "call {main}",
    "ud2",
    stack = sym STACK,
    size = const STACK_LEN,
    main = sym crate::main,
);

const STACK_LEN: usize = 64 << 10;

#[repr(C, align(16))]
struct Stack(core::cell::UnsafeCell<[u8; STACK_LEN]>);

// SAFETY: Rust code never names it; it is the memory below the stack pointer.
unsafe impl Sync for Stack {}

static STACK: Stack = Stack(core::cell::UnsafeCell::new([0; STACK_LEN]));

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let _ = writeln!(Console, "guest: {info}");
    crate::exit(EXIT_PANIC)
}

// The compiler calls these by name. String instructions keep it from recognising a loop that copies
// and calling the very function that it is compiling.

/// Copies `len` bytes; the ranges do not overlap.
///
/// # Safety
/// As for C's `memcpy`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: the caller promises `len` valid bytes at both; the direction flag is clear by the ABI.
    unsafe {
        asm!("rep movsb", inout("rcx") len => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags));
    }
    to
}

/// Fills `len` bytes with the low byte of `value`.
///
/// # Safety
/// As for C's `memset`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, len: usize) -> *mut u8 {
    // SAFETY: the caller promises `len` valid bytes; the direction flag is clear by the ABI.
    unsafe {
        asm!("rep stosb", inout("rcx") len => _, inout("rdi") to => _, in("eax") value,
            options(nostack, preserves_flags));
    }
    to
}
