//! How processes of a tree speak with each other by the kernel's own objects: segments, semaphores
//! and message queues of System V, and POSIX message queues.
//!
//! Such objects belong to an IPC namespace, not to whoever uses them. Those of a namespace of the
//! tree's own go along: CRIU is outside of it at both nodes, so it dumps all that is in it and
//! makes it anew, with the same ids and keys. [`Ipc`] looks for what cannot be made anew, and for
//! what CRIU would lose without a word. Those of the node's namespace stay, and a tree that uses
//! some is refused.
//!
//! Not carried, and not looked for: which process was the last to use an object, and when; who made
//! it, which is the superuser at the target.
//!
//! Absent: who else is in a namespace that is the tree's own. Whoever maps a segment is noticed;
//! who waits for a semaphore or a message is not.

mod mapped;
mod table;

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_sys::ipc;
use pageferry_sys::namespace::{self, NamespaceKind};
use pageferry_sys::task;

use mapped::Mapped;
use table::{Kind, Object};

/// Tells what of it cannot move.
#[derive(Clone, Debug, Default)]
pub struct Ipc {
    /// If the tree has a namespace of its own.
    own: Option<Arc<Namespace>>,
    /// What CRIU loses may be lost.
    accepts_loss: bool,
    /// It is that of several trees, of which CRIU dumps one each and none of its objects.
    is_shared: bool,
}

/// A segment of System V that no process maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its id.
    pub id: i32,
    /// Bytes in use.
    pub bytes: u64,
}

impl Ipc {
    /// That of the tree below `root`, which has a namespace of its own or not.
    pub fn of(root: i32, accepts_loss: bool) -> Result<Self, Failure> {
        let own = match namespace::differs(root, NamespaceKind::Ipc) {
            Ok(true) => Namespace::of(root).map(|own| Some(Arc::new(own))),
            Ok(false) => Ok(None),
            Err(error) => Err(error),
        };
        let own = own.map_err(|error| unreadable(&error))?;
        Ok(Self {
            own,
            accepts_loss,
            is_shared: false,
        })
    }

    /// The namespace is one that several trees share: what is in it goes along with none of them.
    #[must_use]
    pub fn shared(self) -> Self {
        Self {
            is_shared: true,
            ..self
        }
    }

    /// Looks for what cannot move. `members` are the processes of the tree by now; `undoes` says
    /// whether semaphores are changed when one of them ends (`SEM_UNDO`), if that is known, and is
    /// asked if there are any. Blocks: 0.1 ms, and 2 us for each mapping if there are any segments.
    pub fn look(
        &self,
        members: impl Fn() -> io::Result<Vec<i32>>,
        undoes: impl Fn(i32) -> Option<bool>,
    ) -> Result<(), Failure> {
        let looked = match &self.own {
            Some(namespace) if self.is_shared => namespace.look_for_any(),
            Some(namespace) => namespace.look(members, self.accepts_loss, undoes),
            None => members().and_then(|pids| look_at_node(&pids, undoes)),
        };
        match looked {
            Ok(unfit) => unfit.map_or(Ok(()), Err),
            Err(error) => Err(unreadable(&error)),
        }
    }

    /// Segments that no process maps: CRIU copies them like those that one does.
    pub fn unmapped(&self) -> Result<Vec<Segment>, Failure> {
        let Some(namespace) = &self.own else {
            return Ok(Vec::new());
        };
        let segments = namespace.table(Kind::Segments);
        let segments = segments.map_err(|error| unreadable(&error))?;
        let unmapped = segments.into_iter().filter(|segment| segment.mappings == 0);
        Ok(unmapped
            .map(|segment| Segment {
                id: segment.id,
                bytes: segment.bytes,
            })
            .collect())
    }

    /// Bytes in use of all of them.
    pub fn unmapped_bytes(&self) -> Result<u64, Failure> {
        let unmapped = self.unmapped()?;
        Ok(unmapped.iter().map(|segment| segment.bytes).sum())
    }
}

/// An IPC namespace, by files that were opened in it and tell of it wherever they are read.
#[derive(Debug)]
struct Namespace {
    handle: OwnedFd,
    tables: [File; 3],
    /// Whether segments go with their last mapping in any case.
    removes_segments: File,
    message_max: File,
    queue_max: File,
    /// In which POSIX message queues are the files.
    posix_queues: File,
}

impl Namespace {
    fn of(root: i32) -> io::Result<Self> {
        let handle = namespace::open(root, NamespaceKind::Ipc)?;
        let opened = namespace::run_inside(&[(NamespaceKind::Ipc, handle.as_fd())], || {
            let [shm, sem, msg] = Kind::ALL.map(|kind| File::open(kind.path()));
            Ok::<_, io::Error>((
                [shm?, sem?, msg?],
                File::open("/proc/sys/kernel/shm_rmid_forced")?,
                File::open("/proc/sys/kernel/msgmax")?,
                File::open("/proc/sys/kernel/msgmnb")?,
                ipc::posix_queues()?,
            ))
        });
        let (tables, removes_segments, message_max, queue_max, posix_queues) = opened??;
        Ok(Self {
            handle,
            tables,
            removes_segments,
            message_max,
            queue_max,
            posix_queues,
        })
    }

    fn table(&self, kind: Kind) -> io::Result<Vec<Object>> {
        table::parse(kind, &read(&self.tables[kind as usize])?).ok_or_else(unknown_form)
    }

    /// Anything that is in it.
    fn look_for_any(&self) -> io::Result<Option<Failure>> {
        for (kind, what) in
            Kind::ALL
                .into_iter()
                .zip(["segment", "set of semaphores", "message queue"])
        {
            if let Some(object) = self.table(kind)?.first() {
                return Ok(Some(unfit(&format!(
                    "the IPC namespace that the containers share has the {what} {} of System V, \
                     which is not moved with several containers yet",
                    object.id
                ))));
            }
        }
        self.look_at_queues(&[])
    }

    /// What of it cannot move, or would be lost.
    fn look(
        &self,
        members: impl Fn() -> io::Result<Vec<i32>>,
        accepts_loss: bool,
        undoes: impl Fn(i32) -> Option<bool>,
    ) -> io::Result<Option<Failure>> {
        let segments = self.table(Kind::Segments)?;
        let semaphores = self.table(Kind::Semaphores)?;
        let queues = self.table(Kind::Queues)?;
        let unfit = match self.look_at_segments(&segments, &members)? {
            None => self.look_at_queues(&queues)?,
            unfit => unfit,
        };
        if unfit.is_some() || accepts_loss {
            return Ok(unfit);
        }
        let all = [&segments, &semaphores, &queues];
        let mut all = all.into_iter().flatten();
        if let Some(given) = all.find(|found| found.is_given_away()) {
            return Ok(Some(lost(&format!(
                "object {} belongs to user {} and group {}, and user {} and group {}, who made \
                 it, would lose the right to it",
                given.id, given.owner[0], given.owner[1], given.creator[0], given.creator[1]
            ))));
        }
        if let Some(special) = segments.iter().find(|found| found.mode & SPECIAL != 0) {
            let what = match special.mode & table::REMOVED {
                0 => "kept from being swapped (SHM_LOCK)",
                _ => "to vanish with its last mapping (IPC_RMID)",
            };
            let text = format!(
                "segment {} is {what}, and would not be any more",
                special.id
            );
            return Ok(Some(lost(&text)));
        }
        if let Some(limited) = self.find_limited(&queues)? {
            return Ok(Some(limited));
        }
        if semaphores.is_empty() {
            return Ok(None);
        }
        let may_undo = |pid: &i32| undoes(*pid) != Some(false) && !task::has_ended(*pid);
        Ok(members()?.into_iter().find(may_undo).map(|pid| {
            let sure = undoes(pid).map_or("perhaps ", |_| "");
            lost(&format!(
                "process {pid} has {sure}changed semaphores with SEM_UNDO, and what the kernel \
                 would undo when it ends would never be"
            ))
        }))
    }

    fn look_at_segments(
        &self,
        segments: &[Object],
        members: &impl Fn() -> io::Result<Vec<i32>>,
    ) -> io::Result<Option<Failure>> {
        if segments.is_empty() {
            return Ok(None);
        }
        if read_number(&self.removes_segments)? != 0 {
            return Ok(Some(unfit(
                "kernel.shm_rmid_forced is set in the workload's IPC namespace: a segment would \
                 vanish before anybody could map it at the target; set it to 0",
            )));
        }
        let mapped = Mapped::by(&members()?)?;
        for segment in segments {
            let id = segment.id;
            if let Some(name) = mapped.namesake(id) {
                return Ok(Some(unfit(&format!(
                    "segment {id} of the workload's IPC namespace has the number of other shared \
                     memory ({name}), and CRIU would take one for the other: make it anew"
                ))));
            }
            // Some of those that mapped it may have ended since.
            if segment.mappings > mapped.count(id)
                && let Some(other) = self.find_other(id, members)?
            {
                return Ok(Some(unfit(&format!(
                    "segment {id} of the workload's IPC namespace is also mapped by process \
                     {other}, which is not part of what moves: end it, or move the tree above both"
                ))));
            }
        }
        Ok(None)
    }

    /// A process in this namespace that maps a segment and is not a member. Looks at all processes
    /// of the node: 10 us for each.
    fn find_other(
        &self,
        id: i32,
        members: &impl Fn() -> io::Result<Vec<i32>>,
    ) -> io::Result<Option<i32>> {
        let own = fs::metadata(format!("/proc/self/fd/{}", self.handle.as_raw_fd()))?.ino();
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let name = entry?.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
                continue;
            };
            // One that has ended since is in none.
            let theirs = fs::metadata(format!("/proc/{pid}/ns/ipc"));
            if theirs.is_ok_and(|theirs| theirs.ino() == own) && 0 < Mapped::by(&[pid])?.count(id) {
                found.push(pid);
            }
        }
        // Only now: whoever of the tree was born meanwhile is one of them, or has ended.
        let members = members()?;
        let other = |pid: &i32| !members.contains(pid) && !task::has_ended(*pid);
        Ok(found.into_iter().find(other))
    }

    fn look_at_queues(&self, queues: &[Object]) -> io::Result<Option<Failure>> {
        let path = format!("/proc/self/fd/{}", self.posix_queues.as_raw_fd());
        if let Some(queue) = fs::read_dir(path)?.next().transpose()? {
            let told = fs::read_to_string(queue.path()).unwrap_or_default();
            let told = told.split_whitespace().next().unwrap_or_default();
            return Ok(Some(unfit(&format!(
                "the workload's IPC namespace has the POSIX message queue /{} ({told}), which \
                 CRIU does not carry: mq_unlink it",
                queue.file_name().to_string_lossy()
            ))));
        }
        if queues.is_empty() {
            return Ok(None);
        }
        let message_max = read_number(&self.message_max)?;
        let large = |queue: &&Object| message_max.min(queue.bytes) > CARRIED_MESSAGE_MAX;
        Ok(queues.iter().find(large).map(|queue| {
            unfit(&format!(
                "message queue {} of the workload's IPC namespace may hold a message of more than \
                 {CARRIED_MESSAGE_MAX} bytes, which CRIU does not carry",
                queue.id
            ))
        }))
    }

    /// A queue that may hold another number of bytes than new ones may.
    fn find_limited(&self, queues: &[Object]) -> io::Result<Option<Failure>> {
        if queues.is_empty() {
            return Ok(None);
        }
        let usual = read_number(&self.queue_max)?;
        let limits = namespace::run_inside(&[(NamespaceKind::Ipc, self.handle.as_fd())], || {
            let limit = |queue: &Object| ipc::queue_limit(queue.id);
            queues.iter().map(limit).collect::<Vec<_>>()
        })?;
        // One that has gone since has nothing to lose.
        let mut limits = queues.iter().zip(limits);
        let limited = limits.find(|(_, limit)| limit.as_ref().is_ok_and(|limit| *limit != usual));
        Ok(limited.map(|(queue, _)| {
            lost(&format!(
                "message queue {} has a limit of its own (msg_qbytes), and would have that of \
                 kernel.msgmnb, which is {usual}",
                queue.id
            ))
        }))
    }
}

/// What of the node's namespace the processes of a tree have used, as far as the kernel tells: who
/// maps a segment, who made an object, and who was the last to do something to it.
fn look_at_node(pids: &[i32], undoes: impl Fn(i32) -> Option<bool>) -> io::Result<Option<Failure>> {
    let ours = |pid: &i32| *pid != 0 && pids.contains(pid);
    let segments = node_table(Kind::Segments)?;
    if segments.iter().any(|segment| 0 < segment.mappings) {
        let mapped = Mapped::by(pids)?;
        if let Some(segment) = segments.iter().find(|found| 0 < mapped.count(found.id)) {
            return Ok(Some(in_node(&format!("maps segment {}", segment.id))));
        }
    }
    for (objects, what) in [
        (segments, "segment"),
        (node_table(Kind::Queues)?, "message queue"),
    ] {
        for object in objects {
            if let Some(pid) = object.pids.iter().find(|pid| ours(pid)) {
                return Ok(Some(in_node(&format!("used {what} {} ({pid})", object.id))));
            }
        }
    }
    let sets = node_table(Kind::Semaphores)?;
    if sets.is_empty() {
        return Ok(None);
    }
    if let Some(pid) = pids.iter().find(|pid| undoes(**pid) == Some(true)) {
        return Ok(Some(in_node(&format!("used semaphores ({pid}, SEM_UNDO)"))));
    }
    let mut left = SEMAPHORES_MAX;
    for set in sets {
        for number in (0..set.count).take(left) {
            left -= 1;
            // One that has gone since is used by nobody.
            let pid = ipc::semaphore_pid(set.id, number).unwrap_or_default();
            if ours(&pid) {
                let what = format!("used semaphore {number} of set {} ({pid})", set.id);
                return Ok(Some(in_node(&what)));
            }
        }
    }
    Ok(None)
}

fn node_table(kind: Kind) -> io::Result<Vec<Object>> {
    table::parse(kind, &fs::read_to_string(kind.path())?).ok_or_else(unknown_form)
}

/// All of a file of the kernel, from its beginning.
fn read(file: &File) -> io::Result<String> {
    let mut bytes = Vec::new();
    let mut buffer = vec![0; 1 << 14];
    loop {
        match file.read_at(&mut buffer, bytes.len() as u64)? {
            0 => return String::from_utf8(bytes).map_err(io::Error::other),
            _ if bytes.len() > table::BYTES_MAX => return Err(unknown_form()),
            length => bytes.extend_from_slice(&buffer[..length]),
        }
    }
}

fn read_number(file: &File) -> io::Result<u64> {
    read(file)?.trim().parse().map_err(|_| unknown_form())
}

fn unknown_form() -> io::Error {
    let text = "the kernel's table is not of the known form";
    io::Error::new(io::ErrorKind::InvalidData, text)
}

fn lost(what: &str) -> Failure {
    let text = format!(
        "in the workload's IPC namespace {what}: CRIU does not carry that; --force-ipc moves it \
         all the same"
    );
    Failure::new(ErrorCode::IpcLost, text)
}

fn in_node(what: &str) -> Failure {
    unfit(&format!(
        "the workload {what} in the node's own IPC namespace, whose objects do not move: start it \
         in a namespace of its own (unshare --ipc)"
    ))
}

fn unfit(text: &str) -> Failure {
    Failure::new(ErrorCode::IpcUnfit, text)
}

fn unreadable(error: &io::Error) -> Failure {
    let text = format!("the IPC objects of the workload cannot be looked at: {error}");
    Failure::new(ErrorCode::NodeUnfit, text)
}

/// What the mode of a segment says that a new one with that mode has not.
const SPECIAL: u32 = table::REMOVED | table::LOCKED;

/// Longest message that CRIU restores, in bytes (its `MSGMAX`).
const CARRIED_MESSAGE_MAX: u64 = 8192;

/// Semaphores of the node that are looked at: 2 us each.
const SEMAPHORES_MAX: usize = 4096;

#[cfg(test)]
mod tests;
