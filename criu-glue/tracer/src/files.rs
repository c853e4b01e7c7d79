//! The descriptors CRIU and its tracer share.

use std::fs;

/// Those CRIU was started with: its output, and the socket of whoever it works for.
#[derive(Clone, Debug)]
pub struct Inherited(Vec<u32>);

impl Inherited {
    /// All that are open. To be called before CRIU opens one.
    pub fn now() -> Self {
        let listed = fs::read_dir("/proc/self/fd").into_iter().flatten();
        let listed = listed.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        let mut open: Vec<u32> = listed.collect();
        // The directory itself was among them.
        open.retain(|fd| is_open(*fd));
        open.sort_unstable();
        Self(open)
    }

    /// Closes all others.
    pub fn close_others(&self) {
        let mut from = 0;
        for kept in &self.0 {
            if let Some(last) = kept.checked_sub(1)
                && from <= last
            {
                close(from, last);
            }
            from = kept + 1;
        }
        close(from, u32::MAX);
    }
}

fn is_open(fd: u32) -> bool {
    // SAFETY: numbers only.
    libc::c_int::try_from(fd).is_ok_and(|fd| unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0)
}

fn close(first: u32, last: u32) {
    // SAFETY: numbers only. Nothing of ours is behind these descriptors; CRIU is no more.
    unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
}
