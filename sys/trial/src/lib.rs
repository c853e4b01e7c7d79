//! A process to try tracking on: it does what it is told, one line at a time, on memory at
//! addresses it is told, and does nothing in between. Tests start their own executable again as
//! that process.
//!
//! Test code only: a crate of its own, which is a dependency of tests alone. Every function works
//! on memory the process mapped for this purpose, on its own descriptors, or makes a system call
//! that takes numbers. Absent: what is to be tested.

#![allow(unsafe_code)]
#![allow(clippy::unwrap_used)]

mod block;
mod files;
mod ipc;
mod lost;
pub mod shared_mapping;

use std::io::{self, BufRead, BufReader, Lines, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

/// Set in the environment of a process that is to obey.
const ROLE: &str = "PAGEFERRY_TRIAL";

/// Starts every answer, to be told from what the test harness prints.
const MARK: &str = "@ ";

/// A process that obeys. Killed and reaped on drop.
#[derive(Debug)]
pub struct Trial {
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
    /// One answer `done` is to be skipped.
    silent: bool,
}

impl Trial {
    /// Starts one. `test` is the path of the test function that calls [`obey`].
    pub fn start(test: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture", "--test-threads=2"])
            .env(ROLE, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut trial = Self {
            child,
            input,
            output,
            silent: false,
        };
        assert_eq!(trial.answer(), "ready");
        trial
    }

    /// Its pid.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Makes it do something, and returns what it says.
    pub fn tell(&mut self, order: &str) -> String {
        writeln!(self.input, "{order}").unwrap();
        let answer = self.answer();
        assert!(!answer.starts_with("error"), "{order}: {answer}");
        answer
    }

    /// The same of what may fail; an error is what it says.
    pub fn try_tell(&mut self, order: &str) -> Result<String, String> {
        writeln!(self.input, "{order}").unwrap();
        let answer = self.answer();
        match answer.strip_prefix("error ") {
            Some(error) => Err(error.to_owned()),
            None => Ok(answer),
        }
    }

    /// Makes it do something, and ignores that it says `done`, whenever it does.
    pub fn tell_silently(&mut self, order: &str) {
        writeln!(self.input, "{order}").unwrap();
        self.silent = true;
    }

    /// Waits for the next thing it says.
    pub fn answer(&mut self) -> String {
        loop {
            let line = self
                .output
                .next()
                .expect("the trial process has ended")
                .unwrap();
            match line.split_once(MARK) {
                Some((_, "done")) if self.silent => self.silent = false,
                Some((_, answer)) => return answer.to_owned(),
                None => {}
            }
        }
    }
}

impl Trial {
    /// Sends it a signal, which may be a real-time one.
    pub fn signal(&self, number: i32) {
        signal(self.pid(), number);
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The body of the test function that is the other process. Returns at once when it is run as a
/// test, and never when it is run as the process.
pub fn obey() {
    if std::env::var_os(ROLE).is_none() {
        return;
    }
    say("ready");
    for line in io::stdin().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        match act(&words) {
            Ok(answer) => say(&answer),
            Err(error) => say(&format!("error {error}")),
        }
    }
    std::process::exit(0);
}

fn say(text: &str) {
    let mut out = io::stdout().lock();
    writeln!(out, "{MARK}{text}").unwrap();
    out.flush().unwrap();
}

/// Does what needs an answer of its own, or else what does not.
fn act(words: &[&str]) -> io::Result<String> {
    match words[0] {
        "get" => Ok(get(parse(words[1])).to_string()),
        "fork" => fork(),
        "clone-vm" => clone_with_memory(),
        "block" => block::block(words[1]),
        "read-direct" => {
            let length = usize::try_from(parse(words[3])).unwrap();
            block::read_direct(words[1], parse(words[2]), length)
        }
        "open" => files::open(words[1]),
        "ipc" => ipc::make(words[1]),
        "lock-file" => files::lock(&words[1..]),
        "sockets" => files::open_sockets(),
        "signals" => Ok(SIGNALS.load(Ordering::SeqCst).to_string()),
        _ => act_silently(words).map(|()| String::from("done")),
    }
}

fn act_silently(words: &[&str]) -> io::Result<()> {
    let number = |index: usize| parse(words[index]);
    let size = |index: usize| usize::try_from(parse(words[index])).unwrap();
    match words[0] {
        "map" => map(number(1), size(2), words[3])?,
        "fill" => fill(number(1), size(2), words[3]),
        "look" => look(number(1), number(2)),
        "kernel-write" => kernel_write(number(1), size(2))?,
        "protect" => protect(number(1), size(2), words[3])?,
        "advise" => advise(number(1), size(2), words[3])?,
        "unmap" => unmap(number(1), size(2))?,
        "remap" => remap(number(1), size(2), number(3))?,
        "lock" => lock(number(1), size(2))?,
        "uid" => become_nobody()?,
        "seccomp" => deny_userfaultfd(words[1])?,
        "threads" => park_threads(size(1)),
        "storm" => storm(),
        "exec" => return Err(execute()),
        "poke" => poke(number(1))?,
        "count-signals" => count_signals(),
        "open-direct" => files::open_direct(words[1])?,
        "open-direct-in-thread" => files::open_direct_in_thread(words[1])?,
        "make-direct" => files::make_direct(number(1))?,
        "close" => files::close(number(1))?,
        "aio" => files::make_aio_context()?,
        "userfaultfd" => files::open_userfaultfd()?,
        "io-uring" => files::open_io_uring()?,
        "io-uring-registered" => files::register_io_uring()?,
        "poison" => lost::poison(number(1), size(2))?,
        "wait-for-page" => lost::wait_for_page(number(1))?,
        "end-first-thread" => lost::end_first_thread()?,
        other => return Err(io::Error::other(format!("unknown order {other}"))),
    }
    Ok(())
}

fn parse(word: &str) -> u64 {
    match word.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).unwrap(),
        None => word.parse().unwrap(),
    }
}

fn pointer<T>(address: u64) -> *mut T {
    ptr::with_exposed_provenance_mut(usize::try_from(address).unwrap())
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn protection(name: &str) -> libc::c_int {
    let bit = |letter, bit| if name.contains(letter) { bit } else { 0 };
    bit('r', libc::PROT_READ) | bit('w', libc::PROT_WRITE) | bit('x', libc::PROT_EXEC)
}

fn map(address: u64, pages: usize, kind: &str) -> io::Result<()> {
    let (file, shared) = match kind {
        "shared" => (-1, libc::MAP_SHARED | libc::MAP_ANONYMOUS),
        "secret" => (secret_memory(pages)?, libc::MAP_SHARED),
        "huge" => {
            let huge = libc::MAP_HUGETLB | libc::MAP_NORESERVE;
            (-1, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | huge)
        }
        _ => (-1, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS),
    };
    let flags = shared | libc::MAP_FIXED_NOREPLACE;
    let prot = match kind {
        "shared" | "secret" | "huge" => libc::PROT_READ | libc::PROT_WRITE,
        _ => protection(kind),
    };
    // SAFETY: NOREPLACE: the range is not in use.
    let mapped = unsafe { libc::mmap(pointer(address), pages * 4096, prot, flags, file, 0) };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let _ = mapped.expose_provenance();
    Ok(())
}

fn secret_memory(pages: usize) -> io::Result<libc::c_int> {
    // SAFETY: one number.
    let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, 0) };
    let fd = i32::try_from(fd).unwrap();
    check(fd)?;
    // SAFETY: a descriptor of ours and a number.
    check(unsafe { libc::ftruncate(fd, i64::try_from(pages * 4096).unwrap()) })?;
    Ok(fd)
}

/// Writes to every page: `random`, `text`, `zero` or a number for all bytes.
fn fill(address: u64, pages: usize, what: &str) {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ address;
    for page in 0..pages {
        let target: *mut u64 = pointer(address + page as u64 * 4096);
        for word in 0..512 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let value = match what {
                "random" => state,
                "text" => TEXT[usize::try_from(state % 8).unwrap()],
                "half-zero" if page % 2 == 0 => 0,
                "half-zero" => state,
                byte => u64::from_ne_bytes([byte.parse().unwrap(); 8]),
            };
            // SAFETY: the test mapped these pages for this.
            unsafe { target.add(word).write_volatile(value) };
        }
    }
}

const TEXT: [u64; 8] = [
    u64::from_ne_bytes(*b"the quic"),
    u64::from_ne_bytes(*b"k brown "),
    u64::from_ne_bytes(*b"fox jump"),
    u64::from_ne_bytes(*b"ed over "),
    u64::from_ne_bytes(*b"a lazy d"),
    u64::from_ne_bytes(*b"og and t"),
    u64::from_ne_bytes(*b"hen ran "),
    u64::from_ne_bytes(*b"away.\n\n "),
];

fn get(address: u64) -> u8 {
    // SAFETY: the test mapped this page for this.
    unsafe { pointer::<u8>(address).read_volatile() }
}

fn look(address: u64, pages: u64) {
    for page in 0..pages {
        get(address + page * 4096);
    }
}

fn kernel_write(address: u64, length: usize) -> io::Result<()> {
    let file = std::fs::File::open("/dev/urandom")?;
    let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
    // SAFETY: the test mapped these pages for this.
    let read = unsafe { libc::read(fd, pointer(address), length) };
    assert_eq!(read, libc::ssize_t::try_from(length).unwrap());
    Ok(())
}

fn protect(address: u64, pages: usize, name: &str) -> io::Result<()> {
    // SAFETY: the test mapped these pages for this.
    check(unsafe { libc::mprotect(pointer(address), pages * 4096, protection(name)) })
}

fn advise(address: u64, pages: usize, name: &str) -> io::Result<()> {
    let advice = match name {
        "dontneed" => libc::MADV_DONTNEED,
        "free" => libc::MADV_FREE,
        "hugepage" => libc::MADV_HUGEPAGE,
        "dontfork" => libc::MADV_DONTFORK,
        "pageout" => 21,
        "guard" => 102,
        "unguard" => 103,
        other => panic!("unknown advice {other}"),
    };
    // SAFETY: the test mapped these pages for this.
    check(unsafe { libc::madvise(pointer(address), pages * 4096, advice) })
}

fn unmap(address: u64, pages: usize) -> io::Result<()> {
    // SAFETY: the test mapped these pages for this.
    check(unsafe { libc::munmap(pointer(address), pages * 4096) })
}

fn remap(address: u64, pages: usize, target: u64) -> io::Result<()> {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let target: *mut libc::c_void = pointer(target);
    // SAFETY: the test mapped these pages for this, and nothing at the target.
    let moved =
        unsafe { libc::mremap(pointer(address), pages * 4096, pages * 4096, flags, target) };
    if moved == libc::MAP_FAILED {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn lock(address: u64, pages: usize) -> io::Result<()> {
    // SAFETY: the test mapped these pages for this.
    check(unsafe { libc::mlock(pointer(address), pages * 4096) })
}

fn become_nobody() -> io::Result<()> {
    // SAFETY: numbers only; glibc does it for all threads.
    check(unsafe { libc::setgid(65534) })?;
    // SAFETY: as above.
    check(unsafe { libc::setuid(65534) })
}

/// A filter for all threads that refuses, or dies of, `userfaultfd` and `close_range`.
fn deny_userfaultfd(how: &str) -> io::Result<()> {
    let action = match how {
        "errno" => libc::SECCOMP_RET_ERRNO | libc::EPERM.cast_unsigned(),
        "kill" => libc::SECCOMP_RET_KILL_PROCESS,
        other => panic!("unknown action {other}"),
    };
    let statement = |code: u32, k| libc::sock_filter {
        code: u16::try_from(code).unwrap(),
        jt: 0,
        jf: 0,
        k,
    };
    let number = u32::try_from(libc::SYS_userfaultfd).unwrap();
    let mut filter = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        libc::sock_filter {
            jf: 1,
            ..statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, number)
        },
        statement(libc::BPF_RET | libc::BPF_K, action),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: 4,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: numbers only.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
    let (mode, flags) = (
        libc::SECCOMP_SET_MODE_FILTER,
        libc::SECCOMP_FILTER_FLAG_TSYNC,
    );
    // SAFETY: the program and its filter live across the call, which copies them.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program) };
    check(i32::try_from(result).unwrap())
}

fn park_threads(count: usize) {
    for _ in 0..count {
        std::thread::spawn(|| {
            loop {
                std::thread::park();
            }
        });
    }
}

/// Makes threads that end at once, without end.
fn storm() {
    std::thread::spawn(|| {
        loop {
            std::thread::spawn(|| ()).join().unwrap();
        }
    });
}

/// Forks a child that only waits; returns its pid.
fn fork() -> io::Result<String> {
    // SAFETY: the child calls nothing but pause, which may be called after a fork of many threads.
    let pid = unsafe { libc::fork() };
    check(pid)?;
    if pid == 0 {
        loop {
            // SAFETY: no arguments.
            unsafe { libc::pause() };
        }
    }
    Ok(pid.to_string())
}

/// Makes a process with the same memory and descriptors, which executes another program when its
/// pipe is poked. Returns its pid and the pipe.
fn clone_with_memory() -> io::Result<String> {
    extern "C" fn wait(pipe: *mut libc::c_void) -> libc::c_int {
        let mut byte = 0u8;
        let read_end = libc::c_int::try_from(pipe.addr()).unwrap_or(-1);
        let arguments = [c"sleep".as_ptr(), c"1000".as_ptr(), ptr::null()];
        // SAFETY: room for one byte, and strings that live for ever.
        unsafe {
            libc::read(read_end, (&raw mut byte).cast(), 1);
            libc::execv(c"/bin/sleep".as_ptr(), arguments.as_ptr())
        }
    }
    let mut pipe = [0; 2];
    // SAFETY: room for two descriptors.
    check(unsafe { libc::pipe(pipe.as_mut_ptr()) })?;
    let stack = Box::leak(vec![0u64; 8192].into_boxed_slice())
        .as_mut_ptr_range()
        .end;
    let flags = libc::CLONE_VM | libc::CLONE_FILES | libc::SIGCHLD;
    let argument = ptr::without_provenance_mut(usize::try_from(pipe[0]).unwrap());
    // SAFETY: the stack is leaked, so it outlives the process, which makes only system calls.
    let pid = unsafe { libc::clone(wait, stack.cast(), flags, argument) };
    check(pid).map(|()| format!("{pid} {}", pipe[1]))
}

/// Sends a signal to a process of the test's own.
pub fn signal(pid: i32, number: i32) {
    // SAFETY: numbers only.
    check(unsafe { libc::kill(pid, number) }).unwrap();
}

/// Kills a process that a trial process made.
pub fn kill(pid: i32) {
    signal(pid, libc::SIGKILL);
}

/// Executes itself: the same pid, other memory.
fn execute() -> io::Error {
    use std::os::unix::process::CommandExt;
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    Command::new("/proc/self/exe").args(arguments).exec()
}

/// Ends what `block` began.
fn poke(pipe: u64) -> io::Result<()> {
    let pipe = libc::c_int::try_from(pipe).unwrap();
    // SAFETY: one byte of a string.
    let written = unsafe { libc::write(pipe, c"x".as_ptr().cast(), 1) };
    check(libc::c_int::try_from(written).unwrap())
}

static SIGNALS: AtomicU32 = AtomicU32::new(0);

/// A real-time signal: every single one is delivered.
pub fn counted_signal() -> i32 {
    libc::SIGRTMIN() + 3
}

fn count_signals() {
    extern "C" fn count(_: libc::c_int) {
        SIGNALS.fetch_add(1, Ordering::SeqCst);
    }
    let handler = count as extern "C" fn(libc::c_int);
    // SAFETY: the handler only changes an atomic.
    unsafe { libc::signal(counted_signal(), handler as libc::sighandler_t) };
}
