use super::*;
use pageferry_trial::Trial;
use std::process::{Child, Command};

/// The other process of these tests.
#[test]
fn workload() {
    pageferry_trial::obey();
}

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

/// A task that is on its way into a stop when it is asked to freeze does not notice.
#[test]
fn tasks_that_stop_while_they_are_frozen_freeze() {
    let root = FreezerRoot::detect().expect("a freezer");
    let freezer = made(&root, "test-stops");
    let children: Vec<Reaped> = (0..CHILDREN).map(|_| sleeper()).collect();
    let pid = |child: &Reaped| i32::try_from(child.0.id()).expect("pid");
    let pids: Vec<i32> = children.iter().map(pid).collect();
    freezer.adopt(|| Ok(pids.clone())).expect("adopt");
    let frozen = (0..STOPS).try_for_each(|_| {
        for signal in [Signal::SIGCONT, Signal::SIGSTOP] {
            for pid in &pids {
                kill(Pid::from_raw(*pid), signal).expect("our child");
            }
        }
        freezer.freeze()?;
        freezer.thaw()
    });
    drop(children);
    freezer.remove().expect("remove");
    frozen.expect("every time");
}

const CHILDREN: usize = 8;
const STOPS: usize = 500;

#[test]
fn a_freeze_that_is_cut_ends_at_once() {
    let root = FreezerRoot::detect().expect("a freezer");
    let freezer = made(&root, "test-cut");
    let mut trial = Trial::start("freezer::tests::workload");
    let page = 0x2000_0000_0000_u64;
    trial.tell(&format!("map {page:#x} 1 rw"));
    trial.tell(&format!("wait-for-page {page:#x}"));
    let waits = |tid: &str| {
        let path = format!("/proc/{}/task/{tid}/stat", trial.pid());
        fs::read_to_string(path).is_ok_and(|stat| stat.contains(") D "))
    };
    let deadline = Instant::now() + Duration::from_secs(20);
    let tasks = format!("/proc/{}/task", trial.pid());
    while !fs::read_dir(&tasks)
        .expect("its threads")
        .flatten()
        .any(|entry| entry.file_name().to_str().is_some_and(waits))
    {
        assert!(Instant::now() < deadline, "no thread waits for the page");
        std::thread::yield_now();
    }
    freezer.adopt(|| Ok(vec![trial.pid()])).expect("adopt");
    let polls = std::cell::Cell::new(0);
    let cut = || polls.replace(polls.get() + 1) == 3;
    let frozen = freezer.freeze_unless(cut);
    assert!(!frozen.expect("cut before its time-out"));
    assert!(!freezer.is_frozen().expect("state"));
    freezer.thaw().expect("thaw");
    // It was asked no more, and what can run runs once it is thawed.
    assert_eq!(polls.get(), 4);
    assert_eq!(trial.tell("signals"), "0");
    let timed_out = freezer.freeze();
    assert!(matches!(timed_out, Err(CgroupError::FreezeTimeout { .. })));
    drop(trial);
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

/// The unified hierarchy, if this machine has it mounted: nothing tries version 2 where it is not.
fn unified() -> Option<FreezerRoot> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    let unified: String = mounts
        .lines()
        .filter(|line| line.contains(" - cgroup2 "))
        .map(|line| format!("{line}\n"))
        .collect();
    let root = FreezerRoot::among(&Hierarchies::from_mountinfo(&unified));
    if root.is_none() {
        eprintln!("cgroup v2 is not mounted");
    }
    root
}

#[test]
fn a_child_born_while_a_tree_is_brought_back_is_brought_back_too() {
    let root = FreezerRoot::detect().expect("a freezer");
    let (freezer, origin) = (made(&root, "test-back"), made(&root, "test-origin"));
    let script = "while :; do /bin/true & /bin/true & wait; done";
    let busy = Reaped(
        Command::new("sh")
            .args(["-c", script])
            .spawn()
            .expect("a shell"),
    );
    let pid = i32::try_from(busy.0.id()).expect("a pid");
    let back = (0..BACK_AND_FORTH).try_for_each(|_| {
        freezer.make()?;
        freezer.adopt(|| Ok(vec![pid]))?;
        freezer.empty_into(&origin)
    });
    origin.kill(Duration::from_secs(20)).expect("killed");
    drop(busy);
    if freezer.exists() {
        freezer.kill(Duration::from_secs(20)).expect("killed");
        freezer.remove().expect("removed");
    }
    origin.remove().expect("removed");
    back.expect("every time");
}

const BACK_AND_FORTH: usize = 300;

#[test]
fn a_cgroup_of_version_2_is_taken_for_one_of_ours_only_if_it_is() {
    let Some(root) = unified() else { return };
    let top = root.directory.parent().expect("a mount point");
    let own = top.join(format!("pageferry-test-{}.service", std::process::id()));
    let id = MigrationId::new([2; 16]).to_string();
    let (left, again) = (
        own.join(format!("pageferry-{id}")),
        MigrationId::new([3; 16]),
    );
    let below = left.join(format!("pageferry-{again}"));
    let _removed = Removed(vec![own.clone(), left.clone(), below.clone()]);
    fs::create_dir(&own).expect("a cgroup");
    let (child, other, mut ended) = (sleeper(), sleeper(), sleeper());
    let pid = |child: &Reaped| i32::try_from(child.0.id()).expect("a pid");
    let enter = |folder: &Path, child: &Reaped| {
        fs::write(folder.join("cgroup.procs"), pid(child).to_string()).expect("moved");
    };
    enter(&own, &child);
    enter(&own, &other);
    // A unit whose name begins like ours.
    let (freezer, origin) = root
        .place(pid(&child), &[pid(&child), pid(&other)], &id)
        .expect("a place");
    assert_eq!(
        (freezer.path(), origin.as_ref()),
        (left.as_path(), Some(&own))
    );
    // One that a migration has left, with somebody else in it.
    fs::create_dir(&left).expect("a cgroup");
    enter(&left, &child);
    enter(&left, &other);
    let again = again.to_string();
    let place = |pids: &[i32]| root.place(pid(&child), pids, &again).expect("a place");
    assert_eq!(place(&[pid(&child)]).0.path(), below);
    let both = [pid(&child), pid(&other)];
    assert_eq!(place(&both).0.path(), left);
    // A zombie says it is in a cgroup that has been removed.
    let gone = own.join("gone");
    fs::create_dir(&gone).expect("a cgroup");
    enter(&gone, &ended);
    ended.0.kill().expect("our child");
    let deadline = Instant::now() + Duration::from_secs(20);
    while !task::has_ended(pid(&ended)) || fs::remove_dir(&gone).is_err() {
        assert!(Instant::now() < deadline, "its cgroup cannot be removed");
        std::thread::yield_now();
    }
    let told = root.current_of(pid(&ended)).expect("a zombie tells");
    assert_ne!(told, left, "{}", told.display());
    let three = [pid(&child), pid(&other), pid(&ended)];
    assert_eq!(place(&three).0.path(), left);
    drop((child, other, ended));
}

#[test]
fn a_tree_of_version_2_is_frozen_below_its_own_cgroup_and_keeps_its_limits() {
    let Some(root) = unified() else { return };
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
    let id = MigrationId::new([1; 16]).to_string();
    let (freezer, origin) = root.place(pids[0], &pids, &id).expect("a place");
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
    let scattered = root.place(pids[0], &pids, &id);
    assert!(matches!(scattered, Err(CgroupError::Scattered { pid, .. }) if pid == pids[1]));
    drop((child, other));
}

#[test]
fn the_v1_hierarchy_is_preferred_and_v2_is_the_fallback() {
    let v2 = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n";
    let both = format!("{v2}31 24 0:27 / /cg/freezer rw - cgroup cgroup rw,freezer\n");
    let root = FreezerRoot::among(&Hierarchies::from_mountinfo(v2)).expect("v2");
    assert_eq!(root.version(), FreezerVersion::V2);
    let root = FreezerRoot::among(&Hierarchies::from_mountinfo(&both)).expect("v1");
    assert_eq!(root.version(), FreezerVersion::V1);
    assert_eq!(root.directory, Path::new("/cg/freezer/pageferry"));
    assert!(FreezerRoot::among(&Hierarchies::from_mountinfo("")).is_none());
}

#[test]
fn a_frozen_cgroup_that_is_kept_ready_stays_as_it_is() {
    let check = |freezer: &Freezer| {
        let child = sleeper();
        let pid = i32::try_from(child.0.id()).expect("pid");
        freezer.make().expect("make");
        freezer.adopt(|| Ok(vec![pid])).expect("adopt");
        freezer.freeze().expect("freeze");
        let ready = freezer.keep_ready(pid);
        for _ in 0..100 {
            assert!(freezer.is_frozen().expect("state"));
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(ready);
        assert_eq!(freezer.processes().expect("list"), vec![pid]);
        freezer.kill(Duration::from_secs(10)).expect("kill");
        drop(child);
        freezer.remove().expect("remove");
    };
    let name = format!("test-ready-{}", std::process::id());
    check(&FreezerRoot::detect().expect("a freezer").plan(&name));
    if let Some(root) = unified() {
        check(&root.plan(&name));
    }
}

#[test]
fn a_cgroup_made_anew_under_the_same_name_is_another() {
    let root = FreezerRoot::detect().expect("a freezer");
    let known = made(&root, "test-anew").known().expect("known");
    let again = Freezer::again(known.path().to_owned(), known.id());
    assert!(known.exists() && again.exists() && again.is_empty());
    fs::remove_dir(known.path()).expect("empty");
    let other = made(&root, "test-anew");
    let child = sleeper();
    let pid = i32::try_from(child.0.id()).expect("pid");
    other.adopt(|| Ok(vec![pid])).expect("adopt");
    other.freeze().expect("freeze");
    let never = Freezer::again(known.path().to_owned(), Some(FolderId::NEVER));
    for gone in [known, again, never] {
        assert!(!gone.exists() && gone.is_empty());
        assert!(gone.processes().is_err() && gone.is_frozen().is_err());
        assert!(gone.thaw().is_err() && gone.kill(Duration::ZERO).is_err());
        assert!(gone.adopt(|| Ok(vec![pid])).is_err());
        assert!(gone.clone().opened().is_err());
        gone.remove().expect("it is not there");
    }
    assert!(other.is_frozen().expect("state") && !task::has_ended(pid));
    assert_eq!(other.processes().expect("list"), [pid]);
    other.thaw().expect("thaw");
    drop(child);
    other.remove().expect("remove");
}
