//! The API server's objects, and who else works on them: scheduler, kubelets, the owner.

use std::collections::BTreeMap;

use pageferry_k8s::migration::Outcome;
use pageferry_k8s::plan::{
    Adoption, NewPod, Observed, Record, Report, Side, SourcePod, Target, Why,
};

/// A pod object.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pod {
    pub uid: String,
    pub name: String,
    pub deleting: bool,
    pub bound: bool,
    pub running: bool,
    pub ready: bool,
    pub restored: bool,
    pub restarted: bool,
    /// It goes with the Migration.
    pub held: bool,
    pub marked: bool,
    /// The owner counts it.
    pub owned: bool,
    pub created: i64,
    pub unschedulable: bool,
}

/// Everything that the API server has. A clone of it is what somebody saw.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Api {
    /// Changes with everything that is written of the Migration.
    pub version: u64,
    pub gone: bool,
    pub record: Record,
    pub cancel: bool,
    pub deleting: bool,
    pub held: bool,
    pub source_report: Option<Report>,
    pub target_report: Option<Report>,
    pub down: Vec<Side>,
    /// Nodes whose objects somebody has deleted, whether they run or not.
    pub absent: Vec<Side>,
    pub pods: BTreeMap<String, Pod>,
    pub outdated: bool,
    pub cordoned: bool,
    pub next_uid: u64,
}

pub const SOURCE: &str = "source";
pub const SOURCE_NAME: &str = "web";
pub const NEW_NAME: &str = "web-m1";

impl Api {
    pub fn new(owned: bool) -> Self {
        let source = Pod {
            uid: SOURCE.to_owned(),
            name: SOURCE_NAME.to_owned(),
            bound: true,
            running: true,
            ready: true,
            owned,
            ..Pod::default()
        };
        Self {
            pods: BTreeMap::from([(source.uid.clone(), source)]),
            ..Self::default()
        }
    }

    pub fn new_pod(&self) -> Option<&Pod> {
        self.pods.values().find(|pod| pod.name == NEW_NAME)
    }

    /// A pod under a name that none has, or an error as the API server's.
    pub fn create(&mut self, name: &str, owned: bool, now: i64) -> bool {
        if self.pods.values().any(|pod| pod.name == name) {
            return false;
        }
        self.next_uid += 1;
        let uid = format!("uid-{}", self.next_uid);
        let pod = Pod {
            uid: uid.clone(),
            name: name.to_owned(),
            owned,
            created: now,
            ..Pod::default()
        };
        self.pods.insert(uid, pod);
        true
    }

    pub fn observe(&self, now: i64, owned: bool) -> Observed {
        let source = self.pods.get(SOURCE).map(|pod| SourcePod {
            node: "node-a".to_owned(),
            address: Some("10.1.2.3".to_owned()),
            deleting: pod.deleting,
            ready: pod.ready,
            marked: pod.marked,
            owned: pod.owned,
            outdated: self.outdated.then(|| "a rollout".to_owned()),
            evicting: false,
        });
        let new = self.new_pod().map(|pod| NewPod {
            uid: pod.uid.clone(),
            ours: true,
            node: pod.bound.then(|| "node-b".to_owned()),
            created: pod.created,
            deleting: pod.deleting,
            unschedulable: pod.unschedulable.then(|| "no room".to_owned()),
            stuck: None,
            running: pod.running,
            ready: pod.ready,
            restored: pod.restored,
            restarted: pod.restarted,
            bound: pod.held,
            adoption: match (owned, pod.owned) {
                (false, _) => Adoption::Nobody,
                (true, false) => Adoption::Pending,
                (true, true) => Adoption::Done,
            },
        });
        let target = match self.cordoned {
            true => Target::None(Why::new("TargetCordoned", "it is cordoned")),
            false => Target::Node("node-b".to_owned()),
        };
        Observed {
            now,
            cancel: self.cancel || self.deleting,
            held: self.held,
            deleting: self.deleting,
            record: self.record.clone(),
            target,
            source,
            new_name: NEW_NAME.to_owned(),
            new,
            source_report: self.source_report.clone(),
            target_report: self.target_report.clone(),
            down: self.down.clone(),
            absent: self.absent.clone(),
            ..Observed::default()
        }
    }

    pub fn moved(&self) -> bool {
        matches!(
            self.record.result,
            Some(Outcome::Succeeded | Outcome::SucceededWithoutRestore)
        )
    }

    /// What the owner does when it looks: one pod, as it counts. It waits for its own creations,
    /// and what it would delete is chosen as Kubernetes does.
    pub fn own(&self) -> Owner {
        let active = self.pods.values().filter(|pod| pod.owned && !pod.deleting);
        let mut active: Vec<&Pod> = active.collect();
        if active.is_empty() {
            return Owner::Create;
        }
        active.sort_by_key(|pod| {
            (
                pod.bound,
                pod.running,
                pod.ready,
                !pod.marked,
                // Newer ones go first.
                -pod.created,
            )
        });
        match active.len() {
            1 => Owner::Content,
            _ => Owner::Delete(active[0].uid.clone()),
        }
    }
}

pub enum Owner {
    Content,
    Create,
    Delete(String),
}
