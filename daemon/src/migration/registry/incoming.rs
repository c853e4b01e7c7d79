//! Migrations that come to this node.
//!
//! A session names its migration: it goes to the driver of that migration, or begins one. What
//! begins, and what is forgotten again because it never began, do so one after the other, so that
//! no journal is removed that somebody has just taken up.

use std::sync::Arc;

use pageferry_proto::id::{Incarnation, MigrationId, NodeName};
use pageferry_proto::migration::handoff::Side;
use pageferry_proto::migration::target::{TargetMachine, TargetOrigin};
use pageferry_proto::wire::code::{ErrorCode, Failure};
use tokio::sync::{mpsc, watch};

use super::{Entry, Origin, REQUESTS_MAX, Registry, Requests, parse, random};
use crate::migration::clock::Clock;
use crate::migration::journal::Journal;
use crate::migration::journal::remains::Remains;
use crate::migration::progress::Progress;
use crate::migration::target::site::Site as TargetSite;
use crate::migration::target::{Over, TargetDriver, TargetParts, TargetRequest};
use crate::migration::text::{chain, internal};
use crate::net::lanes::TargetSession;

/// What an incoming migration is driven with.
pub(super) type Driven = (TargetMachine, Clock, TargetSite, Journal);

impl Registry {
    /// Gives a session to the migration it names, or begins a new incoming one.
    pub async fn accept(&self, session: TargetSession) {
        let (id, peer) = (session.migration, session.peer.clone());
        let mut session = Box::new(session);
        let known = self.lock().get(&id).cloned();
        if let Some(Entry {
            status, requests, ..
        }) = known
        {
            let ours = match requests {
                Requests::Target(requests) if status.borrow().status.peer == peer => requests,
                Requests::Target(_) => {
                    tracing::warn!(migration = %id, %peer, "named a migration of another node");
                    return session.lanes.close(ErrorCode::MigrationUnknown);
                }
                // Its id was chosen, and not well.
                Requests::Source(_) => {
                    tracing::warn!(migration = %id, %peer, "named one that leaves this node");
                    return session.lanes.close(ErrorCode::IdTaken);
                }
            };
            match ours.send(TargetRequest::Connected(session)).await {
                Ok(()) => return,
                // It is over, and the source asks once more how it ended.
                Err(mpsc::error::SendError(TargetRequest::Connected(back))) => session = back,
                Err(_) => return,
            }
        }
        let _beginning = self.inner.beginnings.lock().await;
        if let Err((failure, session)) = self.begin_incoming(session).await {
            tracing::warn!(migration = %id, %failure, "refused");
            session.lanes.close(failure.code());
        }
    }

    async fn begin_incoming(
        &self,
        session: Box<TargetSession>,
    ) -> Result<(), (Failure, Box<TargetSession>)> {
        let (id, peer) = (session.migration, session.peer.clone());
        match self.incoming(id, peer).await {
            Ok((driven, origin)) => {
                self.start_target(driven, Some(session), &origin);
                Ok(())
            }
            Err(failure) => Err((failure, session)),
        }
    }

    /// What an incoming migration is driven with: what its journal says, or a beginning.
    async fn incoming(&self, id: MigrationId, peer: NodeName) -> Result<(Driven, Origin), Failure> {
        let parts = &self.inner.parts;
        let clock = Clock::start();
        let is_answer = self.answers().contains(&id);
        let found = match (is_answer, self.lock().contains_key(&id)) {
            (true, _) => {
                let kept = parts.journals.read_kept(Remains::Answer, id);
                Some((kept, Origin::Answer))
            }
            (false, true) => {
                let successor = None;
                Some((parts.journals.read(id), Origin::Journal { successor }))
            }
            (false, false) => None,
        };
        if let Some((recovered, origin)) = found {
            let recovered = recovered.map_err(|error| internal(&error))?;
            let records = parse(id, &recovered)?;
            if !records.is_empty() {
                let machine = TargetMachine::recover(&records, clock.now())
                    .map_err(|error| internal(&error))?;
                if machine.status(clock.now()).peer != peer {
                    return Err(Failure::new(
                        ErrorCode::MigrationUnknown,
                        format!("node {peer} named a migration of another node"),
                    ));
                }
                let state = machine.driver_state();
                let site = TargetSite::recover(parts.target.clone(), id, state).await?;
                return Ok(((machine, clock, site, recovered.journal), origin));
            }
        }
        self.refuse_without_room()?;
        let incoming = self.list();
        let others = incoming.iter().filter(|known| {
            let status = &known.status;
            status.role == Side::Target && !status.phase.is_final() && status.id != id
        });
        if others.count() >= parts.incoming_max {
            return Err(Failure::new(
                ErrorCode::TargetBusy,
                format!(
                    "{} migrations come to this node already",
                    parts.incoming_max
                ),
            ));
        }
        let journal = match parts.journals.create(id) {
            Ok(journal) => journal,
            Err(error) => match parts.journals.read(id) {
                // A beginning that never got as far as its first record.
                Ok(recovered) if recovered.records.is_empty() => recovered.journal,
                Ok(_) | Err(_) => return Err(internal(&error)),
            },
        };
        let site = TargetSite::new(parts.target.clone(), id)?;
        let incarnation = Incarnation(u64::from_le_bytes(random()));
        let origin = TargetOrigin {
            id,
            peer,
            incarnation,
        };
        let machine = TargetMachine::new(origin, clock.now());
        Ok(((machine, clock, site, journal), Origin::Offered))
    }

    pub(super) fn start_target(
        &self,
        (machine, clock, site, journal): Driven,
        session: Option<Box<TargetSession>>,
        origin: &Origin,
    ) {
        let (id, begun) = (machine.id(), journal.begun());
        let recovered = origin.is_recovered();
        let timeline = site.timeline().clone();
        let (status, watched) = watch::channel(Arc::new(Progress {
            recovered,
            pid_at_target: site.root_pid(),
            ..Progress::of(machine.status(clock.now()))
        }));
        let (requests, asked) = mpsc::channel(REQUESTS_MAX);
        let driver = TargetDriver::new(TargetParts {
            machine,
            clock,
            site,
            requests: asked,
            status,
            journal,
            recovered,
        });
        let entry = Entry {
            begun,
            departing: None,
            status: watched,
            timeline,
            requests: Requests::Target(requests.clone()),
            is_answer: matches!(origin, Origin::Answer),
        };
        self.count(&entry);
        self.lock().insert(id, entry);
        let registry = self.clone();
        self.run(async move {
            match driver.run(session).await {
                Over::Begun => {}
                Over::NeverBegun => registry.forget_unbegun(id, &requests).await,
            }
        });
    }

    /// Nobody made an offer, so there is nothing to remember.
    async fn forget_unbegun(&self, id: MigrationId, its: &mpsc::Sender<TargetRequest>) {
        let _beginning = self.inner.beginnings.lock().await;
        {
            let mut entries = self.lock();
            // The source may have come back meanwhile, and have begun it.
            let same = |entry: &Entry| match &entry.requests {
                Requests::Target(requests) => requests.same_channel(its),
                Requests::Source(_) => false,
            };
            if !entries.get(&id).is_some_and(same) {
                return;
            }
            entries.remove(&id);
        }
        match self.inner.parts.journals.remove(id) {
            Ok(()) => tracing::debug!(migration = %id, "was never offered"),
            Err(error) => tracing::warn!("forgetting what was never offered: {}", chain(&error)),
        }
    }
}
