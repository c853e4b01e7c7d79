//! Scenarios: one type for tests and benchmarks.
//!
//! A scenario is a function that drives a lab and writes down what it saw in a [`Report`]. A thing
//! that went wrong in the workload or for a client is a *failure* in the report; an error is the
//! lab's own trouble, and ends up there too.

mod annotated;
pub mod apps;
pub mod baseline;
pub mod by_hand;
pub mod capture;
pub mod cases;
pub mod clients;
pub mod container_disk;
pub mod container_errors;
pub mod container_faults;
pub mod container_files;
pub mod containers;
mod crossing;
pub mod direct;
mod drain;
mod eager;
mod empty_dir;
pub mod faults;
pub mod files;
mod install;
mod kills;
pub mod kubernetes;
pub mod locks;
pub mod memory;
mod multi;
pub mod nginx;
pub mod observe;
pub mod parking;
pub mod podman_bridge;
pub mod podman_errors;
pub mod podman_pod;
pub mod pods;
pub mod postcopy;
pub mod redis;
mod refusals;
mod replicas;
pub mod report;
pub mod resources;
mod served;
pub mod session;
pub mod settings;
pub mod shapes;
pub mod stop_and_copy;
pub mod traced;
pub mod traces;
mod twenty;
pub mod volumes;
pub mod writing;

use std::path::Path;

use anyhow::{Result, bail};

use report::Report;
use settings::Settings;

/// One named scenario.
#[derive(Debug)]
pub struct Scenario {
    pub name: &'static str,
    pub summary: &'static str,
    /// Whether it has cases, of which one may be run alone.
    pub cases: bool,
    run: fn(&Settings, &mut Report) -> Result<()>,
}

const DEMO: &str = "demo";
const OBSERVE: &str = "observe";
const CONTAINERS: &str = "containers";
const KUBERNETES: &str = "kubernetes";
const POSTCOPY: &str = "postcopy";

/// All scenarios, in the order in which they make sense.
pub const ALL: [Scenario; 20] = [
    Scenario {
        name: "stop_and_copy",
        summary: "stock CRIU moves Redis by dump, copy and restore: checks the lab itself",
        cases: false,
        run: stop_and_copy::run,
    },
    Scenario {
        name: "baseline",
        summary: "stock CRIU moves every case of `memory`: what CRIU itself can and cannot",
        cases: true,
        run: baseline::run,
    },
    Scenario {
        name: DEMO,
        summary: "one move of Redis with 512 MiB under write load, or of its --container",
        cases: false,
        run: redis::demo,
    },
    Scenario {
        name: OBSERVE,
        summary: "one move of Redis: do the daemons' metrics and the timeline fit it?",
        cases: true,
        run: observe::run,
    },
    Scenario {
        name: "chain",
        summary: "20 moves of Redis with 1 GiB, then the heavier load",
        cases: false,
        run: redis::chain,
    },
    Scenario {
        name: "cross",
        summary: "two Redis move in opposite directions at the same time",
        cases: false,
        run: redis::cross,
    },
    Scenario {
        name: "sizes",
        summary: "64 MiB, 1 GiB and 4 GiB: does the downtime depend on the size?",
        cases: false,
        run: writing::sizes,
    },
    Scenario {
        name: "rate",
        summary: "how fast the first round goes, by contents and link",
        cases: false,
        run: writing::rate,
    },
    Scenario {
        name: "memory",
        summary: "everything odd with memory, 5 moves each, every page compared",
        cases: true,
        run: memory::run,
    },
    Scenario {
        name: "nginx",
        summary: "20 moves of a web server under 500 new connections per second",
        cases: true,
        run: nginx::run,
    },
    Scenario {
        name: "parking",
        summary: "what comes in the freeze reaches the workload: TCP, UDP, new connections",
        cases: true,
        run: parking::run,
    },
    Scenario {
        name: POSTCOPY,
        summary: "memory that follows a writer of twice the link's rate, with kills and a cut",
        cases: true,
        run: postcopy::run,
    },
    Scenario {
        name: "apps",
        summary: "real applications under load, 5 moves each, with a proof that nothing is lost",
        cases: true,
        run: apps::run,
    },
    Scenario {
        name: "cases",
        summary: "state that made other tools hang: moved or refused, and never frozen for long",
        cases: true,
        run: cases::run,
    },
    Scenario {
        name: "faults",
        summary: "aborts and kills in every state of the hand-off",
        cases: true,
        run: faults::run,
    },
    Scenario {
        name: "locks",
        summary: "file locks on shared storage: moved, wanted by others, with kills in between",
        cases: true,
        run: locks::run,
    },
    Scenario {
        name: "files",
        summary: "folders that travel, under writers: there and back, sparse, full, with kills",
        cases: true,
        run: files::run,
    },
    Scenario {
        name: CONTAINERS,
        summary: "10 moves of Redis: a bare tree, containers of runc, crun, podman, containerd",
        cases: true,
        run: containers::run,
    },
    Scenario {
        name: KUBERNETES,
        summary: "a Kubernetes cluster, a pod at one node, its client at the other, nothing left",
        cases: true,
        run: kubernetes::run,
    },
    Scenario {
        name: "capture",
        summary: "5 moves under a packet capture: no reset, no answer from the wrong side",
        cases: false,
        run: capture::run,
    },
];

pub fn find(name: &str) -> Option<&'static Scenario> {
    ALL.iter().find(|scenario| scenario.name == name)
}

impl Scenario {
    /// What `--only` takes, and what that is; of those whose cases are not all called by one name.
    pub fn named_cases(&self) -> &'static [(&'static str, &'static str)] {
        match self.name {
            OBSERVE => &observe::CASES,
            CONTAINERS => &containers::CASES,
            KUBERNETES => &kubernetes::CASES,
            POSTCOPY => &postcopy::NAMES,
            _ => &[],
        }
    }

    /// Runs it from start to clean-up and reports.
    pub fn run(&self, settings: &Settings, json: Option<&Path>) -> Result<bool> {
        if settings.only.is_some() && !self.cases {
            bail!("{} has no cases: leave out --only", self.name);
        }
        if settings.container.is_some() && self.name != DEMO {
            bail!("{} has no --container: that is for {DEMO}", self.name);
        }
        let mut report = Report::new(self.name);
        if let Err(error) = (self.run)(settings, &mut report) {
            report.fail(format!("{error:#}"));
        }
        if report.lost_acks > 0 {
            report.fail(format!("{} acknowledged writes are lost", report.lost_acks));
        }
        report.print();
        // Where no lab came up there is no folder for it, and nothing to put there.
        let _ = report.write_figures();
        if let Some(path) = json {
            report.write(path)?;
        }
        Ok(report.ok())
    }
}
