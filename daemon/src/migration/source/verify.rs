//! What the target compares its pages with: digests of everything that is alive, read anew while
//! the workload stands still. Nothing that was known before counts: a page that tracking lost would
//! not be in it.

use std::collections::BTreeMap;
use std::time::Instant;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use pageferry_pages::digest::{DigestError, Digests, Hashing, PIECE_PAGES};
use pageferry_pages::send::SENDS_MAX;
use pageferry_pages::track::{FinalScan, Space};
use pageferry_proto::id::{Generation, SpaceId};
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::stream::{DIGESTS_PAGES_MAX, SetHeader, StreamKind, seal};

use super::failure::lost;
use super::unread::pages_unread;
use crate::migration::text::{chain, internal};
use crate::net::stream::DataSender;

const _: () = assert!(PIECE_PAGES.0 <= DIGESTS_PAGES_MAX);

/// Begins to hash every live page.
pub(super) fn begin(
    spaces: &BTreeMap<SpaceId, Space>,
    scans: &BTreeMap<SpaceId, FinalScan>,
    threads: usize,
) -> Hashing {
    let live = scans.iter().filter_map(|(id, scan)| {
        let reader = spaces.get(id)?.reader();
        Some((*id, reader, scan.live.clone()))
    });
    Hashing::begin(live, threads)
}

/// Sends digests while others are made; answers with how many streams it took.
pub(super) async fn send(
    mut hashing: Hashing,
    data: &DataSender,
    generation: Generation,
) -> Result<u32, Failure> {
    let began = Instant::now();
    let mut streams = 0;
    let mut sends = FuturesUnordered::new();
    let mut over = false;
    while !over || !sends.is_empty() {
        tokio::select! {
            Some(sent) = sends.next(), if !sends.is_empty() => {
                let sent: Result<(), _> = sent;
                sent.map_err(|error| lost(&error))?;
            }
            made = hashing.next(), if !over && sends.len() < SENDS_MAX => match made {
                Some(made) => {
                    let body = stream_of(generation, &made.map_err(|error| failed(&error))?)?;
                    sends.push(data.send_stream(StreamKind::Digests, body));
                    streams += 1;
                }
                None => over = true,
            },
        }
    }
    tracing::info!(streams, took = ?began.elapsed(), "digests of every live page sent");
    Ok(streams)
}

fn stream_of(generation: Generation, made: &Digests) -> Result<Bytes, Failure> {
    let space = made.space;
    if !made.unread.is_empty() {
        return Err(pages_unread(made.pid, &made.unread));
    }
    let set = made.pages.to_wire();
    let length = u32::try_from(set.len()).map_err(|error| internal(&error))?;
    let header = SetHeader {
        generation,
        space,
        length,
    };
    let mut body = header.encode().to_vec();
    body.extend(set);
    body.extend(made.digests.iter().flat_map(|digest| digest.to_le_bytes()));
    seal(&mut body);
    Ok(body.into())
}

fn failed(error: &DigestError) -> Failure {
    let code = match error {
        DigestError::Read { source, .. } => source.code(),
        DigestError::Cut => ErrorCode::Aborted,
    };
    Failure::new(code, chain(error))
}
