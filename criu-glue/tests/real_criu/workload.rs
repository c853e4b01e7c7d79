//! A process with memory that can tell whether it is still right, and its owner's side.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::thread::sleep;
use std::time::{Duration, Instant};

use memmap2::MmapMut;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::node::PROGRAM;
use crate::sys::stay_in_sequence;

const PAGE: usize = 4096;
const WORD: usize = 8;

/// In its environment, of any value.
const SEQUENCE: &str = "IN_SEQUENCE";

/// The workload's own `main`: fills memory, says where it is, and checks it when asked to. It never
/// holds a file open for longer than it takes.
/// With `threads` more, each sends back what it receives on a port of its own, the first one too.
pub fn run(directory: &Path, mebibytes: usize, threads: usize) -> ExitCode {
    nix::unistd::setsid().expect("a child is no group leader");
    // For signals that stay in a thread's queue.
    SigSet::from_iter([Signal::SIGUSR1])
        .thread_block()
        .expect("a signal");
    let mut memory = MmapMut::map_anon(mebibytes << 20).expect("memory");
    for (index, page) in memory.chunks_exact_mut(PAGE).enumerate() {
        for (at, word) in page.chunks_exact_mut(WORD).enumerate() {
            word.copy_from_slice(&expected(index, at).to_ne_bytes());
        }
    }
    // A thread that only begins has its signals blocked.
    let begun = Arc::new(Barrier::new(threads + 1));
    let mut ports = String::new();
    let mut listen = || {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
        let port = listener.local_addr().expect("bound").port();
        ports += &format!("{port} ");
        listener
    };
    let own = Echo::Listening((threads > 0).then(&mut listen));
    for _ in 0..threads {
        let listener = listen();
        let begun = Arc::clone(&begun);
        std::thread::spawn(move || {
            begun.wait();
            let (mut peer, _) = listener.accept().expect("somebody dials");
            let mut byte = [0];
            while peer.read_exact(&mut byte).is_ok() && peer.write_all(&byte).is_ok() {}
        });
    }
    begun.wait();
    say(directory, "ports", &ports);
    let start = memory.as_ptr() as usize;
    say(
        directory,
        "ready",
        &format!("{start:x} {:x}", start + memory.len()),
    );
    if std::env::var_os(SEQUENCE).is_none() {
        serve(directory, &memory, own, &AtomicBool::new(false));
    }
    let broken = AtomicBool::new(false);
    let stay = || {
        stay_in_sequence();
        broken.store(true, Ordering::Relaxed);
    };
    std::thread::scope(|scope| {
        scope.spawn(|| serve(directory, &memory, own, &broken));
        scope.spawn(stay);
        stay();
    });
    ExitCode::FAILURE
}

/// Does what the owner asks for, for ever.
fn serve(directory: &Path, memory: &[u8], mut own: Echo, broken: &AtomicBool) -> ! {
    loop {
        if fs::remove_file(directory.join("check")).is_ok() {
            let wrong = memory.chunks_exact(PAGE).enumerate().find(|(index, page)| {
                let words = page.chunks_exact(WORD).enumerate();
                let mut words = words.map(|(at, word)| word == expected(*index, at).to_ne_bytes());
                !words.all(|right| right)
            });
            let wrong = format!("{:?}", wrong.map(|(index, _)| index));
            let broken = broken.load(Ordering::Relaxed);
            say(
                directory,
                "result",
                if broken { "a sequence" } else { &wrong },
            );
        }
        own = own.go_on();
        sleep(Duration::from_millis(1));
    }
}

/// The first thread's connection, which it looks at between other things and drops at any error.
enum Echo {
    Listening(Option<TcpListener>),
    Open(TcpStream),
    Over,
}

impl Echo {
    fn go_on(self) -> Self {
        match self {
            Self::Listening(Some(listener)) => {
                listener.set_nonblocking(true).expect("a socket");
                match listener.accept() {
                    Ok((peer, _)) => {
                        peer.set_nonblocking(true).expect("a socket");
                        Self::Open(peer)
                    }
                    Err(_) => Self::Listening(Some(listener)),
                }
            }
            Self::Open(mut peer) => {
                let mut byte = [0];
                match peer
                    .read_exact(&mut byte)
                    .and_then(|()| peer.write_all(&byte))
                {
                    Err(error) if error.kind() != ErrorKind::WouldBlock => Self::Over,
                    _ => Self::Open(peer),
                }
            }
            idle => idle,
        }
    }
}

fn expected(page: usize, at: usize) -> usize {
    page.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ at
}

fn say(directory: &Path, what: &str, text: &str) {
    let draft = directory.join("draft");
    fs::write(&draft, text).expect("a writable directory");
    fs::rename(draft, directory.join(what)).expect("a writable directory");
}

/// A running workload; killed and reaped on drop, also when it was restored since.
pub struct Workload {
    pub pid: i32,
    /// Addresses of its memory, first and one behind the last.
    pub region: (u64, u64),
    directory: PathBuf,
    child: Child,
}

impl Workload {
    pub fn start(mebibytes: usize) -> Self {
        Self::start_with(&[], mebibytes, 0)
    }

    /// Started by `prefix`, a command that becomes the one it is given.
    pub fn start_with(prefix: &[&str], mebibytes: usize, threads: usize) -> Self {
        let directory = tempfile::tempdir_in("/tmp").expect("tmp").keep();
        let words = [prefix, &[PROGRAM]].concat();
        let child = Command::new(words[0])
            .args(&words[1..])
            .arg("--workload")
            .arg(&directory)
            .args([mebibytes.to_string(), threads.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("this program");
        let pid = i32::try_from(child.id()).expect("a pid");
        let mut workload = Self {
            pid,
            region: (0, 0),
            directory,
            child,
        };
        let ready = workload.wait_for("ready");
        pin(pid);
        let (start, end) = ready.split_once(' ').expect("two addresses");
        let number = |text| u64::from_str_radix(text, 16).expect("an address");
        workload.region = (number(start), number(end));
        workload
    }

    /// Two of its threads, the first one too, never leave a restartable sequence.
    pub fn start_in_sequence() -> Self {
        Self::start_with(&["env", &format!("{SEQUENCE}=")], 1, 0)
    }

    /// A connection to each of its threads, the first one first.
    pub fn dial(&self) -> Vec<TcpStream> {
        let ports = self.wait_for("ports");
        let ports = ports.split_whitespace();
        let dialled = ports.map(|port| {
            let address = format!("127.0.0.1:{port}");
            let stream = TcpStream::connect(address).expect("a listener");
            let limit = Some(PATIENCE);
            stream.set_read_timeout(limit).expect("not zero");
            stream
        });
        dialled.collect()
    }

    /// Asks the workload to check its memory.
    pub fn check(&self) {
        fs::write(self.directory.join("check"), "").expect("a writable directory");
        assert_eq!(
            self.wait_for("result"),
            "None",
            "index of a wrong page, or a sequence"
        );
        fs::remove_file(self.directory.join("result")).expect("just read");
    }

    /// Waits until the process is gone, so that its number is free.
    pub fn wait_until_killed(&mut self) {
        let status = self.child.wait().expect("our child");
        assert!(!status.success(), "killed by the dump");
    }

    /// The whole file of this process in `/proc`.
    pub fn proc(&self, name: &str) -> Vec<u8> {
        fs::read(format!("/proc/{}/{name}", self.pid)).expect("a live process")
    }

    fn wait_for(&self, what: &str) -> String {
        wait_until(what, || fs::read_to_string(self.directory.join(what)).ok())
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        let pid = Pid::from_raw(self.pid);
        // It is our child, or was restored and given to us as the init of this pid namespace.
        let _ = kill(pid, Signal::SIGKILL);
        let deadline = Instant::now() + PATIENCE;
        while waitpid(pid, Some(WaitPidFlag::WNOHANG)) == Ok(WaitStatus::StillAlive)
            && Instant::now() < deadline
        {
            sleep(Duration::from_millis(1));
        }
    }
}

/// Polls until `found` finds something.
pub fn wait_until<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(thing) = found() {
            return thing;
        }
        assert!(Instant::now() < deadline, "no {what} within {PATIENCE:?}");
        sleep(Duration::from_millis(1));
    }
}

/// Comes back when `happened` says so; other things go on meanwhile.
pub async fn once(happened: impl Fn() -> bool) {
    while !happened() {
        tokio::task::yield_now().await;
    }
}

/// For everything that has to happen sooner or later.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Keeps a process on one processor. While the parasite of a dump runs in it on another one than
/// before, the kernel writes that one's number into its memory (rseq), behind the back of the dump.
fn pin(pid: i32) {
    let pid = Pid::from_raw(pid);
    let allowed = sched_getaffinity(pid).expect("a live process");
    let first = (0..CpuSet::count()).find(|cpu| allowed.is_set(*cpu) == Ok(true));
    let mut one = CpuSet::new();
    one.set(first.expect("a processor"))
        .expect("a number in range");
    sched_setaffinity(pid, &one).expect("root");
}
