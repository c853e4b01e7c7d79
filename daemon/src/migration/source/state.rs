//! What of a site is kept in the journal.

use std::path::PathBuf;

use pageferry_cgroup::freezer::Freezer;
use pageferry_cgroup::identity::FolderId;
use pageferry_proto::migration::record::DriverState;
use pageferry_proto::wire::code::Failure;
use serde::{Deserialize, Serialize};

use super::site::Asked;
use crate::migration::ports::PortState;
use crate::migration::text::internal;
use crate::runtime::kind::{Kind, Party};
use crate::runtime::shared::marker::Written;

/// What a restarted daemon needs to know of a workload: kept in the journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SiteState {
    /// What it is to this node.
    pub(super) kind: Kind,
    /// When its root started, in clock ticks since the boot.
    pub(super) started: u64,
    /// Which boot that was.
    pub(super) boot: String,
    pub(super) freezer: PathBuf,
    /// What that is known by, if others may make one of its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) freezer_id: Option<FolderId>,
    pub(super) ports: Vec<PortState>,
    /// Files by which the target was to know shared storage.
    pub(super) markers: Vec<Written>,
    /// For whoever asks for the same again.
    pub(super) asked: Asked,
    /// Of a party, the members after the first, which is what stands above.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) members: Vec<MemberState>,
    /// What it is a party of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) party: Option<Party>,
}

/// One tree of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct MemberState {
    /// What it is to this node.
    pub(super) kind: Kind,
    /// When its root started, in clock ticks since the boot.
    pub(super) started: u64,
    pub(super) freezer: PathBuf,
    /// What that is known by, if others may make one of its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) freezer_id: Option<FolderId>,
}

impl SiteState {
    /// All trees, the first one, too.
    pub(super) fn all_members(&self) -> Vec<MemberState> {
        let first = MemberState {
            kind: self.kind.clone(),
            started: self.started,
            freezer: self.freezer.clone(),
            freezer_id: self.freezer_id,
        };
        let others = self.members.iter().cloned();
        std::iter::once(first).chain(others).collect()
    }
}

impl MemberState {
    /// The cgroup that holds the tree, if it is still that. One that was known in another boot is
    /// not there, whoever has made one by its name in this.
    pub(super) fn freezer(&self, is_this_boot: bool) -> Freezer {
        let known = self.freezer_id.map(|id| match is_this_boot {
            true => id,
            false => FolderId::NEVER,
        });
        Freezer::again(self.freezer.clone(), known)
    }
}

/// As the journal keeps it.
pub(super) fn encode_state(state: &SiteState) -> Result<DriverState, Failure> {
    let bytes = serde_json::to_vec(state).map_err(|error| internal(&error))?;
    DriverState::new(bytes).map_err(|error| internal(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_of_a_site_keeps_its_form_and_names_the_kind() {
        let text = concat!(
            r#"{"kind":{"process":{"root":7,"origin":"/sys/fs/cgroup/a"}},"started":5,"boot":"b","#,
            r#""freezer":"/f","ports":[{"ends":[3,2],"name":"v0","bridge":"br0"}],"#,
            r#""markers":[{"path":"/data/.pageferry-1","owner":[1,2]}],"#,
            r#""asked":{"shared":["/data"],"force_cpu":true,"force_ipc":true,"#,
            r#""network":"web","#,
            r#""instead_of":"00000000000000000000000000000009"}}"#
        );
        let state: SiteState = serde_json::from_str(text).unwrap();
        assert_eq!(state.kind.root(), 7);
        assert_eq!(state.asked.network, Some("web".parse().unwrap()));
        assert_eq!(encode_state(&state).unwrap().as_bytes(), text.as_bytes());
        let folder = tempfile::tempdir().unwrap();
        let id = FolderId::of(folder.path()).unwrap();
        let known = SiteState {
            freezer: folder.path().to_owned(),
            freezer_id: Some(id),
            ..state
        };
        let bytes = encode_state(&known).unwrap();
        let known: SiteState = serde_json::from_slice(bytes.as_bytes()).unwrap();
        let first = &known.all_members()[0];
        assert!(first.freezer(true).exists() && !first.freezer(false).exists());
        let other = text.replacen("process", "lxc", 1);
        let error = serde_json::from_str::<SiteState>(&other)
            .unwrap_err()
            .to_string();
        assert!(error.contains("unknown variant `lxc`"), "{error}");
    }

    #[test]
    fn the_state_of_a_party_names_all_its_members() {
        let container = |id: &str, root: i32| {
            format!(
                concat!(
                    r#"{{"podman":{{"container":{{"runtime":"crun","id":"{0}","root":{1},"#,
                    r#""started":5,"boot":"b","bundle":"/c/{0}"}},"id":"{0}","image":"0f","#,
                    r#""restart":"always","pod":{{"infra":"0a","shared":["net"]}}}}}}"#
                ),
                id, root
            )
        };
        let text = format!(
            concat!(
                r#"{{"kind":{},"started":5,"boot":"b","freezer":"/f","ports":[],"markers":[],"#,
                r#""asked":{{"shared":[],"force_cpu":false,"force_ipc":false,"network":null,"#,
                r#""instead_of":null}},"members":[{{"kind":{},"started":6,"freezer":"/g"}}],"#,
                r#""party":{{"podman-pod":{{"name":"shop","id":"0c","infra":"0a","#,
                r#""members":["db","web"],"shared":["net"],"shm":"/s"}}}}}}"#
            ),
            container("0b", 7),
            container("0d", 8)
        );
        let state: SiteState = serde_json::from_str(&text).unwrap();
        assert_eq!(encode_state(&state).unwrap().as_bytes(), text.as_bytes());
        let all = state.all_members();
        let told: Vec<_> = all
            .iter()
            .map(|one| (one.kind.root(), one.started))
            .collect();
        assert_eq!(told, [(7, 5), (8, 6)]);
        assert_eq!(all[1].freezer, std::path::Path::new("/g"));
    }
}
