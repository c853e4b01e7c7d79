//! nginx under new connections all the time: no request fails.

use std::net::SocketAddr;

use anyhow::{Result, ensure};

use super::{App, Proof, Seen};
use crate::client::http::Requests;
use crate::lab::Lab;
use crate::workload::{Workload, nginx};

/// nginx and who asks it.
#[derive(Debug)]
struct Nginx {
    workload: Workload,
    requests: Requests,
}

pub fn start(lab: &mut Lab, node: &str) -> Result<Box<dyn App>> {
    let workload = nginx::start(lab, node)?;
    watch(lab, workload)
}

/// Asks an nginx that has just been started.
pub fn watch(lab: &Lab, workload: Workload) -> Result<Box<dyn App>> {
    let target = SocketAddr::from((workload.link.address, nginx::PORT));
    let requests = Requests::start(&lab.client.net, target, CONNECTIONS_PER_SECOND)?;
    Ok(Box::new(Nginx { workload, requests }))
}

impl App for Nginx {
    fn workload(&mut self) -> &mut Workload {
        &mut self.workload
    }

    fn before_move(&mut self, _: &Lab) -> Result<()> {
        let flows = self.requests.wait_for_answers(ANSWERS_AROUND);
        ensure!(flows, "nginx does not answer");
        self.requests.mark();
        Ok(())
    }

    fn after_move(&mut self) -> Result<Seen> {
        let flows = self.requests.wait_for_answers(ANSWERS_AROUND);
        ensure!(flows, "nginx answers no more");
        Ok(Seen {
            blackout: self.requests.silence(),
            pause: self.requests.slowest(),
        })
    }

    fn prove(self: Box<Self>, _: &Lab) -> Result<Proof> {
        let seen = self.requests.finish()?;
        Ok(Proof {
            text: format!(
                "{} right answers, {} failed requests",
                seen.answers, seen.failed
            ),
            wrong: seen.failures,
        })
    }
}

const CONNECTIONS_PER_SECOND: u32 = 300;
/// Two seconds, so that a connection whose first packet was dropped has its answer as well.
const ANSWERS_AROUND: u64 = 600;
