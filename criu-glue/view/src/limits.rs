//! Resource limits where the kernel does not tell them.
//!
//! CRIU asks `prlimit64` for the limits of every task. Without `CAP_SYS_RESOURCE`, which many
//! virtual machines and all nested containers lack, the kernel answers only for tasks of CRIU's own
//! user, though `/proc/PID/limits` tells root the same numbers. CRIU makes the call by `syscall`,
//! so that is what is interposed: every call is passed on as it came, and only an `EPERM` for a
//! query is answered otherwise.

#[cfg(target_arch = "x86_64")]
mod interposed {
    use std::ffi::{c_int, c_long};

    /// `syscall(2)`. Not variadic: on x86-64 all arguments are in the same places.
    #[cfg_attr(not(test), unsafe(no_mangle))]
    extern "C" fn syscall(
        number: c_long,
        a: c_long,
        b: c_long,
        c: c_long,
        d: c_long,
        e: c_long,
        f: c_long,
    ) -> c_long {
        let result = raw(number, [a, b, c, d, e, f]);
        let Ok(code) = c_int::try_from(-result) else {
            return result;
        };
        // The kernel returns errors as -4095 to -1.
        if !(1..=4095).contains(&code) {
            return result;
        }
        let query = number == libc::SYS_prlimit64 && c == 0 && d != 0;
        if query
            && code == libc::EPERM
            && let (Ok(pid), Ok(resource)) = (i32::try_from(a), usize::try_from(b))
            && let Some((soft, hard)) = super::of_process(pid, resource)
        {
            let limit = libc::rlimit64 {
                rlim_cur: soft,
                rlim_max: hard,
            };
            // SAFETY: the caller passes a place for the answer, which the kernel has left alone.
            unsafe { (d as *mut libc::rlimit64).write(limit) };
            return 0;
        }
        // SAFETY: the C library's own errno of this thread.
        unsafe { *libc::__errno_location() = code };
        -1
    }

    /// The system call itself. The C library's function would be the one above.
    fn raw(number: c_long, [a, b, c, d, e, f]: [c_long; 6]) -> c_long {
        let result;
        // SAFETY: passed on as it came; `rcx` and `r11` are all that the kernel changes.
        unsafe {
            std::arch::asm!(
                "syscall",
                inlateout("rax") number => result,
                in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e, in("r9") f,
                lateout("rcx") _, lateout("r11") _,
                options(nostack),
            );
        }
        result
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn calls_are_passed_on_with_result_and_errno() {
            assert_eq!(
                syscall(libc::SYS_getpid, 0, 0, 0, 0, 0, 0),
                c_long::from(std::process::id())
            );
            assert_eq!(syscall(libc::SYS_close, -1, 0, 0, 0, 0, 0), -1);
            let error = std::io::Error::last_os_error();
            assert_eq!(error.raw_os_error(), Some(libc::EBADF));
        }
    }
}

/// The soft and the hard limit of a resource of a process, by its number.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
fn of_process(pid: i32, resource: usize) -> Option<(u64, u64)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    // After the heading the lines are in the order of the numbers; names have spaces in them.
    let line = text.lines().nth(resource + 1)?;
    let mut columns = line.get(NAME_WIDTH..)?.split_ascii_whitespace();
    let mut limit = || match columns.next()? {
        "unlimited" => Some(libc::RLIM64_INFINITY),
        number => number.parse().ok(),
    };
    Some((limit()?, limit()?))
}

/// Width of the column of names: `"%-25s %-20s %-20s %-10s\n"` in the kernel's `proc_pid_limits`.
const NAME_WIDTH: usize = 26;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn procfs_tells_what_the_kernel_tells() {
        for resource in 0..16 {
            let mut limit = libc::rlimit64 {
                rlim_cur: 0,
                rlim_max: 0,
            };
            // SAFETY: `limit` is a live local variable.
            let asked = unsafe { libc::getrlimit64(resource, &raw mut limit) };
            assert_eq!(asked, 0, "resource {resource}");
            let own = i32::try_from(std::process::id()).expect("a pid");
            let found = of_process(own, usize::try_from(resource).expect("small"));
            assert_eq!(
                found,
                Some((limit.rlim_cur, limit.rlim_max)),
                "resource {resource}"
            );
        }
        assert_eq!(of_process(i32::MAX, 0), None);
        assert_eq!(of_process(1, 99), None);
    }
}
