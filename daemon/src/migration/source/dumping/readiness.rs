//! That a CRIU stands ready when the freeze begins.
//!
//! It is started while rounds are sent and waits, for minutes perhaps. Meanwhile it can be killed:
//! for memory, or by somebody. It has not touched the workload yet, so another one is started, and
//! the migration does not hear of it.

use super::{Dumping, Stage};
use crate::migration::source::dump::DumpError;
use crate::migration::source::failure::criu_failed;
use crate::migration::source::waits::Waits;
use crate::migration::source::workload::Workload;
use crate::migration::text::{chain, internal};
use pageferry_proto::migration::source::Wait;
use pageferry_proto::wire::code::Failure;

/// How often one migration starts CRIU anew. What ends it again and again is no accident.
const RESTARTS_MAX: u32 = 3;

impl Dumping {
    /// Between rounds: starts another CRIU if the one that waits has ended. Does not wait for it.
    pub async fn tend(&mut self, workload: &Workload, waits: &Waits) -> Result<(), Failure> {
        let is_over = match &self.stage {
            Stage::No => false,
            Stage::Preparing(task) => task.is_finished(),
            Stage::Prepared(dump) => dump.holds().is_err(),
        };
        if is_over {
            self.advance(workload, waits).await?;
        }
        Ok(())
    }

    /// Before the freeze: waits until a CRIU waits.
    pub async fn stand_ready(&mut self, workload: &Workload, waits: &Waits) -> Result<(), Failure> {
        while !self.advance(workload, waits).await? {}
        Ok(())
    }

    /// One step towards a CRIU that waits; whether it does.
    async fn advance(&mut self, workload: &Workload, waits: &Waits) -> Result<bool, Failure> {
        let ended = match &mut self.stage {
            Stage::No => {
                self.prepare(workload)?;
                return Ok(false);
            }
            Stage::Preparing(task) => {
                let prepared = waits.on(Wait::Prepared, task).await?;
                self.stage = Stage::No;
                match prepared.map_err(|error| internal(&error))? {
                    Ok(dump) => {
                        self.stage = Stage::Prepared(Box::new(dump));
                        return Ok(false);
                    }
                    // No other one would see more.
                    Err(error @ DumpError::Unseeing { .. }) => return Err(criu_failed(&error)),
                    Err(error) => error,
                }
            }
            Stage::Prepared(dump) => match dump.holds() {
                Ok(()) => return Ok(true),
                Err(ended) => ended,
            },
        };
        if self.restarts == RESTARTS_MAX {
            return Err(criu_failed(&ended));
        }
        self.restarts += 1;
        tracing::warn!(
            root = workload.root(),
            "starting criu again: {}",
            chain(&ended)
        );
        self.prepare(workload)?;
        Ok(false)
    }
}
