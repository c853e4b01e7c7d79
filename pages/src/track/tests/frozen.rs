//! Looks at the threads of a frozen process, and letting them go.

use std::fs;
use std::path::{Path, PathBuf};

use super::*;
use crate::track::frozen::{Frozen, Stops};

/// A cgroup with a freezer, thawed and removed on drop.
struct Cgroup {
    path: PathBuf,
    stops: Stops,
}

impl Cgroup {
    /// One in each hierarchy with a freezer that this machine has.
    fn all(name: &str) -> Vec<Self> {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mounted = |line: &str| {
            let fields: Vec<&str> = line.split(' ').collect();
            let (mount, kind, options) = (fields[1], fields[2], fields[3]);
            let stops = match kind {
                "cgroup2" => Stops::AtReturn,
                "cgroup" if options.split(',').any(|option| option == "freezer") => Stops::InPlace,
                _ => return None,
            };
            let name = format!("pageferry-test-{name}-{}", std::process::id());
            Some((Path::new(mount).join(name), stops))
        };
        let made = mounts.lines().filter_map(mounted).map(|(path, stops)| {
            fs::create_dir_all(&path).unwrap();
            Self { path, stops }
        });
        made.collect()
    }

    fn write(&self, frozen: bool) {
        let (file, value) = match (self.stops, frozen) {
            (Stops::InPlace, true) => ("freezer.state", "FROZEN"),
            (Stops::InPlace, false) => ("freezer.state", "THAWED"),
            (Stops::AtReturn, true) => ("cgroup.freeze", "1"),
            (Stops::AtReturn, false) => ("cgroup.freeze", "0"),
        };
        fs::write(self.path.join(file), value).unwrap();
    }

    /// Freezes a process until what is returned is dropped: before the process is, which would not
    /// die.
    fn freeze(&self, trial: &Trial) -> Standstill<'_> {
        fs::write(self.path.join("cgroup.procs"), trial.pid().to_string()).unwrap();
        self.write(true);
        let (file, word) = match self.stops {
            Stops::InPlace => ("freezer.state", "FROZEN"),
            Stops::AtReturn => ("cgroup.events", "frozen 1"),
        };
        eventually("the freeze", || {
            let text = fs::read_to_string(self.path.join(file)).unwrap();
            text.lines().any(|line| line == word)
        });
        Standstill(self)
    }
}

struct Standstill<'a>(&'a Cgroup);

impl Drop for Standstill<'_> {
    fn drop(&mut self) {
        self.0.write(false);
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        self.write(false);
        let remove = || fs::remove_dir(&self.path).is_ok();
        eventually("its end", remove);
    }
}

/// By the kernel's iterators, where there are any, and by `/proc` alone.
fn supports() -> [Support; 2] {
    let support = Support::probe().unwrap();
    let without = Support {
        calls: None,
        ..support.clone()
    };
    [support, without]
}

fn look(trial: &Trial, support: &Support, stops: Stops) -> Frozen {
    Frozen::look(&[trial.pid()], support, stops).unwrap()
}

/// Starts a trial process with a thread in each of these calls.
fn blocked(calls: &[&str]) -> (Trial, Vec<String>) {
    let mut trial = start();
    let mut pipes = Vec::new();
    for call in calls {
        let answer = trial.tell(&format!("block {call}"));
        let words: Vec<&str> = answer.split(' ').collect();
        let asleep = format!("/proc/{}/stat", words[1]);
        eventually("the call", || {
            fs::read_to_string(&asleep).unwrap().contains(") S ")
        });
        pipes.push(words[2].to_owned());
    }
    (trial, pipes)
}

#[test]
fn a_frozen_process_is_at_rest_and_a_running_one_is_not() {
    for support in supports() {
        for cgroup in Cgroup::all("rest") {
            let (trial, _) = blocked(&["epoll", "read", "read-socket", "nanosleep", "futex"]);
            let running = look(&trial, &support, Stops::InPlace);
            assert!(running.busy().is_some());
            // The other freezer counts no thread that is in a call.
            assert_eq!(look(&trial, &support, Stops::AtReturn).busy(), None);
            let standstill = cgroup.freeze(&trial);
            let frozen = look(&trial, &support, cgroup.stops);
            assert_eq!(frozen.busy(), None, "{}", cgroup.path.display());
            frozen.thaw(|| drop(standstill));
        }
    }
}

#[test]
fn calls_go_on_after_a_thaw() {
    for support in supports() {
        for cgroup in Cgroup::all("calls") {
            for call in ["epoll", "semop", "recv", "read", "read-socket", "poll"] {
                let (mut trial, pipes) = blocked(&[call]);
                for _ in 0..3 {
                    let standstill = cgroup.freeze(&trial);
                    let frozen = look(&trial, &support, cgroup.stops);
                    frozen.thaw(|| drop(standstill));
                }
                trial.tell_silently(&format!("poke {}", pipes[0]));
                let returned = if call == "semop" { 0 } else { 1 };
                let answer = format!("returned {returned} 0");
                assert_eq!(trial.answer(), answer, "{call} {}", cgroup.path.display());
            }
        }
    }
}

/// To trace it would take until it is thawed, and its parent would hear of it.
#[test]
fn a_stopped_process_is_thawed_and_stays_stopped() {
    for support in supports() {
        for cgroup in Cgroup::all("stopped") {
            let (mut trial, pipes) = blocked(&["epoll"]);
            let stopped = super::Frozen::new(trial.pid());
            let standstill = cgroup.freeze(&trial);
            let frozen = look(&trial, &support, cgroup.stops);
            assert_eq!(frozen.busy(), None);
            frozen.thaw(|| drop(standstill));
            let is_stopped = |&tid: &i32| task::Status::read(tid).unwrap().state == b'T';
            eventually("the stop", || {
                task::threads(trial.pid()).unwrap().iter().all(is_stopped)
            });
            drop(stopped);
            trial.tell_silently(&format!("poke {}", pipes[0]));
            // A stop by job control makes it fail, whoever thaws.
            let answer = trial.answer();
            assert!(answer.starts_with("returned "), "{answer}");
            assert_eq!(trial.tell("signals"), "0");
        }
    }
}
