//! A client: somebody else who asks CRIU for something, on a socket of its own.
//!
//! A container runtime makes a socket pair and starts `criu swrk FD` with one end of it. A gate in
//! CRIU's place hands that end on, and it becomes a [`Client`]; the request is read, held for as
//! long as it takes, changed where it must be, and passed on to a CRIU that knows nothing of the
//! runtime. What this crate does not know in a request stays in it.
//!
//! Descriptors in a request are numbers in the runtime, which CRIU opens through the `/proc` entry
//! of whoever made its socket: that is us, so they are taken over and renamed. Those of
//! `inherit_fd` and `ps` are numbers in the process that becomes CRIU, and stay.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use prost::Message;
use tokio::time::timeout;

use super::TalkError;
use super::message::{CriuDumpResponse, CriuOpts, CriuRequest, CriuResponse, CriuRestoreResponse};
use super::packet::{Channel, Packet, Peer};
use super::wire::{Changes, WireError};
use crate::options::{LogLevel, ManageCgroups, NetworkLock};

/// Who asks.
#[derive(Debug)]
pub struct Client {
    pub(super) channel: Channel,
    peer: Peer,
}

/// What a client asks for, as it came.
#[derive(Debug)]
pub struct ClientRequest {
    packet: Packet,
    /// What we know of it.
    known: CriuRequest,
    /// Descriptors that it names now.
    held: Vec<OwnedFd>,
    /// The client is not to be told of notifications.
    untold: bool,
}

/// What is changed in a client's request. What is `None` stays as the client wants it.
#[derive(Debug, Default)]
pub struct Patch {
    /// Where images are written to or read from.
    pub images: Option<OwnedFd>,
    /// Where logs and `lazy-pages.socket` are.
    pub work: Option<OwnedFd>,
    pub network_lock: Option<NetworkLock>,
    pub manage_cgroups: Option<ManageCgroups>,
    pub freeze_cgroup: Option<String>,
    pub lazy_pages: Option<bool>,
    pub tcp_established: Option<bool>,
    pub file_locks: Option<bool>,
    pub link_remap: Option<bool>,
    /// Of the log.
    pub log_level: Option<LogLevel>,
    /// Largest deleted file that goes along, in bytes.
    pub ghost_limit: Option<u32>,
    /// How long freezing may take, in seconds.
    pub freeze_timeout: Option<u32>,
    /// `--external` strings, besides those of the client.
    pub external: Vec<String>,
    /// The client is told of no notification, whatever it wants.
    pub untold: bool,
}

/// Why a client's request cannot be passed on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PatchError {
    #[error("the client's request has no options")]
    NoOptions,
    #[error("the client's request is no message")]
    Wire(#[from] WireError),
    #[error("cannot take over descriptor {number} of process {pid}, {name} of its request")]
    Descriptor {
        name: &'static str,
        number: RawFd,
        pid: i32,
        #[source]
        source: io::Error,
    },
}

impl Client {
    /// Takes over the socket on which a client speaks, or will, with CRIU. Needs a tokio runtime
    /// with IO.
    ///
    /// # Errors
    /// [`TalkError::Client`] when the client has ended, or is in no pid namespace of ours.
    pub fn new(socket: OwnedFd) -> Result<Self, TalkError> {
        let channel = Channel::new(socket).map_err(TalkError::Client)?;
        let peer = channel.peer().map_err(TalkError::Client)?;
        Ok(Self { channel, peer })
    }

    /// Who it is: the process that made the socket.
    #[must_use]
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Waits for what the client asks for.
    ///
    /// # Errors
    /// [`TalkError::ClientClosed`] when it asks for nothing, [`TalkError::ClientSilent`] when it
    /// says nothing within `limit`.
    pub async fn request(&self, limit: Duration) -> Result<ClientRequest, TalkError> {
        match timeout(limit, self.channel.receive()).await {
            Ok(received) => ClientRequest::from_packet(received.map_err(of_client)?.0),
            Err(_) => Err(TalkError::ClientSilent { limit }),
        }
    }

    /// Waits until the client has closed its end, for whoever holds its request. Has no limit of
    /// its own; cancelling loses nothing.
    ///
    /// # Errors
    /// [`TalkError::OutOfTurn`] when it says something more instead.
    pub async fn closed(&self) -> Result<(), TalkError> {
        match self.channel.receive().await {
            Err(TalkError::Closed) => Ok(()),
            Ok(_) => Err(TalkError::OutOfTurn { who: "the client" }),
            Err(error) => Err(of_client(error)),
        }
    }

    /// Answers `request` with failure, for `why`. CRIU never hears of it.
    ///
    /// # Errors
    /// [`TalkError::ClientClosed`] when nobody hears it.
    pub async fn call_off(self, request: &ClientRequest, why: &str) -> Result<(), TalkError> {
        self.say(&failure(request.kind(), why)).await
    }

    /// Answers `request` with success, though CRIU never hears of it.
    pub(super) async fn pretend(self, request: &ClientRequest) -> Result<(), TalkError> {
        self.say(&success(request.kind())).await
    }

    pub(super) async fn say(&self, packet: &Packet) -> Result<(), TalkError> {
        match timeout(SEND_MAX, self.channel.send(packet)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
                Err(TalkError::ClientClosed)
            }
            Ok(Err(error)) => Err(TalkError::Client(error)),
            Err(_) => Err(TalkError::ClientSilent { limit: SEND_MAX }),
        }
    }
}

impl ClientRequest {
    pub(super) fn from_packet(packet: Packet) -> Result<Self, TalkError> {
        let known = CriuRequest::decode(&packet.bytes[..]).map_err(TalkError::Decode)?;
        Ok(Self {
            packet,
            known,
            held: Vec::new(),
            untold: false,
        })
    }

    /// The number of a [`RequestType`], or one that is not known here.
    #[must_use]
    pub fn kind(&self) -> i32 {
        self.known.kind
    }

    /// What is known of its options, as they came.
    #[must_use]
    pub fn options(&self) -> Option<&CriuOpts> {
        self.known.opts.as_ref()
    }

    /// Whether the client is to be told of notifications.
    pub(super) fn wants_notifications(&self) -> bool {
        let wants = self.options().and_then(|options| options.notify_scripts);
        wants == Some(true) && !self.untold
    }

    /// Makes it one that CRIU can serve when we are in the client's place: descriptors of `client`
    /// are taken over, CRIU notifies, whatever the client wanted, and reads no file of options,
    /// which would count for more than what is asked here. A request without options needs none of
    /// this.
    ///
    /// # Errors
    /// [`PatchError`]; the request is as it was then.
    pub fn patch(&mut self, patch: Patch, client: &Peer) -> Result<(), PatchError> {
        let options = self.known.opts.as_ref().ok_or(PatchError::NoOptions)?;
        let mut held = Vec::new();
        let (mut changes, untold) = (patch.changes(), patch.untold);
        changes.set_number(12, 1);
        changes.set_bytes(51, NO_OPTIONS);
        let named = [
            (
                "images_dir_fd",
                1,
                Some(options.images_dir_fd),
                patch.images,
            ),
            ("work_dir_fd", 17, options.work_dir_fd, patch.work),
            ("status_fd", 49, options.status_fd, None),
            ("pidfd_store_sk", 62, options.pidfd_store_sk, None),
        ];
        for (name, field, number, replaced) in named {
            let failed = |number| {
                let pid = client.pid();
                move |source| PatchError::Descriptor {
                    name,
                    number,
                    pid,
                    source,
                }
            };
            let ours = match (replaced, number) {
                (Some(ours), _) => ours,
                (None, Some(number @ 0..)) => client.descriptor(number).map_err(failed(number))?,
                // Below 0 it is none.
                (None, _) => continue,
            };
            changes.set_number(field, ours.as_raw_fd().into());
            held.push(ours);
        }
        let bytes = changes.applied_within(&self.packet.bytes, 2)?;
        self.packet.bytes = bytes;
        self.untold = untold;
        self.held.extend(held);
        Ok(())
    }

    pub(super) fn into_parts(self) -> (Packet, Vec<OwnedFd>) {
        (self.packet, self.held)
    }
}

impl Patch {
    /// All but descriptors.
    fn changes(&self) -> Changes {
        let mut changes = Changes::default();
        let numbers = [
            (5, self.tcp_established.map(i64::from)),
            (8, self.file_locks.map(i64::from)),
            (9, self.log_level.map(|level| level as i64)),
            (18, self.link_remap.map(i64::from)),
            (34, self.manage_cgroups.map(|mode| mode as i64)),
            (35, self.ghost_limit.map(i64::from)),
            (45, self.freeze_timeout.map(i64::from)),
            (48, self.lazy_pages.map(i64::from)),
            (64, self.network_lock.map(|lock| lock as i64)),
        ];
        for (field, number) in numbers {
            if let Some(number) = number {
                changes.set_number(field, number);
            }
        }
        if let Some(cgroup) = &self.freeze_cgroup {
            changes.set_bytes(44, cgroup.as_bytes());
        }
        for external in &self.external {
            changes.add_bytes(37, external.as_bytes());
        }
        changes
    }
}

/// A file of CRIU's options that has none.
const NO_OPTIONS: &[u8] = b"/dev/null";

/// A response that says no.
pub(super) fn failure(kind: i32, why: &str) -> Packet {
    let response = CriuResponse {
        kind,
        success: false,
        cr_errno: Some(nix::errno::Errno::ECANCELED as i32),
        cr_errmsg: Some(why.to_owned()),
        ..CriuResponse::default()
    };
    response.encode_to_vec().into()
}

/// A response that says that the tree of `root` is there.
pub(super) fn restored(kind: i32, root: i32) -> Packet {
    let response = CriuResponse {
        kind,
        success: true,
        restore: Some(CriuRestoreResponse { pid: root }),
        ..CriuResponse::default()
    };
    response.encode_to_vec().into()
}

/// A response that says yes, to who asks for the dump of another.
fn success(kind: i32) -> Packet {
    let restored = Some(false);
    let response = CriuResponse {
        kind,
        success: true,
        dump: Some(CriuDumpResponse { restored }),
        ..CriuResponse::default()
    };
    response.encode_to_vec().into()
}

/// What is said of the other end, said of the client.
pub(super) fn of_client(error: TalkError) -> TalkError {
    match error {
        TalkError::Closed => TalkError::ClientClosed,
        TalkError::Receive(source) => TalkError::Client(source),
        other => other,
    }
}

/// How long somebody who does not read may keep a packet from being sent. One fits into the socket
/// at any time, unless its reader has let others wait.
pub(super) const SEND_MAX: Duration = Duration::from_secs(10);

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;
