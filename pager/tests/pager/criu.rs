//! A stand-in for CRIU: it speaks its RPC and its lazy-pages protocol, in the order in which CRIU
//! does, and "restores" workloads of [`crate::workload`].

use std::io::{BufRead, BufReader, Read, Write};
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};

use criu_glue::rpc::message::{
    CriuNotify, CriuRequest, CriuResponse, CriuRestoreResponse, RequestType,
};
use pageferry_sys::fdpass;
use prost::Message;
use serde::{Deserialize, Serialize};

use crate::sys;
use crate::workload::Setup;

/// What the stand-in is to do; passed as JSON.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Script {
    pub workloads: Vec<Setup>,
    /// The test's socket: connected to before "finished" is said, which is said when a line comes.
    pub finish: Option<String>,
    /// It looks whether its loopback is shut while it restores, and open as soon as it is answered.
    pub probes_loopback: bool,
    /// It fails here.
    pub fail: Fail,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fail {
    Never,
    /// Before anything is restored.
    Early,
    /// It ends without a word while the tree is held, leaving the tasks behind.
    Held,
    /// It says no after it was let go.
    Late,
    /// It never gets ready.
    Hang,
    /// It is stopped before it is ready, and hears nothing.
    Stop,
}

struct Criu {
    socket: OwnedFd,
    workloads: Vec<(Child, UnixStream)>,
}

const FINISHED: u32 = 0x5253_5446;

/// The life of the stand-in.
pub fn run(script: &Script, socket: i32) {
    let socket = sys::inherited(socket);
    let mut criu = Criu {
        socket,
        workloads: Vec::new(),
    };
    let request = CriuRequest::decode(&criu.receive()[..]).unwrap();
    assert_eq!(request.kind, RequestType::Restore as i32);
    let opts = request.opts.unwrap();
    assert_eq!(opts.lazy_pages, Some(true));
    let parent = std::os::unix::process::parent_id();
    let work_dir = format!("/proc/{parent}/fd/{}", opts.work_dir_fd.unwrap());
    std::env::set_current_dir(work_dir).unwrap();
    let mut lazy = UnixStream::connect("lazy-pages.socket").unwrap();
    if !criu.notify("pre-restore", None) || script.fail == Fail::Early {
        return criu.respond(false);
    }
    for setup in &script.workloads {
        criu.start(setup, &lazy);
    }
    for (_, gate) in &mut criu.workloads {
        let ready = gate.read(&mut [0]).unwrap();
        assert_eq!(ready, 1, "a workload ended before it was ready");
    }
    if script.fail == Fail::Stop {
        nix::sys::signal::raise(nix::sys::signal::Signal::SIGSTOP).unwrap();
    }
    if script.fail == Fail::Hang {
        let _ = criu.receive();
        return criu.kill();
    }
    let root = criu
        .workloads
        .first()
        .map(|(child, _)| i32::try_from(child.id()).unwrap());
    if script.fail == Fail::Held {
        criu.tell("post-restore", root);
        // Whoever waits for a word from here gets none.
        std::process::exit(1);
    }
    assert!(!(script.probes_loopback && passes_loopback()));
    if !criu.notify("post-restore", root) {
        criu.kill();
        return criu.respond(false);
    }
    assert!(!script.probes_loopback || passes_loopback());
    if script.fail == Fail::Late {
        criu.kill();
        return criu.respond(false);
    }
    if let Some(path) = &script.finish {
        criu.open_gates();
        let mut test = UnixStream::connect(path).unwrap();
        writeln!(test, "criu").unwrap();
        BufReader::new(test).read_line(&mut String::new()).unwrap();
    }
    lazy.write_all(&FINISHED.to_ne_bytes()).unwrap();
    drop(lazy);
    criu.notify("pre-resume", None);
    criu.open_gates();
    criu.notify("post-resume", None);
    criu.respond(true);
}

/// Whether a datagram over loopback arrives: it is there at once, or never.
pub fn passes_loopback() -> bool {
    let made = || UdpSocket::bind("127.0.0.1:0").unwrap();
    let (from, to) = (made(), made());
    to.set_nonblocking(true).unwrap();
    // That it is dropped may be an error here, or not.
    let _ = from.send_to(b"x", to.local_addr().unwrap());
    to.recv(&mut [0]).is_ok()
}

impl Criu {
    fn start(&mut self, setup: &Setup, lazy: &UnixStream) {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let theirs = OwnedFd::from(theirs);
        sys::keep_on_exec(&theirs).unwrap();
        let setup = Setup {
            gate: theirs.as_raw_fd(),
            ..setup.clone()
        };
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "play_a_role", "--nocapture", "--quiet"])
            .env(
                "PAGER_TEST_WORKLOAD",
                serde_json::to_string(&setup).unwrap(),
            )
            .env_remove("PAGER_TEST_CRIU")
            .stdin(Stdio::from(OwnedFd::from(lazy.try_clone().unwrap())))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // So that the end of a workload is heard.
        drop(theirs);
        // Process id and descriptor are two messages: CRIU's tasks take turns by a lock.
        let sent = ours.read(&mut [0]).unwrap();
        assert_eq!(sent, 1, "a workload ended before it sent its userfaultfd");
        self.workloads.push((child, ours));
    }

    fn open_gates(&mut self) {
        for (_, gate) in &mut self.workloads {
            // One that was opened before has nobody behind it.
            let _ = gate.write_all(b"g");
        }
    }

    fn kill(&mut self) {
        for (child, _) in &mut self.workloads {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    fn notify(&mut self, script: &str, pid: Option<i32>) -> bool {
        self.tell(script, pid);
        let answer = self.receive();
        if answer.is_empty() {
            self.kill();
            std::process::exit(1);
        }
        CriuRequest::decode(&answer[..]).unwrap().notify_success == Some(true)
    }

    fn tell(&mut self, script: &str, pid: Option<i32>) {
        let script = Some(script.to_owned());
        self.send(&CriuResponse {
            kind: RequestType::Notify as i32,
            success: true,
            notify: Some(CriuNotify { script, pid }),
            ..CriuResponse::default()
        });
    }

    fn respond(&mut self, success: bool) {
        let root = self.workloads.first().map(|(child, _)| child.id());
        let pid = i32::try_from(root.unwrap_or_default()).unwrap();
        self.send(&CriuResponse {
            kind: RequestType::Restore as i32,
            success,
            restore: success.then_some(CriuRestoreResponse { pid }),
            ..CriuResponse::default()
        });
    }

    fn send(&self, message: &CriuResponse) {
        fdpass::send(self.socket.as_fd(), &message.encode_to_vec(), &[]).unwrap();
    }

    fn receive(&self) -> Vec<u8> {
        fdpass::receive(self.socket.as_fd(), 1 << 16).unwrap().bytes
    }
}
