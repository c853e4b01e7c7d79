//! The tracer's own process: serves CRIU's calls, and brings everything home when CRIU has ended.

use std::collections::BTreeMap;
use std::io::Write;
use std::time::{Duration, Instant};

use crate::channel::{BUFFER_BYTES, Call, PEEK_BYTES, Shape, Shared, What};
use crate::files::Inherited;
use crate::frozen;
use crate::kernel::{self, Registers, Signal, Stop};
use crate::known;
use crate::links::Links;
use crate::repair;
use crate::sockets::Marks;
use crate::tracee::{Tracee, is_first_thread};

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
        scratch: Some(Box::new(Call::NOTHING)),
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
    /// For what is posted, one after the other.
    scratch: Option<Box<Call>>,
}

impl Tracer {
    fn has_owner(&self) -> bool {
        // SAFETY: no arguments.
        unsafe { libc::getppid() == self.owner }
    }

    fn serve(&mut self, call: &mut Call) {
        self.follow(call.cpu);
        if let Err(error) = self.serve_posted(call) {
            call.result = error;
            return;
        }
        match call.what {
            What::Ptrace(request) => self.ptrace(request, call),
            What::Wait(options) => self.wait(options, call),
        }
    }

    fn serve_posted(&mut self, call: &mut Call) -> Result<(), i64> {
        let posts = call.posts.min(call.posted.len());
        let mut each = self.scratch.take().ok_or(-i64::from(libc::EIO))?;
        let mut result = Ok(());
        for posted in &call.posted[..posts] {
            each.shape = posted.shape;
            each.pid = posted.pid;
            (each.address, each.data) = (posted.address, posted.data);
            each.length = posted.length.min(posted.bytes.len());
            each.buffer[..posted.bytes.len()].copy_from_slice(&posted.bytes);
            self.ptrace(posted.request, &mut each);
            if each.result < 0 {
                result = Err(each.result);
                break;
            }
        }
        self.scratch = Some(each);
        call.posts = 0;
        result
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

    fn ptrace(&mut self, request: u32, call: &mut Call) {
        let before = self.remember(request, call);
        let pointer = call.buffer.as_mut_ptr() as u64;
        call.result = match call.shape {
            Shape::Plain => kernel::ptrace(request, call.pid, call.address, call.data),
            Shape::Data => kernel::ptrace(request, call.pid, call.address, pointer),
            Shape::Address => kernel::ptrace(request, call.pid, pointer, call.data),
            Shape::Both => {
                let behind = pointer + PEEK_BYTES as u64;
                kernel::ptrace(request, call.pid, pointer, behind)
            }
            Shape::Vector => {
                let mut vector = libc::iovec {
                    iov_base: call.buffer.as_mut_ptr().cast(),
                    iov_len: call.length.min(BUFFER_BYTES),
                };
                let vector_at = (&raw mut vector) as u64;
                let result = kernel::ptrace(request, call.pid, call.address, vector_at);
                call.length = vector.iov_len;
                result
            }
        };
        if call.result >= 0 {
            self.note(request, call, before);
        }
    }

    /// Before a change: what is there now. Gives the word that is going to be replaced.
    fn remember(&mut self, request: u32, call: &Call) -> Option<u64> {
        let tracee = self.tracees.get_mut(&call.pid)?;
        match request {
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
    fn note(&mut self, request: u32, call: &Call, before: Option<u64>) {
        match request {
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
        match request {
            kernel::CONT | kernel::SYSCALL => tracee.resumed(),
            kernel::SETREGSET if call.address == kernel::NT_PRSTATUS => {
                if let Some(registers) = registers_in(call) {
                    tracee.has_registers(&registers);
                }
            }
            kernel::SETSIGMASK => {
                let mask = call
                    .buffer
                    .first_chunk()
                    .map(|mask| u64::from_ne_bytes(*mask));
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

    fn wait(&mut self, options: i32, call: &mut Call) {
        let polled = options | libc::__WALL | libc::WNOHANG;
        call.length = 0;
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
        let Ok(tid) = i32::try_from(call.result) else {
            return;
        };
        match Stop::from_status(call.status) {
            Stop::Ended => {
                self.saw_end |= self.tracees.remove(&tid).is_some();
            }
            stop => {
                let (length, registers) = known::collect(tid, &mut call.buffer);
                call.length = length;
                if let Some(tracee) = self.tracees.get_mut(&tid) {
                    tracee.stopped(tid, stop, &call.buffer[..length]);
                    tracee.shows(registers.as_ref());
                }
            }
        }
    }

    /// CRIU is the one who has a handler for what its tracees do without being asked to.
    fn pass_on(&self) {
        if kernel::somebody_waits_to_be_heard() {
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
            if is_first_thread(*tid)
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

fn registers_in(call: &Call) -> Option<Registers> {
    let bytes = call.buffer.get(..size_of::<Registers>())?;
    if call.length != bytes.len() {
        return None;
    }
    // SAFETY: as many bytes as the struct has, all integers; read without alignment.
    Some(unsafe { bytes.as_ptr().cast::<Registers>().read_unaligned() })
}
