//! Which pids are whose: those of workloads, and those that nodes hand out to their own processes.
//!
//! What is born at one node is never in the way of what comes from another.

/// The pid of the root of workload `number`: below the smallest `pid_max` (32768), and outside what
/// nodes hand out.
pub fn of_workload(number: usize) -> i32 {
    let number = i32::try_from(number).expect("the lab bounds its workloads");
    WORKLOADS_FIRST + number * WORKLOAD_STEP
}

/// Whether a process that leads a session is the root of a workload, by its pid.
pub fn is_of_workload(pid: i32) -> bool {
    (WORKLOADS_FIRST..ABOVE).contains(&pid)
}

/// Where node `index` of `nodes` begins to count. Where pid namespaces have a `pid_max` of their
/// own (since Linux 6.14) the ranges are above those of workloads, as they would be: children come
/// after their parents.
pub fn first_of_node(index: usize, nodes: usize) -> i32 {
    let (index, nodes) = (i32::try_from(index), i32::try_from(nodes.max(1)));
    let index = index.expect("the lab bounds its nodes");
    if has_own_pid_max() {
        return ABOVE * (index + 1);
    }
    NODES_FIRST + index * (NODES / nodes.expect("the lab bounds its nodes"))
}

/// Whether a node that begins to count at `first` needs more pids than the smallest `pid_max`.
pub fn is_above(first: i32) -> bool {
    ABOVE <= first
}

fn has_own_pid_max() -> bool {
    let release = nix::sys::utsname::uname().map(|name| name.release().to_owned());
    let release = release.unwrap_or_default().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (6, 14) <= (major, minor),
        _ => false,
    }
}

const WORKLOADS_FIRST: i32 = 10_000;
/// Room to see which workload a pid belongs to.
const WORKLOAD_STEP: i32 = 100;
/// Where ranges above workloads begin, and how large they are.
const ABOVE: i32 = 100_000;
/// A kernel whose counter starts anew begins at 300.
const NODES_FIRST: i32 = 1_000;
/// Up to where workloads begin.
const NODES: i32 = WORKLOADS_FIRST - NODES_FIRST;
