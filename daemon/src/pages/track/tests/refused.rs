//! What forbids tracking, and the tree of a workload.

use pageferry_proto::wire::code::ErrorCode;

use super::*;
use crate::pages::track::{refuse, tree::Tree};

fn refusal(orders: &[&str]) -> Option<ErrorCode> {
    let mut trial = start();
    for order in orders {
        trial.tell(order);
    }
    let found = refuse::find(trial.pid()).unwrap();
    if let Some(failure) = &found {
        assert!(
            failure.text().contains(&format!("process {}", trial.pid())),
            "{failure}"
        );
    }
    found.map(|failure| failure.code())
}

#[test]
fn an_ordinary_process_is_not_refused() {
    assert_eq!(refusal(&["threads 3"]), None);
}

#[test]
fn direct_io_is_refused() {
    let executable = std::env::current_exe().unwrap();
    let order = format!("open-direct {}", executable.display());
    assert_eq!(refusal(&[&order]), Some(ErrorCode::DirectIo));
}

#[test]
fn an_io_uring_is_refused() {
    assert_eq!(refusal(&["io-uring"]), Some(ErrorCode::IoUring));
}

#[test]
fn a_refused_io_uring_says_what_helps() {
    let mut trial = start();
    trial.tell("io-uring");
    let found = refuse::find(trial.pid()).unwrap().unwrap();
    assert!(found.text().contains("io_uring_setup"), "{found}");
}

#[test]
fn a_userfaultfd_is_refused() {
    assert_eq!(refusal(&["userfaultfd"]), Some(ErrorCode::Untrackable));
}

#[test]
fn secret_memory_is_refused() {
    assert_eq!(
        refusal(&["map 0x200000000000 4 secret"]),
        Some(ErrorCode::Secretmem)
    );
}

#[test]
fn huge_pages_of_hugetlbfs_are_refused() {
    // Without a reservation the mapping itself needs no huge page to exist.
    assert_eq!(
        refusal(&["map 0x200000000000 512 huge"]),
        Some(ErrorCode::Hugetlb)
    );
}

#[test]
fn a_traced_process_is_refused() {
    let trial = start();
    crate::sys::ptrace::seize(trial.pid()).unwrap();
    let found = refuse::find(trial.pid()).unwrap().unwrap();
    assert_eq!(found.code(), ErrorCode::Traced);
}

#[test]
fn a_tree_knows_children_threads_and_spaces() {
    let mut trial = start();
    trial.tell("threads 3");
    let child: i32 = trial.tell("fork").parse().unwrap();
    let sharer = trial.tell("clone-vm");
    let sharer: i32 = sharer.split(' ').next().unwrap().parse().unwrap();
    let tree = Tree::read(trial.pid()).unwrap();
    assert_eq!(tree.tasks[0].pid, trial.pid());
    assert!(5 <= tree.tasks[0].threads.len());
    assert_eq!(
        tree.tasks.iter().map(|task| task.parent).max(),
        Some(trial.pid())
    );
    let leaders: Vec<i32> = tree.spaces.iter().map(|space| space.leader).collect();
    assert_eq!(leaders, [trial.pid(), child]);
    assert_eq!(tree.spaces[0].sharers, [sharer]);
    trial::kill(child);
    trial::kill(sharer);
}
