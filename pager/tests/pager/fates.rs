//! Who dies with whom: everybody in a cgroup is killed at once, as by the kernel for memory or by
//! `systemctl kill`, in each hierarchy in turn.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command as Program;
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry_cgroup::hierarchies::{Group, Groups, Hierarchies};
use pageferry_pager::client::{PagerClient, Remains};
use pageferry_pager::message::State;

use crate::lab::{DEADLINE, FIRST_PAGE, Lab, Tree, spawn};
use crate::losses::is_frozen;
use crate::{MIB, check, filled};

/// Kills everybody in this cgroup of one hierarchy; how many there were.
fn kill_all(folder: &Path) -> usize {
    let text = fs::read_to_string(folder.join("cgroup.procs")).unwrap();
    for pid in text.lines() {
        kill(Pid::from_raw(pid.parse().unwrap()), Signal::SIGKILL).unwrap();
    }
    text.lines().count()
}

/// How many hierarchies there are to kill in.
fn hierarchies() -> usize {
    let group = Hierarchies::detect().unwrap().group("unused");
    group.folders().len()
}

#[tokio::test]
async fn killing_the_pagers_cgroup_leaves_the_watcher_that_freezes_the_workload() {
    for index in 0..hierarchies() {
        let (lab, peers) = Lab::running(&Tree::of(MIB).by_hand()).await;
        assert_eq!(kill_all(&lab.groups.pager.folders()[index]), 1);
        lab.until(is_frozen).await;
        let says_so = |lab: &Lab| {
            let remains = Remains::read(lab.directory.path());
            matches!(remains, Ok(Remains::FillLost(_)))
        };
        lab.until(says_so).await;
        assert_eq!(lab.processes().len(), 2, "CRIU and the workload");
        drop(peers);
    }
}

#[tokio::test]
async fn killing_the_watchers_cgroup_leaves_the_pager_that_fills() {
    for index in 0..hierarchies() {
        let (mut lab, mut peers) = Lab::running(&Tree::of(MIB).by_hand()).await;
        assert!(lab.status().await.watched);
        assert_eq!(kill_all(&lab.groups.watcher.folders()[index]), 1);
        let deadline = Instant::now() + DEADLINE;
        while lab.status().await.watched {
            assert!(Instant::now() < deadline, "the watcher is not missed");
        }
        peers[0].ok(&check(FIRST_PAGE, 8)).await;
        lab.finish().await;
        filled(&mut lab).await;
        peers[0].ok(&check(FIRST_PAGE, MIB)).await;
    }
}

/// The life of a daemon that starts a pager and waits to be killed.
pub fn be_a_daemon(directory: &Path) {
    let groups: Vec<Vec<PathBuf>> =
        serde_json::from_str(&std::env::var("PAGER_TEST_GROUPS").unwrap()).unwrap();
    let [own, pager, watcher] = groups.try_into().unwrap();
    for file in own {
        fs::write(file, "0").unwrap();
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let mut spawn = spawn(directory, &Hierarchies::detect().unwrap().groups("unused"));
        (spawn.cgroup_procs, spawn.watcher_cgroup_procs) = (pager, watcher);
        let _held = PagerClient::spawn(&spawn).await.unwrap();
        fs::write(directory.join("started"), "").unwrap();
        std::future::pending::<()>().await;
    });
}

/// Cgroups that are emptied and removed, also when a test fails.
struct Killed(Vec<Group>);

impl Drop for Killed {
    fn drop(&mut self) {
        for group in &self.0 {
            group.kill();
        }
        for group in &self.0 {
            let _ = group.remove(DEADLINE);
        }
    }
}

#[tokio::test]
async fn killing_the_daemons_cgroup_leaves_pager_and_watcher() {
    let hierarchies = Hierarchies::detect().unwrap();
    for index in 0..hierarchies.group("unused").folders().len() {
        let directory = tempfile::Builder::new().prefix("pfp").tempdir().unwrap();
        let name = format!("test-daemon-{}-{index}", std::process::id());
        let Groups {
            tree: daemon,
            pager,
            watcher,
        } = hierarchies.groups(&name);
        let groups = Killed(vec![daemon, pager, watcher]);
        groups.0.iter().for_each(|group| group.make().unwrap());
        let files: Vec<_> = groups.0.iter().map(Group::procs_files).collect();
        let mut daemon = Program::new(std::env::current_exe().unwrap())
            .args(["--exact", "play_a_role", "--nocapture", "--quiet"])
            .env("PAGER_TEST_DAEMON", directory.path())
            .env("PAGER_TEST_GROUPS", serde_json::to_string(&files).unwrap())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + DEADLINE;
        while !directory.path().join("started").exists() {
            assert!(Instant::now() < deadline, "the pager is not started");
            tokio::task::yield_now().await;
        }
        assert_eq!(kill_all(&groups.0[0].folders()[index]), 1);
        assert!(!daemon.wait().unwrap().success());
        // Whoever shared its fate has been sent the signal before.
        let (client, _notices) = PagerClient::connect(directory.path()).unwrap();
        let status = client.status().await.unwrap();
        assert_eq!((status.state, status.watched), (State::Idle, true));
        client.discard().await.unwrap();
    }
}
