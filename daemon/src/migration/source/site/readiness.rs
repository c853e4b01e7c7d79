//! That a CRIU stands ready when the freeze begins.
//!
//! It is started while rounds are sent and waits, for minutes perhaps. Meanwhile it can be killed:
//! for memory, or by somebody. It has not touched the workload yet, so another one is started, and
//! the migration does not hear of it.

use super::{Dumping, Site};
use crate::migration::source::dump::DumpError;
use crate::migration::source::failure::criu_failed;
use crate::migration::text::{chain, internal};
use pageferry_proto::migration::source::Wait;
use pageferry_proto::wire::code::Failure;

/// How often one migration starts CRIU anew. What ends it again and again is no accident.
const RESTARTS_MAX: u32 = 3;

impl Site {
    /// Between rounds: starts another CRIU if the one that waits has ended. Does not wait for it.
    pub(in crate::migration::source) async fn tend_dump(&mut self) -> Result<(), Failure> {
        let is_over = match &self.dumping {
            Dumping::No => false,
            Dumping::Preparing(task) => task.is_finished(),
            Dumping::Prepared(dump) => dump.holds().is_err(),
        };
        if is_over {
            self.advance_dump().await?;
        }
        Ok(())
    }

    /// Before the freeze: waits until a CRIU waits.
    pub(super) async fn stand_ready(&mut self) -> Result<(), Failure> {
        while !self.advance_dump().await? {}
        Ok(())
    }

    /// One step towards a CRIU that waits; whether it does.
    async fn advance_dump(&mut self) -> Result<bool, Failure> {
        let ended = match &mut self.dumping {
            Dumping::No => {
                self.prepare_dump()?;
                return Ok(false);
            }
            Dumping::Preparing(task) => {
                let prepared = self.waits.on(Wait::Prepared, task).await?;
                self.dumping = Dumping::No;
                match prepared.map_err(|error| internal(&error))? {
                    Ok(dump) => {
                        self.dumping = Dumping::Prepared(Box::new(dump));
                        return Ok(false);
                    }
                    // No other one would see more.
                    Err(error @ DumpError::Unseeing { .. }) => return Err(criu_failed(&error)),
                    Err(error) => error,
                }
            }
            Dumping::Prepared(dump) => match dump.holds() {
                Ok(()) => return Ok(true),
                Err(ended) => ended,
            },
        };
        if self.restarts == RESTARTS_MAX {
            return Err(criu_failed(&ended));
        }
        self.restarts += 1;
        tracing::warn!(root = self.root, "starting criu again: {}", chain(&ended));
        self.prepare_dump()?;
        Ok(false)
    }
}
