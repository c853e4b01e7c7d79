//! Stock CRIU, driven by hand, without the daemons: dump, copy, restore.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::criu::{Ends, Passage};
use super::images::{FOLDER, Receiver};
use super::outcome::Outcome;
use super::{Mover, Order};
use crate::lab::Lab;

/// Moves by `criu dump` and `criu restore`, from the link being closed to it being open again.
#[derive(Clone, Copy, Debug)]
pub struct StockCriu;

impl Mover for StockCriu {
    fn name(&self) -> &'static str {
        "criu-stop-copy"
    }

    fn needs_daemons(&self) -> bool {
        false
    }

    fn move_workload(&self, lab: &Lab, order: &Order<'_>) -> Result<Outcome> {
        let mut passage = Passage::begin(lab, order)?;
        let receiver = Receiver::start(passage.target, FOLDER)?;
        passage.close()?;
        if let Err(error) = passage.dump(&[]) {
            return passage.give_up("criu-dump", &error);
        }
        let dumped = Instant::now();
        let wire_bytes = receiver.take(passage.source, passage.target, FOLDER)?;
        let copied = Instant::now();
        passage.restore(&[])?;
        let ends = Ends {
            dumped,
            copied,
            restored: Instant::now(),
        };
        let moved = passage.open("stop-and-copy", wire_bytes, &ends)?;
        Ok(Outcome::moved(moved))
    }

    fn wait_settled(&self, _: &Lab, _: Duration) -> Result<()> {
        // It has nothing left to do when it returns.
        Ok(())
    }
}
