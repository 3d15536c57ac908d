//! The program. All of it is in the library, so that the compiler makes nothing of it twice.

use std::process::ExitCode;

/// Requests make and free many small things on many threads; the C library's allocator took a seventh
/// of the service's time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    service::process::main()
}
