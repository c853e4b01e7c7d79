//! What a panic means to a program that lives on: its end, whichever thread it happens in.

use std::{panic, process};

/// Has each panic of this process, once it is reported, end it with `SIGABRT`. To be called before
/// there are threads: a thread that only unwinds leaves others waiting for what it held.
pub fn ends_the_process() {
    let report = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        report(panic);
        process::abort();
    }));
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;
    use std::{env, thread};

    /// Has the test below be the program.
    const PROGRAM: &str = "PAGEFERRY_PANICS";

    #[test]
    fn a_panic_in_any_thread_ends_the_process() {
        if env::var_os(PROGRAM).is_some() {
            super::ends_the_process();
            drop(thread::spawn(|| panic!("on purpose")).join());
            return;
        }
        let name = "panic::tests::a_panic_in_any_thread_ends_the_process";
        let ended = Command::new(env::current_exe().expect("this program"))
            .args(["--exact", name, "--nocapture"])
            .env(PROGRAM, "1")
            .output()
            .expect("started");
        assert_eq!(ended.status.signal(), Some(libc::SIGABRT), "{ended:?}");
        let said = String::from_utf8_lossy(&ended.stderr);
        assert!(said.contains("on purpose"), "{said}");
    }
}
