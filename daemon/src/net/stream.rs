//! Data streams: one thing each (a parcel, a set, a file), in one direction, then over.
//!
//! A stream is a prefix that says what it is and whom it is for, and bytes that mean nothing
//! here. Its end is the end of the thing; a sender that cannot finish resets the stream, so that
//! half a thing never looks like a whole one.
//!
//! Invariants: a reader never returns more bytes than its kind may have, and never waits longer
//! than [`STALL_TIME_MAX`] for the next one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use pageferry_proto::id::MigrationId;
use pageferry_proto::set;
use pageferry_proto::wire::code::ErrorCode;
use pageferry_proto::wire::copied::FILES_BYTES_MAX;
use pageferry_proto::wire::parcel::PARCEL_BYTES_MAX;
use pageferry_proto::wire::parked::PARKED_BYTES_MAX;
use pageferry_proto::wire::stream::{
    CHECKSUM_BYTES, DIGESTS_BYTES_MAX, IMAGE_BYTES_MAX, ImageFileHeader, SetHeader, StreamError,
    StreamKind, StreamPrefix,
};
use quinn::{ConnectionError, ReadError, ReadExactError, RecvStream, SendStream, WriteError};
use tokio::time::timeout;

use super::endpoint::close_code;

/// A stream that a source opened, read up to its prefix.
#[derive(Debug)]
pub struct DataStream {
    /// What it holds.
    pub kind: StreamKind,
    /// Whom it is for.
    pub migration: MigrationId,
    /// The rest of it.
    pub reader: StreamReader,
}

/// The receiving end of a data stream, after its prefix. Dropped before the end, it tells the
/// sender to stop.
#[derive(Debug)]
pub struct StreamReader {
    inner: RecvStream,
    /// Received and not yet handed out, last one first.
    ready: Vec<Bytes>,
    /// Bytes that may still come.
    left: u64,
    limit: u64,
    ended: bool,
}

/// Opens data streams on whichever lane has the least to do. Cheap to clone; clones share the
/// lanes.
#[derive(Clone, Debug)]
pub struct DataSender {
    lanes: Arc<[Outlet]>,
    /// A lane of which nothing else is sent, if there is one.
    urgent: Option<Arc<[Outlet]>>,
    migration: MigrationId,
}

/// The sending end of a data stream. Dropped unfinished, it resets the stream.
#[derive(Debug)]
pub struct StreamWriter {
    inner: SendStream,
    finished: bool,
}

/// Why a data stream could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadStreamError {
    /// The connection or the stream broke, or the sender gave up.
    #[error("cannot read data stream")]
    Read(#[source] ReadError),
    /// The stream ended where more had to come.
    #[error("data stream ended {0} bytes early")]
    Early(usize),
    /// The sender went quiet.
    #[error("data stream stalled for {STALL_TIME_MAX:?}")]
    Stalled,
    /// The prefix is not one.
    #[error("data stream has a wrong prefix")]
    Prefix(#[source] StreamError),
    /// The stream is for another migration than its lane.
    #[error("data stream is for migration {0}, its lane is not")]
    Migration(MigrationId),
    /// More bytes than its kind may have.
    #[error("data stream is longer than {0} bytes")]
    TooLong(u64),
}

/// Why a data stream could not be sent.
#[derive(Debug, thiserror::Error)]
pub enum SendStreamError {
    /// The lane broke.
    #[error("cannot open data stream")]
    Open(#[source] ConnectionError),
    /// The lane broke, or the receiver gave up on this stream.
    #[error("cannot write data stream")]
    Write(#[source] WriteError),
}

impl DataStream {
    /// Reads the prefix of a stream that belongs on a lane of `migration`.
    pub(super) async fn open(
        mut inner: RecvStream,
        migration: MigrationId,
    ) -> Result<Self, ReadStreamError> {
        let mut prefix = [0; StreamPrefix::BYTES];
        timeout(STALL_TIME_MAX, inner.read_exact(&mut prefix))
            .await
            .map_err(|_| ReadStreamError::Stalled)?
            .map_err(|error| match error {
                ReadExactError::FinishedEarly(read) => {
                    ReadStreamError::Early(StreamPrefix::BYTES - read)
                }
                ReadExactError::ReadError(error) => ReadStreamError::Read(error),
            })?;
        let prefix = StreamPrefix::decode(&prefix).map_err(ReadStreamError::Prefix)?;
        if prefix.migration != migration {
            return Err(ReadStreamError::Migration(prefix.migration));
        }
        let limit = bytes_max(prefix.kind);
        Ok(Self {
            kind: prefix.kind,
            migration,
            reader: StreamReader {
                inner,
                ready: Vec::new(),
                left: limit,
                limit,
                ended: false,
            },
        })
    }
}

impl StreamReader {
    /// The next bytes in order, as many as there are at once; `None` at the end. Cancelling
    /// loses nothing.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, ReadStreamError> {
        if let Some(chunk) = self.ready.pop() {
            return Ok(Some(chunk));
        }
        if self.ended {
            return Ok(None);
        }
        // One packet is one chunk, and every read takes the connection's lock: read many.
        let mut chunks = [const { Bytes::new() }; CHUNKS_PER_READ];
        let read = timeout(STALL_TIME_MAX, self.inner.read_chunks(&mut chunks))
            .await
            .map_err(|_| ReadStreamError::Stalled)?
            .map_err(ReadStreamError::Read)?;
        let Some(count) = read else {
            self.ended = true;
            return Ok(None);
        };
        let received: u64 = chunks.iter().map(|chunk| chunk.len() as u64).sum();
        self.left = self
            .left
            .checked_sub(received)
            .ok_or(ReadStreamError::TooLong(self.limit))?;
        self.ready.extend(chunks.into_iter().take(count).rev());
        Ok(self.ready.pop())
    }

    /// As [`StreamReader::chunk`], but not more than `most` bytes.
    pub async fn chunk_of(&mut self, most: usize) -> Result<Option<Bytes>, ReadStreamError> {
        let Some(mut chunk) = self.chunk().await? else {
            return Ok(None);
        };
        if most < chunk.len() {
            self.ready.push(chunk.split_off(most));
        }
        Ok(Some(chunk))
    }

    /// Whether nothing is left. Waits for the next byte or the end.
    pub async fn is_over(&mut self) -> Result<bool, ReadStreamError> {
        let Some(chunk) = self.chunk().await? else {
            return Ok(true);
        };
        self.ready.push(chunk);
        Ok(false)
    }

    /// Fills the buffer; the stream ending before that is an error. Cancelling loses bytes.
    pub async fn read_exact(&mut self, mut buffer: &mut [u8]) -> Result<(), ReadStreamError> {
        while !buffer.is_empty() {
            let Some(taken) = self.chunk_of(buffer.len()).await? else {
                return Err(ReadStreamError::Early(buffer.len()));
            };
            let (filled, rest) = buffer.split_at_mut(taken.len());
            filled.copy_from_slice(&taken);
            buffer = rest;
        }
        Ok(())
    }

    /// Appends all that is left to the buffer, at most the limit of its kind.
    pub async fn read_to_end(&mut self, buffer: &mut Vec<u8>) -> Result<(), ReadStreamError> {
        while let Some(chunk) = self.chunk().await? {
            buffer.extend_from_slice(&chunk);
        }
        Ok(())
    }

    /// Tells the sender to stop, and why.
    pub fn refuse(mut self, code: ErrorCode) {
        self.stop(code);
    }

    fn stop(&mut self, code: ErrorCode) {
        if !self.ended {
            self.ended = true;
            // An error says that it is over already.
            let _ = self.inner.stop(close_code(code));
        }
    }
}

impl Drop for StreamReader {
    fn drop(&mut self) {
        self.stop(ErrorCode::Aborted);
    }
}

impl DataSender {
    pub(super) fn new(
        connections: &[quinn::Connection],
        urgent: Option<&quinn::Connection>,
        migration: MigrationId,
    ) -> Self {
        let outlet = |connection: &quinn::Connection| Outlet {
            connection: connection.clone(),
            queued: AtomicU64::new(0),
        };
        Self {
            lanes: connections.iter().map(outlet).collect(),
            urgent: urgent.map(|connection| Arc::from([outlet(connection)])),
            migration,
        }
    }

    /// For what does not wait behind anything else: on a lane of its own, if there is one.
    #[must_use]
    pub fn urgent(&self) -> Self {
        let lanes = self.urgent.as_ref().unwrap_or(&self.lanes);
        Self {
            lanes: Arc::clone(lanes),
            ..self.clone()
        }
    }

    /// Sends one whole stream. Returns when the lanes have taken all of it, which is when there
    /// is room for it; that it arrived, only the peer can say.
    ///
    /// Several may be sent at once, and must be to fill a link that is long: a lane takes up to
    /// [`super::tuning::DATA_STREAMS`].
    pub async fn send_stream(&self, kind: StreamKind, body: Bytes) -> Result<(), SendStreamError> {
        let outlet = self.least_loaded();
        let length = body.len() as u64;
        outlet.queued.fetch_add(length, Ordering::Relaxed);
        let _queued = Queued {
            bytes: &outlet.queued,
            length,
        };
        let mut stream = outlet.open(kind, self.migration).await?;
        stream.write(body).await?;
        stream.finish();
        Ok(())
    }

    /// Opens a stream for something that is not in memory as a whole.
    pub async fn open(&self, kind: StreamKind) -> Result<StreamWriter, SendStreamError> {
        self.least_loaded().open(kind, self.migration).await
    }

    fn least_loaded(&self) -> &Outlet {
        self.lanes
            .iter()
            .min_by_key(|outlet| outlet.queued.load(Ordering::Relaxed))
            .expect("a session has at least one lane")
    }
}

/// One lane, as its data streams see it.
#[derive(Debug)]
struct Outlet {
    connection: quinn::Connection,
    /// Bytes of bodies that callers are about to write.
    queued: AtomicU64,
}

impl Outlet {
    async fn open(
        &self,
        kind: StreamKind,
        migration: MigrationId,
    ) -> Result<StreamWriter, SendStreamError> {
        let inner = self
            .connection
            .open_uni()
            .await
            .map_err(SendStreamError::Open)?;
        let mut writer = StreamWriter {
            inner,
            finished: false,
        };
        let prefix = StreamPrefix { kind, migration }.encode();
        writer.write(Bytes::copy_from_slice(&prefix)).await?;
        Ok(writer)
    }
}

/// Takes a body off its lane's count when it is sent, or when sending it is cancelled.
struct Queued<'a> {
    bytes: &'a AtomicU64,
    length: u64,
}

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        self.bytes.fetch_sub(self.length, Ordering::Relaxed);
    }
}

impl StreamWriter {
    /// Writes all of it, without copying. Cancelling leaves an unknown part written.
    pub async fn write(&mut self, bytes: Bytes) -> Result<(), SendStreamError> {
        self.inner
            .write_chunk(bytes)
            .await
            .map_err(SendStreamError::Write)
    }

    /// Ends the stream: what was written is all there is.
    pub fn finish(mut self) {
        self.finished = true;
        // An error says that the peer stopped the stream; it will say why on another.
        let _ = self.inner.finish();
    }
}

impl Drop for StreamWriter {
    fn drop(&mut self) {
        // Left alone, quinn would finish the stream, and half a thing would look whole.
        if !self.finished {
            let _ = self.inner.reset(close_code(ErrorCode::Aborted));
        }
    }
}

/// Bytes a stream of this kind may have after its prefix.
fn bytes_max(kind: StreamKind) -> u64 {
    match kind {
        StreamKind::Parcel | StreamKind::Fetched => PARCEL_BYTES_MAX as u64,
        StreamKind::LiveSet | StreamKind::AbsentSet => {
            (SetHeader::BYTES + set::WIRE_BYTES_MAX + CHECKSUM_BYTES) as u64
        }
        StreamKind::ImageFile => {
            ImageFileHeader::BYTES_MAX as u64 + IMAGE_BYTES_MAX + CHECKSUM_BYTES as u64
        }
        StreamKind::Digests => DIGESTS_BYTES_MAX as u64,
        StreamKind::Files => FILES_BYTES_MAX,
        StreamKind::Parked => (PARKED_BYTES_MAX + CHECKSUM_BYTES) as u64,
    }
}

/// Longest silence in the middle of a stream. A slow link is shared by all streams of a lane, so
/// each of them still moves many times in this; a peer that lives but does not send is broken.
pub const STALL_TIME_MAX: Duration = Duration::from_secs(30);

/// Chunks taken at once: 64 packets, 90 kB, about what arrives while one batch is copied.
const CHUNKS_PER_READ: usize = 64;
