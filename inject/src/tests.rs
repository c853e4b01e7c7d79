//! Locks that real processes take and let go of, running and frozen. All tests need root.

use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use pageferry_cgroup::freezer::{Freezer, FreezerRoot, FreezerVersion};
use pageferry_sys::process_vm::{self, RemoteRun};
use pageferry_sys::{ptrace, task};
use pageferry_trial::{self as trial, Trial};

use super::locks::{self, FileLock, LockKind, Missing, Shown, ShownKind, Taken};
use super::{InjectError, frozen};

/// The other process of these tests.
#[test]
fn workload() {
    trial::obey();
}

const WORKLOAD: &str = "tests::workload";

/// The tests run beside each other, so that a thread may wait for a processor.
const STOP_MAX: Duration = Duration::from_secs(10);

/// A process with a lock, and what belongs to it. The cgroup is thawed and removed on drop.
struct Locked {
    trial: Trial,
    file: PathBuf,
    freezer: Option<Freezer>,
    _folder: tempfile::TempDir,
}

impl Locked {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self {
            trial: Trial::start(WORKLOAD),
            file: folder.path().join("database"),
            freezer: None,
            _folder: folder,
        }
    }

    /// Makes the process take a lock.
    fn lock(
        &mut self,
        kind: LockKind,
        exclusive: bool,
        start: u64,
        bytes: Option<u64>,
    ) -> FileLock {
        let name = match kind {
            LockKind::Flock => "flock",
            LockKind::Ofd => "ofd",
            LockKind::Posix => "posix",
        };
        let access = if exclusive { "write" } else { "read" };
        let path = self.file.display().to_string();
        let all = bytes.unwrap_or_default();
        let fd = self
            .trial
            .tell(&format!("lock-file {path} {name} {access} {start} {all}"));
        FileLock {
            pid: self.trial.pid(),
            fd: fd.parse().unwrap(),
            kind,
            exclusive,
            start,
            bytes,
            path,
            file: None,
            started: Some(task::start_time(self.trial.pid()).unwrap()),
        }
    }

    /// Locks of the three kinds; no two in each other's way.
    fn lock_all(&mut self) -> Vec<FileLock> {
        vec![
            self.lock(LockKind::Posix, true, 0, Some(100)),
            self.lock(LockKind::Posix, false, 200, Some(50)),
            self.lock(LockKind::Ofd, true, 400, None),
            self.lock(LockKind::Flock, true, 0, None),
        ]
    }

    fn freeze(&mut self, version: FreezerVersion) -> Option<Freezer> {
        let freezer = freezer(version, self.trial.pid())?;
        self.freezer = Some(freezer.clone());
        freezer.make().unwrap();
        let pid = self.trial.pid();
        freezer.adopt(|| Ok(vec![pid])).unwrap();
        freezer.freeze().unwrap();
        Some(freezer)
    }

    fn thaw(&mut self) {
        if let Some(freezer) = &self.freezer {
            freezer.thaw().unwrap();
        }
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        if let Some(freezer) = &self.freezer {
            let _ = freezer.kill(Duration::from_secs(10));
            let _ = freezer.remove();
        }
    }
}

/// A cgroup of this version, if this machine has it.
fn freezer(version: FreezerVersion, pid: i32) -> Option<Freezer> {
    let name = format!("pageferry-inject-{pid}");
    match version {
        FreezerVersion::V1 => {
            let root = FreezerRoot::detect().ok()?;
            (root.version() == version).then(|| root.plan(&name))
        }
        FreezerVersion::V2 => {
            let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
            let unified = mounts.lines().find(|line| line.contains(" - cgroup2 "))?;
            let point = Path::new(unified.split(' ').nth(4)?);
            Some(Freezer::at(point.join(name)))
        }
    }
}

/// What is held of a file, as the kernel shows it: kind, access, first byte.
fn held(path: &Path) -> Vec<(LockKind, bool, u64)> {
    use std::os::unix::fs::MetadataExt;
    let inode = format!(":{}", fs::metadata(path).unwrap().ino());
    let mut found: Vec<_> = Shown::all()
        .unwrap()
        .into_iter()
        .filter(|shown| shown.file.ends_with(&inode) && !shown.waits)
        .map(|shown| match shown.kind {
            ShownKind::Lock(kind) => (kind, shown.exclusive, shown.start),
            ShownKind::Other(name) => panic!("{name}"),
        })
        .collect();
    found.sort_by_key(|(kind, _, start)| (format!("{kind:?}"), *start));
    found
}

const ALL: [(LockKind, bool, u64); 4] = [
    (LockKind::Flock, true, 0),
    (LockKind::Ofd, true, 400),
    (LockKind::Posix, true, 0),
    (LockKind::Posix, false, 200),
];

/// All are let go of, by processes that are alive.
fn let_go(locks: &[FileLock], freezer: &Freezer) {
    assert_eq!(locks::let_go_frozen(locks, freezer).unwrap(), [0; 0]);
}

/// All are had, by processes that are alive.
fn taken(locks: &[FileLock], freezer: &Freezer) {
    let taken = locks::take_frozen(locks, freezer).unwrap();
    assert_eq!(taken, Taken::default());
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "{what} does not come about");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn everywhere(check: impl Fn(FreezerVersion)) {
    check(FreezerVersion::V1);
    check(FreezerVersion::V2);
}

#[test]
fn locks_of_a_frozen_process_are_let_go_and_taken_back() {
    everywhere(|version| {
        let mut locked = Locked::start();
        locked.trial.tell("threads 5");
        let all = locked.lock_all();
        let Some(freezer) = locked.freeze(version) else {
            return;
        };
        assert_eq!(held(&locked.file), ALL);
        for _ in 0..3 {
            let_go(&all, &freezer);
            assert_eq!(held(&locked.file), []);
            assert!(freezer.is_frozen().unwrap());
            // Nobody has them any more, and it does no harm.
            let_go(&all, &freezer);
            taken(&all, &freezer);
            assert_eq!(held(&locked.file), ALL);
            taken(&all, &freezer);
            assert!(freezer.is_frozen().unwrap());
        }
        locked.thaw();
        assert_eq!(locked.trial.tell("signals"), "0");
    });
}

#[test]
fn a_frozen_process_does_nothing_while_its_locks_are_let_go() {
    everywhere(|version| {
        let mut locked = Locked::start();
        let lock = locked.lock(LockKind::Posix, true, 0, None);
        let Some(freezer) = locked.freeze(version) else {
            return;
        };
        // An order waits in its pipe.
        locked.trial.tell_silently("count-signals");
        for _ in 0..20 {
            let_go(std::slice::from_ref(&lock), &freezer);
            taken(std::slice::from_ref(&lock), &freezer);
        }
        locked.trial.signal(trial::counted_signal());
        locked.thaw();
        // It was not counted as the order had not been read: the process would have died of it.
        eventually("the end", || task::has_ended(locked.trial.pid()));
    });
}

#[test]
fn a_lock_that_another_has_taken_is_not_taken_and_who_has_it_is_told() {
    everywhere(|version| {
        for (kind, rival) in [
            (LockKind::Posix, "posix write 50 1"),
            (LockKind::Ofd, "ofd read 99 0"),
            (LockKind::Flock, "flock read 0 0"),
        ] {
            let mut locked = Locked::start();
            let lock = locked.lock(kind, true, 0, None);
            let Some(freezer) = locked.freeze(version) else {
                return;
            };
            let lock = [lock];
            let_go(&lock, &freezer);
            let mut other = Trial::start(WORKLOAD);
            let fd = other.tell(&format!("lock-file {} {rival}", locked.file.display()));
            let missing = Missing {
                lock: lock[0].clone(),
                holder: (kind != LockKind::Ofd).then_some(other.pid()),
            };
            let expected = Taken {
                missing: Some(missing),
                ended: Vec::new(),
            };
            assert_eq!(locks::take_frozen(&lock, &freezer).unwrap(), expected);
            assert!(freezer.is_frozen().unwrap());
            other.tell(&format!("close {fd}"));
            taken(&lock, &freezer);
        }
    });
}

#[test]
fn locks_are_taken_by_a_process_that_goes_on_waiting() {
    let mut locked = Locked::start();
    let all = locked.lock_all();
    let Some(freezer) = locked.freeze(FreezerVersion::V1) else {
        return;
    };
    let_go(&all, &freezer);
    locked.thaw();
    // It waits for an order.
    assert_eq!(locks::take_held(&all, STOP_MAX).unwrap(), None);
    assert_eq!(held(&locked.file), ALL);
    assert_eq!(locked.trial.tell("signals"), "0");
    let shown = Shown::all().unwrap();
    let flock = ShownKind::Lock(LockKind::Flock);
    let is_flock = |shown: &&Shown| shown.kind == flock && shown.exclusive;
    let by = shown.iter().filter(is_flock).map(|shown| shown.pid);
    assert!(by.collect::<Vec<_>>().contains(&locked.trial.pid()));
}

#[test]
fn a_process_that_job_control_has_stopped_lets_go_and_stays_stopped() {
    everywhere(|version| {
        let mut locked = Locked::start();
        let lock = [locked.lock(LockKind::Posix, true, 0, None)];
        locked.trial.signal(libc::SIGSTOP);
        let pid = locked.trial.pid();
        let is_stopped = || task::Status::read(pid).unwrap().state == b'T';
        eventually("the stop", is_stopped);
        let Some(freezer) = locked.freeze(version) else {
            return;
        };
        let_go(&lock, &freezer);
        assert_eq!(held(&locked.file), []);
        assert!(freezer.is_frozen().unwrap());
        taken(&lock, &freezer);
        locked.thaw();
        eventually("the stop after the thaw", is_stopped);
        locked.trial.signal(libc::SIGCONT);
        assert_eq!(locked.trial.tell("signals"), "0");
        assert_eq!(held(&locked.file), [(LockKind::Posix, true, 0)]);
    });
}

#[test]
fn who_waits_for_a_lock_in_a_frozen_cgroup_is_not_shown_and_waits_on() {
    everywhere(|version| {
        let mut locked = Locked::start();
        let held_lock = [locked.lock(LockKind::Posix, true, 0, None)];
        let mut waiter = Trial::start(WORKLOAD);
        let path = locked.file.display().to_string();
        waiter.tell_silently(&format!("lock-file {path} posix write 0 0 wait"));
        let waits = || {
            Shown::all()
                .unwrap()
                .iter()
                .any(|shown| shown.waits && shown.pid == waiter.pid())
        };
        eventually("the wait", waits);
        let Some(freezer) = freezer(version, locked.trial.pid()) else {
            return;
        };
        locked.freezer = Some(freezer.clone());
        freezer.make().unwrap();
        let pids = [locked.trial.pid(), waiter.pid()];
        freezer.adopt(|| Ok(pids.to_vec())).unwrap();
        freezer.freeze().unwrap();
        assert!(!waits(), "it is frozen, and does not wait just now");
        let_go(&held_lock, &freezer);
        assert_eq!(held(&locked.file), [], "the waiter has not got it");
        taken(&held_lock, &freezer);
        locked.thaw();
        eventually("the wait", waits);
    });
}

#[test]
fn who_waits_for_a_lock_keeps_no_other_from_whoever_has_it() {
    everywhere(|version| {
        let mut locked = Locked::start();
        let all = locked.lock_all();
        let Some(freezer) = locked.freeze(version) else {
            return;
        };
        let_go(&all, &freezer);
        // The last of them is taken; who has it wants the others before he gives it back.
        let mut other = Trial::start(WORKLOAD);
        let path = locked.file.display().to_string();
        let fd = other.tell(&format!("lock-file {path} flock read 0 0"));
        for _ in 0..3 {
            let missing = locks::take_frozen(&all, &freezer).unwrap().missing;
            assert_eq!(missing.unwrap().lock, all[3]);
            assert_eq!(held(&locked.file), [(LockKind::Flock, false, 0)]);
        }
        for (first, bytes) in [(0, 100), (200, 50), (400, 0)] {
            other.tell(&format!("lock-file {path} posix write {first} {bytes}"));
        }
        let missing = locks::take_frozen(&all, &freezer).unwrap().missing;
        assert_eq!(missing.unwrap().holder, Some(other.pid()));
        drop(other);
        let _ = fd;
        eventually("the end of the other", || held(&locked.file).is_empty());
        taken(&all, &freezer);
        assert_eq!(held(&locked.file), ALL);
    });
    // The same where they are held by processes that wait.
    let mut locked = Locked::start();
    let all = locked.lock_all();
    let freezer = locked.freeze(FreezerVersion::V2).unwrap();
    let_go(&all, &freezer);
    locked.thaw();
    let mut other = Trial::start(WORKLOAD);
    other.tell(&format!(
        "lock-file {} flock read 0 0",
        locked.file.display()
    ));
    let missing = locks::take_held(&all, STOP_MAX).unwrap().unwrap();
    assert_eq!(
        (missing.lock, missing.holder),
        (all[3].clone(), Some(other.pid()))
    );
    assert_eq!(held(&locked.file), [(LockKind::Flock, false, 0)]);
}

#[test]
fn who_has_ended_in_a_frozen_cgroup_has_let_go() {
    everywhere(|version| {
        let mut locked = Locked::start();
        locked.trial.tell("threads 5");
        let all = locked.lock_all();
        let Some(freezer) = locked.freeze(version) else {
            return;
        };
        let pid = locked.trial.pid();
        assert_eq!(locks::ended(&all), [0; 0]);
        // The v1 freezer keeps it from its end until it is seen off.
        locked.trial.signal(libc::SIGKILL);
        for _ in 0..2 {
            assert_eq!(locks::let_go_frozen(&all, &freezer).unwrap(), [pid]);
            assert_eq!(held(&locked.file), []);
            assert_eq!(locks::ended(&all), [pid]);
        }
        let expected = Taken {
            missing: None,
            ended: vec![pid],
        };
        assert_eq!(locks::take_frozen(&all, &freezer).unwrap(), expected);
        // Its number is nobody's.
        let nobody: Vec<FileLock> = all
            .iter()
            .map(|lock| FileLock {
                pid: i32::MAX,
                ..lock.clone()
            })
            .collect();
        assert_eq!(locks::let_go_frozen(&nobody, &freezer).unwrap(), [i32::MAX]);
    });
}

#[test]
fn a_stranger_with_a_number_of_the_list_is_left_alone() {
    everywhere(|version| {
        let mut locked = Locked::start();
        let all = locked.lock_all();
        let mut stranger = Locked::start();
        let theirs = stranger.lock_all();
        let Some(freezer) = locked.freeze(version) else {
            return;
        };
        let strange = |started| -> Vec<FileLock> {
            let lock = |lock: &FileLock| FileLock {
                started,
                ..lock.clone()
            };
            theirs.iter().map(lock).collect()
        };
        let pid = stranger.trial.pid();
        let before = all[0].started.map(|started| started - 1);
        for started in [before, None] {
            let list = strange(started);
            assert_eq!(locks::let_go_frozen(&list, &freezer).unwrap(), [pid]);
            let taken = locks::take_frozen(&list, &freezer).unwrap();
            assert_eq!(taken.ended, [pid]);
            assert_eq!(held(&stranger.file), ALL);
        }
        // It is who is meant, and somebody has moved it.
        let error = locks::let_go_frozen(&theirs, &freezer).unwrap_err();
        assert!(matches!(error, InjectError::Elsewhere { .. }), "{error:?}");
        assert_eq!(held(&stranger.file), ALL);
        assert_eq!(stranger.trial.tell("signals"), "0");
    });
}

#[test]
fn a_stranger_who_came_to_a_number_while_it_was_seized_is_let_go() {
    everywhere(|version| {
        let mut locked = Locked::start();
        locked.lock_all();
        let Some(freezer) = locked.freeze(version) else {
            return;
        };
        let mut dead = Command::new("true").spawn().unwrap();
        let pidfd = ptrace::pidfd_open(dead.id().cast_signed()).unwrap();
        dead.wait().unwrap();
        let mut stranger = Trial::start(WORKLOAD);
        stranger.tell("threads 3");
        let pid = stranger.pid();
        let called = frozen::with_thread((pid, pidfd.as_fd()), &freezer, |_| Ok(()));
        let error = called.unwrap_err();
        assert!(matches!(error, InjectError::Ended { .. }), "{error:?}");
        assert!(!freezer.processes().unwrap().contains(&pid));
        assert_eq!(stranger.tell("signals"), "0");
    });
}

/// The process of the next test that takes a thread aside and is killed.
#[test]
fn taker() {
    let Ok(whom) = std::env::var(TAKER) else {
        return;
    };
    let (pid, cgroup) = whom.split_once(' ').unwrap();
    let taken = |_: &mut super::Borrowed<'_>| {
        println!("{TAKER}");
        loop {
            std::thread::park();
        }
    };
    let freezer = Freezer::at(cgroup.into());
    let pid = pid.parse().unwrap();
    let pidfd = ptrace::pidfd_open(pid).unwrap();
    frozen::with_thread::<()>((pid, pidfd.as_fd()), &freezer, taken).unwrap();
}

const TAKER: &str = "PAGEFERRY_TAKER";

#[test]
fn a_process_dies_with_whoever_has_taken_a_thread_aside() {
    everywhere(|version| {
        let mut locked = Locked::start();
        locked.trial.tell("threads 3");
        let all = locked.lock_all();
        let Some(freezer) = locked.freeze(version) else {
            return;
        };
        let pid = locked.trial.pid();
        let mut taker = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "tests::taker", "--nocapture"])
            .env(TAKER, format!("{pid} {}", freezer.path().display()))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(taker.stdout.take().unwrap()).lines();
        assert!(said.any(|line| line.unwrap().ends_with(TAKER)));
        taker.kill().unwrap();
        taker.wait().unwrap();
        // In v1 the others are kept from their end, and have their files open: they are seen off.
        assert_eq!(locks::let_go_frozen(&all, &freezer).unwrap(), [pid]);
        assert_eq!(held(&locked.file), []);
        assert!(task::has_ended(pid));
        drop(locked);
        assert!(!freezer.path().exists());
        let mut beside = freezer.path().as_os_str().to_owned();
        beside.push("-aside");
        assert!(!Path::new(&beside).exists());
    });
}

#[test]
fn the_stack_is_as_it_was() {
    let mut locked = Locked::start();
    let lock = locked.lock(LockKind::Posix, true, 0, None);
    let pid = locked.trial.pid();
    // Number, six arguments, stack pointer, where it is: of a thread that waits in a call.
    let call = || fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap();
    eventually("a wait", || !call().starts_with("running"));
    let pointer = call().split(' ').nth(7).unwrap().to_owned();
    let address = u64::from_str_radix(pointer.trim_start_matches("0x"), 16).unwrap();
    let stack = || {
        let mut bytes = [0; 512];
        let len = bytes.len();
        let run = RemoteRun {
            address: address - 256,
            len,
        };
        assert_eq!(process_vm::read(pid, &[run], &mut bytes).unwrap(), len);
        bytes
    };
    let before = stack();
    assert_eq!(locks::take_held(&[lock], STOP_MAX).unwrap(), None);
    assert_eq!(stack(), before);
}

#[test]
fn what_cannot_be_locked_says_so() {
    let mut locked = Locked::start();
    let lock = FileLock {
        fd: 99,
        ..locked.lock(LockKind::Posix, true, 0, None)
    };
    let error = locks::take_held(&[lock], STOP_MAX).unwrap_err();
    let InjectError::Call { call, source, .. } = error else {
        panic!("{error:?}");
    };
    assert_eq!((call, source.raw_os_error()), ("fcntl", Some(libc::EBADF)));
    let file = OpenOptions::new().append(true).open(&locked.file).unwrap();
    let free = Flock::lock(file, FlockArg::LockExclusiveNonblock);
    assert!(free.is_ok(), "nothing was taken");
}
