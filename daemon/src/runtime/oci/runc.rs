//! What is particular to runc.

use std::path::PathBuf;

use pageferry_proto::wire::code::Failure;
use serde::Deserialize;

use super::habits::{BoundIn, Habits};
use super::spec::Limits;
use super::state::{self, State};

pub(super) const HABITS: Habits = Habits {
    program: "runc",
    features: &[],
    root: "/run/runc",
    state: "state.json",
    read,
    bound_in: BoundIn::Folder,
    // It moves what is to become CRIU before that has its request.
    enters: true,
    copy: None,
    leaves: &[],
    leaves_below: &[],
};

#[derive(Deserialize)]
struct Written {
    init_process_pid: i32,
    init_process_start: u64,
    #[serde(default)]
    external_descriptors: Vec<String>,
    config: Config,
}

#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    rootfs: PathBuf,
    #[serde(default)]
    readonlyfs: bool,
    #[serde(default)]
    labels: Vec<String>,
    #[serde(default)]
    rootless_euid: bool,
    #[serde(default)]
    cgroups: Option<Cgroups>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Cgroups {
    #[serde(alias = "Systemd")]
    systemd: bool,
    memory: i64,
    memory_swap: i64,
    memory_reservation: i64,
    cpu_quota: i64,
    cpu_period: i64,
    cpu_shares: i64,
    cpuset_cpus: String,
    cpuset_mems: String,
    pids_limit: Option<i64>,
}

impl From<Cgroups> for Limits {
    fn from(cgroups: Cgroups) -> Self {
        Self {
            memory: cgroups.memory,
            memory_swap: cgroups.memory_swap,
            memory_reservation: cgroups.memory_reservation,
            cpu_quota: cgroups.cpu_quota,
            cpu_period: cgroups.cpu_period,
            cpu_shares: cgroups.cpu_shares,
            cpus: cgroups.cpuset_cpus,
            mems: cgroups.cpuset_mems,
            pids: cgroups.pids_limit.unwrap_or_default(),
        }
    }
}

fn read(text: &[u8], id: &str) -> Result<State, Failure> {
    let Written {
        init_process_pid,
        init_process_start,
        external_descriptors,
        config,
    } = state::read(text, (HABITS.program, id))?;
    let labels = config.labels.iter();
    let bundle = labels
        .filter_map(|label| label.strip_prefix("bundle="))
        .next_back();
    let cgroups = config.cgroups.unwrap_or_default();
    Ok(State {
        root: init_process_pid,
        started: init_process_start,
        bundle: bundle
            .map(PathBuf::from)
            .filter(|bundle| bundle.is_absolute()),
        streams: external_descriptors,
        is_rootless: config.rootless_euid,
        is_systemds: cgroups.systemd,
        root_files: config.rootfs,
        is_writable: Some(!config.readonlyfs),
        limits: Some(cgroups.into()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn the_state_names_the_bundle_and_what_was_open_at_the_start() {
        let state = |streams: [&str; 3], config: Value| {
            let text = json!({
                "init_process_pid": 7, "init_process_start": 9,
                "external_descriptors": streams, "config": config,
            });
            read(text.to_string().as_bytes(), "web").unwrap()
        };
        let plain = state(
            ["/dev/null"; 3],
            json!({"labels": ["a=b", "bundle=/srv/web"], "readonlyfs": true}),
        );
        assert_eq!(plain.bundle, Some("/srv/web".into()));
        assert_eq!((plain.root, plain.started), (7, 9));
        plain.check().unwrap();
        let started = json!({"readonlyfs": true});
        let piped = state(["/dev/null", "pipe:[3]", "pipe:[4]"], started);
        let refused = piped.check().unwrap_err();
        assert!(refused.to_string().contains("descriptor 1"), "{refused}");
        assert_eq!(piped.bundle, None);
        let refused = |config: Value| state(["/dev/null"; 3], config).check().unwrap_err();
        let rootless = refused(json!({"rootless_euid": true, "readonlyfs": true}));
        assert!(rootless.text().contains("rootless"), "{rootless}");
        let systemd = refused(json!({"cgroups": {"Systemd": true}, "readonlyfs": true}));
        assert!(systemd.text().contains("systemd"), "{systemd}");
        let writes = state(["/dev/null"; 3], json!({"readonlyfs": false})).is_writable;
        assert_eq!((writes, piped.is_writable), (Some(true), Some(false)));
        let limits = json!({"memory": 5, "pids_limit": 9, "cpuset_cpus": "0"});
        let limits = state(["/dev/null"; 3], json!({"cgroups": limits}))
            .limits
            .unwrap();
        assert_eq!((limits.memory, limits.pids, &*limits.cpus), (5, 9, "0"));
    }
}
