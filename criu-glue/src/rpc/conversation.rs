//! A conversation with CRIU: who asks it for something, what it says meanwhile, and who answers.
//!
//! CRIU serves one chain of requests on a socket: any number of `version` and `feature_check`, then
//! at most one `dump`, `restore` or `check`. While it works it may send notifications and *waits*
//! for each to be answered; holding an answer back is therefore a gate. [`Event::Response`] is the
//! last thing it says. Who asks is either us, and CRIU is a worker of ours
//! ([`Conversation::start`]), or a [`Client`], and CRIU is what the client has started
//! ([`Conversation::between`]): then notifications are handed on to the client, or answered in its
//! place, and it gets the response.
//!
//! ```text
//!   us ──────────── request ──────────►          ┌──► notification: a gate
//!                                        CRIU ───┤
//!   client ── request ── (patched) ───►          └──► response: the end
//!      ▲                                             │
//!      └───── notifications, if it asked for them, and the response
//! ```
//!
//! Invariants: nothing here outlives its usefulness unnoticed. Whatever waits hears of the end of
//! CRIU, and of the client's. Dropping a [`Conversation`] closes our ends: CRIU then fails at its
//! next notification, and a client hears an end of file. Where a dump stood at that moment decides
//! who runs, so a caller that must not lose the tree freezes it by cgroup first.
//!
//! All must see the same pid namespace: CRIU opens `/proc/OUR-PID/fd/N`.

use std::io;
use std::os::fd::OwnedFd;
use std::process::ExitStatus;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use prost::Message;
use tokio::time::timeout;

use super::client::{Client, ClientRequest, SEND_MAX, failure, of_client, restored};
use super::event::{Event, NotifyScript, RequestFailed, Response};
use super::message::RequestType;
use super::packet::{Channel, PACKET_MAX, Packet, Peer, Received};
use super::swrk::{self, Process, StartError, SwrkConfig};
use super::talk::{By, Talk};
use crate::options::Request;

/// A running CRIU, and what is said to it and by it.
#[derive(Debug)]
pub struct Conversation {
    talk: Talk,
    criu: Channel,
    process: Process,
    client: Option<Client>,
    /// Descriptors CRIU opens through our `/proc` entry.
    held: Vec<OwnedFd>,
    /// Who sent CRIU's last packet.
    speaker: Option<i32>,
    /// How long a client may think about a notification.
    client_answer_max: Duration,
}

/// How CRIU ended that was to give up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    ByItself,
    Killed,
}

/// Why a conversation did not go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TalkError {
    #[error("cannot create the socket to criu")]
    Socket(#[source] io::Error),
    #[error("cannot watch the process that is to become criu")]
    Watch(#[source] io::Error),
    #[error("cannot send to criu")]
    Send(#[source] io::Error),
    #[error("cannot receive from criu")]
    Receive(#[source] io::Error),
    #[error("a packet has {length} bytes, more than {PACKET_MAX}")]
    PacketTooLong { length: usize },
    #[error("cannot decode a packet of criu's or its client's")]
    Decode(#[source] prost::DecodeError),
    #[error("criu sent a notification without a name")]
    NamelessNotification,
    #[error("there is no notification to answer")]
    NothingToAnswer,
    #[error("a notification waits for its answer")]
    AnswerOwed,
    #[error("criu works on another request")]
    Busy,
    #[error("{who} spoke out of turn")]
    OutOfTurn { who: &'static str },
    #[error("criu ended the conversation")]
    Closed,
    /// It gave up, or was done, before it came to the point that was waited for.
    #[error("criu was done before it came to {point}")]
    Early {
        point: NotifyScript,
        #[source]
        failed: Option<RequestFailed>,
    },
    #[error("criu did not come to {point} within {limit:?}")]
    Late { point: String, limit: Duration },
    #[error("cannot speak with criu's client")]
    Client(#[source] io::Error),
    /// From now on the conversation is ours alone.
    #[error("criu's client ended the conversation")]
    ClientClosed,
    #[error("criu's client said nothing within {limit:?}")]
    ClientSilent { limit: Duration },
    #[error("cannot wait for criu")]
    Wait(#[source] io::Error),
    #[error("cannot kill criu")]
    Kill(#[source] io::Error),
}

impl Conversation {
    /// Starts a worker of ours. Needs a tokio runtime with IO.
    ///
    /// # Errors
    /// The step that failed; no process is left then.
    pub fn start(config: SwrkConfig) -> Result<Self, StartError> {
        let (ours, theirs) = ends().map_err(StartError::Socket)?;
        let criu = Channel::new(ours).map_err(StartError::Socket)?;
        criu.name_senders().map_err(StartError::Socket)?;
        let process = swrk::start(config, theirs)?;
        Ok(Self::with(criu, process, None))
    }

    /// Stands between `client` and `stand_in`, the process that the client has started as
    /// `criu swrk FD`. The descriptor is CRIU's end: it goes to the stand-in, which puts it where
    /// FD was and becomes the real CRIU by `exec`. What is said before that waits in the socket.
    /// Needs a tokio runtime with IO.
    ///
    /// # Errors
    /// [`TalkError::Socket`], [`TalkError::Watch`].
    pub fn between(client: Client, stand_in: Peer) -> Result<(Self, OwnedFd), TalkError> {
        let (ours, theirs) = ends().map_err(TalkError::Socket)?;
        let criu = Channel::new(ours).map_err(TalkError::Socket)?;
        criu.name_senders().map_err(TalkError::Socket)?;
        let process = Process::theirs(stand_in).map_err(TalkError::Watch)?;
        Ok((Self::with(criu, process, Some(client)), theirs))
    }

    fn with(criu: Channel, process: Process, client: Option<Client>) -> Self {
        Self {
            talk: Talk::default(),
            criu,
            process,
            client,
            held: Vec::new(),
            speaker: None,
            client_answer_max: CLIENT_ANSWER_MAX,
        }
    }

    /// CRIU's process id in our pid namespace.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// The process that sent what was received last from CRIU, in our pid namespace; not CRIU
    /// itself if what was started as `criu` has started another program for it.
    #[must_use]
    pub fn speaker(&self) -> Option<i32> {
        self.speaker
    }

    /// Who asks, if it is not us and has not gone.
    #[must_use]
    pub fn client(&self) -> Option<&Client> {
        self.client.as_ref()
    }

    /// Says when the kernel may kill CRIU for want of memory, from -1000 (never) to 1000. A
    /// tree that is restored inherits it, unless its own was another than 0: `prepare_proc_misc` in
    /// CRIU's `cr-restore.c` passes 0 over.
    ///
    /// # Errors
    /// What the kernel says; less than before needs `CAP_SYS_RESOURCE`.
    pub fn set_oom_score_adj(&self, adjustment: i16) -> io::Result<()> {
        let path = format!("/proc/{}/oom_score_adj", self.pid());
        std::fs::write(path, adjustment.to_string())
    }

    /// How long the client may think about a notification from now on.
    pub fn limit_client(&mut self, limit: Duration) {
        self.client_answer_max = limit;
    }

    /// Asks for something. The descriptors it names stay open until this is dropped.
    ///
    /// # Errors
    /// [`TalkError::Send`] when CRIU is gone, [`TalkError::AnswerOwed`] and [`TalkError::Busy`] out
    /// of order.
    pub async fn request(&mut self, request: Request) -> Result<(), TalkError> {
        let kind = request.message.kind;
        let packet = request.message.encode_to_vec().into();
        self.ask(kind, By::Us, &packet, request.held).await
    }

    /// Passes on what the client asks for.
    ///
    /// # Errors
    /// As [`Conversation::request`].
    pub async fn pass(&mut self, request: ClientRequest) -> Result<(), TalkError> {
        let (kind, told) = (request.kind(), request.wants_notifications());
        let (packet, held) = request.into_parts();
        self.ask(kind, By::Client { told }, &packet, held).await
    }

    /// Answers what the client asks for with failure, for `why`, in the place of a CRIU that was
    /// asked for nothing and is left alone now, of which it ends.
    pub(super) async fn refuse(
        mut self,
        request: &ClientRequest,
        why: &str,
    ) -> Result<(), TalkError> {
        self.criu.hang_up();
        match self.client.take() {
            Some(client) => client.call_off(request, why).await,
            None => Err(TalkError::ClientClosed),
        }
    }

    async fn ask(
        &mut self,
        kind: i32,
        by: By,
        packet: &Packet,
        held: Vec<OwnedFd>,
    ) -> Result<(), TalkError> {
        self.talk.request(kind, by)?;
        self.held.extend(held);
        say(&self.criu, packet).await
    }

    /// Waits for what CRIU says next. It has no limit of its own: who calls it waits for other
    /// things, too. Cancelling loses nothing.
    ///
    /// # Errors
    /// [`TalkError::Closed`] when CRIU ended without a response, [`TalkError::ClientClosed`] when
    /// the client has gone: then this can be called again.
    pub async fn next(&mut self) -> Result<Event, TalkError> {
        loop {
            let Some(client) = &self.client else {
                let received = self.criu.receive().await;
                return self.hear_criu(received);
            };
            tokio::select! {
                biased;
                received = self.criu.receive() => return self.hear_criu(received),
                received = client.channel.receive() => drop(self.hear_client(received)?),
            }
        }
    }

    /// Answers the notification that waits. `false` makes CRIU give up, where it still can; `true`
    /// passes on what the client has said, if it was told.
    ///
    /// # Errors
    /// [`TalkError::NothingToAnswer`] when none waits, [`TalkError::AnswerOwed`] when the client
    /// was told and has not answered, [`TalkError::Send`] when CRIU is gone.
    pub async fn answer(&mut self, success: bool) -> Result<(), TalkError> {
        say(&self.criu, self.talk.answer(success)?.packet()).await?;
        self.talk.answered();
        Ok(())
    }

    /// Tells the client of the notification that waits, if it wants to be told, and waits for its
    /// answer: whether it says yes. CRIU does not hear of it before [`Conversation::answer`].
    /// Cancelling loses nothing.
    ///
    /// # Errors
    /// [`TalkError::ClientClosed`] when it has gone instead, [`TalkError::ClientSilent`] after
    /// [`CLIENT_ANSWER_MAX`] or as [`Conversation::limit_client`] says, [`TalkError::Closed`] when
    /// CRIU has.
    pub async fn relay(&mut self) -> Result<bool, TalkError> {
        if let (Some(client), Some(packet)) = (&self.client, self.talk.untold()) {
            match client.say(packet).await {
                Ok(()) => self.talk.told(),
                Err(error) => return Err(self.client_gone(error)),
            }
        }
        let limit = self.client_answer_max;
        let answered = async {
            while self.talk.client_thinks() {
                let Some(client) = &self.client else { break };
                tokio::select! {
                    biased;
                    received = client.channel.receive() => drop(self.hear_client(received)?),
                    // It waits, so it says nothing but that it has ended.
                    received = self.criu.receive() => drop(self.hear_criu(received)?),
                }
            }
            Ok(())
        };
        let silent = |_| TalkError::ClientSilent { limit };
        timeout(limit, answered).await.map_err(silent)??;
        Ok(self.talk.client_agrees().unwrap_or(true))
    }

    /// Lets CRIU go on, if it waits, and waits for what it says next. The client is told first, if
    /// there is one, and its answer counts. Has no limit of its own, but for the client; cancelling
    /// loses nothing.
    ///
    /// # Errors
    /// As [`Conversation::next`], [`Conversation::relay`] and [`Conversation::answer`].
    pub async fn advance(&mut self) -> Result<Event, TalkError> {
        if self.talk.waiting().is_some() {
            self.relay().await?;
            self.answer(true).await?;
        }
        self.next().await
    }

    /// Lets CRIU go on until it comes to `point`, which is left unanswered, and which no client is
    /// told of. The root task's pid, where CRIU tells it.
    ///
    /// # Errors
    /// [`TalkError::Early`] when it never comes there, [`TalkError::Late`] when it has not within
    /// `limit`; otherwise as [`Conversation::advance`].
    pub async fn until(
        &mut self,
        point: &NotifyScript,
        limit: Duration,
    ) -> Result<Option<i32>, TalkError> {
        let reached = async {
            loop {
                match self.advance().await? {
                    Event::Notify { script, pid } if script == *point => return Ok(pid),
                    Event::Notify { .. } => {}
                    Event::Response(response) => {
                        let point = point.clone();
                        let failed = response.into_result().err();
                        return Err(TalkError::Early { point, failed });
                    }
                }
            }
        };
        let late = |_| TalkError::Late {
            point: point.to_string(),
            limit,
        };
        timeout(limit, reached).await.map_err(late)?
    }

    /// Lets CRIU go on until it responds; the client hears the response. At each notification `at`
    /// says whether it shall; what it says of the one that waits already has been said.
    ///
    /// # Errors
    /// [`TalkError::Late`] when it has not responded within `limit`; otherwise as
    /// [`Conversation::advance`].
    pub async fn conclude(
        &mut self,
        limit: Duration,
        mut at: impl FnMut(&NotifyScript) -> bool,
    ) -> Result<Response, TalkError> {
        let concluded = async {
            loop {
                match self.advance().await? {
                    Event::Notify { script, .. } if at(&script) => {}
                    Event::Notify { .. } => self.answer(false).await?,
                    Event::Response(response) => return Ok(response),
                }
            }
        };
        let late = |_| TalkError::Late {
            point: "its response".to_owned(),
            limit,
        };
        let response = timeout(limit, concluded).await.map_err(late)??;
        self.reply().await?;
        Ok(response)
    }

    /// Gives the client CRIU's response, or one that says that CRIU gave none. Once; nothing is
    /// said if nobody else has asked.
    ///
    /// # Errors
    /// [`TalkError::ClientClosed`] when nobody hears it.
    pub async fn reply(&mut self) -> Result<(), TalkError> {
        let Some((kind, response)) = self.talk.take_response() else {
            return Ok(());
        };
        let response = response.unwrap_or_else(|| failure(kind, "criu ended without a word"));
        match &self.client {
            Some(client) => client.say(&response).await,
            None => Ok(()),
        }
    }

    /// Gives the client a response that says yes, whatever CRIU has said: the tree of `root` was
    /// let go, and a client that heard no would end it. Once, and only if somebody else has asked.
    ///
    /// # Errors
    /// [`TalkError::ClientClosed`] when nobody hears it.
    pub async fn vouch(&mut self, root: i32) -> Result<(), TalkError> {
        match (self.talk.take_response(), &self.client) {
            (Some((kind, _)), Some(client)) => client.say(&restored(kind, root)).await,
            _ => Ok(()),
        }
    }

    /// Whether the other end is open: CRIU lives, or its tracer does and has let go of nothing yet.
    /// While a notification waits, nothing else comes from there. A client that has not been heard
    /// to end must be there, too.
    #[must_use]
    pub fn is_open(&self) -> bool {
        let is_there = |client: &Client| client.channel.is_open();
        self.criu.is_open() && self.client.as_ref().is_none_or(is_there)
    }

    /// Has CRIU give up: no is said to the notification that waits, or else CRIU finds nobody at
    /// its next one. If it has not ended within `patience` it is killed. Waits until it has ended,
    /// and so has who puts back what it leaves ([`Conversation::end`]). A client hears that it
    /// failed.
    ///
    /// # Errors
    /// [`TalkError::Late`] when it has not ended `limit` after it was killed.
    pub async fn give_up(
        &mut self,
        patience: Duration,
        limit: Duration,
    ) -> Result<Ending, TalkError> {
        if self.answer(false).await.is_err() {
            self.criu.hang_up();
        }
        let mut ended = self
            .finish(false, patience)
            .await
            .map(|()| Ending::ByItself);
        if ended.is_err() {
            self.kill()?;
            ended = self.finish(false, limit).await.map(|()| Ending::Killed);
        }
        // A client that has gone as well is no worry of CRIU's.
        drop(self.reply().await);
        ended
    }

    /// Lets CRIU do the rest, whatever it is, and waits until it has ended. Of a dump its tracer
    /// must have ended, too. The client hears the response.
    ///
    /// # Errors
    /// [`TalkError::Late`] when it has not ended within `limit`.
    pub async fn end(&mut self, limit: Duration) -> Result<(), TalkError> {
        let ended = self.finish(true, limit).await;
        drop(self.reply().await);
        ended
    }

    async fn finish(&mut self, go: bool, limit: Duration) -> Result<(), TalkError> {
        let ended = async {
            self.drain(go).await;
            self.wait().await.map(drop)
        };
        let late = |_| TalkError::Late {
            point: "its end".to_owned(),
            limit,
        };
        timeout(limit, ended).await.map_err(late)?
    }

    /// Answers what CRIU still says, until nobody speaks for it any more. Unless it is to go on,
    /// the points at which it asks whether to are answered with no.
    async fn drain(&mut self, go: bool) {
        // Its tracer closes last. A restored task may have the other end open for as long as it
        // lives.
        let until_closed = self.talk.is_about(RequestType::Dump);
        while until_closed || self.talk.is_under_way() {
            let heard = if go {
                self.advance().await
            } else {
                self.next().await
            };
            match heard {
                Ok(Event::Notify { script, .. }) if !go => {
                    if self.answer(!script.asks()).await.is_err() {
                        // We have hung up, which CRIU takes for a no.
                        self.talk.answered();
                    }
                }
                Ok(_) => {}
                // Of what is left unsaid or misunderstood nothing depends any more.
                Err(
                    TalkError::ClientClosed
                    | TalkError::ClientSilent { .. }
                    | TalkError::Decode(_)
                    | TalkError::NamelessNotification
                    | TalkError::OutOfTurn { .. },
                ) => {}
                Err(_) => return,
            }
        }
    }

    /// Waits for CRIU's end; how it ended, if it is a child of ours. Has no limit of its own.
    ///
    /// # Errors
    /// [`TalkError::Wait`] if the kernel does not tell.
    pub async fn wait(&mut self) -> Result<Option<ExitStatus>, TalkError> {
        self.process.wait().await.map_err(TalkError::Wait)
    }

    /// Kills CRIU. Tasks it holds by ptrace go on, unless a freezer cgroup holds them.
    ///
    /// # Errors
    /// [`TalkError::Kill`]; a CRIU that has ended already is no error.
    pub fn kill(&mut self) -> Result<(), TalkError> {
        self.talk.criu_gone();
        self.process.kill().map_err(TalkError::Kill)
    }

    /// Takes in what CRIU says.
    fn hear_criu(&mut self, received: Result<Received, TalkError>) -> Result<Event, TalkError> {
        if let Err(TalkError::Closed) = &received {
            self.talk.criu_gone();
        }
        let (packet, speaker) = received?;
        self.speaker = speaker;
        self.talk.heard(packet)
    }

    /// Takes in what the client says while CRIU works or waits.
    fn hear_client(&mut self, received: Result<Received, TalkError>) -> Result<bool, TalkError> {
        match received.map_err(of_client) {
            Ok((packet, _)) => self.talk.client_said(packet),
            Err(error) => Err(self.client_gone(error)),
        }
    }

    /// Why a client cannot be spoken to any more, after which there is none.
    fn client_gone(&mut self, error: TalkError) -> TalkError {
        if !matches!(error, TalkError::ClientSilent { .. }) {
            self.client = None;
            self.talk.client_gone();
        }
        error
    }
}

/// Both ends of a conversation.
fn ends() -> io::Result<(OwnedFd, OwnedFd)> {
    let (family, kind) = (AddressFamily::Unix, SockType::SeqPacket);
    Ok(socketpair(family, kind, None, SockFlag::SOCK_CLOEXEC)?)
}

async fn say(criu: &Channel, packet: &Packet) -> Result<(), TalkError> {
    match timeout(SEND_MAX, criu.send(packet)).await {
        Ok(sent) => sent.map_err(TalkError::Send),
        Err(_) => Err(TalkError::Send(io::ErrorKind::TimedOut.into())),
    }
}

/// How long a client may think about a notification. It takes milliseconds; the hooks of a
/// container, which a runtime runs then, may take longer.
pub const CLIENT_ANSWER_MAX: Duration = Duration::from_secs(60);

#[cfg(test)]
#[path = "conversation_tests.rs"]
mod tests;
