//! What is particular to runc.

use std::path::PathBuf;

use pageferry_proto::wire::code::Failure;
use serde::Deserialize;

use super::habits::{BoundIn, Habits};
use super::state::{self, State};

pub(super) const HABITS: Habits = Habits {
    program: "runc",
    root: "/run/runc",
    state: "state.json",
    read,
    bound_in: BoundIn::Folder,
    // It moves what is to become CRIU before that has its request.
    enters: true,
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
    labels: Vec<String>,
    #[serde(default)]
    rootless_euid: bool,
    #[serde(default)]
    cgroups: Option<Cgroups>,
}

#[derive(Deserialize)]
struct Cgroups {
    #[serde(default, alias = "Systemd")]
    systemd: bool,
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
    Ok(State {
        root: init_process_pid,
        started: init_process_start,
        bundle: bundle
            .map(PathBuf::from)
            .filter(|bundle| bundle.is_absolute()),
        streams: external_descriptors,
        is_rootless: config.rootless_euid,
        is_systemds: config.cgroups.is_some_and(|cgroups| cgroups.systemd),
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
            json!({"labels": ["a=b", "bundle=/srv/web"]}),
        );
        assert_eq!(plain.bundle, Some("/srv/web".into()));
        assert_eq!((plain.root, plain.started), (7, 9));
        plain.check().unwrap();
        let piped = state(["/dev/null", "pipe:[3]", "pipe:[4]"], json!({}));
        let refused = piped.check().unwrap_err();
        assert!(refused.to_string().contains("descriptor 1"), "{refused}");
        assert_eq!(piped.bundle, None);
        let rootless = state(["/dev/null"; 3], json!({"rootless_euid": true}));
        assert!(rootless.check().is_err());
        let systemd = state(["/dev/null"; 3], json!({"cgroups": {"Systemd": true}}));
        assert!(systemd.check().is_err());
    }
}
