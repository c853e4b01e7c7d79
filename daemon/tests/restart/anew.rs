//! Containers in a journal, and what has become of their cgroups since.

use std::fs;

use pageferry_cgroup::freezer::Freezer;
use pageferry_proto::migration::policy::Policy;
use pageferry_proto::migration::record::{DriverState, Entry, OfferedEntry};
use pageferry_proto::migration::status::Phase;

use crate::id;
use crate::node::{ANY_PORT, Node, Sleeper, name, status, until};

/// The journal of a source of which nothing was decided; the container has a cgroup that is known.
fn offered(freezer: &Freezer) -> Vec<Entry> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let boot = boot.trim_end();
    let state = format!(
        r#"{{"kind":{{"container":{{"runtime":"runc","id":"no-such","root":{ROOT},"started":1,
            "boot":"{boot}","bundle":"/b"}}}},"started":1,"boot":"{boot}",
            "freezer":"{}","freezer_id":{},
            "ports":[],"markers":[],"asked":{{"shared":[],"force_cpu":false,"force_ipc":false,
            "network":null,"instead_of":null}}}}"#,
        freezer.path().display(),
        serde_json::to_string(&freezer.id()).unwrap()
    );
    vec![Entry::Offered(OfferedEntry {
        workload: "runc/no-such".parse().unwrap(),
        peer: name("a"),
        policy: Policy::DEFAULT,
        hold: false,
        state: DriverState::new(state.into_bytes()).unwrap(),
    })]
}

/// No process has this pid.
const ROOT: i32 = i32::MAX;

fn known(node: &Node, name: &str) -> Freezer {
    let freezer = node.freezer(name);
    freezer.make().unwrap();
    freezer.known().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_begun_anew_is_left_alone_and_one_that_is_held_goes_back() {
    let node = Node::new();
    let (stranger, left) = (Sleeper::start(), Sleeper::start());
    let before = known(&node, "anew");
    node.write(id(1), &offered(&before), 0);
    fs::remove_dir(before.path()).unwrap();
    let anew = known(&node, "anew");
    anew.adopt(|| Ok(vec![stranger.pid()])).unwrap();
    anew.freeze().unwrap();
    let held = known(&node, "held");
    held.adopt(|| Ok(vec![left.pid()])).unwrap();
    held.freeze().unwrap();
    let within = held.hold_within(&[left.pid()]).unwrap();
    // As `runc resume` does.
    held.thaw().unwrap();
    assert!(within.is_frozen().unwrap());
    node.write(id(2), &offered(&held), 0);
    let nowhere = ANY_PORT.parse().unwrap();
    let registry = node.start(node.endpoint("b", &[("a", nowhere)])).await;
    for number in [1, 2] {
        let ended = status(&registry, id(number), |known| known.status.phase.is_final()).await;
        assert_eq!(ended.status.phase, Phase::Aborted);
    }
    until("what was held is where it was, and runs", || {
        !within.exists() && !held.is_frozen().unwrap()
    })
    .await;
    assert_eq!(held.processes().unwrap(), [left.pid()]);
    assert!(anew.is_frozen().unwrap(), "somebody else's was thawed");
    anew.thaw().unwrap();
}
