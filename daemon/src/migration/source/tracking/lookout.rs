//! Looks at the whole tree for what forbids moving it and can begin at any time: direct I/O and its
//! like, a tracer, a connection over loopback to somebody who stays.
//!
//! A survey finds what is there when it is made. From then on the tree is looked at before and
//! after every scan, and once more when it is frozen. What two looks can miss is said where the
//! kinds are: [`refuse`] and [`loopback`].

use std::collections::BTreeSet;

use pageferry_cgroup::freezer::Freezer;
use pageferry_pages::track::{Support, refuse};
use pageferry_proto::wire::code::Failure;
use pageferry_sys::task;

use crate::migration::source::failure::{failed_to_track, freeze_failed};
use crate::migration::source::workload::Workload;
use crate::migration::text::internal;
use crate::runtime::loopback::{self, Connections};

/// What a look needs: it may be taken beside an operation on the site.
#[derive(Debug, Clone)]
pub struct Lookout {
    root: i32,
    support: Support,
    /// Holds the tree.
    freezer: Freezer,
    /// Those of its network namespace, if that is its own.
    connections: Option<Connections>,
}

impl Lookout {
    /// That of a workload whose tree is in its cgroup, and the connections of its own network.
    pub fn new(workload: &Workload, support: Support, connections: Option<Connections>) -> Self {
        Self {
            root: workload.root(),
            support,
            freezer: workload.freezer.clone(),
            connections,
        }
    }

    /// Looks at every process. Blocks; a millisecond for some processes with a thousand
    /// descriptors each, and 0.2 ms for a network namespace.
    pub fn look(&self) -> Result<(), Failure> {
        let pids = self.freezer.processes();
        let pids = pids.map_err(|error| freeze_failed(&error))?;
        let mut sockets = BTreeSet::new();
        // One of another pid namespace reads as 0.
        for pid in pids.iter().copied().filter(|pid| 0 < *pid) {
            match refuse::look(pid, &self.support) {
                Ok(looked) => {
                    if let Some(failure) = looked.forbidden {
                        return Err(failure);
                    }
                    sockets.extend(looked.sockets);
                }
                // It has ended since the cgroup was read.
                Err(error) if error.tells_of_end() || task::has_ended(pid) => {}
                Err(error) => return Err(failed_to_track(&error)),
            }
        }
        if let Some(connections) = &self.connections {
            let holds = |inode| sockets.contains(&inode);
            loopback::check(connections, self.root, &pids, holds)?;
        }
        Ok(())
    }

    /// Looks, scans, and looks again: what was there at either end fails the scan.
    pub fn around<T>(&self, scan: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
        self.look()?;
        let scanned = scan()?;
        self.look()?;
        Ok(scanned)
    }

    /// Begins a look on a thread of its own, for [`Looking::end`] to wait for.
    pub fn begin(self) -> Looking {
        Looking(tokio::task::spawn_blocking(move || self.look()))
    }
}

/// A look under way.
#[derive(Debug)]
pub struct Looking(tokio::task::JoinHandle<Result<(), Failure>>);

impl Looking {
    /// What it found.
    pub async fn end(self) -> Result<(), Failure> {
        self.0.await.map_err(|error| internal(&error))?
    }
}

/// Refuses what cannot be tracked, before it is: everything, also what shows in smaps alone.
pub fn check_trackable(pid: i32, root: i32, support: &Support) -> Result<(), Failure> {
    match refuse::find(pid, support) {
        Ok(None) => Ok(()),
        Ok(Some(failure)) => Err(failure),
        // It has ended since the tree was read.
        Err(error) if pid != root && (error.tells_of_end() || task::has_ended(pid)) => Ok(()),
        Err(error) => Err(failed_to_track(&error)),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::migration::source::site::{Asked, Site, SourceNode};
    use crate::migration::source::state::{SiteState, encode_state};
    use crate::runtime::identity::Identity;
    use crate::runtime::kind::Kind;
    use pageferry_cgroup::freezer::FreezerRoot;
    use pageferry_cgroup::hierarchies::Hierarchies;
    use pageferry_pages::track::tree::Tree;
    use pageferry_pages::track::{ATTEMPTS, STOP_MAX, Space, TrackOptions};
    use pageferry_proto::id::{Generation, MigrationId, Round, WorkloadName};
    use pageferry_proto::migration::policy::Policy;
    use pageferry_proto::wire::code::ErrorCode;
    use pageferry_trial::{self as trial, Trial};
    use tokio::sync::watch;

    /// The other process of these tests.
    #[test]
    fn workload() {
        trial::obey();
    }

    /// A tracked process in a freezer cgroup, which is thawed and removed on drop.
    struct Tracked {
        trial: Option<Trial>,
        space: Option<Space>,
        site: Option<Site>,
        lookout: Lookout,
    }

    impl Tracked {
        fn start(name: &str) -> Self {
            let trial = Trial::start("migration::source::tracking::lookout::tests::workload");
            let name = format!("test-{name}-{}", std::process::id());
            let freezer = FreezerRoot::detect().unwrap().plan(&name);
            freezer.make().unwrap();
            freezer.adopt(|| Ok(vec![trial.pid()])).unwrap();
            let support = Support::probe().unwrap();
            let options = TrackOptions {
                support: support.clone(),
                tree: Vec::new(),
                stop_max: 10 * STOP_MAX,
                attempts: ATTEMPTS,
            };
            let lookout = Lookout {
                root: trial.pid(),
                support,
                freezer,
                connections: None,
            };
            Self {
                space: Some(Space::attach(trial.pid(), &options).unwrap()),
                trial: Some(trial),
                site: None,
                lookout,
            }
        }

        /// One scan as a site makes it, with something happening before or after the memory is
        /// gone through.
        fn scan(
            &mut self,
            before: impl FnOnce(&mut Trial),
            after: impl FnOnce(&mut Trial),
        ) -> Result<(), ErrorCode> {
            let (trial, space) = (self.trial.as_mut().unwrap(), self.space.as_mut().unwrap());
            let scanned = self.lookout.around(|| {
                before(trial);
                let scanned = space.scan().map_err(|error| failed_to_track(&error))?;
                after(trial);
                Ok(scanned)
            });
            scanned.map(drop).map_err(|failure| failure.code())
        }

        /// From now on it is a site's, as between two rounds.
        async fn give_to_site(&mut self, cancelled: watch::Receiver<bool>) {
            let root = self.lookout.root;
            let identity = Identity::of(root).unwrap();
            let state = SiteState {
                kind: Kind::of(&WorkloadName::Process(root)).unwrap(),
                started: identity.started,
                boot: identity.boot,
                freezer: self.lookout.freezer.path().to_owned(),
                ports: Vec::new(),
                markers: Vec::new(),
                asked: Asked::default(),
            };
            let node = SourceNode {
                criu: PathBuf::new(),
                view_library: PathBuf::new(),
                tracer: true,
                criu_version: 0,
                migrations: PathBuf::new(),
                freezers: FreezerRoot::detect().unwrap(),
                hierarchies: Hierarchies::default(),
                support: self.lookout.support.clone(),
                workers: 1,
                eager_memory_max: 0,
            };
            let (id, state) = (MigrationId::new([1; 16]), encode_state(&state).unwrap());
            let site = Site::recover(node, id, Policy::DEFAULT, (&state, false), cancelled).await;
            let mut site = site.unwrap();
            let tree = Tree::read(root).unwrap();
            let space = self.space.take().unwrap();
            site.tracking.spaces.insert(tree.spaces[0].id, space);
            self.site = Some(site);
        }

        fn tell(&mut self, order: &str) -> String {
            self.trial.as_mut().unwrap().tell(order)
        }
    }

    impl Drop for Tracked {
        fn drop(&mut self) {
            let _ = self.lookout.freezer.thaw();
            drop((self.site.take(), self.space.take(), self.trial.take()));
            let _ = self.lookout.freezer.remove();
        }
    }

    fn direct() -> String {
        format!("open-direct {}", std::env::current_exe().unwrap().display())
    }

    #[test]
    fn direct_io_that_was_open_before_or_after_a_scan_ends_the_migration() {
        let mut tracked = Tracked::start("look-after");
        assert_eq!(tracked.scan(|_| (), |_| ()), Ok(()));
        let begins = |trial: &mut Trial| drop(trial.tell(&direct()));
        assert_eq!(tracked.scan(begins, |_| ()), Err(ErrorCode::DirectIo));
        // Open at the first look, read from and closed while the memory was gone through.
        let mut tracked = Tracked::start("look-before");
        let path = std::env::current_exe().unwrap();
        let number = tracked.tell(&format!("open {}", path.display()));
        tracked.tell(&format!("make-direct {number}"));
        let ends = |trial: &mut Trial| drop(trial.tell(&format!("close {number}")));
        assert_eq!(tracked.scan(|_| (), ends), Err(ErrorCode::DirectIo));
        tracked.tell(&format!("close {number}"));
        assert_eq!(tracked.scan(|_| (), |_| ()), Ok(()));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_frozen_tree_is_looked_at_once_more() {
        let mut tracked = Tracked::start("look-frozen");
        assert_eq!(tracked.scan(|_| (), |_| ()), Ok(()));
        let (_cut, cancelled) = watch::channel(false);
        tracked.give_to_site(cancelled).await;
        tracked.tell(&direct());
        tracked.lookout.freezer.freeze().unwrap();
        let site = tracked.site.as_mut().unwrap();
        let found = site.finish(Generation::FIRST, Round::FIRST).await;
        let found = found.unwrap_err();
        assert_eq!(found.code(), ErrorCode::DirectIo, "{found}");
        tracked.lookout.freezer.thaw().unwrap();
        assert_eq!(tracked.tell("signals"), "0");
    }
}
