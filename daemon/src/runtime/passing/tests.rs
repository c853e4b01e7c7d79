//! Each state made on the real kernel, found, and no longer found when it has passed.

use std::io::{IoSlice, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind,
    sendmsg, socket,
};
use pageferry_cgroup::freezer::FreezerRoot;
use pageferry_sys::namespace::{NamespaceKind, create, run_inside};

use super::{Observer, Passing, Sleepers, State, uninterruptible, vfork};
use pageferry_trial::Trial;

/// The other process of these tests.
#[test]
fn workload() {
    pageferry_trial::obey();
}

/// A network namespace of the test's own, with its loopback up.
struct Network(OwnedFd);

impl Network {
    fn new() -> Self {
        let net = create(&[NamespaceKind::Net]).expect("root may unshare");
        let network = Self(net.into_iter().next().expect("one namespace"));
        let up = network.inside(|| {
            Command::new("ip")
                .args(["link", "set", "lo", "up"])
                .status()
        });
        assert!(up.expect("iproute2").success());
        network
    }

    fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        run_inside(&[(NamespaceKind::Net, self.0.as_fd())], work).expect("enter")
    }

    fn observer(&self) -> Observer {
        Observer::open(Some(self.0.as_fd())).expect("an observer")
    }

    fn listen(&self) -> (TcpListener, SocketAddr) {
        let listener = self.inside(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)));
        let listener = listener.expect("listen");
        let address = listener.local_addr().expect("an address");
        (listener, address)
    }

    fn connect(&self, address: SocketAddr) -> TcpStream {
        self.inside(|| TcpStream::connect(address))
            .expect("connect")
    }
}

fn own() -> Vec<i32> {
    vec![std::process::id().cast_signed()]
}

fn states(observer: &mut Observer) -> Vec<State> {
    let found = observer.look(&own()).expect("a look");
    found.into_iter().map(|passing| passing.state).collect()
}

/// Waits until `found` is what `wanted` says.
fn until<T: PartialEq + std::fmt::Debug>(wanted: &T, mut found: impl FnMut() -> T) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let now = found();
        if now == *wanted {
            return;
        }
        assert!(Instant::now() < deadline, "{now:?}, not {wanted:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_connection_that_waits_to_be_accepted_is_found_until_it_is() {
    let network = Network::new();
    let mut observer = network.observer();
    let (listener, address) = network.listen();
    assert_eq!(states(&mut observer), []);
    let _client = network.connect(address);
    let found = observer.look(&own()).expect("a look");
    let text = found[0].to_string();
    assert_eq!((found.len(), found[0].state), (1, State::Unaccepted));
    assert!(
        text.contains(&format!("at TCP port {}", address.port())),
        "{text}"
    );
    assert!(text.contains(&format!("process {} (", own()[0])), "{text}");
    // Somebody else's listener says nothing of a workload.
    assert_eq!(observer.look(&[1]).expect("a look"), []);
    let _server = listener.accept().expect("accept");
    assert_eq!(states(&mut observer), []);
}

#[test]
fn a_handshake_is_found_until_the_client_has_sent_something() {
    let network = Network::new();
    let mut observer = network.observer();
    // `TCP_DEFER_ACCEPT`: the kernel ignores the end of the handshake, so that it lasts.
    let script = "use Socket; socket(my $s, PF_INET, SOCK_STREAM, 0); setsockopt($s, 6, 9, 60); \
                  bind($s, sockaddr_in(7321, INADDR_LOOPBACK)); listen($s, 8); \
                  $| = 1; print \"ready\\n\"; accept(my $c, $s); sleep 1000";
    let mut perl = Command::new("perl");
    perl.args(["-e", script]).stdout(Stdio::piped());
    let mut server = Reaped(network.inside(|| perl.spawn()).expect("perl starts"));
    let mut word = [0; 6];
    let output = server.0.stdout.as_mut().expect("a pipe");
    output.read_exact(&mut word).expect("it listens");
    let pids = [server.0.id().cast_signed()];
    let mut client = network.connect(SocketAddr::from((Ipv4Addr::LOCALHOST, 7321)));
    let found = observer.look(&pids).expect("a look");
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].state, State::Handshake);
    assert!(
        found[0].holder.contains("(perl) at TCP port 7321"),
        "{found:?}"
    );
    // It came to somebody else.
    assert_eq!(observer.look(&own()).expect("a look"), []);
    client.write_all(b"x").expect("send");
    until(&Vec::<Passing>::new(), || {
        observer.look(&pids).expect("a look")
    });
}

#[test]
fn what_a_closed_connection_still_owes_its_peer_is_found_until_it_has_it() {
    let network = Network::new();
    let mut observer = network.observer();
    let (listener, address) = network.listen();
    let mut client = network.connect(address);
    let (mut server, _) = listener.accept().expect("accept");
    server.set_nonblocking(true).expect("nonblocking");
    let mut sent = 0;
    // Until the client's buffer is full, too.
    while let Ok(bytes) = server.write(&[7; 65536]) {
        sent += bytes;
    }
    assert_eq!(states(&mut observer), []);
    drop(server);
    assert_eq!(states(&mut observer), [State::Closing]);
    // It was somebody else's, whose listener is still there.
    assert_eq!(observer.look(&[1]).expect("a look"), []);
    drop(listener);
    // Nobody can tell whose it was.
    let found = observer.look(&[1]).expect("a look");
    assert_eq!((found.len(), found[0].state), (1, State::Closing));
    let mut received = Vec::new();
    client.read_to_end(&mut received).expect("read");
    assert_eq!(received.len(), sent);
    until(&Vec::new(), || states(&mut observer));
}

#[test]
fn descriptors_in_flight_are_found_until_they_are_received_and_data_is_not() {
    let network = Network::new();
    let mut observer = network.observer();
    let (sender, mut receiver) = network.inside(UnixStream::pair).expect("a pair");
    (&sender).write_all(b"data").expect("send");
    assert_eq!(states(&mut observer), []);
    let carried = [receiver.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&carried)];
    let bytes = [IoSlice::new(b"!")];
    let raw = sender.as_raw_fd();
    sendmsg::<()>(raw, &bytes, &rights, MsgFlags::empty(), None).expect("sendmsg");
    let found = observer.look(&own()).expect("a look");
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].state, State::Descriptors);
    let mut data = [0; 5];
    receiver.read_exact(&mut data).expect("received");
    assert_eq!(states(&mut observer), []);
}

#[test]
fn an_unread_netlink_message_is_found_until_it_is_read() {
    let network = Network::new();
    let mut observer = network.observer();
    let monitor = network.inside(|| {
        socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )
    });
    let monitor = monitor.expect("a socket");
    bind(monitor.as_raw_fd(), &NetlinkAddr::new(0, 1)).expect("news of links");
    assert_eq!(states(&mut observer), []);
    let down = network.inside(|| {
        Command::new("ip")
            .args(["link", "set", "lo", "down"])
            .status()
    });
    assert!(down.expect("iproute2").success());
    assert_eq!(states(&mut observer), [State::Unread]);
    let mut buffer = [0; 65536];
    while nix::sys::socket::recv(monitor.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT).is_ok() {
    }
    assert_eq!(states(&mut observer), []);
}

/// A child of a child.
struct Killed(nix::unistd::Pid);

impl Drop for Killed {
    fn drop(&mut self) {
        // It may have been killed.
        let _ = nix::sys::signal::kill(self.0, nix::sys::signal::Signal::SIGKILL);
    }
}

struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_parent_in_vfork_is_found_running_and_frozen_until_its_child_ends() {
    // The child goes on in perl, in its parent's memory (CLONE_VM, CLONE_VFORK, SIGCHLD), and ends
    // with its parent (PR_SET_PDEATHSIG, SIGKILL).
    let script = format!(
        "syscall({}, 0x4111, 0, 0, 0, 0) or syscall({}, 1, 9, 0, 0, 0); sleep 1000",
        libc::SYS_clone,
        libc::SYS_prctl
    );
    let mut perl = Command::new("perl");
    let perl = perl.args(["-e", &script]).stdout(Stdio::null()).spawn();
    let perl = Reaped(perl.expect("perl starts"));
    let parent = perl.0.id().cast_signed();
    let children = format!("/proc/{parent}/task/{parent}/children");
    let child = || {
        let text = std::fs::read_to_string(&children).unwrap_or_default();
        text.trim().parse::<i32>().ok()
    };
    until(&true, || child().is_some() && vfork(&[parent]).is_some());
    let child = child().expect("a child");
    let killed = Killed(nix::unistd::Pid::from_raw(child));
    let found = vfork(&[child, parent]).expect("a vfork");
    assert_eq!(found.holder, format!("process {parent} (perl)"));
    assert_eq!(uninterruptible(&[parent]), Some(found.clone()));

    let root = FreezerRoot::detect().expect("a freezer");
    let freezer = root.plan(&format!("test-vfork-{}", std::process::id()));
    freezer.make().expect("make");
    freezer.adopt(|| Ok(vec![parent, child])).expect("adopt");
    let frozen = freezer.freeze();
    // On what CRIU would wait for in vain.
    let found_frozen = vfork(&[parent, child]);
    freezer.thaw().expect("thaw");
    frozen.expect("the freezer counts it as frozen");
    assert_eq!(found_frozen, Some(found));

    drop(killed);
    until(&None, || vfork(&[parent]));
    freezer.kill(Duration::from_secs(5)).expect("kill");
    drop(perl);
    freezer.remove().expect("remove");
}

/// A file system that stands still, and somebody who writes to it; in a mount namespace of their
/// own.
struct Still {
    writer: Reaped,
    mount: String,
}

impl Still {
    fn thaw(&self) {
        let pid = self.writer.0.id().to_string();
        let mut thaw = Command::new("nsenter");
        // It may have been thawed.
        let _ = thaw
            .args(["-t", &pid, "-m", "fsfreeze", "-u", &self.mount])
            .stderr(Stdio::null())
            .status();
    }
}

impl Drop for Still {
    fn drop(&mut self) {
        self.thaw();
    }
}

#[test]
fn a_task_in_uninterruptible_sleep_is_found_until_it_wakes() {
    let folder = tempfile::tempdir().expect("a folder");
    let mount = folder.path().to_str().expect("a path").to_owned();
    let script = "truncate -s 8M $1.img && mkfs.ext4 -q $1.img && mount -o loop $1.img $1 && \
                  rm $1.img && fsfreeze -f $1 && \
                  exec perl -e 'open(my $file, \">\", shift); sleep 1000' $1/file";
    let mut shell = Command::new("unshare");
    let shell = shell.args(["-m", "sh", "-c", script, "sh", &mount]).spawn();
    let still = Still {
        writer: Reaped(shell.expect("unshare starts")),
        mount,
    };
    let pid = still.writer.0.id().cast_signed();
    let is_writer = || {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm"));
        name.is_ok_and(|name| name == "perl\n")
    };
    until(&true, || is_writer() && uninterruptible(&[pid]).is_some());
    let found = uninterruptible(&[pid]).expect("a sleeper");
    assert_eq!(found.state, State::Uninterruptible);
    assert!(
        found.holder.starts_with(&format!("process {pid} (perl)")),
        "{found}"
    );
    still.thaw();
    until(&None, || uninterruptible(&[pid]));
    assert!(is_writer(), "it has ended");
}

/// A process of which one thread waits in the kernel for a page.
fn waiting() -> Trial {
    let mut trial = Trial::start("runtime::passing::tests::workload");
    let page = 0x2000_0000_0000_u64;
    trial.tell(&format!("map {page:#x} 1 rw"));
    trial.tell(&format!("wait-for-page {page:#x}"));
    let pid = trial.pid();
    until(&true, || uninterruptible(&[pid]).is_some());
    trial
}

/// Of many who read and write files some thread is in such a sleep at every look.
#[test]
fn only_a_sleep_that_lasts_over_all_looks_stands_against_a_freeze() {
    let (one, other) = (waiting(), waiting());
    let mut sleepers = Sleepers::default();
    assert!(sleepers.look(&[one.pid()]).is_some());
    // Always somebody, and never the same.
    assert_eq!(sleepers.look(&[other.pid()]), None);
    assert_eq!(sleepers.look(&[one.pid()]), None);
    let mut sleepers = Sleepers::default();
    assert!(sleepers.look(&[other.pid(), one.pid()]).is_some());
    for _ in 0..3 {
        let found = sleepers.look(&[one.pid()]).expect("it sleeps on");
        assert_eq!(found.state, State::Uninterruptible);
        assert!(
            found.holder.contains(&format!("process {}", one.pid())),
            "{found}"
        );
    }
}
