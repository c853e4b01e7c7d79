//! How urgent a thread is: its nice value, from -20 (first) to 19 (last).

#![allow(unsafe_code)]

use std::io;

/// More urgent than everything that is not real-time.
const URGENT: i32 = -20;

/// Makes the calling thread urgent, and what it starts; without CAP_SYS_NICE it stays as it is.
/// Answers how nice it was.
pub fn make_urgent() -> i32 {
    // SAFETY: numbers only. An error is the value -1, which is also a nice value that nobody
    // misses much.
    let before = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    if let Err(error) = set(URGENT) {
        tracing::debug!(%error, "not urgent");
    }
    before
}

/// Sets the nice value of the calling thread. Less needs CAP_SYS_NICE.
pub fn set(nice: i32) -> io::Result<()> {
    // SAFETY: numbers only; in Linux, "process" 0 is the calling thread.
    match unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_was_urgent_is_as_nice_as_before() {
        let checked = std::thread::spawn(|| {
            let before = make_urgent();
            set(before)?;
            Ok::<_, io::Error>((before, make_urgent()))
        });
        let (before, again) = checked.join().expect("no panic").expect("a nice value");
        assert_eq!(before, again);
    }
}
