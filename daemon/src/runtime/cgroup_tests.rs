use super::*;
use std::process::{Child, Command};

struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn made(root: &FreezerRoot, name: &str) -> Freezer {
    let freezer = root.plan(&format!("{name}-{}", std::process::id()));
    freezer.make().expect("make");
    freezer
}

fn sleeper() -> Reaped {
    Reaped(
        Command::new("sleep")
            .arg("1000")
            .spawn()
            .expect("sleep starts"),
    )
}

#[test]
fn a_frozen_cgroup_reads_back_frozen_and_thaws() {
    let root = FreezerRoot::detect().expect("a freezer");
    let freezer = made(&root, "test-freeze");
    let child = sleeper();
    let pid = i32::try_from(child.0.id()).expect("pid");
    freezer.adopt(|| Ok(vec![pid])).expect("adopt");
    assert_eq!(freezer.processes().expect("list"), vec![pid]);
    freezer.freeze().expect("freeze");
    assert!(freezer.is_frozen().expect("state"));
    freezer.thaw().expect("thaw");
    assert!(!freezer.is_frozen().expect("state"));
    assert_eq!(root.holding(&[pid]).expect("ours").path(), freezer.path());
    drop(child);
    freezer.remove().expect("remove");
}

#[test]
fn killing_a_frozen_cgroup_empties_it() {
    let root = FreezerRoot::detect().expect("a freezer");
    let freezer = made(&root, "test-kill");
    let mut child = sleeper();
    let pid = i32::try_from(child.0.id()).expect("pid");
    freezer.adopt(|| Ok(vec![pid])).expect("adopt");
    freezer.freeze().expect("freeze");
    let reaper = std::thread::spawn(move || child.0.wait());
    freezer.kill(Duration::from_secs(5)).expect("kill");
    assert!(!reaper.join().expect("join").expect("wait").success());
    freezer.remove().expect("remove");
}

/// Cgroups of the unified hierarchy that are removed, the first last.
struct Removed(Vec<PathBuf>);

impl Drop for Removed {
    fn drop(&mut self) {
        for folder in self.0.iter().rev() {
            let _ = fs::remove_dir(folder);
        }
    }
}

#[test]
fn a_tree_of_version_2_is_frozen_below_its_own_cgroup_and_keeps_its_limits() {
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    let unified: String = mounts
        .lines()
        .filter(|line| line.contains(" - cgroup2 "))
        .map(|line| format!("{line}\n"))
        .collect();
    let root = FreezerRoot::from_mountinfo(&unified).expect("cgroup2 is mounted");
    let top = root.directory.parent().expect("a mount point");
    let own = top.join(format!("test-place-{}", std::process::id()));
    let aside = top.join(format!("test-place-aside-{}", std::process::id()));
    let mut made = Removed(vec![own.clone(), aside.clone()]);
    fs::create_dir(&own).expect("a cgroup");
    fs::create_dir(&aside).expect("a cgroup");
    let (child, other) = (sleeper(), sleeper());
    let pid = |child: &Reaped| i32::try_from(child.0.id()).expect("a pid");
    let pids = [pid(&child), pid(&other)];
    for pid in pids {
        fs::write(own.join("cgroup.procs"), pid.to_string()).expect("moved");
    }
    let (freezer, origin) = root.place(pids[0], &pids, "id").expect("a place");
    made.0.push(freezer.path().to_owned());
    assert_eq!(origin.as_ref(), Some(&own));
    assert!(freezer.path().starts_with(&own), "{freezer:?}");
    freezer.make().expect("made beside processes");
    freezer.adopt(|| Ok(pids.to_vec())).expect("adopted");
    freezer.freeze().expect("frozen");
    // What limits its cgroup limits it there too.
    let now = root.current_of(pids[1]).expect("a cgroup");
    assert_eq!(now, freezer.path());
    // A migration that begins now finds it where it is.
    let again = root.place(pids[0], &pids, "another").expect("a place");
    assert_eq!(
        (again.0.path(), again.1.as_ref()),
        (freezer.path(), Some(&own))
    );
    freezer.thaw().expect("thawed");
    let back = Freezer::at(own.clone());
    back.adopt(|| Ok(pids.to_vec())).expect("brought back");
    freezer.remove().expect("removed");
    // A tree in several cgroups would lose the limits of some.
    fs::write(aside.join("cgroup.procs"), pids[1].to_string()).expect("moved");
    let scattered = root.place(pids[0], &pids, "id");
    assert!(matches!(scattered, Err(CgroupError::Scattered { pid, .. }) if pid == pids[1]));
    drop((child, other));
}

#[test]
fn the_v1_hierarchy_is_preferred_and_v2_is_the_fallback() {
    let v2 = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n";
    let both = format!("{v2}31 24 0:27 / /cg/freezer rw - cgroup cgroup rw,freezer\n");
    let root = FreezerRoot::from_mountinfo(v2).expect("v2");
    assert_eq!(root.version(), FreezerVersion::V2);
    let root = FreezerRoot::from_mountinfo(&both).expect("v1");
    assert_eq!(root.version(), FreezerVersion::V1);
    assert_eq!(root.directory, Path::new("/cg/freezer/pageferry"));
    assert!(FreezerRoot::from_mountinfo("").is_none());
}
