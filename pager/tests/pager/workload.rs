//! The workload: a process whose memory is missing until somebody fills it, and which knows what
//! must be in it.
//!
//! It takes the place of a task that CRIU restores: it registers its memory, hands the
//! userfaultfd over as a task does, waits until it may run, and then does what the test tells it.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::ForkResult;
use pageferry_sys::{fdpass, uffd::Uffd};
use serde::{Deserialize, Serialize};

use crate::sys;

pub const PAGE: u64 = 4096;

/// Words of a page that are looked at: the first of every 64 bytes.
const WORDS: u64 = PAGE / 64;

/// What the test tells.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Command {
    /// The pages hold what `of` and those behind it held at the source.
    Check {
        page: u64,
        count: u64,
        of: u64,
    },
    /// The pages are zero.
    CheckZero {
        page: u64,
        count: u64,
    },
    /// Writes into a page, and reads it back.
    Write {
        page: u64,
    },
    GiveUp {
        page: u64,
        count: u64,
    },
    Unmap {
        page: u64,
        count: u64,
    },
    Map {
        page: u64,
        count: u64,
    },
    Remap {
        page: u64,
        count: u64,
        to: u64,
    },
    /// A child is made that does what it is told over a connection of its own.
    Fork,
    /// Several threads fork; each child checks all the pages and answers by its exit.
    ForkAtOnce {
        threads: u64,
        page: u64,
        count: u64,
    },
    /// One thread gives up page after page while another forks; each child checks that it has what
    /// its parent had at the fork.
    ForkRace {
        page: u64,
        count: u64,
    },
    /// Random work on the pages for so many steps, all checked.
    Churn {
        page: u64,
        count: u64,
        steps: u64,
        seed: u64,
    },
    /// Whether the memory is still registered with a userfaultfd.
    IsRegistered,
    Exit,
}

/// What it answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    Ok,
    Wrong(String),
    Yes(bool),
}

/// Which word a page holds at the source, at each place that is looked at.
pub fn word(page: u64, place: u64) -> u64 {
    (page ^ (place << 40)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

/// A whole page as it was at the source.
pub fn contents(page: u64, bytes: &mut [u8]) {
    bytes.fill(0);
    for place in 0..WORDS {
        let offset = (place * 64) as usize;
        bytes[offset..offset + 8].copy_from_slice(&word(page, place).to_ne_bytes());
    }
}

/// How a workload is set up; passed as JSON.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Setup {
    pub vpid: i32,
    /// First page of its memory, and how many.
    pub page: u64,
    pub count: u64,
    /// Pages it reads, and checks, before it says that it is ready.
    pub early: Vec<u64>,
    /// The test's socket.
    pub control: String,
    /// Descriptor of a socket: it says there that it has sent its userfaultfd, that it is ready,
    /// and hears that it may run.
    pub gate: i32,
}

/// The life of a workload. Standard input is CRIU's connection to the lazy-pages socket.
pub fn run(setup: &Setup) {
    sys::map(setup.page * PAGE, setup.count * PAGE).unwrap();
    let uffd = Uffd::new().unwrap();
    uffd.register(setup.page * PAGE, setup.count * PAGE)
        .unwrap();
    let lazy = std::io::stdin();
    fdpass::send(lazy.as_fd(), &setup.vpid.to_ne_bytes(), &[]).unwrap();
    fdpass::send(lazy.as_fd(), &[0], &[uffd.as_fd()]).unwrap();
    drop(uffd);
    let mut gate = UnixStream::from(sys::inherited(setup.gate));
    gate.write_all(b"u").unwrap();
    for page in &setup.early {
        assert_eq!(check(*page, 1, *page), Answer::Ok);
    }
    // Ready: all that a restored task does before it waits.
    gate.write_all(b"r").unwrap();
    if gate.read(&mut [0]).unwrap() == 0 {
        return;
    }
    drop(gate);
    obey(setup, &setup.vpid.to_string());
}

/// Connects as `name` and does what it is told until the connection ends.
fn obey(setup: &Setup, name: &str) {
    let mut stream = UnixStream::connect(&setup.control).unwrap();
    writeln!(stream, "{name}").unwrap();
    let reader = BufReader::new(stream.try_clone().unwrap());
    for line in reader.lines() {
        let Ok(line) = line else { return };
        let command: Command = serde_json::from_str(&line).unwrap();
        let answer = match command {
            Command::Exit => return,
            Command::Fork => match sys::fork().unwrap() {
                ForkResult::Child => {
                    obey(setup, &format!("child-of-{name}"));
                    sys::exit(0)
                }
                ForkResult::Parent { .. } => Answer::Ok,
            },
            other => perform(&other),
        };
        let text = serde_json::to_string(&answer).unwrap();
        if writeln!(stream, "{text}").is_err() {
            return;
        }
    }
}

fn perform(command: &Command) -> Answer {
    let done = |result: nix::Result<()>| match result {
        Ok(()) => Answer::Ok,
        Err(errno) => Answer::Wrong(errno.to_string()),
    };
    match *command {
        Command::Check { page, count, of } => check(page, count, of),
        Command::CheckZero { page, count } => check_zero(page, count),
        Command::Write { page } => {
            sys::write(page * PAGE, 77);
            match sys::read(page * PAGE) {
                77 => Answer::Ok,
                found => Answer::Wrong(format!("wrote 77, read {found}")),
            }
        }
        Command::GiveUp { page, count } => done(sys::give_up(page * PAGE, count * PAGE)),
        Command::Unmap { page, count } => done(sys::unmap(page * PAGE, count * PAGE)),
        Command::Map { page, count } => done(sys::map(page * PAGE, count * PAGE)),
        Command::Remap { page, count, to } => {
            done(sys::remap(page * PAGE, count * PAGE, to * PAGE))
        }
        Command::ForkAtOnce {
            threads,
            page,
            count,
        } => fork_at_once(threads, page, count),
        Command::ForkRace { page, count } => fork_race(page, count),
        Command::Churn {
            page,
            count,
            steps,
            seed,
        } => churn(page, count, steps, seed),
        Command::IsRegistered => is_registered(),
        Command::Fork | Command::Exit => Answer::Ok,
    }
}

fn check(page: u64, count: u64, of: u64) -> Answer {
    for offset in 0..count {
        for place in 0..WORDS {
            let found = sys::read((page + offset) * PAGE + place * 64);
            if found != word(of + offset, place) {
                let at = page + offset;
                return Answer::Wrong(format!("page {at:#x} place {place}: {found:#x}"));
            }
        }
    }
    Answer::Ok
}

fn check_zero(page: u64, count: u64) -> Answer {
    for offset in 0..count * PAGE / 64 {
        let found = sys::read(page * PAGE + offset * 64);
        if found != 0 {
            return Answer::Wrong(format!("page {:#x}: {found:#x}", page + offset * 64 / PAGE));
        }
    }
    Answer::Ok
}

fn fork_at_once(threads: u64, page: u64, count: u64) -> Answer {
    let children: Vec<_> = std::thread::scope(|scope| {
        let forks: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| match sys::fork().unwrap() {
                    ForkResult::Child => {
                        let right = check(page, count, page) == Answer::Ok;
                        sys::exit(i32::from(!right))
                    }
                    ForkResult::Parent { child } => child,
                })
            })
            .collect();
        forks.into_iter().map(|fork| fork.join().unwrap()).collect()
    });
    for child in children {
        let status = waitpid(child, Some(WaitPidFlag::empty())).unwrap();
        if !matches!(status, WaitStatus::Exited(_, 0)) {
            return Answer::Wrong(format!("{status:?}"));
        }
    }
    check(page, count, page)
}

/// Not given up, about to be, and given up.
const KEPT: u8 = 0;
const LEAVING: u8 = 1;
const LEFT: u8 = 2;

fn fork_race(page: u64, count: u64) -> Answer {
    use std::sync::atomic::{AtomicU8, Ordering};
    let states: Vec<AtomicU8> = (0..count).map(|_| AtomicU8::new(KEPT)).collect();
    let check_all = || {
        (page..).zip(&states).find_map(|(at, state)| {
            let answer = match state.load(Ordering::SeqCst) {
                KEPT => check(at, 1, at),
                LEFT => check_zero(at, 1),
                // It was under way: either will do.
                _ => Answer::Ok,
            };
            (answer != Answer::Ok).then_some(answer)
        })
    };
    let forker = || {
        let mut forked = 0;
        while states.last().unwrap().load(Ordering::SeqCst) != LEFT {
            match sys::fork().unwrap() {
                ForkResult::Child => {
                    let wrong = check_all();
                    wrong
                        .iter()
                        .for_each(|text| eprintln!("child {forked}: {text:?}"));
                    sys::exit(i32::from(wrong.is_some()))
                }
                ForkResult::Parent { child } => {
                    let status = waitpid(child, None).unwrap();
                    if !matches!(status, WaitStatus::Exited(_, 0)) {
                        return Answer::Wrong(format!("child {forked}: {status:?}"));
                    }
                }
            }
            forked += 1;
        }
        Answer::Ok
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for (at, state) in (page..).zip(&states) {
                state.store(LEAVING, Ordering::SeqCst);
                sys::give_up(at * PAGE, PAGE).unwrap();
                state.store(LEFT, Ordering::SeqCst);
            }
        });
        let answer = forker();
        // However it went, the other thread comes to its end.
        answer
    })
}

/// Numbers that look random and are the same for the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// What a page of the churned memory must hold.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Expected {
    Source(u64),
    Zero,
    Unmapped,
}

fn churn(page: u64, count: u64, steps: u64, seed: u64) -> Answer {
    let mut random = Random(seed | 1);
    let mut pages: Vec<Expected> = (page..page + count).map(Expected::Source).collect();
    let wrong = |at: u64, what: &str| Answer::Wrong(format!("seed {seed} page {at:#x}: {what}"));
    let mut children = Vec::new();
    for _ in 0..steps {
        let size = 1 + random.below((count / 16).max(1));
        let from = random.below(count - size);
        let range = from as usize..(from + size) as usize;
        let is_mapped = pages[range.clone()]
            .iter()
            .all(|it| *it != Expected::Unmapped);
        let (address, bytes) = ((page + from) * PAGE, size * PAGE);
        match random.below(8) {
            0 if is_mapped => {
                sys::give_up(address, bytes).unwrap();
                pages[range].fill(Expected::Zero);
            }
            1 => {
                sys::unmap(address, bytes).unwrap();
                pages[range].fill(Expected::Unmapped);
            }
            2 if is_mapped => {
                let to = random.below(count - size);
                let apart = from + size <= to || to + size <= from;
                // Several mappings at once do not move.
                if apart && is_one_mapping(address, bytes) {
                    if let Err(errno) = sys::remap(address, bytes, (page + to) * PAGE) {
                        return wrong(page + from, &format!("does not move: {errno}"));
                    }
                    let moved = pages[range.clone()].to_vec();
                    pages[range].fill(Expected::Unmapped);
                    pages[to as usize..(to + size) as usize].copy_from_slice(&moved);
                }
            }
            3 if children.len() < 3 => match sys::fork().unwrap() {
                ForkResult::Child => {
                    let wrong = verify(page, &pages);
                    wrong
                        .iter()
                        .for_each(|text| eprintln!("seed {seed}: a child: {text}"));
                    sys::exit(i32::from(wrong.is_some()))
                }
                ForkResult::Parent { child } => children.push(child),
            },
            _ => {
                let at = from as usize;
                if let Some(text) = verify(page + from, &pages[at..at + 1]) {
                    return wrong(page + from, &text);
                }
            }
        }
        if let Some(child) = children.pop_if(|_| random.below(4) == 0) {
            let status = waitpid(child, None).unwrap();
            if !matches!(status, WaitStatus::Exited(_, 0)) {
                return wrong(0, &format!("child {status:?}"));
            }
        }
    }
    for child in children {
        let status = waitpid(child, None).unwrap();
        if !matches!(status, WaitStatus::Exited(_, 0)) {
            return wrong(0, &format!("child {status:?}"));
        }
    }
    verify(page, &pages).map_or(Answer::Ok, |text| wrong(page, &text))
}

fn is_one_mapping(address: u64, bytes: u64) -> bool {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().any(|line| {
        let (start, rest) = line.split_once('-').unwrap();
        let end = rest.split(' ').next().unwrap();
        let parse = |text| u64::from_str_radix(text, 16).unwrap();
        parse(start) <= address && address + bytes <= parse(end)
    })
}

fn verify(page: u64, pages: &[Expected]) -> Option<String> {
    for (expected, at) in pages.iter().zip(page..) {
        let answer = match expected {
            Expected::Source(of) => check(at, 1, *of),
            Expected::Zero => check_zero(at, 1),
            Expected::Unmapped => Answer::Ok,
        };
        if let Answer::Wrong(text) = answer {
            return Some(text);
        }
    }
    None
}

fn is_registered() -> Answer {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let flags = |line: &str| line.split(' ').any(|flag| flag == "um");
    Answer::Yes(
        smaps
            .lines()
            .filter(|line| line.starts_with("VmFlags:"))
            .any(flags),
    )
}
