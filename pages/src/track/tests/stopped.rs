//! A process that job control has stopped.

use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::*;

/// Its parent was told once, and is not told again; it goes on when it is continued.
#[test]
fn a_stopped_process_is_attached_and_stays_stopped() {
    let mut trial = start();
    let pid = Pid::from_raw(trial.pid());
    let stopped = Frozen::new(trial.pid());
    let told = waitpid(pid, Some(WaitPidFlag::WUNTRACED));
    assert_eq!(told, Ok(WaitStatus::Stopped(pid, Signal::SIGSTOP)));
    for _ in 0..3 {
        attach(&trial).detach();
        let is_stopped = |&tid: &i32| task::Status::read(tid).unwrap().state == b'T';
        eventually("the stop", || {
            task::threads(trial.pid()).unwrap().iter().all(is_stopped)
        });
        let flags = WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED | WaitPidFlag::WCONTINUED;
        assert_eq!(waitpid(pid, Some(flags)), Ok(WaitStatus::StillAlive));
    }
    drop(stopped);
    assert_eq!(trial.tell("signals"), "0");
}
