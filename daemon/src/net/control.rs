//! The control stream: framed, typed messages, in order, in both directions.
//!
//! Invariants: what comes out of a receiver is a legal message of the peer's role; a frame never
//! takes more than [`FRAME_TIME_MAX`] from its first byte to its last, nor more memory than
//! one message may have. Sending and receiving may both be cancelled at any await: a frame that
//! was half written is written to its end before the next one.

use std::marker::PhantomData;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use pageferry_proto::wire::code::ErrorCode;
use pageferry_proto::wire::control::{ControlError, Message, SourceMessage, TargetMessage};
use pageferry_proto::wire::frame::{self, FrameError};
use quinn::{ReadError, RecvStream, SendStream, StoppedError, WriteError};
use tokio::time::{Instant, timeout, timeout_at};

use super::endpoint::closed_by_peer;

/// Sends the messages of one role.
#[derive(Debug)]
pub struct ControlSender<M> {
    inner: SendStream,
    /// Frames, or the rest of one, that the stream has not taken yet.
    unsent: BytesMut,
    role: PhantomData<fn(M)>,
}

/// Receives the messages of one role.
#[derive(Debug)]
pub struct ControlReceiver<M> {
    inner: RecvStream,
    /// Bytes that are not yet a whole frame.
    partial: BytesMut,
    /// When the frame that has begun must be whole.
    deadline: Option<Instant>,
    role: PhantomData<fn() -> M>,
}

/// Messages of one role. Implemented by the protocol's two message types and nothing else.
pub trait Role: Into<Message> + Sized {
    /// The message, if it is one of this role.
    fn of(message: Message) -> Option<Self>;
}

/// Why a message could not be sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The message is too large for a frame.
    #[error("message cannot be encoded")]
    Encode(#[source] ControlError),
    /// The lane broke.
    #[error("cannot write to the control stream")]
    Write(#[source] WriteError),
    /// The peer takes nothing any more.
    #[error("peer took no control message for {SEND_TIME_MAX:?}")]
    Stalled,
}

/// Why there is no next message.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The lane broke.
    #[error("cannot read the control stream")]
    Read(#[source] ReadError),
    /// The peer ended the stream in the middle of a frame.
    #[error("control stream ended in the middle of a message")]
    Early,
    /// A frame began and did not end.
    #[error("control message did not arrive within {FRAME_TIME_MAX:?} of its first byte")]
    Stalled,
    /// A frame of no bytes, or too many.
    #[error("control message has a wrong length")]
    Frame(#[source] FrameError),
    /// Not a message.
    #[error("control message is malformed")]
    Decode(#[source] ControlError),
    /// A message that this peer may not send.
    #[error("control message is not one of the peer's role")]
    Role,
}

impl ReceiveError {
    /// The reason of the peer's program, if it has closed the connection.
    pub fn closed_by_peer(&self) -> Option<ErrorCode> {
        match self {
            Self::Read(ReadError::ConnectionLost(error)) => closed_by_peer(error),
            Self::Read(_)
            | Self::Early
            | Self::Stalled
            | Self::Frame(_)
            | Self::Decode(_)
            | Self::Role => None,
        }
    }
}

impl Role for SourceMessage {
    fn of(message: Message) -> Option<Self> {
        match message {
            Message::Source(message) => Some(message),
            Message::Target(_) | Message::Hello(_) | Message::Welcome(_) => None,
        }
    }
}

impl Role for TargetMessage {
    fn of(message: Message) -> Option<Self> {
        match message {
            Message::Target(message) => Some(message),
            Message::Source(_) | Message::Hello(_) | Message::Welcome(_) => None,
        }
    }
}

/// Both ends of a control stream, still speaking any message: how a lane is greeted.
pub(super) type Greeting = (ControlSender<Message>, ControlReceiver<Message>);

impl Role for Message {
    fn of(message: Message) -> Option<Self> {
        Some(message)
    }
}

/// The two ends of a stream, ahead of all data on its lane.
pub(super) fn greeting(sender: SendStream, receiver: RecvStream) -> Greeting {
    // An error says that the stream is gone, which the first write will say too.
    let _ = sender.set_priority(CONTROL_PRIORITY);
    let sender = ControlSender {
        inner: sender,
        unsent: BytesMut::new(),
        role: PhantomData,
    };
    let receiver = ControlReceiver {
        inner: receiver,
        partial: BytesMut::new(),
        deadline: None,
        role: PhantomData,
    };
    (sender, receiver)
}

impl ControlSender<Message> {
    /// The same stream, for the messages of one role.
    pub(super) fn into_role<M: Role>(self) -> ControlSender<M> {
        ControlSender {
            inner: self.inner,
            unsent: self.unsent,
            role: PhantomData,
        }
    }
}

impl ControlReceiver<Message> {
    /// The same stream, for the messages of one role.
    pub(super) fn into_role<M: Role>(self) -> ControlReceiver<M> {
        ControlReceiver {
            inner: self.inner,
            partial: self.partial,
            deadline: self.deadline,
            role: PhantomData,
        }
    }
}

impl<M: Role> ControlSender<M> {
    /// Sends one message. Returns when the stream has taken it; that it was understood, only an
    /// answer can say. If cancelled, the message is sent before the next one.
    pub async fn send(&mut self, message: M) -> Result<(), SendError> {
        let frame = message.into().encode().map_err(SendError::Encode)?;
        self.unsent.extend_from_slice(&frame);
        timeout(SEND_TIME_MAX, self.flush())
            .await
            .map_err(|_| SendError::Stalled)?
    }

    /// Ends the stream, and waits until the peer's machine has received all of it, so that the
    /// lanes can be closed without taking the last words back. Waits at most a few seconds.
    pub async fn finish(mut self) -> Result<(), FinishError> {
        let delivered = async {
            self.flush().await.map_err(FinishError::Send)?;
            // An error says that the peer stopped the stream, and so does the next line.
            let _ = self.inner.finish();
            self.inner.stopped().await.map_err(FinishError::Lost)
        };
        match timeout(FINISH_TIME_MAX, delivered).await {
            Ok(Ok(None)) => Ok(()),
            // The peer stopped reading: it knows all it wants to.
            Ok(Ok(Some(_))) => Ok(()),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(FinishError::Stalled),
        }
    }

    async fn flush(&mut self) -> Result<(), SendError> {
        while self.unsent.has_remaining() {
            // Cancelled, this has written nothing.
            let written = self.inner.write(&self.unsent).await;
            self.unsent.advance(written.map_err(SendError::Write)?);
        }
        Ok(())
    }
}

/// Why the last messages may not have arrived.
#[derive(Debug, thiserror::Error)]
pub enum FinishError {
    /// They could not be sent.
    #[error("cannot send the last control message")]
    Send(#[source] SendError),
    /// The lane broke before they were acknowledged.
    #[error("lane broke before the last control message was acknowledged")]
    Lost(#[source] StoppedError),
    /// No acknowledgement in time.
    #[error("last control message was not acknowledged within {FINISH_TIME_MAX:?}")]
    Stalled,
}

impl<M: Role> ControlReceiver<M> {
    /// The next message; `None` when the peer has ended the stream between two messages. May
    /// wait for as long as the peer is alive and silent. Cancelling loses nothing.
    pub async fn next(&mut self) -> Result<Option<M>, ReceiveError> {
        loop {
            if let Some(message) = self.take_frame()? {
                return M::of(message).map(Some).ok_or(ReceiveError::Role);
            }
            let chunk = self.inner.read_chunk(frame::MESSAGE_BYTES_MAX, true);
            let read = match self.deadline {
                None => chunk.await,
                Some(deadline) => timeout_at(deadline, chunk)
                    .await
                    .map_err(|_| ReceiveError::Stalled)?,
            };
            match read.map_err(ReceiveError::Read)? {
                Some(chunk) => self.partial.extend_from_slice(&chunk.bytes),
                None if self.partial.is_empty() => return Ok(None),
                None => return Err(ReceiveError::Early),
            }
        }
    }

    /// The first frame of what has been received, if it is whole.
    fn take_frame(&mut self) -> Result<Option<Message>, ReceiveError> {
        let Some(header) = self.partial.first_chunk::<{ frame::HEADER_BYTES }>() else {
            if !self.partial.is_empty() {
                self.deadline.get_or_insert(Instant::now() + FRAME_TIME_MAX);
            }
            return Ok(None);
        };
        let length = frame::length(*header).map_err(ReceiveError::Frame)?;
        if self.partial.len() < frame::HEADER_BYTES + length {
            self.deadline.get_or_insert(Instant::now() + FRAME_TIME_MAX);
            return Ok(None);
        }
        self.deadline = None;
        self.partial.advance(frame::HEADER_BYTES);
        let body = self.partial.split_to(length);
        Message::decode(&body)
            .map(Some)
            .map_err(ReceiveError::Decode)
    }
}

/// Above every data stream, whose priority is 0. It orders what this node has not sent yet; what
/// is on the link already goes first.
const CONTROL_PRIORITY: i32 = 1;

/// Longest a message may wait for room: the peer reads control before anything else.
const SEND_TIME_MAX: Duration = Duration::from_secs(10);

/// Longest from a frame's first byte to its last: 1 MiB at 1 Mbit/s.
const FRAME_TIME_MAX: Duration = Duration::from_secs(10);

/// Longest wait for the acknowledgement of last words. Whoever waits is about to close, and a
/// peer that does not hear them learns it by asking.
const FINISH_TIME_MAX: Duration = Duration::from_secs(3);
