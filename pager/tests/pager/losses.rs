//! What is lost and what is not: the daemon, CRIU and the pager go away in every state.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry_pager::client::{ClientError, Notice, PagerClient, Remains};
use pageferry_pager::message::{State, Status};
use pageferry_proto::wire::code::ErrorCode;

use crate::criu::Fail;
use crate::lab::{DEADLINE, FIRST_PAGE, Lab, Tree};
use crate::workload::Command;
use crate::{MIB, check, filled};

impl Lab {
    /// The daemon goes away and comes back.
    fn reconnect(&mut self) {
        self.disconnect();
        let (client, notices) = PagerClient::connect(self.directory.path()).unwrap();
        (self.client, self.notices) = (Arc::new(client), notices);
    }

    /// The daemon goes away.
    fn disconnect(&mut self) {
        if let Some(going) = self.going.take() {
            going.abort();
        }
        self.client.close();
    }

    async fn restore_code(&self, tree: &Tree) -> ErrorCode {
        let restored = self.client.restore(self.request(tree), &[], &[]).await;
        match restored.unwrap_err() {
            ClientError::Failed {
                failure,
                after_go: false,
            } => failure.code(),
            other => panic!("{other}"),
        }
    }

    /// Looks again and again until `what` holds.
    pub async fn until(&self, what: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !what(self) {
            assert!(Instant::now() < deadline, "it does not come about");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    fn freezer_state(&self) -> String {
        let v1 = fs::read_to_string(self.cgroup.join("freezer.state"));
        let v2 = || fs::read_to_string(self.cgroup.join("cgroup.events"));
        v1.or_else(|_| v2()).unwrap()
    }
}

pub fn is_frozen(lab: &Lab) -> bool {
    let state = lab.freezer_state();
    state.contains("FROZEN") || state.contains("frozen 1")
}

#[tokio::test]
async fn a_pager_killed_in_the_fill_leaves_its_tree_frozen_and_no_zero_is_read() {
    let (lab, mut peers) = Lab::running(&Tree::of(4 * MIB).by_hand()).await;
    peers[0].ok(&Command::Fork).await;
    let mut lab = lab;
    let mut child = lab.peer("child-of-77").await;
    peers[0].ok(&check(FIRST_PAGE, 8)).await;
    lab.kill_pager();
    // Both are told to read what nobody can give them now.
    peers[0].tell(&check(FIRST_PAGE, MIB)).await;
    child.tell(&check(FIRST_PAGE, MIB)).await;
    lab.until(is_frozen).await;
    // It says so as soon as it has frozen them.
    let says_so = |lab: &Lab| {
        let remains = Remains::read(lab.directory.path());
        matches!(remains, Ok(Remains::FillLost(_)))
    };
    lab.until(says_so).await;
    assert_eq!(lab.notice().await, Notice::Lost);
    // Let run again, they wait: the descriptors are still held.
    let _ = fs::write(lab.cgroup.join("freezer.state"), "THAWED");
    let _ = fs::write(lab.cgroup.join("cgroup.freeze"), "0");
    lab.until(|lab| !is_frozen(lab)).await;
    let a_while = Duration::from_millis(200);
    assert!(
        !peers[0].has_answered(a_while).await,
        "the parent read something"
    );
    assert!(
        !child.has_answered(a_while).await,
        "the child read something"
    );
}

#[tokio::test]
async fn a_pager_killed_while_it_holds_a_tree_leaves_nothing_of_it() {
    let lab = Lab::held(&Tree::of(MIB)).await;
    assert!(!lab.processes().is_empty());
    lab.kill_pager();
    lab.until(|lab| lab.processes().is_empty()).await;
    let lost = |lab: &Lab| Remains::read(lab.directory.path()).unwrap();
    lab.until(|lab| lost(lab) != Remains::Nothing).await;
    assert!(matches!(lost(&lab), Remains::RestoreLost(_)));
}

#[tokio::test]
async fn a_daemon_that_comes_back_finds_the_tree_held_and_can_let_it_go() {
    let tree = Tree::of(MIB).by_hand();
    let mut lab = Lab::held(&tree).await;
    lab.reconnect();
    assert_eq!(lab.status().await.state, State::Held);
    let again = lab.client.restore(lab.request(&tree), &[], &[]);
    assert!(0 < again.await.unwrap().root_pid);
    let client = lab.client.clone();
    // Both are said before the end of the fill can be, which ends the pager.
    let (first, second, ()) = tokio::join!(client.go(), client.go(), async {
        lab.peer("criu").await.line().await;
    });
    first.unwrap();
    second.unwrap();
    let mut workload = lab.peer("77").await;
    filled(&mut lab).await;
    workload.ok(&check(FIRST_PAGE, MIB)).await;
}

#[tokio::test]
async fn a_daemon_that_goes_away_after_go_is_not_missed() {
    let (mut lab, mut peers) = Lab::running(&Tree::of(MIB).by_hand()).await;
    lab.reconnect();
    let Status { state, watched, .. } = lab.status().await;
    assert_eq!((state, watched), (State::Resuming, true));
    let client = lab.client.clone();
    // Asked first: so little memory is filled, and the pager gone, before a task has its turn.
    let (went, ()) = tokio::join!(client.go(), async {
        let mut criu = lab.peer("criu").await;
        criu.line().await;
    });
    went.unwrap();
    filled(&mut lab).await;
    peers[0].ok(&check(FIRST_PAGE, MIB)).await;
}

#[tokio::test]
async fn a_fill_ends_without_a_daemon_and_leaves_its_mark() {
    let (mut lab, mut peers) = Lab::running(&Tree::of(MIB).by_hand()).await;
    let mut criu = lab.peer("criu").await;
    lab.disconnect();
    criu.line().await;
    lab.until(|lab| matches!(Remains::read(lab.directory.path()), Ok(Remains::Filled(_))))
        .await;
    peers[0].ok(&check(FIRST_PAGE, MIB)).await;
    // It waits for somebody to tell it to, and ends.
    lab.reconnect();
    assert_eq!(filled(&mut lab).await, MIB);
    assert_eq!(lab.notice().await, Notice::Lost);
}

#[tokio::test]
async fn a_tree_is_discarded_in_every_state_before_go_and_in_none_after() {
    let lab = Lab::start().await;
    lab.client.discard().await.unwrap();
    let lab = Lab::held(&Tree::of(MIB)).await;
    lab.client.discard().await.unwrap();
    assert!(lab.processes().is_empty());
    let hanging = Tree {
        fail: Fail::Hang,
        ..Tree::of(MIB)
    };
    let mut lab = Lab::start().await;
    lab.plan(&hanging).await;
    let client = lab.client.clone();
    let request = lab.request(&hanging);
    let restoring = tokio::spawn(async move { client.restore(request, &[], &[]).await });
    lab.until(|lab| 1 < lab.processes().len()).await;
    lab.client.discard().await.unwrap();
    assert!(lab.processes().is_empty());
    let error = restoring.await.unwrap().unwrap_err();
    assert!(
        matches!(
            error,
            ClientError::Failed {
                after_go: false,
                ..
            }
        ),
        "{error}"
    );
    let (lab, _peers) = Lab::running(&Tree::of(MIB).by_hand()).await;
    let error = lab.client.discard().await.unwrap_err();
    assert!(
        matches!(error, ClientError::Failed { after_go: true, .. }),
        "{error}"
    );
    assert!(!lab.processes().is_empty());
}

#[tokio::test]
async fn a_criu_that_is_stopped_in_a_restore_is_discarded_with_everything() {
    let tree = Tree {
        fail: Fail::Stop,
        ..Tree::of(MIB)
    };
    let mut lab = Lab::start().await;
    lab.plan(&tree).await;
    let client = lab.client.clone();
    let request = lab.request(&tree);
    let restoring = tokio::spawn(async move { client.restore(request, &[], &[]).await });
    let is_stopped = |lab: &Lab| {
        let mut pids = lab.processes().into_iter();
        pids.any(|pid| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.contains(") T ")
        })
    };
    lab.until(is_stopped).await;
    let discarded = tokio::time::timeout(DEADLINE, lab.client.discard());
    discarded.await.expect("a discard ends").unwrap();
    assert!(lab.processes().is_empty());
    restoring.await.unwrap().unwrap_err();
    assert_eq!(lab.notice().await, Notice::Lost);
}

#[tokio::test]
async fn a_restore_that_fails_leaves_nothing_and_says_why() {
    let tree = Tree {
        fail: Fail::Early,
        ..Tree::of(MIB)
    };
    let mut lab = Lab::start().await;
    lab.plan(&tree).await;
    assert_eq!(lab.restore_code(&tree).await, ErrorCode::CriuFailed);
    assert!(lab.processes().is_empty());
    assert_eq!(lab.status().await.state, State::Failed);
    // Asked again it says the same, and it can be discarded.
    assert_eq!(lab.restore_code(&tree).await, ErrorCode::CriuFailed);
    lab.client.discard().await.unwrap();
}

#[tokio::test]
async fn a_criu_that_dies_while_the_tree_is_held_takes_the_tree_along() {
    let tree = Tree {
        fail: Fail::Held,
        ..Tree::of(MIB)
    };
    let mut lab = Lab::start().await;
    lab.plan(&tree).await;
    // It may be gone before the tree counts as held.
    let restored = lab.client.restore(lab.request(&tree), &[], &[]).await;
    if restored.is_ok() {
        let notice = lab.notice().await;
        assert!(
            matches!(
                notice,
                Notice::Failed {
                    after_go: false,
                    ..
                }
            ),
            "{notice:?}"
        );
    }
    assert!(lab.processes().is_empty());
    let error = lab.client.go().await.unwrap_err();
    assert!(
        matches!(
            error,
            ClientError::Failed {
                after_go: false,
                ..
            }
        ),
        "{error}"
    );
}

#[tokio::test]
async fn a_criu_that_fails_after_go_is_told_as_such() {
    let tree = Tree {
        fail: Fail::Late,
        ..Tree::of(MIB)
    };
    let mut lab = Lab::held(&tree).await;
    match lab.client.go().await.unwrap_err() {
        ClientError::Failed { failure, after_go } => {
            assert_eq!((failure.code(), after_go), (ErrorCode::CriuFailed, true));
        }
        other => panic!("{other}"),
    }
    // Nothing of it is left to be filled.
    let notice = lab.notice().await;
    assert!(matches!(notice, Notice::Filled(_)), "{notice:?}");
}

#[tokio::test]
async fn a_plan_that_does_not_fit_the_tree_is_refused_before_it_runs() {
    // One space more than CRIU restores.
    let one = Tree::of(MIB);
    let two = Tree {
        spaces: vec![MIB, MIB],
        ..one.clone()
    };
    let mut lab = Lab::start().await;
    lab.plan(&two).await;
    assert_eq!(lab.restore_code(&one).await, ErrorCode::LedgerIncomplete);
    // One space less.
    let mut lab = Lab::start().await;
    lab.plan(&one).await;
    assert_eq!(lab.restore_code(&two).await, ErrorCode::LedgerIncomplete);
    let mut lab = Lab::start().await;
    lab.plan(&one).await;
    let mut request = lab.request(&two);
    request.spaces = 1;
    let error = lab.client.restore(request, &[], &[]).await.unwrap_err();
    let ClientError::Failed { failure, .. } = error else {
        panic!("{error}")
    };
    assert_eq!(failure.code(), ErrorCode::LedgerIncomplete);
    assert!(lab.processes().is_empty());
    // Pages where nothing is mapped.
    let mut lab = Lab::start().await;
    lab.plan(&Tree::of(2 * MIB)).await;
    assert_eq!(lab.restore_code(&one).await, ErrorCode::CriuFailed);
    assert!(lab.processes().is_empty());
}

#[tokio::test]
async fn questions_out_of_order_are_refused_and_change_nothing() {
    let lab = Lab::held(&Tree::of(MIB)).await;
    let store = fs::File::open("/dev/null").unwrap();
    let space = pageferry_proto::id::SpaceId(1);
    let fd = std::os::fd::AsFd::as_fd(&store);
    for error in [
        lab.client.space(space, fd).await.unwrap_err(),
        Lab::start().await.client.go().await.unwrap_err(),
    ] {
        let ClientError::Failed {
            failure,
            after_go: false,
        } = error
        else {
            panic!("{error}")
        };
        assert_eq!(failure.code(), ErrorCode::Unexpected);
    }
    assert_eq!(lab.status().await.state, State::Held);
}

#[tokio::test]
async fn a_signal_does_not_end_a_pager_that_holds_a_tree_and_ends_one_that_does_not() {
    use nix::sys::signal::{Signal, kill};
    let pid = |lab: &Lab| nix::unistd::Pid::from_raw(lab.pager);
    let lab = Lab::held(&Tree::of(MIB)).await;
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        kill(pid(&lab), signal).unwrap();
        assert_eq!(lab.status().await.state, State::Held);
    }
    let mut lab = Lab::start().await;
    kill(pid(&lab), Signal::SIGTERM).unwrap();
    assert_eq!(lab.notice().await, Notice::Lost);
}
