//! An allocator for programs that end with an exit code of their own when memory runs out.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::Write;

/// The system's allocator, whose failure ends the process with a message and an exit code.
///
/// What a program can foresee it refuses beforehand. For the rest, Rust's own way is to abort, which a
/// scheduler takes for a crash. Declare it in a binary:
///
/// ```
/// use ferrotune_kernels::ExitWhenExhausted;
///
/// #[global_allocator]
/// static ALLOCATOR: ExitWhenExhausted = ExitWhenExhausted::with_code(71);
/// # fn main() {}
/// ```
///
/// Code that would go on after a failed allocation (`Vec::try_reserve`) does not get to do so.
#[derive(Debug)]
pub struct ExitWhenExhausted {
    code: i32,
}

impl ExitWhenExhausted {
    /// Ends the process with `code`.
    #[must_use]
    pub const fn with_code(code: i32) -> Self {
        Self { code }
    }

    /// `pointer`, unless it is null: then there is no memory, and nothing here may ask for any.
    fn check(&self, pointer: *mut u8, bytes: usize) -> *mut u8 {
        if pointer.is_null() {
            self.exit(bytes);
        }
        pointer
    }

    #[cold]
    fn exit(&self, bytes: usize) -> ! {
        let _ = writeln!(
            std::io::stderr(),
            "error: does not fit: no memory for another {bytes} bytes; take a smaller batch, length, rank \
             or model, or raise the limit that is in force (ulimit -v, a control group)"
        );
        // SAFETY: ends the process at once, without handlers that could ask for memory.
        unsafe { libc::_exit(self.code) }
    }
}

// SAFETY: every call goes to `System` as it came, and what `System` gives is handed on.
unsafe impl GlobalAlloc for ExitWhenExhausted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are `System`'s conditions.
        let pointer = unsafe { System.alloc(layout) };
        self.check(pointer, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are `System`'s conditions.
        let pointer = unsafe { System.alloc_zeroed(layout) };
        self.check(pointer, layout.size())
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promises are `System`'s conditions.
        let pointer = unsafe { System.realloc(pointer, layout, size) };
        self.check(pointer, size)
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are `System`'s conditions.
        unsafe { System.dealloc(pointer, layout) }
    }
}
