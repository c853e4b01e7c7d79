//! Somebody else asks for a dump, and a gate stands between it and CRIU.
//!
//! Three processes play the parts: a *runtime* makes a socket pair, starts what it believes to be
//! `criu swrk FD` and speaks with it; the *stand-in* is what it starts, gives FD to the gate and
//! becomes the real criu on the gate's socket; the gate is the test.

use std::fs::{self, File};
use std::io::{IoSlice, IoSliceMut, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};

use criu_glue::options::{ManageCgroups, NetworkLock, Request};
use criu_glue::rpc::message::{CriuOpts, CriuRequest, CriuResponse, RequestType};
use criu_glue::rpc::{Client, ClientRequest, Conversation, NotifyScript, Patch, Peer, TalkError};
use nix::cmsg_space;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recv,
    recvmsg, send, sendmsg, socketpair,
};
use prost::Message;
use tokio::net::UnixListener;

use crate::cases::{Run, drive};
use crate::node::PROGRAM;
use crate::sys;
use crate::workload::{PATIENCE, Workload, wait_until};

/// A field of a request that no version of CRIU has, and one of its options.
const UNKNOWN: [u8; 7] = [0xc2, 0x3e, 4, b'n', b'e', b'w', b'!'];

/// What a runtime hears before `post-dump`.
const BEFORE: [&str; 2] = ["pre-dump", "query-ext-files"];

// The runtime.

/// Asks for a dump of process `pid` into `folder/images`, and writes what it hears to
/// `folder/heard`. It wants notifications if `told` is not empty, and says no to the one of this
/// name.
pub fn be_runtime(gate: &Path, pid: i32, folder: &Path, told: &str, no_to: &str) -> ExitCode {
    let flags = SockFlag::SOCK_CLOEXEC;
    let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags);
    let (ours, theirs) = pair.expect("sockets");
    sys::keep_on_exec(&theirs);
    let mut criu = Command::new(PROGRAM)
        .arg("--stand-in")
        .arg(gate)
        .args(["swrk", &theirs.as_raw_fd().to_string()])
        .spawn()
        .expect("this program");
    drop(theirs);
    let open = |name: &str| OwnedFd::from(File::open(folder.join(name)).expect("a directory"));
    let (images, work) = (open("images"), open("work"));
    let request = CriuRequest {
        kind: RequestType::Dump as i32,
        opts: Some(CriuOpts {
            images_dir_fd: images.as_raw_fd(),
            work_dir_fd: Some(work.as_raw_fd()),
            pid: Some(pid),
            notify_scripts: Some(!told.is_empty()),
            log_level: Some(4),
            log_file: Some("dump.log".to_owned()),
            orphan_pts_master: Some(true),
            ..CriuOpts::default()
        }),
        ..CriuRequest::default()
    };
    // Packets are the sum of their pieces.
    let mut bytes = request.encode_to_vec();
    bytes.extend([18, 7]);
    bytes.extend(UNKNOWN);
    bytes.extend(UNKNOWN);
    say(&ours, &bytes);
    let mut heard = File::create(folder.join("heard")).expect("a directory");
    loop {
        let response = hear(&ours);
        if response.is_empty() {
            writeln!(heard, "end of file").expect("room");
            break;
        }
        let response = CriuResponse::decode(&response[..]).expect("a response");
        let Some(notify) = response.notify else {
            let (kind, success) = (response.kind, response.success);
            writeln!(heard, "response {kind} {success}").expect("room");
            break;
        };
        let script = notify.script.expect("a name");
        writeln!(heard, "{script}").expect("room");
        say(&ours, &[8, 6, 24, u8::from(script != no_to)]);
    }
    drop(ours);
    criu.wait().expect("our child");
    ExitCode::SUCCESS
}

fn say(socket: &OwnedFd, bytes: &[u8]) {
    send(socket.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL).expect("somebody listens");
}

fn hear(socket: &OwnedFd) -> Vec<u8> {
    let mut bytes = vec![0; 1 << 16];
    let length = recv(socket.as_raw_fd(), &mut bytes, MsgFlags::empty()).unwrap_or(0);
    bytes.truncate(length);
    bytes
}

// The stand-in.

/// Becomes `criu swrk FD` on a socket that the gate gives for it.
pub fn be_stand_in(gate: &Path, fd: RawFd) -> ExitCode {
    let gate = UnixStream::connect(gate).expect("a gate");
    pass(gate.as_fd(), fd);
    let Some(criu) = receive(gate.as_fd()) else {
        // Called off.
        return ExitCode::FAILURE;
    };
    sys::put_at(&criu, fd);
    let error = Command::new("criu").args(["swrk", &fd.to_string()]).exec();
    panic!("criu: {error}");
}

/// Sends a descriptor.
fn pass(socket: impl AsFd, fd: RawFd) {
    let (descriptors, bytes) = ([fd], [IoSlice::new(b"x")]);
    let rights = [ControlMessage::ScmRights(&descriptors)];
    let socket = socket.as_fd().as_raw_fd();
    sendmsg::<()>(socket, &bytes, &rights, MsgFlags::empty(), None).expect("somebody listens");
}

/// Waits for a descriptor; none if the other end is closed.
fn receive(socket: impl AsFd) -> Option<OwnedFd> {
    let mut control = cmsg_space!([RawFd; 1]);
    let mut byte = [0];
    let mut parts = [IoSliceMut::new(&mut byte)];
    let (socket, flags) = (socket.as_fd().as_raw_fd(), MsgFlags::MSG_CMSG_CLOEXEC);
    let message = recvmsg::<()>(socket, &mut parts, Some(&mut control), flags).ok()?;
    let controls = message.cmsgs().expect("room for one");
    let mut descriptors = controls.filter_map(|control| match control {
        ControlMessageOwned::ScmRights(fds) => fds.first().map(|fd| sys::own(*fd)),
        _ => None,
    });
    descriptors.next()
}

// The gate.

/// A runtime that has asked for a dump of `workload`, and whom the gate keeps waiting.
struct Asked {
    workload: Workload,
    folder: PathBuf,
    runtime: Child,
    client: Client,
    request: ClientRequest,
    stand_in: UnixStream,
}

impl Asked {
    async fn by(told: &str, no_to: &str) -> Self {
        let workload = Workload::start(8);
        let folder = tempfile::tempdir_in("/tmp").expect("tmp").keep();
        for name in ["images", "work"] {
            fs::create_dir(folder.join(name)).expect("an empty directory");
        }
        let gate = folder.join("gate");
        let listener = UnixListener::bind(&gate).expect("an empty directory");
        let runtime = Command::new(PROGRAM)
            .arg("--runtime")
            .arg(&gate)
            .arg(workload.pid.to_string())
            .arg(&folder)
            .args([told, no_to])
            .stdin(Stdio::null())
            .spawn()
            .expect("this program");
        let (stand_in, _) = listener.accept().await.expect("somebody connects");
        let stand_in = stand_in.into_std().expect("a socket");
        stand_in.set_nonblocking(false).expect("a socket");
        let socket = receive(&stand_in).expect("the runtime's socket");
        let client = Client::new(socket).expect("it lives");
        assert_eq!(client.peer().pid().cast_unsigned(), runtime.id());
        let request = client.request(PATIENCE).await.expect("it asks");
        assert_eq!(request.kind(), RequestType::Dump as i32);
        Self {
            workload,
            folder,
            runtime,
            client,
            request,
            stand_in,
        }
    }

    /// Lets the request through, with what must be changed. The descriptors are the runtime's.
    async fn pass(mut self) -> Gated {
        let patch = Patch {
            network_lock: Some(NetworkLock::Skip),
            manage_cgroups: Some(ManageCgroups::Ignore),
            ..Patch::default()
        };
        let patched = self.request.patch(patch, self.client.peer());
        patched.expect("its descriptors are open");
        let stand_in = Peer::of(self.stand_in.as_fd()).expect("it lives");
        let (mut conversation, criu) =
            Conversation::between(self.client, stand_in).expect("it lives");
        conversation.pass(self.request).await.expect("room");
        pass(&self.stand_in, criu.as_raw_fd());
        Gated {
            workload: self.workload,
            folder: self.folder,
            runtime: self.runtime,
            conversation,
        }
    }
}

/// The dump that it asked for, under way.
struct Gated {
    workload: Workload,
    folder: PathBuf,
    runtime: Child,
    conversation: Conversation,
}

impl Gated {
    async fn until(&mut self, point: NotifyScript) {
        let came = self.conversation.until(&point, PATIENCE).await;
        came.unwrap_or_else(|error| panic!("{error}, see {}", self.folder.display()));
    }

    /// What the runtime has heard.
    fn heard(&self) -> Vec<String> {
        let heard = fs::read_to_string(self.folder.join("heard")).unwrap_or_default();
        heard.lines().map(str::to_owned).collect()
    }

    /// What it has heard in the end.
    fn heard_all(&mut self) -> Vec<String> {
        let ended = wait_until("end of the runtime", || {
            self.runtime.try_wait().expect("our child")
        });
        assert!(ended.success(), "{ended}");
        self.heard()
    }
}

/// It is held three times, and gets all that it would get without a gate.
pub async fn a_runtimes_dump_goes_through_a_gate() {
    let asked = Asked::by("told", "").await;
    // As long as the gate likes.
    asked.workload.check();
    let mut gated = asked.pass().await;
    gated.until(NotifyScript::PreDump).await;
    assert_eq!(gated.heard(), Vec::<String>::new());
    gated.until(NotifyScript::PostDump).await;
    assert_eq!(gated.heard(), BEFORE);
    assert!(gated.conversation.relay().await.expect("it answers"));
    assert_eq!(gated.heard(), [BEFORE[0], BEFORE[1], "post-dump"]);
    assert!(gated.conversation.is_open());
    fs::metadata(gated.folder.join("images/inventory.img")).expect("it is the runtime's folder");
    // CRIU has not heard yes.
    let held = gated.workload.proc("status");
    assert!(
        String::from_utf8_lossy(&held).contains("State:\tt"),
        "held by its tracer"
    );
    let response = drive(&mut gated.conversation, |_| true).await;
    response.into_result().expect("dumped");
    gated.workload.wait_until_killed();
    gated.conversation.end(PATIENCE).await.expect("criu ends");
    assert_eq!(
        gated.heard_all(),
        [BEFORE[0], BEFORE[1], "post-dump", "response 1 true"]
    );

    let run = Run {
        images: gated.folder.join("images"),
        work: gated.folder.join("work"),
    };
    let mut worker = Conversation::start(run.config()).expect("criu");
    let request = Request::restore(run.restore_options());
    worker.request(request).await.expect("criu listens");
    drive(&mut worker, |_| true)
        .await
        .into_result()
        .expect("restored");
    gated.workload.check();
}

/// The runtime hears no, whoever says it, and the workload runs.
pub async fn a_runtimes_dump_is_taken_back_at_its_gate() {
    // Called off before CRIU was there.
    let mut asked = Asked::by("told", "").await;
    asked
        .client
        .call_off(&asked.request, "not now")
        .await
        .expect("it listens");
    drop(asked.stand_in);
    asked.runtime.wait().expect("our child");
    let heard = fs::read_to_string(asked.folder.join("heard")).expect("it heard");
    assert_eq!(heard, "response 1 false\n");
    asked.workload.check();
    // By the gate, before the runtime is told.
    let mut gated = Asked::by("told", "").await.pass().await;
    gated.until(NotifyScript::PostDump).await;
    gated
        .conversation
        .give_up(PATIENCE, PATIENCE)
        .await
        .expect("it lets go");
    assert_eq!(
        gated.heard_all(),
        [BEFORE[0], BEFORE[1], "response 1 false"]
    );
    gated.workload.check();
    // By the runtime: what the gate would say does not matter.
    let mut gated = Asked::by("told", "post-dump").await.pass().await;
    gated.until(NotifyScript::PostDump).await;
    assert!(!gated.conversation.relay().await.expect("it answers"));
    let response = drive(&mut gated.conversation, |_| true).await;
    response.into_result().expect_err("the runtime said no");
    assert_eq!(
        gated.heard_all(),
        [BEFORE[0], BEFORE[1], "post-dump", "response 1 false"]
    );
    gated.workload.check();
}

/// crun is one: CRIU notifies all the same, and the gate answers.
pub async fn a_runtime_that_wants_no_notifications_hears_of_none() {
    let mut gated = Asked::by("", "").await.pass().await;
    gated.until(NotifyScript::PostDump).await;
    assert!(
        gated
            .conversation
            .relay()
            .await
            .expect("nobody to be asked")
    );
    let response = drive(&mut gated.conversation, |_| true).await;
    response.into_result().expect("dumped");
    gated.workload.wait_until_killed();
    assert_eq!(gated.heard_all(), ["response 1 true"]);
}

/// Before CRIU is there and while it waits.
pub async fn a_gate_hears_that_its_runtime_has_died() {
    let mut asked = Asked::by("told", "").await;
    asked.runtime.kill().expect("our child");
    asked.runtime.wait().expect("our child");
    asked.client.closed().await.expect("it says nothing more");
    asked.workload.check();
    let mut gated = Asked::by("told", "").await.pass().await;
    gated.until(NotifyScript::PostDump).await;
    gated.runtime.kill().expect("our child");
    gated.runtime.wait().expect("our child");
    let gone = gated.conversation.next().await;
    assert!(matches!(gone, Err(TalkError::ClientClosed)), "{gone:?}");
    gated
        .conversation
        .give_up(PATIENCE, PATIENCE)
        .await
        .expect("it lets go");
    gated.workload.check();
}

/// A CRIU that is no child of ours is heard of and killed like one.
pub async fn a_gate_hears_that_criu_has_died() {
    let mut gated = Asked::by("told", "").await.pass().await;
    gated.until(NotifyScript::PostDump).await;
    assert_eq!(gated.conversation.speaker(), Some(gated.conversation.pid()));
    gated.conversation.kill().expect("it lives");
    let ended = gated.conversation.next().await;
    assert!(matches!(ended, Err(TalkError::Closed)), "{ended:?}");
    gated
        .conversation
        .end(PATIENCE)
        .await
        .expect("it has ended");
    gated.conversation.kill().expect("it has ended");
    assert_eq!(
        gated.heard_all(),
        [BEFORE[0], BEFORE[1], "response 1 false"]
    );
    gated.workload.check();
}
