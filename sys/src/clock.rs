//! The clock that all processes of one boot share: it never jumps, and counts while the machine
//! sleeps.

use nix::time::{ClockId, clock_gettime};

/// Nanoseconds since the boot.
///
/// # Panics
/// On a kernel without that clock: older than any that can be a source or a target.
pub fn since_boot() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("every kernel since 2.6.39 has it");
    let part = |part: i64| u64::try_from(part).unwrap_or_default();
    part(now.tv_sec()) * 1_000_000_000 + part(now.tv_nsec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_on_and_is_the_kernels() {
        let before = since_boot();
        let uptime = std::fs::read_to_string("/proc/uptime").expect("the kernel says it");
        let after = since_boot();
        assert!(before <= after);
        let seconds: f64 = uptime
            .split(' ')
            .next()
            .and_then(|seconds| seconds.parse().ok())
            .expect("seconds");
        // It has hundredths.
        let (least, most) = (before as f64 / 1e9 - 0.02, after as f64 / 1e9 + 0.02);
        assert!(
            (least..=most).contains(&seconds),
            "{least} {seconds} {most}"
        );
    }
}
