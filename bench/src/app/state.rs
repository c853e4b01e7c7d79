//! The client of the programs that compute: the program counts its steps, and what it holds is a
//! function of the count, so that it can be computed again.
//!
//! | we say | it answers |
//! |---|---|
//! | `state` | steps so far, checksum as it was carried along with each step |
//! | `verify` | the same, and the checksum over all that it holds |

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{App, Proof, Seen};
use crate::client::lines::Wire;
use crate::client::steady::{Asker, Steady};
use crate::lab::Lab;
use crate::workload::{Workload, WorkloadPlan};

/// A program that computes, and who asks it how far it is.
#[derive(Debug)]
pub struct Computing {
    workload: Workload,
    load: Steady<Watcher>,
    replay: fn(u64) -> u64,
}

impl Computing {
    /// Starts one at a node; `replay` is the checksum after so many steps.
    pub fn start(
        lab: &mut Lab,
        node: &str,
        plan: &WorkloadPlan,
        replay: fn(u64) -> u64,
    ) -> Result<Self> {
        let workload = Workload::start(lab, node, plan)?;
        workload.wait_until_it_listens(lab, PORT)?;
        let target = SocketAddr::from((workload.link.address, PORT));
        let watcher = Watcher {
            wire: Wire::open(&lab.client.net, target)?,
            steps: 0,
        };
        let load = Steady::start(vec![watcher], PERIOD)?;
        Ok(Self {
            workload,
            load,
            replay,
        })
    }
}

impl App for Computing {
    fn workload(&mut self) -> &mut Workload {
        &mut self.workload
    }

    fn before_move(&mut self, _: &Lab) -> Result<()> {
        self.load.wait_for_answers(ANSWERS_AROUND)?;
        self.load.mark();
        Ok(())
    }

    fn after_move(&mut self) -> Result<Seen> {
        self.load.wait_for_answers(ANSWERS_AROUND)?;
        Ok(self.load.window().into())
    }

    fn prove(self: Box<Self>, _: &Lab) -> Result<Proof> {
        let (mut watchers, mut wrong) = self.load.finish();
        let watcher = watchers.first_mut().context("there is one client")?;
        let answer = watcher.wire.ask(b"verify\n")?;
        let [steps, carried, held] = numbers(&answer)?;
        if steps < watcher.steps {
            wrong.push(format!("{steps} steps after {}", watcher.steps));
        }
        let right = (self.replay)(steps);
        for (what, sum) in [("carried along", carried), ("over all it holds", held)] {
            if sum != right {
                wrong.push(format!(
                    "the checksum {what} is {sum:016x}, not {right:016x}, after {steps} steps"
                ));
            }
        }
        Ok(Proof {
            text: format!("{steps} steps, checksum {held:016x}, as when computed again"),
            wrong,
        })
    }
}

/// The connection that asks.
#[derive(Debug)]
struct Watcher {
    wire: Wire,
    /// As it was answered last.
    steps: u64,
}

impl Asker for Watcher {
    fn ask(&mut self) -> Result<()> {
        let [steps, _] = numbers(&self.wire.ask(b"state\n")?)?;
        ensure!(
            self.steps <= steps,
            "it went back in time: {steps} steps after {}",
            self.steps
        );
        self.steps = steps;
        Ok(())
    }
}

/// The numbers of an answer, without signs.
pub fn numbers<const N: usize>(answer: &str) -> Result<[u64; N]> {
    let numbers = answer.split(' ').map(str::parse::<u64>);
    let numbers: Option<Vec<u64>> = numbers.map(Result::ok).collect();
    let numbers = numbers.and_then(|numbers| <[u64; N]>::try_from(numbers).ok());
    numbers.with_context(|| format!("it answered {answer:?}"))
}

/// A number that looks random and is a function of `number` (SplitMix64's), as the programs have
/// it.
pub fn mix(number: u64) -> u64 {
    let mut x = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// What the programs multiply by: odd, so that nothing that is lost comes back.
pub const FACTOR: u64 = 6_364_136_223_846_793_005;
/// Where both programs listen.
pub const PORT: u16 = 7450;
const PERIOD: Duration = Duration::from_millis(1);
/// A quarter of a second.
const ANSWERS_AROUND: u64 = 250;
