//! The loopback of what is restored: shut from the restore on, open when it runs, whoever dies.

use std::os::fd::{AsFd, OwnedFd};
use std::process::Command as Program;
use std::time::Instant;

use pageferry_pager::client::ClientError;
use pageferry_pager::message::Namespace;
use pageferry_sys::gate::Gate;
use pageferry_sys::namespace::{NamespaceKind, create, run_inside};

use crate::criu::{Fail, passes_loopback};
use crate::lab::{DEADLINE, Lab, Tree};
use crate::{MIB, filled};

/// Nobody here marks anything.
const MARK: i32 = 1;

/// A network of which only `lo` is there, and up.
fn network() -> OwnedFd {
    let net = create(&[NamespaceKind::Net]).unwrap().remove(0);
    let up = || {
        let set = Program::new("ip")
            .args(["link", "set", "lo", "up"])
            .status();
        assert!(set.unwrap().success());
    };
    inside(&net, up);
    net
}

fn inside<T: Send>(net: &OwnedFd, what: impl FnOnce() -> T + Send) -> T {
    run_inside(&[(NamespaceKind::Net, net.as_fd())], what).unwrap()
}

/// A pager that has been given a gate in `net`, and nobody else has it.
async fn gated(net: &OwnedFd, tree: &Tree) -> Lab {
    let mut lab = Lab::start().await;
    let gate = inside(net, || Gate::attach(1, MARK)).unwrap();
    lab.client
        .lo_gate(&gate.descriptors().unwrap())
        .await
        .unwrap();
    lab.plan(tree).await;
    lab
}

fn probing() -> Tree {
    Tree {
        probes_loopback: true,
        ..Tree::of(MIB)
    }
}

async fn until_open(net: &OwnedFd) {
    let deadline = Instant::now() + DEADLINE;
    while !inside(net, passes_loopback) {
        assert!(Instant::now() < deadline, "loopback stays shut");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn loopback_is_shut_for_the_restore_and_opens_before_criu_is_answered() {
    let (net, tree) = (network(), probing());
    let mut lab = gated(&net, &tree).await;
    let namespaces = [(Namespace::Net, net.as_fd())];
    let request = lab.request(&tree);
    assert!(inside(&net, passes_loopback), "nothing is restored yet");
    lab.client.restore(request, &namespaces, &[]).await.unwrap();
    assert!(!inside(&net, passes_loopback), "it is held");
    lab.client.go().await.unwrap();
    assert!(inside(&net, passes_loopback), "it runs");
    filled(&mut lab).await;
}

#[tokio::test]
async fn loopback_opens_when_what_is_held_is_discarded_or_dies() {
    for fail in [Fail::Never, Fail::Held] {
        let (net, tree) = (network(), Tree { fail, ..probing() });
        let lab = gated(&net, &tree).await;
        let namespaces = [(Namespace::Net, net.as_fd())];
        let restored = lab.client.restore(lab.request(&tree), &namespaces, &[]);
        let restored = restored.await;
        if fail == Fail::Never {
            restored.unwrap();
            assert!(!inside(&net, passes_loopback), "it is held");
            lab.client.discard().await.unwrap();
        }
        // One that dies when it is held may do so before that is said.
        until_open(&net).await;
    }
}

#[tokio::test]
async fn loopback_opens_when_the_pager_dies() {
    let (net, tree) = (network(), probing());
    let lab = gated(&net, &tree).await;
    let namespaces = [(Namespace::Net, net.as_fd())];
    let restored = lab.client.restore(lab.request(&tree), &namespaces, &[]);
    restored.await.unwrap();
    assert!(!inside(&net, passes_loopback), "it is held");
    lab.kill_pager();
    until_open(&net).await;
}

#[tokio::test]
async fn what_is_no_gate_is_refused() {
    let lab = Lab::start().await;
    let net = network();
    let gate = lab.client.lo_gate(&[net.as_fd(), net.as_fd()]).await;
    assert!(matches!(gate, Err(ClientError::Failed { .. })), "{gate:?}");
    lab.client.discard().await.unwrap();
}
