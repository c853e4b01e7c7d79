//! What a running tree is made of: everything the target must know of it, or a named refusal.
//!
//! Invariant: nothing is changed. Absent: terminals; sockets in the node's own network namespace.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use pageferry_proto::id::SpaceId;
use pageferry_proto::page::PAGE_SIZE;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::description::{Namespaces, SpaceDescription, WorkloadDescription};
use pageferry_proto::wire::needs::Needs;
use pageferry_sys::namespace::{self, NamespaceKind};
use procfs::process::{Process, Status};

use crate::runtime::files::Descriptors;
use crate::runtime::identity;
use crate::runtime::loopback;
use crate::runtime::mounts::Mounts;
use crate::runtime::rootfs::RootFiles;

/// Threads in one tree; the description of one must fit a control message.
pub const TASKS_MAX: usize = 16_384;

/// What the source learned about a tree, network apart.
#[derive(Debug)]
pub struct Described {
    /// For the target.
    pub description: WorkloadDescription,
    /// Namespaces the root has to itself, in the order in which they are entered.
    pub own: Vec<NamespaceKind>,
    /// What it sees, if it has a mount namespace of its own.
    pub mounts: Option<Mounts>,
    /// The root file system, if it is a container's that travels.
    pub root_files: Option<RootFiles>,
}

/// Looks at the tree of `pids`, `root` first. Blocks for a few milliseconds.
///
/// Of `pipes` somebody who is not in the tree has the other end, and somebody has at the target. If
/// others move along who are in the same network, connections with them do, too: who is left
/// behind is looked for when all are known.
/// `storage` are paths the operator says both nodes share, or that travel along. Links, routes,
/// the addresses spaces go by, the proofs of what is shared, the kernel's boot id, the processor
/// and CRIU's version are left for the caller, who knows them.
pub fn describe(
    root: i32,
    (pids, pipes, others_move_along): (&[i32], &[u64], bool),
    storage: &[PathBuf],
) -> Result<Described, Failure> {
    let gone = |error: &dyn std::fmt::Display| {
        Failure::new(
            ErrorCode::WorkloadGone,
            format!("there is no process {root}: {error}"),
        )
    };
    let process = Process::new(root).map_err(|error| gone(&error))?;
    refuse_ourselves(root)?;
    let own = own_namespaces(root)?;
    check_members(root, pids, &own)?;
    let mounts = own_mounts(root, &own, storage)?;
    let mut descriptors = Descriptors::of(pids, mounts.clone());
    let (spaces, tasks) = members(pids, storage, &mut descriptors)?;
    descriptors.check_pipes(pipes)?;
    if !others_move_along {
        check_sockets(root, pids, &own, &descriptors)?;
    }
    check_session(&process, &tasks)?;
    let (hostname, domainname) = names(root, &own)?;
    let link = |name: &str| {
        fs::read_link(format!("/proc/{root}/{name}"))
            .map(|path| path.to_string_lossy().into_owned())
            .unwrap_or_default()
    };
    let description = WorkloadDescription {
        root_pid: root,
        spaces,
        // In a pid namespace of their own they take nothing of the target's.
        pids: if own.contains(&NamespaceKind::Pid) {
            Vec::new()
        } else {
            tasks.into_iter().collect()
        },
        own_namespaces: own
            .iter()
            .fold(Namespaces::NONE, |all, kind| all.with(wire_kind(*kind))),
        hostname,
        domainname,
        links: Vec::new(),
        routes: Vec::new(),
        files: descriptors.files.into_values().collect(),
        shared: Vec::new(),
        copied: Vec::new(),
        boot_id: [0; 16],
        cpu: None,
        criu_version: 0,
        page_size: PAGE_SIZE as u32,
        kernel_release: kernel_release(),
        cwd: link("cwd"),
        root: link("root"),
        mounts: mounts.as_ref().map_or(Ok(Vec::new()), Mounts::describe)?,
        needs: Needs {
            private_bytes: private_bytes(pids),
            ..Needs::default()
        },
        container: None,
        members: Vec::new(),
        member_name: String::new(),
    };
    Ok(Described {
        description,
        own,
        mounts,
        root_files: None,
    })
}

/// The mounts of a namespace of its own that the root of a tree sees, if it has one; `named` are
/// paths that the operator names.
pub fn mounts(root: i32, named: &[PathBuf]) -> Result<Option<Mounts>, Failure> {
    own_mounts(root, &own_namespaces(root)?, named)
}

/// The spaces and all tasks of the tree; what they have open goes to `descriptors`.
fn members(
    pids: &[i32],
    shared: &[PathBuf],
    descriptors: &mut Descriptors,
) -> Result<(Vec<SpaceDescription>, BTreeSet<i32>), Failure> {
    let mut spaces = Vec::new();
    let mut tasks = BTreeSet::new();
    for pid in pids {
        let Ok(member) = Process::new(*pid) else {
            continue;
        };
        let Some(space) = space(&member, &mut tasks)? else {
            continue;
        };
        descriptors.add(&member, shared)?;
        spaces.push(space);
    }
    if tasks.len() > TASKS_MAX {
        return Err(Failure::new(
            ErrorCode::UnsupportedWorkload,
            format!("the tree has more than {TASKS_MAX} threads"),
        ));
    }
    Ok((spaces, tasks))
}

fn refuse_ourselves(root: i32) -> Result<(), Failure> {
    let own = i32::try_from(std::process::id()).unwrap_or(1);
    if own != root && !identity::ancestors(own).contains(&root) {
        return Ok(());
    }
    Err(Failure::new(
        ErrorCode::UnsupportedWorkload,
        format!("process {root} is this daemon or one of its ancestors"),
    ))
}

fn own_namespaces(root: i32) -> Result<Vec<NamespaceKind>, Failure> {
    let unreadable = |error: io::Error| {
        Failure::new(
            ErrorCode::UnsupportedWorkload,
            format!("the namespaces of process {root} cannot be read: {error}"),
        )
    };
    let user = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/user"));
    if user(&root.to_string()).map_err(unreadable)? != user("self").map_err(unreadable)? {
        return Err(Failure::new(
            ErrorCode::UnsupportedWorkload,
            format!("process {root} is in a user namespace of its own, which is not moved"),
        ));
    }
    let mut own = Vec::new();
    for kind in NamespaceKind::ALL {
        if namespace::differs(root, kind).map_err(unreadable)? {
            own.push(kind);
        }
    }
    Ok(own)
}

fn space(
    process: &Process,
    tasks: &mut BTreeSet<i32>,
) -> Result<Option<SpaceDescription>, Failure> {
    let (Ok(status), Ok(threads)) = (process.status(), process.tasks()) else {
        return Ok(None);
    };
    // Zombies have no memory; CRIU restores them by itself.
    let Some(resident) = status.vmrss else {
        tasks.insert(process.pid);
        tasks.extend(dead_leaders(process));
        return Ok(None);
    };
    let threads: Vec<i32> = threads.flatten().map(|task| task.tid).collect();
    tasks.extend(&threads);
    tasks.extend(dead_leaders(process));
    let vpid = innermost(&status);
    Ok(Some(SpaceDescription {
        vpid: SpaceId(u32::try_from(vpid).unwrap_or(0)),
        comm: status.name,
        threads,
        memory_bytes: (resident + status.vmswap.unwrap_or(0)) << 10, // KiB
    }))
}

/// Leaders of its session and its group that are dead. CRIU makes them again for a moment.
fn dead_leaders(process: &Process) -> impl Iterator<Item = i32> {
    let stat = process.stat().ok();
    let leaders = stat.map(|stat| [stat.session, stat.pgrp]);
    let leaders = leaders.into_iter().flatten();
    leaders.filter(|leader| 0 < *leader && !Path::new(&format!("/proc/{leader}")).exists())
}

/// Memory that each process has for itself, of all of them. A page that parent and child still have
/// in common is counted for both: at the target each has its own.
fn private_bytes(pids: &[i32]) -> u64 {
    let of = |pid: &i32| {
        let status = Process::new(*pid)
            .and_then(|process| process.status())
            .ok()?;
        Some((status.rssanon? + status.vmswap.unwrap_or_default()) << 10) // KiB
    };
    pids.iter().filter_map(of).sum()
}

/// The pid in the innermost pid namespace, which is what CRIU knows a process by: there is at most
/// one level between it and the node.
fn innermost(status: &Status) -> i32 {
    let all = status.nspid.as_deref().unwrap_or_default();
    all.last().copied().unwrap_or(status.pid)
}

/// Namespaces within the workload would have to be made one by one.
fn check_members(root: i32, pids: &[i32], own: &[NamespaceKind]) -> Result<(), Failure> {
    let refused = |text: String| Err(Failure::new(ErrorCode::UnsupportedWorkload, text));
    let of =
        |pid: i32, kind: NamespaceKind| fs::read_link(format!("/proc/{pid}/ns/{}", kind.file()));
    for kind in [NamespaceKind::Pid, NamespaceKind::Mount] {
        let theirs = of(root, kind).ok();
        // One that ends meanwhile, or has ended and is a zombie, is in no namespace.
        let differs =
            |pid: &&i32| of(**pid, kind).is_ok_and(|found| Some(&found) != theirs.as_ref());
        if let Some(pid) = pids.iter().find(differs) {
            return refused(format!(
                "process {pid} is in another {} namespace than process {root}",
                kind.file()
            ));
        }
    }
    if !own.contains(&NamespaceKind::Pid) {
        return Ok(());
    }
    if !own.contains(&NamespaceKind::Mount) {
        return refused(
            "the workload has its own pid namespace, but not its own mount namespace, without \
             which /proc cannot show it"
                .to_owned(),
        );
    }
    let status = Process::new(root).and_then(|process| process.status());
    let ids = status.ok().and_then(|status| status.nspid);
    match ids.as_deref() {
        Some([_, 1]) => Ok(()),
        _ => refused(format!(
            "process {root} is not process 1 of its pid namespace, or that is not the node's child"
        )),
    }
}

fn own_mounts(
    root: i32,
    own: &[NamespaceKind],
    named: &[PathBuf],
) -> Result<Option<Mounts>, Failure> {
    if !own.contains(&NamespaceKind::Mount) {
        return Ok(None);
    }
    // Mounts above a changed root are not listed.
    let place = fs::read_link(format!("/proc/{root}/root")).unwrap_or_default();
    if place != Path::new("/") {
        return Err(Failure::new(
            ErrorCode::UnsupportedWorkload,
            format!(
                "process {root} has a mount namespace of its own, but its root is {} in it",
                place.display()
            ),
        ));
    }
    let mounts = Mounts::read(root, named)?;
    mounts.check_contents(root)?;
    Ok(Some(mounts))
}

/// A session or process group whose leader is outside the tree cannot be made again. A leader
/// outside of the node's pid namespace is called 0.
fn check_session(process: &Process, tasks: &BTreeSet<i32>) -> Result<(), Failure> {
    let Ok(stat) = process.stat() else {
        return Ok(());
    };
    if !tasks.contains(&stat.session) {
        return Err(Failure::new(
            ErrorCode::UnsupportedWorkload,
            if stat.session == 0 {
                format!(
                    "process {} belongs to a session that was begun outside of this node's pid \
                     namespace: start it with setsid",
                    process.pid
                )
            } else {
                format!(
                    "process {} belongs to the session of process {}, which is not part of what \
                     moves: start it with setsid",
                    process.pid, stat.session
                )
            },
        ));
    }
    Ok(())
}

fn names(root: i32, own: &[NamespaceKind]) -> Result<(String, String), Failure> {
    if !own.contains(&NamespaceKind::Uts) {
        return Ok((String::new(), String::new()));
    }
    namespace::open(root, NamespaceKind::Uts)
        .and_then(|uts| namespace::names(&uts))
        .map_err(|error| {
            Failure::new(
                ErrorCode::UnsupportedWorkload,
                format!("the host name of process {root} cannot be read: {error}"),
            )
        })
}

/// A connection to somebody who stays would be torn apart.
fn check_sockets(
    root: i32,
    pids: &[i32],
    own: &[NamespaceKind],
    descriptors: &Descriptors,
) -> Result<(), Failure> {
    if !own.contains(&NamespaceKind::Net) {
        return refuse_inet_sockets(root, descriptors);
    }
    let seen = loopback::Connections::of(root)?;
    loopback::check(&seen, root, pids, |inode| {
        descriptors.sockets.contains_key(&inode)
    })
}

/// Sockets of the node's own network namespace cannot follow the workload.
fn refuse_inet_sockets(root: i32, descriptors: &Descriptors) -> Result<(), Failure> {
    for table in ["tcp", "tcp6", "udp", "udp6", "raw", "raw6", "packet"] {
        let text = fs::read_to_string(format!("/proc/{root}/net/{table}")).unwrap_or_default();
        for line in text.lines().skip(1) {
            // The inode is the tenth column; in `packet` the ninth.
            let column = if table == "packet" { 8 } else { 9 };
            let inode = line
                .split_ascii_whitespace()
                .nth(column)
                .and_then(|word| word.parse().ok());
            let held = inode.and_then(|inode: u64| descriptors.sockets.get(&inode));
            if let Some((pid, fd)) = held {
                return Err(Failure::new(
                    ErrorCode::NetworkUnfit,
                    format!(
                        "descriptor {fd} of process {pid} is a {table} socket in the node's own \
                         network namespace, whose addresses cannot move: give the workload its own"
                    ),
                ));
            }
        }
    }
    Ok(())
}

/// The bit of the wire's set for a kind of namespace.
pub const fn wire_kind(kind: NamespaceKind) -> Namespaces {
    match kind {
        NamespaceKind::Ipc => Namespaces::IPC,
        NamespaceKind::Uts => Namespaces::UTS,
        NamespaceKind::Net => Namespaces::NET,
        NamespaceKind::Pid => Namespaces::PID,
        NamespaceKind::Mount => Namespaces::MNT,
    }
}

fn kernel_release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease")
        .unwrap_or_default()
        .trim_end()
        .to_owned()
}
