//! Journals that are removed because other migrations have ended since.

use super::world::World;
use pageferry_proto::migration::source::SourceMachine;
use pageferry_proto::migration::target::{self, TargetMachine};

impl World {
    pub(super) fn expire_source(&mut self) {
        let node = &mut self.source;
        let over = node
            .machine
            .as_ref()
            .is_some_and(SourceMachine::is_finished);
        if over && node.actions.is_empty() && node.jobs.is_empty() {
            node.journal.replace(&[]);
        }
    }

    pub(super) fn expire_target(&mut self) {
        let node = &mut self.target;
        let over = node
            .machine
            .as_ref()
            .is_some_and(TargetMachine::is_finished);
        if self.link.target_thinks || !over || !node.actions.is_empty() || !node.jobs.is_empty() {
            return;
        }
        let kept = target::answer(&node.journal.records());
        node.journal
            .replace(&kept.ok().flatten().unwrap_or_default());
        self.restart_target();
        self.drain();
    }
}
