//! What is sent to the target: pages in rounds and, of a workload that stands still, the last ones
//! and the sets of those that are alive.
//!
//! Invariants: a page that was not sent is dirty again, or told; no live set is sent before every
//! page of it has been.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use pageferry_pages::read::Misses;
use pageferry_pages::send::{ParcelSink, RoundSent, SendError, Sender};
use pageferry_proto::id::{Generation, Round, SpaceId};
use pageferry_proto::migration::source::{RetryReport, SourceEvent, Wait};
use pageferry_proto::page::PageCount;
use pageferry_proto::set::PageSet;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::parcel::ParcelHeader;
use pageferry_proto::wire::stream::{SetHeader, StreamKind, seal};

use super::failure::lost;
use super::sent::Sent;
use super::tracking::{Scans, Tracking};
use super::unread::{Unsent, Verdict};
use super::waits::Waits;
use crate::migration::text::{chain, internal};
use crate::net::stream::{DataSender, SendStreamError};

/// Sends over the connection of the present session.
#[derive(Debug)]
pub(super) struct Sending {
    sender: Sender,
    /// What the round under way has sent.
    sent: Arc<Sent>,
    /// Opens data streams, while there is a session.
    data: Option<DataSender>,
}

/// Which final round of which freeze.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attempt {
    pub(super) generation: Generation,
    pub(super) round: Round,
}

/// Parcels on one connection are data streams of it.
struct Parcels<'a>(&'a DataSender, &'a Sent);

/// The same of parcels that were asked for.
pub(super) struct Fetched<'a>(pub(super) &'a DataSender, pub(super) &'a Sent);

impl ParcelSink for Parcels<'_> {
    type Error = SendStreamError;

    async fn send(&self, parcel: Bytes) -> Result<(), SendStreamError> {
        send_parcel((self.0, self.1), StreamKind::Parcel, parcel).await
    }
}

impl ParcelSink for Fetched<'_> {
    type Error = SendStreamError;

    async fn send(&self, parcel: Bytes) -> Result<(), SendStreamError> {
        send_parcel((self.0, self.1), StreamKind::Fetched, parcel).await
    }
}

async fn send_parcel(
    (data, sent): (&DataSender, &Sent),
    kind: StreamKind,
    parcel: Bytes,
) -> Result<(), SendStreamError> {
    let wire_bytes = parcel.len() as u64;
    let raw_bytes = ParcelHeader::decode(&parcel).map_or(0, |(header, _)| header.pages().bytes());
    data.send_stream(kind, parcel).await?;
    sent.add(raw_bytes, wire_bytes);
    Ok(())
}

/// The sums of what was sent in one round, over all spaces.
#[derive(Debug, Default)]
pub(super) struct Sums {
    pub(super) parcels: u64,
    pub(super) pages: u64,
    pub(super) raw_bytes: u64,
    pub(super) wire_bytes: u64,
    /// Streams that name pages which are not sent, and how many pages.
    pub(super) absent_sets: u64,
    pub(super) absent_pages: u64,
}

impl Sums {
    fn add(&mut self, sent: &RoundSent) {
        self.parcels += sent.parcels;
        self.pages += sent.pages.0;
        self.raw_bytes += sent.raw_bytes;
        self.wire_bytes += sent.wire_bytes;
    }

    /// Adds those of another tree.
    pub(super) fn merge(&mut self, other: &Self) {
        self.parcels += other.parcels;
        self.pages += other.pages;
        self.raw_bytes += other.raw_bytes;
        self.wire_bytes += other.wire_bytes;
        self.absent_sets += other.absent_sets;
        self.absent_pages += other.absent_pages;
    }

    /// The freeze is given up, with so much of the final round on its way.
    pub(super) fn given_up(
        &self,
        reason: Failure,
        pause: Duration,
    ) -> Result<SourceEvent, Failure> {
        Ok(SourceEvent::Retry(RetryReport {
            parcels: u32::try_from(self.parcels).map_err(|error| internal(&error))?,
            pages: PageCount(self.pages),
            raw_bytes: self.raw_bytes,
            wire_bytes: self.wire_bytes,
            pause,
            reason,
        }))
    }
}

impl Sending {
    /// Reads and encodes on `workers` threads.
    pub(super) fn new(workers: usize) -> Self {
        Self {
            sender: Sender::new(workers),
            sent: Arc::default(),
            data: None,
        }
    }

    /// Counts what is sent.
    pub(super) fn sent(&self) -> Arc<Sent> {
        Arc::clone(&self.sent)
    }

    /// Uses this connection from now on, or none.
    pub(super) fn connect(&mut self, data: Option<DataSender>) {
        self.data = data;
    }

    /// The connection.
    pub(super) fn data(&self) -> Result<DataSender, Failure> {
        self.data.clone().ok_or_else(|| {
            Failure::new(ErrorCode::PeerLost, "there is no connection to the target")
        })
    }

    /// Sends pages of each space; what could not be read is put back as dirty, and told.
    pub(super) async fn pages(
        &self,
        tracking: &mut Tracking,
        wanted: &BTreeMap<SpaceId, PageSet>,
        (round, misses): (Round, Misses),
        waits: &Waits,
    ) -> Result<(Sums, Unsent), Failure> {
        let data = self.data()?;
        let mut sums = Sums::default();
        let mut unsent = Unsent::default();
        for (id, pages) in wanted {
            let Some((pid, reader)) = tracking.reader(*id) else {
                continue;
            };
            if pages.is_empty() {
                continue;
            }
            let sink = Parcels(&data, &self.sent);
            let read = (&reader, misses);
            let sending = self.sender.round(*id, read, pages, round, &sink);
            match waits.on(Wait::Pages, sending).await? {
                Ok(sent) => {
                    tracking.sent(*id, pages, &sent.unread);
                    sums.add(&sent);
                    if !sent.unread.is_empty() {
                        unsent.unread.insert(*id, (pid, sent.unread));
                    }
                }
                // It has ended, all of it; the rest of the tree goes on.
                Err(SendError::Read { sent, .. }) if reader.has_ended() => {
                    sums.add(&sent);
                    unsent.ended.push(pid);
                }
                Err(error) => return Err(send_failed(&error)),
            }
        }
        Ok((sums, unsent))
    }

    /// Sends what is dirty, and live sets if that is all there was to send.
    pub(super) async fn last(
        &self,
        tracking: &mut Tracking,
        scans: &Scans,
        attempt: Attempt,
        waits: &Waits,
    ) -> Result<(Sums, Unsent), Failure> {
        let data = self.data()?;
        let dirty = tracking.dirty(scans);
        let how = (attempt.round, Misses::Settle);
        let (mut sums, mut unsent) = self.pages(tracking, &dirty, how, waits).await?;
        unsent.keep(scans);
        if !unsent.is_empty() {
            return Ok((sums, unsent));
        }
        for (id, scan) in scans {
            tracking.delivered.check(*id, &scan.live)?;
            let set = (StreamKind::LiveSet, *id, &scan.live);
            sums.wire_bytes += send_set(&data, attempt.generation, set, waits).await?;
        }
        Ok((sums, unsent))
    }

    /// Instead of [`Sending::last`]: sends no page, but says which of those that are alive the
    /// target does not have as they are now.
    pub(super) async fn absent(
        &self,
        tracking: &mut Tracking,
        scans: &Scans,
        attempt: Attempt,
        waits: &Waits,
    ) -> Result<Sums, Failure> {
        let data = self.data()?;
        // What is written is not what was sent.
        drop(tracking.dirty(scans));
        let mut sums = Sums::default();
        for (id, scan) in scans {
            let live = (StreamKind::LiveSet, *id, &scan.live);
            sums.wire_bytes += send_set(&data, attempt.generation, live, waits).await?;
            let absent = tracking.delivered.lacks(*id, &scan.live);
            if absent.is_empty() {
                continue;
            }
            let set = (StreamKind::AbsentSet, *id, &absent);
            sums.wire_bytes += send_set(&data, attempt.generation, set, waits).await?;
            sums.absent_sets += 1;
            sums.absent_pages += absent.len().0;
        }
        Ok(sums)
    }

    /// As [`Sending::last`], of what is verified. A page that cannot be read has no digest either,
    /// so that nothing is tried again.
    pub(super) async fn last_verified(
        &self,
        tracking: &mut Tracking,
        (scans, root): (&Scans, i32),
        attempt: Attempt,
        waits: &Waits,
    ) -> Result<Sums, Failure> {
        let (sums, unsent) = self.last(tracking, scans, attempt, waits).await?;
        match tracking.unread.judge(&unsent, root) {
            None => Ok(sums),
            Some(Verdict::Again(failure) | Verdict::Never(failure)) => Err(failure),
        }
    }
}

/// Sends a set of pages; how many bytes that were.
async fn send_set(
    data: &DataSender,
    generation: Generation,
    (kind, space, pages): (StreamKind, SpaceId, &PageSet),
    waits: &Waits,
) -> Result<u64, Failure> {
    let set = pages.to_wire();
    let length = u32::try_from(set.len()).map_err(|error| internal(&error))?;
    let header = SetHeader {
        generation,
        space,
        length,
    };
    let mut body = header.encode().to_vec();
    body.extend(set);
    seal(&mut body);
    let bytes = body.len() as u64;
    let sending = data.send_stream(kind, body.into());
    let sent = waits.on(Wait::LiveSets, sending).await?;
    sent.map_err(|error| lost(&error))?;
    Ok(bytes)
}

fn send_failed(error: &SendError<SendStreamError>) -> Failure {
    let code = match error {
        SendError::Read { source, .. } => source.code(),
        SendError::Send { .. } => ErrorCode::PeerLost,
        SendError::Cut => ErrorCode::Aborted,
    };
    Failure::new(code, chain(error))
}

#[cfg(test)]
#[path = "sending_tests.rs"]
mod tests;
