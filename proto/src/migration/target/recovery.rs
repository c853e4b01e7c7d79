//! A target that was restarted: what its journal proves, and what follows.

use super::state::{Abandon, Absent, Fate, Held, Loss, Refusal, Run, State, Verdict};
use super::{TargetMachine, TargetOrigin};
use crate::migration::handoff::{RecoverError, TargetFacts, is_lost_in_drain};
use crate::migration::record::{AcceptedEntry, DriverState, Entry, Record};
use crate::migration::timer::Time;
use crate::wire::code::{ErrorCode, Failure};

/// Longest driver state that an answer keeps, in bytes: the names of a link or two, and a pid.
pub const ANSWER_STATE_BYTES_MAX: usize = 1 << 10;

/// What must be kept of a target that is finished, in a few hundred bytes, for as long as its
/// source may ask how it ended: records that [`TargetMachine::recover`] makes the same answers
/// from. None if nobody asks any more: nothing was decided here, or the source has settled it.
pub fn answer(records: &[Record]) -> Result<Option<Vec<Record>>, RecoverError> {
    let facts = TargetFacts::from_records(records)?;
    let migration = records.first().ok_or(RecoverError::NoBeginning)?.migration;
    let mut accepted = facts.accepted.ok_or(RecoverError::NoBeginning)?;
    let end = match (facts.running, facts.refused) {
        _ if facts.settled.is_some() => return Ok(None),
        (Some(generation), _) => {
            let running = Entry::Running { generation };
            match facts.aborted {
                // It has run, and is lost.
                Some(failure) if is_lost_in_drain(&failure) => {
                    vec![running, Entry::Aborted(failure), Entry::Done]
                }
                // It may have run, and nobody will know (H-20).
                Some(failure) => vec![running, Entry::Aborted(failure)],
                None => vec![running, Entry::Done],
            }
        }
        (None, Some(generation)) => {
            let unknown = || Failure::new(ErrorCode::Unknown, "no reason was recorded");
            let failure = facts.aborted.unwrap_or_else(unknown);
            vec![Entry::Refused { generation }, Entry::Aborted(failure)]
        }
        (None, None) => return Ok(None),
    };
    if let Some(ready) = facts.ready {
        accepted.state = ready.state;
    }
    if ANSWER_STATE_BYTES_MAX < accepted.state.as_bytes().len() {
        accepted.state = DriverState::default();
    }
    let entries = std::iter::once(Entry::Accepted(accepted)).chain(end);
    let record = |entry| Record { migration, entry };
    Ok(Some(entries.map(record).collect()))
}

impl TargetMachine {
    /// The machine that these records, in the order they were written, leave behind. They must
    /// all be of one migration.
    ///
    /// Before `Ready` nothing is kept. From `Ready` on the last decisive record is written
    /// again, and only then acted upon.
    pub fn recover(records: &[Record], now: Time) -> Result<Self, RecoverError> {
        let facts = TargetFacts::from_records(records)?;
        let id = records.first().ok_or(RecoverError::NoBeginning)?.migration;
        let AcceptedEntry {
            workload,
            peer,
            incarnation,
            state,
        } = facts.accepted.clone().ok_or(RecoverError::NoBeginning)?;
        let origin = TargetOrigin {
            id,
            peer,
            incarnation,
        };
        let mut machine = Self {
            workload: Some(workload),
            driver_state: facts
                .ready
                .as_ref()
                .map_or(state, |ready| ready.state.clone()),
            recorded: true,
            drains: facts.ready.as_ref().is_some_and(|ready| ready.drains),
            settled: facts.settled.is_some(),
            over_at_source: facts.settled,
            failure: facts.aborted.clone(),
            broken: None,
            ..Self::new(origin, now)
        };
        machine.resume(facts);
        machine.report(now);
        Ok(machine)
    }

    fn resume(&mut self, facts: TargetFacts) {
        let over = facts.aborted.is_some();
        let lost = facts.aborted.filter(is_lost_in_drain);
        if let (Some(generation), Some(failure)) = (facts.running, lost) {
            let abandon = match facts.done {
                true => Abandon::Closed,
                false => Abandon::Recording,
            };
            self.state = State::Decided(generation, Fate::Abandoned(abandon));
            if !facts.done {
                self.journal(Entry::Aborted(failure));
            }
        } else if let Some(generation) = facts.running {
            if facts.done {
                self.state = State::Decided(generation, Fate::Running(Run::Closed));
            } else if over {
                self.state = State::Decided(generation, Fate::Lost(Loss::Closed));
            } else {
                self.run(generation);
            }
        } else if let Some(generation) = facts.refused {
            if over {
                self.state = State::Decided(generation, Fate::Refusing(Refusal::Closed));
            } else {
                self.state = State::Decided(generation, Fate::Refusing(Refusal::Recording));
                self.journal(Entry::Refused { generation });
            }
        } else if over {
            self.state = State::Absent(Absent::Closed);
        } else if let Some(entry) = facts.ready {
            let verdict = Verdict::Hold;
            self.state = State::Held(Held::Readying {
                entry: entry.clone(),
                said: true,
                verdict,
            });
            self.journal(Entry::Ready(entry));
        } else {
            let text = "the daemon was restarted before the target was ready";
            self.undo(Failure::new(ErrorCode::Restarted, text), None);
        }
    }
}
