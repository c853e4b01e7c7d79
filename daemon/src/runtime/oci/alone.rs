//! That the cgroup of a container holds its tree, all of it, and nobody else.
//!
//! Who came by `exec` is nobody's child in the tree: he would be frozen with it, not dumped,
//! and killed when it is given away. Who is in another cgroup is dumped, and runs while memory is
//! scanned. Of a running tree this is a moment's picture, of a frozen one it is exact.

use std::collections::BTreeSet;
use std::fs;

use pageferry_cgroup::freezer::Freezer;
use pageferry_sys::task::has_ended;

use super::has_cgroups;
use crate::runtime::identity::ancestors;
use crate::runtime::passing::{Passing, State, name_of};

/// Why a running container cannot be held by its cgroup; `pids` are its processes.
pub fn check_running(freezer: &Freezer, root: i32, pids: &[i32]) -> Result<(), String> {
    check_below(freezer)?;
    let held = freezer.processes().map_err(|error| error.to_string())?;
    for other in held.iter().filter(|pid| !pids.contains(pid)) {
        // A child that was born after the tree was read, or one that has ended since.
        if !ancestors(*other).contains(&root) && !has_ended(*other) {
            return Err(format!(
                "process {other} was started in the container from outside (exec), and is \
                 not moved with it: end it first"
            ));
        }
    }
    let cgroups = |pid: i32| fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let own = cgroups(root);
    for pid in pids {
        if cgroups(*pid) != own && !has_ended(*pid) {
            return Err(elsewhere(*pid));
        }
    }
    Ok(())
}

/// Who is in the cgroup of a frozen container and none of its `threads`; fails if one of them is
/// not in it.
pub fn check_frozen(freezer: &Freezer, threads: &[i32]) -> Result<Option<Passing>, String> {
    check_below(freezer)?;
    let held = freezer.threads().map_err(|error| error.to_string())?;
    let held: BTreeSet<i32> = held.into_iter().collect();
    let tree: BTreeSet<i32> = threads.iter().copied().collect();
    let outside = tree.difference(&held).find(|tid| !has_ended(**tid));
    if let Some(tid) = outside {
        return Err(elsewhere(*tid));
    }
    let other = held.difference(&tree).find(|tid| !has_ended(**tid));
    Ok(other.map(|tid| stranger(*tid)))
}

fn stranger(pid: i32) -> Passing {
    Passing {
        state: State::Stranger,
        holder: name_of(pid),
    }
}

fn elsewhere(pid: i32) -> String {
    format!(
        "process {pid} of the container is not in the cgroups of its root: who moved it there must \
         move it back first"
    )
}

fn check_below(freezer: &Freezer) -> Result<(), String> {
    match has_cgroups(freezer.path()) {
        true => Err(format!(
            "the container has cgroups below its own ({}), which are not moved yet",
            freezer.path().display()
        )),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_cgroup::freezer::FreezerRoot;
    use std::process::{Child, Command};
    use std::time::Duration;

    struct Container {
        freezer: Freezer,
        children: Vec<Child>,
    }

    impl Container {
        fn begin(name: &str) -> Self {
            let name = format!("test-{name}-{}", std::process::id());
            let freezer = FreezerRoot::detect().unwrap().plan(&name);
            freezer.make().unwrap();
            Self {
                freezer: freezer.known().unwrap(),
                children: Vec::new(),
            }
        }

        fn start(&mut self, inside: bool) -> i32 {
            let child = Command::new("sleep").arg("600").spawn().unwrap();
            let pid = child.id().cast_signed();
            self.children.push(child);
            if inside {
                self.freezer.adopt(|| Ok(vec![pid])).unwrap();
            }
            pid
        }
    }

    impl Drop for Container {
        fn drop(&mut self) {
            let _ = self.freezer.kill(Duration::ZERO);
            for child in &mut self.children {
                let _ = child.kill();
                let _ = child.wait();
            }
            let _ = self.freezer.remove();
        }
    }

    #[test]
    fn every_stranger_and_everybody_elsewhere_is_found() {
        let mut container = Container::begin("alone");
        let [root, child] = [(); 2].map(|()| container.start(true));
        let running = |container: &Container, pids: &[i32]| {
            check_running(&container.freezer, root, pids).unwrap_err()
        };
        check_running(&container.freezer, root, &[root, child]).unwrap();
        let stranger = running(&container, &[root]);
        assert!(stranger.contains(&format!("process {child} was started")));
        // One that has ended is none, and hides none behind it.
        let ended = container.start(true);
        container.children.last_mut().unwrap().kill().unwrap();
        while !has_ended(ended) {
            std::thread::yield_now();
        }
        check_running(&container.freezer, root, &[root, child]).unwrap();
        let outside = container.start(false);
        let elsewhere = running(&container, &[root, child, outside]);
        assert!(elsewhere.contains(&format!("process {outside} of the container is not in")));

        container.freezer.freeze().unwrap();
        let frozen = |pids: &[i32]| check_frozen(&container.freezer, pids);
        assert_eq!(frozen(&[root, child]), Ok(None));
        let stranger = frozen(&[root]).unwrap().unwrap().to_string();
        assert!(
            stranger.contains(&format!("process {child} (sleep)")),
            "{stranger}"
        );
        assert!(frozen(&[root, child, outside]).is_err());
        let below = container.freezer.path().join("below");
        fs::create_dir(&below).unwrap();
        let refused = frozen(&[root, child]);
        fs::remove_dir(below).unwrap();
        assert!(refused.unwrap_err().contains("cgroups below its own"));
    }
}
