//! What a pager has measured of a restore, as spans of the timeline.

use std::time::Duration;

use pageferry_pager::message::{Course, Restored};
use pageferry_proto::id::MemberIndex;
use pageferry_proto::migration::timeline as names;

use super::Site;
use crate::metrics::Filled;

impl Site {
    /// Keeps how each member's restore went.
    pub(super) fn keep_course(&self, restored: &[Restored]) {
        for (seat, restored) in self.seats.iter().zip(restored) {
            let detail = member_detail(seat.member);
            for (name, between) in spans(&restored.course) {
                self.timeline.keep(name, detail.clone(), between);
            }
        }
    }

    /// Keeps how each member was filled, and counts it.
    pub(super) fn keep_fills(&self) {
        for seat in &self.seats {
            let Some((end, report)) = &seat.fill else {
                continue;
            };
            let begin = end.saturating_sub(report.fill_ms.saturating_mul(1_000_000));
            let detail = member_detail(seat.member);
            self.timeline.keep(names::FILL, detail, (begin, *end));
            self.node.metrics.filled(&Filled {
                took: Duration::from_millis(report.fill_ms),
                pages: report.pages,
                faults: report.faults,
                faults_by_time: &report.faults_by_time,
                fault_time: Duration::from_nanos(report.fault_ns),
            });
        }
    }
}

/// Which member, where there may be others.
fn member_detail(member: MemberIndex) -> String {
    match member.number() {
        0 => String::new(),
        number => number.to_string(),
    }
}

fn spans(course: &Course) -> [(&'static str, (u64, u64)); 5] {
    let Course {
        asked,
        begun,
        first_memory,
        last_memory,
        held,
        probed,
    } = *course;
    // The last userfaultfd may be read after CRIU has said that all is there.
    let last_memory = last_memory.min(held);
    [
        (names::CRIU_BEGIN, (asked, begun)),
        (names::CRIU_TREE, (begun, first_memory)),
        (names::CRIU_MEMORY, (first_memory, last_memory)),
        (names::CRIU_REST, (last_memory, held)),
        (names::PROBE, (held, probed)),
    ]
}
