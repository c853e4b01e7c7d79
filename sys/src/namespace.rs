//! Namespaces of other tasks: opening them, making new ones, and running code inside them.
//!
//! A namespace belongs to a *thread*, so everything here happens on a thread of its own that ends
//! with the call: no runtime worker ever changes its namespaces. Nothing here is unsafe; it lives
//! in `sys` because a thread in a foreign namespace is as easy to misuse as a pointer.
//!
//! Absent: user namespaces, and mount namespaces (which would need the working directory unshared).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sched::{CloneFlags, setns, unshare};

/// The kinds of namespace that are entered on behalf of a workload, in the order they are entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NamespaceKind {
    /// SysV IPC objects and POSIX message queues.
    Ipc,
    /// Host name and NIS domain name.
    Uts,
    /// Links, addresses, routes, sockets.
    Net,
    /// Process ids.
    Pid,
    /// Mounts.
    Mount,
}

impl NamespaceKind {
    /// All kinds.
    pub const ALL: [Self; 5] = [Self::Ipc, Self::Uts, Self::Net, Self::Pid, Self::Mount];

    /// The file under `/proc/PID/ns`.
    pub const fn file(self) -> &'static str {
        match self {
            Self::Ipc => "ipc",
            Self::Uts => "uts",
            Self::Net => "net",
            Self::Pid => "pid",
            Self::Mount => "mnt",
        }
    }

    const fn flag(self) -> CloneFlags {
        match self {
            Self::Ipc => CloneFlags::CLONE_NEWIPC,
            Self::Uts => CloneFlags::CLONE_NEWUTS,
            Self::Net => CloneFlags::CLONE_NEWNET,
            Self::Pid => CloneFlags::CLONE_NEWPID,
            Self::Mount => CloneFlags::CLONE_NEWNS,
        }
    }
}

/// Opens the namespace `kind` of process `pid`.
pub fn open(pid: i32, kind: NamespaceKind) -> io::Result<OwnedFd> {
    Ok(File::open(format!("/proc/{pid}/ns/{}", kind.file()))?.into())
}

/// Opens the namespace `kind` that is bound at `path`. Another file is an error, and so is the
/// namespace that the calling process is in.
pub fn open_bound(path: &Path, kind: NamespaceKind) -> io::Result<OwnedFd> {
    let file = File::open(path)?;
    // The kernel alone knows what it is: a bound one goes by the path it is bound at.
    run_inside(&[(kind, file.as_fd())], || ()).map_err(|error| {
        let kind = kind.file();
        io::Error::new(error.kind(), format!("it is no {kind} namespace: {error}"))
    })?;
    let ours = std::fs::metadata(format!("/proc/self/ns/{}", kind.file()))?;
    let theirs = file.metadata()?;
    if (theirs.dev(), theirs.ino()) == (ours.dev(), ours.ino()) {
        return Err(io::Error::other("it is this node's own"));
    }
    Ok(file.into())
}

/// True when `pid` lives in another namespace of this kind than the calling process.
pub fn differs(pid: i32, kind: NamespaceKind) -> io::Result<bool> {
    let theirs = std::fs::read_link(format!("/proc/{pid}/ns/{}", kind.file()))?;
    let ours = std::fs::read_link(format!("/proc/self/ns/{}", kind.file()))?;
    Ok(theirs != ours)
}

/// Runs `work` on a new thread inside the given namespaces and returns its result.
///
/// Blocks the caller until `work` is done. `kinds` says what each descriptor must be; the kernel
/// refuses a descriptor of another kind.
pub fn run_inside<T: Send>(
    namespaces: &[(NamespaceKind, BorrowedFd<'_>)],
    work: impl FnOnce() -> T + Send,
) -> io::Result<T> {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                for (kind, fd) in namespaces {
                    setns(fd, kind.flag())?;
                }
                Ok(work())
            })
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Makes new namespaces of the given kinds, without any process in them, in the order asked.
///
/// They live as long as the descriptors, or a process that enters them.
pub fn create(kinds: &[NamespaceKind]) -> io::Result<Vec<OwnedFd>> {
    let flags = kinds
        .iter()
        .fold(CloneFlags::empty(), |flags, kind| flags | kind.flag());
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                unshare(flags)?;
                kinds
                    .iter()
                    .map(|kind| {
                        let path = format!("/proc/thread-self/ns/{}", kind.file());
                        Ok(File::open(path)?.into())
                    })
                    .collect()
            })
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Sets host name and domain name inside the UTS namespace `uts`.
pub fn set_names(uts: &impl AsFd, hostname: &str, domainname: &str) -> io::Result<()> {
    let uts = uts.as_fd();
    run_inside(&[(NamespaceKind::Uts, uts)], || {
        nix::unistd::sethostname(hostname)?;
        // No library wraps setdomainname(2); the sysctl belongs to the caller's UTS namespace.
        std::fs::write("/proc/sys/kernel/domainname", domainname)
    })?
}

/// Host name and domain name inside the UTS namespace `uts`.
pub fn names(uts: &impl AsFd) -> io::Result<(String, String)> {
    let uts = uts.as_fd();
    run_inside(&[(NamespaceKind::Uts, uts)], || {
        let read = |file: &str| {
            std::fs::read_to_string(format!("/proc/sys/kernel/{file}"))
                .map(|name| name.trim_end().to_owned())
        };
        let domainname = read("domainname")?;
        Ok((
            read("hostname")?,
            if domainname == "(none)" {
                String::new()
            } else {
                domainname
            },
        ))
    })?
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn a_new_uts_namespace_keeps_its_own_names() {
        let outside = nix::unistd::gethostname().expect("a host name");
        let fds = create(&[NamespaceKind::Uts]).expect("root may unshare");
        set_names(&fds[0], "ferry", "example").expect("set");
        assert_eq!(
            names(&fds[0]).expect("read"),
            ("ferry".to_owned(), "example".to_owned())
        );
        assert_eq!(nix::unistd::gethostname().expect("a host name"), outside);
    }

    #[test]
    fn entering_a_namespace_leaves_the_caller_where_it_was() {
        let before = std::fs::read_link("/proc/thread-self/ns/net").expect("proc");
        let fds = create(&[NamespaceKind::Net]).expect("root may unshare");
        let inside = run_inside(&[(NamespaceKind::Net, fds[0].as_fd())], || {
            std::fs::read_link("/proc/thread-self/ns/net").expect("proc")
        })
        .expect("enter");
        assert_ne!(inside, before);
        assert_eq!(
            std::fs::read_link("/proc/thread-self/ns/net").expect("proc"),
            before
        );
    }

    #[test]
    fn what_is_bound_is_opened_unless_it_is_something_else_or_the_callers_own() {
        let fds = create(&[NamespaceKind::Net]).expect("root may unshare");
        let path = format!("/proc/self/fd/{}", fds[0].as_raw_fd());
        let opened = open_bound(Path::new(&path), NamespaceKind::Net).expect("it is one");
        assert_eq!(
            nix::sys::stat::fstat(&opened).expect("stat").st_ino,
            nix::sys::stat::fstat(&fds[0]).expect("stat").st_ino
        );
        let refused = |path: &str, kind| {
            let refused = open_bound(Path::new(path), kind).expect_err(path);
            refused.to_string()
        };
        let text = refused(&path, NamespaceKind::Uts);
        assert!(text.starts_with("it is no uts namespace"), "{text}");
        let text = refused("/proc/self/exe", NamespaceKind::Net);
        assert!(text.starts_with("it is no net namespace"), "{text}");
        let text = refused("/proc/self/ns/net", NamespaceKind::Net);
        assert_eq!(text, "it is this node's own");
    }

    #[test]
    fn a_namespace_of_the_wrong_kind_is_refused() {
        let fds = create(&[NamespaceKind::Uts]).expect("root may unshare");
        assert!(run_inside(&[(NamespaceKind::Net, fds[0].as_fd())], || ()).is_err());
    }
}
