//! What forbids tracking, and the tree of a workload.

use pageferry_proto::wire::code::{ErrorCode, Failure};

use super::*;
use crate::track::{refuse, tree::Tree};

/// By the kernel's iterators, where there are any, and by `/proc` alone: both must say the same.
fn supports() -> [Support; 2] {
    let support = Support::probe().unwrap();
    let without = Support {
        files: None,
        threads: None,
        calls: None,
        ..support.clone()
    };
    [support, without]
}

fn refusal(orders: &[&str]) -> Option<ErrorCode> {
    let mut trial = start();
    for order in orders {
        trial.tell(order);
    }
    let find = |support| refuse::find(trial.pid(), &support).unwrap();
    let found = supports().map(find);
    assert_eq!(found[0], found[1]);
    if let Some(failure) = &found[0] {
        assert!(
            failure.text().contains(&format!("process {}", trial.pid())),
            "{failure}"
        );
    }
    found[0].as_ref().map(Failure::code)
}

fn looks(trial: &Trial) -> Option<ErrorCode> {
    let look = |support| refuse::look(trial.pid(), &support).unwrap().forbidden;
    let found = supports().map(look);
    assert_eq!(found[0], found[1]);
    found[0].as_ref().map(Failure::code)
}

/// Which descriptor a look sees that is for direct I/O. That forbids nothing.
fn direct(trial: &Trial) -> Option<String> {
    let looked = supports().map(|support| refuse::look(trial.pid(), &support).unwrap());
    assert!(looked.iter().all(|looked| looked.forbidden.is_none()));
    let [one, other] = looked.map(|looked| looked.direct);
    assert_eq!(one, other);
    one
}

fn executable() -> String {
    std::env::current_exe().unwrap().display().to_string()
}

#[test]
fn an_ordinary_process_is_not_refused() {
    assert_eq!(refusal(&["threads 3"]), None);
}

#[test]
fn direct_io_is_seen_and_not_refused() {
    let order = format!("open-direct {}", executable());
    assert_eq!(refusal(&[&order]), None);
    let mut trial = start();
    assert_eq!(direct(&trial), None);
    trial.tell(&order);
    let seen = direct(&trial).unwrap();
    let begin = format!("process {} has a file open for direct I/O", trial.pid());
    assert!(seen.starts_with(&begin), "{seen}");
    assert!(seen.ends_with(&executable()), "{seen}");
}

#[test]
fn what_is_refused_is_refused_also_beside_direct_io() {
    let order = format!("open-direct {}", executable());
    assert_eq!(refusal(&[&order, "io-uring"]), Some(ErrorCode::IoUring));
}

#[test]
fn an_io_uring_is_refused() {
    assert_eq!(refusal(&["io-uring"]), Some(ErrorCode::IoUring));
}

/// `/proc` does not tell of it.
#[test]
fn an_io_uring_that_only_a_thread_knows_is_refused() {
    let support = Support::probe().unwrap();
    if support.threads.is_none() {
        eprintln!("this kernel does not tell its types");
        return;
    }
    let mut trial = start();
    let looked = || refuse::look(trial.pid(), &support).unwrap().forbidden;
    assert_eq!(looked(), None);
    trial.tell("io-uring-registered");
    let found = refuse::look(trial.pid(), &support)
        .unwrap()
        .forbidden
        .unwrap();
    assert_eq!(found.code(), ErrorCode::IoUring);
    assert!(found.text().contains("registered with itself"), "{found}");
}

#[test]
fn a_refused_io_uring_says_what_helps() {
    let mut trial = start();
    trial.tell("io-uring");
    let found = refuse::find(trial.pid(), &Support::probe().unwrap())
        .unwrap()
        .unwrap();
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
    pageferry_sys::ptrace::seize(trial.pid()).unwrap();
    assert_eq!(looks(&trial), Some(ErrorCode::Traced));
}

#[test]
fn a_descriptor_that_a_thread_has_for_itself_is_seen() {
    let mut trial = start();
    trial.tell(&format!("open-direct-in-thread {}", executable()));
    assert!(direct(&trial).is_some());
}

#[test]
fn a_harmless_descriptor_that_turns_to_direct_io_is_seen_by_the_next_look() {
    let mut trial = start();
    let number = trial.tell(&format!("open {}", executable()));
    assert_eq!(direct(&trial), None);
    trial.tell(&format!("make-direct {number}"));
    assert!(direct(&trial).is_some());
    trial.tell(&format!("close {number}"));
    assert_eq!(direct(&trial), None);
}

#[test]
fn a_look_tells_the_inodes_of_all_sockets() {
    let (mut trial, other) = (start(), start());
    let inodes = trial.tell("sockets");
    let inodes: Vec<u64> = inodes
        .split(' ')
        .map(|inode| inode.parse().unwrap())
        .collect();
    assert_eq!(inodes.len(), 2);
    for support in supports() {
        let sockets = refuse::look(trial.pid(), &support).unwrap().sockets;
        assert!(inodes.iter().all(|inode| sockets.contains(inode)));
        let sockets = refuse::look(other.pid(), &support).unwrap().sockets;
        assert!(!inodes.iter().any(|inode| sockets.contains(inode)));
    }
}

fn forbidden<T: std::fmt::Debug>(scanned: Result<T, TrackError>) -> ErrorCode {
    let error = scanned.unwrap_err();
    assert!(matches!(error, TrackError::Forbidden { .. }), "{error:?}");
    error.code()
}

#[test]
fn a_mapping_that_forbids_tracking_and_came_after_it_began_fails_the_next_scan() {
    for (order, code) in [
        ("aio", ErrorCode::DirectIo),
        ("map 0x200000000000 4 secret", ErrorCode::Secretmem),
    ] {
        let mut trial = start();
        let mut space = attach(&trial);
        space.scan().unwrap();
        trial.tell(order);
        assert_eq!(forbidden(space.scan()), code, "{order}");
    }
}

#[test]
fn what_forbids_tracking_and_came_after_the_last_round_fails_the_final_scan() {
    for (order, code) in [
        ("aio", ErrorCode::DirectIo),
        ("map 0x200000000000 512 huge", ErrorCode::Hugetlb),
    ] {
        let mut trial = start();
        let mut space = attach(&trial);
        space.record_smaps().unwrap();
        space.scan().unwrap();
        trial.tell(order);
        let _frozen = Frozen::new(trial.pid());
        assert_eq!(forbidden(space.final_scan()), code, "{order}");
    }
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

#[test]
fn semaphores_that_are_changed_when_a_process_ends_are_told_from_a_list_that_is_empty() {
    let [support, without] = supports();
    if support.threads.is_none() {
        eprintln!("this kernel does not tell of threads");
        return;
    }
    let mut trial = start();
    // With the second thread a process gets such a list.
    trial.tell("threads 3");
    assert_eq!(support.undoes(trial.pid()), Some(false));
    let set = trial.tell("ipc undo");
    let told = support.undoes(trial.pid());
    let mut remove = std::process::Command::new("ipcrm");
    assert!(remove.args(["-s", &set]).status().unwrap().success());
    assert_eq!(told, Some(true));
    assert_eq!(support.undoes(trial.pid()), Some(false));
    assert_eq!(without.undoes(trial.pid()), None);
}
