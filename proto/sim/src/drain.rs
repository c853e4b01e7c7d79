//! A workload that runs at the target while pages of it are at the source: what both drivers do,
//! and what must never be then.

use std::collections::BTreeMap;

use super::memory::Memory;
use super::node::{SourceJob, SourceWorkload, Stream, TargetWorkload};
use super::oracle::Violation;
use super::sabotage::Sabotage;
use super::world::{World, workload_gone};
use pageferry_proto::id::SpaceId;
use pageferry_proto::migration::absent::{Absent, Ask};
use pageferry_proto::migration::handoff::Side;
use pageferry_proto::migration::ledger::Account;
use pageferry_proto::migration::record::{Entry, Record};
use pageferry_proto::migration::source::SourceEvent;
use pageferry_proto::migration::target::TargetEvent;
use pageferry_proto::page::{PageCount, PageIndex};
use pageferry_proto::set::PageSet;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::control::{Fetch, Message, TargetMessage};

/// Pages that the simulated fill asks for at once.
const FETCH_PAGES: PageCount = PageCount(2);

/// What the workload writes at the target has versions from here on.
const WRITTEN: u32 = 1 << 31;

impl World {
    /// The final round is complete: this is still to come.
    pub(super) fn expect(&mut self, accounts: &[Account]) {
        let held = self.target.store.live();
        let absent = accounts.iter().map(|it| (it.space, it.absent.clone()));
        self.target.absent = Absent::new(absent.collect(), &held);
        self.target.written = Memory::default();
    }

    /// The source's driver is told that the target fetches what it lacks.
    pub(super) fn drain_at_source(&mut self) -> Result<(), Violation> {
        if self.sabotage == Some(Sabotage::KillsAtStarted) {
            self.check_release()?;
        }
        self.source.drain_asked = true;
        if self.source.workload != SourceWorkload::Frozen {
            self.lose_pages();
        }
        Ok(())
    }

    /// The source's driver finds that its copy is not whole.
    pub(super) fn lose_pages(&mut self) {
        let lost = SourceEvent::DrainLost(workload_gone());
        if self.source.drain_asked {
            self.source.jobs.push(SourceJob::Late(lost));
        }
    }

    /// Whether the target's driver has anything to ask for, and whom.
    pub(super) fn can_ask(&self) -> bool {
        self.can_fetch() && !self.target.absent.is_asked()
    }

    fn can_fetch(&self) -> bool {
        let is_there = matches!(
            self.target.workload,
            TargetWorkload::Held | TargetWorkload::Running
        );
        is_there && self.link.up && self.target.machine.is_some()
    }

    /// The fill goes on.
    pub(super) fn ask(&mut self) {
        if let Some(ask) = self.target.absent.next(FETCH_PAGES) {
            self.send_fetch(ask);
        }
    }

    fn send_fetch(&mut self, ask: Ask) {
        let Some(generation) = self.final_generation() else {
            return;
        };
        let message = TargetMessage::Fetch(Fetch {
            generation,
            space: ask.space,
            pages: ask.pages,
            urgent: ask.urgent,
        });
        let bytes = Message::from(message).encode().expect("a small message");
        self.link.to_source.push_back(bytes);
    }

    /// The workload at the target reads a page, or with bit 4 writes it.
    pub(super) fn touch(&mut self, bits: u8) {
        if self.target.workload != TargetWorkload::Running {
            return;
        }
        let (space, page) = (SpaceId(1 + u32::from(bits >> 3 & 1)), u64::from(bits & 7));
        let missing = self.target.absent.missing(space);
        if missing.is_some_and(|missing| missing.contains(PageIndex(page))) {
            if self.can_fetch()
                && let Some(ask) = self.target.absent.fault(space, PageIndex(page))
            {
                self.send_fetch(ask);
            }
        } else if bits & 16 != 0 && self.target.restored.0.version(space, page).is_some() {
            self.target.restored.0.insert(space, page, WRITTEN);
            self.target.written.insert(space, page, WRITTEN);
        }
    }

    /// The source's driver is asked for pages of the frozen copy.
    pub(super) fn answer_fetch(&mut self, fetch: Fetch, failed: bool) {
        match self.source.workload {
            SourceWorkload::Running => {}
            SourceWorkload::Frozen if failed && self.source.drain_asked => {
                self.unread = true;
                self.lose_pages();
            }
            // It is tried again: before that, the driver has nobody to tell.
            SourceWorkload::Frozen if failed => self.source.jobs.push(SourceJob::Fetch(fetch)),
            SourceWorkload::Frozen => {
                let pages = self.source.memory.memory.read(fetch.space, &fetch.pages);
                let space = fetch.space;
                self.put(Stream::Fetched { space, pages });
            }
            SourceWorkload::Maimed | SourceWorkload::Gone => self.lose_pages(),
        }
    }

    /// Pages come that were asked for.
    pub(super) fn fetched(&mut self, space: SpaceId, pages: &[(u64, u32)]) {
        if !matches!(
            self.target.workload,
            TargetWorkload::Held | TargetWorkload::Running
        ) {
            return;
        }
        let arrived = super::intake::set_of(pages);
        let newly = match self.target.absent.arrived(space, &arrived) {
            Ok(newly) => newly,
            Err(error) => {
                let failure = Failure::new(ErrorCode::Unexpected, error.to_string());
                return self.at_target(TargetEvent::Failure(failure));
            }
        };
        let overwrites = self.sabotage == Some(Sabotage::OverwritesWritten);
        for &(page, version) in pages {
            if overwrites || newly.contains(PageIndex(page)) {
                self.target.restored.0.insert(space, page, version);
            }
        }
    }

    /// What was asked for and has not come is asked for again.
    pub(super) fn forget_asked(&mut self) {
        match self.sabotage {
            Some(Sabotage::AsksOnce) => {}
            Some(Sabotage::LosesByLink) if self.target.workload == TargetWorkload::Running => {
                self.at_target(TargetEvent::DrainLost(workload_gone()));
            }
            _ => self.target.absent.disconnected(),
        }
    }

    pub(super) fn filled(&mut self) {
        self.at_target(TargetEvent::Filled);
    }

    /// The target's driver freezes for good what it runs.
    pub(super) fn abandon(&mut self) -> Result<(), Violation> {
        self.demand(
            lost_in_drain(&self.target.journal.durable()),
            "the target abandons what it runs before that is on disk",
        )?;
        if self.target.workload == TargetWorkload::Running
            && self.sabotage != Some(Sabotage::RunsOn)
        {
            self.target.workload = TargetWorkload::Ended;
            self.release_locks(Side::Target);
        }
        Ok(())
    }

    /// Something is about to be written: that pages are lost has a cause.
    pub(super) fn check_lost(&self, side: Side, record: &Record) -> Result<(), Violation> {
        let Entry::Aborted(failure) = &record.entry else {
            return Ok(());
        };
        if failure.code() != ErrorCode::LostInDrain {
            return Ok(());
        }
        let target_gone = self.target.dead || self.target.workload == TargetWorkload::Lost;
        let holds = match side {
            Side::Source => target_gone || lost_in_drain(&self.target.journal.durable()),
            Side::Target => {
                self.source.dead
                    || self.unread
                    || self.source.workload != SourceWorkload::Frozen
                    || target_gone
            }
        };
        self.demand(holds, "the workload is lost in the drain without a cause")
    }

    /// The source is about to kill its copy, of which the target has lacked pages.
    pub(super) fn check_drained(&self) -> Result<(), Violation> {
        if !self.is_drain() {
            return Ok(());
        }
        let theirs = self.target.journal.durable();
        let filled = |record: &Record| matches!(record.entry, Entry::Filled { .. });
        self.demand(
            theirs.iter().any(filled)
                || lost_in_drain(&theirs)
                || self.target.dead
                || self.target.workload == TargetWorkload::Lost,
            "the source kills a copy of which the target lacks pages",
        )
    }

    /// The source is about to run the workload.
    pub(super) fn check_not_drained(&self) -> Result<(), Violation> {
        self.demand(
            !(self.is_drain() && self.has_heard_started()),
            "the source thaws what has run at the target with pages missing",
        )
    }

    /// Whether it is on the source's disk that the workload runs at the target.
    pub(super) fn has_heard_started(&self) -> bool {
        let started = |record: &Record| matches!(record.entry, Entry::Started { .. });
        self.source.journal.durable().iter().any(started)
    }

    /// Whether the commit says that pages were missing.
    pub(super) fn is_drain(&self) -> bool {
        let commit = |record: &Record| matches!(record.entry, Entry::Commit { drains: true, .. });
        self.source.journal.durable().iter().any(commit)
    }

    /// The target says that it has all pages.
    pub(super) fn check_filled(&self) -> Result<(), Violation> {
        let ours = self.target.journal.durable();
        let filled = |record: &Record| matches!(record.entry, Entry::Filled { .. });
        self.demand(
            ours.iter().any(filled),
            "the target says filled before that is on disk",
        )?;
        self.demand(
            self.target.absent.is_empty(),
            "the target says filled while it lacks pages",
        )
    }

    /// The target says that pages are lost.
    pub(super) fn check_said_lost(&self) -> Result<(), Violation> {
        self.demand(
            self.target.workload == TargetWorkload::Lost
                || lost_in_drain(&self.target.journal.durable()),
            "the target says that pages are lost before that is on disk",
        )
    }

    /// Every page that the workload at the target can read is as it was in the freeze, or as it has
    /// written it since; and every other one is still to come.
    pub(super) fn check_pages(&self) -> Result<(), Violation> {
        if self.target.workload != TargetWorkload::Running {
            return Ok(());
        }
        let Some((frozen, _)) = &self.frozen else {
            return self.demand(false, "it runs at the target and was never frozen");
        };
        let present = self.target.restored.0.live();
        for (space, live) in frozen.live() {
            let none = PageSet::new();
            let missing = self.target.absent.missing(space).unwrap_or(&none);
            let present = present.get(&space).unwrap_or(&none);
            self.demand(
                present.union(missing) == live && present.intersection(missing).is_empty(),
                "a page of what runs at the target is neither there nor to come",
            )?;
            for (page, version) in self.target.restored.0.read(space, present) {
                let written = self.target.written.version(space, page);
                let right = written.or_else(|| frozen.version(space, page));
                self.demand(
                    right == Some(version),
                    "what runs at the target reads a page that is not the newest",
                )?;
            }
        }
        let frozen: BTreeMap<SpaceId, PageSet> = frozen.live();
        self.demand(
            present.keys().all(|space| frozen.contains_key(space)),
            "what runs at the target has a space that was not frozen",
        )
    }

    /// The migration has come to its end: what was lost in the drain is known on both sides, and
    /// nothing else is lost.
    pub(super) fn check_drain_end(&self) -> Result<(), Violation> {
        if !self.is_drain() || self.starts == 0 {
            return Ok(());
        }
        let theirs = self.target.journal.durable();
        let runs = self.target.workload == TargetWorkload::Running;
        self.demand(
            !(lost_in_drain(&theirs) && runs),
            "what is lost in the drain runs on",
        )?;
        let filled = |record: &Record| matches!(record.entry, Entry::Filled { .. });
        // What is lost when all of it was there is not lost in the drain.
        if runs || !self.has_heard_started() || theirs.iter().any(filled) {
            return Ok(());
        }
        let code = |side| {
            let status = self.status(side)?;
            Some(status.failure.map(|failure| failure.code()))
        };
        let said = |code: Option<Option<ErrorCode>>| match code {
            // It does not come back, or remembers nothing any more.
            None | Some(None) => self.source.dead || self.target.dead,
            Some(Some(code)) => code == ErrorCode::LostInDrain,
        };
        let target = code(Side::Target);
        let power = self.target.workload == TargetWorkload::Lost;
        self.demand(
            said(code(Side::Source)) && (power || said(target)),
            "what is lost in the drain is not said to be",
        )
    }
}

/// Whether a journal says that pages are lost.
pub(super) fn lost_in_drain(records: &[Record]) -> bool {
    let lost = |record: &Record| {
        matches!(&record.entry, Entry::Aborted(failure)
            if failure.code() == ErrorCode::LostInDrain)
    };
    let refused = |record: &Record| matches!(record.entry, Entry::Refused { .. });
    records.iter().any(lost) && !records.iter().any(refused)
}
