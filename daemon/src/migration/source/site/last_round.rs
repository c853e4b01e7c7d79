//! The final round: a tree that stands still is dumped, and all that the target lacks is sent.
//!
//! ```text
//! scan ───── what is dirty and what is alive; memory that no round has seen is another round
//! dump ───── CRIU has the tasks; what is dirty is sent beside it, unless all is verified
//! freeze ─── again: CRIU has thawed the cgroup, and holds the tasks by ptrace alone
//! rest ───── images, digests, lengths of files, folders that travel; shared storage is synced
//! ```

use std::time::{Duration, Instant};

use pageferry_pages::digest::Hashing;
use pageferry_pages::track::tree::Tree;
use pageferry_proto::id::{Generation, Round};
use pageferry_proto::migration::source::{FinalReport, SourceEvent, Wait};
use pageferry_proto::page::PageCount;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use tokio::task::block_in_place;

use super::Site;
use crate::migration::source::dump::DumpError;
use crate::migration::source::failure::criu_failed;
use crate::migration::source::sending::{Attempt, Sums};
use crate::migration::source::tracking::{Scans, Unfit};
use crate::migration::source::unread::{Unsent, Verdict};
use crate::migration::source::workload::unreadable;
use crate::migration::source::{images, verify};
use crate::migration::text::internal;

/// What was sent besides pages.
#[derive(Debug)]
struct Rest {
    digests: u32,
    images: u32,
    image_bytes: u64,
    locks: u32,
    files: u32,
    file_bytes: u64,
}

impl Site {
    /// The final round: everything the target still lacks, with the tree frozen.
    pub async fn finish(
        &mut self,
        generation: Generation,
        round: Round,
    ) -> Result<SourceEvent, Failure> {
        let attempt = Attempt { generation, round };
        let began = Instant::now();
        let mut scans = match self.last_scan().await? {
            Ok(scans) => scans,
            Err(unfit) => return self.unfit(unfit),
        };
        let scanned = began.elapsed();
        let (dumped, sent) = self.dump_and_send(&scans, attempt).await?;
        let frozen_in_criu = match dumped {
            Ok(frozen) => frozen,
            Err(error) => return self.not_dumped(&error, sent),
        };
        let sent = match sent {
            Some((sums, unsent)) => match self.tracking.unread.judge(&unsent, self.workload.root())
            {
                None => Some(sums),
                Some(Verdict::Again(failure)) => return sums.given_up(failure, Duration::ZERO),
                Some(Verdict::Never(failure)) => return Err(failure),
            },
            None => None,
        };
        // CRIU has thawed the cgroup and holds the tasks by ptrace alone: from here on they stay
        // frozen whoever dies.
        self.workload.freeze(&self.waits)?;
        self.dumping.check_held()?;
        if let Some(stranger) = self.workload.stranger()? {
            let sums = sent.unwrap_or_default();
            return self.tries.give_up(&stranger.to_string(), &sums);
        }
        let frozen_again = began.elapsed();
        let verify = self.policy.verify;
        let hashing = verify.then(|| self.tracking.hash(&scans, self.node.workers));
        self.dumping.begin_comparing(self.tracking.shown_smaps());
        if verify {
            self.tracking.scan_again(&mut scans, &self.waits)?;
        }
        let (mut sums, rest) = self.send_rest(sent, hashing, &scans, attempt).await?;
        sums.wire_bytes += rest.image_bytes + rest.file_bytes;
        sums.raw_bytes += rest.file_bytes;
        let (synced, image_bytes) = (self.kept.synced(), rest.image_bytes);
        tracing::info!(%round, pages = sums.pages, wire_bytes = sums.wire_bytes, ?scanned,
            ?frozen_in_criu, ?frozen_again, ?synced, images_sent = ?began.elapsed(), image_bytes,
            "final round sent");
        Ok(SourceEvent::Finished(FinalReport {
            parcels: u32::try_from(sums.parcels).map_err(|error| internal(&error))?,
            pages: PageCount(sums.pages),
            live_sets: u32::try_from(scans.len()).map_err(|error| internal(&error))?,
            images: rest.images,
            digests: rest.digests,
            locks: rest.locks,
            files: rest.files,
            raw_bytes: sums.raw_bytes,
            wire_bytes: sums.wire_bytes,
        }))
    }

    /// Scans what stands still, beside a last look for what forbids that; the inner error is a
    /// reason for another round.
    async fn last_scan(&mut self) -> Result<Result<Scans, Unfit>, Failure> {
        let tree = block_in_place(|| Tree::read(self.workload.root()));
        let tree = tree.map_err(|error| unreadable(&error))?;
        if let Some(stranger) = self.workload.note_standing(&tree)? {
            return Ok(Err(Unfit::Passing(stranger)));
        }
        let (workload, waits) = (&self.workload, &self.waits);
        let lookout = self.tracking.lookout(workload, &self.network.sockets);
        let looking = lookout.begin();
        let scans = match block_in_place(|| self.tracking.last_scan(&tree, workload, waits))? {
            Ok(scans) => scans,
            Err(unfit) => return Ok(Err(unfit)),
        };
        let busy = block_in_place(|| workload.busy())?;
        let seen = waits.on(Wait::Scan, looking.end()).await??;
        if let Some(busy) = busy {
            return Ok(Err(Unfit::Passing(busy)));
        }
        Ok(match self.tracking.begins_anew(seen) {
            Some(direct) => Err(Unfit::Unseen(format!("{direct}, since the last round"))),
            None => Ok(scans),
        })
    }

    /// What a frozen tree needs that is not dumped.
    fn unfit(&mut self, unfit: Unfit) -> Result<SourceEvent, Failure> {
        match unfit {
            Unfit::Passing(passing) => self.tries.give_up(&passing.to_string(), &Sums::default()),
            Unfit::Unseen(reason) => {
                let reason = Failure::new(ErrorCode::RetryRound, reason);
                Sums::default().given_up(reason, Duration::ZERO)
            }
        }
    }

    /// Has CRIU dump the tree, and sends what is dirty meanwhile, unless the dump must come first
    /// because everything is compared. Answers with how long CRIU had the tasks.
    async fn dump_and_send(
        &mut self,
        scans: &Scans,
        attempt: Attempt,
    ) -> Result<(Result<Duration, DumpError>, Option<(Sums, Unsent)>), Failure> {
        self.tracking.show(self.dumping.feed()?, scans)?;
        let waits = &self.waits;
        let dumping = self.dumping.run(waits);
        if self.policy.verify {
            return Ok((dumping.await?, None));
        }
        let sending = self.sending.last(&mut self.tracking, scans, attempt, waits);
        let (dumped, sent) = tokio::join!(dumping, sending);
        Ok((dumped?, Some(sent?)))
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
        self.tries.give_up(&what, &sums)
    }

    /// Sends what there is besides pages, and those too if they have not been sent, and waits for
    /// the sync of shared storage.
    async fn send_rest(
        &mut self,
        sent: Option<Sums>,
        hashing: Option<Hashing>,
        scans: &Scans,
        attempt: Attempt,
    ) -> Result<(Sums, Rest), Failure> {
        let generation = attempt.generation;
        let (workload, waits) = (&self.workload, &self.waits);
        let (data, folder) = (self.sending.data()?, self.dumping.images()?);
        let (pids, mounts) = (workload.pids()?, workload.mounts.as_ref());
        self.kept
            .tell_lengths(pids.clone(), mounts, folder, waits)
            .await?;
        let locks = self.locks.tell(folder, &workload.freezer)?;
        let synced = self.kept.settle(waits);
        let digests = async {
            let digests = verify::send(hashing, &data, generation);
            waits.on(Wait::Digests, digests).await?
        };
        let (sending, tracking) = (&self.sending, &mut self.tracking);
        let last = async {
            match sent {
                Some(sums) => Ok(sums),
                None => {
                    let all = (scans, workload.root());
                    sending.last_verified(tracking, all, attempt, waits).await
                }
            }
        };
        let images = async {
            let sending = images::send(&data, generation, folder);
            waits.on(Wait::Images, sending).await?
        };
        // CRIU has given files that were deleted a name again.
        let members = workload.members();
        let folders = self.folders.last(&data, attempt.round, &members, waits);
        let (digests, sums, (images, image_bytes), (), (files, file_bytes)) =
            tokio::try_join!(digests, last, images, synced, folders)?;
        let rest = Rest {
            digests,
            images,
            image_bytes,
            locks,
            files,
            file_bytes,
        };
        Ok((sums, rest))
    }
}
