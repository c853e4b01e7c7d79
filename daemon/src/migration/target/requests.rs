//! What others ask of a migration that comes here.

use std::sync::Arc;

use pageferry_proto::id::{PodUid, WorkloadName};
use pageferry_proto::migration::status::Phase;
use pageferry_proto::migration::target::TargetEvent;
use pageferry_proto::wire::code::{ErrorCode, Failure};

use super::{Operation, TargetDriver, TargetRequest};

impl TargetDriver {
    pub(super) fn requested(&mut self, request: TargetRequest) {
        match request {
            TargetRequest::Abort => self.handle(TargetEvent::AbortRequested),
            TargetRequest::Fence(side) => self.handle(TargetEvent::Fenced(side)),
            TargetRequest::Expect { pod, answer } => {
                // Who has asked may have gone away.
                drop(answer.send(self.expect(pod)));
            }
            TargetRequest::Connected(session) => self.connected(*session),
        }
    }

    /// It is to come as this pod: waits for that, beside the rounds.
    fn expect(&mut self, pod: PodUid) -> Result<(), Failure> {
        let status = self.machine.status(self.clock.now());
        let refused = |code, text: String| Err(Failure::new(code, text));
        match (&self.expected, &status.workload) {
            (Some(expected), _) if *expected == pod => return Ok(()),
            (Some(expected), _) => {
                let text = format!("the migration comes as pod {expected} already");
                return refused(ErrorCode::IdTaken, text);
            }
            (None, Some(WorkloadName::Pod(_))) => {}
            (None, _) => {
                let text = "the migration is none of a pod".to_owned();
                return refused(ErrorCode::UnsupportedWorkload, text);
            }
        }
        if !matches!(status.phase, Phase::Accepted | Phase::Receiving) {
            let text = format!("the migration is {}, and expects no pod", status.phase);
            return refused(ErrorCode::Unexpected, text);
        }
        self.expected = Some(pod.clone());
        self.waiting.push_back(Operation::Expect(pod));
        self.next_operation();
        Ok(())
    }

    /// Says how things stand once more: the driver knows more of it.
    pub(super) fn say_again(&self) {
        let pod_waits = self.pod_waits;
        self.status.send_modify(|progress| {
            Arc::make_mut(progress).waiting = pod_waits;
        });
    }
}
