//! Whether a move may begin now: how many go on at the same time.

use super::course::Course;
use super::observed::{Disruption, SourcePod};
use super::record::Why;

impl Course<'_> {
    /// What it has to wait for. Those that came first go first, so that all have their turn.
    pub fn has_no_turn(&self, source: &SourcePod, target: &str) -> Option<Why> {
        let seen = self.observed;
        let limits = seen.limits;
        if limits.per_cluster <= seen.others.len() {
            let text = format!("{} moves go on or come first", seen.others.len());
            return Some(Why::new("ClusterLimit", text));
        }
        for node in [source.node.as_str(), target] {
            let there = seen.others.iter();
            let there = there
                .filter(|other| other.anywhere || other.nodes.iter().any(|one| one == node))
                .count();
            if limits.per_node <= there {
                let text = format!("{there} moves from or to node {node} go on or come first");
                return Some(Why::new("NodeLimit", text));
            }
        }
        // What does not serve is no loss to those who count.
        let mut budgets = seen.budgets.iter().filter(|_| source.ready);
        budgets.find_map(disrupts)
    }
}

/// Whether one more of a budget's pods may be on its way. A pod that moves is not lost, so one may
/// always be, where the budget is kept; but it may become unready for a moment, and so more of them
/// only as the budget lets pods go.
fn disrupts(budget: &Disruption) -> Option<Why> {
    let Disruption {
        name,
        healthy,
        wanted,
        moving,
    } = budget;
    let spare = healthy.saturating_sub(*wanted);
    let text = if healthy < wanted {
        format!("the disruption budget {name} wants {wanted} healthy pods, and has {healthy}")
    } else if spare.max(1) <= *moving {
        format!(
            "{moving} pods of the disruption budget {name} move or come first: it has {healthy} \
             healthy ones, and wants {wanted}"
        )
    } else {
        return None;
    };
    Some(Why::new(DISRUPTION, text))
}

/// The reason of those that wait for a budget. It may never be kept, so that they keep nobody else
/// from having his turn.
pub const DISRUPTION: &str = "DisruptionBudget";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_kept_and_one_pod_alone_moves() {
        let disrupts = |healthy, wanted, moving| {
            let budget = Disruption {
                name: "web".to_owned(),
                healthy,
                wanted,
                moving,
            };
            disrupts(&budget).is_some()
        };
        // A single pod that must always be there moves.
        assert!(!disrupts(1, 1, 0));
        assert!(disrupts(1, 1, 1));
        assert!(!disrupts(3, 2, 0));
        assert!(disrupts(3, 2, 1));
        assert!(!disrupts(5, 2, 2));
        assert!(disrupts(5, 2, 3));
        assert!(disrupts(1, 2, 0));
        assert!(!disrupts(0, 0, 0));
    }
}
