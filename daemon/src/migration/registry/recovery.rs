//! What the start of a daemon makes of its journals: every unfinished migration goes on.

use std::collections::BTreeMap;
use std::sync::Arc;

use pageferry_proto::id::MigrationId;
use pageferry_proto::migration::handoff::RecoverError;
use pageferry_proto::migration::record::{Entry as Written, Record};
use pageferry_proto::migration::source::SourceMachine;
use pageferry_proto::migration::target::TargetMachine;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use tokio::sync::{Mutex as AsyncMutex, watch};

use super::{Inner, Origin, Registry, RegistryParts, parse, repeated};
use crate::migration::clock::Clock;
use crate::migration::journal::remains::Remains;
use crate::migration::journal::{Found, Journal};
use crate::migration::source::site::Site as SourceSite;
use crate::migration::target::site::Site as TargetSite;
use crate::migration::text::{chain, internal};

/// One migration of which there is a journal.
struct Known {
    id: MigrationId,
    records: Vec<Record>,
    journal: Journal,
}

impl Registry {
    /// The registry, with every unfinished migration of the journals under way again.
    pub async fn recover(parts: RegistryParts) -> Result<Self, Failure> {
        let found = parts.journals.scan().map_err(|error| internal(&error))?;
        let kept = |what| parts.journals.kept(what).map_err(|error| internal(&error));
        let (answers, outcomes) = (kept(Remains::Answer)?, kept(Remains::Outcome)?);
        let inner = Inner {
            parts,
            entries: std::sync::Mutex::default(),
            beginnings: AsyncMutex::default(),
            departures: AsyncMutex::default(),
            answers: std::sync::Mutex::new(answers.into_iter().collect()),
            outcomes: std::sync::Mutex::new(outcomes.into()),
            refusals: std::sync::Mutex::default(),
        };
        let registry = Self {
            inner: Arc::new(inner),
        };
        let known: Vec<Known> = found.into_iter().map(read).collect::<Result<_, _>>()?;
        let successors = successors(&known)?;
        for one in known {
            let successor = successors.get(&one.id).copied();
            registry.resume(one, successor).await?;
        }
        registry.clean_up().await;
        Ok(registry)
    }

    async fn resume(&self, known: Known, successor: Option<MigrationId>) -> Result<(), Failure> {
        let Known {
            id,
            records,
            journal,
        } = known;
        let (parts, clock) = (&self.inner.parts, Clock::start());
        let origin = Origin::Journal { successor };
        let contradiction = |error: RecoverError| {
            let text = format!("journal of {id}: {error}");
            Failure::new(ErrorCode::JournalFailed, text)
        };
        match records.first().map(|record| &record.entry) {
            // A crash came before the first record: nothing was begun.
            None => parts.journals.remove(id).map_err(|error| internal(&error)),
            Some(Written::Offered(offered)) => {
                let request = repeated::asked(id, offered)?;
                let machine = SourceMachine::recover(&records, clock.now());
                let machine = machine.map_err(contradiction)?;
                let (cancel, cancelled) = watch::channel(false);
                let (node, policy) = (parts.source.clone(), request.policy);
                let state = (machine.driver_state(), machine.is_finished());
                let peer = parts.endpoint.address(&request.target);
                let site = SourceSite::recover(node, id, policy, state, cancelled).await?;
                let site = site.to(peer);
                self.start_source(machine, clock, (site, cancel), journal, request, &origin);
                Ok(())
            }
            Some(_) => {
                let machine = TargetMachine::recover(&records, clock.now());
                let machine = machine.map_err(contradiction)?;
                let node = parts.target.clone();
                let site = TargetSite::recover(node, id, machine.driver_state()).await?;
                self.start_target((machine, clock, site, journal), None, &origin);
                Ok(())
            }
        }
    }
}

fn read(found: Found) -> Result<Known, Failure> {
    let id = found.migration;
    let recovered = found.contents.map_err(|error| {
        // Going on without it could run a workload twice.
        Failure::new(ErrorCode::JournalFailed, chain(&error))
    })?;
    Ok(Known {
        id,
        records: parse(id, &recovered)?,
        journal: recovered.journal,
    })
}

/// Which migration was begun in place of which.
fn successors(known: &[Known]) -> Result<BTreeMap<MigrationId, MigrationId>, Failure> {
    let mut successors = BTreeMap::new();
    for one in known {
        if let Some(Written::Offered(offered)) = one.records.first().map(|record| &record.entry) {
            let asked = repeated::asked(one.id, offered)?.asked;
            successors.extend(asked.instead_of.map(|first| (first, one.id)));
        }
    }
    Ok(successors)
}
