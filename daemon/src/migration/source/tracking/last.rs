//! The last look at the memory of a workload that stands still: what is dirty, what is alive, and
//! what CRIU may see of it.

use std::collections::BTreeMap;
use std::fs;

use criu_glue::view::Feed;
use pageferry_pages::digest::Hashing;
use pageferry_pages::track::tree::Tree;
use pageferry_pages::track::{FinalScan, LATE_BIRTH_BYTES_MAX, ShownSmaps, Space, TrackError};
use pageferry_proto::id::SpaceId;
use pageferry_proto::migration::source::Wait;
use pageferry_proto::page::PageCount;
use pageferry_proto::set::PageSet;
use pageferry_proto::wire::code::Failure;
use tokio::task::block_in_place;

use super::Tracking;
use crate::migration::source::failure::failed_to_track;
use crate::migration::source::verify;
use crate::migration::source::waits::Waits;
use crate::migration::source::workload::Workload;
use crate::migration::text::{chain, internal};
use crate::runtime::passing::{self, Passing};

/// What the last scan found, per space.
pub type Scans = BTreeMap<SpaceId, FinalScan>;

/// Why a frozen tree is not dumped, but copied for another round.
#[derive(Debug)]
pub enum Unfit {
    /// Memory was born that no round has seen, or is to be seen anew.
    Unseen(String),
    /// CRIU would not come to an end.
    Passing(Passing),
}

impl Tracking {
    /// Scans every tracked space of the frozen `tree`; the inner error is a reason for another
    /// round.
    pub fn last_scan(
        &mut self,
        tree: &Tree,
        workload: &Workload,
        waits: &Waits,
    ) -> Result<Result<Scans, Unfit>, Failure> {
        let scanning = waits.begin(Wait::Scan);
        if let Some(passing) = find_vfork(tree) {
            return Ok(Err(Unfit::Passing(passing)));
        }
        if let Some(late) = self.find_late_birth(tree) {
            return Ok(Err(Unfit::Unseen(late)));
        }
        self.forget_others(tree);
        let mut scans = BTreeMap::new();
        let mut replaced = Vec::new();
        for (id, space) in &mut self.spaces {
            scanning.check()?;
            match space.final_scan() {
                Ok(scan) => {
                    scans.insert(*id, scan);
                }
                Err(error @ TrackError::LateBirth { .. }) => {
                    return Ok(Err(Unfit::Unseen(chain(&error))));
                }
                // It is a zombie by now, or about to be one.
                Err(error) if error.tells_of_end() && space.pid() != workload.root() => {
                    replaced.push(*id);
                }
                Err(error @ TrackError::Exec { .. }) => {
                    if resident_bytes(space.pid()) > LATE_BIRTH_BYTES_MAX {
                        return Ok(Err(Unfit::Unseen(chain(&error))));
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

    /// A process with much memory that no round has seen. CRIU copies a small one by itself; see
    /// design: late births.
    fn find_late_birth(&self, tree: &Tree) -> Option<String> {
        tree.spaces.iter().find_map(|found| {
            let known = self.spaces.get(&found.id);
            let tracked = known.is_some_and(|space| space.pid() == found.leader);
            let bytes = resident_bytes(found.leader);
            (!tracked && bytes > LATE_BIRTH_BYTES_MAX).then(|| {
                format!(
                    "process {} with {bytes} bytes was born after the last round",
                    found.leader
                )
            })
        })
    }

    /// Finds what the dump itself has made dirty: while CRIU's parasite runs in a thread, the
    /// kernel writes the number of its processor into the thread's rseq area, and does so again
    /// wherever the thread is restored. Nothing would be lost without these pages, but digests
    /// would differ.
    pub fn scan_again(&mut self, scans: &mut Scans, waits: &Waits) -> Result<(), Failure> {
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

    /// Shows CRIU what it may see of the spaces.
    pub fn show(&self, feed: &mut Feed, scans: &Scans) -> Result<(), Failure> {
        for (id, scan) in scans {
            let Some(space) = self.spaces.get(id) else {
                continue;
            };
            feed.set_ranges(space.pid(), &scan.hidden)
                .and_then(|()| feed.set_guards(space.pid(), &scan.guards))
                .map_err(|error| internal(&error))?;
            feed.set_smaps(space.pid(), &scan.smaps);
        }
        feed.publish().map_err(|error| internal(&error))
    }

    /// What CRIU was shown that must still be true.
    pub fn shown_smaps(&self) -> Vec<ShownSmaps> {
        self.spaces
            .values()
            .filter_map(Space::shown_smaps)
            .collect()
    }

    /// What of the scans has to be sent: the target has only older versions of it.
    pub fn dirty(&mut self, scans: &Scans) -> BTreeMap<SpaceId, PageSet> {
        let dirty: BTreeMap<_, _> = scans
            .iter()
            .map(|(id, scan)| (*id, scan.dirty.clone()))
            .collect();
        for (id, dirty) in &dirty {
            self.delivered.written(*id, dirty);
        }
        dirty
    }

    /// Begins to hash every live page.
    pub fn hash(&self, scans: &Scans, threads: usize) -> Hashing {
        verify::begin(&self.spaces, scans, threads)
    }
}

/// A thread in a `vfork`, which the freezer counts as frozen: its child lives in its memory.
fn find_vfork(tree: &Tree) -> Option<Passing> {
    let shared = tree.spaces.iter().filter(|space| !space.sharers.is_empty());
    shared
        .map(|space| [&[space.leader], space.sharers.as_slice()].concat())
        .find_map(|pids| passing::vfork(&pids))
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
