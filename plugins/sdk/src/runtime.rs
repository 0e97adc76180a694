//! Memory for a component that stands alone: the allocator, and the entry point by which the host puts
//! strings and lists into it.
//!
//! Needs no import. `plugins/probe` compiles this file as a module of its own: a prober cannot depend
//! on the tool kit, whose panic handler imports the log.

use core::alloc::Layout;

#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

/// Memory for what the host passes in, as the canonical ABI asks for.
///
/// # Safety
/// Called by the canonical ABI only, with `old_pointer`, `old_length` and `align` from an earlier
/// call.
// SAFETY of the name: it is the one that the component tool chain looks for, defined once, here.
#[unsafe(no_mangle)]
unsafe extern "C" fn cabi_realloc(old_pointer: *mut u8, old_length: usize, align: usize, new_length: usize) -> *mut u8 {
    let Ok(layout) = Layout::from_size_align(new_length, align) else { core::arch::wasm32::unreachable() };
    let pointer = if new_length == 0 {
        // The ABI wants a well-aligned pointer, and never reads through it.
        return core::ptr::without_provenance_mut(align);
    } else if old_length == 0 {
        // SAFETY: the size of the layout is not 0.
        unsafe { alloc::alloc::alloc(layout) }
    } else {
        // SAFETY: `old_pointer` came from this function with this length and alignment, and the new
        // length, checked above with this alignment, is not 0.
        unsafe { alloc::alloc::realloc(old_pointer, Layout::from_size_align_unchecked(old_length, align), new_length) }
    };
    if pointer.is_null() {
        // Out of memory is a trap: the host throws the instance away.
        core::arch::wasm32::unreachable()
    }
    pointer
}

/// What the compiler calls to compare byte strings. It comes with a C library, which a component without
/// std does not link; copying and filling are instructions of WebAssembly.
///
/// # Safety
/// Called by compiled code only, with `length` readable bytes at both pointers.
// SAFETY of the name: it is the one that the compiler calls, defined once, here.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, length: usize) -> i32 {
    for at in 0..length {
        // SAFETY: `at` is below `length`.
        let (left, right) = unsafe { (left.add(at).read(), right.add(at).read()) };
        if left != right {
            return i32::from(left) - i32::from(right);
        }
    }
    0
}
