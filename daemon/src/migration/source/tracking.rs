//! The workload's memory, tracked from outside: which spaces there are, which of their pages the
//! target lacks, and which it has.
//!
//! Invariants: a page that was found dirty is pending, sent, or dirty still: none is forgotten but
//! with its space; every scan has a [`Lookout`] around it; once direct I/O was seen the workload
//! stands still for each, and nothing counts that was found before. Whether what CRIU copies by
//! itself is within the [`Budget`] is asked of all trees together.

mod budget;
mod last;
mod lookout;
mod pauses;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use pageferry_pages::read::Reader;
use pageferry_pages::track::tree::Tree;
use pageferry_pages::track::{ATTEMPTS, STOP_MAX};
use pageferry_pages::track::{Eager, Space, Support, TrackError, TrackOptions};
use pageferry_proto::id::SpaceId;
use pageferry_proto::set::PageSet;
use pageferry_proto::wire::code::Failure;
use pageferry_sys::task::has_ended;

use super::delivered::Delivered;
use super::failure::failed_to_track;
use super::network::Sockets;
use super::unread::Unreadable;
use super::waits::Waits;
use super::workload::Workload;
pub(super) use budget::Budget;
pub(super) use last::{Scans, Unfit};
pub(super) use lookout::{Lookout, Seen, check_trackable};
pub(super) use pauses::Paused;
use pauses::{Pauses, Scanned};

/// The spaces of a workload.
#[derive(Debug)]
pub(super) struct Tracking {
    support: Support,
    /// CRIU reads the true smaps, for 11 ms per GiB of the freeze.
    true_smaps: bool,
    spaces: BTreeMap<SpaceId, Space>,
    /// Direct I/O was seen.
    direct: bool,
    /// Makes the scans from then on.
    pauses: Pauses,
    /// Pages found dirty that the next round sends.
    pending: BTreeMap<SpaceId, PageSet>,
    /// What the target has of the spaces.
    pub(super) delivered: Delivered,
    /// What no final round could read.
    pub(super) unread: Unreadable,
    /// When the last scan was, for the rate of dirtying.
    scanned: Instant,
    /// What only CRIU can copy, as of the last scan.
    eager: Eager,
}

impl Tracking {
    /// Nothing is tracked yet.
    pub(super) fn new(support: Support, true_smaps: bool, paused: Paused) -> Self {
        Self {
            support,
            true_smaps,
            spaces: BTreeMap::new(),
            direct: false,
            pauses: Pauses::new(paused),
            pending: BTreeMap::new(),
            delivered: Delivered::default(),
            unread: Unreadable::default(),
            scanned: Instant::now(),
            eager: Eager::default(),
        }
    }

    /// Attaches to what is new in the tree, and finds what the next round has to send. Returns
    /// whether that is everything once more, because direct I/O was seen.
    pub(super) fn scan(
        &mut self,
        workload: &Workload,
        sockets: &Sockets,
        waits: &Waits,
    ) -> Result<bool, Failure> {
        self.attach_new(workload)?;
        // Before the first look, so that little time is between that and the scan.
        let mut recorded = BTreeMap::new();
        if !self.true_smaps {
            let record = |(id, space): (&SpaceId, &mut Space)| (*id, space.record_smaps());
            recorded.extend(self.spaces.iter_mut().map(record));
        }
        let lookout = self.lookout(workload, sockets);
        let mut anew = self.begins_anew(lookout.look()?).is_some();
        let mut eager = self.scan_spaces(workload, recorded, waits)?;
        if self.begins_anew(lookout.look()?).is_some() {
            anew = true;
            eager = self.scan_spaces(workload, BTreeMap::new(), waits)?;
            lookout.look()?;
        }
        for segment in workload.ipc.unmapped()? {
            eager.add_segment(segment.id, segment.bytes);
        }
        self.scanned = Instant::now();
        self.eager = eager;
        Ok(anew)
    }

    /// Whether direct I/O was seen for the first time, and what. Then nothing counts that scans
    /// have found so far: one of them may have been in the middle of a read.
    pub(super) fn begins_anew(&mut self, seen: Seen) -> Option<String> {
        let direct = seen.direct.filter(|_| !self.direct)?;
        tracing::info!("scans are made in pauses of the workload from now on: {direct}");
        self.direct = true;
        self.pending.clear();
        for (id, space) in &mut self.spaces {
            space.begin_anew();
            self.delivered.begin(*id);
        }
        Some(direct)
    }

    /// Tells how often the workload stood still for scans.
    pub(super) fn paused(&self) -> Paused {
        self.pauses.paused()
    }

    /// Looks for what forbids tracking.
    pub(super) fn lookout(&self, workload: &Workload, sockets: &Sockets) -> Lookout {
        Lookout::new(workload, self.support.clone(), sockets)
    }

    /// Attaches to the spaces that are not yet tracked and forgets those that are gone.
    fn attach_new(&mut self, workload: &Workload) -> Result<(), Failure> {
        let root = workload.root();
        let tree = workload.tree()?;
        let pids = tree.pids();
        self.forget_others(&tree);
        self.pending.retain(|id, _| self.spaces.contains_key(id));
        for found in tree.spaces {
            if self.spaces.contains_key(&found.id) {
                continue;
            }
            check_trackable(found.leader, root, &self.support)?;
            let options = TrackOptions {
                support: self.support.clone(),
                tree: pids.clone(),
                stop_max: STOP_MAX,
                attempts: ATTEMPTS,
            };
            match Space::attach(found.leader, &options) {
                Ok(space) => {
                    tracing::debug!(pid = found.leader, stopped = ?space.attached().stopped,
                        threads = space.attached().threads, "attached");
                    self.spaces.insert(found.id, space);
                    self.delivered.begin(found.id);
                }
                // It has ended since the tree was read; whoever is left is in the next round.
                Err(error) if error.tells_of_end() && found.leader != root => {}
                Err(_) if found.leader != root && has_ended(found.leader) => {}
                // A program that has just replaced itself is a new space with the same name.
                Err(TrackError::Exec { .. }) => {}
                Err(error) => return Err(failed_to_track(&error)),
            }
        }
        Ok(())
    }

    /// Forgets spaces that are not in the tree any more.
    fn forget_others(&mut self, tree: &Tree) {
        self.spaces.retain(|id, space| {
            tree.spaces
                .iter()
                .any(|found| found.id == *id && found.leader == space.pid())
        });
    }

    /// Scans every space whose smaps could be recorded, if that was tried.
    fn scan_spaces(
        &mut self,
        workload: &Workload,
        recorded: BTreeMap<SpaceId, Result<(), TrackError>>,
        waits: &Waits,
    ) -> Result<Eager, Failure> {
        let failed = |(id, recorded): (_, Result<_, _>)| Some((id, Err(recorded.err()?)));
        let mut scanned: Scanned = recorded.into_iter().filter_map(failed).collect();
        let all = self.spaces.iter_mut();
        let spaces = all.filter(|(id, _)| !scanned.contains_key(*id)).collect();
        scanned.append(&mut if self.direct {
            self.pauses.scan(workload, spaces, waits)?
        } else {
            let scan = |(id, space): (&SpaceId, &mut Space)| (*id, space.scan());
            spaces.into_iter().map(scan).collect()
        });
        let mut eager = Eager::default();
        for (id, scan) in scanned {
            let Some(pid) = self.spaces.get(&id).map(Space::pid) else {
                continue;
            };
            match scan {
                Ok(scan) => {
                    self.delivered.written(id, &scan.dirty);
                    self.pending.entry(id).or_default().union_with(&scan.dirty);
                    eager.merge(scan.eager);
                }
                // A program that replaced itself is a new space with the same name.
                Err(error)
                    if matches!(error, TrackError::Exec { .. })
                        || pid != workload.root() && (error.tells_of_end() || has_ended(pid)) =>
                {
                    self.spaces.remove(&id);
                    self.pending.remove(&id);
                }
                Err(error) => return Err(failed_to_track(&error)),
            }
        }
        Ok(eager)
    }

    /// Whether a round has something to begin with. A freeze that was given up has left nothing,
    /// and has met what no round has seen.
    pub(super) fn is_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// What the round that begins has to send.
    pub(super) fn take_pending(&mut self) -> BTreeMap<SpaceId, PageSet> {
        std::mem::take(&mut self.pending)
    }

    /// What is pending is dirty again: the last scan finds it with all else.
    pub(super) fn put_pending_back(&mut self) {
        for (id, pages) in self.take_pending() {
            if let Some(space) = self.spaces.get_mut(&id) {
                space.put_back(&pages);
            }
        }
    }

    /// A space that is still there, and how its pages are read.
    pub(super) fn reader(&self, id: SpaceId) -> Option<(i32, Arc<Reader>)> {
        let space = self.spaces.get(&id)?;
        Some((space.pid(), space.reader()))
    }

    /// How all spaces are read.
    pub(super) fn readers(&self) -> impl Iterator<Item = (SpaceId, Arc<Reader>)> {
        self.spaces.iter().map(|(id, space)| (*id, space.reader()))
    }

    /// How many pages are pending.
    pub(super) fn pages_pending(&self) -> u64 {
        self.pending.values().map(|pages| pages.len().0).sum()
    }

    /// Pages of a space have been sent, but for those that could not be read: they are dirty again.
    pub(super) fn sent(&mut self, id: SpaceId, pages: &PageSet, unread: &PageSet) {
        self.delivered.sent(id, pages, unread);
        if let Some(space) = self.spaces.get_mut(&id) {
            space.put_back(unread);
        }
    }

    /// When the last scan was.
    pub(super) fn scanned(&self) -> Instant {
        self.scanned
    }

    /// What only CRIU can copy, as of then.
    pub(super) fn eager(&self) -> &Eager {
        &self.eager
    }

    /// Lets go of every space.
    pub(super) fn end(&mut self) {
        self.spaces.clear();
        self.pending.clear();
    }
}

#[cfg(test)]
mod tests;
