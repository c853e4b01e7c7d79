//! The tracer's own process: serves CRIU's calls, and brings everything home when CRIU has ended.

use std::collections::BTreeMap;
use std::io::Write;
use std::time::{Duration, Instant};

use crate::ahead::{self, Peeked};
use crate::channel::{Call, PEEK_BYTES, Shape, Shared, What};
use crate::files::Inherited;
use crate::kernel::{self, Signal, Stop};
use crate::links::Links;
use crate::sockets::Marks;
use crate::told::Post;
use crate::tracee::Tracee;
use crate::{frozen, repair};

/// The process, from its fork to its end. All signals are blocked in it.
pub fn run(shared: Shared, owner: i32, things: (Inherited, &'static Marks, &'static Links)) -> ! {
    // SAFETY: a C string and a number; the kernel sends the signal when our parent ends.
    unsafe {
        libc::prctl(libc::PR_SET_NAME, c"criu-tracer".as_ptr());
        libc::prctl(libc::PR_SET_PDEATHSIG, kernel::ORPHANED);
    }
    let mut tracer = Tracer {
        owner,
        inherited: things.0,
        marks: things.1,
        links: things.2,
        beside: false,
        tracees: BTreeMap::new(),
        let_some_go: false,
        saw_end: false,
        peeked: None,
    };
    // It may have ended before the kernel was told to say so.
    while tracer.has_owner() {
        match kernel::next_signal(Some(LOOK_ROUND)) {
            Signal::Asked => shared.serve(|call| tracer.serve(call)),
            Signal::Child => tracer.pass_on(),
            Signal::Orphaned => break,
            Signal::None => {}
        }
    }
    tracer.let_all_go()
}

/// How often it is made sure that CRIU is there, besides being told.
const LOOK_ROUND: Duration = Duration::from_secs(1);

/// How long CRIU waits in one call, so that its alarms can end the wait.
const WAIT_TIME_MAX: Duration = Duration::from_millis(20);

struct Tracer {
    /// CRIU's process id.
    owner: i32,
    /// What stays open when CRIU has ended.
    inherited: Inherited,
    marks: &'static Marks,
    links: &'static Links,
    /// We share a processor with CRIU.
    beside: bool,
    tracees: BTreeMap<i32, Tracee>,
    /// Threads have been let go, have ended.
    let_some_go: bool,
    saw_end: bool,
    /// CRIU's last look into a queue of signals, if it was empty.
    peeked: Option<Peeked>,
}

impl Tracer {
    fn has_owner(&self) -> bool {
        // SAFETY: no arguments.
        unsafe { libc::getppid() == self.owner }
    }

    fn serve(&mut self, call: &mut Call) {
        self.follow(call.cpu);
        call.told = 0;
        if let Err(error) = self.serve_posted(call) {
            call.result = error;
            return;
        }
        match call.what {
            What::Ptrace(request) => {
                let asked = Post {
                    request,
                    shape: call.shape,
                    pid: call.pid,
                    address: call.address,
                    data: call.data,
                    length: call.length,
                };
                (call.result, call.length) = self.ptrace(&asked, &mut call.buffer);
                if call.result >= 0 {
                    call.told = self.look_ahead(&asked, call);
                }
            }
            What::Wait(options) => self.wait(options, call),
        }
    }

    fn serve_posted(&mut self, call: &mut Call) -> Result<(), i64> {
        let posts = call.posts.min(call.posted.len());
        call.posts = 0;
        let mut list = &mut call.posted[..posts];
        while let Some((post, bytes, rest)) = Post::first(list) {
            let (result, _) = self.ptrace(&post, bytes);
            if result < 0 {
                return Err(result);
            }
            list = rest;
        }
        Ok(())
    }

    /// A call goes to and fro between two processes: on one processor that takes 6 us, between two
    /// of which one sleeps, 50 (measured in a virtual machine).
    fn follow(&mut self, cpu: i32) {
        if !self.beside {
            kernel::stay_on(self.owner, cpu);
            kernel::stay_on(0, cpu);
            self.beside = true;
            self.inherit_oom_score();
        }
    }

    /// CRIU was told after it had forked us how unwilling the kernel should be to kill it.
    fn inherit_oom_score(&self) {
        let path = |process: &str| format!("/proc/{process}/oom_score_adj");
        if let Ok(score) = std::fs::read(path(&self.owner.to_string())) {
            // Where it may not be lowered it is not.
            let _ = std::fs::write(path("self"), score);
        }
    }

    /// The result, and the length of what is in `bytes` then.
    fn ptrace(&mut self, call: &Post, bytes: &mut [u8]) -> (i64, usize) {
        let before = self.remember(call);
        let pointer = bytes.as_mut_ptr() as u64;
        let (request, pid) = (call.request, call.pid);
        let mut length = call.length.min(bytes.len());
        let result = match call.shape {
            Shape::Plain => kernel::ptrace(request, pid, call.address, call.data),
            Shape::Data => kernel::ptrace(request, pid, call.address, pointer),
            Shape::Address => kernel::ptrace(request, pid, pointer, call.data),
            Shape::Both => kernel::ptrace(request, pid, pointer, pointer + PEEK_BYTES as u64),
            Shape::Vector => {
                let mut vector = libc::iovec {
                    iov_base: bytes.as_mut_ptr().cast(),
                    iov_len: length,
                };
                let vector_at = (&raw mut vector) as u64;
                let result = kernel::ptrace(request, pid, call.address, vector_at);
                length = vector.iov_len;
                result
            }
        };
        if result >= 0 {
            self.note(call, &bytes[..length], before);
        }
        (result, length)
    }

    /// Before a change: what is there now. Gives the word that is going to be replaced.
    fn remember(&mut self, call: &Post) -> Option<u64> {
        let tracee = self.tracees.get_mut(&call.pid)?;
        match call.request {
            kernel::SETREGSET | kernel::SETSIGMASK | kernel::SETFPREGS => {
                tracee.leaves(call.pid);
                None
            }
            kernel::POKEDATA => kernel::word(call.pid, call.address),
            kernel::DETACH => {
                tracee.begins_section_anew(call.pid);
                None
            }
            _ => None,
        }
    }

    /// After a call that succeeded.
    fn note(&mut self, call: &Post, bytes: &[u8], before: Option<u64>) {
        match call.request {
            kernel::SEIZE => {
                self.tracees.insert(call.pid, Tracee::default());
            }
            kernel::DETACH => {
                self.tracees.remove(&call.pid);
                self.let_some_go = true;
            }
            _ => {}
        }
        let Some(tracee) = self.tracees.get_mut(&call.pid) else {
            return;
        };
        match call.request {
            kernel::CONT | kernel::SYSCALL => tracee.resumed(),
            kernel::INTERRUPT => tracee.interrupted(),
            kernel::SETREGSET if call.address == kernel::NT_PRSTATUS => {
                if let Some(registers) = kernel::registers_in(bytes) {
                    tracee.has_registers(&registers);
                }
            }
            kernel::SETSIGMASK => {
                let mask = bytes.first_chunk().map(|mask| u64::from_ne_bytes(*mask));
                tracee.has_mask(mask.unwrap_or_default());
            }
            kernel::POKEDATA => {
                if let Some(before) = before {
                    tracee.has_word(call.address, before, call.data);
                }
            }
            _ => {}
        }
    }

    /// Does what CRIU is going to ask for after a call that succeeded; how much tells of it.
    fn look_ahead(&mut self, asked: &Post, call: &mut Call) -> usize {
        let (tid, besides) = (asked.pid, &mut call.besides);
        match asked.request {
            kernel::SEIZE => {
                let Some((result, told)) = ahead::interrupt(tid, besides) else {
                    return 0;
                };
                if let Some(tracee) = self.tracees.get_mut(&tid).filter(|_| result >= 0) {
                    tracee.interrupted();
                }
                told
            }
            kernel::CONT => match self.tracees.get_mut(&tid) {
                Some(tracee) if tracee.is_on_errand(tid) => ahead::next_stop(tid, tracee, besides),
                _ => 0,
            },
            kernel::PEEKSIGINFO => {
                let now = Peeked::empty(tid, &call.buffer, call.result);
                let before = std::mem::replace(&mut self.peeked, now);
                match (before, now) {
                    (Some(before), Some(now)) if before.is_like(&now) => {
                        ahead::peek(&now, &self.tracees, besides)
                    }
                    _ => 0,
                }
            }
            _ => 0,
        }
    }

    fn wait(&mut self, options: i32, call: &mut Call) {
        let polled = options | libc::__WALL | libc::WNOHANG;
        let deadline = Instant::now() + WAIT_TIME_MAX;
        loop {
            (call.result, call.status) = kernel::wait(call.pid, polled);
            let left = deadline.saturating_duration_since(Instant::now());
            if call.result != 0 || options & libc::WNOHANG != 0 || left.is_zero() {
                break;
            }
            if kernel::next_signal(Some(left)) == Signal::Orphaned || !self.has_owner() {
                self.let_all_go();
            }
        }
        let Ok(tid @ 1..) = i32::try_from(call.result) else {
            return;
        };
        if Stop::from_status(call.status) == Stop::Ended {
            self.saw_end |= self.tracees.remove(&tid).is_some();
            return;
        }
        let Some(tracee) = self.tracees.get_mut(&tid) else {
            return;
        };
        let was_expected = tracee.is_expected();
        let besides = &mut call.besides;
        call.told = ahead::hear(tid, call.status, tracee, besides, None);
        if was_expected && call.pid == tid {
            call.told += ahead::next_stops(tid, &mut self.tracees, &mut besides[call.told..]);
        }
    }

    /// CRIU is the one who has a handler for what its tracees do without being asked to. It has it
    /// for as long as one of them serves in the parasite, and may end there.
    fn pass_on(&self) {
        let serves = self.tracees.iter().any(|(tid, tracee)| tracee.serves(*tid));
        if serves && kernel::somebody_waits_to_be_heard() {
            // SAFETY: numbers only.
            unsafe { libc::kill(self.owner, libc::SIGCHLD) };
        }
    }

    /// The kernel lets go of all that are stopped when this process ends.
    fn let_all_go(&mut self) -> ! {
        if !self.tracees.is_empty() {
            frozen::put_back(self.tracees.keys().copied());
        }
        for (tid, tracee) in &mut self.tracees {
            tracee.hold(*tid);
        }
        // A tree that CRIU has ended leaves its sockets in repair mode, for them to end silently.
        let is_ended = self.tracees.is_empty() && self.saw_end && !self.let_some_go;
        let (unlinked, repaired) = if is_ended {
            (Ok(()), Ok(()))
        } else {
            (self.links.remove(), self.marks.end_repair())
        };
        // Only now may the parasites notice that nobody speaks to them any more.
        self.inherited.close_others();
        let tracees = self.tracees.iter_mut();
        let homeless: Vec<i32> = tracees
            .filter_map(|(tid, tracee)| (!tracee.come_home(*tid)).then_some(*tid))
            .collect();
        let mut said = String::new();
        for (tid, tracee) in &mut self.tracees {
            if kernel::is_first_thread(*tid)
                && let Err(error) = repair::end(*tid)
            {
                said += &format!("sockets of process {tid} may be left in repair mode: {error}\n");
            }
            if !homeless.contains(tid) {
                if !tracee.clean_up(*tid) {
                    said += &format!("something of criu is left in process {tid}\n");
                }
                tracee.begins_section_anew(*tid);
                tracee.send_owed(*tid);
            }
        }
        if let Err(error) = repaired {
            said += &format!("a socket may be left in repair mode: {error}\n");
        }
        if let Err(error) = unlinked {
            said += &format!("a name of criu's, link_remap.N, may be left: {error}\n");
        }
        if !homeless.is_empty() {
            said += &format!("criu has ended, and these threads are broken: {homeless:?}\n");
        }
        if !said.is_empty() {
            // Where it cannot be said it is not; nothing may keep the threads from going on.
            let _ = write!(std::io::stderr(), "criu-tracer: {said}");
        }
        // SAFETY: a number; what CRIU wants done at its exit is not for us to do.
        unsafe { libc::_exit(0) }
    }
}
