//! The final round: trees that stand still are dumped, and all that the target lacks is sent.
//!
//! ```text
//! scan ───── what is dirty and what is alive; memory that no round has seen is another round
//! dump ───── CRIU has the tasks; what is dirty is sent beside it, unless all is verified
//! freeze ─── again: CRIU has thawed the cgroup, and holds the tasks by ptrace alone
//! rest ───── images, digests, lengths of files, folders that travel; shared storage is synced
//! ```

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use pageferry_pages::digest::Hashing;
use pageferry_proto::id::{Generation, Round};
use pageferry_proto::migration::source::{FinalReport, SourceEvent, Wait};
use pageferry_proto::page::PageCount;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use tokio::task::block_in_place;

use super::Site;
use crate::migration::source::dump::DumpError;
use crate::migration::source::failure::criu_failed;
use crate::migration::source::member::{Member, Trees};
use crate::migration::source::sending::{Attempt, Sums};
use crate::migration::source::tracking::{Scans, Unfit};
use crate::migration::source::unread::{Unsent, Verdict};
use crate::migration::source::{images, verify};
use crate::migration::text::internal;
use crate::runtime::passing::Passing;

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

/// What the dump of a tree has come to, and how long CRIU had the tasks.
type Dumped = Result<Duration, DumpError>;

impl Site {
    /// The final round: everything the target still lacks, with the trees frozen.
    pub async fn finish(
        &mut self,
        generation: Generation,
        round: Round,
        absent: bool,
    ) -> Result<SourceEvent, Failure> {
        let attempt = Attempt { generation, round };
        let began = Instant::now();
        let mut scans = match self.last_scan().await? {
            Ok(scans) => scans,
            Err(unfit) => return self.unfit(unfit),
        };
        let scanned = began.elapsed();
        self.network
            .parking
            .forward(self.sending.data()?, generation);
        let (dumped, sent) = self.dump_and_send(&scans, attempt, absent).await?;
        let sums = sent
            .iter()
            .flatten()
            .fold(Sums::default(), |mut sums, (sent, _)| {
                sums.merge(sent);
                sums
            });
        let mut frozen_in_criu = Duration::ZERO;
        for dumped in dumped {
            match dumped {
                Ok(held) => frozen_in_criu = frozen_in_criu.max(held),
                Err(error) => return self.not_dumped(&error, &sums),
            }
        }
        if let Some(sent) = &sent
            && let Some(verdict) = self.judge(sent)
        {
            return match verdict {
                Verdict::Again(failure) => sums.given_up(failure, Duration::ZERO),
                Verdict::Never(failure) => Err(failure),
            };
        }
        if let Some(stranger) = self.hold_again()? {
            return self.tries.give_up(&stranger.to_string(), &sums);
        }
        let frozen_again = began.elapsed();
        if absent {
            let members = self.members.iter();
            let readers = members.flat_map(|member| member.tracking.readers());
            self.drain.begin(readers.collect());
        }
        let sent = sent.map(|_| sums);
        let hashing = self.compare(&mut scans)?;
        let (mut sums, rest) = self.send_rest(sent, hashing, &scans, attempt).await?;
        sums.wire_bytes += rest.image_bytes + rest.file_bytes;
        sums.raw_bytes += rest.file_bytes;
        let (synced, image_bytes) = (self.kept.synced(), rest.image_bytes);
        tracing::info!(%round, pages = sums.pages, wire_bytes = sums.wire_bytes, ?scanned,
            ?frozen_in_criu, ?frozen_again, ?synced, images_sent = ?began.elapsed(), image_bytes,
            absent_pages = sums.absent_pages, "final round sent");
        let live_sets = scans.iter().map(Scans::len).sum::<usize>();
        Ok(SourceEvent::Finished(FinalReport {
            parcels: u32::try_from(sums.parcels).map_err(|error| internal(&error))?,
            pages: PageCount(sums.pages),
            live_sets: u32::try_from(live_sets).map_err(|error| internal(&error))?,
            images: rest.images,
            digests: rest.digests,
            locks: rest.locks,
            files: rest.files,
            absent_sets: u32::try_from(sums.absent_sets).map_err(|error| internal(&error))?,
            absent_pages: PageCount(sums.absent_pages),
            raw_bytes: sums.raw_bytes,
            wire_bytes: sums.wire_bytes,
        }))
    }

    /// Scans what stands still, tree by tree, beside a last look for what forbids that; the inner
    /// error is a reason for another round.
    async fn last_scan(&mut self) -> Result<Result<Vec<Scans>, Unfit>, Failure> {
        let mut all = Vec::new();
        for Member {
            workload, tracking, ..
        } in &mut self.members
        {
            let waits = &self.waits;
            let tree = block_in_place(|| workload.tree())?;
            if let Some(stranger) = workload.note_standing(&tree)? {
                return Ok(Err(Unfit::Passing(stranger)));
            }
            let lookout = tracking.lookout(workload, &self.network.sockets);
            let looking = lookout.begin();
            let scans = match block_in_place(|| tracking.last_scan(&tree, workload, waits))? {
                Ok(scans) => scans,
                Err(unfit) => return Ok(Err(unfit)),
            };
            let busy = block_in_place(|| workload.busy())?;
            let seen = waits.on(Wait::Scan, looking.end()).await??;
            if let Some(busy) = busy {
                return Ok(Err(Unfit::Passing(busy)));
            }
            if let Some(direct) = tracking.begins_anew(seen) {
                let text = format!("{direct}, since the last round");
                return Ok(Err(Unfit::Unseen(text)));
            }
            all.push(scans);
        }
        Ok(Ok(all))
    }

    /// What frozen trees need that are not dumped.
    fn unfit(&mut self, unfit: Unfit) -> Result<SourceEvent, Failure> {
        match unfit {
            Unfit::Passing(passing) => self.tries.give_up(&passing.to_string(), &Sums::default()),
            Unfit::Unseen(reason) => {
                let reason = Failure::new(ErrorCode::RetryRound, reason);
                Sums::default().given_up(reason, Duration::ZERO)
            }
        }
    }

    /// Has CRIU dump all trees at the same time, and sends what is dirty meanwhile, unless the dump
    /// must come first because everything is compared. All dumps have come to their end then. Of
    /// what may be absent nothing is sent but what it is.
    async fn dump_and_send(
        &mut self,
        scans: &[Scans],
        attempt: Attempt,
        absent: bool,
    ) -> Result<(Vec<Dumped>, Option<Vec<(Sums, Unsent)>>), Failure> {
        for (member, scans) in self.members.iter_mut().zip(scans) {
            member.tracking.show(member.dumping.feed()?, scans)?;
        }
        let (mut dumping, mut trackings) = (Vec::new(), Vec::new());
        for Member {
            dumping: criu,
            tracking,
            ..
        } in &mut self.members
        {
            dumping.push(criu.run(&self.waits));
            trackings.push(tracking);
        }
        let dumping = join_all(dumping);
        let ended = |dumped: Vec<_>| dumped.into_iter().collect::<Result<Vec<Dumped>, Failure>>();
        if self.policy.verify {
            return Ok((ended(dumping.await)?, None));
        }
        let (sending, waits) = (&self.sending, &self.waits);
        let sending = async {
            let mut sent = Vec::new();
            for (tracking, scans) in trackings.into_iter().zip(scans) {
                sent.push(match absent {
                    true => {
                        let named = sending.absent(tracking, scans, attempt, waits);
                        (named.await?, Unsent::default())
                    }
                    false => sending.last(tracking, scans, attempt, waits).await?,
                });
            }
            Ok::<_, Failure>(sent)
        };
        let (dumped, sent) = tokio::join!(dumping, sending);
        Ok((ended(dumped)?, Some(sent?)))
    }

    /// What becomes of a final round of which something is missing; none if nothing is.
    fn judge(&mut self, sent: &[(Sums, Unsent)]) -> Option<Verdict> {
        let mut members = self.members.iter_mut().zip(sent);
        members.find_map(
            |(
                Member {
                    workload, tracking, ..
                },
                (_, unsent),
            )| { tracking.unread.judge(unsent, workload.root()) },
        )
    }

    /// CRIU has thawed the cgroups and holds the tasks by ptrace alone: from here on they stay
    /// frozen whoever dies. Answers with who else is in one of them.
    fn hold_again(&mut self) -> Result<Option<Passing>, Failure> {
        for Member {
            workload, dumping, ..
        } in &mut self.members
        {
            workload.freeze(&self.waits)?;
            dumping.check_held()?;
        }
        for tree in self.trees().iter() {
            if let Some(stranger) = tree.stranger()? {
                return Ok(Some(stranger));
            }
        }
        Ok(None)
    }

    /// Begins to compare what CRIU was shown with the truth, and to hash all that is alive if that
    /// is to be verified; what the dump has written is dirty then.
    fn compare(&mut self, scans: &mut [Scans]) -> Result<Vec<Hashing>, Failure> {
        let mut hashing = Vec::new();
        for (member, scans) in self.members.iter_mut().zip(scans) {
            let Member {
                tracking, dumping, ..
            } = member;
            if self.policy.verify {
                hashing.push(tracking.hash(scans, self.node.workers));
            }
            dumping.begin_comparing(tracking.shown_smaps());
            if self.policy.verify {
                tracking.scan_again(scans, &self.waits)?;
            }
        }
        Ok(hashing)
    }

    /// What a dump that failed asks for: some failures are of a moment.
    fn not_dumped(&mut self, error: &DumpError, sent: &Sums) -> Result<SourceEvent, Failure> {
        let Some(cause) = error.passing() else {
            return Err(criu_failed(error));
        };
        let what = format!("criu met it in a moment that it cannot dump ({cause}): try again");
        self.tries.give_up(&what, sent)
    }

    /// Puts beside the images of each tree what the target must know of its files and locks.
    /// Answers with how many locks there are.
    async fn tell(&mut self) -> Result<u32, Failure> {
        let mut all = 0;
        for member in &mut self.members {
            let workload = &member.workload;
            let folder = member.dumping.images()?;
            let (pids, mounts) = (workload.pids()?, workload.mounts.as_ref());
            let telling = self.kept.tell_lengths(pids, mounts, folder, &self.waits);
            telling.await?;
            all += member.locks.tell(folder, &workload.freezer)?;
        }
        Ok(all)
    }

    /// Sends what there is besides pages, and those too if they have not been sent, and waits for
    /// the sync of shared storage.
    async fn send_rest(
        &mut self,
        sent: Option<Sums>,
        hashing: Vec<Hashing>,
        scans: &[Scans],
        attempt: Attempt,
    ) -> Result<(Sums, Rest), Failure> {
        let generation = attempt.generation;
        let locks = self.tell().await?;
        let (waits, data) = (&self.waits, self.sending.data()?);
        let pids_now = Trees::of(&self.members).members();
        let synced = self.kept.settle(waits);
        let digests = async {
            let mut all = 0;
            for hashing in hashing {
                let digests = verify::send(hashing, &data, generation);
                all += waits.on(Wait::Digests, digests).await??;
            }
            Ok(all)
        };
        let (mut folders_of_images, mut trackings) = (Vec::new(), Vec::new());
        for Member {
            workload,
            tracking,
            dumping,
            ..
        } in &mut self.members
        {
            folders_of_images.push((workload.member, dumping.images()?));
            trackings.push((tracking, workload.root()));
        }
        let sending = &self.sending;
        let last = async {
            let Some(sums) = sent else {
                let mut sums = Sums::default();
                for ((tracking, root), scans) in trackings.into_iter().zip(scans) {
                    let sent = sending.last_verified(tracking, (scans, root), attempt, waits);
                    sums.merge(&sent.await?);
                }
                return Ok(sums);
            };
            Ok(sums)
        };
        let images = async {
            let (mut files, mut bytes) = (0, 0);
            for of in folders_of_images {
                let sending = images::send(&data, generation, of);
                let sent = waits.on(Wait::Images, sending).await??;
                files += sent.0;
                bytes += sent.1;
            }
            Ok((files, bytes))
        };
        // CRIU has given files that were deleted a name again.
        let folders = self.folders.last(&data, attempt.round, &pids_now, waits);
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
