//! The heap of this process: how much freed memory the C library keeps.
//!
//! glibc makes an arena per thread, up to eight per core, and each keeps what was freed in it. It
//! also stops returning large buffers at once after the first one was freed: it takes that for a
//! sign that such sizes come and go. The buffers of a migration are 4 MiB each and are made on
//! other threads every time, so a daemon grew by some of them with every migration, up to 330 MiB.

#![allow(unsafe_code)]

/// Lets the C library keep little of what is freed: buffers of a migration are returned when it
/// ends. To be called before there are threads. Without effect where the C library is not glibc.
pub fn keep_little() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in [
        (libc::M_ARENA_MAX, ARENAS_MAX),
        (libc::M_MMAP_THRESHOLD, LARGE_BYTES),
        (libc::M_TRIM_THRESHOLD, TRIM_BYTES),
    ] {
        // SAFETY: numbers only, and it is safe to call at any time. A value that it refuses leaves
        // the default, which costs memory and nothing else.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// Heaps that threads share: packets are received, decrypted and read by few threads at a time.
#[cfg(target_env = "gnu")]
const ARENAS_MAX: libc::c_int = 4;

/// Buffers of this size and above, in bytes, are mapped on their own, and unmapped when they are
/// freed: those of parcels, of which there are few, and which pools keep while they are in use.
#[cfg(target_env = "gnu")]
const LARGE_BYTES: libc::c_int = 1 << 20; // 1 MiB

/// Free bytes at the end of a heap that are kept.
#[cfg(target_env = "gnu")]
const TRIM_BYTES: libc::c_int = 4 << 20; // 4 MiB

#[cfg(all(test, target_env = "gnu"))]
mod tests {
    use super::*;

    /// Bytes of buffers that are mapped on their own, as glibc counts them.
    fn mapped_bytes() -> usize {
        // SAFETY: returns numbers.
        unsafe { libc::mallinfo2() }.hblkhd
    }

    /// Where other tests have freed much the C library takes that first, so this one has a process
    /// of its own.
    #[test]
    fn a_large_buffer_is_mapped_on_its_own_also_after_one_was_freed() {
        if std::env::var_os(ALONE).is_none() {
            let name = std::thread::current().name().map(str::to_owned);
            let own = std::env::current_exe().expect("procfs");
            let status = std::process::Command::new(own)
                .args(["--exact", &name.expect("a test's thread has its name")])
                .env(ALONE, "")
                .status();
            assert!(status.expect("this program").success());
            return;
        }
        keep_little();
        const BYTES: usize = 24 << 20; // 24 MiB
        for _ in 0..3 {
            let buffer = vec![1_u8; BYTES];
            assert!(BYTES <= mapped_bytes());
            drop(std::hint::black_box(buffer));
        }
    }

    /// Set in the process that has nothing else to test.
    const ALONE: &str = "PAGEFERRY_TEST_ALONE";
}
