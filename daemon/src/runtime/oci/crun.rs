//! What is particular to crun.
//!
//! It wants to be told nothing of a dump, and writes down that its container runs when CRIU has
//! responded to the restore. It finds `/run/crun` only by itself: the folders that it masks are
//! called by its root in the images.

use std::path::PathBuf;

use pageferry_proto::wire::code::{ErrorCode, Failure};
use serde::Deserialize;

use super::habits::{BoundIn, Habits};
use super::state::{self, State};

pub(super) const HABITS: Habits = Habits {
    program: "crun",
    features: &["+CRIU"],
    root: "/run/crun",
    state: "status",
    read,
    bound_in: BoundIn::Bundle,
    // It has CRIU enter the cgroup, which the images do not ask for.
    enters: false,
    copy: Some(CONFIG),
    leaves: &[CONFIG],
    // Where a process of its own waits for the container, in version 1 and with systemd.
    leaves_below: &[".proxy-crun"],
};

/// A copy of the one in the bundle, as that was at the start.
const CONFIG: &str = "config.json";

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Written {
    pid: i32,
    process_start_time: u64,
    #[serde(default)]
    systemd_cgroup: bool,
    bundle: PathBuf,
    rootfs: PathBuf,
    /// Who has started it, if not root.
    #[serde(default)]
    owner: Option<String>,
    /// A list, as text.
    #[serde(rename = "external_descriptors")]
    streams: String,
}

fn read(text: &[u8], id: &str) -> Result<State, Failure> {
    let written: Written = state::read(text, (HABITS.program, id))?;
    let streams = serde_json::from_str(&written.streams).map_err(|error| {
        let text = format!("what crun has written of the streams of {id} cannot be read: {error}");
        Failure::new(ErrorCode::UnsupportedWorkload, text)
    })?;
    Ok(State {
        root: written.pid,
        started: written.process_start_time,
        bundle: Some(written.bundle).filter(|bundle| bundle.is_absolute()),
        streams,
        is_rootless: written.owner.is_some_and(|owner| owner != "root"),
        is_systemds: written.systemd_cgroup,
        root_files: written.rootfs,
        // What it says of these is in `config.json`.
        is_writable: None,
        limits: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn state(change: impl FnOnce(&mut Value)) -> State {
        let mut written = json!({
            "pid": 7, "process-start-time": 9, "cgroup-path": "/web", "scope": "",
            "rootfs": "/srv/web/rootfs", "systemd-cgroup": false, "bundle": "/srv/web",
            "created": "2026-01-01T00:00:00.000000Z", "owner": "root", "detached": true,
            "external_descriptors": r#"["/dev/null","/dev/null","/dev/null"]"#,
        });
        change(&mut written);
        read(written.to_string().as_bytes(), "web").unwrap()
    }

    #[test]
    fn the_state_names_the_bundle_and_what_was_open_at_the_start() {
        let plain = state(|_| {});
        assert_eq!(plain.bundle, Some("/srv/web".into()));
        assert_eq!((plain.root, plain.started), (7, 9));
        plain.check().unwrap();
        let piped = r#"["/dev/null","pipe:[3]","pipe:[4]"]"#;
        let refused = state(|written| written["external_descriptors"] = piped.into()).check();
        assert!(refused.unwrap_err().to_string().contains("descriptor 1"));
        assert!(
            state(|written| written["owner"] = "bob".into())
                .check()
                .is_err()
        );
        assert!(
            state(|written| written["systemd-cgroup"] = true.into())
                .check()
                .is_err()
        );
        assert_eq!(
            state(|written| written["bundle"] = "web".into()).bundle,
            None
        );
    }

    #[test]
    fn what_cannot_be_read_is_said() {
        let refused = read(b"{}", "web").unwrap_err();
        assert!(
            refused.text().contains("crun has written of web"),
            "{refused}"
        );
    }
}
