//! What a site sends: rounds while the workload runs, and the final one while it stands still.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Instant;

use bytes::Bytes;
use pageferry_proto::id::{Round, SpaceId};
use pageferry_proto::migration::policy::RoundReport;
use pageferry_proto::migration::source::{FinalReport, RetryReport, SourceEvent};
use pageferry_proto::page::PageCount;
use pageferry_proto::set::PageSet;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::parcel::ParcelHeader;
use pageferry_proto::wire::stream::{ImageFileHeader, ImageName, SetHeader, StreamKind, seal};
use tokio::task::block_in_place;

use super::dump::Dump;
use super::failure::{criu_failed, failed_to_track, freeze_failed, lost};
use super::sent::Sent;
use super::site::{Lookout, Site};
use super::verify;
use crate::migration::text::{chain, internal};
use crate::net::stream::{DataSender, SendStreamError};
use crate::pages::read::ReadError;
use crate::pages::send::{ParcelSink, RoundSent, SendError};
use crate::pages::track::tree::Tree;
use crate::pages::track::{FinalScan, LATE_BIRTH_BYTES_MAX, TrackError};
use crate::sys::task::has_ended;

/// Bytes of an image file given to the network at once.
const IMAGE_PIECE: usize = 256 << 10; // 256 KiB

/// Parcels on one connection are data streams of it.
struct Parcels<'a>(&'a DataSender, &'a Sent);

impl ParcelSink for Parcels<'_> {
    type Error = SendStreamError;

    async fn send(&self, parcel: Bytes) -> Result<(), SendStreamError> {
        let wire_bytes = parcel.len() as u64;
        let raw_bytes =
            ParcelHeader::decode(&parcel).map_or(0, |(header, _)| header.pages().bytes());
        self.0.send_stream(StreamKind::Parcel, parcel).await?;
        self.1.add(raw_bytes, wire_bytes);
        Ok(())
    }
}

/// The sums of what was sent in one round, over all spaces.
#[derive(Debug, Default)]
struct Sums {
    parcels: u64,
    pages: u64,
    raw_bytes: u64,
    wire_bytes: u64,
}

impl Sums {
    fn add(&mut self, sent: &RoundSent) {
        self.parcels += sent.parcels;
        self.pages += sent.pages.0;
        self.raw_bytes += sent.raw_bytes;
        self.wire_bytes += sent.wire_bytes;
    }
}

impl Site {
    /// Sends what is pending and finds what became dirty meanwhile.
    pub async fn round(&mut self, round: Round) -> Result<RoundReport, Failure> {
        let began = Instant::now();
        let last_scan = self.scanned;
        let pending = std::mem::take(&mut self.pending);
        let sums = self.send_pages(&pending, round).await?;
        block_in_place(|| {
            self.attach_new()?;
            self.scan()
        })?;
        self.tend_dump().await?;
        let dirtied = self
            .pending
            .values()
            .map(|pages| pages.len().0)
            .sum::<u64>();
        tracing::debug!(%round, pages = sums.pages, dirtied, wire_bytes = sums.wire_bytes,
            took = ?began.elapsed(), since_scan = ?last_scan.elapsed(), "round sent");
        Ok(RoundReport {
            round,
            parcels: u32::try_from(sums.parcels).map_err(|error| internal(&error))?,
            pages_sent: PageCount(sums.pages),
            pages_dirtied_estimate: PageCount(dirtied),
            raw_bytes: sums.raw_bytes,
            wire_bytes: sums.wire_bytes,
            duration: began.elapsed(),
            eager_bytes: self.eager_bytes,
        })
    }

    /// Sends pages of each space; what could not be read is put back as dirty.
    async fn send_pages(
        &mut self,
        wanted: &BTreeMap<SpaceId, PageSet>,
        round: Round,
    ) -> Result<Sums, Failure> {
        let data = self.data()?;
        let mut sums = Sums::default();
        for (id, pages) in wanted {
            let Some(space) = self.spaces.get_mut(id) else {
                continue;
            };
            if pages.is_empty() {
                continue;
            }
            let reader = space.reader();
            let mut cancelled = self.cancelled.clone();
            let sink = Parcels(&data, &self.sent);
            let sent = tokio::select! {
                sent = self.sender.round(*id, &reader, pages, round, &sink) => sent,
                _ = cancelled.wait_for(|cancelled| *cancelled) => Err(SendError::Cut),
            };
            match sent {
                Ok(sent) => {
                    space.put_back(&sent.unread);
                    sums.add(&sent);
                }
                // It has ended, or is about to without its memory; the rest of the tree goes on.
                Err(SendError::Read { sent, source, .. })
                    if matches!(source, ReadError::Gone { .. }) || has_ended(space.pid()) =>
                {
                    sums.add(&sent);
                }
                Err(error) => return Err(send_failed(&error)),
            }
        }
        Ok(sums)
    }

    /// The final round: everything the target still lacks, with the tree frozen.
    pub async fn finish(&mut self, round: Round) -> SourceEvent {
        match self.try_finish(round).await {
            Ok(event) => event,
            Err(failure) => SourceEvent::Failure(failure),
        }
    }

    async fn try_finish(&mut self, round: Round) -> Result<SourceEvent, Failure> {
        let began = Instant::now();
        let looking = Lookout::of(self).begin();
        let mut scans = match block_in_place(|| self.final_scans())? {
            Ok(scans) => scans,
            Err(reason) => {
                return Ok(SourceEvent::Retry(RetryReport {
                    parcels: 0,
                    pages: PageCount::ZERO,
                    reason,
                }));
            }
        };
        looking.end().await?;
        let scanned = began.elapsed();
        let mut dump = self.take_dump()?;
        self.show(&mut dump, &scans)?;
        let in_criu = Instant::now();
        let dumping = async {
            let dumped = dump.run().await;
            (dumped, in_criu.elapsed())
        };
        let ((dumped, frozen_in_criu), sent) = if self.policy.verify {
            (dumping.await, None)
        } else {
            let (dumped, sent) = tokio::join!(dumping, self.send_final(&scans, round));
            (dumped, Some(sent))
        };
        self.return_dump(dump);
        dumped.map_err(|error| criu_failed(&error))?;
        self.frozen_in_criu = Some(frozen_in_criu);
        // CRIU has thawed the cgroup and holds the tasks by ptrace alone: from here on they stay
        // frozen whoever dies.
        block_in_place(|| self.freezer.freeze()).map_err(|error| freeze_failed(&error))?;
        // A CRIU that was killed before that has let them run after their dump.
        self.dump()?.holds().map_err(|error| criu_failed(&error))?;
        let frozen_again = began.elapsed();
        let hashing = self
            .policy
            .verify
            .then(|| verify::begin(&self.spaces, &scans, self.node.workers));
        self.begin_comparing();
        if hashing.is_some() {
            self.scan_again(&mut scans)?;
        }
        let (data, images) = (self.data()?, self.dump()?.images().to_owned());
        let digests = verify::send(hashing, &data, self.cancelled.clone());
        let last = async {
            match sent {
                Some(sent) => sent,
                None => self.send_final(&scans, round).await,
            }
        };
        let (digests, mut sums, (images, image_bytes)) =
            tokio::try_join!(digests, last, send_images(&data, &images))?;
        sums.wire_bytes += image_bytes;
        self.image_bytes = image_bytes;
        tracing::info!(%round, pages = sums.pages, wire_bytes = sums.wire_bytes, ?scanned,
            ?frozen_in_criu, ?frozen_again, images_sent = ?began.elapsed(), image_bytes,
            "final round sent");
        Ok(SourceEvent::Finished(FinalReport {
            parcels: u32::try_from(sums.parcels).map_err(|error| internal(&error))?,
            pages: PageCount(sums.pages),
            live_sets: u32::try_from(scans.len()).map_err(|error| internal(&error))?,
            images,
            digests,
            raw_bytes: sums.raw_bytes,
            wire_bytes: sums.wire_bytes,
        }))
    }

    /// Shows CRIU what it may see of the spaces.
    fn show(&self, dump: &mut Dump, scans: &BTreeMap<SpaceId, FinalScan>) -> Result<(), Failure> {
        for (id, scan) in scans {
            let Some(space) = self.spaces.get(id) else {
                continue;
            };
            let feed = dump.feed();
            feed.set_ranges(space.pid(), &scan.hidden)
                .and_then(|()| feed.set_guards(space.pid(), &scan.guards))
                .map_err(|error| internal(&error))?;
            feed.set_smaps(space.pid(), &scan.smaps);
        }
        dump.feed().publish().map_err(|error| internal(&error))
    }

    /// Scans every tracked space; the inner error is a reason for another round.
    fn final_scans(&mut self) -> Result<Result<BTreeMap<SpaceId, FinalScan>, String>, Failure> {
        let tree =
            Tree::read(self.root).map_err(|error| Failure::new(error.code(), chain(&error)))?;
        for found in &tree.spaces {
            let tracked = self
                .spaces
                .get(&found.id)
                .is_some_and(|s| s.pid() == found.leader);
            let bytes = resident_bytes(found.leader);
            // CRIU copies a small one by itself; see design: late births.
            if !tracked && bytes > LATE_BIRTH_BYTES_MAX {
                return Ok(Err(format!(
                    "process {} with {bytes} bytes was born after the last round",
                    found.leader
                )));
            }
        }
        self.spaces.retain(|id, space| {
            tree.spaces
                .iter()
                .any(|found| found.id == *id && found.leader == space.pid())
        });
        let mut scans = BTreeMap::new();
        let mut replaced = Vec::new();
        for (id, space) in &mut self.spaces {
            match space.final_scan() {
                Ok(scan) => {
                    scans.insert(*id, scan);
                }
                Err(error @ TrackError::LateBirth { .. }) => return Ok(Err(chain(&error))),
                // It is a zombie by now, or about to be one.
                Err(error) if error.tells_of_end() && space.pid() != self.root => {
                    replaced.push(*id);
                }
                Err(error @ TrackError::Exec { .. }) => {
                    if resident_bytes(space.pid()) > LATE_BIRTH_BYTES_MAX {
                        return Ok(Err(chain(&error)));
                    }
                    replaced.push(*id);
                }
                Err(error) => return Err(failed_to_track(&error)),
            }
        }
        for id in replaced {
            self.spaces.remove(&id);
        }
        Ok(Ok(scans))
    }

    /// Finds what the dump itself has made dirty: while CRIU's parasite runs in a thread, the
    /// kernel writes the number of its processor into the thread's rseq area, and does so again
    /// wherever the thread is restored. Nothing would be lost without these pages, but digests
    /// would differ.
    fn scan_again(&mut self, scans: &mut BTreeMap<SpaceId, FinalScan>) -> Result<(), Failure> {
        for (id, scan) in scans {
            let Some(space) = self.spaces.get_mut(id) else {
                continue;
            };
            let again = block_in_place(|| space.final_scan()).map_err(|e| failed_to_track(&e))?;
            scan.dirty = again.dirty;
        }
        Ok(())
    }

    async fn send_final(
        &mut self,
        scans: &BTreeMap<SpaceId, FinalScan>,
        round: Round,
    ) -> Result<Sums, Failure> {
        let data = self.data()?;
        let dirty = scans
            .iter()
            .map(|(id, scan)| (*id, scan.dirty.clone()))
            .collect();
        let mut sums = self.send_pages(&dirty, round).await?;
        for (id, scan) in scans {
            let set = scan.live.to_wire();
            let length = u32::try_from(set.len()).map_err(|error| internal(&error))?;
            let mut body = SetHeader { space: *id, length }.encode().to_vec();
            body.extend(set);
            seal(&mut body);
            sums.wire_bytes += body.len() as u64;
            let sent = data.send_stream(StreamKind::LiveSet, body.into()).await;
            sent.map_err(|error| lost(&error))?;
        }
        Ok(sums)
    }

    fn data(&self) -> Result<DataSender, Failure> {
        self.data.clone().ok_or_else(|| {
            Failure::new(ErrorCode::PeerLost, "there is no connection to the target")
        })
    }
}

/// Sends every image file of a folder; answers with how many and how many bytes.
async fn send_images(data: &DataSender, folder: &Path) -> Result<(u32, u64), Failure> {
    let unreadable = |path: &Path, error: std::io::Error| {
        Failure::new(
            ErrorCode::CriuFailed,
            format!("image {}: {error}", path.display()),
        )
    };
    let (mut files, mut bytes) = (0, 0);
    // Most are small, and each stream costs a round trip: small ones go together.
    let mut together = Vec::new();
    let entries = fs::read_dir(folder).map_err(|error| unreadable(folder, error))?;
    for entry in entries {
        let path = entry.map_err(|error| unreadable(folder, error))?.path();
        if !path.is_file() {
            continue;
        }
        let content = fs::read(&path).map_err(|error| unreadable(&path, error))?;
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        let name = ImageName::new(name).map_err(|error| internal(&error))?;
        let header = ImageFileHeader::new(name, content.len() as u64);
        let mut body = header.map_err(|error| internal(&error))?.encode();
        body.extend(&content);
        seal(&mut body);
        bytes += body.len() as u64;
        files += 1;
        if IMAGE_PIECE < body.len() {
            let sent = send_pieces(data, body.into()).await;
            sent.map_err(|error| lost(&error))?;
            continue;
        }
        together.extend(body);
        if IMAGE_PIECE < together.len() {
            let sent = send_pieces(data, std::mem::take(&mut together).into()).await;
            sent.map_err(|error| lost(&error))?;
        }
    }
    if !together.is_empty() {
        let sent = send_pieces(data, together.into()).await;
        sent.map_err(|error| lost(&error))?;
    }
    Ok((files, bytes))
}

async fn send_pieces(data: &DataSender, mut body: Bytes) -> Result<(), SendStreamError> {
    if body.len() <= IMAGE_PIECE {
        return data.send_stream(StreamKind::ImageFile, body).await;
    }
    let mut writer = data.open(StreamKind::ImageFile).await?;
    while !body.is_empty() {
        let piece = body.split_to(IMAGE_PIECE.min(body.len()));
        writer.write(piece).await?;
    }
    writer.finish();
    Ok(())
}

fn resident_bytes(pid: i32) -> u64 {
    let pages = fs::read_to_string(format!("/proc/{pid}/statm"))
        .ok()
        .and_then(|text| {
            text.split(' ')
                .nth(1)
                .and_then(|word| word.parse::<u64>().ok())
        });
    PageCount(pages.unwrap_or(0)).bytes()
}

fn send_failed(error: &SendError<SendStreamError>) -> Failure {
    let code = match error {
        SendError::Read { .. } => ErrorCode::WorkloadGone,
        SendError::Send { .. } => ErrorCode::PeerLost,
        SendError::Cut => ErrorCode::Aborted,
    };
    Failure::new(code, chain(error))
}
