//! What a site sends: rounds while the workload runs, and the final one while it stands still.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use bytes::Bytes;
use pageferry_pages::digest::Hashing;
use pageferry_pages::read::Misses;
use pageferry_pages::send::{ParcelSink, RoundSent, SendError};
use pageferry_pages::track::tree::Tree;
use pageferry_pages::track::{FinalScan, LATE_BIRTH_BYTES_MAX, TrackError};
use pageferry_proto::id::{Generation, Round, SpaceId};
use pageferry_proto::migration::policy::RoundReport;
use pageferry_proto::migration::source::{FinalReport, RetryReport, SourceEvent, Wait};
use pageferry_proto::page::PageCount;
use pageferry_proto::set::PageSet;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::parcel::ParcelHeader;
use pageferry_proto::wire::stream::{SetHeader, StreamKind, seal};
use tokio::task::block_in_place;

use super::dump::{Dump, DumpError};
use super::failure::{criu_failed, failed_to_track, lost};
use super::images;
use super::sent::Sent;
use super::site::{Lookout, Site};
use super::storage;
use super::unread::{Unsent, Verdict};
use super::verify;
use crate::migration::text::{chain, internal};
use crate::net::stream::{DataSender, SendStreamError};
use crate::runtime::passing::Passing;
use crate::runtime::shared::sync::Syncing;

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
pub(super) struct Sums {
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

/// Why a frozen tree is not dumped, but copied for another round.
#[derive(Debug)]
enum Unfit {
    /// Memory was born that no round has seen.
    LateBirth(String),
    /// CRIU would not come to an end.
    Passing(Passing),
}

/// What was sent besides pages.
#[derive(Debug)]
struct Rest {
    digests: u32,
    images: u32,
    image_bytes: u64,
}

impl Site {
    /// Sends what is pending and finds what became dirty meanwhile.
    pub async fn round(&mut self, round: Round) -> Result<RoundReport, Failure> {
        let began = Instant::now();
        // A freeze that was given up has left nothing pending, and has met what no round has seen.
        if self.pending.is_empty() {
            block_in_place(|| {
                self.attach_new()?;
                self.scan()
            })?;
        }
        let last_scan = self.scanned;
        let pending = std::mem::take(&mut self.pending);
        let syncing = self.kept.sync_beside(&self.pids()?);
        // What was not sent is dirty again, or gone.
        let (sums, _) = self.send_pages(&pending, round, Misses::GiveUp).await?;
        let sent = began.elapsed();
        self.sync_ended(syncing).await?;
        let waited = began.elapsed().saturating_sub(sent);
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
            // Without the wait for storage, which says nothing of the link.
            duration: began.elapsed().saturating_sub(waited),
            eager_bytes: self.eager_bytes,
        })
    }

    /// Sends pages of each space; what could not be read is put back as dirty, and told.
    async fn send_pages(
        &mut self,
        wanted: &BTreeMap<SpaceId, PageSet>,
        round: Round,
        misses: Misses,
    ) -> Result<(Sums, Unsent), Failure> {
        let data = self.data()?;
        let mut sums = Sums::default();
        let mut unsent = Unsent::default();
        for (id, pages) in wanted {
            let Some(space) = self.spaces.get_mut(id) else {
                continue;
            };
            if pages.is_empty() {
                continue;
            }
            let reader = space.reader();
            let sink = Parcels(&data, &self.sent);
            let read = (&reader, misses);
            let sending = self.sender.round(*id, read, pages, round, &sink);
            match self.waits.on(Wait::Pages, sending).await? {
                Ok(sent) => {
                    self.delivered.sent(*id, pages, &sent.unread);
                    space.put_back(&sent.unread);
                    sums.add(&sent);
                    if !sent.unread.is_empty() {
                        unsent.unread.insert(*id, (space.pid(), sent.unread));
                    }
                }
                // It has ended, all of it; the rest of the tree goes on.
                Err(SendError::Read { sent, .. }) if reader.has_ended() => {
                    sums.add(&sent);
                    unsent.ended.push(space.pid());
                }
                Err(error) => return Err(send_failed(&error)),
            }
        }
        Ok((sums, unsent))
    }

    /// The final round: everything the target still lacks, with the tree frozen.
    pub async fn finish(&mut self, generation: Generation, round: Round) -> SourceEvent {
        match self.try_finish(generation, round).await {
            Ok(event) => event,
            Err(failure) => SourceEvent::Failure(failure),
        }
    }

    async fn try_finish(
        &mut self,
        generation: Generation,
        round: Round,
    ) -> Result<SourceEvent, Failure> {
        let began = Instant::now();
        let looking = Lookout::of(self).begin();
        let mut scans = match block_in_place(|| self.final_scans())? {
            Ok(scans) => scans,
            Err(unfit) => return self.unfit(unfit),
        };
        let waits = self.waits.clone();
        waits.on(Wait::Scan, looking.end()).await??;
        let scanned = began.elapsed();
        let mut dump = self.take_dump()?;
        let attempt = (generation, round);
        let sent = self.dump_and_send(&mut dump, &scans, attempt).await;
        // Also a dump that was cut: the thaw has CRIU let go.
        self.return_dump(dump);
        let (dumped, sent) = sent?;
        let frozen_in_criu = match dumped {
            Ok(frozen) => frozen,
            Err(error) => return self.not_dumped(&error, sent),
        };
        self.frozen_in_criu = Some(frozen_in_criu);
        let sent = match sent {
            Some((sums, unsent)) => match self.unread.judge(&unsent, self.root) {
                None => Some(sums),
                Some(Verdict::Again(failure)) => return sums.given_up(failure, Duration::ZERO),
                Some(Verdict::Never(failure)) => return Err(failure),
            },
            None => None,
        };
        // CRIU has thawed the cgroup and holds the tasks by ptrace alone: from here on they stay
        // frozen whoever dies.
        self.freeze_cgroup()?;
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
        let attempt = (generation, round);
        let (mut sums, rest) = self.send_rest(sent, hashing, &scans, attempt).await?;
        sums.wire_bytes += rest.image_bytes;
        self.image_bytes = rest.image_bytes;
        let (synced, image_bytes) = (self.synced, rest.image_bytes);
        tracing::info!(%round, pages = sums.pages, wire_bytes = sums.wire_bytes, ?scanned,
            ?frozen_in_criu, ?frozen_again, ?synced, images_sent = ?began.elapsed(), image_bytes,
            "final round sent");
        Ok(SourceEvent::Finished(FinalReport {
            parcels: u32::try_from(sums.parcels).map_err(|error| internal(&error))?,
            pages: PageCount(sums.pages),
            live_sets: u32::try_from(scans.len()).map_err(|error| internal(&error))?,
            images: rest.images,
            digests: rest.digests,
            raw_bytes: sums.raw_bytes,
            wire_bytes: sums.wire_bytes,
        }))
    }

    /// Sends what there is besides pages, and those too if they have not been sent, and waits for
    /// the sync of shared storage.
    async fn send_rest(
        &mut self,
        sent: Option<Sums>,
        hashing: Option<Hashing>,
        scans: &BTreeMap<SpaceId, FinalScan>,
        (generation, round): (Generation, Round),
    ) -> Result<(Sums, Rest), Failure> {
        let (data, folder) = (self.data()?, self.dump()?.images().to_owned());
        self.tell_lengths(&folder).await?;
        let (waits, syncing) = (self.waits.clone(), self.kept.take_syncing());
        let synced = async {
            let synced = storage::synced(syncing, waits.cut());
            waits.on(Wait::Storage, synced).await?
        };
        let digests = async {
            let digests = verify::send(hashing, &data, generation);
            waits.on(Wait::Digests, digests).await?
        };
        let last = async {
            match sent {
                Some(sums) => Ok(sums),
                None => self.send_verified(scans, generation, round).await,
            }
        };
        let images = async {
            let sending = images::send(&data, generation, &folder);
            waits.on(Wait::Images, sending).await?
        };
        let (digests, sums, (images, image_bytes), synced) =
            tokio::try_join!(digests, last, images, synced)?;
        self.synced = synced;
        let rest = Rest {
            digests,
            images,
            image_bytes,
        };
        Ok((sums, rest))
    }

    /// What a frozen tree needs that is not dumped.
    fn unfit(&mut self, unfit: Unfit) -> Result<SourceEvent, Failure> {
        match unfit {
            Unfit::Passing(passing) => self.give_up(&passing.to_string(), &Sums::default()),
            Unfit::LateBirth(reason) => {
                let reason = Failure::new(ErrorCode::RetryRound, reason);
                Sums::default().given_up(reason, Duration::ZERO)
            }
        }
    }

    /// What a dump that failed asks for: some failures are of a moment.
    fn not_dumped(
        &mut self,
        error: &DumpError,
        sent: Option<(Sums, Unsent)>,
    ) -> Result<SourceEvent, Failure> {
        let Some(cause) = error.passing() else {
            return Err(criu_failed(error));
        };
        let what = format!("criu met it in a moment that it cannot dump ({cause}): try again");
        let sums = sent.map_or_else(Sums::default, |(sums, _)| sums);
        self.give_up(&what, &sums)
    }

    /// Has CRIU dump the tree, and sends what is dirty meanwhile, unless the dump must come first
    /// because everything is compared. Answers with how long CRIU had the tasks.
    async fn dump_and_send(
        &mut self,
        dump: &mut Dump,
        scans: &BTreeMap<SpaceId, FinalScan>,
        (generation, round): (Generation, Round),
    ) -> Result<(Result<Duration, DumpError>, Option<(Sums, Unsent)>), Failure> {
        self.show(dump, scans)?;
        self.let_in = true;
        let waits = self.waits.clone();
        let in_criu = Instant::now();
        let dumping = async {
            let dumped = waits.on(Wait::Dump, dump.run()).await?;
            Ok::<_, Failure>(dumped.map(|()| in_criu.elapsed()))
        };
        if self.policy.verify {
            return Ok((dumping.await?, None));
        }
        let (dumped, sent) = tokio::join!(dumping, self.send_final(scans, generation, round));
        Ok((dumped?, Some(sent?)))
    }

    /// As [`Site::send_final`]. A page that cannot be read has no digest either, so that nothing is
    /// tried again.
    async fn send_verified(
        &mut self,
        scans: &BTreeMap<SpaceId, FinalScan>,
        generation: Generation,
        round: Round,
    ) -> Result<Sums, Failure> {
        let (sums, unsent) = self.send_final(scans, generation, round).await?;
        match self.unread.judge(&unsent, self.root) {
            None => Ok(sums),
            Some(Verdict::Again(failure) | Verdict::Never(failure)) => Err(failure),
        }
    }

    /// Waits for a sync beside a round, if there is one: as long as the round may take.
    async fn sync_ended(&self, syncing: Option<Syncing>) -> Result<(), Failure> {
        let Some(syncing) = syncing else {
            return Ok(());
        };
        let ended = syncing.ended(Duration::MAX, self.waits.cut());
        let took = self.waits.on(Wait::Storage, ended).await??;
        tracing::debug!(?took, "shared storage synced");
        Ok(())
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
    fn final_scans(&mut self) -> Result<Result<BTreeMap<SpaceId, FinalScan>, Unfit>, Failure> {
        let waits = self.waits.clone();
        let scanning = waits.begin(Wait::Scan);
        let tree =
            Tree::read(self.root).map_err(|error| Failure::new(error.code(), chain(&error)))?;
        if let Some(passing) = Self::find_vfork(&tree) {
            return Ok(Err(Unfit::Passing(passing)));
        }
        for found in &tree.spaces {
            let tracked = self
                .spaces
                .get(&found.id)
                .is_some_and(|s| s.pid() == found.leader);
            let bytes = resident_bytes(found.leader);
            // CRIU copies a small one by itself; see design: late births.
            if !tracked && bytes > LATE_BIRTH_BYTES_MAX {
                return Ok(Err(Unfit::LateBirth(format!(
                    "process {} with {bytes} bytes was born after the last round",
                    found.leader
                ))));
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
            scanning.check()?;
            match space.final_scan() {
                Ok(scan) => {
                    scans.insert(*id, scan);
                }
                Err(error @ TrackError::LateBirth { .. }) => {
                    return Ok(Err(Unfit::LateBirth(chain(&error))));
                }
                // It is a zombie by now, or about to be one.
                Err(error) if error.tells_of_end() && space.pid() != self.root => {
                    replaced.push(*id);
                }
                Err(error @ TrackError::Exec { .. }) => {
                    if resident_bytes(space.pid()) > LATE_BIRTH_BYTES_MAX {
                        return Ok(Err(Unfit::LateBirth(chain(&error))));
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
        let waits = self.waits.clone();
        let scanning = waits.begin(Wait::Scan);
        for (id, scan) in scans {
            scanning.check()?;
            let Some(space) = self.spaces.get_mut(id) else {
                continue;
            };
            let again = block_in_place(|| space.final_scan()).map_err(|e| failed_to_track(&e))?;
            scan.dirty = again.dirty;
        }
        Ok(())
    }

    /// Sends what is dirty, and live sets if that is all there was to send.
    async fn send_final(
        &mut self,
        scans: &BTreeMap<SpaceId, FinalScan>,
        generation: Generation,
        round: Round,
    ) -> Result<(Sums, Unsent), Failure> {
        let data = self.data()?;
        let dirty: BTreeMap<_, _> = scans
            .iter()
            .map(|(id, scan)| (*id, scan.dirty.clone()))
            .collect();
        for (id, dirty) in &dirty {
            self.delivered.written(*id, dirty);
        }
        let (mut sums, mut unsent) = self.send_pages(&dirty, round, Misses::Settle).await?;
        unsent.keep(scans);
        if !unsent.is_empty() {
            return Ok((sums, unsent));
        }
        for (id, scan) in scans {
            self.delivered.check(*id, &scan.live)?;
            let set = scan.live.to_wire();
            let length = u32::try_from(set.len()).map_err(|error| internal(&error))?;
            let header = SetHeader {
                generation,
                space: *id,
                length,
            };
            let mut body = header.encode().to_vec();
            body.extend(set);
            seal(&mut body);
            sums.wire_bytes += body.len() as u64;
            let sending = data.send_stream(StreamKind::LiveSet, body.into());
            let sent = self.waits.on(Wait::LiveSets, sending).await?;
            sent.map_err(|error| lost(&error))?;
        }
        Ok((sums, unsent))
    }

    fn data(&self) -> Result<DataSender, Failure> {
        self.data.clone().ok_or_else(|| {
            Failure::new(ErrorCode::PeerLost, "there is no connection to the target")
        })
    }
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
        SendError::Read { source, .. } => source.code(),
        SendError::Send { .. } => ErrorCode::PeerLost,
        SendError::Cut => ErrorCode::Aborted,
    };
    Failure::new(code, chain(error))
}

#[cfg(test)]
#[path = "rounds_tests.rs"]
mod tests;
